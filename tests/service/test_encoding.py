"""What encoders receive, with the tokenizer of all-MiniLM-L6-v2, and with instructions and lower case of their own."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lmserve.errors import InputTooLong, InvalidRequest
from lmserve.models.starter import STARTERS, find_source
from lmserve.runtime.interface import EncoderInput
from lmserve.service.encoding import EncodingOptions, EncodingRequest, EncodingService
from lmserve.service.log_stream import LogStream
from lmserve.service.model_text import ModelText
from lmserve.service.texts import Texts
from tests.api.stub_engine import Settings, StubEngine, StubEntry, StubModels, runner_info

TEXTS = ["Hello, World!", "naïve café", "a", "  ", "\n", "one\ttwo " * 3]
PROMPTS = {"query": "query: ", "document": "", "task": "Find what is like it. "}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2's files without its weights, with instructions."""
    made = tmp_path_factory.mktemp("encoder") / "model"
    source = find_source(STARTERS["all-minilm-l6-v2"])
    shutil.copytree(source, made, ignore=shutil.ignore_patterns("*.safetensors", ".*"))
    (made / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS}))
    return made


@pytest.fixture(scope="session")
def text(folder: Path) -> ModelText:
    return ModelText.load(str(folder))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def prepare(text: ModelText, inputs: Sequence[str | list[int]], limit: int = 256, **options: Any) -> EncodingRequest:
    async def make() -> EncodingRequest:
        engine = StubEngine(runner_info(vocab_size=30522, max_model_len=limit, row_size=4), lambda request, choice: [])
        texts = Texts(lambda entry: text)
        service = EncodingService(StubModels(StubEntry(engine)), texts, LogStream(), Settings())
        try:
            return await service.prepare_texts("r", "stub", inputs, EncodingOptions(**options))
        finally:
            texts.close()

    return asyncio.run(make())


def pairs(text: ModelText, wanted: list[tuple[str, str]], limit: int = 256, cut_to: int | None = None) -> list[Any]:
    async def make() -> EncodingRequest:
        engine = StubEngine(runner_info(vocab_size=30522, max_model_len=limit), lambda request, choice: [])
        texts = Texts(lambda entry: text)
        service = EncodingService(StubModels(StubEntry(engine)), texts, LogStream(), Settings())
        try:
            params = [f"documents[{i}]" for i in range(len(wanted))]
            return await service.prepare_pairs("r", "stub", wanted, params, cut_to)
        finally:
            texts.close()

    return asyncio.run(make()).inputs


def test_texts_are_encoded_as_transformers_does(text: ModelText, tokenizer: Any) -> None:
    request = prepare(text, TEXTS)
    assert [each.token_ids for each in request.inputs] == tokenizer(TEXTS)["input_ids"]
    assert request.texts == TEXTS
    assert request.num_tokens == sum(len(ids) for ids in tokenizer(TEXTS)["input_ids"])


def test_pairs_are_encoded_as_transformers_does(text: ModelText, tokenizer: Any) -> None:
    wanted = [("what is it", each) for each in TEXTS]
    expected = tokenizer(*map(list, zip(*wanted, strict=True)))
    inputs = pairs(text, wanted)
    assert [each.token_ids for each in inputs] == expected["input_ids"]
    assert [each.token_type_ids for each in inputs] == expected["token_type_ids"]


def test_token_ids_are_taken_as_they_are(text: ModelText) -> None:
    assert prepare(text, [[5, 6], [101]]).inputs == [EncoderInput([5, 6]), EncoderInput([101])]


