"""Folders, shards, lists and texts that are not what they should be: nothing vanishes, nothing stops the whole run."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from face_fusion_pipeline.cli import main
from face_fusion_pipeline.evaluation.people import read_people
from face_fusion_pipeline.evaluation.pictures import read_pictures, read_prompts
from face_fusion_pipeline.face_errors import FaceFusionError
from face_fusion_pipeline.files.folders import inside
from face_fusion_pipeline.files.texts import decode, parse_json, read_text
from face_fusion_pipeline.training import shards
from face_fusion_pipeline.training.photos import PICTURE_SUFFIXES
from face_fusion_pipeline.training.preparation import PrepareOptions, prepare, read_report, read_rows
from face_fusion_pipeline.training.records import as_name
from face_fusion_pipeline.training.selection import SelectionOptions
from face_fusion_pipeline.training.shards import ShardPiece, braces
from face_fusion_pipeline.training.sources import BrokenShardError, DataError, Photo, SourceOptions, open_source


BOX = [30, 20, 60, 60]
OPTIONS = PrepareOptions(SelectionOptions(resolution=32, reference_resolution=16, min_side=32, min_face=8))


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def put(folder: Path, *names: str, content: bytes | None = None) -> Path:
    """Write files: different pictures, or `content`."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number) if content is None else content)
    return folder


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(source: Path | str, **options: Any) -> list[Photo]:
    return [photo for piece in open_source(source, SourceOptions(**options)) for photo in piece.photos()]


def who(source: Path | str, **options: Any) -> dict[str, str | None]:
    return {photo.name: photo.identity for photo in read(source, **options)}


# --- What is not data --------------------------------------------------------------------------------------------


def test_litter_and_hidden_files_are_no_people(tmp_path: Path) -> None:
    litter = (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "$RECYCLE.BIN", "#recycle", "lost+found")
    put(
        tmp_path,
        "ada/1.jpg",
        "ada/._1.jpg",
        *(f"{name}/1.jpg" for name in litter),
        *(f"ada/{n}/2.jpg" for n in litter),
    )
    assert who(tmp_path) == {"ada/1.jpg": "ada"}


@pytest.mark.parametrize("out", ["photos/out", "photos/a/b/out"])
def test_the_second_run_does_not_read_the_first_output(out: str, tmp_path: Path) -> None:
    photos, target = put(tmp_path / "photos", "1.png", "2.png"), tmp_path / out
    (photos / "1.txt").write_text("a")
    command = ["prepare", str(photos), "--out", str(target), "--resolution", "32", "--workers", "1"]
    boxed = put(
        photos, "boxed/metadata.jsonl", content=lines({"file_name": "../1.png"}, {"file_name": "x.png", "box": BOX})
    )
    put(boxed, "boxed/x.png")
    for _ in range(2):
        assert main(command) == 0
        assert read_report(target)["read"] == 4
    other = command[:3] + [str(photos / "other"), *command[4:]]
    assert main(other) == 0 and read_report(photos / "other")["read"] == 4, "nor that of another run"
    assert {person.name for person in read_people(photos)} == {"1.png", "2.png", "boxed/x.png"}


def test_results_never_lie_among_photos_or_replace_their_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = put(tmp_path / "listed", "1.png")
    put(listed, "metadata.jsonl", content=lines({"file_name": "1.png", "box": BOX}))
    plain = put(tmp_path / "plain", "ada/1.png")
    link = tmp_path / "link"
    link.symlink_to(listed)
    for photos, out in ((listed, listed), (link, listed), (plain, plain), (plain, plain / "ada"), (plain, listed)):
        assert main(["prepare", str(photos), "--out", str(out), "--workers", "1"]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "face detector: " not in line]
        assert len(errors) == 1 and "name another" in errors[0]
    assert sorted(path.name for path in listed.iterdir()) == ["1.png", "metadata.jsonl"]
    assert sorted(path.name for path in plain.rglob("*")) == ["1.png", "ada"]


def test_results_of_other_commands_are_no_photos(tmp_path: Path) -> None:
    put(tmp_path, "ada/1.jpg", "weights/logs/x/sample_1.png", "judged/images/1.png")
    put(tmp_path, "weights/face_fusion_adapter.safetensors", "judged/settings.json", content=b"{}")
    put(tmp_path, "judged/images/metadata.jsonl", content=lines({"file_name": "1.png", "identity": "bob"}))
    assert who(tmp_path) == {"ada/1.jpg": "ada"}


# --- Lists -------------------------------------------------------------------------------------------------------


