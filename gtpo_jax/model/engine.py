"""Generation: slots whose key/value cache lives as long as their trajectory.

The engine knows token ids only, never text. A slot is the list of all its ids; the invariant
that every operation keeps is

    the cache of a slot holds the keys and values of all its tokens but the last,

so a prompt or a feedback is written by a forward pass without logits, and `decode` begins by
feeding the last token, whoever wrote it. Nothing is ever computed twice: not on `append`, and
`rewind` only forgets. Entries beyond a slot's length are stale, masked and overwritten later.

Shapes come from a short list: prefill and append work on `rows` slots at a time with lengths
from `buckets`, decode always on all slots, and the cache is as long as the longest slot in use
needs (`capacities`), since every step reads all of it. So after warm-up nothing compiles, and a
trajectory's numbers depend on who shares the batch with it in the last bits at most.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gtpo_jax.errors import InputError
from gtpo_jax.model import sampling
from gtpo_jax.model.attention import Cache
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.sampling import Sampling
from gtpo_jax.model.transformer import Block, Params, head, norm

SHORTEST = 256  # tokens of cache that a slot has at the least


class Engine:
    """`slots` trajectories decoded side by side, each up to `max_length` tokens."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        max_length: int,
        stop_ids: Sequence[int],
        how: Sampling | None = None,
        rows: int = 16,
        buckets: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048, 4096),
    ) -> None:
        if max_length > config.max_length:
            raise InputError(
                f"engine.max_length={max_length} exceeds the model's context of "
                f"{config.max_length} tokens"
            )
        self.config = config
        self.slots = slots
        self.max_length = max_length
        self.rows = min(rows, slots)
        self.buckets = sorted({min(b, max_length) for b in buckets} | {max_length})
        doubled = (SHORTEST << i for i in range(max_length.bit_length()))
        self.capacities = [c for c in doubled if c < max_length] + [max_length]
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self.prefilled = 0  # tokens that went through a forward pass in prefill and append
        self.slot_steps = 0  # decoding steps times slots, idle ones too
        self._keys = np.zeros((slots, 2), np.uint32)
        self._turns = np.zeros(slots, np.int32)
        self._prompts = np.zeros(slots, np.int32)  # lengths
        self._params: Params | None = None
        shape = (slots, config.kv_heads, self.capacities[0], config.head_dim)
        self._caches = [
            (jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
            for _ in range(config.layers)
        ]
        stops = tuple(int(i) for i in stop_ids)
        self._decode = jax.jit(
            functools.partial(_decode, config, stops, how or Sampling()),
            static_argnames="steps",
            donate_argnums=1,
        )
        self._extend = jax.jit(functools.partial(_extend, config), donate_argnums=1)
        self._fork = jax.jit(_fork, donate_argnums=0)
        self._resize = jax.jit(_resize, static_argnums=1)
        self._refresh = jax.jit(functools.partial(_per_layer, config))

    def refresh(self, params: Params) -> None:
        """Take the policy's new weights. Slots in flight keep their caches; start afresh."""
        self._params = self._refresh(params)

    def prefill(
        self, slots: Sequence[int], prompts: Sequence[Sequence[int]], keys: np.ndarray
    ) -> None:
        """Start new trajectories. keys [n,2] uint32, from `sampling.trajectory_keys`."""
        for slot, prompt, key in zip(slots, prompts, keys, strict=True):
            if not 0 < len(prompt) < self.max_length:
                raise InputError(
                    f"a prompt of {len(prompt)} tokens: between 1 and "
                    f"{self.max_length - 1} fit into engine.max_length={self.max_length}"
                )
            self._start(slot, list(prompt), key)
        self._run_extend(slots, [0] * len(slots))

    def fork(
        self,
        sources: Sequence[int],
        targets: Sequence[int],
        lengths: Sequence[int],
        keys: np.ndarray,
    ) -> None:
        """Start each target with the first `lengths` tokens of its source, cache included."""
        prompts = [self.tokens[s][:n] for s, n in zip(sources, lengths, strict=True)]
        for target, prompt, key in zip(targets, prompts, keys, strict=True):
            self._start(target, prompt, key)
        for first in range(0, len(targets), self.rows):
            # Targets beyond the last slot are padding: nothing is written there.
            index = np.full((2, self.rows), ((0,), (self.slots,)), np.int32)
            chunk = slice(first, first + self.rows)
            index[:, : len(targets[chunk])] = sources[chunk], targets[chunk]
            self._caches = self._fork(self._caches, *index)

    def append(self, slots: Sequence[int], feedback: Sequence[Sequence[int]]) -> None:
        """Add tokens that the policy did not sample; the next decode is a new turn."""
        starts = [len(self.tokens[s]) - 1 for s in slots]
        for slot, tokens in zip(slots, feedback, strict=True):
            if len(self.tokens[slot]) + len(tokens) >= self.max_length:
                raise ValueError(
                    f"slot {slot}: {len(tokens)} tokens of feedback after "
                    f"{len(self.tokens[slot])} leave no room in {self.max_length}"
                )
            self.tokens[slot] += tokens
            self._turns[slot] += 1
        self._run_extend(slots, starts)

    def decode(
        self, slots: Sequence[int], steps: int, limits: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]:
        """Sample up to `steps` tokens in each of `slots`, at most its own of `limits`.

        A slot stops at a stop id (which is part of what it sampled). The loop runs on the
        device and returns when all have stopped. Gives (tokens, logprobs) per slot.
        """
        if self._params is None:
            raise ValueError("Engine.refresh(params) comes before the first decode")
        room = np.zeros(self.slots, np.int32)
        for slot, limit in zip(slots, limits, strict=True):
            room[slot] = min(limit, steps, self.max_length - len(self.tokens[slot]))
        self._hold([len(self.tokens[s]) + int(room[s]) for s in slots])
        lengths = np.array([max(len(t), 1) - 1 for t in self.tokens], np.int32)
        pending = np.array([t[-1] if t else 0 for t in self.tokens], np.int32)
        self._caches, tokens, logprobs, counts, steps_run = self._decode(
            self._params,
            self._caches,
            lengths,
            pending,
            room,
            self._keys,
            self._turns,
            steps=steps,
        )
        tokens, logprobs, counts, steps_run = jax.device_get(
            (tokens, logprobs, counts, steps_run)
        )
        self.slot_steps += self.slots * int(steps_run)
        sampled = []
        for slot in slots:
            new = tokens[slot, : counts[slot]].tolist()
            self.tokens[slot] += new
            sampled.append((new, logprobs[slot, : counts[slot]].tolist()))
        return sampled

    def rewind(self, slot: int, length: int) -> None:
        """Forget everything past the first `length` tokens of the slot."""
        if not 0 < length <= len(self.tokens[slot]):
            raise ValueError(f"rewind to {length} of a slot of {len(self.tokens[slot])} tokens")
        del self.tokens[slot][length:]

    def release(self, slot: int) -> None:
        """Nothing more is decoded here. Its prompt may still be forked until it is reused."""
        self._turns[slot] = 0
        del self.tokens[slot][self._prompts[slot] :]

    def _start(self, slot: int, prompt: list[int], key: np.ndarray) -> None:
        self.tokens[slot] = prompt
        self._keys[slot] = key
        self._turns[slot] = 0
        self._prompts[slot] = len(prompt)

    def _hold(self, lengths: Sequence[int]) -> None:
        """Make the cache just long enough for all slots and for these lengths."""
        needed = max([*lengths, *map(len, self.tokens), 1])
        capacity = next(c for c in self.capacities if c >= needed)
        if capacity != self._caches[0][0].shape[2]:
            self._caches = self._resize(self._caches, capacity)

    def _run_extend(self, slots: Sequence[int], starts: Sequence[int]) -> None:
        """Write the cache from position starts[i] up to all but the last token of slots[i]."""
        if self._params is None:
            raise ValueError("Engine.refresh(params) comes before the first prefill")
        self._hold([])
        for first in range(0, len(slots), self.rows):
            chunk = range(first, min(first + self.rows, len(slots)))
            news = [self.tokens[slots[i]][starts[i] : -1] for i in chunk]
            longest = max(len(new) for new in news)
            if longest == 0:
                continue  # prompts of one token: there is nothing but the pending one
            length = next(b for b in self.buckets if b >= longest)
            tokens = np.zeros((self.rows, length), np.int32)
            positions = np.full((self.rows, length), self.max_length, np.int32)
            index = np.full(self.rows, self.slots, np.int32)  # padding: written nowhere
            for row, (i, new) in enumerate(zip(chunk, news, strict=True)):
                tokens[row, : len(new)] = new
                positions[row, : len(new)] = np.arange(starts[i], starts[i] + len(new))
                index[row] = slots[i]
                self.prefilled += len(new)
            self._caches = self._extend(self._params, self._caches, tokens, positions, index)


def _per_layer(config: ModelConfig, params: Params) -> Params:
    """Stacked training weights -> one tree a layer, matrices in the compute dtype."""
    # Slicing the stack in every decode step would cost as much as reading it.
    cast = jax.tree.map(lambda x: x.astype(config.dtype), params)
    layers = [
        jax.tree.map(lambda x, layer=layer: x[layer], cast["layers"])
        for layer in range(config.layers)
    ]
    return {**cast, "layers": layers}


def _forward(config, params, tokens, positions, caches, slots=None):
    """tokens, positions [n,T] -> hidden [n,T,D] and the caches with these tokens in them."""
    x = params["embed"][tokens]
    block, out = Block(config), []
    for layer, (keys, values) in zip(params["layers"], caches, strict=True):
        cache = Cache(keys, values, slots)
        x, cache = block.apply({"params": layer}, x, positions, cache=cache)
        out.append((cache.keys, cache.values))
    return norm(config, "final_norm").apply({"params": params["final_norm"]}, x), out


def _extend(config, params, caches, tokens, positions, slots):
    return _forward(config, params, tokens, positions, caches, slots)[1]


def _fork(caches, sources, targets):
    # In place, a few rows at a time: a target is never also a source of another.
    return jax.tree.map(
        lambda cache: cache.at[targets].set(cache[sources], mode="drop"), caches
    )


def _resize(caches, capacity):
    """Longer by empty places, or shorter."""
    missing = max(0, capacity - caches[0][0].shape[2])
    widths = ((0, 0), (0, 0), (0, missing), (0, 0))
    return jax.tree.map(lambda cache: jnp.pad(cache[:, :, :capacity], widths), caches)


def _decode(
    config,
    stops,
    how,
    params,
    caches,
    lengths,
    pending,
    room,
    keys,
    turns,
    steps,
):
    """The device-side loop. lengths, pending, room, turns [B]; keys [B,2]; see `decode`."""
    slots = lengths.shape[0]
    turn_keys = sampling.fold(jax.random.wrap_key_data(keys), turns)

    def going(state):
        return jnp.any(state["alive"]) & (state["step"] < steps)

    def step(state):
        # A slot that has stopped feeds its last token again, to the place where that token
        # will be written when it goes on: harmless, and the shape stays the same.
        hidden, caches = _forward(
            config,
            params,
            state["pending"][:, None],
            state["lengths"][:, None],
            state["caches"],
        )
        logits = head(config, params, hidden[:, 0])
        draw_keys = sampling.fold(turn_keys, state["lengths"])
        new, logprob = sampling.sample(logits, draw_keys, how)
        alive, i = state["alive"], state["step"]
        counts = state["counts"] + alive
        ended = functools.reduce(jnp.logical_or, [new == s for s in stops], ~alive)
        return {
            "caches": caches,
            "lengths": state["lengths"] + alive,
            "pending": jnp.where(alive, new, state["pending"]),
            "alive": ~ended & (counts < room),
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
        "counts": jnp.zeros(slots, jnp.int32),
        "tokens": jnp.zeros((slots, steps), jnp.int32),
        "logprobs": jnp.zeros((slots, steps), jnp.float32),
        "step": jnp.int32(0),
    }
    state = jax.lax.while_loop(going, step, state)
    return tuple(state[name] for name in ("caches", "tokens", "logprobs", "counts", "step"))
