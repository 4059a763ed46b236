"""Token healing: the border between a prompt and an output that has to be of a form.

Where a prompt ends within what the model would write as one token (``{"`` before a name, say), the tokens that fit the
form there are not those that the model knows. So the prompt's last token is taken back, and the grammar begins with its
text, in whatever tokens the model likes; that text is no part of the answer. (The idea is the guidance library's.)
"""

from __future__ import annotations

from dataclasses import replace

from lmserve.service.chat_template import Prompt
from lmserve.service.model_text import ModelText


def heal(prompt: Prompt, text: ModelText) -> Prompt:
    """The prompt without its last token, if that is text."""
    if prompt.text is None or prompt.images or len(prompt.token_ids) < 2 or not text.table.concatenates:
        return prompt
    last = prompt.token_ids[-1]
    if last in text.tokenizer.added_tokens_decoder:
        return prompt
    try:
        end = text.table.piece(last).decode()
    except UnicodeDecodeError:  # half a character
        return prompt
    if not end or not prompt.text.endswith(end):
        return prompt
    return replace(prompt, token_ids=prompt.token_ids[:-1], healed=end)
