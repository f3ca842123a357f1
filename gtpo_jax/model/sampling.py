"""Drawing the next token, and the keys it is drawn with.

The policy is the tempered distribution softmax(logits / T): the trainer scores with the same
T, so one array of logprobs serves both. Every draw has a key of its own, folded from
(seed, step, problem, member) by `trajectory_keys`, then turn and position in the engine's
decode loop: what is drawn depends neither on the slot nor on who else is decoding.
"""

import jax
import jax.numpy as jnp


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


def sample(
    logits: jax.Array, keys: jax.Array, temperature: float, top_p: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """logits [B,V], one key a row -> tokens [B] int32 and their logprobs [B] float32.

    temperature 0 is greedy; its logprobs are those at temperature 1. `top_p` < 1 draws from
    the nucleus only (for evaluation: the policy that is trained has none); logprobs stay
    those of the whole tempered distribution.
    """
    scaled = logits / temperature if temperature > 0 else logits
    logprobs = jax.nn.log_softmax(scaled)
    if temperature > 0:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        kept = nucleus(logprobs, top_p) if top_p < 1 else scaled
        tokens = jnp.argmax(kept + noise, axis=-1)
    else:
        tokens = jnp.argmax(scaled, axis=-1)
    return tokens.astype(jnp.int32), jnp.take_along_axis(logprobs, tokens[:, None], 1)[:, 0]


def nucleus(logprobs: jax.Array, top_p: float) -> jax.Array:
    """-inf outside the smallest set of likeliest tokens that weighs at least `top_p`.

    logprobs [B,V] -> [B,V]. Holtzman et al., arXiv 1904.09751. Tokens as likely as the
    last one that is needed all stay.
    """
    descending = -jnp.sort(-logprobs, axis=-1)
    before = jnp.cumsum(jnp.exp(descending), axis=-1) - jnp.exp(descending)
    needed = jnp.sum(before < top_p, axis=-1, keepdims=True)  # the first always is
    least = jnp.take_along_axis(descending, jnp.maximum(needed, 1) - 1, axis=-1)
    return jnp.where(logprobs >= least, logprobs, -jnp.inf)
