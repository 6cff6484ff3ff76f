"""Faces for any Stable Diffusion pipeline: encode people, place them, let the UNet see them, call the pipeline."""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .call_arguments import Call, bind_call, follow_steps, has_call_below, with_whole_signature
from .conditioner import IdentityOptions, conditioner_of, one_mode
from .conditioner_face_snap import snap_context
from .conditioner_face_studio import MODE, Style, studio_acting, studio_context
from .conditioner_reference import ReferenceConditioner  # noqa: F401  (registers the modes)
from .face_attention import FaceCall
from .face_layout import Background, Box, Layout, Overlap
from .face_loader_mixin import FaceLoaderMixin
from .face_ownership import check_idle, sole_use
from .face_people import Faces, check_window, encode_people, wanted_people
from .face_places import DraftInterrupted, Placement, picture_rows, place_people, with_boxes
from .face_self_attention import SelfAttentionReference
from .face_snap_loader_mixin import FaceSnapLoaderMixin
from .face_studio_loader_mixin import FaceStudioLoaderMixin


_tokenizing = threading.RLock()


class FaceFusionMixin(FaceLoaderMixin, FaceStudioLoaderMixin, FaceSnapLoaderMixin):
    """Adds faces to a diffusers pipeline that has `unet`, `vae`, `scheduler` and `encode_prompt`.

    Put it before the pipeline class: `class Mine(FaceFusionMixin, StableDiffusionPipeline)`. Without a face, or with
    scale 0, a call is exactly the pipeline's own.

    A model may recommend settings (`face_fusion_defaults.json` in its folder): `face_defaults` has them, and a call
    uses them for what it is not told. None: there are none, or they are not wanted. With a scheduler of distilled
    models, guidance and steps that neither says are theirs, see `face_defaults`.

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
            return encode_people(self, [images], face_mode, [options])[0]

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
            return encode_people(self, faces, face_mode, options)

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
            face_image: a [`FaceIdentity`], one or several face crops of one person, or a list of these for several
                people: `[[ada_1, ada_2], [bob]]`; one level deeper, each prompt has its own. None: the plain pipeline.
            face_scale, face_self_scale, face_weights, face_mode, face_resolution, face_mirrored, identity_by: how, and
                how strongly, people are seen: see `face_people.Faces`.
            face_start, face_end: step i of n sees the faces where face_start <= i / n < face_end.
            face_boxes, face_masks, face_layout, face_assign, face_overlap, face_background, face_detector: where
                people go, see `face_places.Placement`. Several without a place: where they stand in a first drawing.
            style_image, style_scale, style_context: FaceStudio's picture, or one for each prompt, whose faces are
                covered; how strongly it counts, by default .5; and how, see `conditioner_face_studio.Style`.

        Returns:
            What the underlying pipeline returns; where people were placed, it also has `face_boxes`, for each image
            the boxes used, in the order of the people (None for masks), and `face_boxes_source`: where they come
            from (see `face_layout.Layout`), a list with one for each image where the images differ.

        Raises:
            FaceFusionError: a subclass for each kind of bad input; or the UNet is in use by another call with faces.
        """
        faces = Faces(
            *(face_image, face_scale, face_self_scale, face_weights, face_mode, face_resolution, face_mirrored),
            identity_by,
        )
        place = (face_boxes, face_masks, face_layout, face_assign, face_overlap, face_background, face_detector)
        window, style = check_window(face_start, face_end), Style(style_image, style_scale, style_context)
        call = bind_call(self, FaceFusionMixin, super().__call__, (prompt, *args), kwargs)  # type: ignore[misc]
        return self._generate(call, faces, window, Placement(*place), style)

    def _generate(
        self, call: Call, faces: Faces, window: tuple[float, float], placement: Placement, style: Style
    ) -> Any:
        """See [`__call__`]: who is there, where, and the call with them in the UNet."""
        wanted = faces.wanted(call.prompts)
        style.check()
        if not any(person.scale for row in wanted for person in row) or not self._any_layer_scale():
            if style.image is None and self._token_network is None:
                check_idle(self.unet)
                return call.run()
            wanted = []
        with sole_use(self.unet):
            options = faces.options(wanted, call.lora_scale)
            people = wanted_people(self, faces, wanted, options)
            conditioner = conditioner_of(one_mode(people) or MODE)
            context = studio_context(self, style, call, placement.detector, wanted=one_mode(people) == MODE)
            network = snap_context(self, call, wanted, people, options)
            try:
                layouts = self._layouts(placement, [len(row) for row in people], call) if wanted else []
            except DraftInterrupted as stopped:
                return stopped.result
            rows = picture_rows(self, people, layouts, placement, call)
            state = self._follow_steps(call, *window)
            with (
                studio_acting(self, context),
                conditioner.installed(self, rows, state, context),
                nullcontext() if network is None else network.installed(rows, state),
                self._layouts_applied(layouts, call.images),
            ):
                result = call.run()
        return with_boxes(result, layouts, call.images)

    def _follow_steps(self, call: Call, start: float, end: float) -> FaceCall:
        """Which rows see faces in which steps, see `call_arguments.follow_steps`; for subclasses."""
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
