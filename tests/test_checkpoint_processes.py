"""Saves of processes that are killed at any moment, and of several processes together."""

import contextlib
import functools
import multiprocessing
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtpo_jax.checkpoint import Checkpoints, newest_step


def train_until_killed(run, report):
    """Save 4 MB after each step; reports what it resumed, began to save, knows to be saved."""

    @functools.partial(jax.jit, donate_argnums=0)  # as the update does
    def advance(state):
        return {"w": state["w"] + 1.0, "step": state["step"] + 1}

    state = {"w": jnp.arange(1 << 20, dtype=jnp.float32), "step": jnp.int32(0)}
    with Checkpoints(run) as checkpoints:
        if checkpoints.latest() is not None:
            state, cursor = checkpoints.restore(state, 1)
            assert cursor["step"] == state["step"]
        step = int(state["step"])
        right = np.array_equal(state["w"], np.arange(1 << 20, dtype=np.float32) + step)
        report.send(("resumed" if right else "wrong values", step))
        while True:
            state = advance(state)
            step += 1
            report.send(("saving", step))
            checkpoints.save(step, state, {"seed": 1, "step": step})
            report.send(("saved", step - 1))


def test_twenty_kills_lose_no_finished_save(tmp_path, capfd):
    """SIGKILL at random moments, most of them within a save."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "orbax.checkpoint", "pytest"])
    rng = random.Random(0)
    saved, promised, cut_short = 0, 0, 0
    for _ in range(20):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=train_until_killed, args=(tmp_path, theirs))
        process.start()
        theirs.close()
        saves, resumed = rng.randint(1, 4), None
        promised += max(saves - 2, 0)  # a save waits for the one before
        try:
            while resumed is None or saves:
                what, step = ours.recv()
                if what == "resumed":
                    assert step >= saved
                    resumed = step
                elif what == "saving":
                    saves -= 1
                else:
                    assert what == "saved", (what, step)
                    saved = step
            process.join(rng.uniform(0.0, 0.05))  # it doesn't end by itself
        finally:
            process.kill()
            process.join()
        with contextlib.suppress(EOFError):
            while True:
                what, step = ours.recv()
                saved = step if what == "saved" else saved
        cut_short += any((tmp_path / "checkpoints").glob("*tmp*"))
    assert saved >= promised and cut_short >= 5
    assert newest_step(tmp_path) >= saved
    assert "torn" not in capfd.readouterr().out


TOGETHER = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from gtpo_jax.checkpoint import Checkpoints, load_params, newest_step

jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
mesh = jax.make_mesh((4,), ("data",))

def state(step):
    values = np.arange(4000, dtype=np.float32).reshape(400, 10) + step
    def put(spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(values.shape, sharding, lambda i: values[i])
    return {"params": {"sharded": put(P("data")), "replicated": put(P())}}

with Checkpoints(Path(sys.argv[3])) as checkpoints:
    first = 0
    if checkpoints.latest() is not None:
        restored, cursor = checkpoints.restore(state(0), 1)
        first = cursor["step"]
        for got, right in zip(jax.tree.leaves(restored), jax.tree.leaves(state(first))):
            assert got.sharding == right.sharding
            for a, b in zip(got.addressable_shards, right.addressable_shards):
                np.testing.assert_array_equal(a.data, b.data)
    for step in range(first + 1, first + 4):
        checkpoints.save(step, state(step), {"seed": 1, "step": step}, score=1 / step)
like = {"sharded": jax.ShapeDtypeStruct((400, 10), np.float32)}
like["replicated"] = like["sharded"]
params = load_params(Path(sys.argv[3]), {"params": like})["params"]
assert params["sharded"][0, 0] == newest_step(Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_two_processes_save_set_aside_and_restore_together(tmp_path):
    def run_both():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        flags = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", TOGETHER, str(rank), port, str(tmp_path)],
                cwd=Path(__file__).parents[1],
                env={**os.environ, **flags},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        printed = [process.communicate(timeout=120)[0] for process in pair]
        assert [process.returncode for process in pair] == [0, 0]
        return printed

    folder = tmp_path / "checkpoints"
    run_both()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]
    second = max((folder / "3").rglob("ocdbt.process_1/d/*"), key=lambda p: p.stat().st_size)
    second.write_bytes(b"")
    first_said, second_said = run_both()
    assert "3 is torn" in first_said and "is torn" not in second_said
    names = ["1", "3.torn", "4", "5", "removed"]
    assert sorted(path.name for path in folder.iterdir()) == names
