"""The pictures of the avatar model's card: a reference, what the model makes of it, and a contact sheet.

    python docs/card_images.py [weights_card/images]

To be run again when the embedded model was replaced.
"""

import sys
import tempfile
from pathlib import Path

from face_fusion_pipeline.cli import main


SEED = "1100000"  # the first person whom no training saw, not a picked one
PROMPTS = [
    "a photo of a smiling person in a red shirt in a garden",
    "a photo of a person in a suit in a library",
    "a watercolor of a person in a blue shirt on a beach",
]


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
        for number, prompt in enumerate(PROMPTS):
            sheet = [] if number == 0 else ["--no-sheet"]
            count = 3 if number == 0 else 1
            made = work / str(number)
            words = ["--face", work / "reference.png", "--prompt", prompt, "--num-images", count, "--out", made]
            run("generate", *words, *sheet)
            (out / f"example_{number + 1}.png").write_bytes((made / "image_000.png").read_bytes())
        (out / "sheet.png").write_bytes((work / "0" / "contact_sheet.png").read_bytes())


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "weights_card" / "images")
