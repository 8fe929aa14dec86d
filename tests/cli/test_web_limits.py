"""Limits of the page in the browser: who may ask for it, and how much may be sent to it."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from negtome_fast import cli, generation
from negtome_fast.cli.web import gate, page, upload_folder, uploads
from negtome_fast.cli.web.gate import MOST_BODY, MOST_UPLOAD, Gate, HostNames
from negtome_fast.cli.web.session import WebSession
from negtome_fast.cli.web.upload_folder import UploadFolder

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="the extra 'web' is not installed"
)
LOOPBACK = {"localhost": True, "LOCALHOST": True, "127.0.0.1": True, "127.9.9.9": True}
LOOPBACK |= {"::1": True, "localhost.": True}
OTHERS = ("", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "2130706433")


@pytest.mark.parametrize(
    ("host", "more", "admitted"),
    [
        ("127.0.0.1", (), {**LOOPBACK, "192.168.1.5": False, "page.example": False}),
        ("localhost", ("Page.Example",), {**LOOPBACK, "page.example": True, "10.0.0.1": False}),
        ("0.0.0.0", (), {**LOOPBACK, "192.168.1.5": True, "fe80::1": True, "page.example": False}),
        ("machine", (), {**LOOPBACK, "machine": True, "192.168.1.5": True, "page.example": False}),
    ],
)
def test_names_that_are_answered(
    host: str, more: tuple[str, ...], admitted: dict[str, bool]
) -> None:
    names = HostNames(host, more)
    assert {name: names.admit(name) for name in admitted} == admitted
    assert not any(names.admit(name) for name in OTHERS)


def exchange(
    asked: Gate, path: str = "/", method: str = "GET", client: str = "1.2.3.4", **headers: str
) -> tuple[int, bytes]:
    """Status and body of a request; names of headers are written with _ for -."""
    told: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        told.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    given = {"host": "localhost:7860", **headers}
    pairs = [(k.replace("_", "-").encode(), v.encode()) for k, v in given.items() if v]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs}
    asyncio.run(asked({**scope, "client": (client, 1)}, receive, send))
    return told[0]["status"], b"".join(one.get("body", b"") for one in told)


async def answering(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"behind the gate"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadFolder]:
    monkeypatch.setenv(upload_folder.VARIABLE, str(tmp_path))
    made = UploadFolder()
    yield made
    made.remove()


POST = {"method": "POST", "content_length": "10"}
REQUESTS: dict[str, tuple[dict[str, str], int]] = {
    "a page": ({}, 200),
    "an IPv6 host": ({"host": "[::1]:7860"}, 200),
    "its own script": ({"origin": "http://127.0.0.1:7860"}, 200),
    "a request": ({"path": "/gradio_api/queue/join", **POST}, 200),
    "a rebound name": ({"host": "evil.example:7860"}, 421),
    "a name that begins as ours": ({"host": "localhost.evil.example"}, 421),
    "a user in the host": ({"host": "localhost@evil.example"}, 421),
    "a broken host": ({"host": "[::1"}, 421),
    "no host": ({"host": ""}, 421),
    "another site's script": ({"origin": "http://evil.example"}, 403),
    "a script of a file": ({"origin": "null"}, 403),
    "another site's preflight": (
        {"method": "OPTIONS", "origin": "http://evil.example"}
        | {"access_control_request_method": "POST"},
        403,
    ),
    "another site's form": ({"origin": "https://evil.example", **POST}, 403),
    "no length": ({"method": "POST"}, 411),
    "a length that is none": ({"method": "POST", "content_length": "-1"}, 411),
    "an unknown length": ({**POST, "transfer_encoding": "chunked"}, 411),
    "a long prompt": ({"method": "POST", "content_length": str(MOST_BODY + 1)}, 413),
    "a number of digits": ({"method": "POST", "content_length": "1" * 5000}, 413),
    "a large upload": (
        {"path": "/gradio_api/upload", "method": "POST", "content_length": str(MOST_UPLOAD + 1)},
        413,
    ),
    "a large layer": (
        {"path": "/gradio_api/component_server/", "method": "POST", "content_length": "99999999"},
        413,
    ),
    "a file of another server": ({"path": "/gradio_api/file=http://10.0.0.1/x"}, 404),
    "a recording": ({"path": "/gradio_api/process_recording", **POST}, 404),
}  # fmt: skip


@pytest.mark.parametrize(("request_", "status"), REQUESTS.values(), ids=REQUESTS.keys())
def test_the_gate_answers_this_machine_alone_and_reads_little(
    request_: dict[str, str], status: int, folder: UploadFolder
) -> None:
    found, body = exchange(Gate(answering, HostNames("127.0.0.1"), folder), **request_)
    assert found == status
    assert (body == b"behind the gate") == (status == 200)
    assert b"evil" not in body


def test_uploads_have_a_quota_and_go_with_the_last_page_of_their_client(
    folder: UploadFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_folder, "MOST_FILES", 3)
    monkeypatch.setattr(upload_folder, "MOST_UPLOADED", 50)
    foreign = folder.path.parent / "foreign.png"
    foreign.write_bytes(b"not an upload")

    def upload(name: str, size: int, client: str = "a") -> None:
        path = folder.path / name

        async def storing(scope: Any, receive: Any, send: Any) -> None:
            path.write_bytes(b"x" * size)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            answer = json.dumps([str(path), str(foreign), 5]).encode()
            await send({"type": "http.response.body", "body": answer})

        asked = Gate(storing, HostNames("localhost"), folder)
        length = {"content_length": str(size)}
        assert exchange(asked, "/gradio_api/upload", "POST", client, **length)[0] == 200

    def kept() -> list[str]:
        return sorted(path.name for path in folder.path.iterdir())

    for number in range(5):
        upload(f"{number}.png", 10)
    assert kept() == ["2.png", "3.png", "4.png"], "the newest three"
    upload("5.png", 45, "b")
    assert kept() == ["5.png"], "fifty bytes"
    upload("6.png", 5, "a")
    asked = Gate(answering, HostNames("localhost"), folder)
    assert exchange(asked, "/gradio_api/heartbeat/session", client="a")[0] == 200
    assert kept() == ["5.png"], "the client b still has its page"
    (folder.path / "drawn.png").write_bytes(b"x" * 10)
    monkeypatch.setattr(upload_folder, "MOST_STORED", 15)
    folder.trim()
    assert kept() == ["drawn.png"], "the newest file of all"
    folder.remove()
    assert not folder.path.exists() and foreign.is_file()


def test_a_client_with_two_pages_keeps_its_uploads_until_both_are_closed(
    folder: UploadFolder,
) -> None:
    path = folder.path / "a.png"
    path.write_bytes(b"x")
    folder.keep("a", [str(path)])

    async def open_pages() -> None:
        ends = [asyncio.Event(), asyncio.Event()]

        async def staying(scope: Any, receive: Any, send: Any) -> None:
            await ends[int(scope["path"][-1])].wait()

        asked = Gate(staying, HostNames("localhost"), folder)
        headers = [(b"host", b"localhost")]
        pages = [
            asyncio.create_task(
                asked(
                    {"type": "http", "method": "GET", "path": f"/gradio_api/heartbeat/{number}"}
                    | {"headers": headers, "client": ("a", 1)},
                    lambda: None,  # type: ignore[arg-type, return-value]
                    lambda message: None,  # type: ignore[arg-type, return-value]
                )
            )
            for number in range(2)
        ]
        for number in range(2):
            await asyncio.sleep(0)
            assert path.is_file()
            ends[number].set()
            await pages[number]
        assert not path.exists()

    asyncio.run(open_pages())


def picture(width: int, height: int = 1) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


class Editor:
    """The parts of gradio's editor that are replaced."""

    def __init__(self) -> None:
        self.blob_storage: dict[str, Any] = {}
        self.decoded: list[Any] = []

    def preprocess(self, payload: Any) -> Any:
        self.decoded.append(payload)
        return payload

    def accept_blobs(self, data: Any) -> None:
        self.blob_storage[data.data["id"]] = data.files[0][1]


