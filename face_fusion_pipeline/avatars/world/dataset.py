"""Avatar data sets on disk, in the Hugging Face ImageFolder form: `images/*.png` and `metadata.jsonl`."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from ...files.atomic import write_text
from ...files.texts import read_json
from .caption import caption
from .identity import SPLITS
from .render import Rendered, render
from .scene import Scene, sample_scene


PER_IDENTITY = 5  # single portraits of each person in a row
_CHUNK = 100  # pictures that one worker renders and writes at a time


def plan(split: str, index: int, per_identity: int, world: int | None = None) -> Scene:
    """Picture `index` of a split: which people, in which scene; a pure function of its arguments.

    Out of every ten pictures seven are single portraits, two show two people, one shows three. Single portraits walk
    through the split's identities, `per_identity` in a row for each, so that every person has several pictures.
    """
    seeds = SPLITS[split]
    rng = random.Random(f"plan {split} {index}")
    scene_seed = seeds.start * 10 + index
    tens, ones = divmod(index, 10)
    if ones < 7:
        people = [seeds[(tens * 7 + ones) // per_identity % len(seeds)]]
    else:
        people = rng.sample(seeds, 2 if ones < 9 else 3)
    return sample_scene(scene_seed, people, world)


def scene_records(scenes: list[Scene], rendered: Rendered) -> list[dict[str, Any]]:
    """The metadata of each picture, ready for JSON: caption, who, how, and where the faces are (pixels, XYXY)."""
    vectors = [torch.stack([p.identity.vector for p in scene.people]) for scene in scenes]
    dots = [points[..., :2] for points in rendered.landmarks72]
    numbers = (_rounded(found) for found in (vectors, rendered.boxes, rendered.landmarks5, rendered.landmarks68, dots))
    return [_record(scene, *found) for scene, *found in zip(scenes, *numbers, strict=True)]


class Drawn(NamedTuple):
    """A batch of pictures with all that is known of them."""

    pixels: torch.Tensor  # (B, 3, size, size) uint8
    rendered: Rendered
    records: list[dict[str, Any]]


def draw(scenes: Iterable[Scene], size: int, device: torch.device | str = "cpu") -> Iterator[Drawn]:
    """Any number of scenes, rendered in batches that suit the device."""
    scenes, at_once = iter(scenes), 512 if torch.device(device).type == "cuda" else 32
    while batch := list(islice(scenes, at_once)):
        rendered = render(batch, size, device)
        yield Drawn((rendered.images * 255).round().byte(), rendered, scene_records(batch, rendered))


def _rounded(found: list[torch.Tensor]) -> list[Any]:
    """To hundredths, as lists; in one piece, since each transfer from a GPU waits for it."""
    flat = (torch.cat(found).cpu() * 100).round().div(100).tolist()
    ends = list(accumulate(map(len, found)))
    return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _record(
    scene: Scene,
    vectors: list[Any],
    boxes: list[Any],
    landmarks5: list[Any],
    landmarks68: list[Any],
    landmarks72: list[Any],
) -> dict[str, Any]:
    people = scene.people
    return {
        "text": caption(scene),
        "seed": scene.seed,
        "people": len(people),
        "identities": [p.identity.seed for p in people],
        "identity_vectors": vectors,
        "expression": people[0].expression,
        "expressions": [p.expression for p in people],
        "clothing": people[0].clothing,
        "clothings": [p.clothing for p in people],
        "background": scene.background,
        "style": scene.style,
        "as_reference": scene.style == "photo",  # a drawing tells no colours
        "yaw": round(people[0].yaw, 2),
        "boxes": boxes,
        "landmarks5": landmarks5,
        "landmarks68": landmarks68,
        "landmarks72": landmarks72,
    }


def _write_chunk(task: tuple[str, str, int, int, int, int, bool]) -> int:
    folder, split, first, last, size, per_identity, depth = task
    torch.set_num_threads(1)
    target = Path(folder) / "parts" / f"{first:07d}.jsonl"
    rows: list[str] = []
    for drawn in draw((plan(split, index, per_identity) for index in range(first, last)), size):
        pixels, rendered = drawn.pixels.permute(0, 2, 3, 1).numpy(), drawn.rendered
        for k, record in enumerate(drawn.records):
            name = f"{first + len(rows):07d}.png"
            Image.fromarray(pixels[k]).save(Path(folder) / "images" / name, compress_level=3)
            row: dict[str, Any] = {"file_name": f"images/{name}", **record}
            if depth:
                metres = ((rendered.depth[k] + 2) / 4 * 65535).clamp(0, 65535).round().to(torch.int32).numpy()
                Image.fromarray(metres.astype("uint16")).save(Path(folder) / "depth" / name)
                labels = (rendered.masks[k].float() * torch.tensor((1.0, 2.0, 3.0)).view(3, 1, 1)).amax(0)
                Image.fromarray(labels.byte().numpy()).save(Path(folder) / "masks" / name)
                row |= {"depth_file_name": f"depth/{name}", "mask_file_name": f"masks/{name}"}
            rows.append(json.dumps(row))
    # The part file appears only when all its pictures are on disk: it is what resuming trusts.
    write_text(target, "\n".join(rows) + "\n")
    return last - first


def write(
    out: Path,
    split: str,
    count: int,
    size: int = 128,
    per_identity: int = PER_IDENTITY,
    workers: int = 1,
    depth: bool = False,
    progress: bool = True,
) -> int:
    """Write `count` pictures of a split to `out`; what an earlier run has finished is kept. Returns pictures written.

    With `depth`, also 16-bit depth maps (0 is the background plane at -2, 65535 is +2 image units towards the viewer)
    and instance label maps. Raises ValueError for an unknown split or for a folder of other settings.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    settings = {"split": split, "size": size, "per_identity": per_identity, "depth": depth}
    stamp = out / "settings.json"
    if stamp.exists() and (found := read_json(stamp, "choose another folder")) != settings:
        raise ValueError(f"{out} was begun with {found}, not {settings}: choose another folder")
    for name in ("images", "parts", *(("depth", "masks") if depth else ())):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_text(stamp, json.dumps(settings))
    tasks = [
        (str(out), split, first, min(first + _CHUNK, count), size, per_identity, depth)
        for first in range(0, count, _CHUNK)
        if not _finished(out / "parts" / f"{first:07d}.jsonl", min(_CHUNK, count - first))
    ]
    written = 0
    with tqdm(total=sum(t[3] - t[2] for t in tasks), unit="img", disable=not progress) as bar:
        for number in _run(tasks, workers):
            written += number
            bar.update(number)
    parts = (out / "parts" / f"{first:07d}.jsonl" for first in range(0, count, _CHUNK))
    write_text(out / "metadata.jsonl", "".join(part.read_text(encoding="utf-8") for part in parts))
    return written


def _finished(part: Path, rows: int) -> bool:
    return part.exists() and part.read_text(encoding="utf-8").count("\n") == rows


def _run(tasks: list[Any], workers: int) -> Iterator[int]:
    if workers <= 1:
        yield from map(_write_chunk, tasks)
        return
    # Spawned, not forked: a forked child of a process that has used torch's threads may hang.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(_write_chunk, tasks)
