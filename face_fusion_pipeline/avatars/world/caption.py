"""Captions of two lengths, in varied words: plain ones never name a trait of identity beyond "man", "woman" or
"child"; full ones name what is to be seen of each person."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ...generation.prompt_words import words_of
from .identity import (
    CATEGORICAL,
    EYE_COLOURS,
    GENES,
    HAIR_COLOURS,
    RIM_COLOURS,
    SKIN_TONES,
)
from .scene import CLOTHINGS, EXPRESSIONS, PLACES, PLAIN_COLOURS, STYLES, Light, Person, Scene


_STYLE_WORDS = {
    "photo": ("a photo of {}", "a portrait photo of {}", "{}", "a picture of {}"),
    "pencil sketch": ("a pencil sketch of {}", "{}, pencil sketch", "a pencil drawing of {}"),
    "watercolor": ("a watercolor of {}", "{}, watercolor", "a watercolor painting of {}"),
    "faded film": ("a faded film photo of {}", "{}, faded film", "an old faded film photo of {}"),
    "line art": ("line art of {}", "{}, line art", "a line art drawing of {}"),
}
_PLACE_WORDS = {
    "garden": ("in a garden", "in the garden"),
    "beach": ("on a beach", "at the beach"),
    "city": ("in a city", "in the city"),
    "forest": ("in a forest", "in the forest"),
    "space": ("in space", "in outer space"),
    "library": ("in a library", "in the library"),
}
EXPRESSION_WORDS = {
    "neutral": ("with a neutral expression", "with a neutral face"),
    "smiling": ("smiling", "with a smile"),
    "laughing": ("laughing", "laughing out loud"),
    "sad": ("looking sad", "with a sad face"),
    "crying": ("crying", "in tears, crying"),
    "angry": ("looking angry", "with an angry face"),
    "surprised": ("looking surprised", "with a surprised face"),
}
_NUMBERS = {2: "two", 3: "three"}
_PLURALS = {"man": "men", "woman": "women", "child": "children"}
_WEARING = ("wearing", "in")
_BEFORE_PLAIN = ("on", "against")


def _clothing(rng: random.Random, clothing: str) -> str:
    article = "an" if clothing[0] in "aeiou" else "a"
    return f"{rng.choice(_WEARING)} {article} {clothing}"


def _place(rng: random.Random, background: str) -> str:
    if background in PLACES:
        return rng.choice(_PLACE_WORDS[background])
    return f"{rng.choice(_BEFORE_PLAIN)} a {background} background"


def _people(rng: random.Random, scene: Scene, plain: bool) -> str:
    nouns = [p.identity.kind if not plain and rng.random() < 0.6 else "person" for p in scene.people]
    if len(nouns) == 1:
        return f"a {nouns[0]} {_clothing(rng, scene.people[0].clothing)}"
    clothes = [f"a {noun} {_clothing(rng, p.clothing)}" for noun, p in zip(nouns, scene.people, strict=True)]
    number = _NUMBERS[len(nouns)]
    group = _PLURALS.get(nouns[0], "people") if len(set(nouns)) == 1 else "people"
    return f"{number} {group}, " + ", ".join(clothes[:-1]) + f" and {clothes[-1]}"


def caption(scene: Scene, plain: bool = False) -> str:
    """One English sentence for a scene, deterministic from its seed.

    `plain` keeps to the word "person" for everybody, so that a prompt gives no hint about who is meant.
    """
    rng = random.Random(f"caption {scene.seed}")
    place = _place(rng, scene.background)
    parts = [rng.choice(EXPRESSION_WORDS[scene.people[0].expression]), place]
    if rng.random() < 0.3:
        parts.reverse()
    text = _people(rng, scene, plain) + ", " + ", ".join(parts)
    return rng.choice(_STYLE_WORDS[scene.style]).format(text)


def vocabulary() -> dict[str, tuple[str, ...]]:
    """What `caption` can say, by group: what to show, and last the other words, alone and in alphabetical order."""
    groups = {
        "expressions": EXPRESSIONS,
        "clothes": CLOTHINGS,
        "places": PLACES,
        "plain backgrounds": tuple(f"plain {colour}" for colour in PLAIN_COLOURS),
        "styles": STYLES,
    }
    templates = [*_STYLE_WORDS.values(), *_PLACE_WORDS.values(), *EXPRESSION_WORDS.values(), _WEARING, _BEFORE_PLAIN]
    texts = [text.replace("{}", "") for template in templates for text in template]
    texts += [*_NUMBERS.values(), *_PLURALS, *_PLURALS.values(), "a an person people background and"]
    shown = words_of(" ".join(phrase for phrases in groups.values() for phrase in phrases))
    return groups | {"other words": tuple(sorted(set(words_of(" ".join(texts))) - set(shown)))}


# Words of the full captions. `{}` is a colour with a space behind it, or nothing where a drawing shows no colours.
_HAIR_WORDS = {
    "bald": ("a bald head", "no hair"),
    "buzz": ("{}buzzed hair", "very short {}hair"),
    "short": ("short {}hair",),
    "side part": ("{}hair parted at the side", "parted {}hair"),
    "long": ("long {}hair",),
    "bob": ("{}hair in a bob", "a {}bob"),
    "bun": ("{}hair in a bun", "a {}bun"),
    "afro": ("a {}afro", "{}afro hair"),
    "mohawk": ("a {}mohawk", "{}hair in a mohawk"),
    "ponytail": ("a {}ponytail", "{}hair in a ponytail"),
    "curly": ("curly {}hair",),
    "spiky": ("spiky {}hair",),
}
_BEARD_WORDS = {
    "stubble": ("stubble",),
    "moustache": ("a moustache",),
    "goatee": ("a goatee",),
    "full": ("a full beard", "a beard"),
}
_CHILD_AGES = ("young ", "little ", "")
_ADULT_AGES = (
    # Highest gene, words before the noun, words after it. Up to 0.45 the age leaves no line on a face.
    (0.45, ("young ", "young ", ""), ("", "of about thirty")),
    (0.60, ("",), ("of about forty", "of forty", "")),
    (0.75, ("", "middle aged "), ("of about fifty", "of fifty")),
    (0.90, ("", "old "), ("of about sixty", "of sixty")),
    (1.01, ("", "old ", "elderly "), ("of about seventy", "of seventy")),
)
_CUES = {  # Tokens (words and commas) that all traits together may take, by the number of people.
    1: 50,
    2: 22,
    3: 13,
}
_LONGEST = 73  # words, commas and apostrophes of a whole caption: with start and end it fits a context of 77 tokens
_NO_COLOURS = ("pencil sketch", "line art")
_BELOW_HATS = ("long", "bob", "ponytail", "curly")  # styles that are told by what hangs beside the face
_COVERED = ("astronaut suit", "chef's hat", "crown")
_AT = {name: index for index, name in enumerate(GENES)}


def _nearest(colours: dict[str, tuple[float, float, float]], r: float, g: float, b: float) -> str:
    return min(colours, key=lambda n: (colours[n][0] - r) ** 2 + (colours[n][1] - g) ** 2 + (colours[n][2] - b) ** 2)


def _extreme(value: float, low: str, high: str) -> str:
    """The word for a gene that is far from the middle; nothing for the three fifths in between."""
    return low if value < 0.2 else high if value > 0.8 else ""


def _phrase(*words: str) -> str:
    return " ".join(word for word in words if word)


def _with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _length(text: str) -> int:
    return text.count(" ") + 1 + text.count(",") + text.count("'")


class _Look:
    """What a person looks like, read from the identity vector; `colours` says whether the style shows colours."""

    def __init__(self, person: Person, colours: bool) -> None:
        self.person = person
        self.gene = person.identity.vector.tolist()
        self.kind, self.hair, self.beard, self.glasses = (
            values[self.gene.index(1.0, _AT[f"{name}={values[0]}"]) - _AT[f"{name}={values[0]}"]]
            for name, values in CATEGORICAL.items()
        )
        self.colours = colours

    def __getitem__(self, name: str) -> float:
        return self.gene[_AT[name]]

    def colour(self, prefix: str, names: dict[str, tuple[float, float, float]]) -> str:
        """The name of a colour, with a space behind it; nothing where it is not to be seen."""
        if not self.colours:
            return ""
        start = _AT[f"{prefix}_r"]
        return _nearest(names, *self.gene[start : start + 3]) + " "

    def hair_phrase(self, rng: random.Random) -> str:
        """Hair as far as it shows: a hat hides its top, and with it most styles; a hood hides more."""
        clothing, colour = self.person.clothing, self.colour("hair", HAIR_COLOURS)
        words = _HAIR_WORDS[self.hair]
        buzz = self.hair == "buzz" and clothing != "astronaut suit"
        if clothing in _COVERED and self.hair not in _BELOW_HATS and not buzz:
            if self.hair in ("bald", "buzz", "mohawk") or not colour:
                return ""
            words = ("{}hair",)
        text = rng.choice(words).format(colour)
        return text.replace("a auburn", "an auburn").replace("a afro", "an afro")

    def necessary(self, rng: random.Random) -> list[str]:
        """What is seen first: hair, glasses, beard."""
        found = [self.hair_phrase(rng)]
        rim = self.colour("rim", RIM_COLOURS)
        if self.glasses != "none":
            found.append(rng.choice((f"{self.glasses} {rim}glasses", f"{rim}{self.glasses} glasses")))
        if self.beard != "none":
            found.append(rng.choice(_BEARD_WORDS[self.beard]))
        return [phrase for phrase in found if phrase]

    def optional(self, rng: random.Random) -> list[str]:
        """Everything else, average measures left out."""
        g, person = self.__getitem__, self.person
        still = person.expression not in ("laughing", "crying", "surprised")
        found: list[str] = []
        if self.colours:
            tone = list(SKIN_TONES)[round(g("skin_light") * (len(SKIN_TONES) - 1))]
            found.append(f"{tone} skin")
        eye = "" if self.glasses == "tinted" else self.colour("eye", EYE_COLOURS).strip()
        room = g("eye_spacing") > 0.15 or g("eye_size") < 0.5  # the nose keeps eyes that are close together small
        size = _extreme(g("eye_size"), "small", "large") if still and room else ""
        spacing = _extreme(g("eye_spacing"), "close together", "far apart")
        if eye or size:
            found.append(_phrase(size, eye, "eyes"))
        if spacing and rng.random() < 0.5:
            found.append(f"eyes {spacing}")
        if brow := _extreme(g("brow_thick"), "thin", "thick"):
            found.append(f"{brow} brows")
        nose = _phrase(_extreme(g("nose_length"), "short", "long"), _extreme(g("nose_width"), "narrow", "wide"))
        if nose or (nose := _extreme(g("nose_tip"), "", "big")):
            found.append(f"a {nose} nose")
        if still and (mouth := _extreme(g("mouth_width"), "small", "wide")):
            found.append(f"a {mouth} mouth")
        red = "red" if self.colours and g("lip_red") > 0.85 else ""
        if lips := _phrase(_extreme(g("lip_thick"), "thin", "full"), red):
            found.append(f"{lips} lips")
        if face := _extreme(g("head_width"), "narrow", "wide"):
            found.append(f"a {face} face")
        if self.beard != "full":
            if jaw := _extreme(g("jaw_width"), "narrow", "square"):
                found.append(f"a {jaw} jaw")
            if chin := _extreme(g("chin_length"), "short", "long"):
                found.append(f"a {chin} chin")
        if cheeks := _extreme(g("cheek"), "", "round"):
            found.append(f"{cheeks} cheeks")
        bare = self.hair not in ("long", "bob", "afro", "curly") and person.clothing != "astronaut suit"
        if bare and (ears := _extreme(g("ear_size"), "small", "large")):
            found.append(f"{ears} ears")
        if g("freckles") > 0:
            found.append("freckles")
        # The far cheek of a turned head is not seen, nor is skin below a beard.
        side = g("mole_x") - 0.5
        turned_away = abs(side) > 0.3 and side * person.yaw > 0 and abs(person.yaw) > 10
        if g("mole_x") > 0 and self.beard not in ("full", "stubble") and not turned_away:
            where = "" if abs(side) < 0.15 else " on the right" if side > 0 else " on the left"
            found.append("a mole" + where)
        rng.shuffle(found)
        return found

    def noun(self, rng: random.Random, short: bool) -> str:
        """ "young woman", "man of about sixty": age as far as a face shows it."""
        if self.kind == "child":
            return rng.choice(_CHILD_AGES) + "child"
        before, after = next((b, a) for top, b, a in _ADULT_AGES if self["age"] < top)
        first = rng.choice(before)
        if first or short:
            return first + self.kind
        return _phrase(self.kind, rng.choice(after))


def _listed(rng: random.Random, traits: Sequence[str], last_and: bool = True) -> str:
    if len(traits) < 2 or not last_and:
        return ", ".join(traits)
    return ", ".join(traits[:-1]) + rng.choice((" and ", ", ")) + traits[-1]


def _described(rng: random.Random, look: _Look, tokens: int, short: bool) -> str:
    """One person in at most about `tokens` words and commas beside noun and clothing."""
    chosen = look.necessary(rng)
    left = tokens - sum(_length(trait) + 1 for trait in chosen)
    chance = rng.uniform(0.6, 1.0)
    for trait in look.optional(rng):
        if rng.random() < chance and _length(trait) + 1 <= left:
            chosen.append(trait)
            left -= _length(trait) + 1
    if rng.random() < 0.5:
        rng.shuffle(chosen)
    noun, clothing = look.noun(rng, short), _clothing(rng, look.person.clothing)
    if not chosen:
        return f"{_with_article(noun)} {clothing}"
    if short or rng.random() < 0.4:
        # No commas inside a person of several, so that each is plainly the next one's neighbour.
        return f"{_with_article(noun)} {clothing} with {' and '.join(chosen) if short else _listed(rng, chosen)}"
    if rng.random() < 0.75:
        return f"{_with_article(noun)} with {_listed(rng, chosen)}, {clothing}"
    return f"{_with_article(noun)}, {_listed(rng, chosen, last_and=False)}, {clothing}"


def _light_words(rng: random.Random, light: Light, colours: bool) -> str:
    tone = ""
    if colours and abs(light.warmth) > 0.4:
        tone = "warm" if light.warmth > 0 else "cool"
    if abs(light.azimuth) < 12:
        where = rng.choice(("from the front", "")) if light.elevation < 42 else "from above"
    else:
        side = "right" if light.azimuth > 0 else "left"
        where = rng.choice((f"from the {side}", f"coming from the {side}"))
    return _phrase(tone, "light", where) if tone or where else ""


def _pose_words(rng: random.Random, yaw: float) -> str:
    if abs(yaw) < 8:
        return rng.choice(("facing the camera", "seen from the front", ""))
    return rng.choice(("turned to the {}", "looking to the {}", "facing {}")).format("right" if yaw > 0 else "left")


def full_caption(scene: Scene) -> str:
    """One English sentence that names what is to be seen of each person, deterministic from the scene's seed.

    Beside the words of `caption`: age, hair, glasses, beard, skin, eyes, marks and extreme measures of each person as
    far as hats, beards, the pose and the style let them be seen, in a random choice and order; where the light comes
    from, and where a single person looks. At most 75 words; several people share them.
    """
    rng = random.Random(f"full caption {scene.seed}")
    colours, count = scene.style not in _NO_COLOURS, len(scene.people)
    place = _place(rng, scene.background)
    parts = [rng.choice(EXPRESSION_WORDS[scene.people[0].expression]), place]
    light = _light_words(rng, scene.light, colours) if count < 3 and rng.random() < 0.7 else ""
    pose = _pose_words(rng, scene.people[0].yaw) if count == 1 and rng.random() < 0.8 else ""
    rng.shuffle(parts)
    parts += [part for part in (light, pose) if part]
    if rng.random() < 0.3:
        rng.shuffle(parts)
    style = rng.choice(_STYLE_WORDS[scene.style])
    start = "" if count == 1 or rng.random() < 0.5 else f"{_NUMBERS[count]} people, "
    around = _length(style) + _length(start) + sum(_length(part) + 1 for part in parts)
    looks = [_Look(person, colours) for person in scene.people]
    # Noun and clothing take up to ten tokens; of several people eight, with a comma or an "and" between them.
    each = min(_CUES[count], (_LONGEST - around) // count - (10 if count == 1 else 9))
    people = [_described(rng, look, each, short=count > 1) for look in looks]
    text = people[0] if count == 1 else ", ".join(people[:-1]) + f" and {people[-1]}"
    return style.format(start + ", ".join((text, *parts)))
