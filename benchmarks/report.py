"""Tables, CSV and plots of what was measured, and the page that shows them."""

import csv
import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from face_fusion_pipeline.evaluation.reports import circumstances, markdown_table

from .floor import STEPS, Use, arithmetic, floor_ratio, image_floor
from .measure import Result, Setup
from .shapes import SHAPES
from .variants import Variant


CSV_FIELDS = (
    *("shape", "device", "dtype", "compile", "attention", "threads", "steps_run", "variant", "against", "round"),
    *("image_s", "step_s", "first_image_s", "memory_bytes", "flops", "skipped"),
)


def machine(setup: Setup) -> str:
    """Machine, versions and date that figures belong to."""
    about = circumstances()
    device = torch.cuda.get_device_name() if setup.device == "cuda" else about["machine"]
    threads = "" if setup.device == "cuda" else f", {setup.threads or torch.get_num_threads()} threads"
    return f"{device}{threads}; torch {about['torch']}, diffusers {about['diffusers']}; {about['date']}.\n"


def foot(setup: Setup, rounds: int) -> str:
    """How the figures of a table came about."""
    extrapolated = "" if setup.steps == STEPS else f", extrapolated from {setup.steps} measured steps"
    return (
        f"Images of {STEPS} steps with guidance{extrapolated}; medians over {rounds} rounds in alternation, ratios "
        f"within a round as median [least, greatest]. {machine(setup)}"
    )


def ratio(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]" if values else "–"


def _number(value: float | None, unit: float = 1.0, form: str = ".3g") -> str:
    return "–" if value is None else f"{value / unit:{form}}"


def _over(value: float | None, base: float | None) -> str:
    return "–" if value is None or not base else f"{value / base:.3f}"


def _bases(results: Sequence[Result]) -> dict[str, Result]:
    return {result.variant.label: result for result in results}


def comparison_table(results: Sequence[Result]) -> str:
    """One row a variant; for each figure its ratio to the plain pipeline."""
    bases, rows, skipped = _bases(results), [], []
    for result in results:
        base, variant = bases[result.variant.against], result.variant
        if result.skipped:
            skipped.append(f"* Not run: {variant.label}: {result.skipped}\n")
            continue
        floor = floor_ratio(result.setup.shape, variant.use)
        row = [variant.label, _number(result.median("image"), form=".2f"), ratio(result.ratios(base, "image"))]
        row += [_number(variant.goal, form=".2f"), _number(floor, form=".3f")]
        row += [_number(result.median("step"), form=".4f")]
        row += [ratio(result.ratios(base, "step")), _number(result.first, form=".2f")]
        row += [_number(result.memory, 2**30, ".2f"), _over(result.memory, base.memory)]
        rows.append([*row, _number(result.flops, 1e12, ".4g"), _over(result.flops, base.flops)])
    header = ["variant", "image, s", "× plain", "goal", "floor", "step, s", "× plain", "first image, s"]
    header += ["memory, GiB", "× plain", "TFLOP", "× plain"]
    notes = [*skipped, *_beside_reference_pipeline(results)]
    return markdown_table(header, rows) + "".join(["\n", *notes] if notes else [])


def _beside_reference_pipeline(results: Sequence[Result]) -> list[str]:
    """The most that any use of Face Fusion takes of the two-pass method's time (goal: 0.55)."""
    two_pass = next((result for result in results if result.variant.label == "reference pipeline"), None)
    if two_pass is None or not two_pass.timings:
        return []
    ours = [one for one in results if one.timings and one.variant.use and one.variant.use.references]
    ratios = {one.variant.label: one.ratios(two_pass, "image") for one in ours}
    if not ratios:
        return []
    most = max(ratios, key=lambda label: statistics.median(ratios[label]))
    return [f"* Of the reference pipeline's time at most {ratio(ratios[most])} ({most}); goal 0.55.\n"]


def growth_table(sweeps: Mapping[str, Sequence[Result]]) -> str:
    """One row a point of each sweep."""
    rows = []
    for name, results in sweeps.items():
        bases = _bases(results)
        for result in results:
            base, use = bases[result.variant.against], result.variant.use
            if result is base:
                continue
            cells = [name, result.variant.label]
            if result.skipped:
                rows.append([*cells, result.skipped, *["–"] * 4])
                continue
            cells += [_number(result.median("image"), form=".2f"), ratio(result.ratios(base, "image"))]
            cells += [_number(floor_ratio(result.setup.shape, use), form=".3f")]
            rows.append([*cells, ratio(result.ratios(base, "step")), _over(result.flops, base.flops)])
    header = ["growth of", "to", "image, s", "× plain", "× plain, floor", "step × plain", "TFLOP × plain"]
    return markdown_table(header, rows)


