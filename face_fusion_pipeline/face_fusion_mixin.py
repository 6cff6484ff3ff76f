"""Face Fusion for any Stable Diffusion pipeline: encode the faces, install processors, call the pipeline, restore."""

import difflib
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from .face_adapter import KeysAndValues, unet_fingerprint
from .face_attention import (
    Cast,
    FaceFusionAttnProcessor,
    FusionSwitch,
    PersonKeys,
    check_idle,
    installed_processors,
    reference_log_weights,
)
from .face_axes import face_axes, is_identity, per_person, weights_per_person
from .face_defaults import FACE_MODES
from .face_errors import FaceAxesError, FaceFusionError, IdentityMismatchError, InvalidPromptError
from .face_file_checks import check_identity_fits
from .face_identity import (
    MODE_WITH_WEIGHTS,
    FaceIdentity,
    capture_hidden_states,
    encode_latents,
    face_tensors,
    noise_latents,
    reference_passes,
    self_attention_projections,
)
from .face_layout import (
    Background,
    Box,
    Layout,
    Overlap,
    Placement,
    assign_boxes,
    even_boxes,
    given_masks,
    layer_regions,
    layout_from_boxes,
    scale_boxes,
)
from .face_loader_mixin import FaceLoaderMixin, check_scale, check_window
from .face_ownership import own_thread, sole_use
from .face_pictures import load_images
from .face_self_attention import SelfAttentionReference
from .late_guidance import LateGuidance


logger = logging.getLogger(__name__)


