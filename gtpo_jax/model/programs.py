"""What the engine runs, compiled ahead for its shapes: every program has a name."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gtpo_jax.model import caches, transformer
from gtpo_jax.model.config import ModelConfig

MOVED_TOGETHER = 4  # rows


@functools.cache
def compiled(config: ModelConfig, dtype: str, name: str, *shape) -> Callable:
    """The program of this name for these shapes; engines that are alike share it.

    fresh rows capacity | grow rows before after | take, put rows capacity | extend rows
    capacity n T | decode rows capacity W steps stops how, as `model.caches` has them.
    """

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def empty(rows, capacity):
        return jax.eval_shape(lambda: caches.fresh(config, dtype, rows, capacity))

    def weights():
        return jax.eval_shape(lambda: caches.per_layer(config, transformer.init(config, 0)))

    match name, *shape:
        case "fresh", rows, capacity:
            made = jax.jit(lambda: caches.fresh(config, dtype, rows, capacity))
            shapes = ()
        case "grow", rows, before, after:
            made = jax.jit(functools.partial(caches.grow, after))
            shapes = (empty(rows, before),)
        case "take", rows, capacity:
            made = jax.jit(caches.take_rows)
            shapes = (empty(rows, capacity), ints(MOVED_TOGETHER))
        case "put", rows, capacity:
            made = jax.jit(caches.put_rows, donate_argnums=0)
            taken = empty(MOVED_TOGETHER, capacity)
            shapes = (empty(rows, capacity), ints(MOVED_TOGETHER), taken)
        case "extend", rows, capacity, count, length:
            made = jax.jit(functools.partial(caches.extend, config), donate_argnums=1)
            tokens = ints(count, length)
            shapes = (weights(), empty(rows, capacity), tokens, tokens, ints(count))
        case "decode", rows, capacity, width, steps, stops, how:
            made = functools.partial(caches.decode, config, stops, how, steps)
            made = jax.jit(made, donate_argnums=1)
            keys = jax.ShapeDtypeStruct((width, 2), jnp.uint32)
            each = ints(width)
            shapes = (
                weights(),
                empty(rows, capacity),
                each,
                each,
                each,
                each,
                keys,
                each,
                ints(),
            )
    return made.lower(*shapes).compile()
