"""The model cards of weights that make context tokens: FaceStudio's and FaceSnap's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..face_snap import SnapMetadata
from ..face_studio import StudioMetadata


@dataclass(frozen=True)
class TokenCard:
    """What the card of a system says that no other one does.

    Attributes:
        trained: what was trained, in a few words.
        options: names of the metadata that are listed beside the base.
        summary: what the weights are, with `{base}` for the base.
        use: code, and what to know of it.
        rows: of the weights' metadata, the rows of a table.
    """

    system: str
    tag: str
    trained: str
    options: tuple[str, ...]
    summary: str
    use: str
    rows: Callable[[dict[str, str]], dict[str, str]]

    def described(self, weights: dict[str, str]) -> str:
        """The options as text."""
        return ", ".join(f"{name.removeprefix('picture_')} {weights[name]}" for name in self.options)

    def text(self, record: dict[str, Any], validation: dict[str, float], table: str) -> str:
        """The whole card.

        Args:
            record: as `model_card.write_card` completes it.
            validation: the last validation losses by kind of face.
            table: of all that is needed to train the weights again, Markdown.
        """
        base, rows = record["base"], self.rows(record["adapter"])
        return CARD.format(
            tag=self.tag,
            title=f"{self.system} weights for {base}",
            summary=self.summary.format(base=base),
            use=self.use,
            rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
            table=table,
            losses=losses_of(validation),
        )


def losses_of(validation: dict[str, float]) -> str:
    """The validation losses as a sentence."""
    found = "; ".join(f"{name.removeprefix('validation_loss_')} {value:.4f}" for name, value in validation.items())
    return f"Loss of people set aside, with the same noise: {found}." if found else "Nobody was set aside."


def known_by(weights: dict[str, str]) -> dict[str, str]:
    """Rows of the two networks that look at pictures."""
    encoder = weights["image_encoder"] or "the model's own"
    return {
        "face embedder": f"{weights['face_embedder']}, {weights['face_width']} numbers",
        "image encoder": f"{encoder}, {weights['image_width']} numbers",
    }


def studio_rows(weights: dict[str, str]) -> dict[str, str]:
    """See [`TokenCard`]."""
    return known_by(weights) | {
        "prior": weights["prior"] or "none: pass one with `prior=`",
        "context": f"{weights['tokens']} tokens, `{weights['context']}` by default; LoRA of rank {weights['rank']}",
    }


def snap_rows(weights: dict[str, str]) -> dict[str, str]:
    """See [`TokenCard`]."""
    seen = "read by the ControlNet alone" if weights["context"] == "none" else "also appended to the UNet's text"
    return known_by(weights) | {
        "mixer": f"{weights['depth']} layers, {weights['tokens']} tokens, {seen}",
        "reference": f"an oval of {weights['oval']} of the crop is seen",
    }


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- {tag}
- stable-diffusion
- text-to-image
---

# {title}

{summary}

## Use

{use}

| | |
| --- | --- |
{rows}

## Limits

Likeness is not identification: nothing here can prove who somebody is. **Not for** pictures of people who did not
agree, deceiving, harassing, sexual or degrading pictures. The licences of the base and of all networks named above
apply, and the rights in the training photos.

## Training

{table}

{losses}

## Evaluation

<!-- evaluation -->

Nothing measured yet: `face-fusion push --table FILE` puts the tables of an evaluation here.

<!-- /evaluation -->
"""

STUDIO_CARD = TokenCard(
    system="FaceStudio",
    tag="face-studio",
    trained="FaceStudio's Linear and LoRA",
    options=("tokens", "picture_mask"),
    summary="""New pictures of a person as a prompt, a style picture, or something between the two describes
them. These are a Linear and a LoRA for `{base}`, after *FaceStudio: Put Your Face Everywhere in Seconds* (arXiv
2312.02663), whose authors published no code and no weights.""",
    use="""```python
pipe.load_face_studio("OWNER/NAME")
image = pipe("a portrait at the beach", face_image=face, style_image=picture, style_scale=0.5).images[0]
```

`style_scale` goes from 0, the prompt alone, to 1, the style picture alone. Faces in the style picture are covered.""",
    rows=studio_rows,
)

SNAP_CARD = TokenCard(
    system="FaceSnap",
    tag="face-snap",
    trained="FaceSnap's mixer and its ControlNet",
    options=("tokens", "depth", "oval"),
    summary="""New pictures of a person in the pose and with the expression of somebody else, in the shape of
their own face. These are a mixer and a ControlNet for `{base}`, after *FaceSnap: Enhanced ID-fidelity Network for
Tuning-free Portrait Customization* (arXiv 2602.00627), whose authors published no code and no weights.""",
    use="""```python
pipe.load_face_snap("OWNER/NAME")
image = pipe("a portrait at the beach", face_image=face, driver_image=driver, face_model=face_model).images[0]
```

Strength, start and end are those of every ControlNet, such as `controlnet_conditioning_scale=0.8`. With Face Fusion
loaded, it carries the identity, unless `identity_by="face-snap"`.""",
    rows=snap_rows,
)

CARDS = {StudioMetadata.FORMAT: STUDIO_CARD, SnapMetadata.FORMAT: SNAP_CARD}
