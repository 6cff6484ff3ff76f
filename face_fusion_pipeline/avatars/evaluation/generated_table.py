"""What weights learn from people whom the base drew itself, beside what they learn from as many true renders.

Two trainings from the same start, of as many steps: one learns from a folder of `face-fusion prepare generated:N`,
without one render, the other from renders of the avatar world. Both are measured on people and prompts of the test
split, beside the base without a face and its training-free mode.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...evaluation.generation import Settings, hash_weights, pipeline_of
from ...evaluation.reports import markdown_table, write_report
from ...face_adapter import ADAPTER_WEIGHTS_NAME, create_adapter
from ...training.base_model import BaseModel
from ...training.latent_cache import cache_folders, encode
from ...training.loop import LoopOptions, train
from ...training.pairs import Pairs, split_people
from ...training.preparation import is_prepared, read_report, read_rows
from ...training.task import FaceFusionTask
from ..ablations.training import LOSS
from ..training.rendered import prepare_rendered
from .avatar_table import as_markdown, compare
from .scoring import Panel
from .trials import Trial


SCENES = 3  # that are rendered for an example; those of several people and of a single render are left out
BASE, GENERATED, RENDERED = "the base", "generated people", "renders"


@dataclass(frozen=True)
class Schooling:
    """The training, the same for both."""

    steps: int
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    seed: int = 0
    precision: str = "no"

    @property
    def loop(self) -> LoopOptions:
        return LoopOptions(
            batch_size=self.batch_size,
            lr=self.learning_rate,
            steps=self.steps,
            warmup=min(100, self.steps // 10),
            ema_decay=0.99,
            seed=self.seed,
            precision=self.precision,
            sample_minutes=1e9,
        )


def compare_generated(
    base: BaseModel, data: Path, trials: list[Trial], panel: Panel, settings: Settings, schooling: Schooling, out: Path
) -> dict[str, Any]:
    """Train, draw, score; writes the tables of both weights, and `generated.json` and `.md`; returns the result.

    Args:
        data: a folder of `face-fusion prepare generated:N`; as many renders are made for the other weights.
    """
    encode(data, base)
    drawn = singles(read_rows(data), None)
    count = sum(map(len, drawn))
    rendered = out / "rendered"
    if not is_prepared(rendered):
        prepare_rendered(SCENES * count, rendered, base)
    folders = {
        GENERATED: train_on(base, data, drawn, schooling, out / "weights-generated"),
        RENDERED: train_on(base, rendered, singles(read_rows(rendered), count), schooling, out / "weights-rendered"),
    }
    tables: dict[str, dict[str, Any]] = {}
    for name, folder, methods in (
        (BASE, None, ["none", "training-free"]),
        *((name, str(folder), ["adapter", "both"]) for name, folder in folders.items()),
    ):
        own = replace(settings, adapter=folder, weights_hash=hash_weights(settings.model, folder))
        table = compare(pipeline_of(own), trials, methods, panel, own, out / name.replace(" ", "-"))
        tables[name] = {"text": as_markdown(table, panel.names), "methods": table["methods"]}
    result = {"examples": count, "schooling": asdict(schooling), "report": read_report(data), "tables": tables}
    write_report(out, "generated", result, table_of(result, panel.names))
    return result


def singles(rows: list[dict[str, Any]], count: int | None) -> list[list[int]]:
    """Examples by person of those alone in their picture and with another one to go with; the first `count` of all."""
    people, _ = split_people([row | {"others": row.get("others", [])} for row in rows], 0, seed=0)
    alone = [[index for index in members if not rows[index].get("others")] for members in people]
    found, left = [], count if count is not None else len(rows)
    for members in alone:
        if (members := members[:left]) and len(members) > 1:
            found.append(members)
            left -= len(members)
    return found


def train_on(base: BaseModel, data: Path, people: list[list[int]], schooling: Schooling, out: Path) -> Path:
    """Weights that learned from these examples, trained now or before."""
    if not (out / ADAPTER_WEIGHTS_NAME).is_file():
        torch.manual_seed(schooling.seed)
        settings = read_report(data)["settings"]
        about = {"resolution": settings["reference_resolution"], "face_crop": settings["face_crop"]}
        adapter = create_adapter(base.unet, metadata={**about, "token_count_bias": True})
        pairs = Pairs(data, cache_folders(data, base), people)
        train(FaceFusionTask(base, adapter, pairs, None, replace(LOSS, keep_references=True)), schooling.loop, out)
    return out


def table_of(result: dict[str, Any], recognisers: list[str]) -> str:
    """One table of all."""
    rows: list[list[Any]] = []
    for name, table in result["tables"].items():
        for method, figures in table["methods"].items():
            if method in ("true render", "somebody else") and name != BASE:
                continue
            similar = [f"{figures['similarity'][r]['mean']:.3f}" for r in recognisers]
            normalised = [f"{100 * figures['similarity'][r]['normalised']:.0f} %" for r in recognisers]
            traits = figures["traits"]["normalised"]["mean"] if "traits" in figures else None
            rows.append([f"{name}: {method}", *(x for pair in zip(similar, normalised, strict=True) for x in pair),
                         None if traits is None else f"{100 * traits:.0f} %",
                         f"{100 * figures['obedience']['mean']:.0f} %"])  # fmt: skip
    header = [
        "weights from: method",
        *(x for r in recognisers for x in (f"{r} ↑", "normalised ↑")),
        "traits ↑",
        "obedience ↑",
    ]
    report = result["report"]
    settings = report["settings"]
    return (
        markdown_table(header, rows)
        + f"\nWeights of {result['schooling']['steps']} steps of {result['schooling']['batch_size']} on "
        f"{result['examples']} examples each, the base frozen. Generated: {report['people']} of "
        f"{settings['drawn_people']} people, drawn in {settings['steps']} steps, {settings['mode']}. The reference is "
        "a render of a held-out person, as is what likeness is measured against.\n"
    )
