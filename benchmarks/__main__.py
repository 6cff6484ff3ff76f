"""What identity costs, measured.

    python -m benchmarks floor                             # the least possible cost, counted; needs no time
    python -m benchmarks floor --shape sdxl                # of Stable Diffusion XL at 1024 pixels
    python -m benchmarks compare --shape avatar --steps 20 # all variants in alternation
    python -m benchmarks compare --shape sdxl --dtype bfloat16 --rounds 1 --variants "1 reference, 512 px" \
        "saved identity, 512 px" "2 people, 512 px"        # 24 GiB of memory, and on CPUs an idle machine
    python -m benchmarks compare --device cuda --dtype float16 bfloat16 --compile none inductor --steps 20
    python -m benchmarks added                             # what a face adds, timed where it is added
    python -m benchmarks grow                              # more references, people, pixels, images
    python -m benchmarks regions                           # several people: grouped queries against a dense mask
    python -m benchmarks profile                           # where the time over the plain pipeline goes
    python -m benchmarks training --batch 1                # a step of training, beside a bare forward and backward
    python -m benchmarks load                              # import and loading, beside diffusers' own
    python -m benchmarks soak --shape avatar --calls 200   # does a long run leak or recompile?

Each writes what it found to --out and, with --page, between the marks of benchmarks/README.md that bear its name.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from face_fusion_pipeline.evaluation.reports import markdown_table


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from the Hub

PAGE = Path(__file__).parent / "README.md"
COMPARED_WITH = "plain"


def say(text: str) -> None:
    """Progress, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def deliver(args: argparse.Namespace, name: str, markdown: str) -> None:
    """Print a table, write it to `--out`, and put it into the page if that was asked for."""
    from .report import fill

    print(markdown)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name.replace(' ', '-')}.md").write_text(markdown)
    if args.page:
        fill(args.page, name, markdown)


def named(args: argparse.Namespace, *parts: str) -> str:
    """Name of a result: of its files, and of its place in the page."""
    return " ".join(filter(None, [args.command, args.shape, *parts, args.tag]))


def setups(args: argparse.Namespace) -> list[Any]:
    """Every combination of the options that may be given more than once."""
    from .measure import Setup

    axes = itertools.product(args.dtype, args.compile, args.attention)
    return [Setup(args.shape, args.device, *point, args.steps, args.threads) for point in axes]


def one_setup(args: argparse.Namespace) -> Any:
    """The only combination. Raises SystemExit if there are several."""
    first, *others = setups(args)
    if others:
        raise SystemExit(f"{args.command} takes one --dtype, --compile and --attention")
    return first


def chosen(variants: Sequence[Any], labels: Sequence[str] | None) -> list[Any]:
    """The variants named, and those that they are compared with. Raises SystemExit on an unknown name."""
    known = {variant.label: variant for variant in variants}
    if unknown := set(labels or ()) - known.keys():
        raise SystemExit(f"no variant {min(unknown)!r}; there are: {', '.join(map(repr, known))}")
    wanted = set(labels or known)
    wanted |= {known[label].against for label in wanted}
    return [variant for variant in variants if variant.label in wanted]


# --- Commands ----------------------------------------------------------------------------------------------------


def floor(args: argparse.Namespace) -> None:
    """Count the least possible cost."""
    from .report import floor_tables
    from .shapes import SHAPES
    from .variants import comparison

    variants = [variant for variant in comparison(SHAPES[args.shape]) if variant.label != "plain, again"]
    deliver(args, named(args), floor_tables(args.shape, variants))


def compare(args: argparse.Namespace) -> None:
    """Measure all variants side by side."""
    from .measure import measure, measure_alone
    from .report import comparison_plot, comparison_table, foot, write_csv
    from .variants import comparison

    groups, text = {}, ""
    for setup in setups(args):
        variants = chosen(comparison(setup.sizes), args.variants)
        groups[str(setup)] = results = measure(setup, variants, args.rounds, say)
        for result in results if args.alone else ():
            measure_alone(result, say)
        text += f"**{setup}**\n\n{comparison_table(results)}\n{foot(setup, args.rounds)}\n"
    name = named(args, args.device)
    everything = [result for results in groups.values() for result in results]
    write_csv(args.out / f"{name.replace(' ', '-')}.csv", everything)
    draw(args, name, comparison_plot, groups)
    deliver(args, name, text)


