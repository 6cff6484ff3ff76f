"""Where the avatar model that comes with the package lies, and how models of avatars are asked best."""

from importlib import resources
from pathlib import Path

from ..face_defaults import FaceDefaults
from ..face_errors import ModelNotFoundError


# What `avatars-publish` writes into the folder of a model of avatars that says nothing itself. Figures of guidance are
# in docs/figures.md, those of mode and mirrored photo in docs/method.md.
AVATAR_DEFAULTS = FaceDefaults(
    guidance_scale=4.0, low_noise_guidance=2.0, num_inference_steps=25, face_mode="both", face_mirrored=True
)


def embedded_model() -> Path:
    """Folder of the avatar model that comes with the package. Raises [`ModelNotFoundError`] if it was left out."""
    folder = Path(str(resources.files("face_fusion_pipeline"))) / "embedded"
    if not (folder / "model_index.json").is_file():
        raise ModelNotFoundError(
            f"this installation has no embedded avatar model in {folder}: name one with --model, "
            "for example --model stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    return folder
