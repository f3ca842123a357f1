"""The one description of a decoder: all that differs between families is a field here."""

import dataclasses

from gtpo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a decoder-only transformer.

    vocab_size V, width D, `heads` query heads over `kv_heads` key/value heads of `head_dim`,
    `hidden` the SwiGLU width, `max_length` the longest context in tokens. `dtype` is what
    matrix products run in; parameters are kept in `param_dtype`, norms, softmax and
    logprobs are always computed in float32. `unroll` layers are laid out in one iteration of
    the training scan: all of them is fastest for a small model, one compiles fastest.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    max_length: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    unroll: int = 1

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise InputError(
                f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"model.head_dim={self.head_dim} must be even: RoPE turns pairs")
        for field in ("dtype", "param_dtype"):
            if getattr(self, field) not in ("float32", "bfloat16"):
                raise InputError(
                    f"model.{field}={getattr(self, field)!r}: one of 'float32', 'bfloat16'"
                )
