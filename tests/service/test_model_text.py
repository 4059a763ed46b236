from __future__ import annotations

import json
from pathlib import Path

from lmserve.service.model_text import ModelText, SamplingDefaults, sampling_defaults
from tests.service import tokenizers_for_tests as made


def save(folder: Path, **generation_config: object) -> None:
    made.byte_level().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 7}))
    (folder / "generation_config.json").write_text(json.dumps(generation_config))


def test_a_folder(tmp_path: Path) -> None:
    save(tmp_path, eos_token_id=[3, 5], temperature=0.7, top_k=20)
    text = ModelText.load(str(tmp_path))
    eos = made.byte_level().eos_token_id
    assert text.eos_token_ids == sorted([3, 5, eos])
    assert text.defaults == SamplingDefaults(temperature=0.7, top_k=20)
    assert text.decode(text.encode_rendered("hello world")) == "hello world"


def test_the_models_config_says_the_end_where_the_generation_config_does_not(tmp_path: Path) -> None:
    save(tmp_path)
    assert 7 in ModelText.load(str(tmp_path)).eos_token_ids


def test_defaults_that_no_request_could_ask_for_are_left_out() -> None:
    config = {"temperature": -3.0, "top_p": 0.9, "top_k": "many", "repetition_penalty": None, "do_sample": True}
    assert sampling_defaults(config) == SamplingDefaults(top_p=0.9)


def test_smollm2_from_its_gguf_file() -> None:
    text = made.smollm2()
    assert text.eos_token_ids == [0, 2], "<|im_end|>, and <|endoftext|>, which no turn goes beyond"
    assert text.defaults == SamplingDefaults()
    assert text.decode(text.encode("Hello, world!")) == "Hello, world!"


def test_a_written_beginning_of_sequence_is_not_doubled() -> None:
    tokenizer = made.byte_level()
    tokenizer.add_bos_token = True
    text = ModelText(tokenizer)
    bos = tokenizer.bos_token_id
    plain = text.encode("hello")
    assert plain[0] == bos, "the tokenizer begins every text with it"
    assert text.encode("<s>hello") == plain


def test_limits_in_the_tokenizers_file_are_not_ours() -> None:
    tokenizer = made.byte_level()
    tokenizer.backend_tokenizer.enable_truncation(max_length=2)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    assert ModelText(tokenizer).encode_rendered("hello hello") == made.byte_level().encode("hello hello")


def test_chats_with_control_tokens_leave_no_trace() -> None:
    """Encoding them must not change flags of the tokenizer, which other threads are using."""
    text = ModelText(made.byte_level("{{ messages[0].content }}"))
    control_token = [text.tokenizer.eos_token_id]
    assert text.encode_rendered("</s>") == control_token
    assert text.encode_chat([{"role": "user", "content": "</s>"}]) != control_token
    assert text.encode_rendered("</s>") == control_token
