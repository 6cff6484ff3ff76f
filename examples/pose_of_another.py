"""A person in the pose and with the expression of somebody else, in the shape of their own face: FaceSnap.

    python examples/pose_of_another.py ada.jpg driver.jpg "a person on a beach"

It draws avatars; for photos and another checkpoint see docs/facesnap.md. Writes pose_of_another.png: the person, the
driver, the points of the person's shape in the driver's pose, the picture, and one whose head is turned by numbers.
"""

import sys

import torch

from face_fusion_pipeline import (
    StableDiffusionFaceFusionPipeline,
    contact_sheet,
    embedded_model,
    landmark_control,
    load_avatar_face_model,
    load_image,
    prepare_face,
)


def main(person: str, driver: str, prompt: str, steps: int = 25) -> None:
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model())
    pipe.load_face_fusion_adapter(embedded_model())  # the identity
    pipe.load_face_snap(embedded_model(), subfolder="face_snap")  # the pose
    pipe.face_model = load_avatar_face_model()

    face, drivers = prepare_face(person), {"picture": load_image(driver)}
    identity = pipe.encode_face(face)  # once, for both pictures
    shape = pipe.face_model.fit(load_image(person))  # of the face, whatever its pose
    turned = pipe.face_model.fit(load_image(driver)).turned(yaw=20)
    drivers["turned by 20 degrees"] = turned
    columns = {
        "person": [face],
        "driver": [load_image(driver)],
        "points": [landmark_control(shape, driver, face_model=pipe.face_model)],
    }
    for name, pose in drivers.items():
        generator = torch.Generator().manual_seed(0)
        result = pipe(
            prompt,
            face_image=identity,
            driver_image=pose,
            control_source=shape,
            num_inference_steps=steps,
            generator=generator,
        )
        columns[name] = result.images
    contact_sheet(columns).save("pose_of_another.png")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
