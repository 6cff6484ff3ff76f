"""What the parts of FaceSnap give: variants go on from the same weights, and each draws avatars.

Each differs from the whole in one thing: what the mixer sees of a face, whether FFRNet reads the mixer's tokens or the
prompt, how many points it sees, or whether there is an identity loss. What a variant lacks it may learn to do without.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...evaluation.generation import Settings, pipeline_of
from ...evaluation.image_files import read_image, write_image
from ...evaluation.reports import circumstances, markdown_table, write_report
from ...face_attached import detach_module
from ...face_landmarks import PARTS, POINTS, draw_landmarks
from ...face_models import recombined
from ...face_snap import NETWORK, FaceMixer, load_network, new_network
from ...files.atomic import write_text
from ...training.base_model import BaseModel
from ...training.initial_weights import continued_tokens
from ...training.loop import Batch, LoopOptions, train
from ...training.objective import load_face_embedder
from ...training.pairs import Pairs, Reference
from ...training.snap import IDENTITY_LOSS_WEIGHT, SnapOptions, SnapTask
from ...training.snap_cache import SnapFeatures
from ..evaluation.avatar_table import CEILING, FLOOR, summarise
from ..evaluation.evaluators import IMAGE_SIZE
from ..evaluation.scoring import Panel
from ..evaluation.snap_table import Driven, driven_trial, followed, obeyed
from ..evaluation.trial_pictures import image_path, trial_image
from ..evaluation.trials import Trial, portraits, true_renders
from ..face_model import EstimatedAvatarFaceModel
from .laboratory import keep_common


TIP, CORNERS = 30, (52, 58)  # of the nose, and of the mouth
LOSS = {"timestep_power": 0.8, "snr_gamma": 5.0, "keep_noisy": True, "face_loss_weight": 6.0, "text_dropout": 0.5,
        "face_dropout": 0.15, "identity_loss_until": 0.95}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What is there of FaceSnap.

    Attributes:
        vector, patches: whether the mixer sees the embedding of a face, and the patches of its picture.
        reads_text: FFRNet reads the prompt, as other ControlNets do; nobody is known then.
        five: FFRNet sees the eyes, the tip of the nose and the corners of the mouth, as they are in the driver.
        identity_loss: λ √ᾱ L_id is a part of the loss.
    """

    vector: bool = True
    patches: bool = True
    reads_text: bool = False
    five: bool = False
    identity_loss: bool = False


VARIANTS = {
    "whole": Variant(),
    "vector alone": Variant(patches=False),
    "patches alone": Variant(vector=False),
    "text in place of tokens": Variant(reads_text=True),
    "five points": Variant(five=True),
    "identity loss": Variant(identity_loss=True),
}


def five_points(points: Tensor) -> Tensor:
    """72 points (..., 72, D) that lie on five: the eyes keep their colours, the nose is white, the mouth red."""
    found = points[..., TIP : TIP + 1, :].expand_as(points).clone()
    for part in (PARTS["left eye"][0], PARTS["right eye"][0]):
        found[..., part, :] = points[..., part, :].mean(-2, keepdim=True)
    left, right = CORNERS
    for corner, half in ((left, slice(left, right)), (right, slice(right, POINTS))):
        found[..., half, :] = points[..., corner : corner + 1, :]
    return found


