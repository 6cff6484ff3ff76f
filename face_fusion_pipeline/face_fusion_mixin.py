"""Faces for any Stable Diffusion pipeline: encode people, place them, let the UNet see them, call the pipeline."""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from .call_arguments import Call, bind_call, has_call_below, with_whole_signature
from .conditioner import IdentityOptions, Person, conditioner_of, mode_by, one_mode
from .conditioner_face_snap import MODE as SNAP_MODE
from .conditioner_face_snap import snap_context
from .conditioner_face_studio import MODE, Style, studio_acting, studio_context
from .conditioner_reference import ReferenceConditioner  # noqa: F401  (registers the modes)
from .face_attention import FaceCall, check_idle
from .face_axes import face_axes, per_person, weights_per_person
from .face_familiarity import encode_people
from .face_layout import Background, Box, Layout, Overlap, Placement
from .face_loader_mixin import FaceLoaderMixin, check_scale, check_window
from .face_ownership import sole_use
from .face_places import DraftInterrupted, picture_rows, place_people, with_boxes
from .face_self_attention import SelfAttentionReference
from .face_snap_loader_mixin import FaceSnapLoaderMixin
from .face_steps import follow_steps
from .face_studio_loader_mixin import FaceStudioLoaderMixin


_tokenizing = threading.RLock()
MODE_WITH_WEIGHTS = "adapter"  # where weights are loaded and no mode is asked for: the paper


