"""The images of a chat: from their URLs to features that a prompt can name."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from lmserve.config import Config
from lmserve.errors import InvalidRequest, UnsupportedField
from lmserve.images.fetch import ImageFetcher
from lmserve.images.job import BadImage, ImageJob, ProcessorError
from lmserve.images.pool import ImagePool, StoredImage
from lmserve.images.source import ImageLimits, is_web_url, read_data_uri
from lmserve.service.messages import ImagePart
from lmserve.service.protocols import ModelEntry


class ChatImages:
    """Owns the helpers that look at images, and the way to images on other machines."""

    def __init__(self, limits: ImageLimits, pool: ImagePool | None = None, fetcher: ImageFetcher | None = None) -> None:
        self._limits = limits
        self._pool = pool or ImagePool()
        self._fetcher = fetcher or ImageFetcher(limits)

    async def look(self, parts: Sequence[ImagePart], entry: ModelEntry) -> list[StoredImage]:
        """Each image as the model wants it.

        Raises:
            InvalidRequest: one is none, or over a limit; ``param`` is its path.
            UnsupportedField: the model cannot look at images here.
            QueueFull: other requests' images take all the room.
        """
        if len(parts) > self._limits.max_images:
            path = parts[self._limits.max_images].path
            raise InvalidRequest(
                f"{path}: the request has {len(parts)} images, the limit is {self._limits.max_images}.", path
            )
        try:
            contents = await asyncio.wait_for(self._read_all(parts), self._limits.seconds)
        except asyncio.TimeoutError as error:
            seconds = f"{self._limits.seconds:g} seconds"
            raise InvalidRequest(f"messages: the images were not there within {seconds}.", "messages") from error
        jobs = (self._process(part, data, entry) for part, data in zip(parts, contents, strict=True))
        return list(await asyncio.gather(*jobs))

    async def prepare(self, entry: ModelEntry) -> None:
        """Reads the processor of a model that is being loaded: its first image need not wait for that."""
        config = entry.config
        with contextlib.suppress(ProcessorError):  # the worker finds out, too, and says so
            await self._pool.prepare(entry.path, trust_remote_code=config.trust_remote_code, revision=config.revision)

    async def close(self) -> None:
        """Ends the helpers."""
        await self._fetcher.close()
        self._pool.close()

    async def _read_all(self, parts: Sequence[ImagePart]) -> list[bytes]:
        """One after the other, so that all of them together never take more room than is allowed."""
        contents, left = [], self._limits.max_bytes
        for part in parts:
            if is_web_url(part.url):
                data = await self._fetcher.fetch(part.url, part.path, left)
            else:
                data = await asyncio.to_thread(read_data_uri, part.url, part.path)
            left -= len(data)
            if left < 0:
                limit = self._limits.max_bytes
                raise InvalidRequest(f"{part.path}: with it the images have more than {limit} bytes.", part.path)
            contents.append(data)
        return contents

    async def _process(self, part: ImagePart, data: bytes, entry: ModelEntry) -> StoredImage:
        job = ImageJob(
            data=data,
            detail=part.detail,
            max_pixels=self._limits.max_pixels,
            path=entry.path,
            trust_remote_code=entry.config.trust_remote_code,
            revision=entry.config.revision,
        )
        try:
            return await self._pool.process(job)
        except BadImage as error:
            raise InvalidRequest(f"{part.path}: the image cannot be read: {error}.", part.path) from error
        except ProcessorError as error:
            raise UnsupportedField(f"{part.path} is an image, but {error}.", part.path) from error


def image_limits(config: Config) -> ImageLimits:
    """An image that is fetched counts as if it had come in the body."""
    return ImageLimits(
        max_bytes=config.max_body_bytes,
        max_pixels=config.max_image_pixels,
        max_images=config.max_images,
        seconds=config.body_seconds,
        hosts=config.image_hosts,
    )
