"""`face-fusion evaluate`: likeness, copying, prompt and quality of pictures of people, with tables and plots."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_errors import FaceFusionError
from ..generation.arguments import METHODS, check_model, guidance_scales
from ..generation.avatar_model import embedded_model
from ..generation.loading import ADAPTER_FILE, defaults_beside, usable_device
from ._arguments import COUNT, GUIDANCE, GUIDED, SEED, STEPS, STRENGTH, Gather, whole


if TYPE_CHECKING:
    from ..evaluation.generation import Settings
    from ..evaluation.people import Person
    from ..evaluation.picture_rows import PicturePanel
    from ..evaluation.pictures import Picture

HELP = "measure likeness, copying, prompt and quality on people of your own, with tables and plots"
PACKAGES = ("matplotlib", "pyarrow", "scipy", "torchmetrics")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Generate pictures of people (--prompts), or take those that exist (--images), and compare the methods. A run "
        "that was stopped goes on when the same command is given again; several processes: accelerate launch -m "
        "face_fusion_pipeline evaluate ..."
    )
    parser.add_argument(
        "--identities",
        required=True,
        metavar="DIR",
        help="one folder of photos for each person, or what `avatars-dataset` or `prepare` wrote; the first photo of "
        "a person is the reference, the others tell likeness from copying",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for pictures, rows and tables")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line: generate pictures of them")
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures that exist, with a metadata.jsonl")
    parser.add_argument("--max-identities", type=COUNT, metavar="N", help="only the first N people")
    parser.add_argument(
        "--multiid-bench",
        action="store_true",
        help="also write the pictures in the folder layout of MultiID-Bench, for scorers of others: OUT/multiid_bench",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_generation(parser.add_argument_group("generation"))
    _add_evaluators(parser.add_argument_group("what looks at the pictures"))


def _add_generation(group: Any) -> None:
    group.add_argument(
        "--model", metavar="DIR_OR_HUB_ID", help="Stable Diffusion 1.x, 2.x or XL model; default: the avatars"
    )
    group.add_argument(
        "--adapter",
        metavar="DIR_OR_FILE_OR_HUB_ID",
        help=f"trained Face Fusion weights; default: {ADAPTER_FILE} in the model's folder, if any",
    )
    group.add_argument(
        "--methods",
        nargs="+",
        action=Gather,
        choices=METHODS,
        metavar="METHOD",
        help="of none, training-free, adapter (default: all that can be), both, and the last three with -mirrored, "
        "where the mirrored reference is a second one",
    )
    group.add_argument("--people", type=whole(1, 8), default=1, metavar="N", help="people in each picture")
    group.add_argument(
        "--images-per-prompt",
        type=whole(1, 1000),
        default=1,
        metavar="N",
        help="pictures of each person by each prompt and method",
    )
    group.add_argument("--steps", type=STEPS, default=25, help="denoising steps")
    group.add_argument(
        "--guidance",
        type=GUIDANCE,
        help="classifier-free guidance; 1 is off; default: as the model recommends (the avatars: 4, then 2), else 5",
    )
    group.add_argument(
        "--low-noise-guidance", type=GUIDED, help="in the low-noise half of the timesteps; default: the same"
    )
    group.add_argument("--scale", type=STRENGTH, default=1.0, help="strength of the face with the adapter")
    group.add_argument("--training-free-scale", type=STRENGTH, default=1.0, help="strength of the face without it")
    group.add_argument("--self-scale", type=STRENGTH, default=4.0, help="strength at the self-attention, times these")
    group.add_argument("--seed", type=SEED, default=0, help="of the noise")
    group.add_argument("--batch-size", type=whole(1, 1000), default=4, help="pictures denoised together (memory)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto")


def _add_evaluators(group: Any) -> None:
    group.add_argument(
        "--recogniser",
        action="append",
        default=[],
        metavar="SPEC",
        help="NAME=FILE.onnx[:PREPROCESSING] (arcface, imagenet or raw), insightface[:PACK], deepface:Facenet512, "
        "deepface:VGG-Face, ...; repeat for several",
    )
    group.add_argument("--recognisers", type=Path, metavar="DIR", help="folder of recognisers as .onnx files")
    group.add_argument("--expression", type=Path, metavar="FILE.onnx", help="classifier of expressions, 112x112 crops")
    group.add_argument("--clip", metavar="DIR_OR_HUB_ID", help="CLIP; default: the model's own, else one in the cache")
    group.add_argument("--evaluators", nargs="?", type=Path, const=Path(), metavar="DIR",
                       help="the evaluators of avatars; on by themselves with an avatar model")  # fmt: skip
    group.add_argument(
        "--no-evaluators", action="store_const", const=False, dest="evaluators", help="without these evaluators"
    )
    group.add_argument("--detector", choices=("auto", "yunet", "haar", "insightface"), default="auto")
    group.add_argument("--detector-model", metavar="FILE", help="the detector's own model file")


def run(args: argparse.Namespace) -> int:
    check_arguments(args)

    from ..evaluation.comparison import evaluate
    from ..evaluation.comparison_tables import as_markdown
    from ..evaluation.generation import pipeline_of
    from ..evaluation.multiid_bench import FOLDER as MULTIID_BENCH
    from ..evaluation.multiid_bench import write_multiid_bench
    from ..evaluation.people import read_people
    from ..evaluation.pictures import photos_to_compare

    model = args.model or str(embedded_model())
    people = read_people(args.identities, args.max_identities, exclude=(args.out,))
    settings = _settings(args, model) if args.prompts is not None else None
    pictures = _pictures(args, people, settings)
    device = _device(args.device)
    panel, left_out = _panel(args, people, model if settings is not None else args.model, device)
    if max(len(picture.people) for picture in pictures) == 1:
        pictures += photos_to_compare(people)
    result = evaluate(
        pictures,
        panel,
        args.out,
        settings=settings,
        load_pipeline=None if settings is None else lambda: pipeline_of(settings, str(device)),
        left_out=left_out,
        seed=args.seed,
    )
    if result is not None:
        if args.multiid_bench:
            left = write_multiid_bench(pictures, panel.people, args.out / MULTIID_BENCH)
            for name, why in left.items():
                print(f"face-fusion: not in {MULTIID_BENCH}: {name}: {why}", file=sys.stderr)
        print(json.dumps(result, indent=1) if args.json else as_markdown(result))
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before torch is imported. Raises [`FaceFusionError`]."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise FaceFusionError(f"evaluate needs {missing[0]}: pip install 'face-fusion-pipeline[evaluate]'")
    if args.prompts is None and args.images is None:
        raise FaceFusionError("nothing to evaluate: give --prompts FILE to generate, or --images DIR, or both")
    if args.model is not None and args.prompts is not None:
        check_model(args.model)
    defaults = None if args.prompts is None else defaults_beside(args.model)
    args.guidance, args.low_noise_guidance = guidance_scales(args.guidance, args.low_noise_guidance, defaults)


def _settings(args: argparse.Namespace, model: str) -> Settings:
    from ..evaluation.generation import Settings, keep_settings, needs_adapter
    from ..training.loop import process_group

    adapter = args.adapter or (model if (Path(model) / ADAPTER_FILE).is_file() else None)
    settings = Settings.of(
        model,
        adapter,
        dtype=args.dtype,
        steps=args.steps,
        guidance_scale=args.guidance,
        low_noise_guidance=args.low_noise_guidance,
        face_scale=args.scale,
        training_free_scale=args.training_free_scale,
        self_scale=args.self_scale,
        seed=args.seed,
        batch=args.batch_size,
    )
    if settings.adapter is None and any(map(needs_adapter, args.methods or ())):
        raise FaceFusionError(f"--methods adapter: {model} has no {ADAPTER_FILE}, name one with --adapter")
    with process_group().main_process_first():
        keep_settings(args.out, settings)
    return settings


def _pictures(args: argparse.Namespace, people: list[Person], settings: Settings | None) -> list[Picture]:
    """Those to be made, then those that exist; the first are listed, so that `--images` can read them too."""
    from ..evaluation.generation import METHODS as USUAL
    from ..evaluation.generation import needs_adapter
    from ..evaluation.pictures import list_pictures, plan_pictures, read_pictures, read_prompts
    from ..training.loop import process_group

    pictures: list[Picture] = []
    if settings is not None:
        methods = args.methods or [m for m in USUAL if settings.adapter is not None or not needs_adapter(m)]
        folder = args.out / "images"
        pictures = plan_pictures(
            people,
            read_prompts(args.prompts),
            methods,
            folder,
            together=args.people,
            per_prompt=args.images_per_prompt,
            seed=args.seed,
        )
        with process_group().main_process_first():
            if process_group().is_main_process:
                list_pictures(pictures, folder)
    return pictures + (read_pictures(args.images, people) if args.images is not None else [])


def _panel(
    args: argparse.Namespace, people: list[Person], model: str | None, device: Any
) -> tuple[PicturePanel, dict[str, str]]:
    """All that looks at the pictures; a model of avatars brings its CLIP and the evaluators of avatars along."""
    from ..avatars.evaluation.evaluators import SHIPPED, load_evaluators
    from ..evaluation.clip_score import is_pipeline_folder
    from ..evaluation.picture_panel import load_panel
    from ..face_detectors import load_detector

    avatars = model is not None and is_pipeline_folder(Path(model))
    evaluators = (
        SHIPPED if args.evaluators == Path() or (avatars and args.evaluators is None) else args.evaluators or None
    )
    return load_panel(
        {person.name: person for person in people},
        load_detector(args.detector, args.detector_model),
        recognisers=args.recogniser,
        folder=args.recognisers,
        expression=args.expression,
        clip=args.clip or (model if avatars else None),
        evaluators=load_evaluators(evaluators) if evaluators is not None else None,
        device=device,
    )


def _device(name: str) -> Any:
    """The device of this process; Accelerate knows which, for "auto". Raises [`FaceFusionError`]."""
    import torch

    from ..training.loop import process_group

    return process_group().device if name == "auto" else torch.device(usable_device(name))
