"""The gate before the page: names and origins that it answers, and how much it reads.

It wraps gradio's whole application, so nothing behind it sees a request that is refused. A page of
another site that is open in the same browser can neither read this page by a name that it makes
point here (DNS rebinding), nor have it work.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from .upload_folder import UploadFolder
from .uploads import MOST_BYTES

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_UPLOAD = MOST_BYTES + 2**16
"""Largest body of an upload: a picture and the form around it."""
MOST_BODY = 2**20
"""Largest body of any other request: numbers and a prompt."""
MOST_UPLOADS_AT_ONCE = 4
MOST_THROWN = 4 * MOST_UPLOAD
"""Bytes of a refused request that are read before the answer."""

_API = "/gradio_api/"
_UPLOADS = ("upload", "component_server")
_CLOSED = ("process_recording", "proxy=", "file=http", "file/http", "deep_link", "run-history")
"""Beginnings of gradio's routes that the page does not use; they store or fetch without a limit."""


class HostNames:
    """Names under which the page may be asked for.

    Args:
        host: address that the page listens at. If it is this machine's alone, its names are the
            allowed ones. Else all addresses in figures are allowed, too, since no other site can
            have those, and `host` itself.
        more: further names.

    Raises:
        ValueError: a name is not one.
    """

    def __init__(self, host: str, more: Sequence[str] = ()) -> None:
        for name in more:
            if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name.lower()):
                raise ValueError(
                    f"`allow_host` {name!r} is not a name such as page.example.org, without "
                    "http:// and port"
                )
        self._figures = not is_loopback(host)
        self._names = {host.lower(), *(name.lower() for name in more)}

    def admit(self, name: str) -> bool:
        """Return True if requests for this name are answered."""
        name = name.lower().rstrip(".")
        if is_loopback(name) or name in self._names:
            return True
        return self._figures and _address(name) is not None


def is_loopback(name: str) -> bool:
    """Return True for a name or address that reaches the machine itself alone."""
    address = _address(name)
    return name == "localhost" if address is None else address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None


def host_in(text: str) -> str:
    """Return the name in a Host header or an origin; "" if there is none."""
    try:
        return urlsplit(text if "//" in text else f"//{text}").hostname or ""
    except ValueError:
        return ""


class Gate:
    """The application behind the gate.

    Args:
        app: gradio's application.
        names: hosts and origins that are answered.
        folder: told of every upload, and of pages that close.
    """

    def __init__(self, app: Application, names: HostNames, folder: UploadFolder) -> None:
        self._app, self._names, self._folder = app, names, folder
        self._uploading = 0
        self._open: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(_API)
        uploads = path.split("/")[0] in _UPLOADS and scope.get("method") == "POST"
        refusal = self._refusal(scope, path, uploads)
        if refusal is not None:
            await _refuse(scope, receive, send, *refusal)
        elif uploads:
            await self._upload(scope, receive, send)
        elif path.startswith("heartbeat/"):
            await self._heartbeat(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, path: str, uploads: bool) -> tuple[int, str] | None:
        """Return status and text of a refusal; None if the request is passed on."""
        found: dict[str, list[str]] = {}
        for key, value in scope["headers"]:
            found.setdefault(key.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts = found.get("host", [""])
        if len(hosts) > 1 or not self._names.admit(host_in(hosts[0])):
            return 421, "this page is not for that host name; --allow-host NAME allows one"
        if not all(self._names.admit(host_in(origin)) for origin in found.get("origin", [])):
            return 403, "pages of other sites may not use this one"
        if path.startswith(_CLOSED):
            return 404, "not found"
        if scope.get("method") in ("GET", "HEAD", "OPTIONS"):
            return None
        length = found.get("content-length", [""])[0]
        if not length.isdecimal() or "transfer-encoding" in found:
            return 411, "the request must say its length"
        most = MOST_UPLOAD if uploads else MOST_BODY
        if len(length) > 12 or int(length) > most:
            return 413, f"the request has more than {most} bytes"
        if uploads and self._uploading >= MOST_UPLOADS_AT_ONCE:
            return 503, "too many uploads at once; try again"
        return None

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an upload on, and tell the folder which files it left."""
        answer: list[bytes] = []

        async def heard(message: MutableMapping[str, Any]) -> None:
            answer.append(message.get("body", b""))
            await send(message)

        self._uploading += 1
        try:
            await self._app({**scope, "headers": _uncompressed(scope)}, receive, heard)
        finally:
            self._uploading -= 1
            self._folder.keep(_client(scope), _paths(b"".join(answer)))

    async def _heartbeat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An open page holds this request; with its last page, the uploads of a client go."""
        client = _client(scope)
        self._open[client] = self._open.get(client, 0) + 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]
                self._folder.forget(client)


def _client(scope: Scope) -> str:
    return (scope.get("client") or ("", 0))[0]


def _uncompressed(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Return the headers without the one that asks for a compressed answer, which is read here."""
    return [pair for pair in scope["headers"] if pair[0].lower() != b"accept-encoding"]


def _paths(answer: bytes) -> list[str]:
    """Return the paths of an answer to an upload; none if it is another answer."""
    try:
        found = json.loads(answer)
    except ValueError:
        return []
    return [path for path in found if isinstance(path, str)] if isinstance(found, list) else []


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    # Clients read the answer only after they have sent their body, so some of it is thrown away.
    thrown, more = 0, True
    while more and thrown < MOST_THROWN:
        message = await receive()
        thrown += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = text.encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    # What is left of the body would be taken for the next request.
    headers += [(b"connection", b"close")] if more else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
