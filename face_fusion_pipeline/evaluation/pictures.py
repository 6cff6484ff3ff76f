"""What is evaluated: pictures, each with the people, the prompt and the method it was made with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..face_errors import FaceFusionError
from ..files.atomic import write_text
from ..files.folders import inside
from ..files.texts import parse_json, read_text
from ..training.records import as_caption, as_name, is_missing
from .people import Person


ANOTHER_PHOTO, SOMEBODY_ELSE = "another photo", "somebody else"


@dataclass(frozen=True)
class Picture:
    """One picture, made or to be made.

    Attributes:
        source: its file, or its encoded content.
        method: how it was made; tables compare methods.
        people: names of those it should show, from left to right.
        prompt: what else it should show; empty if nothing was asked.
        seed: of the noise, None where it is not known.
    """

    source: Path | bytes
    method: str
    people: tuple[str, ...]
    prompt: str = ""
    seed: int | None = None

    @property
    def path(self) -> Path:
        """The file of a picture that is to be made."""
        assert isinstance(self.source, Path)
        return self.source

    @property
    def name(self) -> str:
        """The file's name, empty for a picture that is no file."""
        return self.source.name if isinstance(self.source, Path) else ""

    @property
    def group(self) -> str:
        """All its people: rows of one group are not independent of each other."""
        return " + ".join(self.people)

    @property
    def key(self) -> str:
        """A name for files about this picture; another source, method, person or prompt gives another one."""
        if isinstance(self.source, Path):
            name, source = self.source.stem, str(self.source.resolve())
        else:
            name, source = "picture", hashlib.sha256(self.source).hexdigest()
        return f"{_slug(name)}_{_digest(source, self.method, self.people, self.prompt)}"


def plan_pictures(
    people: Sequence[Person],
    prompts: Sequence[str],
    methods: Sequence[str],
    folder: Path,
    *,
    together: int = 1,
    per_prompt: int = 1,
    seed: int = 0,
) -> list[Picture]:
    """`per_prompt` pictures for every group of `together` people, prompt and method, as files in `folder`.

    The methods share their noise. Seeds and file names depend on people, reference photos and prompt alone: more
    people or prompts leave the other pictures what they are.

    Raises FaceFusionError where there are fewer people than stand in one picture.
    """
    if len(people) < together:
        raise FaceFusionError(f"{len(people)} people in --identities, too few for --people {together}")
    pictures = []
    for start in range(0, len(people) - together + 1, together):
        group = people[start : start + together]
        names, references = tuple(p.name for p in group), tuple(p.fingerprint for p in group)
        for method in methods:
            for prompt in prompts:
                for number in range(per_prompt):
                    noise = int(_digest(seed, names, prompt, number), 16)
                    mark = _digest(names, references, prompt, seed, number)
                    file = folder / f"{_slug('+'.join(names))}_{mark}_{_slug(method)}.png"
                    pictures.append(Picture(file, method, names, prompt, noise))
    return pictures


def photos_to_compare(people: Sequence[Person]) -> list[Picture]:
    """What likeness means on these photos: another photo of each person (the ceiling), somebody else's (the floor)."""
    pictures = [Picture(p.others[0].content, ANOTHER_PHOTO, (p.name,)) for p in people if p.others]
    if len(people) > 1:
        strangers = [*people[1:], people[0]]
        pairs = zip(people, strangers, strict=True)
        pictures += [Picture(other.reference.content, SOMEBODY_ELSE, (p.name,)) for p, other in pairs]
    return pictures


def read_pictures(folder: Path, known: Sequence[Person]) -> list[Picture]:
    """The pictures that `folder/metadata.jsonl` lists.

    A line has `file_name`, `identity` (or `identities`, from left to right) and, if there are some, `prompt` (or
    `text`), `method` (default: the folder's name) and `seed`. Raises FaceFusionError naming the line otherwise.
    """
    listing, names = folder / "metadata.jsonl", {person.name for person in known}
    if not listing.is_file():
        raise FaceFusionError(
            f"--images {folder} has no metadata.jsonl: one line a picture, "
            '{"file_name": ..., "identity": ..., "prompt": ..., "method": ...}'
        )
    pictures = []
    for number, line in enumerate(read_text(listing).split("\n"), 1):
        if line.strip():
            try:
                pictures.append(_picture(folder, parse_json(line), names))
            except (ValueError, TypeError, AttributeError) as error:
                raise FaceFusionError(f"{listing}, line {number}: {error}") from error
            except KeyError as error:
                raise FaceFusionError(f"{listing}, line {number}: {error} is missing") from error
    if not pictures:
        raise FaceFusionError(f"{listing} lists no picture")
    return pictures


def _picture(folder: Path, record: dict[str, Any], names: set[str]) -> Picture:
    listed = record["identities"] if "identities" in record else [record["identity"]]
    people = tuple(as_name(name) for name in listed)
    if unknown := [name for name in people if name not in names]:
        raise ValueError(f"identity {unknown[0]!r} is not among those of --identities")
    if not people:
        raise ValueError("identities is empty")
    path = inside(folder, record["file_name"])
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    said = {key: value for key, value in record.items() if not is_missing(value)}
    prompt = as_caption(said.get("prompt", said.get("text", "")))
    method = as_name(said.get("method", folder.resolve().name))
    return Picture(path, method, people, prompt, int(said["seed"]) if "seed" in said else None)


def list_pictures(pictures: Sequence[Picture], folder: Path) -> None:
    """Write `folder/metadata.jsonl`, from which `read_pictures` reads the same pictures."""
    lines = [
        json.dumps(
            {
                "file_name": str(picture.path.relative_to(folder)),
                "identities": list(picture.people),
                "prompt": picture.prompt,
                "method": picture.method,
                "seed": picture.seed,
            }
        )
        for picture in pictures
    ]
    write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty, each once. Raises FaceFusionError if there are none."""
    lines = read_text(path, "--prompts").split("\n")
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise FaceFusionError(f"--prompts {path} is empty: write one prompt a line")
    return prompts


def _slug(text: str) -> str:
    return re.sub(r"[^\w+.-]+", "-", text)[-60:].strip("-.")


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()[:8]
