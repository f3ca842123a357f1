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
    logits: jax.Array, keys: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """logits [B,V], one key a row -> tokens [B] int32 and their logprobs [B] float32.

    temperature 0 is greedy; its logprobs are those at temperature 1.
    """
    scaled = logits / temperature if temperature > 0 else logits
    logprobs = jax.nn.log_softmax(scaled)
    if temperature > 0:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        tokens = jnp.argmax(scaled + noise, axis=-1)
    else:
        tokens = jnp.argmax(scaled, axis=-1)
    return tokens.astype(jnp.int32), jnp.take_along_axis(logprobs, tokens[:, None], 1)[:, 0]
