"""True eyes made wrong in the ways in which models draw them wrong: scrambled, strange, faded, barred, doubled.

All functions take pictures (B, 3, H, W) in [0, 1] with landmarks (B, 5, 2) in their pixels, and give pictures; what is
random comes from a generator. Lengths are fractions of the distance between the eyes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


Damage = Callable[[Tensor, Tensor, Tensor, "Dice"], Tensor]


class Dice:
    """Random numbers for `count` pictures, on one device."""

    def __init__(self, count: int, generator: torch.Generator, device: torch.device) -> None:
        self.count, self.generator, self.device = count, generator, device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """(count, *shape) between `low` and `high`."""
        drawn = torch.rand(self.count, *shape, generator=self.generator, device=self.generator.device)
        return low + (high - low) * drawn.to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """(count, *shape), standard normal."""
        drawn = torch.randn(self.count, *shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.device)

    def sign(self, *shape: int) -> Tensor:
        """(count, *shape) of -1 and 1."""
        return (self.uniform(-1, 1, *shape) > 0).float() * 2 - 1


def damaged(images: Tensor, landmarks: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture with one eye or both made wrong, in one way or two."""
    dice, images = Dice(len(images), generator, images.device), images.clone()
    for chance in (1.0, 0.35):  # one way, and often a second
        ways = torch.where(dice.uniform(0, 1) < chance, dice.uniform(0, len(WAYS)).long(), -1)
        both, left = dice.uniform(0, 1) < 0.4, dice.uniform(0, 1) < 0.5
        eyes = torch.stack([both | left, both | ~left], 1).float()  # (B, 2)
        for number, way in enumerate(WAYS):
            rows = (ways == number).nonzero()[:, 0]
            if len(rows):
                own = Dice(len(rows), generator, images.device)
                images[rows] = way(images[rows], landmarks[rows], eyes[rows], own)
    return images.clamp(0, 1)


def _places(images: Tensor) -> Tensor:
    """Of the pixels: (H, W, 2), x and y."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device=images.device) for n in images.shape[-2:]), indexing="ij")
    return torch.stack([columns, rows], -1).to(images)


def _apart(landmarks: Tensor) -> Tensor:
    """Distance between the eyes (B,), pixels."""
    return (landmarks[:, 0] - landmarks[:, 1]).norm(dim=-1).clamp_min(4)


def _mask(images: Tensor, landmarks: Tensor, eyes: Tensor, radius: Tensor) -> Tensor:
    """Near 1 around the chosen eyes (B, 1, H, W); `radius` (B,) is a fraction of the distance between them."""
    size = (radius * _apart(landmarks)).view(-1, 1, 1, 1)
    distance = (_places(images)[None, None] - landmarks[:, :2, None, None]).norm(dim=-1)  # (B, 2, H, W)
    near = torch.sigmoid((size - distance) / (0.18 * size)) * eyes[..., None, None]
    return near.amax(1, keepdim=True)


def _sample(images: Tensor, places: Tensor) -> Tensor:
    """Pictures at places (B, H, W, 2), pixels."""
    span = torch.tensor([images.shape[-1] - 1, images.shape[-2] - 1]).to(images)
    return F.grid_sample(images, places / span * 2 - 1, padding_mode="border", align_corners=True)


def scrambled(images: Tensor, landmarks: Tensor, eyes: Tensor, dice: Dice) -> Tensor:
    """Pixels around the eye lie where they do not belong."""
    cells = 12
    shifts = F.interpolate(dice.normal(2, cells, cells), size=images.shape[-2:], mode="bicubic", align_corners=True)
    amount = (dice.uniform(0.12, 0.28) * _apart(landmarks)).view(-1, 1, 1, 1)
    moved = _mask(images, landmarks, eyes, dice.uniform(0.35, 0.55)) * shifts * amount
    return _sample(images, _places(images) + moved.permute(0, 2, 3, 1))


def strange(images: Tensor, landmarks: Tensor, eyes: Tensor, dice: Dice) -> Tensor:
    """Another person's eye, of another size, turned, a little beside its place, not always opaque."""
    donors, theirs = images.roll(1, 0), landmarks.roll(1, 0)
    angle, size = dice.uniform(-0.7, 0.7), dice.uniform(0.6, 1.7) * _apart(theirs) / _apart(landmarks)
    cos, sin = (angle.cos() * size), (angle.sin() * size)
    turn = torch.stack([cos, -sin, sin, cos], 1).view(-1, 1, 1, 2, 2)
    beside = dice.normal(2) * 0.10 * _apart(theirs)[:, None]
    result = images
    for eye in (0, 1):
        mine, other = landmarks[:, eye, None, None], (theirs[:, eye] + beside)[:, None, None]
        offset = (turn @ (_places(images) - mine)[..., None])[..., 0]
        chosen = eyes * torch.tensor([1.0 - eye, float(eye)], device=eyes.device)
        mask = _mask(images, landmarks, chosen, dice.uniform(0.25, 0.38)) * dice.uniform(0.6, 1, 1, 1, 1)
        result = torch.lerp(result, _sample(donors, other + offset), mask)
    return result


