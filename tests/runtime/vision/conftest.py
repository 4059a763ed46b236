from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.runtime.vision.chats import Case, Family, chats

Families = Callable[[str], tuple[Family, dict[str, Case]]]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """A family by name, and ``chats`` for it with the answers of stock transformers. Made once."""

    @cache
    def find(name: str) -> tuple[Family, dict[str, Case]]:
        family = Family(tmp_path_factory.mktemp(name), name)
        return family, {chat: family.case(messages) for chat, messages in chats().items()}

    return find