FakeGradio = SimpleNamespace(Error=lambda text, **_: ValueError(text))


def sent(*layers: bytes, background: bytes | None = None, identity: str | None = None) -> Any:
    parts: dict[str, Any] = {"background": background, "layers": list(layers)}
    return SimpleNamespace(**parts, composite=picture(2), id=identity)


LARGE = picture(5000, 5000)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (sent(*[picture(2)] * 2, background=picture(2)), "2 layers of paint; 1 is allowed"),
        (sent(*[picture(2)] * 5000), "5000 layers of paint"),
        (sent(background=LARGE), "5000 x 5000 pixels; 16 million are allowed"),
        (sent(LARGE, background=picture(2)), "5000 x 5000 pixels"),
        (sent(background=b"text"), "not a readable picture"),
    ],
    ids=["two layers", "many layers", "a large picture", "a large layer", "no picture"],
)
def test_a_request_is_refused_before_its_pictures_are_decoded(payload: Any, words: str) -> None:
    editor = Editor()
    with pytest.raises(ValueError, match=words):
        uploads.checked_reading(FakeGradio, editor)(payload)
    editor.blob_storage["a"], asked = payload, SimpleNamespace(id="a")
    with pytest.raises(ValueError, match=words):
        uploads.checked_reading(FakeGradio, editor)(asked)
    assert not editor.decoded


