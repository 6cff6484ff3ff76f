"""ControlNets for the avatar UNet, trained on the renderer's exact depth or facial points; all else stays frozen.

The encoder starts as a copy of the UNet's, without the attention of the middle block, which keeps the file below
15 MB. Depth maps are drawn as photo depth estimators draw them: near is white, and stretched to the picture's range.
Facial points are drawn as `face_landmarks` draws them; they say where a face is, and the UNet alone reads the text.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor
from tqdm.auto import tqdm

from ...face_landmarks import POINTS, landmark_maps
from ...face_pictures import open_picture
from ...training.kernels import plain_attention_on_cpu
from ...training.latent_cache import cached
from ...training.loop import Batch, Task, TrainingError, digest, seeded
from .data import AvatarImages, save_grid, stretched
from .unet import (
    DiffusionLoss,
    Frozen,
    LatentData,
    fit_text,
    load_unet_for,
    with_weights,
)


FOLDERS = {"depth": "controlnet", "landmarks": "controlnet_landmarks"}  # in a model's folder, by what it sees
EMBEDDING_CHANNELS = (16, 16, 32, 64)  # of the four convolutions that bring the depth map to an eighth of its size


def create_controlnet(unet: UNet2DConditionModel, reads_text: bool = True) -> ControlNetModel:
    """A ControlNet whose encoder equals the UNet's and whose output is zero.

    Without `reads_text` it has no attention to text: depth says where, the UNet reads what.
    """
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING_CHANNELS)
    config = {**controlnet.config, "mid_block_type": "UNetMidBlock2D"}
    if not reads_text:
        config["down_block_types"] = ("DownBlock2D",) * len(unet.config.block_out_channels)
    return with_weights(ControlNetModel.from_config(config), controlnet.state_dict())


def load_controlnet_for(
    frozen: Frozen, base: UNet2DConditionModel, folder: Path, captions: list[str], control: str = "depth"
) -> ControlNetModel:
    """The ControlNet of the model `folder`, fitted to the UNet `base` instead of the one in `folder`.

    What its training added to the copy of its own UNet's encoder is added to this UNet's; the text encoder is changed
    as in `load_unet_for`. A ControlNet that lies without a UNet stays as it is.
    """
    path = folder / FOLDERS[control]
    if not path.is_dir():
        raise TrainingError(f"{path} does not exist: leave out --continue-from to train a new one")
    controlnet = ControlNetModel.from_pretrained(path, torch_dtype=torch.float32)
    if (folder / "unet").is_dir():
        fit_text(controlnet, frozen, folder, captions)
        now, before = base.state_dict(), load_unet_for(frozen, folder, captions).state_dict()
        with torch.no_grad():
            for name, weight in controlnet.named_parameters():
                if name in now:
                    weight += now[name] - before[name]
    return controlnet


def load_depth(data: AvatarImages) -> Tensor:
    """Depth maps uint8 (N, 1, S, S), see `data.stretched`, of images rendered with them or written with `--depth`."""
    if data.depth is not None:
        return data.depth
    missing = [record for record in data.records if "depth_file_name" not in record]
    if missing:
        raise TrainingError(f"{data.folder} has no depth maps: write the dataset with `avatars-dataset --depth`")

    def read() -> Tensor:
        maps = []
        for record in tqdm(data.records, desc="depth maps", unit="image"):
            depth = np.asarray(open_picture(data.folder / record["depth_file_name"]))
            maps.append(torch.from_numpy(depth.astype(np.float32)))
        return torch.cat([stretched(part) for part in torch.stack(maps).split(1024)])[:, None]

    return cached(data.folder / "depth.safetensors", f"{data.key} stretched", read)


def load_dots(data: AvatarImages) -> Tensor:
    """Facial points of everybody as dots, uint8 (N, 3, S, S), see `face_landmarks.landmark_maps`."""
    if any("landmarks72" not in record for record in data.records):
        raise TrainingError(f"{data.folder} has no 72 facial points: write the dataset again with `avatars-dataset`")
    side = data.pixels.shape[-1]
    most = max(record["people"] for record in data.records)
    points = torch.full((len(data), most, POINTS, 2), torch.nan)
    for row, record in enumerate(data.records):
        points[row, : record["people"]] = torch.tensor(record["landmarks72"])
    return torch.cat([landmark_maps(part.to(data.pixels.device), (side, side)).cpu() for part in points.split(256)])


LOADED = {"depth": load_depth, "landmarks": load_dots}


class ControlNetTask(Task):
    """Trains the ControlNet with the UNet's own loss; captions are dropped as often as in its training.

    `control` is what it sees, `"depth"` or `"landmarks"`; a depth map in the names below is that picture.
    """

    name = "controlnet"
    control = "depth"
    data: Any  # `LatentData` with its depth maps, or what else has them
    held_out: Any

    def __init__(
        self,
        controlnet: ControlNetModel,
        unet: UNet2DConditionModel,
        frozen: Frozen,
        train: AvatarImages,
        validation: AvatarImages,
        control: str = "depth",
    ) -> None:
        super().__init__()
        self.control = control
        self.controlnet = controlnet.requires_grad_(True)
        self.unet, self.frozen = unet.requires_grad_(False).eval(), frozen
        self.vae, self.text_encoder = frozen.vae, frozen.text_encoder
        self.validation, self.size = validation, len(train)
        self.data, self.held_out = LatentData(frozen, train), LatentData(frozen, validation)
        self.data.depth, self.held_out.depth = LOADED[control](train), LOADED[control](validation)
        self.loss = DiffusionLoss(face_weight=1.0)

    @property
    def subject(self) -> dict[str, Any]:
        seen = {} if self.control == "depth" else {"control": self.control}
        return {"data": self.data.key, **seen, "unet": digest(self.unet.state_dict()), **self.frozen.subject}

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device  # see `UnetTask.device`

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        return self.loss.drawn(self.examples(self.data, indices, indices), generator)

    def examples(self, data: Any, indices: Tensor, depths: Tensor) -> Batch:
        """The images `indices` with the depth maps of the images `depths`."""
        near = data.depth[depths.to(data.depth.device)].to(self.device).float().div(255).expand(-1, 3, -1, -1)
        return {**data.rows(indices, self.device), "depth": near}

    def prompts(self, rows: Tensor) -> dict[str, Any]:
        """What a pipeline is told to draw held-out images."""
        return {"prompt": [self.validation.captions[int(i)] for i in rows]}

    def pictures(self, rows: Tensor) -> Tensor:
        """Held-out images (B, 3, S, S) in [-1, 1]."""
        return self.validation.images(rows)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        noisy, target = self.loss.noised(batch)
        with plain_attention_on_cpu(noisy):
            down, middle = self.controlnet(
                noisy, batch["timesteps"], batch["text"], controlnet_cond=batch["depth"], return_dict=False
            )
            predicted = self.unet(
                noisy,
                batch["timesteps"],
                batch["text"],
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample
        return self.loss.per_image(predicted, target, batch).mean(), {}

    @torch.compiler.set_stance("force_eager")  # other sizes: not worth compiling for
    def sample(self, path: Path) -> dict[str, float]:
        """Rows: depth, generated, true image; and the held-out loss with the right and with another depth map."""
        from diffusers import StableDiffusionControlNetPipeline

        rows = torch.arange(min(len(self.held_out), 8))
        depth = self.examples(self.held_out, rows, rows)["depth"]
        parts = self.frozen.pipeline(self.unet).components
        pipe = StableDiffusionControlNetPipeline(**parts, controlnet=self.controlnet, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            **self.prompts(rows),
            image=depth,
            num_inference_steps=20,
            guidance_scale=4.0,
            generator=seeded(0, 0, "sample"),
            output_type="pt",
        ).images
        save_grid([depth * 2 - 1, images * 2 - 1, self.pictures(rows)], path)
        losses = {}
        rows = torch.arange(min(len(self.held_out), 128))
        for kind, depths in (("right", rows), ("wrong", rows.roll(1))):
            batch = self.examples(self.held_out, rows, depths)
            batch |= self.loss.draw(batch["latents"].shape, seeded(0, 0, "validation", self.device))
            losses[f"validation_loss_{kind}_{self.control}"] = float(self.forward(batch)[0])
        return losses

    def export(self, folder: Path) -> None:
        copy.deepcopy(self.controlnet).half().cpu().save_pretrained(folder / FOLDERS[self.control])
