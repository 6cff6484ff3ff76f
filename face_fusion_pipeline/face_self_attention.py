"""The reference at the self-attention: keys and values that the model has without any training. Not in the paper.

At every self-attention layer the picture attends to itself, and there to the reference, too: with q of the picture,
K, V of the picture and K_f, V_f = W_k h_f, W_v h_f of the reference, all by the layer's own frozen matrices,

    softmax([q K^T / sqrt(d) ; q K_f^T / sqrt(d) + log(scale)]) [V ; V_f].

A reference as it is shows its background and the drawing of its first levels as well. What is chosen of it, and how
noisy the UNet sees it, decides more than anything else whether the person comes out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real

import torch
from torch import Tensor

from .face_errors import FaceFusionError, IdentityMismatchError, InvalidScaleError, short


MAX_SCALE = 100.0


@dataclass(frozen=True)
class SelfAttentionReference:
    """What the self-attention of a picture sees of a reference, and how strongly.

    The defaults were found on the avatar model (128 x 128 pixels, latents 16 x 16). They are stated so that they mean
    the same in other UNets, **where they are untested**. In pictures of the model's own size the default layers are:

    | UNet | self-attention layers in `up_blocks`, by the size of their feature maps |
    |---|---|
    | avatars | `up_blocks.0` 4 x 4, `up_blocks.1` 8 x 8, `up_blocks.2` 16 x 16; two each |
    | Stable Diffusion 1.5, 512 px | `up_blocks.1` 16 x 16, `up_blocks.2` 32 x 32, `up_blocks.3` 64 x 64; three each |
    | Stable Diffusion 2.x, 768 px | the same layers, 24 x 24, 48 x 48, 96 x 96 |
    | Stable Diffusion XL, 1024 px | `up_blocks.0` 32 x 32, thirty; `up_blocks.1` 64 x 64, six |

    Attributes:
        scale: strength in [0, 100] of the reference's keys against the picture's own, before `face_scale` multiplies
            it; 0 leaves the self-attention as it is.
        timestep: noise level of the reference, of the scheduler's training timesteps (usually 1000); 0 is clean.
        seed: of that noise, which is the same for every reference.
        half_axes: of the ellipse around the middle of the crop whose cells are seen, across and down, over half the
            side of the crop. From sqrt(2) on the whole crop is seen.
        layers: prefixes of the names of the layers that see it.

    Raises:
        InvalidScaleError: a scale, timestep or half axis out of range.
        FaceFusionError: no layers.
    """

    scale: float = 4.0
    timestep: int = 150
    seed: int = 0
    half_axes: tuple[float, float] = (0.6, 0.75)
    layers: tuple[str, ...] = ("up_blocks",)

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, Real) and 0 <= self.scale <= MAX_SCALE):
            raise InvalidScaleError(f"the scale at the self-attention must be from 0 to {MAX_SCALE}, got {self.scale}")
        if not (isinstance(self.timestep, Integral) and self.timestep >= 0 and isinstance(self.seed, Integral)):
            raise InvalidScaleError(
                f"timestep and seed of a reference must be integers, 0 or more, got {self.timestep} and {self.seed}"
            )
        if len(self.half_axes) != 2 or not all(0 < axis < math.inf for axis in self.half_axes):
            raise InvalidScaleError(f"half_axes must be two numbers above 0, across and down, got {self.half_axes}")
        if isinstance(self.layers, str) or not self.layers:
            raise FaceFusionError(f'layers must be a tuple of prefixes such as ("up_blocks",), got {self.layers!r}')

    @property
    def noise(self) -> tuple[int, int]:
        """Timestep and seed of the noise; without noise the seed means nothing."""
        return self.timestep, self.seed if self.timestep else 0

    def with_scale(self, scale: float) -> "SelfAttentionReference":
        """The same at another strength."""
        return replace(self, scale=scale)

    def chosen(self, hidden_states: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of what enters all self-attention layers, the layers and cells that the picture sees.

        Args:
            hidden_states: layer name -> `(B, N_f, C)`, N_f a square.

        Returns:
            layer name -> `(B, cells, C)`, and layer name -> bool `(h_f, w_f)`, which cells these are.

        Raises:
            FaceFusionError: no layer has one of the prefixes.
        """
        names = [n for n in hidden_states if any(f"{n}.".startswith(f"{prefix}.") for prefix in self.layers)]
        if not names:
            raise FaceFusionError(
                f"no self-attention layer of this UNet is in {', '.join(self.layers)}; it has {list(hidden_states)}"
            )
        cells = {name: ellipse(math.isqrt(hidden_states[name].shape[1]), self.half_axes) for name in names}
        return {name: hidden_states[name][:, cells[name].flatten()] for name in names}, cells

    def to_strings(self) -> dict[str, str]:
        """The part of an identity file's metadata that says how its self-attention part was made."""
        return {
            "self_scale": str(float(self.scale)),
            "self_timestep": str(self.timestep),
            "self_seed": str(self.seed),
            "self_half_axes": " ".join(str(float(axis)) for axis in self.half_axes),
            "self_layers": " ".join(self.layers),
        }

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> "SelfAttentionReference":
        """Inverse of [`to_strings`]; raises [`IdentityMismatchError`] where a value is missing or none."""
        try:
            across, down = (float(axis) for axis in strings["self_half_axes"].split())
            layers = tuple(strings["self_layers"].split())
            numbers = int(strings["self_timestep"]), int(strings["self_seed"])
            return cls(float(strings["self_scale"]), *numbers, (across, down), layers)
        except (KeyError, ValueError, FaceFusionError) as error:
            raise IdentityMismatchError(f"an identity whose metadata are damaged: {short(error)}") from error


# What identity files of version 1 hold: the whole clean reference at all layers.
WHOLE_AND_CLEAN = SelfAttentionReference(1.0, 0, 0, (2.0, 2.0), ("down_blocks", "mid_block", "up_blocks"))


def square_ellipse(cells: int, half_axes: tuple[float, float]) -> Tensor:
    """As [`ellipse`], of a square of so many cells, flat: bool `(cells,)`."""
    return ellipse(math.isqrt(cells), half_axes).flatten()


def ellipse(side: int, half_axes: tuple[float, float]) -> Tensor:
    """Cells of a square grid whose centres lie in the ellipse around its middle, bool `(side, side)`; at least one.

    Args:
        half_axes: across and down, over half the side.
    """
    centres = (torch.arange(side) + 0.5) / side * 2 - 1
    across, down = half_axes
    distance = (centres[None] / across) ** 2 + (centres[:, None] / down) ** 2
    return distance <= distance.min().clamp(min=1)
