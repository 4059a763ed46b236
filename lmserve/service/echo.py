"""The prompt as the answer repeats it, with the log-probabilities of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lmserve.outputs import TokenLogprobs
from lmserve.service.chat_template import Prompt
from lmserve.service.deltas import PositionLogprobs
from lmserve.service.model_text import ModelText
from lmserve.service.token_table import TokenTable


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt's text, and where in it each token begins, in characters."""

    text: str
    text_offsets: tuple[int, ...]


def echo_prompt(prompt: Prompt, model: ModelText) -> Echo:
    """The echo of a prompt: the client's own text or, of token ids, what they decode to, control tokens shown.

    A token that begins within a character has the character's offset. A token that the tokenizer added has no text,
    and its offset is that of the next one. Where the tokenizer changed the text (normalized it, say) offsets are as
    near as its own decoding tells, and never beyond the text.
    """
    text, position = prompt.text, 0
    pieces, offsets = _pieces(prompt, model), []
    for token_id, piece in zip(prompt.token_ids, pieces, strict=True):
        offsets.append(position)
        is_special = token_id in model.table.special_ids
        position += len(piece) if text is None else _length_in(text, position, piece, is_special=is_special)
    return Echo("".join(pieces) if text is None else text, tuple(offsets))


def _pieces(prompt: Prompt, model: ModelText) -> list[str]:
    """The text that each token completes, control tokens by their names.

    Half a character at the end is dropped, as it is at the end of an output.
    """
    special_ids = model.table.special_ids
    begins_with_word = prompt.token_ids[0] not in special_ids
    detokenizer = model.detokenizer(begins_text=prompt.text is None and begins_with_word)
    pieces = [
        model.table.piece(token_id).decode("utf-8", "replace")
        if token_id in special_ids
        else detokenizer.push(token_id)
        for token_id in prompt.token_ids
    ]
    pieces[-1] += detokenizer.finish()
    return pieces


def _length_in(text: str, position: int, piece: str, *, is_special: bool) -> int:
    """How much of the client's text from ``position`` on a token's piece stands for."""
    if text.startswith(piece, position):
        return len(piece)
    if is_special:
        return 0  # the tokenizer added it
    if piece.startswith(" ") and text.startswith(piece[1:], position):
        return len(piece) - 1  # the tokenizer writes a space before the first word
    return min(len(piece), len(text) - position)


@dataclass(slots=True)
class EchoLogprobs:
    """Owns an echo's log-probabilities while they come: one entry for each token of the prompt, the first at once."""

    echo: Echo
    token_ids: Sequence[int]
    table: TokenTable
    positions: list[PositionLogprobs] = field(init=False)

    def __post_init__(self) -> None:
        self.positions = [PositionLogprobs.unpredicted(self.token_ids[0], self.table, self.echo.text_offsets[0])]

    @property
    def is_complete(self) -> bool:
        return len(self.positions) == len(self.token_ids)

    def push(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """Those of the next tokens, in order."""
        for entry in logprobs:
            i = len(self.positions)
            self.positions.append(PositionLogprobs.of(self.token_ids[i], entry, self.table, self.echo.text_offsets[i]))
