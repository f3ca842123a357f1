"""Overlap of test and training questions, by hand."""

import random
import string

from gtpo_jax.tasks.overlap import overlap
from gtpo_jax.tasks.types import Problem


def problem(text):
    return Problem("p", "t", ({"role": "user", "content": text},), "1")


WORDS = [f"{a}{b}" for a in string.ascii_lowercase for b in string.ascii_lowercase]


def text(*numbers):
    return " ".join(WORDS[n] for n in numbers)


def test_exact_ones_and_runs_of_thirteen_words():
    train = [problem(text(*range(100))), problem("How many?")]
    test = [
        problem("how  many"),  # the same but for case, spaces and marks; shorter than a run
        problem(text(*range(100)).upper() + "!"),
        problem("New: " + text(*range(40, 53)) + " end"),  # 13 of them
        problem("New: " + text(*range(40, 52)) + " end"),  # 12
        problem("How many apples?"),
    ]
    found = overlap(train, test)
    assert found == (2, 3, 5)
    assert str(found) == (
        "overlap with training: 2 of 5 test questions are the same, 3 share 13 words in a row"
    )


def test_nothing_overlaps_with_nothing():
    assert overlap([], [problem("a")]) == (0, 0, 1)
    assert overlap([problem("a")], []) == (0, 0, 0)


def test_agrees_with_a_search_in_the_text():
    rng = random.Random(0)
    train = [problem(" ".join(rng.choices("ab", k=40))) for _ in range(20)]
    test = [problem(" ".join(rng.choices("ab", k=20))) for _ in range(200)]
    corpus = [p.messages[0]["content"] for p in train]
    shared = 0
    for one in test:
        words = one.messages[0]["content"].split()
        runs = (" ".join(words[i : i + 13]) for i in range(8))
        shared += any(run in whole for run in runs for whole in corpus)
    assert 0 < shared < 200
    assert overlap(train, test).shared == shared
