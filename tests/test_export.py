"""A run as a Hugging Face folder: what transformers makes of it, and what comes back of it."""

import dataclasses
import json
import resource
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import MODELS, drawn, random_tokens, torch_logits
from safetensors import safe_open

from gtpo_jax import build, export
from gtpo_jax.build import Policy
from gtpo_jax.checkpoint import Checkpoints
from gtpo_jax.errors import InputError
from gtpo_jax.model import families, lora, transformer, weights
from gtpo_jax.model.config import MATRICES, RopeScaling
from gtpo_jax.model.tokenizer import load_tokenizer, train_sentencepiece
from gtpo_jax.tasks import arithmetic


@pytest.fixture(autouse=True)
def exact_products():
    # An accelerator would round float32 products to fewer bits by default.
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "spm.model"
    texts = arithmetic.corpus(0, 2000)
    return train_sentencepiece(texts, 384, arithmetic.SYMBOLS, path)


def random_policy(name, tokenizer, **changes):
    """A model of MODELS, made without transformers, and a tokenizer, any one."""
    family, settings, scaling = MODELS[name]
    raw = settings | {"model_type": family.lower(), "rope_scaling": scaling}
    fields = families.from_hf(raw, "random_models.py")
    config = weights.ModelConfig(**fields | changes)
    plain = dataclasses.replace(config, lora_rank=0)
    shapes = {n: place.shape for n, place in families.places(plain, families.HF).items()}
    found = drawn(shapes)
    params = weights._assemble(plain, name, families.HF, shapes, found.__getitem__)
    if config.lora_rank:
        made = lora.split(config, transformer.init(config, 0))[0]
        made = jax.tree.map(lambda x: x + 0.01, made)  # B begins as 0
        params = lora.join(made, params)
    return Policy(config, params, tokenizer)


def run_of(folder, policies, scores):
    """The folder of a run with a checkpoint for each of the policies."""
    trained = policies[0]
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(dataclasses.asdict(trained.config)))
    trained.tokenizer.save(folder / "tokenizer")
    with Checkpoints(folder, keep=len(policies)) as checkpoints:
        for step, (policy, score) in enumerate(zip(policies, scores, strict=True), 1):
            parts = lora.split(policy.config, jax.tree.map(jnp.asarray, policy.params))
            state = dict(zip(("params", "frozen"), parts, strict=True))
            checkpoints.save(step, state, {"step": step, "seed": 0}, score)
    return folder


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "gtpo_jax.export", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


