"""From one person to another in five steps: references of two people, weighted.

    python examples/morph.py ada.jpg bob.jpg "a photo of a person in a blue shirt on a beach"

Writes morph.png: Ada's photo, five pictures from the same noise with Bob's weight going from 0 to 1, Bob's photo.
"""

import sys

import torch

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline, contact_sheet, embedded_model, prepare_face


def main(ada: str, bob: str, prompt: str, steps: int = 25) -> None:
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model())
    pipe.load_face_fusion_adapter(embedded_model())

    faces = [prepare_face(ada), prepare_face(bob)]
    both = pipe.encode_face(faces)  # both photos in one identity, encoded once
    columns = {"Ada": faces[:1]}
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        result = pipe(
            prompt,
            face_image=both,
            face_weights=[1 - fraction, fraction],
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
        )
        columns[f"{fraction:.0%} Bob"] = result.images
    contact_sheet({**columns, "Bob": faces[1:]}).save("morph.png")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit('usage: python examples/morph.py PHOTO PHOTO "PROMPT"')
    main(*sys.argv[1:])
