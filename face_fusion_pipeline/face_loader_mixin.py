"""Loading, saving and scaling of Face Fusion weights in a diffusers pipeline."""

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.utils.hub_utils import _get_model_file
from torch import Tensor

from .face_adapter import (
    ADAPTER_WEIGHTS_NAME,
    AdapterMetadata,
    FaceFusionAdapter,
    adapter_fingerprint,
    load_adapter,
    save_adapter,
)
from .face_attention import attention_layers
from .face_defaults import DEFAULTS_NAME, FaceDefaults, loaded_defaults
from .face_errors import AdapterMismatchError, FaceFusionError, InvalidScaleError, ModelNotFoundError
from .face_files import read_tensors
from .face_people import check_scale
from .face_single_file import load_single_file
from .unet_family import base_family


logger = logging.getLogger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


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


def check_hub_arguments(method: str, given: Mapping[str, Any]) -> None:
    """Raise TypeError for arguments of a `load_` method that the Hub does not know."""
    if unknown := given.keys() - set(HUB_ARGUMENTS):
        raise TypeError(f"{method}() got unexpected arguments {sorted(unknown)}")


def weights_path(
    what: str, source: str | os.PathLike[str], weight_name: str, subfolder: str | None, **hub: Any
) -> str:
    """The `.safetensors` file that a Hub id, folder or file stands for; fetched, if it is on the Hub.

    Args:
        what: how messages call the weights.

    Raises:
        ModelNotFoundError: no such file. AdapterMismatchError: not safetensors.
    """
    name = str(source) if os.path.isfile(source) else weight_name
    if not name.endswith(".safetensors"):
        raise AdapterMismatchError(f"{what} weights are .safetensors files only, got {name!r}")
    try:
        return _get_model_file(str(source), weights_name=weight_name, subfolder=subfolder, **hub)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"no {what} {weight_name!r} found in {str(source)!r}: {error}") from error


