from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Sequence

import pytest

from lmserve.errors import InvalidRequest
from lmserve.images.address import is_public
from lmserve.images.fetch import MAX_REDIRECTS, ImageFetcher
from tests.images.picture_server import (
    LOOPBACK,
    MAX_BYTES,
    PATH,
    PICTURE,
    SECONDS,
    Certified,
    Names,
    PictureServer,
    fetched,
    is_loopback_or_public,
    limits,
    ok_server,
    plain,
    redirect,
)


@pytest.mark.parametrize("hosts", ["*:PORT", "pictures.test:PORT", ".pictures.test:PORT", ".test:PORT", "TEST|x"])
def test_a_picture_of_a_listed_host(hosts: str) -> None:
    server = ok_server()
    listed = ["other.test", "pictures.TEST:PORT"] if "|" in hosts else [hosts]
    assert fetched("http://pictures.test:PORT/cat.png#top", server, hosts=listed).data == PICTURE
    head = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in server.heads[0][1:]}
    assert head["host"] == f"pictures.test:{server.port}"
    assert head["accept-encoding"] == "identity"
    assert not {"cookie", "authorization", "referer"} & set(head)


def test_the_query_is_sent_and_the_case_of_the_host_does_not_matter() -> None:
    outcome = fetched(" HTTP://Pictures.TEST:PORT/cat.png?size=2 ", ok_server(), hosts=["pictures.test:PORT"])
    assert outcome.data == PICTURE[:100]


def test_an_answer_in_chunks_without_a_length() -> None:
    body = b"4\r\nabcd\r\n3\r\nefg\r\n0\r\n\r\n"
    server = PictureServer(
        {"/c": plain(body, "200 OK", "Transfer-Encoding: chunked"), "/u": plain(b"abc", "200 OK", "A: b")}
    )
    assert fetched("http://pictures.test:PORT/c", server).data == b"abcdefg"
    assert fetched("http://pictures.test:PORT/u", server).data == b"abc"


@pytest.mark.parametrize(
    "url",
    [
        "http://other.test:PORT/cat.png",
        "http://pictures.test.evil.test:PORT/cat.png",
        "http://evilpictures.test:PORT/cat.png",
        "http://sub.pictures.test:PORT/cat.png",
        "http://pictures.test/cat.png",
        "https://pictures.test/cat.png",
        "http://pictures.test:22/cat.png",
        "http://127.0.0.1:PORT/cat.png",
        "http://[::1]:PORT/cat.png",
    ],
)
def test_a_host_or_port_that_is_not_listed(url: str) -> None:
    server, names = ok_server(), Names()
    outcome = fetched(url, server, names, hosts=["pictures.test:PORT", "elsewhere.test"])
    assert "not among those" in outcome.reason
    assert (server.num_connections, names.asked) == (0, [])


@pytest.mark.parametrize("entry", ["*", "pictures.test", ".test"])
def test_an_entry_without_a_port_allows_the_usual_ones_only(entry: str) -> None:
    assert "not among those" in fetched("http://pictures.test:PORT/cat.png", ok_server(), hosts=[entry]).reason
    for url in ("http://pictures.test/x", "https://pictures.test/x", "http://pictures.test:443/x"):
        unknown = fetched(url, ok_server(), Names(), hosts=[entry])
        assert "is not known" in unknown.reason


