"""What belongs to one user, apart from all others, in a temporary folder that goes with the app."""

import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .engine import CancelledError, Picture
from .form import FieldError


MAX_SESSIONS = 32  # open pages: each may hold pictures and identities in memory
IDLE = 600  # seconds after which a session ends whose page is not connected
HALF_AN_UPLOAD = 3600  # seconds after which a file that nobody finished sending is removed
PREFIX = "face_fusion_app_"


class Folder:
    """A folder that stays removed once it was, whoever was about to write into it. Its name cannot be guessed."""

    def __init__(self, parent: Path, prefix: str) -> None:
        self.path = parent / f"{prefix}{secrets.token_hex(16)}"
        self.path.mkdir(mode=0o700, parents=True)
        self._lock = threading.Lock()

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Nobody else writes into it or removes it meanwhile. Raises [`CancelledError`]: it was removed."""
        with self._lock:
            if not self.path.is_dir():
                raise CancelledError
            yield self.path

    def remove(self) -> None:
        """Remove it with all that is in it, after who is writing."""
        with self._lock:
            shutil.rmtree(self.path, ignore_errors=True)


@dataclass
class Run:
    """One press of “Generate”: where its files go, the event that stops it, and what there is so far.

    Attributes:
        id: tells it from the other runs of the page.
        references: label -> face crops, the first columns of the contact sheet.
        results: finished pictures, each with its file.
    """

    folder: Folder
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    cancelled: threading.Event = field(default_factory=threading.Event)
    references: dict[str, Sequence[Any]] = field(default_factory=dict)
    results: list[tuple[Picture, Path]] = field(default_factory=list)
    _unbegun: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> bool:
        """Whether it is to be made now: not cancelled while it waited for its turn, and not begun before."""
        return not self.cancelled.is_set() and self._unbegun.acquire(blocking=False)

    @property
    def begun(self) -> bool:
        """Whether somebody has begun to make it: what goes wrong then is shown by who makes it."""
        return self._unbegun.locked()

    def add(self, picture: Picture, save: Callable[[Picture, Path, int], Path]) -> None:
        """Save a picture as `save(picture, folder, index)`, and note it.

        Raises [`CancelledError`], and saves nothing, if the run was cancelled.
        """
        with self.folder.writing() as folder:
            if self.cancelled.is_set():
                raise CancelledError
            self.results.append((picture, save(picture, folder, len(self.results))))

    def discard(self) -> None:
        """Stop it, and remove its files."""
        self.cancelled.set()
        self.folder.remove()


@dataclass
class Session:
    """One open page.

    Attributes:
        folder: for results and identity files; removed when the page is closed.
        identities: person's number -> identity loaded from a file.
        layout: picture behind the boxes, RGB, or None.
        style: picture whose style is taken, RGB, or None.
        driver: `FaceFit` of the face whose pose is taken, or None.
        run: the last one, or None.
        failure_due: Gradio is still to say that a run failed which was cancelled.
        seen: when it was last asked for, in seconds of `time.monotonic`.
    """

    folder: Folder
    identities: dict[int, Any] = field(default_factory=dict)
    layout: Any = None
    style: Any = None
    driver: Any = None
    run: Run | None = None
    failure_due: bool = False
    seen: float = field(default_factory=time.monotonic)

    def new_run(self) -> Run:
        """Stop the run before, and begin one with an empty folder; files of the one before that stay until then."""
        if self.run is not None:
            self.run.discard()
        self.run = Run(Folder(self.folder.path, "run_"))
        return self.run

    def cancel(self) -> Run | None:
        """Stop the run that there is, at its next step; what it has made stays."""
        if self.run is not None:
            self.run.cancelled.set()
            self.failure_due = True
        return self.run

    def failed_run(self, name: str) -> Run | None:
        """The run that Gradio says failed as `name`; None if it means one that was cancelled.

        Of that one it says so once, by the id that the page has at that time, which may be that of the next.
        """
        due, self.failure_due = self.failure_due, False
        return None if due or self.run is None or self.run.id != name else self.run

    def close(self) -> None:
        """Stop what is running, and remove all files."""
        if self.run is not None:
            self.run.discard()
        self.folder.remove()


def _lock_of(root: Path) -> FileLock:
    """The lock beside the folder of an app, which is held while that app lives."""
    return FileLock(root.with_name(f".{root.name}.lock"), thread_local=False)


def _remove(root: Path, lock: FileLock) -> None:
    shutil.rmtree(root, ignore_errors=True)
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


def remove_left_over() -> None:
    """Remove the folders of apps that were killed, and so could not do it themselves."""
    for root in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        lock = _lock_of(root)
        with suppress(Timeout, OSError):  # it is alive, or somebody else's
            lock.acquire(blocking=False)
            _remove(root, lock)


class Sessions:
    """All open pages. Everything is under one temporary folder, which `close` removes, or the next app after a kill.

    Sessions have their folders among the uploads: Gradio serves files from there, and would copy all others there.
    """

    def __init__(self) -> None:
        remove_left_over()
        self.root = Path(tempfile.gettempdir()) / f"{PREFIX}{secrets.token_hex(8)}"
        lock = _lock_of(self.root)
        lock.acquire()  # first: a folder without a lock is taken for a left-over
        self.root.mkdir(mode=0o700)
        self._end = weakref.finalize(self, _remove, self.root, lock)
        self.uploads, self.examples = self.root / "uploads", self.root / "examples"
        self._sessions: dict[str, Session] = {}
        self._connected: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, name: str | None) -> Session:
        """The session of a page, a new one if it is not known yet. Names are never part of a path.

        Raises [`FieldError`]: too many pages are open.
        """
        name = name or ""
        with self._lock:
            session = self._sessions.get(name)
            given_up = None
            if session is None:
                if len(self) >= MAX_SESSIONS:
                    given_up = self._sessions.pop(self._longest_idle())
                session = self._sessions[name] = Session(Folder(self.uploads, "user_"))
            session.seen = time.monotonic()
        if given_up is not None:
            given_up.close()
        return session

    def _longest_idle(self) -> str:
        idle = [name for name in self._sessions if not self._connected[name]]
        if not idle:
            raise FieldError("result", f"{MAX_SESSIONS} pages are open here: close one that is not needed")
        return min(idle, key=lambda name: self._sessions[name].seen)

    def get(self, name: str | None) -> Session | None:
        """The session of a page, or None: it has none yet, or was closed. For events that need no new one."""
        with self._lock:
            session = self._sessions.get(name or "")
            if session is not None:
                session.seen = time.monotonic()
            return session

    def of_open(self, name: str | None) -> Session | None:
        """The session of a page, a new one if the page is open and has none yet; None if it was closed."""
        return self.of(name) if self._connected[name or ""] else self.get(name)

    def connect(self, name: str) -> None:
        """A page has opened, or come back: its session stays as long."""
        with self._lock:
            self._connected[name] += 1

    def disconnect(self, name: str) -> None:
        """A page has been left; its session ends when it is not asked for again."""
        with self._lock:
            self._connected -= Counter([name])  # drops names that are at 0

    def expire(self) -> None:
        """End the sessions of pages that were left, and remove uploads that nobody finished."""
        now = time.monotonic()
        with self._lock:
            left = [
                name
                for name, session in self._sessions.items()
                if not self._connected[name] and now - session.seen > IDLE
            ]
        for name in left:
            self.drop(name)
        for file in self.uploads.glob("*"):
            with suppress(OSError):  # removed meanwhile
                if file.is_file() and time.time() - file.stat().st_mtime > HALF_AN_UPLOAD:
                    file.unlink()

    def drop(self, name: str | None) -> None:
        """Stop what a page that was closed has running, and remove its files."""
        with self._lock:
            session = self._sessions.pop(name or "", None)
        if session is not None:
            session.close()

    def close(self) -> None:
        """Remove everything."""
        for name in list(self._sessions):
            self.drop(name)
        self._end()
