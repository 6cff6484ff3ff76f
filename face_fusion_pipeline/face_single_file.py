"""Checkpoints in one file, as model sites give them: what is in one, and where its configuration comes from.

A file holds weights alone. What they belong to is read from its header, before any weight is. The rest, such as
tokenizer, scheduler and the sizes of all parts, has to come from a Diffusers folder or from the Hub.
"""

import inspect
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    LDM_UNET_KEY,
    LDM_VAE_KEYS,
    infer_diffusers_model_type,
)
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .face_defaults import read_defaults
from .face_errors import FaceFusionError, ModelNotFoundError, check_no_pickle, short


# What diffusers calls a file -> the pipeline that it is for; ours have "FaceFusionPipeline" in the place of "Pipeline"
PIPELINES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "inpainting_v2": "StableDiffusionInpaintPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "xl_inpaint": "StableDiffusionXLInpaintPipeline",
}
PARTS = {"vae": tuple(LDM_VAE_KEYS), "text_encoder": ("cond_stage_model.", "conditioner.embedders.")}
CONFIGURATION = ["*.json", "*.txt", "*.model"]  # files of a repository that are no weights
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
VELOCITY, ZERO_SNR = "v_pred", "ztsnr"  # names of empty tensors by which files say that they are trained otherwise


def check_file_name(name: str) -> None:
    """Raise [`FaceFusionError`] unless `name` is that of a safetensors file."""
    check_no_pickle(name)
    if not name.lower().endswith(".safetensors"):
        raise FaceFusionError(f"{name} is a file, but no .safetensors checkpoint")


def read_shapes(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensor names of a safetensors file -> tensors of their shapes without contents: nothing but the header is read.

    Raises:
        ModelNotFoundError: no such file. FaceFusionError: no safetensors.
    """
    check_file_name(str(path))
    if not os.path.isfile(path):
        raise ModelNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  not iterable
    except (SafetensorError, OSError) as error:
        raise FaceFusionError(f"{path} is not a readable safetensors file: {short(error)}") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def checkpoint_kind(path: str | os.PathLike[str], shapes: dict[str, Tensor] | None = None) -> str:
    """A key of [`PIPELINES`] for a checkpoint file. Raises [`FaceFusionError`] for one of another architecture."""
    shapes = read_shapes(path) if shapes is None else shapes
    if not any(name.startswith(LDM_UNET_KEY) for name in shapes):
        example = next(iter(shapes), "nothing at all")
        raise FaceFusionError(
            f"{path} is no checkpoint of Stable Diffusion in one file, such as model sites give: it has no "
            f"{LDM_UNET_KEY}* (but {example}); a LoRA, a VAE or a single part is not enough"
        )
    kind = infer_diffusers_model_type(shapes)
    if kind not in PIPELINES:
        raise FaceFusionError(f"{path} holds a model of the kind {kind!r}: take Stable Diffusion 1.x, 2.x or XL")
    return kind


def check_pipeline(pipeline_class: type, path: str | os.PathLike[str], kind: str) -> None:
    """Raise [`FaceFusionError`] where a file of this kind is loaded with a pipeline for another one."""
    name = PIPELINES[kind]
    is_xl = "text_encoder_2" in inspect.signature(pipeline_class.__init__).parameters  # type: ignore[misc]
    inpaints = "mask_image" in inspect.signature(pipeline_class.__call__).parameters
    if ("XL" in name) != is_xl or ("Inpaint" in name and not inpaints):
        what = f"Stable Diffusion {'XL' if 'XL' in name else '1.x or 2.x'}{', for inpainting' * ('Inpaint' in name)}"
        ours = name.replace("Pipeline", "FaceFusionPipeline")
        raise FaceFusionError(f"{path} is {what}: load it with {ours}, not with {pipeline_class.__name__}")


def configuration_folder(path: str | os.PathLike[str], kind: str, config: Any = None, **hub: Any) -> str:
    """The folder with the configuration of a checkpoint file, fetched if it is a Hub id, or diffusers' own choice.

    Args:
        config: Diffusers folder or Hub id; its weights are not used.
        hub: see [`HUB_ARGUMENTS`].

    Raises:
        ModelNotFoundError: it is not here and cannot be fetched; the message says how to get it.
    """
    name = str(config or DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])
    if (Path(name) / "model_index.json").is_file():
        return name
    if os.path.exists(name):
        raise ModelNotFoundError(f"{name} is no configuration of {path}: it has no model_index.json")
    try:
        folder = snapshot_download(name, allow_patterns=CONFIGURATION, **hub)
        if (Path(folder) / "model_index.json").is_file():
            return folder
        reason = f"{name} has no model_index.json"
    except Exception as error:  # not there, offline, gated, no name of a repository: any type
        reason = short(error, 120) or type(error).__name__
    raise ModelNotFoundError(
        f"{path} holds weights alone, and its configuration {name} is not here: give a Diffusers folder of such a "
        f"model (config=FOLDER, on the command line --model-config FOLDER), or fetch it once: hf download {name} "
        f"--include '*.json' --include '*.txt' ({reason})"
    )


def check_parts(path: str | os.PathLike[str], shapes: dict[str, Tensor], folder: str, given: Collection[str]) -> None:
    """Raise [`FaceFusionError`] for a file without its VAE or its text encoder, where nobody else has them."""
    for part, prefixes in PARTS.items():
        beside = part != "vae" and any((Path(folder) / part).glob("*.safetensors"))  # diffusers looks there
        if part not in given and not beside and not any(name.startswith(prefixes) for name in shapes):
            raise FaceFusionError(
                f"{path} has no {part}: take the file that has everything in it, or give the part, "
                f"from_single_file(FILE, {part}=...)"
            )


def load_single_file(plain: Callable[..., Any], pipeline_class: Any, path: str, **kwargs: Any) -> Any:
    """`plain`, diffusers' `from_single_file` of a class, with the checks of this module before and after.

    Args:
        path: local file; the address of a file on the Hub is left to diffusers, but for its name.
        kwargs: of diffusers; `config` may be a folder or a Hub id. `controlnet` is none unless it is given.

    Raises:
        FaceFusionError: no safetensors, another architecture, without a part, or weights of another configuration.
        ModelNotFoundError: no such file, or no configuration for it.
    """
    check_file_name(path)
    if "controlnet" in pipeline_class._optional_components:  # the folder of the configuration may list one
        kwargs.setdefault("controlnet", None)
    if "://" in path or kwargs.get("original_config") is not None:
        return plain(path, **kwargs)
    shapes = read_shapes(path)
    kind = checkpoint_kind(path, shapes)
    check_pipeline(pipeline_class, path, kind)
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    folder = configuration_folder(path, kind, kwargs.get("config"), **hub)
    check_parts(path, shapes, folder, kwargs)
    lacking = f"{path} lacks weights that a model of the configuration {folder} has"
    try:
        pipe = plain(path, **{**kwargs, "config": folder})
    except ValueError as error:  # above all other shapes
        raise FaceFusionError(
            f"{path} cannot be loaded with the configuration {folder}: {short(error, 160)}"
        ) from error
    except NotImplementedError as error:  # moved without contents
        raise FaceFusionError(lacking) from error
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    if any(weight.is_meta for module in modules for weight in module.parameters()):
        raise FaceFusionError(lacking)
    if VELOCITY in shapes:
        trained: dict[str, Any] = {"prediction_type": "v_prediction"}
        trained |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if ZERO_SNR in shapes else {}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **trained)
    if hasattr(pipe, "face_defaults"):
        pipe.face_defaults = read_defaults(folder)
    return pipe