def added(args: argparse.Namespace) -> None:
    """Time what a face adds: before the loop, and in each attention layer that sees it."""
    from .added import PAIRS, added_table, measure_added, write_rounds
    from .floor import STEPS
    from .report import machine
    from .variants import comparison, growth

    setup = one_setup(args)
    if setup.compile != "none":
        raise SystemExit("added times single layers, which a compiled graph does not have: leave --compile out")
    known = comparison(setup.sizes)
    plain = next(variant for variant in known if variant.label == COMPARED_WITH)
    if args.grow:  # the sweeps whose points are all compared with the one plain picture
        sweeps = {name: points for name, points in growth(setup.sizes).items() if points[0].label == plain.label}
        known = [replace(one, label=f"{name}: {one.label}") for name, points in sweeps.items() for one in points[1:]]
    variants = chosen([plain, *known], args.variants)
    ours = [variant for variant in variants if variant.use is not None and variant.use.references]
    rows = measure_added(setup, [plain, *ours], args.rounds, say)
    name = named(args, "grow" if args.grow else "", args.device)
    write_rounds(args.out / f"{name.replace(' ', '-')}.csv", rows)
    images = [one.plain for row in rows for one in row.rounds]
    text = f"**{setup}**\n\n{added_table(args.shape, rows)}\n"
    text += f"A plain image of {STEPS} steps with guidance takes {statistics.median(images):.4g} s"
    text += f" (median; {min(images):.4g} to {max(images):.4g}; extrapolated). Medians over {args.rounds} rounds as "
    text += (
        f"median [least, greatest], each layer {PAIRS} times in turn with and without the face; percentages are of "
    )
    text += f"a plain image. {machine(setup)}"
    deliver(args, name, text)


def grow(args: argparse.Namespace) -> None:
    """Measure how the cost grows."""
    from .measure import measure
    from .report import foot, growth_plot, growth_table, write_csv
    from .variants import growth

    setup = one_setup(args)
    sweeps = growth(setup.sizes)
    if unknown := set(args.sweeps or ()) - sweeps.keys():
        raise SystemExit(f"no sweep {min(unknown)!r}; there are: {', '.join(map(repr, sweeps))}")
    measured = {name: measure(setup, sweeps[name], args.rounds, say) for name in args.sweeps or sweeps}
    name = named(args, args.device)
    write_csv(
        args.out / f"{name.replace(' ', '-')}.csv", [result for results in measured.values() for result in results]
    )
    draw(args, name, growth_plot, measured)
    deliver(args, name, f"**{setup}**\n\n{growth_table(measured)}\n{foot(setup, args.rounds)}")


REGION_CASES = [(people, tokens) for tokens in (1024, 4096) for people in (2, 3)]  # references of 256 and 512 px


def regions(args: argparse.Namespace) -> None:
    """Several people at the finest layer of Stable Diffusion 1.5: queries grouped by region against a dense mask."""
    from .measure import in_own_process
    from .regions import Layer, added_bytes, measure_layer, region_row, region_table
    from .report import machine

    setup = one_setup(args)
    if args.case:
        people, tokens, way = args.case.split(",")
        print(json.dumps(added_bytes(int(people), int(tokens), way, setup)))
        return
    rows = []
    for people, tokens in REGION_CASES:
        memory = {
            way: in_own_process(["regions", "--case", f"{people},{tokens},{way}", *setup.options()])
            for way in ("grouped", "dense")
        }
        times = measure_layer(Layer.create(people, tokens, setup), setup, args.rounds)
        rows.append(region_row(people, tokens, times, memory))
    note = f"One row of a batch, 4096 queries, 8 heads of 40. Medians over {args.rounds} alternating rounds, memory "
    note += f"each in a process of its own. {machine(setup)}"
    deliver(args, named(args, args.device), f"{region_table(rows)}\n{note}")


def draw(args: argparse.Namespace, name: str, plot: Callable[..., None], data: Any) -> None:
    """Plot, where matplotlib is installed."""
    from .report import plots_possible

    if plots_possible():
        plot(args.out / f"{name.replace(' ', '-')}.png", data)
    else:
        say("no plot: matplotlib is not installed")


