"""Training data of rendered avatars, made where the model is: nothing passes through files of pictures.

The folder is one that `preparation` and `latent_cache` together would make, without its pictures. On a GPU a hundred
thousand examples take a minute or two; from a dataset on disk they would take hours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import compress, groupby, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..avatars.dataset import PER_IDENTITY, draw, plan
from ..face_adapter import save_tensors
from ..face_images import CROP_ENLARGE, crop_face
from .base_model import BaseModel
from .latent_cache import COMPLETE, SHARD, cache_folders, caption_shard, encode_pictures, shard_path
from .preparation import METADATA, REPORT, Row, has_partner, write_lines, write_text
from .sources import Box, DataError


PREFIX = "avatars:"


def scene_count(source: str) -> int:
    """How many scenes `avatars:N` asks for. Raises [`DataError`] unless N is a positive number."""
    count = source.removeprefix(PREFIX)
    if not count.isdecimal() or int(count) < 1:
        raise DataError(f"{source}: give the number of scenes to render, such as {PREFIX}20000")
    return int(count)


def prepare_rendered(count: int, out: Path, base: BaseModel, progress: bool = True) -> dict[str, Any]:
    """Render the first `count` training scenes of the avatars and encode those with one person; returns the report.

    Args:
        out: a new or empty folder.
        base: what is trained; its resolution is that of the pictures and of the face crops.

    Raises:
        DataError: `out` holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty: rendered data are made in one go, name a new folder")
    partial = out / "encoding"
    for name in ("latents", "conditions"):
        (partial / name).mkdir(parents=True)
    rows: list[Row] = []
    for examples in in_shards(paired(portraits(count, base.resolution, base.unet.device, progress))):
        first = {"first": str(len(rows)), "base": Path(base.name).name}
        number, found = len(rows) // SHARD, [row for row, _ in examples]
        pictures = encoded([pixels for _, pixels in examples], found, base)
        save_tensors(shard_path(partial / "latents", number), pictures, first)
        captions = caption_shard(base, [row["text"] for row in found])
        save_tensors(shard_path(partial / "conditions", number), captions, first)
        rows += found
    report = describe_rendered(rows, count, base)
    write_lines(out / METADATA, rows)
    cache = cache_folders(out, base)
    for name, target in (("latents", cache.latents), ("conditions", cache.conditions)):
        write_text(partial / name / COMPLETE, json.dumps({"examples": len(rows)}) + "\n")
        target.parent.mkdir(exist_ok=True)
        (partial / name).rename(target)
    partial.rmdir()
    write_text(out / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def portraits(count: int, size: int, device: torch.device, progress: bool) -> Iterator[tuple[Row, Tensor]]:
    """Row and pixels, uint8 (3, size, size), of each of `count` scenes that shows one person."""
    indices = tqdm(range(count), desc="rendering", unit="scene", disable=not progress)
    planned = (plan("train", index, PER_IDENTITY) for index in indices)
    for drawn in draw((scene for scene in planned if len(scene.people) == 1), size, device):
        yield from zip(map(row_of, drawn.records), drawn.pixels, strict=True)


def row_of(record: dict[str, Any]) -> Row:
    return {
        "text": record["text"],
        "identity": record["identities"][0],
        "own_reference": False,
        "as_reference": record["as_reference"],
        "box": record["boxes"][0],
        "landmarks5": record["landmarks5"][0],
        "source": f"{PREFIX}{record['seed']}",  # a training scene's number is its seed
    }


def paired(examples: Iterator[tuple[Row, Tensor]]) -> Iterator[tuple[Row, Tensor]]:
    """Those of people of whom there is another picture that may be the reference; a person's come in a row."""
    for _, group in groupby(examples, lambda example: example[0]["identity"]):
        found = list(group)
        yield from compress(found, has_partner([row for row, _ in found]))


def in_shards(examples: Iterator[tuple[Row, Tensor]]) -> Iterator[list[tuple[Row, Tensor]]]:
    """As many examples as a shard holds, the last time what is left."""
    while found := list(islice(examples, SHARD)):
        yield found


def encoded(pictures: list[Tensor], rows: list[Row], base: BaseModel) -> dict[str, Tensor]:
    """The tensors of a shard of pictures, see `latent_cache`, each with one reference: its face crop."""
    pixels = torch.stack(pictures).permute(0, 2, 3, 1).contiguous().cpu()
    images = [Image.fromarray(picture) for picture in pixels.numpy()]
    with ThreadPoolExecutor() as pool:
        faces = pool.map(lambda image, row: crop_face(image, detected(row), CROP_ENLARGE, image.width), images, rows)
        return {
            "latents": encode_pictures(base, images),
            "references": encode_pictures(base, list(faces)),
            "reference_start": torch.arange(len(rows) + 1),
        }


def detected(row: Row) -> Box:
    """The face box as a detector might have drawn it: a fifth larger or smaller, a twelfth of its height aside.

    Users' faces are cut out by detectors, whose boxes differ by as much, and weights that only ever saw exact boxes
    lose likeness on them.
    """
    x0, y0, x1, y1 = row["box"]
    rng = random.Random(f"detected {row['source']}")
    size, aside = 1.2 ** rng.uniform(-1, 1), (y1 - y0) / 12
    x, y = (x0 + x1) / 2 + rng.uniform(-aside, aside), (y0 + y1) / 2 + rng.uniform(-aside, aside)
    half_w, half_h = size * (x1 - x0) / 2, size * (y1 - y0) / 2
    return x - half_w, y - half_h, x + half_w, y + half_h


def describe_rendered(rows: list[Row], count: int, base: BaseModel) -> dict[str, Any]:
    """The report, in the form of `preparation.describe`."""
    return {
        "read": count,
        "kept": len(rows),
        "skipped": {"several people or no other picture": count - len(rows)},
        "people": len({row["identity"] for row in rows}),
        "paired_with_another_photo": len(rows),
        "paired_with_itself": 0,
        "settings": {
            "rendered": count,
            "resolution": base.resolution,
            "reference_resolution": base.resolution,
            "face_crop": CROP_ENLARGE,
        },
    }
