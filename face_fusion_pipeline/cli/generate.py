"""`face-fusion generate`: new pictures of the person in a photo, as a prompt describes them."""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_defaults import FACE_MODES
from ..face_errors import FaceFusionError
from ..files.folders import is_litter
from ..generation.arguments import (
    MAX_IMAGES,
    MAX_SEED,
    add_version_arguments,
    check_model,
    check_prompt,
    check_version,
    guidance_scales,
)
from ..generation.loading import ADAPTER_FILE, adapter_beside, defaults_beside, load_pipeline
from ..generation.prompt_words import groups_of_words, unknown_words_line
from ..generation.provenance import describe
from ..generation.references import reference_crops
from ..training.photos import begins_as_picture
from ._arguments import GUIDANCE, GUIDED, STEPS, STRENGTH, whole
from ._driver_options import (
    BY_SNAP,
    add_driver_arguments,
    check_driver,
    driven,
    driver_points,
    driver_settings,
    load_snap,
    posed,
)
from ._generate_studio import (
    add_studio_arguments,
    check_studio,
    load_studio,
    read_identity,
    style_of,
    style_settings,
)


if TYPE_CHECKING:
    from PIL import Image

    from ..generation.photos import FacePhoto

SIDE = whole(64, 4096, step=8)  # pixels
BATCH_SIZE = 4
MOST_PHOTOS = 32  # of a folder: each is one more reference
HELP = "new pictures of the person in a photo, as a prompt describes them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = known_words()
    add_face_argument(parser)
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="what the pictures show; repeat for several"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what they should not show")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for images and contact sheet")
    add_model_arguments(parser)
    add_studio_arguments(parser)
    add_number_arguments(parser)
    add_photo_arguments(parser)
    add_driver_arguments(parser)
    parser.add_argument("--no-sheet", action="store_true", help="skip the contact sheet and its pictures without face")
    parser.add_argument(
        "--refine-faces", action="store_true", help="draw the face again, larger, where it came out small"
    )
    add_output_arguments(parser)


def add_face_argument(parser: argparse.ArgumentParser) -> None:
    """Whose face it is; also of `refine`."""
    parser.add_argument(
        "--face",
        action="append",
        default=[],
        metavar="FILE_OR_DIR",
        help="photo of the person, a folder of such photos, or an identity saved by FaceIdentity.save "
        "(.safetensors); repeat for several photos of the same person",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, how strongly it sees the face, and how it denoises; also of `refine`."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_FILE_OR_HUB_ID",
        help="Stable Diffusion 1.x, 2.x or XL model; default: the avatars",
    )
    add_version_arguments(parser)
    parser.add_argument(
        "--adapter",
        metavar="DIR_OR_FILE_OR_HUB_ID",
        help=f"trained Face Fusion weights; default: {ADAPTER_FILE} in the model's folder, else training-free mode",
    )
    parser.add_argument(
        "--mode",
        choices=(*FACE_MODES, "face-studio", BY_SNAP),
        help="where the face joins: trained weights at the cross-attention (the paper), the model's own at the "
        "self-attention, or both; face-studio, face-snap: identity by that system; "
        "default: as the model recommends (the avatars: both), else the adapter, if any",
    )
    parser.add_argument("--scale", type=STRENGTH, default=1.0, help="strength of the face: 0 off, 1 as in the paper")
    parser.add_argument(
        "--self-scale",
        type=STRENGTH,
        help="strength at the self-attention, times --scale; default: that of the identity (4)",
    )
    parser.add_argument(
        "--steps", type=STEPS, help="denoising steps; default: as the model recommends, else 25 (the avatars: 25)"
    )
    parser.add_argument(
        "--guidance",
        type=GUIDANCE,
        help="classifier-free guidance, 1 is off; default: as the model recommends (the avatars: 4, then 2), else 5",
    )
    parser.add_argument(
        "--low-noise-guidance", type=GUIDED, help="guidance in the low-noise half of the timesteps; default: the same"
    )


def add_number_arguments(parser: argparse.ArgumentParser) -> None:
    """How many pictures, and of what size."""
    parser.add_argument(
        "--num-images", type=whole(1, MAX_IMAGES), default=4, help="number of pictures for each prompt"
    )
    parser.add_argument(
        "--batch-size", type=whole(1, MAX_IMAGES), default=BATCH_SIZE, help="pictures denoised together (memory)"
    )
    parser.add_argument(
        "--seed", type=whole(0, MAX_SEED - MAX_IMAGES), default=0, help="picture i is made with seed + i"
    )
    parser.add_argument("--height", type=SIDE, help="pixels; default: --width, else the model's own")
    parser.add_argument("--width", type=SIDE, help="pixels; default: --height, else the model's own")