def floor_tables(shape: str, variants: Sequence[Variant], itemsize: int = 2) -> str:
    """The parts of the least possible cost, and what they sum up to for each use."""
    parts, sizes = arithmetic(shape, itemsize), SHAPES[shape]
    once, step = parts.plain(sizes.size, 1)
    whole = image_floor(shape, Use(references=0), itemsize)
    lines: list[tuple[str, int, Any]] = [
        (f"plain: {'one text' if parts.model.is_xl else 'two texts'}, VAE decoder", 1, once),
        ("plain: UNet, two rows", STEPS, step),
    ]
    for side in (sizes.reference, sizes.small):
        lines += [(f"reference of {side} px: {name}", 1, cost) for name, cost in parts.reference(side).items()]
        lines.append((f"reference of {side} px: attention to it", STEPS, parts.attention(sizes.size, side)))
    table = markdown_table(
        ["part", "times", "GFLOP each", "MB each", "of the plain image's FLOP"],
        [
            [
                name,
                times,
                f"{cost.flops / 1e9:.4g}",
                f"{cost.bytes / 1e6:.4g}",
                f"{times * cost.flops / whole.flops:.2%}",
            ]
            for name, times, cost in lines
        ],
    )
    rows = []
    for variant in variants:
        if variant.use is not None:
            cost = image_floor(shape, variant.use, itemsize)
            figures = [f"{cost.flops / 1e12:.4g}", f"{cost.flops / whole.flops:.3f}"]
            rows.append([variant.label, *figures, f"{cost.bytes / 1e9:.4g}", f"{cost.bytes / whole.bytes:.3f}"])
    header = ["image", "TFLOP", "× plain", "GB", "× plain"]
    note = f"{sizes.size} px, {STEPS} steps with guidance, {itemsize} bytes a number; counted, not measured.\n"
    return f"{table}\n{markdown_table(header, rows)}\n{note}"


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Every round of every variant, nothing summed up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_FIELDS)
        writer.writeheader()
        for result in results:
            setup, variant = result.setup, result.variant
            row = {name: getattr(setup, name) for name in CSV_FIELDS[:6]} | {"steps_run": setup.steps}
            row |= {"variant": variant.label, "against": variant.against, "skipped": result.skipped}
            row |= {"first_image_s": result.first, "memory_bytes": result.memory, "flops": result.flops}
            for turn, timing in enumerate(result.timings):
                writer.writerow({**row, "round": turn, "image_s": timing.image, "step_s": timing.step})
            if not result.timings:
                writer.writerow(row)


# --- Plots -------------------------------------------------------------------------------------------------------


def plots_possible() -> bool:
    """True if matplotlib, which only the plots need, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _panels(titles: Sequence[str], width: float, height: float, *, sharey: bool) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (width * len(titles), height)
    figure, grid = pyplot.subplots(1, len(titles), figsize=size, squeeze=False, sharey=sharey, layout="constrained")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    return figure, list(grid[0])


def _points(axes: Any, results: Sequence[Result], *, upright: bool) -> None:
    """Median ratio with its range for each result that has another as its base, and a mark for the floor."""
    bases = _bases(results)
    compared = ((result, bases[result.variant.against]) for result in results)
    ratios = [(one, one.ratios(base, "image")) for one, base in compared if one is not base]
    shown = [(one, values) for one, values in ratios if values]
    for place, (result, values) in enumerate(shown):
        middle, floor = statistics.median(values), floor_ratio(result.setup.shape, result.variant.use)
        spread = [[middle - min(values)], [max(values) - middle]]
        at = (place, middle) if upright else (middle, place)
        axes.errorbar(*at, **{"yerr" if upright else "xerr": spread}, fmt="o", color="tab:blue", capsize=3)
        if floor is not None:
            axes.plot(
                *((place, floor) if upright else (floor, place)), "_" if upright else "|", color="tab:red", ms=12
            )
    labels = [result.variant.label for result, _ in shown]
    (axes.set_xticks if upright else axes.set_yticks)(range(len(labels)), labels, fontsize=8)


def comparison_plot(path: Path, groups: Mapping[str, Sequence[Result]]) -> None:
    """Image time over plain, one panel a setup; red marks are the floor."""
    figure, panels = _panels(list(groups), 5.5, 4.5, sharey=False)
    for axes, results in zip(panels, groups.values(), strict=True):
        _points(axes, results, upright=False)
        axes.set_xlabel("time of an image, × plain (red: counted floor)", fontsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.invert_yaxis()
    _save(figure, path)


def growth_plot(path: Path, sweeps: Mapping[str, Sequence[Result]]) -> None:
    """Image time over plain, one panel a sweep; red marks are the floor."""
    figure, panels = _panels(list(sweeps), 3.0, 3.5, sharey=True)
    for axes, results in zip(panels, sweeps.values(), strict=True):
        _points(axes, results, upright=True)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("time of an image, × plain (red: counted floor)", fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- Page --------------------------------------------------------------------------------------------------------


def fill(page: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- begin name -->` and `<!-- end name -->` in `page`. Raises ValueError without them."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    old = page.read_text()
    if begin not in old or end not in old:
        raise ValueError(f"{page} has no lines {begin.strip()!r} and {end!r}")
    head, rest = old.split(begin, 1)
    page.write_text(f"{head}{begin}\n{text.strip()}\n\n{end}{rest.split(end, 1)[1]}")
