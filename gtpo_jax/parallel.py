"""Devices: the only file that knows how many there are.

A function of packed rows is one of two kinds, and each kind is mapped over devices in one of
two ways, by name:

    sums over rows   f(params, batch) -> tree of sums        gradients, metrics
    values per row   f(params, batch) -> tree of [R, ...]    logprobs

    "mesh"  jax.jit over a mesh with the axis `data`: rows are sharded, the compiler adds
            the all-reduce
    "pmap"  jax.pmap over the same devices, rows split by hand, psum of the sums

Weights are written for the whole mini-batch, so a sum over devices is the whole result. No
leading device axis leaves this file.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gtpo_jax.errors import InputError

MAPPINGS = ("mesh", "pmap")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How rows are spread over devices."""

    mapping: str
    mesh: Mesh

    @property
    def devices(self) -> int:
        """Devices that share the rows."""
        return self.mesh.devices.size

    def replicate(self, tree: Any) -> Any:
        """Put a tree on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def local(self, tree: Any) -> Any:
        """This host's single-device copy of a replicated tree: what the engine reads."""
        return jax.tree.map(lambda x: x.addressable_data(0), tree)

    def sum_over_rows(self, fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Map fn(params, batch) -> sums; every device ends up with the whole sum."""
        if self.mapping == "mesh":
            replicated, rows = self._shardings()
            return jax.jit(fn, in_shardings=(replicated, rows), out_shardings=replicated)

        def summed(params, batch):
            return jax.lax.psum(fn(params, batch), "data")

        mapped = self._pmap(summed, out_axes=None)
        return lambda params, batch: self.replicate(mapped(params, self._split(batch)))

    def per_row(self, fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Map fn(params, batch) -> values with a leading row axis."""
        if self.mapping == "mesh":
            replicated, rows = self._shardings()
            return jax.jit(fn, in_shardings=(replicated, rows), out_shardings=rows)
        mapped = self._pmap(fn, out_axes=0)

        def joined(params, batch):
            out = mapped(params, self._split(batch))
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

        return joined

    def _shardings(self):
        spec = PartitionSpec
        return NamedSharding(self.mesh, spec()), NamedSharding(self.mesh, spec("data"))

    def _pmap(self, fn, out_axes):
        devices = list(self.mesh.devices.flat)
        return jax.pmap(fn, "data", in_axes=(None, 0), out_axes=out_axes, devices=devices)

    def _split(self, batch):
        return jax.tree.map(lambda x: x.reshape(self.devices, -1, *x.shape[1:]), batch)


def make(mapping: str, devices: int = 0) -> Parallel:
    """The first `devices` devices (0: all), under "mesh" or "pmap"."""
    if mapping not in MAPPINGS:
        raise InputError(f"parallel.mapping={mapping!r}: one of {', '.join(MAPPINGS)}")
    available = jax.devices()
    if devices > len(available):
        raise InputError(f"parallel.devices={devices}, but there are {len(available)}")
    chosen = available[: devices or len(available)]
    return Parallel(mapping, jax.make_mesh((len(chosen),), ("data",), devices=chosen))
