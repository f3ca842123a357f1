"""What a run is going to be, in a few lines: said when it starts, and alone by --dry_run.

Nothing is compiled; bytes are those of the shapes, and of weights only those of a .gguf file
are read. What the compiled programs take besides, on devices that need not be there, says
`gtpo_jax.plan`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from gtpo_jax import build
from gtpo_jax.model import lora, transformer, weights
from gtpo_jax.model.caches import fresh
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.parallel import Parallel

MIB = 2**20


def model(config: ConfigDict) -> ModelConfig:
    """The model that the config trains, without its weights where they need not be read."""
    m = config.model
    if m.init_from:
        made = build.model_of_run(Path(m.init_from))
    elif m.source and Path(m.source).is_dir():
        made = weights.read_config(m.source, m.dtype, m.param_dtype)
    elif m.source:
        made = weights.load(m.source, dtype=m.dtype, param_dtype=m.param_dtype)[0]
    else:
        made = build.described(config)
    return build.as_trained(config, made)


def lines(
    config: ConfigDict, made: ModelConfig, devices: Parallel, workdir: Path | None
) -> Sequence[str]:
    """The lines. Bytes are a device's."""
    r, learn = config.rollout, config.learn
    kind, where = jax.devices()[0].device_kind, devices.mesh.shape
    shapes = jax.eval_shape(lambda: transformer.init(made, 0))
    trained, frozen = lora.split(made, shapes)
    size = sum(x.size for x in jax.tree.leaves(shapes))
    own = sum(x.size for x in jax.tree.leaves(trained))
    adapted = f", {own:,} of them trained" if jax.tree.leaves(frozen) else ""
    length = r.max_prompt_tokens + r.max_tokens
    dtype = r.cache_dtype or made.dtype
    caches = jax.eval_shape(lambda: fresh(made, devices.layout.platform, dtype, 1, length))
    most = r.problems * r.samples
    out = [
        f"{config.advantage.name} on {config.task.name}: {r.problems} problems x {r.samples} "
        f"samples a step, up to {r.max_turns} turns, {r.max_tokens} tokens after a prompt of "
        f"up to {r.max_prompt_tokens}; {config.steps} steps",
        f"devices: {devices.mesh.size} x {kind}, {devices.mapping} of data {where['data']}, "
        f"fsdp {where['fsdp']}, tensor {where['tensor']}",
        f"model: {made.layers} layers of width {made.width}, {size:,} parameters{adapted}, "
        f"{made.param_dtype}, computed in {made.dtype}",
        f"memory a device: parameters {_mib(shapes, devices)}, gradients "
        f"{_mib(trained, devices)} and as much again for a second micro-batch, a slot of "
        f"{length} tokens {_mib(caches, devices, where['tensor'])}",
        f"update: at most {-(-most * length // learn.row_tokens)} rows of {learn.row_tokens} "
        f"tokens, {learn.micro_rows} at a time, {learn.minibatches} mini-batches",
    ]
    if workdir is not None:
        out.append(
            f"writes to {workdir}: metrics.jsonl, trajectories every "
            f"{config.trajectories_every} steps, a checkpoint every {config.checkpoint_every}, "
            f"an evaluation of {config.task.eval_count or 'all'} problems every "
            f"{config.eval_every}"
        )
    return out


def changed(config: ConfigDict, default: ConfigDict, prefix: str = "") -> Sequence[str]:
    """The settings that are not the default ones, as the command line spells them."""
    out: list[str] = []
    for key, value in config.items():
        there = default.get(key)
        if isinstance(value, ConfigDict):
            below = there if isinstance(there, ConfigDict) else ConfigDict()
            out += changed(value, below, f"{prefix}{key}.")
        elif key not in default or value != there:
            out.append(f"--config.{prefix}{key}={value}")
    return out


def _mib(tree: Any, devices: Parallel, split: int | None = None) -> str:
    """What a device holds of a tree of shapes: as it lies, or over `split` devices."""
    if split is None and devices.mapping == "mesh":
        tree = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype),
            tree,
            devices.shardings(tree),
        )
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / (split or 1)
    return f"{total / MIB:,.1f} MiB"
