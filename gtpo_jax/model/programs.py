"""What the engine runs, compiled ahead for its shapes: every program has a name."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gtpo_jax.model import caches, transformer
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.parallel import Layout, sharding

MOVED_TOGETHER = 4  # rows


@functools.cache
def compiled(config: ModelConfig, dtype: str, mesh: Mesh, name: str, *shape) -> Callable:
    """The program of this name for these shapes; engines that are alike share it.

    fresh rows capacity | grow rows before after | take, put rows capacity | extend rows
    capacity n T | decode rows capacity W steps stops how, as `model.caches` has them. Weights
    and caches lie on `mesh` by heads, all else is on each of its devices.
    """
    layout = Layout(mesh)
    fresh = functools.partial(caches.fresh, config, layout.platform, dtype)
    copied, by_heads = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "tensor"))

    def ints(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=copied)

    def empty(rows, capacity):
        made = jax.eval_shape(lambda: fresh(rows, capacity))
        return jax.tree.map(lambda x: x.update(sharding=by_heads), made)

    def weights():
        made = jax.eval_shape(lambda: caches.per_layer(config, transformer.init(config, 0)))
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x.update(sharding=sharding(mesh, path, x.shape)), made
        )

    outs = by_heads
    match name, *shape:
        case "fresh", rows, capacity:
            made = functools.partial(fresh, rows, capacity)
            donated, shapes = (), ()
        case "grow", rows, before, after:
            made = functools.partial(caches.grow, layout.platform, after - before)
            donated, shapes = (), (empty(rows, before),)
        case "take", rows, capacity:
            made = caches.take_rows
            donated, shapes = (), (empty(rows, capacity), ints(MOVED_TOGETHER))
        case "put", rows, capacity:
            made = caches.put_rows
            taken = empty(MOVED_TOGETHER, capacity)
            donated, shapes = 0, (empty(rows, capacity), ints(MOVED_TOGETHER), taken)
        case "extend", rows, capacity, count, length:
            made = functools.partial(caches.extend, config, layout)
            tokens = ints(count, length)
            shapes = (weights(), empty(rows, capacity), tokens, tokens, ints(count))
            donated = 1
        case "decode", rows, capacity, width, steps, stops, how:
            made = functools.partial(caches.decode, config, layout, stops, how, steps)
            keys, each = ints(width, 2, dtype=jnp.uint32), ints(width)
            shapes = (weights(), empty(rows, capacity), *[each] * 4, keys, each, ints())
            donated, outs = 1, (by_heads, copied)
    program = jax.jit(made, donate_argnums=donated, out_shardings=outs)
    return program.lower(*shapes).compile()
