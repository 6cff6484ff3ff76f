"""Publishing trained weights on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from ..face_adapter import ADAPTER_WEIGHTS_NAME
from ..face_errors import FaceFusionError


# Weights, card and records; no state of the training, no photo of anybody.
PUBLISHED = [ADAPTER_WEIGHTS_NAME, "README.md", "training.json", "logs/*/metrics.jsonl"]


def create_repository(name: str, private: bool) -> str:
    """Make the repository before the training starts, so that a missing token is known then; returns its id.

    Raises [`FaceFusionError`] if the Hub refuses, or cannot be reached.
    """
    try:
        made = HfApi().create_repo(name, private=private or None, exist_ok=True)
    except Exception as error:  # no token, offline, not allowed: many types, one way out
        raise FaceFusionError(
            f"cannot make {name} on the Hub ({error}): log in with `hf auth login`, or leave --push-to-hub out"
        ) from error
    return made.repo_id


def upload(out: Path, repository: str) -> str:
    """Upload weights, card and records of `out`; returns the address. Raises [`FaceFusionError`] if that fails."""
    try:
        done = HfApi().upload_folder(repo_id=repository, folder_path=out, allow_patterns=PUBLISHED)
    except Exception as error:
        raise FaceFusionError(
            f"the training is done and in {out}, but cannot be uploaded to {repository}: {error}"
        ) from error
    return str(done)
