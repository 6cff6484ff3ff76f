"""From any source to a folder of examples: `images/`, `faces/`, `metadata.jsonl`, and a report of what was left out.

The folder is a Hugging Face ImageFolder. Pieces of the source are worked on by several processes; a finished piece is
one file in `parts/`, which appears when all its pictures are on disk, so a run that was killed goes on from there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
from tqdm import tqdm

from ..face_detectors import FaceDetector, load_detector
from ..face_errors import FaceFusionError, renamed
from ..face_images import CROP_ENLARGE
from ..files.atomic import write_text
from ..files.texts import UnreadableFileError, read_json, read_json_lines
from .photos import BrokenShardError, DataError, Fault, Photo, Piece
from .selection import EARLIER_NAMES, REASONS, RefusedPhotoError, SelectionOptions, differences, select


METADATA, SKIPPED, REPORT = "metadata.jsonl", "skipped.jsonl", "report.json"
LEFT_OUT = "left_out.jsonl"  # fields of photos
BROKEN_SHARD = "broken shard"
AGAIN = "run `face-fusion prepare` again"
SAME_PHOTO = 1.0  # grey levels between thumbnails, see selection.differences
JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}
Row = dict[str, Any]


@dataclass(frozen=True)
class PrepareOptions:
    """`detector` and `detector_model` as for `face_detectors.load_detector`; `workers` is a number of processes.

    What "auto" means here and now is decided at the start: a folder is not prepared by two detectors.
    """

    selection: SelectionOptions = field(default_factory=SelectionOptions)
    detector: str = "auto"
    detector_model: str | None = None
    workers: int = 1

    def settings(self) -> dict[str, Any]:
        """What one folder must be prepared with from its first to its last piece."""
        return {**asdict(self.selection), "detector": self.detector, "face_crop": CROP_ENLARGE}

    def decided(self) -> PrepareOptions:
        """These options with a detector in place of "auto"."""
        if self.detector != "auto":
            return self
        return replace(self, detector=load_detector("auto", self.detector_model).name)


def prepare(pieces: Iterable[Piece], out: Path, options: PrepareOptions, progress: bool = True) -> dict[str, Any]:
    """Make `out` from the pieces of a source; returns the report, which is also written to `out/report.json`.

    What an earlier run with the same settings has finished is kept. Photos that give no example are counted in the
    report by reason and listed in `out/skipped.jsonl`.

    What a source says of a photo and cannot be read is left out by itself: counted too, and listed in
    `out/left_out.jsonl`.

    Raises:
        DataError: `out` was begun with other settings or holds other files, or no photo is left.
        ModelNotFoundError: no such detector.
    """
    out, options = Path(out), options.decided()
    stamp(out / "settings.json", options.settings())
    for name in ("images", "faces", "parts"):
        (out / name).mkdir(parents=True, exist_ok=True)
    count = 0
    with tqdm(desc="preparing", unit="photo", disable=not progress) as bar:
        for found in _run(pieces, out, options):
            bar.update(found)
            count += 1
    kept, skipped, left_out = _merge(out, count)
    report = describe(kept, skipped, options, left_out)
    write_lines(out / SKIPPED, skipped)
    write_lines(out / LEFT_OUT, left_out)
    if not kept:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in report["skipped"].items())
        raise DataError(
            f"none of {report['read']} photos can be used ({reasons or 'there are none'}): see {out / SKIPPED}"
        )
    write_lines(out / METADATA, kept)
    write_text(out / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def stamp(path: Path, settings: dict[str, Any]) -> None:
    """Note what a folder is prepared with. Raises [`DataError`] where it was begun with something else."""
    found = read_json(path, "name another folder for --out") if path.is_file() else settings
    if isinstance(found, dict):
        found = renamed(found, EARLIER_NAMES, path)
    if not isinstance(found, dict) or found != settings:
        found = found if isinstance(found, dict) else {}
        changed = next(key for key in {**settings, **found} if settings.get(key) != found.get(key))
        raise DataError(
            f"{path.parent} was begun with {changed} {found.get(changed)!r}, not {settings.get(changed)!r}: "
            "give the same options, or another folder"
        )
    taken = [path.with_name(name) for name in (METADATA, REPORT, "images", "faces", "parts")]
    if not path.is_file() and (there := next((one for one in taken if one.exists()), None)):
        raise DataError(f"{there} is there, and not of this command: name another folder for --out")
    write_text(path, json.dumps(settings, indent=2) + "\n")


def _run(pieces: Iterable[Piece], out: Path, options: PrepareOptions) -> Iterator[int]:
    """Work on all pieces; yields the number of photos of each as it is done."""
    numbered = enumerate(pieces)
    if options.workers <= 1:
        yield from (work(number, piece, out, options) for number, piece in numbered)
        return
    # Spawned, not forked: OpenCV's threads do not survive a fork. The window bounds the photos that wait in memory.
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        waiting: set[Future[int]] = set()
        try:
            for number, piece in numbered:
                waiting.add(pool.submit(work, number, piece, out, options))
                if len(waiting) >= 3 * options.workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in waiting)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that looked at photos was ended, for want of memory perhaps: the same command goes on, "
                f"also with fewer --workers than {options.workers}"
            ) from error


def work(number: int, piece: Piece, out: Path, options: PrepareOptions) -> int:
    """Write the pictures and the part file of one piece unless that is done; returns its number of photos."""
    part = _part(out, number)
    if part.is_file():
        with suppress(UnreadableFileError):  # a damaged one is written again
            key, *done = read_lines(part) or [None]
            if key == piece.key:
                return len(done)
    cv2.setNumThreads(1)  # the processes share the cores
    detector = functools.partial(_detector, options.detector, options.detector_model)
    rows: list[Row] = []
    try:
        for photo in piece.photos():
            rows.append(_example(photo, f"{number:06d}_{len(rows):05d}.jpg", out, options, detector))
    except BrokenShardError as error:
        rows.append({"source": piece.key, "reason": BROKEN_SHARD, "message": str(error)})
    write_lines(part, [piece.key, *rows])
    return len(rows)


def _part(out: Path, number: int) -> Path:
    return out / "parts" / f"{number:06d}.jsonl"


@functools.cache  # one for each process
def _detector(name: Any, model: str | None) -> FaceDetector:
    return load_detector(name, model)


def _example(photo: Photo, name: str, out: Path, options: PrepareOptions, detector: Any) -> Row:
    """The row of an example whose pictures are written, or a row with the reason why there is none."""
    try:
        example = select(photo, options.selection, detector)
    except FaceFusionError as error:
        reason = error.reason if isinstance(error, RefusedPhotoError) else REASONS.get(type(error))
        if reason is None:  # not the photo's fault, such as a missing detector
            raise
        return {"source": photo.name, "reason": reason, "message": str(error), **_faults(photo.faults)}
    except (ArithmeticError, LookupError, MemoryError, ValueError, cv2.error) as error:  # of a broken file, at last
        message = f"{type(error).__name__}: {error}"
        return {"source": photo.name, "reason": "unreadable", "message": message, **_faults(photo.faults)}
    example.image.save(out / "images" / name, **JPEG)
    example.crop.save(out / "faces" / name, **JPEG)
    return {
        "file_name": f"images/{name}",
        "face_file_name": f"faces/{name}",
        "text": example.text,
        "identity": photo.identity,
        "own_reference": photo.reference is not None,
        "as_reference": photo.as_reference,
        "box": example.box,
        "landmarks5": example.landmarks5,
        "thumbnail": example.thumbnail,
        "source": photo.name,
        **_faults(example.faults),
    }


def _faults(found: Sequence[Fault]) -> Row:
    return {"faults": found} if found else {}


# --- All pieces together -----------------------------------------------------------------------------------------


def _merge(out: Path, count: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows kept, rows skipped, and fields left out of all parts, in the order of the source.

    Copies of a photo are skipped here.
    """
    kept: list[Row] = []
    skipped: list[Row] = []
    left_out: list[Row] = []
    of_person: dict[str, list[Row]] = defaultdict(list)
    for number in range(count):
        for row in read_lines(_part(out, number))[1:]:
            for name, message in row.pop("faults", ()):
                left_out.append({"source": row["source"], "field": name, "message": message})
            if "reason" in row:
                skipped.append(row)
                continue
            others = of_person[row["identity"]] if row["identity"] is not None else []
            same = differences(row["thumbnail"], [other["thumbnail"] for other in others]) < SAME_PHOTO
            if same.any():  # as a pair the two would teach to copy
                message = f"the same photo as {others[int(same.argmax())]['source']}"
                skipped.append({"source": row["source"], "reason": "duplicate", "message": message})
                continue
            others.append(row)
            kept.append(row)
    for row in kept:
        del row["thumbnail"]
    return kept, skipped, left_out


