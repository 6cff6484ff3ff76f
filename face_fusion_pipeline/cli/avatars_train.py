"""`face-fusion avatars-train`: train one part of the avatar Stable Diffusion; the adapter is `face-fusion train`'s."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..face_errors import FaceFusionError
from ._arguments import AVATAR_SIDE, COUNT, DECAY, FRACTION, POSITIVE, POWER, RATE, SEED, THREADS, real, whole


if TYPE_CHECKING:
    from ..avatars.training.data import AvatarImages
    from ..avatars.training.presets import Preset
    from ..training.loop import LoopOptions, Task

HELP = (
    "train a part of the avatar model (vae, clip, unet, controlnet, prior), a face embedder, or a measure (traits, "
    "drawing)"
)
MEASURES = ("traits", "drawing")
OWN_PORTRAITS = (*MEASURES, "landmarks")  # stages that draw what they learn from
STAGES = ("vae", "clip", "unet", "controlnet", "prior", "face-embedder", "crop-embedder", *OWN_PORTRAITS)
PORTRAITS = {"train": 24000, "validation": 2000}  # that measures learn from, and are tried on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train one part and write it into a diffusers folder. Order: vae, clip, unet, controlnet; after clip also the "
        "prior, which makes embeddings of pictures from text, for FaceStudio. A run that was "
        "killed goes on from its last checkpoint when the same command is given again. Face Fusion weights for the "
        "result are trained as for any other checkpoint: `face-fusion prepare` and `face-fusion train`. A face "
        "embedder is not part of the model: "
        "it can be asked for in the training of Face Fusion weights (identity loss). A crop embedder, by which "
        "FaceStudio knows faces, continues from it; its --data is a folder that `face-fusion prepare avatars:N` made "
        "for the embedded model. Traits "
        "and drawing are measures of `face-fusion avatars-evaluate table`: they learn from portraits of their own, "
        "which --data keeps."
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", type=Path, required=True, help="dataset with train/ and validation/")
    parser.add_argument("--out", type=Path, required=True, help="model folder; logs go to its logs/")
    parser.add_argument("--preset", choices=("cpu", "gpu"), default="cpu", help="sizes and options (default: cpu)")
    parser.add_argument("--images", type=COUNT, help="use only the first so many training images")
    parser.add_argument(
        "--render", type=COUNT, metavar="N", help="render N training images on the device instead; --data takes caches"
    )
    parser.add_argument("--size", type=AVATAR_SIDE, help="pixels of a rendered image's side (default: 128)")
    parser.add_argument("--world", type=whole(1, 2), help="traits, drawing, landmarks: of the people (default: 1)")
    parser.add_argument("--threads", type=THREADS, help="CPU threads of torch (default: torch decides)")
    parser.add_argument(
        "--processes",
        type=whole(1, 256),
        default=1,
        help="share each batch among so many processes, one thread each on a CPU: on 2 cores 1.6 times as quick",
    )
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="go on from a checkpoint if any")
    parser.add_argument("--continue-from", type=Path, metavar="MODEL", help="start from the weights of this folder")
    parser.add_argument("--export-only", action="store_true", help="write the last checkpoint into --out, no training")

    length = parser.add_argument_group("training; what is not given comes from the preset")
    length.add_argument("--steps", type=COUNT, help="length of the training")
    length.add_argument(
        "--minutes", type=POSITIVE, help="limit by time; the learning rate decays with the elapsed part"
    )
    length.add_argument("--batch-size", type=COUNT, help="images of a step")
    length.add_argument("--lr", type=RATE, help="learning rate")
    length.add_argument("--warmup", type=whole(0), help="steps")
    length.add_argument("--schedule", choices=("cosine", "linear"))
    length.add_argument("--weight-decay", type=FRACTION, help="of AdamW")
    length.add_argument("--ema-decay", type=DECAY, help="of the averaged weights")
    length.add_argument("--seed", type=SEED, help="of weights, data and noise")
    length.add_argument("--precision", choices=("auto", "no", "bf16", "fp16"), help="auto: bf16 where it is quick")
    length.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="memory format of convolutions")
    length.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the training step")
    length.add_argument("--checkpoint-minutes", type=POSITIVE, help="between two checkpoints")
    length.add_argument("--sample-minutes", type=POSITIVE, help="between two looks at the validation images")

    length.add_argument("--face-loss-weight", type=POSITIVE, help="unet: loss weight in face boxes (default: 3)")

    vae = parser.add_argument_group("vae")
    vae.add_argument("--decoder-only", action="store_true", help="train the decoder on, latents stay as they are")
    vae.add_argument("--latent-noise", type=real(), help="largest noise on latents, over their deviation")

    vae.add_argument("--equivariance", type=real(), help="weight of the loss on shrunken latents; 0 for none")

    controlnet = parser.add_argument_group("controlnet")
    controlnet.add_argument(
        "--control",
        choices=("depth", "landmarks"),
        help="what it sees: depth maps, or dots at the facial points, without text (default: depth)",
    )

    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "--verdicts",
        type=Path,
        metavar="FILE",
        help="judged eyes, FILE.json and FILE.webp (default: the package's, for 128 pixels of the first world)",
    )

    unet = parser.add_argument_group("unet")
    unet.add_argument(
        "--timestep-power", type=POWER, help="timesteps are T u^P: above 1 more often the less noisy ones (default: 1)"
    )


ONLY_FOR = {
    "face_loss_weight": "unet",
    "timestep_power": "unet",
    "decoder_only": "vae",
    "latent_noise": "vae",
    "equivariance": "vae",
    "verdicts": "drawing",
    "control": "controlnet",
}


def check_arguments(args: argparse.Namespace) -> None:
    """Raise [`FaceFusionError`] for an option that would do nothing."""
    for name, stage in ONLY_FOR.items():
        if getattr(args, name) not in (None, False) and args.stage != stage:
            raise FaceFusionError(f"--{name.replace('_', '-')} is for the stage {stage}, not {args.stage}")
    if args.render and args.images:
        raise FaceFusionError("--render says how many images there are: leave --images out")
    if args.world and args.stage not in OWN_PORTRAITS:
        raise FaceFusionError(f"--world is for the stages {', '.join(OWN_PORTRAITS)}, not {args.stage}")
    if args.images and args.stage in OWN_PORTRAITS:
        raise FaceFusionError(f"the stage {args.stage} draws its own images: say how many with --render")
    if args.size and args.size % 32 and args.stage in MEASURES:
        raise FaceFusionError(f"--size is {args.size}: for the stage {args.stage} choose a multiple of 32")
    if args.size and not args.render and args.stage not in OWN_PORTRAITS:
        raise FaceFusionError("--size is for --render: images from disk have a size of their own")


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    if args.processes > 1 and "RANK" not in os.environ:
        return in_processes(args.processes)

    import torch

    from ..avatars.training.data import load_avatars, render_avatars
    from ..avatars.training.presets import PRESETS
    from ..training.loop import train

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed or 0)  # the initial weights
    preset = PRESETS[args.stage][args.preset]
    options = loop_options(preset.loop, args)
    if args.stage == "crop-embedder":
        task = crop_embedder_task(args)
    elif args.stage in OWN_PORTRAITS:
        data, validation = (own_portraits(args, split) for split in PORTRAITS)
    elif args.render:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        depth = args.stage == "controlnet" and args.control != "landmarks"
        size = args.size or 128
        data = render_avatars(args.data, "train", args.render, device, size, depth=depth)
        held_out = max(1, min(args.render // 4, 2000))
        validation = render_avatars(args.data, "validation", held_out, device, size, depth=depth)
    else:
        data = load_avatars(args.data, "train", args.images)
        validation = load_avatars(args.data, "validation")
    if args.stage != "crop-embedder":
        task = create_task(args, preset, data, validation)
    record = train(task, options, args.out, export_only=args.export_only, source=args.continue_from)
    if os.environ.get("RANK", "0") == "0":
        print(f"{args.stage}: {record['steps']} steps in {record['seconds'] / 60:.1f} minutes, written to {args.out}")
    return 0


def crop_embedder_task(args: argparse.Namespace) -> Task:
    """Of the face crops of a prepared folder, from `--continue-from` or from the face embedder of trainings."""
    from ..avatars.training.crop_embedder import CropEmbedderTask
    from ..avatars.training.face_embedder import SHIPPED
    from ..face_embedders import load_avatar_embedder
    from ..generation.avatar_model import embedded_model
    from ..training.base_model import load_base
    from ..training.latent_cache import cache_folders
    from ..training.preparation import is_prepared

    if not is_prepared(args.data):
        raise FaceFusionError(f"{args.data} is not prepared: `face-fusion prepare avatars:20000 --out {args.data}`")
    base = load_base(embedded_model())
    source = (args.continue_from or SHIPPED) / "face_embedder.safetensors"
    return CropEmbedderTask(load_avatar_embedder(source), args.data, cache_folders(args.data, base), base)


def own_portraits(args: argparse.Namespace, split: str) -> AvatarImages:
    """What measures learn from: drawn at first, by as many processes as there are threads to be used."""
    from ..avatars.measures.portraits import draw_portraits

    count = min(args.render or PORTRAITS["train"], PORTRAITS[split])
    processes = args.threads or os.cpu_count() or 1
    return draw_portraits(args.data, split, count, size=args.size or 128, world=args.world, processes=processes)


def in_processes(count: int) -> int:
    """Run this same command line in `count` processes that know of each other; the exit status of the group."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run([sys.executable, *launcher, "-m", "face_fusion_pipeline", *sys.argv[1:]]).returncode


