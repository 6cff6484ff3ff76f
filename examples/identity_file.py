"""Encode a person once, keep the identity as a file, and use it later without the photo.

    python examples/identity_file.py photo.jpg "a watercolor of a smiling person in a forest"

The file ada.safetensors holds the projected keys and values, no photograph, and names of the models it fits.
"""

import sys

import torch

from face_fusion_pipeline import FaceIdentity, StableDiffusionFaceFusionPipeline, embedded_model, prepare_face


def main(photo: str, prompt: str, steps: int = 25) -> None:
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model())
    pipe.load_face_fusion_adapter(embedded_model())
    pipe.encode_face(prepare_face(photo)).save("ada.safetensors")

    # later, perhaps on another machine
    ada = FaceIdentity.load("ada.safetensors")
    generator = torch.Generator().manual_seed(0)
    result = pipe(prompt, face_image=ada, num_inference_steps=steps, generator=generator)
    result.images[0].save("identity_file.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('usage: python examples/identity_file.py PHOTO "PROMPT"')
    main(*sys.argv[1:])
