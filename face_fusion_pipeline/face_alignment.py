"""Face crops aligned by five landmarks: left eye, right eye, nose, left and right mouth corner, as seen in the image.

Coordinates are (x, y) in pixels with integer values at pixel centres, as in OpenCV.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


# Where ArcFace recognisers expect the five landmarks in a 112 x 112 crop.
ARCFACE_TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def similarity_transform(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Least-squares rotation, scale and shift (no reflection) taking `source` to `target`.

    Points (..., K, 2) in, matrices (..., 2, 3) out: target ≈ matrix[:, :2] @ source + matrix[:, 2]. With points as
    complex numbers the map is w = a z + b, and a = Σ conj(z - mean z)(w - mean w) / Σ |z - mean z|².
    """
    z = torch.view_as_complex(source.double().contiguous())
    w = torch.view_as_complex(target.double().contiguous())
    z, w = torch.broadcast_tensors(z, w)
    z_mean, w_mean = z.mean(-1, keepdim=True), w.mean(-1, keepdim=True)
    a = ((z - z_mean).conj() * (w - w_mean)).sum(-1) / (z - z_mean).abs().square().sum(-1).clamp_min(1e-12)
    b = w_mean[..., 0] - a * z_mean[..., 0]
    rows = [torch.stack([a.real, -a.imag, b.real], -1), torch.stack([a.imag, a.real, b.imag], -1)]
    return torch.stack(rows, -2).to(source.dtype)


def face_template(size: int, zoom: float = 1.0) -> torch.Tensor:
    """The ArcFace template in a crop of `size` pixels; `zoom` < 1 shrinks the face, so that hair and chin come in."""
    centre = 55.5
    return ((ARCFACE_TEMPLATE - centre) * zoom + centre) * (size - 1) / 111


def align_faces(images: torch.Tensor, landmarks: torch.Tensor, size: int = 112, *, zoom: float = 1.0) -> torch.Tensor:
    """Crops (B, 3, size, size) of images (B, 3, H, W), landmarks (B, 5, 2) on the template; edges are replicated."""
    height, width = images.shape[-2:]
    to_crop = similarity_transform(landmarks, face_template(size, zoom).to(landmarks))
    turn = to_crop[..., :2]
    turn = turn.mT / torch.linalg.det(turn).clamp_min(1e-6)[..., None, None]  # the inverse; of coinciding points too
    matrix = torch.cat([turn, -turn @ to_crop[..., 2:]], -1)  # crop pixel -> image pixel
    rows, columns = torch.meshgrid(*[torch.arange(size, device=images.device)] * 2, indexing="ij")
    pixels = torch.stack([columns, rows, torch.ones_like(rows)], -1).to(images)  # (size, size, 3)
    points = torch.einsum("bij,yxj->byxi", matrix.to(images), pixels)
    span = torch.tensor([width - 1, height - 1]).to(images)
    return F.grid_sample(images, points / span * 2 - 1, padding_mode="border", align_corners=True)