def test_without_a_list_nothing_is_fetched() -> None:
    outcome = fetched("http://pictures.test:PORT/cat.png", ok_server(), hosts=[])
    assert "fetches no images" in outcome.reason


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@pictures.test:PORT/cat.png",
        "http://user@pictures.test:PORT/cat.png",
        "http://evil.test\\@pictures.test:PORT/cat.png",
        "ftp://pictures.test:PORT/cat.png",
        "file:///etc/passwd",
        "http:///cat.png",
        "http://",
        "http:cat.png",
        "",
        "http://pictures.test:0/cat.png",
        "http://pictures.test:99999/cat.png",
        "http://pictures.test:port/cat.png",
        "http://.pictures.test:PORT/cat.png",
        "http://pictures..test:PORT/cat.png",
        f"http://{'a' * 64}.test:PORT/",
        f"http://{'a.' * 200}test:PORT/",
        "http://pic%74ures.test:PORT/",
        "http://[::1%25lo]:PORT/",
        "http://[::1:PORT/",
        "http://①.test/",
        "http://pictures.test:PORT/\x00",
        "http://pictures.test/" + "x" * 100_000,
    ],
)
def test_urls_that_are_none_or_say_too_much(url: str) -> None:
    server, names = ok_server(), Names(pictures_test=[[LOOPBACK]])
    outcome = fetched(url, server, names, hosts=["*", "*:PORT"])
    assert outcome.reason
    assert "secret" not in outcome.reason
    assert len(outcome.reason) < 300
    assert (server.num_connections, names.asked) == (0, [])


@pytest.mark.parametrize(
    "answer",
    [
        ["127.0.0.1"],
        ["10.0.0.7"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["2002:7f00:1::"],
        ["fe80::1%1"],
        ["8.8.8.8", "127.0.0.1"],
        ["2606:4700:4700::1111", "10.0.0.7"],
    ],
)
def test_any_address_that_is_not_public_is_enough_to_refuse(answer: list[str]) -> None:
    server = ok_server()
    outcome = fetched(
        "http://pictures.test:PORT/cat.png", server, Names(pictures_test=[answer]), is_allowed_address=is_public
    )
    assert outcome.reason == f"{PATH}: its host has an address that is not public."
    assert server.num_connections == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "2130706433", "0x7f000001", "127.1", "localhost", "0"])
def test_this_machine_by_its_other_names_and_the_systems_own_resolver(host: str) -> None:
    async def scenario() -> str:
        serving = await asyncio.start_server(ok_server().answer, LOOPBACK, 0)
        port = serving.sockets[0].getsockname()[1]
        fetcher = ImageFetcher(limits(f"*:{port}"))
        try:
            with pytest.raises(InvalidRequest) as refusal:
                await fetcher.fetch(f"http://{host}:{port}/cat.png", PATH)
            return str(refusal.value)
        finally:
            await fetcher.close()
            serving.close()

    assert "not public" in asyncio.run(scenario())


def test_a_name_is_resolved_once_and_the_address_that_was_judged_is_the_one_that_is_reached() -> None:
    """The second answer, which nobody may judge by, would be another machine's."""
    server, names = ok_server(), Names(pictures_test=[[LOOPBACK], ["10.0.0.7"]])
    assert fetched("http://pictures.test:PORT/cat.png", server, names).data == PICTURE
    assert names.asked == ["pictures.test"]


def test_a_name_that_turns_inwards_between_redirects_is_judged_again() -> None:
    server = PictureServer({"/a": redirect("/cat.png"), "/cat.png": plain(PICTURE)})
    outcome = fetched("http://pictures.test:PORT/a", server, Names(pictures_test=[[LOOPBACK], ["10.0.0.7"]]))
    assert outcome.reason == f"{PATH}: its host has an address that is not public."
    assert server.num_connections == 1


def test_an_address_that_does_not_answer_is_followed_by_the_next() -> None:
    names = Names(pictures_test=[["127.0.0.2", LOOPBACK]])  # nobody listens there
    outcome = fetched("http://pictures.test:PORT/cat.png", ok_server(), names, is_allowed_address=lambda _: True)
    assert outcome.data == PICTURE
    nobody = fetched(
        "http://pictures.test:PORT/cat.png",
        ok_server(),
        Names(pictures_test=[["127.0.0.2"]]),
        is_allowed_address=lambda _: True,
    )
    assert nobody.reason == f"{PATH}: its host cannot be reached."


