"""Generated images as files: what exists is not made again, so that a stopped evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..face_defaults import EARLIER_NAMES
from ..face_errors import FaceFusionError, renamed
from ..face_self_attention import SelfAttentionReference
from ..files.atomic import write_text
from ..files.texts import read_json
from ..generation.contact_sheet import save_png
from ..generation.loading import load_pipeline
from ..generation.photos import with_mirrored
from ..generation.provenance import DISCLOSURE, SOURCE_TYPE
from ..guidance_interval import GuidanceInterval
from .image_files import to_pil
from .pictures import Picture


BLACKED_OUT = "blacked_out"  # in the text of a PNG file
MIRRORED = "-mirrored"  # at the end of a method: the mirrored reference is a second one
CutOut = Literal["true", "yunet", "haar"]  # whose box an avatar is cut out by: the renderer's, a detector's
TRUE_BOX: CutOut = "true"
METHODS = ("none", "training-free", "adapter")  # the usual ones
_LATER = {
    "weights_hash": None,
    "controlnet": None,
    "dtype": "float32",
    "cut_out": TRUE_BOX,
    "low_noise_guidance": None,
    "self_scale": 1.0,
}  # settings that older folders do not name


@dataclass(frozen=True)
class Settings:
    """Everything that decides what an image looks like, apart from its trial."""

    model: str
    adapter: str | None = None
    steps: int = 25
    guidance_scale: float = 4.0
    face_scale: float = 1.0
    training_free_scale: float = 1.0
    seed: int = 0
    batch: int = 4
    controlnet: str | None = None
    dtype: str = "float32"
    cut_out: CutOut = TRUE_BOX  # of references that are avatars
    low_noise_guidance: float | None = None  # guidance in the low-noise half of the timesteps; None: as before
    self_scale: float = SelfAttentionReference.scale  # of training-free and both, at the self-attention
    weights_hash: str | None = None  # of local files, which may be trained on under the same name

    @classmethod
    def of(
        cls,
        model: str,
        adapter: str | None = None,
        controlnet: str | None = None,
        beside: Sequence[str] = (),
        **more: Any,
    ) -> Settings:
        """Settings that know the weights in local files: UNet, adapter, ControlNet, and others that are `beside`."""
        hashed = hash_weights(model, adapter, controlnet, *beside)
        return cls(model, adapter, controlnet=controlnet, weights_hash=hashed, **more)

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of a pipeline: how it denoises."""
        interval = self.low_noise_guidance and GuidanceInterval(self.low_noise_guidance)
        guidance = {"guidance_scale": self.guidance_scale, "callback_on_step_end": interval}
        return {"num_inference_steps": self.steps, **guidance}


def denoising(settings: Mapping[str, Any]) -> str:
    """How pictures of these settings, as a report has them, were denoised: the words under its table."""
    low_noise = settings.get("low_noise_guidance")
    words = f"{settings['steps']} steps, guidance {settings['guidance_scale']}"
    return words if low_noise is None else f"{words} ({low_noise} in the low-noise half)"


def needs_adapter(method: str) -> bool:
    """Whether pictures of a method cannot be made without trained weights."""
    return method.removesuffix(MIRRORED) in ("adapter", "both")


PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # folders of a model, whose weights pictures come from


def hash_weights(model: str, *weights: str | None) -> str | None:
    """Of a model and weights for it: of the content of the local files among these, None where all are on the Hub."""
    base = [Path(model)] if Path(model).is_file() else [Path(model) / part for part in PARTS]
    folders = [*base, *(Path(place) for place in weights if place)]
    files = [
        file for place in folders for file in ([place] if place.is_file() else sorted(place.glob("*.safetensors")))
    ]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16] if files else None


def pipeline_of(settings: Settings, device: str = "cpu") -> Any:
    """The pipeline with exactly the adapter that the settings name, or none; see `loading.load_pipeline`.

    The safety checker of the model stays on. A picture that it blacks out is marked in its file.
    """
    pipe = load_pipeline(settings.model, settings.adapter, device, settings.dtype, settings.controlnet)
    pipe.face_defaults = None  # what is measured is said with every call, and not changed by a file
    pipe.set_progress_bar_config(disable=True)
    return pipe


