"""One device, meshes and pmap over eight give the same gradients and the same parameters."""

import json
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from gtpo_jax import parallel
from gtpo_jax.errors import InputError
from gtpo_jax.model import transformer
from gtpo_jax.model.caches import per_layer
from gtpo_jax.model.config import MATRICES, ModelConfig

SCRIPT = """
import json, sys
import jax, numpy as np, optax
from gtpo_jax import parallel
from gtpo_jax.model import transformer
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.rl.losses import LOSSES
from gtpo_jax.rl.packing import Segment, pack_segments
from gtpo_jax.rl.update import build, start

config = ModelConfig(64, 32, 2, 4, 2, 8, 48, 64, qk_norm=True, qkv_bias=True)
rng = np.random.default_rng(0)

def segment(i):
    n = int(rng.integers(6, 30))
    turns = np.full(n, -1)
    turns[3:5], turns[n // 2 + 2 :] = 0, 1
    if i % 3 == 0:  # uneven: some rows have far fewer tokens that count
        turns[6:] = -1
    sampled = (turns >= 0).astype(np.float32)
    return Segment((i,), rng.integers(0, 64, n).astype(np.int32), turns.astype(np.int32),
                   rng.normal(size=n).astype(np.float32) * sampled, sampled / 200, -4 * sampled)

batch = pack_segments([segment(i) for i in range(21)], 32, 16)
for case, (mapping, count, fsdp, tensor, micro) in json.loads(sys.argv[1]).items():
    devices = parallel.make(mapping, count, fsdp, tensor)
    optimizers = {"sgd": optax.sgd(0.3)}
    if sys.argv[2] == "ppo_clip" and case in ("one", "2,2,2"):
        optimizers["adamw"] = optax.adamw(1e-3)
    for name, optimizer in optimizers.items():
        update = build(config, LOSSES[sys.argv[2]], optimizer, devices, micro)
        state = start(config, transformer.init(config, 0), optimizer, devices)
        def flat():
            leaves = jax.tree.leaves(jax.device_get(state.params))
            return np.concatenate([x.ravel() for x in leaves])

        before, micros = flat(), update.rows(batch)
        old = update.score(state.params, state.frozen, micros)
        micros = [m._replace(old_logprobs=x) for m, x in zip(micros, old)]
        out = {}
        for i in range(3):
            state, metrics = update.step(state, micros)
            if i == 0:
                out = {"gradient": (before - flat()) / 0.3, **jax.device_get(metrics)}
        np.savez(f"{sys.argv[3]}/{case}-{name}.npz", params=flat(), before=before,
                 scores=np.concatenate([devices.fetch(x) for x in old]), **out)
"""

# Each is compiled anew, which takes the time: pieces that two losses share are tried with one.
CASES = {  # mapping, devices, fsdp, tensor, rows of a micro-batch
    "one": ("mesh", 1, 1, 1, 16),
    "one, micro-batches": ("mesh", 1, 1, 1, 8),
    "8,1,1": ("mesh", 8, 1, 1, 16),
    "2,4,1": ("mesh", 8, 4, 1, 8),
    "2,2,2": ("mesh", 8, 2, 2, 8),
    "pmap": ("pmap", 8, 1, 1, 8),
}


def run(arguments, devices=8):
    # Compiling takes the time here, not running.
    flags = (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    )
    out = subprocess.run(
        [sys.executable, "-c", *arguments],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


@pytest.mark.parametrize(
    ("loss", "names"), [("ppo_clip", tuple(CASES)), ("gspo", ("one", "2,2,2", "pmap"))]
)
def test_same_gradients_and_parameters_on_any_devices(loss, names, tmp_path):
    cases = {name: CASES[name] for name in names}
    run([SCRIPT, json.dumps(cases), loss, str(tmp_path)])
    one = np.load(tmp_path / "one-sgd.npz")
    norm, moved = np.linalg.norm(one["gradient"]), np.linalg.norm(one["params"] - one["before"])
    assert norm > 0.01 and moved > 0.001
    for case in cases:
        got = np.load(tmp_path / f"{case}-sgd.npz")
        difference = np.linalg.norm(got["gradient"] - one["gradient"]) / norm
        assert difference < 1e-5, (case, difference)
        apart = np.linalg.norm(got["params"] - one["params"]) / moved
        assert apart < 1e-5, (case, apart)
        np.testing.assert_allclose(got["scores"], one["scores"], atol=1e-5, err_msg=case)
        for name in ("loss", "tokens", "entropy", "ratio", "ratio_max", "grad_norm"):
            np.testing.assert_allclose(got[name], one[name], rtol=1e-4, atol=1e-6, err_msg=case)
    if loss == "ppo_clip":
        # AdamW divides by the root of the second moment: where a gradient is nearly nothing,
        # the order of a sum decides its sign, and with it as much as a step of lr.
        adam = [np.load(tmp_path / f"{case}-adamw.npz")["params"] for case in ("one", "2,2,2")]
        worst = np.abs(adam[0] - adam[1]).max()
        print(f"SGD apart {apart:.1e} of what was moved; AdamW at most {worst:.1e}, lr 1e-3")
        assert worst <= 3 * 2e-3


def test_every_weight_of_every_kind_has_a_rule_and_lies_as_it_says():
    config = ModelConfig(
        64,
        32,
        2,
        4,
        2,
        8,
        48,
        64,
        qkv_bias=True,
        qk_norm=True,
        tie_embeddings=False,
        lora_rank=2,
    )
    mesh = jax.sharding.AbstractMesh((2, 2, 2), parallel.AXES)
    shapes = jax.eval_shape(lambda: transformer.init(config, 0))

    def specs_of(tree):
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(
                parallel.sharding(mesh, path, x.shape).spec
            )
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }

    specs = specs_of(shapes)
    assert specs["embed"] == ("tensor", "fsdp") and specs["head"] == ("fsdp", "tensor")
    assert specs["layers/q/kernel"] == (None, "fsdp", "tensor")
    assert specs["layers/down/kernel"] == (None, "tensor", "fsdp")
    assert specs["layers/k/bias"] == (None, "tensor")
    assert specs["layers/gate/lora_a"] == (None, None, None) == specs["layers/q/lora_a"]
    assert specs["layers/o/lora_a"] == (None, "tensor", "fsdp")
    assert specs["final_norm/scale"] == (None,)
    assert len(specs) == 3 + 4 + 7 + 3 + 14  # outside layers, norms, kernels, biases, adapters
    # An engine's kernels lie as the trained ones do, the other way round.
    engine = specs_of(jax.eval_shape(lambda: per_layer(config, shapes)))
    for name in MATRICES:
        kernel = specs[f"layers/{name}/kernel"]
        assert engine[f"layers/1/{name}/transposed"] == kernel[:0:-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("grid",), "'grid': one of mesh, pmap"),
        (("mesh", 9999), "parallel.devices=9999, but there are"),
        (("mesh", 1, 2, 1), "1 devices do not divide into parallel.fsdp=2 x parallel.tensor=1"),
        (("pmap", 1, 1, 2), "need 'mesh'"),
    ],
)
def test_what_cannot_be_a_mesh_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        parallel.make(*arguments)


