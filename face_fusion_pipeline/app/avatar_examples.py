"""Examples that work at first click: avatars drawn when the app starts, always the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..avatars import render, sample_scene
from ..avatars.world.sheet import portrait, to_pil
from .form import AS_WRITTEN


ADA, BOB = 1_100_000, 1_100_001  # the first people of the test split: no training saw them, and nobody picked them


SIDE = 96  # pixels of a photo on a card
SUIT, CROWN = "a person in a suit", "a person in a crown"


@dataclass(frozen=True)
class Example:
    """A filled-in form.

    Attributes:
        label: what its button says.
        people: photos of person 1, 2, 3.
        card: picture of all these photos.
    """

    label: str
    people: tuple[tuple[Path, ...], ...]
    card: Path
    prompt: str
    style: str = AS_WRITTEN


def card(path: Path, photos: Sequence[Path]) -> Path:
    """The photos side by side, as a file."""
    row = Image.new("RGB", (SIDE * len(photos), SIDE))
    for number, photo in enumerate(photos):
        with Image.open(photo) as picture:
            row.paste(picture.convert("RGB").resize((SIDE, SIDE)), (SIDE * number, 0))
    row.save(path)
    return path


def draw_examples(folder: Path) -> list[Example]:
    """Draw the avatars into `folder` and return the examples that use them."""
    folder.mkdir(parents=True, exist_ok=True)
    ada, smile, bob = folder / "ada.png", folder / "ada_smiling.png", folder / "bob.png"
    portrait(ADA).save(ada)
    portrait(BOB).save(bob)
    scene = sample_scene(5, [ADA], expression="smiling", clothing="blue shirt", background="plain blue",
                         style="photo", yaw=-8, pitch=0, roll=0)  # fmt: skip
    to_pil(render([scene], 256).images[0]).save(smile)
    one, two, pair, other = (
        card(folder / f"card_{number}.png", photos)
        for number, photos in enumerate([(ada,), (ada, smile), (ada, bob), (bob,)])
    )
    return [
        Example("One photo", ((ada,),), one, "a photo of a smiling person in a red shirt in a garden"),
        Example("Two photos", ((ada, smile),), two, "a photo of a person in an astronaut suit in space"),
        Example("Two people", ((ada,), (bob,)), pair, f"a photo of two people, {SUIT} and {CROWN}"),
        Example("Watercolor", ((bob,),), other, "a person in a green shirt in a forest", "watercolor"),
    ]