@pytest.mark.parametrize("answer", [[], ["nonsense"]])
def test_a_resolver_that_says_nothing_of_use(answer: list[str]) -> None:
    outcome = fetched("http://pictures.test:PORT/cat.png", ok_server(), Names(pictures_test=[answer]))
    assert "is not known" in outcome.reason


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize(
    "location", ["/cat.png", "cat.png", "//pictures.test:PORT/cat.png", "http://b.test:PORT/cat.png"]
)
def test_a_redirect_is_followed(status: str, location: str) -> None:
    server = PictureServer({"/": redirect(location, status), "/cat.png": plain(PICTURE)})
    names = Names(pictures_test=[[LOOPBACK]], b_test=[[LOOPBACK]])
    assert fetched("http://pictures.test:PORT/", server, names).data == PICTURE


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://10.0.0.7:PORT/", "not public"),
        ("http://inside.test:PORT/", "not public"),
        ("http://pictures.test:22/", "not among those"),
        ("http://user@pictures.test:PORT/", "user or password"),
        ("file:///etc/passwd", "over http and https only"),
        ("data:image/png;base64,AAAA", "over http and https only"),
        ("http://[", "no proper URL"),
        ("http://①/", "no proper URL"),
    ],
)
def test_where_a_redirect_may_not_lead(location: str, reason: str) -> None:
    server = PictureServer({"/": redirect(location)})
    answers = {"pictures_test": [[LOOPBACK]], "inside_test": [["192.168.0.1"]], "10_0_0_7": [["10.0.0.7"]]}
    names = Names(**answers)
    outcome = fetched("http://pictures.test:PORT/", server, names)
    assert reason in outcome.reason
    assert "10.0.0.7" not in outcome.reason
    assert "inside" not in outcome.reason
    assert server.num_connections == 1


def test_redirects_end() -> None:
    server = PictureServer({"/": redirect("/")})
    assert "more than 3 times" in fetched("http://pictures.test:PORT/", server).reason
    assert server.num_connections == MAX_REDIRECTS + 1
    chain = {f"/{i}": redirect(f"/{i + 1}") for i in range(3)} | {"/3": plain(PICTURE)}
    assert fetched("http://pictures.test:PORT/0", PictureServer(chain)).data == PICTURE


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (plain(b"gone", "404 Not Found"), "status 404"),
        (plain(b"", "204 No Content"), "status 204"),
        (plain(PICTURE, "206 Partial Content"), "status 206"),
        (plain(b"", "304 Not Modified"), "status 304"),
        (plain(b"oops", "500 Internal Server Error"), "status 500"),
        (plain(b""), "sent nothing"),
        (plain(b"", "302 Found", "Content-Length: 0"), "redirected more than"),
        (plain(b"x" * (MAX_BYTES + 1)), "more bytes"),
        (plain(b"x" * 10**6, "200 OK", "A: b"), "more bytes"),
        (plain(b"xyz", "200 OK", f"Content-Length: {10**12}"), "more bytes"),
        (plain(b"xyz", "200 OK", "Content-Length: 10"), "broke off"),
        (plain(b"xyz", "200 OK", "Content-Length: -1"), "no proper answer"),
        (plain(b"5\r\nab", "200 OK", "Transfer-Encoding: chunked"), "broke off"),
        (plain(b"zz\r\n", "200 OK", "Transfer-Encoding: chunked"), "broke off"),
        (plain(gzip.compress(bytes(10**7)), "200 OK", "Content-Encoding: gzip"), "compressed"),
        (plain(b"\x1b\x00", "200 OK", "Content-Encoding: identity, br"), "compressed"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "no proper answer"),
        (b"", "no proper answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 100_000, "no proper answer"),
    ],
)
def test_answers_that_are_no_picture(answer: bytes, reason: str) -> None:
    outcome = fetched("http://pictures.test:PORT/", PictureServer({"/": answer}))
    assert reason in outcome.reason
    assert outcome.reason.startswith(PATH)
    assert outcome.param == PATH