def test_lists_one_level_down_are_read(tmp_path: Path) -> None:
    put(tmp_path, *(f"{split}/{n}.png" for split in ("train", "test") for n in range(3)), "carl/1.png")
    put(
        tmp_path,
        "train/metadata.jsonl",
        content=lines(*({"file_name": f"{n}.png", "text": f"t{n}"} for n in range(3))),
    )
    put(tmp_path, "test/metadata.csv", content=b'file_name,text,identity\n0.png,a,7.0\n1.png,"b, c",\n2.png,,7\n')
    found = {photo.name: (photo.text, photo.identity) for photo in read(tmp_path)}
    assert found == {
        "carl/1.png": ("", "carl"),
        "test/0.png": ("a", "7"),
        "test/1.png": ("b, c", None),
        "test/2.png": ("", "7"),
        "train/0.png": ("t0", None),
        "train/1.png": ("t1", None),
        "train/2.png": ("t2", None),
    }
    assert len(read(tmp_path, limit=2)) == 2


def test_tables_say_the_same_in_their_own_way(tmp_path: Path) -> None:
    put(tmp_path, "metadata.csv", content=(
        b"\xef\xbb\xbffile_name;text;identity;box;as_reference;landmarks5\r\n"
        b'a.png;"x\ny";7;[1, 2, 3, 4];False;\r\nb.png;nan;nan;;;"[1, 2]"\r\n'
    ))  # fmt: skip
    first, second = read(tmp_path)
    assert (first.name, first.text, first.identity, first.box) == ("a.png", "x\ny", "7", (1, 2, 3, 4))
    assert first.as_reference is False and second.as_reference is True
    assert (second.text, second.identity) == ("", None) and [name for name, _ in second.faults] == ["landmarks5"]


def test_a_parquet_list_is_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the optional package pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {"file_name": ["a.png", "b.png"], "text": [["x", "y"], []], "identity": [float("nan"), 7.0]}
    parquet.write_table(arrow.table({**table, "box": [None, [1, 2, 3, 4]]}), tmp_path / "metadata.parquet")
    first, second = read(tmp_path)
    assert (first.text, first.identity, first.box) == ("x", None, None)
    assert (second.text, second.identity, second.box) == ("", "7", (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b"[" * 100_000 + b"\n", "line 1: JSON nested too deeply"),
        ("metadata.jsonl", b"[1]\n", "line 1: it is no JSON object"),
        ("metadata.jsonl", b'{"file_name": NaN}\n', "line 1: 'file_name' is missing"),
        ("metadata.csv", b"name\na.png\n", "line 2: 'file_name' is missing"),
        ("metadata.csv", b"file_name\n" + b"a" * 200_000 + b"\n", "field larger"),
        ("metadata.csv", b"file_name\na\0.png\n", "leads|zero|NUL|no file name|line"),
        ("metadata.parquet", b"no parquet", "metadata.parquet"),
        ("metadata.jsonl", "\ufeff{".encode("utf-16-le")[:-1], "metadata.jsonl"),
    ],
)
def test_a_list_that_is_none_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    put(tmp_path, name, content=content)
    try:
        (photo,) = read(tmp_path)
    except DataError as error:
        assert name in str(error)
        pytest.raises(DataError, read, tmp_path).match(message)
    else:
        assert photo.refused is not None, "a csv reader may take zero bytes"


def test_what_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    names = ["../b.png", "/etc/passwd", "x/../../b.png", "..\\b.png", "C:\\b.png", "\\b.png", "a\0.png"]
    photos = put(tmp_path / "photos", "a.png", "sub/c.png")
    rows = [{"file_name": name} for name in [*names, "a.png", "sub/../a.png", "./sub/c.png"]]
    rows[7] |= {"reference_file_name": "../b.png", "identity": "ada"}
    put(photos, "metadata.jsonl", content=lines(*rows))
    found = read(photos)
    assert [photo.refused is not None for photo in found] == [True] * 7 + [False] * 3
    assert all(photo.content == b"" for photo in found[:7])
    assert found[7].reference is None and found[7].identity == "ada"
    assert [name for name, _ in found[7].faults] == ["reference_file_name"]
    assert [photo.content for photo in found[8:]] == [photos / "a.png", photos / "sub/c.png"]
    with pytest.raises(DataError, match=r"outside the folder: 7"):
        prepare(open_source(photos), tmp_path / "out", OPTIONS, progress=False)
    put(photos, "metadata.jsonl", content=lines({"file_name": "../b.png", "identity": "ada"}))
    put(tmp_path, "people/ada/1.png", "b.png")
    with pytest.raises(FaceFusionError, match="line 1: '../b.png' leads out of photos"):
        read_pictures(photos, read_people(tmp_path / "people"))
    with pytest.raises(ValueError):
        inside(photos, "../photos/a.png")


