"""Arguments of the commands and the app, checked before torch is imported: bad input is answered at once."""

import re
from pathlib import Path

from ..face_errors import InvalidPromptError, ModelNotFoundError


MAX_IMAGES, MAX_SEED = 1000, 2**63 - 1


def check_prompt(text: str, name: str) -> None:
    """Raise [`InvalidPromptError`] unless `text`, which the user knows as `name`, is readable and not empty."""
    if not text.strip() or "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidPromptError(f"{name} must be readable text that is not empty, got {text!r}")


def check_model(model: str) -> None:
    """Raise [`ModelNotFoundError`] unless `model` is a diffusers folder or can be a Hub id."""
    path = Path(model)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ModelNotFoundError(f"{model} is no diffusers model: it has no model_index.json")
    if path.is_file():
        raise ModelNotFoundError(
            f"{model} is a file: --model takes a diffusers folder or a Hub id (owner/name); make a folder of it once: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if path.exists():
        return
    if model.startswith((".", "/", "~")):
        raise ModelNotFoundError(f"there is no folder {model}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ModelNotFoundError(f"there is no folder {model}, and it is no Hub id (owner/name) either")