def alone(args: argparse.Namespace) -> None:
    """First image and peak memory of one variant, as JSON; `compare` starts this in processes of their own."""
    from .measure import first_image
    from .variants import comparison

    setup = one_setup(args)
    variant = next(variant for variant in comparison(setup.sizes) if variant.label == args.label)
    print(json.dumps(first_image(setup, variant)))


def profile(args: argparse.Namespace) -> None:
    """Time by operator of plain calls and of a variant's, and the difference."""
    from .measure import operator_seconds
    from .report import machine
    from .variants import comparison

    setup = one_setup(args)
    variants = {variant.label: variant for variant in chosen(comparison(setup.sizes), args.variants)}
    model = setup.model()
    times = {label: operator_seconds(setup, variant.build(model)) for label, variant in variants.items()}
    text = ""
    for label in [label for label in variants if label != COMPARED_WITH]:
        plain, mine = times[COMPARED_WITH], times[label]
        added = {name: mine.get(name, 0.0) - plain.get(name, 0.0) for name in {*plain, *mine}}
        most = sorted(added, key=lambda name: -abs(added[name]))[: args.rows]
        rows = [[name, plain.get(name, 0.0), mine.get(name, 0.0), added[name]] for name in most]
        rows.append(["all", sum(plain.values()), sum(mine.values()), sum(added.values())])
        text += f"**{label}**\n\n{markdown_table(['operator', 'plain, s', 'with, s', 'added, s'], rows)}\n"
    text += f"One call of {setup.steps} steps each, under the profiler. {machine(setup)}"
    deliver(args, named(args, args.device), text)


def training(args: argparse.Namespace) -> None:
    """Time a step of Face Fusion training beside a bare forward and backward of the same UNet."""
    from .training import measure_training, training_table

    text = []
    for setup in setups(args):
        if setup.compile != "none" or setup.attention != "default":
            raise SystemExit("training measures the loop as it is: leave --compile and --attention out")
        reference = args.reference or setup.sizes.reference
        found = measure_training(setup, reference, args.batch, args.steps, args.rounds)
        text.append(training_table(setup, reference, args.batch, found))
    deliver(args, named(args, args.device), "\n".join(text))


def load(args: argparse.Namespace) -> None:
    """Import and load adapter weights, ours and diffusers' in alternation."""
    from safetensors.torch import save_file

    from face_fusion_pipeline import StableDiffusionFaceFusionPipeline

    from .measure import import_seconds, seconds
    from .report import machine, ratio
    from .variants import ip_adapter_weights

    setup = one_setup(args)
    model = setup.model()
    with tempfile.TemporaryDirectory() as folder:
        ours = model.pipeline(StableDiffusionFaceFusionPipeline)
        ours.save_face_fusion_adapter(folder)
        weights = ip_adapter_weights(model, "plus")
        flat = {f"{part}.{key}": tensor for part, tensors in weights.items() for key, tensor in tensors.items()}
        save_file({key: tensor.contiguous() for key, tensor in flat.items()}, Path(folder) / "ip.safetensors")
        extra = {"image_encoder": model.image_encoder, "feature_extractor": model.feature_extractor}
        theirs = model.pipeline(**extra)
        tasks: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
            "import of the pipeline": (
                lambda: import_seconds("from face_fusion_pipeline import StableDiffusionFaceFusionPipeline"),
                lambda: import_seconds("from diffusers import StableDiffusionPipeline"),
            ),
            "adapter from disk": (
                lambda: seconds(lambda: ours.load_face_fusion_adapter(folder)),
                lambda: seconds(
                    lambda: theirs.load_ip_adapter(folder, "", "ip.safetensors", image_encoder_folder=None)
                ),
            ),
        }
        rows = []
        for name, (mine, other) in tasks.items():
            mine(), other()  # warm the disk's cache
            pairs = [(mine(), other()) for _ in range(args.rounds)]
            medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
            rows.append([name, *medians, medians[0] - medians[1], ratio([a / b for a, b in pairs])])
    table = markdown_table(["", "Face Fusion, s", "diffusers, s", "difference, s", "ratio"], rows)
    note = "diffusers: `StableDiffusionPipeline`, and an IP-Adapter plus without its image encoder."
    deliver(args, named(args), f"{table}\n{note} Medians over {args.rounds} rounds in alternation. {machine(setup)}")


