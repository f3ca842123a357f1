"""Shapes of published models, for benchmarks that need no weights."""

import dataclasses

from gtpo_jax.model import transformer, weights
from gtpo_jax.model.config import ModelConfig

# vocabulary, width, layers, heads, kv heads, head width, hidden, context
SHAPES = {
    "tiny": ModelConfig(512, 128, 2, 4, 4, 32, 512, 4096),
    "smollm2-135m": ModelConfig(
        49152, 576, 30, 9, 3, 64, 1536, 8192, rope_theta=1e5, norm_eps=1e-5
    ),
    "qwen2.5-0.5b": ModelConfig(
        151936, 896, 24, 14, 2, 64, 4864, 32768, qkv_bias=True, rope_theta=1e6
    ),
    "qwen3-0.6b": ModelConfig(
        151936, 1024, 28, 16, 8, 128, 3072, 40960, qk_norm=True, rope_theta=1e6
    ),
    "qwen2.5-1.5b": ModelConfig(
        151936, 1536, 28, 12, 2, 128, 8960, 32768, qkv_bias=True, rope_theta=1e6
    ),
    "qwen2.5-7b": ModelConfig(
        152064, 3584, 28, 28, 4, 128, 18944, 32768,
        qkv_bias=True, rope_theta=1e6, tie_embeddings=False,
    ),
}  # fmt: skip


def load(name: str, **fields) -> tuple[ModelConfig, transformer.Params]:
    """Random weights of a shape above, or those of a source that `weights.load` knows; `fields`
    are replaced in its ModelConfig."""
    if name not in SHAPES:
        kinds = {key: fields[key] for key in ("dtype", "param_dtype")}
        config, params = weights.load(name, **kinds)
        return dataclasses.replace(config, **fields), params
    config = dataclasses.replace(SHAPES[name], **fields)
    return config, transformer.init(config, 0)
