"""Is a reference like the pictures that a model was trained with? Where it is not, the training-free mode is taken.

Weights that were trained with avatars alone make whole people of avatars, and monsters of photographs. The UNet's own
states tell the two apart: what enters its cross-attention while it looks at a reference anyway. A linear judge of
their means and deviations lies beside a model that has one, and `face_fusion_defaults.json` names it; `face-fusion
familiarity` makes it. A mode that is asked for always wins.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .face_attention import attention_layers
from .face_errors import FaceFusionError, shown
from .face_files import check_tensors, number, read_tensors, save_tensors
from .face_self_attention import SelfAttentionReference, square_ellipse
from .unet_family import is_fingerprint, same_fingerprint, unet_fingerprint


FAMILIARITY_FORMAT, FORMAT_VERSION = "face-fusion-familiarity", "1"
FALLBACK_MODE = "training-free"
UNFAMILIAR = (
    "this face is unlike the pictures that the model was trained with, so the training-free mode is taken: expect the "
    "colours of the person and no likeness"
)


def cell_statistics(states: Tensor, half_axes: tuple[float, float]) -> Tensor:
    """Means and standard deviations `(B, 2, C)` of states `(B, N, C)` over the cells of an ellipse, N a square."""
    seen = states[:, square_ellipse(states.shape[1], half_axes).to(states.device)].float()
    return torch.stack([seen.mean(1), seen.std(1, correction=0)], 1)


@dataclass(frozen=True, eq=False, repr=False)
class Familiarity:
    """A judge of references: above 0 a model knows their like.

    Attributes:
        weights: name of a cross-attention layer -> float `(2, C)`, what a mean and a deviation count for.
        bias: of their sum.
        timestep, seed: noise of the reference that the UNet looks at.
        half_axes: of the ellipse whose cells count, see `SelfAttentionReference`.
        fallback: what the self-attention sees of an unfamiliar reference.
        base_fingerprint: of the UNet that it knows.
    """

    weights: dict[str, Tensor]
    bias: float
    timestep: int
    seed: int
    half_axes: tuple[float, float]
    fallback: SelfAttentionReference
    base_fingerprint: str

    @property
    def noise(self) -> tuple[int, int]:
        """Timestep and seed, as `SelfAttentionReference.noise`."""
        return self.timestep, self.seed if self.timestep else 0

    def logits(self, hidden_states: Mapping[str, Tensor]) -> Tensor:
        """`(B,)` of what enters all cross-attention layers, layer name -> `(B, N, C)`."""
        return self.of_statistics(
            {name: cell_statistics(hidden_states[name], self.half_axes).cpu() for name in self.weights}
        )

    def of_statistics(self, found: Mapping[str, Tensor]) -> Tensor:
        """As [`logits`], of layer name -> `(B, 2, C)`, see [`cell_statistics`]."""
        return torch.stack([(found[name] * weights).sum((1, 2)) for name, weights in self.weights.items()]).sum(
            0
        ) + torch.tensor(self.bias)

    def fits(self, unet: Any) -> bool:
        """Whether it is of this UNet."""
        layers = attention_layers(unet, "attn2")
        return same_fingerprint(self.base_fingerprint, unet_fingerprint(unet)) and all(
            name in layers and weights.shape[1] == layers[name].to_q.in_features
            for name, weights in self.weights.items()
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        metadata = {
            "format": FAMILIARITY_FORMAT,
            "format_version": FORMAT_VERSION,
            "bias": repr(float(self.bias)),
            "timestep": str(self.timestep),
            "seed": str(self.seed),
            "half_axes": " ".join(str(float(axis)) for axis in self.half_axes),
            "base_fingerprint": self.base_fingerprint,
            **self.fallback.to_strings(),
        }
        save_tensors(path, self.weights, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Familiarity":
        """Read what `save` wrote. Raises [`FaceFusionError`]: no such file, another kind of file, or damaged."""
        weights, strings = read_tensors(path, FaceFusionError, lambda found: _check_metadata(found, path))
        check_tensors(weights, str(path), FaceFusionError)
        if not weights or any(tensor.ndim != 2 or len(tensor) != 2 for tensor in weights.values()):
            raise FaceFusionError(f"{path} has no weights for a mean and a deviation of each layer: it is damaged")
        try:
            across, down = (float(axis) for axis in strings["half_axes"].split())
            looking = SelfAttentionReference(
                1.0, int(strings["timestep"]), int(strings["seed"]), half_axes=(across, down)
            )
            fallback = SelfAttentionReference.from_strings(strings)
        except (ValueError, FaceFusionError) as error:
            raise FaceFusionError(f"{path}: its metadata are damaged: {error}") from error
        bias = number(strings, "bias", float, FaceFusionError)
        how = (bias, looking.timestep, looking.seed, looking.half_axes, fallback)
        return cls({name: tensor.float() for name, tensor in weights.items()}, *how, strings["base_fingerprint"])


def _check_metadata(strings: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    """Raise [`FaceFusionError`] unless these are the metadata of a judge that can be read."""
    form, version = strings.get("format"), strings.get("format_version")
    if (form, version) != (FAMILIARITY_FORMAT, FORMAT_VERSION):
        raise FaceFusionError(
            f"{path} has format {shown(form)} version {shown(version)}, expected {FAMILIARITY_FORMAT!r} version "
            f"{FORMAT_VERSION}"
        )
    names = ("bias", "timestep", "seed", "half_axes", "base_fingerprint")
    if lacking := [name for name in names if name not in strings]:
        raise FaceFusionError(f"{path} lacks {', '.join(lacking)}: it is damaged")
    if not is_fingerprint(strings["base_fingerprint"]):
        raise FaceFusionError(
            f"{path}: base_fingerprint is {shown(strings['base_fingerprint'])}, no numbers of a model"
        )


def familiarity_of(pipe: Any) -> Familiarity | None:
    """The judge that the model of a pipeline recommends; None: it has none, or its UNet was changed since.

    Raises:
        FaceFusionError: a file that is no judge.
    """
    path = getattr(pipe.face_defaults, "familiarity_file", None)
    judge = path and pipe._kept("familiarity", str(path), Familiarity.load)
    return judge if judge and judge.fits(pipe.unet) else None


def is_unfamiliar(identity: Any) -> bool:
    """Whether a judge looked at the references of an identity and found them unlike what the model knows."""
    logit = getattr(identity, "familiarity", None)
    return logit is not None and logit < 0
