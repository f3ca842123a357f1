"""Two processes of four devices do what one of eight does, sandboxes and all."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from gtpo_jax import metrics

SCRIPT = """
import sys, json, jax, numpy as np
from pathlib import Path
from configs import tiny
from gtpo_jax import train
from gtpo_jax.errors import run_command

processes, process, port = map(int, sys.argv[1:4])
out = Path(sys.argv[4])

def main():
    config = tiny.get_config("gtpo")
    config.steps = config.checkpoint_every = config.eval_every = 2
    config.task.count = 40
    config.task.eval_count = 8
    config.optim.name, config.optim.lr = "adamw", 1e-3
    config.model.hidden = 64
    config.rollout.problems, config.rollout.samples, config.rollout.slots = 8, 2, 2
    config.rollout.max_tokens, config.rollout.max_turns = 40, 2
    config.learn.row_tokens, config.learn.micro_rows = 80, 8
    config.parallel.fsdp = 2
    config.sandbox.workers = 1
    if processes > 1:
        config.parallel.coordinator = f"localhost:{port}"
        config.parallel.processes, config.parallel.process = processes, process
    state = train.run(config, out)
    if jax.process_index() == 0:
        print("sharded over", len(state.params["embed"].sharding.device_set), "devices")

run_command(main)
"""


def start(processes, process, port, out):
    count = 8 // processes
    flags = f"--xla_force_host_platform_device_count={count}"
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, (processes, process, port, out))],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_hosts_train_as_one(tmp_path):
    port, out = free_port(), {}
    for processes in (1, 2):
        run = tmp_path / str(processes)
        started = [start(processes, i, port, run) for i in range(processes)]
        said = [process.communicate(timeout=900)[0] for process in started]
        assert [process.returncode for process in started] == [0] * processes, said
        assert "sharded over 8 devices" in said[0]
        assert all(" train 0" not in text for text in said[1:])  # one of them speaks
        lines = (run / "trajectories.jsonl").read_text().splitlines()
        out[processes] = [json.loads(line) for line in lines], metrics.read(run)
    one, two = out[1], out[2]
    assert len(one[0]) == 8 * 2 * 2  # problems, samples, steps
    for a, b in zip(one[0], two[0], strict=True):
        assert a["problem"] == b["problem"] and a["member"] == b["member"]
        for turn, other in zip(a["turns"], b["turns"], strict=True):
            assert turn["tokens"] == other["tokens"]
            np.testing.assert_allclose(turn["logprobs"], other["logprobs"], atol=1e-4)
            assert turn["advantage"] == pytest.approx(other["advantage"], abs=1e-5)
    for a, b in zip(one[1], two[1], strict=True):
        assert a["phase"] == b["phase"] and a["step"] == b["step"]
        for name in ("train/loss", "train/grad_norm", "train/tokens", "eval/accuracy"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