# --- Links -------------------------------------------------------------------------------------------------------


def test_links_are_followed_and_circles_cut(tmp_path: Path) -> None:
    put(tmp_path, "else/bob/1.png", "photos/ada/1.png", "photos/.store/carl/1.png")
    photos = tmp_path / "photos"
    for name, target in (
        ("bob", tmp_path / "else/bob"),
        ("carl", photos / ".store/carl"),
        ("again", photos / "ada"),  # comes by itself
        ("ada/up", photos),
        ("ada/self", photos / "ada"),
        ("root", tmp_path),
        ("nowhere", tmp_path / "nothing"),
        ("loop", photos / "loop"),
    ):
        (photos / name).symlink_to(target)
    (tmp_path / "else/bob/back").symlink_to(tmp_path / "else")
    (photos / "ada/2.png").symlink_to(tmp_path / "else/bob/1.png")
    assert who(photos) == {
        "ada/1.png": "ada",
        "ada/2.png": "ada",
        "bob/1.png": "bob",
        "carl/1.png": "carl",
    }
    (tmp_path / "link").symlink_to(photos)
    assert who(tmp_path / "link") == who(photos)


def test_deep_folders_are_no_trouble(tmp_path: Path) -> None:
    deep = tmp_path / "/".join(["d"] * 400)
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(400):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    put(deep, "1.png")
    assert len(read(tmp_path)) == 1


def test_pipes_and_lost_links_are_counted(tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "1.png")
    os.mkfifo(photos / "pipe.png")
    os.mkfifo(photos / "pipe")
    os.mkfifo(photos / "1.txt")
    os.mkfifo(photos / "0.tar")
    (photos / "lost.png").symlink_to(photos / "nowhere.png")
    put(photos, "x/metadata.jsonl", content=lines({"file_name": "x.png", "box": BOX}))
    put(photos, "x/x.png")
    report = prepare(open_source(photos), tmp_path / "out", OPTIONS, progress=False)
    assert report["kept"] == 1
    assert report["skipped"] == {"broken shard": 1, "no file": 1, "unreadable": 1, "no face": 1}


# --- Fields ------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_unknown_and_numbers_are_one(tmp_path: Path) -> None:
    values = [float("nan"), None, "", "  ", "nan", "NaN", "None", "<NA>", 7, 7.0, "7", "7.0", " 7 ", 7.5, "007", -0.0]
    put(tmp_path, "metadata.jsonl", content=lines(*({"file_name": "a.png", "identity": value} for value in values)))
    assert [photo.identity for photo in read(tmp_path)] == [None] * 8 + ["7"] * 5 + ["7.5", "007", "0"]
    assert as_name(np.float32(3)) == "3" and as_name(2**70) == str(2**70)
    one = {"file_name": "a.png", "boxes": [BOX]}
    put(tmp_path, "metadata.jsonl", content=lines(*({**one, "identities": [value]} for value in (float("nan"), 7.0))))
    assert [(photo.identity, photo.people) for photo in read(tmp_path)] == [(None, 1), ("7", 1)]


def test_a_list_of_captions_gives_the_first(tmp_path: Path) -> None:
    values = [["", "a", "b"], [], [None], "a", 7, None, float("nan"), "None"]
    put(tmp_path, "metadata.jsonl", content=lines(*({"file_name": "a.png", "text": value} for value in values)))
    assert [photo.text for photo in read(tmp_path)] == ["a", "", "", "a", "7", "", "", ""]


BAD_FIELDS = {
    "box": [[1, 2, 0, 4], [1, 2, 3], "no box", 7, [1, 2, float("inf"), 4], [1, 2, 10**400, 4], {}, [None] * 4],
    "landmarks5": [[[1, 2]] * 4, [1, 2, 3, 4, 5], "x", [["a", "b"]] * 5, [[0, float("nan")]] * 5],
    "boxes": ["x", {"a": 1}, [[1, 2, 0, 4]]],
    "identities": ["ada", 7, [[]]],
    "text": [{"a": 1}, True],
    "identity": [["ada"], {"name": "ada"}, True, float("inf")],
    "as_reference": ["perhaps", [], 3],
    "reference_file_name": [7, ["a.png"], "/a.png"],
}


