"""From a training folder to a model that can be shipped: its parts without the logs, and a card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..face_adapter import ADAPTER_WEIGHTS_NAME
from ..face_errors import FaceFusionError, ModelNotFoundError


PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "image_encoder", "clip_score")
SIZE_LIMIT = 60_000_000  # bytes of weights
_STAGES = {"vae": "autoencoder", "clip": "CLIP", "unet": "UNet", "adapter": "Face Fusion adapter"}


def publish(model: Path, out: Path, tables: list[Path], note: str = "") -> int:
    """Copy the parts of `model` to `out`, write `out/README.md` with the `tables`; returns the bytes of weights.

    Nothing of `out` changes unless everything is there. Raises ModelNotFoundError for a missing part or table,
    FaceFusionError for weights above SIZE_LIMIT.
    """
    needed = [model / name for name in (*PARTS, "model_index.json", ADAPTER_WEIGHTS_NAME, "training.json")]
    if missing := [str(path) for path in (*needed, *tables) if not path.exists()]:
        raise ModelNotFoundError(f"cannot publish {model}: {', '.join(missing)} missing; train that stage first")
    weights = [*model.glob("*.safetensors"), *(f for part in PARTS for f in (model / part).glob("*.safetensors"))]
    size = sum(path.stat().st_size for path in weights)
    if size > SIZE_LIMIT:
        raise FaceFusionError(f"the weights of {model} are {size / 1e6:.1f} MB, more than {SIZE_LIMIT / 1e6:.0f} MB")
    out.mkdir(parents=True, exist_ok=True)
    for path in needed:
        if path.is_dir():
            shutil.rmtree(out / path.name, ignore_errors=True)
            shutil.copytree(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)
    for config in out.rglob("*.json"):
        forget_origin(config)
    records = json.loads((model / "training.json").read_text())
    (out / "README.md").write_text(card(records, [path.read_text() for path in tables], size, note))
    return size


def forget_origin(config: Path) -> None:
    """Drop `_name_or_path` from a config: the folder that a part was loaded from means nothing elsewhere."""
    content = json.loads(config.read_text())
    if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(content, indent=2) + "\n")


def card(records: dict[str, dict[str, Any]], tables: list[str], size: int, note: str) -> str:
    """The model card: what it is, what training took (from the records of the runs), what was measured."""
    rows = []
    for stage, title in _STAGES.items():
        for name, record in records.items():
            if name.split("-")[0] != stage:
                continue
            part = title if name == stage else f"{title} ({name.removeprefix(stage).lstrip('-')} alone)"
            runs = [record]  # the last one first, then those that it went on from
            while earlier := runs[-1].get("continues"):
                runs.append(earlier)
            rows += [_row(part, run) for run in reversed(runs)]
    versions = next(iter(records.values()))["versions"]
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "library_name: diffusers",
            "pipeline_tag: text-to-image",
            "tags: [face-fusion, avatars, stable-diffusion]",
            "---",
            "",
            "# Avatars: a small Stable Diffusion of a rendered world, with Face Fusion weights",
            "",
            f"128 × 128 pixels, {size / 1e6:.1f} MB of float16 weights, an ordinary diffusers",
            "`StableDiffusionPipeline` (`AutoencoderTiny`, `CLIPTextModel`, `UNet2DConditionModel`, `DDIMScheduler`",
            "with v-prediction). It has seen rendered avatars only: no photograph of anybody was used in training.",
            "`image_encoder/` and `clip_score/` are the two towers of its CLIP, for scores.",
            "",
            "## Training",
            "",
            "| part | parameters | steps × batch | time | machine | seed | date |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"{', '.join(f'{name} {version}' for name, version in versions.items())}. {note}".rstrip(),
            "Data and commands: `face-fusion avatars-dataset`, then `face-fusion avatars-train` with `vae`, `clip`,",
            "`unet` and `adapter`.",
            "",
            "## Measured",
            "",
            *tables,
            "Training, validation and test people are disjoint.",
            "",
        ]
    )


def _row(part: str, record: dict[str, Any]) -> str:
    options = record["options"]
    return (
        f"| {part} | {record['trained_parameters']:,} | {record['steps']:,} × {options['batch_size']} "
        f"| {record['seconds'] / 60:.1f} min, {record['threads']} threads | {record['machine']} "
        f"| {options['seed']} | {record['date'][:10]} |"
    )
