"""Floating-point operations that a model needs, and what devices can do."""

from collections.abc import Iterable
from typing import NamedTuple

from gtpo_jax.model.config import ModelConfig


class Device(NamedTuple):
    """One device, by its maker's data sheet. FLOP/s are dense bfloat16."""

    flops: float  # FLOP/s
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes
    links: float  # bytes/s to other devices, all links and both ways together


GIB = 2**30
DEVICES = {  # by JAX's device_kind
    "NVIDIA H100 80GB HBM3": Device(989e12, 3.35e12, 80 * GIB, 900e9),
    "NVIDIA H200": Device(989e12, 4.8e12, 141e9, 900e9),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 2.04e12, 80 * GIB, 600e9),
    "TPU v4": Device(275e12, 1.23e12, 32 * GIB, 300e9),
    "TPU v5 lite": Device(197e12, 0.82e12, 16 * GIB, 200e9),
    "TPU v5": Device(459e12, 2.77e12, 95 * GIB, 600e9),
    "TPU v6 lite": Device(918e12, 1.64e12, 32 * GIB, 448e9),
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
