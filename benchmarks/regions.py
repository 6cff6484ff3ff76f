"""Several people at one layer: queries grouped by region against the dense mask of Eq. 7, same numbers."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from face_fusion_pipeline.evaluation.reports import markdown_table
from face_fusion_pipeline.face_layout import Regions, box_masks, even_boxes, group_queries, visible_people

from .measure import Setup, device_bytes
from .report import ratio


SIDE, HEADS, WIDTH, TEXT = 64, 8, 320, 77  # the finest layers of Stable Diffusion 1.5 at 512 px


@dataclass
class Layer:
    """Keys and values of one row of a batch: `(1, tokens, heads, d)`, the text's first, then each person's."""

    query: Tensor
    text: tuple[Tensor, Tensor]
    faces: list[tuple[Tensor, Tensor]]
    visible: Tensor  # bool (people, queries)
    regions: Regions

    @classmethod
    def create(cls, people: int, tokens: int, setup: Setup, side: int = SIDE) -> "Layer":
        """Random keys; `people` stand side by side."""
        generator = torch.Generator().manual_seed(0)

        def random(count: int) -> Tensor:
            drawn = torch.randn(1, count, HEADS, WIDTH // HEADS, generator=generator)
            return drawn.to(setup.device, getattr(torch, setup.dtype))

        visible = visible_people(box_masks(even_boxes(people, side, side), side, side))
        faces = [(random(tokens), random(tokens)) for _ in range(people)]
        regions = group_queries(visible).to(setup.device)
        return cls(random(side**2), (random(TEXT), random(TEXT)), faces, visible.to(setup.device), regions)

    def keys(self, people: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Keys and values of the text and of these people."""
        chosen = [self.text, *(self.faces[index] for index in people)]
        return torch.cat([key for key, _ in chosen], 1), torch.cat([value for _, value in chosen], 1)

    def grouped(self) -> Tensor:
        """What `FaceFusionAttnProcessor` does: each region attends to its own keys, without a mask."""
        parts = [attend(self.query[:, part.queries], *self.keys(part.people)) for part in self.regions.parts]
        return torch.cat(parts, 1)[:, self.regions.order]

    def dense(self) -> Tensor:
        """One mask of queries x keys, as Eq. 7 is written."""
        columns = [torch.ones(TEXT, self.query.shape[1], dtype=torch.bool, device=self.query.device)]
        columns += [row.expand(len(face[0][0]), -1) for row, face in zip(self.visible, self.faces, strict=True)]
        allowed = torch.cat(columns).T
        mask = torch.zeros(allowed.shape, dtype=self.query.dtype, device=allowed.device)
        mask = mask.masked_fill(~allowed, -torch.inf)
        return attend(self.query, *self.keys(tuple(range(len(self.faces)))), mask)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """`(1, queries, heads, d)`."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def measure_layer(layer: Layer, setup: Setup, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in alternation, after one round to warm up."""
    ways = {"grouped": layer.grouped, "dense": layer.dense}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, call in ways.items():
            setup.synchronize()
            start = time.perf_counter()
            call()
            setup.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def added_bytes(people: int, tokens: int, way: str, setup: Setup) -> float:
    """Peak memory that one call adds; meant for a process that does nothing else."""
    layer = Layer.create(people, tokens, setup)
    attend(layer.query[:, :64], *layer.text)  # the kernel's own libraries
    before = device_bytes(setup)
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    getattr(layer, way)()
    return device_bytes(setup, peak=True) - before


def region_row(people: int, tokens: int, times: dict[str, list[float]], memory: dict[str, float]) -> list[Any]:
    """A row of [`region_table`]."""
    medians = [statistics.median(times[way]) for way in ("grouped", "dense")]
    return [
        people,
        tokens,
        *(f"{1000 * median:.1f}" for median in medians),
        ratio([a / b for a, b in zip(times["dense"], times["grouped"], strict=True)]),
        *(f"{memory[way] / 2**20:.0f}" for way in ("grouped", "dense")),
    ]


def region_table(rows: list[list[Any]]) -> str:
    head = ["people", "tokens of each", "grouped, ms", "dense mask, ms", "dense over grouped"]
    return markdown_table([*head, "grouped, MiB added", "dense, MiB added"], rows)
