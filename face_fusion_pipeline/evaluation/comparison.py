"""`face-fusion evaluate`: make pictures, score them, and write rows, tables and plots.

Everything can be stopped and goes on: a picture is a file, and so are its rows; what is there and still true is not
made again. Several processes share the pictures by Accelerate.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..face_errors import FaceFusionError, UnreadableImageError
from ..files.atomic import replacing, write_text
from ..files.texts import UnreadableFileError, read_json
from ..generation.provenance import public_name
from ..generation.references import reference_crops
from ..training.loop import process_group
from .comparison_tables import as_markdown, columns, summarise
from .generation import Settings, make_pictures
from .picture_rows import PicturePanel, Row
from .pictures import Picture
from .plots import draw_plots
from .reports import circumstances, write_report
from .separation import check_recognisers


ROWS_FORMAT = 1  # another number when rows of an older version must not be taken


def evaluate(
    pictures: Sequence[Picture],
    panel: PicturePanel,
    out: Path,
    *,
    settings: Settings | None = None,
    load_pipeline: Callable[[], Any] | None = None,
    left_out: dict[str, str] | None = None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Make what is missing, score what is new, write `rows.parquet`, `table.json`, `table.md` and `plots/` to `out`.

    Args:
        pictures: all that the tables compare; those in `out/images` are made where they are missing.
        settings, load_pipeline: how; the pipeline is loaded only if a picture is missing.
        left_out: what is not measured, and how to get it.
        seed: of the bootstrap.

    Returns the content of `table.json` in the main process, None in others. Raises FaceFusionError if nothing can be
    scored, or by evaluators that take strangers for the person, see `separation.check_recognisers`.
    """
    processes = process_group()
    doubts = check_recognisers(panel)
    # only in this folder anything is made: nothing is ever written where photos lie
    here = {p for p in pictures if isinstance(p.source, Path) and p.path.parent == out / "images"}
    planned, others = [p for p in pictures if p in here], [p for p in pictures if p not in here]
    with processes.split_between_processes(planned) as made, processes.split_between_processes(others) as given:
        missing = [picture for picture in made if not picture.path.is_file()]
        if missing and settings is not None and load_pipeline is not None:
            _make(load_pipeline(), missing, panel, settings)
        score_pictures([*made, *given], panel, out / "rows")
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return None
    rows, unusable = collect_rows(pictures, panel, out / "rows")
    if not rows:
        raise FaceFusionError(f"no picture could be scored: {next(iter(unusable.values()), 'there is none')}")
    write_parquet(rows, out / "rows.parquet")
    summary = summarise(rows, seed=seed)
    result = {
        "model": "pictures that exist" if settings is None else public_name(settings.model),
        "settings": None if settings is None else asdict(settings),
        "people": len({name for picture in pictures for name in picture.people}),
        "people_in_a_picture": max(len(picture.people) for picture in pictures),
        "pictures": dict(Counter(picture.method for picture in pictures)),
        **circumstances(),
        "columns": columns(summary),
        "methods": summary,
        "doubts": doubts,
        "left_out": left_out or {},
        "unusable": unusable,
    }
    write_report(out, "table", result, as_markdown(result))
    draw_plots(result, out / "plots")
    return result


def _make(pipe: Any, pictures: Sequence[Picture], panel: PicturePanel, settings: Settings) -> None:
    """The pictures of people whose reference shows a face; the others are left out here and listed later."""
    make_pictures(
        pipe,
        [picture for picture in pictures if all(panel.known(name) for name in picture.people)],
        lambda name: reference_crops(pipe, [panel.reference_photo(name)])[0],
        settings,
        detector=panel.observer.finder.detector,
    )


def score_pictures(pictures: Sequence[Picture], panel: PicturePanel, folder: Path) -> None:
    """Write `folder/KEY.json` with the rows of every picture that has none, or other ones than it would get now."""
    for picture in tqdm(pictures, desc="scores", unit="image"):
        if _read(picture, panel, folder) is not None:
            continue
        record: dict[str, Any] = {"stamp": _stamp(picture, panel), "rows": [], "unusable": {}}
        try:
            if all(panel.known(name) for name in picture.people):  # else it is said of the photo why not
                record["rows"] = panel.rows(picture)
        except UnreadableImageError as error:
            record["unusable"][picture.name or picture.key] = str(error)
        names = {photo.name for person in picture.people for photo in panel.people[person].photos}
        record["unusable"] |= {name: why for name, why in panel.unusable.items() if name in names}
        write_text(folder / f"{picture.key}.json", json.dumps(record) + "\n")


def collect_rows(pictures: Sequence[Picture], panel: PicturePanel, folder: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows of all pictures, and what could not be used: photos and pictures by name, with the reason."""
    rows: list[Row] = []
    unusable: dict[str, str] = {}
    for picture in pictures:
        record = _read(picture, panel, folder) or {"rows": [], "unusable": {picture.name: "it was not scored"}}
        rows += record["rows"]
        unusable |= record["unusable"]
    return rows, unusable


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """All rows as one table; a column is null where a row has no such figure."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as partial:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), partial)


def _read(picture: Picture, panel: PicturePanel, folder: Path) -> dict[str, Any] | None:
    """The record of a picture, None if there is none or it tells of another file or other recognisers."""
    try:
        record = read_json(folder / f"{picture.key}.json", "it is made again")
    except UnreadableFileError:
        return None
    return record if isinstance(record, dict) and record.get("stamp") == _stamp(picture, panel) else None


def _stamp(picture: Picture, panel: PicturePanel) -> list[Any]:
    """Changes with the picture's file, the photos of its people and everything that looks at them."""
    size: list[int] = []
    if isinstance(picture.source, Path) and picture.path.is_file():
        size = [picture.path.stat().st_size, picture.path.stat().st_mtime_ns]
    people = [[p.fingerprint, len(p.photos)] for p in (panel.people[name] for name in picture.people)]
    words = json.dumps([ROWS_FORMAT, panel.description, people])
    return [*size, hashlib.sha256(words.encode()).hexdigest()[:16]]