def add_photo_arguments(parser: argparse.ArgumentParser) -> None:
    """How the face is found in the photos of `--face`; also of `refine`."""
    parser.add_argument(
        "--face-index", type=whole(0, 999), help="which face of the photo, from the left, counted from 0"
    )
    parser.add_argument("--detector", choices=("auto", "yunet", "haar", "insightface"), default="auto")
    parser.add_argument("--detector-model", metavar="FILE", help="the detector's own model file")
    parser.add_argument("--no-detect", action="store_true", help="the photo already is a face crop")
    parser.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="show each photo mirrored as well, as one more reference; default: a single photo, if the model "
        "recommends it (the avatars do)",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The watermark, where it is computed, and what is printed; also of `refine`."""
    parser.add_argument("--watermark", action="store_true", help="mark the pixels, too, invisibly, as generated")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto")
    parser.add_argument("--json", action="store_true", help="print what was written, and how, as JSON")


def known_words() -> str | None:
    """The words that the embedded model knows, for the end of `--help`; None where it was left out."""
    try:
        defaults = defaults_beside(None)
    except FaceFusionError:
        return None
    if defaults is None or defaults.vocabulary is None:
        return None
    groups = "; ".join(f"{group}: {words}" for group, words in groups_of_words(defaults.vocabulary))
    return f"The avatars know the words of their captions and no others. {groups}."


def run(args: argparse.Namespace) -> int:
    check_model_arguments(args)
    set_defaults(args)
    check_arguments(args)
    faces = read_faces(args)
    pipe = load_model(args)
    load_studio(pipe, args)
    load_snap(pipe, args)
    warn(pipe, args)
    if args.watermark:
        from ..generation.watermark import add_watermark, check_size

        check_size(args.width or pipe._default_resolution(), args.height or pipe._default_resolution())
    references, identity = encode(pipe, faces, args.mirror, args.mode) if faces else ([], None)
    people = people_of(args, references, identity)
    settings = settings_of(args, pipe, identity)
    if posed(args):
        args.points = driver_points(pipe, args, faces)

    from ..generation.contact_sheet import contact_sheet, save_new_png, save_png

    written: list[Path] = []
    fused: list[Image.Image] = []
    numbers = free_numbers(args.out)
    for prompt, seed, picture in generate(pipe, args, people):  # each is saved at once: a stop keeps what there is
        text = {**settings, "prompt": prompt, "seed": seed}
        marked = add_watermark(picture) if args.watermark else picture
        names = (f"image_{number:03d}.png" for number in numbers)
        written.append(save_new_png(marked, args.out, names, text))
        fused.append(picture)
    if not args.no_sheet and identity is not None:
        plain = [picture for *_, picture in generate(pipe, args, {})]
        columns = {"reference": references, "without Face Fusion": plain, "with Face Fusion": fused}
        rows = [prompt[:60] for prompt in args.prompt for _ in range(args.num_images)] if len(args.prompt) > 1 else []
        sheet = contact_sheet({label: pictures for label, pictures in columns.items() if pictures}, rows)
        sheet = add_watermark(sheet) if args.watermark else sheet
        number = number_of(written[0])  # no other run has that of our first picture
        name = f"contact_sheet_{number:03d}.png" if number else "contact_sheet.png"
        written.append(save_png(sheet, args.out / name, {**settings, "seed": args.seed}))
    if args.json:
        print(json.dumps({"files": [str(path) for path in written], "seed": args.seed, **settings}))
    else:
        print("\n".join(str(path) for path in written))
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before torch is imported. Raises [`FaceFusionError`]."""
    check_studio(args)
    check_driver(args)
    for prompt in args.prompt:
        check_prompt(prompt, "--prompt")
    if args.negative_prompt:
        check_prompt(args.negative_prompt, "--negative-prompt")
    if args.refine_faces and args.steps < 3:
        raise FaceFusionError("--refine-faces does a part of the steps again: give --steps 3 or more")
    if not args.face and not args.style_image:
        raise FaceFusionError("give the photo of a person, --face, or a picture whose style is taken, --style-image")
    if any(face.endswith(".safetensors") for face in args.face) and len(args.face) > 1:
        raise FaceFusionError("a saved identity holds all references of a person: give it alone as --face")
    if args.mirror and args.face and args.face[0].endswith(".safetensors"):
        raise FaceFusionError("--mirror is for photos: a saved identity is encoded already")
    if args.watermark:
        from ..generation.watermark import blind_watermark, check_size

        blind_watermark()
        if args.width is not None:
            check_size(args.width, args.height)


