"""The model card: one form (`card.md`) for the avatar model and for adapters that users train."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..face_errors import FaceFusionError
from ..face_pictures import open_picture


logger = logging.getLogger(__name__)

SHEET = "sheet.png"  # a contact sheet among the pictures of a repository
REPOSITORY = "OWNER/NAME"  # stands for the repository in a card until that is pushed to one
TAGS = ["face-fusion", "stable-diffusion", "text-to-image"]
_GALLERY = "<Gallery />"
_OF_TRAINING = "<!-- of the training, on this machine only -->"
_OWN_COPY = '# "{base}" was a folder: put that of your copy of the same model\n'
NOT_MEASURED = "Nothing measured yet: `face-fusion push --table FILE` puts the tables of an evaluation here."

_EVALUATION = re.compile(r"(?<=<!-- evaluation -->\n\n).*?(?=\n\n<!-- /evaluation -->)", re.S)


def render_card(
    *,
    title: str,
    summary: str,
    base: str,
    training: str,
    limits: str,
    tables: Iterable[str] = (),
    base_model: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
    reference: str = "face.png",
) -> str:
    """The text of a card.

    Args:
        base: Hub id or folder of the model that the weights belong to; "" where the repository is a whole model. Of a
            folder, which only the trainer has, the snippet says that it is to be replaced.
        training, limits: Markdown of these sections; `tables`: of the evaluation.
        base_model, license: Hub metadata, left out if None; base_model is the Hub id of `base`, if it has one.
        tags: in addition to those that all cards have.
        reference: picture of a face that the snippet reads; a path in the repository where it has a folder.
    """
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base_model,
        tags=[*TAGS, *tags],
    )
    return Template((Path(__file__).parent / "card.md").read_text()).substitute(
        metadata=data.to_yaml(original_order=["license"]),
        title=title,
        summary=summary,
        base=f'"{base}"' if base else "folder",
        own_copy=_OWN_COPY.format(base=base) if base and not base_model else "",
        model=base or REPOSITORY,
        face=f'f"{{folder}}/{reference}"' if "/" in reference else f'"{reference}"',
        repository=REPOSITORY,
        limits=limits,
        training=training,
        evaluation="\n\n".join(table.strip() for table in tables) or NOT_MEASURED,
    )


def with_picture_of_training(card: str, picture: Path) -> str:
    """A card that shows a picture of its training, by its path from the card.

    It may show photos of those who were set aside: [`finish_card`] takes it out, and it is never pushed.
    """
    figure = f"{_OF_TRAINING}\n![Reference, without and with Face Fusion]({picture.as_posix()})"
    return card.replace(_GALLERY, f"{_GALLERY}\n\n{figure}", 1)


def finish_card(
    path: Path,
    repository: str = REPOSITORY,
    pictures: Iterable[Path] = (),
    tables: Iterable[str] = (),
    license: str | None = None,
) -> str:
    """The text of the card at `path`, ready for a repository of the Hub.

    Args:
        repository: its id, put in place of `OWNER/NAME`.
        pictures: PNG files in its folder `images`. `sheet.png` is shown in the card; others that carry their prompt,
            as all that `face-fusion generate` writes do, become examples on its page.
        tables: Markdown, in place of what the card has under "Evaluation"; none leaves that as it is.
        license: Hub identifier, in place of the card's own.

    Raises:
        FaceFusionError: no card there, metadata that are no YAML, or no "Evaluation" between its marks.
    """
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FaceFusionError(f"no model card {path}: {error.strerror or error}") from error
    except Exception as error:  # YAML has many errors, and metadata may be of a wrong type
        raise FaceFusionError(f"the metadata of the model card {path} cannot be read: {error}") from error
    card.text = re.sub(rf"\n\n{_OF_TRAINING}\n.*", "", card.text).replace(REPOSITORY, repository)
    if license:
        card.data["license"] = license
    elif not card.data.get("license"):
        logger.warning("%s names no licence: give the one of the weights with --license", path)
    pictures = list(pictures)
    if any(picture.name == SHEET for picture in pictures):
        figure = f"![Reference, without and with Face Fusion](images/{SHEET})"
        card.text = card.text.replace(_GALLERY, f"{_GALLERY}\n\n{figure}")
    if widget := [example for picture in pictures if picture.name != SHEET and (example := _example(picture))]:
        card.data["widget"] = widget
    if text := "\n\n".join(table.strip() for table in tables):
        if not _EVALUATION.search(card.text):
            raise FaceFusionError(f"{path} has no lines <!-- evaluation --> and <!-- /evaluation --> for the tables")
        card.text = _EVALUATION.sub(lambda _: text, card.text, count=1)
    return card.content


def _example(picture: Path) -> dict[str, Any] | None:
    prompt = open_picture(picture).info.get("prompt")
    return {"text": prompt, "output": {"url": f"images/{picture.name}"}} if prompt else None
