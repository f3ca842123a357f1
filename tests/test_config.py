"""The config: every algorithm resolves, options are checked, what cannot run is refused."""

import functools

import jax
import numpy as np
import pytest

from configs import tiny
from gtpo_jax.config import ALGORITHMS, default, options_for, validate, with_algorithm
from gtpo_jax.errors import InputError
from gtpo_jax.rl.advantages import ADVANTAGES
from gtpo_jax.rl.losses import LOSSES
from gtpo_jax.rl.packing import AGGREGATIONS
from gtpo_jax.rl.types import Rewards


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_resolves_to_functions_that_run(name):
    config = tiny.get_config(name)
    validate(config)
    assert config.loss.aggregation in AGGREGATIONS
    loss = LOSSES[config.loss.name]
    assert options_for(loss, config.loss.options, "loss").keys() >= {"clip_low", "clip_high"}
    estimator = ADVANTAGES[config.advantage.name]
    options = options_for(estimator, config.advantage.options, "advantage")
    rewards = Rewards(np.array([[0, 1.0], [-0.1, 0]]), np.array([1.0, 0]), np.array([1.0, 0]))
    mask, groups = np.ones((2, 2), bool), np.zeros(2, int)
    advantages = jax.jit(functools.partial(estimator, **options))(rewards, mask, groups)
    assert advantages[0, 1] > 0 > advantages[1, 1]


def test_gspo_clips_as_its_paper_does():
    config = with_algorithm(default(), "gspo")
    assert (config.loss.options.clip_low, config.loss.options.clip_high) == (3e-4, 4e-4)
    assert config.loss.aggregation == "sequence_mean"


def test_dapo_is_whole():
    config = tiny.get_config("dapo")
    assert config.reward.overlong_buffer == 24  # a fifth of 120, as in its paper
    assert config.rollout.resample_rounds == 3
    assert config.loss.aggregation == "token_mean"


def test_options_of_another_function_are_refused():
    config = with_algorithm(default(), "gtpo")
    with pytest.raises(InputError, match=r"advantage.options.\w+: rloo takes none"):
        options_for(ADVANTAGES["rloo"], config.advantage.options, "advantage")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rollout.samples", 0, "rollout.samples=0"),
        ("learn.minibatches", 3, "learn.minibatches=3"),
        ("learn.row_tokens", 100, "learn.row_tokens=100"),
        ("rollout.temperature", 0.0, "rollout.temperature=0.0"),
        ("eval_every", 0, "eval_every=0"),
    ],
)
def test_what_cannot_run_is_named(key, value, message):
    config = with_algorithm(default(), "gtpo")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=message):
        validate(config)
