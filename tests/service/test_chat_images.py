"""The limits that hold for all images of a request together, with real data URIs and a real host of pictures."""

from __future__ import annotations

import asyncio
import base64

import pytest

from lmserve.errors import InvalidRequest
from lmserve.images.fetch import ImageFetcher
from lmserve.images.source import ImageLimits
from lmserve.service.chat_images import ChatImages
from lmserve.service.messages import ImagePart
from tests.api.stub_engine import StubEngine, StubEntry, runner_info
from tests.images.picture_server import LOOPBACK, Names, PictureServer, is_loopback_or_public, plain


def parts(*urls: str) -> list[ImagePart]:
    return [ImagePart(f"messages[0].content[{i}].image_url.url", url, "auto") for i, url in enumerate(urls)]


def data_uri(num_bytes: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(b'x' * num_bytes).decode()}"


def refusal(server: PictureServer, *urls: str, max_bytes: int = 1000, seconds: float = 20.0) -> InvalidRequest:
    """Why the images are refused before anybody looks at one."""

    async def scenario() -> InvalidRequest:
        serving = await asyncio.start_server(server.answer, LOOPBACK, 0)
        port = serving.sockets[0].getsockname()[1]
        limits = ImageLimits(
            max_bytes=max_bytes, max_pixels=1, max_images=3, seconds=seconds, hosts=(f"pictures.test:{port}",)
        )
        names = Names(pictures_test=[[LOOPBACK]])
        fetcher = ImageFetcher(limits, resolver=names, is_allowed_address=is_loopback_or_public)
        images = ChatImages(limits, fetcher=fetcher)
        entry = StubEntry(StubEngine(runner_info(), lambda request, choice: []))
        try:
            with pytest.raises(InvalidRequest) as caught:
                await images.look(parts(*(url.replace("PORT", str(port)) for url in urls)), entry)
            return caught.value
        finally:
            await images.close()
            serving.close()

    return asyncio.run(scenario())


WEB = "http://pictures.test:PORT/a"


def test_all_together_have_one_limit_of_bytes() -> None:
    error = refusal(PictureServer({}), data_uri(400), data_uri(500), data_uri(101))
    assert error.param == "messages[0].content[2].image_url.url"
    assert "more than 1000 bytes" in str(error)


def test_what_is_fetched_has_what_the_others_have_left() -> None:
    server = PictureServer({"/a": plain(b"x" * 300)})
    error = refusal(server, data_uri(701), WEB, WEB)
    assert error.param == "messages[0].content[1].image_url.url"
    assert "(299)" in str(error)
    assert server.num_connections == 1, "nothing is fetched beyond the limit"


def test_all_together_have_one_deadline() -> None:
    server = PictureServer({"/a": plain(b"x" * 8)}, drips=True)  # some four seconds each
    error = refusal(server, WEB, WEB, WEB, seconds=6.0)
    assert "within 6 seconds" in str(error)


def test_no_more_than_so_many() -> None:
    error = refusal(PictureServer({}), *[WEB] * 4)
    assert error.param == "messages[0].content[3].image_url.url"
    assert "4 images, the limit is 3" in str(error)
