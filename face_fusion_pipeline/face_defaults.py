"""What suits a call that does not say otherwise: what a model recommends in its folder, and what its scheduler tells.

A model that was measured best with other settings than those of diffusers says so itself, and every way to it (a bare
`pipe(...)`, the commands, the app) asks it alike. Nothing here needs torch: commands check their arguments before.
"""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .face_errors import FaceFusionError, also_named, renamed


logger = logging.getLogger(__name__)

DEFAULTS_NAME = "face_fusion_defaults.json"
EARLIER_NAMES = {"late_guidance": "low_noise_guidance"}
FACE_MODES = ("adapter", "training-free", "both")


@dataclass(frozen=True)
class FaceDefaults:
    """Recommended settings of a model; None leaves diffusers' or this package's own.

    Attributes:
        guidance_scale: classifier-free guidance.
        low_noise_guidance: guidance in the low-noise half of the timesteps, see `guidance_interval.GuidanceInterval`.
        num_inference_steps: denoising steps.
        face_mode: see [`FaceFusionMixin.encode_face`]; one that needs weights counts where weights are loaded.
        face_mirrored: whether a single photo of a person is shown mirrored as well.
        face_familiarity: name of the file beside it by which faces are told that the model does not know, see
            `face_familiarity.Familiarity`.
        vocabulary: group -> the words and phrases that the model knows, for one that knows no others.
    """

    guidance_scale: float | None = None
    low_noise_guidance: float | None = None
    num_inference_steps: int | None = None
    face_mode: str | None = None
    face_mirrored: bool | None = None
    face_familiarity: str | None = None
    vocabulary: Mapping[str, tuple[str, ...]] | None = None
    folder: Path | None = field(default=None, compare=False, repr=False)  # that they were read from

    @property
    def familiarity_file(self) -> Path | None:
        """The file of `face_familiarity`; None: there is none, or it is not there."""
        if self.face_familiarity is None or self.folder is None:
            return None
        path = self.folder / self.face_familiarity
        return path if path.is_file() else None

    @classmethod
    def from_dict(cls, values: Any, source: object = "the defaults") -> "FaceDefaults":
        """Checked settings. Raises [`FaceFusionError`] that names `source` and the key."""
        if not isinstance(values, dict):
            raise FaceFusionError(f"{source} must hold an object, got {type(values).__name__}")
        values = renamed(values, EARLIER_NAMES, source)
        for key, value in values.items():
            if key not in _CHECKS:
                raise FaceFusionError(f"{source} has an unknown key {key!r}; known are {', '.join(_CHECKS)}")
            right, what = _CHECKS[key]
            if value is not None and not right(value):
                raise FaceFusionError(f"{source}: {key} must be {what}, got {value!r}")
        guidance, later = values.get("guidance_scale"), values.get("low_noise_guidance")
        if later is not None and not (guidance is not None and guidance > 1):
            raise FaceFusionError(f"{source}: low_noise_guidance goes with a guidance_scale above 1, got {guidance!r}")
        words = values.get("vocabulary")
        if words is not None:
            values = values | {"vocabulary": {group: tuple(phrases) for group, phrases in words.items()}}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What is recommended, as the file has it."""
        values: dict[str, Any] = {key: getattr(self, key) for key in _CHECKS if getattr(self, key) is not None}
        if self.vocabulary is not None:
            values["vocabulary"] = {group: list(phrases) for group, phrases in self.vocabulary.items()}
        return values

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the file, and what it names, into a folder that is there."""
        beside = self.familiarity_file
        if beside is not None and beside.parent.resolve() != Path(folder).resolve():
            shutil.copyfile(beside, Path(folder) / beside.name)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        (Path(folder) / DEFAULTS_NAME).write_text(text + "\n", encoding="utf-8")

    @property
    def late_guidance(self) -> float | None:
        """An earlier name of `low_noise_guidance`."""
        return renamed({"late_guidance": self.low_noise_guidance}, EARLIER_NAMES, "FaceDefaults")["low_noise_guidance"]


FaceDefaults.__init__ = also_named(**EARLIER_NAMES)(FaceDefaults.__init__)  # type: ignore[method-assign]


def _number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and least <= float(value) <= most


def _words(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(phrases, (list, tuple)) and all(isinstance(phrase, str) for phrase in phrases)
        for phrases in value.values()
    )


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "guidance_scale": (lambda value: _number(value, 0, 100), "a number from 0 to 100"),
    "low_noise_guidance": (lambda value: _number(value, math.nextafter(1, 2), 100), "a number above 1, at most 100"),
    "num_inference_steps": (lambda value: type(value) is int and 1 <= value <= 1000, "a whole number from 1 to 1000"),
    "face_mode": (lambda value: value in FACE_MODES, f"one of {', '.join(FACE_MODES)}"),
    "face_mirrored": (lambda value: isinstance(value, bool), "true or false"),
    "face_familiarity": (
        lambda value: isinstance(value, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", value) is not None,
        "the name of a .safetensors file in the same folder",
    ),
    "vocabulary": (_words, "an object with a list of texts for each group"),
}


