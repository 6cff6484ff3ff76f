"""Every notebook of the examples runs from top to bottom on the embedded model, and shows what it promises."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from diffusers import UNet2DConditionModel
from nbclient import NotebookClient
from PIL import Image

from face_fusion_pipeline import embedded_model
from face_fusion_pipeline.training.controlnet import create_controlnet


EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
QUICK = {"STEPS": "4", "COUNT": "2"}  # constants of the notebooks that cost time


def read(name: str) -> Any:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def run(name: str, folder: Path, **constants: str) -> Any:
    """The notebook with outputs, executed in `folder` with other values of its constants, `NAME = value` each."""
    notebook = read(name)
    for constant, value in constants.items():
        changed = 0
        for cell in notebook.cells:
            cell.source, count = re.subn(rf"^{constant} = .*$", f"{constant} = {value}", cell.source, flags=re.M)
            changed += count
        assert changed == 1, f"{name}.ipynb sets {constant} {changed} times"
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()  # raises on the first error


def pictures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)
    assert "Traceback" not in "".join(output.text for output in outputs if output.output_type == "stream")
    return sum("image/png" in output.get("data", {}) for output in outputs)


def size_of_picture(cell: Any) -> tuple[int, int]:
    data = next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    return Image.open(io.BytesIO(base64.b64decode(data))).size


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in {text!r}"
    return [float(value) for value in found.groups()]


# --- As stored -----------------------------------------------------------------------------------------------------


def test_notebooks_are_those_that_are_tested() -> None:
    assert {path.stem for path in NOTEBOOKS} == {
        "first_steps",
        "several_people",
        "train_on_your_photos",
        "look_inside",
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.read_text().endswith("}\n") and path.stat().st_size < 20_000
    for cell in notebook.cells:
        assert cell.id
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cell_installs_the_package_only_where_it_is_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].cell_type == "markdown" and "Stable Diffusion 1.x" in notebook.cells[0].source
    install = notebook.cells[1].source
    magic = re.search(r"^    (%pip install .*)$", install, re.M)
    assert magic and "git+https://github.com/OWNER/NAME" in magic[1]
    installed: list[str] = []
    code = compile(install.replace(magic[1], "installed.append('package')"), path.name, "exec")
    exec(code, {"installed": installed})
    assert installed == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(code, {"installed": installed})
    assert installed == ["package"]


# --- Executed ------------------------------------------------------------------------------------------------------


def test_first_steps(tmp_path: Path) -> None:
    notebook = run("first_steps", tmp_path, **QUICK)
    assert pictures(notebook) == 4
    off, on = numbers(r"similarity (-?[\d.]+) at strength 0, (-?[\d.]+) at strength 1", printed(notebook))
    assert -1 <= off < on <= 1, "a face that is fused in does not make the pictures more alike"


def test_several_people(tmp_path: Path) -> None:
    notebook = run("several_people", tmp_path, STEPS="2", CONTROLNET="MODEL / 'none'")
    assert pictures(notebook) == 4
    assert "2 places from the layout" in printed(notebook)
    assert "No depth ControlNet lies in none/" in printed(notebook)


def test_depth_control_where_there_is_a_controlnet(tmp_path: Path) -> None:
    """An untrained one: it shows that the notebook finds and uses it, not what it does."""
    unet = UNet2DConditionModel.from_pretrained(embedded_model(), subfolder="unet")
    create_controlnet(unet).save_pretrained(tmp_path / "net")
    notebook = run("several_people", tmp_path, STEPS="2", CONTROLNET=f"MODEL / {str(tmp_path / 'net')!r}")
    assert pictures(notebook) == 4
    assert "No depth ControlNet" not in printed(notebook)
    width, height = size_of_picture(notebook.cells[-1])
    assert width > 2.5 * height  # layout, depth and two results in a row


def test_train_on_your_photos(tmp_path: Path) -> None:
    notebook = run("train_on_your_photos", tmp_path, STEPS="2", TRAINING_STEPS="2")
    assert pictures(notebook) == 2
    text = printed(notebook)
    (kept,) = numbers(r"(\d+) of 40 photos of 8 people", text)
    assert kept > 20
    assert numbers(r"(\d+) steps of 4 in", text) == [2]


def test_look_inside(tmp_path: Path) -> None:
    notebook = run("look_inside", tmp_path, STEPS="4")
    assert pictures(notebook) == 4
    text = printed(notebook)
    assert "the same picture: True" in text
    shares = numbers(r"left eye ([\d.]+), mouth ([\d.]+), background ([\d.]+)", text)
    assert all(0 < share < 1 for share in shares)
