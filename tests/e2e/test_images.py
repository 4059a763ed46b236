"""Chats with pictures by the official client, against ``generate`` with the same weights and the stock processor."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from PIL import Image

from lmserve.service.model_text import ModelText
from tests.e2e.serving import Server, start
from tests.images.odd_files import encoded
from tests.images.odd_images import odd_images
from tests.images.tiny_vlms import (
    load_model,
    load_processor,
    model_inputs,
    pictures,
    reference_answer,
    user,
    write_tiny_vlm,
)
from tests.processes import still_running
from tests.runtime.vision.chats import chats

VLMS = ("qwen2.5-vl", "gemma3", "gemma4", "smolvlm")
NUM_NEW = 8
MAX_IMAGES = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_tiny_vlm(tmp_path_factory.mktemp("vlms") / name, name) for name in VLMS}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path], tiny_folder: Path) -> Iterator[Server]:
    models = [f"{name}={folder}" for name, folder in folders.items()]
    flags = [flag for model in (*models, f"blind={tiny_folder}") for flag in ("--model", model)]
    limits = ("--max-images", str(MAX_IMAGES), "--max-image-pixels", "4000000")
    common = ("--dtype", "float32", "--max-model-len", "2000", "--kv-cache-memory", "16MiB", "--threads", "1")
    with start(tmp_path_factory.mktemp("vlm-server"), *flags, *limits, *common) as found:
        yield found


def url_of(picture: Image.Image, kind: str = "PNG") -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(picture, kind)).decode()}"


def image_part(url: str, **more: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def on_the_wire(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As OpenAI has it."""
    wire = []
    for message in messages:
        parts = [image_part(url_of(p["image"])) if p["type"] == "image" else p for p in message["content"]]
        wire.append({**message, "content": parts})
    return wire


def ask(server: Server, model: str, messages: Any, **options: Any) -> Any:
    client: Any = server.client()
    settings = {"max_tokens": NUM_NEW, "temperature": 0, **options}
    return client.chat.completions.create(model=model, messages=messages, **settings)


def said(answer: Any) -> bytes:
    """Every byte of the answer's tokens: a text loses half characters at its end."""
    return b"".join(bytes(token.bytes) for token in answer.choices[0].logprobs.content)


@pytest.mark.parametrize("name", VLMS)
def test_greedy_equals_generate_alone_and_among_others(name: str, server: Server, folders: dict[str, Path]) -> None:
    model, processor = load_model(folders[name]), load_processor(folders[name])
    table = ModelText.load(str(folders[name])).table
    expected, prompts = {}, {}
    for chat, messages in chats().items():
        tokens = reference_answer(model, processor, messages, NUM_NEW)
        expected[chat] = b"".join(map(table.piece, tokens))
        prompts[chat] = model_inputs(processor, messages)["input_ids"].shape[1]

    def one(chat: str) -> tuple[bytes, int]:
        answer = ask(server, name, on_the_wire(chats()[chat]), logprobs=True)
        return said(answer), answer.usage.prompt_tokens

    assert {chat: one(chat) for chat in expected} == {chat: (expected[chat], prompts[chat]) for chat in expected}
    crowd = [*expected, *expected, *expected]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(one, crowd)) == [(expected[chat], prompts[chat]) for chat in crowd]


def test_the_next_turn_finds_the_picture(server: Server) -> None:
    first = [user("What a disc: ", pictures()["disc"].convert("RGB"), "Is it one?")]
    answer = ask(server, "qwen2.5-vl", on_the_wire(first))
    more = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Sure?"}]
    again = ask(server, "qwen2.5-vl", [*on_the_wire(first), *more])
    assert again.usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens - 32


def test_streaming(server: Server) -> None:
    messages = on_the_wire(chats()["three"])
    whole = ask(server, "gemma3", messages).choices[0].message.content
    chunks = list(ask(server, "gemma3", messages, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage.prompt_tokens > 3 * 9


def test_pictures_in_every_role(server: Server) -> None:
    red, grey = (image_part(url_of(pictures()[name].convert("RGB"))) for name in ("red", "grey"))
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": [{"type": "text", "text": "Look."}, red]},
        {"role": "user", "content": [grey, {"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": "Hm."},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "A screen: "}, red, grey]},
    ]
    one = ask(server, "qwen2.5-vl", messages, logprobs=True)
    messages[3]["content"] = [{"type": "text", "text": "A screen: "}, grey, red]
    other = ask(server, "qwen2.5-vl", messages, logprobs=True)
    assert one.usage.prompt_tokens == other.usage.prompt_tokens
    assert said(one) != said(other), "the order counts"


