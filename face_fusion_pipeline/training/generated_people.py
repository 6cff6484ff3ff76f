"""Words for people and scenes that a checkpoint draws itself: a grammar, a file of the user's, or a small vocabulary.

Who a person is and what a picture shows are drawn from separate seeds, so that the same words of a person go with many
scenes. People are adults: what is trained on them is not about children.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..files.texts import read_text
from .photos import DataError


SCENE = "scene:"  # how a line with a scene begins in a file of prompts
WHO = "{}"  # where the person goes in a scene


@dataclass(frozen=True)
class PersonWords:
    """What a person is called: `full` with all that is to be seen of them, `short` with nothing of it."""

    full: str
    short: str


@dataclass(frozen=True)
class SceneWords:
    """A sentence with `{}` for the person; `as_reference` is false where a drawing cannot stand for a photo."""

    text: str
    as_reference: bool = True

    def of(self, person: str) -> str:
        return self.text.replace(WHO, person)


class Grammar(Protocol):
    """Words for people by number, and for their pictures: number 0 shows the face well, the others vary.

    `source` says where the words come from and changes with them; `negative` is a negative prompt.
    """

    source: str
    negative: str

    def person(self, rng: random.Random, number: int) -> PersonWords: ...

    def scene(self, rng: random.Random, picture: int) -> SceneWords: ...


# --- Natural words -----------------------------------------------------------------------------------------------

NOUNS = {"woman": "a woman", "man": "a man"}
AGES = ("twenty", "twenty-five", "thirty", "thirty-five", "forty", "forty-five", "fifty", "sixty", "seventy", "eighty")
COMPLEXIONS = (
    *("East Asian", "South Asian", "Southeast Asian", "West African", "East African", "Middle Eastern"),
    *("Latin American", "Northern European", "Mediterranean", "Eastern European", "Polynesian", "Native American"),
)
FACES = (
    *("a round face", "a narrow face", "a square jaw", "high cheekbones", "a pointed chin", "full cheeks"),
    *("a broad nose", "a long nose", "thick eyebrows", "thin lips", "full lips", "deep-set eyes", "a mole"),
    *("freckles", "wide-set eyes", "a pointed nose", "laughter lines", ""),
)
HAIR_COLOURS = ("black", "dark brown", "brown", "auburn", "red", "blond", "light blond")
GREY = ("grey", "white", "silver")
HAIR = {
    "woman": ("long straight {} hair", "long curly {} hair", "shoulder-length {} hair", "a short {} bob",
              "{} hair in a bun", "{} hair in a ponytail", "{} braids", "a {} pixie cut"),
    "man": ("short {} hair", "a {} buzz cut", "curly {} hair", "{} hair parted at the side", "long {} hair",
            "slicked back {} hair", "a receding {} hairline", "a shaved head"),
}  # fmt: skip
BEARDS = ("", "", "", "", "stubble", "a short {} beard", "a full {} beard", "a {} moustache", "a {} goatee")
GLASSES = ("", "", "", "", "", "thin metal glasses", "black-rimmed glasses", "round glasses")
EXPRESSIONS = (
    *("smiling", "laughing", "with a neutral expression", "with a serious expression", "looking surprised"),
    *("looking sad", "looking thoughtful", "looking angry", "with a slight smile", "talking", "with closed lips"),
)
LOOKS = ("looking at the camera", "looking to the side", "turned slightly to the left", "turned slightly to the right",
         "seen from slightly above", "seen from slightly below", "with a tilted head")  # fmt: skip
CLOTHES = (
    *("a white shirt", "a red sweater", "a black turtleneck", "a denim jacket", "a grey suit", "a green raincoat"),
    *(
        "a striped shirt",
        "a leather jacket",
        "a yellow dress shirt",
        "a blue hoodie",
        "a woollen scarf",
        "a tweed coat",
    ),
    *("a chef's jacket", "a doctor's coat", "a hiking jacket", "an evening outfit", "an apron", "a knitted cardigan"),
)
PLACES = (
    *("in a garden", "on a beach", "in a busy street", "in a forest", "in a library", "in an office", "in a kitchen"),
    *("in a cafe", "on a mountain", "in a park", "at a market", "in a museum", "on a train", "in a workshop"),
    *("by a lake", "in the snow", "on a rooftop", "in a concert hall", "in a plain studio", "against a brick wall"),
)
LIGHTS = (
    *("soft window light", "bright sunlight", "golden hour light", "overcast daylight", "studio lighting"),
    *("warm lamp light", "backlight", "evening light", "side light", "neon light"),
)
LENSES = ("85mm lens", "50mm lens", "35mm lens", "shallow depth of field", "film grain", "sharp focus", "")
STYLES = (
    *("a photo of {}", "a portrait photo of {}", "a candid photo of {}", "a close-up photo of {}"),
    *("a professional photo of {}", "a magazine photo of {}", "a film still of {}", "an analog photo of {}"),
)
FIRST = "a portrait photo of {}, face and shoulders, looking at the camera, plain background, sharp focus"


@dataclass(frozen=True)
class NaturalGrammar:
    """For checkpoints that know common words. `lines` and `scenes` of the user take the place of the grammar's own."""

    lines: Sequence[str] = ()
    scenes: Sequence[str] = ()
    source: str = "the package's grammar"
    negative: str = "nude, nsfw, several people, collage, frame, text, deformed, blurry, cropped head, hat, sunglasses"

    def person(self, rng: random.Random, number: int) -> PersonWords:
        if self.lines:
            words = self.lines[number % len(self.lines)]
            return PersonWords(words, next((NOUNS[n] for n in NOUNS if n in words.split()), "a person"))
        noun = rng.choice(tuple(NOUNS))
        age = rng.randrange(len(AGES))
        colour = rng.choice(GREY if age > 6 and rng.random() < 0.7 else HAIR_COLOURS)
        traits = [rng.choice(HAIR[noun]), *rng.sample(FACES, 2), rng.choice(GLASSES)]
        traits.insert(1, rng.choice(BEARDS) if noun == "man" else "")
        seen = [trait.replace("a {}", f"{with_article(colour)}").replace("{}", colour) for trait in traits if trait]
        listed = f"{', '.join(seen[:-1])} and {seen[-1]}" if len(seen) > 1 else seen[0]
        words = f"{rng.choice(COMPLEXIONS)} {noun}, about {AGES[age]} years old, with {listed}"
        return PersonWords(with_article(words), NOUNS[noun])

    def scene(self, rng: random.Random, picture: int) -> SceneWords:
        if not picture:
            return SceneWords(f"{FIRST}, {rng.choice(LIGHTS)}")
        if self.scenes:
            return SceneWords(rng.choice(tuple(self.scenes)))
        parts = [rng.choice(EXPRESSIONS), rng.choice(LOOKS), f"wearing {rng.choice(CLOTHES)}", rng.choice(PLACES)]
        parts += [part for part in (rng.choice(LIGHTS), rng.choice(LENSES)) if part]
        return SceneWords(f"{rng.choice(STYLES)}, {', '.join(parts)}")