def faded(images: Tensor, landmarks: Tensor, eyes: Tensor, dice: Dice) -> Tensor:
    """What is around the eye runs over it."""
    width = int(images.shape[-1] / 128 * 17) | 1
    smooth = F.avg_pool2d(images, width, 1, width // 2, count_include_pad=False)
    mask = _mask(images, landmarks, eyes, dice.uniform(0.22, 0.40)) * dice.uniform(0.75, 1, 1, 1, 1)
    return torch.lerp(images, smooth, mask)


def barred(images: Tensor, landmarks: Tensor, eyes: Tensor, dice: Dice) -> Tensor:
    """Bars and spots over the eye, dark or of a colour from elsewhere in the picture."""
    places, apart = _places(images), _apart(landmarks).view(-1, 1, 1)
    for _ in range(2):
        side = torch.where(eyes[:, 1] * dice.uniform(0, 1) > eyes[:, 0] * dice.uniform(0, 1), 1, 0)
        centre = landmarks[torch.arange(len(images)), side] + dice.normal(2) * 0.12 * apart[:, 0]
        angle = dice.uniform(0, 3.1416).view(-1, 1, 1)
        x, y = (places - centre[:, None, None]).unbind(-1)
        along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        long, thick = (dice.uniform(*ends).view(-1, 1, 1) * apart for ends in ((0.15, 0.6), (0.04, 0.12)))
        inside = torch.sigmoid((long - along.abs()) * 1.5) * torch.sigmoid((thick - across.abs()) * 1.5)
        spot = dice.uniform(0, images.shape[-1] * images.shape[-2]).long()
        elsewhere = images.flatten(2)[torch.arange(len(images)), :, spot]
        dark = dice.uniform(0, 0.25, 1).expand(-1, 3)
        colour = torch.where(dice.uniform(0, 1, 1) < 0.5, dark, elsewhere)[..., None, None]
        images = torch.lerp(images, colour.expand_as(images), (inside * dice.uniform(0.6, 1, 1, 1))[:, None])
    return images


def doubled(images: Tensor, landmarks: Tensor, eyes: Tensor, dice: Dice) -> Tensor:
    """The eye a second time, beside itself."""
    angle = dice.uniform(0, 6.2832)
    aside = torch.stack([angle.cos(), angle.sin()], 1) * (dice.uniform(0.14, 0.32) * _apart(landmarks))[:, None]
    again = _sample(images, _places(images) + aside[:, None, None])
    return torch.lerp(
        images, again, _mask(images, landmarks, eyes, dice.uniform(0.3, 0.5)) * dice.uniform(0.4, 0.7, 1, 1, 1)
    )


def streaked(images: Tensor, landmarks: Tensor, eyes: Tensor, dice: Dice) -> Tensor:
    """The eye is drawn out along a line."""
    angle = dice.uniform(0, 3.1416)
    step = torch.stack([angle.cos(), angle.sin()], 1) * (dice.uniform(0.05, 0.11) * _apart(landmarks))[:, None]
    taps = [_sample(images, _places(images) + k * step[:, None, None]) for k in (-2, -1, 0, 1, 2)]
    return torch.lerp(images, torch.stack(taps).mean(0), _mask(images, landmarks, eyes, dice.uniform(0.3, 0.45)))


WAYS: tuple[Damage, ...] = (scrambled, strange, faded, barred, doubled, streaked)
