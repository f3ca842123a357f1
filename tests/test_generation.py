"""From a config to an engine: where it stops, and what fits."""

from types import SimpleNamespace

import pytest

from configs import tiny
from gtpo_jax import generation
from gtpo_jax.errors import InputError
from gtpo_jax.model.config import ModelConfig

MODEL = ModelConfig(64, 32, 2, 4, 2, 8, 48, 1024)


class Texts:
    """A vocabulary of these texts; the last is the end token."""

    def __init__(self, *texts):
        self.texts = (*texts, "<end>")
        self.vocab_size, self.end_ids = len(self.texts), (len(texts),)

    def decode(self, ids):
        return "".join(self.texts[i] for i in ids)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        (("\n```",), {"`", "``", "```", "`x", "```\n", "a\n```b", "\n```"}),
        (("</code>",), {">", "e>", "code>", ">=", "</code>"}),
        (("</code>", ""), {">", "e>", "code>", ">=", "</code>"}),
        (("",), set()),
    ],
)
def test_every_token_that_may_complete_a_mark_hands_back(marks, expected):
    texts = ["`", "``", "```", "`x", "```\n", "a\n```b", "\n```", "\n``", "x`", "\n"]
    texts += [">", "e>", "code>", ">=", "</code>", "</code", "a>", "d", ""]
    tokenizer = Texts(*texts)
    stops = generation.stop_ids(tokenizer, marks)
    assert {tokenizer.texts[i] for i in stops} == expected | {"<end>"}


def policy():
    return SimpleNamespace(config=MODEL, tokenizer=Texts("a", "b"))


def test_slots_are_as_many_as_memory_holds_where_none_are_named(monkeypatch):
    config = tiny.get_config()
    token = 2 * 2 * 2 * 8 * 4  # bytes: keys and values, layers, heads, width, float32
    # Embeddings, then q, k, v, o, three of the MLP and two norms a layer, and the last norm.
    weights = 4 * (64 * 32 + 2 * (1024 + 512 + 512 + 1024 + 3 * 32 * 48 + 64) + 32)
    monkeypatch.setattr(
        generation, "free_bytes", lambda *_: weights + int(1.5 * 100.5 * 160 * token)
    )
    config.rollout.slots = 0
    assert generation.engine(config, policy()).slots == 100
    config.rollout.cache_dtype = "bfloat16"
    assert generation.engine(config, policy()).slots == 16 * 8  # all there are
    config.rollout.cache_dtype, config.rollout.slots, config.rollout.width = "", 96, 32
    engine = generation.engine(config, policy())
    assert (engine.slots, engine.width) == (96, 32)


def test_slots_that_do_not_fit_are_refused_with_what_to_lower(monkeypatch):
    config = tiny.get_config()
    monkeypatch.setattr(generation, "free_bytes", lambda *_: 2**22)
    with pytest.raises(InputError, match="128 slots of 160 tokens") as error:
        generation.engine(config, policy())
    for name in ("4 MiB, 67 do", "rollout.max_tokens", "cache_dtype=bfloat16"):
        assert name in str(error.value)
    monkeypatch.setattr(generation, "free_bytes", lambda *_: 2**10)
    config.rollout.slots = 0
    with pytest.raises(InputError, match=r"1 slots of 160 .* 0 do"):
        generation.engine(config, policy())
