"""What FaceSnap's training sees of a prepared folder, computed once: the facial points of every picture, and of every
face crop its embedding and its patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..face_errors import LandmarksError, NoFaceError, SeveralFacesError
from ..face_landmarks import POINTS
from ..face_models import FaceModel, recombined
from ..face_style import in_oval, picture_patches, unit_length
from .base_model import BaseModel
from .example_pictures import decoded, in_batches, read_target
from .latent_cache import Cache, Column, Shards, digest_of, open_shards, write_shards
from .loop import digest
from .preparation import data_key, read_rows
from .sources import DataError


class SnapFeatures:
    """Random access to the features of all examples, in the order of the folder's rows.

    Raises:
        DataError: no face could be fitted, so there is nothing to learn of points.
    """

    def __init__(self, folder: Path, count: int) -> None:
        files = open_shards(folder, count)
        small = {"points": True, "faces": True, "patches": False}
        self._columns = {name: Column(files, name, in_memory) for name, in_memory in small.items()}
        self.count = count
        self.fitted = int(self.points(range(count)).isfinite().all(-1).all(-1).sum())
        if not self.fitted:
            raise DataError(f"{folder}: the face model could fit no face; name another with --face-model")

    def points(self, examples: Sequence[int]) -> Tensor:
        """(B, 72, 2) in pixels of the pictures; NaN where the face could not be fitted."""
        return self._columns["points"].take(examples)

    def faces(self, references: Sequence[int]) -> Tensor:
        """(B, face width) of face crops, of length 1, counted as `Shards.references` counts them."""
        return unit_length(self._columns["faces"].take(references))

    def patches(self, references: Sequence[int]) -> Tensor:
        """(B, P, image width) of face crops."""
        return self._columns["patches"].take(references).float()


def encode_snap_features(
    folder: Path,
    base: BaseModel,
    cache: Cache,
    encoder: Any,
    embedder: Any,
    face_model: FaceModel,
    *,
    model_name: str,
    oval: float,
    processor: Any = None,
    progress: bool = True,
) -> Path:
    """Compute what is missing of the features of a prepared folder; returns the folder of the shards.

    Args:
        cache: what `latent_cache.encode` returned.
        encoder, processor: CLIP's vision tower, see `face_style.picture_patches`.
        embedder: of face crops, see `face_embedders`.
        face_model, model_name: what finds the points, and what to remember it by.
        oval: how much of a crop is seen, see `face_style.in_oval`.
    """
    rows = read_rows(folder)
    shards = Shards(cache, len(rows))
    described = [digest(encoder.state_dict()), embedder.name, model_name, oval, data_key(folder), cache.latents.name]
    target = folder / "snap" / digest_of(described)

    def patches(crops: Sequence[Any]) -> Tensor:
        return picture_patches(encoder, [in_oval(crop, oval) for crop in crops], processor).half()

    def shard(members: range) -> dict[str, Tensor]:
        points = [
            points_of(face_model, read_target(folder, base, shards, rows, index), tuple(rows[index]["box"]))
            for index in members
        ]
        chosen = [(index, number) for index in members for number in range(shards.reference_count(index))]
        crops = decoded(base, shards.references(chosen).float())
        return {
            "points": torch.stack(points),
            "faces": in_batches(crops, lambda part: embedder(part).float()),
            "patches": in_batches(crops, patches),
        }

    write_shards(target, shard, {"examples": len(rows), "base": Path(base.name).name}, "features", progress)
    return target


def points_of(model: FaceModel, picture: Any, box: Any) -> Tensor:
    """The points (72, 2) of a face by its own shape, expression and pose; NaN for one that cannot be fitted."""
    try:
        fit = model.fit(picture, box)
    except (LandmarksError, NoFaceError, SeveralFacesError):
        return torch.full((POINTS, 2), torch.nan)
    return torch.from_numpy(np.asarray(recombined(model, fit, fit))[:, :2]).float()
