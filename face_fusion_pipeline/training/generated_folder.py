"""A prepared folder of drawn people: pieces drawn by all processes, pairs chosen, latents and text states cached."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ..face_files import save_tensors
from ..files.atomic import write_text
from .base_model import BaseModel
from .generated import PieceDrawer, key_of, tensors_path
from .generated_pairs import Plan, merge
from .generated_pictures import Artist
from .latent_cache import (
    AUGMENTATIONS,
    COMPLETE,
    SHARD,
    cache_folders,
    caption_shard,
    encode_pictures,
    is_stored,
    reference_pictures,
    shard_path,
)
from .loop import digest, process_group
from .preparation import METADATA, REPORT, has_partner, is_prepared, read_lines, read_report, stamp


def prepare_generated(
    out: Path, load: Callable[[], BaseModel], plan: Plan, earlier: Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """Draw people and make a prepared folder of them; returns the report. All processes of a group call it.

    What an earlier run with the same plan has finished is kept.

    Args:
        load: loads the base on the device of this process, in float32.
        earlier: folder of another round of the same people, whose first pictures are taken as they are.

    Raises:
        DataError: `out` was begun with something else, nobody can be used, or memory is short.
    """
    group = process_group()
    base = load()
    drawn_with = digest(base.unet.state_dict())
    on_gpu = base.device.type == "cuda"
    if on_gpu:
        base.cast(torch.float16)
    artist = Artist(base, plan.drawing, plan.adapter)
    settings = plan.settings(base, drawn_with)
    with group.main_process_first():
        stamp(out / "settings.json", settings)
    if is_prepared(out):
        return read_report(out)
    for name in ("images", "faces", "parts"):
        (out / name).mkdir(parents=True, exist_ok=True)
    drawer = PieceDrawer(artist, plan.cast, plan.checks, out, key_of(settings), earlier)
    pieces = list(enumerate(plan.cast.pieces()))[group.process_index :: group.num_processes]
    with tqdm(
        total=sum(len(people) for _, people in pieces), desc="drawing", unit="person", disable=not progress
    ) as bar:
        for number, people in pieces:
            drawer.draw(number, people, bar)
    group.wait_for_everyone()
    report = merge(out, plan, settings) if group.is_main_process else {}
    group.wait_for_everyone()
    if on_gpu:  # caches are of the weights as they are trained with
        del artist, drawer, base
        base = load()
    encode_drawn(out, base, progress)
    if group.is_main_process:
        write_text(out / REPORT, json.dumps(report, indent=2) + "\n")
    group.wait_for_everyone()
    return read_report(out)


# --- ------------------------------------------------------------------------------------------------------


def encode_drawn(folder: Path, base: BaseModel, progress: bool = True) -> None:
    """Write latents as they were drawn, those of the face crops, and text states; processes share the shards."""
    rows, group = read_lines(folder / METADATA), process_group()
    copies = [0 if partnered else AUGMENTATIONS for partnered in has_partner(rows)]
    places = where_latents_are(folder)

    @lru_cache(maxsize=4)
    def piece(number: int) -> Tensor:
        return load_file(tensors_path(folder, number))["latents"]

    def pictures(members: range) -> dict[str, Tensor]:
        with ThreadPoolExecutor() as pool:
            crops = list(pool.map(lambda i: reference_pictures(folder, rows[i], i, copies[i]), members))
        found = [places[rows[index]["source"]] for index in members]
        return {
            "latents": torch.stack([piece(number)[at] for number, at in found]),
            "references": encode_pictures(base, [crop for some in crops for crop in some]),
            "reference_start": torch.tensor([0, *map(len, crops)]).cumsum(0),
        }

    def captions(members: range) -> dict[str, Tensor]:
        return caption_shard(base, [rows[index]["text"] for index in members])

    cache, named = cache_folders(folder, base), Path(base.name).name
    starts = list(range(0, len(rows), SHARD))[group.process_index :: group.num_processes]
    for start in tqdm(starts, desc="encoding", unit="shard", disable=not progress):
        for target, shard in ((cache.latents, pictures), (cache.conditions, captions)):
            path = shard_path(target, start // SHARD)
            if not is_stored(path, first=str(start)):
                tensors = shard(range(start, min(start + SHARD, len(rows))))
                save_tensors(path, tensors, {"first": str(start), "base": named})
    group.wait_for_everyone()
    if group.is_main_process:
        for target in (cache.latents, cache.conditions):
            write_text(target / COMPLETE, json.dumps({"examples": len(rows), "base": named}) + "\n")


def where_latents_are(folder: Path) -> dict[str, tuple[int, int]]:
    """Source of each picture -> its piece, and its row in the tensors of that."""
    places: dict[str, tuple[int, int]] = {}
    for number, path in enumerate(sorted((folder / "parts").glob("*.jsonl"))):
        pictures = (row for row in read_lines(path)[1:] if "reason" not in row)
        places |= {row["source"]: (number, at) for at, row in enumerate(pictures)}
    return places
