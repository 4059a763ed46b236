"""Kept outputs of every family, whole, character by character, and cut in two at every character."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmserve.service.parsing.events import ContentText
from lmserve.service.parsing.table import FAMILIES
from tests.service.parsing.replay import BY_NAME, FOLDER, fold, read_transcript, replay

PATHS = sorted(FOLDER.glob("*/*.json"))


def test_every_family_has_transcripts() -> None:
    assert {path.parent.name for path in PATHS} == {line.name for line in FAMILIES}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_transcript_says_the_same_however_it_is_cut(path: Path) -> None:
    transcript = read_transcript(path)
    assert transcript.family == path.parent.name
    family, text = BY_NAME[transcript.family], transcript.text
    cuts = [[text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))]
    for cut in cuts:
        events = replay(family, transcript.given, cut)
        assert fold(events) == transcript.expected, cut
        for event in events:
            if isinstance(event, ContentText):
                assert text[event.start : event.start + len(event.text)] == event.text
