"""docs/configs.md, made from the source of `gtpo_jax.config.default`.

A setting's meaning is the comment behind it or, where there is none, the one above it. A
comment above a setting that has one of its own is a remark on those that follow.
"""

import ast
import io
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gtpo_jax import config
from gtpo_jax.errors import command_parser
from gtpo_jax.rl.advantages import ADVANTAGES
from gtpo_jax.rl.losses import LOSSES

OPTIONS = {  # of estimators and losses -> meaning
    "gamma": "discount of later rewards, per turn",
    "scope": "the set that returns are normalised over: group, batch, turn, group_trajectory",
    "scale": "divide by the standard deviation",
    "drop_equal_groups": "advantage 0 where all trajectories of a group earned the same",
    "lam": "weight of the second advantage: of turns in mt_grpo, of the outcome in irc",
    "clip_low": "the ratio is clipped from 1 - this",
    "clip_high": "to 1 + this",
    "dual_clip": "where A < 0, the surrogate is at least this times A; None: off",
    "kl_coef": "weight of the KL to the initial policy (k3); 0: no reference is kept",
    "tis_cap": "weight by min(pi_old / sampler, this); None: off",
}

TOP = """\
# Every setting

Made from `gtpo_jax/config.py` by `python -m gtpo_jax.config > docs/configs.md`.

A run's config is these defaults, overridden by a file in `configs/` and then by the command
line: `--config.rollout.samples=16`. A key that is not here is an error. Sizes are in tokens,
times in seconds, unless the name says otherwise. What a run uses stands in its `config.json`;
`python -m gtpo_jax.train --config=FILE.py --dry_run` lists what a file changes.
"""

NAMES = """\
## Algorithms

The argument of a config, as in `--config=configs/tiny.py:rloo`, is one of these names. Each
changes against the defaults only what stands beside it.
"""

FUNCTIONS = """\
## Options of an algorithm

`--config.advantage.options.gamma=1.0`. An option that the chosen function does not take is an
error.
"""


class Setting(NamedTuple):
    """A key of the config, dotted, with what its comment says of it."""

    key: str
    default: Any
    meaning: str
    remark: str  # on this one and those that follow


def settings(source: str | None = None) -> list[Setting]:
    """All settings, in the order of the source, which is config.py where none is given."""
    source = source or Path(config.__file__).read_text(encoding="utf-8")
    behind, above = _comments(source)
    out = []
    for key, name, value in _leaves(_tree(source)):
        own = behind.get(value.end_lineno or 0, "")
        before = above.get(name.lineno - 1, "")
        out.append(Setting(key, _value(value), own or before, before if own else ""))
    return out


def _tree(source: str) -> ast.Dict:
    """The dict that `default` makes its config of."""
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and function.name == "default":
            match function.body[-1]:
                case ast.Return(ast.Call(args=[ast.Dict() as tree])):
                    return tree
    raise ValueError("no function default() that returns ConfigDict({...})")


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Line -> the comment behind its code; last line -> a comment of whole lines."""
    behind: dict[int, str] = {}
    above: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("# ")
            whole = token.line.lstrip().startswith("#")
            if whole:
                earlier = above.pop(line - 1, "")
                above[line] = f"{earlier} {text}".strip()
            else:
                behind[line] = text
    return behind, above


def _leaves(tree: ast.Dict, prefix: str = "") -> Iterator[tuple[str, ast.expr, ast.expr]]:
    for name, value in zip(tree.keys, tree.values, strict=True):
        assert name is not None  # a **dict
        key = prefix + ast.literal_eval(name)
        if isinstance(value, ast.Dict) and value.keys:
            yield from _leaves(value, key + ".")
        else:
            yield key, name, value


def _value(node: ast.expr) -> Any:
    """A literal, a name of config.py, or None for a placeholder."""
    if isinstance(node, ast.Call):
        return None
    return getattr(config, node.id) if isinstance(node, ast.Name) else ast.literal_eval(node)


def page() -> str:
    """The whole of docs/configs.md."""
    parts: list[str] = [TOP]
    section = None
    for setting in settings():
        first = setting.key.split(".")[0] if "." in setting.key else "The run"
        if first != section:
            section = first
            parts += [f"## {section if '.' not in setting.key else f'`{section}`'}\n", HEAD]
        if setting.remark:
            parts += [f"\n{setting.remark}\n", HEAD]
        parts.append(_row(setting.key, setting.default, setting.meaning))
    parts += [NAMES, "| name | changes |\n|---|---|"]
    for name, changes in config.ALGORITHMS.items():
        parts.append(f"| `{name}` | {'; '.join(_change(*c) for c in changes.items())} |")
    parts += ["", FUNCTIONS, "| option | default of | meaning |\n|---|---|---|"]
    for option, defaults in options().items():
        of = ", ".join(f"`{name}` {value}" for name, value in defaults.items())
        parts.append(f"| `{option}` | {of} | {OPTIONS[option]} |")
    return _spaced("\n".join(parts)) + "\n"


HEAD = "| setting | default | meaning |\n|---|---|---|"


def options() -> dict[str, dict[str, Any]]:
    """Option -> the functions that take it, and their defaults."""
    found: dict[str, dict[str, Any]] = {}
    tables: Sequence[dict[str, Callable]] = (ADVANTAGES, LOSSES)
    for name, function in (item for table in tables for item in table.items()):
        for option, value in config.defaults_of(function).items():
            found.setdefault(option, {})[name] = value
    return found


def _row(key: str, default: Any, meaning: str) -> str:
    shown = "empty" if default == "" else f"`{default}`"
    return f"| `{key}` | {shown} | {meaning} |"


def _change(key: str, value: Any) -> str:
    if callable(value):
        return f"`{key}` made from the rest of the config"
    if isinstance(value, dict):
        return ", ".join(f"`{key}.{name}={x}`" for name, x in value.items())
    return f"`{key}={value}`"


def _spaced(text: str) -> str:
    """A blank line between a table and what comes after it."""
    out: list[str] = []
    for line in text.splitlines():
        if out and out[-1].startswith("|") and not line.startswith("|") and line:
            out.append("")
        if line or (out and out[-1]):
            out.append(line)
    return "\n".join(out).strip()


def main() -> None:
    """Print the page."""
    command_parser("gtpo_jax.config", config.__doc__).parse_args()
    print(page(), end="")