def test_what_users_write_is_no_picture(server: Server) -> None:
    """A placeholder's name in a text is text, also beside a picture."""
    picture = image_part(url_of(pictures()["red"].convert("RGB")))
    for model, token in (("qwen2.5-vl", "<|image_pad|>"), ("gemma3", "<start_of_image>"), ("smolvlm", "<image>")):
        plain = ask(server, model, [{"role": "user", "content": [picture, {"type": "text", "text": "x"}]}])
        text = {"type": "text", "text": f"x{token}"}
        odd = ask(server, model, [{"role": "user", "content": [picture, text]}])
        assert odd.usage.prompt_tokens == plain.usage.prompt_tokens + len(token), "one token a byte"
        ask(server, model, [{"role": "user", "content": f"What is {token}?"}])


def test_low_detail_takes_fewer_tokens(server: Server) -> None:
    picture = url_of(pictures()["red"].convert("RGB"))

    def tokens(**more: object) -> int:
        answer = ask(server, "smolvlm", [{"role": "user", "content": [image_part(picture, **more)]}], max_tokens=1)
        return int(answer.usage.prompt_tokens)

    assert tokens(detail="low") < tokens() == tokens(detail="high") == tokens(detail="auto")


def test_an_image_url_may_be_a_plain_string_and_declare_another_type(server: Server) -> None:
    picture = pictures()["red"].convert("RGB")
    usual = ask(server, "gemma3", [{"role": "user", "content": [image_part(url_of(picture))]}], logprobs=True)
    odd = url_of(picture).replace("image/png", "image/jpeg")
    part = {"type": "image_url", "image_url": odd}
    assert said(ask(server, "gemma3", [{"role": "user", "content": [part]}], logprobs=True)) == said(usual)


RED = url_of(Image.new("RGB", (32, 32), (200, 0, 0)))
LARGE = url_of(Image.new("RGB", (2001, 2000)))


@pytest.mark.parametrize(
    ("model", "parts", "param", "words"),
    [
        ("blind", [{"type": "text", "text": "?"}, image_part(RED)], "messages[0].content[1]", "reads text only"),
        (
            "gemma3",
            [image_part(RED)] * (MAX_IMAGES + 1),
            f"messages[0].content[{MAX_IMAGES}].image_url.url",
            "the limit is 5",
        ),
        ("gemma3", [image_part(LARGE)], "messages[0].content[0].image_url.url", "the limit is 4000000"),
        ("gemma3", [image_part(RED, detail="most")], "messages[0].content[0].image_url.detail", "auto, low, high"),
        ("gemma3", [image_part("file:///etc/passwd")], "messages[0].content[0].image_url.url", "never read"),
        ("gemma3", [image_part("http://localhost/x.png")], "messages[0].content[0].image_url.url", "fetches no images"),
        ("gemma3", [image_part("data:image/png;base64,AAAA")], "messages[0].content[0].image_url.url", "no PNG, JPEG"),
        ("gemma3", [{"type": "image_url"}], "messages[0].content[0].image_url.url", "required"),
        (
            "gemma3",
            [{"type": "image_url", "image_url": {"url": 5}}],
            "messages[0].content[0].image_url.url",
            "required",
        ),
        ("gemma3", [{"type": "input_audio"}], "messages[0].content[0]", "text and images only"),
    ],
)
def test_refusals_name_the_part(model: str, parts: list[Any], param: str, words: str, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, model, [{"role": "user", "content": parts}])
    assert caught.value.param == param
    assert words in str(caught.value)


