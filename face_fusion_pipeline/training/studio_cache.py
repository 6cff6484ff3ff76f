"""Embeddings of a prepared folder for FaceStudio, computed once: of every picture, with and without its face, and of
every face crop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..face_style import picture_embeddings, unit_length, without_faces
from .base_model import BaseModel
from .example_pictures import decoded, in_batches, read_target
from .latent_cache import Cache, Column, Shards, digest_of, open_shards, write_shards
from .loop import digest
from .preparation import data_key, read_rows


class Embeddings:
    """Random access to the embeddings of all examples, of length 1, in the order of the folder's rows."""

    def __init__(self, folder: Path, count: int) -> None:
        files = open_shards(folder, count)
        self._columns = {name: Column(files, name, in_memory=True) for name in ("whole", "covered", "faces")}

    def whole(self, examples: Sequence[int]) -> Tensor:
        """(B, image width) of pictures as they are."""
        return unit_length(self._columns["whole"].take(examples))

    def covered(self, examples: Sequence[int]) -> Tensor:
        """(B, image width) of pictures whose faces are covered."""
        return unit_length(self._columns["covered"].take(examples))

    def faces(self, references: Sequence[int]) -> Tensor:
        """(B, face width) of face crops, counted as `Shards.references` counts them."""
        return unit_length(self._columns["faces"].take(references))


def encode_embeddings(
    folder: Path,
    base: BaseModel,
    cache: Cache,
    encoder: Any,
    embedder: Any,
    *,
    mask: float,
    processor: Any = None,
    progress: bool = True,
) -> Path:
    """Compute what is missing of the embeddings of a prepared folder; returns the folder of the shards.

    Args:
        cache: what `latent_cache.encode` returned.
        encoder, processor: CLIP's vision tower, see `face_style.picture_embeddings`.
        embedder: of face crops, see `face_embedders`.
        mask: how much of a face is covered, see `face_style.without_faces`.
    """
    rows = read_rows(folder)
    shards = Shards(cache, len(rows))
    described = [digest(encoder.state_dict()), embedder.name, mask, data_key(folder), cache.latents.name]
    target = folder / "studio" / digest_of(described)

    def shard(members: range) -> dict[str, Tensor]:
        pictures = [read_target(folder, base, shards, rows, index) for index in members]
        boxes = [[tuple(rows[index]["box"]), *map(tuple, rows[index].get("others", ()))] for index in members]
        covered = [without_faces(picture, found, mask) for picture, found in zip(pictures, boxes, strict=True)]
        chosen = [(index, number) for index in members for number in range(shards.reference_count(index))]
        crops = decoded(base, shards.references(chosen).float())
        return {
            "whole": in_batches(pictures, lambda part: picture_embeddings(encoder, part, processor)),
            "covered": in_batches(covered, lambda part: picture_embeddings(encoder, part, processor)),
            "faces": in_batches(crops, lambda part: embedder(part).float()),
        }

    write_shards(target, shard, {"examples": len(rows), "base": Path(base.name).name}, "embeddings", progress)
    return target