class FaceFusionMixin(FaceLoaderMixin):
    """Adds faces to a diffusers pipeline that has `unet`, `vae`, `scheduler` and `encode_prompt`.

    Put it before the pipeline class: `class Mine(FaceFusionMixin, StableDiffusionPipeline)`. Without a face, or with
    scale 0, a call is exactly the pipeline's own.

    A model may recommend settings (`face_fusion_defaults.json` in its folder): `face_defaults` has them, and a call
    uses them for what it is not told. None: there are none, or they are not wanted.

    One call with faces at a time uses a UNet; a second one is refused, in another thread and in a callback. Calls
    without faces in other threads, also of stock pipelines on the same UNet, go their own way.
    """

    vae: Any
    scheduler: Any
    encode_prompt: Any
    maybe_free_model_hooks: Any
    image_processor: Any
    vae_scale_factor: int
    do_classifier_free_guidance: bool
    _guidance_scale: float
    _execution_device: torch.device
    _interrupt: bool
    _outer: Any = None  # the pipeline that the user called, see `as_pipeline`

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
    ) -> FaceIdentity:
        """Encode one or several face crops of one person into an identity that any later call can take.

        Args:
            images: see `face_identity.face_tensors`; already cropped to the face.
            weights: one number >= 0 for each image, equal by default; only ratios matter (a morph slider).
            face_mode: `"adapter"`, trained weights at the cross-attention (the paper); `"training-free"`, the model's
                own at the self-attention; `"both"`; or `None`: as the model recommends, else with an adapter that is
                loaded.
            face_resolution: side in pixels, default the adapter's, else the UNet's own.
            self_attention: what the self-attention sees of the face in the latter two modes, and how strongly.
            mirrored: show each image mirrored as well, with the same weight. Default: a single image, if the model
                recommends that.

        Raises:
            FaceFusionError: bad image, weight, mode or resolution; or the UNet is in use by another call with faces.
        """
        with sole_use(self.unet):
            return self._encode_face(images, weights, face_mode, face_resolution, self_attention, mirrored)

    @torch.no_grad()
    def _encode_face(
        self,
        images: Any,
        weights: Any,
        face_mode: str | None,
        face_resolution: int | None,
        self_attention: SelfAttentionReference | None = None,
        mirrored: bool | None = None,
    ) -> FaceIdentity:
        mode = self._face_mode(face_mode)
        adapter = self._face_adapter if mode != "training-free" else None
        metadata = adapter.metadata if adapter else None
        own = (self_attention or SelfAttentionReference()) if mode != "adapter" else None
        resolution: Any = face_resolution
        if resolution is None:
            resolution = metadata.resolution if metadata else self._default_resolution()
        if not isinstance(resolution, Integral) or resolution <= 0 or resolution % self.vae_scale_factor:
            raise FaceFusionError(
                f"face_resolution {resolution!r} must be a positive multiple of {self.vae_scale_factor}"
            )
        passes = reference_passes(metadata.reference_timestep if metadata else None, own)
        check_unet(self.unet)
        device, dtype = self._execution_device, self.unet.dtype
        text_states = self._empty_prompt_states(device)
        references: list[KeysAndValues] = []
        cells: dict[str, Tensor] = {}
        # One by one, for an image encodes the same in any company; first all through the VAE: where models take turns
        # on a GPU, each of them comes once.
        pictures = face_tensors(images, int(resolution))
        if mirrored is None:
            mirrored = len(pictures) == 1 and self.face_defaults is not None and bool(self.face_defaults.face_mirrored)
        pictures += [pixels.flip(-1) for pixels in pictures] if mirrored else []
        encoded = [encode_latents(self.vae, pixels.to(device)) for pixels in pictures]
        for latents in encoded:
            keys_and_values: KeysAndValues = {}
            for (timestep, seed), kinds in passes.items():
                noised = noise_latents(latents.to(dtype), self.scheduler.alphas_cumprod, timestep, seed)
                sample = unet_input(noised, self.unet.config.in_channels)
                states = capture_hidden_states(self.unet, sample, timestep, text_states, kinds)
                if adapter and "attn2" in kinds:
                    keys_and_values |= adapter.to(next(iter(states.values())).device)(states)
                if own and "attn1" in kinds:
                    seen, cells = own.chosen({name: h for name, h in states.items() if name.endswith(".attn1")})
                    keys_and_values |= self_attention_projections(self.unet, seen)
            references.append(keys_and_values)
        self.maybe_free_model_hooks()
        identity = FaceIdentity(
            keys={name: torch.cat([r[name][0] for r in references]) for name in references[0]},
            values={name: torch.cat([r[name][1] for r in references]) for name in references[0]},
            weights=torch.ones(len(references)),
            mode=mode,
            base_fingerprint=unet_fingerprint(self.unet),
            adapter_fingerprint=self._adapter_fingerprint() if adapter else "",
            self_attention=own,
            cells=cells,
        )
        return identity.with_weights(weights if weights is None or not mirrored else twice(weights))

    def _face_mode(self, face_mode: str | None) -> str:
        if face_mode not in (None, *FACE_MODES):
            raise FaceFusionError(f"face_mode must be one of {', '.join(FACE_MODES)} or None, got {face_mode!r}")
        if face_mode in ("adapter", "both") and self._face_adapter is None:
            raise FaceFusionError(f"face_mode={face_mode!r} needs weights; call `load_face_fusion_adapter(...)` first")
        if face_mode is None and self._face_adapter is not None and self.face_defaults is not None:
            face_mode = self.face_defaults.face_mode
        return face_mode or ("training-free" if self._face_adapter is None else MODE_WITH_WEIGHTS)

    def _default_resolution(self) -> int:
        return min(self._default_size())

    def _default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the UNet's own images."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def _empty_prompt_states(self, device: torch.device) -> Tensor:
        """Text states `(1, N_c, width)` of the reference pass."""
        return self.encode_prompt("", device, 1, False)[0]

    def _identity(
        self,
        face: Any,
        weights: Any,
        face_mode: str | None,
        resolution: int | None,
        self_scale: float | None,
        mirrored: bool | None = None,
    ) -> FaceIdentity:
        if not is_identity(face):
            identity = self._encode_face(face, weights, face_mode, resolution, mirrored=mirrored)
            return identity if self_scale is None else identity.with_self_scale(self_scale)
        if face_mode is not None and face_mode != face.mode:
            raise IdentityMismatchError(f"the identity was encoded for {face.mode!r}, not {face_mode!r}")
        if face.needs_adapter and self._face_adapter is None:
            raise IdentityMismatchError(
                "this identity needs the adapter it was encoded with; call `load_face_fusion_adapter(...)` first"
            )
        face.check(unet_fingerprint(self.unet), self._adapter_fingerprint())
        check_identity_fits(face, self.unet)
        face = face if weights is None else face.with_weights(weights)
        return face if self_scale is None else face.with_self_scale(self_scale)

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
                first and takes its place.
            face_assign: for each person the number of the face in the layout or draft that it takes, counted from 0
                and from left to right. Default: people as given, from left to right.
            face_overlap, face_background: what queries in several masks, and in none, see; see
                `face_layout.visible_people`. `"literal"` and `"all"` are Eq. 7 of the paper.
            face_detector: see `face_detectors.load_detector`.

        Returns:
            What the underlying pipeline returns; where people were placed, it also has `face_boxes`, for each image
            the boxes used, in the order of the people (None for masks), and `face_boxes_source`: where they come
            from (see `face_layout.Layout`), a list with one for each image where the images differ.

        Raises:
            FaceFusionError: a subclass for each kind of bad input; or the UNet is in use by another call with faces.
        """
        if not isinstance(prompt, (str, type(None))) and not (
            isinstance(prompt, list) and all(isinstance(text, str) for text in prompt)
        ):
            raise InvalidPromptError(f"the prompt must be text or a list of texts, got {prompt!r}")
        check_window(face_start, face_end)
        plain = super().__call__  # type: ignore[misc]
        kwargs |= self._recommended(inspect.signature(plain).bind(prompt, *args, **kwargs))
        bound = inspect.signature(plain).bind(prompt, *args, **kwargs)
        check_names(bound)
        bound.apply_defaults()
        prompts = prompt_count(bound.arguments)
        faces = [] if face_image is None else face_axes(face_image, prompts)
        scales = per_person(face_scale, faces, "face_scale", check_scale)
        self_scales = per_person(face_self_scale, faces, "face_self_scale", check_self_scale)
        layer_scales = self._face_layer_scales
        off = not any(layer_scales.values() if isinstance(layer_scales, dict) else [layer_scales])
        if not faces or off or not any(map(any, scales)):
            check_idle(self.unet)
            return plain(prompt, *args, **kwargs)

        placement = Placement(
            face_boxes, face_masks, face_layout, face_assign, face_overlap, face_background, face_detector
        )
        images = prompts * (bound.arguments.get("num_images_per_prompt") or 1)
        with sole_use(self.unet):
            weights = weights_per_person(face_weights, faces)
            people = [
                [
                    self._identity(f, w, face_mode, face_resolution, s, face_mirrored)
                    for f, w, s in zip(*cast, strict=True)
                ]
                for cast in zip(faces, weights, self_scales, strict=True)
            ]
            layouts = self._layouts(placement, [len(cast) for cast in people], bound, plain)
            casts = self._casts(people, scales, layouts, placement, bound.arguments)
            switch = self._follow_steps(bound.arguments, face_start, face_end)
            with self._faces_installed(casts, switch), self._layouts_applied(layouts, images):
                result = plain(*bound.args, **bound.kwargs)
        if layouts and hasattr(result, "images"):
            of_images = [layouts[i * len(layouts) // images] for i in range(images)]
            sources = [layout.source for layout in of_images]
            result["face_boxes"] = [layout.boxes for layout in of_images]
            result["face_boxes_source"] = sources[0] if len(set(sources)) == 1 else sources
        return result

    def _recommended(self, bound: inspect.BoundArguments) -> dict[str, Any]:
        """What the model recommends of those arguments of the underlying pipeline that `bound` was not given."""
        defaults, known = self.face_defaults, bound.signature.parameters
        if defaults is None:
            return {}
        given = bound.arguments
        added = {
            name: getattr(defaults, name)
            for name in ("num_inference_steps", "guidance_scale")
            if name in known and name not in given and getattr(defaults, name) is not None
        }
        late, user = defaults.late_guidance, given.get("callback_on_step_end")
        if late is None or "guidance_scale" not in added or "callback_on_step_end" not in known:
            return added
        if isinstance(user, (PipelineCallback, MultiPipelineCallbacks)):
            return added  # one that may change guidance itself, as `LateGuidance` does
        later = LateGuidance(late)
        if user is None:
            return added | {"callback_on_step_end": later}

        def both(pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> Any:
            return user(pipe, step, timestep, later(pipe, step, timestep, tensors))

        return added | {"callback_on_step_end": both}

    # --- Where people are ----------------------------------------------------------------------------------------

    def _layouts(
        self, placement: Placement, people: list[int], bound: inspect.BoundArguments, plain: Any
    ) -> list[Layout]:
        """One layout for all images, or one for each prompt or image; none if nobody has to be placed.

        Args:
            people: number of people, for all prompts or for each.
            bound, plain: the call of the underlying pipeline, for a draft.
        """
        placement.check()
        height, width = self._output_size(bound.arguments)
        if placement.given is None:
            if max(people) == 1 and not self._needs_layout():
                return []
            return self._draft_layouts(placement, people, bound, plain)
        prompts = prompt_count(bound.arguments)
        if placement.layout is not None:
            return self._detected_layouts(placement, people, prompts, height, width)
        given = placement.per_prompt()
        if len(given) not in (1, len(people)) and len(people) != 1:
            raise FaceAxesError(f"{placement.given} for {len(given)} prompts, people for {len(people)}")
        if len(given) not in (1, prompts):
            raise FaceAxesError(f"{placement.given} for {len(given)} prompts, but there are {prompts}")
        rows = max(len(given), len(people))
        layouts = []
        for row in range(rows):
            places, count = given[row % len(given)], people[row % len(people)]
            if len(places) != count:
                raise FaceAxesError(
                    f"{len(places)} of {placement.given} for {count} people: give one for each person; a flat list of "
                    "images is one person with several references, [[image], [image]] is two people"
                )
            if placement.given == "face_boxes":
                layouts.append(layout_from_boxes(places, height, width, "given"))
            else:
                layouts.append(Layout(given_masks(places, height, width), None, "given"))
        return layouts

    def _detected_layouts(
        self, placement: Placement, people: list[int], prompts: int, height: int, width: int
    ) -> list[Layout]:
        """The faces found in the layout pictures; one layout for all prompts, or one for each."""
        pictures = load_images(placement.layout)
        if len(pictures) not in (1, prompts):
            raise FaceAxesError(
                f"face_layout has {len(pictures)} pictures, but there are {prompts} prompts: give one picture for "
                "each prompt, or one for all"
            )
        found = [
            scale_boxes(self._detect_boxes(picture, placement.detector), picture.size, (width, height))
            for picture in pictures
        ]
        rows = max(len(found), len(people))
        boxes = [assign_boxes(found[i % len(found)], people[i % len(people)], placement.assign) for i in range(rows)]
        return [layout_from_boxes(places, height, width, "layout") for places in boxes]

    def _draft_layouts(
        self, placement: Placement, people: list[int], bound: inspect.BoundArguments, plain: Any
    ) -> list[Layout]:
        """Generate without faces, from the same noise, and take the faces found there; one layout for each image."""
        height, width = self._output_size(bound.arguments)
        with repeatable_noise(bound.arguments):
            changed = {"output_type": "pil", "return_dict": True, "callback_on_step_end": None}
            draft = inspect.BoundArguments(bound.signature, type(bound.arguments)(bound.arguments | changed))
            images = plain(*draft.args, **draft.kwargs).images
        layouts = []
        for index, image in enumerate(images):
            count = people[index * len(people) // len(images)]
            found = scale_boxes(self._detect_boxes(image, placement.detector), image.size, (width, height))
            if len(found) >= count:
                boxes, source = assign_boxes(found, count, placement.assign), "draft"
            else:
                logger.warning(
                    "the draft of image %d shows %d faces for %d people: they are placed side by side; give "
                    "face_boxes or face_layout for better places",
                    *(index, len(found), count),
                )
                assign = placement.assign and [sorted(placement.assign).index(face) for face in placement.assign]
                boxes, source = assign_boxes(even_boxes(count, height, width), count, assign), "even"
            layouts.append(layout_from_boxes(boxes, height, width, source))
        return layouts

    def _needs_layout(self) -> bool:
        """Whether the face of a single person has to be placed, too; for subclasses."""
        return False

    def _layouts_applied(self, layouts: list[Layout], images: int) -> AbstractContextManager[None]:
        """What else the layouts mean while the underlying pipeline runs; for subclasses."""
        return nullcontext()

    def _detect_boxes(self, image: Any, detector: Any) -> list[Box]:
        from .face_detectors import load_detector
        from .face_images import detect_faces

        return [face.box for face in detect_faces(image, load_detector(detector))]

    def _output_size(self, arguments: dict[str, Any]) -> tuple[int, int]:
        """(height, width) in pixels of the images that the underlying pipeline will make; for subclasses."""
        if (latents := arguments.get("latents")) is not None:  # diffusers asks nothing else then
            return latents.shape[-2] * self.vae_scale_factor, latents.shape[-1] * self.vae_scale_factor
        height, width = arguments.get("height"), arguments.get("width")
        return (height, width) if height and width else self._default_size()  # as diffusers: one alone does not count

    def _casts(
        self,
        people: list[list[FaceIdentity]],
        scales: list[list[float]],
        layouts: list[Layout],
        placement: Placement,
        arguments: dict[str, Any],
    ) -> dict[str, list[Cast]]:
        """Layer name -> casts: one for the batch, or one for each prompt or image."""
        modes = {person.mode for cast in people for person in cast}
        if len(modes) > 1:
            raise IdentityMismatchError(f"people of one call must be encoded in one mode, got {' and '.join(modes)}")
        device, dtype = self._execution_device, self.unet.dtype
        height, width = (side // self.vae_scale_factor for side in self._output_size(arguments))
        regions = [
            {
                size: part.to(device)
                for size, part in layer_regions(
                    layout.masks, height, width, placement.overlap, placement.background
                ).items()
            }
            for layout in layouts
        ]
        rows = max(len(people), len(regions))
        at_layers = [
            [self._person_at_layers(person.to(device, dtype), scale) for person, scale in zip(cast, s, strict=True)]
            for cast, s in zip(people, scales, strict=True)
        ]
        if len({frozenset(person) for cast in at_layers for person in cast}) > 1:
            raise IdentityMismatchError(
                "people of one call must be seen at the same layers: encode them again with one `self_attention`"
            )
        seen = {name for cast in at_layers for person in cast for name, keys in person.items() if keys.seen}
        names = [name for name in at_layers[0][0] if name in seen]
        return {
            name: [
                Cast(
                    tuple(person[name] for person in at_layers[row * len(at_layers) // rows]),
                    regions[row * len(regions) // rows] if regions else None,
                )
                for row in range(rows)
            ]
            for name in names
        }

    def _person_at_layers(self, identity: FaceIdentity, scale: float) -> dict[str, PersonKeys]:
        """Layer name -> keys of one person, for the layers whose scale is not 0."""
        used = identity.weights > 0  # log(0): such references are left out
        log_weights = reference_log_weights(identity.weights[used])
        if log_weights is not None:
            log_weights = log_weights.to(self._execution_device)
        adapter = self._face_adapter if identity.needs_adapter else None
        token_count_bias = adapter is not None and adapter.metadata.token_count_bias
        return {
            name: PersonKeys(
                key=key[used.to(key.device)][None],
                value=identity.values[name][used.to(key.device)][None],
                log_weights=log_weights,
                scale=scale * identity.scale_at(name) * self._layer_scale(name),
                token_count_bias=token_count_bias and name.endswith(".attn2"),
                cells=identity.cells.get(name),
            )
            for name, key in identity.keys.items()
            if self._layer_scale(name) > 0
        }

    @contextmanager
    def _faces_installed(self, casts: dict[str, list[Cast]], switch: FusionSwitch) -> Iterator[None]:
        processors = {name: FaceFusionAttnProcessor(members, switch) for name, members in casts.items()}
        with installed_processors(self.unet, processors):
            yield

    def _follow_steps(self, arguments: dict[str, Any], start: float, end: float) -> FusionSwitch:
        """A switch set for the first step, and kept right by a step callback around the user's, put in `arguments`.

        Plain attributes rather than a look at the pipeline inside the layers: `torch.compile` can follow these.
        """
        self._guidance_scale = arguments["guidance_scale"]  # what the pipeline itself does first
        guided = bool(self.do_classifier_free_guidance)
        switch = FusionSwitch(active=start == 0, guided=guided, thread=own_thread())
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


def check_unet(unet: Any) -> None:
    """Raise [`FaceFusionError`] for a UNet that wants to be told more than a text, as that of SDXL does."""
    if unet.config.addition_embed_type is not None or unet.config.class_embed_type is not None:
        raise FaceFusionError(
            "this UNet takes more than a text (addition_embed_type "
            f"{unet.config.addition_embed_type!r}), as that of SDXL does: take a Stable Diffusion 1.x or 2.x model"
        )


def unet_input(latents: Tensor, channels: int) -> Tensor:
    """Latents `(B, c, h, w)` of a reference as a UNet with `channels` inputs takes them.

    One made for inpainting, 2c + 1 inputs, also gets a mask that leaves the whole picture as it is, and the picture.

    Raises:
        FaceFusionError: another number of channels.
    """
    own = latents.shape[1]
    if channels == own:
        return latents
    if channels == 2 * own + 1:
        return torch.cat([latents, torch.zeros_like(latents[:, :1]), latents], dim=1)
    raise FaceFusionError(
        f"this UNet takes {channels} channels, the latents of its VAE have {own}: only UNets for text ({own}) "
        f"and for inpainting ({2 * own + 1}) can look at a face"
    )


def check_self_scale(scale: Any, name: str) -> float | None:
    """As [`check_scale`]; None is the identity's own."""
    return None if scale is None else check_scale(scale, name)


