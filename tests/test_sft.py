"""The cold start: what is masked, what is counted, and that the loss falls."""

import numpy as np
import pytest
from pages import metric_keys

from configs import tiny
from gtpo_jax import metrics, sft
from gtpo_jax.model.tokenizer import train_sentencepiece
from gtpo_jax.tasks import arithmetic
from gtpo_jax.tools.toolcall import FORMATS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "spm.model"
    return train_sentencepiece(arithmetic.corpus(0, 500), 384, arithmetic.SYMBOLS, path)


def test_feedback_is_masked_and_the_prompt_weighs_less(tokenizer):
    make = sft.segment_maker(tokenizer, FORMATS["markdown"], "", 0.1, 129)
    trace = next(t for t in arithmetic.traces(0, 200) if len(t.turns) == 3 and not t.flaw)
    segment = make(trace)
    prompt = len(tokenizer.render(trace.problem.messages))
    assert segment.weights[0] == 0 and segment.turn_ids[0] == -1
    np.testing.assert_allclose(segment.weights[1:prompt], 0.1)
    end, place = tokenizer.end_ids[0], prompt
    for j, turn in enumerate(trace.turns):
        sampled = tokenizer.encode(turn.text) + ([end] if j == 2 else [])
        feedback = tokenizer.encode(turn.feedback)
        here = slice(place, place + len(sampled))
        assert segment.tokens[here].tolist() == sampled
        assert (segment.weights[here] == 1).all() and (segment.turn_ids[here] == j).all()
        there = slice(here.stop, here.stop + len(feedback))
        assert segment.tokens[there].tolist() == feedback
        assert (segment.weights[there] == 0).all() and (segment.turn_ids[there] == -1).all()
        place = there.stop
    assert place == len(segment.tokens)


def test_an_unclosed_call_ends_with_the_end_token(tokenizer):
    make = sft.segment_maker(tokenizer, FORMATS["markdown"], "", 0.1, 129)
    trace = next(t for t in arithmetic.traces(0, 500) if t.flaw == "unclosed")
    tokens = make(trace).tokens
    assert list(tokens).count(tokenizer.end_ids[0]) == 2  # of the broken call and of the box


def test_walk_sees_each_row_once_an_epoch_and_weights_sum_to_one(tokenizer):
    make = sft.segment_maker(tokenizer, FORMATS["markdown"], "", 0.1, 129)
    rows = sft.pack_all([make(t) for t in arithmetic.traces(0, 200)], 129)
    count = len(rows.tokens) // 4
    batches = list(sft.walk(rows, 4, 0, count, seed=0))
    seen = np.concatenate([b.tokens for b in batches])
    assert len(np.unique(seen, axis=0)) == 4 * count
    for batch in batches:
        assert batch.weights.sum() == pytest.approx(1, abs=1e-5)


def test_number_mask_is_the_digits_of_turns(tokenizer):
    make = sft.segment_maker(tokenizer, FORMATS["markdown"], "", 0.1, 129)
    trace = next(t for t in arithmetic.traces(0, 50) if not t.flaw)
    rows = sft.pack_all([make(trace)], 129)
    digits = sum(c.isdigit() for turn in trace.turns for c in turn.text)
    assert sft.number_mask(rows, tokenizer).sum() == digits


def test_loss_falls_and_the_run_is_written_down(tmp_path):
    config = tiny.get_config()
    overrides = {
        "sft.steps": 40,
        "sft.traces": 400,
        "sft.check_every": 20,
        "task.eval_count": 8,
        "rollout.slots": 8,
        "model.width": 32,
        "model.hidden": 64,
        "model.head_dim": 8,
        "sandbox.isolation": "process",
        "sandbox.workers": 1,
    }
    config.update_from_flattened_dict(overrides)
    run = tmp_path / "sft"
    sft.run(config, run)
    lines = metrics.read(run)
    steps = [line for line in lines if line["phase"] == "sft"]
    assert [line["step"] for line in steps] == [1, 20, 40]
    assert all(line.keys() == metric_keys("sft") for line in steps)
    assert lines[-1].keys() == metric_keys("eval")
    for name in ("sft/loss", "sft/held_out_loss"):
        losses = [line[name] for line in steps]
        assert losses[2] < losses[1] < losses[0] < 1.1 * np.log(384)
    assert lines[-1]["phase"] == "eval" and 0 <= lines[-1]["eval/accuracy"] <= 1
    assert (run / "model.json").exists() and (run / "tokenizer").is_dir()
