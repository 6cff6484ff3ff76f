"""Which drawn pictures become examples: those of one person in two poses, as far as that can be told."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ..face_images import CROP_ENLARGE
from .base_model import BaseModel
from .generated import FIRST, Cast, Checks, rows_path, tensors_path
from .generated_pictures import Drawing
from .loop import digest
from .model_card import public_name
from .preparation import METADATA, SKIPPED, Row, has_partner, read_lines, write_lines
from .same_person import is_copy, standardised, threshold, unit
from .sources import DataError


OF_PARTS = ("person", "picture", "small_face")  # what rows of parts say and examples do not
ASIDE, MOST_ASIDE = 20, 32  # one of so many people is set aside to compare rounds, at most so many
OTHER, COPY, ALONE, HELD = (
    "not the same person",
    "copy of another picture",
    "no other picture of the person",
    "set aside to compare rounds",
)


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a folder of drawn people holds.

    Attributes:
        model: folder, file or Hub id that draws.
        false_matches: share of pairs of unrelated people that would pass for one person.
        adapter: weights that draw further pictures, file, folder or Hub id; None: without training.
        round, rounds: which of how many; with several some people are set aside to compare them.
    """

    model: str
    cast: Cast
    drawing: Drawing
    checks: Checks
    false_matches: float = 0.05
    adapter: str | None = None
    round: int = 1
    rounds: int = 1

    def settings(self, base: BaseModel, unet: str) -> dict[str, Any]:
        """What stays from the first to the last piece; `unet` is a digest of the weights that draw."""
        chosen, weights = self.checks.selection, base.pipeline._face_adapter
        return {
            "drawn_by": public_name(self.model),
            "unet": unet,
            "drawn_people": self.cast.count,
            "pictures_each": self.cast.pictures,
            "prompts": self.cast.grammar.source,
            "seed": self.cast.seed,
            "steps": self.drawing.steps,
            "guidance": self.drawing.guidance,
            "low_noise_guidance": self.drawing.low_noise_guidance,
            "mode": "training-free" if weights is None else "both",
            "drawn_with": None if weights is None else digest(weights.state_dict()),
            "round": self.round,
            "rounds": self.rounds,
            "embedder": None if self.checks.embed is None else self.checks.embed.name,
            "false_matches": self.false_matches,
            "detector": self.checks.detector,
            "resolution": chosen.resolution,
            "reference_resolution": chosen.reference_resolution,
            "min_face": self.checks.least_face,
            "min_sharpness": chosen.min_sharpness,
            "face_crop": CROP_ENLARGE,
        }


@dataclass
class Pair:
    """A further picture beside the first one of its person, by their rows."""

    row: Row
    first: Row
    similarity: float


def compare(out: Path, plan: Plan) -> tuple[list[Row], list[Pair], np.ndarray]:
    """All rows in order, the pairs among them, and the similarities of unrelated people who are called the same."""
    count = len(plan.cast.pieces())
    rows = [read_lines(rows_path(out, number))[1:] for number in range(count)]
    features = [load_file(tensors_path(out, number))["features"] for number in range(count)]
    pictures = [[row for row in piece if "reason" not in row] for piece in rows]
    wide = max((part.shape[-1] for part in features if part.ndim == 2), default=0)
    features = [part if part.ndim == 2 else torch.empty(0, wide) for part in features]
    units = standardised(features) if plan.checks.embed is None else [unit(part) for part in features]
    pairs: list[Pair] = []
    unrelated: list[np.ndarray] = [np.empty(0)]
    for piece, part in zip(pictures, units, strict=True):
        firsts = [at for at, row in enumerate(piece) if row["picture"] == FIRST]
        others = [at for at, row in enumerate(piece) if row["picture"] != FIRST]
        if not firsts or not others:
            continue
        alike = (part[others] @ part[firsts].T).numpy()
        whose, who = (np.array([piece[at]["person"] for at in found]) for found in (others, firsts))
        called = {person: plan.cast.group(int(person)) for person in who}
        same = np.array([[called[a] == called[b] for b in who] for a in whose])
        unrelated.append(alike[same & (whose[:, None] != who)])
        place = {person: column for column, person in enumerate(who)}
        pairs += [
            Pair(piece[at], piece[firsts[place[person]]], float(alike[number, place[person]]))
            for number, (at, person) in enumerate(zip(others, whose, strict=True))
        ]
    return [row for piece in rows for row in piece], pairs, np.concatenate(unrelated)