def may_be_reference(row: Row) -> bool:
    """Whether the source lets the photo stand for the person's others; all could before it was asked."""
    return bool(row.get("as_reference", True))


def has_partner(rows: list[Row]) -> list[bool]:
    """Whether another photo serves as reference of each row: one of the same person, or one that the source named."""
    shown = Counter(row["identity"] for row in rows if row["identity"] is not None and may_be_reference(row))
    return [row["own_reference"] or shown[row["identity"]] > may_be_reference(row) for row in rows]


def describe(
    kept: list[Row], skipped: list[Row], options: PrepareOptions, left_out: list[Row] | None = None
) -> dict[str, Any]:
    """The report: how many photos were read, kept, and skipped for which reason; how many have a partner.

    `fields_left_out` counts what could not be read of what the source says of them, by field.
    """
    people = Counter(row["identity"] for row in kept if row["identity"] is not None)
    paired = sum(has_partner(kept))
    return {
        "read": len(kept) + sum(row["reason"] != BROKEN_SHARD for row in skipped),
        "kept": len(kept),
        "skipped": dict(Counter(row["reason"] for row in skipped).most_common()),
        "fields_left_out": dict(Counter(row["field"] for row in left_out or ()).most_common()),
        "people": len(people) + sum(row["identity"] is None for row in kept),
        "paired_with_another_photo": paired,
        "paired_with_itself": len(kept) - paired,
        "settings": options.settings(),
    }


def read_rows(folder: Path) -> list[Row]:
    """The examples of a prepared folder. Raises [`DataError`] if it is none."""
    if not is_prepared(folder):
        raise DataError(f"{folder} is no prepared folder: make one with `face-fusion prepare PHOTOS --out {folder}`")
    return read_lines(folder / METADATA)


def read_report(folder: Path) -> dict[str, Any]:
    """What `prepare` returned when it made the folder."""
    report = read_json(folder / REPORT, AGAIN)
    if not isinstance(report, dict) or not isinstance(report.get("settings"), dict):
        raise DataError(f"{folder / REPORT} is no report of a prepared folder: {AGAIN}")
    return report


def data_key(folder: Path) -> str:
    """Changes with the examples of a prepared folder."""
    return hashlib.sha256((folder / METADATA).read_bytes()).hexdigest()


def is_prepared(folder: Path) -> bool:
    return (folder / METADATA).is_file() and (folder / REPORT).is_file()


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """A JSON value a line, complete or not there at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[Any]:
    """Raises `UnreadableFileError` for a damaged file, which names it."""
    return read_json_lines(path, AGAIN)
