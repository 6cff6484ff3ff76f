"""Where a picture looks at the face: the softmax weights of the face keys, by layer and denoising step.

Fast attention kernels never show their weights. So they are computed a second time, beside the call, from the very
queries, keys and biases of the layer, and only sums of them are kept. The call itself does not notice.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ..face_attention import FaceFusionAttnProcessor, LayerPeople, attention_layers
from ..face_errors import FaceFusionError
from ..face_layout import Box, Region, box_masks, layer_sizes, pool
from ..joint_attention import PersonKeys, join_people, split_heads


MAX_WEIGHTS = 2**24  # softmax weights held at a time, 64 MB: queries are taken in portions


@dataclass(frozen=True)
class FaceMaps:
    """What the queries of one image see of its people at one layer and step, averaged over heads.

    Attributes:
        mass: `(people, h, w)` in [0, 1], the fraction of each query's attention that goes to each person's face; the
            rest goes to the text (at an `attn1`: to the image itself).
        reference: box name -> for each person `(n_refs, h_f, w_f)`, the mean attention of the queries in the box to
            every cell of the references; 0 where a cell has no key. It sums to the mean mass in the box.
    """

    mass: Tensor
    reference: dict[str, tuple[Tensor, ...]]


@dataclass
class AttentionRecord:
    """What [`record_attention`] has seen of the last call: `record.maps[layer, step][image]`, all on the CPU.

    A layer or step that sees no face (its strength is 0, or it lies outside `face_start` and `face_end`) has no entry.
    """

    maps: dict[tuple[str, int], list[FaceMaps]] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """Names of the recorded layers, in the order of computation."""
        return list(dict.fromkeys(layer for layer, _ in self.maps))

    @property
    def steps(self) -> list[int]:
        """The recorded steps, counted from 0."""
        return sorted({step for _, step in self.maps})


def attention_weights(
    query: Tensor, text_key: Tensor, face_key: Tensor, face_bias: Tensor | None = None, text_bias: Tensor | None = None
) -> Tensor:
    """Eq. 4, softmax(M + Q [K_c; K_f]^T / sqrt(d)), explicitly and in float32 at least.

    Args:
        query, text_key, face_key, face_bias, text_bias: as in `joint_attention.joint_attention`.

    Returns:
        `(B, heads, N_h, N_c + K_f)`, the text first; every row sums to 1.
    """
    key = torch.cat([text_key, face_key.expand(query.shape[0], -1, -1, -1)], dim=1)
    precision = torch.promote_types(query.dtype, torch.float32)
    logits = torch.einsum("bqhd,bkhd->bhqk", query.to(precision), key.to(precision)) / math.sqrt(query.shape[-1])
    text, face = logits[..., : text_key.shape[1]], logits[..., text_key.shape[1] :]
    for part, bias in ((text, text_bias), (face, face_bias)):
        if bias is not None:
            part += bias.to(query.dtype)
    return logits.softmax(-1)


@contextmanager
def record_attention(
    pipe: Any,
    layers: Collection[str] | None = None,
    steps: Collection[int] | None = None,
    boxes: Mapping[str, Box] | None = None,
) -> Iterator[AttentionRecord]:
    """Within the block, a call of `pipe` with faces is recorded; its images are the same, bit for bit.

    Only the half of the batch that has faces is looked at. All modes are recorded: with an adapter the layers are the
    `attn2`, training-free the `attn1`. Of several calls in the block the last one is kept.

    Args:
        pipe: any Face Fusion pipeline, not compiled.
        layers: names as in `face_attention.attention_layers`; default all that see faces.
        steps: which calls of the UNet, counted from 0; default all.
        boxes: for [`FaceMaps.reference`]: names of your own -> XYXY in pixels of the picture. At each layer the
            queries that the box touches count, at least one.

    Raises:
        FaceFusionError: a layer that is not there, or a compiled UNet.
        InvalidLayoutError: during the call, a box that is empty or outside the picture.

    Examples:
        >>> with record_attention(pipe, steps=[0, 12, 24], boxes={"mouth": (56, 72, 72, 80)}) as record:
        ...     image = pipe(prompt, face_image=face).images[0]
        >>> record.maps[record.layers[0], 12][0].mass  # (1, 16, 16)
    """
    unet = pipe.unet
    if hasattr(unet, "_orig_mod"):
        raise FaceFusionError("a compiled UNet does not let its attention be recorded: use one without torch.compile")
    known = {**attention_layers(unet, "attn1"), **attention_layers(unet, "attn2")}
    if unknown := sorted(set(layers or ()) - known.keys()):
        raise FaceFusionError(f"this UNet has no attention layer {unknown[0]!r}, but {', '.join(known)}")
    observer = _Observer(list(known.values()), steps, boxes or {}, pipe.vae_scale_factor)
    handles = [unet.register_forward_pre_hook(observer.before_step, with_kwargs=True)]
    try:
        for name in known if layers is None else layers:
            hook = partial(observer.before_layer, name)
            handles.append(known[name].register_forward_pre_hook(hook, with_kwargs=True))
        yield observer.record
    finally:
        for handle in handles:
            handle.remove()


class _Observer:
    """Hooks before the UNet, which count the steps, and before its attention layers, which look."""

    def __init__(
        self, layers: list[Attention], steps: Collection[int] | None, boxes: Mapping[str, Box], pixels: int
    ) -> None:
        self.layers, self.steps, self.boxes, self.pixels = layers, steps, boxes, pixels
        self.record = AttentionRecord()
        self.call: Any = None  # of the call that is being recorded
        self.step = -1
        self.levels: dict[int, _Level] = {}

    def before_step(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        processors = [layer.processor for layer in self.layers]
        call = next((p.call for p in processors if has_faces_here(p)), None)
        if call is None:  # the pass of a reference, a draft, a call without faces
            return
        if call is not self.call:
            self.record.maps.clear()
            self.call, self.step = call, -1
        self.step += 1
        height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
        places = box_masks(list(self.boxes.values()), height * self.pixels, width * self.pixels, enlarge=1)
        masks = dict(zip(self.boxes, places, strict=True))
        self.levels = {
            h * w: _Level((h, w), {name: pool(mask[None], h, w).flatten().float() for name, mask in masks.items()})
            for h, w in layer_sizes(height, width)
        }

    @torch.no_grad()
    def before_layer(self, name: str, layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        processor: Any = layer.processor
        if not has_faces_here(processor):
            return
        if type(processor).__name__ != FaceFusionAttnProcessor.__name__:
            raise FaceFusionError(f"{name} uses {type(processor).__name__}: no joint softmax that could be recorded")
        if self.steps is not None and self.step not in self.steps:
            return
        twin = _LookingProcessor(processor, self.levels)
        text = kwargs.get("encoder_hidden_states")
        text = text[0] if isinstance(text, tuple) else text  # the rest is an IP-Adapter's
        twin(layer, args[0], text, kwargs.get("attention_mask"))
        if twin.maps:
            self.record.maps[name, self.step] = twin.maps


def has_faces_here(processor: Any) -> bool:
    """Whether calls in this thread see faces through `processor`."""
    return getattr(processor, "is_face_fusion_processor", False) and processor.acts_here


@dataclass(frozen=True)
class _Level:
    """A size of feature maps: (h, w), and which of its queries lie in each box, 0 or 1 `(h·w,)`."""

    size: tuple[int, int]
    boxes: dict[str, Tensor]


class _LookingProcessor(FaceFusionAttnProcessor):
    """Goes the way of the processor it copies up to the softmax and notes that; its output means nothing."""

    def __init__(self, processor: Any, levels: Mapping[int, _Level]) -> None:
        super().__init__(processor.shares, processor.call)
        self.levels = levels
        self.maps: list[FaceMaps] = []

    def _attend_rows(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, row: LayerPeople
    ) -> Tensor:
        if row.context is not None or any(person.embedded for person in row.people):
            raise FaceFusionError(
                "attention maps show which cells of a reference are looked at, and the tokens of FaceStudio and "
                "FaceSnap are of none: leave out style_image and their people"
            )
        if row.people:
            if query.shape[1] not in self.levels:
                raise FaceFusionError(
                    f"a layer has {query.shape[1]} queries, the latents make {sorted(self.levels)}: this UNet does "
                    "not halve its latents from level to level, so its attention cannot be drawn as maps"
                )
            self.maps += _look(attn, query, key, mask, row, self.levels[query.shape[1]])
        return query


def _look(
    attn: Attention, query: Tensor, key: Tensor, mask: Tensor | None, row: LayerPeople, level: _Level
) -> list[FaceMaps]:
    """The maps of each image of a batch that has the same people: query and key `(B, N, heads, d)`."""
    batch, queries, heads, _ = query.shape
    mass = torch.zeros(len(row.people), batch, queries)
    reference = {name: [torch.zeros(batch, p.key.shape[1]) for p in row.people] for name in level.boxes}
    everybody = Region(torch.arange(queries, device=query.device), tuple(range(len(row.people))))
    for part in (everybody,) if row.regions is None else row.regions[queries].parts:
        seen = [index for index in part.people if row.people[index].scale > 0]
        if not seen:
            continue
        people = [row.people[index] for index in seen]
        face_key, face_value, bias = join_people(people, key.shape[1], query.shape[1])
        face_key, _ = split_heads(attn, face_key, face_value, query.dtype)
        counts = [person.key.shape[1] for person in people]
        portion = max(1, MAX_WEIGHTS // (batch * heads * (key.shape[1] + sum(counts))))
        for some in part.queries.split(portion):
            weights = attention_weights(query[:, some], key, face_key, bias, mask).mean(1)  # over heads
            some = some.cpu()
            for index, face in zip(seen, weights[..., key.shape[1] :].cpu().split(counts, dim=-1), strict=True):
                mass[index][:, some] = face.sum(-1)
                for name, inside in level.boxes.items():
                    reference[name][index] += torch.einsum("bqk,q->bk", face, inside[some]) / inside.sum()
    return [
        FaceMaps(
            mass[:, image].unflatten(-1, level.size),
            {
                name: tuple(on_cells(m[image], person) for m, person in zip(by_person, row.people, strict=True))
                for name, by_person in reference.items()
            },
        )
        for image in range(batch)
    ]


def on_cells(attention: Tensor, person: PersonKeys) -> Tensor:
    """Attention to all keys of a person `(n_refs * N_f,)` as maps `(n_refs, h_f, w_f)` of the references."""
    side = math.isqrt(person.tokens_per_reference)  # references are square
    cells = torch.ones(side, side, dtype=torch.bool) if person.cells is None else person.cells
    attention = attention.unflatten(0, (-1, person.tokens_per_reference))
    maps = attention.new_zeros(len(attention), *cells.shape)
    maps[:, cells] = attention
    return maps
