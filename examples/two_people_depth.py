"""Two people take the places and the pose of two others in a layout photo: faces found in it, depth ControlNet.

    python examples/two_people_depth.py ada.jpg bob.jpg layout.jpg "two people on a beach" [depth.png]

Without a depth map (near is white) the depth of the layout photo is estimated, by controlnet-aux or transformers.
Writes two_people_depth.png: the photos of the people, the layout, its depth, the picture, and one with a ControlNet
that is weaker inside the faces.
"""

import sys

import torch
from diffusers import ControlNetModel
from PIL import Image

from face_fusion_pipeline import (
    StableDiffusionFaceFusionPipeline,
    contact_sheet,
    control_depth,
    embedded_model,
    load_image,
    prepare_face,
)


def main(ada: str, bob: str, layout: str, prompt: str, depth: str | None = None, steps: int = 25) -> None:
    controlnet = ControlNetModel.from_pretrained(embedded_model() / "controlnet")
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model(), controlnet=controlnet)
    pipe.load_face_fusion_adapter(embedded_model())

    faces = [prepare_face(ada), prepare_face(bob)]
    people = pipe.encode_people(faces)  # from left to right
    photo = load_image(layout)
    near = load_image(depth) if depth else control_depth(photo, "photo")
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor  # the depth map decides how large the picture becomes
    near = near.resize((side, side))
    pictures: list[Image.Image] = []
    for inside in (1.0, 0.5):
        result = pipe(
            prompt,
            face_image=people,
            face_layout=photo,
            control_image=near,
            control_kind="depth",
            control_face_scale=inside,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
        )
        print(result.face_boxes_source, result.face_boxes[0])
        pictures += result.images
    columns = {"Ada": faces[:1], "Bob": faces[1:], "layout": [photo], "depth": [near]}
    contact_sheet({**columns, "generated": pictures[:1], "half depth in faces": pictures[1:]}).save(
        "two_people_depth.png"
    )


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit('usage: python examples/two_people_depth.py PHOTO PHOTO LAYOUT "PROMPT" [DEPTH]')
    main(*sys.argv[1:])