def soak(args: argparse.Namespace) -> None:
    """Call after call with another face each, watching memory and recompilation."""
    from face_fusion_pipeline import StableDiffusionFaceFusionPipeline

    from .measure import Job, device_bytes, graphs_counted, slope
    from .report import machine
    from .shapes import picture
    from .variants import settings

    setup = one_setup(args)
    model = setup.model()
    side = model.shape.small
    pipe = model.pipeline(StableDiffusionFaceFusionPipeline)
    setup.prepare(Job(pipe, pipe))
    used, graphs = [], []
    with graphs_counted() as compiled:
        for call in range(args.calls):
            identity = pipe.encode_face(picture(call, side), face_resolution=side)
            pipe(**settings(model, None, 1), face_image=identity, num_inference_steps=setup.steps)
            used.append(device_bytes(setup))
            graphs.append(compiled())
            if (call + 1) % 20 == 0:
                say(f"{call + 1} calls, {used[-1] / 2**20:.1f} MiB, {graphs[-1]} graphs")
    warm = min(2, len(used) - 1)  # what the first calls take is kept, not leaked
    rows = [
        ["memory after the first call, MiB", used[0] / 2**20],
        ["memory after the last call, MiB", used[-1] / 2**20],
        ["growth a call over the second half, KiB", slope(used) / 2**10],
        ["graphs compiled in the first two calls", graphs[warm - 1] if warm else graphs[0]],
        ["graphs compiled after that", graphs[-1] - (graphs[warm - 1] if warm else graphs[0])],
    ]
    table = markdown_table([f"{args.calls} calls, another face in each", str(setup)], rows)
    deliver(args, named(args, args.device), f"{table}\n{machine(setup)}")


# --- Command line ------------------------------------------------------------------------------------------------

COMMANDS = {
    command.__name__: command
    for command in (floor, compare, added, grow, regions, profile, training, load, soak, alone)
}
DEFAULT_STEPS = {"sd15": 3, "sdxl": 2, "avatar": 20, "tiny": 2, "tiny-xl": 2}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run in COMMANDS.items():
        command = commands.add_parser(name, help=(run.__doc__ or "").splitlines()[0])
        add = command.add_argument
        add("--shape", choices=DEFAULT_STEPS, default="sd15", help="model (default: sd15; sdxl: random, too)")
        add("--device", choices=("cpu", "cuda"), default="cpu")
        add("--dtype", nargs="+", default=["float32"], choices=("float32", "float16", "bfloat16"))
        add("--compile", nargs="+", default=["none"], metavar="BACKEND", help="none, or a torch.compile backend")
        add("--attention", nargs="+", default=["default"], help="default, flash, efficient, cudnn, math")
        add("--steps", type=int, help="denoising steps that are run, 2 or more; 20 are extrapolated from them")
        add("--threads", type=int, default=0, help="CPU threads (default: PyTorch's choice)")
        add("--out", type=Path, default=Path("benchmarks/results"))
        add("--page", nargs="?", type=Path, const=PAGE, help="also put the tables into benchmarks/README.md")
        add("--tag", default="", help="a word at the end of the result's name")
        if name in ("compare", "added", "grow", "load", "regions", "training"):
            add("--rounds", type=int, default=5)
        if name == "added":
            add("--grow", action="store_true", help="more references, people and reference pixels instead")
        if name in ("compare", "added", "profile"):
            add("--variants", nargs="+", help="labels of the rows (default: all)")
        if name == "compare":
            add(
                "--no-alone",
                dest="alone",
                action="store_false",
                help="skip first image and memory: processes of their own",
            )
        if name == "grow":
            add("--sweeps", nargs="+", help='of "references", "people", "reference px", "output px", "batch"')
        if name == "profile":
            add("--rows", type=int, default=12)
        if name == "training":
            add("--batch", type=int, default=1)
            add("--reference", type=int, metavar="PIXELS", help="side of the reference (default: as the shape trains)")
        if name == "soak":
            add("--calls", type=int, default=200)
        if name == "alone":
            add("--label", required=True)
        if name == "regions":
            add("--case", help=argparse.SUPPRESS)  # PEOPLE,TOKENS,WAY: print the memory of this one and end
    args = parser.parse_args(argv)
    args.steps = args.steps or DEFAULT_STEPS[args.shape]
    if args.steps < 2:
        parser.error("--steps must be 2 or more: time a step is the distance between two of them")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    args = parse(argv)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
