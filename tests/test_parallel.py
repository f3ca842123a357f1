"""One device, a mesh of four and pmap over four give the same gradients and parameters."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import json, sys
import jax, numpy as np, optax
from gtpo_jax import parallel
from gtpo_jax.model import transformer
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.rl.losses import LOSSES
from gtpo_jax.rl.packing import Segment, pack_segments
from gtpo_jax.rl.update import TrainState, build

config = ModelConfig(61, 32, 2, 4, 2, 8, 48, 64, qk_norm=True)
rng = np.random.default_rng(0)

def segment(i):
    n = int(rng.integers(6, 30))
    turns = np.full(n, -1)
    turns[3:5], turns[n // 2 + 2 :] = 0, 1
    sampled = (turns >= 0).astype(np.float32)
    return Segment((i,), rng.integers(0, 61, n).astype(np.int32), turns.astype(np.int32),
                   rng.normal(size=n).astype(np.float32) * sampled, sampled / 200, -4 * sampled)

batch = pack_segments([segment(i) for i in range(21)], 32, 8)
optimizer = optax.sgd(1.0)
for case, (mapping, count, micro) in json.loads(sys.argv[1]).items():
    devices = parallel.make(mapping, count)
    assert devices.devices == count
    update = build(config, LOSSES[sys.argv[2]], optimizer, devices, micro)
    params = devices.replicate(transformer.init(config, 0))
    before = jax.device_get(params)
    state = TrainState(params, optimizer.init(params), devices.replicate(np.int32(0)))
    scored = batch._replace(old_logprobs=update.score(params, batch))
    state, metrics = update.step(state, scored)
    after = jax.device_get(devices.local(state.params))
    grads = jax.tree.leaves(jax.tree.map(lambda a, b: (a - b).ravel(), before, after))
    np.savez(f"{sys.argv[3]}/{case}.npz", gradient=np.concatenate(grads),
             scores=scored.old_logprobs, **metrics)
"""

CASES = {
    "one": ("mesh", 1, 8),
    "one, micro-batches": ("mesh", 1, 4),
    "mesh": ("mesh", 4, 8),
    "mesh, micro-batches": ("mesh", 4, 4),
    "pmap": ("pmap", 4, 8),
    "pmap, micro-batches": ("pmap", 4, 4),
}


@pytest.mark.parametrize("loss", ["ppo_clip", "gspo"])
def test_same_gradients_on_any_devices(loss, tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CASES), loss, str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    results = {case: dict(np.load(tmp_path / f"{case}.npz")) for case in CASES}
    one = results["one"]
    norm = np.linalg.norm(one["gradient"])
    assert norm > 0.01
    for case, got in results.items():
        difference = np.linalg.norm(got["gradient"] - one["gradient"]) / norm
        assert difference < 1e-5, (case, difference)
        np.testing.assert_allclose(got["scores"], one["scores"], atol=1e-5, err_msg=case)
        for name in ("loss", "tokens", "entropy", "ratio", "grad_norm"):
            np.testing.assert_allclose(got[name], one[name], rtol=1e-4, atol=1e-6, err_msg=case)
