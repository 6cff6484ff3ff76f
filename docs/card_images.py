"""The pictures of the avatar model's card, and the first one of README and site: a person, and new pictures of them.

    python docs/card_images.py [weights_card/images]

To be run again when the embedded model was replaced.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from face_fusion_pipeline.cli import main
from face_fusion_pipeline.generation.contact_sheet import contact_sheet, save_png


SEED = "1100000"  # the first person whom no training saw, not a picked one
PROMPTS = {
    "smiling, red shirt, garden": "a photo of a smiling person in a red shirt in a garden",
    "suit, library": "a photo of a person in a suit in a library",
    "watercolor, blue shirt, beach": "a watercolor of a person in a blue shirt on a beach",
}
ROOT = Path(__file__).parents[1]


def run(*words: object) -> None:
    if status := main([str(word) for word in words]):
        sys.exit(status)


def draw(out: Path) -> None:
    """Write reference.png, sheet.png and example_1.png, ..., each with its prompt in the file."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run("avatars", "--out", work, "--portrait", SEED)
        (out / "reference.png").write_bytes((work / "reference.png").read_bytes())
        for number, prompt in enumerate(PROMPTS.values()):
            sheet = [] if number == 0 else ["--no-sheet"]
            count = 3 if number == 0 else 1
            made = work / str(number)
            words = ["--face", work / "reference.png", "--prompt", prompt, "--num-images", count, "--out", made]
            run("generate", *words, *sheet)
            (out / f"example_{number + 1}.png").write_bytes((made / "image_000.png").read_bytes())
        (out / "sheet.png").write_bytes((work / "0" / "contact_sheet.png").read_bytes())


def row(images: Path) -> Image.Image:
    """The reference and the examples in `images` side by side."""
    names = {"reference": "reference.png"} | {label: f"example_{n}.png" for n, label in enumerate(PROMPTS, 1)}
    return contact_sheet({label: [Image.open(images / name)] for label, name in names.items()})


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "weights_card" / "images"
    draw(out)
    if len(sys.argv) == 1:
        save_png(row(out), ROOT / "docs" / "images" / "home.png")
