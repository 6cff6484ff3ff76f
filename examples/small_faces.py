"""Small faces drawn again: two people in a picture, before and after a second pass over their faces.

    python examples/small_faces.py ada.jpg bob.jpg \\
        "a photo of two people, a person in a suit and a person in a crown" "a person in a suit" "a person in a crown"

Writes small_faces.png: both photos, the picture, and the picture with its faces drawn again, each for itself and
larger. The last two arguments say what is to be seen of each person alone.
"""

import sys

import torch

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline, contact_sheet, embedded_model, prepare_face


LEFT, RIGHT = (16, 36, 48, 80), (80, 36, 112, 80)  # face boxes: x0, y0, x1, y1 in pixels of the 128x128 picture


def main(ada: str, bob: str, prompt: str, of_ada: str, of_bob: str, steps: int = 25) -> None:
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model())
    pipe.load_face_fusion_adapter(embedded_model())

    faces = [prepare_face(ada), prepare_face(bob)]
    people = pipe.encode_people(faces)
    common = {"face_image": people, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
    result = pipe(prompt, face_boxes=[LEFT, RIGHT], **common)
    again = pipe.refine_faces(result.images, [of_ada, of_bob], face_boxes=result.face_boxes, **common)
    columns = {"Ada": faces[:1], "Bob": faces[1:], "at once": result.images, "faces drawn again": again}
    contact_sheet(columns).save("small_faces.png")


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit('usage: python examples/small_faces.py PHOTO PHOTO "PROMPT" "PROMPT OF ONE" "PROMPT OF THE OTHER"')
    main(*sys.argv[1:])