@pytest.mark.parametrize(
    ("field", "value"), [(name, value) for name, values in BAD_FIELDS.items() for value in values]
)
def test_of_a_bad_field_only_that_is_lost(field: str, value: Any, tmp_path: Path) -> None:
    record = {"file_name": "a.png", "text": "t", "identity": "ada", field: value}
    put(tmp_path, "metadata.jsonl", content=lines(record))
    (photo,) = read(tmp_path)
    assert [name for name, _ in photo.faults] == [field]
    assert photo.text == ("" if field == "text" else "t")
    assert photo.identity == (None if field == "identity" else "ada")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "0.png", png())
        add(archive, "0.json", json.dumps(record).encode())
    (photo,) = ShardPiece(tmp_path / "0.tar").photos()
    if field != "reference_file_name":  # which no shard has
        assert [name for name, _ in photo.faults] == [field]
    assert photo.identity == (None if field == "identity" else "ada")


def test_bad_fields_are_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = put(tmp_path / "photos", "0.png", "1.png", "2.png")
    far, points = [0, 0, 1e9, 1e9], [[1e30, 0]] * 5
    rows = [{"box": BOX, "identity": ["x"]}, {"box": BOX, "landmarks5": points}, {"box": far, "identity": "ada"}]
    put(photos, "metadata.jsonl", content=lines(*({"file_name": f"{n}.png", **row} for n, row in enumerate(rows))))
    command = ["prepare", str(photos), "--out", str(tmp_path / "out"), "--resolution", "32", "--workers", "1"]
    assert main(command) == 0
    assert "fields left out: identity 1, landmarks5 1" in capsys.readouterr().out
    report = read_report(tmp_path / "out")
    left_out, skipped = report["fields_left_out"], report["skipped"]
    # Without its box the third is searched. It shows noise, in which the Haar cascades see a face.
    assert (left_out.pop("box", 0), skipped) in ((0, {"no face": 1}), (1, {}))
    assert left_out == {"identity": 1, "landmarks5": 1}
    listed = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    assert [(row["source"], row["field"]) for row in listed][:2] == [("0.png", "identity"), ("1.png", "landmarks5")]
    assert "faults" not in read_rows(tmp_path / "out")[0]


def test_evaluation_warns_of_what_it_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.png")
    rows = [{"file_name": "a.png", "box": "x", "identity": 7.0}, {"file_name": "../a.png"}]
    put(tmp_path, "metadata.jsonl", content=lines(*rows))
    (person,) = read_people(tmp_path)
    assert person.name == "7" and "field box 1, outside the folder 1" in caplog.text


# --- Encodings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_are_decoded_by_their_mark(encoding: str, tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "ada/1.png")
    put(photos, "ada/1.txt", content="café ü\r\n".encode(encoding))
    put(tmp_path, "listed/metadata.jsonl", content='{"file_name": "a", "text": "café ü"}\n'.encode(encoding))
    put(tmp_path, "table/metadata.csv", content="file_name,text\na,café ü\n".encode(encoding))
    for folder in ("photos", "listed", "table"):
        assert [photo.text for photo in read(tmp_path / folder)] == ["café ü"]
    put(tmp_path, "prompts.txt", content="café ü\r\na dog\r\n".encode(encoding))
    assert read_prompts(tmp_path / "prompts.txt") == ["café ü", "a dog"]
    pictures = put(tmp_path / "pictures", "1.png")
    put(pictures, "metadata.jsonl", content='{"file_name": "1.png", "identity": "ada"}\n'.encode(encoding))
    assert len(read_pictures(pictures, read_people(photos))) == 1
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "0.png", png())
        add(archive, "0.txt", "café ü".encode(encoding))
    assert [photo.text for photo in read(tmp_path / "0.tar")] == ["café ü"]


@pytest.mark.parametrize("content", ["café".encode("latin-1"), "café".encode("utf-16-le"), b"\xff\xfea", bytes(100)])
def test_what_cannot_be_decoded_is_reported(content: bytes, tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "ada/1.png")
    put(photos, "ada/1.txt", content=content)
    (photo,) = read(photos)
    assert photo.text == "" and photo.identity == "ada" and [name for name, _ in photo.faults] == ["caption"]
    put(tmp_path, "prompts.txt", content=content)
    with pytest.raises(FaceFusionError, match=r"--prompts .*prompts.txt is not UTF-8 text .*: save it as UTF-8"):
        read_prompts(tmp_path / "prompts.txt")
    pictures = put(tmp_path / "pictures", "metadata.jsonl", content=content)
    with pytest.raises(FaceFusionError, match="not UTF-8"):
        read_pictures(pictures, read_people(photos))
    with pytest.raises(ValueError, match="not UTF-8"):
        decode(content)


