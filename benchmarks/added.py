"""What a face adds to plain Stable Diffusion, timed where it is added.

Two whole images differ by more from one run to the next than a face costs. But Face Fusion is the plain pipeline's own
code except in two places: before the loop, where faces are encoded, and in the attention layers that see them. So

    image with a face = plain image + (before the loop - the plain pipeline's) + 20 * sum over layers (with - without)

where each layer is timed with and without the face one right after the other, on the hidden states of a real step.
What slows the machine for longer than a layer takes slows both sides, and cancels. The plain image, by which the sum
is divided, has 20 times the pass of the UNet that is timed right after the layers, without the face.
"""

import csv
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from face_fusion_pipeline.evaluation.reports import markdown_table
from face_fusion_pipeline.face_attention import attention_layers

from .floor import STEPS, floor_ratio
from .measure import Setup, timed
from .report import ratio
from .variants import Job, Variant


PAIRS = 3  # of a layer with and without the face, in each step that is timed


@dataclass(frozen=True)
class Added:
    """Seconds that a variant takes beyond the plain pipeline in one round.

    Attributes:
        before: once, before the loop.
        attention: a step, by number of queries of the layers.
        plain: a whole image of the plain pipeline at the speed that the machine had.
    """

    before: float
    attention: dict[int, float]
    plain: float

    @property
    def step(self) -> float:
        """Seconds that all layers add to a step."""
        return sum(self.attention.values())

    @property
    def ratio(self) -> float:
        """A whole image over the plain one."""
        return 1 + (self.before + STEPS * self.step) / self.plain


@dataclass
class Row:
    """One variant, and what it added in each round."""

    variant: Variant
    rounds: list[Added] = field(default_factory=list)

    def median(self, of: Callable[[Added], float]) -> float:
        return statistics.median(of(found) for found in self.rounds)


@dataclass
class Pass:
    """When a pass of the UNet began, and with what."""

    start: float
    inputs: tuple[Any, ...]
    options: dict[str, Any]


@contextmanager
def passes_noted(unet: Any) -> Iterator[list[Pass]]:
    """Yields the passes of the UNet as they begin."""
    passes: list[Pass] = []
    handle = unet.register_forward_pre_hook(
        lambda _, inputs, options: passes.append(Pass(time.perf_counter(), inputs, options)), with_kwargs=True
    )
    try:
        yield passes
    finally:
        handle.remove()


@contextmanager
def layers_timed(unet: Any, setup: Setup, pairs: int = PAIRS) -> Iterator[dict[int, float]]:
    """Within it each layer that sees a face runs with and without it in turn; what it returns is unchanged.

    Yields number of queries -> seconds that faces add to a pass, summed over the layers of that size. A layer counts
    with the median of its pairs; one more pair before them warms up.
    """
    seconds: dict[int, float] = {}

    def watched(layer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            ours = layer.processor
            if not getattr(ours, "is_face_fusion_processor", False):
                return forward(hidden_states, *args, **kwargs)
            differences, output = [], None
            try:
                for turn in range(pairs + 1):
                    took = {}
                    for processor in (ours, ours.original)[:: 1 if turn % 2 else -1]:
                        layer.processor = processor
                        setup.synchronize()
                        start = time.perf_counter()
                        result = forward(hidden_states, *args, **kwargs)
                        setup.synchronize()
                        took[processor is ours] = time.perf_counter() - start
                        output = result if processor is ours else output
                    differences.append(took[True] - took[False])
            finally:
                layer.processor = ours
            queries = hidden_states.shape[1]
            seconds[queries] = seconds.get(queries, 0.0) + statistics.median(differences[1:])
            return output

        return run

    layers = [layer for kind in ("attn1", "attn2") for layer in attention_layers(unet, kind).values()]
    for layer in layers:
        layer.forward = watched(layer, layer.forward)
    try:
        yield seconds
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def plain_image(job: Job, setup: Setup) -> tuple[float, float]:
    """Seconds of a plain image without its steps, and of the part of them before the loop."""
    with passes_noted(job.pipe.unet) as passes:
        begin = time.perf_counter()
        return timed(job, setup).once, passes[0].start - begin


@torch.no_grad()
def added_by(job: Job, setup: Setup, plain: tuple[float, float]) -> Added:
    """Run one step of the job; `plain` is what [`plain_image`] found in the same round."""
    once, before = plain
    with passes_noted(job.pipe.unet) as passes, layers_timed(job.pipe.unet, setup) as seconds:
        begin = time.perf_counter()
        # References pass through the UNet too, but before: the last pass is that of the step.
        job.call(num_inference_steps=1, output_type="latent")
    step = passes[-1]
    setup.synchronize()
    start = time.perf_counter()
    job.pipe.unet(*step.inputs, **step.options)  # the face is gone with the call
    setup.synchronize()
    image = once + STEPS * (time.perf_counter() - start)
    return Added(step.start - begin - before, dict(seconds), image)


def measure_added(setup: Setup, variants: Sequence[Variant], rounds: int, say: Callable[[str], None]) -> list[Row]:
    """What each of the `variants` adds; the first one is the plain pipeline. Everything once a round, in turn."""
    model = setup.model()
    base, *others = [(Row(variant), variant.build(model)) for variant in variants]
    plain_image(base[1], setup)  # warm up
    for turn in range(rounds):
        plain = plain_image(base[1], setup)
        for row, job in others:
            row.rounds.append(added_by(job, setup, plain))
        say(f"{setup}: round {turn + 1} of {rounds}")
    return [row for row, _ in others]


def added_table(shape: str, rows: Sequence[Row]) -> str:
    """Ratio of a whole image beside goal and floor, and the fractions that its parts add to a plain image."""
    sizes = sorted({queries for row in rows for found in row.rounds for queries in found.attention}, reverse=True)
    cells = []
    for row in rows:
        fractions = [row.median(lambda one: one.before / one.plain)]
        for queries in sizes:
            fractions.append(row.median(lambda one, n=queries: STEPS * one.attention.get(n, 0.0) / one.plain))  # type: ignore[misc]
        goal, floor = row.variant.goal, floor_ratio(shape, row.variant.use)
        cells.append(
            [row.variant.label, ratio([one.ratio for one in row.rounds])]
            + ["–" if value is None else f"{value:{form}}" for value, form in ((goal, ".2f"), (floor, ".3f"))]
            + [f"{100 * fraction:.2f} %" for fraction in fractions]
        )
    header = ["variant", "image, × plain", "goal", "floor", "before the loop", *(f"{n} queries" for n in sizes)]
    return markdown_table(header, cells)


def write_rounds(path: Path, rows: Sequence[Row]) -> None:
    """Every round of every variant, in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "round", "plain_image_s", "before_s", "queries", "attention_a_step_s"])
        for row in rows:
            for turn, found in enumerate(row.rounds):
                for queries, seconds in found.attention.items():
                    writer.writerow([row.variant.label, turn, found.plain, found.before, queries, seconds])
