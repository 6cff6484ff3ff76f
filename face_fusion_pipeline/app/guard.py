"""Requests before the page sees them: from whom they may come, and how much they may bring."""

from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .session import Sessions


MAX_FORM = 4 * 2**20  # bytes of a request that is no upload: a form with a small picture behind the boxes
SMALLEST = 4096  # bytes that a file takes on a disk
HEARTBEAT = "/heartbeat/"  # Gradio's: open as long as the page is


def is_loopback(host: str) -> bool:
    """Whether an address, or a name for it, is of this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def size_of(folder: Path) -> int:
    """Bytes that the files in a folder take; others may be removing some."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += max(path.lstat().st_size, SMALLEST)
        except OSError:
            continue
    return total


class Guard:
    """ASGI middleware around the app.

    A page of another site must not use this one through the browser of somebody here: neither by its own address
    (Origin), nor by a name of its own that it lets lead to this machine (Host).

    Args:
        sessions: hear which pages are open; their folder is what the quota counts.
        host: address that the app listens on. If it is of this machine alone, requests must name it so, too.
        quota: bytes that the files of all users may take together.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions, host: str, quota: int) -> None:
        self.app, self.sessions, self.quota = app, sessions, quota
        self.local = is_loopback(host)
        self._arriving = 0  # bytes of the uploads that are under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the page uses no websockets
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"].rstrip("/")
        length = int(headers.get("content-length", "0"))  # the server has refused what is no number
        uploads = path.endswith("/upload")
        refusal = self._stranger(headers) or self._excess(headers, length, uploads)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        name = path.rpartition("/")[2] if HEARTBEAT in path else None
        if name is not None:
            self.sessions.connect(name)
        self._arriving += length * uploads
        try:
            await self.app(scope, receive, send)
        finally:
            self._arriving -= length * uploads
            if name is not None:
                self.sessions.disconnect(name)

    def _stranger(self, headers: Headers) -> PlainTextResponse | None:
        """The answer to a request that a page of somebody else may have made, or None."""
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name, page = urlsplit(f"//{host}").hostname, None if origin is None else urlsplit(origin).netloc
        except ValueError:  # brackets that do not match
            return PlainTextResponse("This address cannot be read.", 400)
        if self.local and not is_loopback(name or ""):
            return PlainTextResponse("This page is for its own machine: open it as 127.0.0.1 or localhost.", 403)
        if page is not None and page.lower() != host.lower():
            return PlainTextResponse("Pages of other sites may not use this one.", 403)
        return None

    def _excess(self, headers: Headers, length: int, uploads: bool) -> PlainTextResponse | None:
        """The answer to a request that brings too much, or None."""
        if "transfer-encoding" in headers:
            return PlainTextResponse("A request must say its length.", 411)
        if not uploads:
            return PlainTextResponse("This is more than a form holds.", 413) if length > MAX_FORM else None
        if length + self._arriving + size_of(self.sessions.root) > self.quota:
            words = "the files of all pages take too much room: close pages that are not needed, or wait two hours"
            return PlainTextResponse(words, 507)
        return None
