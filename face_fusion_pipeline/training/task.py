"""The training task: `to_k_face` and `to_v_face` alone, on latents of people and the face crops that go with them.

Every random choice is drawn from (seed, step) for the whole batch. So neither the number of processes nor the number
of parts that a batch is computed in changes what is learned.

The noise in a noised photo is what the squared error asks for, and the best answer is the mean of it over all photos
that fit the prompt, the person and the noisy picture. One photo lies far from that mean, which is why it takes a long
time to learn. A teacher, weights that know the person already, predicts about that mean: learning its prediction
instead leads to the same place, as far as the teacher is right, by a much shorter way (`teacher`).
"""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..face_adapter import ADAPTER_WEIGHTS_NAME, FaceFusionAdapter, adapter_fingerprint, save_adapter
from ..face_errors import also_named
from ..face_layout import layer_sizes
from ..face_self_attention import SelfAttentionReference
from ..joint_attention import PersonKeys, reference_log_weights
from ..reference_pass import capture_hidden_states, noise_latents, reference_passes, self_attention_projections
from .base_model import BaseModel
from .fused_unet import face_fused_unet
from .kernels import plain_attention_on_cpu
from .loop import Batch, Part, Task, seeded
from .objective import (
    FaceEmbedder,
    face_mask,
    face_places,
    identity_distance,
    jittered,
    spread_timesteps,
    weighted_error,
)
from .pairs import Pairs, Reference
from .recomputation import enable_recomputation
from .samples import Samples


STATE = "state "  # prefix of the cached features in a batch
AT_ONCE = 8  # images of a validation pass, or references, computed together


@dataclass(frozen=True)
class FaceFusionOptions:
    """What is learned, and from what.

    Attributes:
        text_dropout, face_dropout, both_dropout: fractions of examples without prompt, without face, without both.
        timestep_power: see `spread_timesteps`; below 1 noisy steps, which know least of the person, come more often.
        snr_gamma, keep_noisy: see `NoiseSchedule.weight`.
        face_loss_weight: weight of the error in latent cells of the face, 1 elsewhere.
        identity_loss_weight: weight of the identity loss, the [`identity_distance`] of the one-step prediction.
        identity_loss_from, identity_loss_until: it is taken between these fractions of all timesteps; below who is
            shown is settled, above one step does not show a face.
        identity_loss_jitter: see `jittered`.
        keep_references: compute the reference pass once for all references and keep its float16 features in memory.
        gradient_checkpointing: less memory, more time.
    """

    text_dropout: float = 0.05
    face_dropout: float = 0.05
    both_dropout: float = 0.05
    timestep_power: float = 1.0
    snr_gamma: float | None = None
    keep_noisy: bool = False
    face_loss_weight: float = 1.0
    identity_loss_weight: float = 0.0
    identity_loss_from: float = 0.0
    identity_loss_until: float = 0.25
    identity_loss_jitter: float = 0.0
    keep_references: bool = False
    gradient_checkpointing: bool = False


@dataclass
class FeatureCache:
    """What the UNet makes of all references: layer name -> float16 (references, N_f, C), and the row of each."""

    rows: dict[Reference, int] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)