def test_a_latin_1_caption_keeps_the_identity(tmp_path: Path) -> None:
    record = '{"file_name": "a.png", "text": "café", "identity": "ada"}\n'.encode("latin-1")
    put(tmp_path, "metadata.jsonl", content=record)
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "0.png", png())
        add(archive, "0.txt", "café".encode("latin-1"))
        add(archive, "0.json", b'{"identity": "ada"}')
        add(archive, "1.png", png())
        add(archive, "1.json", record)
    found = [*read(tmp_path), *read(tmp_path / "0.tar")]
    assert [(photo.text, photo.identity) for photo in found] == [("", "ada")] * 3
    assert [photo.faults[0][0] for photo in found] == ["text", "txt", "text"]


def test_names_that_are_not_utf_8_are_written_down(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    (Path(os.fsdecode(folder)) / "1.png").write_bytes(png())
    (photo,) = read(tmp_path)
    assert photo.identity == "caf\\udce9" and isinstance(photo.content, Path) and photo.content.is_file()
    next(iter(open_source(tmp_path))).key.encode()


@pytest.mark.parametrize("name", ["folder", "pipe", "huge", "/dev/zero", "nowhere"])
def test_no_file_is_no_text(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(FaceFusionError, match=f"--prompts .*{name}"):
        read_text(tmp_path / name, "--prompts")


def test_json_from_outside_has_one_error() -> None:
    for text in ("[" * 100_000, "{", "9" * 5000, b"\xff"):
        with pytest.raises(ValueError):
            parse_json(text)


# --- Shards ------------------------------------------------------------------------------------------------------


def add(archive: tarfile.TarFile, name: str, content: bytes, **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("suffix", sorted(PICTURE_SUFFIXES))
def test_every_picture_is_read_or_counted(suffix: str, tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "a/x" + suffix, "a/y" + suffix.upper(), content=b"no picture")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, f"0{suffix}", b"no picture")
        add(archive, f"1.image{suffix}", b"no picture")
    assert len(read(photos)) == len(read(tmp_path / "0.tar")) == 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_picture_without_a_name_for_it_is_one(kind: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    put(tmp_path / "photos", "ada/1", "ada/1.jpg_large", content=buffer.getvalue())
    put(tmp_path / "photos", "ada/notes.md", "ada/2.txt", content=b"BU")
    assert who(tmp_path / "photos") == {"ada/1": "ada", "ada/1.jpg_large": "ada"}
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "0", buffer.getvalue())
        add(archive, "1.bin", buffer.getvalue())
        add(archive, "2.npy", b"numbers")
    assert [photo.content for photo in read(tmp_path / "0.tar")] == [buffer.getvalue()] * 2


def test_of_several_pictures_of_a_sample_the_plainest_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "0.depth.png", b"depth")
        add(archive, "0.image.jpg", b"image")
        add(archive, "1.image.jpg", b"image")
        add(archive, "1.caption.txt", b"other")
        add(archive, "1.jpg", b"plain")
        add(archive, "1.txt", b"text")
        add(archive, "./__MACOSX/._1.jpg", b"litter")
        add(archive, "2.jpg", b"", type=tarfile.LNKTYPE, linkname="1.jpg")
    found = read(tmp_path / "0.tar")
    assert [photo.content for photo in found if not photo.refused] == [b"image", b"plain"]
    assert [photo.text for photo in found if not photo.refused] == ["", "text"]
    refused = [photo.refused[0] for photo in found if photo.refused]
    assert refused == ["second picture of a sample", "second picture of a sample", "link in a shard"]


def test_shards_and_photos_of_one_folder_are_all_read(tmp_path: Path) -> None:
    put(tmp_path, "ada/1.png")
    for name, mode in (("0.tar", "w"), ("sub/1.tgz", "w:gz"), ("sub/2.tar.xz", "w:xz")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with tarfile.open(tmp_path / name, mode) as archive:  # type: ignore[call-overload]
            add(archive, "0.png", png())
    assert sorted(who(tmp_path)) == ["0.tar/0", "1.tgz/0", "2.tar.xz/0", "ada/1.png"]
    (tmp_path / "0.tar").unlink()
    with pytest.raises(DataError, match="not up to a limit of 3 photos"):
        read(tmp_path, limit=3)


def sparse(path: Path, name: str, size: int) -> None:
    """A tar file with a member of `size` bytes of which none is in the file."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "0.png", png())
        map_of_holes = b"1\n%d\n0\n".ljust(512, b"\0") % size
        add(archive, name, map_of_holes, pax_headers={
            "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name,
            "GNU.sparse.realsize": str(size),
        })  # fmt: skip


@pytest.mark.parametrize(("name", "size"), [("1.png", 40 * 2**30), ("1.png", 2**29), ("1.bin", 40 * 2**30)])
def test_a_bomb_is_listed_and_what_came_before_is_good(name: str, size: int, tmp_path: Path) -> None:
    sparse(tmp_path / "0.tar", name, size)
    assert (tmp_path / "0.tar").stat().st_size < 2**17
    found = []
    with pytest.raises(BrokenShardError, match="above|unpacks to more"):
        for photo in ShardPiece(tmp_path / "0.tar").photos():
            found.append(photo)
    assert [photo.name for photo in found] == ["0.tar/0"]


def test_a_long_header_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "HEADER", 2000)
    with tarfile.open(tmp_path / "0.tar", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "0.png", png())
        add(archive, "1.png", png(), pax_headers={"comment": "x" * 3000})
    with pytest.raises(BrokenShardError, match="a header of 3,0.. bytes"):
        list(ShardPiece(tmp_path / "0.tar").photos())


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_shard_is_a_broken_shard_and_no_more(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    mode = ("w", "w:gz", "w:bz2", "w:xz")[seed % 4]
    with tarfile.open(tmp_path / "0.tar", mode) as archive:  # type: ignore[call-overload]
        for number in range(3):
            add(archive, f"{number}.png", random.bytes(700), pax_headers={"GNU.sparse.realsize": "9"})
            add(archive, f"{number}.json", b'{"identity": 7}')
    content = bytearray((tmp_path / "0.tar").read_bytes())
    for place in random.integers(0, len(content), 40):
        content[place] = random.integers(0, 256)
    (tmp_path / "0.tar").write_bytes(content)
    try:
        list(ShardPiece(tmp_path / "0.tar").photos())
    except BrokenShardError as error:
        assert "0.tar" in str(error)


@pytest.mark.parametrize("pattern", ["x{0..9999999999}.tar", "x{0..999999}{0..999999}.tar", "x{5..2}.tar"])
def test_a_pattern_that_names_far_too_many_shards_is_refused(pattern: str) -> None:
    with pytest.raises(DataError, match="names .* shards: give a range"):
        open_source(pattern)


def test_ranges_that_are_none_are_names() -> None:
    assert braces("x{08..10}.tar") == ["x08.tar", "x09.tar", "x10.tar"]
    for name in ("x{²..³}.tar", "x{1..}.tar", "x{a..b}.tar", "x{" + "9" * 5000 + ".." + "9" * 5000 + "}.tar"):
        assert braces(name) == [name]


# --- A folder that was prepared ----------------------------------------------------------------------------------


def prepared(tmp_path: Path) -> tuple[Path, Path]:
    photos = put(tmp_path / "photos", "0.png", "1.png")
    put(photos, "metadata.jsonl", content=lines(*({"file_name": f"{n}.png", "box": BOX} for n in range(2))))
    prepare(open_source(photos), tmp_path / "out", OPTIONS, progress=False)
    return photos, tmp_path / "out"


def test_a_torn_part_is_made_again(tmp_path: Path) -> None:
    photos, out = prepared(tmp_path)
    whole = (out / "parts/000000.jsonl").read_bytes()
    for left in (b"", whole[:-9]):
        (out / "parts/000000.jsonl").write_bytes(left)
        assert prepare(open_source(photos), out, OPTIONS, progress=False)["kept"] == 2
        assert (out / "parts/000000.jsonl").read_bytes() == whole


@pytest.mark.parametrize("name", ["metadata.jsonl", "report.json", "settings.json"])
def test_a_torn_file_of_prepared_data_is_named_with_the_remedy(name: str, tmp_path: Path) -> None:
    photos, out = prepared(tmp_path)
    (out / name).write_bytes((out / name).read_bytes()[:-9])
    with pytest.raises(FaceFusionError, match=f"{name} is damaged .*(prepare. again|another folder)"):
        if name == "settings.json":
            prepare(open_source(photos), out, OPTIONS, progress=False)
        read_rows(out)
        read_report(out)
