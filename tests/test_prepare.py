"""`face-fusion prepare`: every kind of source, what is skipped and why, and taking up a run that was stopped."""

import dataclasses
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from face_fusion_pipeline.avatars.world.sheet import portrait
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.face_detectors import Face
from face_fusion_pipeline.face_errors import (
    FaceTooSmallError,
    NoFaceError,
    SeveralFacesError,
    UnreadableImageError,
)
from face_fusion_pipeline.training import preparation
from face_fusion_pipeline.training.augmentation import augmented
from face_fusion_pipeline.training.preparation import PrepareOptions, prepare, read_rows
from face_fusion_pipeline.training.selection import (
    RefusedPhotoError,
    SelectionOptions,
    differences,
    select,
    sharpness,
    thumbnail,
    training_square,
)
from face_fusion_pipeline.training.sources import (
    BrokenShardError,
    DataError,
    Photo,
    SourceOptions,
    open_source,
)


BOX = (30.0, 20.0, 60.0, 60.0)
OPTIONS = SelectionOptions(resolution=32, reference_resolution=16, min_side=32, min_face=8)


def noise(seed: int, size: tuple[int, int] = (100, 80)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


class Fixed:
    """A detector that sees what it was told, in pixels of a 100 x 80 picture."""

    name, sizes = "fixed", (100,)

    def __init__(self, *boxes: tuple[float, float, float, float]) -> None:
        self.boxes = boxes

    def detect(self, image: Image.Image) -> list[Face]:
        return [Face(box, 0.9) for box in self.boxes] if image.size == (100, 80) else []


def photos_of(pieces: Iterator[Any]) -> list[Photo]:
    return [photo for piece in pieces for photo in piece.photos()]


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """An ImageFolder whose pictures are noise; rows get a box where they have none."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, row in enumerate(rows):
        row.setdefault("file_name", f"{index}.png")
        row.setdefault("box", list(BOX))
        if not (folder / row["file_name"]).exists():
            noise(index).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# --- Sources -----------------------------------------------------------------------------------------------------


def test_an_image_folder_says_who_and_where(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "identity": 7, "reference_file_name": "1.png"},
        {"identities": [3], "boxes": [[1, 2, 3, 4]], "box": None, "landmarks5": [[[0, 0]] * 5]},
        {"identities": [3, 4], "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "box": None},
    ]
    first, single, couple = photos_of(open_source(write_rows(tmp_path, rows)))
    assert (first.text, first.identity, first.box) == ("a", "7", BOX) and first.reference == tmp_path / "1.png"
    assert (single.identity, single.box, single.people) == ("3", (1, 2, 3, 4), 1) and single.landmarks5 == [[0, 0]] * 5
    assert (couple.identity, couple.box, couple.people) == (None, None, 2)
    assert len(photos_of(open_source(tmp_path, SourceOptions(limit=2)))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [("{}", "'file_name' is missing"), ("{", "line 2"), ('{"file_name": 7}', "file_name 7 is no text")],
)
def test_bad_metadata_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png"}}\n{line}\n')
    with pytest.raises(DataError, match=f"line 2.*{message}" if message != "line 2" else message):
        photos_of(open_source(tmp_path))


def test_one_folder_for_each_person(tmp_path: Path) -> None:
    for name in ("ada/1.jpg", "ada/2.PNG", "bob/1.jpg", "nobody.jpg", "ada/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "bob/1.txt").write_text("bob at sea\n")
    found = {photo.name: (photo.identity, photo.text) for photo in photos_of(open_source(tmp_path))}
    assert found == {
        "ada/1.jpg": ("ada", ""),
        "ada/2.PNG": ("ada", ""),
        "bob/1.jpg": ("bob", "bob at sea"),
        "nobody.jpg": (None, ""),
    }


def test_a_photo_that_changed_makes_another_piece(tmp_path: Path) -> None:
    folder = write_rows(tmp_path, [{"text": "a"}])
    keys = [next(iter(open_source(folder))).key]
    keys.append(next(iter(open_source(folder))).key)
    noise(5).save(folder / "0.png")
    os.utime(folder / "0.png", ns=(1, 1))
    keys.append(next(iter(open_source(folder))).key)
    for field in ({"as_reference": False}, {"landmarks5": [[0, 0]] * 5}, {"boxes": [[1, 2, 3, 4], [5, 6, 7, 8]]}):
        write_rows(tmp_path, [{"text": "a", **field}])
        keys.append(next(iter(open_source(folder))).key)
    assert keys[0] == keys[1] and len(set(keys)) == 5


def test_a_limit_is_refused_for_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"a.png": b""})
    for source in (tmp_path, tmp_path / "*.tar"):
        with pytest.raises(DataError, match="not up to a limit of 3 photos"):
            open_source(source, SourceOptions(limit=3))


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_shards_are_read_as_webdataset_writes_them(tmp_path: Path) -> None:
    for number in (0, 1):
        files = {
            f"{number}01.jpg": b"first",
            f"{number}01.txt": b"from txt",
            f"{number}01.json": b'{"caption": "from json", "identity": "ada", "box": [1, 2, 3, 4]}',
            f"{number}02.x.json": b"{}",
            f"{number}03.webp": b"third",
            f"{number}03.json": b'{"caption": "from json"}',
            f"{number}04.png": b"fourth",
            f"{number}04.json": b"no json",
        }
        write_shard(tmp_path / f"{number:04d}.tar", files)
    (tmp_path / "report.txt").write_text("not a shard")
    for source in (tmp_path, f"{tmp_path}/{{0000..0001}}.tar", f"{tmp_path}/*.tar"):
        found = photos_of(open_source(source))
        assert [photo.name for photo in found[:3]] == ["0000.tar/001", "0000.tar/003", "0000.tar/004"]
        assert len(found) == 6 and found[0].content == b"first"
        assert [photo.text for photo in found[:3]] == ["from txt", "from json", ""]
        assert (found[0].identity, found[0].box) == ("ada", (1, 2, 3, 4))
    with pytest.raises(DataError, match=r"0002\.tar"):
        open_source(f"{tmp_path}/{{0000..0002}}.tar")


def test_a_broken_shard_gives_what_came_before(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", {f"{i}.png": bytes(2000) for i in range(5)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:6000])
    found = []
    with pytest.raises(BrokenShardError, match=r"a\.tar"):
        for piece in open_source(tmp_path):
            found.extend(piece.photos())
    assert [photo.name for photo in found[:2]] == ["a.tar/0", "a.tar/1"]


def test_datasets_are_asked_for_encoded_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"image": {"bytes": b"one", "path": None}, "text": "a", "person": 3},
        {"image": {"bytes": None, "path": "/two.png"}, "text": None, "person": None},
        {"image": None, "text": "c", "person": None},
    ]

    class Dataset(list):  # type: ignore[type-arg]
        column_names = ["image", "text", "person"]

        def cast_column(self, name: str, feature: Any) -> "Dataset":
            assert name == "image" and feature == "not decoded"
            return self

    asked: dict[str, Any] = {}

    def load_dataset(name: str, config: str | None, **options: Any) -> Dataset:
        asked.update(options, name=name, config=config)
        return Dataset(rows)

    stub = types.SimpleNamespace(
        load_dataset=load_dataset, Image=lambda decode: "decoded" if decode else "not decoded"
    )
    monkeypatch.setitem(sys.modules, "datasets", stub)  # type: ignore[arg-type]
    options = SourceOptions(identity_column="person", config="small", split="test", streaming=True)
    found = photos_of(open_source("me/photos", options))
    assert asked == {"name": "me/photos", "config": "small", "split": "test", "streaming": True}
    assert [photo.content for photo in found[:2]] == [b"one", Path("/two.png")]
    assert [photo.identity for photo in found] == ["3", None, None] and found[1].text == ""
    with pytest.raises(DataError, match="no column 'photo'"):
        next(open_source("me/photos", SourceOptions(image_column="photo")))


def test_a_missing_package_or_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"face-fusion-pipeline\[train\]"):
        next(open_source("me/photos"))
    for source in (tmp_path / "nowhere" / "photos", tmp_path):
        with pytest.raises(DataError, match="no folder of photos|has no photos"):
            next(open_source(source))


def test_real_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    pictures = [{"bytes": encoded(noise(i)), "path": None} for i in range(3)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": pictures, "text": ["a", "b", "c"]}, features=features)
    made.save_to_disk(tmp_path / "disk")
    (tmp_path / "parquet").mkdir()
    made.to_parquet(tmp_path / "parquet" / "train.parquet")
    for source, streaming in (("disk", False), ("parquet", False), ("parquet", True)):
        found = photos_of(open_source(tmp_path / source, SourceOptions(streaming=streaming)))
        assert [photo.text for photo in found] == ["a", "b", "c"] and found[1].content == encoded(noise(1))


# --- One photo ---------------------------------------------------------------------------------------------------


def test_the_training_image_has_the_face_where_its_row_says() -> None:
    image = Image.new("RGB", (200, 100), "white")
    image.paste("red", (150, 40, 170, 60))
    plain = dataclasses.replace(OPTIONS, min_sharpness=0)
    example = select(Photo("a", encoded(image), box=(150, 40, 170, 60)), plain, lambda: Fixed())
    assert example.image.size == (32, 32) and example.crop.size == (16, 16)
    red = np.asarray(example.image)[:, :, 1] < 128
    rows, columns = red.any(1).nonzero()[0], red.any(0).nonzero()[0]
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert np.allclose(found, example.box, atol=1)
    centre = np.asarray(example.crop)[8, 8]
    assert centre[0] > 200 > 60 > centre[1]  # the reference shows the face in its middle
    points = np.asarray(example.landmarks5)
    assert (points[:, 0] > example.box[0]).all() and (points[:, 1] < example.box[3]).all()


def test_small_faces_are_cropped_closer_and_the_square_stays_inside() -> None:
    near = training_square(Face((40, 40, 60, 60), 1.0), (100, 80), 0.15)
    assert near == (10, 0, 80)
    corner = training_square(Face((0, 70, 10, 80), 1.0), (100, 80), 0.15)
    assert corner == (0, 13, 67)
    assert round(10 / corner[2], 2) == 0.15


@pytest.mark.parametrize(
    ("photo", "boxes", "error"),
    [
        (Photo("a", encoded(noise(0))), [], NoFaceError),
        (Photo("a", encoded(noise(0))), [BOX, (70, 20, 95, 60)], SeveralFacesError),
        (Photo("a", encoded(noise(0)), people=2, box=BOX), [], SeveralFacesError),
        (Photo("a", encoded(noise(0)), people=0), [BOX], NoFaceError),
        (Photo("a", encoded(noise(0))), [(10, 10, 14, 15)], FaceTooSmallError),
        (Photo("a", encoded(noise(0)), box=(10, 10, 14, 15)), [], FaceTooSmallError),
        (Photo("a", encoded(noise(0, (100, 31))), box=BOX), [], RefusedPhotoError),
        (Photo("a", encoded(Image.new("RGB", (100, 80))), box=BOX), [], RefusedPhotoError),
        (Photo("a", b"no picture"), [BOX], UnreadableImageError),
        (Photo("a", Path("/nowhere.png")), [BOX], UnreadableImageError),
        (Photo("a", encoded(noise(0)), box=BOX, reference=Path("/nowhere.png")), [BOX], UnreadableImageError),
    ],
)
def test_bad_photos_are_refused(photo: Photo, boxes: list[Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        select(photo, OPTIONS, lambda: Fixed(*boxes))


def test_sharpness_and_copies_on_a_portrait() -> None:
    image, other = portrait(1_100_007), portrait(1_100_004)
    middle = (image.width * 0.3, image.height * 0.25, image.width * 0.7, image.height * 0.75)
    blurred = image.filter(ImageFilter.GaussianBlur(image.height * 0.5 / 15))
    assert sharpness(image, middle) > 100 > 10 > sharpness(blurred, middle)
    copy = Image.open(io.BytesIO(encoded(image.resize((image.width // 2, image.height // 2)), "JPEG")))
    found = differences(thumbnail(image), [thumbnail(copy), thumbnail(other)])
    assert found[0] < preparation.SAME_PHOTO < 3 < found[1]


def test_augmented_crops_differ_and_can_be_made_again() -> None:
    crop = portrait(1_100_007).resize((64, 64))
    made = [np.asarray(augmented(crop, random.Random(seed)), dtype=np.int16) for seed in (*range(6), 0)]
    assert made[0].shape == (64, 64, 3) and (made[0] == made[6]).all()
    changes = [np.abs(found - np.asarray(crop)).mean() for found in made[:6]]
    assert min(changes) > 3 and max(changes) < 120


# --- All photos --------------------------------------------------------------------------------------------------


def test_report_pairs_and_duplicates(tmp_path: Path) -> None:
    rows = [{"identity": "ada"}, {"identity": "ada"}, {"identity": "bob"}, {"text": "c"}, {"identity": "ada"}, {}]
    folder = write_rows(tmp_path / "photos", rows)
    noise(0).resize((50, 40)).resize((100, 80)).save(folder / "4.png")  # a copy of ada's first
    (folder / "5.png").write_bytes(b"broken")
    report = prepare(open_source(folder), tmp_path / "out", PrepareOptions(OPTIONS), progress=False)
    assert (report["read"], report["kept"], report["people"]) == (6, 4, 3)
    assert (report["paired_with_another_photo"], report["paired_with_itself"]) == (2, 2)
    assert report["skipped"] == {"unreadable": 1, "duplicate": 1}
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [(row["source"], row["reason"]) for row in skipped] == [("4.png", "duplicate"), ("5.png", "unreadable")]
    kept = read_rows(tmp_path / "out")
    assert [row["text"] for row in kept] == ["a photo of a person"] * 3 + ["c"]
    for row in kept:
        assert Image.open(tmp_path / "out" / row["file_name"]).size == (32, 32)
        assert Image.open(tmp_path / "out" / row["face_file_name"]).size == (16, 16)


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("face_fusion_pipeline.training.sources.PIECE", 2)
    folder = write_rows(tmp_path / "photos", [{} for _ in range(6)])
    seen: list[str] = []
    stop_at = 3

    def counted(photo: Photo, *args: Any) -> Any:
        seen.append(photo.name)
        if len(seen) == stop_at + 1:
            raise KeyboardInterrupt
        return select(photo, *args)

    monkeypatch.setattr(preparation, "select", counted)
    options = PrepareOptions(OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        prepare(open_source(folder), tmp_path / "out", options, progress=False)
    assert not (tmp_path / "out/metadata.jsonl").exists()
    stop_at = 100
    report = prepare(open_source(folder), tmp_path / "out", options, progress=False)
    assert seen == ["0.png", "1.png", "2.png", "3.png", "2.png", "3.png", "4.png", "5.png"] and report["kept"] == 6
    prepare(open_source(folder), tmp_path / "out", options, progress=False)
    assert len(seen) == 8
    write_rows(folder, [{} for _ in range(5)] + [{"text": "another"}])
    prepare(open_source(folder), tmp_path / "out", options, progress=False)
    assert seen[8:] == ["4.png", "5.png"] and read_rows(tmp_path / "out")[5]["text"] == "another"
    with pytest.raises(DataError, match="begun with resolution 32, not 64"):
        other = dataclasses.replace(OPTIONS, resolution=64)
        prepare(open_source(folder), tmp_path / "out", PrepareOptions(other), progress=False)


def test_processes_give_the_same_as_one_and_a_broken_shard_is_listed(tmp_path: Path) -> None:
    for shard in range(3):
        files: dict[str, bytes] = {}
        for i in range(2):
            files |= {f"{i}.png": encoded(noise(10 * shard + i)), f"{i}.json": json.dumps({"box": BOX}).encode()}
        write_shard(tmp_path / f"{shard}.tar", files)
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:-30000])
    reports = []
    for workers in (1, 2):
        options = PrepareOptions(OPTIONS, workers=workers)
        reports.append(prepare(open_source(tmp_path), tmp_path / f"out{workers}", options, progress=False))
    assert reports[0] == reports[1] and reports[0]["skipped"]["broken shard"] == 1
    assert read_rows(tmp_path / "out1") == read_rows(tmp_path / "out2")


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_rows(tmp_path / "photos", [{"box": [0, 0, 5, 5]}])
    command = ["prepare", str(folder), "--out", str(tmp_path / "out"), "--workers", "1", "--min-side", "32"]
    assert main(command) == 2
    assert "none of 1 photos can be used (face too small: 1)" in capsys.readouterr().err
    assert "too small" in (tmp_path / "out/skipped.jsonl").read_text()


def test_the_command_prepares_and_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_rows(tmp_path / "photos", [{"identity": "ada"}, {"identity": "ada"}, {"box": [0, 0, 3, 3]}])
    selection = ["--resolution", "32", "--workers", "1", "--caption", "somebody"]
    assert main(["prepare", str(folder), "--out", str(tmp_path / "out"), *selection]) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 photos of 1 people, 2 with another photo of the same person; skipped: " in printed
    assert read_rows(tmp_path / "out")[0]["text"] == "somebody"


@pytest.mark.parametrize("options", [["--resolution", "33"], ["--limit", "0"], ["--workers", "0"]])
def test_bad_options_are_one_line(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(tmp_path), "--out", str(tmp_path / "out"), *options]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_selection_needs_no_torch() -> None:
    """The processes that look at photos start quickly."""
    code = "import sys, face_fusion_pipeline.training.preparation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
