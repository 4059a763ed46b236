"""A small hub on a free port: what huggingface_hub asks the real one for, answered from local folders.

Model information, the tree of files, and the files: whole or from a byte on, with the headers that huggingface_hub goes
by. There is no xet, as on most mirrors. Switches make it misbehave.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PIECE_BYTES = 1 << 14
_LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".onnx", ".pth", ".h5", ".msgpack")
_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass(frozen=True)
class StoredFile:
    """A file of a repository, as it ought to be."""

    name: str
    content: bytes

    @property
    def is_lfs(self) -> bool:
        return self.name.endswith(_LFS_SUFFIXES)

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id


@dataclass
class HubStandIn:
    """The repositories, the switches, and the books."""

    url: str
    hold_after: int | None = None
    """Of each file from here on, so many bytes go out; the rest when ``released`` is set."""
    released: threading.Event = field(default_factory=threading.Event)
    break_after: int | None = None
    """Each answer with a file breaks off after so many bytes, as long as there are ``breaks`` left."""
    breaks: int = 0
    wrong: set[str] = field(default_factory=set)
    """Files that come with a wrong byte in them."""
    gated: set[str] = field(default_factory=set)
    """Repositories that need ``token``: their information is public, their files are not."""
    token: str = "hf_secret"
    out_of_order: bool = False
    """Everything is answered with a 500."""
    announced: dict[str, int] = field(default_factory=dict)
    """Sizes that it tells of files instead of the true ones."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each."""
    bytes_served: int = 0
    """Of files."""
    _repositories: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_folder(self, repo: str, folder: Path) -> int:
        """Its files as ``repo``; their size in bytes."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return self.add(repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    def add(self, repo: str, files: dict[str, bytes]) -> int:
        """These files as ``repo``, or as its next commit; their size in bytes."""
        self._repositories[repo] = {name: StoredFile(name, content) for name, content in files.items()}
        return sum(map(len, files.values()))

    def commit(self, repo: str) -> str:
        files = self._repositories[repo].values()
        return hashlib.sha1("".join(f"{file.name} {file.etag}\n" for file in files).encode()).hexdigest()

    def files(self, repo: str) -> dict[str, StoredFile] | None:
        return self._repositories.get(repo)

    def size_of(self, file: StoredFile) -> int:
        return self.announced.get(file.name, len(file.content))

    def content_of(self, file: StoredFile) -> bytes:
        return file.content[:-1] + bytes([file.content[-1] ^ 1]) if file.name in self.wrong else file.content

    def note(self, request: str) -> None:
        with self._lock:
            self.requests.append(request)

    def note_bytes(self, number: int) -> None:
        with self._lock:
            self.bytes_served += number

    def take_break(self) -> int | None:
        """After how many bytes this answer is to break off."""
        with self._lock:
            if self.breaks == 0 or self.break_after is None:
                return None
            self.breaks -= 1
            return self.break_after


@contextlib.contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """Starts one, and ends it; whoever is held then is let go."""

    class Handler(_Handler):
        hub = HubStandIn("")

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub = Handler.hub
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.released.set()
            server.shutdown()
            thread.join()


def environment(hub: HubStandIn, folder: Path, **more: str) -> dict[str, str]:
    """That of a server whose hub this is, and whose cache in ``folder`` is empty."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder), "HF_HUB_CACHE": str(folder / "hub"), **more}


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the books are enough."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.note(f"{self.command} {unquote(path)}")
        found = _TREE.fullmatch(path) or _INFO.fullmatch(path) or _FILE.fullmatch(path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client was ended
            if self.hub.out_of_order:
                self._refuse(500, "", "out of order")
            elif found is None:
                self._refuse(404, "", f"no such path: {path}")
            else:
                self._answer_for(unquote(found["repo"]), unquote(found["revision"] or "main"), found)

    def _answer_for(self, repo: str, revision: str, found: re.Match[str]) -> None:
        files = self.hub.files(repo)
        if files is None:  # the real one does not tell strangers whether a private repository is there
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif revision not in ("main", self.hub.commit(repo)):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif found.re is _INFO:
            self._answer_json(self._info(repo, files))
        elif found.re is _TREE:
            self._answer_json([self._tree_entry(file) for file in files.values()])
        elif repo in self.hub.gated and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._refuse(401, "GatedRepo", f"Access to model {repo} is restricted.")
        elif (file := files.get(unquote(found["name"]))) is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._answer_file(file, self.hub.commit(repo))

    def _info(self, repo: str, files: dict[str, StoredFile]) -> dict[str, object]:
        siblings = []
        for file in files.values():
            sibling: dict[str, object] = {"rfilename": file.name, "size": self.hub.size_of(file)}
            sibling["blobId"] = file.blob_id
            if file.is_lfs:
                sibling["lfs"] = {"size": self.hub.size_of(file), "sha256": file.sha256, "pointerSize": 134}
            siblings.append(sibling)
        gated = "manual" if repo in self.hub.gated else False
        return {"id": repo, "sha": self.hub.commit(repo), "private": False, "gated": gated, "siblings": siblings}

    def _tree_entry(self, file: StoredFile) -> dict[str, object]:
        size = self.hub.size_of(file)
        entry: dict[str, object] = {"type": "file", "path": file.name, "size": size, "oid": file.blob_id}
        if file.is_lfs:
            entry["lfs"] = {"size": size, "oid": file.sha256, "pointerSize": 134}
        return entry

    def _answer_file(self, file: StoredFile, commit: str) -> None:
        content, status = self.hub.content_of(file), 200
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(self.hub.size_of(file))}
        if start is not None:
            first, last = int(start[1]), len(content) - 1
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first:], 206
        headers["Content-Length"] = str(len(content))
        self._begin(status, headers)
        if self.command == "GET":
            self._send(content)

    def _send(self, content: bytes) -> None:
        break_after, hold_after = self.hub.take_break(), self.hub.hold_after
        sent = 0
        while sent < len(content):
            if break_after is not None and sent >= break_after:
                self.close_connection = True
                return
            if hold_after is not None and sent >= hold_after:
                self.wfile.flush()
                self.hub.released.wait()
                hold_after = None
            limits = [limit for limit in (break_after, hold_after) if limit is not None]
            end = min([sent + _PIECE_BYTES, len(content), *limits])
            self.wfile.write(content[sent:end])
            self.hub.note_bytes(end - sent)
            sent = end

    def _answer_json(self, answer: object) -> None:
        content = json.dumps(answer).encode()
        self._begin(200, {"Content-Type": "application/json", "Content-Length": str(len(content))})
        if self.command == "GET":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str) -> None:
        content = json.dumps({"error": message}).encode()
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": str(len(content))}
        self._begin(status, {key: value for key, value in headers.items() if value})
        if self.command == "GET":
            self.wfile.write(content)

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
