"""A person in the pose and with the expression of somebody else, in their own shape: a ControlNet of facial points.

    python examples/pose_of_another.py ada.jpg driver.jpg "a person on a beach" CONTROLNET FACE_MODEL [LANDMARKER]

FACE_MODEL is what `face-fusion avatars-train landmarks` wrote, for avatars, or with a LANDMARKER of MediaPipe what
`face-fusion face-model` wrote, for photos; see docs/facesnap.md. Writes pose_of_another.png: the person, the driver,
the points of the person's shape in the driver's pose, the picture, and one whose head is turned by numbers.
"""

import sys

import torch
from diffusers import ControlNetModel

from face_fusion_pipeline import (
    StableDiffusionFaceFusionPipeline,
    contact_sheet,
    embedded_model,
    landmark_control,
    load_face_model,
    load_image,
    prepare_face,
)
from face_fusion_pipeline.avatars.face_model import load_avatar_face_model


def main(
    person: str,
    driver: str,
    prompt: str,
    controlnet: str,
    face_model: str,
    landmarker: str | None = None,
    steps: int = 25,
) -> None:
    net = ControlNetModel.from_pretrained(controlnet)
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model(), controlnet=net)
    pipe.load_face_fusion_adapter(embedded_model())
    if landmarker is None:
        pipe.face_model = load_avatar_face_model(face_model)
    else:
        pipe.face_model = load_face_model(face_model, landmarker)

    face, size = prepare_face(person), pipe.unet.config.sample_size * pipe.vae_scale_factor
    options = {"face_image": pipe.encode_face(face), "num_inference_steps": steps, "height": size, "width": size}
    points = landmark_control(face, driver, face_model=pipe.face_model, size=(size, size))
    turned = landmark_control(
        face, driver, face_model=pipe.face_model, size=(size, size), yaw=20, expression="neutral"
    )
    pictures = [
        pipe(
            prompt, control_image=dots, control_kind="map", generator=torch.Generator().manual_seed(0), **options
        ).images[0]
        for dots in (points, turned)
    ]
    columns = {
        "person": [face],
        "driver": [load_image(driver)],
        "points": [points],
        "picture": pictures[:1],
        "turned by 20 degrees": pictures[1:],
    }
    contact_sheet(columns).save("pose_of_another.png")


if __name__ == "__main__":
    if len(sys.argv) not in (6, 7):
        sys.exit(__doc__)
    main(*sys.argv[1:])
