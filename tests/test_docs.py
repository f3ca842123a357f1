"""The pages in docs/ say what the code does: every setting, every metric."""

import importlib
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from pages import metric_keys, rows

from gtpo_jax import config, config_page, evaluate, metrics, train
from gtpo_jax.rl import advantages
from gtpo_jax.rl.rollout import RolloutStats

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_page_of_settings_is_the_one_that_is_made_from_the_source():
    assert (DOCS / "configs.md").read_text(encoding="utf-8") == config_page.page(), (
        "run: python -m gtpo_jax.config > docs/configs.md"
    )


def test_every_setting_and_option_has_a_meaning():
    found = config_page.settings()
    empty = {"task.fields", "advantage.options", "loss.options"}
    assert {s.key for s in found} == {*config._flatten(config.default()), *empty}
    assert [s.key for s in found if len(s.meaning) < 5] == []
    assert config_page.options().keys() == config_page.OPTIONS.keys()


@pytest.mark.parametrize("setting", config_page.settings(), ids=lambda s: s.key)
def test_a_default_on_the_page_is_the_default(setting):
    value = config.default()
    for part in setting.key.split("."):
        value = value[part]
    assert setting.default == (value.to_dict() if hasattr(value, "to_dict") else value)


# What a run really writes is compared in test_train.py and test_sft.py, which have one.
def test_the_page_of_metrics_has_what_the_functions_return():
    described = {
        **evaluate.rollout_metrics([], RolloutStats()),
        **train.advantage_metrics(np.zeros((1, 1)), np.zeros((1, 1), bool)),
    }
    assert described.keys() <= metric_keys("train")
    measured, _ = evaluate.evaluate(lambda *_: ([], RolloutStats()), [], 1)
    assert {*measured, "step", "phase", "time"} == metric_keys("eval")


def test_every_metric_that_is_read_is_on_the_page():
    keys = metric_keys("train") | metric_keys("eval") | metric_keys("sft")
    assert metrics.CONSOLE.keys() <= keys
    source = (ROOT / "gtpo_jax" / "metrics.py").read_text(encoding="utf-8")
    read = set(re.findall(r'"((?:accuracy|rollout|tool|advantage|eval|time)/\w+)"', source))
    assert read <= keys


def test_no_metric_is_on_the_page_twice_and_each_is_explained():
    names = [row[0] for row in rows("metrics.md")]
    assert len(names) == len(set(names))
    assert all(len(row) == 4 and len(row[2]) > 5 for row in rows("metrics.md"))


PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("experiments/*.md")])
FILES = (".py", ".json", ".jsonl", ".safetensors")
SECTIONS = {key.split(".")[0] for key in config.default()}


def settings_and_options():
    keys = {setting.key for setting in config_page.settings()}
    options = {f"{p}.options.{o}" for p in ("advantage", "loss") for o in config_page.OPTIONS}
    parts = {".".join(key.split(".")[:n]) for key in keys for n in (1, 2)}
    return keys | options | parts


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    known = settings_and_options()
    for key in re.findall(r"--config\.([\w.]+)=", text):
        assert key in known, key
    for key in re.findall(r"`(\w+\.[a-z_.]+)[=`]", text):
        # Files apart (`config.json`); `log.wandb` and its like are settings.
        if key.split(".")[0] in SECTIONS and not key.endswith(FILES):
            assert key in known, key
    for path in re.findall(r"[\w./-]*\w+/\w+\.(?:py|md|sh|jsonl)\b", text):
        if path.startswith(("runs/", "data/", "models/", "DATA/", "/home")) or "tinny" in path:
            continue
        places = (ROOT, ROOT / "gtpo_jax", page.parent)
        assert any((place / path).exists() for place in places), path
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for module in re.findall(r"python -m ([a-z_.]+[a-z_])", text):
        assert module in ("pytest", "venv") or importlib.util.find_spec(module), module
    for name in re.findall(r"`gtpo_jax\.([\w.]+)`", text):
        module, _, attribute = f"gtpo_jax.{name}".rpartition(".")
        there = attribute == "py" or hasattr(importlib.import_module(module), attribute)
        assert there or importlib.util.find_spec(f"gtpo_jax.{name}"), name


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "README.md"])
def test_prose_fits_a_narrow_window(page):
    text = page.read_text(encoding="utf-8")
    lines = re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines()
    assert [x for x in lines if len(x) > 100 and not x.startswith("|")] == []


def test_every_page_is_in_the_list_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f"](docs/{page.name})" in readme, page.name


def test_the_numbered_choices_of_the_estimators_are_on_the_page():
    numbers = re.findall(r"^ +(\d+)\. ", advantages.__doc__, re.MULTILINE)
    table = (DOCS / "algorithm.md").read_text(encoding="utf-8")
    choices = re.findall(r"^\| (\d+) \| .* \| (.*) \| (.*) \|$", table, re.MULTILINE)
    assert [number for number, _, _ in choices] == [str(n + 1) for n in range(len(choices))]
    assert numbers == [str(n) for n in range(1, 10)] and len(choices) >= len(numbers)
    for _, where, _ in choices:
        for path in re.findall(r"`(rl/\w+\.py)`", where):
            source = (ROOT / "gtpo_jax" / path).read_text(encoding="utf-8")
            assert all(n in source for n in re.findall(r"`([a-zA-Z_]+)`", where)), where


def test_every_algorithm_is_in_the_table_of_the_algorithms():
    table = (DOCS / "algorithm.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert names == list(config.ALGORITHMS)


def test_figures_of_the_recorded_plans_are_those_on_the_page():
    results = (ROOT / "benchmarks" / "results" / "plan.md").read_text(encoding="utf-8")
    page = (DOCS / "scaling.md").read_text(encoding="utf-8")
    found = re.findall(r"\| ([\d.]+) of ([\d.]+) \| ([\d.,]+) \| ([\d.,]+) \| (.*) \|", page)
    assert len(found) == 4
    for most, of, decoding, update, verdict in found:
        plan = next(p for p in results.split("devices of")[1:] if f"**{most}**" in p)
        assert (
            plan.startswith(f" {of} GiB") and f"at a time: {verdict.lower()}**" in plan.lower()
        )
        assert f"decoding, by memory | {decoding} |" in plan
        assert f"update, by FLOP/s | {update} |" in plan


def test_the_citation_is_of_this_version():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f'version="{cited["version"]}"' in setup and f'license="{cited["license"]}"' in setup
    assert cited["references"][0]["url"].endswith("2511.14846")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {cited['version']}" in changes
