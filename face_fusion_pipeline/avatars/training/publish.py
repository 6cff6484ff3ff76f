"""From a training folder to a model that can be shipped: its parts without the logs, and a card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...face_adapter import ADAPTER_WEIGHTS_NAME
from ...face_defaults import read_defaults
from ...face_errors import FaceFusionError, ModelNotFoundError
from ...files.atomic import write_text
from ...files.texts import read_text
from ...generation.avatar_model import AVATAR_DEFAULTS
from ...publishing.card import render_card
from ...training.run_records import read_records
from ..world.caption import vocabulary


PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "image_encoder", "clip_score")
SIZE_LIMIT = 60_000_000  # bytes of weights
# What may lie beside the model, with the most bytes of its weights and what the card says of it.
BESIDE = {
    "controlnet": (15_000_000, "a depth ControlNet for it, an ordinary diffusers `ControlNetModel`"),
    "face_studio": (7_000_000, "the weights of FaceStudio, which takes the style of another picture"),
    "face_snap": (17_000_000, "those of FaceSnap, which takes the pose and expression of another face"),
}
_STAGES = {
    "vae": "autoencoder",
    "clip": "CLIP",
    "unet": "UNet",
    "adapter": "Face Fusion adapter",
    "controlnet": "depth ControlNet",
}

_SUMMARY = """\
New pictures of the person in one picture, as a prompt describes them: {megabytes:.1f} MB of float16 weights that draw
128 × 128 pixels, an ordinary diffusers `StableDiffusionPipeline` (`AutoencoderTiny`, `CLIPTextModel`,
`UNet2DConditionModel`, `DDIMScheduler` with v-prediction) and the two matrices for each cross-attention layer that
Face Fusion adds. It was trained from nothing and is its own base; `image_encoder/` and `clip_score/` are the two
towers of its CLIP, for scores."""
_LIMITS = """\
It has seen rendered avatars only: a photo goes through the same path, but what comes out is an avatar. It knows the
words of its own captions (a few expressions, clothes, places and styles) and no others. How its people look was drawn
at random and says nothing about real people."""


def publish(model: Path, out: Path, tables: list[Path], note: str = "", adapter: Path | None = None) -> int:
    """Copy the parts of `model` to `out`, write `out/README.md` with the `tables`; returns the bytes of weights.

    `adapter` is the folder that `face-fusion train` wrote; without it the adapter and its record are in `model`.
    What of `BESIDE` is in `model` goes along, and so do the settings that it recommends, else those of
    `AVATAR_DEFAULTS`, with the words of its captions.
    Nothing of `out` changes unless everything is there. Raises ModelNotFoundError for a missing part or table,
    FaceFusionError for weights above SIZE_LIMIT or the limits of `BESIDE`, wrong settings, or where `out` is one of
    the folders that are copied from.
    """
    if out.resolve() in [folder.resolve() for folder in (model, adapter) if folder]:
        raise FaceFusionError(f"{out} is what is published: take another folder for the result")
    beside = [model / name for name in BESIDE if (model / name).is_dir()]
    copied = [model / name for name in (*PARTS, "model_index.json")] + beside
    copied.append((adapter or model) / ADAPTER_WEIGHTS_NAME)
    recorded = [folder / "training.json" for folder in (model, adapter) if folder]
    if missing := [str(path) for path in (*copied, *recorded, *tables) if not path.exists()]:
        raise ModelNotFoundError(f"cannot publish {model}: {', '.join(missing)} missing; train that stage first")
    weights = [copied[-1], *(file for part in PARTS for file in (model / part).glob("*.safetensors"))]
    size = sum(path.stat().st_size for path in weights)
    limits = {model: (size, SIZE_LIMIT)}
    for folder in beside:
        limits[folder] = sum(path.stat().st_size for path in folder.rglob("*.safetensors")), BESIDE[folder.name][0]
    for what, (found, limit) in limits.items():
        if found > limit:
            raise FaceFusionError(f"the weights of {what} are {found / 1e6:.1f} MB, more than {limit / 1e6:.0f} MB")
    defaults = replace(read_defaults(model) or AVATAR_DEFAULTS, vocabulary=vocabulary())
    records = read_records(recorded[0])
    if adapter:
        records["adapter"] = read_records(recorded[1])["face-fusion"]
    texts = [read_text(path, "--table") for path in tables]
    out.mkdir(parents=True, exist_ok=True)
    for name in BESIDE:  # those of an earlier model would not fit this one
        shutil.rmtree(out / name, ignore_errors=True)
    for path in copied:
        if path.is_dir():
            shutil.rmtree(out / path.name, ignore_errors=True)
            shutil.copytree(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)
    for config in out.rglob("*.json"):
        forget_origin(config)
    defaults.save(out)
    write_text(out / "training.json", json.dumps(records, indent=2) + "\n")
    write_text(out / "README.md", card(records, texts, size, note, [folder.name for folder in beside]))
    return size


def forget_origin(config: Path) -> None:
    """Drop from a config what means nothing elsewhere: the folder that a part was loaded from, and of a tiny VAE what
    diffusers writes, and warns of when it reads it."""
    content = json.loads(config.read_text())
    if not isinstance(content, dict):
        return
    idle = ["_name_or_path"] + ["block_out_channels"] * (content.get("_class_name") == "AutoencoderTiny")
    if [name for name in idle if content.pop(name, None) is not None]:
        write_text(config, json.dumps(content, indent=2) + "\n")


def card(
    records: dict[str, dict[str, Any]], tables: list[str], size: int, note: str, beside: Sequence[str] = ()
) -> str:
    """The model card: what it is, what training took (from the records of the runs), what was measured.

    Args:
        beside: names of `BESIDE` that go along.
    """
    rows, seconds = [], 0.0
    for stage, title in _STAGES.items():
        for name, record in records.items():
            if name.split("-")[0] != stage:
                continue
            part = title if name == stage else f"{title} ({name.removeprefix(stage).lstrip('-')} alone)"
            runs = [record]  # the last one first, then those that it went on from
            while earlier := runs[-1].get("continues"):
                runs.append(earlier)
            rows += [_row(part, run) for run in reversed(runs)]
            seconds += sum(run["seconds"] for run in runs)
    used = {", ".join(f"{k} {v}" for k, v in record["versions"].items()): None for record in records.values()}
    training = [
        "Data: rendered avatars with exact captions, written by `face-fusion avatars-dataset` or drawn on the device",
        "(`--render`). No photograph of anybody. Training, validation and test people are disjoint. Commands:",
        "`face-fusion avatars-train` with `vae`, `clip`, `unet` and `controlnet`, then `face-fusion prepare` and",
        "`face-fusion train` for the adapter.",
        f"Cost: {seconds / 3600:.1f} hours in all.",
        "",
        "| part | parameters | steps × batch | time | machine | seed | date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"Last runs with {'; or '.join(used)}. {note}".rstrip(),
    ]
    holdings = [f"`{name}/` holds {BESIDE[name][1]}." for name in beside]
    return render_card(
        title="Avatars: a small Stable Diffusion of a rendered world, with Face Fusion weights",
        summary=" ".join([_SUMMARY.format(megabytes=size / 1e6), *holdings]),
        base="",
        training="\n".join(training),
        limits=_LIMITS,
        tables=tables,
        license="apache-2.0",
        tags=["avatars"],
        reference="images/reference.png",
    )


def _row(part: str, record: dict[str, Any]) -> str:
    options = record["options"]
    threads = record["threads"] * record.get("processes", 1)
    used = f", {threads} thread{'s' * (threads > 1)}" if "cores" in record["machine"] else ""
    return (
        f"| {part} | {record['trained_parameters']:,} | {record['steps']:,} × {options['batch_size']} "
        f"| {record['seconds'] / 60:.1f} min{used} | {record['machine']} "
        f"| {options['seed']} | {record['date'][:10]} |"
    )
