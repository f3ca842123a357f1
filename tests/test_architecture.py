"""The three sentences about who may import whom, held against a fresh interpreter's modules."""

import subprocess
import sys

import pytest

RULES = [
    ("gtpo_jax.model.engine", "gtpo_jax.rl"),
    ("gtpo_jax.model.weights", "gtpo_jax.rl"),
    ("gtpo_jax.model.tokenizer", "gtpo_jax.rl"),
    ("gtpo_jax.tools.sandbox", "jax"),
    ("gtpo_jax.tools.toolcall", "jax"),
    ("gtpo_jax.tools.sandbox", "gtpo_jax.model"),
    ("gtpo_jax.tasks", "jax"),
    ("gtpo_jax.tasks", "gtpo_jax.model"),
    # rl/ uses model/ through the engine (sample) and `logprobs` (score) alone.
    ("gtpo_jax.rl.advantages", "gtpo_jax.model"),
    ("gtpo_jax.rl.losses", "gtpo_jax.model"),
    ("gtpo_jax.rl.packing", "gtpo_jax.model"),
    ("gtpo_jax.rl.rewards", "gtpo_jax.model"),
]


@pytest.mark.parametrize(("module", "forbidden"), RULES)
def test_module_does_not_pull_in(module, forbidden):
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    python = [sys.executable, "-c", code]
    loaded = subprocess.run(python, capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded
    assert not [m for m in loaded if m == forbidden or m.startswith(f"{forbidden}.")]