def check_model_arguments(args: argparse.Namespace) -> None:
    """Raise [`FaceFusionError`] for a model that cannot be one: what it recommends is read next."""
    check_version(args.model, args.revision, args.variant, args.model_config)
    if args.model is not None:
        check_model(args.model)


def set_defaults(args: argparse.Namespace) -> None:
    """What the model recommends, where nothing was said; the mode is left to the pipeline, which knows its weights.

    A folder of photos becomes its photos, and one side of a picture both.
    """
    args.face = [photo for face in args.face for photo in photos_in(face)]
    args.height, args.width = args.height or args.width, args.width or args.height
    defaults = defaults_beside(args.model, args.revision, args.model_config, args.steps)
    args.guidance, args.low_noise_guidance = guidance_scales(args.guidance, args.low_noise_guidance, defaults)
    if args.steps is None:
        args.steps = (defaults and defaults.num_inference_steps) or 25
    if args.mirror is None:
        single = len(args.face) == 1 and not args.face[0].endswith(".safetensors")
        args.mirror = single and defaults is not None and bool(defaults.face_mirrored)


def pictures_in(folder: Path) -> list[str]:
    """The pictures of a folder, without those below it, by their names."""
    files = (path for path in folder.iterdir() if path.is_file() and not is_litter(path.name))
    return sorted(str(path) for path in files if begins_as_picture(path))


def photos_in(face: str) -> list[str]:
    """The photos of a folder by their names; of anything else itself. Raises [`FaceFusionError`] for none or many."""
    folder = Path(face)
    if not folder.is_dir():
        return [face]
    photos = pictures_in(folder)
    if not photos:
        raise FaceFusionError(f"--face {face} has no photos in it")
    if len(photos) > MOST_PHOTOS:
        raise FaceFusionError(f"--face {face} has {len(photos)} photos: keep the best {MOST_PHOTOS} or fewer in it")
    return photos


def warn_of_words(pipe: Any, prompts: Sequence[str]) -> None:
    """Say which words of the prompts the model was not trained with."""
    vocabulary = pipe.face_defaults.vocabulary if pipe.face_defaults is not None else None
    for words in dict.fromkeys(unknown_words_line(prompt, vocabulary) for prompt in prompts):
        if words:
            print(f"face-fusion: {words}; the words that the avatars know: --help", file=sys.stderr)


def warn(pipe: Any, args: argparse.Namespace) -> None:
    """Say what the model is likely to draw badly: words and sizes that it was not trained with."""
    warn_of_words(pipe, args.prompt)
    side = pipe._default_resolution()
    if args.width is not None and (
        max(args.width, args.height) >= 2 * side or min(args.width, args.height) <= side / 2
    ):
        print(
            f"face-fusion: this model draws pictures of {side} pixels a side; at {args.width} x {args.height} people "
            "come out deformed or several times",
            file=sys.stderr,
        )


