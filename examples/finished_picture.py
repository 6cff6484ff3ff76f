"""A finished picture of any origin, with the face in it drawn again as the person in a photo.

    python examples/finished_picture.py picture.png ada.jpg "a photo of a person in a suit"

Writes finished_picture.png: the photo, the picture, and the picture with its largest face drawn again. The text says
what is to be seen of this person alone. `face-fusion refine` does it with many pictures.
"""

import sys

import torch

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline, contact_sheet, embedded_model, prepare_face
from face_fusion_pipeline.face_pictures import load_image


def main(picture: str, photo: str, prompt: str, steps: int = 25) -> None:
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model())
    pipe.load_face_fusion_adapter(embedded_model())

    before, face = load_image(picture), prepare_face(photo)
    after = pipe.refine_faces(
        before,
        prompt,
        face_image=face,  # without face_boxes the largest face is meant; face_boxes=[(x0, y0, x1, y1)] is another
        max_face=120,  # pixels; by default what is large enough is left alone
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
    )
    contact_sheet({"Ada": [face], "before": [before], "after": after}).save("finished_picture.png")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit('usage: python examples/finished_picture.py PICTURE PHOTO "PROMPT"')
    main(*sys.argv[1:])
