"""What the method must compute and read at the least, counted on the meta device: no weights, no time.

Extra work of one image, for references of N_f tokens and pictures of N_h tokens at a layer C wide:

* every step, conditional row only: softmax(Q [K_c; K_f]^T) [V_c; V_f] costs 4 N_h N_f C more, and reads K_f and V_f;
* once for each reference: the VAE's encoder, the UNet up to the input of its last attention layer with a single row,
  and W_kf h_f, W_vf h_f, which cost 4 N_f C^2 a layer.

At the self-attention (modes training-free and both) N_f are the cells of the reference that are seen, in the layers
that see them; its noise asks for a pass of its own.

The rest is plain Stable Diffusion: two texts (in XL one, in both encoders: the other is zeros), a UNet pass of two
rows a step, the VAE's decoder. Bytes are weights and
keys and values, each read once a pass; what fits into caches in between is not counted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from face_fusion_pipeline.face_attention import attention_layers
from face_fusion_pipeline.face_self_attention import SelfAttentionReference
from face_fusion_pipeline.unet_family import POOLED, TEXT, unet_arguments

from .shapes import SHAPES, Model


STEPS = 20  # of a whole image
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Cost:
    """Floating-point operations (a multiply-add is two) and bytes read."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, count: float) -> "Cost":
        return Cost(self.flops * count, self.bytes * count)


