"""The formats that are enforced, and what narrows the grammar engine's idea of each to what validators take."""

from __future__ import annotations

from dataclasses import dataclass

_NO_SECOND_60 = r"[0-9]{2}:[0-9]{2}:[0-5][0-9]"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DATE = f"(?:{_LEAP_YEAR}-02-29|{_YEAR}-(?:02-(?:[01][0-9]|2[0-8])|(?:0[13-9]|1[0-2])-[0-9]{{2}}))"
_LABEL = "[a-zA-Z0-9]+(?:-[a-zA-Z0-9]+)*"
"""Of a host's name; without `--`, which in the third place begins an encoding with rules of its own."""


@dataclass(frozen=True)
class Narrowing:
    """A pattern and a length that hold beside a format."""

    pattern: str | None = None
    max_length: int | None = None


FORMATS: dict[str, Narrowing] = {
    # The engine takes 29 February in every year, the year 0000 and leap seconds at any minute.
    "date": Narrowing(f"^{_DATE}$"),
    "date-time": Narrowing(f"^{_DATE}[tT]{_NO_SECOND_60}"),
    "time": Narrowing(f"^{_NO_SECOND_60}"),
    "duration": Narrowing(),
    # The engine bounds neither the parts nor the whole.
    "email": Narrowing(rf"^[^@]{{1,64}}@(?:{_LABEL}\.)*{_LABEL}$", 128),
    "hostname": Narrowing(rf"^{_LABEL}(?:\.{_LABEL})*$", 253),
    "ipv4": Narrowing(),
    "ipv6": Narrowing(),
    "uuid": Narrowing(),
    # The engine's addresses in brackets are an approximation.
    "uri": Narrowing(r"^[^\[\]]*$"),
}
"""Every format that a schema may name."""
