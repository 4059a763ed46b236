"""A chat made into a prompt by the tokenizer's own template."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from lmserve.errors import InvalidRequest
from lmserve.images.placeholders import WrongPlaceholders, locate_images
from lmserve.images.pool import StoredImage
from lmserve.service.call_history import fit_history, has_history
from lmserve.service.control_tokens import ControlTokens
from lmserve.service.messages import TEXT_ONLY, ImagePart, PartStyle, check_nesting, normalize_messages
from lmserve.service.model_text import ModelText
from lmserve.service.parsing.family import CallSyntax
from lmserve.service.parsing.table import find_family
from lmserve.service.template_abilities import TemplateAbilities, find_abilities, switches_read
from lmserve.service.tool_words import describe_tools, put_in_front, show_tool
from lmserve.service.tools import Toolbox

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image, and where its placeholder tokens begin and end in the prompt."""

    image: StoredImage
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model receives. ``text`` is None where the client sent token ids."""

    text: str | None
    """With one token of the template for each image."""
    token_ids: list[int]
    images: tuple[PlacedImage, ...] = ()
    healed: str = ""
    """The end of the text that ``token_ids`` lack: the output begins with it, and the answer behind it."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat in the template's words; its images are not in it yet."""

    text: str
    images: list[ImagePart]
    token_ids: list[int] | None
    """Where messages hold control tokens, which are text there; else the text says all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A chat as the client wrote it."""

    messages: Sequence[dict[str, Any]]
    add_generation_prompt: bool | None = None
    """None: unless the last message is to be continued."""
    continue_final_message: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    toolbox: Toolbox | None = None
    reasoning_effort: str | None = None
    """One of EFFORTS. What ``template_kwargs`` say of reasoning goes before it."""


