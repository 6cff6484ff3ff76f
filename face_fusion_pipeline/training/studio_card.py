"""The model card of FaceStudio weights."""

from __future__ import annotations

from typing import Any


def studio_card(record: dict[str, Any], validation: dict[str, float], table: str) -> str:
    """The text of the card.

    Args:
        record: as `model_card.write_card` completes it.
        validation: the last validation losses by kind of face.
        table: of all that is needed to train the weights again, Markdown.
    """
    weights, base = record["adapter"], record["base"]
    losses = "; ".join(f"{name.removeprefix('validation_loss_')} {value:.4f}" for name, value in validation.items())
    losses = f"Loss of people set aside, with the same noise: {losses}." if losses else "Nobody was set aside."
    prior = weights["prior"] or "none: pass one with `prior=`"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- face-studio
- stable-diffusion
- text-to-image
---

# FaceStudio weights for {base}

New pictures of a person as a prompt, a style picture, or something between the two describes them. These are a Linear
and a LoRA for `{base}`, after *FaceStudio: Put Your Face Everywhere in Seconds* (arXiv 2312.02663), whose authors
published no code and no weights.

## Use

```python
pipe.load_face_studio("OWNER/NAME")
image = pipe("a portrait at the beach", face_image=face, style_image=picture, style_scale=0.5).images[0]
```

`style_scale` goes from 0, the prompt alone, to 1, the style picture alone. Faces in the style picture are covered.

| | |
| --- | --- |
| face embedder | {weights["face_embedder"]}, {weights["face_width"]} numbers |
| image encoder | {weights["image_encoder"] or "the model's own"}, {weights["image_width"]} numbers |
| prior | {prior} |
| context | {weights["tokens"]} tokens, `{weights["context"]}` by default; LoRA of rank {weights["rank"]} |

## Limits

Likeness is no identification: nothing here can prove who somebody is. **Not for** pictures of people who did not
agree, deceiving, harassing, sexual or degrading pictures. The licences of the base, the image encoder, the face
embedder and the prior apply, and the rights in the training photos.

## Training

{table}

{losses}

## Evaluation

<!-- evaluation -->

Nothing measured yet: `face-fusion push --table FILE` puts the tables of an evaluation here.

<!-- /evaluation -->
"""