def test_instructions_go_before_the_text(text: ModelText, tokenizer: Any) -> None:
    plain, query, document = (prepare(text, ["a cat"], prompt_name=name) for name in (None, "query", "document"))
    assert plain.inputs == document.inputs == [EncoderInput(tokenizer("a cat")["input_ids"])]
    # [CLS] query : [SEP]: what is of the instruction ends before the last special token.
    assert query.inputs == [EncoderInput(tokenizer("query: a cat")["input_ids"], [], 3)]
    assert query.texts == ["query: a cat"]
    with pytest.raises(InvalidRequest, match="It has: query, document, task") as refused:
        prepare(text, ["a cat"], prompt_name="nobody")
    assert refused.value.param == "prompt_name"
    with pytest.raises(InvalidRequest, match="token ids"):
        prepare(text, [[1]], prompt_name="query")


def test_a_default_instruction(folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    shutil.copytree(folder, tmp_path / "m")
    said = {"prompts": PROMPTS, "default_prompt_name": "query"}
    (tmp_path / "m" / "config_sentence_transformers.json").write_text(json.dumps(said))
    text = ModelText.load(str(tmp_path / "m"))
    assert prepare(text, ["a cat"]).inputs[0].token_ids == tokenizer("query: a cat")["input_ids"]
    assert prepare(text, ["a cat"], prompt_name="document").inputs[0].token_ids == tokenizer("a cat")["input_ids"]
    assert prepare(text, [[7]]).inputs == [EncoderInput([7])]


def test_lower_case_where_sentence_transformers_asks_for_it(folder: Path, tmp_path: Path) -> None:
    """Its tokenizer keeps the case here, as some do."""
    shutil.copytree(folder, tmp_path / "m")
    tokenizer_file = tmp_path / "m" / "tokenizer.json"
    content = json.loads(tokenizer_file.read_text())
    content["normalizer"]["lowercase"] = False
    tokenizer_file.write_text(json.dumps(content))
    for name in ("tokenizer_config.json",):
        config = json.loads((tmp_path / "m" / name).read_text())
        (tmp_path / "m" / name).write_text(json.dumps({**config, "do_lower_case": False}))
    ids = {}
    for lower in (False, True):
        said = {"max_seq_length": 256, "do_lower_case": lower}
        (tmp_path / "m" / "sentence_bert_config.json").write_text(json.dumps(said))
        text = ModelText.load(str(tmp_path / "m"))
        ids[lower] = text.encode_inputs(["HELLO", "hello"])
    assert ids[False][0] != ids[False][1]
    assert ids[True][0] == ids[True][1] == ids[False][1]


def test_the_transformers_own_folder(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "m"
    shutil.copytree(folder, made / "0_Transformer")
    modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (made / "modules.json").write_text(json.dumps(modules))
    shutil.move(made / "0_Transformer" / "config.json", made / "config.json")
    shutil.copy(made / "config.json", made / "0_Transformer")
    text = ModelText.load(str(made))
    assert len(text.encode_inputs(["a cat"])[0]) == 4


def test_a_cut_input_keeps_its_last_token(text: ModelText, tokenizer: Any) -> None:
    long = "one two three four five six seven eight"
    expected = tokenizer(long, truncation=True, max_length=6)["input_ids"]
    assert prepare(text, [long], cut_to=6).inputs[0].token_ids == expected
    assert prepare(text, [long], limit=6, cut_to=-1).inputs[0].token_ids == expected
    with pytest.raises(InputTooLong, match=r"6 tokens. However, input\[1\] has 10"):
        prepare(text, ["a", long], limit=6)
    with pytest.raises(InvalidRequest, match="input cannot be cut to 2 tokens: .* 3 are needed"):
        prepare(text, [long], cut_to=2)


def test_a_cut_pair_loses_the_end_of_its_second_text(text: ModelText, tokenizer: Any) -> None:
    long = "one two three four five six seven eight"
    expected = tokenizer("what", long, truncation="only_second", max_length=8)
    (made,) = pairs(text, [("what", long)], cut_to=8)
    assert (made.token_ids, made.token_type_ids) == (expected["input_ids"], expected["token_type_ids"])
    for first, limit in ((long, 11), ("what", 4)):
        with pytest.raises(InvalidRequest, match=r"documents\[0\] cannot be cut"):
            pairs(text, [(first, long)], cut_to=limit)
