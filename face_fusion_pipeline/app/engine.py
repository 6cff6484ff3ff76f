"""One pipeline for all users of the app: forms to pictures, one call at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ..control_pictures import control_depth
from ..face_defaults import FaceDefaults, settings_of_pipeline
from ..face_detectors import FaceDetector
from ..face_errors import InvalidLayoutError
from ..face_identity import FaceIdentity
from ..face_layout import Box, assign_boxes, even_boxes, scale_boxes
from ..generation.provenance import describe, public_name
from ..generation.watermark import check_size
from .form import FieldError, Form, in_field
from .posing import PosingEngine


OnStep = Callable[[float, str], None]  # part of the work that is done in [0, 1], and what is being done


class CancelledError(Exception):
    """The user does not want the rest of the pictures."""


@dataclass(frozen=True)
class Picture:
    """One result.

    Attributes:
        image: with the faces. plain: the same noise without them, or None.
        boxes: the face boxes used, XYXY in pixels, and where they are from; None for a single person without a place.
        hidden: the model's safety checker blacked the picture out.
        text: what made it, for PNG text chunks.
    """

    image: Image.Image
    plain: Image.Image | None
    boxes: list[Box] | None
    hidden: bool
    text: dict[str, object]


class Engine(PosingEngine):
    """A Face Fusion pipeline and a face detector that any number of threads may ask.

    Args:
        pipe: [`StableDiffusionFaceFusionPipeline`].
        model, adapter: their names, for the text in the pictures; see `provenance.describe`.
        detector: see `face_detectors.load_detector`.
        watermark: the files of the pictures are to carry a watermark.

    Raises:
        FaceFusionError: the model's pictures are too small for a watermark.
    """

    def __init__(
        self,
        pipe: Any,
        model: str | None = None,
        adapter: str | None = None,
        detector: FaceDetector | None = None,
        watermark: bool = False,
    ) -> None:
        pipe.set_progress_bar_config(disable=True)
        super().__init__(pipe, detector)
        self.model, self.adapter, self.watermark = model, adapter, watermark
        if watermark:
            check_size(*self.size())

    def size(self, shape: tuple[int, int] | None = None) -> tuple[int, int]:
        """(width, height) of the pictures in pixels: the model's own square, or inside it the same `shape`."""
        side = self.pipe._default_resolution()
        if shape is None:
            return side, side
        width, height = (max(1, round(length * side / max(shape) / 8)) * 8 for length in shape)
        return width, height

    @property
    def defaults(self) -> FaceDefaults:
        """What the model recommends; nothing, if it says nothing."""
        return settings_of_pipeline(self.pipe) or FaceDefaults()

    @property
    def described(self) -> str:
        """What draws the pictures, in a sentence or two."""
        width, height = self.size()
        if self.model is None:
            return (
                f"Draws avatars, {width} × {height} pixels, with the small model that comes with the package: a real "
                "person comes out as an avatar. For photographs start the app with your own checkpoint, --model."
            )
        name, adapter = public_name(self.model), self.adapter and public_name(self.adapter)
        weights = f"with the weights {adapter}" if adapter else "training-free, a weaker likeness than with weights"
        return f"Draws with {name}, {width} × {height} pixels, {weights}."

    @property
    def has_style(self) -> bool:
        """Whether FaceStudio's weights are loaded, and so a picture can bring the style."""
        return self.pipe.face_studio is not None

    def run(
        self, form: Form, identities: list[FaceIdentity], on_step: OnStep, cancelled: Callable[[], bool]
    ) -> Iterator[Picture]:
        """Picture after picture; picture i is made with seed + i and does not depend on the others.

        Args:
            form: checked.
            identities: of `form.people`, see [`identity`].
            on_step: called after every denoising step.
            cancelled: asked at every step.

        Raises:
            CancelledError: `cancelled()` was true; the pictures so far have been handed out.
            FieldError, FaceFusionError: bad input that only the pipeline could see.
        """
        if form.control is not None:  # once: an estimator of depth takes its time to load
            form = replace(form, control=in_field("places", control_depth, form.control))
        if self.watermark:  # `__init__` has checked the size without a picture to follow
            in_field("places", check_size, *self.size(form.shape))
        for person, identity in zip(form.people, identities, strict=True):
            if identity.mode != identities[0].mode:
                words = f"an identity of {identity.mode} mode does not go with one of {identities[0].mode} mode"
                raise FieldError(person.field, f"{words}: make this one again")
        boxes = form.face_boxes and scale_boxes(form.face_boxes, (1, 1), self.size(form.shape))
        posed = self.posed(form, self.size(form.shape), boxes)
        control = self.control_of(form, posed)
        draft = len(identities) > 1 and boxes is None
        passes = 2 if form.compare or draft else 1
        for index in range(form.count):

            def report(part: float, done: int, index: int = index, words: str = "") -> None:
                if cancelled():
                    raise CancelledError
                pass_ = ("draft" if draft else "without the face") if passes - done == 2 else ""
                words = f"Picture {index + 1} of {form.count}" + (f", {pass_}" if pass_ else words)
                on_step((index * passes + done + part) / (form.count * passes), words)

            one = replace(form, seed=form.seed + index)
            plain = None
            if passes == 2:
                plain = self._denoise(one, control, lambda part: report(part, 0)).images[0]
            places, source = (boxes, "drawn") if boxes else (None, None)
            if draft:
                places, source = self._boxes_in_draft(plain, len(identities))
            faces = {"face_image": identities, "face_scale": [person.strength for person in form.people]}
            faces |= {"face_boxes": places} if places else {}
            seen = {**control, **faces, **(posed.faces(identities[0].mode) if posed else {})}
            output = self._denoise(one, seen, lambda part: report(part, passes - 1))
            hidden = any(getattr(output, "nsfw_content_detected", None) or [])
            image = output.images[0]
            if form.refine and not hidden:
                image = self._refined(one, image, faces, lambda: report(1.0, passes - 1, words=", faces again"))
            text = self._text(one, identities, places, source)
            yield Picture(image, plain, places, hidden, text)

    def _denoise(self, form: Form, seen: dict[str, Any], on_step: Callable[[float], None]) -> Any:
        """A call of the pipeline with the arguments `seen`: faces, and what else is followed."""
        import torch

        from ..guidance_interval import GuidanceInterval

        interval = form.guidance_in_low_noise_half and GuidanceInterval(form.guidance_in_low_noise_half)

        def after_step(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step((step + 1) / pipe.num_timesteps)
            return interval(pipe, step, timestep, tensors) if interval else tensors

        width, height = self.size(form.shape)
        style = {**form.style_of_picture, "face_detector": self.detector} if form.style_of_picture else {}
        try:
            with self._unet_lock:
                on_step(0.0)  # a run that waited for others may have been cancelled meanwhile
                return self.pipe(
                    form.full_prompt,
                    negative_prompt=form.negative_prompt or None,
                    num_inference_steps=form.steps,
                    guidance_scale=form.guidance,
                    width=width,
                    height=height,
                    generator=torch.Generator("cpu").manual_seed(form.seed),
                    callback_on_step_end=after_step,
                    **seen,
                    **style,
                )
        except InvalidLayoutError as error:  # boxes
            raise FieldError("places", error) from error

    def _refined(
        self, form: Form, image: Image.Image, faces: dict[str, Any], on_step: Callable[[], None]
    ) -> Image.Image:
        """The picture with its small faces drawn again; as it is, if fewer are found than there are people."""
        import torch

        boxes = faces.get("face_boxes") or self.find_boxes(image)
        if len(boxes) < len(form.people):
            return image

        def after_step(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return tensors

        with self._unet_lock:
            (again,) = self.pipe.refine_faces(
                image,
                form.prompt_of_one,
                face_image=faces["face_image"],
                face_scale=faces["face_scale"],
                face_boxes=assign_boxes(boxes, len(form.people)) if "face_boxes" not in faces else boxes,
                negative_prompt=form.negative_prompt or None,
                num_inference_steps=form.steps,
                guidance_scale=form.guidance,
                generator=torch.Generator("cpu").manual_seed(form.seed),
                callback_on_step_end=after_step,
            )
        return again

    def _boxes_in_draft(self, draft: Any, count: int) -> tuple[list[Box], str]:
        found = self.find_boxes(draft)
        if len(found) < count:
            return even_boxes(count, draft.height, draft.width), "even"
        return assign_boxes(found, count), "draft"

    def _text(
        self, form: Form, identities: list[FaceIdentity], boxes: list[Box] | None, source: str | None
    ) -> dict[str, object]:
        settings: dict[str, object] = {
            "prompt": form.full_prompt,
            "negative_prompt": form.negative_prompt or None,
            "seed": form.seed,
            "people": len(identities),
            "face_scale": ", ".join(f"{person.strength:g}" for person in form.people),
            "face_mode": identities[0].mode,
            "face_boxes": boxes and "; ".join(", ".join(f"{value:.0f}" for value in box) for box in boxes),
            "face_boxes_source": source,
            "steps": form.steps,
            "guidance": form.guidance,
            "low_noise_guidance": form.guidance_in_low_noise_half,
            "refine_faces": form.refine,
            "watermark": self.watermark,
            "control": None if form.control is None else "depth of the layout picture",
            "style_image": form.style_picture is not None or None,  # whatever it is called is nobody's business
            "style_scale": form.style_of_picture.get("style_scale"),
            **form.pose.text,
        }
        return describe(self.pipe, self.model, self.adapter, settings)
