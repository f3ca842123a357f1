"""Devices: the only file that knows how many there are, and where arrays lie on them.

One mesh of three axes, whatever the machine:

    data     rows are split, weights are copied
    fsdp     rows are split, and weights too: each is gathered where it is used
    tensor   heads, the SwiGLU's width and the vocabulary are split, within one host

Training is mapped over it in one of two ways, by name:

    "mesh"   jax.jit over the mesh: weights lie as RULES says, the compiler adds what moves
    "pmap"   jax.pmap over `data` alone, rows split by hand, psum of the sums

Weights of the loss are written for the whole mini-batch, so a sum over devices is the whole
result. No leading device axis leaves this file.

Several hosts run the same program, step by step. Each samples its share of a step's problems
with its own engines and sandboxes; then all know all trajectories (`everywhere`) and compute
the same rewards and rows, of which each puts its own on its devices. Engines work within a
host, one on each group of `tensor` devices: hosts decode at their own pace.
"""

import contextlib
import dataclasses
import itertools
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gtpo_jax.errors import InputError

MAPPINGS = ("mesh", "pmap")
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
AT_ONCE = 2  # micro-batches on a CPU; each holds its activations

# How a weight is cut: the end of its path -> the axis that cuts each of its last dimensions.
# The first that fits counts. An optimiser's moments end alike; what has no dimension is copied.
RULES = (
    (r"(^|/)embed", ("tensor", "fsdp")),  # [V, D]
    (r"(^|/)head", ("fsdp", "tensor")),  # [D, V]
    (r"/(q|k|v|gate|up)/(kernel|lora_b)", ("fsdp", "tensor")),  # [D, out], [rank, out]
    (r"/(o|down)/(kernel|lora_a)", ("tensor", "fsdp")),  # [in, D], [in, rank]
    (r"/(q|k|v|gate|up)/transposed", ("tensor", "fsdp")),  # the same for engines, [out, D]
    (r"/(o|down)/transposed", ("fsdp", "tensor")),  # [D, in]
    (r"/(q|k|v)/bias", ("tensor",)),
    (r"/lora_[ab]|scale|ns_coeffs", ()),  # the others are small: every device has a copy
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the model is told of devices: how activations lie on a mesh. None: JAX's default."""

    mesh: Mesh | None = None

    @property
    def platform(self) -> str:
        """Of the devices that the program is for, which need not be there."""
        return self.mesh.devices.flat[0].platform if self.mesh else jax.default_backend()

    @property
    def sharers(self) -> int:
        """How many devices, or groups of `tensor` of them, share the rows."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"] if self.mesh else 1

    def between_layers(self, x: jax.Array) -> jax.Array:
        """x [R,T,D]: rows over data and fsdp, tokens over tensor (sequence parallelism)."""
        return self._lies(x, ROWS, "tensor", None)

    def whole_rows(self, x: jax.Array) -> jax.Array:
        """x [R,T,D]: rows over data and fsdp, each of them whole."""
        return self._lies(x, ROWS, None, None)

    def by_rows_and_heads(self, attend: Callable) -> Callable:
        """attend(q, k, v [R,T,heads,h], segment_ids [R,T]) -> [R,T,heads,h], device by device:
        no row and no head sees another."""
        heads = P(ROWS, None, "tensor", None)
        return self._map(attend, (heads, heads, heads, P(ROWS, None)), heads)

    def by_heads(self, attend: Callable) -> Callable:
        """attend(q, k, v [n,T,heads,h], positions [n,T], (keys, values [B,heads,S,h], slots))
        -> [n,T,heads,h] and the cache, device by device."""
        heads, cached = P(None, None, "tensor"), P(None, "tensor")

        def attend_on(q, k, v, positions, cache):
            on = type(cache)(cached, cached, P())
            ins, outs = (heads, heads, heads, P(), on), (heads, on)
            return self._map(attend, ins, outs)(q, k, v, positions, cache)

        return attend_on

    @property
    def _spread(self) -> bool:
        return self.mesh is not None and self.mesh.size > 1

    def _lies(self, x: jax.Array, *axes) -> jax.Array:
        if self.mesh is None or self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*axes)))

    def _map(self, fn: Callable, ins, outs) -> Callable:
        if not self._spread:
            return fn
        return jax.shard_map(fn, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How training is spread over the devices of all hosts, and engines over those of this."""

    mapping: str
    mesh: Mesh

    @property
    def sharers(self) -> int:
        """How many devices, or groups of `tensor` of them, share the rows."""
        return Layout(self.mesh).sharers

    @property
    def layout(self) -> Layout:
        """For the function that is mapped: pmap's sees one device."""
        return Layout(self.mesh if self.mapping == "mesh" else None)

    # ---- where things lie ------------------------------------------------------------------

    def shardings(self, tree: Any) -> Any:
        """For every leaf of a tree of weights, or what an optimiser made of it."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: sharding(self.mesh, path, x.shape), tree
        )

    def place(self, tree: Any) -> Any:
        """Weights, the same on every host, onto the devices, each only where it belongs."""
        return jax.tree.map(_put, tree, self.shardings(tree))

    def make(self, fn: Callable[..., Any], *args: Any) -> Any:
        """fn(*args), its leaves made where they belong."""
        outs = self.shardings(jax.eval_shape(fn, *args))
        return jax.jit(fn, out_shardings=outs)(*args)

    def rows(self, batch: Any) -> Any:
        """Arrays [R, ...] of all rows, the same on every host, onto the devices."""
        if self.mapping == "pmap":  # pmap splits them itself
            return batch
        over_rows = NamedSharding(self.mesh, P(ROWS))
        return jax.tree.map(lambda x: _put(np.asarray(x), over_rows), batch)

    def fetch(self, values: jax.Array) -> np.ndarray:
        """All rows of values [R, ...], on every host."""
        if jax.process_count() == 1:
            return np.asarray(values)
        return np.asarray(multihost_utils.process_allgather(values, tiled=True))

    # ---- functions of weights and rows -----------------------------------------------------

    def over_rows(self, fn: Callable) -> Callable:
        """Map fn(params, frozen, batch) -> gradients, sums, maxima, over the rows it is given;
        every device ends up with all of the sums and maxima, and its part of the gradients."""
        if self.mapping == "mesh":

            def whole(params, frozen, batch):
                grads, sums, maxima = fn(params, frozen, batch)
                grads = jax.lax.with_sharding_constraint(grads, self.shardings(grads))
                return grads, sums, maxima

            return jax.jit(whole)

        def summed(params, frozen, batch):
            grads, sums, maxima = fn(params, frozen, batch)
            grads, sums = jax.lax.psum((grads, sums), "data")
            return grads, sums, jax.lax.pmax(maxima, "data")

        mapped = self._pmap(summed, None)
        return lambda *weights_batch: self.place(mapped(*self._split(*weights_batch)))

    def per_row(self, fn: Callable) -> Callable:
        """Map fn(params, frozen, batch) -> values with a leading row axis."""
        if self.mapping == "mesh":
            return jax.jit(fn, out_shardings=NamedSharding(self.mesh, P(ROWS)))

        mapped = self._pmap(fn, 0)

        def joined(params, frozen, batch):
            out = mapped(*self._split(params, frozen, batch))
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

        return joined

    def _pmap(self, fn, out_axes):
        devices = list(self.mesh.devices.flat)
        return jax.pmap(fn, "data", in_axes=(None, None, 0), out_axes=out_axes, devices=devices)

    def _split(self, params, frozen, batch):
        split = jax.tree.map(lambda x: x.reshape(self.sharers, -1, *x.shape[1:]), batch)
        return params, frozen, split

    def each(self, fn: Callable[[Any], Any], parts: Sequence[Any]) -> Iterator[Any]:
        """fn(part) for every part, in order.

        The programs that one thread starts run one after another, and one alone leaves cores
        idle where its products are small. So on a CPU AT_ONCE threads start them. Not on
        several devices, whose collectives have to meet in one order, nor on an accelerator,
        which one program fills.
        """
        if self.mesh.size > 1 or Layout(self.mesh).platform != "cpu":
            yield from map(fn, parts)
            return
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(lambda part: jax.block_until_ready(fn(part)), parts)

    # ---- the engines of this host ----------------------------------------------------------

    def engine_meshes(self) -> list[Mesh]:
        """A mesh for each engine of this host: (1, 1, tensor) devices."""
        groups = self.mesh.devices.reshape(-1, self.mesh.shape["tensor"])
        hosts = [{d.process_index for d in group} for group in groups]
        here = jax.process_index()
        if any(len(of) > 1 for of in hosts):
            count = sum(d.process_index == here for d in self.mesh.devices.flat)
            raise InputError(
                f"parallel.tensor={self.mesh.shape['tensor']} reaches over hosts: an engine "
                f"works within one, which has {count} devices"
            )
        return [
            engine_mesh(group) for group, of in zip(groups, hosts, strict=True) if of == {here}
        ]

    def for_engines(self, fn: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
        """fn(weights) as one program over all devices, its result on each engine's mesh."""

        def spread(weights):
            out = fn(weights)
            return jax.tree_util.tree_map_with_path(
                lambda path, x: jax.lax.with_sharding_constraint(
                    x, sharding(self.mesh, path, x.shape, ("tensor",))
                ),
                out,
            )

        program, meshes = jax.jit(spread), self.engine_meshes()

        def locally(weights) -> list[Any]:
            out = program(weights)
            return [
                jax.tree_util.tree_map_with_path(lambda p, x, m=m: _part(x, m, p), out)
                for m in meshes
            ]

        return locally


def engine_mesh(devices: Sequence[jax.Device] | np.ndarray) -> Mesh:
    """Devices that share the heads of one engine."""
    return Mesh(np.array(devices).reshape(1, 1, -1), AXES)


def sharding(
    mesh: Mesh, path: Any, shape: Sequence[int], axes: Sequence[str] = AXES
) -> NamedSharding:
    """Where RULES puts the array at `path` of a tree, cut by none but `axes`.

    Raises ValueError where no rule fits, InputError where a dimension does not divide.
    """
    if not shape:
        return NamedSharding(mesh, P())
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    cut = next((cut for pattern, cut in RULES if re.search(f"(?:{pattern})$", name)), None)
    if cut is None:
        raise ValueError(f"no rule of parallel.RULES says how {name!r} lies on devices")
    spec = [None] * (len(shape) - len(cut)) + [a if a in axes else None for a in cut]
    for size, axis in zip(shape, spec, strict=True):
        if axis and size % mesh.shape[axis]:
            raise InputError(
                f"{name} {tuple(shape)}: {size} does not divide by "
                f"parallel.{axis}={mesh.shape[axis]}"
            )
    return NamedSharding(mesh, P(*spec))


def make(
    mapping: str, devices: int = 0, fsdp: int = 1, tensor: int = 1, among: Sequence = ()
) -> Parallel:
    """The first `devices` devices (0: all) of `among` (default: all hosts'), as a mesh.

    Raises InputError on an unknown mapping, or sizes that do not divide.
    """
    if mapping not in MAPPINGS:
        raise InputError(f"parallel.mapping={mapping!r}: one of {', '.join(MAPPINGS)}")
    available = list(among) or jax.devices()
    if devices > len(available):
        raise InputError(f"parallel.devices={devices}, but there are {len(available)}")
    chosen = available[: devices or len(available)]
    if mapping == "pmap" and fsdp * tensor > 1:
        raise InputError(
            f"parallel.mapping='pmap' copies the weights: parallel.fsdp={fsdp} and "
            f"parallel.tensor={tensor} need 'mesh'"
        )
    if mapping == "pmap" and jax.process_count() > 1:
        raise InputError("parallel.mapping='pmap' is for one host: use 'mesh' on several")
    if len(chosen) % (fsdp * tensor):
        raise InputError(
            f"{len(chosen)} devices do not divide into parallel.fsdp={fsdp} x "
            f"parallel.tensor={tensor}"
        )
    # Neighbours share `tensor`: they lie on one host, and nearest to each other.
    return Parallel(mapping, Mesh(np.array(chosen).reshape(-1, fsdp, tensor), AXES))


@contextlib.contextmanager
def hosts(coordinator: str, processes: int = 0, process: int = 0):
    """Join the other hosts, as jax.distributed.initialize has it, and leave them at the end.

    coordinator: "" one host; "auto" where JAX finds the others itself (TPU pods, Slurm, ...);
    else HOST:PORT of process 0 of `processes`. Comes before anything touches a device.
    """
    if not coordinator:
        yield
        return
    if coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(coordinator, processes, process)
    try:
        yield
    finally:
        jax.distributed.shutdown()


def shares(items: Sequence[Any], count: int) -> list[list[Any]]:
    """`count` shares as even as can be, neighbours together."""
    cuts = [len(items) * i // count for i in range(count + 1)]
    return [list(items[a:b]) for a, b in itertools.pairwise(cuts)]


def mine(items: Sequence[Any]) -> list[Any]:
    """This host's share."""
    return shares(items, jax.process_count())[jax.process_index()]


def everywhere(items: Sequence[Any]) -> list[Any]:
    """What all hosts have, in their order, on every host."""
    if jax.process_count() == 1:
        return list(items)
    packed = np.frombuffer(pickle.dumps(list(items)), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(packed)])).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(packed)] = packed
    gathered = multihost_utils.process_allgather(padded)
    parts = [pickle.loads(row[:n].tobytes()) for row, n in zip(gathered, sizes, strict=True)]
    return [item for part in parts for item in part]


def speaks() -> bool:
    """Whether this is the host that prints and writes."""
    return jax.process_index() == 0


def _put(x: Any, where: NamedSharding) -> jax.Array:
    """Every host has all of x, and puts its part on its devices."""
    if isinstance(x, jax.Array) and x.is_fully_addressable and where.is_fully_addressable:
        return jax.device_put(x, where)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])


def _part(x: jax.Array, mesh: Mesh, path: Any) -> jax.Array:
    """The copy of x that lies on the devices of an engine's mesh; nothing is moved."""
    held = {shard.device: shard.data for shard in x.addressable_shards}
    where = sharding(mesh, path, x.shape, ("tensor",))
    parts = [held[device] for device in mesh.devices.flat]
    return jax.make_array_from_single_device_arrays(x.shape, where, parts)