class FaceLoaderMixin:
    """`load_`, `save_`, `unload_` and `set_` methods named and ordered as diffusers' own for IP-Adapters."""

    unet: Any
    components: dict[str, Any]
    config: Any
    maybe_free_model_hooks: Any
    _default_resolution: Any
    set_progress_bar_config: Any

    face_defaults: FaceDefaults | None = None  # of the model's folder, for calls that do not say otherwise
    _interrupt: bool
    _face_adapter: FaceFusionAdapter | None = None
    _face_layer_scales: float | dict[str, float] = 1.0

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As diffusers' `from_pipe`; from another Face Fusion pipeline come adapter, scales and defaults, too.

        An `AutoencoderTiny` comes along. A pipeline of diffusers' own takes it only if it is named:
        `StableDiffusionPipeline.from_pipe(pipe, vae=pipe.vae)`.
        """
        kwargs.setdefault("vae", pipeline.vae)  # diffusers would look at its type
        new = super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        if not (hasattr(new, "_face_adapter") and hasattr(pipeline, "_face_adapter")):
            return new
        new.face_defaults = pipeline.face_defaults
        if new.unet is pipeline.unet:
            new._token_parts = getattr(pipeline, "_token_parts", {})
            new._face_adapter, new._face_layer_scales = pipeline._face_adapter, pipeline._face_layer_scales
        elif pipeline._face_adapter is not None:
            logger.warning("the new pipeline has another UNet and so no adapter: load one that was trained for it")
        return new

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As diffusers', of a `.safetensors` file; `face_defaults` are those in the folder of its configuration.

        Args:
            pretrained_model_link_or_path: file, or the address of one on the Hub.
            kwargs: of diffusers. `config`, a Diffusers folder or Hub id, has the configuration; by default it is
                fetched from the repository of the model that the file was made from.

        Raises:
            FaceFusionError: a pickle, another architecture, or weights that do not fit the configuration.
            ModelNotFoundError: no such file, or no configuration; the message says how to get it.
        """
        plain = super().from_single_file  # type: ignore[misc]
        return load_single_file(plain, cls, str(pretrained_model_link_or_path), **kwargs)

    def register_to_config(self, **kwargs: Any) -> None:
        """As diffusers'; `from_pretrained` ends with it and the model's name, however it was called, also by way of
        `custom_pipeline`: then the model's defaults are read."""
        super().register_to_config(**kwargs)  # type: ignore[misc]
        if name := kwargs.get("_name_or_path"):
            self.face_defaults = loaded_defaults(str(name), self.components)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As diffusers'; the model's defaults lie beside it. Those of another model that lay there are removed."""
        if not os.path.isfile(save_directory):  # diffusers says so in a moment
            os.makedirs(save_directory, exist_ok=True)
            if self.face_defaults is not None:  # first: diffusers may upload the folder at its end
                self.face_defaults.save(save_directory)
            elif os.path.isfile(beside := os.path.join(save_directory, DEFAULTS_NAME)):
                os.remove(beside)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def as_pipeline(self, pipeline_class: Any, **parts: Any) -> Any:
        """Another Face Fusion pipeline of this family for a part of this one's work: same components, adapter, scales
        and defaults.

        Unlike `from_pipe` it takes any VAE, leaves offloading to this pipeline, and stops where this one is told to
        (`_interrupt`).

        Args:
            parts: components that it has instead.
        """
        wanted = inspect.signature(pipeline_class.__init__).parameters
        known = dict(self.config) | self.components | parts  # the configuration lists components by their classes
        new = pipeline_class(**{name: known[name] for name in wanted if name in known})
        if hasattr(self, "watermark"):  # diffusers' XL pipelines mark pictures, and keep no word of it
            new.watermark = self.watermark
        new._face_adapter, new._face_layer_scales = self._face_adapter, self._face_layer_scales
        new.face_defaults = self.face_defaults
        new._token_parts = getattr(self, "_token_parts", {})
        new.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        new.maybe_free_model_hooks = self.maybe_free_model_hooks
        new._tools = self.__dict__.setdefault("_tools", {})
        new._outer, self._interrupt = self, False  # what stopped an earlier call does not stop this one
        return new

    def _kept(self, kind: str, name: Any, load: Callable[[Any], Any]) -> Any:
        """`load(name)`, such as a detector, loaded once for each name or path and kept with the pipeline."""
        if not isinstance(name, (str, os.PathLike)):
            return load(name)
        tools, key = self.__dict__.setdefault("_tools", {}), (kind, os.fspath(name))
        if key not in tools:
            tools[key] = load(name)
        return tools[key]

    def load_face_fusion_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        subfolder: str | None = None,
        weight_name: str = ADAPTER_WEIGHTS_NAME,
        **kwargs: Any,
    ) -> None:
        """Load trained `to_k_face`, `to_v_face` weights; they replace those loaded before.

        Args:
            pretrained_model_name_or_path_or_dict: Hub id, folder, `.safetensors` file, or a state dict, which is
                taken to have the default metadata and references of the base's own size.
            kwargs: `cache_dir`, `force_download`, `proxies`, `local_files_only`, `token`, `revision`.

        Raises:
            ModelNotFoundError: no such file.
            AdapterMismatchError: other base family, format version, keys or shapes; not safetensors.
        """
        check_hub_arguments("load_face_fusion_adapter", kwargs)
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, Mapping):
            metadata = AdapterMetadata(base_family(self.unet), resolution=self._default_resolution())
        else:
            path = weights_path("adapter", source, weight_name, subfolder, **kwargs)
            source, strings = read_tensors(path, check=AdapterMetadata.from_strings)
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

    def _any_layer_scale(self) -> bool:
        scales = self._face_layer_scales
        return any(scales.values() if isinstance(scales, dict) else [scales])

    def _layer_scale(self, name: str) -> float:
        if not isinstance(self._face_layer_scales, dict):
            return self._face_layer_scales
        matching = [prefix for prefix in self._face_layer_scales if f"{name}.".startswith(f"{prefix}.")]
        return self._face_layer_scales[max(matching, key=len)] if matching else 0.0

    def _adapter_fingerprint(self) -> str:
        return "" if self._face_adapter is None else adapter_fingerprint(self._face_adapter)
