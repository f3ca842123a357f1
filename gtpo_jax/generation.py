"""From a config to what samples: the engines of this host, and rollouts over all hosts.

An engine works on a group of `tensor` devices and takes its share of the problems, in a thread
of its own. On several hosts each takes its share first, then all know all trajectories.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gtpo_jax import parallel
from gtpo_jax.build import Policy, form, rollout_config
from gtpo_jax.errors import InputError
from gtpo_jax.model import transformer
from gtpo_jax.model.caches import per_layer
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.engine import Engine
from gtpo_jax.model.sampling import Sampling
from gtpo_jax.model.tokenizer import Tokenizer
from gtpo_jax.model.transformer import Params
from gtpo_jax.parallel import Parallel, engine_mesh
from gtpo_jax.rl.rollout import RolloutStats, Sampler, rollout
from gtpo_jax.rl.types import Trajectory
from gtpo_jax.tasks.types import Judges, Problem, Task


class Generation:
    """The engines of this host. `how`: for evaluation, which may draw otherwise than training.

    Build it when the training state is in memory: slots are counted by what is free then.
    """

    def __init__(
        self,
        config: ConfigDict,
        made: Policy,
        devices: Parallel,
        how: Sampling | None = None,
    ) -> None:
        meshes = devices.engine_meshes()
        self.engines = [
            engine(config, made, how, mesh, len(meshes), devices.sharers) for mesh in meshes
        ]
        self._weights = devices.for_engines(functools.partial(per_layer, made.config))

    def refresh(self, params: Params) -> None:
        """Take the policy's new weights: one program, on the training state where it lies."""
        for each, weights in zip(self.engines, self._weights(params), strict=True):
            each.refresh(weights)

    def release(self) -> None:
        """Give the weights' memory back, to the update; `refresh` comes before all sampling."""
        for each in self.engines:
            each.refresh(None)

    def warm_up(self, steps: int) -> str:
        """Compile every program now; says how many, and how long it took."""
        return "\n".join(each.warm_up(steps) for each in self.engines)


def engine(
    config: ConfigDict,
    made: Policy,
    how: Sampling | None = None,
    mesh: Mesh | None = None,
    here: int = 1,
    everywhere: int = 1,
) -> Engine:
    """Slots for the rollout; the context is a longest prompt and a whole token budget.

    One of `here` engines of this host and of `everywhere` in all, which share the problems.
    Raises InputError where the slots do not fit into the memory that is free.
    """
    r = config.rollout
    mesh = mesh or engine_mesh(jax.local_devices()[:1])
    length = r.max_prompt_tokens + r.max_tokens
    most = -(-r.problems // everywhere) * r.samples
    wanted = min(r.slots or most, most)
    free = free_bytes(mesh, here)
    fit, needed = slots_that_fit(made.config, length, r.cache_dtype, free), r.slots and wanted
    if fit < max(needed, 1):
        raise InputError(
            f"{max(needed, 1)} slots of {length} tokens do not fit into the free "
            f"{free / 2**20:,.0f} MiB, {fit} do: lower rollout.slots, rollout.max_tokens or "
            "rollout.max_prompt_tokens, or set rollout.cache_dtype=bfloat16"
        )
    return Engine(
        made.config,
        slots=min(wanted, fit),
        max_length=length,
        stop_ids=stop_ids(made.tokenizer, (form(config).closing, *r.stops)),
        how=how or Sampling(r.temperature),
        width=r.width,
        cache_dtype=r.cache_dtype,
        mesh=mesh,
    )


def slots_that_fit(model: ModelConfig, length: int, dtype: str, free: float) -> int:
    """How many slots of `length` tokens `free` bytes hold, beside the engine's own copy of the
    weights and with half as much again to work."""
    shapes = jax.eval_shape(lambda: transformer.init(model, 0))
    weights = sum(x.size for x in jax.tree.leaves(shapes)) * jnp.dtype(model.dtype).itemsize
    size = jnp.dtype(dtype or model.dtype).itemsize
    token = 2 * model.layers * model.kv_heads * model.head_dim * size
    return max(0, int((free - weights) / (1.5 * token * length)))


def free_bytes(mesh: Mesh, engines: int) -> int:
    """What the devices of an engine can still hold; on a CPU, which all `engines` of a host
    share, its part of what the machine has available."""
    stats = [device.memory_stats() for device in mesh.devices.flat]
    if all(stats):
        return len(stats) * min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    return psutil.virtual_memory().available // engines


def stop_ids(tokenizer: Tokenizer, marks: Sequence[str]) -> tuple[int, ...]:
    """Where the engine hands back to the host: the end ids, and every token that may complete
    one of the marks, alone or after others."""
    marks = [mark for mark in marks if mark]
    ends = {mark[-n:] for mark in marks for n in range(1, len(mark) + 1)}

    def completes(text: str) -> bool:
        starts = (text[:n] for n in range(1, len(text) + 1))
        return any(start in ends for start in starts) or any(mark in text for mark in marks)

    others = (i for i in range(tokenizer.vocab_size) if completes(tokenizer.decode([i])))
    return tuple(sorted({*tokenizer.end_ids, *others}))


def sampler(
    config: ConfigDict, made: Policy, generation: Generation, judges: Judges, task: Task
) -> Sampler:
    """The rollout over all engines, with everything bound but (problems, samples, step)."""
    engines = generation.engines

    def part(each: Engine, chosen: Sequence[Problem], samples: int, step: int):
        return rollout(
            each,
            made.tokenizer,
            form(config),
            judges,
            task,
            chosen,
            samples,
            rollout_config(config),
            config.seed,
            step,
        )

    def sample(chosen: Sequence[Problem], samples: int, step: int):
        shares = parallel.shares(parallel.mine(chosen), len(engines))
        with ThreadPoolExecutor(len(engines)) as threads:
            started = [
                threads.submit(part, each, share, samples, step)
                for each, share in zip(engines, shares, strict=True)
                if share
            ]
            done = parallel.everywhere([future.result() for future in started])
        trajectories: list[Trajectory] = [t for part, _ in done for t in part]
        return trajectories, functools.reduce(RolloutStats.beside, (s for _, s in done))

    return sample
