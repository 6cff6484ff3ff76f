"""Settings and fixtures of all tests: no network, one thread, an optional folder of real photographs and models."""

import os
from pathlib import Path

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"  # a Hub call would otherwise retry for half a minute

import torch  # noqa: E402  after the environment that it and the Hub read at import


torch.set_num_threads(1)  # several times faster for tiny models


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with photos/ and models/ of real faces. $FACE_FUSION_TEST_DATA, else shared/data beside the checkout."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FACE_FUSION_TEST_DATA", default))
    if not (folder / "photos").is_dir():
        pytest.skip("no photographs and detector models: set FACE_FUSION_TEST_DATA to a folder that has them")
    return folder
