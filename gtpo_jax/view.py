"""The report of a run: one HTML file that opens from disk and asks nothing of the network.

    python -m gtpo_jax.view runs/tiny/gtpo                            writes its report.html
    python -m gtpo_jax.view runs/tiny/gtpo --screenshot=report.png    and a picture of it

Curves of metrics.jsonl; then, for each recorded step of trajectories.jsonl, every problem's
group side by side: what was sampled, what the tool said, rewards, returns and advantages by
turn, and how similar the members' code is. A picture needs the extra `browser`.

What a model wrote is data, never markup: it stands in a JSON block whose <, > and & are
escaped, goes into the page as text nodes, and the page's own script is the only one that its
content security policy lets run.
"""

import base64
import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gtpo_jax.errors import InputError, command_parser, run_command
from gtpo_jax.rl.rewards import all_code, left_out
from gtpo_jax.rl.shaping import token_similarity
from gtpo_jax.rl.types import Trajectory, Turn
from gtpo_jax.tasks.types import Problem
from gtpo_jax.tools.toolcall import Call, cut

MAX_BYTES = 4_800_000  # of the page
POINTS = 1000  # of a curve
LONGEST = 20_000  # characters of one text
NUMBERS = ("reward", "discounted_return", "advantage")  # of a turn
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
Lines = list[dict[str, Any]]
Groups = dict[int, list[Lines]]  # step -> a list a problem -> its trajectories

# Beyond what could end the script element: line ends of old JavaScript, and half characters,
# which JSON allows and UTF-8 does not.
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def report(run: Path, max_bytes: int = MAX_BYTES) -> str:
    """The page of a run, thinned to `max_bytes` where it would be larger.

    Raises InputError where there is no run, or a file of it is broken. A last line without an
    end, as a kill leaves it, is left out, and the page says so.
    """
    if not run.is_dir():
        raise InputError(f"{run} is no folder: give the --workdir of a run")
    notes: list[str] = []
    curves = _curves(read_lines(run / "metrics.jsonl", notes, _check_metrics), notes)
    recorded = run / "trajectories.jsonl"
    groups = _groups(read_lines(recorded, notes, _slim)) if recorded.exists() else {}
    if not groups:
        notes.append("no trajectories are recorded: there are curves alone")
    if not curves and not groups:
        raise InputError(f"{run}/metrics.jsonl has no line: did the run begin?")
    config = _config(run)
    start = {"run": run.resolve().name, "facts": _facts(config), "curves": curves}
    reward = config.get("reward", {})
    away = left_out(reward.get("drop_void", False), reward.get("drop_truncated", False))
    start |= {"alpha": reward.get("alpha"), "left_out": away}

    # Whole steps go first; then problems of a step; then long texts are cut shorter.
    steps = len(groups)
    problems, longest = max((len(g) for g in groups.values()), default=0), LONGEST
    while True:
        chosen = {step: groups[step][:problems] for step in spaced(sorted(groups), steps)}
        said = notes + _thinning(groups, chosen, longest)
        page = fill({**start, "notes": said, **encode(chosen, longest)})
        size = len(page.encode())
        if size <= max_bytes or longest < 100:
            return page
        room = max_bytes / size
        if steps > 2:
            steps = max(2, min(steps - 1, int(steps * room)))
        elif problems > 2:
            problems = max(2, min(problems - 1, int(problems * room)))
        else:
            longest //= 2


