"""Every notebook of the examples runs from top to bottom on the embedded model, and shows what it promises."""

import base64
import importlib.util
import io
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from PIL import Image
from tiny_models import tiny_pipeline


EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
PLACEHOLDER = "OWNER/NAME"  # of the repository, which a reader puts there
OUTPUTS = 1_500_000  # characters of a notebook with its outputs, as they come
STORED = 300_000  # bytes of a notebook with its outputs, as docs/run_notebooks.py leaves them
QUICK = {"STEPS": "4", "COUNT": "2"}  # constants of the notebooks that cost time


def read(name: str) -> Any:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def run(name: str, folder: Path, then: str = "", **constants: str) -> Any:
    """The notebook with outputs, executed in `folder` with other values of its constants, `NAME = value` each.

    `then` is run before its last cell is executed once more, at the end.
    """
    notebook = read(name)
    if then:
        again = nbformat.v4.new_code_cell(notebook.cells[-1].source)
        notebook.cells += [nbformat.v4.new_code_cell(then), again]
    for constant, value in constants.items():
        changed = 0
        for cell in notebook.cells:
            cell.source, count = re.subn(rf"^{constant} = .*$", f"{constant} = {value}", cell.source, flags=re.M)
            changed += count
        assert changed == 1, f"{name}.ipynb sets {constant} {changed} times"
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})  # raises on the first error
    assert len(nbformat.writes(notebook)) < OUTPUTS, "the outputs are too large to keep in a notebook"
    return notebook


def pictures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)
    assert "Traceback" not in "".join(output.text for output in outputs if output.output_type == "stream")
    return sum("image/png" in output.get("data", {}) for output in outputs)


def images_of(output: Any) -> list[str]:
    """The pictures of an output, in base64."""
    return [data for kind, data in output.get("data", {}).items() if kind.startswith("image/")]


def size_of_picture(cell: Any) -> tuple[int, int]:
    data = next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    return Image.open(io.BytesIO(base64.b64decode(data))).size


def printed_by(cell: Any) -> str:
    return "".join(o.text for o in cell.get("outputs", []) if o.output_type == "stream" and o.name == "stdout")


def printed(notebook: Any) -> str:
    return "".join(map(printed_by, notebook.cells))


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in {text!r}"
    return [float(value) for value in found.groups()]


# --- As stored -----------------------------------------------------------------------------------------------------


def test_notebooks_are_those_that_are_tested() -> None:
    assert {path.stem for path in NOTEBOOKS} == {
        "first_steps",
        "several_people",
        "poses",
        "train_on_your_photos",
        "look_inside",
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_small_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.read_text().endswith("}\n") and path.stat().st_size < STORED
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # in one go, from top to bottom
    assert all(cell.id and "execution" not in cell.metadata for cell in notebook.cells)
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}  # no error
    assert not [output.text for output in outputs if output.get("name") == "stderr"]  # no warning
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for o in outputs for data in images_of(o)]
    assert sizes and all(100 < side < 1200 for size in sizes for side in size)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_name_no_path_of_a_machine(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"(?<![\w.])(/\w+/|~/|[A-Z]:\\)", text), text


def test_the_command_that_stores_them_makes_pictures_small_and_leaves_bars_out() -> None:
    spec = importlib.util.spec_from_file_location("run_notebooks", EXAMPLES.parent / "docs" / "run_notebooks.py")
    assert spec and spec.loader
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    assert command.NOTEBOOKS == NOTEBOOKS
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(buffer, "PNG")
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": "<Figure>"}
    small = command.smaller(nbformat.v4.new_output("display_data", data)).data
    assert small.keys() == {"image/jpeg", "text/plain"} and len(small["image/jpeg"]) < len(data["image/png"])
    bars = "\rLoading: 50%|##  | 1/2 [00:01<00:01]\n\x1b[A\rpreparing: 24photo [00:41,  1.73s/photo]\n"
    assert command.smaller(nbformat.v4.new_output("stream", name="stderr", text=bars)) is None
    said = command.smaller(nbformat.v4.new_output("stream", name="stderr", text=bars + "a warning\n"))
    assert said.text == "a warning"  # which the tests above would find


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cell_installs_the_package_only_where_it_is_not(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].cell_type == "markdown" and "Stable Diffusion 1.x" in notebook.cells[0].source
    shell = InteractiveShell()
    installed: list[str] = []
    shell.register_magic_function(installed.append, magic_name="pip")

    def run_cell(repository: str) -> BaseException | None:
        return shell.run_cell(notebook.cells[1].source.replace(PLACEHOLDER, repository, 1)).error_in_exec

    assert PLACEHOLDER in notebook.cells[1].source
    assert run_cell(PLACEHOLDER) is None and installed == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "REPOSITORY" in str(run_cell(PLACEHOLDER)) and installed == []  # as it is: what to do, not an error of pip
    assert run_cell("someone/weights") is None
    assert installed == ['install --quiet "face-fusion-pipeline[evaluate] @ git+https://github.com/someone/weights"']


# --- Executed ------------------------------------------------------------------------------------------------------


def test_first_steps(tmp_path: Path) -> None:
    tiny_pipeline(family="xl").save_pretrained(tmp_path / "xl")
    notebook = run("first_steps", tmp_path, XL_MODEL='"xl"', **QUICK)
    assert pictures(notebook) == 5
    off, on = numbers(r"similarity (-?[\d.]+) at strength 0, (-?[\d.]+) at strength 1", printed(notebook))
    assert -1 <= off < on <= 1, "a face that is fused in does not make the pictures more alike"


def test_several_people(tmp_path: Path) -> None:
    notebook = run("several_people", tmp_path, STEPS="2", then="CONTROLNET = MODEL / 'none'")
    assert pictures(notebook) == 6
    assert "2 places from the layout" in printed(notebook)
    width, height = size_of_picture(notebook.cells[-3])
    assert width > 2.5 * height  # layout, depth and two results in a row
    without = notebook.cells[-1]
    assert "No depth ControlNet lies in none/" in printed_by(without)
    assert printed(notebook).count("No depth ControlNet") == 1
    width, height = size_of_picture(without)
    assert width < 2.5 * height  # layout and depth


def test_poses(tmp_path: Path) -> None:
    notebook = run("poses", tmp_path, STEPS="1", YAWS="(-20, 20)", EXPRESSIONS='{"smiling": "smiling"}')
    assert pictures(notebook) == 3
    yaw, pitch = numbers(r"yaw (-?\d+), pitch (-?\d+)", printed(notebook))
    assert abs(yaw) < 15 and abs(pitch) < 15  # what the portrait shows


def test_train_on_your_photos(tmp_path: Path) -> None:
    notebook = run("train_on_your_photos", tmp_path, PEOPLE="3", STEPS="2", TRAINING_STEPS="2")
    assert pictures(notebook) == 2
    text = printed(notebook)
    (kept,) = numbers(r"(\d+) of 12 photos of 3 people", text)
    assert kept > 5
    assert numbers(r"(\d+) steps of 4 in", text) == [2]


def test_look_inside(tmp_path: Path) -> None:
    notebook = run("look_inside", tmp_path, STEPS="4")
    assert pictures(notebook) == 4
    text = printed(notebook)
    assert "the same picture: True" in text
    shares = numbers(r"left eye ([\d.]+), mouth ([\d.]+), background ([\d.]+)", text)
    assert all(0 < share < 1 for share in shares)