class PartsTask(SnapTask):
    """The training of a [`Variant`]."""

    def __init__(self, variant: Variant, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.variant = variant

    @property
    def subject(self) -> dict[str, Any]:
        return super().subject | asdict(self.variant)

    def examples(self, pairs: Pairs, rows: Tensor, references: list[Reference]) -> Batch:
        batch = super().examples(pairs, rows, references)
        for name, seen in (("face", self.variant.vector), ("patches", self.variant.patches)):
            batch[name] = batch[name] if seen else torch.zeros_like(batch[name])
        return batch | ({"points": five_points(batch["points"])} if self.variant.five else {})

    def network_reads(self, conditions: dict[str, Tensor], tokens: Tensor, side: int) -> dict[str, Any]:
        if self.variant.reads_text:
            return self.base.unet_arguments(conditions, side)
        return super().network_reads(conditions, tokens, side)


@dataclass
class Workshop:
    """Trains variants into `out/VARIANT/seed-N`, where what is finished is not trained again.

    Args:
        start: folder of the FaceSnap weights that every variant begins with.
        loop: how long and how fast; the seed is another for each run.
    """

    base: BaseModel
    pairs: Pairs
    features: SnapFeatures
    start: Path
    loop: LoopOptions
    out: Path

    def trained(self, name: str, seed: int) -> Path:
        """The folder with the weights of a variant."""
        folder, variant = self.out / "-".join(name.split()) / f"seed-{seed}", VARIANTS[name]
        if not (folder / "training.json").is_file():  # written last
            detach_module(self.base.unet, FaceMixer.NAME)
            mixer = continued_tokens(self.base.unet, FaceMixer, self.start)
            network = new_network(self.base.unet, start=str(self.start / NETWORK))
            weight = IDENTITY_LOSS_WEIGHT if variant.identity_loss else 0.0
            options = SnapOptions(**LOSS, identity_loss_weight=weight)  # type: ignore[arg-type]
            embedder = load_face_embedder("avatars") if variant.identity_loss else None
            parts = (self.base, mixer, network, self.pairs, self.features)
            task = PartsTask(variant, *parts, options=options, embedder=embedder)
            train(task, replace(self.loop, seed=seed), folder)
        return folder


class Drawer:
    """Draws what is not there yet in the folder of a variant.

    Args:
        embedder: what faces are known by, of the mixers' training.
    """

    def __init__(self, settings: Settings, device: str, embedder: Any, model: EstimatedAvatarFaceModel) -> None:
        self.settings, self.device, self.embedder, self.model = settings, device, embedder, model

    def pictures(self, name: str, folder: Path, asked: Sequence[Driven]) -> list[Tensor]:
        """(3, S, S) of each trial."""
        paths = [image_path(folder / "pictures", driven.trial, "picture") for driven in asked]
        if not all(path.is_file() for path in paths):
            pipe, variant = pipeline_of(self.settings, self.device), VARIANTS[name]
            if variant.reads_text:
                pipe.register_modules(controlnet=load_network(folder / NETWORK))
            else:
                pipe.load_face_snap(folder, face_embedder=self.embedder)
            for driven, path in zip(tqdm(asked, desc=name, unit="picture"), paths, strict=True):
                if not path.is_file():
                    arguments = self.arguments(pipe, variant, driven)
                    write_image(path, trial_image(pipe, driven.trial, self.settings, **arguments))
        return [read_image(path, IMAGE_SIZE) for path in paths]

    def arguments(self, pipe: Any, variant: Variant, driven: Driven) -> dict[str, Any]:
        shape = driven.driver_fit if variant.five else driven.fit
        points = torch.from_numpy(recombined(self.model, shape, driven.driver_fit)[:, :2])
        points = five_points(points) if variant.five else points
        if variant.reads_text:
            return {"control_image": draw_landmarks(points, driven.picture.size), "control_kind": "map"}
        identity = pipe.encode_face(
            portraits(driven.trial.person, seed=self.settings.seed).face, face_mode="face-snap"
        )
        vector = identity.embeddings if variant.vector else torch.zeros_like(identity.embeddings)
        patches = identity.features if variant.patches else torch.zeros_like(identity.features)
        identity = replace(identity, embeddings=vector, features=patches)
        return {"face_image": identity, "driver_image": points.numpy()}


def compare_parts(
    workshop: Workshop,
    drawer: Drawer,
    names: Sequence[str],
    seeds: Sequence[int],
    trials: Sequence[Trial],
    panel: Panel,
) -> dict[str, Any]:
    """Train, draw, score, write `rows.jsonl`, `snap_parts.json` and `snap_parts.md` to `workshop.out`."""
    out, settings = workshop.out, drawer.settings
    budget = {name: value for name, value in asdict(workshop.loop).items() if name != "log_every"} | LOSS
    sampling = {name: value for name, value in asdict(settings).items() if name != "batch"}
    keep_common(out, {"training": budget, "data": workshop.pairs.key, "sampling": sampling})
    asked = [driven_trial(trial, drawer.model, settings.seed) for trial in trials]
    runs = [(name, seed) for name in names for seed in seeds]
    drawn = [drawer.pictures(name, workshop.trained(name, seed), asked) for name, seed in runs]
    wanted = [driven.trial for driven in asked]
    truth, strangers = true_renders(wanted), true_renders(wanted, person_shift=1)
    labelled = [*runs, (CEILING, 0), (FLOOR, 0)]
    rows: list[dict] = []
    for i, driven in enumerate(asked):
        images = torch.stack([*(pictures[i] for pictures in drawn), truth[i], strangers[i]])
        known = portraits(driven.trial.person, seed=settings.seed)
        mine = panel.score(driven.trial, images, [name for name, _ in labelled], known)
        found = followed(drawer.model, panel, driven, images)
        rows += [row | more | {"seed": seed} for row, more, (_, seed) in zip(mine, found, labelled, strict=True)]
    result = {
        "settings": asdict(settings),
        "training": budget,
        "seeds": list(seeds),
        "recognisers": panel.names,
        "identities": len({trial.person for trial in trials}),
        "images_per_run": len(asked),
        **circumstances(),
        "variants": {
            name: figures(rows, name, seeds, panel.names, settings.seed) for name in (*names, CEILING, FLOOR)
        },
    }
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_report(out, "snap_parts", result, as_markdown(result))
    return result


def figures(
    rows: list[dict], name: str, seeds: Sequence[int], recognisers: Sequence[str], seed: int
) -> dict[str, Any]:
    """Of a variant: how the driver is obeyed, likeness with intervals over people, and its spread over seeds."""
    bounds = [row for row in rows if row["method"] in (CEILING, FLOOR)]
    mine = [row for row in rows if row["method"] == name]
    methods, names = list(dict.fromkeys((name, CEILING, FLOOR))), list(recognisers)

    def likeness(those: list[dict]) -> dict[str, Any]:
        others = [row for row in bounds if row["method"] != name]
        found: dict[str, Any] = summarise([*those, *others], methods, names, seed=seed)[name]["similarity"]
        return found

    each = [likeness([row for row in mine if row["seed"] == one]) for one in seeds] if name in VARIANTS else []
    own = [found[names[-1]]["normalised"] for found in each]
    return {
        "driver": obeyed(mine, seed),
        "similarity": likeness(mine),
        "by_seed": own,
        "spread": float(np.std(own, ddof=1)) if len(own) > 1 else None,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The table with its legend."""
    recognisers, rows = result["recognisers"], []
    for name, found in result["variants"].items():
        driver, spread = found["driver"], found["spread"]
        row = [name, *(f"{driver[angle]['median']:.1f}°" for angle in ("yaw", "pitch", "roll"))]
        row += [f"{100 * driver[key]['mean']:.1f} %" for key in ("own_shape", "driver_shape")]
        row += [
            "{normalised:.0%} [{normalised_low:.0%}, {normalised_high:.0%}]".format(**found["similarity"][who])
            for who in recognisers
        ]
        rows.append([*row, None if spread is None else f"{100 * spread:.0f} points"])
    header = ["variant", "yaw ↓", "pitch ↓", "roll ↓", "from the own shape ↓", "from the driver's shape"]
    training = result["training"]
    legend = (
        f"\n{training['steps']} steps of {training['batch_size']} for each of the seeds "
        f"{', '.join(map(str, result['seeds']))}; {result['images_per_run']} pictures of {result['identities']} "
        f"people a run; {result['machine']}, {result['date']}. Median angles; shapes over the distance of the eyes; "
        "how far a picture comes from a stranger to another true picture of the person, with 95 % intervals over "
        "people; the deviation of the last recogniser over seeds.\n"
    )
    return markdown_table([*header, *(f"{name} ↑" for name in recognisers), "± seeds"], rows) + legend
