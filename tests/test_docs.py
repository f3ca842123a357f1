"""The pages in docs/ say what the code does: every setting, every metric."""

import re
from pathlib import Path

import numpy as np
import pytest
from pages import metric_keys, rows

from gtpo_jax import config, config_page, evaluate, metrics, train
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