def twice(weights: Any) -> list[Any]:
    """The weights of images, then those of the same images mirrored."""
    values = weights.flatten().tolist() if hasattr(weights, "flatten") else weights
    return [*values, *values] if isinstance(values, (list, tuple)) else [values, values]


def check_names(bound: inspect.BoundArguments) -> None:
    """Raise TypeError for an argument that no pipeline knows: diffusers would pass over it in silence."""
    rest = next((p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    unknown = [name for name in bound.arguments.get(rest) or {} if name not in ("callback", "callback_steps")]
    if unknown:
        name = unknown[0]
        if name.startswith("control"):
            raise TypeError(f"{name} goes with a control_image, and there is none")
        own = inspect.signature(FaceFusionMixin.__call__).parameters
        near = difflib.get_close_matches(name, [*bound.signature.parameters, *own], 1)
        raise TypeError(f"unknown argument {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))


def prompt_count(arguments: dict[str, Any]) -> int:
    """Number of prompts in a call."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if isinstance(prompt, (list, tuple)):
        return len(prompt)
    return 1 if prompt is not None or embeds is None else int(embeds.shape[0])


@contextmanager
def repeatable_noise(arguments: dict[str, Any]) -> Iterator[None]:
    """Generators in `arguments` are put back at the end; where there is none, one is added: a draft has to look like
    the image that is then made of the same noise."""
    if arguments.get("generator") is None:
        arguments["generator"] = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    generators = arguments["generator"]
    generators = generators if isinstance(generators, list) else [generators]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
