"""Where the avatar model that comes with the package lies, and how it is asked best."""

from importlib import resources
from pathlib import Path

from .face_errors import ModelNotFoundError


GUIDANCE, LATE_GUIDANCE = 4.0, 2.0  # the latter in the clear half of the timesteps; figures in docs/figures.md
FACE_MODE = "both"  # likeness in docs/method.md


def embedded_model() -> Path:
    """Folder of the avatar model that comes with the package. Raises [`ModelNotFoundError`] if it was left out."""
    folder = Path(str(resources.files("face_fusion_pipeline"))) / "embedded"
    if not (folder / "model_index.json").is_file():
        raise ModelNotFoundError(
            f"this installation has no embedded avatar model in {folder}: name one with --model, "
            "for example --model stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    return folder
