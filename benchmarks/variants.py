"""What is compared: plain Stable Diffusion, Face Fusion in its uses, and other ways to show a pipeline a face."""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import IPAdapterFaceIDImageProjection, IPAdapterPlusImageProjection
from torch import Tensor

from face_fusion_pipeline import FaceFusionMixin, StableDiffusionFaceFusionPipeline
from face_fusion_pipeline.face_attention import attention_layers
from face_fusion_pipeline.reference_pass import face_tensors
from face_fusion_pipeline.unet_family import encode_latents

from .floor import Use
from .shapes import Model, Shape, picture


PROMPT = "a photo of a person in a garden"
GUIDANCE = 7.5
FACE_ID_WIDTH, LORA_RANK = 512, 128  # of IP-Adapter FaceID


class UnavailableError(Exception):
    """The variant cannot run here; the message says why."""


@dataclass
class Job:
    """A pipeline that is ready, and the call that makes one image (or one batch) with it."""

    pipe: Any
    call: Callable[..., Any]


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        build: prepares the job outside of the measured time; raises [`UnavailableError`].
        against: label of the row that ratios are taken to.
        use: what the method must compute for it, see `floor.Use`; `None` where no floor is counted.
        goal: what the ratio of a whole image's time should stay below.
    """

    label: str
    build: Callable[[Model], Job]
    against: str = "plain"
    use: Use | None = None
    goal: float | None = None


def settings(model: Model, size: int | None, batch: int) -> dict[str, Any]:
    """Arguments that all variants share. Guidance is on: every step is a pass of two rows for each image."""
    side = size or model.shape.size
    return {
        "prompt": PROMPT,
        "height": side,
        "width": side,
        "guidance_scale": GUIDANCE,
        "num_images_per_prompt": batch,
        "generator": torch.Generator().manual_seed(0),
    }


def plain(model: Model, size: int | None = None, batch: int = 1) -> Job:
    """Stable Diffusion without any face."""
    pipe = model.pipeline()
    return Job(pipe, partial(pipe, **settings(model, size, batch)))


# --- Face Fusion -------------------------------------------------------------------------------------------------


def face(
    model: Model,
    side: int,
    references: int = 1,
    mode: str = "adapter",
    saved: bool = False,
    size: int | None = None,
    batch: int = 1,
) -> Job:
    """Face Fusion with references of `side` pixels, encoded in every call, or once and kept in a file."""
    pipe = model.pipeline(StableDiffusionFaceFusionPipeline)
    arguments: dict[str, Any] = {"face_image": [picture(seed, side) for seed in range(references)]}
    encoding = {"face_mode": mode, "face_resolution": side}
    if saved:
        arguments["face_image"] = model.through_file(pipe.encode_face(arguments["face_image"], **encoding))
    else:
        arguments |= encoding
    return Job(pipe, partial(pipe, **settings(model, size, batch), **arguments))


def people(model: Model, side: int, count: int) -> Job:
    """`count` people side by side, each encoded in every call and kept to a box of its own."""
    if "face_boxes" not in inspect.signature(FaceFusionMixin.__call__).parameters:
        raise UnavailableError("the installed pipeline does not accept `face_boxes`")
    pipe = model.pipeline(StableDiffusionFaceFusionPipeline)
    pictures = [picture(seed, side) for seed in range(count)]
    arguments = {**settings(model, None, 1), "face_boxes": boxes(model.shape.size, count)}

    def call(**options: Any) -> Any:
        identities = [pipe.encode_face(one, face_resolution=side) for one in pictures]
        return pipe(face_image=identities, **arguments, **options)

    return Job(pipe, call)


def boxes(side: int, count: int) -> list[list[float]]:
    """Square face boxes [x0, y0, x1, y1] in pixels, side by side in the middle of a picture of `side` pixels."""
    column, half = side / count, face_side(count) * side / 2
    middles = [column * (index + 0.5) for index in range(count)]
    return [[x - half, side / 2 - half, x + half, side / 2 + half] for x in middles]


def face_side(count: int) -> float:
    """Side of one of `count` faces in a picture of side 1."""
    return min(0.5, 0.6 / count)


def people_use(side: int, count: int) -> Use:
    """The queries that see a person are those in the box, which the pipeline enlarges 1.6 times to a mask."""
    return Use(count, side=side, fraction=(1.6 * face_side(count)) ** 2)


# --- Others ------------------------------------------------------------------------------------------------------


def ip_adapter_weights(model: Model, kind: str) -> dict[str, dict[str, Tensor]]:
    """Random weights as the files of IP-Adapter "plus" or "faceid" (with its LoRA) have them."""
    unet = model.unet
    width = unet.config.cross_attention_dim
    if kind == "plus":
        hidden = max(64, width)
        image = model.image_encoder.config.hidden_size
        heads = hidden // 64
        projection: Any = IPAdapterPlusImageProjection(image, width, hidden, heads=heads, num_queries=16)
        names = {"to_out.0.": "to_out."}
    else:
        projection = IPAdapterFaceIDImageProjection(FACE_ID_WIDTH, width, mult=2, num_tokens=4)
        names = {"ff.net.0.proj": "proj.0", "ff.net.2": "proj.2"}
    image_projection = {}
    for key, weight in projection.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        image_projection[key] = weight

    attention: dict[str, Tensor] = {}
    for index, name in enumerate(unet.attn_processors):  # layers have numbers, not names, in these files
        layer = unet.get_submodule(name.removesuffix(".processor"))
        if layer.is_cross_attention:
            for part in ("k", "v"):
                attention[f"{index}.to_{part}_ip.weight"] = torch.randn(layer.to_q.out_features, width) / width**0.5
        for part in ("q", "k", "v", "out") if kind == "faceid" else ():
            linear = layer.to_out[0] if part == "out" else getattr(layer, f"to_{part}")
            attention[f"{index}.to_{part}_lora.down.weight"] = torch.randn(LORA_RANK, linear.in_features) * 0.01
            attention[f"{index}.to_{part}_lora.up.weight"] = torch.randn(linear.out_features, LORA_RANK) * 0.01
    parts = {"image_proj": image_projection, "ip_adapter": attention}
    return {name: {k: w.to(model.device, model.dtype) for k, w in part.items()} for name, part in parts.items()}


def ip_adapter(model: Model, kind: str) -> Job:
    """diffusers' IP-Adapter. "plus" encodes the image in every call; "faceid" is handed a face embedding, free."""
    if kind == "faceid" and importlib.util.find_spec("peft") is None:
        raise UnavailableError("the LoRA of IP-Adapter FaceID needs peft")
    arguments = settings(model, None, 1)
    extra: dict[str, Any] = {}
    if kind == "plus":
        extra = {"image_encoder": model.image_encoder, "feature_extractor": model.feature_extractor}
        arguments["ip_adapter_image"] = picture(0, model.shape.reference)
    else:
        embeds = torch.randn(2, 1, FACE_ID_WIDTH, device=model.device, dtype=model.dtype)
        arguments["ip_adapter_image_embeds"] = [embeds]
    pipe = model.pipeline(**extra)
    pipe.load_ip_adapter(ip_adapter_weights(model, kind), "", "", image_encoder_folder=None)
    return Job(pipe, partial(pipe, **arguments))


