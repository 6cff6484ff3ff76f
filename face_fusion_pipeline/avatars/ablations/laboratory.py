"""Where questions are answered: the runs that are missing are trained, drawn and scored, and none is made twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...evaluation.reports import circumstances
from ...face_adapter import adapter_fingerprint
from ...face_errors import FaceFusionError, renamed
from ...files.atomic import write_text
from ...files.texts import read_json
from ...training.initial_weights import continued_adapter
from ...training.loop import digest
from ...training.preparation import data_key, read_rows
from ...unet_family import unet_fingerprint
from ..evaluation.avatar_table import CEILING, FLOOR
from ..evaluation.evaluators import load_evaluators
from ..evaluation.trials import Trial
from .encoders import check_independent, load_conditioner, load_evaluator
from .pictures import Sampling, make_pictures
from .questions import Condition, Question
from .scoring import Row, Scorer
from .training import Trainer
from .variants import NO_FACE, VARIANTS


@dataclass(frozen=True)
class Run:
    """A finished run: who evaluated, which variant, seed and condition; its rows, and the record of its training."""

    variant: str
    seed: int
    condition: Condition
    rows: list[Row]
    training: dict[str, Any]


@dataclass
class Laboratory:
    """Answers questions in `trainer.out`: weights, pictures and results lie there, and nothing is made twice.

    Args:
        evaluator: the recogniser that measures likeness, see `encoders.load_evaluator`.
    """

    trainer: Trainer
    sampling: Sampling
    seeds: tuple[int, ...]
    evaluator: str | None = None

    def answer(self, question: Question) -> list[Run]:
        """Train, generate and score what is missing; returns all runs of the question.

        Raises:
            FaceFusionError: the folder holds runs with other settings, or the recogniser would evaluate itself.
        """
        scorer = Scorer(load_evaluators(), load_evaluator(self.evaluator), self.sampling.seed)
        if question.needs_second_embedder:
            check_independent(load_conditioner(self.trainer.embedder), scorer.recogniser)
        keep_common(self.trainer.out, self.settings())
        runs = list(self._bounds(question, scorer))
        for name in (NO_FACE, *question.variants):
            for seed in self.seeds if VARIANTS[name].trained and self.trainer.budget.steps else (0,):
                runs += self._runs(question, name, seed, scorer)
        return runs

    def settings(self) -> dict[str, Any]:
        """What all runs in one folder have in common."""
        base = self.trainer.base
        return {
            "model": Path(base.name).name,
            "unet": unet_fingerprint(base.unet),
            "encoders": [digest(part.state_dict()) for part in (base.vae, *base.text_encoders)],
            "examples": len(read_rows(self.trainer.data)),
            "data": data_key(self.trainer.data),
            "budget": {key: value for key, value in asdict(self.trainer.budget).items() if key != "rates"},
            "start": self._fingerprint(self.trainer.start),
            "teacher": self._fingerprint(self.trainer.teacher),
            "sampling": {key: value for key, value in asdict(self.sampling).items() if key != "batch"},
            "condition_embedder": load_conditioner(self.trainer.embedder).name,
        }

    def _fingerprint(self, path: Path | None) -> str | None:
        """Of the weights of an adapter."""
        return None if path is None else adapter_fingerprint(continued_adapter(self.trainer.base.unet, path, {}))

    def _path(self, scorer: Scorer, name: str, seed: int, condition: Condition) -> Path:
        slug = scorer.recogniser.name.replace(" ", "-").replace("/", "-")
        return self.trainer.out / name / f"seed-{seed}" / "results" / slug / f"{condition.slug}.json"

    def _trials(self, condition: Condition) -> list[Trial]:
        captions = {row["text"] for row in read_rows(self.trainer.data)}
        return self.sampling.trials(condition.people, captions)

    def _runs(self, question: Question, name: str, seed: int, scorer: Scorer) -> Iterator[Run]:
        # Without a face strength and photos mean nothing.
        same = {Condition(people=c.people): None for c in question.conditions}
        conditions = question.conditions if name != NO_FACE else tuple(same)
        paths = [self._path(scorer, name, seed, condition) for condition in conditions]
        if not all(path.is_file() for path in paths):
            conditioning, training = self.trainer.trained(VARIANTS[name], seed)
            folder = self.trainer.out / name / f"seed-{seed}"
            for condition, path in zip(conditions, paths, strict=True):
                trials = self._trials(condition)
                pictures = make_pictures(self.trainer.base, conditioning, trials, condition, self.sampling, folder)
                if not path.is_file():
                    write_run(path, Run(name, seed, condition, scorer.files(trials, pictures), training))
        for run in map(read_run, paths):
            if run.training:
                self.trainer.check_rate(VARIANTS[name], seed, run.training)
            yield run

    def _bounds(self, question: Question, scorer: Scorer) -> Iterator[Run]:
        for condition in {Condition(people=c.people): None for c in question.conditions}:
            paths = {name: self._path(scorer, name, 0, condition) for name in (CEILING, FLOOR)}
            if not all(path.is_file() for path in paths.values()):
                for name, rows in scorer.bounds(self._trials(condition)).items():
                    write_run(paths[name], Run(name, 0, condition, rows, {}))
            yield from (read_run(path) for path in paths.values())


def keep_common(out: Path, settings: dict[str, Any]) -> None:
    """Note what all runs in `out` have in common. Raises [`FaceFusionError`]: runs with other settings are there."""
    path, settings = out / "settings.json", json.loads(json.dumps(settings))
    if path.is_file():
        earlier = {"condition_recogniser": "condition_embedder"}
        known = renamed(read_json(path, "choose another --out"), earlier, path)
        changed = [key for key in settings if known.get(key) != settings[key]]
        if changed:
            raise FaceFusionError(
                f"{out} holds runs with another {changed[0]}: {known.get(changed[0])}, not {settings[changed[0]]}; "
                "choose another --out"
            )
    write_text(path, json.dumps(settings, indent=1) + "\n")


def write_run(path: Path, run: Run) -> None:
    write_text(path, json.dumps({**asdict(run), **circumstances()}, indent=1) + "\n")


def read_run(path: Path) -> Run:
    content = read_json(path, "remove it, and it is measured again")
    values = {key: content[key] for key in ("variant", "seed", "rows", "training")}
    return Run(condition=Condition(**content["condition"]), **values)
