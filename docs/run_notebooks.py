"""Run the notebooks from top to bottom, and store them with small outputs, as they lie in `examples`.

    python docs/run_notebooks.py                              # all of them, some minutes on two CPU cores
    python docs/run_notebooks.py examples/first_steps.ipynb

Needs `pip install -e ".[test]"`. To be run again when a notebook or the embedded model has changed. A notebook that
fails stays as it was.
"""

import argparse
import base64
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image


NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
QUALITY = 80  # of the JPEG that takes the place of a PNG which is larger
BAR = re.compile(r"\x1b\[\w|^.*(?:\d+%\||\[\d+:\d+[,<]).*$", re.M)  # a line of a progress bar, and its way back up
# transformers would miss torchvision at each import, and tqdm the widgets of Jupyter
SETTINGS = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore:IProgress not found"}


def run(path: Path) -> Any:
    """The notebook with what its cells give, in a kernel and a folder of its own. Raises at the first error."""
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}})
        client.execute(env={**os.environ, **SETTINGS})
    notebook.metadata = nbformat.from_dict(metadata)  # not the version of Python that it ran in
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        if cell.cell_type == "code":
            cell.outputs = [small for output in cell.outputs if (small := smaller(output)) is not None]
    return notebook


def smaller(output: Any) -> Any:
    """The output with a smaller picture, without progress bars; None if nothing is left of it."""
    if output.output_type == "stream" and output.name == "stderr":
        output.text = BAR.sub("", output.text.replace("\r", "\n")).strip()
        return output if output.text else None
    png = output.get("data", {}).get("image/png")
    if png is None:
        return output
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        picture.convert("RGB").save(buffer, "JPEG", quality=QUALITY, optimize=True)
    jpeg = base64.b64encode(buffer.getvalue()).decode()
    if len(jpeg) < len(png):
        del output.data["image/png"]
        output.data["image/jpeg"] = jpeg
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS)
    for path in parser.parse_args().notebooks:
        done = nbformat.writes(run(path))
        path.write_text(done.rstrip("\n") + "\n")
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
