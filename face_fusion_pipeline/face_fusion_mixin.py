"""Face Fusion for any Stable Diffusion pipeline: encode the face, install processors, call the pipeline, restore."""

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.hub_utils import _get_model_file
from torch import Tensor

from .face_adapter import (
    ADAPTER_WEIGHTS_NAME,
    AdapterMetadata,
    FaceFusionAdapter,
    adapter_fingerprint,
    load_adapter,
    read_tensors,
    save_adapter,
    unet_fingerprint,
)
from .face_attention import (
    FaceFusionAttnProcessor,
    FusionSwitch,
    attention_layers,
    installed_processors,
    reference_log_weights,
)
from .face_errors import (
    AdapterMismatchError,
    FaceFusionError,
    IdentityMismatchError,
    InvalidPromptError,
    InvalidScaleError,
    ModelNotFoundError,
)
from .face_identity import (
    FaceIdentity,
    capture_hidden_states,
    encode_latents,
    face_tensors,
    noise_latents,
    self_attention_projections,
)


MAX_FACE_SCALE = 100.0
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


def check_scale(scale: Any, name: str = "face_scale") -> float:
    """`scale` as a float in [0, 100]; raises [`InvalidScaleError`] otherwise."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale <= MAX_FACE_SCALE:
        raise InvalidScaleError(f"{name} must be a number from 0 (off) over 1 (the paper) to 100, got {scale!r}")
    return float(scale)


def flatten_scales(scales: Mapping[str, Any]) -> dict[str, float]:
    """`{"up": {"block_1": [0, .5]}}` or `{"up_blocks.1": .5}` -> `{layer-name prefix: scale}`."""
    flat: dict[str, float] = {}
    for key, value in scales.items():
        prefix = BLOCKS.get(key, key.removeprefix("block_"))
        if isinstance(value, list):
            value = {f"attentions.{index}": item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= {f"{prefix}.{rest}": scale for rest, scale in flatten_scales(value).items()}
        else:
            flat[prefix] = check_scale(value, f"the face scale of {key!r}")
    return flat


class FaceFusionMixin:
    """Adds faces to a diffusers pipeline that has `unet`, `vae`, `scheduler` and `encode_prompt`.

    Put it before the pipeline class: `class Mine(FaceFusionMixin, StableDiffusionPipeline)`. Without a face, or with
    scale 0, a call is exactly the pipeline's own.
    """

    unet: Any
    vae: Any
    scheduler: Any
    encode_prompt: Any
    maybe_free_model_hooks: Any
    vae_scale_factor: int
    do_classifier_free_guidance: bool
    _guidance_scale: float
    _execution_device: torch.device

    _face_adapter: FaceFusionAdapter | None = None
    _face_layer_scales: float | dict[str, float] = 1.0

    # --- Weights -------------------------------------------------------------------------------------------------

    def load_face_fusion_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        subfolder: str | None = None,
        weight_name: str = ADAPTER_WEIGHTS_NAME,
        **kwargs: Any,
    ) -> None:
        """Load trained `to_k_face`, `to_v_face` weights; they replace those loaded before.

        Args:
            pretrained_model_name_or_path_or_dict: Hub id, folder, `.safetensors` file, or a state dict (which is
                taken to have the default metadata).
            kwargs: `cache_dir`, `force_download`, `proxies`, `local_files_only`, `token`, `revision`.

        Raises:
            ModelNotFoundError: no such file.
            AdapterMismatchError: other base family, format version, keys or shapes; not safetensors.
        """
        if unknown := kwargs.keys() - set(HUB_ARGUMENTS):
            raise TypeError(f"load_face_fusion_adapter() got unexpected arguments {sorted(unknown)}")
        source, metadata = pretrained_model_name_or_path_or_dict, None
        if not isinstance(source, Mapping):
            name = str(source) if os.path.isfile(source) else weight_name
            if not name.endswith(".safetensors"):
                raise AdapterMismatchError(f"adapter weights are .safetensors files only, got {name!r}")
            try:
                path = _get_model_file(str(source), weights_name=weight_name, subfolder=subfolder, **kwargs)
            except (OSError, ValueError) as error:
                raise ModelNotFoundError(f"no adapter {weight_name!r} found in {str(source)!r}: {error}") from error
            source, strings = read_tensors(path)
            metadata = AdapterMetadata.from_strings(strings)
        self.set_face_fusion_adapter(load_adapter(self.unet, source, metadata))

    def set_face_fusion_adapter(self, adapter: FaceFusionAdapter) -> None:
        """Use an adapter that is in memory, for example one in training."""
        self._face_adapter = adapter

    def save_face_fusion_adapter(
        self, save_directory: str | os.PathLike[str], weight_name: str = ADAPTER_WEIGHTS_NAME
    ) -> None:
        """Write the loaded adapter to `save_directory/weight_name`. Raises [`FaceFusionError`] if there is none."""
        if self._face_adapter is None:
            raise FaceFusionError("no adapter to save; load one with `load_face_fusion_adapter(...)`")
        save_adapter(self._face_adapter, os.path.join(save_directory, weight_name))

    def unload_face_fusion_adapter(self) -> None:
        """Forget adapter and layer scales; faces then use the training-free mode."""
        self._face_adapter = None
        self._face_layer_scales = 1.0

    def set_face_fusion_scale(self, scale: float | Mapping[str, Any]) -> None:
        """Strength per layer for all later calls; multiplies `face_scale`.

        Args:
            scale: a float in [0, 100], or a dict as in `set_ip_adapter_scale`, `{"up": {"block_1": [0.0, 1.0]}}`, or
                by layer-name prefix, `{"up_blocks.1": 0.5, "mid_block": 1.0}`. The longest matching prefix counts;
                layers that no prefix matches get 0.

        Raises:
            InvalidScaleError: out of range, or a prefix that no layer has.
        """
        if not isinstance(scale, Mapping):
            self._face_layer_scales = check_scale(scale)
            return
        flat = flatten_scales(scale)
        layers = [*attention_layers(self.unet, "attn1"), *attention_layers(self.unet, "attn2")]
        for prefix in flat:
            if not any(f"{name}.".startswith(f"{prefix}.") for name in layers):
                raise InvalidScaleError(f"no attention layer of this UNet is in {prefix!r}; layers: {layers}")
        self._face_layer_scales = flat

    def _layer_scale(self, name: str) -> float:
        if not isinstance(self._face_layer_scales, dict):
            return self._face_layer_scales
        matching = [prefix for prefix in self._face_layer_scales if f"{name}.".startswith(f"{prefix}.")]
        return self._face_layer_scales[max(matching, key=len)] if matching else 0.0

    # --- Identity ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_face(
        self,
        images: Any,
        weights: Any = None,
        face_mode: str | None = None,
        face_resolution: int | None = None,
    ) -> FaceIdentity:
        """Encode one or several face crops of one person into an identity that any later call can take.

        Args:
            images: see `face_identity.face_tensors`; already cropped to the face.
            weights: one number >= 0 for each image, equal by default; only ratios matter (a morph slider).
            face_mode: `"adapter"`, `"training-free"`, or `None`: with the adapter if one is loaded.
            face_resolution: side in pixels, default the adapter's, else the UNet's own.

        Raises:
            FaceFusionError: bad image, weight, mode or resolution.
        """
        mode = self._face_mode(face_mode)
        metadata = self._face_adapter.metadata if mode == "adapter" and self._face_adapter else None
        resolution = face_resolution or (metadata.resolution if metadata else self._default_resolution())
        if resolution % self.vae_scale_factor:
            raise FaceFusionError(f"face_resolution {resolution} must be a multiple of {self.vae_scale_factor}")
        timestep = metadata.reference_timestep if metadata else 0
        device, dtype = self._execution_device, self.unet.dtype
        text_states = self._empty_prompt_states(device)
        references = []
        for pixels in face_tensors(images, resolution):  # one by one: an image encodes the same in any company
            latents = encode_latents(self.vae, pixels.to(device)).to(dtype)
            latents = noise_latents(latents, self.scheduler.alphas_cumprod, timestep)
            kind = "attn2" if mode == "adapter" else "attn1"
            hidden_states = capture_hidden_states(self.unet, latents, timestep, text_states, kind)
            references.append(self._project(hidden_states, mode))
        self.maybe_free_model_hooks()
        identity = FaceIdentity(
            keys={name: torch.cat([r[name][0] for r in references]) for name in references[0]},
            values={name: torch.cat([r[name][1] for r in references]) for name in references[0]},
            weights=torch.ones(len(references)),
            mode=mode,
            base_fingerprint=unet_fingerprint(self.unet),
            adapter_fingerprint=self._adapter_fingerprint() if mode == "adapter" else "",
        )
        return identity.with_weights(weights)

    def _project(self, hidden_states: dict[str, Tensor], mode: str) -> dict[str, tuple[Tensor, Tensor]]:
        if mode == "training-free":
            return self_attention_projections(self.unet, hidden_states)
        assert self._face_adapter is not None
        first = next(iter(hidden_states.values()))
        return self._face_adapter.to(first.device)(hidden_states)

    def _face_mode(self, face_mode: str | None) -> str:
        if face_mode not in (None, "adapter", "training-free"):
            raise FaceFusionError(f"face_mode must be 'adapter', 'training-free' or None, got {face_mode!r}")
        if face_mode == "adapter" and self._face_adapter is None:
            raise FaceFusionError("face_mode='adapter' needs weights; call `load_face_fusion_adapter(...)` first")
        return face_mode or ("training-free" if self._face_adapter is None else "adapter")

    def _default_resolution(self) -> int:
        size = self.unet.config.sample_size
        return (size if isinstance(size, int) else min(size)) * self.vae_scale_factor

    def _empty_prompt_states(self, device: torch.device) -> Tensor:
        """Text states `(1, N_c, width)` of the reference pass."""
        return self.encode_prompt("", device, 1, False)[0]

    def _adapter_fingerprint(self) -> str:
        return "" if self._face_adapter is None else adapter_fingerprint(self._face_adapter)

    def _identity(self, face: Any, weights: Any, face_mode: str | None, resolution: int | None) -> FaceIdentity:
        if not isinstance(getattr(face, "adapter_fingerprint", None), str):
            return self.encode_face(face, weights, face_mode, resolution)
        if face_mode is not None and face_mode != face.mode:
            raise IdentityMismatchError(f"the identity was encoded for {face.mode!r}, not {face_mode!r}")
        if face.mode == "adapter" and self._face_adapter is None:
            raise IdentityMismatchError(
                "this identity needs the adapter it was encoded with; call `load_face_fusion_adapter(...)` first"
            )
        face.check(unet_fingerprint(self.unet), self._adapter_fingerprint())
        return face if weights is None else face.with_weights(weights)

    # --- Generation ----------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        face_image: Any = None,
        face_scale: float = 1.0,
        face_weights: Any = None,
        face_start: float = 0.0,
        face_end: float = 1.0,
        face_mode: str | None = None,
        face_resolution: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as the underlying pipeline does, with a person's face fused in.

        Args:
            prompt, args, kwargs: those of the underlying pipeline.
            face_image: `None` (the plain pipeline), a [`FaceIdentity`], or one or several face crops of one person
                (see [`encode_face`]). The face goes into every image of the batch.
            face_scale: strength in [0, 100]: 1 is the paper, 0 is exactly the plain pipeline.
            face_weights: one number for each image, see [`encode_face`].
            face_start, face_end: step i of n sees the face where face_start <= i / n < face_end.
            face_mode, face_resolution: see [`encode_face`].

        Returns:
            What the underlying pipeline returns.

        Raises:
            FaceFusionError: a subclass for each kind of bad input.
        """
        if not isinstance(prompt, (str, type(None))) and not (
            isinstance(prompt, list) and all(isinstance(text, str) for text in prompt)
        ):
            raise InvalidPromptError(f"the prompt must be text or a list of texts, got {prompt!r}")
        scale = check_scale(face_scale)
        if not 0 <= face_start < face_end <= 1:
            raise InvalidScaleError(f"need 0 <= face_start < face_end <= 1, got {face_start!r} and {face_end!r}")
        scales = self._face_layer_scales
        if face_image is None or scale == 0 or not any(scales.values() if isinstance(scales, dict) else [scales]):
            return super().__call__(prompt, *args, **kwargs)  # type: ignore[misc]

        identity = self._identity(face_image, face_weights, face_mode, face_resolution)
        bound = inspect.signature(super().__call__).bind(prompt, *args, **kwargs)  # type: ignore[misc]
        bound.apply_defaults()
        switch = self._follow_steps(bound.arguments, face_start, face_end)
        with self._face_installed(identity, scale, switch):
            return super().__call__(*bound.args, **bound.kwargs)  # type: ignore[misc]

    @contextmanager
    def _face_installed(self, identity: FaceIdentity, scale: float, switch: FusionSwitch) -> Iterator[None]:
        used = identity.weights > 0  # log(0): such references are left out
        identity = identity.to(self._execution_device, self.unet.dtype)
        log_weights = reference_log_weights(identity.weights[used])
        if log_weights is not None:
            log_weights = log_weights.to(self._execution_device)
        adapter = self._face_adapter if identity.mode == "adapter" else None
        token_count_bias = adapter is not None and adapter.metadata.token_count_bias
        processors = {
            name: FaceFusionAttnProcessor(
                key=identity.keys[name][used.to(key.device)][None],
                value=identity.values[name][used.to(key.device)][None],
                log_weights=log_weights,
                scale=scale * self._layer_scale(name),
                token_count_bias=token_count_bias,
                switch=switch,
            )
            for name, key in identity.keys.items()
            if scale * self._layer_scale(name) > 0
        }
        with installed_processors(self.unet, processors):
            yield

    def _follow_steps(self, arguments: dict[str, Any], start: float, end: float) -> FusionSwitch:
        """A switch set for the first step, and kept right by a step callback around the user's, put in `arguments`.

        Plain attributes rather than a look at the pipeline inside the layers: `torch.compile` can follow these.
        """
        self._guidance_scale = arguments["guidance_scale"]  # what the pipeline itself does first
        switch = FusionSwitch(active=start == 0, guided=bool(self.do_classifier_free_guidance))
        user = arguments["callback_on_step_end"]
        if isinstance(user, (PipelineCallback, MultiPipelineCallbacks)):
            arguments["callback_on_step_end_tensor_inputs"] = user.tensor_inputs

        def after_step(pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            tensors = tensors if user is None else user(pipe, step, timestep, tensors)
            switch.active = start <= (step + 1) / pipe.num_timesteps < end
            switch.guided = bool(pipe.do_classifier_free_guidance)  # a callback may end guidance half-way
            return tensors

        arguments["callback_on_step_end"] = after_step
        return switch
