"""What a save withstands: Ctrl-C, torn folders, full disks, other devices, other models."""

import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gtpo_jax.checkpoint import Checkpoints, best_step, load_params, newest_step
from gtpo_jax.errors import InputError


def test_ctrl_c_within_a_save_waits_for_its_end(tmp_path, monkeypatch):
    state = {"params": jnp.arange(3.0)}
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path) as checkpoints:
        save, close = checkpoints._manager.save, checkpoints._manager.close

        def interrupted(act):
            def call(*arguments, **options):
                signal.raise_signal(signal.SIGINT)
                return act(*arguments, **options)

            return call

        monkeypatch.setattr(checkpoints._manager, "save", interrupted(save))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(4, state, {"seed": 1, "step": 4})
        monkeypatch.setattr(checkpoints._manager, "close", interrupted(close))
    assert newest_step(tmp_path) == 4
    with Checkpoints(tmp_path) as again:
        restored, cursor = again.restore(state, seed=1)
    np.testing.assert_array_equal(restored["params"], [0.0, 1.0, 2.0])
    assert cursor["step"] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class TrainState(NamedTuple):
    params: dict
    opt_state: tuple


def state_of(step, size=1000):
    """Two arrays, one of them long enough for a file of its own, and a count."""
    values = np.random.default_rng(step).standard_normal(size).astype(np.float32)
    params = {"kernel": jnp.asarray(values), "bias": jnp.full(3, step, jnp.bfloat16)}
    return {"params": params, "count": jnp.int32(step)}


def cursor_of(step):
    return {"seed": 1, "step": step, "consumed": 10 * step}


def save_all(run, steps, scores=None, keep=2):
    with Checkpoints(run, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), cursor_of(step), (scores or {}).get(step))


def restored(run):
    with Checkpoints(run) as checkpoints:
        return checkpoints.restore(state_of(0), seed=1)


def assert_is(state, step):
    expected = state_of(step, state["params"]["kernel"].size)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def on_disk(run):
    paths = [path for path in (run / "checkpoints").iterdir() if path.name != "removed"]
    return sorted(path.name for path in paths)


def test_the_newest_and_the_best_are_kept(tmp_path):
    save_all(tmp_path, [1, 2], {1: None, 2: 0.5})
    save_all(tmp_path, [3, 4, 5], {3: 0.75, 4: 0.75, 5: 0.25})  # as a run that is resumed
    save_all(tmp_path, [6, 7], {6: 0.75})
    assert on_disk(tmp_path) == ["3", "6", "7"]
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest(), checkpoints.best()) == (7, 3)
        state, cursor = checkpoints.restore(state_of(0), seed=1)
        assert cursor == {**cursor_of(7), "score": None}
    assert_is(state, 7)
    like = jax.eval_shape(lambda: state_of(0)["params"])
    for which, step in {"newest": 7, "best": 3}.items():
        params = load_params(tmp_path, {"params": like}, which)["params"]
        assert isinstance(params["kernel"], np.ndarray)
        jax.tree.map(np.testing.assert_array_equal, params, state_of(step)["params"])


def test_without_scores_only_the_newest_are_kept(tmp_path):
    save_all(tmp_path, [1, 2, 3, 4])
    assert on_disk(tmp_path) == ["3", "4"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best() is None
    with pytest.raises(InputError, match="has a score"):
        load_params(tmp_path, {"params": state_of(0)["params"]}, "best")


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"missing": Path.unlink, "empty": lambda path: path.write_bytes(b""), "cut": cut_off}


def test_no_file_missing_or_cut_short_gives_wrong_values(tmp_path, capfd):
    """Either the file is not needed or the checkpoint before is used, the torn one aside."""
    whole = tmp_path / "whole"
    save_all(whole, [1, 2], {1: 0.5, 2: 0.25})
    checkpoint = whole / "checkpoints" / "2"
    files = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()]
    fell_back = set()
    for file in files:
        for how, damage in DAMAGES.items():
            run = tmp_path / f"{len(fell_back)}_{file.name}_{how}"
            shutil.copytree(whole, run)
            torn = run / "checkpoints" / "2"
            damage(torn / file)
            capfd.readouterr()
            state, cursor = restored(run)
            assert_is(state, cursor["step"])
            if cursor["step"] == 2:
                continue
            fell_back.add(file)
            (line,) = capfd.readouterr().out.splitlines()
            assert line.startswith(f"{torn} is torn (") and line.endswith("renamed to 2.torn")
            assert on_disk(run) == ["1", "2.torn"]
            save_all(run, [2])
            assert_is(restored(run)[0], 2)
            assert on_disk(run) == ["1", "2", "2.torn"]
    assert {"cursor/metadata", "state/_METADATA", "state/manifest.ocdbt"} <= set(
        map(str, fell_back)
    )
    assert any("ocdbt.process_0/d" in str(file) for file in fell_back)  # the arrays


