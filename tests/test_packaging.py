"""What a fresh clone and an installed package promise."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import face_fusion_pipeline
from face_fusion_pipeline.publishing.repository import pipeline_modules


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[; ]", line, maxsplit=1)[0].lower().replace("_", "-") for line in requirements}


def test_one_version_everywhere() -> None:
    assert face_fusion_pipeline.__version__ == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_dependency_has_a_lower_bound_or_a_pin() -> None:
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]:
        assert re.search("[>=]=", line), line
    assert {"train", "insightface", "depth", "app", "test"} <= set(extras)


def test_constraints_pin_what_is_tested() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in lines
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    wanted = names(PROJECT["dependencies"]) | names(PROJECT["optional-dependencies"]["test"])
    assert wanted <= names(lines)


def test_console_command() -> None:
    assert PROJECT["scripts"] == {"face-fusion": "face_fusion_pipeline.cli:main"}
    try:
        installed = metadata.distribution("face-fusion-pipeline")
    except metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert any(entry.name == "face-fusion" for entry in installed.entry_points)


def test_two_commands_and_one_check() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.M) and re.search(r"^test:", makefile, re.M)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "test.yml").read_text()


def test_flat_modules_are_those_that_the_pipelines_need() -> None:
    flat = {path.name for path in (ROOT / "face_fusion_pipeline").glob("*.py")}
    needed = {path.name for xl in (False, True) for path in pipeline_modules(xl).values()}
    assert flat - needed == {
        *("__init__.py", "__main__.py"),
        "block.py",  # of Modular Diffusers, which finds it by modular_config.json
    }


def test_embedded_files_are_package_data() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert {"embedded/**/*", "publishing/*.md"} <= set(data["face_fusion_pipeline"])


def test_every_asset_is_named_with_its_origin() -> None:
    notice, _, _ = (ROOT / "NOTICE").read_text().partition("What is used but is not part of it")
    assert "NOTICE" in PROJECT["license-files"]
    named = re.findall(r"^  (\w+/[\w./]*)(?:, ([\w./]+))?(?: |$)", notice, re.M)
    folders = tuple(place for row in named for place in row if place)
    assert len(folders) >= 8 and all((ROOT / place).exists() for place in folders)
    written = {".py", ".md", ".typed", ".pyc"}
    for top in ("face_fusion_pipeline", "docs", "weights_card", "benchmarks", "examples"):
        for file in (path for path in (ROOT / top).rglob("*") if path.is_file() and "." not in path.parent.name):
            place = file.relative_to(ROOT).as_posix()
            assert file.suffix in written or place.startswith(folders), f"{place} is not named in NOTICE"


def test_every_public_name_is_there_and_belongs_to_the_package() -> None:
    import face_fusion_pipeline

    for name in face_fusion_pipeline.__all__:
        assert getattr(face_fusion_pipeline, name).__module__.startswith("face_fusion_pipeline."), name
