"""A family's parser for one model, one prompt, one request's tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lmserve.service.choice import Parsing
from lmserve.service.model_text import ModelText
from lmserve.service.parsing.events import control
from lmserve.service.parsing.family import Family, ParserInput
from lmserve.service.parsing.table import needs_parser
from lmserve.service.tools import Toolbox


def parsing_of(family: Family, prompt: str, toolbox: Toolbox | None, text: ModelText) -> Callable[[], Parsing] | None:
    """Makes the parser of a choice. None where nothing is to be taken apart: no tools, and no reasoning."""
    tools = () if toolbox is None else toolbox.callable_tools
    if not needs_parser(family, tools):
        return None
    controls = control_markers(family, text)
    names = set(controls.values())
    asked = ParserInput(prompt, tools, lambda name: control(name) in names)
    return lambda: Parsing(family.make_parser(asked), controls, family.make_call_id)


def control_markers(family: Family, text: ModelText) -> Mapping[int, str]:
    """By token id: those of the family's markers that are control tokens here, as they stand in a parser's input."""
    special, ids = text.table.special_ids, text.added_ids
    return {ids[name]: control(name) for name in family.markers if ids.get(name) in special}