def test_a_vocabulary_that_does_not_divide_is_refused_by_name():
    mesh = jax.sharding.AbstractMesh((1, 1, 2), parallel.AXES)
    path = (jax.tree_util.DictKey("embed"),)
    with pytest.raises(InputError, match=r"embed \(61, 32\): 61 .* parallel.tensor=2"):
        parallel.sharding(mesh, path, (61, 32))


def test_shares_are_even_and_keep_their_order():
    assert parallel.shares([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4, 5]]
    assert parallel.shares([1], 3) == [[], [], [1]]


def test_on_a_cpu_two_parts_are_under_way_at_once_and_come_in_order():
    both = threading.Barrier(2, timeout=60)  # broken, and so an error, where one waits alone

    def meet(part):
        both.wait()
        return part * part

    assert list(parallel.make("mesh", 1).each(meet, range(4))) == [0, 1, 4, 9]


def test_an_error_in_one_part_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(parallel.make("mesh", 1).each(lambda part: 1 // part, [1, 0, 1]))


def test_on_several_devices_one_thread_asks_for_every_part():
    devices = parallel.make("mesh", 8, among=jax.devices()[:1] * 8)
    asked = list(devices.each(lambda part: threading.current_thread(), range(3)))
    assert asked == [threading.main_thread()] * 3


ENGINES = """
import functools, json, sys
import jax, numpy as np
from gtpo_jax import parallel
from gtpo_jax.model import sampling, transformer
from gtpo_jax.model.caches import per_layer
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.engine import Engine
from gtpo_jax.model.sampling import Sampling

config = ModelConfig(64, 32, 2, 4, 2, 8, 48, 64, qk_norm=True, qkv_bias=True)
params = transformer.init(config, 0)
numbers = np.arange(3, dtype=np.uint32)
keys = np.asarray(sampling.trajectory_keys(0, 0, numbers, numbers))
out = {}
for name, sizes in {"one": (1, 1, 1), "mesh": (8, 2, 2)}.items():
    devices = parallel.make("mesh", *sizes)
    weights = devices.for_engines(functools.partial(per_layer, config))(devices.place(params))
    meshes = devices.engine_meshes()
    assert len(weights) == len(meshes) == (4 if name == "mesh" else 1)
    engine = Engine(config, 3, 64, (), Sampling(1.0), 2, (2,), (16,), mesh=meshes[-1])
    engine.refresh(weights[-1])  # the last two devices
    engine.prefill([0, 1], [[1, 2, 3, 4], [5, 6]], keys[:2])
    engine.fork([0], [2], [3], keys[2:])
    first = engine.decode([0, 1], 6, [6, 4]) + engine.decode([2], 6, [6])
    engine.append([2], [[7, 8, 9]])
    out[name] = [*first, *engine.decode([2], 5, [5])]
print(json.dumps(out))
"""


def test_an_engine_over_two_devices_samples_what_one_samples():
    out = json.loads(run([ENGINES]).splitlines()[-1])
    assert len(out["one"]) == 4
    for (tokens, logprobs), (others, theirs) in zip(out["one"], out["mesh"], strict=True):
        assert tokens == others and len(tokens) > 1
        np.testing.assert_allclose(logprobs, theirs, atol=1e-5)