class ChatTemplate:
    """Renders chats with one model's template.

    Tools, calls and their results that the template does not know are written into the messages in our own words.

    Control tokens that people write in messages stay text: such a chat is encoded in pieces, any other as one text.
    Where this version of transformers cannot do that, a message that holds a special token is refused.
    """

    def __init__(self, text: ModelText, call_syntax: CallSyntax | None = None) -> None:
        """``call_syntax``: how a model is asked to write calls if its template does not say; None: its family's way."""
        self._text = text
        self.family = find_family(self.source, text.tokenizer)
        self._call_syntax = call_syntax or self.family.syntax
        self._lock = threading.Lock()
        self._abilities: dict[bool, TemplateAbilities] = {}
        self._switches: frozenset[str] | None = None
        self._apply = text.tokenizer.apply_chat_template
        parameters = inspect.signature(self._apply).parameters
        self._reserved = frozenset(parameters) | {"messages"}
        self._can_sanitize = "sanitize_control_tokens" in parameters
        added = [token for token in text.tokenizer.added_tokens_decoder.values() if not str(token).isspace()]
        names = [str(token) for token in added if self._can_sanitize or token.special]
        self._style: PartStyle = self._find_style() if text.reads_images else "text"
        self._control_tokens = ControlTokens(names)

    @property
    def source(self) -> str | None:
        """The template in Jinja; None if the model has none."""
        try:
            return str(self._text.tokenizer.get_chat_template())
        except ValueError:
            return None

    def render(self, chat: Chat) -> Prompt:
        """The prompt of a chat without images. Raises as ``begin``."""
        return self.finish(self.begin(chat), [])

    def begin(self, chat: Chat, no_images: str | None = TEXT_ONLY) -> RenderedChat:
        """``no_images``: why the model may have none; None if it may.

        Raises:
            InvalidRequest: there is no template, the messages are malformed, or the template refuses them.
            UnsupportedField: they hold what the model cannot read.
        """
        source = self.source
        if source is None:
            raise InvalidRequest(
                "This model has no chat template, so it cannot be asked with messages; use /v1/completions.", "messages"
            )
        found = normalize_messages(chat.messages, source, self._style, no_images)
        options, token_ids = self._options(chat), None
        messages = self._fit(found.messages, chat, options)
        try:
            text = str(self._apply(messages, tokenize=False, **options))
            field_at_fault = self._field_with_control_token(found.messages, chat)
            if field_at_fault is not None:
                self._check_keys(messages, options)
                token_ids = self._encode_in_pieces(messages, options, field_at_fault)
        except jinja2.TemplateError as error:
            raise InvalidRequest(error.message or "The chat template refuses these messages.", "messages") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest(f"The chat template cannot render these messages: {error}", "messages") from error
        return RenderedChat(text, found.images, token_ids)

    def finish(self, chat: RenderedChat, images: Sequence[StoredImage]) -> Prompt:
        """Put the images in their places, and encode. ``images``: as many as ``chat.images``.

        Raises:
            InvalidRequest: the template has not a place for each.
        """
        if not images:
            return Prompt(
                chat.text, self._text.encode_rendered(chat.text) if chat.token_ids is None else chat.token_ids
            )
        token = images[0].facts.image_token
        if chat.token_ids is None:
            pieces = chat.text.split(token)
            if len(pieces) != len(images) + 1:
                raise _not_a_place_for_each(len(images), len(pieces) - 1)
            texts = [*(image.facts.text for image in images), ""]
            token_ids = self._text.encode_rendered("".join(map("".join, zip(pieces, texts, strict=True))))
        else:
            token_ids = self._expand(chat.token_ids, token, images)
        return Prompt(chat.text, token_ids, _place(token_ids, images))

    def _expand(self, token_ids: list[int], token: str, images: Sequence[StoredImage]) -> list[int]:
        """As ``finish``, of token ids: what people have written as text would be taken for control tokens otherwise."""
        (image_token_id,) = self._text.encode_tokens(token)
        found = [i for i, token_id in enumerate(token_ids) if token_id == image_token_id]
        if len(found) != len(images):
            raise _not_a_place_for_each(len(images), len(found))
        expanded, end = [], 0
        for place, image in zip(found, images, strict=True):
            expanded += [*token_ids[end:place], *self._text.encode_tokens(image.facts.text)]
            end = place + 1
        return expanded + token_ids[end:]

    def _find_style(self) -> PartStyle:
        """Whether contents may be texts, lists of parts, or both: seen by rendering one of each."""
        probe = "lmserve"

        def shows(content: object) -> bool:
            try:
                text = str(self._apply([{"role": "user", "content": content}], tokenize=False))
            except Exception:  # a template of another mind
                return False
            return probe in text and "'type'" not in text

        if not shows([{"type": "text", "text": probe}]):
            return "text"
        return "either" if shows(probe) else "parts"

    def abilities(self, *, with_tools: bool) -> TemplateAbilities:
        """What the template does with a chat that has tools, or has none. Found at the first question."""
        with self._lock:
            if with_tools not in self._abilities:
                self._abilities[with_tools] = find_abilities(self._probe, self._style, with_tools=with_tools)
            return self._abilities[with_tools]

    def ignored(self, chat: Chat) -> list[str]:
        """Fields of the chat that change nothing with this template."""
        return ["reasoning_effort"] if chat.reasoning_effort is not None and not self._find_switches() else []

    def _probe(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return str(self._apply(messages, tools=tools, tokenize=False))

    def _find_switches(self) -> frozenset[str]:
        """The variables by which the template, in each of its variants, lets people control reasoning."""
        with self._lock:
            if self._switches is None:
                templates = self._text.tokenizer.chat_template
                sources = templates.values() if isinstance(templates, dict) else [templates or ""]
                self._switches = switches_read([str(source) for source in sources])
            return self._switches

    def _fit(self, messages: list[dict[str, Any]], chat: Chat, options: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages as the template shows them whole; puts the tools into ``options`` if it shows those, too."""
        offered = chat.toolbox.callable_tools if chat.toolbox is not None else ()
        shows_tools = bool(offered) and self.abilities(with_tools=True).shows_tools
        if shows_tools:
            options["tools"] = [show_tool(tool) for tool in offered]
        if has_history(messages):
            abilities = self.abilities(with_tools=shows_tools)
            messages = fit_history(messages, abilities, self._call_syntax, self._style)
        if chat.toolbox is not None and offered and not shows_tools:
            words = describe_tools(chat.toolbox, self._call_syntax)
            takes_system = self.abilities(with_tools=False).takes_system
            messages = put_in_front(messages, words, takes_system=takes_system, style=self._style)
        return messages

    def _encode_in_pieces(self, messages: list[dict[str, Any]], options: dict[str, Any], field: str) -> list[int]:
        if not self._can_sanitize:
            raise InvalidRequest(
                f"{field}: there is a control token, which the server's version of transformers cannot keep as text.",
                field,
            )
        return self._text.encode_chat(messages, **options)

    def _options(self, chat: Chat) -> dict[str, Any]:
        if chat.continue_final_message and chat.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other.", "continue_final_message"
            )
        if chat.continue_final_message and chat.messages and chat.messages[-1].get("role") != "assistant":
            raise InvalidRequest(
                "continue_final_message needs a last message of the assistant.", "continue_final_message"
            )
        for name in chat.template_kwargs:
            if name in self._reserved:
                path = f"chat_template_kwargs.{name}"
                raise InvalidRequest(f"{path} is not the template's to decide.", path)
        check_nesting(chat.template_kwargs, "chat_template_kwargs")
        if chat.reasoning_effort is not None and chat.reasoning_effort not in EFFORTS:
            raise InvalidRequest(f"reasoning_effort must be one of {', '.join(EFFORTS)}.", "reasoning_effort")
        generation_prompt = chat.add_generation_prompt
        if generation_prompt is None:
            generation_prompt = not chat.continue_final_message
        return {
            "add_generation_prompt": generation_prompt,
            "continue_final_message": chat.continue_final_message,
            **self._reasoning_options(chat.reasoning_effort),
            **chat.template_kwargs,
        }

    def _reasoning_options(self, effort: str | None) -> dict[str, Any]:
        """In the template's own variables: the effort, or whether to think at all."""
        if effort is None:
            return {}
        return {name: effort if name == "reasoning_effort" else effort != "none" for name in self._find_switches()}

    def _field_with_control_token(self, messages: list[dict[str, Any]], chat: Chat) -> str | None:
        """Of what the client wrote: our own words may hold some, as the model is to write them."""
        offered = [show_tool(tool) for tool in chat.toolbox.callable_tools] if chat.toolbox is not None else []
        said = {"messages": messages, "tools": offered, "chat_template_kwargs": chat.template_kwargs}
        return next((name for name, value in said.items() if self._control_tokens.are_in(value)), None)

    def _check_keys(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
        """Refuse control tokens where transformers does not look for them."""
        own = {key: value for key, value in options.items() if key != "tools"}
        given = {"messages": messages, "tools": options.get("tools"), "chat_template_kwargs": own}
        for name, value in given.items():
            key = self._control_tokens.find_key(value)
            if key is not None:
                raise InvalidRequest(f"{name}: the key {key!r} holds a control token of the model.", name)


def _place(token_ids: Sequence[int], images: Sequence[StoredImage]) -> tuple[PlacedImage, ...]:
    """Each image with the stretch that its placeholder tokens cover."""
    counts = [image.facts.num_placeholders for image in images]
    try:
        found = locate_images(token_ids, images[0].facts.placeholder_id, counts)
    except WrongPlaceholders as error:
        raise InvalidRequest(f"messages: the prompt has {error}.", "messages") from error
    return tuple(PlacedImage(image, start, end) for image, (start, end) in zip(images, found, strict=True))


def _not_a_place_for_each(num_images: int, num_places: int) -> InvalidRequest:
    return InvalidRequest(
        f"messages: {num_images} images, for which the model's chat template has {num_places} places.", "messages"
    )
