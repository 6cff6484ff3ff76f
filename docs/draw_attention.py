"""Attention to the face, docs/images/attention.png: how much, and to what of the reference.

    python docs/draw_attention.py

Needs matplotlib. To be run again when the embedded model was replaced.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline, embedded_model, prepare_face
from face_fusion_pipeline.avatars.evaluation.evaluators import load_evaluators
from face_fusion_pipeline.avatars.world.sheet import portrait
from face_fusion_pipeline.inspection.attention_maps import AttentionRecord, record_attention


OUT = Path(__file__).parent / "images" / "attention.png"
PERSON = 1_100_008  # who is not in any training data
PROMPT = "a photo of a smiling person in a red shirt in a garden"
STEPS = 20
SHOWN = (0, 4, 12)
BLOCK = "{}.transformer_blocks.0.attn2"
LAYERS = ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.2.attentions.0")
LOOKS_FROM, LOOKS_AT = LAYERS[-1], SHOWN[:2]  # the layer and steps whose looks at the reference are drawn
COLOURS = {"left eye": "#00c8ff", "mouth": "#8cff5a", "background": "#ff6ad5"}
HALF = 4  # pixels: half a side of the boxes that are looked from
SHARE = PowerNorm(0.5, 0, 1)  # shares of a few percent are to be seen, too


def generate() -> tuple[Image.Image, Image.Image, dict[str, Any], AttentionRecord]:
    """Reference, result, the boxes XYXY that are looked from, and the record of the attention."""
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model())
    pipe.load_face_fusion_adapter(embedded_model())
    pipe.face_defaults = None  # one reference, in the attention that the paper is about
    pipe.set_progress_bar_config(disable=True)
    face = prepare_face(portrait(PERSON))

    def call() -> Image.Image:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPT, face_image=face, num_inference_steps=STEPS, generator=generator).images[0]

    picture = call()
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    eye, _, _, *mouth = load_evaluators().locate(pixels)[0].tolist()
    places = {"left eye": eye, "mouth": np.mean(mouth, axis=0), "background": (12, 12)}
    boxes = {name: (x - HALF, y - HALF, x + HALF, y + HALF) for name, (x, y) in places.items()}
    with record_attention(pipe, [BLOCK.format(layer) for layer in LAYERS], SHOWN, boxes) as record:
        assert call().tobytes() == picture.tobytes()  # recording does not change the picture
    return face, picture, boxes, record


def draw_picture(axes: Axes, picture: Image.Image, title: str, heat: Any = None, norm: Normalize | None = None) -> Any:
    """A picture; with `heat`, of any size, it is grey below that. Returns what a colour bar needs."""
    options: dict[str, Any] = {"extent": (0, picture.width, picture.height, 0), "interpolation": "nearest"}
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    if heat is None:
        return axes.imshow(picture, **options)
    axes.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255, **options)
    return axes.imshow(heat, alpha=0.65, cmap="inferno", norm=norm, **options)


def draw() -> Figure:
    face, picture, boxes, record = generate()
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1, 3.2, 2])

    left.suptitle("picture", fontsize=12)
    upper, lower, legend = left.subplots(3, 1)
    draw_picture(upper, face, "reference")
    draw_picture(lower, picture, "result")
    for (name, (x0, y0, x1, y1)), colour in zip(boxes.items(), COLOURS.values(), strict=True):
        lower.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2, label=name))
    legend.set_axis_off()
    legend.legend(*lower.get_legend_handles_labels(), loc="upper center", frameon=False, fontsize=10)

    middle.suptitle("share of the attention that goes to the face", fontsize=12)
    panels = middle.subplots(len(LAYERS), len(SHOWN))
    for row, layer in zip(panels, LAYERS, strict=True):
        for axes, step in zip(row, SHOWN, strict=True):
            mass = record.maps[BLOCK.format(layer), step][0].mass[0]
            heat = draw_picture(axes, picture, f"step {step + 1} of {STEPS}", mass, SHARE)
        name, beside = layer.replace(".attentions", ""), row[0].transAxes
        row[0].text(-0.05, 0.5, name, rotation=90, ha="right", va="center", fontsize=10, transform=beside)
    middle.colorbar(heat, ax=panels, orientation="horizontal", aspect=40, ticks=[0, 0.05, 0.2, 0.5, 1])

    right.suptitle(f"where {LOOKS_FROM.replace('.attentions', '')} looks", fontsize=12)
    for row, (name, colour) in zip(right.subplots(len(COLOURS), len(LOOKS_AT)), COLOURS.items(), strict=True):
        for axes, step in zip(row, LOOKS_AT, strict=True):
            looks = record.maps[BLOCK.format(LOOKS_FROM), step][0].reference[name][0]
            draw_picture(axes, face, f"{name}, step {step + 1}", looks[0])
            axes.add_patch(Rectangle((0, 0), face.width, face.height, fill=False, edgecolor=colour, linewidth=4))
    return figure


if __name__ == "__main__":
    draw().savefig(OUT, dpi=100, pil_kwargs={"optimize": True})
