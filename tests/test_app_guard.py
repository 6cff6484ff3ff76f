"""Requests to the web app: whom it answers, and how much it takes. The middleware alone, then the served page."""

import asyncio
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_app import make_engine

from face_fusion_pipeline.app.session import Sessions


pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")

from face_fusion_pipeline.app.guard import MAX_FORM, Guard, is_loopback, size_of  # noqa: E402


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    sessions = Sessions()
    yield sessions
    sessions.close()


def ask(guard: Guard, path: str = "/", **headers: str) -> int:
    """The status of the answer; 200 where the app was asked."""
    sent: list[Any] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()],
    }

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"]


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


HOSTS = {
    "127.0.0.1:7860": 200,
    "localhost:8000": 200,
    "LOCALHOST": 200,
    "[::1]:7860": 200,
    "127.1.2.3": 200,
    "evil.example:7860": 403,
    "localhost.evil.example": 403,
    "127.0.0.1.evil.example": 403,
    "192.168.0.7:7860": 403,
    "": 403,
    "[::1": 400,
}


@pytest.mark.parametrize("host", HOSTS)
def test_a_page_for_this_machine_answers_to_its_names_only(host: str, sessions: Sessions) -> None:
    guard = Guard(app, sessions, "127.0.0.1", 10**9)
    assert ask(guard, host=host) == HOSTS[host]
    assert ask(Guard(app, sessions, "localhost", 10**9), host=host) == HOSTS[host]
    assert ask(guard) == 403  # without one
    open_to_all = Guard(app, sessions, "0.0.0.0", 10**9)  # whose names nobody knows
    assert ask(open_to_all, host=host) == (400 if host == "[::1" else 200)


@pytest.mark.parametrize("listening", ["127.0.0.1", "0.0.0.0"])
def test_pages_of_other_origins_are_refused(listening: str, sessions: Sessions) -> None:
    guard = Guard(app, sessions, listening, 10**9)
    assert ask(guard, host="localhost:7860", origin="http://localhost:7860") == 200
    for origin in ("http://evil.example", "null", "http://localhost:3000", "http://127.0.0.1:7860", "", "http://[::1"):
        assert ask(guard, host="localhost:7860", origin=origin) in (400, 403), origin


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LocalHost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.")))


def test_forms_and_uploads_have_limits(sessions: Sessions) -> None:
    here = {"host": "localhost"}
    (sessions.uploads / "x").mkdir(parents=True)
    (sessions.uploads / "x" / "photo.png").write_bytes(bytes(600_000))
    guard = Guard(app, sessions, "127.0.0.1", 1_000_000)
    assert ask(guard, "/gradio_api/queue/join", content_length=str(MAX_FORM), **here) == 200
    assert ask(guard, "/gradio_api/queue/join", content_length=str(MAX_FORM + 1), **here) == 413
    assert ask(guard, "/gradio_api/upload", content_length="300000", **here) == 200
    assert ask(guard, "/gradio_api/upload", content_length="500000", **here) == 507
    assert ask(guard, "/gradio_api/upload/", content_length="500000", **here) == 507
    assert ask(guard, "/gradio_api/upload", transfer_encoding="chunked", **here) == 411
    answers = []

    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        if not answers:  # while this one is under way another one comes
            answers.append(await asyncio.to_thread(ask, guard, "/gradio_api/upload", content_length="300000", **here))
        await app(scope, receive, send)

    guard.app = waiting
    assert ask(guard, "/gradio_api/upload", content_length="300000", **here) == 200 and answers == [507]
    assert ask(guard, "/gradio_api/upload", content_length="300000", **here) == 200  # it has ended


def test_many_small_files_count(tmp_path: Path) -> None:
    for index in range(10):
        (tmp_path / str(index)).touch()
    assert size_of(tmp_path) == 10 * 4096


def test_a_heartbeat_keeps_a_session(sessions: Sessions) -> None:
    connected = []

    async def beating(scope: Any, receive: Any, send: Any) -> None:
        connected.append(dict(sessions._connected))
        await app(scope, receive, send)
        if scope["path"].endswith("bob"):
            raise ConnectionError

    guard = Guard(beating, sessions, "127.0.0.1", 10**9)
    assert ask(guard, "/gradio_api/heartbeat/ada", host="localhost") == 200
    with pytest.raises(ConnectionError):
        ask(guard, "/gradio_api/heartbeat/bob", host="localhost")
    assert connected == [{"ada": 1}, {"bob": 1}] and not sessions._connected


def test_the_served_page_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    from face_fusion_pipeline.app import server

    monkeypatch.setattr(server, "QUOTA", 2)
    with server.serving(make_engine(), port=0, max_upload_mb=1) as address:
        port = int(address.rstrip("/").rpartition(":")[2])

        def status(method: str, path: str, body: bytes = b"", **headers: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body or None, given)
            return connection.getresponse().status

        assert status("GET", "/") == 200
        assert status("GET", "/", Host="evil.example") == 403
        assert status("GET", "/config", Origin="http://evil.example") == 403
        join = {"Content_Type": "application/json"}
        assert status("POST", "/gradio_api/queue/join", b"{}", Origin="http://evil.example", **join) == 403
        assert status("POST", "/gradio_api/queue/join", b" " * (MAX_FORM + 1), **join) == 413
        multipart = {"Content_Type": "multipart/form-data; boundary=edge"}
        head = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        sent = [
            status("POST", "/gradio_api/upload", head + bytes([fill]) * 900_000 + b"\r\n--edge--\r\n", **multipart)
            for fill in range(4)
        ]
        assert sent[0] == 200 and sent[-1] == 507
        heartbeat = socket.create_connection(("127.0.0.1", port), timeout=60)
        heartbeat.sendall(b"GET /gradio_api/heartbeat/ada HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" in heartbeat.recv(1000)
        heartbeat.close()