class FaceFusionMixin(FaceLoaderMixin, FaceStudioLoaderMixin, FaceSnapLoaderMixin):
    """Adds faces to a diffusers pipeline that has `unet`, `vae`, `scheduler` and `encode_prompt`.

    Put it before the pipeline class: `class Mine(FaceFusionMixin, StableDiffusionPipeline)`. Without a face, or with
    scale 0, a call is exactly the pipeline's own.

    A model may recommend settings (`face_fusion_defaults.json` in its folder): `face_defaults` has them, and a call
    uses them for what it is not told. None: there are none, or they are not wanted. With a scheduler of distilled
    models, guidance and steps that neither says are theirs, see `face_few_steps`.

    One call with faces at a time uses a UNet; a second one is refused, in another thread and in a callback. Calls
    without faces in other threads, also of stock pipelines on the same UNet, go their own way.
    """

    vae: Any
    scheduler: Any
    image_processor: Any
    vae_scale_factor: int
    do_classifier_free_guidance: bool
    _guidance_scale: float
    _execution_device: torch.device
    _interrupt: bool
    _outer: Any = None  # the pipeline that the user called, see `as_pipeline`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if has_call_below(cls, FaceFusionMixin):  # a pipeline, not yet another mixin
            cls.__call__ = with_whole_signature(cls.__call__, cls, FaceFusionMixin)  # type: ignore[method-assign]

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are passed over: `_interrupt` was set here or in the pipeline called."""
        return any(getattr(pipe, "_interrupt", False) for pipe in (self, self._outer))

    # --- Identity ------------------------------------------------------------------------------------------------

    def encode_face(
        self,
        images: Any,
        weights: Any = None,
        face_mode: str | None = None,
        face_resolution: int | None = None,
        self_attention: SelfAttentionReference | None = None,
        mirrored: bool | None = None,
    ) -> Any:
        """Encode one or several face crops of one person into an identity that any later call can take.

        Args:
            images: see `reference_pass.face_tensors`; already cropped to the face.
            weights: one number >= 0 for each image, equal by default; only ratios matter (a morph slider).
            face_mode: `"adapter"`, trained weights at the cross-attention (the paper); `"training-free"`, the model's
                own at the self-attention; `"both"`; `"face-studio"`; `"face-snap"`; or `None`: as the model
                recommends, else with what is loaded; training-free for a face unlike what the model knows, if it can
                tell (see `face_familiarity`).
            face_resolution: side in pixels, default the adapter's, else the UNet's own.
            self_attention: what the self-attention sees of the face in the latter two modes, and how strongly.
            mirrored: show each image mirrored as well, with the same weight. Default: a single image, if the model
                recommends that.

        Raises:
            FaceFusionError: bad image, weight, mode or resolution; or the UNet is in use by another call with faces.
        """
        with sole_use(self.unet):
            options = IdentityOptions(weights, face_resolution, self_attention, None, mirrored)
            return encode_people(self, [images], face_mode, [options], self._face_mode(face_mode))[0]

    def encode_people(self, faces: Sequence[Any], face_mode: str | None = None) -> list[Any]:
        """Identities of people who are to be seen together: all in one mode, also where the model chooses it.

        Args:
            faces: of each person an identity, or what [`encode_face`] takes.
            face_mode: see [`encode_face`].

        Raises:
            FaceFusionError: as [`encode_face`]; IdentityMismatchError: an identity of another mode or model.
        """
        with sole_use(self.unet):
            options = [IdentityOptions()] * len(faces)
            return encode_people(self, faces, face_mode, options, self._face_mode(face_mode))

    def _face_mode(self, face_mode: str | None) -> str:
        """The mode of this name, or the one that is taken where none is asked for."""
        if face_mode is not None:
            return conditioner_of(face_mode).mode
        if self._face_adapter is None:
            loaded = {MODE: self.face_studio, SNAP_MODE: self.face_snap}
            return next((mode for mode, weights in loaded.items() if weights is not None), "training-free")
        return getattr(self.face_defaults, "face_mode", None) or MODE_WITH_WEIGHTS

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As the underlying pipeline's, one thread after the other: a tokenizer that threads share is not safe."""
        with _tokenizing:
            return super().encode_prompt(*args, **kwargs)  # type: ignore[misc]

    # --- Generation ----------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        face_image: Any = None,
        face_scale: float | Sequence[float] = 1.0,
        face_self_scale: float | Sequence[float] | None = None,
        face_weights: Any = None,
        face_start: float = 0.0,
        face_end: float = 1.0,
        face_mode: str | None = None,
        face_resolution: int | None = None,
        face_mirrored: bool | None = None,
        face_boxes: Any = None,
        face_masks: Any = None,
        face_layout: Any = None,
        face_assign: Sequence[int] | None = None,
        face_overlap: Overlap = "nearest",
        face_background: Background = "none",
        face_detector: Any = "auto",
        style_image: Any = None,
        style_scale: float | None = None,
        style_context: str | None = None,
        identity_by: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as the underlying pipeline does, with people's faces fused in.

        Args:
            prompt, args, kwargs: those of the underlying pipeline. Guidance and steps that are not given are those of
                `face_defaults`, where a model recommends any; `guidance_scale` that is given is that of all steps.
            face_image: `None` (the plain pipeline), a [`FaceIdentity`], one or several face crops of one person (see
                [`encode_face`]), or a list of these for several people: `[[ada_1, ada_2], [bob]]`. One level deeper,
                each prompt has its own people. See `face_axes`.
            face_scale: strength in [0, 100]: 1 is the paper, 0 is exactly the plain pipeline. One, or one a person.
            face_self_scale: of the modes `"training-free"` and `"both"`: strength at the self-attention in [0, 100],
                which `face_scale` multiplies. Default: that of the identity, see `SelfAttentionReference`.
            face_weights: one number for each image, see [`encode_face`]; of several people one such list each.
            face_start, face_end: step i of n sees the faces where face_start <= i / n < face_end.
            face_mode, face_resolution, face_mirrored: see [`encode_face`].
            face_boxes: where each person's face goes: XYXY in pixels of the output, one for each person, or one such
                list for each prompt. The person's mask is the box enlarged 1.6 times.
            face_masks: instead of boxes one mask for each person: path, image or array (H, W), see
                `face_layout.read_mask`.
            face_layout: instead of boxes a picture with as many faces, which are detected, or a list with one picture
                for each prompt. Several people without boxes, masks and layout: a draft without faces is generated
                first, as an ordinary call with its callbacks, and takes its place.
            face_assign: for each person the number of the face in the layout or draft that it takes, counted from 0
                and from left to right. Default: people as given, from left to right.
            face_overlap, face_background: what queries in several masks, and in none, see; see
                `face_layout.visible_people`. `"literal"` and `"all"` are Eq. 7 of the paper.
            face_detector: see `face_detectors.load_detector`.
            style_image: FaceStudio's style picture, or one for each prompt; its faces are covered.
            style_scale: from 0, the prompt alone, to 1, the style picture alone; default .5 where there is one.
            style_context: FaceStudio's tokens `"replace"` the text or are `"append"`ed to it; default: the weights'.
            identity_by: `"face-fusion"`, `"face-studio"` or `"face-snap"`, who takes `face_image` where several are
                loaded; default the first of them that is.

        Returns:
            What the underlying pipeline returns; where people were placed, it also has `face_boxes`, for each image
            the boxes used, in the order of the people (None for masks), and `face_boxes_source`: where they come
            from (see `face_layout.Layout`), a list with one for each image where the images differ.

        Raises:
            FaceFusionError: a subclass for each kind of bad input; or the UNet is in use by another call with faces.
        """
        check_window(face_start, face_end)
        style = Style(style_image, style_scale, style_context)
        call = bind_call(self, FaceFusionMixin, super().__call__, (prompt, *args), kwargs)  # type: ignore[misc]
        faces = [] if face_image is None else face_axes(face_image, call.prompts)
        scales = per_person(face_scale, faces, "face_scale", check_scale)
        self_scales = per_person(face_self_scale, faces, "face_self_scale", check_self_scale)
        style.check()
        if not any(map(any, scales)) or not self._any_layer_scale():
            if style.image is None and self._token_network is None:
                check_idle(self.unet)
                return call.run()
            faces = []

        placement = Placement(
            face_boxes, face_masks, face_layout, face_assign, face_overlap, face_background, face_detector
        )
        with sole_use(self.unet):
            mode = mode_by(self, identity_by, face_mode)
            weights = weights_per_person(face_weights, faces)
            options = IdentityOptions(resolution=face_resolution, mirrored=face_mirrored, lora_scale=call.lora_scale)
            each = [
                replace(options, weights=w, self_scale=own)
                for row in zip(faces, weights, self_scales, strict=False)
                for _, w, own in zip(*row, strict=True)
            ]
            everybody = [face for row in faces for face in row]
            identities = iter(encode_people(self, everybody, mode, each, self._face_mode(mode)))
            people = [
                tuple(Person(next(identities), scale) for _, scale in zip(*row, strict=True))
                for row in zip(faces, scales, strict=False)
            ] or [()]
            conditioner = conditioner_of(one_mode(people) or MODE)
            context = studio_context(self, style, call, face_detector, wanted=one_mode(people) == MODE)
            network = snap_context(self, call, faces, people, each)
            try:
                layouts = self._layouts(placement, [len(row) for row in people], call) if faces else []
            except DraftInterrupted as stopped:
                return stopped.result
            rows = picture_rows(self, people, layouts, placement, call)
            state = self._follow_steps(call, face_start, face_end)
            with (
                studio_acting(self, context),
                conditioner.installed(self, rows, state, context),
                nullcontext() if network is None else network.installed(rows, state),
                self._layouts_applied(layouts, call.images),
            ):
                result = call.run()
        return with_boxes(result, layouts, call.images)

    def _follow_steps(self, call: Call, start: float, end: float) -> FaceCall:
        """Which rows see faces in which steps, see `face_steps.follow_steps`; for subclasses."""
        return follow_steps(self, call, start, end)

    def _layouts(self, placement: Placement, people: list[int], call: Call) -> list[Layout]:
        """Where people go, see `face_places.place_people`; for subclasses."""
        return place_people(self, placement, people, call)

    def _needs_layout(self) -> bool:
        """Whether the face of a single person has to be placed, too; for subclasses."""
        return False

    def _layouts_applied(self, layouts: list[Layout], images: int) -> AbstractContextManager[None]:
        """What else the layouts mean while the underlying pipeline runs; for subclasses."""
        return nullcontext()

    def _detect_boxes(self, image: Any, detector: Any) -> list[Box]:
        from .face_detectors import load_detector
        from .face_images import detect_faces

        return [face.box for face in detect_faces(image, self._kept("detector", detector, load_detector))]

    def _default_resolution(self) -> int:
        return min(self._default_size())

    def _default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the UNet's own images."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def _output_size(self, arguments: dict[str, Any]) -> tuple[int, int]:
        """(height, width) in pixels of the images that the underlying pipeline will make; for subclasses."""
        if (latents := arguments.get("latents")) is not None:  # diffusers asks nothing else then
            return latents.shape[-2] * self.vae_scale_factor, latents.shape[-1] * self.vae_scale_factor
        height, width = arguments.get("height"), arguments.get("width")
        return (height, width) if height and width else self._default_size()  # as diffusers: one alone does not count

    def _row_roles(self) -> tuple[str, ...]:
        """What the equal blocks of the UNet's batches are, in order; see `face_attention.sees_faces`. For subclasses
        whose pipelines form other batches."""
        guided = ("unconditional",) if self.do_classifier_free_guidance else ()
        perturbed = ("perturbed",) if getattr(self, "do_perturbed_attention_guidance", False) else ()
        return (*guided, "conditional", *perturbed)


def check_self_scale(scale: Any, name: str) -> float | None:
    """As [`check_scale`]; None is the identity's own."""
    return None if scale is None else check_scale(scale, name)
