"""Whether native code can run here, for the tests that need it."""

from __future__ import annotations

import pytest

from lmserve.runtime.native.compiler import NativeUnavailable, check_available


def _reason() -> str:
    try:
        check_available()
    except NativeUnavailable as error:
        return str(error)
    return ""


REASON = _reason()
needs_native = pytest.mark.skipif(bool(REASON), reason=REASON or "native code runs here")
