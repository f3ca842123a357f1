"""What a config costs on devices that are not there: compiled for them, not run.

    python -m gtpo_jax.plan --config=configs/qwen25_7b_math.py --topology=v5p:4x4x4
    python -m gtpo_jax.plan --config=configs/tiny.py --topology=cpu:8

TPU topologies need the extra `plan` (libtpu, which compiles on any machine): v4, v5e, v5p, v6e
and the shape, such as v5e:4x4; cpu:N stands for N devices of this machine. The model is that of
config.model.source where such a folder is here, else the one that config.model describes.

Prints bytes per device by kind, FLOPs, what a device sends, and the least time a step takes by
the data sheets (model/flops.py). Exit code 1 where update or engine does not fit: the training
state stays, and beside it either the update's gradients and activations or the engine's weights
and caches have to find room.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from gtpo_jax import collectives, parallel, preview
from gtpo_jax.config import named, parse_command, validate
from gtpo_jax.errors import InputError, run_command
from gtpo_jax.generation import slots_that_fit
from gtpo_jax.model import flops, lora, transformer
from gtpo_jax.model.caches import per_layer
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.engine import Engine
from gtpo_jax.model.programs import compiled
from gtpo_jax.model.sampling import Sampling
from gtpo_jax.parallel import Parallel, engine_mesh
from gtpo_jax.rl.learn import prepare
from gtpo_jax.rl.losses import LOSSES
from gtpo_jax.rl.types import Batch
from gtpo_jax.rl.update import TrainState

FLAGS: dict[str, tuple[Any, str]] = {"topology": ("", "such as v5e:4x4 or cpu:8")}
GIB = flops.GIB


@dataclasses.dataclass
class Plan:
    """Bytes are per device, seconds of one whole step of RL."""

    name: str
    devices: int
    engines: int  # on one host
    memory: float  # what a device has
    resident: dict[str, float]  # training state
    update: dict[str, float]  # beside them while learning
    engine: dict[str, float]  # or while sampling
    slots: int  # of one engine
    flops: float  # of all updates and scores of a step, on all devices together
    sent: dict[str, float]  # what a device sends and receives meanwhile, by kind
    seconds: dict[str, float]

    @property
    def needed(self) -> float:
        """The larger of the two phases, with what stays."""
        phases = (sum(self.update.values()), sum(self.engine.values()))
        return sum(self.resident.values()) + max(phases)

    @property
    def fits(self) -> bool:
        """A twentieth of the memory is left to the runtime."""
        return self.slots > 0 and self.needed <= 0.95 * self.memory


def topology(name: str) -> tuple[list, flops.Device]:
    """The devices of a topology, and what one of them can do."""
    kind, _, shape = name.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape) > 0:
        jax.config.update("jax_num_cpu_devices", int(shape))
        there = psutil.virtual_memory().total / int(shape)
        return jax.devices("cpu"), flops.Device(1e11 / int(shape), 2e10, there, 1e10)
    if kind not in ("v4", "v5e", "v5p", "v6e") or not shape:
        raise InputError(f"--topology={name!r}: such as v5e:4x4, v5p:2x2x2 or cpu:8")
    found = _tpus(name)
    return found, flops.DEVICES[found[0].device_kind]


def one_engine(name: str, tensor: int) -> list:
    """The devices of one engine, as a topology of its own: the compiler wants a whole one."""
    kind = name.partition(":")[0]
    if kind == "cpu":
        return jax.devices("cpu")[:tensor]
    bounds = {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 2, 1), 8: (2, 4, 1)}
    if tensor not in bounds:
        raise InputError(f"parallel.tensor={tensor}: plans are for 1, 2, 4 or 8")
    sizes = bounds[tensor] if kind in ("v4", "v5p") else bounds[tensor][:2]
    shape = "x".join(map(str, sizes))
    found = _tpus(f"{kind}:{shape}", chips_per_host_bounds=bounds[tensor])
    return found[:tensor]


def _tpus(name: str, **options) -> list:
    from jax.experimental import topologies

    # It only compiles: the TPU need not be its own, and no cloud need say what machine this is.
    os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # libtpu's, of several types
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--topology={name!r}: {reason} (needs pip install gtpo_jax[plan])"
        ) from None
    return list(found.devices)


def plan(config: ConfigDict, name: str) -> Plan:
    """Compile what a step runs. Raises InputError where config and devices do not go together,
    DoesNotFit where the compiler finds no room."""
    there, device = topology(name)
    p, r, learn = config.parallel, config.rollout, config.learn
    if p.mapping != "mesh":
        raise InputError(f"parallel.mapping={p.mapping!r}: plans are for 'mesh'")
    devices = parallel.make("mesh", p.devices, p.fsdp, p.tensor, there)
    model = preview.model(config)
    state, update = abstract_update(config, model, devices)
    gradients = abstract_batch(config, devices)
    length = r.max_prompt_tokens + r.max_tokens
    rows = -(-r.problems * r.samples * length // learn.row_tokens)
    micros = -(-rows // learn.micro_rows)

    programs = {
        "gradients": update.programs["gradients"].lower(*state[:2], gradients),
        "score": update.programs["score"].lower(*state[:2], gradients),
        "apply": update.programs["apply"].lower(
            state, state.params, jax.ShapeDtypeStruct((), jnp.float32)
        ),
    }
    programs = {name: _compile(name, lowered) for name, lowered in programs.items()}
    resident = {
        "parameters": _bytes(state.params) + _bytes(state.frozen),
        "optimiser": _bytes(state.opt_state),
    }
    if config.loss.options.get("kl_coef", 0.0) > 0:
        resident["reference"] = resident["parameters"]
    sums = 2 if micros > 1 else 1  # of gradients: the sum so far, and the next
    learning = {
        "gradients": sums * _bytes(state.params),
        "activations": max(programs[n].memory_analysis().temp_size_in_bytes for n in programs),
    }
    engines = len(devices.engine_meshes())  # refuses `tensor` beyond a host
    mesh = engine_mesh(one_engine(name, p.tensor))
    own = _bytes(jax.eval_shape(lambda: per_layer(model, transformer.init(model, 0))))
    token = 2 * model.layers * model.kv_heads * model.head_dim / p.tensor
    token *= jnp.dtype(r.cache_dtype or model.dtype).itemsize
    most = -(-r.problems // devices.sharers) * r.samples
    free = p.tensor * (0.95 * device.memory - sum(resident.values()))
    slots = r.slots or min(most, slots_that_fit(model, length, r.cache_dtype, free))
    sampling: dict[str, float] = {
        "weights": own / p.tensor,
        "caches": slots * length * token,
    }
    if slots:
        sampling["working"] = _engine_temp(model, mesh, slots, r, length)
    sent = collectives.sent(programs["gradients"].as_text())
    scored = flops.update(model, [learn.row_tokens] * rows) / 3
    remade = {"none": 0, "matmuls": 0, "full": scored}[model.remat]
    work = learn.epochs * (3 * scored + remade) + scored
    total = {kind: size * micros * learn.epochs for kind, size in sent.items()}
    decoded = r.max_tokens * -(-most // max(slots, 1))
    live = own / p.tensor + slots * token * length / 2
    seconds = {
        "update, by FLOP/s": work / devices.mesh.size / device.flops,
        "update, by links": sum(total.values()) / device.links,
        "decoding, by memory": decoded * live / device.bandwidth,
    }
    return Plan(
        name=name,
        devices=devices.mesh.size,
        engines=engines,
        memory=device.memory,
        resident=resident,
        update=learning,
        engine=sampling,
        slots=slots,
        flops=work,
        sent=total,
        seconds=seconds,
    )


def abstract_update(config: ConfigDict, model: ModelConfig, devices: Parallel):
    """The training state as shapes on the devices, and the functions of an update."""
    loss = named(LOSSES, config.loss, "loss")
    optimizer, update = prepare(config, model, loss, devices)
    shapes = jax.eval_shape(lambda: transformer.init(model, 0))
    trained, frozen = (_placed(devices, part) for part in lora.split(model, shapes))
    moments = _placed(devices, jax.eval_shape(optimizer.init, trained))
    count = _placed(devices, jax.ShapeDtypeStruct((), jnp.int32))
    return TrainState(trained, frozen, moments, count, count), update


def abstract_batch(config: ConfigDict, devices: Parallel) -> Batch:
    """A micro-batch of full rows, as shapes."""
    shape = (config.learn.micro_rows, config.learn.row_tokens)
    rows = NamedSharding(devices.mesh, P(parallel.ROWS))
    ints = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    floats = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    return Batch(ints, ints, ints, ints, ints, *[floats] * 5)


def _engine_temp(model, mesh, slots, r, length) -> float:
    """What decoding, or writing a prompt, needs to work at full length."""
    made = Engine(model, slots, length, (0,), Sampling(r.temperature), r.width, mesh=mesh)
    dtype = r.cache_dtype or model.dtype
    names = [
        name
        for name in made.programs(r.chunk)
        if (name[0] == "decode" and name[2:4] == (length, made.width))
        or (name[0] == "extend" and name[2:] == (length, made.rows[0], made.lengths[-1]))
    ]
    programs = [compiled(model, dtype, mesh, *name) for name in names]
    return max(program.memory_analysis().temp_size_in_bytes for program in programs)


def _compile(name: str, lowered) -> Any:
    try:
        return lowered.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        lines = [line for line in str(error).splitlines() if "sed " in line or "xceed" in line]
        raise DoesNotFit(f"{name}: {(lines or [str(error)])[0].strip()[:300]}") from None


class DoesNotFit(Exception):
    """The compiler found no room for a program."""


def _placed(devices: Parallel, tree: Any) -> Any:
    return jax.tree.map(lambda x, s: x.update(sharding=s), tree, devices.shardings(tree))


def _bytes(tree: Any) -> float:
    """Of what one device holds of a tree of shapes."""

    def size(x) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        count = 1
        for n in shape:
            count *= n
        return count * x.dtype.itemsize

    return float(sum(map(size, jax.tree.leaves(tree))))


def lines(made: Plan) -> Sequence[str]:
    """The plan as Markdown."""
    out = [
        f"{made.name}: {made.devices} devices of {made.memory / GIB:.1f} GiB, "
        f"{made.engines} engines on a host with {made.slots} slots each",
        "",
        "| GiB a device | |",
        "|---|---:|",
    ]
    for when, part in (
        ("", made.resident),
        ("update: ", made.update),
        ("engine: ", made.engine),
    ):
        out += [f"| {when}{what} | {size / GIB:.2f} |" for what, size in part.items()]
    verdict = "fits" if made.fits else "DOES NOT FIT"
    out += [f"| **most at a time: {verdict}** | **{made.needed / GIB:.2f}** |", ""]
    sent = ", ".join(f"{kind} {size / GIB:,.1f}" for kind, size in made.sent.items()) or "none"
    out += [
        f"A step, every trajectory at its full length: {made.flops:.2e} FLOPs of updates and "
        f"scoring; GiB that a device sends: {sent}.",
        "",
        "| the least a step takes | s |",
        "|---|---:|",
    ]
    return out + [f"| {what} | {s:,.2f} |" for what, s in made.seconds.items()]


def main() -> None:
    """Plan as the command line says."""
    config, _, options = parse_command(FLAGS)
    validate(config)
    try:
        made = plan(config, options["topology"])
    except DoesNotFit as error:
        print(f"{options['topology']}: DOES NOT FIT, says the compiler of {error}")
        raise SystemExit(1) from None
    print("\n".join(lines(made)))
    raise SystemExit(0 if made.fits else 1)


if __name__ == "__main__":
    run_command(main)
