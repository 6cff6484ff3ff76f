"""`face-fusion push`: exactly the folder that the card's own snippet needs, and nothing that should stay at home."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from tiny_models import face, kind_of, tiny_pipeline

from face_fusion_pipeline import create_adapter, embedded_model
from face_fusion_pipeline.avatars.world.sheet import portrait
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.publishing import card, hub, repository


ROOT = Path(__file__).parents[1]
CARD = ROOT / "weights_card"

# The snippet of a card, word for word, in a process that knows the package as little as a user of the Hub does.
RUN_SNIPPET = """
import sys
import torch
torch.set_num_threads(1)
exec(compile(open("snippet.py").read(), "card", "exec"))
assert "face_fusion_pipeline" not in sys.modules
assert type(pipe).__name__ == sys.argv[1] and pipe._face_adapter is not None
"""


@pytest.fixture
def family() -> str:
    """Of the weights, where a test says no other."""
    return "sd"


@pytest.fixture
def trained(tmp_path: Path, family: str) -> Path:
    """What `face-fusion train` leaves behind: weights, card, records; and much that is nobody's business."""
    folder = tmp_path / "trained"
    pipe = tiny_pipeline(family=family)
    pipe.save_pretrained(tmp_path / "base")
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, metadata={"resolution": 16}))
    pipe.save_face_fusion_adapter(folder)
    text = card.render_card(title="Ada", summary="Ada.", base="base", training="Short.", limits="Many.")
    (folder / "README.md").write_text(text)
    (folder / "training.json").write_text(json.dumps({"face-fusion": {"pipeline": type(pipe).__name__}}))
    for name in ("prepared/faces/ada.png", "checkpoint-2/state.bin", "logs/face-fusion/sample_0000002.png", "me.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        face(1, size=32).save(folder / name, format="PNG")
    (folder / "logs/face-fusion/metrics.jsonl").write_text("{}\n")
    return folder


def downloaded(files: dict[str, Path | bytes], home: Path) -> str:
    """Put the files into the cache of the Hub in `home` as a download of someone/weights does; returns the card.

    They are links to blobs that are named by hash, so that nothing may rely on lying beside another file.
    """
    cache, revision = home / "hub" / "models--someone--weights", "0123abcd" * 5
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(revision)
    repository.write_folder(files, home / "files")
    for number, name in enumerate(files):
        blob = cache / "blobs" / f"{number:040x}"
        blob.parent.mkdir(exist_ok=True)
        shutil.move(home / "files" / name, blob)
        link = cache / "snapshots" / revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return (cache / "snapshots" / revision / "README.md").read_text()


def run_offline(command: list[str], cwd: Path) -> None:
    """Run Python in a process that has nothing of the Hub but the cache in `cwd`."""
    environment = {
        **os.environ,
        "HF_HOME": str(cwd),
        "HF_HUB_CACHE": str(cwd / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(cwd / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]


def run_snippet(text: str, cwd: Path, pipeline: str = "StableDiffusionFaceFusionPipeline") -> None:
    """Run the Python of a card, with fewer denoising steps."""
    snippet = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippet) == 1
    assert "face_image=face)" in snippet[0]
    short = snippet[0].replace("face_image=face)", "face_image=face, num_inference_steps=2)")
    (cwd / "snippet.py").write_text(short)
    run_offline(["-c", RUN_SNIPPET, pipeline], cwd)
    assert_picture(cwd / "picture.png")


def assert_picture(path: Path) -> None:
    with Image.open(path) as picture:
        assert len(set(picture.convert("L").getdata())) > 20  # not a blank picture


def command_of(text: str) -> list[str]:
    """The one command of a card, in words."""
    commands = re.findall(r"^face-fusion (generate .*)$", text, re.M)
    assert len(commands) == 1
    return shlex.split(commands[0])


def test_the_snippets_of_the_card_run_on_the_pushed_avatar_model(tmp_path: Path) -> None:
    """Without this package, and with it."""
    text = downloaded(repository.repository_files(CARD, "someone/weights"), tmp_path)
    run_snippet(text, tmp_path)
    portrait(1_100_007).save(tmp_path / "photo.jpg")
    run_offline(["-m", "face_fusion_pipeline", *command_of(text), "--steps", "2"], tmp_path)
    assert_picture(tmp_path / "out" / "image_000.png")


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_the_cards_snippet_runs_on_pushed_weights_for_another_base(trained: Path, tmp_path: Path, family: str) -> None:
    text = downloaded(repository.repository_files(trained, "someone/weights"), tmp_path)
    face(1, size=32).save(tmp_path / "face.png")
    run_snippet(text, tmp_path, kind_of(family).__name__)


def test_the_cards_command_parses(trained: Path) -> None:
    from face_fusion_pipeline.cli import build_parser

    for folder in (CARD, trained):
        text = repository.repository_files(folder, "someone/weights")["README.md"].decode()  # type: ignore[union-attr]
        assert build_parser().parse_args(command_of(text)).adapter == "someone/weights"


def test_metadata_of_the_avatar_model(tmp_path: Path) -> None:
    files = repository.repository_files(CARD, "someone/weights")
    text = files["README.md"].decode()  # type: ignore[union-attr]
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "diffusers", "text-to-image")
    assert {"face-fusion", "stable-diffusion"} <= set(data.tags)
    assert len(data["widget"]) >= 2
    for example in data["widget"]:
        assert example["text"] and isinstance(files[example["output"]["url"]], Path)
    assert "images/reference.png" in files and "images/sheet.png" in files
    assert text.count("](images/sheet.png)") == 1 and "sheet.png" not in str(data["widget"])
    for heading in ("Use", "Intended use", "Limits, bias and misuse", "Training", "Evaluation"):
        assert f"\n## {heading}\n" in text, heading
    assert card.REPOSITORY not in text and "Cost:" in text


def test_the_committed_card_is_that_of_the_embedded_model() -> None:
    assert (CARD / "README.md").resolve() == embedded_model() / "README.md"
    parts = json.loads((embedded_model() / "model_index.json").read_text())
    files = repository.repository_files(CARD)
    parts = [name for name, value in parts.items() if isinstance(value, list) and value[0] is not None]
    assert "unet" in parts and "face_fusion_defaults.json" in files
    for part in parts:
        assert any(name.startswith(f"{part}/") for name in files), part


def test_nothing_else_goes_up(trained: Path) -> None:
    files = repository.repository_files(trained)
    modules = {name for name in files if name.endswith(".py")}
    others = {
        "README.md",
        "LICENSE",
        "face_fusion_adapter.safetensors",
        "training.json",
        "logs/face-fusion/metrics.jsonl",
    }
    assert files.keys() - modules == others
    assert {"pipeline.py", "face_attention.py", "face_detectors.py"} <= modules
    assert all("/" not in name for name in modules), "the loader of diffusers looks for siblings only"


def test_dry_run_lists_and_sends_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", None)
    assert main(["push", str(CARD), "--dry-run", "--to", "someone/weights"]) == 0
    out = capsys.readouterr().out
    assert " pipeline.py\n" in out and " unet/config.json\n" in out and "nothing was uploaded" in out


class StubbedHub:
    """Remembers what it was asked to do."""

    made: list[Any] = []
    sent: dict[str, Any] = {}

    def create_repo(self, name: str, **options: Any) -> Any:
        self.made.append((name, options))
        return type("Url", (), {"repo_id": name})

    def repo_info(self, name: str) -> Any:
        return type("Info", (), {"private": "public" not in name})

    def create_commit(self, repository: str, operations: Any, **options: Any) -> Any:
        self.sent.update({operation.path_in_repo: operation for operation in operations}, repository=repository)
        return type("Commit", (), {"commit_url": "https://address"})


def test_a_public_repository_is_not_taken_for_a_private_one(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HfApi", StubbedHub)
    monkeypatch.setattr(StubbedHub, "made", [])
    monkeypatch.setattr(StubbedHub, "sent", {})
    assert main(["push", str(trained), "--to", "me/public", "--private", "--license", "openrail"]) == 2
    assert "me/public is on the Hub already, and public" in capsys.readouterr().err and not StubbedHub.sent
    assert main(["push", str(trained), "--to", "me/public", "--license", "openrail"]) == 0


def test_pushes_in_one_commit(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(hub, "HfApi", StubbedHub)
    (tmp_path / "table.md").write_text("| likeness | 0.9 \\1 |\n")
    words = ["push", str(trained), "--to", "me/ada", "--private", "--license", "openrail", "--json"]
    assert main([*words, "--table", str(tmp_path / "table.md")]) == 0
    assert StubbedHub.made == [("me/ada", {"private": True, "exist_ok": True})]
    assert StubbedHub.sent["repository"] == "me/ada" and "face_fusion_adapter.safetensors" in StubbedHub.sent
    pushed = ModelCard(StubbedHub.sent["README.md"].path_or_fileobj.decode())
    assert pushed.data.license == "openrail"
    assert "| likeness | 0.9 \\1 |" in pushed.text and card.NOT_MEASURED not in pushed.text
    assert 'snapshot_download("me/ada")' in pushed.text
    assert json.loads(capsys.readouterr().out)["address"] == "https://address"
    assert card.NOT_MEASURED in (trained / "README.md").read_text(), "the folder itself stays as it was"
    assert not caplog.messages
    assert main(["push", str(trained), "--dry-run"]) == 0
    assert "names no licence" in caplog.text


def test_writes_the_folder_to_look_at(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "written"
    assert main(["push", str(trained), "--out", str(out)]) == 0
    assert (out / "pipeline.py").read_bytes() == (ROOT / "face_fusion_pipeline" / "pipeline.py").read_bytes()
    assert main(["push", str(trained), "--out", str(out)]) == 2
    assert "no empty folder" in capsys.readouterr().err


def test_bad_input_is_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*words: object) -> str:
        assert main(["push", *map(str, words)]) == 2
        *notes, line = capsys.readouterr().err.splitlines()
        assert line.startswith("face-fusion: error:") and not [note for note in notes if "error:" in note]
        return line

    assert "--to OWNER/NAME" in error(trained)
    assert "'a b'" in error(trained, "--to", "a b")
    assert "nowhere" in error(tmp_path / "nowhere", "--dry-run")
    assert "no.md" in error(trained, "--dry-run", "--table", tmp_path / "no.md")
    (tmp_path / "table.md").write_text("| x |")
    text = (trained / "README.md").read_text()
    (trained / "README.md").write_text(text.replace("<!-- evaluation -->", ""))
    assert "<!-- evaluation -->" in error(trained, "--dry-run", "--table", tmp_path / "table.md")
    (trained / "README.md").write_text("---\nlicense: [\n---\n")
    assert "cannot be read" in error(trained, "--dry-run")
    (trained / "README.md").write_text(text)
    save_file({"w": torch.zeros(1)}, trained / "face_fusion_adapter.safetensors")
    assert "not a Face Fusion adapter" in error(trained, "--dry-run")
    (trained / "face_fusion_adapter.safetensors").unlink()
    assert "face_fusion_adapter.safetensors" in error(trained, "--dry-run")


def test_a_hub_that_refuses_is_one_line(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(StubbedHub):
        def create_commit(self, *args: Any, **options: Any) -> Any:
            raise RuntimeError("403 Forbidden")

    monkeypatch.setattr(hub, "HfApi", Refusing)
    assert main(["push", str(trained), "--to", "me/ada"]) == 2
    assert "403 Forbidden" in capsys.readouterr().err
