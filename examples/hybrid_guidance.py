"""Text, a style picture and a person: FaceStudio's slider between the prompt and the picture.

    python examples/hybrid_guidance.py ada.jpg style.png "a person in a red shirt, smiling, at the beach"

Writes hybrid_guidance.png: the photo, the prompt alone, three steps towards the style picture, and the picture; then
the same style with the identity by Face Fusion.
"""

import sys

import torch

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline, contact_sheet, embedded_model, prepare_face


def main(photo: str, style: str, prompt: str, steps: int = 25) -> None:
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model())
    pipe.load_face_studio(embedded_model(), subfolder="face_studio")

    face = prepare_face(photo)
    ada = pipe.encode_face(face)  # by FaceStudio: no Face Fusion weights are loaded yet
    columns = {"photo": [face]}
    for style_scale in (0, 0.25, 0.5, 0.75, 1):
        columns[f"style_scale {style_scale:g}"] = pipe(
            prompt,
            face_image=ada,
            style_image=style,  # faces in it are covered
            style_scale=style_scale,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
        ).images

    pipe.load_face_fusion_adapter(embedded_model())
    columns["identity by Face Fusion"] = pipe(
        prompt,
        face_image=face,  # by Face Fusion, where both are loaded; identity_by="face-studio" would say otherwise
        style_image=style,
        style_scale=0.5,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
    ).images
    contact_sheet(columns).save("hybrid_guidance.png")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit('usage: python examples/hybrid_guidance.py PHOTO STYLE_PICTURE "PROMPT"')
    main(*sys.argv[1:])
