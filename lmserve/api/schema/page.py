"""The documentation page of the request fields: ``python -m lmserve.api.schema.page > docs/request-fields.md``."""

from __future__ import annotations

import sys

import msgspec

from lmserve.api.schema.chat import ChatCompletionRequest
from lmserve.api.schema.completions import CompletionRequest
from lmserve.api.schema.embeddings import EmbeddingRequest
from lmserve.api.schema.fields import Field, Treatment, table
from lmserve.api.schema.manage import DownloadRequest, LoadRequest, UnloadRequest
from lmserve.api.schema.sampling import SamplingFields
from lmserve.api.schema.scores import RerankRequest, ScoreRequest
from lmserve.api.schema.tokens import ApplyTemplateRequest, DetokenizeRequest, TokenizeRequest

_INTRODUCTION = """\
# Request fields

Made from the code that parses requests (`python -m lmserve.api.schema.page`); a test keeps it fresh.

A field is **honoured** with the meaning given here; or **ignored**, and named in the answer's header
`x-lmserve-ignored`, as is every key that is not on this page; or **refused** with a 400 that names it. `null` is the
same as leaving a field out. Refused fields pass if their value asks for nothing: `null`, or what stands in the column
*value*. The same description, for machines, is at `/openapi.json`.
"""
_SECTIONS: tuple[tuple[str, type[msgspec.Struct], type[msgspec.Struct] | None], ...] = (
    ("Chat and completions", SamplingFields, None),
    ("Chat only: POST /v1/chat/completions, /api/v0/chat/completions", ChatCompletionRequest, SamplingFields),
    ("Completions only: POST /v1/completions, /api/v0/completions", CompletionRequest, SamplingFields),
    ("POST /v1/embeddings, /api/v0/embeddings", EmbeddingRequest, None),
    ("POST /v1/rerank, /rerank", RerankRequest, None),
    ("POST /v1/score, /score", ScoreRequest, None),
    ("POST /tokenize", TokenizeRequest, None),
    ("POST /detokenize", DetokenizeRequest, None),
    ("POST /apply-template", ApplyTemplateRequest, None),
    ("POST /api/v1/models/load", LoadRequest, None),
    ("POST /api/v1/models/unload", UnloadRequest, None),
    ("POST /api/v1/models/download", DownloadRequest, None),
)


def page() -> str:
    """The page, in Markdown."""
    parts = [_INTRODUCTION]
    for title, body, shown_before in _SECTIONS:
        known = table(shown_before) if shown_before is not None else {}
        rows = [row for name, row in table(body).items() if known.get(name) != row]
        parts.append(f"## {title}\n")
        parts.append("| field | | type | value | default | meaning |\n|---|---|---|---|---|---|")
        parts.extend(_line(row) for treatment in Treatment for row in rows if row.treatment is treatment)
        parts.append("")
    return "\n".join(parts)


def _line(row: Field) -> str:
    value = row.allowed or ", ".join(f"`{msgspec.json.encode(same).decode()}`" for same in row.harmless)
    default = "required" if row.required else row.default
    cells = (f"`{row.name}`", row.treatment.value, row.kind, value, default, row.help)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


if __name__ == "__main__":
    sys.stdout.write(page())
