"""Everything textual about one model: tokenizer, chat template, end-of-sequence ids, sampling defaults."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmserve.errors import InvalidRequest
from lmserve.gguf_tokenizer import load_gguf_tokenizer
from lmserve.grammar.tokenizer_text import TokenizerText, looks_like_control
from lmserve.image_parts import has_image_part
from lmserve.sampling_params import SamplingParams
from lmserve.service.detokenizer import ByteDetokenizer, IncrementalDetokenizer, PrefixDetokenizer
from lmserve.service.token_table import TokenTable, build_token_table


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a parameter is when the request does not say. None: not said here either."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class Instructions:
    """What an embedding model wants before a text, by name (sentence-transformers calls them prompts)."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    """The name of the one that is used when none is asked for."""


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Two texts as a cross-encoder receives them."""

    token_ids: list[int]
    token_type_ids: list[int]
    """Which text each token belongs to; empty if the model is not told."""
    begin: int
    """Where the second text begins."""


class ModelText:
    """One model's words. Made once, off the event loop; safe to use from several threads.

    A transformers tokenizer is not: at each call it sets its backend's flags where they are not as the call wants them.
    So they are set here, once, to what every call here wants. Plain text goes straight to the backend, which gives up
    the interpreter's lock; what needs transformers' own code goes one by one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos_token_ids: Sequence[int] = (),
        defaults: SamplingDefaults | None = None,
        instructions: Instructions | None = None,
        reads_images: bool = False,
    ) -> None:
        """``reads_images``: the model has an image encoder, and transformers a processor for it."""
        self.tokenizer = tokenizer
        self.reads_images = reads_images
        self.instructions = instructions or Instructions()
        self.table: TokenTable = build_token_table(tokenizer)
        self.eos_token_ids = sorted({*eos_token_ids, *_as_list(tokenizer.eos_token_id)})
        added = tokenizer.added_tokens_decoder
        self.added_ids: Mapping[str, int] = {str(token): token_id for token_id, token in added.items()}
        """By name, the tokens that were added to the vocabulary, special or not."""
        self.control_ids: Mapping[str, int] = {
            str(token): token_id
            for token_id, token in added.items()
            if looks_like_control(str(token), special=token.special)
        }
        """Of these, by name, those that a grammar asks for by their ids."""
        self.defaults = defaults or SamplingDefaults()
        self._lock = threading.Lock()
        self._backend: Any = None
        if tokenizer.is_fast:
            self._backend = tokenizer.backend_tokenizer
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = False

    @classmethod
    def load(cls, path: str, *, trust_remote_code: bool = False, revision: str = "") -> ModelText:
        """Read the tokenizer of a model and its ``generation_config.json``.

        ``path``: a local folder, a GGUF file or a hub name. Takes seconds: transformers' tokenizers import torch.

        Raises:
            ModelLoadFailed: a GGUF file has texts cut in a way that is not known.
            Exception: transformers' own, for files that it cannot read.
        """
        from transformers import AutoTokenizer  # noqa: PLC0415  (takes seconds, and only the serving process needs it)

        location = Path(path)
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
        if location.is_file():
            tokenizer, ends, generation = load_gguf_tokenizer(location)
            return cls(tokenizer, eos_token_ids=ends, defaults=sampling_defaults(generation))
        generation = _read_json(path, "generation_config.json", options["revision"])
        model = _read_json(path, "config.json", options["revision"])
        eos = _as_list(generation.get("eos_token_id", model.get("eos_token_id")))
        folder, instructions = _read_encoder_files(path, options["revision"])
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder=folder, **options)
        transformer = _read_json(path, f"{folder}/sentence_bert_config.json".lstrip("/"), options["revision"])
        if transformer.get("do_lower_case"):
            lower_case(tokenizer)
        reads_images = has_image_part(model)
        if reads_images and not tokenizer.chat_template:  # where processors kept it before they shared a file
            tokenizer.chat_template = _read_json(path, "chat_template.json", options["revision"]).get("chat_template")
        return cls(
            tokenizer,
            eos_token_ids=eos,
            defaults=sampling_defaults(generation),
            instructions=instructions,
            reads_images=reads_images,
        )

    def encode(self, text: str) -> list[int]:
        """A text that begins a sequence, with the tokenizer's own special tokens (most often one at the beginning).

        A beginning-of-sequence token that the text already has is not doubled.
        """
        token_ids = self._encode(text, add_special_tokens=True)
        bos = self.tokenizer.bos_token_id
        if bos is not None and token_ids[:2] == [bos, bos] and text.startswith(self.tokenizer.bos_token):
            del token_ids[0]
        return token_ids

    def encode_rendered(self, text: str) -> list[int]:
        """A rendered chat: the template wrote the special tokens.

        Those of a model that reads images it may have left out: transformers' processors then add them.
        """
        bos = self.tokenizer.bos_token
        return self._encode(text, add_special_tokens=self.reads_images and not (bos and text.startswith(bos)))

    def encode_tokens(self, text: str) -> list[int]:
        """A piece of a prompt, nothing added."""
        return self._encode(text, add_special_tokens=False)

    def encode_inputs(self, texts: Sequence[str]) -> list[list[int]]:
        """What an encoder receives of each text: as it is, with the tokenizer's own special tokens."""
        if self._backend is not None:
            return [list(encoding.ids) for encoding in self._backend.encode_batch_fast(list(texts))]
        return [self._encode(text, add_special_tokens=True) for text in texts]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        """What a cross-encoder receives of each pair."""
        tells = "token_type_ids" in self.tokenizer.model_input_names
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(list(pairs))
            return [
                EncodedPair(list(each.ids), list(each.type_ids) if tells else [], _begin(each.sequence_ids))
                for each in encodings
            ]
        with self._lock:
            found = [(self.tokenizer(*pair), self.tokenizer(pair[0])) for pair in pairs]
        return [
            EncodedPair(list(both["input_ids"]), list(both.get("token_type_ids") or []), len(first["input_ids"]))
            for both, first in found
        ]

    def num_final_tokens(self) -> int:
        """Special tokens that the tokenizer adds at the end of a text, or of a pair."""
        with_them, without = (self._encode("a", add_special_tokens=added) for added in (True, False))
        first = next(i for i in range(len(with_them)) if with_them[i : i + len(without)] == without)
        return len(with_them) - first - len(without)

    def encode_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Render and encode at once: control tokens that stand in the messages become ordinary text."""
        with self._lock:
            token_ids = self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=False, sanitize_control_tokens=True, **options
            )
        return list(token_ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""
        if self._backend is not None:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        with self._lock:
            return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def for_grammars(self) -> TokenizerText:
        """What the worker has to know of the tokens. Takes tenths of a second for a large vocabulary.

        Raises:
            InvalidRequest: nothing can be enforced with this tokenizer.
        """
        if self._backend is None or not self.table.has_bytes:
            raise InvalidRequest(
                "No format can be enforced for this model: its tokenizer's tokens are not bytes.", "response_format"
            )
        if not self.eos_token_ids:
            raise InvalidRequest(
                "No format can be enforced for this model: it has no end-of-sequence token.", "response_format"
            )
        return TokenizerText.of(self._backend.to_str(), self.eos_token_ids)

    def detokenizer(self, *, begins_text: bool) -> IncrementalDetokenizer:
        """For one choice. ``begins_text``: its output is a text of its own, not the continuation of one."""
        if self.table.concatenates:
            return ByteDetokenizer(self.table, drop_first_space=begins_text and self.table.drops_first_space)
        return PrefixDetokenizer(self.decode)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))


def sampling_defaults(generation_config: dict[str, Any]) -> SamplingDefaults:
    """A generation config's sampling parameters; those that no request could ask for are left out."""
    defaults = SamplingDefaults()
    for name in SamplingDefaults.__dataclass_fields__:
        value = generation_config.get(name)
        if value is None:
            continue
        try:
            SamplingParams(max_tokens=1, **{name: value})
        except (InvalidRequest, TypeError):
            continue
        defaults = replace(defaults, **{name: value})
    return defaults


