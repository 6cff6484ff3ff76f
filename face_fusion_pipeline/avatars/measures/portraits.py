"""What the measures learn from: photographs of one person each, drawn once and kept in files."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from ...face_files import save_tensors
from ..training.data import AvatarImages
from ..world.dataset import draw
from ..world.first_world import head as first_head
from ..world.identity import SPLITS, WORLD, traits
from ..world.scene import Scene, sample_scene


PART = 500  # portraits in a file
DOTS, NO_EYES = (
    0.2,
    0.05,
)  # fractions of the eyes that show: below the first a person has dots, below the second nothing
_SCENE_SEEDS = 3 << 40  # far from those of datasets and of trials


@dataclass(frozen=True)
class _Wanted:
    path: Path
    split: str
    first: int
    count: int
    size: int
    world: int


def portrait_scene(split: str, index: int, world: int) -> Scene:
    """Portrait `index` of a split: a photograph of its person number `index`, all else free."""
    person = SPLITS[split][index]
    return sample_scene(_SCENE_SEEDS + person, [person], world, style="photo")


def eyes_shown(records: list[dict[str, Any]], world: int) -> Tensor:
    """How much of the eyes of the first person of each record shows (N,), from 0 to 1.

    In the first world some eyes lie below the skin, wholly or up to a dot; in later ones all are whole.
    """
    if world != 1:
        return torch.ones(len(records))
    genes = traits(torch.tensor([record["identity_vectors"][0] for record in records]))
    return first_head.eyes_shown(genes, first_head.measure(genes, [record["expression"] for record in records]))


def draw_portraits(
    folder: Path, split: str, count: int, *, size: int = 128, world: int | None = None, processes: int = 1
) -> AvatarImages:
    """The first `count` portraits of a split, `size` pixels a side; of a stopped run only what is missing is drawn.

    Nobody is shown twice. Raises ValueError for an unknown split or world, or for more portraits than people.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if not 1 <= count <= len(SPLITS[split]):
        raise ValueError(f"{count} portraits of the split {split}: from 1 to {len(SPLITS[split])}")
    world = WORLD if world is None else world
    place = Path(folder) / f"portraits-{size}-world{world}" / split
    place.mkdir(parents=True, exist_ok=True)
    wanted = [
        _Wanted(place / f"{first:07d}.safetensors", split, first, PART, size, world) for first in range(0, count, PART)
    ]
    wanted[-1] = replace(wanted[-1], count=count - wanted[-1].first)
    missing = [part for part in wanted if _drawn(part.path) < part.count]
    with tqdm(total=sum(part.count for part in missing), desc=f"drawing {split}", unit="image") as bar:
        if processes > 1 and len(missing) > 1:
            with multiprocessing.get_context("spawn").Pool(processes) as pool:
                for number in pool.imap_unordered(_draw_part, missing):
                    bar.update(number)
        else:
            for part in missing:
                bar.update(_draw_part(part))
    pixels, records = [], []
    for part in wanted:
        with safe_open(part.path, "pt") as file:
            pixels.append(file.get_tensor("pixels")[: part.count])
            records += json.loads(file.metadata()["records"])[: part.count]
    return AvatarImages(torch.cat(pixels), records, place, f"portraits {split} {count} {size} world {world}")


def _drawn(path: Path) -> int:
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        return file.get_slice("pixels").get_shape()[0]


def _draw_part(part: _Wanted) -> int:
    torch.set_num_threads(1)
    scenes = (portrait_scene(part.split, part.first + k, part.world) for k in range(part.count))
    drawn = list(draw(scenes, part.size))
    records = [record for batch in drawn for record in batch.records]
    save_tensors(part.path, {"pixels": torch.cat([batch.pixels for batch in drawn])}, {"records": json.dumps(records)})
    return part.count
