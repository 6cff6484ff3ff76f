"""Do tools made for photographs accept avatars? Face recognisers must tell them apart, a detector must find them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...evaluation.image_files import to_pil
from ...evaluation.metrics import box_iou, normalised_similarity, verification_auc
from ...face_detectors import FaceDetector
from ...face_images import detect_faces
from ...face_recognisers import Recogniser
from .. import render, sample_scene
from .renders import coarse
from .trials import FIRST_TEST_IDENTITY, NEAR_FRONTAL


COARSE = 4  # pixels that become one


def measure_recognition(
    recognisers: Sequence[Recogniser],
    detector: FaceDetector | None,
    *,
    identities: int = 100,
    portraits: int = 4,
    seed: int = 0,
    size: int = 128,
    world: int | None = None,
) -> dict[str, Any]:
    """AUC of same against different people, over near-frontal photographs with any expression, light and clothes.

    Faces are aligned by the true landmarks ("auc") and by the detector's ("auc_detected", the true ones where it
    finds none). "coarse": what is left of likeness when one of two pictures has a quarter of the resolution,
    normalised: 0 is different people, 1 the same one. It says how fine the differences are that a recogniser goes by.
    For the detector: fraction of faces found, fraction of those with IoU >= 0.5 against the true box, mean IoU.
    `size` is in pixels, `world` as for `sample_identity`.
    """
    rng = np.random.default_rng(seed)
    people = np.repeat(np.arange(FIRST_TEST_IDENTITY, FIRST_TEST_IDENTITY + identities), portraits)
    yaws = rng.uniform(-NEAR_FRONTAL, NEAR_FRONTAL, len(people))
    seeds = rng.integers(1 << 50, size=len(people))
    draws = zip(seeds.tolist(), people.tolist(), yaws.tolist(), strict=True)
    scenes = [sample_scene(scene_seed, [person], world, style="photo", yaw=yaw) for scene_seed, person, yaw in draws]
    parts = [render(scenes[start : start + 16], size) for start in range(0, len(scenes), 16)]
    images = torch.cat([part.images.cpu() for part in parts])
    landmarks = torch.stack([points[0].cpu() for part in parts for points in part.landmarks5])
    boxes = np.stack([box[0].cpu().numpy() for part in parts for box in part.boxes])
    result: dict[str, Any] = {"identities": identities, "images": len(images), "seed": seed, "size": size}
    found = {r.name: r.embed(images, landmarks) for r in recognisers}
    result["auc"] = {name: verification_auc(rows, people) for name, rows in found.items()}
    blurred = coarse(images, COARSE)
    result["coarse"] = {r.name: kept(found[r.name], r.embed(blurred, landmarks), people) for r in recognisers}
    if detector is not None:
        detected, ious = landmarks.clone(), []
        for i, image in enumerate(images):
            faces = detect_faces(to_pil(image), detector)
            if not faces:
                continue
            best = max(faces, key=lambda face: box_iou(np.array(face.box), boxes[i]))
            ious.append(box_iou(np.array(best.box), boxes[i]))
            if best.landmarks5 is not None:
                detected[i] = torch.from_numpy(np.asarray(best.landmarks5)).float()
        result["detector"] = {
            "name": detector.name,
            "found": len(ious) / len(images),
            "iou_above_half": float(np.mean(np.array(ious) >= 0.5)) if ious else 0.0,
            "mean_iou": float(np.mean(ious)) if ious else 0.0,
        }
        result["auc_detected"] = {r.name: verification_auc(r.embed(images, detected), people) for r in recognisers}
    return result


def kept(sharp: np.ndarray, blurred: np.ndarray, people: np.ndarray) -> float:
    """How far `blurred` embeddings come from strangers to other sharp pictures of the person; `sharp` ones come to 1.

    Both (N, D), of the same pictures of `people` (N,).
    """
    same = people[:, None] == people[None]
    others, strangers = same & ~np.eye(len(people), dtype=bool), ~same

    def cosines(rows: np.ndarray) -> np.ndarray:
        return unit(rows) @ unit(sharp).T

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    clear = cosines(sharp)
    return normalised_similarity(cosines(blurred)[others].mean(), clear[strangers].mean(), clear[others].mean())