class FaceFusionTask(Task):
    """Trains `adapter` for the frozen `base`.

    Args:
        train, validation: targets with their references; `validation` may be None.
        embedder: for the identity loss.
        samples: pictures to generate now and then.
        teacher: weights for the same base and the same kind of reference. What they predict is learned.
        feature_cache: where `keep_references` keeps them, for other tasks of the same base to use it too.
        self_attention: what of the reference is seen at the self-attention as well, for weights that are to be used
            in `face_mode="both"`: they learn what it lacks. None: nothing, as in the paper.
    """

    name = "face-fusion"
    published_as = "adapter"

    @also_named(recogniser="embedder", kept="feature_cache")
    def __init__(
        self,
        base: BaseModel,
        adapter: FaceFusionAdapter,
        train: Pairs,
        validation: Pairs | None = None,
        options: FaceFusionOptions | None = None,
        embedder: FaceEmbedder | None = None,
        samples: Samples | None = None,
        teacher: FaceFusionAdapter | None = None,
        feature_cache: FeatureCache | None = None,
        self_attention: SelfAttentionReference | None = None,
    ) -> None:
        super().__init__()
        self.options = options or FaceFusionOptions()
        self.self_attention = self_attention
        self.settings = asdict(self.options)
        own = {} if self_attention is None else self_attention.to_strings()
        self.settings |= {"face_mode": "both" if own else "adapter", **own}
        self.base, self.adapter, self.pairs, self.held_out, self.samples = base, adapter, train, validation, samples
        self.size = len(train)
        self.empty = {key: state.float().cpu() for key, state in base.conditions([""]).items()}
        self.unet = base.unet.requires_grad_(False).eval()
        needs_decoder = samples is not None or self.options.identity_loss_weight > 0
        self.vae = base.vae if needs_decoder else None  # what is a part of the task moves to its device
        self.text_encoders = torch.nn.ModuleList(base.text_encoders if samples is not None else [])
        self.embedder = embedder
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self.feature_cache = feature_cache or FeatureCache()
        if self.options.gradient_checkpointing:
            enable_recomputation(self.unet)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The UNet alone is compiled: that is where the time goes, and faces are put into it from outside."""
        self.unet.compile(*args, **kwargs)

    def train(self, mode: bool = True) -> FaceFusionTask:
        """Only the adapter is in training; the frozen parts stay as they are used later."""
        super().train(mode)
        for name, module in self.named_children():
            module.train(mode and name == "adapter")
        return self

    @property
    def subject(self) -> dict[str, Any]:
        metadata = getattr(self.adapter, "metadata", None)  # a subclass may train something else
        described = {} if metadata is None else asdict(metadata)
        teacher = None if self.teacher is None else adapter_fingerprint(self.teacher)
        return {
            **self.settings,
            **described,
            "data": self.pairs.key,
            "training_images": self.size,
            "teacher": teacher,
        }

    @property
    def device(self) -> torch.device:
        return self.base.device

    # --- Batches -------------------------------------------------------------------------------------------------

    def part(self, part: Part, generator: torch.Generator, progress: float) -> Batch:
        whole = seeded(part.seed, part.step, "choices")
        power = self.options.timestep_power
        timesteps = spread_timesteps(part.batch_size, len(self.base.schedule), whole, power)[part.rows]
        draws = torch.rand(2, part.batch_size, generator=whole)[:, part.rows]
        batch = self.examples(self.pairs, part.indices, self.pairs.choose(part.indices, draws[0]))
        shape = (part.batch_size, *batch["latents"].shape[1:])
        noise = seeded(part.seed, part.step, "noise", self.device)
        batch["noise"] = torch.randn(shape, generator=noise, device=self.device)[
            part.rows.to(self.device, non_blocking=True)
        ]
        batch["timesteps"] = timesteps
        # One draw decides: [text | both | face | none dropped], so that the three cases exclude each other.
        text, both, face = self.options.text_dropout, self.options.both_dropout, self.options.face_dropout
        no_text = draws[1] < text + both
        batch["has_face"] = ~((draws[1] >= text) & (draws[1] < text + both + face))
        if self.options.identity_loss_weight:
            # Always as many: cuDNN looks for its best kernels anew for every other size.
            most = math.ceil(part.batch_size * self.options.identity_loss_until ** (1 / power))
            batch["recognised"] = timesteps.argsort()[:most]
            batch["looks"] = torch.rand(part.batch_size, 4, generator=whole)[part.rows]
        batch = {key: self.on_device(value) for key, value in batch.items()}
        no_text = self.on_device(no_text)
        for key, state in self.empty.items():
            empty = self.on_device(state)
            batch[key] = torch.where(no_text.view(-1, *[1] * (empty.ndim - 1)), empty, batch[key])
        return batch

    def on_device(self, value: Tensor) -> Tensor:
        """On the device of the UNet, without waiting for what a GPU still computes."""
        if self.device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(self.device, non_blocking=True)

    def examples(self, pairs: Pairs, rows: Tensor, references: list[Reference]) -> Batch:
        """The targets `rows` (B,) of `pairs` and their references, on the CPU."""
        batch = pairs.batch(rows)
        if pairs is self.pairs and self.options.keep_references:
            return batch | {STATE + name: state for name, state in self.cached_features(references).items()}
        return batch | {"reference": pairs.reference_latents(references)}

    def cached_features(self, references: list[Reference]) -> dict[str, Tensor]:
        """Layer name -> float16 (B, N_f, C) of these references, on the CPU; all are computed at the first call."""
        if not all(reference in self.feature_cache.rows for reference in references):
            self.cache_all()
        chosen = torch.tensor([self.feature_cache.rows[reference] for reference in references])
        return {name: state[chosen] for name, state in self.feature_cache.states.items()}

    @torch.no_grad()
    def cache_all(self) -> None:
        """Compute the features of all references that are not cached yet."""
        missing = [reference for reference in self.pairs.all_references() if reference not in self.feature_cache.rows]
        known, states = len(self.feature_cache.rows), dict[str, Tensor]()
        for start in range(0, len(missing), AT_ONCE):
            latents = self.pairs.reference_latents(missing[start : start + AT_ONCE])
            for name, state in self.reference_states(latents.to(self.device)).items():
                if name not in states:  # room for all at once: there may be gigabytes
                    states[name] = torch.empty(known + len(missing), *state.shape[1:], dtype=torch.float16)
                    if known:
                        states[name][:known] = self.feature_cache.states[name]
                states[name][known + start :][: len(state)] = state.cpu()
        self.feature_cache.states |= states
        self.feature_cache.rows |= {reference: known + row for row, reference in enumerate(missing)}

    @property
    def reference_timestep(self) -> int:
        """At which noise the UNet sees references; a teacher sees what the student sees."""
        seen_by = self.adapter if self.teacher is None else self.teacher
        return seen_by.metadata.reference_timestep

    @torch.no_grad()
    def reference_states(self, latents: Tensor) -> dict[str, Tensor]:
        """h_f of Eq. 2: layer name -> (B, N_f, C) for reference latents (B, c, r, r).

        With `self_attention` also what its layers of self-attention see, (B, cells, C).
        """
        empty = {
            key: self.on_device(state).expand(len(latents), *state.shape[1:]) for key, state in self.empty.items()
        }
        arguments = self.base.unet_arguments(empty, self.side(latents))
        found: dict[str, Tensor] = {}
        for (timestep, seed), kinds in reference_passes(self.reference_timestep, self.self_attention).items():
            noised = noise_latents(latents, self.base.schedule.alphas, timestep, seed).to(self.base.dtype)
            step = torch.full((), timestep, device=latents.device)
            found |= capture_hidden_states(self.unet, noised, step, kind=kinds, **arguments)
        if self.self_attention is None:
            return found
        own, cross = by_attention(found)
        return cross | self.self_attention.chosen(own)[0]

    def side(self, latents: Tensor) -> int:
        """Pixels a side of the images of these latents."""
        return latents.shape[-1] * self.base.pipeline.vae_scale_factor

    # --- Loss ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        schedule, timesteps, latents = self.base.schedule, batch["timesteps"], batch["latents"]
        noisy = schedule.noised(latents, batch["noise"], timesteps)
        tokens = self.identity_tokens(batch)
        with self.fused(batch, tokens):
            predicted = self.predicted(batch, noisy)
        target = self.target(batch, noisy, tokens)
        faces = face_mask(batch["boxes"], self.side(latents), latents.shape[-1])
        error = weighted_error(predicted, target, faces, self.options.face_loss_weight)
        loss = (self.loss_weights(batch) * error).mean()
        if self.embedder is None or not self.options.identity_loss_weight or not self.training:
            return loss, {}
        likeness = self.identity_loss(batch, noisy, predicted)
        return loss + self.options.identity_loss_weight * likeness, {"identity_loss": likeness}

    def loss_weights(self, batch: Batch) -> Tensor:
        """How much the error of each example counts (B,)."""
        return self.base.schedule.weight(batch["timesteps"], self.options.snr_gamma, self.options.keep_noisy)

    def target(self, batch: Batch, noisy: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """What is to be predicted; a teacher teaches in training alone."""
        if self.teacher is not None and self.training:
            return self.taught(batch, noisy, tokens)
        return self.base.schedule.target(batch["latents"], batch["noise"], batch["timesteps"])

    def predicted(self, batch: Batch, noisy: Tensor) -> Tensor:
        """What the UNet, as it is now, predicts."""
        arguments = self.base.unet_arguments({key: batch[key] for key in self.empty}, self.side(noisy))
        with plain_attention_on_cpu(noisy):
            return self.unet(noisy.to(self.base.dtype), batch["timesteps"], **arguments).sample.float()

    def fused(self, batch: Batch, tokens: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Within it the UNet sees the faces of the batch, each in its place."""
        return self.fused_by(self.adapter, batch, tokens)

    def fused_by(self, adapter: Any, batch: Batch, tokens: dict[str, Tensor]) -> AbstractContextManager[None]:
        """As [`fused`], with the weights of `adapter`."""
        own, cross = by_attention(tokens)
        seen, places = batch["has_face"], self.places(batch)
        further = self.self_attention_keys(own, seen, places) if own else None
        return face_fused_unet(self.unet, adapter, cross, seen, places=places, further=further)

    @torch.no_grad()
    def self_attention_keys(
        self, tokens: dict[str, Tensor], seen: Tensor, places: dict[int, Tensor] | None
    ) -> dict[str, PersonKeys]:
        """What the model's own self-attention makes of the references (B, 1, cells, C), where `seen` (B,) says so."""
        assert self.self_attention is not None
        log_weights = reference_log_weights(torch.ones(1), ~seen)
        projected = self_attention_projections(self.unet, {n: h.to(self.base.dtype) for n, h in tokens.items()})
        return {
            name: PersonKeys(key, value, log_weights, self.self_attention.scale, places=places)
            for name, (key, value) in projected.items()
        }

    @torch.no_grad()
    def taught(self, batch: Batch, noisy: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """What the teacher predicts, who sees what the student sees."""
        with self.fused_by(self.teacher, batch, tokens):
            return self.predicted(batch, noisy)

    def places(self, batch: Batch) -> dict[int, Tensor] | None:
        """Number of queries -> bool (B, queries), which of them see the face; None where everybody is alone."""
        boxes, others, latents = batch["boxes"], batch["others"], batch["latents"]
        if not others.shape[1]:
            return None
        side, sizes = self.side(latents), layer_sizes(*latents.shape[-2:])
        return {height * width: face_places(boxes, others, side, height) for height, width in sizes}

    def identity_tokens(self, batch: Batch) -> dict[str, Tensor]:
        """The reference states of a batch, cached or computed now: layer name -> (B, 1, N_f, C)."""
        states = {key.removeprefix(STATE): state.float() for key, state in batch.items() if key.startswith(STATE)}
        states = states or self.reference_states(batch["reference"])
        return {name: state.unsqueeze(1) for name, state in states.items()}  # one reference each

    def identity_loss(self, batch: Batch, noisy: Tensor, predicted: Tensor) -> Tensor:
        """Mean over the batch of the predicted pictures' [`identity_distance`], 0 for those that are too noisy yet."""
        assert self.embedder is not None
        rows = batch["recognised"]
        if not len(rows):
            return predicted.sum() * 0
        weights = self.identity_weights(batch["timesteps"][rows], batch["has_face"][rows])
        latents = self.base.schedule.one_step(noisy[rows], predicted[rows], batch["timesteps"][rows])
        with torch.no_grad():
            truth = self.base.decode(batch["latents"][rows])
        landmarks5 = jittered(batch["landmarks5"][rows], batch["looks"][rows], self.options.identity_loss_jitter)
        found = identity_distance(self.embedder, self.base.decode(latents), truth, landmarks5)
        return (found * weights).sum() / len(noisy)

    def identity_weights(self, timesteps: Tensor, has_face: Tensor) -> Tensor:
        """How much the identity loss of each counts: 1 where it is taken, else 0."""
        noise = timesteps / len(self.base.schedule)
        taken = (noise >= self.options.identity_loss_from) & (noise < self.options.identity_loss_until)
        return (taken & has_face).float()

    # --- Validation and result -----------------------------------------------------------------------------------

    @torch.compiler.set_stance("force_eager")  # now and then, with batches of other sizes: not worth compiling for
    def sample(self, path: Path) -> dict[str, float]:
        """Loss of held-out people with the right face, somebody else's and none; pictures, if there are to be some.

        Noise and targets are the same in all three. Only where the right face is below the other two is somebody
        recognised.
        """
        if self.samples is not None:
            self.samples.draw(self.base, self.adapter, path)
        if self.held_out is None:
            return {}
        first = [self.held_out.targets.index(members[0]) for members in self.held_out.people]
        rows = torch.tensor(first)
        references = self.held_out.choose(rows, torch.zeros(len(rows)))
        timesteps = spread_timesteps(len(rows), len(self.base.schedule), seeded(0, 0, "validation timesteps"))
        kinds = {"right": references, "wrong": references[1:] + references[:1], "no": references}
        if len(rows) == 1:
            del kinds["wrong"]
        losses = {f"validation_loss_{kind}_face": 0.0 for kind in kinds}
        for kind, chosen in kinds.items():
            for start in range(0, len(rows), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                batch = self.examples(self.held_out, rows[part], chosen[part])
                noise = seeded(0, start, "validation noise")
                batch["noise"] = torch.randn(batch["latents"].shape, generator=noise)
                batch["timesteps"] = timesteps[part]
                batch["has_face"] = torch.full((len(batch["noise"]),), kind != "no")
                loss, _ = self({key: value.to(self.device) for key, value in batch.items()})
                losses[f"validation_loss_{kind}_face"] += float(loss) * len(batch["noise"]) / len(rows)
        return losses

    def export(self, folder: Path) -> None:
        """Write the adapter in float16."""
        save_adapter(copy.deepcopy(self.adapter).half(), folder / ADAPTER_WEIGHTS_NAME)


def by_attention(states: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of self-attention layers, and those of all others."""
    own = {name: state for name, state in states.items() if name.endswith(".attn1")}
    return own, {name: state for name, state in states.items() if name not in own}
