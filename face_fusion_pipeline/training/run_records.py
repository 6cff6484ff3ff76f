"""The records of finished trainings: `training.json` in a folder of weights, one record for each task by its name."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from ..files.atomic import write_text
from ..files.texts import UnreadableFileError, read_json


logger = logging.getLogger(__name__)

RECORD = "training.json"
Records = dict[str, dict[str, Any]]


def read_records(path: Path) -> Records:
    """The records by task; none where the file is missing.

    Raises `UnreadableFileError` where it is damaged.
    """
    if not path.is_file():
        return {}
    remedy = "put back a copy, or remove it: what is known of the training is then lost"
    records = read_json(path, remedy)
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise UnreadableFileError(f"{path} is no record of trainings: {remedy}")
    return records


def known_records(path: Path) -> Records:
    """As [`read_records`], for the end of a training, which a damaged file must not undo: a warning, and none."""
    try:
        return read_records(path)
    except UnreadableFileError as error:
        logger.warning("%s", error)
        return {}


def add_record(path: Path, name: str, record: dict[str, Any]) -> None:
    """Set `records[name]` in the JSON file, which is made where it is missing; a damaged one is kept beside it."""
    records = known_records(path)
    if path.is_file() and not records:
        os.replace(path, path.with_name(f"{path.name}.damaged"))
    write_text(path, json.dumps(records | {name: record}, indent=2) + "\n")
