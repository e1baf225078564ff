"""A package that comes over HTTP and is cut off or changed on its way: nothing bad is kept, the rest is fetched."""

import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_store import contents, make_package

from hf_fedlarge import remote
from hf_fedlarge import store as module
from hf_fedlarge.artifacts import PackageManifest, read_manifest
from hf_fedlarge.errors import ArtifactError, StoreError
from hf_fedlarge.store import Store


class Handler(BaseHTTPRequestHandler):
    """Gives parts of files, and cuts the line where it is told to."""

    def do_HEAD(self):
        content = self.server.files.get(self.path.lstrip("/"))
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()

    def do_GET(self):
        self.server.silent.wait(30)
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
        part = content[int(first) : int(last) + 1]
        self.server.asked.append((self.path.rpartition("/")[2], int(first), len(part)))
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.end_headers()
        if len(self.server.asked) == self.server.cut_at:
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            # With nothing to wait for, closing sends a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        self.wfile.write(self.server.change(part))

    def log_message(self, *_):
        pass


@pytest.fixture
def line(tmp_path):
    """A package on an HTTP server of this machine: its store, the package, and the server."""
    pytest.importorskip("aiohttp", reason="needs aiohttp, which the extra dev brings with s3fs")
    package = make_package(tmp_path / "package")
    local = Store(str(tmp_path / "store"))
    local.put(package)
    root = tmp_path / "store"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    server.asked, server.cut_at, server.change = [], None, lambda part: part
    server.silent = threading.Event()
    server.silent.set()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield Store(f"http://127.0.0.1:{server.server_port}"), package, server
    server.shutdown()
    thread.join()
    server.server_close()


def get(line, cache):
    store, package, _ = line
    digest = read_manifest(package, PackageManifest).digest
    return store.get(digest, cache / digest, PackageManifest)


@pytest.mark.parametrize("cut_at", [1, 2, 3, 4, 5, 6])
def test_a_connection_that_is_cut_costs_one_part_and_the_rest_is_fetched(line, tmp_path, monkeypatch, cut_at):
    """The parts are the manifest, the small file, and four of the large one."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 300)
    _, package, server = line
    server.cut_at, cache = cut_at, tmp_path / "cache"
    with pytest.raises(StoreError, match=r"failed \(cat_file: .*check the network"):
        get(line, cache)
    assert not [path for path in cache.glob("*") if not path.name.startswith(".")]
    whole = server.asked[: cut_at - 1]
    server.cut_at, server.asked = None, []
    get(line, cache)
    assert contents(cache / read_manifest(package, PackageManifest).digest) == contents(package)
    assert not set(whole[1:]) & set(server.asked)  # nothing but the manifest is fetched twice
    assert len(whole) + len(server.asked) == 6 + (cut_at > 1)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (lambda part: part[:-1] + bytes([part[-1] ^ 1]), ArtifactError, "has the SHA-256|is not JSON|is of kind"),
        (lambda part: part[:-1], StoreError, r"failed \(cat_file"),
    ],
    ids=["one bit flipped on the way", "an answer shorter than it says"],
)
def test_what_was_changed_on_the_way_is_not_kept(line, tmp_path, change, error, sentence):
    server = line[2]
    server.change = lambda part: part if part.startswith(b"{\n") else change(part)
    for _ in range(2):
        with pytest.raises(error, match=sentence):
            get(line, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").glob("*") if not path.name.startswith(".")]
    server.change = lambda part: part
    get(line, tmp_path / "cache")


def test_a_server_that_gives_whole_files_for_parts_is_refused(line, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 300)
    server = line[2]
    model = next(content for content in server.files.values() if len(content) == 1000)
    monkeypatch.setattr(Handler, "send_header", lambda self, name, value: super(Handler, self).send_header(
        name, "1000" if self.command == "GET" and name == "Content-Length" and value == "300" else value
    ))  # fmt: skip
    server.change = lambda part: model if len(part) == 300 else part
    with pytest.raises(StoreError, match="gave 1000 bytes from 0; expected 300"):
        get(line, tmp_path / "cache")


def test_a_server_that_does_not_answer_is_not_waited_for(line, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.5)
    server = line[2]
    server.silent.clear()
    with pytest.raises(StoreError, match=r"http://127.0.0.1:\d+ did not answer within 0.5 s \(cat_file\)"):
        get(line, tmp_path / "cache")
    server.silent.set()
    get(line, tmp_path / "cache")