def denoising(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a pipeline's call: how it denoises."""
    from ..guidance_interval import GuidanceInterval

    interval = args.low_noise_guidance and GuidanceInterval(args.low_noise_guidance)
    return {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "callback_on_step_end": interval}


def read_faces(args: argparse.Namespace) -> "list[FacePhoto] | Any":
    """The photos with the face in each, or a saved identity; before the model is loaded, for it takes longer."""
    if args.face and args.face[0].endswith(".safetensors"):
        return read_identity(args.face[0])
    from ..face_detectors import load_detector
    from ..generation.photos import locate_face

    detector = None if args.no_detect else load_detector(args.detector, args.detector_model)
    photos, bad = [], []
    for face in args.face:
        try:
            photos.append(locate_face(face, detector, args.face_index))
        except FaceFusionError as error:
            bad.append(error)
    if len(bad) > 1:
        raise FaceFusionError(f"{len(bad)} of {len(args.face)} photos cannot be used: {'; '.join(map(str, bad))}")
    if bad:
        raise bad[0]
    return photos


def load_model(args: argparse.Namespace) -> Any:
    """The pipeline; `args.adapter` then says which adapter it has."""
    args.adapter = args.adapter or adapter_beside(args.model)
    version = {"revision": args.revision, "variant": args.variant, "config": args.model_config}
    pipe = load_pipeline(
        args.model, args.adapter, args.device, args.dtype, getattr(args, "controlnet", None), **version
    )
    if args.adapter is None:
        print(
            f"face-fusion: no --adapter for {args.model or 'it'}: training-free mode, a weaker likeness",
            file=sys.stderr,
        )
    return pipe


def encode(
    pipe: Any, faces: "list[FacePhoto] | Any", mirror: bool = False, mode: str | None = None
) -> "tuple[list[Image.Image], Any]":
    """The reference crops and the identity made of them; no crops where the identity was read from a file.

    Raises [`FaceFusionError`] for a saved identity of another mode.
    """
    if not isinstance(faces, list):
        if mode not in (None, faces.mode):
            raise FaceFusionError(f"--mode {mode} is for photos: this identity was saved in mode {faces.mode}")
        return [], faces
    from ..generation.photos import with_mirrored

    crops = reference_crops(pipe, faces)
    return crops, pipe.encode_face(with_mirrored(crops) if mirror else crops, face_mode=mode, mirrored=False)


def people_of(args: argparse.Namespace, references: "list[Image.Image]", identity: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call: who is shown. FaceSnap's ControlNet sees photos, and no identity of others."""
    if identity is None or not posed(args) or args.face_snap is None or args.mode == BY_SNAP:
        return {"face_image": identity}
    from ..generation.photos import with_mirrored

    shown = with_mirrored(references) if args.mirror else references
    return {"face_image": [shown], "face_mode": identity.mode, "face_mirrored": False}


def number_of(path: Path) -> int | None:
    """The number of a picture or contact sheet; None for another file."""
    found = re.fullmatch(r"(?:image|contact_sheet)_([0-9]{1,18})\.png", path.name)
    return int(found[1]) if found else 0 if path.name == "contact_sheet.png" else None


def free_numbers(folder: Path) -> Iterator[int]:
    """Numbers for the next pictures in `folder`: what earlier runs wrote there stays."""
    taken = [number for path in folder.glob("*.png") if (number := number_of(path)) is not None]
    return itertools.count(max(taken, default=-1) + 1)


def generate(pipe: Any, args: argparse.Namespace, people: dict[str, Any]) -> "Iterator[tuple[str, int, Image.Image]]":
    """All pictures with their prompts and seeds, with the faces of these arguments of a call or (none) without.

    Picture i of each prompt depends on seed + i only, not on the batch.
    """
    import torch

    faced = people.get("face_image") is not None
    batches = itertools.product(args.prompt, range(0, args.num_images, args.batch_size))
    for prompt, first in batches:
        count = min(args.batch_size, args.num_images - first)
        seeds = range(args.seed + first, args.seed + first + count)
        output = pipe(
            prompt,
            negative_prompt=args.negative_prompt,
            **people,
            face_scale=args.scale,
            face_self_scale=args.self_scale,
            **(style_of(args) if faced or not args.face else {}),
            **driven(args),
            **denoising(args),
            num_images_per_prompt=count,
            height=args.height,
            width=args.width,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        )
        if any(getattr(output, "nsfw_content_detected", None) or []):  # XL has no safety checker
            print("face-fusion: the safety checker blacked out a picture: try another prompt or seed", file=sys.stderr)
        for seed, picture in zip(seeds, output.images, strict=True):
            if faced and args.refine_faces:
                picture = refined(pipe, args, people, prompt, picture, seed)
            yield prompt, seed, picture


def refined(
    pipe: Any, args: argparse.Namespace, people: dict[str, Any], prompt: str, picture: "Image.Image", seed: int
) -> "Image.Image":
    """The picture after a second pass over its largest face; as it is, if no face is found in it."""
    import torch

    from ..face_detectors import load_detector
    from ..face_errors import InvalidLayoutError

    try:
        (again,) = pipe.refine_faces(
            picture,
            prompt,
            **people,
            face_detector=load_detector(args.detector, args.detector_model),
            face_scale=args.scale,
            face_self_scale=args.self_scale,
            negative_prompt=args.negative_prompt,
            **denoising(args),
            generator=torch.Generator("cpu").manual_seed(seed),
        )
    except InvalidLayoutError:
        print(f"face-fusion: no face is found in the picture of seed {seed}: none was refined", file=sys.stderr)
        return picture
    return again


def settings_of(args: argparse.Namespace, pipe: Any, identity: Any) -> dict[str, object]:
    """What made the pictures, for PNG text chunks and --json."""
    own = getattr(identity, "self_attention", None)
    settings: dict[str, object] = {
        "prompt": args.prompt[0] if len(args.prompt) == 1 else args.prompt,
        "negative_prompt": args.negative_prompt,
        "face_scale": args.scale,
        "face_self_scale": args.self_scale if args.self_scale is not None or own is None else own.scale,
        "face_mode": None if identity is None else identity.mode,
        **style_settings(args),
        **driver_settings(args),
        "steps": args.steps,
        "guidance": args.guidance,
        "low_noise_guidance": args.low_noise_guidance,
        "refine_faces": args.refine_faces,
        "mirror": args.mirror,
        "watermark": args.watermark,
        "revision": args.revision,
    }
    return describe(pipe, args.model, args.adapter, settings)