def keep_settings(out: Path, settings: Settings) -> None:
    """Note the settings in `out`; FaceFusionError if images made with others lie there already.

    The size of the batch may be another one: where memory was short, a run goes on with a smaller one.
    """
    path, now = out / "settings.json", asdict(settings)
    earlier = read_json(path, "choose an empty folder") if path.is_file() else now
    if isinstance(earlier, dict):
        earlier = _LATER | renamed(earlier, EARLIER_NAMES, path)
    if not isinstance(earlier, dict) or earlier | {"batch": settings.batch} != now:
        raise FaceFusionError(f"{out} holds images made with other settings ({path}): choose an empty folder")
    write_text(path, json.dumps(now, indent=1) + "\n")


def make_pictures(
    pipe: Any,
    pictures: Sequence[Picture],
    face_of: Callable[[str], Image.Image],
    settings: Settings,
    *,
    detector: Any = "auto",
) -> None:
    """Make the pictures that are not there yet: the same seed, hence the same noise, for every method.

    Neighbours in the list with the same people and method encode them once, and `settings.batch` prompts are denoised
    together; several people are placed one picture at a time, on the faces that `detector` finds in a draft.
    `face_of` gives the reference crop of a person by name.
    """
    with tqdm(total=len(pictures), desc="images", unit="image") as progress:
        for (people, method), group in groupby(pictures, key=lambda picture: (picture.people, picture.method)):
            members = list(group)
            missing = [picture for picture in members if not picture.path.is_file()]
            progress.update(len(members) - len(missing))
            face = _face_arguments(pipe, [face_of(name) for name in people], method, settings) if missing else {}
            if len(people) > 1 and face:
                face["face_detector"] = detector
            size = settings.batch if len(people) == 1 else 1
            for start in range(0, len(missing), size):
                batch = missing[start : start + size]
                for picture, (image, hidden) in zip(batch, _images(pipe, batch, face, settings), strict=True):
                    save_png(to_pil(image), picture.path, _text(picture) | ({BLACKED_OUT: True} if hidden else {}))
                progress.update(len(batch))


def _text(picture: Picture) -> dict[str, object]:
    """What the file says of itself."""
    made = {"prompt": picture.prompt, "seed": picture.seed, "method": picture.method}
    return {**made, "description": DISCLOSURE, "digital_source_type": SOURCE_TYPE}


def _face_arguments(pipe: Any, faces: list[Image.Image], method: str, settings: Settings) -> dict[str, Any]:
    if method == "none":
        return {}
    mode = method.removesuffix(MIRRORED)
    references = [[face] if mode == method else with_mirrored([face]) for face in faces]
    people = [pipe.encode_face(images, face_mode=mode) for images in references]
    scale = settings.training_free_scale if mode == "training-free" else settings.face_scale
    strength = {"face_scale": scale} | ({} if mode == "adapter" else {"face_self_scale": settings.self_scale})
    return {"face_image": people if len(people) > 1 else people[0], **strength}


@torch.inference_mode()
def _images(
    pipe: Any, pictures: Sequence[Picture], face: dict[str, Any], settings: Settings
) -> list[tuple[torch.Tensor, bool]]:
    """Images (3, H, W) in [0, 1] on the CPU, and whether the safety checker blacked them out.

    Noise comes from CPU generators: the same on every device.
    """
    output = pipe(
        [picture.prompt for picture in pictures],
        **settings.call,
        generator=[torch.Generator().manual_seed(picture.seed or 0) for picture in pictures],
        output_type="pt",
        **face,
    )
    hidden = getattr(output, "nsfw_content_detected", None) or [False] * len(pictures)
    return list(zip(output.images.float().cpu(), map(bool, hidden), strict=True))
