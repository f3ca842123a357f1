"""RoPE's frequencies, plain and scaled, against the formulas as Hugging Face has them."""

import math

import numpy as np
import pytest

from gtpo_jax.errors import InputError
from gtpo_jax.model.config import ModelConfig, RopeScaling
from gtpo_jax.model.transformer import frequencies

LLAMA32 = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)  # Llama 3.2's


def llama3(f, s):
    """transformers' `_compute_llama3_parameters`, one frequency at a time."""
    length, wavelength = s.original_max_position_embeddings, 2 * math.pi / f
    if wavelength < length / s.high_freq_factor:
        return f
    if wavelength > length / s.low_freq_factor:
        return f / s.factor
    smooth = (length / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    return (1 - smooth) * f / s.factor + smooth * f


def test_frequencies():
    np.testing.assert_allclose(frequencies(4, 1e4), [1.0, 0.01], rtol=1e-6)
    scaled = frequencies(4, 1e4, RopeScaling("linear", 2.0))
    np.testing.assert_allclose(scaled, [0.5, 0.005], rtol=1e-6)


def test_llama3_frequencies():
    plain = [5e5 ** (-i / 32) for i in range(32)]
    expected = np.array([llama3(f, LLAMA32) for f in plain])
    kept, slowed = np.isclose(expected, plain), np.isclose(expected, np.array(plain) / 32)
    assert kept.sum() == 15 and slowed.sum() == 14  # and three between
    np.testing.assert_allclose(frequencies(64, 5e5, LLAMA32), expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (("yarn", 2.0), "kind='yarn': one of linear, llama3"),
        (("linear", 0), "factor=0 must be a number > 0"),
        (("llama3", 8.0), "low_freq_factor=0.0 must be a number > 0"),
        (("llama3", 8.0, 4.0, 4.0, 64), "low_freq_factor=4.0 must be below high_freq_factor"),
    ],
)
def test_scaling_that_cannot_be(made, says):
    with pytest.raises(InputError, match=says):
        RopeScaling(*made)


def test_a_description_comes_back_from_json():
    config = ModelConfig(7, 4, 1, 1, 1, 4, 8, 16, rope_scaling={"kind": "linear", "factor": 2})
    assert config.rope_scaling == RopeScaling("linear", 2)
    assert hash(config) == hash(ModelConfig(**vars(config)))
