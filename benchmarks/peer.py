"""The update of `benchmarks.train` in PyTorch, with `transformers` and the same weights.

What a careful user of PyTorch writes: trajectories sorted by length and padded to the longest
of their micro-batch on the right, where causal attention needs no mask (so that PyTorch takes
its fused kernel); logits of the sampled tokens alone; fused AdamW.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import transformers

from gtpo_jax.model import families
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.transformer import Params
from gtpo_jax.model.weights import as_stored
from gtpo_jax.rl.types import Batch


class Peer:
    """A model, its optimiser and the micro-batches: `take` a batch, then `run` updates."""

    def __init__(
        self, config: ModelConfig, params: Params, lr: float, micro_tokens: int
    ) -> None:
        """params: NumPy arrays."""
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, config.dtype)
        self.micro_tokens = micro_tokens
        self.model = _with_weights(config, params).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr, (0.9, 0.95), weight_decay=0.0, fused=True
        )

    def take(self, batch: Batch) -> int:
        """Unpack rows to sequences, then batch them by length, `micro_tokens` at a time; the
        number of tokens with padding."""
        names = ("tokens", "turn_ids", "advantages", "weights", "old_logprobs")
        segments = [
            {name: np.asarray(getattr(batch, name)[row][ids == segment]) for name in names}
            for row, ids in enumerate(batch.segment_ids)
            for segment in range(1, ids.max() + 1)
        ]
        groups: list[list[dict]] = [[]]
        for segment in sorted(segments, key=lambda s: -len(s["tokens"])):
            longest = len((groups[-1] or [segment])[0]["tokens"])
            if (len(groups[-1]) + 1) * longest > self.micro_tokens:
                groups.append([])
            groups[-1].append(segment)
        self.micros = [self._padded(group) for group in groups]
        return sum(micro["tokens"].numel() for micro in self.micros)

    def _padded(self, group: list[dict]) -> dict[str, torch.Tensor]:
        longest = len(group[0]["tokens"])
        fill = {"turn_ids": -1}
        return {
            name: torch.tensor(
                np.stack(
                    [
                        np.pad(
                            s[name],
                            (0, longest - len(s[name])),
                            constant_values=fill.get(name, 0),
                        )
                        for s in group
                    ]
                )
            )
            for name in group[0]
        }

    def run(self) -> tuple[float, float]:
        """One update -> seconds, norm of the gradient."""
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        for micro in self.micros:
            with torch.autocast(self.device, self.dtype, self.dtype != torch.float32):
                self._loss({k: v.to(self.device) for k, v in micro.items()}).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        value = norm.item()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, value

    def _loss(self, micro: dict[str, torch.Tensor]) -> torch.Tensor:
        """sum(weights * ppo_clip) over the sampled tokens, each scored one position before."""
        hidden = self.model.model(micro["tokens"], use_cache=False).last_hidden_state
        sampled = micro["turn_ids"][:, 1:] >= 0
        logits = self.model.lm_head(hidden[:, :-1][sampled]).float()
        targets, advantages, weights, old = (
            micro[name][:, 1:][sampled]
            for name in ("tokens", "advantages", "weights", "old_logprobs")
        )
        logprobs = -torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
        ratio = torch.exp(logprobs - old)
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
        return -(weights * surrogate).sum()


def beside(*arguments) -> tuple[Callable[[Batch], int], Callable[[], tuple[float, float]]]:
    """`take` and `run` of Peer(*arguments), in a process with memory and threads of its own."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, arguments)
    return lambda batch: pool.submit(_take, batch).result(), lambda: pool.submit(_run).result()


def _begin(*arguments) -> None:
    global _peer
    _peer = Peer(*arguments)


def _take(batch: Batch) -> int:
    return _peer.take(batch)


def _run() -> tuple[float, float]:
    return _peer.run()


def hugging_face(config: ModelConfig) -> transformers.PreTrainedModel:
    """The Hugging Face model of that shape, with random weights."""
    settings = transformers.AutoConfig.for_model(**families.to_hf(config))
    return transformers.AutoModelForCausalLM.from_config(settings)


def _with_weights(config: ModelConfig, params: Params) -> transformers.PreTrainedModel:
    """The same with those weights."""
    model = hugging_face(config)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, place in families.places(config, families.HF).items():
            values = as_stored(config, params, place, np.float32)
            named[name].copy_(torch.tensor(values))
    return model
