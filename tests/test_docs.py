"""README and documentation: every link leads somewhere, every snippet works, and the site builds without a warning."""

import ast
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_pipeline

from face_fusion_pipeline import (
    StableDiffusionFaceFusionPipeline,
    StableDiffusionXLFaceFusionPipeline,
    embedded_model,
)
from face_fusion_pipeline.avatars import render, sample_scene
from face_fusion_pipeline.avatars.world import sheet
from face_fusion_pipeline.cli import build_parser, commands
from face_fusion_pipeline.face_detectors import HaarDetector
from face_fusion_pipeline.generation.contact_sheet import save_png


ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, *sorted((ROOT / "benchmarks").glob("*.md"))]
CARD = ROOT / "weights_card" / "README.md"
LENGTHS = {"steps=10_000": "steps=1", "steps=25": "steps=2"}  # of trainings and pictures
OWN_CHECKPOINT = '"stable-diffusion-v1-5/stable-diffusion-v1-5"'  # the embedded model stands for it
XL_CHECKPOINT, TINY_XL = '"stabilityai/stable-diffusion-xl-base-1.0"', '"xl"'  # a random one stands for it
KINDS: dict[str, Any] = {"pipe": StableDiffusionFaceFusionPipeline, "xl": StableDiffusionXLFaceFusionPipeline}
A_REPOSITORY = "OWNER/NAME"  # snippets that download one are read here, and run by test_push.py


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def anchors(page: Path) -> set[str]:
    """The anchors that headings get, on GitHub and in MkDocs."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# --- Links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, CARD], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"\w+:", link):
            assert link.startswith("https://"), link  # whether it answers is asked by the workflow `links`
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{name(page)}: {link}"
        assert ROOT in target.resolve().parents, f"{name(page)}: {link} leaves the repository"
        assert not anchor or anchor in anchors(target), f"{name(page)}: no heading for {link}"


@pytest.mark.parametrize("page", [*PAGES, CARD], ids=name)
def test_files_and_options_that_pages_name_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:docs|examples|benchmarks|face_fusion_pipeline|weights_card|tests)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{name(page)}: {path}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"\.\[([\w,]+)\]\"", text):
        assert set(extra.split(",")) <= extras.keys(), f"{name(page)}: {extra}"
    for command in re.findall(r"`face-fusion ([a-z-]+)", text):
        assert command in commands(), f"{name(page)}: face-fusion {command}"


NAMED = re.compile(r"`(\w+(?:\.\w+)+)`")  # `module.name` or `room.module.name`
ENDINGS = ("py", "json", "jsonl", "safetensors")  # of names of files


def is_there(dotted: str) -> bool:
    """Whether a name of this package exists; one that begins with no module or room of it is another's."""
    path, parts = ROOT / "face_fusion_pipeline", dotted.split(".")
    foreign = not (path / parts[0]).is_dir() and not (path / f"{parts[0]}.py").is_file()
    if foreign or parts[-1] in ENDINGS:
        return True
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    path = path / parts.pop(0) if parts and (path / f"{parts[0]}.py").is_file() else path
    found: Any = importlib.import_module(".".join(path.relative_to(ROOT).parts))
    for part in parts:
        if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
            return False
        found = getattr(found, part, None)
    return True


def test_names_that_pages_and_docstrings_mention_exist() -> None:
    texts = [*PAGES, CARD, *(ROOT / "face_fusion_pipeline").rglob("*.py")]
    wrong = [
        f"{name(text)}: {said}" for text in texts for said in NAMED.findall(text.read_text()) if not is_there(said)
    ]
    assert not wrong


def test_the_page_of_the_architecture_says_where_things_are() -> None:
    page = (ROOT / "docs" / "reference" / "attention.md").read_text()
    said = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(said) > 8 and all(NAMED.search(line) for line in said)
    for what in ("encoded", "see it", "kept apart"):
        assert any(what in line for line in said), what


