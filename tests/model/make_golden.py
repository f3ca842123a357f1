"""Writes golden/*.npz: config.json and logits of some of MODELS, by `transformers` on a CPU.

    PYTHONPATH=. python tests/model/make_golden.py        (needs the extra `parity`)

Weights and tokens are not stored: both sides draw them (random_models.py). The files that are
checked in are by transformers 5.24 and torch 2.13.
"""

import tempfile
from pathlib import Path

import numpy as np
from random_models import random_tokens, torch_logits, torch_model

FOLDER = Path(__file__).parent / "golden"
GOLDEN = {  # file -> name in MODELS
    "llama": "llama untied, heads wider than the model",
    "llama3": "llama3 scaling",
    "linear": "linear scaling",
    "smollm2": "smollm2",
    "qwen2": "qwen2 tied",
    "qwen3": "qwen3 untied",
}
SHAPE = (1, 30)  # of the tokens


def main():
    for file, name in GOLDEN.items():
        model = torch_model(name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = (Path(folder) / "config.json").read_text()
        logits = torch_logits(model, random_tokens(*SHAPE))
        np.savez_compressed(FOLDER / f"{file}.npz", **{"config.json": config}, logits=logits)


if __name__ == "__main__":
    main()
