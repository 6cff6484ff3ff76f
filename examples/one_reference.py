"""One photo, one prompt: the same person somewhere else.

    python examples/one_reference.py photo.jpg "a photo of a smiling person in a red shirt in a garden"

Uses the avatar model that comes with the package; BASE and ADAPTER below may name any Stable Diffusion 1.x checkpoint
and weights trained on it instead.
"""

import sys

import torch

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline, embedded_model, prepare_face


BASE = embedded_model()
ADAPTER = BASE  # folder with face_fusion_adapter.safetensors; None: training-free mode


def main(photo: str, prompt: str, steps: int = 25) -> None:
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    if ADAPTER is not None:
        pipe.load_face_fusion_adapter(ADAPTER)

    face = prepare_face(photo)  # detect and crop; errors say what is wrong with the photo
    identity = pipe.encode_face(face)  # once; identity.save("me.safetensors") keeps it
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        image = pipe(prompt, face_image=identity, num_inference_steps=steps, generator=generator).images[0]
        image.save(f"one_reference_{seed}.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('usage: python examples/one_reference.py PHOTO "PROMPT"')
    main(sys.argv[1], sys.argv[2])
