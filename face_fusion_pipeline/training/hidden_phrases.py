"""Captions without the phrases that say what a control picture shows as well, such as the expression of a face.

A UNet that reads "smiling" draws a smile, whatever the points say: then the points are never needed for it, and no
ControlNet learns to see it in them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .base_model import BaseModel
from .latent_cache import Cache, Captions, caption_shard, digest_of, open_shards, write_shards
from .preparation import read_rows
from .sources import DataError


def without_phrases(text: str, phrases: Sequence[str]) -> str:
    """`text` without these phrases, in any case of their letters, each with the comma before it."""
    longest_first = "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True))
    left = re.sub(rf",?\s*\b(?:{longest_first})\b", "", text, flags=re.IGNORECASE)
    return left.strip(" ,")


def read_phrases(path: Path) -> tuple[str, ...]:
    """One phrase a line. Raises [`DataError`] for a file that cannot be read, or is empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the phrases in {path}: {error}") from error
    phrases = tuple(line.strip() for line in lines if line.strip())
    if not phrases:
        raise DataError(f"{path} has no phrases: write one a line, such as smiling")
    return phrases


def encode_without(
    folder: Path, base: BaseModel, cache: Cache, phrases: Sequence[str], progress: bool = True
) -> Captions:
    """The captions of a prepared folder without `phrases`, as the base reads them; computed once.

    Raises:
        DataError: no caption has any of them.
    """
    texts = [row["text"] for row in read_rows(folder)]
    left = [without_phrases(text, phrases) for text in texts]
    if left == texts:
        raise DataError(f"no caption of {folder} has any of the phrases to be hidden, such as {phrases[0]!r}")
    target = folder / "conditions" / digest_of([cache.conditions.name, *sorted(phrases)])
    described = {"examples": len(texts), "base": Path(base.name).name}
    write_shards(target, lambda rows: caption_shard(base, [left[i] for i in rows]), described, "captions", progress)
    return Captions(open_shards(target, len(texts)), in_memory=True, key=target.name)
