"""What the engine runs on the device: pure functions of weights, caches and small arrays.

Caches are a list, a layer each, of (keys, values), shaped by `attention.cache_shapes`. A row
number beyond the last is padding: it is read as any row and written nowhere. Letters: W rows
decoded together, n rows and T tokens written together.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gtpo_jax.model import sampling
from gtpo_jax.model.attention import Cache, cache_shapes
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.sampling import Sampling
from gtpo_jax.model.transformer import Block, Params, head, norm, product_for
from gtpo_jax.parallel import Layout

Caches = list[tuple[jax.Array, jax.Array]]


def fresh(config: ModelConfig, platform: str, dtype: str, rows: int, capacity: int) -> Caches:
    """Empty caches, for devices of this platform."""
    keys, values = cache_shapes(platform, rows, config.kv_heads, capacity, config.head_dim)
    return [(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for _ in range(config.layers)]


def grow(platform: str, more: int, caches: Caches) -> Caches:
    """The same with `more` empty places after them."""
    # Shapes of nothing but the places: how much longer each axis gets.
    wider = [[(0, n) for n in axes] for axes in cache_shapes(platform, 0, 0, more, 0)]
    return [(jnp.pad(keys, wider[0]), jnp.pad(values, wider[1])) for keys, values in caches]


# To copy or swap rows takes both of these, one after the other: in one program XLA on CPU would
# copy the whole cache first, and not only the rows.


def take_rows(caches: Caches, rows: jax.Array) -> Caches:
    """A copy of these rows."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), caches)


def put_rows(caches: Caches, rows: jax.Array, taken: Caches) -> Caches:
    """In place, row rows[i] := row i of `taken`."""
    return jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), caches, taken)


@functools.partial(jax.jit, static_argnums=0)
def per_layer(config: ModelConfig, params: Params) -> Params:
    """Stacked training weights -> one tree a layer, in the compute dtype; kernels [in,out] as
    "transposed" [out,in], which is how decoding reads them best (`transformer.columns`)."""

    # Slicing the stack in every decode step would cost as much as reading it.
    def of_layer(tree: Params, layer: int) -> Params:
        tree = jax.tree.map(lambda x: x[layer], tree)
        return {name: _renamed(part, "kernel", "transposed") for name, part in tree.items()}

    cast = jax.tree.map(lambda x: x.astype(config.dtype), params)
    layers = [of_layer(cast["layers"], layer) for layer in range(config.layers)]
    return {**cast, "layers": layers}


def _renamed(part: Params, old: str, new: str) -> Params:
    """The same part of a layer, with its matrix `old` transposed and called `new`."""
    return {new if name == old else name: x.T if name == old else x for name, x in part.items()}


def extend(
    config: ModelConfig,
    layout: Layout,
    params: Params,
    caches: Caches,
    tokens: jax.Array,
    positions: jax.Array,
    rows: jax.Array,
) -> Caches:
    """Write tokens [n,T] at positions [n,T] of rows [n]; positions past the end are padding."""
    return _forward(config, layout, params, tokens, positions, caches, rows)[1]


def decode(
    config: ModelConfig,
    layout: Layout,
    stops: tuple[int, ...],
    how: Sampling,
    steps: int,
    params: Params,
    caches: Caches,
    rows: jax.Array,
    lengths: jax.Array,
    pending: jax.Array,
    room: jax.Array,
    keys: jax.Array,
    turns: jax.Array,
    enough: jax.Array,
) -> tuple[Caches, dict[str, Any]]:
    """Sample up to `steps` tokens in each row, until `enough` of those going have stopped.

    lengths: tokens in the cache; pending: the one after them, not in it; room: how many may be
    sampled, 0 for a row that only keeps its place; keys [W,2], turns: what draws are keyed
    with. All [W] int32. -> the caches, and counts [W], tokens and logprobs [W,steps], steps.
    """
    # All rows: in place. Fewer: out of the caches, and back when done.
    narrow = len(rows) < caches[0][0].shape[0]
    if narrow:
        held, caches = caches, take_rows(caches, rows)
    turn_keys = sampling.fold(jax.random.wrap_key_data(keys), turns)
    stopping = jnp.zeros(config.vocab_size, bool).at[jnp.array(stops, int)].set(True)
    left = jnp.sum(room > 0) - enough
    product = product_for(layout.platform, len(rows))

    def going(state):
        return (jnp.sum(state["alive"]) > left) & (state["step"] < steps)

    def step(state):
        # A row that has stopped feeds its last token again, to the place where that token
        # will be written when it goes on: harmless, and the shape stays the same.
        hidden, caches = _forward(
            config,
            layout,
            params,
            state["pending"][:, None],
            state["lengths"][:, None],
            state["caches"],
        )
        logits = head(config, params, hidden[:, 0], product)
        draw_keys = sampling.fold(turn_keys, state["lengths"])
        new, logprob = sampling.sample(logits, draw_keys, how)
        alive, i = state["alive"], state["step"]
        counts = state["counts"] + alive
        return {
            "caches": caches,
            "lengths": state["lengths"] + alive,
            "pending": jnp.where(alive, new, state["pending"]),
            "alive": alive & ~stopping[new] & (counts < room),
            "counts": counts,
            "tokens": state["tokens"].at[:, i].set(new),
            "logprobs": state["logprobs"].at[:, i].set(logprob),
            "step": i + 1,
        }

    state = {
        "caches": caches,
        "lengths": lengths,
        "pending": pending,
        "alive": room > 0,
        "counts": jnp.zeros_like(room),
        "tokens": jnp.zeros((len(rows), steps), jnp.int32),
        "logprobs": jnp.zeros((len(rows), steps), jnp.float32),
        "step": jnp.int32(0),
    }
    state = jax.lax.while_loop(going, step, state)
    caches = state["caches"]
    if narrow:
        caches = put_rows(held, rows, caches)
    return caches, {name: state[name] for name in ("counts", "tokens", "logprobs", "step")}


def _forward(config, layout, params, tokens, positions, caches, rows=None):
    """tokens, positions [n,T] -> hidden [n,T,D] and the caches with these tokens in them."""
    x = params["embed"][tokens]
    # Jitted by itself, a layer is traced once and not as often as there are layers.
    block = jax.jit(lambda p, x, at, cache: Block(config, layout).apply(p, x, at, cache=cache))
    out = []
    for layer, (keys, values) in zip(params["layers"], caches, strict=True):
        params_of = {n: _renamed(part, "transposed", "kernel") for n, part in layer.items()}
        x, cache = block({"params": params_of}, x, positions, Cache(keys, values, rows))
        out.append((cache.keys, cache.values))
    return norm(config, "final_norm").apply({"params": params["final_norm"]}, x), out
