"""Loading a pipeline with its adapter for the commands and the app.

torch and diffusers are imported inside the function: `--help` and the checks of arguments do without them.
"""

from pathlib import Path
from typing import Any

from ..avatar_model import embedded_model
from ..face_defaults import FaceDefaults, defaults_of
from ..face_errors import FaceFusionError, ModelNotFoundError


ADAPTER_FILE = "face_fusion_adapter.safetensors"


def adapter_beside(model: str | None) -> str | None:
    """The adapter file in the folder of `model` (None: the embedded avatar model), or None if there is none.

    Raises [`ModelNotFoundError`] for an embedded model that was left out.
    """
    path = Path(model or embedded_model()) / ADAPTER_FILE
    return str(path) if path.is_file() else None


def defaults_beside(model: str | None, revision: str | None = None) -> FaceDefaults | None:
    """What `model` (folder or Hub id; None: the embedded avatar model) recommends, or None.

    Raises [`FaceFusionError`] for a file of it that is wrong.
    """
    return defaults_of(model or embedded_model(), revision)


def controlnet_beside(model: str | None) -> str | None:
    """The folder of the ControlNet in the folder of `model` (None: the embedded avatar model), or None.

    Raises [`ModelNotFoundError`] for an embedded model that was left out.
    """
    path = Path(model or embedded_model()) / "controlnet"
    return str(path) if (path / "config.json").is_file() else None


def class_of(model: str | Path, **hub: Any) -> str:
    """Name of the pipeline class that a model was saved with.

    Args:
        hub: as diffusers' `load_config` takes them: `revision`, `token`, `cache_dir`.

    Raises:
        OSError: there is no such model. KeyError: its index names no class.
    """
    from diffusers import DiffusionPipeline

    name = DiffusionPipeline.load_config(model, **hub)["_class_name"]
    return str(name[-1] if isinstance(name, (list, tuple)) else name)  # a list where the pipeline is a file beside it


def pipeline_for(name: str) -> Any:
    """The text-to-image pipeline with faces for models of the class `name`: of XL, or of 1.x and 2.x."""
    if "XL" in name:
        from ..pipeline_xl import StableDiffusionXLFaceFusionPipeline

        return StableDiffusionXLFaceFusionPipeline
    from ..pipeline import StableDiffusionFaceFusionPipeline

    return StableDiffusionFaceFusionPipeline


def load_pipeline(
    model: str | None = None,
    adapter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    controlnet: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """The pipeline with its adapter, on its device. The safety checker of the model, if it has one, stays on.

    Args:
        model: diffusers folder or Hub id; None is the embedded avatar model.
        adapter: folder, file or Hub id; None is the training-free mode, also where [`adapter_beside`] finds one.
        device: "auto" (CUDA where there is one) or a device of torch.
        dtype: "auto" (half precision on CUDA), "float32", "float16" or "bfloat16".
        controlnet: folder or Hub id of a ControlNet, or None.
        revision, variant: of `model`, as diffusers' `from_pretrained` takes them.

    Raises:
        FaceFusionError: the device is not there; ModelNotFoundError and AdapterMismatchError for the rest.
    """
    model = model or str(embedded_model())

    import torch
    from diffusers import ControlNetModel

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    name = ("float16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FaceFusionError(f"--device {device} cannot be used here: {error}") from error
    settings: dict[str, Any] = {"dtype": getattr(torch, name)}
    what = f"model {model}"
    try:
        if controlnet is not None:
            what = f"ControlNet {controlnet}"
            settings["controlnet"] = ControlNetModel.from_pretrained(controlnet, **settings)
            what = f"model {model}"
        kind = pipeline_for(class_of(model, revision=revision))
        pipe = kind.from_pretrained(model, revision=revision, variant=variant, **settings)
    except (OSError, ValueError, KeyError) as error:  # not there, offline, gated, a broken or other kind of model
        raise ModelNotFoundError(f"cannot load the {what}: {error}") from error
    pipe.set_progress_bar_config(desc="denoising", leave=False)
    if adapter is not None:
        pipe.load_face_fusion_adapter(adapter)
    return pipe.to(device)
