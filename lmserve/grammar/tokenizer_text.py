"""A model's tokens as llguidance wants them, on their way to the worker.

llguidance takes every added token that is special, or looks like ``<…>``, for a control token. Where a grammar leaves
one text only, and that spells such a token, it allows nothing but the token, which then does not fit (seen with 1.9.1
and a constant that holds ``<|im_start|>``). So these tokens get names here that no text has: what spells their old
name is spelled with ordinary tokens, and a grammar asks for the token itself by its id.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

_PRIVATE = "<\ue000{}\ue000>"


@dataclass(frozen=True, slots=True)
class TokenizerText:
    """A tokenizer on its way to the worker."""

    json: str
    """As the tokenizers library writes it, control tokens renamed."""
    num_ids: int
    eos_token_ids: list[int]
    """At least one: where a grammar is at its end only these are allowed."""

    @classmethod
    def of(cls, tokenizer_json: str, eos_token_ids: Sequence[int]) -> TokenizerText:
        """The tokenizer without its control tokens' names, and without what adds tokens to a text or cuts it."""
        state: dict[str, Any] = msgspec.json.decode(tokenizer_json)
        model, added = state["model"], state["added_tokens"]
        _rename(model["vocab"], added)
        if model.get("unk_token") is not None and model["unk_token"] not in model["vocab"]:
            model["unk_token"] = None
        state.update(post_processor=None, truncation=None, padding=None)
        num_ids = 1 + max([len(model["vocab"]) - 1, *(token["id"] for token in added), *_ids(model["vocab"])])
        return cls(msgspec.json.encode(state).decode(), num_ids, list(eos_token_ids))


def looks_like_control(name: str, *, special: bool) -> bool:
    """Whether llguidance takes an added token for a control token."""
    return special or (name.startswith("<") and name.endswith(">"))


def _rename(vocab: dict[str, int] | list[list[Any]], added: Sequence[dict[str, Any]]) -> None:
    for token in added:
        old, token_id = token["content"], token["id"]
        if not looks_like_control(old, special=token["special"]):
            continue
        token["content"] = new = _PRIVATE.format(token_id)
        if not isinstance(vocab, dict):
            for pair in vocab:
                pair[0] = new if pair[0] == old else pair[0]
        elif vocab.get(old) == token_id:
            del vocab[old]
            vocab[new] = token_id


def _ids(vocab: dict[str, int] | list[list[Any]]) -> Collection[int]:
    return vocab.values() if isinstance(vocab, dict) else ()
