"""Training data without a photograph: the checkpoint draws the people that its weights are trained with.

The first picture of a person is drawn from the prompt alone. Further ones have the same words for the person, another
scene, and the face of the first one as reference, without training or with weights of an earlier round. Faces are
found, cut out and checked as those of photos; then pairs that are not the same person, or copies, are left out.

The folder is one that `preparation` and `latent_cache` together would make. People are drawn in pieces; a finished
piece is two files in `parts/`, so a run that was stopped goes on from there, and several processes share the pieces.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ..face_detectors import FaceDetector, load_detector
from ..face_embedders import FaceEmbedder
from ..face_errors import FaceFusionError
from ..face_files import save_tensors
from ..face_images import CROP_ENLARGE, crop_face, find_face
from ..files.texts import UnreadableFileError
from .generated_people import Grammar
from .generated_pictures import Artist, Drawn, Wanted
from .latent_cache import is_stored
from .photos import DataError
from .preparation import JPEG, Row, read_lines, write_lines
from .same_person import small_face, unet_features
from .selection import REASONS, RefusedPhotoError, SelectionOptions, landmarks, sharpness


PREFIX = "generated:"
PIECE = 64  # people
FIRST = 0  # number of the picture that the prompt alone makes


@dataclass(frozen=True)
class Portrait:
    """A picture to draw: `picture` of the person `person`, both numbers."""

    person: int
    picture: int
    prompt: str
    caption: str
    as_reference: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.person:06d}_{self.picture}"


@dataclass(frozen=True)
class Cast:
    """Who is drawn: `count` people, `pictures` of each, from `seed` and the words of a grammar."""

    count: int
    grammar: Grammar
    pictures: int = 2
    seed: int = 0

    def portrait(self, person: int, picture: int) -> Portrait:
        words = self.grammar.person(self._rng("person", person), person)
        scene = self.grammar.scene(self._rng("scene", person, picture), picture)
        rng = self._rng("picture", person, picture)
        # Half of the captions do not say what the face shows: they teach to look at it.
        caption = scene.of(words.short if rng.random() < 0.5 else words.full)
        return Portrait(person, picture, scene.of(words.full), caption, scene.as_reference, rng.getrandbits(32))

    def group(self, person: int) -> str:
        """People of one group are called the same in short."""
        return self.grammar.person(self._rng("person", person), person).short

    def pieces(self) -> list[range]:
        return [range(start, min(start + PIECE, self.count)) for start in range(0, self.count, PIECE)]

    def _rng(self, *what: object) -> random.Random:
        return random.Random(f"generated {self.seed} {' '.join(map(str, what))}")


@dataclass(frozen=True)
class Checks:
    """What a drawn picture must be like, see `SelectionOptions`; `embed` says who it shows (None: the UNet itself)."""

    selection: SelectionOptions
    detector: str = "auto"
    detector_model: str | None = None
    embed: FaceEmbedder | None = None

    @property
    def least_face(self) -> float:
        """Pixels: a smaller face would have to be cropped closer, and the latents are kept as they were drawn."""
        return max(self.selection.min_face, self.selection.min_face_fraction * self.selection.resolution)


@dataclass
class Piece:
    """What is drawn of some people: rows, and of those that are pictures, in order, latents and features."""

    rows: list[Row] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    crops: dict[int, Image.Image] = field(default_factory=dict)  # of first pictures, by person

    def save(self, out: Path, number: int, key: str) -> None:
        tensors = {"latents": self.latents, "features": self.features}
        stacked = {name: torch.stack(found) if found else torch.empty(0) for name, found in tensors.items()}
        save_tensors(tensors_path(out, number), stacked, {"key": key})
        write_lines(rows_path(out, number), [key, *self.rows])


def rows_path(out: Path, number: int) -> Path:
    return out / "parts" / f"{number:06d}.jsonl"


def tensors_path(out: Path, number: int) -> Path:
    return out / "parts" / f"{number:06d}.safetensors"


def is_drawn(out: Path, number: int, key: str) -> bool:
    """Whether a piece is there, whole, and of this `key`; a damaged one is drawn again."""
    with suppress(UnreadableFileError):
        path = rows_path(out, number)
        return path.is_file() and read_lines(path)[:1] == [key] and is_stored(tensors_path(out, number), key=key)
    return False


class PieceDrawer:
    """Draws, looks and writes: pictures to `out/images`, faces to `out/faces`, pieces to `out/parts`.

    Args:
        key: changes with all that decides what is drawn.
        earlier: a folder of the same people by other weights, whose first pictures are taken as they are.
    """

    def __init__(
        self, artist: Artist, cast: Cast, checks: Checks, out: Path, key: str, earlier: Path | None = None
    ) -> None:
        self.artist, self.cast, self.checks, self.out, self.key = artist, cast, checks, out, key
        self.earlier = earlier
        cv2.setNumThreads(1)  # threads look at pictures side by side

    def draw(self, number: int, people: range, progress: tqdm) -> None:
        """Draw a piece, unless it is there."""
        done = is_drawn(self.out, number, self.key)
        if not done:
            piece = Piece()
            with ThreadPoolExecutor(2) as pool:  # who looks for faces while the next batch is drawn
                if not self._copy_first(piece, number):
                    firsts = [self.cast.portrait(person, FIRST) for person in people]
                    self._stage(piece, firsts, pool, progress)
                further = [
                    self.cast.portrait(person, picture)
                    for person in sorted(piece.crops)
                    for picture in range(FIRST + 1, self.cast.pictures)
                ]
                self._stage(piece, further, pool, progress)
            piece.save(self.out, number, self.key)
        progress.update(len(people) if done else 0)

    def _stage(self, piece: Piece, portraits: list[Portrait], pool: ThreadPoolExecutor, progress: tqdm) -> None:
        wanted = [Wanted(one.prompt, one.seed, piece.crops.get(one.person)) for one in portraits]
        waiting, start = [], 0
        for drawn in self.artist.draw(wanted):
            batch = portraits[start : start + len(drawn)]
            waiting.append((drawn, [pool.submit(self._look, *pair) for pair in zip(batch, drawn, strict=True)]))
            start += len(drawn)
            if len(waiting) > 1:  # the batch before: its faces were found meanwhile
                self._keep(piece, *waiting.pop(0))
            progress.update(sum(one.picture == FIRST for one in batch))
        for drawn, looks in waiting:
            self._keep(piece, drawn, looks)

    def _keep(self, piece: Piece, drawn: list[Drawn | None], looks: list[Any]) -> None:
        """Add to the piece what was found on a batch, with the features of the faces."""
        found = [(picture, *look.result()) for picture, look in zip(drawn, looks, strict=True)]
        good = [(picture, row, crop) for picture, row, crop in found if crop is not None]
        piece.rows += [row for _, row, _ in found]
        piece.latents += [picture.latents for picture, *_ in good]
        piece.features += list(self._features(good))
        piece.crops |= {row["person"]: crop for _, row, crop in good if row["picture"] == FIRST}

    def _features(self, good: list[tuple[Drawn, Row, Image.Image]]) -> Tensor:
        """Who the pictures show, float16 (B, D)."""
        if not good:
            return torch.empty(0)
        crops = [crop for *_, crop in good]
        return unet_features(self.artist.base, crops) if self.checks.embed is None else self.checks.embed(crops).half()

    def _look(self, portrait: Portrait, drawn: Drawn | None) -> tuple[Row, Image.Image | None]:
        """The row of a picture and its face crop, both written; or a row that says why it is none, and None."""
        row: Row = {"person": portrait.person, "picture": portrait.picture, "source": f"{PREFIX}{portrait.name}"}
        try:
            if drawn is None:
                raise RefusedPhotoError("no numbers", "the model drew values that are no numbers")
            face = find_face(drawn.image, self._detector(), min_size=self.checks.least_face)
            if (found := sharpness(drawn.image, face.box)) < self.checks.selection.min_sharpness:
                raise RefusedPhotoError("blurred", f"sharpness {found:.1f}")
        except FaceFusionError as error:
            reason = error.reason if isinstance(error, RefusedPhotoError) else REASONS.get(type(error))
            if reason is None:  # not the picture's fault, such as a missing detector
                raise
            return {**row, "reason": reason, "message": str(error)}, None
        crop = crop_face(drawn.image, face.box, CROP_ENLARGE, self.checks.selection.reference_resolution)
        name = f"{portrait.name}.jpg"
        drawn.image.save(self.out / "images" / name, **JPEG)
        crop.save(self.out / "faces" / name, **JPEG)
        return {
            **row,
            "file_name": f"images/{name}",
            "face_file_name": f"faces/{name}",
            "text": portrait.caption,
            "identity": f"{portrait.person:06d}",
            "own_reference": False,
            "as_reference": portrait.as_reference,
            "box": [round(float(value), 2) for value in face.box],
            "landmarks5": landmarks(face).round(2).tolist(),
            "small_face": small_face(crop),
        }, crop

    def _detector(self) -> FaceDetector:
        return _detector(threading.get_ident(), self.checks.detector, self.checks.detector_model)

    def _copy_first(self, piece: Piece, number: int) -> bool:
        """Take the first pictures of an earlier round, which are the same; False where there are none."""
        if self.earlier is None or not rows_path(self.earlier, number).is_file():
            return False
        _, *rows = read_lines(rows_path(self.earlier, number))
        tensors = load_file(tensors_path(self.earlier, number))
        pictures = [row for row in rows if "reason" not in row]
        for at, row in enumerate(pictures):
            if row["picture"] == FIRST:
                for name in (row["file_name"], row["face_file_name"]):
                    link_or_copy(self.earlier / name, self.out / name)
                piece.latents.append(tensors["latents"][at])
                piece.features.append(tensors["features"][at])
                with Image.open(self.out / row["face_file_name"]) as crop:
                    piece.crops[row["person"]] = crop.convert("RGB")
        piece.rows += [row for row in rows if row["picture"] == FIRST]
        return True


@functools.lru_cache(maxsize=16)
def _detector(thread: int, name: Any, model: str | None) -> FaceDetector:
    """One for each thread: those of OpenCV are not to be shared."""
    return load_detector(name, model)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file at another place, without its bytes a second time where the disk can do that."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def people_count(source: str) -> int:
    """How many people `generated:N` asks for. Raises [`DataError`] unless N is a number above 1."""
    count = source.removeprefix(PREFIX)
    if not (count.isascii() and count.isdecimal() and len(count) < 10 and int(count) > 1):
        raise DataError(f"{source}: give the number of people to draw, 2 or more, such as {PREFIX}2000")
    return int(count)


def key_of(settings: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]
