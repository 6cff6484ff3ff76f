"""Loading, saving and unloading FaceSnap's weights in a diffusers pipeline."""

import os
from typing import Any

from .face_attached import attach_module, attached, detach_module, move_to, read_attached, save_attached, whole
from .face_errors import FaceFusionError
from .face_loader_mixin import check_hub_arguments, weights_path
from .face_snap import (
    NETWORK,
    SNAP,
    SNAP_WEIGHTS_NAME,
    FaceMixer,
    as_component,
    check_network,
    load_network,
    mixer_left_out,
    networks_of,
    save_network,
)
from .face_studio_loader_mixin import parts_of


class FaceSnapLoaderMixin:
    """`load_face_snap`, `save_face_snap`, `unload_face_snap`."""

    unet: Any
    controlnet: Any
    register_modules: Any
    _token_parts: dict[str, dict[str, Any]] = {}

    @property
    def face_snap(self) -> FaceMixer | None:
        """The mixer that is loaded, or None."""
        mixer: FaceMixer | None = attached(self.unet, SNAP)
        return mixer

    @property
    def face_snap_network(self) -> Any:
        """FaceSnap's own among the ControlNets of the pipeline, or None."""
        own = self._token_parts.get(SNAP, {}).get("network")
        return next((net for net in networks_of(getattr(self, "controlnet", None)) if whole(net) is own), None)

    @property
    def _token_network(self) -> Any:
        """The ControlNet that reads tokens in calls of this pipeline; for subclasses that have ControlNets."""
        return None

    def load_face_snap(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        weight_name: str = SNAP_WEIGHTS_NAME,
        *,
        controlnet: Any = None,
        image_encoder: str | None = None,
        face_embedder: Any = None,
        **kwargs: Any,
    ) -> None:
        """Load FaceSnap's mixer and its ControlNet; they replace those loaded before.

        The ControlNet joins those that the pipeline has. Until a call has a `driver_image`, or people by FaceSnap,
        pictures are what they were, bit for bit.

        Args:
            pretrained_model_name_or_path: Hub id, folder, or `.safetensors` file.
            controlnet: instead of the one in `ffrnet` beside the weights; one that the pipeline has already is taken
                as FaceSnap's.
            image_encoder: instead of the model's own, or the one that the weights name: folder or Hub id.
            face_embedder: see `face_embedders.load_face_embedder`; by default the one beside the weights.
            kwargs: `cache_dir`, `force_download`, `proxies`, `local_files_only`, `token`, `revision`.

        Raises:
            ModelNotFoundError: no such file.
            AdapterMismatchError: other base family, format or shapes; not safetensors; no ControlNet for this model.
        """
        check_hub_arguments("load_face_snap", kwargs)
        source = pretrained_model_name_or_path
        path = weights_path("FaceSnap", source, weight_name, subfolder, **kwargs)
        mixer, _ = read_attached(self.unet, FaceMixer, path)
        if controlnet is None and hasattr(self, "controlnet"):
            if os.path.exists(source):
                controlnet = load_network(os.path.join(os.path.dirname(path), NETWORK))
            else:
                folder = "/".join(part for part in (subfolder, NETWORK) if part)
                controlnet = load_network(source, subfolder=folder, **kwargs)
        if controlnet is not None:
            check_network(controlnet, self.unet)
        if self.face_snap is not None:
            self.unload_face_snap()
        attach_module(self.unet, mixer)
        given = {"image_encoder": image_encoder, "face_embedder": face_embedder}
        parts = parts_of(path, mixer.metadata, given) | {"network": whole(controlnet)}
        self._token_parts = {**self._token_parts, SNAP: parts}
        if controlnet is not None and hasattr(self, "controlnet"):
            others = [net for net in networks_of(self.controlnet) if whole(net) is not whole(controlnet)]
            move_to(controlnet, self.unet)
            self.register_modules(controlnet=as_component([*others, controlnet]))

    def save_face_snap(self, save_directory: str | os.PathLike[str], weight_name: str = SNAP_WEIGHTS_NAME) -> None:
        """Write the mixer to `save_directory/weight_name`, and the ControlNet to `ffrnet` beside it.

        Raises:
            FaceFusionError: there are none.
        """
        save_attached(self.unet, FaceMixer, os.path.join(save_directory, weight_name))
        if (network := self.face_snap_network) is not None:
            save_network(network, save_directory)

    def unload_face_snap(self) -> None:
        """Take the mixer out of the UNet and its ControlNet out of the pipeline, which then are what they were."""
        if self.face_snap is None:
            raise FaceFusionError("FaceSnap is not loaded")
        self._without_network()
        detach_module(self.unet, SNAP)
        self._token_parts = {name: parts for name, parts in self._token_parts.items() if name != SNAP}

    def _without_network(self) -> None:
        if (own := self.face_snap_network) is not None:
            others = [net for net in networks_of(self.controlnet) if net is not own]
            self.register_modules(controlnet=as_component(others))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers'; FaceSnap's weights stay out of the model's, see [`save_face_snap`]."""
        together = getattr(self, "controlnet", None)
        self._without_network()
        try:
            with mixer_left_out(self.unet):
                super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            if getattr(self, "controlnet", None) is not together:
                self.register_modules(controlnet=together)
