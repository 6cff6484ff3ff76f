"""`face-fusion prepare generated:N`: people whom the model draws itself, as training data."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import LCMScheduler
from PIL import Image
from safetensors.torch import load_file

from face_fusion_pipeline import embedded_model, face_embedders
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.face_defaults import read_defaults
from face_fusion_pipeline.face_detectors import Face
from face_fusion_pipeline.face_errors import NoFaceError
from face_fusion_pipeline.generation.prompt_words import unknown_words
from face_fusion_pipeline.training import generated, generated_pairs
from face_fusion_pipeline.training.base_model import load_base
from face_fusion_pipeline.training.generated import Cast, people_count
from face_fusion_pipeline.training.generated_pairs import COPY, OTHER, Pair, why_no_pair
from face_fusion_pipeline.training.generated_people import NaturalGrammar, VocabularyGrammar, read_prompts
from face_fusion_pipeline.training.generated_rounds import prepare_rounds
from face_fusion_pipeline.training.latent_cache import cache_folders, is_encoded
from face_fusion_pipeline.training.pairs import Pairs, split_people
from face_fusion_pipeline.training.preparation import METADATA, REPORT, read_report, read_rows
from face_fusion_pipeline.training.same_person import (
    grey_difference,
    shape_difference,
    small_face,
    standardised,
    threshold,
    unet_features,
)
from face_fusion_pipeline.training.sources import DataError


POINTS = np.array([[5, 6], [11, 6], [8, 9], [6, 12], [10, 12]], dtype=float)
OPTIONS = ["--min-sharpness", "0", "--false-matches", "0.5", "--steps", "2"]


class Finds:
    """A detector that finds a face in the middle of pictures of 16 pixels."""

    name, sizes = "finds", (16,)

    def detect(self, image: Image.Image) -> list[Face]:
        moved = POINTS + np.asarray(image)[:5, 0, :2] / 128  # another pose in every picture
        return [Face((4.0, 4.0, 12.0, 13.0), 0.9, moved)]


@pytest.fixture(autouse=True)
def seeing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "_detector", lambda thread, name, model: Finds())
    monkeypatch.setattr(generated, "PIECE", 4)
    monkeypatch.setattr(generated_pairs, "threshold", lambda *_: -2.0)  # random weights know nobody


@pytest.fixture(scope="module", params=["sd", "xl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_models.tiny_pipeline(family=request.param).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("small")
    tiny_models.tiny_pipeline().save_pretrained(folder)
    return str(folder)


def draw(model: str, out: Path, *options: str, count: int = 6) -> int:
    words = ["prepare", f"generated:{count}", "--model", model, "--out", str(out), "--detector", "haar"]
    return main([*words, *OPTIONS, *options])


# --- Words -------------------------------------------------------------------------------------------------------


def test_a_person_keeps_their_words_from_picture_to_picture() -> None:
    cast = Cast(40, NaturalGrammar(), pictures=3)
    for person in range(40):
        first, *others = [cast.portrait(person, picture) for picture in range(3)]
        words = cast.grammar.person(cast._rng("person", person), person)
        assert all(words.full in one.prompt for one in (first, *others)) and words.short.startswith("a ")
        assert others[0].prompt != others[1].prompt and others[0].seed != others[1].seed
        assert not re.search(r"\b(child|kid|boy|girl|teen)", words.full) and len(first.prompt.split()) < 60
    assert cast.portrait(7, 1) == Cast(99, NaturalGrammar(), pictures=9).portrait(7, 1), "of the numbers alone"
    assert cast.portrait(7, 1) != Cast(40, NaturalGrammar(), pictures=3, seed=1).portrait(7, 1)
    prompts = [cast.portrait(person, 1) for person in range(40)]
    assert {one.caption == one.prompt for one in prompts} == {True, False}, "half of the captions say less"


def test_a_small_vocabulary_is_kept_to() -> None:
    defaults = read_defaults(embedded_model())
    assert defaults is not None and defaults.vocabulary is not None
    cast = Cast(60, VocabularyGrammar(defaults.vocabulary), pictures=4)
    drawn = [cast.portrait(person, picture) for person in range(60) for picture in range(4)]
    for one in drawn:
        assert not unknown_words(one.prompt, defaults.vocabulary) and not unknown_words(
            one.caption, defaults.vocabulary
        )
        assert one.as_reference == (
            "photo" in one.prompt or "film" not in one.prompt and one.prompt.startswith("a ph")
        )
        assert one.picture > 1 or one.as_reference
        assert one.picture or not re.search("hat|crown|astronaut", one.prompt), "the first picture shows who it is"
    assert len({one.prompt for one in drawn}) > 150
    assert VocabularyGrammar({}).scene(random.Random(0), 1).of("a person") == "a photo of a person"


def test_own_people_and_scenes(tmp_path: Path) -> None:
    file = tmp_path / "people.txt"
    file.write_text("# mine\na woman with red braids\n\nan old sailor\nscene: a photo of {} at sea\n")
    grammar = read_prompts(file)
    cast = Cast(4, grammar)
    assert cast.portrait(1, 1).prompt == cast.portrait(3, 1).prompt == "a photo of an old sailor at sea"
    assert cast.portrait(1, 1).seed != cast.portrait(3, 1).seed and cast.group(0) == "a woman"
    assert cast.portrait(0, 0).prompt.startswith("a portrait photo of a woman with red braids")
    for text, message in (("scene: a beach\na man", "'a beach' has no {}"), ("# a man\n", "describes nobody")):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_prompts(file)


# --- Drawing -----------------------------------------------------------------------------------------------------


def test_people_are_drawn_paired_and_trained_on(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    assert draw(model, data, "--per-person", "3", "--batch-size", "4") == 0
    assert str(data) in capsys.readouterr().out
    rows, base = read_rows(data), load_base(model)
    report = read_report(data)
    assert report["read"] == 18 and report["kept"] == len(rows) and sum(report["skipped"].values()) == 18 - len(rows)
    assert 1 <= report["people"] <= 6 and report["paired_with_another_photo"] == len(rows)
    assert {row["source"].rpartition("_")[2] for row in rows} >= {"0"} and is_encoded(data, base)
    pairs = Pairs(data, cache_folders(data, base), split_people(rows, 0, seed=0)[0])
    cast = Cast(6, NaturalGrammar(), pictures=3)
    firsts = [index for index, row in enumerate(rows) if row["source"].endswith("_0")]
    one = cast.portrait(int(rows[firsts[0]]["identity"]), 0)
    base.pipeline.face_defaults = None
    found = base.pipeline(
        [one.prompt],
        num_inference_steps=2,
        guidance_scale=5.0,
        negative_prompt=[cast.grammar.negative],
        generator=[torch.Generator().manual_seed(one.seed)],
        output_type="latent",
    ).images
    torch.testing.assert_close(pairs.shards.latents([firsts[0]]).float(), found, rtol=2e-3, atol=2e-3)
    for index, row in enumerate(rows):
        picture, face = (Image.open(data / row[name]) for name in ("file_name", "face_file_name"))
        assert picture.size == face.size == (16, 16)
        assert all(other != index for other, _ in pairs.references[index])
    weights = tmp_path / "weights"
    words = ["train", "--model", model, "--data", str(data), "--out", str(weights), "--max-train-steps", "1"]
    assert main([*words, "--train-batch-size", "2", "--validation-people", "0"]) == 0
    text = (weights / "README.md").read_text()
    assert f"drawn by {Path(model).name}" in text and "no photograph was used" in text and "2 steps" in text
    assert "further pictures of a person without training, round 1" in text and "50% of unrelated pairs" in text
    again = tmp_path / "again"  # weights draw the next
    assert draw(model, again, "--adapter", str(weights)) == 0
    settings = read_report(again)["settings"]
    assert settings["mode"] == "both" and re.fullmatch("[0-9a-f]{16}", settings["drawn_with"])


def test_a_run_that_was_stopped_goes_on(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw(small, tmp_path / "whole") == 0
    kept, drawn = generated.Piece.save, []

    def stop_at_second(self: Any, out: Path, number: int, key: str) -> None:
        if number:
            raise KeyboardInterrupt
        kept(self, out, number, key)

    monkeypatch.setattr(generated.Piece, "save", stop_at_second)
    assert draw(small, tmp_path / "stopped") == 130 and not (tmp_path / "stopped" / REPORT).exists()
    monkeypatch.setattr(generated.Piece, "save", lambda s, o, n, k: (drawn.append(n), kept(s, o, n, k)))
    assert draw(small, tmp_path / "stopped") == 0 and drawn == [1]
    for name in (METADATA, REPORT, "skipped.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        mine, other = load_file(path), load_file(tmp_path / "stopped" / path.relative_to(tmp_path / "whole"))
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    drawn.clear()
    assert draw(small, tmp_path / "stopped") == 0 and not drawn, "a finished folder is left as it is"
    (tmp_path / "whole" / REPORT).unlink()
    piece = tmp_path / "whole" / "parts" / "000001.safetensors"
    piece.write_bytes(piece.read_bytes()[:100])  # damaged
    assert draw(small, tmp_path / "whole") == 0 and drawn == [1]


def test_processes_share_the_pieces(small: str, tmp_path: Path) -> None:
    assert draw(small, tmp_path / "alone", count=10) == 0
    words = ["prepare", "generated:10", "--model", small, "--out", str(tmp_path / "shared"), "--detector", "haar"]
    script = Path(__file__).with_name("generated_run.py")
    run = subprocess.run([sys.executable, str(script), *words, *OPTIONS], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert {0, 1} == set(map(int, re.findall(r"piece \d of rank (\d)", run.stdout))), "each draws some"
    assert re.findall(r"piece (\d) of rank 0", run.stdout) == ["0", "2"]
    shared, alone = (tmp_path / name for name in ("shared", "alone"))
    assert (shared / METADATA).read_bytes() == (alone / METADATA).read_bytes()
    one, two = (json.loads((folder / REPORT).read_text()) for folder in (shared, alone))
    assert one.pop("similarity") == pytest.approx(two.pop("similarity"), abs=0.01)  # processes have other threads
    assert one == two
    assert is_encoded(tmp_path / "shared", load_base(small))


def test_other_settings_are_refused(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(small, tmp_path / "data") == 0
    for option, value, said in (("--steps", "3", "steps 2, not 3"), ("--people-seed", "1", "seed 0, not 1")):
        assert draw(small, tmp_path / "data", option, value) == 2
        assert f"was begun with {said}" in capsys.readouterr().err


def test_pictures_that_fail_are_counted(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find, looked = generated.find_face, []

    def seldom(image: Image.Image, *args: Any, **kwargs: Any) -> Face:
        looked.append(image)
        if len(looked) == 3 or blind:
            raise NoFaceError("nobody")
        return find(image, *args, **kwargs)

    blind = False
    monkeypatch.setattr(generated, "find_face", seldom)
    drawing = generated.Artist._batch

    def no_numbers(self: Any, wanted: Any, faces: Any) -> Any:
        found = drawing(self, wanted, faces)
        return [
            None if faces is None and one.seed == bad else picture for one, picture in zip(wanted, found, strict=True)
        ]

    bad = Cast(9, NaturalGrammar()).portrait(4, 0).seed
    monkeypatch.setattr(generated.Artist, "_batch", no_numbers)
    assert draw(small, tmp_path / "data", count=9) == 0
    report = read_report(tmp_path / "data")
    assert report["skipped"]["no face"] == report["skipped"]["no numbers"] == 1
    assert report["read"] == 16, "a person without a first picture has no other"
    blind = True
    assert draw(small, tmp_path / "nobody") == 2


def test_nan_is_no_picture(small: str) -> None:
    artist = generated.Artist(load_base(small), generated_pairs.Drawing(steps=1, guidance=1.0))
    wanted = [generated.Wanted("a", 0), generated.Wanted("b", 1)]
    forward = artist.base.unet.forward

    def broken(sample: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(sample, *args, **kwargs)
        (found[0] if isinstance(found, tuple) else found.sample)[1] = torch.nan
        return found

    artist.base.unet.forward = broken
    (batch,) = artist.draw(wanted)
    assert batch[0] is not None and batch[0].latents.dtype == torch.float16 and batch[1] is None


def test_a_face_costs_one_look_and_one_check(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    from diffusers import UNet2DConditionModel

    forward = UNet2DConditionModel.forward

    def counted(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    assert draw(small, tmp_path / "data", "--per-person", "3", "--batch-size", "4", count=4) == 0
    plain = 2 * 2 * 12  # guidance, steps, pictures
    assert sum(rows) == plain + 4 + 12, "each person is looked at once, each picture checked once"
    assert len(rows) == 3 * 2 + 4 + 3, "in whole batches"


def test_few_step_models_are_asked_as_they_are(tmp_path: Path) -> None:
    pipe = tiny_models.tiny_pipeline()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "lcm")
    words = ["prepare", "generated:4", "--model", str(tmp_path / "lcm"), "--out", str(tmp_path / "data")]
    assert main([*words, "--detector", "haar", "--min-sharpness", "0", "--false-matches", "0.5"]) == 0
    settings = read_report(tmp_path / "data")["settings"]
    assert (settings["steps"], settings["guidance"]) == (8, 1.0)


# --- Who is who --------------------------------------------------------------------------------------------------


def test_features_tell_faces_apart(small: str) -> None:
    base = load_base(small)
    faces = [tiny_models.face(seed, 16) for seed in (0, 1, 0)]
    found = unet_features(base, faces)
    assert found.dtype == torch.float16 and len(found) == 3 and torch.equal(found[0], found[2])
    one, two = standardised([found[:2], found[2:]])
    assert float(one[0] @ two[0]) == pytest.approx(1, abs=1e-3) and float(one[0] @ one[1]) < 0


def test_the_threshold_lets_so_many_strangers_pass() -> None:
    unrelated = np.linspace(0, 1, 1001)
    assert threshold(unrelated, 0.05) == pytest.approx(0.95)


def test_copies_are_told_by_points_and_cells() -> None:
    turned = POINTS @ np.array([[0.8, 0.6], [-0.6, 0.8]]) * 3 + 7
    assert shape_difference(POINTS, turned) < 1e-6
    other = POINTS.copy()
    other[3:] += [0, 2]  # an open mouth
    assert shape_difference(POINTS, other) > 0.05
    picture = tiny_models.face(3, 64)
    brighter = Image.fromarray((np.asarray(picture) * 0.6 + 60).astype(np.uint8))
    faces = [small_face(one) for one in (picture, brighter, tiny_models.face(4, 64))]
    assert grey_difference(faces[0], faces[1]) < 1 and grey_difference(faces[0], faces[2]) > 12
    rows = [{"source": str(i), "small_face": face, "landmarks5": POINTS.tolist()} for i, face in enumerate(faces)]
    found = [why_no_pair(Pair(row, rows[0], 0.5), [rows[0]], 0.4) for row in rows[1:]]
    assert found[0] is not None and found[0][0] == COPY and found[1] is None
    assert why_no_pair(Pair(rows[1], rows[2], 0.5), [rows[2], rows[0]], 0.4) == found[0], "of any that is kept"
    apart = why_no_pair(Pair(rows[2], rows[0], 0.3), [rows[0]], 0.4)
    assert apart is not None and apart[0] == OTHER


def test_an_embedder_may_say_who_it_is(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Grey:
        name, width = "grey", 64

        def __call__(self, faces: Any) -> torch.Tensor:
            cells = [np.asarray(face.convert("L").resize((8, 8)), np.float32).ravel() for face in faces]
            return torch.from_numpy(np.stack([row - row.mean() for row in cells]))

    monkeypatch.setattr(
        face_embedders, "load_face_embedder", lambda source: face_embedders.CheckedEmbedder(source, 64, Grey())
    )
    monkeypatch.setattr(generated_pairs, "threshold", threshold)
    assert draw(small, tmp_path / "data", "--embedder", "grey", "--per-person", "4", count=4) == 0
    report = read_report(tmp_path / "data")
    assert report["settings"]["embedder"] == "grey"
    assert report["similarity"]["kept"] > report["similarity"]["threshold"] > report["similarity"]["drawn"] - 1
    assert report["skipped"][OTHER] >= 1


# --- Rounds ------------------------------------------------------------------------------------------------------


def plan(rounds: int) -> Any:
    from face_fusion_pipeline.training.generated_pairs import Checks, Plan
    from face_fusion_pipeline.training.generated_pictures import Drawing
    from face_fusion_pipeline.training.selection import SelectionOptions

    return Plan("m", Cast(40, NaturalGrammar()), Drawing(), Checks(SelectionOptions()), rounds=rounds)


@pytest.mark.parametrize(("figures", "best"), [([0.1, 0.3, 0.2], 2), ([0.1, 0.2, 0.3], 3), ([0.3, 0.3], 1)])
def test_rounds_go_on_while_people_set_aside_come_out_better(tmp_path: Path, figures: list[float], best: int) -> None:
    learned: list[Path] = []

    def drawn(folder: Path, asked: Any, earlier: Path | None) -> dict[str, Any]:
        (folder / "images").mkdir(parents=True)
        assert (asked.adapter, earlier) == ((str(learned[-1]), learned[-1].parent) if learned else (None, None))
        report = {"similarity": {"held_out": figures[asked.round - 1]}, "settings": {"round": asked.round}}
        for name in ("settings.json", METADATA, REPORT):
            (folder / name).write_text(json.dumps(report))
        return report

    def learn(data: Path, weights: Path) -> None:
        weights.mkdir()
        (weights / "training.json").write_text("{}")
        learned.append(weights)

    report = prepare_rounds(tmp_path / "out", plan(3), drawn, learn)
    assert report["settings"]["round"] == best and (tmp_path / "out" / "images").is_dir()
    assert len(learned) == (2 if len(figures) == 3 else 1)
    assert prepare_rounds(tmp_path / "out", plan(3), drawn, learn) == report, "it is done"
    count = len(learned)
    (tmp_path / "out" / REPORT).unlink()  # as if stopped before the end

    def there(folder: Path, asked: Any, earlier: Path | None) -> dict[str, Any]:
        return json.loads((folder / REPORT).read_text())

    assert prepare_rounds(tmp_path / "out", plan(3), there, learn) == report and len(learned) == count


def test_a_second_round_takes_first_pictures_from_the_first(small: str, tmp_path: Path) -> None:
    training = "--max-train-steps 1 --train-batch-size 2 --validation-people 0"
    assert draw(small, tmp_path / "data", "--rounds", "2", "--round-training", training, count=8) == 0
    first, second = (tmp_path / "data" / "rounds" / name for name in "12")
    assert (first / "weights" / "face_fusion_adapter.safetensors").is_file()
    parts = [load_file(folder / "parts" / "000000.safetensors")["latents"] for folder in (first, second)]
    assert torch.equal(parts[0][:4], parts[1][:4]) and not torch.equal(parts[0][4:], parts[1][4:])
    report = read_report(tmp_path / "data")
    assert report["skipped"]["set aside to compare rounds"] >= 1 and report["similarity"]["held_out"] is not None
    assert is_encoded(tmp_path / "data", load_base(small))
    assert all(int(row["identity"]) > 0 for row in read_rows(tmp_path / "data")), "nobody is trained on who compares"


# --- Bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["generated:", "generated:1", "generated:many", "generated:-3", "generated:²"])
def test_a_number_of_people_is_asked_for(source: str) -> None:
    with pytest.raises(DataError, match="give the number of people to draw"):
        people_count(source)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generated:4"], "give --model"),
        (["generated:4", "--model", "MODEL", "--caption", "a"], "--caption is for photos"),
        (["generated:4", "--model", "MODEL", "--limit", "3"], "--limit is for photos"),
        (["generated:4", "--model", "MODEL", "--round-training", "--use-ema "], "give 2 or more"),
        (["generated:4", "--model", "MODEL", "--rounds", "2", "--round-training=--no"], "--round-training '--no'"),
        (["generated:4", "--model", "MODEL", "--embedder", "nobody"], "no face embedder nobody"),
        (["generated:4", "--model", "MODEL", "--prompts", "/no/file"], "/no/file"),
        (["generated:4", "--model", "MODEL", "--adapter", "/no/weights"], "/no/weights"),
        (["PHOTOS", "--per-person", "3"], "--per-person is for people whom the model draws"),
        (["avatars:9", "--model", "MODEL", "--rounds", "3"], "--rounds is for people whom the model draws"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [{"MODEL": small, "PHOTOS": str(tmp_path)}.get(word, word) for word in words]
    assert main(["prepare", *words, "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "face detector: " not in line]
    *bars, error = lines
    assert (
        message in error
        and all("%|" in bar or not bar.strip("\r ") for bar in bars)
        and not (tmp_path / "out" / METADATA).exists()
    )


def test_training_says_that_people_are_drawn_first(small: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", "--model", small, "--data", "generated:4", "--out", str(tmp_path)]) == 2
    assert "`face-fusion prepare generated:4 --model ...`" in capsys.readouterr().err


def test_the_comparison_trains_in_the_precision_that_is_asked_for() -> None:
    from face_fusion_pipeline.avatars.evaluation.generated_table import Schooling

    loop = Schooling(7, 4, seed=3, precision="bf16").loop
    assert (loop.steps, loop.batch_size, loop.seed, loop.precision) == (7, 4, 3, "bf16")