def _begin(sequence_ids: Sequence[int | None]) -> int:
    """Of the second text, as the tokenizer tells; the end if it has no tokens."""
    return next((i for i, sequence in enumerate(sequence_ids) if sequence == 1), len(sequence_ids))


def lower_case(tokenizer: Any) -> None:
    """Makes a tokenizer lower the case of its texts first, as sentence-transformers' ``do_lower_case`` asks."""
    from tokenizers import normalizers  # noqa: PLC0415  (only the serving process needs it)

    backend = tokenizer.backend_tokenizer
    own = backend.normalizer
    if not (isinstance(own, normalizers.BertNormalizer) and own.lowercase):
        both = [normalizers.Lowercase(), *([] if own is None else [own])]
        backend.normalizer = normalizers.Sequence(both)


def _read_encoder_files(path: str, revision: str) -> tuple[str, Instructions]:
    """Where a sentence-transformers folder has the transformer's own files, and its instructions."""
    modules = _read_list(path, "modules.json", revision)
    folder = str(modules[0].get("path") or "") if modules else ""
    said = _read_json(path, "config_sentence_transformers.json", revision)
    prompts = said.get("prompts")
    texts = {str(name): str(text or "") for name, text in prompts.items()} if isinstance(prompts, dict) else {}
    default = said.get("default_prompt_name")
    return folder, Instructions(texts, default if default in texts else None)


def _read_list(path: str, name: str, revision: str) -> list[dict[str, Any]]:
    content = _read(path, name, revision)
    return [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []


def _read_json(path: str, name: str, revision: str) -> dict[str, Any]:
    """A file of a model's folder or hub repository; empty if there is none."""
    content = _read(path, name, revision)
    return content if isinstance(content, dict) else {}


def _read(path: str, name: str, revision: str) -> Any:
    from transformers.utils.hub import cached_file  # noqa: PLC0415  (as above)

    file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else None


def _as_list(token_ids: int | list[int] | None) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)
