"""Without installing the package: diffusers loads the pipeline from a folder (or from the Hub) by itself.

    python examples/custom_pipeline.py photo.png "a photo of a sad person in a library" path/to/face_fusion_pipeline

The photo has to be a face crop here: finding faces is part of the package.
"""

import sys

import torch
from diffusers import DiffusionPipeline
from PIL import Image


def main(photo: str, prompt: str, folder: str, steps: int = 25) -> None:
    model = f"{folder}/embedded"  # or any Stable Diffusion 1.x checkpoint
    pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline=folder, trust_remote_code=True)
    pipe.load_face_fusion_adapter(model)
    with Image.open(photo) as face:
        generator = torch.Generator().manual_seed(0)
        result = pipe(prompt, face_image=face, num_inference_steps=steps, generator=generator)
    result.images[0].save("custom_pipeline.png")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit('usage: python examples/custom_pipeline.py FACE "PROMPT" FOLDER')
    main(*sys.argv[1:])
