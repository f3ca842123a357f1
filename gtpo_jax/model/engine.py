"""Generation: slots whose key/value cache lives as long as their trajectory.

The engine knows token ids only, never text. A slot is the list of all its ids; the invariant
that every operation keeps is

    the cache of a slot holds the keys and values of all its tokens but the last,

so a prompt or a feedback is written by a forward pass without logits, and `decode` begins by
feeding the last token, whoever wrote it. Nothing is ever computed twice: not on `append`, and
`rewind` only forgets. Entries beyond a slot's length are stale, masked and overwritten later.

At most `width` slots decode at a time: they have a row in the batch. The others are parked, in
rows of a second cache, and change places with slots that wait for their tools: so the batch
stays full while tools run, and nothing is copied but the rows that change.

Shapes come from short lists (`programs` names them all), and each is compiled once, by
`warm_up` before the first step or else when it is first needed. The caches start short and
double while trajectories grow, since every step reads all of them; few slots decode in a
narrower batch. So a trajectory's numbers depend on who shares the batch with it in the last
bits at most.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from gtpo_jax.errors import InputError
from gtpo_jax.model.caches import Caches
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.programs import MOVED_TOGETHER, compiled
from gtpo_jax.model.sampling import Sampling
from gtpo_jax.model.transformer import Params
from gtpo_jax.parallel import engine_mesh

SHORTEST = 256  # tokens of cache that a slot has at the least
WRITTEN_TOGETHER = 2048  # tokens of one forward pass without logits, at most
EARLY = 8  # decode returns when one slot in EARLY has stopped


class Engine:
    """`slots` trajectories, each up to `max_length` tokens, `width` of them decoded at a time.

    stop_ids: where a slot stops and the host looks at what it says. width 0: all slots.
    rows, lengths: the shapes in which prompts and feedback are written, rising. cache_dtype:
    empty for the model's. mesh: the devices it works on (None: the first), heads over `tensor`.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        max_length: int,
        stop_ids: Sequence[int],
        how: Sampling | None = None,
        width: int = 0,
        rows: Sequence[int] = (1, 4, 16),
        lengths: Sequence[int] = (32, 128, 512),
        cache_dtype: str = "",
        mesh: Mesh | None = None,
    ) -> None:
        if max_length > config.max_length:
            raise InputError(
                f"engine.max_length={max_length} exceeds the model's context of "
                f"{config.max_length} tokens"
            )
        if width == 1 < slots:
            raise InputError("engine.width=1: at least 2, a slot and the one it is forked from")
        self.config = config
        self.slots = slots
        self.max_length = max_length
        self.width = min(width or slots, slots)
        self.widths = sorted({-(-self.width // 2**i) for i in range(4)})
        self.rows = sorted({min(n, self.width) for n in rows})
        self.lengths = sorted({min(n, max_length) for n in lengths})
        doubled = (SHORTEST << i for i in range(max_length.bit_length()))
        self.capacities = [c for c in doubled if c < max_length] + [max_length]
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self.prefilled = 0  # tokens that went through a forward pass in prefill and append
        self.slot_steps = 0  # decoding steps times the rows that took part, idle ones too
        self._stops = tuple(int(i) for i in stop_ids)
        self._how = how or Sampling()
        self._dtype = cache_dtype or config.dtype
        self._mesh = mesh or engine_mesh(jax.local_devices()[:1])
        self._keys = np.zeros((slots, 2), np.uint32)
        self._turns = np.zeros(slots, np.int32)
        self._prompts = np.zeros(slots, np.int32)  # lengths
        self._row = list(range(slots))  # of each slot; from `width` on: parked
        self._params: Params | None = None
        self._batch: Caches | None = None
        self._parked: Caches | None = None

    def refresh(self, weights: Params | None) -> None:
        """Take the policy's new weights, as `caches.per_layer` gives them; None: hold none.
        Slots in flight keep their caches; start afresh."""
        self._params = weights

    def reset(self) -> None:
        """Forget all slots and give the memory of their caches back."""
        self._batch = self._parked = None
        self._row = list(range(self.slots))
        self.tokens = [[] for _ in range(self.slots)]

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
        self._extend(slots, [0] * len(slots))

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
        self._hold([])
        pairs = list(zip(sources, targets, strict=True))
        together = min(MOVED_TOGETHER, self.width // 2 or 1)  # so that all have a seat
        for now in (pairs[i : i + together] for i in range(0, len(pairs), together)):
            self._seat({s for pair in now for s in pair})
            taken = self._take(self._batch, [self._row[s] for s, _ in now])
            self._batch = self._put(self._batch, [self._row[t] for _, t in now], taken)

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
        self._extend(slots, starts)

    def decode(
        self, slots: Sequence[int], steps: int, limits: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]:
        """Sample up to `steps` tokens in each of `slots`, at most its own of `limits`.

        A slot stops at a stop id (which is part of what it sampled). The loop runs on the
        device and returns when one in EARLY has stopped. Gives (tokens, logprobs) per slot;
        nothing for those beyond `width`, of which those go first that are in the batch.
        """
        sampled: list[tuple[list[int], list[float]]] = [([], []) for _ in slots]
        room = [
            min(limit, steps, self.max_length - len(self.tokens[slot]))
            for slot, limit in zip(slots, limits, strict=True)
        ]
        going = sorted(
            (i for i in range(len(slots)) if room[i] > 0),
            key=lambda i: self._row[slots[i]] >= self.width,
        )[: self.width]
        if not going:
            return sampled
        self._hold([len(self.tokens[slots[i]]) + room[i] for i in going])
        self._seat({slots[i] for i in going})
        width = next(w for w in self.widths if w >= len(going))
        at = {self._row[slots[i]]: i for i in going}
        seats = list(range(width)) if width == self.width else list(at)
        rows, lengths, pending, rooms, turns = np.zeros((5, width), np.int32)
        keys = np.zeros((width, 2), np.uint32)
        rows[len(seats) :] = self.width
        seated = {row: slot for slot, row in enumerate(self._row)}
        for place, row in enumerate(seats):
            slot = seated[row]
            rows[place] = row
            lengths[place] = max(len(self.tokens[slot]), 1) - 1
            pending[place] = self.tokens[slot][-1] if self.tokens[slot] else 0
            rooms[place] = room[at[row]] if row in at else 0
            turns[place], keys[place] = self._turns[slot], self._keys[slot]
        program = self._program(*self._decoding(self._capacity, width, steps))
        enough = np.int32(max(1, len(going) // EARLY))
        self._batch, out = program(
            self._params, self._batch, rows, lengths, pending, rooms, keys, turns, enough
        )
        out = jax.device_get(out)
        self.slot_steps += width * int(out["step"])
        for place, row in enumerate(seats):
            if row in at:
                count = out["counts"][place]
                new = out["tokens"][place, :count].tolist()
                self.tokens[seated[row]] += new
                sampled[at[row]] = (new, out["logprobs"][place, :count].tolist())
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

    def programs(self, steps: int) -> list[tuple]:
        """The names of all programs that a rollout with decodes of `steps` can need."""
        batch, parked = self.width, self.slots - self.width
        names: list[tuple] = []
        for place, capacity in enumerate(self.capacities):
            names += [self._decoding(capacity, width, steps) for width in self.widths]
            names += [
                ("extend", batch, capacity, n, length)
                for n in self.rows
                for length in self.lengths
                if n * length <= WRITTEN_TOGETHER or length == self.lengths[0]
            ]
            for held in {batch, parked} - {0}:
                names += [("take", held, capacity), ("put", held, capacity)]
                before = self.capacities[place - 1] if place else 0
                names += [
                    ("grow", held, before, capacity) if place else ("fresh", held, capacity)
                ]
        return names

    def warm_up(self, steps: int) -> str:
        """Compile all programs now, side by side; says how many, and how long it took."""
        started = time.perf_counter()
        names = self.programs(steps)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda name: self._program(*name), names))
        seconds = time.perf_counter() - started
        return f"compiled {len(names)} programs for generation in {seconds:.0f} s"

    @property
    def _capacity(self) -> int:
        return self._batch[0][1].shape[2] if self._batch else 0

    def _start(self, slot: int, prompt: list[int], key: np.ndarray) -> None:
        self.tokens[slot] = prompt
        self._keys[slot] = key
        self._turns[slot] = 0
        self._prompts[slot] = len(prompt)

    def _hold(self, lengths: Sequence[int]) -> None:
        """Make the caches long enough for all slots and for these lengths."""
        parked = self.slots - self.width
        if self._batch is None:
            shortest = self.capacities[0]
            self._batch = self._program("fresh", self.width, shortest)()
            self._parked = self._program("fresh", parked, shortest)() if parked else None
        needed = max([*lengths, *map(len, self.tokens)])
        for before, after in zip(self.capacities, self.capacities[1:], strict=False):
            if self._capacity == before and needed > before:
                self._batch = self._program("grow", self.width, before, after)(self._batch)
                if parked:
                    self._parked = self._program("grow", parked, before, after)(self._parked)

    def _seat(self, slots: set[int]) -> None:
        """Bring `slots`, at most `width`, into the batch; others make room."""
        outside = sorted(s for s in slots if self._row[s] >= self.width)
        inside = {s for s, row in enumerate(self._row) if row < self.width}
        # Those without tokens go first, then those that have the least to say.
        leaving = sorted(inside - slots, key=lambda s: (len(self.tokens[s]), s))
        pairs = list(zip(leaving, outside, strict=False))
        for first in range(0, len(pairs), MOVED_TOGETHER):
            now = pairs[first : first + MOVED_TOGETHER]
            mine = [self._row[out] for out, _ in now]
            theirs = [self._row[come] - self.width for _, come in now]
            going = self._take(self._batch, mine)
            self._batch = self._put(self._batch, mine, self._take(self._parked, theirs))
            self._parked = self._put(self._parked, theirs, going)
            for out, come in now:
                self._row[out], self._row[come] = self._row[come], self._row[out]

    def _take(self, cache: Caches | None, rows: Sequence[int]) -> Caches:
        assert cache is not None  # `_hold` has made it
        held = cache[0][0].shape[0]
        return self._program("take", held, self._capacity)(cache, _padded(rows, held))

    def _put(self, cache: Caches | None, rows: Sequence[int], taken: Caches) -> Caches:
        assert cache is not None
        held = cache[0][0].shape[0]
        return self._program("put", held, self._capacity)(cache, _padded(rows, held), taken)

    def _extend(self, slots: Sequence[int], starts: Sequence[int]) -> None:
        """Write the cache from position starts[i] up to all but the last token of slots[i]."""
        if self._params is None:
            raise ValueError("Engine.refresh(weights) comes before the first prefill")
        self._hold([])
        news = {s: self.tokens[s][a:-1] for s, a in zip(slots, starts, strict=True)}
        at = dict(zip(slots, starts, strict=True))
        self.prefilled += sum(map(len, news.values()))
        # The longest together; a prompt of one token has nothing but the pending one.
        queue = sorted((s for s in slots if news[s]), key=lambda s: -len(news[s]))
        for count in pieces(len(queue), self.rows):
            group, queue = queue[:count], queue[count:]
            self._seat(set(group))
            lengths = [n for n in self.lengths if count * n <= WRITTEN_TOGETHER]
            done = 0
            for length in pieces(len(news[group[0]]), lengths or self.lengths[:1]):
                tokens = np.zeros((count, length), np.int32)
                positions = np.full((count, length), self.max_length, np.int32)
                rows = np.full(count, self.width, np.int32)
                for i, slot in enumerate(group):
                    new = news[slot][done : done + length]
                    first = at[slot] + done
                    tokens[i, : len(new)] = new
                    positions[i, : len(new)] = np.arange(first, first + len(new))
                    rows[i] = self._row[slot]
                done += length
                program = self._program("extend", self.width, self._capacity, count, length)
                self._batch = program(self._params, self._batch, tokens, positions, rows)

    def _decoding(self, capacity: int, width: int, steps: int) -> tuple:
        return ("decode", self.width, capacity, width, steps, self._stops, self._how)

    def _program(self, *name) -> Callable:
        return compiled(self.config, self._dtype, self._mesh, *name)


def _padded(rows: Sequence[int], nowhere: int) -> np.ndarray:
    """MOVED_TOGETHER row numbers, of which the last are read as any and written nowhere."""
    return np.array([*rows, *[nowhere] * (MOVED_TOGETHER - len(rows))], np.int32)


def pieces(count: int, sizes: Sequence[int]) -> list[int]:
    """Sizes, out of `sizes` (rising), that cover `count` with no more padding than `count`
    where the smallest allows it: 100 of (32, 128, 512) -> [128]; 140 -> [128, 32]."""
    out = []
    while count > 0:
        size = next((s for s in sizes if s >= count), sizes[-1])
        if size > 2 * count:
            size = max((s for s in sizes if s <= count), default=size)
        out.append(size)
        count -= size
    return out
