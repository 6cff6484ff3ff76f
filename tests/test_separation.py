"""What an evaluation says of those who look at its pictures, and the folder layout of MultiID-Bench."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_evaluate_command import CentralFaces, folder, model, words  # noqa: F401  fixtures
from tiny_models import face

from face_fusion_pipeline.cli import main
from face_fusion_pipeline.evaluation.faces import FaceFinder
from face_fusion_pipeline.evaluation.multiid_bench import side_by_side, write_multiid_bench
from face_fusion_pipeline.evaluation.observation import Observation, Observer
from face_fusion_pipeline.evaluation.people import Person
from face_fusion_pipeline.evaluation.picture_rows import KnownPerson, PicturePanel
from face_fusion_pipeline.evaluation.pictures import ANOTHER_PHOTO, Picture
from face_fusion_pipeline.evaluation.separation import check_recognisers, separation
from face_fusion_pipeline.face_detectors import Face
from face_fusion_pipeline.face_errors import FaceFusionError
from face_fusion_pipeline.training.sources import Photo


class Evaluator:
    name = "the evaluator"

    def embed(self, images: Any, landmarks: Any) -> np.ndarray:
        return np.zeros((len(images), 2))

    def landmarks(self, image: Any, boxes: Any) -> list[np.ndarray]:
        return []


def panel_of(people: dict[str, list[float]], as_evaluators: bool) -> PicturePanel:
    """People by the angles in degrees of their photos' embeddings; the first is that of the reference."""

    def seen(degrees: float) -> Observation:
        a = np.radians(degrees)
        return Observation(Face((0, 0, 9, 9), 1.0), {Evaluator.name: np.array([np.cos(a), np.sin(a)])})

    photos = {name: tuple(Photo(f"{name}{i}", b"") for i in range(len(angles))) for name, angles in people.items()}
    panel = PicturePanel(
        {name: Person(name, mine) for name, mine in photos.items()},
        Observer(FaceFinder(CentralFaces(), Evaluator() if as_evaluators else None), [Evaluator()]),  # type: ignore[list-item]
    )
    for name, (first, *others) in people.items():
        panel._known[name] = KnownPerson(seen(first), {i: seen(angle) for i, angle in enumerate(others, 1)})
    return panel


def test_how_well_people_are_told_apart() -> None:
    found = separation(panel_of({"ada": [0, 60, 0], "bob": [90, 90], "carl": [45]}, False))[Evaluator.name]
    assert found.person == pytest.approx((0.75 + 1) / 2) and found.stranger == pytest.approx(0)  # carl has no second
    assert separation(panel_of({"ada": [0, 60], "bob": [90]}, False)) == {}


@pytest.mark.parametrize("as_evaluators", [True, False])
def test_evaluators_that_take_strangers_for_the_person_are_refused(as_evaluators: bool) -> None:
    wrong = panel_of({"ada": [0, 80], "bob": [10, 90]}, as_evaluators)
    if as_evaluators:
        with pytest.raises(FaceFusionError, match=r"a stranger 0\.985, the person 0\.174\): .*--no-evaluators"):
            check_recognisers(wrong)
    else:
        assert "a stranger 0.985, the person 0.174" in check_recognisers(wrong)[Evaluator.name]
    unsure = check_recognisers(panel_of({"ada": [0, 40], "bob": [50, 90]}, as_evaluators))[Evaluator.name]
    assert ("renders of avatars" in unsure) is as_evaluators and "the person 0.766" in unsure
    assert check_recognisers(panel_of({"ada": [0, 5], "bob": [90, 80]}, as_evaluators)) == {}


