"""Self-supervised reward shaping: credit for code that resembles a right trajectory's.

For a trajectory whose answer is wrong, in a group with right ones P:

    r_acc_i = (alpha / |P|) sum_{p in P} sim(code_i, code_p)

The mean over P, not the max. Negative similarities count as 0, and so does empty code. The
paper takes sim from a paid embedding service; here it is any function
(list of codes, list of codes) -> matrix, by default one that needs no download.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

Similarity = Callable[[Sequence[str], Sequence[str]], np.ndarray]

# Names, numbers, strings, then any other visible character: enough of Python's lexis that
# broken code has tokens too, which the standard tokenizer would refuse to give.
_TOKEN = re.compile(r"[^\W\d]\w*|\d+(?:\.\d+)?|'[^'\n]*'|\"[^\"\n]*\"|\*\*|//|[^\s\w]")
_LONGEST = 3


def token_similarity(left: Sequence[str], right: Sequence[str]) -> np.ndarray:
    """Cosine between counts of 1- to 3-grams of Python tokens. -> [len(left), len(right)]."""
    counts = [[_ngrams(code) for code in codes] for codes in (left, right)]
    out = np.zeros((len(left), len(right)), np.float64)
    for i, a in enumerate(counts[0]):
        for j, b in enumerate(counts[1]):
            norm = (sum(v * v for v in a.values()) * sum(v * v for v in b.values())) ** 0.5
            out[i, j] = sum(v * b[gram] for gram, v in a.items()) / norm if norm else 0.0
    return out


def _ngrams(code: str) -> Counter:
    tokens = _TOKEN.findall(code)
    return Counter(
        tuple(tokens[i : i + n])
        for n in range(1, _LONGEST + 1)
        for i in range(len(tokens) - n + 1)
    )


def partial_credit(
    codes: Sequence[str],
    correct: Sequence[bool],
    groups: Sequence[int],
    alpha: float = 0.5,
    similarity: Similarity = token_similarity,
) -> np.ndarray:
    """r_acc of every trajectory: 1 if right, the shaped credit if not. -> [N] float32."""
    correct, groups = np.asarray(correct, bool), np.asarray(groups)
    credit = correct.astype(np.float32)
    if alpha == 0:
        return credit
    for group in np.unique(groups):
        right = [i for i in np.flatnonzero((groups == group) & correct) if codes[i].strip()]
        count = int(np.sum((groups == group) & correct))  # |P| counts those without code too
        wrong = [i for i in np.flatnonzero((groups == group) & ~correct) if codes[i].strip()]
        if right and wrong:
            sims = similarity([codes[i] for i in wrong], [codes[i] for i in right])
            credit[wrong] = alpha * np.clip(sims, 0.0, None).sum(axis=1) / count
    return credit


SIMILARITIES: dict[str, Similarity] = {"tokens": token_similarity}
