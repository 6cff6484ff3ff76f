"""Examples that work at first click: avatars drawn when the app starts, always the same ones."""

from dataclasses import dataclass
from pathlib import Path

from ..avatars import render, sample_scene
from ..avatars.world.sheet import portrait, to_pil
from .form import AS_WRITTEN


ADA, BOB = 1_100_000, 1_100_001  # the first people of the test split: no training saw them, and nobody picked them


@dataclass(frozen=True)
class Example:
    """A filled-in form.

    Attributes:
        label: what its button says.
        people: photos of person 1, 2, 3.
    """

    label: str
    people: tuple[tuple[Path, ...], ...]
    prompt: str
    style: str = AS_WRITTEN


def draw_examples(folder: Path) -> list[Example]:
    """Draw the avatars into `folder` and return the examples that use them."""
    folder.mkdir(parents=True, exist_ok=True)
    ada, smile, bob = folder / "ada.png", folder / "ada_smiling.png", folder / "bob.png"
    portrait(ADA).save(ada)
    portrait(BOB).save(bob)
    scene = sample_scene(5, [ADA], expression="smiling", clothing="blue shirt", background="plain blue",
                         style="photo", yaw=-8, pitch=0, roll=0)  # fmt: skip
    to_pil(render([scene], 256).images[0]).save(smile)
    return [
        Example("One photo", ((ada,),), "a photo of a smiling person in a red shirt in a garden"),
        Example("Two photos", ((ada, smile),), "a photo of a person in an astronaut suit in space"),
        Example("Two people", ((ada,), (bob,)), "a photo of two people, a person in a suit and a person in a crown"),
        Example("Watercolor", ((bob,),), "a person in a green shirt in a forest", "watercolor"),
    ]
