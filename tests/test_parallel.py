"""One device, a mesh of four and pmap over four give the same gradients and parameters."""

import json
import os
import subprocess
import sys

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

mapping, devices, micro, loss = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
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
devices = parallel.make(mapping, devices)
assert devices.devices == int(sys.argv[2])
optimizer = optax.sgd(1.0)
update = build(config, LOSSES[loss], optimizer, devices, micro)
params = devices.replicate(transformer.init(config, 0))
before = jax.device_get(params)
state = TrainState(params, optimizer.init(params), devices.replicate(np.int32(0)))
batch = batch._replace(old_logprobs=update.score(params, batch))
state, metrics = update.step(state, batch)
after = jax.device_get(devices.local(state.params))
grads = jax.tree.leaves(jax.tree.map(lambda a, b: (a - b).ravel(), before, after))
np.save(sys.argv[5], np.concatenate(grads))
np.save(sys.argv[5] + "-scores", batch.old_logprobs)
print(json.dumps({k: float(v) for k, v in metrics.items()}))
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
    import numpy as np

    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    results = {}
    for case, (mapping, devices, micro) in CASES.items():
        path = str(tmp_path / case.replace(" ", "-").replace(",", ""))
        arguments = [mapping, str(devices), str(micro), loss, path]
        out = subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert out.returncode == 0, out.stderr[-2000:]
        results[case] = (
            np.load(path + ".npy"),
            np.load(path + "-scores.npy"),
            json.loads(out.stdout.splitlines()[-1]),
        )
    gradient, scores, metrics = results["one"]
    assert np.linalg.norm(gradient) > 0.01
    for case, (other, other_scores, other_metrics) in results.items():
        difference = np.linalg.norm(other - gradient) / np.linalg.norm(gradient)
        assert difference < 1e-5, (case, difference)
        np.testing.assert_allclose(other_scores, scores, atol=1e-5, err_msg=case)
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6), case
