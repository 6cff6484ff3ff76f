"""What a record says of a photo, each field read by itself: a bad one is left out and named, the others stay.

What is missing is unknown, however a table writes that: an empty field, null, NaN. Numbers are names in one spelling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

from ..files.texts import decode, is_garbled, parse_json
from .photos import Box, Fault


MISSING = {"", "nan", "NaN", "None", "null", "NULL", "<NA>", "N/A", "n/a", "NaT"}  # as tables are written
LONGEST = 10_000  # characters of a caption: text encoders read far less
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def is_missing(value: Any) -> bool:
    """Whether a field says nothing."""
    if isinstance(value, str):
        return value.strip() in MISSING
    return value is None or (isinstance(value, (Real, Decimal)) and math.isnan(value))


class Fields:
    """The fields of one record; `faults` grows with those that cannot be read."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record, self.faults = record, list[Fault]()

    def read(self, name: str, how: Callable[[Any], Any], missing: Any = None) -> Any:
        """The field `name` as `how` reads it; `missing` where it says nothing or cannot be read."""
        value = self.record.get(name)
        try:
            return missing if is_missing(value) else how(value)
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
            self.faults.append((name, str(error)[:200] or type(error).__name__))
            return missing


def face_fields(fields: Fields) -> dict[str, Any]:
    """Who and where: `identity`, `box`, `landmarks5`, or the lists `identities`, `boxes`, ... of all in the picture.

    Returns the attributes of a `Photo` of these names, `people` and `as_reference`.
    """
    names, boxes = fields.read("identities", as_list), fields.read("boxes", as_list)
    counted = names if names is not None else boxes
    people = None if counted is None else len(counted)
    alone = people in (None, 1)
    identity, box = fields.read("identity", as_name), fields.read("box", as_box)
    if people == 1:
        single = Fields({"identities": names and names[0], "boxes": boxes and boxes[0]})
        listed = single.read("identities", as_name), single.read("boxes", as_box)
        identity, box = (own if own is not None else other for own, other in zip((identity, box), listed, strict=True))
        fields.faults += single.faults
    return {
        "identity": identity,
        "people": people,
        "box": box,
        "landmarks5": fields.read("landmarks5", as_points) if alone else None,
        "as_reference": fields.read("as_reference", as_yes_or_no, missing=True),
    }


def as_name(value: Any) -> str:
    """A text or number as the name of a person: 7, 7.0 and "7.0" are one. Raises ValueError for anything else."""
    if isinstance(value, (Real, Decimal)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{value!r} is no finite number")
        whole = int(value)  # type: ignore[arg-type]
        return str(whole) if value == whole else str(value)
    if not isinstance(value, str):
        raise ValueError(f"{_short(value)} is neither a text nor a number")
    if is_garbled(value):
        raise ValueError(f"{_short(value)} is not UTF-8 text")
    return re.sub(r"^(-?\d+)\.0+$", r"\1", value.strip())


def as_caption(value: Any) -> str:
    """A caption, or the first of a list of them. Raises ValueError for what is no text."""
    if isinstance(value, (list, tuple)):
        value = next((one for one in value if not is_missing(one)), "")
    if isinstance(value, bytes):
        value = decode(value)
    return as_name(value[:LONGEST] if isinstance(value, str) else value)


def as_box(value: Any) -> Box:
    """(x0, y0, x1, y1). Raises ValueError or TypeError for what is no box."""
    box = tuple(float(number) for number in as_list(value))
    if len(box) != 4 or not all(map(math.isfinite, box)) or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"box {_short(list(box))} is not [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return box


def as_points(value: Any) -> list[list[float]]:
    """Five points [x, y], which may be in a list of one person. Raises ValueError or TypeError for anything else."""
    points = as_list(value)
    points = as_list(points[0]) if len(points) == 1 else points
    found = [[float(number) for number in as_list(point)] for point in points]
    if [len(point) for point in found] != [2] * 5 or not all(math.isfinite(x) for point in found for x in point):
        raise ValueError(f"{_short(found)} are not five points [x, y]")
    return found


def as_list(value: Any) -> Sequence[Any]:
    """A list, also one that a table holds as text. Raises ValueError for anything else."""
    value = parse_json(value) if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{_short(value)} is no list")
    return value


def as_yes_or_no(value: Any) -> bool:
    """True or false, also as a word. Raises ValueError for anything else."""
    word = str(value).strip().lower()
    if word not in WORDS:
        raise ValueError(f"{_short(value)} is neither true nor false")
    return WORDS[word]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]} ..."