# --- Snippets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, CARD], ids=name)
def test_shell_snippets_parse(page: Path) -> None:
    """By the command's own parser: a wrong option or a missing value would exit."""
    makefile = (ROOT / "Makefile").read_text()
    for block in [*blocks(page, "bash"), *blocks(page, "sh")]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["face-fusion"]:
                build_parser().parse_args(words[1:])
            elif words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", makefile, re.M), line
            elif words[:1] == ["python"] and words[1:2] != ["-m"]:
                assert (ROOT / words[1]).is_file(), line


@pytest.mark.parametrize("page", [*PAGES, CARD], ids=name)
def test_python_snippets_name_what_exists(page: Path) -> None:
    for snippet in blocks(page, "python"):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("face_fusion_pipeline"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in KINDS:
                assert hasattr(KINDS[node.value.id], node.attr), ast.unparse(node)
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in KINDS:
                known = arguments_of_a_call(KINDS[node.func.id])
                assert {keyword.arg for keyword in node.keywords} <= known, ast.unparse(node)


def arguments_of_a_call(kind: type) -> set[str | None]:
    classes = kind.__mro__
    return {
        argument for c in classes if "__call__" in vars(c) for argument in inspect.signature(c.__call__).parameters
    }


def runnable(page: Path) -> list[str]:
    changes = {OWN_CHECKPOINT: repr(str(embedded_model())), XL_CHECKPOINT: TINY_XL, **LENGTHS}
    snippets = [snippet for snippet in blocks(page, "python") if A_REPOSITORY not in snippet]
    for old, new in changes.items():
        snippets = [snippet.replace(old, new) for snippet in snippets]
    return snippets


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three people with two photos each, a folder for each of them."""
    folder = tmp_path_factory.mktemp("people")
    for person in range(1_100_004, 1_100_007):
        (folder / str(person)).mkdir()
        frontal = {"expression": "neutral", "style": "photo", "background": "plain gray", "pitch": 0, "roll": 0}
        scenes = [sample_scene(2 * person + number, [person], yaw=8 * number, **frontal) for number in range(2)]
        for number, image in enumerate(render(scenes, 256).images):
            sheet.to_pil(image).save(folder / str(person) / f"{number}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a reader: photos of avatars and weights under the names that pages use; few steps."""
    shutil.copytree(photos, tmp_path / "photos")
    for number, photo in enumerate(("demo/reference.png", "photo.jpg", "ada.jpg", "bob.jpg")):
        path = tmp_path / photo
        path.parent.mkdir(exist_ok=True)
        sheet.portrait(1_100_004 + number).save(path, format="PNG")
    Image.linear_gradient("L").resize((128, 128)).save(tmp_path / "depth.png")
    sheet.portrait(1_100_008).save(tmp_path / "picture.png")
    save_png(sheet.portrait(1_100_007), tmp_path / "out" / "image_000.png", {"description": "generated by AI"})
    (tmp_path / "weights").mkdir()
    shutil.copy(embedded_model() / "face_fusion_adapter.safetensors", tmp_path / "weights")
    tiny_pipeline(family="xl").save_pretrained(tmp_path / TINY_XL.strip('"'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HaarDetector, "sizes", (256,))  # where no face is found, 768 takes seconds
    original = StableDiffusionFaceFusionPipeline.__call__

    def quick(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **{"num_inference_steps": 2, **kwargs})

    monkeypatch.setattr(StableDiffusionFaceFusionPipeline, "__call__", quick)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=name)
def test_python_snippets_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of a page one after the other, on the embedded model, without a network."""
    if "watermark" in page.read_text() and importlib.util.find_spec("blind_watermark") is None:
        pytest.skip("the watermark extra is not installed")
    names: dict[str, Any] = {}
    for snippet in runnable(page):
        exec(compile(snippet, name(page), "exec"), names)
    if "image" in names:
        assert names["image"].size == (128, 128)
    if name(page) == "docs/training.md":
        adapter = load_file(folder / "weights" / "face_fusion_adapter.safetensors")
        shipped = load_file(embedded_model() / "face_fusion_adapter.safetensors")
        assert adapter.keys() == shipped.keys()
        assert any(not torch.equal(adapter[key].float(), shipped[key].float()) for key in adapter)
    if name(page) == "docs/evaluation.md":
        assert names["result"]["methods"].keys() >= {"none", "adapter", "another photo", "somebody else"}
    if name(page) == "docs/responsible_use.md":
        assert capsys.readouterr().out == "generated by AI\nFalse\n"


def test_pages_with_snippets_to_run() -> None:
    """A slip of the pattern above would run nothing and pass."""
    ran = {name(page): len(runnable(page)) for page in PAGES if runnable(page)}
    assert ran["README.md"] >= 3 and ran["docs/index.md"] == 1 and ran["docs/responsible_use.md"] == 2
    assert ran["docs/training.md"] == ran["docs/evaluation.md"] == 1
    assert ran["docs/generate.md"] == ran["docs/several_people.md"] == ran["docs/your_checkpoint.md"] == 2


# --- Tables and figures ----------------------------------------------------------------------------------------------


def test_tables_of_the_figures_are_those_of_the_card() -> None:
    figures, card = (ROOT / "docs" / "figures.md").read_text(), CARD.read_text()
    tables = re.findall(r"<!-- table: \w+ -->\n\n(.*?)\n\n<!-- /table -->", figures, re.S)
    assert len(tables) == 2
    for table in tables:
        assert table in card, "docs/figures.md shows other figures than the card of the embedded model: " + table[:80]


def test_the_readme_is_short_and_asks_for_nothing_that_is_not_there() -> None:
    """One sitting long; and until the package is on a registry no page installs it from one."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 160 and len(readme) <= 14_000
    assert "git clone" in readme
    for page in PAGES:
        assert not re.search(r"pip install [^\n]*face-fusion-pipeline(?!\S* @)", page.read_text()), name(page)


def test_the_diagram_is_what_its_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("draw_method", ROOT / "docs" / "draw_method.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.OUT.read_text() == script.draw(), "run: python docs/draw_method.py"


# --- The site --------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation_and_every_module_in_the_reference() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = set(re.findall(r"[\w/-]+\.md", str(navigation)))
    assert pages == {page.relative_to(ROOT / "docs").as_posix() for page in DOCS}
    described = "\n".join(page.read_text() for page in DOCS)
    named = re.findall(r"^::: (\S+)", described, re.M)
    assert len(named) == len(set(named)), "a module is on two pages"
    package = ROOT / "face_fusion_pipeline"
    packages = [
        "files",
        "generation",
        "inspection",
        "training",
        "evaluation",
        "publishing",
        "avatars/training",
        "avatars/evaluation",
        "avatars/measures",
    ]
    for module in (path for folder in ("", *packages) for path in (package / folder).glob("[!_]*.py")):
        name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
        assert re.search(rf"^::: {re.escape(name)}\b", described, re.M), f"{name} is on no page of docs/reference"


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # advertises the successor of the theme
    command += ["--site-dir", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    page = (tmp_path / "reference" / "weights" / "index.html").read_text()
    assert "load_face_fusion_adapter" in page and "AdapterMismatchError" in page
    assert not re.search(r"\[<code>\w+</code>\]", page)
    assert "FaceFusionTask" in (tmp_path / "reference" / "training" / "index.html").read_text()
    options = (tmp_path / "reference" / "commands" / "index.html").read_text()
    assert all(f">face-fusion {command}<" in options for command in commands()) and "--dry-run" in options
    assert all(f'href="#face-fusion-{command}">{command}<' in options for command in commands())
    foreign = re.compile(r'<(?:script|img|iframe)[^>]+src="(https?:)?//|<link[^>]+stylesheet[^>]+href="(https?:)?//')
    for built in tmp_path.rglob("*.html"):
        assert not foreign.search(built.read_text()), f"{built.name} asks another server for something"