@dataclass(frozen=True)
class Use:
    """How Face Fusion is used for one image.

    Attributes:
        references: number of reference pictures, 0 for the plain pipeline.
        side: of a reference in pixels, by default the shape's.
        saved: the identity is at hand, nothing is encoded.
        fraction: of the picture's queries that attend to one reference: less than all where people have regions.
        size: side of the picture in pixels, by default the shape's.
        batch: images at once.
        mode: `"adapter"`, `"training-free"` or `"both"`.
    """

    references: int = 1
    side: int | None = None
    saved: bool = False
    fraction: float = 1.0
    size: int | None = None
    batch: int = 1
    mode: str = "adapter"


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, which by itself overlooks attention on a CPU."""

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    return FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention})


@torch.no_grad()
def count_flops(call: Callable[[], Any]) -> float:
    """Counted operations of a call."""
    with flop_counter() as counter:
        call()
    return float(counter.get_total_flops())


class _Enough(Exception):
    """The last layer that is needed has been reached."""


@contextmanager
def _inputs_noted(unet: Any, stop: bool) -> Iterator[dict[str, int]]:
    """Tokens that enter each cross-attention layer; with `stop`, the pass ends where the last one is entered."""
    layers = attention_layers(unet, "attn2")
    tokens: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens[name] = inputs[0].shape[1]
            if stop and len(tokens) == len(layers):
                raise _Enough

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        yield tokens
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


class Arithmetic:
    """Costs of the parts of one shape's pipeline, at 1, 2 or 4 bytes a number."""

    def __init__(self, shape: str, itemsize: int) -> None:
        self.model, self.itemsize = Model(SHAPES[shape], "meta"), itemsize
        parts = self.model.components
        self.unet, self.vae = parts["unet"], parts["vae"]
        self.texts = [parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts]
        self.words = self.texts[0].config.max_position_embeddings
        self.factor = SHAPES[shape].size // self.unet.config.sample_size  # pixels a latent
        self._passes: dict[tuple[int, int, bool], tuple[Cost, dict[str, int]]] = {}

    def _weights(self, *modules: nn.Module) -> float:
        return float(sum(weight.numel() for module in modules for weight in module.parameters()) * self.itemsize)

    def unet_pass(self, side: int, rows: int, stop: bool = False) -> tuple[Cost, dict[str, int]]:
        """A UNet pass over pictures of `side` pixels, and the tokens at its cross-attention layers."""
        if (known := self._passes.get((side, rows, stop))) is not None:
            return known
        latents = torch.empty(rows, self.unet.config.in_channels, side // self.factor, side // self.factor)
        text = torch.empty(rows, self.words, self.unet.config.cross_attention_dim, device="meta")
        told: dict[str, Tensor] = {TEXT: text}
        if self.model.is_xl:
            told[POOLED] = torch.empty(rows, self.texts[1].config.projection_dim, device="meta")
        timestep = torch.zeros(1, device="meta")
        with torch.no_grad(), flop_counter() as counter, _inputs_noted(self.unet, stop) as tokens:
            self.unet(latents.to("meta"), timestep, **unet_arguments(told, side, side))
        found = Cost(float(counter.get_total_flops()), self._weights(self.unet)), tokens
        self._passes[side, rows, stop] = found
        return found

    def plain(self, size: int, batch: int) -> tuple[Cost, Cost]:
        """Of plain Stable Diffusion: what is done once, and what in each step."""
        ids = torch.zeros(1, self.words, dtype=torch.int64, device="meta")
        side = size // self.factor
        latents = torch.empty(batch, self.unet.config.in_channels, side, side, device="meta")
        text = Cost(count_flops(lambda: [encoder(ids) for encoder in self.texts]), self._weights(*self.texts))
        decode = Cost(count_flops(lambda: self.vae.decode(latents)), self._weights(self.vae.decoder))
        return text * (1 if self.model.is_xl else 2) + decode, self.unet_pass(size, 2 * batch)[0]

    def face_keys(self, side: int, mode: str) -> list[tuple[str, int, int]]:
        """Of each layer that sees a face: its block's cross-attention, the keys of one reference, its width."""
        tokens, keys = self.unet_pass(side, 1)[1], {}
        if mode != "training-free":
            keys |= tokens
        if mode != "adapter":
            own = {name: torch.empty(1, tokens[beside(name)], 1) for name in attention_layers(self.unet, "attn1")}
            keys |= {name: seen.shape[1] for name, seen in SelfAttentionReference().chosen(own)[0].items()}
        layer = self.unet.get_submodule
        return [(beside(name), count, layer(name).to_q.out_features) for name, count in keys.items()]

    def reference(self, side: int, mode: str = "adapter") -> dict[str, Cost]:
        """What encoding one reference takes, by part."""
        pixels = torch.empty(1, 3, side, side, device="meta")
        unet_pass = self.unet_pass(side, 1, stop=True)[0] * (2 if mode == "both" else 1)
        found = self.face_keys(side, mode)
        projections = Cost(
            sum(4.0 * count * width**2 for _, count, width in found),
            sum(2.0 * width**2 for _, _, width in found) * self.itemsize,
        )
        encoder = Cost(count_flops(lambda: self.vae.encode(pixels)), self._weights(self.vae.encoder))
        return {"VAE encoder": encoder, "UNet, one row": unet_pass, "face keys and values": projections}

    def attention(self, size: int, side: int, mode: str = "adapter") -> Cost:
        """What the keys and values of one reference add to the conditional row of one step."""
        queries, found = self.unet_pass(size, 1)[1], self.face_keys(side, mode)
        return Cost(
            sum(4.0 * queries[name] * count * width for name, count, width in found),
            sum(2.0 * count * width for _, count, width in found) * self.itemsize,
        )


def beside(name: str) -> str:
    """The cross-attention layer of the same block: as many queries enter it."""
    return name.removesuffix("attn1") + "attn2" if name.endswith("attn1") else name


@cache
def arithmetic(shape: str, itemsize: int) -> Arithmetic:
    """[`Arithmetic`], built once."""
    return Arithmetic(shape, itemsize)


@cache
def image_floor(shape: str, use: Use, itemsize: int = 2) -> Cost:
    """The least that an image of `STEPS` steps can take."""
    parts = arithmetic(shape, itemsize)
    size, side = use.size or SHAPES[shape].size, use.side or SHAPES[shape].reference
    once, step = parts.plain(size, use.batch)
    if use.references:
        added = parts.attention(size, side, use.mode)
        step += Cost(added.flops * use.fraction * use.batch, added.bytes) * use.references
        if not use.saved:
            for cost in parts.reference(side, use.mode).values():
                once += Cost(cost.flops * use.references, cost.bytes)  # one pass, whatever the number
    return once + step * STEPS


def floor_ratio(shape: str, use: Use | None) -> float | None:
    """Operations of an image as a multiple of the plain pipeline's; `None` without a use."""
    if use is None:
        return None
    without = Use(references=0, size=use.size, batch=use.batch)
    return image_floor(shape, use).flops / image_floor(shape, without).flops
