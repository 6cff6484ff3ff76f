"""Making a repository on the Hugging Face Hub and uploading files to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from ..face_errors import FaceFusionError


def create_repository(name: str, private: bool) -> str:
    """Make the repository, before any long work, so that a missing token is known early; returns its id.

    Raises [`FaceFusionError`] if the Hub refuses, or cannot be reached, or if a `private` one is asked for where there
    is a public one of this name, which the Hub would leave as it is.
    """
    try:
        made = HfApi().create_repo(name, private=private or None, exist_ok=True)
        public = private and not HfApi().repo_info(made.repo_id).private
    except Exception as error:  # no token, offline, not allowed: many types, one way out
        raise FaceFusionError(f"cannot make {name} on the Hub ({error}): log in with `hf auth login`") from error
    if public:
        raise FaceFusionError(
            f"{made.repo_id} is on the Hub already, and public: make it private there, or name another one"
        )
    return made.repo_id


def upload(files: Mapping[str, Path | bytes], repository: str) -> str:
    """Upload all `files` (path in the repository -> file or its content) in one commit, all or nothing.

    Returns the address of the commit. Raises [`FaceFusionError`] if that fails.
    """
    operations = [
        CommitOperationAdd(name, os.fspath(file) if isinstance(file, Path) else file) for name, file in files.items()
    ]
    try:
        done = HfApi().create_commit(repository, operations, commit_message="Upload Face Fusion weights")
    except Exception as error:
        raise FaceFusionError(
            f"cannot upload to {repository}, nothing was changed there ({error}): `face-fusion push` tries again"
        ) from error
    return done.commit_url