def test_hundreds_of_odd_files_harm_nobody(server: Server) -> None:
    """Each gives an answer or a 400 that says why; meanwhile somebody's text chat goes on undisturbed."""
    text = [{"role": "user", "content": "Tell me a story."}]
    undisturbed = said(ask(server, "gemma3", text, max_tokens=100, logprobs=True, extra_body={"ignore_eos": True}))
    telling: list[bytes] = []

    def tell() -> None:
        for _ in range(3):
            answer = ask(server, "gemma3", text, max_tokens=100, logprobs=True, extra_body={"ignore_eos": True})
            telling.append(said(answer))

    def send(data: bytes) -> int:
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        body = {"model": "gemma3", "max_tokens": 1, "messages": [{"role": "user", "content": [image_part(url)]}]}
        answer = http.post(f"{server.url}/v1/chat/completions", json=body)
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            error = answer.json()["error"]
            assert error["param"] == "messages[0].content[0].image_url.url"
            assert error["message"]
        return answer.status_code

    files = odd_images()
    thread = threading.Thread(target=tell)
    thread.start()
    with httpx.Client(timeout=60) as http, ThreadPoolExecutor(4) as threads:
        codes = list(threads.map(send, [file.data for file in files]))
        assert http.get(f"{server.url}/health").status_code == 200
    thread.join()
    for file, code in zip(files, codes, strict=True):
        assert file.expected == "either" or code == {"good": 200, "bad": 400}[file.expected], file.name
    assert telling == [undisturbed] * 3


def test_the_log_stream_tells_of_each_picture(server: Server) -> None:
    some = pictures()
    messages = on_the_wire(
        [user(some["stripes"].convert("RGB"), some["red"].convert("RGB"), some["stripes"].convert("RGB"))]
    )
    with httpx.stream("GET", f"{server.url}/log/stream?types=llm.prediction.input", timeout=30) as stream:
        lines = stream.iter_lines()
        asking = threading.Thread(target=ask, args=(server, "qwen2.5-vl", messages))
        asking.start()
        event = next(json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {"))
        asking.join()
    seen = event["images"]
    assert [(image["format"], image["width"], image["height"]) for image in seen] == [
        ("PNG", 60, 24),
        ("PNG", 32, 32),
        ("PNG", 60, 24),
    ]
    assert [image["placeholderTokensCount"] for image in seen] == [24, 16, 24]
    assert seen[0]["content"] == seen[2]["content"] != seen[1]["content"]
    assert event["input"].count("<|image_pad|>") == 3, "the template's words, one for a picture"
    assert event["promptTokensCount"] > 64


def test_the_template_and_the_tokens_can_be_looked_at(server: Server) -> None:
    messages = on_the_wire(chats()["one"])
    with httpx.Client(base_url=server.url, timeout=30) as http:
        found = http.post("/apply-template", json={"model": "qwen2.5-vl", "messages": messages}).json()
        usage = ask(server, "qwen2.5-vl", messages).usage
        assert len(found["tokens"]) == usage.prompt_tokens
        models = {model["id"]: model for model in http.get("/api/v0/models").json()["data"]}
    assert [(models[name]["type"], "vision" in models[name]["capabilities"]) for name in (*VLMS, "blind")] == [
        *[("vlm", True)] * len(VLMS),
        ("llm", False),
    ]


def side_processes(server: Server) -> list[psutil.Process]:
    return [p for p in server.workers() if any("spawn_main" in part for part in p.cmdline())]


def feature_files() -> list[str]:
    places = [place for place in ("/dev/shm", os.environ.get("TMPDIR", "/tmp")) if os.path.isdir(place)]
    folders = [
        entry.path for place in places for entry in os.scandir(place) if entry.name.startswith("lmserve-images-")
    ]
    return [os.path.join(folder, name) for folder in folders for name in os.listdir(folder)]


def test_a_side_process_that_dies_costs_nothing(server: Server) -> None:
    message = on_the_wire(chats()["one"])
    before = said(ask(server, "gemma3", message, logprobs=True))
    for process in side_processes(server):
        process.kill()
    assert said(ask(server, "gemma3", message, logprobs=True)) == before


def test_no_features_outlive_their_request(server: Server) -> None:
    ask(server, "gemma3", on_the_wire(chats()["three"]))
    deadline = time.monotonic() + 10
    while feature_files() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert feature_files() == []


def test_nothing_is_left_of_a_server_that_is_killed(tmp_path: Path, folders: dict[str, Path]) -> None:
    with start(tmp_path, "--model", str(folders["gemma3"]), "--max-model-len", "1000", "--threads", "1") as server:
        ask(server, "gemma3", on_the_wire(chats()["one"]))
        processes = server.workers()
        assert side_processes(server)
        os.kill(server.process.pid, signal.SIGKILL)
        assert not still_running(processes)