def with_article(words: str) -> str:
    return ("an " if words[0] in "AEIOaeio" else "a ") + words


def read_prompts(path: Path) -> NaturalGrammar:
    """A grammar of the user's own: a person a line, and after `scene:` a scene with `{}` for the person.

    Empty lines and those that begin with # are left out. Without scenes those of the package are taken.

    Raises:
        DataError: no person in it, or a scene without `{}`.
    """
    lines = [line.strip() for line in read_text(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    scenes = [line[len(SCENE) :].strip() for line in lines if line.lower().startswith(SCENE)]
    people = [line for line in lines if not line.lower().startswith(SCENE)]
    if bad := next((scene for scene in scenes if WHO not in scene), None):
        raise DataError(f"{path}: the scene {bad!r} has no {WHO} for the person: 'scene: a photo of {WHO} on a beach'")
    if not people:
        raise DataError(f"{path} describes nobody: write a person a line, such as 'a freckled woman with red braids'")
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    return NaturalGrammar(people, scenes, source=f"{path.name} {digest}")


# --- A small vocabulary ------------------------------------------------------------------------------------------

KNOWN_NOUNS = ("man", "woman", "child")  # of avatars, which are no people
PHOTO = "photo"
DRAWINGS = 0.2  # fraction of pictures from the third on in another style than photos, where there is any
HEADGEAR = ("hat", "crown", "cap", "helmet", "hood", "astronaut")  # not in first pictures, which show who it is
IN_PLACE = {"beach": "on a beach", "space": "in space"}  # else "in a ..."


@dataclass(frozen=True)
class VocabularyGrammar:
    """For a model that knows few words, by the groups of its `FaceDefaults.vocabulary`; its noise decides the rest."""

    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    source: str = "the model's vocabulary"
    negative: str = ""

    def person(self, rng: random.Random, number: int) -> PersonWords:
        known = {word for phrases in self.groups.values() for phrase in phrases for word in phrase.split()}
        nouns = [noun for noun in KNOWN_NOUNS if noun in known] or ["person"]
        return PersonWords(f"a {rng.choice(nouns)}", "a person" if "person" in known else f"a {nouns[0]}")

    def scene(self, rng: random.Random, picture: int) -> SceneWords:
        styles = [style for style in self.groups.get("styles", ()) if style != PHOTO]
        drawing = rng.choice(styles) if picture > 1 and styles and rng.random() < DRAWINGS else ""
        expressions = self.groups.get("expressions", ())
        parts = [
            self._clothes(rng, bare=not picture),
            as_expression(rng.choice(tuple(expressions))) if expressions else "",
            self._place(rng),
        ]
        words = " ".join([WHO, *filter(None, parts[:1])])
        words = ", ".join([words, *filter(None, parts[1:])])
        return SceneWords(f"{words}, {drawing}" if drawing else f"a photo of {words}", not drawing)

    def _clothes(self, rng: random.Random, bare: bool) -> str:
        known = self.groups.get("clothes", ())
        clothes = [one for one in known if not (bare and set(one.split()) & set(HEADGEAR))]
        return f"wearing {with_article(rng.choice(clothes))}" if clothes else ""

    def _place(self, rng: random.Random) -> str:
        places = [IN_PLACE.get(place, f"in {with_article(place)}") for place in self.groups.get("places", ())]
        plain = [f"on {with_article(ground)} background" for ground in self.groups.get("plain backgrounds", ())]
        kinds = [kind for kind in (places, plain) if kind]
        return rng.choice(rng.choice(kinds)) if kinds else ""


def as_expression(word: str) -> str:
    """ "smiling", but "with a sad face"."""
    return word if word.endswith("ing") else f"with {with_article(word)} face"
