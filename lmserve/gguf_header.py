"""What stands at the head of a GGUF file: metadata and the list of its tensors.

Own code although the ``gguf`` package reads such files: its ``GGUFReader`` makes numpy objects for every token of the
vocabulary, seconds of work that hold the interpreter's lock, and the API process streams answers meanwhile. Here arrays
of texts, and long ones, are passed over. The layout is ggml's ``docs/gguf.md``, versions 2 and 3, little endian.

Files come from strangers: every count and length is held against what is left of the file before it is used.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lmserve.errors import LMServeError

MAX_HEADER_BYTES = 128 * 2**20
"""The vocabulary is most of a header: a quarter of a million tokens with their merges take about 20 MiB."""
MAX_STRING_BYTES = 8 * 2**20
MAX_ENTRIES = 65536
"""Metadata keys, and tensors. The largest models have some thousand tensors."""
MAX_DIMENSIONS = 4
"""As in ggml (``GGML_MAX_DIMS``)."""
MAX_ELEMENTS = 2**63 - 1
MAX_ARRAY = 4096
"""Numbers in an array that is kept: one for each layer, not one for each token."""
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Mapping[int, struct.Struct] = {
    kind: struct.Struct("<" + code)
    for kind, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "B",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_U32, _U64, _TENSOR_END = _SCALARS[4], _SCALARS[10], struct.Struct("<IQ")


class GGUFError(LMServeError):
    """The file is no GGUF file that can be read; the message is a sentence about it without its name."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor, as the header announces it."""

    name: str
    shape: tuple[int, ...]
    """In ggml's order: the first dimension runs fastest."""
    ggml_type: int
    offset: int
    """Bytes from the header's ``data_offset``."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """A header without its arrays of texts and its long ones."""

    version: int
    metadata: Mapping[str, str | int | float | bool]
    array_lengths: Mapping[str, int]
    """How many elements each of the metadata's arrays has."""
    arrays: Mapping[str, tuple[int | float, ...]]
    """Of these, those of at most ``MAX_ARRAY`` numbers."""
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    """Bytes from the file's beginning to its tensors."""