def merge(out: Path, plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """Choose among what was drawn, write `metadata.jsonl` and `skipped.jsonl`; returns the report.

    Raises:
        DataError: too few people can be compared, or nobody is left.
    """
    rows, pairs, unrelated = compare(out, plan)
    if not len(unrelated):
        raise DataError(
            f"of {plan.cast.count} people too few can be compared to tell who is the same: draw more, or see why "
            f"pictures were skipped in {out / 'parts'}"
        )
    least, aside = threshold(unrelated, plan.false_matches), set_aside(plan)
    reasons = {row["source"]: (row["reason"], row["message"]) for row in rows if "reason" in row}
    kept_of: dict[int, list[Row]] = {}
    for pair in pairs:
        others = kept_of.setdefault(pair.row["person"], [pair.first])
        if (reason := why_no_pair(pair, others, least)) is None:
            others.append(pair.row)
        else:
            reasons[pair.row["source"]] = reason
    paired = {pair.row["person"] for pair in pairs if pair.row["source"] not in reasons}
    similarity = describe_similarity(pairs, reasons, unrelated, least, aside)
    for row in rows:
        if row["person"] in aside:
            reasons.setdefault(row["source"], (HELD, "nobody is trained on who tells how good the weights are"))
        elif row["person"] not in paired:
            reasons.setdefault(row["source"], (ALONE, "of all further pictures none can be used"))
    skipped = [
        {"source": row["source"], "reason": reason[0], "message": reason[1]}
        for row in rows
        if (reason := reasons.get(row["source"])) is not None
    ]
    kept = [
        {key: value for key, value in row.items() if key not in OF_PARTS}
        for row in rows
        if row["source"] not in reasons
    ]
    write_lines(out / SKIPPED, skipped)
    report = describe_drawn(kept, skipped, settings, similarity)
    if not kept:
        why = ", ".join(f"{reason}: {number}" for reason, number in report["skipped"].items())
        raise DataError(f"none of {len(rows)} pictures can be used ({why}): see {out / SKIPPED}")
    write_lines(out / METADATA, kept)
    return report


def why_no_pair(pair: Pair, others: list[Row], least: float) -> tuple[str, str] | None:
    """Reason and sentence why a further picture does not go with `others` of its person; None: it does."""
    if pair.similarity < least:
        return OTHER, f"similarity {pair.similarity:.3f}, below {least:.3f}"
    one = pair.row
    for other in others:
        if is_copy((one["small_face"], other["small_face"]), (one["landmarks5"], other["landmarks5"])):
            return COPY, f"{other['source']} has the same pose and expression"
    return None


def describe_similarity(
    pairs: list[Pair], reasons: dict[str, tuple[str, str]], unrelated: np.ndarray, least: float, aside: set[int]
) -> dict[str, float | None]:
    """Means over pairs: unrelated ones, all that were drawn, those kept, and those of people set aside.

    `above` is the share of drawn pairs at or above the threshold. Copies count in none but `drawn` and `above`.
    """
    no_copies = [pair for pair in pairs if reasons.get(pair.row["source"], ("",))[0] != COPY]
    return {
        "threshold": least,
        "unrelated": mean(unrelated.tolist()),
        "drawn": mean([pair.similarity for pair in pairs]),
        "kept": mean([pair.similarity for pair in no_copies if pair.row["source"] not in reasons]),
        "above": mean([float(pair.similarity >= least) for pair in pairs]),
        "held_out": mean([pair.similarity for pair in no_copies if pair.row["person"] in aside]),
    }


def mean(values: list[float]) -> float | None:
    """To four places: further ones differ with the number of threads."""
    return round(float(np.mean(values)), 4) if values else None


def set_aside(plan: Plan) -> set[int]:
    """Numbers of the people who tell how good each round is."""
    if plan.rounds == 1:
        return set()
    return set(range(min(plan.cast.count // ASIDE, MOST_ASIDE) or 1))


def describe_drawn(
    kept: list[Row], skipped: list[Row], settings: dict[str, Any], similarity: dict[str, float | None]
) -> dict[str, Any]:
    """The report, in the form of `preparation.describe`."""
    paired = sum(has_partner(kept))
    return {
        "read": len(kept) + len(skipped),
        "kept": len(kept),
        "skipped": dict(Counter(row["reason"] for row in skipped).most_common()),
        "people": len({row["identity"] for row in kept}),
        "paired_with_another_photo": paired,
        "paired_with_itself": len(kept) - paired,
        "similarity": similarity,
        "settings": settings,
    }