def test_a_length_that_says_less_than_is_sent_cuts_the_body() -> None:
    server = PictureServer({"/": plain(b"x" * 10**6, "200 OK", "Content-Length: 5")})
    assert fetched("http://pictures.test:PORT/", server).data == b"xxxxx"


def test_what_the_request_has_left_is_the_limit() -> None:
    assert fetched("http://pictures.test:PORT/cat.png", ok_server(), max_bytes=len(PICTURE)).data == PICTURE
    assert "more bytes" in fetched("http://pictures.test:PORT/cat.png", ok_server(), max_bytes=len(PICTURE) - 1).reason


@pytest.mark.parametrize("answer", [plain(PICTURE), redirect("/"), b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000])
def test_one_deadline_for_all_of_it(answer: bytes) -> None:
    """Each byte comes in time, all of them never would."""
    began = time.monotonic()
    outcome = fetched("http://pictures.test:PORT/", PictureServer({"/": answer}, drips=True), seconds=0.3)
    assert outcome.reason == f"{PATH}: the image was not there within 0.3 seconds."
    assert time.monotonic() - began < SECONDS


def test_a_resolver_that_never_answers_is_within_the_deadline() -> None:
    class Silent(Names):
        async def __call__(self, host: str, port: int) -> Sequence[str]:
            await asyncio.Event().wait()
            return []

    assert "within 0.1 seconds" in fetched("http://pictures.test:PORT/", ok_server(), Silent(), seconds=0.1).reason


def test_nothing_in_the_environment_is_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetched("http://pictures.test:PORT/cat.png", ok_server()).data == PICTURE


def test_cookies_are_not_sent_back() -> None:
    server = PictureServer(
        {
            "/": plain(b"", "302 Found", "Location: /cat.png", "Set-Cookie: a=b; Path=/", "Content-Length: 0"),
            "/cat.png": plain(PICTURE),
        }
    )
    assert fetched("http://pictures.test:PORT/", server).data == PICTURE
    assert not [line for head in server.heads for line in head if line.lower().startswith("cookie")]


def test_the_certificate_is_checked_for_the_name_and_not_for_the_address() -> None:
    tls = Certified("pictures.test")
    url = "https://pictures.test:PORT/cat.png"
    assert fetched(url, ok_server(), tls=tls.server, verify=tls.client).data == PICTURE
    assert tls.shown == ["pictures.test"]
    names = Names(other_test=[[LOOPBACK]])
    wrong = fetched("https://other.test:PORT/cat.png", ok_server(), names, tls=tls.server, verify=tls.client)
    assert wrong.reason == f"{PATH}: its host cannot be reached."
    assert fetched(url, ok_server(), tls=tls.server).data is None  # signed by nobody that is known


def test_a_second_name_at_the_same_address_is_checked_again() -> None:
    tls = Certified("pictures.test")
    names = Names(pictures_test=[[LOOPBACK]], other_test=[[LOOPBACK]])
    server = PictureServer({"/": redirect("https://other.test:PORT/cat.png"), "/cat.png": plain(PICTURE)})
    outcome = fetched("https://pictures.test:PORT/", server, names, tls=tls.server, verify=tls.client)
    assert outcome.reason == f"{PATH}: its host cannot be reached."


def test_closing_ends_what_is_being_fetched() -> None:
    async def scenario() -> str:
        asked = asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            asked.set()
            await reader.read()
            writer.close()

        serving = await asyncio.start_server(silent, LOOPBACK, 0)
        port = serving.sockets[0].getsockname()[1]
        fetcher = ImageFetcher(
            limits(f"*:{port}"), resolver=Names(a_test=[[LOOPBACK]]), is_allowed_address=is_loopback_or_public
        )
        fetching = asyncio.ensure_future(fetcher.fetch(f"http://a.test:{port}/", PATH))
        await asked.wait()
        await fetcher.close()
        with pytest.raises(InvalidRequest) as refusal:
            await fetching
        serving.close()
        return str(refusal.value)

    assert "no proper answer" in asyncio.run(asyncio.wait_for(scenario(), 2 * SECONDS))
