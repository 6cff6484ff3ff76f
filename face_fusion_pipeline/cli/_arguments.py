"""Types and actions of the commands' options: every number is checked here, before anything is loaded."""

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


logger = logging.getLogger(__name__)

MANY = 10**9  # no count of steps, pictures or pixels is larger
OPEN = 10**6  # upper ends from here on only keep infinity out: `--help` does not name them
SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True)
class Number:
    """The `type` of an option that takes a finite number in a range.

    Attributes:
        least, most: the ends of the range, which belong to it.
        whole: integers only.
        above, below: the lower, the upper end itself is left out.
        step: the value is a multiple of it.
    """

    least: float
    most: float
    whole: bool = False
    above: bool = False
    below: bool = False
    step: int = 1

    def __call__(self, text: str) -> int | float:
        """The number that `text` says. Raises [`argparse.ArgumentTypeError`] that names the range and the text."""
        value: int | float
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:  # no number, or one of thousands of digits
            value = math.nan
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        if not (low and high) or value % self.step and self.whole:
            shown = text if len(text) <= SHOWN else text[:SHOWN] + "…"
            raise argparse.ArgumentTypeError(f"must be {self}, got {shown or 'nothing'}")
        return value

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        multiple = f", a multiple of {self.step}" if self.step > 1 else ""
        least, most = (str(end) if self.whole else f"{end:.15g}" for end in (self.least, self.most))
        low = f"above {least}" if self.above else f"from {least}"
        high = f"below {most}" if self.below else f"{'at most' if self.above else 'to'} {most}"
        return f"{kind} {low}{', ' if self.above else ' '}{high}{multiple}"

    @property
    def range(self) -> str:
        """The range for `--help`."""
        multiple = f", a multiple of {self.step}" if self.step > 1 else ""
        low = f"above {self.least:g}" if self.above else f"{self.least:g}"
        if self.most >= OPEN:
            return low + ("" if self.above else " or more") + multiple
        return f"{low} {'to below' if self.below else 'to'} {self.most:g}{multiple}"


def whole(least: int = 1, most: int = MANY, step: int = 1) -> Number:
    """A whole number from `least` to `most`."""
    return Number(least, most, whole=True, step=step)


def real(least: float = 0, most: float = 1e9, *, above: bool = False, below: bool = False) -> Number:
    """A finite number from `least` to `most`; `above` and `below` leave that end out."""
    return Number(least, most, above=above, below=below)


COUNT = whole()
STEPS = whole(1, 1000)  # of denoising
THREADS = whole(1, 1024)
SEED = whole(0, 2**32 - 1)  # what every generator of random numbers takes
POSITIVE = real(above=True)
FRACTION = real(0, 1)
DECAY = real(0, 1, below=True)
RATE = real(0, 100, above=True)  # of learning
POWER = real(0, 100, above=True)
STRENGTH = real(0, 100)  # of a face
GUIDANCE = real(0, 100)
GUIDED = real(1, 100, above=True)
AVATAR_SIDE = whole(32, 1024, step=8)  # pixels that the renderer can draw


class Gather(argparse.Action):
    """An option whose values add up when it is given again; the first ones take the default's place."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        before = [] if before is self.default or before is None else before
        added = values if isinstance(values, list) else [values]
        setattr(namespace, self.dest, [*before, *added])


# What words of a command line were called earlier: options of any command, and the second word after the first.
EARLIER_OPTIONS = {
    "--late-guidance": "--low-noise-guidance",
    "--min-face-share": "--min-face-fraction",
    "--share": "--fraction",
    "--judges": "--evaluators",
    "--judge-recogniser": "--evaluator",
    "--condition-recogniser": "--condition-embedder",
    "--identity-recogniser": "--identity-embedder",
}
EARLIER_ACTIONS = {
    ("avatars-evaluate", "train-judges"): "train-evaluators",
    ("avatars-train", "recogniser"): "face-embedder",
}


def todays_words(words: Sequence[str]) -> list[str]:
    """A command line in the names of today; a line of warning for each that has changed."""
    found = list(words)
    if tuple(found[:2]) in EARLIER_ACTIONS:
        action = EARLIER_ACTIONS[found[0], found[1]]
        logger.warning("%s is called %s now", found[1], action)
        found[1] = action
    for place, word in enumerate(found):
        option, equals, value = word.partition("=")
        if option in EARLIER_OPTIONS:
            logger.warning("%s is called %s now", option, EARLIER_OPTIONS[option])
            found[place] = EARLIER_OPTIONS[option] + equals + value
    return found
