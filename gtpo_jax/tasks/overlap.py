"""How much of a test set stands in the training set: exact questions, and runs of 13 words.

The 13-gram test is GPT-3's (arXiv 2005.14165, appendix C), on lower-case words and numbers.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gtpo_jax.tasks.types import Problem

RUN = 13
_WORD = re.compile(r"\w+")


class Overlap(NamedTuple):
    """Test problems whose question is a training question, word for word; those that share a
    run of 13 words with one (the former included); and how many there are."""

    exact: int
    shared: int
    total: int

    def __str__(self) -> str:
        return (
            f"overlap with training: {self.exact} of {self.total} test questions are the same, "
            f"{self.shared} share {RUN} words in a row"
        )


def overlap(train: Sequence[Problem], test: Sequence[Problem]) -> Overlap:
    """How many problems of `test` overlap with `train`."""
    questions = [_words(p) for p in train]
    whole = set(questions)
    runs = {run for words in questions for run in _runs(words)}
    exact = shared = 0
    for problem in test:
        words = _words(problem)
        exact += words in whole
        shared += words in whole or any(run in runs for run in _runs(words))
    return Overlap(exact, shared, len(test))


def _words(problem: Problem) -> tuple[str, ...]:
    return tuple(w for m in problem.messages for w in _WORD.findall(m["content"].lower()))


def _runs(words: tuple[str, ...]) -> Iterator[int]:
    return (hash(words[i : i + RUN]) for i in range(len(words) - RUN + 1))
