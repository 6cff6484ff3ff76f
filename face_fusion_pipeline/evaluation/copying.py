"""How much of the reference photo itself was copied: head pose, expression, face shape, and the pixels of the face.

Poses and shapes come from five landmarks (5, 2) in pixels, see `alignment`.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ..face_recognisers import similarity_transform


# The five landmarks of an average head in millimetres: x to the image's right, y down, z away from the camera.
HEAD = np.array([[-31.5, -36, 0], [31.5, -36, 0], [0, 0, -30], [-26, 37, -3], [26, 37, -3]], np.float64)
DISTANCE = 20  # of the camera, in eye distances: so far that perspective hardly matters


def head_rotation(landmarks: np.ndarray) -> np.ndarray:
    """The rotation matrix (3, 3) of a head from the frontal view, by SQPnP on an average head."""
    points = np.asarray(landmarks, np.float64)
    focal = DISTANCE * max(float(np.linalg.norm(points[1] - points[0])), 1.0)
    camera = np.array([[focal, 0, 0], [0, focal, 0], [0, 0, 1.0]])
    _, turn, _ = cv2.solvePnP(HEAD, points - points.mean(0), camera, None, flags=cv2.SOLVEPNP_SQPNP)
    return cv2.Rodrigues(turn)[0]


def yaw(rotation: np.ndarray) -> float:
    """Degrees about the vertical axis, 0 for a frontal head; positive where the nose points to the image's right."""
    return float(np.degrees(np.arctan2(-rotation[0, 2], rotation[2, 2])))


def pose_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Angle between two head rotations (3, 3), degrees in [0, 180]."""
    return float(np.degrees(np.linalg.norm(cv2.Rodrigues(a @ b.T)[0])))


def landmark_difference(landmarks: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square distance of landmarks laid over those of the reference, in its eye distances.

    They are laid over each other by the best shift, turn and scale: what is left is shape, expression and pose.
    """
    source, target = torch.as_tensor(landmarks).double(), torch.as_tensor(reference).double()
    matrix = similarity_transform(source, target)
    rest = source @ matrix[:, :2].T + matrix[:, 2] - target
    eyes = (target[1] - target[0]).norm().clamp_min(1e-6)
    return float(rest.square().sum(-1).mean().sqrt() / eyes)


def expression_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation distance of two distributions (C,) over expressions: 0 the same, 1 nothing in common."""
    return float(np.abs(a - b).sum() / 2)


def pixel_agreement(crop: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """PSNR in dB and SSIM of aligned face crops (3, H, W) in [0, 1], computed in float.

    In 8-bit integers the differences would wrap around, and unrelated faces would score near 28 dB.
    """
    pair = crop[None].double(), reference[None].double()
    found = {
        "psnr": peak_signal_noise_ratio(*pair, data_range=1.0),
        "ssim": structural_similarity_index_measure(*pair, data_range=1.0),
    }
    return {name: float(torch.as_tensor(value)) for name, value in found.items()}