def tear(run, step):
    cut_off(run / "checkpoints" / str(step) / "cursor" / "metadata")


def test_a_reader_passes_over_what_is_torn_and_touches_nothing(tmp_path, capsys):
    save_all(tmp_path, [1, 2, 3], {1: 0.5, 2: 0.25, 3: 0.75}, keep=3)
    tear(tmp_path, 3)
    assert newest_step(tmp_path) == 2
    assert best_step(tmp_path) == 1
    assert "3 is torn (cursor/metadata is cut short) and passed over" in capsys.readouterr().out
    params = load_params(tmp_path, {"params": state_of(0)["params"]})["params"]
    jax.tree.map(np.testing.assert_array_equal, params, state_of(2)["params"])
    assert on_disk(tmp_path) == ["1", "2", "3"]


def test_where_all_are_torn_an_error_names_them_and_nothing_is_touched(tmp_path):
    save_all(tmp_path, [1, 2])
    tear(tmp_path, 1)
    tear(tmp_path, 2)
    for _ in range(2):
        with pytest.raises(InputError) as error:
            Checkpoints(tmp_path)
        assert f"{tmp_path}/checkpoints/1 (cursor/metadata" in str(error.value)
        assert f"{tmp_path}/checkpoints/2 (cursor/metadata" in str(error.value)
        assert "\n" not in str(error.value)
        assert on_disk(tmp_path) == ["1", "2"]
    with pytest.raises(InputError, match="no checkpoint is whole"):
        load_params(tmp_path, {"params": state_of(0)["params"]})


