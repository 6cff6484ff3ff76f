"""Loading, saving and unloading FaceStudio's weights in a diffusers pipeline."""

import os
from typing import Any

from .face_errors import FaceFusionError
from .face_loader_mixin import check_hub_arguments, weights_path
from .face_studio import STUDIO, STUDIO_WEIGHTS_NAME, FaceStudio, detach, load_studio, save_studio


PARTS = ("prior", "image_encoder", "face_embedder")  # what may lie beside the weights, or is named


class FaceStudioLoaderMixin:
    """`load_face_studio`, `save_face_studio`, `unload_face_studio`."""

    unet: Any
    _studio_parts: dict[str, Any] = {}

    @property
    def face_studio(self) -> FaceStudio | None:
        """The weights that are loaded, or None."""
        return getattr(getattr(self.unet, "_orig_mod", self.unet), STUDIO, None)

    def load_face_studio(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        weight_name: str = STUDIO_WEIGHTS_NAME,
        *,
        prior: Any = None,
        image_encoder: str | None = None,
        face_embedder: Any = None,
        **kwargs: Any,
    ) -> None:
        """Load FaceStudio's Linear and LoRA; they replace those loaded before.

        Until a call has a `style_image`, or people by FaceStudio, pictures are what they were, bit for bit.

        Args:
            pretrained_model_name_or_path: Hub id, folder, or `.safetensors` file.
            prior: instead of the one beside the weights, or the one that they name: see `face_prior.load_prior`.
            image_encoder: instead of the model's own, or the one that the weights name: folder or Hub id.
            face_embedder: see `face_embedders.load_face_embedder`; by default the one beside the weights.
            kwargs: `cache_dir`, `force_download`, `proxies`, `local_files_only`, `token`, `revision`.

        Raises:
            ModelNotFoundError: no such file.
            AdapterMismatchError: other base family, format or shapes; not safetensors.
        """
        check_hub_arguments("load_face_studio", kwargs)
        path = weights_path("FaceStudio", pretrained_model_name_or_path, weight_name, subfolder, **kwargs)
        if self.face_studio is not None:
            detach(self.unet)
        metadata = load_studio(self.unet, path).metadata
        given = {"prior": prior, "image_encoder": image_encoder, "face_embedder": face_embedder}
        self._studio_parts = {
            part: given[part] if given[part] is not None else beside(path, part, getattr(metadata, part))
            for part in PARTS
        }

    def save_face_studio(self, save_directory: str | os.PathLike[str], weight_name: str = STUDIO_WEIGHTS_NAME) -> None:
        """Write the loaded weights to `save_directory/weight_name`. Raises [`FaceFusionError`] if there are none."""
        save_studio(self.unet, os.path.join(save_directory, weight_name))

    def unload_face_studio(self) -> None:
        """Take FaceStudio out of the UNet, which then is what it was; other LoRAs stay."""
        if self.face_studio is None:
            raise FaceFusionError("FaceStudio is not loaded")
        detach(self.unet)
        self._studio_parts = {}


def beside(weights: str, part: str, name: str) -> str:
    """Where a part is: beside the weights, if there is such a folder or file, else where the metadata name it."""
    folder = os.path.dirname(weights)
    if part == "prior":  # a folder of one holds prior/, see `face_prior`
        return folder if os.path.isdir(os.path.join(folder, part)) else name
    file = os.path.join(folder, f"{part}.safetensors")
    return file if os.path.isfile(file) else name
