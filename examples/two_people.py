"""Two people in one picture, each in their own place.

    python examples/two_people.py
    python examples/two_people.py ada.jpg bob.jpg "a photo of two people, a person in a suit and a person in a crown"

Without arguments it draws portraits of two avatars first. Writes two_people.png: both photos, the picture with people
where the boxes are, and one where the places were found in a draft.
"""

import sys

import torch

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline, contact_sheet, embedded_model, prepare_face
from face_fusion_pipeline.avatars.world.sheet import portrait


LEFT, RIGHT = (16, 36, 48, 80), (80, 36, 112, 80)  # face boxes: x0, y0, x1, y1 in pixels of the 128x128 picture


PROMPT = "a photo of two people, a person in a suit and a person in a crown"


def portraits() -> tuple[str, str]:
    """Two avatars, as ada.png and bob.png."""
    for name, seed in (("ada.png", 1_100_007), ("bob.png", 1_100_004)):
        portrait(seed).save(name)
    return "ada.png", "bob.png"


def main(ada: str, bob: str, prompt: str = PROMPT, steps: int = 25) -> None:
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model())
    pipe.load_face_fusion_adapter(embedded_model())

    faces = [prepare_face(ada), prepare_face(bob)]
    people = pipe.encode_people(faces)  # a list of identities is several people
    pictures = []
    for places in ({"face_boxes": [LEFT, RIGHT]}, {}):
        result = pipe(
            prompt,
            face_image=people,
            face_scale=[1.0, 1.0],  # one for all, or one for each person
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            **places,
        )
        print(result.face_boxes_source, result.face_boxes[0])
        pictures += result.images
    columns = {"Ada": faces[:1], "Bob": faces[1:], "boxes": pictures[:1], "from a draft": pictures[1:]}
    contact_sheet(columns).save("two_people.png")


if __name__ == "__main__":
    if len(sys.argv) not in (1, 4):
        sys.exit('usage: python examples/two_people.py [PHOTO PHOTO "PROMPT"]')
    main(*(sys.argv[1:] or portraits()))