def transformers_apart(folder, config, params):
    """The largest difference of a logit from that of transformers, given the folder alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert str(model.dtype) == f"torch.{config.param_dtype}"
    tokens = random_tokens(2, 33)
    theirs = torch_logits(model.float().eval(), tokens)
    assert theirs.std() > 0.5
    return np.abs(transformer.logits(config, params, jnp.asarray(tokens)) - theirs).max()


# What transformers makes of it


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_transformers(name, tokenizer, tmp_path):
    pytest.importorskip("torch")
    policy = random_policy(name, tokenizer)
    export.write(tmp_path / "out", policy)
    assert transformers_apart(tmp_path / "out", policy.config, policy.params) < 1e-5


@pytest.mark.parametrize("targets", [MATRICES, ("q", "v", "down")])
def test_adapters_are_merged(targets, tokenizer, tmp_path):
    pytest.importorskip("torch")
    policy = random_policy("qwen2 tied", tokenizer, lora_rank=2, lora_targets=targets)
    export.write(tmp_path / "out", policy)
    assert transformers_apart(tmp_path / "out", policy.config, policy.params) < 1e-5
    config, params = weights.load(tmp_path / "out")
    assert same(params, lora.merged(policy.config, policy.params)) and not config.lora_rank


def test_transformers_goes_on_with_the_same_text(tokenizer, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = random_policy("qwen3 tied", tokenizer, vocab_size=tokenizer.vocab_size)
    export.write(tmp_path / "out", policy)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.generation_config.eos_token_id == list(tokenizer.end_ids)
    question = [{"role": "user", "content": "What is 12 + 7?"}]
    inputs = theirs.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
    ids = tokenizer.render(question)
    assert written[: len(ids)] == ids
    logits = jax.jit(transformer.logits, static_argnums=0)
    while len(ids) < len(written):
        padded = jnp.asarray([ids + [0] * (64 - len(ids))])  # one length, one compilation
        likeliest = logits(policy.config, policy.params, padded)[0, len(ids) - 1].argmax()
        ids.append(int(likeliest))
    assert written == ids and theirs.decode(ids) == tokenizer.decode(ids)


# Tokenizers


def test_sentencepiece_tokenizer_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    export.write(tmp_path / "out", random_policy("qwen3 tied", tokenizer))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    random = np.random.default_rng(0)
    corpus = arithmetic.corpus(1, 300)
    characters = [*sorted(set("".join(corpus))), *arithmetic.SYMBOLS, "    ", "é", "中中"]
    texts = corpus + ["".join(random.choice(characters, 40)) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        if 0 not in ids:  # the unknown token is shown in two ways
            assert theirs.decode(ids) == tokenizer.decode(ids) == text
    again = load_tokenizer(tmp_path / "out")
    assert again.encode(corpus[0]) == tokenizer.encode(corpus[0])
    assert again.end_ids == tokenizer.end_ids


@pytest.mark.parametrize("name", ["qwen3 tied", "qwen2 tied"])
def test_a_tokenizer_that_transformers_replaces_is_noticed(name, tokenizer, tmp_path):
    import transformers

    export.write(tmp_path / "out", random_policy(name, tokenizer))
    replaced = name == "qwen2 tied" and int(transformers.__version__.split(".")[0]) >= 5
    assert export.misread(tmp_path / "out", tokenizer) == replaced
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    text = arithmetic.corpus(1, 1)[0]
    assert theirs(text)["input_ids"] == tokenizer.encode(text)


def test_hugging_face_tokenizer(tmp_path):
    from test_tokenizer import CHAT, small_hf
    from transformers import AutoTokenizer

    from gtpo_jax.model.tokenizer import HFTokenizer

    ours = HFTokenizer(small_hf(), [3])
    export.write(tmp_path / "out", random_policy("llama3 scaling", ours))
    again = load_tokenizer(tmp_path / "out")
    assert again.end_ids == ours.end_ids == (257, 258, 3) and again.pad_id == ours.pad_id
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    rendered = theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert rendered == ours.render(CHAT) == again.render(CHAT)
    assert theirs("a  7 é")["input_ids"] == ours.encode("a  7 é")
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"


# There and back


@pytest.mark.parametrize("name", MODELS)
def test_comes_back_to_the_bit(name, tokenizer, tmp_path):
    policy = random_policy(name, tokenizer)
    export.write(tmp_path / "out", policy)
    config, params = weights.load(tmp_path / "out")
    assert config == policy.config and same(params, policy.params)


def test_training_changes_what_it_changed_and_no_more(tokenizer, tmp_path):
    """Published weights, a step of SGD on one matrix of one layer, a run, a folder, loaded."""
    export.write(tmp_path / "published", random_policy("qwen2 untied", tokenizer))
    config, params = weights.load(tmp_path / "published")
    tokens = jnp.asarray(random_tokens(2, 17))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits = transformer.logits(config, params, tokens)[:, :-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return -picked.mean()

    before, gradient = loss(params)
    step = np.asarray(gradient["layers"]["up"]["kernel"][1])
    trained = jax.tree.map(np.array, params)
    trained["layers"]["up"]["kernel"][1] -= 0.1 * step
    assert loss(trained)[0] < before
    run = run_of(tmp_path / "run", [Policy(config, trained, tokenizer)], [None])
    export.write(tmp_path / "out", build.from_run(run))

    back_config, back = weights.load(tmp_path / "out")
    assert back_config == config and same(back, trained)
    with (
        safe_open(tmp_path / "published" / "model.safetensors", "np") as old,
        safe_open(tmp_path / "out" / "model.safetensors", "np") as new,
    ):
        assert old.metadata() == new.metadata() == {"format": "pt"}
        names = sorted(old.keys())
        assert names == sorted(new.keys())
        same_there = {n: np.array_equal(old.get_tensor(n), new.get_tensor(n)) for n in names}
        assert [n for n in names if not same_there[n]] == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("rank", [0, 2])
def test_bfloat16(rank, tokenizer, tmp_path):
    """Rounded once: adapters are merged in float32 before."""
    policy = random_policy("qwen3 untied", tokenizer, lora_rank=rank)
    export.write(tmp_path / "out", policy, "bfloat16")
    merged = lora.merged(policy.config, policy.params)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), merged)
    assert same(weights.load(tmp_path / "out", param_dtype="bfloat16")[1], rounded)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == (
        "bfloat16"
    )
    # A run that keeps its weights in bfloat16 loses nothing, whatever it is exported as.
    config = dataclasses.replace(policy.config, lora_rank=0, param_dtype="bfloat16")
    for dtype in ("", "float32"):
        export.write(tmp_path / f"again{dtype}", Policy(config, rounded, tokenizer), dtype)
        again = weights.load(tmp_path / f"again{dtype}", param_dtype="bfloat16")[1]
        assert same(again, rounded)


def test_shards(tokenizer, tmp_path):
    policy = random_policy("qwen2 untied", tokenizer)
    export.write(tmp_path / "out", policy, shard_bytes=8000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert {f.name for f in files} == set(index["weight_map"].values()) and len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    sizes = sum(x.nbytes for x in jax.tree.leaves(policy.params))
    assert index["metadata"]["total_size"] == sizes
    assert all(f.stat().st_size < 8000 + 3000 for f in files)  # and the header
    assert same(weights.load(tmp_path / "out")[1], policy.params)
    pytest.importorskip("torch")
    assert transformers_apart(tmp_path / "out", policy.config, policy.params) < 1e-5


# The command


def test_the_command(tokenizer, tmp_path):
    first, second = (
        random_policy("llama3 scaling", tokenizer),
        random_policy("llama3 scaling", tokenizer),
    )
    second.params["embed"] = second.params["embed"] + 1
    run = run_of(tmp_path / "run", [first, second], [0.5, 0.25])
    assert isinstance(build.from_run(run).config.rope_scaling, RopeScaling)
    out = tmp_path / "new" / "best"
    code, said, complaint = command(run, f"--out={out}", "--which=best", "--dtype=float32")
    assert code == 0, complaint
    assert str(out) in said and "best" in said
    assert same(weights.load(out)[1], first.params)
    assert out.stat().st_mode & 0o777 == (tmp_path / "run").stat().st_mode & 0o777
    assert {f.stat().st_mode for f in out.iterdir()} == {(run / "model.json").stat().st_mode}
    assert [path.name for path in out.parent.iterdir()] == ["best"]

    code, _, complaint = command(run, f"--out={out}")
    assert code == 2 and complaint.startswith(f"error: --out={out} exists")
    assert complaint.count("\n") == 1
    code, _, complaint = command(tmp_path, f"--out={tmp_path / 'b'}")
    assert code == 2 and "no model.json there" in complaint
    assert not (tmp_path / "b").exists()


def test_help_shows_an_example():
    code, said, _ = command("--help")
    assert code == 0 and "python -m gtpo_jax.export runs/smollm2 --out=" in said


# What can go wrong


def complaint(*arguments, **options):
    with pytest.raises(InputError) as caught:
        export.write(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_family_is_such_a_model(tokenizer, tmp_path):
    policy = random_policy("qwen2 tied", tokenizer)
    both = policy._replace(config=dataclasses.replace(policy.config, qk_norm=True))
    message = complaint(tmp_path / "out", both)
    assert "model.qkv_bias=True, model.qk_norm=True: no family has this" in message
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_export_that_failed(tokenizer, tmp_path):
    policy = random_policy("qwen2 tied", tokenizer)
    # No file above 8000 bytes, as a full disk would have it.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        message = complaint(tmp_path / "out", policy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert message.startswith(f"{tmp_path / 'out'}: can't be written: ")
    assert "File too large" in message
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "can't be written" in complaint(tmp_path / "file" / "out", policy)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "exists" in complaint(tmp_path / "link", policy)
