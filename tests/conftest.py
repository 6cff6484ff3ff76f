"""Settings and fixtures of all tests: no network, one thread, an optional folder of real photographs and models."""

import os
from pathlib import Path

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"  # a Hub call would otherwise retry for half a minute

import torch  # noqa: E402  after the environment that it and the Hub read at import


torch.set_num_threads(1)  # several times faster for tiny models

FAMILIES = ("sd", "xl")  # of tiny_models.py

# $FACE_FUSION_TEST_DATA, else shared/data beside the checkout
TEST_DATA = Path(os.environ.get("FACE_FUSION_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
if (yunet := TEST_DATA / "models" / "face_detection_yunet_2023mar.onnx").is_file():
    os.environ.setdefault("FACE_FUSION_YUNET", str(yunet))  # the detector of all tests; without it the Haar cascades


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """A family of base models; what uses this fixture is tested for each."""
    return str(request.param)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with photos/ and models/ of real faces."""
    if not (TEST_DATA / "photos").is_dir():
        pytest.skip("no photographs and detector models: set FACE_FUSION_TEST_DATA to a folder that has them")
    return TEST_DATA
