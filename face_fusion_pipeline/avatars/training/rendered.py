"""Training data of rendered avatars, made where the model is: nothing passes through files of pictures.

The folder is one that `preparation` and `latent_cache` together would make, without its pictures. On a GPU a hundred
thousand examples take a minute or two; from a dataset on disk they would take hours.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Callable, Iterator
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...face_files import save_tensors
from ...face_images import CROP_ENLARGE, crop_face
from ...files.atomic import new_folder, write_text
from ...training.base_model import BaseModel
from ...training.latent_cache import COMPLETE, SHARD, cache_folders, caption_shard, encode_pictures, shard_path
from ...training.preparation import METADATA, REPORT, Row, has_partner, write_lines
from ...training.sources import Box, DataError
from ..world.dataset import PER_IDENTITY, draw, plan
from ..world.scene import Scene, sample_scene


PREFIX = "avatars:"
WINDOW = 1000  # scenes; 700 of them are all the portraits of 140 people, who also stand together in the other 300
# Rows, float16 latents (n, c, h, w) of their pictures, and of the face crop of each.
Encoded = tuple[list[Row], Tensor, Tensor]


def scene_count(source: str) -> int:
    """How many scenes `avatars:N` asks for. Raises [`DataError`] unless N is a positive number."""
    count = source.removeprefix(PREFIX)
    if not count.isdecimal() or int(count) < 1:
        raise DataError(f"{source}: give the number of scenes to render, such as {PREFIX}20000")
    return int(count)


def prepare_rendered(
    count: int,
    out: Path,
    base: BaseModel,
    progress: bool = True,
    workers: int = 1,
    load: Callable[[], BaseModel] | None = None,
) -> dict[str, Any]:
    """Render and encode `count` training scenes of the avatars, each as a target for one face; returns the report.

    Of several people in a picture one is the target, who alone is seen there, in their place (see `Pairs.batch`): so
    small faces are learned too, and that a face belongs to a place.

    Args:
        out: a new or empty folder.
        base: what is trained; its resolution is that of the pictures and of the face crops.
        workers: processes that render and encode; what they make does not depend on their number.
        load: makes `base` in each of them; can be pickled. Without it there are no workers.

    Raises:
        DataError: `out` holds something, or `count` scenes show nobody twice.
    """
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise DataError(f"{out} is not empty: rendered data are made in one go, name a new folder")
    with new_folder(out) as partial:
        rows = write_rendered(encoded_windows(windows(count), base, workers, load, progress), partial, base)
        if not rows:
            raise DataError(f"{PREFIX}{count} shows nobody twice, so nobody has a reference: render more scenes")
        report = describe_rendered(rows, count, base)
        write_lines(partial / METADATA, rows)
        cache = cache_folders(partial, base)
        for name, target in (("latents", cache.latents), ("conditions", cache.conditions)):
            write_text(partial / "encoding" / name / COMPLETE, json.dumps({"examples": len(rows)}) + "\n")
            target.parent.mkdir()
            (partial / "encoding" / name).rename(target)
        (partial / "encoding").rmdir()
        write_text(partial / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def write_rendered(encoded: Iterator[Encoded], folder: Path, base: BaseModel) -> list[Row]:
    """Write windows as shards, `folder/encoding/latents` and `folder/encoding/conditions`; returns their rows."""
    rows: list[Row] = []
    for found, latents, references in in_shards(encoded):
        first = {"first": str(len(rows)), "base": Path(base.name).name}
        number = len(rows) // SHARD
        one_each = torch.arange(len(found) + 1)
        pictures = {"latents": latents, "references": references, "reference_start": one_each}
        save_tensors(shard_path(folder / "encoding" / "latents", number), pictures, first)
        captions = caption_shard(base, [row["text"] for row in found])
        save_tensors(shard_path(folder / "encoding" / "conditions", number), captions, first)
        rows += found
    return rows


def windows(count: int) -> list[range]:
    """The first `count` training scenes by window."""
    return [range(start, min(start + WINDOW, count)) for start in range(0, count, WINDOW)]


def encoded_windows(
    ranges: list[range], base: BaseModel, workers: int, load: Callable[[], BaseModel] | None, progress: bool
) -> Iterator[Encoded]:
    """The windows of scenes one after another, encoded here or in processes of their own."""
    with tqdm(total=sum(map(len, ranges)), desc="rendering", unit="scene", disable=not progress) as bar:
        if workers <= 1 or len(ranges) <= 1 or load is None:
            for window in ranges:
                yield encoded_window(window, base)
                bar.update(len(window))
            return
        context = multiprocessing.get_context("spawn")  # a forked child cannot use the GPU
        with context.Pool(min(workers, len(ranges)), _start_worker, (load,)) as pool:
            for window, (rows, latents, faces) in zip(ranges, pool.imap(_in_worker, ranges), strict=True):
                yield rows, torch.from_numpy(latents), torch.from_numpy(faces)
                bar.update(len(window))


_base: BaseModel | None = None  # of a worker


def _start_worker(load: Callable[[], BaseModel]) -> None:
    global _base
    torch.set_num_threads(1)
    _base = load()


def _in_worker(window: range) -> tuple[list[Row], np.ndarray, np.ndarray]:
    assert _base is not None
    rows, latents, references = encoded_window(window, _base)
    return rows, latents.numpy(), references.numpy()  # tensors would pass through a file each


def encoded_window(window: range, base: BaseModel) -> Encoded:
    """The targets of the training scenes `window`, those of people of whom there is a reference among them."""
    examples = paired(targets(window, base.resolution, base.unet.device))
    if not examples:  # of the last few scenes, say
        return [], torch.empty(0), torch.empty(0)
    rows = [row for row, _ in examples]
    pixels = torch.stack([pixels for _, pixels in examples]).permute(0, 2, 3, 1).contiguous().cpu()
    images = [Image.fromarray(picture) for picture in pixels.numpy()]
    faces = [
        crop_face(image, detected(row), CROP_ENLARGE, image.width) for image, row in zip(images, rows, strict=True)
    ]
    return rows, encode_pictures(base, images), encode_pictures(base, faces)


def scenes(window: range, world: int | None = None) -> Iterator[Scene]:
    """Training scenes; those of several people with people of whom the same window has portraits."""
    planned = [plan("train", index, PER_IDENTITY, world) for index in window]
    known = sorted({scene.people[0].identity.seed for scene in planned if len(scene.people) == 1})
    for scene in planned:
        together = min(len(scene.people), len(known))
        if together > 1:
            yield sample_scene(scene.seed, random.Random(f"together {scene.seed}").sample(known, together), world)
        elif len(scene.people) == 1:
            yield scene


def targets(window: range, size: int, device: torch.device) -> list[tuple[Row, Tensor]]:
    """Row and pixels, uint8 (3, size, size), of each of the scenes, as a target for one of its people."""
    drawings = draw(scenes(window), size, device)
    return [example for drawn in drawings for example in zip(map(row_of, drawn.records), drawn.pixels, strict=True)]


def row_of(record: dict[str, Any]) -> Row:
    who = random.Random(f"target {record['seed']}").randrange(record["people"])
    return {
        "text": record["text"],
        "identity": record["identities"][who],
        "own_reference": False,
        "as_reference": record["as_reference"] and record["people"] == 1,
        "box": record["boxes"][who],
        "others": [box for index, box in enumerate(record["boxes"]) if index != who],
        "landmarks5": record["landmarks5"][who],
        "source": f"{PREFIX}{record['seed']}",  # a training scene's number is its seed
    }


def paired(examples: list[tuple[Row, Tensor]]) -> list[tuple[Row, Tensor]]:
    """Those of people of whom there is another picture that may be the reference; a person's come in a row."""
    together = sorted(examples, key=lambda example: (example[0]["identity"], len(example[0]["others"])))
    return list(compress(together, has_partner([row for row, _ in together])))


def in_shards(parts: Iterator[Encoded]) -> Iterator[Encoded]:
    """As many examples as a shard holds, the last time what is left."""
    rows: list[Row] = []
    latents, references = torch.empty(0), torch.empty(0)
    for more, *tensors in parts:
        if not more:
            continue
        rows = rows + more
        latents, references = (
            torch.cat([old, new]) if len(old) else new for old, new in zip((latents, references), tensors, strict=True)
        )
        while len(rows) >= SHARD:
            yield rows[:SHARD], latents[:SHARD], references[:SHARD]
            rows, latents, references = rows[SHARD:], latents[SHARD:], references[SHARD:]
    if rows:
        yield rows, latents, references


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
        "skipped": {"no other picture of the person": count - len(rows)},
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
