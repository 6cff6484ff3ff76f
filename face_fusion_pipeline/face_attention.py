"""The attention processor that lets the layers of a UNet see people, and which rows of a batch do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from .face_errors import FaceFusionError
from .face_layout import Regions
from .face_ownership import OwnThread, is_ip_adapter_processor
from .joint_attention import PersonKeys, join_people, joint_attention, split_heads


@dataclass
class FaceCall:
    """What all layers share during one call.

    Attributes:
        roles: what the equal blocks of every batch are, in their order, see [`sees_faces`]. The pipeline says it.
        images: rows of a block; None where nobody checks (training).
        active: are we inside the time window?
        thread: the one that sees faces. None for all: autograd recomputes a training step in a thread of its own.
    """

    roles: tuple[str, ...] = ("conditional",)
    images: int | None = None
    active: bool = True
    thread: OwnThread | None = None

    def segments(self, batch: int, parts: int, always: bool = False) -> list[tuple[int, int, int | None]]:
        """The rows of a batch as (first, end, which of `parts` equal shares of a block they see; None: no face).

        Args:
            always: what is seen is not of faces alone, and so outside the time window, too.

        Raises:
            FaceFusionError: a batch that is not made of these blocks.
        """
        size = batch // len(self.roles)
        if size * len(self.roles) != batch or (self.images is not None and size != self.images):
            raise FaceFusionError(
                f"the UNet got {batch} rows, where {' + '.join(self.roles)} of {self.images or 'equally many'} images "
                "were expected: this pipeline forms its batches in a way that is not known here, so nobody can say "
                "which rows see a face"
            )
        found: list[tuple[int, int, int | None]] = []
        for block, role in enumerate(self.roles):
            seeing = (always or self.active) and sees_faces(role)
            bounds = [block * size + size * i // parts for i in range(parts + 1)]
            shares = zip(bounds, bounds[1:], range(parts), strict=False) if seeing else [(bounds[0], bounds[-1], None)]
            for first, end, share in shares:
                if found and found[-1][2] == share:  # neighbours that see the same are attended together
                    found[-1] = (found[-1][0], end, share)
                elif first < end:
                    found.append((first, end, share))
        return found


def sees_faces(role: str) -> bool:
    """Whether rows of this role see faces.

    `"conditional"` rows do; so do `"perturbed"` ones (PAG), for they differ from the conditional ones in the
    perturbation alone. `"unconditional"` rows do not, as in training with dropped faces.

    Raises:
        FaceFusionError: another role.
    """
    if role not in ("unconditional", "conditional", "perturbed"):
        raise FaceFusionError(f"unknown role of a batch row {role!r}")
    return role != "unconditional"


@dataclass(frozen=True)
class LayerPeople:
    """The people of a picture at one layer; `regions` says by number of queries which of them each query sees.

    Without regions every query sees everybody. `context` is seen by those who see nobody with a context of their own.
    """

    people: tuple[PersonKeys, ...]
    regions: Mapping[int, Regions] | None = None
    context: PersonKeys | None = None


class FaceFusionAttnProcessor:
    """Attention whose keys and values are joined by those of faces; drop-in for `AttnProcessor2_0`.

    At `attn2` the faces join the text (the paper), at `attn1` the image itself (ours, without training). It holds no
    weights: keys and values are projected once, before the denoising loop, so nothing can leak into a saved UNet.

    Args:
        shares: the people of all rows, or of each equal share of them in order (one a prompt, or one an image).
        call: shared state of the call: which rows see faces, and when.
        unconditional: context of the rows that see no faces, where the shares have contexts.
    """

    is_face_fusion_processor = True

    def __init__(
        self, shares: Sequence[LayerPeople], call: FaceCall | None = None, unconditional: PersonKeys | None = None
    ) -> None:
        self.shares, self.unconditional = tuple(shares), unconditional
        self.call = call or FaceCall()
        self.original: Any = None
        self.additive: Any = None
        self._attention_backend: Any = None
        self._parallel_config: Any = None

    @property
    def acts_here(self) -> bool:
        """False in threads whose calls are none of ours: there the layer computes what it did before."""
        return self.call.thread is None or self.call.thread.here

    def take_over(self, original: Any) -> None:
        """Inherit the backend of the replaced processor; one that adds to the output (IP-Adapter) still adds."""
        self.original = original
        self.additive = original if is_ip_adapter_processor(original) else None
        self._attention_backend = getattr(original, "_attention_backend", None)
        self._parallel_config = getattr(original, "_parallel_config", None)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        if not self.acts_here:
            return call_processor(
                self.original, attn, hidden_states, encoder_hidden_states, attention_mask, temb, ip_adapter_masks
            )
        added: Tensor | float = 0.0
        if self.additive is not None:
            # The output projection is affine, so what the other processor adds is its output less the plain one.
            assert isinstance(encoder_hidden_states, tuple)
            both, text = encoder_hidden_states, encoder_hidden_states[0]
            added = self.additive(attn, hidden_states, both, attention_mask, temb, ip_adapter_masks=ip_adapter_masks)
            added = added - AttnProcessor2_0()(attn, hidden_states, text, attention_mask, temb)
            encoder_hidden_states = text

        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        assert not isinstance(encoder_hidden_states, tuple)
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)

        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[1], key.shape[0])
            attention_mask = attention_mask.unflatten(0, (key.shape[0], attn.heads))
        hidden_states = self._attend(attn, query, key, value, attention_mask)

        hidden_states = hidden_states.flatten(2).to(query.dtype)
        for layer in attn.to_out:  # projection, dropout
            hidden_states = layer(hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor + added

    def _attend(self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        contexts = self.unconditional is not None
        parts = [
            self._attend_rows(
                *(attn, query[a:b], key[a:b], value[a:b], None if mask is None else mask[a:b]), self._seen(share)
            )
            for a, b, share in self.call.segments(query.shape[0], len(self.shares), contexts)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _seen(self, share: int | None) -> LayerPeople:
        """What rows of a share see now."""
        if share is None:
            return LayerPeople((), None, self.unconditional)
        seen = self.shares[share]
        return seen if self.call.active else LayerPeople((), None, seen.context)

    def _attend_rows(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seen: LayerPeople
    ) -> Tensor:
        if seen.regions is None:
            return self._attend_people(attn, query, key, value, mask, with_context(seen.people, seen.context))
        if query.shape[1] not in seen.regions:
            raise FaceFusionError(
                f"a layer has {query.shape[1]} queries, the masks are for {sorted(seen.regions)}: "
                "this UNet does not halve its latents from level to level, so people cannot be placed in it"
            )
        regions = seen.regions[query.shape[1]]
        parts = [
            self._attend_people(
                *(attn, query[:, part.queries], key, value, mask),
                with_context(tuple(seen.people[i] for i in part.people), seen.context),
            )
            for part in regions.parts
        ]
        return torch.cat(parts, dim=1)[:, regions.order]

    def _attend_people(
        self,
        attn: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        people: tuple[PersonKeys, ...],
    ) -> Tensor:
        dispatch = {"backend": self._attention_backend, "parallel_config": self._parallel_config}
        people = tuple(person for person in people if person.seen)
        if texts := [person for person in people if person.replaces_text]:
            people = tuple(person for person in people if not person.replaces_text)
            text_key, text_value, _ = join_people(texts, 0, query.shape[1])
            key, value = (
                t.expand(len(query), -1, -1, -1) for t in split_heads(attn, text_key, text_value, query.dtype)
            )
            mask = None
        if not people:
            return dispatch_attention_fn(query, key, value, mask, **dispatch)
        face_key, face_value, bias = join_people(people, key.shape[1], query.shape[1])
        face_key, face_value = split_heads(attn, face_key, face_value, query.dtype)
        return joint_attention(query, key, value, face_key, face_value, bias, mask, **dispatch)


def with_context(people: tuple[PersonKeys, ...], context: PersonKeys | None) -> tuple[PersonKeys, ...]:
    """The people, and the context of everybody unless somebody of them has one."""
    return people if context is None or any(person.context for person in people) else (*people, context)


def call_processor(
    processor: Any,
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Any,
    attention_mask: Tensor | None,
    temb: Tensor | None,
    ip_adapter_masks: Any,
) -> Tensor:
    """`processor` as the layer itself would call it: not every processor knows the last two arguments."""
    known: dict[str, Any] = {} if temb is None else {"temb": temb}
    if is_ip_adapter_processor(processor):
        known["ip_adapter_masks"] = ip_adapter_masks
    return processor(
        attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **known
    )


# --- Layers of a UNet --------------------------------------------------------------------------------------------


def attention_layers(unet: Any, kind: str) -> dict[str, Attention]:
    """The `attn1` (self) or `attn2` (cross) layers of all transformer blocks by name, in the order of the UNet."""
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile's wrapper
    return {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(f".{kind}")
        and ".transformer_blocks." in name
        and isinstance(module, Attention)
        and module.is_cross_attention == (kind == "attn2")
    }
