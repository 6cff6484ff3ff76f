"""Files and folders appear whole or not at all, also on a full disk, beside another process, and after a kill."""

import json
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from face_fusion_pipeline import create_adapter, save_adapter
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.cli.generate import free_numbers
from face_fusion_pipeline.face_errors import FaceFusionError
from face_fusion_pipeline.files.atomic import check_new, check_writable, new_folder, replacing, write_text
from face_fusion_pipeline.files.texts import read_log
from face_fusion_pipeline.generation.contact_sheet import save_new_png
from face_fusion_pipeline.publishing.repository import write_folder
from face_fusion_pipeline.training.checkpoints import numbered_states
from face_fusion_pipeline.training.errors import TrainingError
from face_fusion_pipeline.training.loop import LoopOptions, Task, train
from face_fusion_pipeline.training.run_records import add_record


@contextmanager
def full_disk(bytes: int) -> Iterator[None]:
    """Inside, no file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# --- One file, one folder ----------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "é")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "é".encode()
    with full_disk(10), pytest.raises(OSError):
        write_text(tmp_path / "a" / "b.txt", "x" * 100)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a" / "b.txt") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a" / "b.txt").read_bytes() == "é".encode() and names(tmp_path / "a") == ["b.txt"]
    write_text(tmp_path / ("n" * 250), "a name as long as the system takes")


def test_a_folder_appears_whole_and_a_retry_is_not_barred(tmp_path: Path) -> None:
    files = {"a.txt": b"a", "sub/b.txt": bytes(100)}
    for out in (tmp_path / "new" / "out", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with full_disk(50), pytest.raises(OSError):
            write_folder(dict(files), out)
        assert not out.exists() or names(out) == []
        inside = out if out.is_dir() else out.parent
        (inside / f".{out.name}.partial").mkdir()  # as a kill leaves it
        (inside / f".{out.name}.partial" / "old").touch()
        write_folder(dict(files), out)
        assert names(out) == ["a.txt", "b.txt", "sub"]
        with pytest.raises(FaceFusionError, match="no empty folder"), new_folder(out):
            pass


def test_a_folder_that_cannot_be_is_known_and_no_trace_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for bad in ("file", "file/below", "link", "pipe/x", "n" * 300, "a/" + "n" * 300, "zero\0", "/proc/nothing/x"):
        with pytest.raises(FaceFusionError, match="name a(nother)? folder") as raised:
            check_writable(tmp_path / bad)
        assert bad[:9].split("/")[0] in str(raised.value)
    for good in (tmp_path, tmp_path / "a" / "b", tmp_path / "x" / ".." / "y"):
        check_new(good / "new")
    assert names(tmp_path) == ["file", "link", "pipe"]


@pytest.mark.parametrize(
    "command", ["average a b", "push a", "generate --face x --prompt y", "sweep --face x --prompt y"]
)
def test_an_out_that_cannot_be_is_noticed_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out in ("file", "file/below", "n" * 300):
        assert main([*command.split(), "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert "--out" in error and len(error.splitlines()) == 1, (
            "and nothing of photos or weights, which are not there"
        )


# --- Two processes -----------------------------------------------------------------------------------------------


def _write_many(folder: Path, colour: int) -> None:
    for _ in range(20):
        numbers = (f"image_{number:03d}.png" for number in free_numbers(folder))
        save_new_png(Image.new("RGB", (8, 8), (colour, 0, 0)), folder, numbers)


def test_two_runs_into_one_folder_lose_no_picture(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=_write_many, args=(tmp_path, colour)) for colour in (1, 2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
        assert run.exitcode == 0
    assert names(tmp_path) == [f"image_{number:03d}.png" for number in range(40)]
    colours = [Image.open(path).getpixel((0, 0))[0] for path in tmp_path.iterdir()]  # type: ignore[index]
    assert colours.count(1) == colours.count(2) == 20


def test_numbers_go_on_after_pictures_and_sheets(tmp_path: Path) -> None:
    for name, expected in (("x.png", 0), ("contact_sheet.png", 1), ("image_004.png", 5), ("contact_sheet_007.png", 8)):
        (tmp_path / name).touch()
        assert next(free_numbers(tmp_path)) == expected
    (tmp_path / f"image_{'9' * 5000}.png"[:200]).touch()
    assert next(free_numbers(tmp_path)) == 8


# --- Averages ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for name in "ab":
        save_adapter(create_adapter(tiny_models.tiny_unet()), folder / name / "face_fusion_adapter.safetensors")
    return folder


def average(weights: Path, out: Path) -> int:
    return main(["average", str(weights / "a"), str(weights / "b"), "--out", str(out)])


def test_a_damaged_record_is_known_before_weights_are_written(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for damaged, content in (("b", '{"face'), ("b", "[]"), ("b", '{"x": 1}'), ("a", "")):
        for name in "ab":
            write_text(weights / name / "training.json", content if name == damaged else '{"x": {"steps": 1}}')
        assert average(weights, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert f"{damaged}/training.json" in error and "remove it" in error
        assert not (tmp_path / "out").exists()


def test_of_weights_and_record_both_are_written_or_none(weights: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_text(weights / name / "training.json", json.dumps({"x": {"steps": 1, "note": "n" * 100_000}}))
    for room in (90_000, 1_000):  # for the weights, for neither
        with full_disk(room):
            assert average(weights, tmp_path / "out") == 2
        assert names(tmp_path / "out") == []
    assert average(weights, tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["face_fusion_adapter.safetensors", "training.json"]
    (weights / "b" / "training.json").unlink()
    assert average(weights, tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["face_fusion_adapter.safetensors"], "the record was of other weights"


# --- Resuming ----------------------------------------------------------------------------------------------------

OPTIONS = LoopOptions(batch_size=2, lr=0.1, steps=4, warmup=0, schedule="constant", log_every=1, checkpoint_steps=1)


class Line(Task):
    """One weight that learns to be one."""

    name, size = "line", 8

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.steps = nn.Parameter(torch.zeros(3)), 0

    def batch(self, indices: torch.Tensor, generator: torch.Generator, progress: float) -> dict[str, torch.Tensor]:
        return {"noise": torch.randn(3, generator=generator)}

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.steps += 1
        return (self.weight - 1 - batch["noise"] / 9).square().mean(), {}

    def export(self, folder: Path) -> None:
        write_text(folder / "exported", "")


def run(folder: Path, **changed: Any) -> Line:
    task = Line()
    train(task, LoopOptions(**{**vars(OPTIONS), **changed}), folder)
    return task


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a safetensors file is no dict
        counters = json.loads(file.metadata()["state"])
    change(tensors, counters)
    save_file(tensors, path, {"state": json.dumps(counters)})


def drop(*starts: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor], counters: dict[str, Any]) -> None:
        for key in [key for key in tensors if key.startswith(starts)]:
            del tensors[key]

    return lambda path: rewrite(path, change)


def lose(counter: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda tensors, counters: counters.pop(counter))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "other content": lambda path: path.write_bytes(b"x" * 1000),
    "no metadata": lambda path: save_file({"model/weight": torch.zeros(3)}, path),
    "metadata cut off": lambda path: save_file({"model/weight": torch.zeros(3)}, path, {"state": '{"step": 3'}),
    "metadata of something else": lambda path: save_file({"model/weight": torch.zeros(3)}, path, {"state": "[]"}),
    "no state of the optimizer": drop("optimizer/"),
    "half the state of the optimizer": drop("optimizer/exp_avg_sq/"),
    "no step of the optimizer": drop("optimizer/step/"),
    "no average": drop("ema/"),
    "no weights": drop("model/"),
    "no step": lose("step"),
    "no seconds": lose("seconds"),
    "no options": lose("options"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = run(tmp_path / "straight")
    out = tmp_path / "out"
    run(out, steps=3)
    DAMAGES[damage](numbered_states(out)[-1])
    resumed = run(out, checkpoint_limit=1)
    assert resumed.steps == 2 and torch.equal(resumed.weight, straight.weight)
    assert "checkpoint-3" in caplog.text and "the one before is taken" in caplog.text
    kept = sorted(path.name for path in out.glob("checkpoint-*"))
    assert kept == ["checkpoint-3.damaged", "checkpoint-4"], "it is kept, and never again taken for the last"


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_another_checkpoint_the_file_and_the_remedy_are_named(damage: str, tmp_path: Path) -> None:
    run(tmp_path, steps=1)
    DAMAGES[damage](numbered_states(tmp_path)[-1])
    for resume in ("auto", str(tmp_path / "checkpoint-1")):
        with pytest.raises(TrainingError, match=r"checkpoint-1/training_state.*(resume from another|begin anew)"):
            run(tmp_path, resume=resume)
    assert [path.parent.name for path in numbered_states(tmp_path)] == ["checkpoint-1"]
    unnumbered = {"checkpoint_steps": None, "steps": 1}
    run(tmp_path / "one", **unnumbered)
    path = tmp_path / "one" / "logs" / "line" / "checkpoint.safetensors"
    DAMAGES[damage](path)
    with pytest.raises(TrainingError, match="checkpoint.safetensors"):
        run(tmp_path / "one", **unnumbered)


def test_a_checkpoint_of_an_earlier_version_is_taken(tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    lose("tensors")(numbered_states(tmp_path)[-1])
    assert run(tmp_path).steps == 2


@pytest.mark.parametrize(
    "torn", ['{"step": 2, "lo', '{"step": 2, "lo{"step": 9}', "\0\0\0", "[1]", "[" * 100_000, "\xff"]
)
def test_a_torn_log_is_read_without_its_torn_lines(torn: str, tmp_path: Path, caplog: Any) -> None:
    run(tmp_path, steps=2)
    path = tmp_path / "logs" / "line" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn.encode("latin-1"))
    run(tmp_path)
    assert [row["step"] for row in read_log(path)] == [1, 2, 3, 4]
    assert "metrics.jsonl: line 3 is damaged" in caplog.text


@pytest.mark.parametrize("torn", ['{"other": {"steps', "", "[]", '{"line": 3}', "\xff"])
def test_a_torn_record_costs_no_training(torn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "training.json").write_bytes(torn.encode("latin-1"))
    train(Line(), OPTIONS, tmp_path, source=tmp_path)
    assert json.loads((tmp_path / "training.json").read_text())["line"]["steps"] == 4
    assert (tmp_path / "training.json.damaged").read_bytes() == torn.encode("latin-1")
    assert "training.json" in caplog.text
    add_record(tmp_path / "training.json", "other", {"steps": 1})
    assert json.loads((tmp_path / "training.json").read_text()).keys() == {"line", "other"}


def test_a_record_that_lacks_something_is_still_known(tmp_path: Path) -> None:
    write_text(tmp_path / "first" / "training.json", '{"line": {"note": 1}}')
    record = train(Line(), OPTIONS, tmp_path / "second", source=tmp_path / "first")
    assert record["continues"] == {"note": 1}
