"""`face-fusion sweep`: the grid of settings of the self-attention."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from PIL import Image

from face_fusion_pipeline.cli import main
from face_fusion_pipeline.generation.contact_sheet import BAR, GAP, SMALLEST_CELL


CELL = SMALLEST_CELL + GAP


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.tiny_pipeline().save_pretrained(folder)
    tiny_models.face(1, size=32).save(folder / "face.png")
    return folder


def sweep(model: Path, out: Path, *words: str) -> int:
    given = ["--face", str(model / "face.png"), "--no-detect", "--prompt", "a cat", "--model", str(model)]
    return main(["sweep", *given, "--out", str(out), "--steps", "2", *words])


def test_every_combination_is_in_its_cell(model, tmp_path, capsys):
    words = ["--timesteps", "0", "300", "--scales", "0", "2", "--layers", "up", "all"]
    assert sweep(model, tmp_path, *words) == 0
    sheet = np.asarray(Image.open(tmp_path / "sweep.png"))
    assert sheet.shape[:2] == (BAR + 4 * CELL, GAP + 3 * CELL)
    printed = capsys.readouterr().out
    assert printed.splitlines()[1:] == [
        f"row: {layers}, timestep {timestep}" for layers in ("up", "all") for timestep in (0, 300)
    ]

    def cell(row: int, column: int) -> np.ndarray:
        top, left = BAR + row * CELL, GAP + column * CELL
        return sheet[top : top + SMALLEST_CELL // 2, left : left + SMALLEST_CELL]  # above the label

    plain = cell(0, 0)
    for row in range(4):
        assert np.array_equal(cell(row, 1), plain)  # strength 0 is the plain pipeline
        assert not np.array_equal(cell(row, 2), plain)
    assert len({cell(row, 2).tobytes() for row in range(4)}) == 4
    assert (sheet[BAR + CELL : BAR + 2 * CELL - GAP, GAP : GAP + SMALLEST_CELL] == 255).all()  # one picture without


def test_the_grid_says_what_made_it(model, tmp_path, capsys, monkeypatch):
    marked = []
    monkeypatch.setattr("face_fusion_pipeline.generation.watermark.blind_watermark", lambda: None)
    monkeypatch.setattr(
        "face_fusion_pipeline.generation.watermark.add_watermark", lambda picture: marked.append(1) or picture
    )
    words = ["--timesteps", "0", "--scales", "2", "--layers", "up", "--json", "--watermark"]
    assert sweep(model, tmp_path, *words) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["columns"] == ["without", "strength 2"] and made["rows"] == ["up, timestep 0"] and made["watermark"]
    assert Image.open(made["files"][0]).text["watermark"] == "True" and marked == [1]


def test_what_cannot_be_swept_is_refused(model, tmp_path, capsys):
    for words, said in (
        (["--mode", "adapter"], "no --mode adapter"),
        (["--num-images", "2"], "leave --num-images out"),
        (["--batch-size", "2"], "leave --batch-size out"),
        (["--self-scale", "2"], "leave --self-scale out"),
        (["--no-sheet"], "leave --no-sheet out"),
        (["--prompt", "a dog"], "leave the second --prompt out"),
        (["--scales", "-1"], "got -1"),
        (["--timesteps", *map(str, range(60))], "more than 100"),
    ):
        assert sweep(model, tmp_path / "out", *words) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
