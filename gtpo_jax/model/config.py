"""The one description of a decoder: all that differs between families is a field here."""

import dataclasses

from gtpo_jax.errors import InputError

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer
# Name -> what the forward pass of a layer keeps for the backward pass besides its input; the
# rest is computed again. "none" keeps all and is fastest, "full" keeps least.
REMAT = ("none", "matmuls", "full")
# Ways to stretch RoPE -> what each needs, by Hugging Face's names.
LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_SCALING = {"linear": ("factor",), "llama3": ("factor", *LLAMA3)}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a context longer than that of pre-training is reached: `transformer.frequencies`."""

    kind: str
    factor: float
    low_freq_factor: float = 0.0  # these three: of llama3 alone, which needs all of them
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0  # tokens

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALING:
            raise InputError(
                f"model.rope_scaling.kind={self.kind!r}: one of {', '.join(ROPE_SCALING)}"
            )
        for name in ROPE_SCALING[self.kind]:
            value = getattr(self, name)
            if not isinstance(value, int | float) or value <= 0:
                raise InputError(f"model.rope_scaling.{name}={value!r} must be a number > 0")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"model.rope_scaling.low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a decoder-only transformer.

    vocab_size V, width D, `heads` query heads over `kv_heads` key/value heads of `head_dim`,
    `hidden` the SwiGLU width, `max_length` the longest context in tokens. `dtype` is what
    matrix products run in; parameters are kept in `param_dtype`, norms, softmax and
    logprobs are always computed in float32. `unroll` layers are laid out in one iteration of
    the training scan: all of them is fastest for a small model, one compiles fastest.

    `remat` is what the backward pass computes again, by name (REMAT); `lora_rank` > 0 trains
    adapters of that rank on the matrices `lora_targets`, and nothing else (model.lora).
    `one_segment`: a row of training holds one trajectory, not several packed ones.
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
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    unroll: int = 1
    remat: str = "none"
    one_segment: bool = False
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = MATRICES

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
        if self.remat not in REMAT:
            raise InputError(f"model.remat={self.remat!r}: one of {', '.join(REMAT)}")
        if self.lora_rank < 0:
            raise InputError(f"model.lora.rank={self.lora_rank} must be at least 0 (0: none)")
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))  # from JSON: a list
        if isinstance(self.rope_scaling, dict):  # from JSON
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        for name in self.lora_targets:
            if name not in MATRICES:
                raise InputError(f"model.lora.targets: {name!r}: one of {', '.join(MATRICES)}")