def read_defaults(folder: str | os.PathLike[str]) -> FaceDefaults | None:
    """The settings in a model's folder, or None if it has none.

    Raises [`FaceFusionError`] that names the file, and the key that is wrong.
    """
    path = Path(folder) / DEFAULTS_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FaceFusionError(f"{path} cannot be read as JSON: {error}") from error
    return replace(FaceDefaults.from_dict(values, path), folder=path.parent)


def defaults_of(
    model: str | os.PathLike[str], revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> FaceDefaults | None:
    """As [`read_defaults`], of a folder or of a model on the Hub; None also where the Hub cannot be asked."""
    path = file_of(model, DEFAULTS_NAME, revision, cache_dir)
    defaults = None if path is None else read_defaults(path.parent)
    if defaults is not None and defaults.face_familiarity is not None:
        file_of(model, defaults.face_familiarity, revision, cache_dir)  # from the Hub into the same folder
    return defaults


def file_of(
    model: str | os.PathLike[str],
    name: str,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path | None:
    """A file in the folder `model` or in the repository of this Hub id; None where there is none, or no Hub.

    It is fetched by itself, before the model is.
    """
    if os.path.isdir(model):
        path = Path(model) / name
        return path if path.is_file() else None
    if os.path.isfile(model) or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        return None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    place: dict[str, Any] = {"repo_id": str(model), "filename": name, "revision": revision, "cache_dir": cache_dir}
    cached = try_to_load_from_cache(**place)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None:  # asked before: it has no such file
        return None
    try:
        return Path(hf_hub_download(**place))
    except (OSError, ValueError) as error:  # no such file, offline, not allowed
        logger.debug("no %s of %s: %s", name, model, error)
        return None


def loaded_defaults(name: str, parts: Mapping[str, Any]) -> FaceDefaults | None:
    """The settings of the model that a pipeline was loaded from.

    Args:
        name: what `from_pretrained` was given.
        parts: components of the pipeline; those of a model on the Hub know the folder in the cache, and so the commit.
    """
    if not os.path.isdir(name):
        for part in parts.values():
            folder = Path(str(getattr(getattr(part, "config", None), "_name_or_path", ""))).parent
            if folder.parent.name == "snapshots" and (folder / "model_index.json").is_file():
                return defaults_of(name, folder.name, folder.parents[2])
    return defaults_of(name)


# --- Models distilled to few steps ---------------------------------------------------------------------------------
#
# They draw in 1 to 8 steps and have guidance in their weights: more of it, or many steps, burn their pictures.

# Schedulers that are for such models alone -> steps that suit them.
DISTILLED = {"LCMScheduler": 8, "TCDScheduler": 4}
# Lightning and Hyper-SD draw with these from the last timestep on; so do other models, but not in FEW steps.
TRAILING = ("EulerDiscreteScheduler", "DDIMScheduler")
FEW = 8


def few_step_defaults(
    scheduler: str, config: Mapping[str, Any], steps: int | None = None, guidance_embedded: bool = False
) -> FaceDefaults | None:
    """Guidance, and steps if none were asked for, of a model with this scheduler; None if it is no distilled one.

    Args:
        scheduler: name of its class.
        config: its configuration.
        steps: those that were asked for. The schedulers of Lightning and Hyper-SD serve other models, too: they are
            taken for them in at most 8 steps.
        guidance_embedded: the UNet is told the guidance (`time_cond_proj_dim`): there is no unconditional row at any
            guidance, and diffusers' own suits it.
    """
    if scheduler in DISTILLED:
        return FaceDefaults(None if guidance_embedded else 1.0, num_inference_steps=DISTILLED[scheduler])
    distilled = (
        scheduler in TRAILING
        and config.get("timestep_spacing") == "trailing"
        and config.get("prediction_type", "epsilon") in ("epsilon", "sample")
        and not config.get("rescale_betas_zero_snr")
    )
    few = isinstance(steps, Integral) and 1 <= steps <= FEW
    return FaceDefaults(1.0) if distilled and few and not guidance_embedded else None


def with_few_steps(own: FaceDefaults | None, few: FaceDefaults | None) -> FaceDefaults | None:
    """What a model recommends itself, and where it does not say, what suits its scheduler."""
    if own is None or few is None:
        return own or few
    found = {
        name: getattr(few, name)
        for name in ("guidance_scale", "num_inference_steps")
        if getattr(own, name) is None and getattr(few, name) is not None
    }
    return replace(own, **found)


def settings_of_pipeline(pipe: Any, steps: int | None = None) -> FaceDefaults | None:
    """What suits a call of a loaded pipeline: its `face_defaults`, and what its scheduler of today says."""
    embedded = getattr(getattr(pipe.unet, "config", None), "time_cond_proj_dim", None) is not None
    few = few_step_defaults(type(pipe.scheduler).__name__, pipe.scheduler.config, steps, embedded)
    return with_few_steps(pipe.face_defaults, few)
