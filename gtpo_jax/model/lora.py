"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + (alpha / rank) (x A) B.

A and B lie beside the kernel they adapt, as `lora_a` [L, in, rank] and `lora_b` [L, rank, out];
they alone are trained, in float32, while W stays in `param_dtype`. Training and engine apply
them unmerged: in bfloat16, W + AB would round away what was learned, and the sampler would not
be the policy that is trained.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gtpo_jax.model.config import ModelConfig

NAMES = ("lora_a", "lora_b")


class Adapted(nn.Module):
    """A dense layer with an adapter. B begins as 0, so that nothing changes at first."""

    features: int
    use_bias: bool
    rank: int
    alpha: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., features]."""
        shape, init = (x.shape[-1], self.features), nn.initializers
        kernel = self.param("kernel", init.lecun_normal(), shape, self.param_dtype)
        a = self.param("lora_a", init.he_uniform(), (shape[0], self.rank), jnp.float32)
        b = self.param("lora_b", init.zeros, (self.rank, shape[1]), jnp.float32)
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        y += (x @ a.astype(self.dtype)) @ b.astype(self.dtype) * (self.alpha / self.rank)
        if self.use_bias:
            bias = self.param("bias", init.zeros, (self.features,), self.param_dtype)
            y += bias.astype(self.dtype)
        return y


def split(config: ModelConfig, params: dict) -> tuple[dict, dict]:
    """What is trained and what is frozen: all and nothing, or the adapters and the rest."""
    if not config.lora_rank:
        return params, {}
    return _only(params, lambda name: name in NAMES), _only(params, lambda n: n not in NAMES)


def join(trained: dict, frozen: dict) -> dict:
    """What `split` has split."""
    both = {
        name: join(trained[name], frozen[name]) if isinstance(trained[name], dict) else None
        for name in trained.keys() & frozen.keys()
    }
    return {**trained, **frozen, **both}


def merged(config: ModelConfig, params: dict) -> dict:
    """The same policy without adapters: W + (alpha / rank) A B, computed in float32."""

    def walk(tree: dict) -> dict:
        if "lora_a" not in tree:
            return {k: walk(v) if isinstance(v, dict) else v for k, v in tree.items()}
        tree = dict(tree)
        a, b = tree.pop("lora_a"), tree.pop("lora_b")
        # An accelerator would round the factors to fewer bits by default.
        change = (config.lora_alpha / config.lora_rank) * jnp.matmul(a, b, precision="highest")
        kernel = tree["kernel"]
        return {**tree, "kernel": (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}

    return walk(params)


def _only(tree: dict, keep) -> dict:
    out = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            part = _only(value, keep)
            if part:
                out[name] = part
        elif keep(name):
            out[name] = value
    return out
