"""Arguments of the commands and the app, checked before torch is imported: bad input is answered at once."""

import argparse
import json
import re
from pathlib import Path

from ..face_defaults import FACE_MODES, FaceDefaults
from ..face_errors import FaceFusionError, InvalidPromptError, ModelNotFoundError, check_no_pickle


MAX_IMAGES, MAX_SEED = 1000, 2**63 - 1
MAX_PROMPT = 2000  # characters; a text encoder reads some 350 of them
METHODS = ("none", *FACE_MODES, *(f"{mode}-mirrored" for mode in FACE_MODES))  # of the evaluations


def check_prompt(text: str, name: str) -> None:
    """Raise [`InvalidPromptError`] unless `text`, known to the user as `name`, is readable, neither empty nor long."""
    if len(text) > MAX_PROMPT:
        raise InvalidPromptError(f"{name} has {len(text):,} characters: give at most {MAX_PROMPT:,}")
    if not text.strip() or "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidPromptError(f"{name} must be readable text that is not empty, got {text!r}")


def add_version_arguments(parser: argparse.ArgumentParser) -> None:
    """Which version of `--model`, as `from_pretrained` takes it, and what belongs to one that is a file."""
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--variant", help="variant of the model's weight files, such as fp16")
    parser.add_argument(
        "--model-config",
        metavar="DIR_OR_HUB_ID",
        help="of a --model that is a .safetensors file: a Diffusers model of the same kind, whose configuration "
        "(tokenizer, scheduler, sizes) is taken; default: the model on the Hub that such files are made from",
    )


def check_version(model: str | None, revision: str | None, variant: str | None, config: str | None = None) -> None:
    """Raise [`FaceFusionError`] for the version or configuration of a model that was not given, or has none."""
    for flag, value in (("--revision", revision), ("--variant", variant), ("--model-config", config)):
        if value is not None and model is None:
            raise FaceFusionError(f"{flag} {value} is of a model that you name: give --model")
    if model is not None and Path(model).is_file():
        if variant is not None:
            raise FaceFusionError(f"--variant {variant}: {model} is one file, and has no variants")
        if config is not None:
            check_folder_or_id(config)
    elif config is not None:
        raise FaceFusionError(f"--model-config {config} is for a --model that is one .safetensors file")


def check_model(model: str) -> None:
    """Raise [`FaceFusionError`] unless `model` is a diffusers folder, a `.safetensors` file or can be a Hub id."""
    path = Path(model)
    if not path.is_dir():
        check_no_pickle(model)
    if not path.is_file():
        if model.lower().endswith(".safetensors") and not path.is_dir():
            raise ModelNotFoundError(f"there is no file {model}")
        check_folder_or_id(model)
    elif not model.lower().endswith(".safetensors"):
        raise ModelNotFoundError(
            f"{model} is a file: --model takes a .safetensors checkpoint, a diffusers folder or a Hub id (owner/name)"
        )


def check_folder_or_id(model: str) -> None:
    """Raise [`ModelNotFoundError`] unless `model` is a diffusers folder or can be a Hub id."""
    path = Path(model)
    if path.is_dir():
        _check_index(path / "model_index.json")
    if path.is_file():
        raise ModelNotFoundError(f"{model} is a file: a diffusers folder or a Hub id (owner/name) is meant")
    if path.exists():
        return
    if model.startswith((".", "/", "~")):
        raise ModelNotFoundError(f"there is no folder {model}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ModelNotFoundError(f"there is no folder {model}, and it is no Hub id (owner/name) either")


def _check_index(file: Path) -> None:
    if not file.is_file():
        raise ModelNotFoundError(f"{file.parent} is no diffusers model: it has no {file.name}")
    try:
        index = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelNotFoundError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ModelNotFoundError(f"{file} is not that of a diffusers model: it names no pipeline (_class_name)")


def guidance_scales(
    guidance: float | None, low_noise: float | None, defaults: FaceDefaults | None = None, *, name: str = "--guidance"
) -> tuple[float, float | None]:
    """Guidance, and that of the low-noise half of the timesteps, or None: as before.

    Where nothing was asked for, it is what the model recommends, else 5; guidance that was asked for is that of all
    steps. Raises [`FaceFusionError`] for guidance at low noise where there is none before.
    """
    if guidance is None:
        defaults = defaults or FaceDefaults()
        guidance = 5.0 if defaults.guidance_scale is None else defaults.guidance_scale
        low_noise = defaults.low_noise_guidance if low_noise is None else low_noise
    if low_noise is not None and not guidance > 1:
        raise FaceFusionError(f"--low-noise-guidance goes with {name} above 1, got {guidance}")
    return guidance, low_noise
