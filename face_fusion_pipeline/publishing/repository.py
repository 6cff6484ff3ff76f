"""What a repository of Face Fusion weights holds: card, pipeline, weights, records and pictures of the card.

Two kinds of folder make one: what `face-fusion train` wrote (weights for a base that is elsewhere), and a whole model
such as the avatars. A list of what is taken, never of what is left out: a folder of training also has checkpoints, and
photos of people.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from diffusers.utils.dynamic_modules_utils import get_relative_imports

from ..face_adapter import ADAPTER_WEIGHTS_NAME, AdapterMetadata
from ..face_defaults import DEFAULTS_NAME, read_defaults
from ..face_embedders import WEIGHTS_NAME as EMBEDDER_WEIGHTS_NAME
from ..face_errors import AdapterMismatchError, FaceFusionError, ModelNotFoundError
from ..face_files import check_tensors, read_tensors
from ..face_snap import NETWORK, SNAP_WEIGHTS_NAME, SnapMetadata
from ..face_studio import STUDIO_WEIGHTS_NAME, StudioMetadata
from ..files.atomic import new_folder
from .card import REPOSITORY, finish_card


PACKAGE = Path(__file__).parents[1]
TASKS = ("", "_img2img", "_inpaint", "_controlnet")  # ends of the names of pipeline files
MODEL_PARTS = (
    *("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    *("scheduler", "image_encoder", "clip_score", "controlnet", "face_studio", "face_snap"),
)
# Weights by the name of their file: their metadata, and what may lie beside them.
WEIGHTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    ADAPTER_WEIGHTS_NAME: (AdapterMetadata, ()),
    STUDIO_WEIGHTS_NAME: (
        StudioMetadata,
        (EMBEDDER_WEIGHTS_NAME, "prior", "prior_scheduler", "tokenizer", "text_encoder"),
    ),
    SNAP_WEIGHTS_NAME: (SnapMetadata, (EMBEDDER_WEIGHTS_NAME, NETWORK)),
}
RECORDS = ("training.json", "logs/*/metrics.jsonl")
PICTURES = "images/*.png"


def repository_files(
    folder: Path, repository: str = REPOSITORY, tables: Iterable[str] = (), license: str | None = None
) -> dict[str, Path | bytes]:
    """Path in the repository -> the file that goes there, or its content.

    Args:
        folder: has `README.md`, the card, and perhaps `images/`; beside the card lie the weights. `README.md` may be a
            link: then the weights lie beside the file that it points to, and nothing is stored twice.
        repository, tables, license: see `card.finish_card`.

    Raises:
        ModelNotFoundError: no card, or no Face Fusion weights beside it.
        AdapterMismatchError: weights that are no Face Fusion weights.
        FaceFusionError: a card that cannot be used.
    """
    if not (folder / "README.md").is_file():
        raise ModelNotFoundError(
            f"{folder} has no README.md: name a folder that `face-fusion train` or `avatars-publish` wrote"
        )
    weights = (folder / "README.md").resolve().parent
    family, trained = trained_files(weights)
    pictures = sorted(folder.glob(PICTURES))
    files: dict[str, Path | bytes] = {
        "README.md": finish_card(folder / "README.md", repository, pictures, tables, license).encode(),
        "LICENSE": license_file(),
    }
    files |= pipeline_modules(family == "sdxl" or says_xl(weights))
    taken = [*trained, *(path for pattern in RECORDS for path in sorted(weights.glob(pattern)))]
    if (weights / "model_index.json").is_file():
        taken.append(weights / "model_index.json")
        if (defaults := read_defaults(weights)) is not None:  # refuses one that would stop whoever loads the model
            taken += [weights / DEFAULTS_NAME, *([defaults.familiarity_file] if defaults.familiarity_file else [])]
        taken += sorted(path for part in MODEL_PARTS for path in (weights / part).rglob("*") if path.is_file())
    files |= {path.relative_to(weights).as_posix(): path for path in taken}
    files |= {path.relative_to(folder).as_posix(): path for path in pictures}
    return files


def trained_files(weights: Path) -> tuple[str, list[Path]]:
    """The base family of the weights in a folder, of whichever system, and their files.

    Raises:
        ModelNotFoundError: there are none. AdapterMismatchError: a file of such a name with something else in it.
    """
    families: list[str] = []
    files: dict[Path, None] = {}
    for name, (kind, beside) in WEIGHTS.items():
        path = weights / name
        if not path.is_file():
            continue
        tensors, strings = read_tensors(path, check=kind.from_strings)  # refuses anything else of that name
        check_tensors(tensors, str(path), AdapterMismatchError)
        families.append(kind.from_strings(strings).base_family)
        for part in (path, *(weights / other for other in beside)):
            found = [part] if part.is_file() else sorted(inner for inner in part.rglob("*") if inner.is_file())
            files |= dict.fromkeys(found)
    if not families:
        first, *others = WEIGHTS
        raise ModelNotFoundError(f"{weights} has no {first} beside its card, nor {' or '.join(others)}")
    return families[0], list(files)


def says_xl(weights: Path) -> bool:
    """Whether the model beside the weights, or the record of their training, names a pipeline of XL."""
    named = []
    for path in (weights / "model_index.json", weights / "training.json"):
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise FaceFusionError(f"{path} cannot be read as JSON: {error}") from error
        named += [found.get("_class_name"), *(r.get("pipeline") for r in found.values() if isinstance(r, dict))]
    return any("XL" in str(name) for name in named)


def pipeline_modules(xl: bool = False) -> dict[str, Path]:
    """Name in a repository -> a pipeline of one family, or a sibling that it needs, as diffusers finds them.

    `pipeline.py`, which diffusers takes where only the repository is named, is that of the weights' family.
    """
    family = "pipeline_xl" if xl else "pipeline"
    entries = [PACKAGE / f"{family}{task}.py" for task in TASKS]
    found = {*entries, *(PACKAGE / f"{name}.py" for entry in entries for name in get_relative_imports(entry))}
    modules = {path.name: path for path in sorted(found)}
    return modules | {"pipeline.py": modules.pop(f"{family}.py")}


def license_file() -> Path:
    """The licence of the pipeline's code: in the checkout, or with the installed package."""
    if (PACKAGE.parent / "LICENSE").is_file():
        return PACKAGE.parent / "LICENSE"
    installed = metadata.distribution("face-fusion-pipeline")
    return next(Path(str(path.locate())) for path in installed.files or () if path.name == "LICENSE")


def write_folder(files: dict[str, Path | bytes], out: Path) -> None:
    """Write the repository as the folder `out`, to look at or try: all of it, or nothing.

    Raises [`FaceFusionError`] if `out` holds anything.
    """
    with new_folder(out) as folder:
        for name, file in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, bytes):
                target.write_bytes(file)
            else:
                shutil.copyfile(file, target)


def size(file: Path | bytes) -> int:
    """Bytes."""
    return len(file) if isinstance(file, bytes) else file.stat().st_size