def test_the_command_refuses_before_it_draws(
    words: list[str],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from face_fusion_pipeline.avatars.evaluation.evaluators import Evaluators

    name = Evaluators.name
    monkeypatch.setattr(Evaluators, "embed", lambda self, images, landmarks: np.ones((len(images), 4)))
    assert main(words) == 2
    assert f"the {name}, which was trained on renders of avatars, takes strangers" in capsys.readouterr().err
    assert not (tmp_path / "out" / "images" / "rows").exists() and not list((tmp_path / "out").rglob("*.png"))
    assert main([*words, "--no-evaluators", "--methods", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["doubts"] == {}


def test_doubts_are_in_the_table(
    words: list[str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "face_fusion_pipeline.evaluation.comparison.check_recognisers", lambda panel: {"somebody": "it is unsure"}
    )
    assert main([*words, "--methods", "none"]) == 0
    assert "## To be read with care\n\n* **somebody**: it is unsure" in (tmp_path / "out" / "table.md").read_text()


def test_the_layout_of_multiid_bench(words: list[str], tmp_path: Path) -> None:  # noqa: F811
    assert main([*words, "--methods", "none", "adapter", "--multiid-bench"]) == 0
    bench = tmp_path / "out" / "multiid_bench"
    assert sorted(path.name for path in bench.iterdir()) == ["adapter", "none"]
    for method in ("none", "adapter"):
        folders = sorted((bench / method).iterdir())
        assert [path.name for path in folders] == [f"id{number}" for number in range(1, 7)]
        for path in folders:
            assert sorted(file.name for file in path.iterdir()) == ["meta.json", "ori.jpg", "out.jpg", "ref_1.jpg"]
    metas = [json.loads((bench / method / "id2" / "meta.json").read_text()) for method in ("none", "adapter")]
    assert metas[0]["prompt"] == metas[1]["prompt"] == "a dog" and metas[0]["identities"] == ["ada"]
    out, made = (Image.open(path) for path in (
        bench / "adapter" / "id2" / "out.jpg", tmp_path / "out" / "images" / metas[1]["file"]))  # fmt: skip
    assert out.format == "JPEG" and np.abs(np.asarray(out, int) - np.asarray(made.convert("RGB"), int)).mean() < 12
    reference = Image.open(bench / "none" / "id1" / "ref_1.jpg")
    photo = Image.open(Path(words[2]) / "ada" / "0.png").convert("RGB")
    assert np.abs(np.asarray(reference, int) - np.asarray(photo, int)).mean() < 12


def test_several_people_in_the_layout_and_what_does_not_fit(tmp_path: Path) -> None:
    files = []
    for seed in range(5):
        face(seed, size=16 + 8 * seed).save(tmp_path / f"{seed}.png")
        files.append(Photo(f"{seed}.png", tmp_path / f"{seed}.png"))
    people = {"ada": Person("ada", (files[0], files[1])), "bob": Person("bob", (files[2], files[3]))}
    people["zoe"] = Person("zoe", (files[4],))
    made = Picture(tmp_path / "0.png", "m", ("ada", "bob"), "two people")
    alone = Picture(tmp_path / "1.png", "m", ("zoe",), "a person")
    five = Picture(tmp_path / "2.png", "m", ("ada",) * 5, "a crowd")
    photo = Picture(tmp_path / "3.png", ANOTHER_PHOTO, ("ada",))
    out = tmp_path / "bench"
    (out / "m" / "id7").mkdir(parents=True)  # of a longer run before
    (out / "m" / "notes").mkdir()
    left = write_multiid_bench([made, alone, five, photo], people, out)
    assert (
        set(left) == {"1.png", "2.png"} and "zoe has no second photo" in left["1.png"] and "5 people" in left["2.png"]
    )
    assert sorted(path.name for path in out.rglob("*")) == sorted(
        ["m", "id1", "notes", "meta.json", "ori.jpg", "out.jpg", "ref_1.jpg", "ref_2.jpg"]
    )
    assert Image.open(out / "m" / "id1" / "ori.jpg").size == (24 + 24, 24)


def test_side_by_side_keeps_shapes() -> None:
    row = side_by_side([Image.new("RGB", (10, 20), "red"), Image.new("RGB", (40, 10), "blue")])
    assert row.size == (5 + 40, 10) and row.getpixel((2, 5)) == (255, 0, 0) and row.getpixel((30, 5)) == (0, 0, 255)
