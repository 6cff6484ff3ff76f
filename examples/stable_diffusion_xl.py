"""Stable Diffusion XL: the same person in 1024 x 1024 pixels, with a second prompt and a second pass for a small face.

    python examples/stable_diffusion_xl.py photo.jpg "a photo of a person in a garden" [MODEL [ADAPTER]]

MODEL is any Stable Diffusion XL checkpoint, a folder or a Hub id; ADAPTER weights that `face-fusion train` made for
it. Without them the mode is training-free. A GPU is all but needed: the checkpoint takes 7 GB in half precision.
"""

import sys

import torch

from face_fusion_pipeline import FaceFusionError, StableDiffusionXLFaceFusionPipeline, prepare_face


MODEL = "stabilityai/stable-diffusion-xl-base-1.0"


def main(photo: str, prompt: str, model: str = MODEL, adapter: str | None = None, steps: int = 30) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = StableDiffusionXLFaceFusionPipeline.from_pretrained(model, dtype=dtype).to(device)
    if adapter is not None:
        pipe.load_face_fusion_adapter(adapter)

    identity = pipe.encode_face(prepare_face(photo))  # face_resolution=512 takes a quarter of the work
    settings = {"face_image": identity, "num_inference_steps": steps, "guidance_scale": 5.0}
    generator = torch.Generator().manual_seed(0)
    image = pipe(prompt, prompt_2="soft light", generator=generator, **settings).images[0]
    image.save("stable_diffusion_xl.png")
    try:
        pipe.refine_faces(image, prompt, generator=generator, **settings)[0].save("stable_diffusion_xl_refined.png")
    except FaceFusionError as error:
        print(f"no second pass: {error}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4, 5):
        sys.exit('usage: python examples/stable_diffusion_xl.py PHOTO "PROMPT" [MODEL [ADAPTER]]')
    main(*sys.argv[1:])
