"""A run as a Hugging Face folder, which `transformers` and what builds on it can load.

    python -m gtpo_jax.export runs/smollm2 --out=exported/smollm2 --which=best --dtype=bfloat16

writes config.json, the weights as safetensors (adapters merged, several files with an index
above 5 GB), generation_config.json with the tokens that end a turn, and the tokenizer:

    AutoModelForCausalLM.from_pretrained("exported/smollm2", dtype="auto")
    AutoTokenizer.from_pretrained("exported/smollm2")

The folder appears when it is whole. Training can start from it: --config.model.source=FOLDER.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gtpo_jax import build
from gtpo_jax.build import Policy
from gtpo_jax.errors import InputError, command_parser, run_command
from gtpo_jax.model.tokenizer import SentencePieceTokenizer, Tokenizer
from gtpo_jax.model.weights import save_hf

# What `SentencePieceTokenizer.render` does: each user message and a newline.
USER_LINES = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}\n{% endif %}"
    "{% endfor %}"
)


def write(out: Path, policy: Policy, dtype: str = "", **options: Any) -> None:
    """The policy as the folder `out`, there whole or not at all. `options` go to `save_hf`.

    Raises InputError where `out` exists or can't be written, and where no family is such a
    model.
    """
    refuse(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The folder is one inside the temporary one, which nobody else may enter.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            folder = Path(scratch) / out.name
            folder.mkdir()
            save_hf(folder, policy.config, policy.params, dtype, **options)
            _save_tokenizer(folder, policy.tokenizer)
            os.rename(folder, out)
    except (OSError, SafetensorError) as error:  # the latter has no strerror
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{out}: can't be written: {reason}") from error


def refuse(out: Path) -> None:
    """InputError where `out` is there already, be it a broken link."""
    if os.path.lexists(out):
        raise InputError(f"--out={out} exists: name a folder that does not, or move it away")


def _save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """What both `AutoTokenizer` and `load_tokenizer` read, and which tokens end a turn."""
    ends = {"eos_token_id": list(tokenizer.end_ids), "pad_token_id": tokenizer.pad_id}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    # In config.json too: where nothing stands there, Llama's means tokens 1 and 2.
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | {"bos_token_id": None} | ends
    file.write_text(json.dumps(raw, indent=2) + "\n")
    tokenizer.save(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        hugging_face(tokenizer).save_pretrained(folder)
    # transformers 5 names a class that 4 does not know; this name both take.
    file = folder / "tokenizer_config.json"
    raw = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n")


def misread(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether `AutoTokenizer` makes other ids of a text than `tokenizer` does.

    transformers 5 gives every qwen2 model Qwen's own splitting, whatever its tokenizer.json.
    """
    from transformers import AutoTokenizer

    text = "What is  12345 + 6.7?\n\n    print('it is')\n"
    theirs = AutoTokenizer.from_pretrained(folder)
    return theirs.encode(text, add_special_tokens=False) != tokenizer.encode(text)


def hugging_face(tokenizer: SentencePieceTokenizer) -> Any:
    """The same tokenizer for `transformers`: same ids for a text, same prompt for messages.

    A SentencePiece BPE joins the neighbours whose piece has the best score. Hugging Face's has
    a list of pairs, best first: all pairs of pieces that make a piece.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    pieces = ModelProto.FromString(tokenizer.model.serialized_model_proto()).pieces
    normal, symbol = ModelProto.SentencePiece.NORMAL, ModelProto.SentencePiece.USER_DEFINED
    # A symbol is compared with the text as it comes, where a space is a space.
    words = [p.piece.replace("▁", " ") if p.type == symbol else p.piece for p in pieces]
    vocab = {word: i for i, word in enumerate(words)}
    score = {p.piece: p.score for p in pieces if p.type == normal}
    merges = []
    for piece in sorted(score, key=lambda piece: (-score[piece], vocab[piece])):
        pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [pair for pair in pairs if pair[0] in score and pair[1] in score]
    unknown, end = pieces[tokenizer.model.unk_id()].piece, pieces[tokenizer.end_ids[0]].piece
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    symbols = [w for w, p in zip(words, pieces, strict=True) if p.type == symbol]
    backend.add_tokens([AddedToken(text, normalized=False) for text in symbols])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        eos_token=end,
        pad_token=end,
        chat_template=USER_LINES,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = command_parser("gtpo_jax.export", __doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--which", choices=("newest", "best"), default="newest", help="checkpoint"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="",
        help="of the weights; else that of the run (model.param_dtype)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    chosen = parser.parse_args()
    refuse(chosen.out)  # before minutes of reading
    policy = build.from_run(chosen.run, chosen.which)
    write(chosen.out, policy, chosen.dtype)
    print(f"{chosen.run} ({chosen.which} checkpoint) exported to {chosen.out}")
    if misread(chosen.out, policy.tokenizer):
        print(
            "note: this version's AutoTokenizer splits text otherwise than the model was "
            f"trained with: use PreTrainedTokenizerFast.from_pretrained({str(chosen.out)!r})",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_command(main)
