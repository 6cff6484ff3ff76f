"""Which photo is the reference of which: targets and references of training and validation, as batches of latents."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from .latent_cache import Cache, Shards
from .preparation import Row, data_key, has_partner, may_be_reference, read_rows
from .sources import DataError


MAX_VALIDATION_PEOPLE = 32
Batch = dict[str, Tensor]
Reference = tuple[int, int]  # an example, and which of the crops made for it


class Pairs:
    """Examples that serve as targets, each with the references that may go with it.

    References of a target are the face crops of the person's other photos; where there is none, or the source named
    one, those made for the target itself (see `latent_cache`).

    Args:
        folder: the prepared folder.
        cache: what `latent_cache.encode` returned.
        people: only these, see [`split_people`].
        same_photo: the only reference of a target is its own face crop, to measure what such pairs teach.
    """

    def __init__(self, folder: Path, cache: Cache, people: list[list[int]], *, same_photo: bool = False) -> None:
        self.rows, self.people = read_rows(folder), people
        self.key = data_key(folder)
        self.shards = Shards(cache, len(self.rows))
        self.company = max(len(row.get("others", ())) for row in self.rows)
        self.targets = sorted(index for members in people for index in members)
        self.references: dict[int, list[Reference]] = {}
        partnered = has_partner(self.rows)
        for members in people:
            for index in members:
                others = [(other, 0) for other in members if other != index and may_be_reference(self.rows[other])]
                if self.rows[index]["own_reference"] or not (partnered[index] and others):
                    count = self.shards.reference_count(index)
                    others = [(index, number) for number in range(min(1, count - 1), count)]
                self.references[index] = [(index, 0)] if same_photo else others

    def __len__(self) -> int:
        return len(self.targets)

    def choose(self, rows: Tensor, draws: Tensor) -> list[Reference]:
        """A reference for each of the targets `rows` (B,), by `draws` (B,) in [0, 1)."""
        candidates = [self.references[self.targets[row]] for row in rows.tolist()]
        return [found[int(draw * len(found))] for found, draw in zip(candidates, draws.tolist(), strict=True)]

    def all_references(self) -> list[Reference]:
        """Every reference that [`choose`] may give, once, in a fixed order."""
        return sorted({reference for found in self.references.values() for reference in found})

    def reference_latents(self, references: list[Reference]) -> Tensor:
        """float32 (B, c, r, r)."""
        return self.shards.references(references).float()

    def batch(self, rows: Tensor) -> Batch:
        """Of the targets `rows` (B,): `latents`, conditions, `boxes` (B, 4) and `landmarks5` (B, 5, 2) in pixels.

        `others` (B, n, 4) are the boxes of up to n other people in the picture, NaN where there are fewer.
        """
        indices = [self.targets[row] for row in rows.tolist()]
        others = torch.full((len(indices), self.company, 4), torch.nan)
        for row, index in enumerate(indices):
            if boxes := self.rows[index].get("others"):
                others[row, : len(boxes)] = torch.tensor(boxes)
        return {
            "latents": self.shards.latents(indices).float(),
            "others": others,
            "boxes": torch.tensor([self.rows[index]["box"] for index in indices], dtype=torch.float32),
            "landmarks5": torch.tensor([self.rows[index]["landmarks5"] for index in indices], dtype=torch.float32),
            **{key: found.float() for key, found in self.shards.conditions(indices).items()},
        }

    def caption(self, row: int) -> str:
        return self.rows[self.targets[row]]["text"]


def split_people(rows: list[Row], validation: int | None, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Examples by person, of training and of validation, which share nobody.

    Args:
        validation: number of people set aside; None: of four or more one in twenty, at least 2 and at most 32.
            Somebody without a name is somebody else in every photo.

    Raises:
        DataError: nobody would be left to train on.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        identity = row["identity"]
        members[f"photo {index}" if identity is None else f"person {identity}"].append(index)
    few = 2 if len(members) >= 4 else 0
    count = min(max(len(members) // 20, few), MAX_VALIDATION_PEOPLE) if validation is None else validation
    if not 0 <= count < len(members):
        raise DataError(f"{count} people for validation leave none of {len(members)} to train on")
    aside = set(random.Random(f"validation {seed}").sample(sorted(members), count))
    return (
        [found for name, found in members.items() if name not in aside],
        [found for name, found in members.items() if name in aside],
    )