def test_a_picture_and_a_layer_are_read_and_the_composite_is_not(tmp_path: Path) -> None:
    editor = Editor()
    payload = sent(picture(3), None, background=picture(2))  # type: ignore[arg-type]
    read = uploads.checked_reading(FakeGradio, editor)(payload)
    assert read.composite is None and read.layers == [picture(3)]
    gone = sent(background=SimpleNamespace(path=str(tmp_path / "none.png")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="upload it again"):
        uploads.checked_reading(FakeGradio, editor)(gone)


def test_what_waits_in_memory_is_bounded() -> None:
    editor = Editor()
    accept = uploads.checked_receiving(editor)

    def send(content: bytes, kind: str = "background", index: str = "0", name: str = "a") -> None:
        data = {"type": kind, "index": index, "id": name}
        accept(SimpleNamespace(data=data, files=[("blob", content)]))

    for number in range(100):
        send(picture(2), name=str(number))
    assert len(editor.blob_storage) == uploads.MOST_WAITING
    assert list(editor.blob_storage)[-1] == "99"
    before = dict(editor.blob_storage)
    send(picture(2), "composite", name="new")
    for content, kind, index in (
        (picture(2), "layer", "1"),
        (picture(2), "layer", "99999999999"),
        (LARGE, "layer", "0"),
        (b"text", "background", "null"),
    ):
        with pytest.raises(ValueError):
            send(content, kind, index, "new")
    assert editor.blob_storage == before


def test_addresses_are_not_fetched() -> None:
    assert asyncio.run(uploads.local_only("/tmp/a.png")) == "/tmp/a.png"
    with pytest.raises(ValueError, match="addresses are not fetched"):
        asyncio.run(uploads.local_only("https://example.org/a.png"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(settings: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(generation, "load_pipeline", loaded)
    monkeypatch.setattr(page, "load_gradio", lambda: None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "99999"], "--port must be 1 to 65535, or 0 for a free one, got 99999"),
        (["--port", "-1"], "--port must be 1 to 65535"),
        (["--port", str(10**30)], "--port must be 1 to 65535"),
        (["--host", "no.such.host.invalid"], "cannot be opened at no.such.host.invalid"),
        (["--host", "a" * 70], "cannot be opened at"),
        (["--host", "203.0.113.7"], "cannot be opened at 203.0.113.7"),
        (["--allow-host", "http://a.example"], "--allow-host 'http://a.example' is not a name"),
        (["--allow-host", "*"], "--allow-host '*' is not a name"),
        (["--allow-host", "a:80"], "--allow-host 'a:80' is not a name"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("no_model")
def test_a_bad_address_is_one_line_before_a_model_is_loaded(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["web", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.usefixtures("no_model")
def test_a_busy_port_is_one_line_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert cli.main(["web", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"port {port}, which is taken" in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------
# The page of gradio itself
# ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def opened() -> Iterator[tuple[Any, int]]:
    served, address = page.serve(port=0, wait=False, pipe=WebSession().pipe)
    yield served, int(address.rstrip("/").rsplit(":", 1)[1])
    served.close()


def answer(
    port: int, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, given)
    found = connection.getresponse()
    return found.status, dict(found.getheaders()), found.read()


def form(name: str, content: bytes, fields: dict[str, str] | None = None) -> tuple[bytes, str]:
    parts = [
        f'--B\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
        for key, value in (fields or {}).items()
    ]
    head = f'--B\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return b"".join(
        [*parts, head.encode(), content, b"\r\n--B--\r\n"]
    ), "multipart/form-data; boundary=B"


@needs_gradio
def test_the_page_is_behind_the_gate(opened: tuple[Any, int]) -> None:
    _, port = opened
    assert answer(port, "/config")[0] == 200
    for path in ("/", "/config", "/gradio_api/info", "/gradio_api/queue/join"):
        for headers in (
            {"Host": "evil.example"},
            {"Origin": "http://evil.example"},
            {"Host": "evil.example", "Origin": "http://evil.example"},
        ):
            for method in ("GET", "OPTIONS"):
                asked = {**headers, "Access_Control_Request_Method": "POST"}
                status, got, body = answer(port, path, method, **asked)
                assert status in (403, 421) and b"evil" not in body
                assert not any("evil" in value for value in got.values())


@needs_gradio
def test_no_file_of_the_machine_is_served(opened: tuple[Any, int], tmp_path: Path) -> None:
    served, port = opened
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    folder = Path(served.app.uploaded_file_dir)
    neighbour = folder.parent / "negtome-test-neighbour.txt"
    neighbour.write_text("another program's file of gradio")
    try:
        steps = os.path.relpath(secret, folder)
        for path in (secret, f"{folder}/{steps}", f"../..{secret}", "/etc/passwd", neighbour):
            for route in ("/gradio_api/file=", "/gradio_api/file/", "/static/", "/assets/"):
                assert answer(port, f"{route}{path}")[0] in (400, 403, 404, 405)
    finally:
        neighbour.unlink()


@needs_gradio
def test_uploads_are_private_and_bounded(opened: tuple[Any, int]) -> None:
    served, port = opened
    folder = Path(served.app.uploaded_file_dir)
    assert folder.stat().st_mode & 0o077 == 0
    body, kind = form("../../a.png", picture(8, 8))
    status, _, got = answer(port, "/gradio_api/upload", "POST", body, Content_Type=kind)
    (path,) = json.loads(got)
    assert status == 200 and Path(path).is_relative_to(folder) and Path(path).is_file()
    body, kind = form("a.png", b"x" * (uploads.MOST_BYTES + 2**17))
    assert answer(port, "/gradio_api/upload", "POST", body, Content_Type=kind)[0] == 413
    # Layers that the editor would keep for good.
    editor = next(
        block for block in served.blocks.values() if block.get_block_name() == "imageeditor"
    )
    fields = {"type": "layer", "index": "99999999", "id": "x", "component_id": str(editor._id)}
    fields |= {"fn_name": "accept_blobs", "session_hash": "s"}
    body, kind = form("blob", picture(2), {**fields, "data": "x"})
    status = answer(port, "/gradio_api/component_server", "POST", body, Content_Type=kind)[0]
    assert status >= 400 and not editor.blob_storage


@needs_gradio
def test_requests_cannot_pass_the_queue(opened: tuple[Any, int]) -> None:
    _, port = opened
    data = ["a pixel art person", "others", None, 2, 0, 2.5, 2, 0.5, 0.65, 1000, 0, "paper"]
    body = json.dumps({"data": data}).encode()
    for route in ("run", "api"):
        found = answer(
            port, f"/gradio_api/{route}/generate", "POST", body, Content_Type="application/json"
        )
        assert found[0] == 404


@needs_gradio
def test_the_folder_goes_when_the_page_stops() -> None:
    before = os.environ.get(upload_folder.VARIABLE)
    served, _ = page.serve(port=0, wait=False, pipe=WebSession().pipe)
    folder = Path(served.app.uploaded_file_dir)
    assert folder.is_dir() and os.environ.get(upload_folder.VARIABLE) == before
    served.close(verbose=False)
    assert not folder.exists()


def test_limits_fit_each_other() -> None:
    assert gate.MOST_UPLOAD > uploads.MOST_BYTES
    assert upload_folder.MOST_UPLOADED >= uploads.MOST_WAITING * uploads.MOST_BYTES