def read_gguf_header(path: Path) -> GGUFHeader:
    """Reads the header only, with few objects: milliseconds.

    Raises:
        GGUFError: it is damaged, cut off, of another byte order or version, or beyond the limits above.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        reader = _Reader(file, os.fstat(file.fileno()).st_size)
        if reader.take(4) != b"GGUF":
            raise GGUFError("it does not begin like a GGUF file")
        version = reader.scalar(_U32)
        if version not in (2, 3):
            big_endian = isinstance(version, int) and version & 0xFFFF == 0
            raise GGUFError("it is written for big endian machines" if big_endian else f"GGUF version {version}")
        num_tensors, num_keys = reader.count(minimum_bytes=24), reader.count(minimum_bytes=13)
        metadata, array_lengths, arrays = _read_metadata(reader, num_keys)
        tensors = _read_tensors(reader, num_tensors)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise GGUFError(f"its alignment is {alignment!r}")
        data_offset = -(-reader.position // alignment) * alignment
        return GGUFHeader(int(version), metadata, array_lengths, arrays, tensors, data_offset)


def _read_metadata(
    reader: _Reader, count: int
) -> tuple[dict[str, str | int | float | bool], dict[str, int], dict[str, tuple[int | float, ...]]]:
    metadata: dict[str, str | int | float | bool] = {}
    array_lengths: dict[str, int] = {}
    arrays: dict[str, tuple[int | float, ...]] = {}
    for _ in range(count):
        key = reader.string()
        if key in metadata or key in array_lengths:
            raise GGUFError(f"the key {key[:80]!r} stands in it twice")
        kind = int(reader.scalar(_U32))
        if kind == _ARRAY:
            array_lengths[key], numbers = reader.array()
            if numbers is not None:
                arrays[key] = numbers
        elif kind == _STRING:
            metadata[key] = reader.string()
        else:
            value = reader.scalar(_scalar(kind))
            metadata[key] = bool(value) if kind == _BOOL else value
    return metadata, array_lengths, arrays


def _read_tensors(reader: _Reader, count: int) -> tuple[TensorInfo, ...]:
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        name = reader.string()
        if name in tensors:
            raise GGUFError(f"the tensor {name[:80]!r} stands in it twice")
        num_dimensions = reader.scalar(_U32)
        if num_dimensions > MAX_DIMENSIONS:
            raise GGUFError(f"the tensor {name[:80]!r} has {num_dimensions} dimensions")
        shape = tuple(int(reader.scalar(_U64)) for _ in range(int(num_dimensions)))
        ggml_type, offset = _TENSOR_END.unpack(reader.take(_TENSOR_END.size))
        tensors[name] = info = TensorInfo(name, shape, ggml_type, offset)
        if info.num_elements > MAX_ELEMENTS:
            raise GGUFError(f"the tensor {name[:80]!r} has the shape {shape}")
    return tuple(tensors.values())


def _scalar(kind: int) -> struct.Struct:
    try:
        return _SCALARS[kind]
    except KeyError:
        raise GGUFError(f"it has a value of the unknown kind {kind}") from None


class _Reader:
    """Goes through the file from its beginning, never past its end or ``MAX_HEADER_BYTES``."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._end = min(size, MAX_HEADER_BYTES)
        self._is_whole = size <= MAX_HEADER_BYTES
        self.position = 0

    def take(self, length: int) -> bytes:
        self._check(length)
        data = self._file.read(length)
        if len(data) != length:  # somebody shortened it while it was read
            raise GGUFError("it is cut off")
        self.position += length
        return data

    def skip(self, length: int) -> None:
        self._check(length)
        self._file.seek(length, os.SEEK_CUR)
        self.position += length

    def scalar(self, layout: struct.Struct) -> int | float:
        value: int | float = layout.unpack(self.take(layout.size))[0]
        return value

    def count(self, minimum_bytes: int) -> int:
        """A number of entries that take ``minimum_bytes`` each or more."""
        count = int(self.scalar(_U64))
        if count > MAX_ENTRIES:
            raise GGUFError(f"it announces {count} entries, more than {MAX_ENTRIES}")
        self._check(count * minimum_bytes)
        return count

    def string(self) -> str:
        length = int(self.scalar(_U64))
        if MAX_STRING_BYTES < length <= self._end - self.position:
            raise GGUFError(f"it has a text of {length} bytes")
        return self.take(length).decode(errors="replace")

    def array(self) -> tuple[int, tuple[int | float, ...] | None]:
        """How many elements it has; and its numbers, if it has numbers, and few of them."""
        kind, length = int(self.scalar(_U32)), int(self.scalar(_U64))
        if kind == _ARRAY:
            raise GGUFError("it has an array of arrays")
        if kind != _STRING:
            layout = _scalar(kind)
            if length > MAX_ARRAY:
                self.skip(layout.size * length)
                return length, None
            return length, tuple(struct.unpack(f"<{length}{layout.format[1:]}", self.take(layout.size * length)))
        self._check(_U64.size * length)
        self._skip_strings(length)
        return length, None

    def _skip_strings(self, count: int) -> None:
        """Half a million of them in a vocabulary, hence without the methods above: two reads a string."""
        read, unpack, position = self._file.read, _U64.unpack, self.position
        for _ in range(count):
            prefix = read(8)
            position += 8
            if len(prefix) != 8:
                raise self._past_the_end()
            (length,) = unpack(prefix)
            position += length
            if position > self._end:
                raise self._past_the_end()
            if length > MAX_STRING_BYTES:
                raise GGUFError(f"it has a text of {length} bytes")
            read(length)
        self.position = position

    def _check(self, length: int) -> None:
        if length > self._end - self.position:
            raise self._past_the_end()

    def _past_the_end(self) -> GGUFError:
        return GGUFError("it is cut off" if self._is_whole else f"its header is longer than {MAX_HEADER_BYTES} bytes")
