"""Loading a pipeline with its adapter for the commands and the app.

torch and diffusers are imported inside the function: `--help` and the checks of arguments do without them.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..face_defaults import FaceDefaults, defaults_of, few_step_defaults, file_of, with_few_steps
from ..face_errors import FaceFusionError, ModelNotFoundError, short
from .avatar_model import embedded_model


ADAPTER_FILE = "face_fusion_adapter.safetensors"
STUDIO_FOLDER, STUDIO_FILE = "face_studio", "face_studio.safetensors"  # of FaceStudio, in a model's folder
SNAP_FOLDER, SNAP_FILE = "face_snap", "face_snap.safetensors"  # of FaceSnap


def adapter_beside(model: str | None) -> str | None:
    """The adapter file in the folder of `model` (None: the embedded avatar model), or None if there is none.

    Raises [`ModelNotFoundError`] for an embedded model that was left out.
    """
    path = Path(model or embedded_model()) / ADAPTER_FILE
    return str(path) if path.is_file() else None


def defaults_beside(
    model: str | None, revision: str | None = None, config: str | None = None, steps: int | None = None
) -> FaceDefaults | None:
    """What `model` (folder or Hub id; None: the embedded avatar model) recommends, or what suits its scheduler.

    Args:
        config: of a model in one file, which recommends in its place.
        steps: those that were asked for, see `face_defaults.few_step_defaults`.

    Raises:
        FaceFusionError: a file of it that is wrong.
    """
    place = config if model is not None and Path(model).is_file() else model or embedded_model()
    if place is None:
        return None
    return with_few_steps(defaults_of(place, revision), few_steps_beside(str(place), revision, steps))


def few_steps_beside(model: str, revision: str | None = None, steps: int | None = None) -> FaceDefaults | None:
    """As [`few_step_defaults`], of a folder or Hub id that is not loaded; None where its files cannot be read."""
    scheduler = read_part(model, "scheduler/scheduler_config.json", revision)
    if few_step_defaults(str(scheduler.get("_class_name")), scheduler, steps) is None:
        return None
    embedded = read_part(model, "unet/config.json", revision).get("time_cond_proj_dim") is not None
    return few_step_defaults(str(scheduler["_class_name"]), scheduler, steps, embedded)


def read_part(model: str, name: str, revision: str | None = None) -> dict[str, Any]:
    """The object in a JSON file of a model, see [`file_of`]; empty where it cannot be read, as loading will say."""
    path = file_of(model, name, revision)
    try:
        values = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def controlnet_beside(model: str | None) -> str | None:
    """The folder of the ControlNet in the folder of `model` (None: the embedded avatar model), or None.

    Raises [`ModelNotFoundError`] for an embedded model that was left out.
    """
    path = Path(model or embedded_model()) / "controlnet"
    return str(path) if (path / "config.json").is_file() else None


def studio_beside(model: str | None) -> str | None:
    """The folder of FaceStudio's weights in the folder of `model` (None: the embedded avatar model), or None.

    Raises [`ModelNotFoundError`] for an embedded model that was left out.
    """
    path = Path(model or embedded_model()) / STUDIO_FOLDER
    return str(path) if (path / STUDIO_FILE).is_file() else None


def snap_beside(model: str | None) -> str | None:
    """The folder of FaceSnap's weights in the folder of `model` (None: the embedded avatar model), or None.

    Raises [`ModelNotFoundError`] for an embedded model that was left out.
    """
    path = Path(model or embedded_model()) / SNAP_FOLDER
    return str(path) if (path / SNAP_FILE).is_file() else None


@contextmanager
def quietly() -> Iterator[None]:
    """diffusers and transformers say errors only, without bars: what they do takes seconds. Downloads keep theirs."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub import utils as hub
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    downloads = not hub.are_progress_bars_disabled()
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    if downloads:  # transformers has taken their bars away with its own
        hub.enable_progress_bars()
    try:
        with warnings.catch_warnings():  # diffusers names an argument that the Hub's library no longer has
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
            yield
    finally:
        for library, verbosity, bar in zip(libraries, before, bars, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def usable_device(name: str) -> str:
    """The device of torch that "auto" or another name means. Raises [`FaceFusionError`] where nothing can be computed
    on it: it is not there, or it is none for numbers, as "meta"."""
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        why = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise FaceFusionError(f"--device {name[:40]} cannot be used here: {why}") from error
    return device


def unloadable(what: str, error: Exception) -> ModelNotFoundError:
    """The error of a model that cannot be loaded, in one line; of one that has pickles alone, with the way out."""
    reason = short(error) or type(error).__name__
    if _is_offline(error):
        reason = "it is not in the cache, and the Hub cannot be reached: go online once, or name a folder"
    if "safetensors" in reason or ".bin" in reason:
        reason += "; only .safetensors weights are read: convert pickled ones, `save_pretrained` writes them"
    return ModelNotFoundError(f"cannot load the {what}: {reason}")


def _is_offline(error: BaseException | None) -> bool:
    """Whether an error came of a Hub that cannot be reached, or must not be."""
    from httpx import TransportError
    from huggingface_hub.errors import LocalEntryNotFoundError

    while error is not None and not isinstance(error, (ConnectionError, TransportError, LocalEntryNotFoundError)):
        error = error.__cause__ or error.__context__
    return error is not None


def model_class(model: str, **hub: Any) -> str:
    """The class of diffusers that a folder, a Hub id or a checkpoint file says that it is for.

    Args:
        hub: `revision`, `token`, `cache_dir` of a Hub id.
    """
    from diffusers import DiffusionPipeline

    from ..face_single_file import PIPELINES, checkpoint_kind

    if Path(model).is_file():
        return PIPELINES[checkpoint_kind(model)]
    name = DiffusionPipeline.load_config(model, **hub)["_class_name"]
    return str(name[-1] if isinstance(name, (list, tuple)) else name)  # a list where the pipeline is a file beside it


def load_checkpoint(
    pipeline_class: Any, model: str, config: str | None = None, variant: str | None = None, **settings: Any
) -> Any:
    """`model` as a pipeline of this class, from a folder, a Hub id or a `.safetensors` file; never from a pickle.

    Args:
        config: folder or Hub id with the configuration of a file, see `face_single_file.load_single_file`.
        variant, settings: as `from_pretrained` takes them; a file has no variant.
    """
    if not Path(model).is_file():
        return pipeline_class.from_pretrained(model, variant=variant, use_safetensors=True, **settings)
    from ..face_loader_mixin import FaceLoaderMixin
    from ..face_single_file import load_single_file

    if issubclass(pipeline_class, FaceLoaderMixin):
        return pipeline_class.from_single_file(model, config=config, **settings)
    return load_single_file(pipeline_class.from_single_file, pipeline_class, model, config=config, **settings)


def pipeline_for(kind: str) -> Any:
    """The text-to-image pipeline with faces for models of the class `kind`: of XL, or of 1.x and 2.x."""
    if "XL" in kind:
        from ..pipeline_xl import StableDiffusionXLFaceFusionPipeline

        return StableDiffusionXLFaceFusionPipeline
    from ..pipeline import StableDiffusionFaceFusionPipeline

    return StableDiffusionFaceFusionPipeline


def check_draws_text(pipe: Any, model: str) -> None:
    """Raise [`FaceFusionError`] for a model whose UNet takes more than latents, as those for inpainting do."""
    channels, own = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != own:
        raise FaceFusionError(
            f"{model} takes {channels} channels instead of {own}, as models for inpainting do: use it in Python, with "
            "StableDiffusionInpaintFaceFusionPipeline"
        )


def load_pipeline(
    model: str | None = None,
    adapter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    controlnet: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
) -> Any:
    """The pipeline with its adapter, on its device. The safety checker of the model, if it has one, stays on.

    Args:
        model: diffusers folder, Hub id or `.safetensors` file; None is the embedded avatar model.
        adapter: folder, file or Hub id; None is the training-free mode, also where [`adapter_beside`] finds one.
        device: "auto" (CUDA where there is one) or a device of torch.
        dtype: "auto" (half precision on CUDA), "float32", "float16" or "bfloat16".
        controlnet: folder or Hub id of a ControlNet, or None.
        revision, variant: of `model`, as diffusers' `from_pretrained` takes them.
        config: folder or Hub id with the configuration of a file, see `face_single_file.load_single_file`.

    Raises:
        FaceFusionError: the device is not there, or another kind of model; ModelNotFoundError and
            AdapterMismatchError for the rest.
    """
    model = model or str(embedded_model())
    device = usable_device(device)
    with quietly():
        pipe = _from_pretrained(model, device, dtype, controlnet, revision, variant, config)
    pipe.set_progress_bar_config(desc="denoising", leave=False)
    if adapter is not None:
        pipe.load_face_fusion_adapter(adapter)
    return pipe.to(device)


def _from_pretrained(
    model: str,
    device: str,
    dtype: str,
    controlnet: str | None,
    revision: str | None,
    variant: str | None,
    config: str | None,
) -> Any:
    import torch
    from diffusers import ControlNetModel

    name = ("float16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
    settings: dict[str, Any] = {"dtype": getattr(torch, name)}
    what = f"model {model}"
    try:
        if controlnet is not None:
            what = f"ControlNet {controlnet}"
            settings["controlnet"] = ControlNetModel.from_pretrained(controlnet, use_safetensors=True, **settings)
            what = f"model {model}"
        pipeline_class = pipeline_for(model_class(model, revision=revision))
        pipe = load_checkpoint(pipeline_class, model, config, variant, revision=revision, **settings)
        check_draws_text(pipe, model)
        return pipe
    except FaceFusionError:
        raise
    except Exception as error:  # not there, offline, gated, a broken or other kind of model, pickles: any type
        raise unloadable(what, error) from error
