"""A GGUF file's words are those of the tokenizer that it was made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

from lmserve.errors import ModelLoadFailed
from lmserve.gguf_tokenizer import SPLITS, load_gguf_tokenizer
from lmserve.service.model_text import ModelText, SamplingDefaults
from tests.service.tokenizers_for_tests import TEMPLATE

TEXTS = [
    "Hello  world,\n\n\tit's 12345 o'clock: naïve café, 東京, 😀.",
    "def f(x):\n    return x**2 + 1000  # 1,000\r\n",
    "<|im_start|>user\nI've 7 dogs, you'll see<|im_end|>\n",
    "   leading and trailing   ",
    "Привет, мир! 3.14159 $100 <=> ^~|`",
]
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CORPUS = [*TEXTS, "the clock struck 1000 and 2000 and 12 times, it's the time we've had, world world"] * 20
DIGITS = (pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))
PLAIN = (pre_tokenizers.ByteLevel(add_prefix_space=False),)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def by_regex(expression: str) -> tuple[Any, ...]:
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return (split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


QWEN2 = SPLITS["stablelm2"][0]
WAYS: dict[str, tuple[Any, ...]] = {
    "gpt-2": PLAIN,
    "olmo": PLAIN,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "command-r": DIGITS,
    "falcon": (
        pre_tokenizers.Punctuation(behavior="contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex(r"[0-9][0-9][0-9]"), behavior="isolated"),
    ),
    "llama-bpe": by_regex(LLAMA3),
    "stablelm2": by_regex(QWEN2),
    "qwen2": by_regex(QWEN2),
}
"""How the tokenizers of these families cut texts, as their own tokenizer.json has it."""


def train(way: Sequence[Any]) -> Tokenizer:
    """Byte-level BPE that has learned its merges from what ``way`` leaves whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(way))
    special = [AddedToken(token, special=True, normalized=False) for token in CONTROL]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=700,
            min_frequency=2,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    """Sorted."""
    found = [tokenizer.token_to_id(token) for token in tokens]
    return sorted(token_id for token_id in found if token_id is not None)


def write(path: Path, tokenizer: Tokenizer, pre: str | None, **said: Any) -> Path:
    """As llama.cpp's converters write it; ``said``: further keys of the tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    state = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in CONTROL else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    for key, value in said.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", WAYS)
def test_texts_become_the_tokens_that_the_model_has_learned(pre: str, tmp_path: Path) -> None:
    own = train(WAYS[pre])
    text = ModelText.load(str(write(tmp_path / "tiny.gguf", own, pre)))
    for each in TEXTS:
        token_ids = text.encode_tokens(each)
        assert token_ids == own.encode(each, add_special_tokens=False).ids
        assert text.decode(token_ids, skip_special_tokens=False) == each


def test_ways_differ() -> None:
    """Or the test above could not fail."""
    tokens = {pre: tuple(train(WAYS[pre]).encode(TEXTS[0] + TEXTS[1]).tokens) for pre in ("gpt-2", "smollm", "falcon")}
    assert len(set(tokens.values())) == 3


def test_an_unknown_way_is_refused_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", train(PLAIN), "wobble")
    with pytest.raises(ModelLoadFailed, match=r"'wobble' \(tokenizer\.ggml\.pre\)"):
        load_gguf_tokenizer(path)


def test_a_file_of_before_there_were_names(tmp_path: Path) -> None:
    own = train(PLAIN)
    text = ModelText.load(str(write(tmp_path / "tiny.gguf", own, None)))
    assert text.encode_tokens(TEXTS[0]) == own.encode(TEXTS[0]).ids


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(ModelLoadFailed, match=r"tiny\.gguf: it is cut off"):
        load_gguf_tokenizer(tmp_path / "tiny.gguf")


def test_answers_end_where_the_models_turns_end(tmp_path: Path) -> None:
    """Not only at the one token that the file calls the end."""
    own = train(PLAIN)
    path = write(tmp_path / "tiny.gguf", own, "gpt-2", eos_token_id=own.token_to_id("x"))
    assert ModelText.load(str(path)).eos_token_ids == ids(own, "x", "<|endoftext|>", "<|im_end|>")


def test_ends_that_the_file_names(tmp_path: Path) -> None:
    own = train(PLAIN)
    path = write(tmp_path / "tiny.gguf", own, "gpt-2", eos_token_id=20, eot_token_id=21, eom_token_id=22)
    assert {20, 21, 22} <= set(ModelText.load(str(path)).eos_token_ids)


def test_the_end_of_a_part_is_no_end_where_there_are_ends_of_the_whole(tmp_path: Path) -> None:
    """gpt-oss writes <|end|> behind its reasoning."""
    for more, is_end in ((("<|return|>", "<|call|>"), False), ((), True)):
        own = train(PLAIN)
        tokens = ("<|end|>", *more)
        own.add_special_tokens([AddedToken(token, special=True) for token in tokens])
        path = tmp_path / "tiny.gguf"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "CONTROL", (*CONTROL, *tokens))
            write(path, own, "gpt-2")
        ends = ModelText.load(str(path)).eos_token_ids
        assert (own.token_to_id("<|end|>") in ends) is is_end
        assert all(own.token_to_id(token) in ends for token in more)


@pytest.mark.parametrize("begins", [True, False])
def test_texts_begin_as_the_file_says(begins: bool, tmp_path: Path) -> None:
    own = train(PLAIN)
    said = {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": begins}
    text = ModelText.load(str(write(tmp_path / "tiny.gguf", own, "gpt-2", **said)))
    assert text.encode("hello")[0] == 1 if begins else text.encode("hello")[0] != 1
    assert text.encode("hello")[begins:] == own.encode("hello").ids


def test_chat_templates(tmp_path: Path) -> None:
    own = train(PLAIN)
    text = ModelText.load(str(write(tmp_path / "one.gguf", own, "gpt-2", chat_template=TEMPLATE, bos_token_id=1)))
    assert text.tokenizer.chat_template == TEMPLATE
    templates = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools"}]
    text = ModelText.load(str(write(tmp_path / "two.gguf", own, "gpt-2", chat_template=templates)))
    assert text.tokenizer.chat_template == {"default": TEMPLATE, "tool_use": "tools"}
    text = ModelText.load(str(write(tmp_path / "none.gguf", own, "gpt-2")))
    assert text.tokenizer.chat_template is None


def test_sampling_defaults(tmp_path: Path) -> None:
    own = train(PLAIN)
    said = {"sampling_temp": 0.5, "sampling_top_k": 20, "sampling_min_p": 0.25}
    text = ModelText.load(str(write(tmp_path / "tiny.gguf", own, "gpt-2", **said)))
    assert text.defaults == SamplingDefaults(temperature=0.5, top_k=20, min_p=0.25)