def loop_options(defaults: LoopOptions, args: argparse.Namespace) -> LoopOptions:
    """The preset's options with those that were given on the command line; --minutes alone lifts the step limit."""
    given = {f.name: getattr(args, f.name, None) for f in fields(defaults)}
    options = replace(defaults, **{name: value for name, value in given.items() if value is not None})
    return replace(options, steps=None) if args.minutes is not None and args.steps is None else options


def create_task(args: argparse.Namespace, preset: Preset, data: AvatarImages, validation: AvatarImages) -> Task:
    """The networks of the stage, new or from `--continue-from`, as a task."""
    from ..training.loop import process_group

    source: Path | None = args.continue_from
    if args.stage == "vae":
        from diffusers import AutoencoderTiny

        from ..avatars.training.vae import VaeTask, create_vae

        if args.decoder_only:
            source = source or args.out
        vae = AutoencoderTiny.from_pretrained(source / "vae") if source else create_vae(**preset.network)
        given = {name: getattr(args, name) for name in ("latent_noise", "equivariance")}
        given = {name: value for name, value in given.items() if value is not None}
        return VaeTask(vae, data, validation, decoder_only=args.decoder_only, **given)
    if args.stage == "clip":
        from ..avatars.training.clip import ClipTask, create_clip
        from ..avatars.training.tokenizer import load_tokenizer, train_tokenizer
        from ..evaluation.clip_score import load_clip

        known = source or args.out  # a model folder that has a tokenizer keeps it
        has_one = (known / "tokenizer").is_dir()
        tokenizer = load_tokenizer(known) if has_one else train_tokenizer(data.captions)
        clip = load_clip(source) if source else create_clip(tokenizer, data.pixels.shape[-1], **preset.network)
        return ClipTask(clip, tokenizer, data, validation)
    if args.stage == "unet":
        from ..avatars.training.unet import UnetTask, create_unet, load_frozen, load_unet_for

        frozen = load_frozen(args.out).to(process_group().device)
        if source:
            unet = load_unet_for(frozen, source, data.captions[:1000])
        else:
            unet = create_unet(frozen, data.pixels.shape[-1], **preset.network)
        given = {"face_weight": args.face_loss_weight, "timestep_power": args.timestep_power}
        given = {name: value for name, value in given.items() if value is not None}
        return UnetTask(unet, frozen, data, validation, **given)
    if args.stage == "prior":
        from diffusers import PriorTransformer

        from ..avatars.training.prior import PriorTask, create_prior
        from ..avatars.training.tokenizer import load_tokenizer
        from ..evaluation.clip_score import is_pipeline_folder, load_clip

        if not is_pipeline_folder(args.out):
            raise FaceFusionError(f"{args.out / 'clip_score'} does not exist: train the stage `clip` first")
        clip = load_clip(args.out).to(process_group().device)
        prior = PriorTransformer.from_pretrained(source / "prior") if source else create_prior(clip, **preset.network)
        return PriorTask(prior, clip, load_tokenizer(args.out), data, validation)
    if args.stage == "face-embedder":
        from ..avatars.training.face_embedder import FaceEmbedderTask, TrainingEmbedder, load_training_embedder

        return FaceEmbedderTask(load_training_embedder(source) if source else TrainingEmbedder(), data, validation)
    if args.stage == "landmarks":
        from ..avatars.face_model import FaceEstimator, load_avatar_face_model
        from ..avatars.training.landmarks import LandmarksTask

        estimator = load_avatar_face_model(source).estimator if source else FaceEstimator()
        return LandmarksTask(estimator, data, validation, args.world)
    if args.stage == "traits":
        from ..avatars.measures.traits import TraitNetwork, load_traits
        from ..avatars.measures.traits_training import TraitsTask

        return TraitsTask(load_traits(source).network if source else TraitNetwork(), data, validation, args.world)
    if args.stage == "drawing":
        from ..avatars.measures.drawing import EyeNetwork, load_eye_evaluator
        from ..avatars.measures.drawing_training import DrawingTask
        from ..avatars.measures.verdicts import SHIPPED, read_verdicts

        usual = args.verdicts is None and (args.size or 128) == 128 and (args.world or 1) == 1
        verdicts = read_verdicts(args.verdicts or SHIPPED) if args.verdicts or usual else None
        network = load_eye_evaluator(source).network if source else EyeNetwork()
        return DrawingTask(network, data, validation, verdicts, args.world)
    from ..avatars.training.controlnet import ControlNetTask, create_controlnet, load_controlnet_for
    from ..avatars.training.unet import load_frozen, load_unet

    frozen, base = load_frozen(args.out).to(process_group().device), load_unet(args.out)
    control = args.control or "depth"
    if source:
        controlnet = load_controlnet_for(frozen, base, source, data.captions[:1000], control)
    else:
        controlnet = create_controlnet(base, reads_text=control == "depth")
    return ControlNetTask(controlnet, base, frozen, data, validation, control)
