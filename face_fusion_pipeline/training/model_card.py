"""The model card of trained weights: what they are, how to use them, and all that is needed to train them again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.atomic import write_text
from ..files.texts import read_log
from ..generation.provenance import public_name
from ..publishing.card import render_card, with_picture_of_training
from .preparation import data_key, read_report
from .run_records import RECORD, add_record
from .task import FaceFusionTask
from .token_cards import CARDS


SAMPLES = "sample_*.png"  # in the folder of logs
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    out: Path, model: str, data: Path, task: FaceFusionTask, record: dict[str, Any], command: Sequence[str]
) -> None:
    """Write `out/README.md`, and into `out/training.json` what only this task knows.

    Args:
        model: the base as it was given, a folder or Hub id.
        data: the prepared folder.
        record: what `training.loop.train` returned.
        command: the words of the command line.
    """
    report = read_report(data)
    report["sha256"] = data_key(data)
    record = {
        **record,
        "base": public_name(model),
        "pipeline": type(task.base.pipeline).__name__,
        "learned": task.settings,
        "adapter": task.adapter.metadata.to_strings(),
        "data": report,
        "command": shlex.join(map(public_name, command)),
    }
    add_record(out / RECORD, task.name, record)
    logs = out / "logs" / task.name
    text = card(record, last_validation(logs / "metrics.jsonl"))
    if drawn := sorted(logs.glob(SAMPLES)):
        text = with_picture_of_training(text, drawn[-1].relative_to(out))
    write_text(out / "README.md", text)


def last_validation(metrics: Path) -> dict[str, float]:
    """The last validation losses of a run, by kind of face; empty if there were none."""
    found = [row for row in read_log(metrics) if "validation_loss_right_face" in row]
    return {key: value for key, value in found[-1].items() if key.startswith("validation")} if found else {}


def card(record: dict[str, Any], validation: dict[str, float]) -> str:
    """The text of the card."""
    options, data, adapter, base = record["options"], record["data"], record["adapter"], record["base"]
    other = CARDS.get(adapter["format"])
    trained = other.trained if other else "`to_k_face`, `to_v_face` of all cross-attentions"
    described = other.described(adapter) if other else options_of(adapter)
    skipped = ", ".join(f"{reason} {number}" for reason, number in data["skipped"].items()) or "none"
    rows = {
        "base": f"{base} (`{adapter['base_family']}`, {described})",
        "trained": f"{record['trained_parameters']:,} parameters: {trained}",
        **drawn_people(data),
        "photos": f"{data['kept']} of {data['read']}, of {data['people']} people; skipped: {skipped}",
        "pairs": f"{data['paired_with_another_photo']} with another photo of the same person, "
        f"{data['paired_with_itself']} with an altered crop of the same photo",
        "data": f"`metadata.jsonl` sha256 {data['sha256'][:16]}…, {settings(data['settings'])}",
        "length": f"{record['steps']:,} steps × {options['batch_size']} ({record['samples']:,} examples), "
        f"{record['seconds'] / 60:.1f} min",
        "options": settings({**options, **record["learned"]}),
        "machine": f"{record['processes']} × {record['machine']}, {record['date'][:10]}",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    table = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
    if other:
        return other.text(record, validation, "\n".join([*table, "", "```bash", record["command"], "```"]))
    losses = "; ".join(
        f"{kind} face {validation[key]:.4f}"
        for kind in ("right", "wrong", "no")
        if (key := f"validation_loss_{kind}_face") in validation
    )
    training = [
        *table,
        "",
        "The command, with paths reduced to their last part; everything else is in `training.json`:",
        "",
        "```bash",
        record["command"],
        "```",
        "",
        f"Loss of people set aside, with the same noise: {losses}." if losses else "Nobody was set aside.",
    ]
    return render_card(
        title=f"Face Fusion weights for {base}",
        summary="New pictures of the person in a photo, as a prompt describes them. These are the trained matrices\n"
        f"of Face Fusion for `{base}`, two for each of its cross-attention layers.",
        base=base,
        training="\n".join(training),
        limits="The licence of the base applies, and its idea of what people look like: no photograph was used."
        if "drawn_by" in data["settings"]
        else "The licence of the base and the rights in the training photos apply.",
        base_model=base if _HUB_ID.fullmatch(base) else None,
        tags=["stable-diffusion-xl"] if "XL" in record.get("pipeline", "") else [],
    )


def drawn_people(data: dict[str, Any]) -> dict[str, str]:
    """The row that says who drew the people, where they are no photographs."""
    how, alike = data["settings"], data.get("similarity", {})
    if "drawn_by" not in how:
        return {}
    by = "without training" if how["drawn_with"] is None else f"with weights `{how['drawn_with']}`"
    alike_enough = f"{how['false_matches']:.0%} of unrelated pairs reach {alike['threshold']:.3f}"
    return {
        "people": f"no photographs: drawn by {how['drawn_by']} (UNet `{how['unet']}`), words of {how['prompts']}, "
        f"seed {how['seed']}, {how['steps']} steps, guidance {how['guidance']:g}; further pictures of a person {by}, "
        f"round {how['round']} of at most {how['rounds']}; pairs kept by {how['embedder'] or 'the UNet itself'}: "
        f"{alike_enough}, kept ones have {alike['kept']:.3f} on average"
    }


def options_of(adapter: dict[str, str]) -> str:
    return f"reference {adapter['reference_mode']} at {adapter['resolution']} pixels, crop {adapter['face_crop']}"


def settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