def read_lines(
    path: Path, notes: list[str], check: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Each line of a jsonl file through `check`; a cut-off last one is noted and left out."""
    if not path.exists():
        raise InputError(f"{path} does not exist: is {path.parent} the folder of a run?")
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
            except ValueError as error:
                if not text.endswith("\n"):
                    notes.append(f"the last line of {path.name} is cut off, and left out")
                    return
                raise InputError(f"{path} line {number} is not JSON: {error}") from None
            try:
                yield check(line)
            except (KeyError, TypeError, AttributeError) as error:
                what = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise InputError(f"{path} line {number} is not one of a run: {what}") from None


def spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, first and last among them (count > 1)."""
    if count >= len(items):
        return list(items)
    last = len(items) - 1
    return [items[round(i * last / max(count - 1, 1))] for i in range(count)]


def similarities(group: Lines) -> list[list[int]]:
    """Similarity of all code of each two members, in hundredths. -> [G][G]."""
    codes = [all_code(_trajectory(line)) for line in group]
    return (100 * token_similarity(codes, codes)).round().astype(int).tolist()


def encode(groups: Groups, longest: int = LONGEST) -> dict[str, Any]:
    """What the page shows of the steps. A text that stands there often is stored once:
    `texts` holds them, all else their numbers. A turn is a list:

        [before, code, after, kind, detail, seconds, feedback, output, tokens, r, R, A]

    `before + code + after` is what was sampled; `after` None: the code stands there in another
    spelling. `output` is what the tool said where `feedback` does not hold all of it.
    """
    texts: dict[str, int] = {}
    prompts: dict[tuple, int] = {}

    def number(text: str | None) -> int | None:
        return None if text is None else texts.setdefault(cut(text, longest), len(texts))

    def prompt(line: dict[str, Any]) -> int:
        question = "\n\n".join(str(m["content"]) for m in line["problem"]["messages"])
        parts = _around(line["prompt"], question)
        key = (line["problem"]["id"], *map(number, (line["problem"]["answer"], *parts)))
        return prompts.setdefault(key, len(prompts))

    def turn(t: dict[str, Any]) -> list[Any]:
        result = t["result"] or {}
        output = result.get("output", "").rstrip("\n")
        kind = "invalid" if t["invalid"] is not None else result.get("status", "no call")
        if t["code"] is not None and not result:
            kind = "not run"
        return [
            *map(number, _around(t["text"], t["code"])),
            kind,
            t["invalid"],
            _short(result.get("seconds")),
            number(t["feedback"]),
            None if output in t["feedback"] else number(output),
            t["tokens"],
            *(_short(t[key]) for key in NUMBERS),
        ]

    def member(line: dict[str, Any]) -> dict[str, Any]:
        out = {key: line[key] for key in ("member", "status", "correct")}
        out |= {"answer": number(line["answer"]), "turns": [turn(t) for t in line["turns"]]}
        return out | {"reason": number(line["reason"])}

    steps = [
        {
            "step": step,
            "groups": [
                {
                    "problem": prompt(group[0]),
                    "similar": similarities(group),
                    "members": [member(line) for line in group],
                }
                for group in step_groups
            ],
        }
        for step, step_groups in groups.items()
    ]
    return {"steps": steps, "problems": [list(key) for key in prompts], "texts": list(texts)}


def fill(data: dict[str, Any]) -> str:
    """The template with style, script and data inside. -> HTML."""
    html, style, script, curves = (
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("view.html", "view.css", "view.js", "view_curves.js")
    )
    script += curves + "begin();\n"
    policy = (
        f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    for place, text in (("{{policy}}", policy), ("{{style}}", style), ("{{script}}", script)):
        html = html.replace(place, text)
    before, after = html.split("{{data}}")  # last, and once: data may hold such words itself
    return before + as_json(data) + after


def as_json(data: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends or opens one."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium, Playwright's own or the system's. Raises InputError without one."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise InputError(
            "a picture needs Playwright: pip install 'gtpo_jax[browser]'"
        ) from None
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found: str | None = own
        if not Path(own).exists():
            found = next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None:
            raise InputError(
                "a picture needs Chromium: `playwright install chromium`, or one of "
                f"{', '.join(BROWSERS)} on the PATH"
            )
        try:
            chromium = playwright.chromium.launch(executable_path=found)
        except Error as error:
            raise InputError(f"{found} does not start: {str(error).splitlines()[0]}") from None
        try:
            yield chromium
        finally:
            chromium.close()


def screenshot(page: Path, picture: Path) -> None:
    """What a person sees of the page at 1440 x 1000, as a PNG."""
    with browser() as chromium:
        tab = chromium.new_page(viewport={"width": 1440, "height": 1000})
        tab.goto(page.resolve().as_uri())
        tab.screenshot(path=picture)


def _check_metrics(line: dict[str, Any]) -> dict[str, Any]:
    return {"step": line["step"], "phase": str(line["phase"]), **line}


def _slim(line: dict[str, Any]) -> dict[str, Any]:
    """A recorded line without token ids and log-probabilities, which are most of it."""
    out = {key: line[key] for key in ("step", "member", "status", "prompt", "answer")}
    out["correct"] = bool(line["correct"])
    out["reason"] = (line.get("meta") or {}).get("reason") or ""
    out["problem"] = {key: line["problem"][key] for key in ("id", "answer", "messages")}
    out["turns"] = [
        {key: t[key] for key in ("text", "code", "invalid", "result", "feedback")}
        | {"tokens": len(t["tokens"])}
        | {key: t.get(key) for key in NUMBERS}
        for t in line["turns"]
    ]
    return out


def _groups(lines: Iterator[dict[str, Any]]) -> Groups:
    steps: dict[int, dict[str, Lines]] = {}
    for line in lines:
        steps.setdefault(line["step"], {}).setdefault(line["problem"]["id"], []).append(line)
    return {step: list(groups.values()) for step, groups in steps.items()}


def _curves(lines: Iterator[dict[str, Any]], notes: list[str]) -> dict[str, dict[str, list]]:
    """phase -> key -> values, one a line; None where there is no number."""
    phases: dict[str, Lines] = {}
    for line in lines:
        phases.setdefault(line["phase"], []).append(line)
    out = {}
    for phase, found in phases.items():
        some = spaced(found, POINTS)
        if len(some) < len(found):
            notes.append(f"curves of '{phase}' show {len(some)} of {len(found)} lines")
        keys = dict.fromkeys(key for line in some for key in line)
        values = {key: [_short(line.get(key)) for line in some] for key in keys}
        out[phase] = {k: v for k, v in values.items() if k not in ("phase", "time")}
    return out


def _thinning(groups: Groups, chosen: Groups, longest: int) -> list[str]:
    notes = []
    if len(chosen) < len(groups):
        notes.append(
            f"to keep this page small it shows {len(chosen)} of {len(groups)} recorded steps"
        )
    had, have = (sum(len(groups[s]) for s in chosen), sum(map(len, chosen.values())))
    if have < had:
        notes.append(f"and {have} of the {had} problems of these steps")
    if longest < LONGEST:
        notes.append(f"and at most {longest} characters of a text")
    return notes


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def _facts(config: dict[str, Any]) -> list[list[str]]:
    """What to know of a run at a glance: [name, value] each."""

    def get(path: str) -> Any:
        value: Any = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    model = get("model.source") or f"{get('model.layers')} layers of {get('model.width')}"
    facts = {
        "advantage": get("advantage.name"),
        "loss": get("loss.name"),
        "task": get("task.name"),
        "model": model if get("model") else None,
        "problems": get("rollout.problems"),
        "samples": get("rollout.samples"),
        "turns": get("rollout.max_turns"),
        "γ": get("advantage.options.gamma"),
        "α": get("reward.alpha"),
        "lr": get("optim.lr"),
        "seed": get("seed"),
    }
    return [[name, str(value)] for name, value in facts.items() if value is not None]


def _trajectory(line: dict[str, Any]) -> Trajectory:
    """As much of it as `all_code` reads."""
    turns = [
        Turn([], [], None if t["code"] is None else Call(t["code"])) for t in line["turns"]
    ]
    return Trajectory(Problem(line["problem"]["id"], "", (), ""), line["member"], [], turns)


def _around(text: str, part: str | None) -> tuple[str, str | None, str | None]:
    """What stands before and after `part`, and `part`; after is None if it is not there."""
    if not part:
        return text, None, ""
    before, found, after = text.partition(part)
    return (before, part, after) if found else (text, part, None)


def _short(value: Any) -> float | int | None:
    """A number to five digits; None for what JSON has no number for."""
    if isinstance(value, bool | int):
        return int(value)
    if not isinstance(value, float) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def main() -> None:
    """Write the report, and a picture of it where asked."""
    parser = command_parser("gtpo_jax.view", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the --workdir of a run")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="RUN/report.html where left out"
    )
    parser.add_argument("--screenshot", type=Path, metavar="FILE.png", help="a picture as well")
    options = parser.parse_args()
    page = report(options.run)
    out = options.out or options.run / "report.html"
    for path in filter(None, (out, options.screenshot)):
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(f"{path} must name a file in a folder that exists")
    out.write_text(page, encoding="utf-8")
    print(f"{out}: {len(page.encode()) / 1e6:.1f} MB")
    if options.screenshot:
        screenshot(out, options.screenshot)
        print(f"{options.screenshot}: a picture of it")


if __name__ == "__main__":
    run_command(main)
