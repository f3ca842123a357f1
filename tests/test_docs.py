"""The pages in docs/ say what the code does: every setting, every metric."""

from pathlib import Path

import pytest

from gtpo_jax import config, config_page

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
