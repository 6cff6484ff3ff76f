"""Several photos of one person tell more than one: give them together, the sharper ones with more weight.

    python examples/several_references.py "a photo of a laughing person in a crown" photo_1.jpg photo_2.jpg

Writes several_references.png: the photos' faces, then the picture made with the first alone and with all of them.
"""

import sys

import torch

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline, contact_sheet, embedded_model, prepare_face


def main(prompt: str, photos: list[str], steps: int = 25) -> None:
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model())
    pipe.load_face_fusion_adapter(embedded_model())

    faces = [prepare_face(photo) for photo in photos]
    pictures = []
    for references in (faces[:1], faces):
        result = pipe(
            prompt,
            face_image=references,  # a list of images is one person
            face_weights=[1.0] * len(references),  # equal; only the ratios matter
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
        )
        pictures += result.images
    columns = {"photos": faces, "first photo": pictures[:1], "all photos": pictures[1:]}
    contact_sheet(columns).save("several_references.png")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit('usage: python examples/several_references.py "PROMPT" PHOTO PHOTO...')
    main(sys.argv[1], sys.argv[2:])
