"""The questions: which variants answer each, and how they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .variants import METHOD, VARIANTS


@dataclass(frozen=True)
class Condition:
    """How a trained variant is used: strength, number of reference photos of a person, people in the picture."""

    scale: float = 1.0
    references: int = 1
    people: int = 1

    @property
    def slug(self) -> str:
        """Its name in file names."""
        return f"scale-{self.scale:g}_references-{self.references}_people-{self.people}"


@dataclass(frozen=True)
class Question:
    """One of the reviewers' questions.

    Attributes:
        variants: what is compared; the picture without a face and true renders are measured beside them.
        conditions: how each is used.
        axis: the field of [`Condition`] that the curve runs along, if the answer is one.
    """

    number: int
    name: str
    asks: str
    variants: tuple[str, ...]
    conditions: tuple[Condition, ...] = (Condition(),)
    axis: str | None = None

    @property
    def needs_second_embedder(self) -> bool:
        """Whether a variant is conditioned on a face embedder, which then must not evaluate."""
        return any(VARIANTS[name].encoder == "face embedder" for name in self.variants)

    def among(self, names: Sequence[str]) -> Question:
        """The same question of these of its variants only."""
        return replace(self, variants=tuple(name for name in self.variants if name in names))

    def along(self, values: Sequence[float]) -> Question:
        """The same question with other scales along its curve."""
        return replace(self, conditions=tuple(Condition(scale=value) for value in values))


TOKENS = ("ip-adapter", "ip-adapter-plus", "ip-adapter-faceid")
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
QUESTIONS = {
    question.name: question
    for question in (
        Question(1, "attention", "one softmax, or a second attention that is added?", (METHOD, "added-attention")),
        Question(2, "encoders", "features of the UNet, or tokens of another encoder?", (METHOD, *TOKENS)),
        Question(
            3,
            "training",
            "what do training, a clean reference, the initial weights, the bias and the region of the keys give?",
            (
                METHOD,
                "training-free",
                "noised-reference",
                "init-zero-v",
                "init-xavier",
                "no-count-bias",
                "face-region",
            ),
        ),
        Question(
            4,
            "references",
            "what do more photos of the person give?",
            (METHOD,),
            tuple(Condition(references=count) for count in (1, 2, 3, 5)),
            axis="references",
        ),
        Question(5, "pairs", "does the photo itself as reference in training teach copying?", (METHOD, "same-photo")),
        Question(
            6,
            "scale",
            "what does likeness cost in obedience to the prompt?",
            (METHOD, "added-attention", "training-free", *TOKENS),
            tuple(Condition(scale=scale) for scale in SCALES),
            axis="scale",
        ),
        Question(
            7,
            "face-size",
            "how much likeness do small faces keep?",
            (METHOD,),
            tuple(Condition(people=count) for count in (1, 2, 3)),
            axis="people",
        ),
        Question(8, "layers", "what do fewer layers cost?", (METHOD, "layers-up", "layers-down", "layers-half")),
    )
}
