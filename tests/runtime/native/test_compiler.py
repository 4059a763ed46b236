from __future__ import annotations

from pathlib import Path

import pytest

from lmserve.runtime.native import compiler
from lmserve.runtime.native.compiler import NativeUnavailable, build_source, check_available, compiled
from tests.runtime.native.availability import needs_native

ANSWER = 'extern "C" int answer() { return 42; }\n'


@needs_native
def test_a_text_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMSERVE_CACHE", str(tmp_path))
    assert build_source(ANSWER, "answer").answer() == 42
    (file,) = tmp_path.glob("native/answer-*.so")
    made = file.stat().st_mtime_ns
    assert build_source(ANSWER, "answer").answer() == 42
    assert [each.stat().st_mtime_ns for each in (tmp_path / "native").iterdir()] == [made], "nothing else is left"
    assert compiled(ANSWER + "// another\n", "answer") != file


@needs_native
def test_a_text_that_is_none_is_refused_with_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMSERVE_CACHE", str(tmp_path))
    with pytest.raises(NativeUnavailable, match="the compiler refuses broken: .*error"):
        build_source("int broken(", "broken")
    assert not list((tmp_path / "native").iterdir())


@needs_native
def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LMSERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(NativeUnavailable, match="cannot be kept"):
        build_source(ANSWER, "answer")


@needs_native
def test_a_broken_shared_object_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMSERVE_CACHE", str(tmp_path))
    compiled(ANSWER, "answer").write_bytes(b"no code")
    with pytest.raises(NativeUnavailable, match="cannot be loaded"):
        build_source(ANSWER, "answer")


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler|processor|x86-64"):
        check_available()


def test_a_processor_that_lacks_instructions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "processor_flags", lambda: "avx2 avx512f")
    with pytest.raises(NativeUnavailable, match="processor lacks avx512bw|x86-64"):
        check_available()


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")])
def test_other_machines_have_none(system: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(NativeUnavailable, match="Linux on x86-64 only"):
        check_available()
