"""Plans: bytes by hand, what is sent read from a compiled program's text, refusals."""

import os
import subprocess
import sys

import pytest

from configs import qwen25_7b_math, tiny
from gtpo_jax import build, collectives, parallel, plan
from gtpo_jax.errors import InputError
from gtpo_jax.model import flops
from gtpo_jax.model.config import ModelConfig

HLO = """
HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %x)
}

%inner (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %g = bf16[8,16]{1,0} all-gather(bf16[8,4]{1,0} %p), dimensions={1}
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %r = (f32[10]{0}, f32[2,5]{1,0}) all-reduce(%a, %b), to_apply=%add
  %w = (s32[]) while(%p), condition=%cond, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %s = (f32[4]{0}, f32[16]{0}) all-gather-start(f32[4]{0} %a), dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  ROOT %w = (s32[]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501


def test_what_is_sent_counts_loops_as_often_as_they_go_round():
    assert collectives.sent(HLO) == {
        "all-gather": 16 * 4 + 5 * 3 * (8 * 16 * 2),
        "all-reduce": 5 * (10 * 4 + 10 * 4),
    }
    assert collectives.sent("ENTRY %main () -> f32[] {\n}\n") == {}


def test_flops_by_hand():
    config = ModelConfig(50, 8, 3, 4, 2, 2, 16, 64)
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # q, k and v, o, the MLP
    assert flops.matrix_weights(config) == 3 * layer + 8 * 50
    # Forward: 2 a weight and token, 4 for each pair of tokens and channel, half of them seen.
    attention = 3 * 3 * (4 * 4 * 2 * (5 * 5 + 7 * 7) / 2)
    expected = 3 * 2 * (3 * layer + 400) * 12 + attention
    assert flops.update(config, [5, 7]) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [("v5e", "such as v5e:4x4"), ("gpu:8", "such as v5e:4x4"), ("cpu:x", "cpu:8")],
)
def test_a_topology_that_is_none_is_refused(name, words):
    with pytest.raises(InputError, match=words):
        plan.topology(name)


def test_the_7b_config_describes_the_model():
    config = qwen25_7b_math.get_config()
    model = build.described(config)
    count = flops.matrix_weights(model) + 152064 * 3584  # head and embedding are apart
    assert 7.6e9 < count < 7.63e9


def command(*arguments):
    flags = ["--config=configs/tiny.py", "--topology=cpu:8", *arguments]
    return subprocess.run(
        [sys.executable, "-m", "gtpo_jax.plan", *flags],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_eight_devices_that_are_not_there_are_planned_for():
    done = command("--config.parallel.fsdp=2", "--config.parallel.tensor=2")
    assert done.returncode == 0, done.stderr
    assert "cpu:8: 8 devices" in done.stdout and "4 engines on a host" in done.stdout
    assert "most at a time: fits" in done.stdout
    rows = dict(
        (cell.strip() for cell in line.strip("|").split("|")[:2])
        for line in done.stdout.splitlines()
        if line.startswith("| ")
    )
    for name in ("parameters", "optimiser", "update: activations", "engine: caches"):
        assert name in rows
    assert "all-reduce" in done.stdout and "all-gather" in done.stdout


def test_what_does_not_fit_ends_with_exit_code_1():
    wide = [f"--config.model.{n}={v}" for n, v in {"width": 65536, "layers": 64}.items()]
    done = command(*wide, "--config.rollout.slots=1")
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout


def test_bytes_of_shapes_are_those_of_one_device():
    config = tiny.get_config()
    model = build.described(config)
    # Embedding; q, k, v, o, the MLP, two norms and those of queries and keys; the last norm.
    layer = 4 * 128 * 128 + 3 * 128 * 512 + 2 * 128 + 2 * 32
    expected = 384 * 128 + 2 * layer + 128
    state, _ = plan.abstract_update(config, model, parallel.make("mesh", 1))
    assert plan._bytes(state.params) == 4 * expected
    assert plan._bytes(state.opt_state) == 8 * expected + 2 * 4  # AdamW and its rate count
