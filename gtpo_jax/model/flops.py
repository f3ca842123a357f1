"""Floating-point operations that a model needs, and what a device can do."""

from collections.abc import Iterable

from gtpo_jax.model.config import ModelConfig

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; by JAX's device_kind.
PEAK = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def matrix_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: the layers' matrices and the head."""
    width, q, kv = config.width, config.heads * config.head_dim, config.kv_heads
    layer = 2 * width * q + 2 * width * kv * config.head_dim + 3 * width * config.hidden
    return config.layers * layer + width * config.vocab_size


def update(config: ModelConfig, lengths: Iterable[int]) -> float:
    """FLOPs of one update on sequences of these lengths: forward and twice as much backward,
    6 for each weight and token, and causal attention's 6 heads h n^2 a layer; nothing for what
    is computed again. With adapters, the frozen weights' gradients are not needed: 4 for 6."""
    lengths = list(lengths)
    per_weight = 4 if config.lora_rank else 6
    attention = 6 * config.layers * config.heads * config.head_dim * sum(n * n for n in lengths)
    return float(per_weight * matrix_weights(config) * sum(lengths) + attention)