# Orbax abandons its other reads when one fails, and Python complains of each.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_altered_bytes_are_an_error_of_one_line(tmp_path):
    save_all(tmp_path, [1, 2])
    largest = max((tmp_path / "checkpoints" / "2").rglob("d/*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))
    with pytest.raises(InputError, match=r"2 can't be read .*move it away") as error:
        restored(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_a_kill_left_over_is_removed_with_a_line(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    (folder / "4.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / "removed" / "1" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
    assert capsys.readouterr().out.splitlines() == [
        f"removed {folder}/{name}, which a process that was killed left over"
        for name in ("4.orbax-checkpoint-tmp", "removed/1")
    ]
    assert on_disk(tmp_path) == [] and not list((folder / "removed").iterdir())


def test_another_model_or_optimiser_is_named_in_one_line(tmp_path):
    def state(width, optimizer, dtype=jnp.float32):
        params = {"block": {"kernel": jnp.zeros((3, width), dtype)}, "norm": jnp.ones(3)}
        return TrainState(params, optimizer.init(params))

    adam, sgd = optax.adam(1e-3), optax.sgd(1e-3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(4, adam), cursor_of(1))
    refused = {
        "params.block.kernel is float32[3, 4] there and float32[3, 8] here": state(8, adam),
        "params.block.kernel is float32[3, 4] there and bfloat16[3, 4] here": state(
            4, adam, jnp.bfloat16
        ),
        "opt_state.0.count is int32[] there and missing here": state(4, sgd),
        "opt_state.0.trace.block.kernel is missing there and float32[3, 4] here": state(
            4, optax.sgd(1e-3, momentum=0.9)
        ),
    }
    with Checkpoints(tmp_path) as checkpoints:
        for message, like in refused.items():
            with pytest.raises(InputError) as error:
                checkpoints.restore(like, seed=1)
            path = tmp_path / "checkpoints" / "1"
            assert str(error.value) == f"{path} is of another model or optimiser: {message}"
        with pytest.raises(InputError, match="seed 1 and can't go on with seed 2"):
            checkpoints.restore(state(4, adam), seed=2)
    params = state(4, sgd).params
    assert load_params(tmp_path, {"params": params})["params"]["norm"].tolist() == [
        1.0,
        1.0,
        1.0,
    ]
    del params["norm"]
    with pytest.raises(InputError, match=r"params.norm is float32\[3\] there and missing here"):
        load_params(tmp_path, {"params": params})


@pytest.fixture(params=["tmpfs", "rlimit"])
def disk(request, tmp_path):
    """(folder, fill, free): after fill() nothing of 0.6 MB can be written, until free()."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "rlimit":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        free = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, before)
        yield (
            folder,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1])),
            free,
        )
        free()
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount here")
    ballast = folder / "ballast"

    def fill():
        rest = shutil.disk_usage(folder).free - (1 << 19)
        ballast.write_bytes(bytes(rest))

    yield folder, fill, ballast.unlink
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_costs_the_save_and_not_the_run(disk, capfd):
    run, fill, free = disk
    size = 200_000  # 0.8 MB, more than is left
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(1, state_of(1, size), cursor_of(1))
        checkpoints.save(2, state_of(2, size), cursor_of(2))
        checkpoints.wait()
        fill()
        checkpoints.save(3, state_of(3, size), cursor_of(3))
        checkpoints.save(4, state_of(4, size), cursor_of(4))
        checkpoints.wait()
        assert [name for name in on_disk(run) if name != "ballast"] == ["2"]
        free()
        checkpoints.save(5, state_of(5, size), cursor_of(5))
        checkpoints.save(6, state_of(6, size), cursor_of(6))
    assert on_disk(run) == ["6"]
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert [line.split(" could not be written (")[0] for line in lines] == [
        f"{run}/checkpoints/3",
        f"{run}/checkpoints/4",
    ]
    assert all(line.endswith("); step 2 stays the last one saved") for line in lines)
    assert "Traceback" not in err
    with Checkpoints(run) as checkpoints:
        assert_is(checkpoints.restore(state_of(0, size), seed=1)[0], 6)

    with (
        pytest.raises(InputError, match=r"9 could not be written .*goes on from step 6"),
        Checkpoints(run, keep=1) as checkpoints,
    ):
        fill()
        checkpoints.save(9, state_of(9, size), cursor_of(9))
    with pytest.raises(ZeroDivisionError), Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(9, state_of(9, size), cursor_of(9))
        raise ZeroDivisionError
    assert on_disk(run) == ["6"]
    free()


DEVICES = """
import sys, jax, numpy as np
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec as P
from gtpo_jax.checkpoint import Checkpoints, load_params
assert jax.device_count() == 8
first = jax.make_mesh((4, 2), ("data", "tensor"))
second = jax.make_mesh((2, 4), ("data", "tensor"))
values = np.arange(32 * 16, dtype=np.float32).reshape(32, 16)

def put(sharding, array=values):
    return {"params": {"w": jax.device_put(array, sharding)}}

ways = {
    "sharded": NamedSharding(first, P("data", "tensor")),
    "other mesh": NamedSharding(second, P("tensor", "data")),
    "replicated": NamedSharding(first, P()),
    "one device": jax.sharding.SingleDeviceSharding(jax.devices()[3]),
}
runs = Path(sys.argv[1])
for name, sharding in ways.items():
    with Checkpoints(runs / name) as checkpoints:
        checkpoints.save(1, put(sharding), {"seed": 1, "step": 1})
for name in [*ways, "from one"]:
    for sharding in ways.values():
        with Checkpoints(runs / name) as checkpoints:
            state, _ = checkpoints.restore(put(sharding, 0 * values), 1)
        got = state["params"]["w"]
        assert got.sharding == sharding, (name, got.sharding, sharding)
        np.testing.assert_array_equal(got, values)
"""


def test_a_run_goes_on_with_other_devices(tmp_path):
    """8 -> 8 on another mesh, 8 -> 1 and 1 -> 8; sharded, replicated and on one device."""
    values = np.arange(32 * 16, dtype=np.float32).reshape(32, 16)
    state = {"params": {"w": jnp.asarray(values)}}
    with Checkpoints(tmp_path / "from one") as checkpoints:
        checkpoints.save(1, state, {"seed": 1, "step": 1})
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", DEVICES, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        check=True,
    )
    like = jax.tree.map(jnp.zeros_like, state)
    for run in ("sharded", "other mesh", "replicated", "one device"):
        with Checkpoints(tmp_path / run) as checkpoints:
            got = checkpoints.restore(like, 1)[0]["params"]["w"]
        assert got.sharding == like["params"]["w"].sharding
        np.testing.assert_array_equal(got, values)
        shapes = {"params": jax.eval_shape(lambda: state["params"])}
        params = load_params(tmp_path / run, shapes)["params"]
        np.testing.assert_array_equal(params["w"], values)
