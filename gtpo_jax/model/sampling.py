"""Drawing the next token, and the keys it is drawn with.

The policy is the tempered distribution softmax(logits / T): the trainer scores with the same
T, so one array of logprobs serves both. Every draw has a key of its own, folded from
(seed, step, problem, member) by `trajectory_keys`, then turn and position in the engine's
decode loop: what is drawn depends neither on the slot nor on who else is decoding.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gtpo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. All but `temperature` cut the policy's distribution down, so they
    are for evaluation and chat, never for training.

    temperature: 0 is greedy. top_k: the likeliest k; 0: all. top_p: the nucleus (Holtzman et
    al., arXiv 1904.09751). min_p: those at least so likely against the likeliest (Nguyen et
    al., arXiv 2407.01082). banned: ids that are never drawn. What all of them leave is drawn
    from in its proportions. Raises InputError for values that make no sense.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, good, right in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
        ):
            if not good:
                raise InputError(f"{name}={getattr(self, name)} must be {right}")


@jax.jit
def trajectory_keys(
    seed: jax.Array, step: jax.Array, problems: jax.Array, members: jax.Array
) -> jax.Array:
    """seed, step scalars; problems, members [n] uint32 -> key data [n,2] uint32."""
    base = jax.random.fold_in(jax.random.key(seed), step)

    def one(problem, member):
        return jax.random.fold_in(jax.random.fold_in(base, problem), member)

    return jax.random.key_data(jax.vmap(one)(problems, members))


def fold(keys: jax.Array, numbers: jax.Array) -> jax.Array:
    """Fold one number into each key. keys [B] (typed keys), numbers [B] int32."""
    return jax.vmap(jax.random.fold_in)(keys, numbers)


def sample(logits: jax.Array, keys: jax.Array, how: Sampling) -> tuple[jax.Array, jax.Array]:
    """logits [B,V], one key a row -> tokens [B] int32 and their logprobs [B] float32.

    Logprobs are those of the whole tempered distribution, whatever was cut off; of a greedy
    token, those at temperature 1.
    """
    scaled = logits / how.temperature if how.temperature > 0 else logits
    logprobs = scaled - jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    kept = keep(logprobs, how)
    tokens = draw(kept, keys) if how.temperature > 0 else jnp.argmax(kept, axis=-1)
    return tokens.astype(jnp.int32), jnp.take_along_axis(logprobs, tokens[:, None], 1)[:, 0]


def draw(logprobs: jax.Array, keys: jax.Array, block: int = 128) -> jax.Array:
    """logprobs [B,V], one key a row -> tokens [B], drawn in proportion to exp(logprobs).

    By Gumbel-max twice, first a block of the vocabulary and then a token in it, since
    P(token) = P(block) P(token | block): V / block + block random numbers a row, not V, which
    would cost as much as the head of a small model.
    """
    rows, size = logprobs.shape
    blocks = jnp.pad(logprobs, ((0, 0), (0, -size % block)), constant_values=-jnp.inf)
    blocks = blocks.reshape(rows, -1, block)
    count = blocks.shape[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (count + block,)))(keys)
    # A block may be all -inf: its sum is 0 and its logarithm -inf again.
    masses = jnp.log(jnp.sum(jnp.exp(blocks), axis=-1))
    chosen = jnp.argmax(masses + noise[:, :count], axis=-1)
    inner = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0]
    return chosen * block + jnp.argmax(inner + noise[:, count:], axis=-1)


def keep(logprobs: jax.Array, how: Sampling) -> jax.Array:
    """-inf where `how` leaves nothing. logprobs [B,V] -> [B,V]; as likely, as kept.

    The likeliest token that is not banned always stays.
    """
    if how.banned:
        logprobs = logprobs.at[:, jnp.array(how.banned)].set(-jnp.inf)
        logprobs = logprobs - jax.nn.logsumexp(logprobs, axis=-1, keepdims=True)
    if how.temperature == 0:
        return logprobs
    least = jnp.full((len(logprobs), 1), -jnp.inf)
    if how.min_p > 0:
        least = jnp.maximum(least, logprobs.max(axis=-1, keepdims=True) + jnp.log(how.min_p))
    if 0 < how.top_k < logprobs.shape[1]:
        least = jnp.maximum(least, jax.lax.top_k(logprobs, how.top_k)[0][:, -1:])
    if how.top_p < 1:
        descending = -jnp.sort(-logprobs, axis=-1)
        before = jnp.cumsum(jnp.exp(descending), axis=-1) - jnp.exp(descending)
        needed = jnp.sum(before < how.top_p, axis=-1, keepdims=True)  # the first always is
        last = jnp.take_along_axis(descending, jnp.maximum(needed, 1) - 1, axis=-1)
        least = jnp.maximum(least, last)
    return jnp.where(logprobs >= least, logprobs, -jnp.inf)
