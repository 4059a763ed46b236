"""What runs in a helper process: bytes to picture, picture to features, features to a file.

Decoding and resizing take tens of milliseconds and libraries written in C read what strangers have sent: neither is for
the process that passes tokens on. The server imports this file to name its functions: what is heavy is imported late.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import connection, parent_process
from typing import TYPE_CHECKING

from lmserve.images.job import BadImage, ImageJob, ProcessedImage

if TYPE_CHECKING:
    from lmserve.images.processor import ImageProcessor

DECODE_SECONDS = 20
NICENESS = 10
"""Tokens that others wait for go first where there are fewer cores than work."""
MAX_PROCESSORS = 4
"""Models whose processors one helper keeps."""


def begin() -> None:
    """The helper's first acts: it gives way to the workers, and ends when the server does, however that ends."""
    os.nice(NICENESS)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(parent: int) -> None:
    connection.wait([parent])
    os._exit(0)


def prepare(path: str, trust_remote_code: bool, revision: str) -> None:
    """Raises as ``process``, of the processor."""
    _processor(path, trust_remote_code, revision)


def process(job: ImageJob) -> ProcessedImage:
    """
    Raises:
        BadImage: it is none, or one that this model cannot look at.
        ProcessorError: the model has no processor that works here.
    """
    from lmserve.images.decode import decode_image  # noqa: PLC0415  (see the head)

    with _limited_time():
        decoded = decode_image(job.data, job.max_pixels)
    processor = _processor(job.path, job.trust_remote_code, job.revision)
    try:
        features = processor.process(decoded.image, job.detail)
    except (ValueError, TypeError, IndexError, ZeroDivisionError, OSError) as error:
        raise BadImage(f"the model's own processor refuses it: {error}") from error
    file, num_bytes = features.save(job.folders)
    return ProcessedImage(
        file=file,
        num_bytes=num_bytes,
        content=features.content,
        format=decoded.format,
        width=decoded.image.width,
        height=decoded.image.height,
        image_token=processor.image_token,
        placeholder_id=processor.placeholder_id,
        text=features.text,
        num_placeholders=features.num_placeholders,
        detail_honoured=features.detail_honoured,
    )


@contextmanager
def _limited_time() -> Iterator[None]:
    """Of the processor: some formats let a small file ask for minutes."""

    def stop(*_: object) -> None:
        raise BadImage(f"it takes more than {DECODE_SECONDS} seconds to decode")

    if not hasattr(signal, "ITIMER_PROF"):  # Windows has none
        yield
        return
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, DECODE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@lru_cache(MAX_PROCESSORS)
def _processor(path: str, trust_remote_code: bool, revision: str) -> ImageProcessor:
    from lmserve.images.processor import ImageProcessor  # noqa: PLC0415  (see the head)

    return ImageProcessor.load(path, trust_remote_code=trust_remote_code, revision=revision)
