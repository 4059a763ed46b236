"""What the figures are to be, and whether they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypedDict

from benchmarks.gpu.results import Row, Section

Outcome = Literal["met", "missed", "not measured"]
Of = Literal["value", "share", "limit"]
"""What of a row is looked at: its value, its share of the roofline, or its value over its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What one figure is to be."""

    what: str
    section: str
    model: str = ""
    row: str
    """The row's name, or a pattern (error, *): then each row that it fits has to be as wanted."""
    of: Of = "value"
    least: float | None = None
    most: float | None = None
    over: tuple[str, str] | None = None
    """Section and row, of the same model, that the figure is divided by."""
    device: str = ""
    """Part of the GPU's name: on others the aim says nothing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an aim."""

    what: str
    outcome: Outcome
    value: float | None = None
    """What was looked at; of several rows, the worst."""
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Place(TypedDict):
    section: str
    model: str


IN_8B = _Place(section="serving", model="qwen3-8b")
IN_06B = _Place(section="serving", model="qwen3-0.6b")
STARTS = _Place(section="start", model="qwen3-0.6b")

AIMS: tuple[Aim, ...] = (
    Aim(what="attention is right", section="kernels", row="error, *", of="limit", most=1.0),
    Aim(what="keys and values are written right", section="kernels", row="writing, *", least=1.0),
    Aim(what="a decode attends alike in any company", section="kernels", row="decodes alone, *", least=1.0),
    Aim(what="8B, 1 stream: 75 % of the roofline", row="decode, 1 stream", of="share", least=0.75, **IN_8B),
    Aim(what="8B, 1 stream: 208 tokens/s", row="decode, 1 stream", least=208.0, device="H200", **IN_8B),
    Aim(what="8B, 32 streams: 75 % of the roofline", row="decode, 32 streams", of="share", least=0.75, **IN_8B),
    Aim(what="8B, 32 streams: 5,100 tokens/s", row="decode, 32 streams", least=5100.0, device="H200", **IN_8B),
    Aim(what="8B, 256 streams: 14,000 tokens/s", row="decode, 256 streams", least=14_000.0, device="H200", **IN_8B),
    Aim(what="0.6B, 1 stream: 900 tokens/s", row="decode, 1 stream", least=900.0, device="H200", **IN_06B),
    Aim(what="8B, prefill of 8k: 50 % of the product rate", row="prefill of 8192", of="share", least=0.5, **IN_8B),
    Aim(
        what="8B, 32 streams: 3 x transformers' continuous batching",
        row="whole, 32 streams",
        over=("peers", "generate_batch, 32 streams"),
        least=3.0,
        **IN_8B,
    ),
    Aim(what="compiling costs 15 s at most, cold", row="more than eager, cold", most=15.0, **STARTS),
    Aim(what="compiling costs 4 s at most, warm", row="more than eager, warm", most=4.0, **STARTS),
)


def judge(sections: Sequence[Section], device: str, aims: Sequence[Aim] = AIMS, *, tiny: bool = False) -> list[Verdict]:
    """What became of each aim. ``device``: the GPU's name. A tiny run meets none and misses none."""
    if tiny:
        return [Verdict(aim.what, "not measured", reason="a tiny run judges nothing") for aim in aims]
    return [_judge(aim, sections, device) for aim in aims]


def _judge(aim: Aim, sections: Sequence[Section], device: str) -> Verdict:
    if aim.device not in device:
        return Verdict(aim.what, "not measured", reason=f"an aim for the {aim.device}")
    rows = _rows(sections, aim.section, aim.model, aim.row)
    failed = [row for row in rows if row.failed]
    if failed:
        return Verdict(aim.what, "missed", reason=f"{failed[0].name}: {failed[0].note}")
    try:
        values = [_figure(aim, row, sections) for row in rows if row.value is not None]
    except _NotMeasured as error:
        return Verdict(aim.what, "not measured", reason=str(error))
    section = next((each for each in sections if (each.name, each.model) == (aim.section, aim.model)), None)
    reason = section.reason if section else "the section was not run"
    if not values:
        return Verdict(aim.what, "not measured", reason=reason)
    worst = min(values) if aim.least is not None else max(values)
    is_met = worst >= aim.least if aim.least is not None else worst <= (aim.most or 0.0)
    if is_met and "*" in aim.row and section is not None and section.status != "done":
        return Verdict(aim.what, "not measured", reason=f"not all of it: {reason}")
    return Verdict(aim.what, "met" if is_met else "missed", worst)


class _NotMeasured(Exception):
    pass


def _rows(sections: Sequence[Section], name: str, model: str, pattern: str) -> list[Row]:
    of = [section for section in sections if (section.name, section.model) == (name, model)]
    return [row for section in of for row in section.rows if fnmatchcase(row.name, pattern)]


def _figure(aim: Aim, row: Row, sections: Sequence[Section]) -> float:
    assert row.value is not None, "the others were left out"
    if aim.of == "share":
        if row.share is None:
            raise _NotMeasured("what the device can do at best was not measured")
        return row.share
    if aim.of == "limit":
        return row.value / (row.limit or 1.0)
    if aim.over is None:
        return row.value
    others = [other.value for other in _rows(sections, aim.over[0], aim.model, aim.over[1]) if other.value]
    if not others:
        raise _NotMeasured(f"{aim.over[1]}: there is nothing to compare with")
    return row.value / others[0]
