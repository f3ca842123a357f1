"""Cold start: supervised fine-tuning on tool-use traces, the tool's output masked.

    python -m gtpo_jax.sft --config=configs/tiny.py --workdir=runs/tiny/sft

The traces are the embedded task's own or, with `sft.path`, a file of any teacher's
(docs/traces.md), written in the config's tool format; the prompts are those that RL uses.

The same model, packing, checkpoint and metrics as RL; the loss is -log p of what a policy
would sample, prompt tokens weighted by `sft.prompt_weight`. A run is resumed as an RL run is.
With `sft.stop_accuracy` it ends once that share of the numbers in held-out traces is
predicted right.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from gtpo_jax import build, parallel
from gtpo_jax.checkpoint import Checkpoints
from gtpo_jax.config import parse_command
from gtpo_jax.errors import InputError, run_command
from gtpo_jax.evaluate import evaluate
from gtpo_jax.generation import Generation, sampler
from gtpo_jax.metrics import MetricsLog
from gtpo_jax.model import lora
from gtpo_jax.model.tokenizer import Tokenizer
from gtpo_jax.rl.losses import LossInputs
from gtpo_jax.rl.packing import Segment, loss_index, pack_segments
from gtpo_jax.rl.rollout import feedback_tokens, prompt_tokens
from gtpo_jax.rl.types import Batch
from gtpo_jax.rl.update import TrainState, make_optimizer, start
from gtpo_jax.rl.update import build as build_update
from gtpo_jax.tasks import get_task
from gtpo_jax.tasks.types import Trace
from gtpo_jax.tools.toolcall import Format

PACK_TOGETHER = 512  # traces packed at a time: first-fit over all of them would be quadratic


def negative_log_likelihood(inputs: LossInputs):
    """-log p of every token that has a weight."""
    return -inputs.logprobs, {}


def run(config: ConfigDict, workdir: Path) -> TrainState:
    """Train on the traces of the config; evaluate at the end."""
    sft = config.sft
    with contextlib.ExitStack() as stack:  # closed in any case: a save under way is finished
        judges = stack.enter_context(build.judges(config))
        # ---- setup -------------------------------------------------------------------------
        devices = stack.enter_context(build.devices(config))
        policy = build.policy(config, workdir)
        traces, held_out = build.traces(config, policy.tokenizer)
        make = segment_maker(
            policy.tokenizer,
            build.form(config),
            build.rollout_config(config).system,
            sft.prompt_weight,
            sft.row_tokens,
        )
        rows = pack_all([make(t) for t in traces], sft.row_tokens)
        check = pack_segments([make(t) for t in held_out], sft.row_tokens, sft.micro_rows)
        numbers, sampled = number_mask(check, policy.tokenizer), check.weights == 1.0
        steps = sft.epochs * (len(rows.tokens) // sft.rows) or sft.steps
        if len(rows.tokens) < sft.rows:
            raise InputError(
                f"sft.rows={sft.rows}, but {len(traces)} traces fill {len(rows.tokens)} rows"
            )

        # ---- model -------------------------------------------------------------------------
        optimizer = make_optimizer(
            sft.optimizer, sft.lr, steps, sft.warmup, sft.schedule, muon_lr=sft.muon_lr
        )
        update = build_update(
            policy.config,
            negative_log_likelihood,
            optimizer,
            devices,
            sft.micro_rows,
            chunk=config.learn.logprob_chunk,
        )
        state = start(policy.config, policy.params, optimizer, devices)
        checks = update.rows(check)

        # ---- restore -----------------------------------------------------------------------
        checkpoints = stack.enter_context(Checkpoints(workdir, keep=1))
        cursor = {"step": 0, "consumed": 0, "seed": config.seed, "done": False}
        if checkpoints.latest() is not None:
            state, cursor = checkpoints.restore(state, config.seed)
            if parallel.speaks():
                print(f"resuming {workdir} after step {cursor['step']}")
        log = stack.enter_context(
            MetricsLog(workdir, cursor["step"] + 1, parallel.speaks(), config)
        )

        # ---- loop --------------------------------------------------------------------------
        started = time.perf_counter()
        for batch in walk(rows, sft.rows, cursor["step"], steps, config.seed):
            if cursor["done"]:
                break
            state, metrics = update.step(state, update.rows(batch))
            step, done = cursor["step"] + 1, cursor["step"] + 1 == steps
            if step == 1 or step % sft.check_every == 0 or done:
                parts = update.score(state.params, state.frozen, checks)
                scores = np.concatenate([devices.fetch(part) for part in parts])
                accuracy = float((scores > np.log(0.5))[numbers].mean()) if numbers.any() else 0
                metrics = jax.device_get(metrics)
                log.write(
                    step,
                    "sft",
                    {
                        "sft/loss": metrics["loss"],
                        "sft/held_out_loss": -scores[sampled].mean(),
                        "sft/number_accuracy": accuracy,
                        "sft/grad_norm": metrics["grad_norm"],
                        "time/total": time.perf_counter() - started,
                    },
                    steps,
                )
                done = done or 0 < sft.stop_accuracy <= accuracy
            cursor = {**cursor, "step": step, "done": done}
            if done or step % sft.checkpoint_every == 0:
                checkpoints.save(step, state, cursor)

        # ---- evaluate ----------------------------------------------------------------------
        generation = Generation(config, policy, devices)
        generation.refresh(lora.join(state.params, state.frozen))
        sample = sampler(config, policy, generation, judges, get_task(config.task.name))
        problems = build.problems(config, config.task.eval_split)
        measured, _ = evaluate(sample, problems, config.task.eval_samples)
        log.write(cursor["step"], "eval", measured)
    return state


def segment_maker(
    tokenizer: Tokenizer, form: Format, system: str, prompt_weight: float, longest: int
) -> Callable[[Trace], Segment]:
    """trace -> Segment: prompt at `prompt_weight`, turns at 1, feedback at 0."""
    end = tokenizer.end_ids[0]

    def make(trace: Trace) -> Segment:
        asked = get_task(trace.problem.task).prompt
        prompt = prompt_tokens(trace.problem, asked, tokenizer, system, longest)
        tokens, turn_ids, weights = (
            list(prompt),
            [0] * len(prompt),
            [prompt_weight] * len(prompt),
        )
        for j, turn in enumerate(trace.turns):
            # A turn ends at the closing mark of its call, else at the end token.
            closed = form.end_of_call(turn.text) is not None
            sampled = tokenizer.encode(turn.text) + ([] if closed else [end])
            feedback = (
                feedback_tokens(tokenizer, form, turn.feedback, not closed)
                if turn.feedback
                else []
            )
            tokens += sampled + feedback
            turn_ids += [j] * len(sampled) + [-1] * len(feedback)
            weights += [1.0] * len(sampled) + [0.0] * len(feedback)
        turn_ids[0], weights[0] = -1, 0.0  # nothing comes before the first token
        zeros = np.zeros(len(tokens), np.float32)
        return Segment(
            (trace.problem.id,),
            np.array(tokens, np.int32),
            np.array(turn_ids, np.int32),
            zeros,
            np.array(weights, np.float32),
            zeros,
        )

    return make


def pack_all(segments: Sequence[Segment], row_tokens: int) -> Batch:
    """All traces in rows, some hundred packed at a time."""
    nothing = np.zeros(0, np.int32)  # it is made of the rows together
    parts = [
        pack_segments(segments[i : i + PACK_TOGETHER], row_tokens)._replace(loss_index=nothing)
        for i in range(0, len(segments), PACK_TOGETHER)
    ]
    joined = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    return joined._replace(loss_index=loss_index(joined.turn_ids))


def walk(rows: Batch, count: int, start: int, stop: int, seed: int) -> Iterator[Batch]:
    """Batches number start .. stop of `count` rows each, shuffled anew each epoch, the
    weights of each summing to 1."""
    total = len(rows.tokens)
    per_epoch = total // count
    for step in range(start, stop):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(total)
        chosen = order[place * count : (place + 1) * count]
        batch = Batch(*(x[chosen] for x in rows))
        yield batch._replace(weights=batch.weights / batch.weights.sum())


def number_mask(batch: Batch, tokenizer: Tokenizer) -> np.ndarray:
    """Where a digit is to be sampled. [R,T] bool."""
    digits = np.array([tokenizer.decode([i]).isdigit() for i in range(tokenizer.vocab_size)])
    return digits[batch.tokens] & (batch.turn_ids >= 0) & (batch.weights == 1.0)


def main() -> None:
    """Cold start as the command line says."""
    config, workdir, _ = parse_command()
    assert workdir is not None  # without flags of its own a command needs one
    run(config, workdir)


if __name__ == "__main__":
    run_command(main)
