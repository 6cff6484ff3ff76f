"""What is compared: one `Variant` for each way to encode a reference, to show it to the UNet, and to train that.

A variant differs from `face-fusion` in the one thing that its question is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


Encoder = Literal["none", "unet", "clip", "clip patches", "face embedder"]


@dataclass(frozen=True)
class Variant:
    """One way to condition on a reference.

    Attributes:
        about: what is special about it, in a few words.
        encoder: what turns the reference into tokens: nothing, the UNet (its hidden states), an image encoder (its
            embedding, IP-Adapter, or its patch tokens, IP-Adapter Plus), or a face embedder (its embedding, FaceID).
        attention: "joint", one softmax over text and face, or "added", a second attention whose result is added.
            Tokens of another encoder than the UNet are always added, by diffusers' own IP-Adapter.
        trained: False uses the projections of the self-attention as they are.
        init: initial weights of `create_adapter`.
        reference_noise: noise level of the reference as a fraction of all timesteps.
        region: keys of the whole crop, or only of the part of it where the face box lies.
        layers: which cross-attention layers see the face, see [`chosen_layers`].
        same_photo: the reference in training is the target photo itself.
        token_count_bias: log(text tokens / face tokens) on the face logits; never without training.
    """

    name: str
    about: str
    encoder: Encoder = "unet"
    attention: Literal["joint", "added"] = "joint"
    trained: bool = True
    init: str = "attn1"
    reference_noise: float = 0.0
    region: Literal["crop", "face"] = "crop"
    layers: Literal["all", "up", "down and middle", "every second"] = "all"
    same_photo: bool = False
    token_count_bias: bool = True


METHOD, NO_FACE = "face-fusion", "none"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(NO_FACE, "the prompt alone", encoder="none", trained=False),
        Variant(METHOD, "the paper: UNet features, one softmax"),
        Variant("added-attention", "UNet features, a second attention added", attention="added"),
        Variant("ip-adapter", "tokens of the image encoder's embedding", encoder="clip", attention="added"),
        Variant("ip-adapter-plus", "tokens of its patches", encoder="clip patches", attention="added"),
        Variant("ip-adapter-faceid", "tokens of a recogniser's embedding", encoder="face embedder", attention="added"),
        Variant("training-free", "keys and values of the self-attention", trained=False),
        Variant("noised-reference", "reference at a quarter of the timesteps", reference_noise=0.25),
        Variant("init-zero-v", "values start at zero", init="zero_v"),
        Variant("init-xavier", "keys and values start at random", init="xavier"),
        Variant("no-count-bias", "no bias for the number of face tokens", token_count_bias=False),
        Variant("face-region", "keys of the face box only", region="face"),
        Variant("same-photo", "trained on the photo itself as reference", same_photo=True),
        Variant("layers-up", "the face in the upward half only", layers="up"),
        Variant("layers-down", "the face in the downward half and the middle", layers="down and middle"),
        Variant("layers-half", "the face in every second layer", layers="every second"),
    )
}


def chosen_layers(names: Sequence[str], which: str) -> list[str]:
    """Those of the layers `names`, in the order of the UNet, that [`Variant.layers`] means."""
    if which == "up":
        return [name for name in names if name.startswith("up_blocks.")]
    if which == "down and middle":
        return [name for name in names if not name.startswith("up_blocks.")]
    return list(names[::2]) if which == "every second" else list(names)
