"""The families of models: what config.json says of them, and what their tensors are called.

One set of tables, read in both directions: by `model.weights` to load and to save. To add a
family that this decoder computes:

1. FAMILIES: its `model_type`, the class of `transformers` that is the model, and where it
   differs from Llama, as fields of ModelConfig. A computation that no field describes is a new
   field first, and a line in `transformer.Block`.
2. ONLY: settings of its config.json that would change the numbers; other values are refused.
3. NAMES and `shapes`: a line for each tensor that it has and the others have not. Where a
   family has other names altogether, they are a column beside HF.
4. MODELS in tests/model/random_models.py: a line there has it compared with `transformers`
   (logits, gradients), exported and read back.
"""

import dataclasses
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

from gtpo_jax.errors import InputError
from gtpo_jax.model.config import ROPE_SCALING, ModelConfig, RopeScaling


class Family(NamedTuple):
    architecture: str  # the class of transformers
    fields: dict[str, Any]  # where it differs from Llama


# By model_type; SmolLM2 is a Llama. A ModelConfig is exported as the first that it fits.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", {}),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}),
}

# Fields of ModelConfig and their keys in config.json.
KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "max_length": "max_position_embeddings",
}
# The same where config.json may leave them out, with what they are then; a function makes it
# from the fields above.
OPTIONAL = {
    "kv_heads": ("num_key_value_heads", lambda fields: fields["heads"]),
    "head_dim": ("head_dim", lambda fields: fields["width"] // fields["heads"]),
    "norm_eps": ("rms_norm_eps", lambda _: 1e-6),
    "tie_embeddings": ("tie_word_embeddings", lambda _: False),
}

# Settings of config.json that change the computation, and the one value that is computed here.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "quantization_config": None,
}

# Path in the tree -> (Hugging Face's name, llama.cpp's name), within its layer or outside all.
NAMES = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm/scale": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
    "layers/attn_norm/scale": ("input_layernorm.weight", "attn_norm.weight"),
    "layers/q/kernel": ("self_attn.q_proj.weight", "attn_q.weight"),
    "layers/q/bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "layers/q_norm/scale": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "layers/k/kernel": ("self_attn.k_proj.weight", "attn_k.weight"),
    "layers/k/bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "layers/k_norm/scale": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "layers/v/kernel": ("self_attn.v_proj.weight", "attn_v.weight"),
    "layers/v/bias": ("self_attn.v_proj.bias", "attn_v.bias"),
    "layers/o/kernel": ("self_attn.o_proj.weight", "attn_output.weight"),
    "layers/mlp_norm/scale": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "layers/gate/kernel": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "layers/up/kernel": ("mlp.up_proj.weight", "ffn_up.weight"),
    "layers/down/kernel": ("mlp.down_proj.weight", "ffn_down.weight"),
}
HF, GGUF = 0, 1  # columns of NAMES and LAYER
LAYER = ("model.layers.{}.", "blk.{}.")


class Place(NamedTuple):
    """Where a file's tensor lies in the tree, and its shape in the file."""

    path: str
    layer: int | EllipsisType  # ...: outside all layers
    shape: tuple[int, ...]


def from_hf(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """config.json -> fields of ModelConfig. InputError on what is not computed here."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{file}: model_type={family!r}: one of {', '.join(FAMILIES)}")
    # transformers 5 writes rope_parameters; before, rope_scaling stood next to rope_theta.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    for key, only in ONLY.items():
        value = raw.get(key, rope.get(key, only))
        if value not in (None, only):
            raise InputError(f"{file}: {key}={value!r} is not supported, only {only!r}")
    for kind in raw.get("layer_types") or ():
        if kind != "full_attention":
            raise InputError(
                f"{file}: layer_types has {kind!r}, which is not supported, only "
                "'full_attention'"
            )
    fields = {field: need(raw, key, file) for field, key in KEYS.items()}
    for field, (key, default) in OPTIONAL.items():
        value = raw.get(key)
        fields[field] = default(fields) if value is None else value
    return {
        **fields,
        "rope_theta": float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        "rope_scaling": _rope_scaling(rope, file),
        **FAMILIES[family].fields,
    }


def _rope_scaling(rope: dict[str, Any], file: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ROPE_SCALING:
        raise InputError(
            f"{file}: RoPE scaling {kind!r} is not supported, only 'default', "
            f"{', '.join(map(repr, ROPE_SCALING))}"
        )
    numbers = {key: need(rope, key, f"{file}: rope_scaling") for key in ROPE_SCALING[kind]}
    return RopeScaling(kind, **numbers)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of the model; transformers 4 and 5 both read this form."""
    plain = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    switches = {name: plain[name] for f in FAMILIES.values() for name in f.fields}
    ours = {name: getattr(config, name) for name in switches}
    fitting = [name for name, f in FAMILIES.items() if switches | f.fields == ours]
    if not fitting:
        said = ", ".join(f"model.{name}={value}" for name, value in ours.items())
        raise InputError(f"{said}: no family has this; one of {', '.join(FAMILIES)}")
    s = config.rope_scaling
    scaling = s and {"rope_type": s.kind, **{k: getattr(s, k) for k in ROPE_SCALING[s.kind]}}
    keys = KEYS | {field: key for field, (key, _) in OPTIONAL.items()}
    return {
        "architectures": [FAMILIES[fitting[0]].architecture],
        "model_type": fitting[0],
        **{key: getattr(config, field) for field, key in keys.items()},
        "hidden_act": ONLY["hidden_act"],
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path in the tree -> shape, without the leading layer axis."""
    width, q, kv = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim
    out = {
        "embed": (c.vocab_size, width),
        "final_norm/scale": (width,),
        "layers/attn_norm/scale": (width,),
        "layers/q/kernel": (width, q),
        "layers/k/kernel": (width, kv),
        "layers/v/kernel": (width, kv),
        "layers/o/kernel": (q, width),
        "layers/mlp_norm/scale": (width,),
        "layers/gate/kernel": (width, c.hidden),
        "layers/up/kernel": (width, c.hidden),
        "layers/down/kernel": (c.hidden, width),
    }
    if c.qkv_bias:
        out |= {"layers/q/bias": (q,), "layers/k/bias": (kv,), "layers/v/bias": (kv,)}
    if c.qk_norm:
        out |= dict.fromkeys(("layers/q_norm/scale", "layers/k_norm/scale"), (c.head_dim,))
    if not c.tie_embeddings:
        out["head"] = (width, c.vocab_size)
    return out


def places(config: ModelConfig, column: int) -> dict[str, Place]:
    """Name in the file -> its place, for every tensor of the model, layer by layer."""
    # Files keep matrices as [out, in]; only the embedding already lies as it does here.
    stored = {p: s if p == "embed" else s[::-1] for p, s in shapes(config).items()}
    inside = [path for path in stored if path.startswith("layers/")]
    outside = [path for path in stored if path not in inside]
    out = {NAMES[path][column]: Place(path, ..., stored[path]) for path in outside}
    for layer in range(config.layers):
        for path in inside:
            name = LAYER[column].format(layer) + NAMES[path][column]
            out[name] = Place(path, layer, stored[path])
    return out


def need(mapping: dict, key: str, where: str | Path) -> Any:
    """mapping[key]; InputError where it is missing or null."""
    if mapping.get(key) is None:
        raise InputError(f"{where}: {key} is missing")
    return mapping[key]
