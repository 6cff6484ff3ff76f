"""What belongs to one user, apart from all others, in a temporary folder that goes with the app."""

import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .engine import Picture


@dataclass
class Run:
    """One press of “Generate”: where its files go, the event that stops it, and what there is so far.

    Attributes:
        references: label -> face crops, the first columns of the contact sheet.
    """

    folder: Path
    cancelled: threading.Event = field(default_factory=threading.Event)
    references: dict[str, Sequence[Any]] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def add(self, picture: Picture, file: Path) -> None:
        """Note a finished picture."""
        self.files.append(file)
        self.pictures.append(picture)


@dataclass
class Session:
    """One open page.

    Attributes:
        folder: for results and identity files; removed when the page is closed.
        identities: person's number -> identity loaded from a file.
        layout: picture behind the boxes, RGB, or None.
        run: the last one, or None.
    """

    folder: Path
    identities: dict[int, Any] = field(default_factory=dict)
    layout: Any = None
    run: Run | None = None

    def new_run(self) -> Run:
        """Stop the run before, and begin one with an empty folder; files of the one before that stay until then."""
        if self.run is not None:
            self.run.cancelled.set()
            shutil.rmtree(self.run.folder, ignore_errors=True)
        self.run = Run(Path(tempfile.mkdtemp(prefix="run_", dir=self.folder)))
        return self.run


class Sessions:
    """All open pages. Everything is under one temporary folder, which `close` removes."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="face_fusion_app_", ignore_cleanup_errors=True)
        self.root = Path(self._temporary.name)
        self.uploads, self.examples = self.root / "uploads", self.root / "examples"
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, name: str | None) -> Session:
        """The session of a page, a new one if it is not known yet. Names are never part of a path."""
        name = name or ""
        with self._lock:
            if name not in self._sessions:
                self._sessions[name] = Session(Path(tempfile.mkdtemp(prefix="user_", dir=self.root)))
            return self._sessions[name]

    def drop(self, name: str | None) -> None:
        """Stop what a page that was closed has running, and remove its files."""
        with self._lock:
            session = self._sessions.pop(name or "", None)
        if session is None:
            return
        if session.run is not None:
            session.run.cancelled.set()
        shutil.rmtree(session.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        for name in list(self._sessions):
            self.drop(name)
        self._temporary.cleanup()