class _Bank:
    """Self-attention of the two-pass method: notes its input in the first pass and attends to it in the second."""

    def __init__(self, first_pass: Callable[[], bool]) -> None:
        self.first_pass = first_pass
        self.noted: Tensor | None = None
        self.attend = AttnProcessor2_0()

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.first_pass():
            self.noted = hidden_states
            return self.attend(attn, hidden_states)
        assert self.noted is not None
        joined = self.attend(attn, hidden_states, torch.cat([hidden_states, self.noted], dim=1))
        without, guided = joined.chunk(2)
        alone = self.attend(attn, hidden_states[: len(without)])
        return torch.cat([(without + alone) / 2, guided])


def reference_pipeline(model: Model) -> Job:
    """Cost model of the community "reference" pipeline, in its default setting (style fidelity 0.5).

    Every step passes the noised reference through the UNet with both rows of guidance, then the picture, whose
    self-attention has twice the keys; the unconditional row is attended to once more without them and averaged in.
    Left out: its matching of means and variances, which costs next to nothing.
    """
    pipe = model.pipeline()
    latents = torch.empty(0)
    writing = False

    def note_reference(unet: Any, inputs: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
        nonlocal writing
        if writing:
            return
        sample, timestep = inputs
        noise = torch.randn_like(latents)
        noised = pipe.scheduler.add_noise(latents, noise, timestep.reshape(1)).expand_as(sample)
        writing = True
        unet(noised, timestep, **options)
        writing = False

    for layer in attention_layers(pipe.unet, "attn1").values():
        layer.set_processor(_Bank(lambda: writing))
    pipe.unet.register_forward_pre_hook(note_reference, with_kwargs=True)
    arguments = settings(model, None, 1)
    reference = picture(0, model.shape.size)

    @torch.no_grad()
    def call(**options: Any) -> Any:
        nonlocal latents
        pixels = face_tensors(reference, model.shape.size)[0]
        latents = encode_latents(pipe.vae, pixels.to(model.device)).to(model.dtype)
        return pipe(**arguments, **options)

    return Job(pipe, call)


def controlnet(model: Model, side: int | None = None) -> Job:
    """A depth ControlNet, with one reference of `side` pixels or without a face."""
    # The depth map comes in at the picture's size: one halving for each halving that the VAE does.
    halvings = (model.shape.size // model.unet.config.sample_size).bit_length() - 1
    channels = (16, 32, 96, 256)[: halvings + 1]
    network = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=channels)
    network.to(model.device, model.dtype).eval().requires_grad_(False)
    arguments, depth = settings(model, None, 1), picture(9, model.shape.size)
    if side is None:
        pipe = model.pipeline(StableDiffusionControlNetPipeline, controlnet=network)
        return Job(pipe, partial(pipe, **arguments, image=depth))
    pipe = model.pipeline(StableDiffusionFaceFusionPipeline, controlnet=network)
    arguments |= {"face_image": picture(0, side), "face_resolution": side}
    return Job(pipe, partial(pipe, **arguments, control_image=depth, control_kind="depth"))


# --- Lists -------------------------------------------------------------------------------------------------------


def comparison(shape: Shape) -> list[Variant]:
    """The rows of the main table. "plain, again" is what equal things differ by on this machine."""
    large, small = shape.reference, shape.small
    free, both = (partial(face, side=small, mode=mode) for mode in ("training-free", "both"))

    def ours(label: str, build: Callable[[Model], Job], use: Use, goal: float | None = None) -> Variant:
        return Variant(label, build, use=use, goal=goal if shape.name == "sd15" else None)

    return [
        Variant("plain", plain, use=Use(0)),
        Variant("plain, again", plain, use=Use(0)),
        ours(f"1 reference, {large} px", partial(face, side=large), Use(1, large), 1.12),
        ours(f"1 reference, {small} px", partial(face, side=small), Use(1, small), 1.04),
        ours(f"3 references, {small} px", partial(face, side=small, references=3), Use(3, small), 1.09),
        ours(f"saved identity, {large} px", partial(face, side=large, saved=True), Use(1, large, saved=True)),
        ours(f"saved identity, {small} px", partial(face, side=small, saved=True), Use(1, small, saved=True), 1.03),
        ours(f"2 people, {small} px", partial(people, side=small, count=2), people_use(small, 2), 1.09),
        ours(f"3 people, {small} px", partial(people, side=small, count=3), people_use(small, 3)),
        ours(f"training-free, {small} px", free, Use(1, small, mode="training-free"), 1.05),
        ours(f"both attentions, {small} px", both, Use(1, small, mode="both"), 1.08),
        ours(
            f"both attentions, saved identity, {small} px",
            partial(both, saved=True),
            Use(1, small, saved=True, mode="both"),
            1.05,
        ),
        Variant("IP-Adapter plus", partial(ip_adapter, kind="plus")),
        Variant("IP-Adapter FaceID", partial(ip_adapter, kind="faceid")),
        Variant("reference pipeline", reference_pipeline),
        Variant("ControlNet", controlnet),
        Variant(f"ControlNet, 1 reference, {small} px", partial(controlnet, side=small)),
    ]


def growth(shape: Shape) -> dict[str, list[Variant]]:
    """Sweeps over one size each; every point is compared with the plain pipeline of the same output."""
    small = shape.small

    def sweep(points: dict[int, tuple[Callable[[Model], Job], Use]]) -> list[Variant]:
        return [Variant("plain", plain), *(Variant(f"{at}", build, use=use) for at, (build, use) in points.items())]

    def output_sweep(name: str, points: list[int]) -> list[Variant]:
        pairs = []
        for at in points:
            output: dict[str, Any] = {name: at}
            without, build = f"plain, {at}", partial(face, side=small, **output)
            pairs += [Variant(without, partial(plain, **output), without)]
            pairs += [Variant(f"{at}", build, without, Use(side=small, **output))]
        return pairs

    sides = [shape.reference * eighths // 8 for eighths in (2, 4, 6, 8)]
    sizes = [shape.size * halves // 2 for halves in (2, 3, 4)]
    return {
        "references": sweep({n: (partial(face, side=small, references=n), Use(n, small)) for n in range(1, 9)}),
        "people": sweep({n: (partial(people, side=small, count=n), people_use(small, n)) for n in range(1, 5)}),
        "reference px": sweep({side: (partial(face, side=side), Use(side=side)) for side in sides}),
        "output px": output_sweep("size", sizes),
        "batch": output_sweep("batch", [1, 2, 4, 8]),
    }
