"""Loading, saving and unloading FaceStudio's weights in a diffusers pipeline."""

import os
from collections.abc import Mapping
from typing import Any

from .face_attached import attached
from .face_errors import FaceFusionError
from .face_loader_mixin import check_hub_arguments, weights_path
from .face_studio import STUDIO, STUDIO_WEIGHTS_NAME, FaceStudio, detach, load_studio, save_studio, studio_left_out


class FaceStudioLoaderMixin:
    """`load_face_studio`, `save_face_studio`, `unload_face_studio`."""

    unet: Any
    _token_parts: dict[str, dict[str, Any]] = {}  # of each system that is loaded, see `beside`

    @property
    def face_studio(self) -> FaceStudio | None:
        """The weights that are loaded, or None."""
        studio: FaceStudio | None = attached(self.unet, STUDIO)
        return studio

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
        metadata = load_studio(self.unet, path).metadata
        given = {"prior": prior, "image_encoder": image_encoder, "face_embedder": face_embedder}
        self._token_parts = {**self._token_parts, STUDIO: parts_of(path, metadata, given)}

    def save_face_studio(self, save_directory: str | os.PathLike[str], weight_name: str = STUDIO_WEIGHTS_NAME) -> None:
        """Write the loaded weights to `save_directory/weight_name`. Raises [`FaceFusionError`] if there are none."""
        save_studio(self.unet, os.path.join(save_directory, weight_name))

    def unload_face_studio(self) -> None:
        """Take FaceStudio out of the UNet, which then is what it was; other LoRAs stay."""
        if self.face_studio is None:
            raise FaceFusionError("FaceStudio is not loaded")
        detach(self.unet)
        self._token_parts = {name: parts for name, parts in self._token_parts.items() if name != STUDIO}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers'; FaceStudio's weights stay out of the model's, see [`save_face_studio`]."""
        with studio_left_out(self.unet):
            super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def parts_of(weights: str, metadata: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What works with weights, by its name: what is `given`, else what lies beside them, else what they name."""
    return {
        part: named if named is not None else beside(weights, part, getattr(metadata, part))
        for part, named in given.items()
    }


def beside(weights: str, part: str, name: str) -> str:
    """Where a part is: beside the weights, if there is such a folder or file, else where the metadata name it.

    In the folder of a model several weights share what lies beside FaceStudio's.
    """
    folder = os.path.dirname(weights)
    if part == "prior":  # a folder of one holds prior/, see `face_prior`
        return folder if os.path.isdir(os.path.join(folder, part)) else name
    for place in (folder, os.path.join(os.path.dirname(folder), STUDIO)):
        if os.path.isfile(file := os.path.join(place, f"{part}.safetensors")):
            return file
    return name
