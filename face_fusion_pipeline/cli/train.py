"""`face-fusion train`: train Face Fusion weights for a Stable Diffusion checkpoint on one's own photos.

Options are those of diffusers' training scripts with `-` for `_`; `examples/train_face_fusion.py` takes them as they
are. Several processes: `accelerate launch -m face_fusion_pipeline train ...`, or `torchrun` in its place.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generation.arguments import add_version_arguments, check_version
from ._train_options import add_arguments, check_arguments, command_line, loss_options, resume
from ._train_snap import create_snap_task
from ._train_studio import create_studio_task
from .prepare import (
    add_selection_arguments,
    add_source_arguments,
    first_look,
    given_words,
    load,
    prepare_photos,
)


if TYPE_CHECKING:
    from PIL import Image

    from ..face_adapter import FaceFusionAdapter
    from ..training.base_model import BaseModel
    from ..training.loop import LoopOptions
    from ..training.pairs import Pairs
    from ..training.samples import Samples
    from ..training.task import FaceFusionTask

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train Face Fusion weights for a Stable Diffusion model on your own photos"


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    check_version(args.model, args.revision, args.variant, args.model_config)

    import torch

    from ..publishing.hub import create_repository, upload
    from ..publishing.repository import repository_files
    from ..training.loop import process_group, train
    from ..training.model_card import write_card

    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(args.seed)  # of --init xavier
    processes = process_group()
    repository = None
    if args.push_to_hub and processes.is_main_process:
        repository = create_repository(args.hub_model_id or args.out.resolve().name, args.hub_private_repo)
    base = load(args.model, args)
    folder = prepared_folder(args, base)
    task = create_task(args, base, folder)
    base.schedule = replace(base.schedule, alphas=base.schedule.alphas.to(base.unet.device))  # read in every step
    options = loop_options(args, task.size, processes.num_processes)
    earlier = args.init_adapter.parent if args.init_adapter and args.init_adapter.is_file() else args.init_adapter
    record = train(task, options, args.out, source=earlier)
    if processes.is_main_process:
        write_card(args.out, args.model, folder, task, record, command_line(args))
        minutes = record["seconds"] / 60
        print(f"{record['steps']} steps of {options.batch_size} in {minutes:.1f} minutes, written to {args.out}")
        print(where_samples_lie(args.out / "logs" / task.name))
        if repository is not None:
            print(upload(repository_files(args.out, repository), repository))
    return 0


def where_samples_lie(logs: Path) -> str:
    """The pictures that were drawn meanwhile, or how to have some."""
    from ..training.model_card import SAMPLES

    drawn = sorted(logs.glob(SAMPLES))
    if not drawn:
        return "no pictures were drawn meanwhile: --validation-prompt TEXT draws people set aside"
    return f"{len(drawn)} sheets of pictures drawn meanwhile: {logs}; the last is {drawn[-1].name}"


def prepared_folder(args: argparse.Namespace, base: BaseModel) -> Path:
    """The prepared data, made in `OUT/prepared` if `--data` is something else, with latents for this base."""
    from ..training.latent_cache import encode, is_encoded
    from ..training.loop import process_group
    from ..training.preparation import is_prepared
    from ..training.sources import DataError

    folder = Path(args.data)
    ready = folder if is_prepared(folder) else args.out / "prepared"
    if ready == folder:
        check_prepared(args, folder)
    if process_group().num_processes > 1 and not (is_prepared(ready) and is_encoded(ready, base, args.augmentations)):
        words = ["face-fusion", "prepare", args.data, "--model", args.model, "--out", str(ready)]
        for add in (add_version_arguments, add_source_arguments, add_selection_arguments):
            words += given_words(args, add)
        raise DataError(f"several processes need prepared data: first `{shlex.join(words)}`, in one process")
    if ready != folder and process_group().num_processes == 1:
        prepare_photos(first_look(args.data, args), ready, args, base)
    if not is_encoded(ready, base, args.augmentations):
        encode(ready, base, args.augmentations)
    return ready


def check_prepared(args: argparse.Namespace, folder: Path) -> None:
    """Raise `DataError` where an option asks for other photos than those that the prepared `folder` holds."""
    from ..training.preparation import read_report
    from ..training.sources import DataError

    settings = read_report(folder)["settings"]
    words = given_words(args, add_selection_arguments)
    for option in [word for word in words if word.startswith("--")]:
        name = option[2:].replace("-", "_")
        if name in settings and getattr(args, name) != settings[name]:
            raise DataError(
                f"{folder} was prepared with {option} {settings[name]}, not {getattr(args, name)}: leave the option "
                "out, or prepare the photos again in another folder"
            )
    if words := given_words(args, add_source_arguments):
        raise DataError(
            f"{words[0]} chooses photos, and {folder} is prepared already: give it to `face-fusion prepare`"
        )


def create_task(args: argparse.Namespace, base: BaseModel, folder: Path) -> FaceFusionTask:
    """The adapter, the pairs and what else the options ask for, as a task; the base gets its training precision."""
    import torch

    from ..face_self_attention import SelfAttentionReference
    from ..training.latent_cache import cache_folders
    from ..training.objective import load_face_embedder
    from ..training.pairs import Pairs, split_people
    from ..training.preparation import read_rows
    from ..training.task import FaceFusionOptions, FaceFusionTask

    frozen = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision(args), torch.float32)
    if args.conditioner != "face-fusion":
        create = create_studio_task if args.conditioner == "face-studio" else create_snap_task
        return create(args, base, folder, frozen, loss_options(args))
    cache = cache_folders(folder, base, args.augmentations)
    people, aside = split_people(read_rows(folder), args.validation_people, args.seed)
    pairs, held_out = Pairs(folder, cache, people), Pairs(folder, cache, aside) if aside else None
    adapter = start_adapter(args, base, folder)
    options = FaceFusionOptions(
        **loss_options(args),
        identity_loss_weight=args.identity_loss_weight,
        identity_loss_from=args.identity_loss_from,
        identity_loss_until=args.identity_loss_until,
        identity_loss_jitter=args.identity_loss_jitter,
        keep_references=args.keep_references,
    )
    embedder = load_face_embedder(args.identity_embedder) if args.identity_embedder else None
    samples = create_samples(args, base, adapter, folder, held_out) if args.validation_prompt else None
    own = SelfAttentionReference() if args.face_mode == "both" else None
    task = FaceFusionTask(base, adapter, pairs, held_out, options, embedder, samples, self_attention=own)
    base.cast(frozen)
    if base.unet.device.type == "cuda":  # the layout in which tensor cores convolve
        base.unet.to(memory_format=torch.channels_last)
    needed = set(task.modules())
    for part in (base.vae, *base.text_encoders):
        if part not in needed:
            part.to("cpu")
    return task


def precision(args: argparse.Namespace) -> str:
    from ..training.loop import usable_precision

    return usable_precision(args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))


def start_adapter(args: argparse.Namespace, base: BaseModel, folder: Path) -> FaceFusionAdapter:
    """New weights, or those of `--init-adapter`, which must have been made for the same kind of reference."""
    from ..face_adapter import create_adapter
    from ..training.initial_weights import continued_adapter
    from ..training.preparation import read_report

    settings = read_report(folder)["settings"]
    metadata = {
        "reference_mode": "noised" if args.reference_timestep else "clean",
        "reference_timestep": args.reference_timestep,
        "token_count_bias": args.token_count_bias,
        "face_crop": settings["face_crop"],
        "resolution": settings["reference_resolution"],
    }
    if args.init_adapter is not None:
        return continued_adapter(base.unet, args.init_adapter, metadata)
    return create_adapter(base.unet, args.init, metadata=metadata)


def create_samples(
    args: argparse.Namespace, base: BaseModel, adapter: FaceFusionAdapter, folder: Path, held_out: Pairs | None
) -> Samples:
    """Faces and prompts of the validation pictures; without `--validation-image` the faces of people set aside."""
    from ..training.samples import Samples
    from ..training.sources import DataError

    metadata = adapter.metadata
    faces: list[Image.Image]
    if args.validation_image:
        from ..face_detectors import load_detector
        from ..generation.photos import prepare_face

        detector = load_detector(args.detector, args.detector_model)
        crop: dict[str, Any] = {"enlarge": metadata.face_crop, "resolution": metadata.resolution}
        faces = [prepare_face(image, detector, **crop) for image in args.validation_image]
    elif held_out is not None:
        from ..training.latent_cache import read_picture

        rows = [held_out.rows[members[0]] for members in held_out.people]
        count = len(args.validation_prompt) if len(args.validation_prompt) > 1 else 4
        faces = [read_picture(folder / row["face_file_name"]) for row in rows[:count]]
    else:
        raise DataError("nobody is set aside for validation: give --validation-image, or --validation-people 1")
    return Samples(faces, args.validation_prompt, args.validation_inference_steps, seed=args.seed, mode=args.face_mode)


def loop_options(args: argparse.Namespace, size: int, processes: int) -> LoopOptions:
    """The options of the shared loop; its batch is that of all processes and steps of accumulation together."""
    from ..training.loop import LoopOptions

    batch_size = args.train_batch_size * args.gradient_accumulation_steps * processes
    steps = args.max_train_steps
    if steps is None and args.num_train_epochs is not None:
        steps = math.ceil(args.num_train_epochs * size / batch_size)
    if steps is None and args.max_train_minutes is None:
        steps = 10_000
    return LoopOptions(
        batch_size=batch_size,
        lr=args.learning_rate,
        steps=steps,
        minutes=args.max_train_minutes,
        warmup=0 if args.lr_scheduler == "constant" else args.lr_warmup_steps,
        schedule="constant" if args.lr_scheduler.startswith("constant") else args.lr_scheduler,
        weight_decay=args.adam_weight_decay,
        clip_norm=args.max_grad_norm,
        ema_decay=args.ema_decay if args.use_ema else 0.0,
        seed=args.seed,
        precision=precision(args),
        compile=args.compile,
        log_every=args.log_every,
        resume=resume(args.resume_from_checkpoint, args.out),
        accumulation=args.gradient_accumulation_steps,
        optimizer="adamw-8bit" if args.use_8bit_adam else "adamw",
        beta2=args.adam_beta2,
        checkpoint_steps=args.checkpointing_steps,
        checkpoint_limit=args.checkpoints_total_limit,
        sample_steps=args.validation_steps,
        report_to=args.report_to,
    )
