"""The app's pose and expression of another photo: forms, calls of the pipeline, the page and the command."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from PIL import Image
from test_app import FORM, make_engine, run
from test_face_snap import ToyModel, loaded, weights  # noqa: F401  a fixture
from test_several_people import FakeDetector

from face_fusion_pipeline import FaceFusionError
from face_fusion_pipeline.app.engine import Engine
from face_fusion_pipeline.app.form import AS_IN_PHOTO, WHOLE_PHOTO, FieldError, PersonForm, PoseForm
from face_fusion_pipeline.app.session import Sessions
from face_fusion_pipeline.cli import app as app_command
from face_fusion_pipeline.control_landmarks import driven_faces
from face_fusion_pipeline.face_errors import LandmarksError, ModelNotFoundError


DRIVER = tiny_models.face(4, size=40)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    tiny_models.face(1, size=32).save(tmp_path / "ada.png")
    return tmp_path / "ada.png"


@pytest.fixture
def engine(weights: Any) -> Engine:  # noqa: F811
    made = make_engine()
    loaded(made.pipe, weights)
    return made


def spied(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the pipeline is called with from now on."""
    calls: list[dict[str, Any]] = []
    original = type(engine.pipe).__call__
    monkeypatch.setattr(
        type(engine.pipe),
        "__call__",
        lambda pipe, prompt, **settings: calls.append(settings) or original(pipe, prompt, **settings),
    )
    return calls


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


# --- The form --------------------------------------------------------------------------------------------------------

ADA, BOB = PersonForm(1, (Path("ada.png"),)), PersonForm(2, (Path("bob.png"),))
BAD = {
    "several people": ({"people": (ADA, BOB)}, {"expression": "open"}, "a pose is for one person, and 2 are given"),
    "a saved identity": ({"people": (PersonForm(1, identity="ada"),)}, {"driver": "a fit"}, "holds no photo"),
    "turned too far": ({}, {"turned": (46, 0, 0)}, "“Turn left or right” must be from -45 to 45, got 46"),
    "turned by nothing": ({}, {"turned": (0, None, 0)}, "“Up or down” .*got None"),
    "no number": ({}, {"turned": (0, 0, float("nan"))}, "“Tilt” .*got nan"),
    "too strong": ({}, {"expression": "open", "strength": 1.6}, "from 0 to 1.5, got 1.6"),
    "no strength": ({}, {"expression": "open", "strength": None}, "got None"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_pose_that_cannot_be_is_named_beside_its_photo(case: str) -> None:
    changes, pose, words = BAD[case]
    form = replace(FORM, **changes, pose=PoseForm(**pose))
    with pytest.raises(FieldError, match=words) as caught:
        form.check()
    assert caught.value.field == "driver"
    replace(form, pose=PoseForm()).check()


def test_what_pictures_say_of_a_pose() -> None:
    assert PoseForm(strength=0.5).text == {}
    assert PoseForm(driver="a fit").text == {"posed": True, "expression": None, "control_scale": 1.0}
    assert PoseForm(turned=(20, 0, -5), expression="open").text == {
        **{"posed": True, "yaw": 20, "pitch": 0, "roll": -5},
        **{"expression": "open", "control_scale": 1.0},
    }


# --- What the pipeline is called with --------------------------------------------------------------------------------


def test_the_network_of_poses_is_not_one_of_depth(engine: Engine) -> None:
    assert make_engine().expressions is None
    assert engine.expressions == ("neutral", "open") and not engine.has_control
    engine.pipe.face_model = None
    assert engine.expressions is None  # weights alone take no pose


def test_points_are_of_the_persons_shape_and_of_the_drivers_pose(
    engine: Engine, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = ToyModel(), spied(engine, monkeypatch)
    own, driver = model.fit(Image.open(photo)), engine.fit_driver(DRIVER, "bob.png")
    form = replace(FORM, people=(PersonForm(1, (photo,)),), count=1)
    box = (0.25, 0.25, 0.75, 0.75)
    poses = {
        "as it is": ({"driver": driver}, None, {}),
        "turned": ({"driver": driver, "turned": (20, -5, 3)}, None, {"turned": (20, -5, 3)}),
        "neither": ({"expression": "open"}, None, {"expression": "open"}),
        "placed": ({"driver": driver}, {1: box}, {"boxes": [(4, 4, 12, 12)]}),
    }
    for pose, boxes, settings in poses.values():
        run(engine, replace(form, pose=PoseForm(**pose), boxes=boxes))
        expected = driven_faces(model, [own], pose.get("driver"), lambda _: [], size=(16, 16), **settings)
        found = calls[-1]["driver_image"]
        assert found.shape == (72, 2) and np.allclose(found, expected.points[0, :, :2])
        assert calls[-1]["controlnet_conditioning_scale"] == 1.0
    run(engine, form)
    assert "driver_image" not in calls[-1] and "controlnet_conditioning_scale" not in calls[-1]


def test_the_network_reads_the_person_from_photos_and_nobody_where_there_is_no_face(
    engine: Engine, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    encode = "face_fusion_pipeline.conditioner_face_snap.SnapConditioner.encode"
    from face_fusion_pipeline.conditioner_face_snap import SnapConditioner

    original = SnapConditioner.encode
    monkeypatch.setattr(encode, lambda self, pipe, images, options: read.append(images) or original(
        self, pipe, images, options))  # fmt: skip
    pose = PoseForm(engine.fit_driver(DRIVER, "bob.png"), strength=1.5)
    form = replace(FORM, people=(PersonForm(1, (photo, photo)),), pose=pose, compare=True)
    pictures = run(engine, form)
    assert [[crop.size for crop in crops] for crops in read] == [[(16, 16)] * 2] * 2  # once for each picture
    (first, _) = pictures
    assert first.plain is not None and not same(first.plain, first.image)
    assert first.text["posed"] and first.text["control_scale"] == 1.5 and "bob" not in str(first.text)
    plain = run(engine, replace(form, pose=PoseForm()))[0]
    assert "posed" not in plain.text
    assert not same(plain.image, first.image)
    assert plain.plain is not None and not same(plain.plain, first.plain)  # the pose is the same without the face


@pytest.mark.parametrize("mode", ["adapter", "both"])
def test_at_strength_zero_a_picture_is_the_one_without_a_pose(engine: Engine, photo: Path, mode: str) -> None:
    """Photos are encoded in the call as the identity was before it."""
    person = PersonForm(1, (photo,), which=WHOLE_PHOTO)
    identities = engine.identities((person,), [engine.crops(person)], mode)
    form = replace(FORM, people=(person,), count=1, mode=mode, refine=True, steps=3)
    plain, posed = (
        next(engine.run(replace(form, pose=pose), identities, lambda *_: None, lambda: False))
        for pose in (PoseForm(), PoseForm(expression="open", strength=0))
    )
    assert same(plain.image, posed.image) and plain.text["face_mode"] == mode


def test_depth_and_pose_together(engine: Engine, photo: Path, weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    engine.pipe.unload_face_snap()
    engine.pipe.register_modules(controlnet=tiny_models.tiny_controlnet(engine.pipe.unet, seed=5))
    loaded(engine.pipe, weights)
    assert engine.has_control and engine.expressions
    calls = spied(engine, monkeypatch)
    depth = Image.fromarray(np.linspace(0, 255, 512, dtype=np.uint8).reshape(16, 32)).convert("RGB")
    pose = PoseForm(expression="open", strength=0.5)
    form = replace(FORM, people=(PersonForm(1, (photo,)),), count=1, control=depth, pose=pose)
    (picture,) = run(engine, form)
    assert picture.image.size == (16, 8) and picture.text["control"] and picture.text["posed"]
    assert calls[-1]["controlnet_conditioning_scale"] == [1.0, 0.5] and calls[-1]["control_image"] is not None
    assert not same(picture.image, run(engine, replace(form, pose=replace(pose, strength=0)))[0].image)
    assert same(
        run(engine, replace(form, pose=replace(pose, strength=0)))[0].image,
        run(engine, replace(form, pose=PoseForm()))[0].image,
    )


def test_a_pose_without_what_it_needs_is_named_beside_its_field(
    engine: Engine, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = replace(FORM, people=(PersonForm(1, (photo,)),), pose=PoseForm(expression="open"))

    def field_of(engine: Engine, form: Any, words: str) -> str:
        with pytest.raises(FieldError, match=words) as caught:
            run(engine, form)
        return caught.value.field

    assert field_of(make_engine(), form, "--face-snap") == "driver"
    assert field_of(engine, replace(form, pose=PoseForm(expression="winking")), "winking") == "driver"

    def refuse(self: Any, picture: Image.Image, box: Any = None) -> Any:
        raise LandmarksError("the face is turned by 80 degrees")

    monkeypatch.setattr(ToyModel, "fit", refuse)
    assert field_of(engine, form, "needs the shape of the face: the face is turned") == "person_1"
    with pytest.raises(FieldError, match=r"^bob.png: the face is turned by 80 degrees") as caught:
        engine.fit_driver(DRIVER, "bob.png")
    assert caught.value.field == "driver"
    engine.detector._detector.boxes = []  # type: ignore[attr-defined]
    with pytest.raises(FieldError, match=r"^bob.png: no face .*take a photo"):
        engine.fit_driver(DRIVER, "bob.png")


def test_the_face_that_is_meant_is_fitted_and_of_the_other_photo_the_largest(
    engine: Engine, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, original = [], ToyModel.fit
    monkeypatch.setattr(ToyModel, "fit", lambda self, picture, box=None: seen.append(box) or original(self, picture))
    form = replace(FORM, people=(PersonForm(1, (photo,)),), pose=PoseForm(expression="open"))
    engine.posed(form, (16, 16), None)
    engine.detector._detector = FakeDetector((1, 1, 9, 9), (12, 4, 30, 28), (31, 2, 38, 9), size=40)
    engine.fit_driver(DRIVER, "bob.png")
    assert seen == [(4, 4, 28, 28), (12, 4, 30, 28)]


def test_of_a_persons_photos_those_count_whose_face_can_be_fitted(
    engine: Engine, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.face(6, size=24).save(tmp_path / "profile.png")
    original = ToyModel.fit

    def fit(self: Any, picture: Image.Image, box: Any = None) -> Any:
        if picture.size == (24, 24):
            raise LandmarksError("a profile")
        return original(self, picture)

    form = replace(FORM, people=(PersonForm(1, (photo,)),), count=1, pose=PoseForm(expression="open"))
    monkeypatch.setattr(ToyModel, "fit", fit)
    calls = spied(engine, monkeypatch)
    run(engine, form)
    run(engine, replace(form, people=(PersonForm(1, (tmp_path / "profile.png", photo)),)))
    assert np.array_equal(calls[0]["driver_image"], calls[1]["driver_image"])


# --- The page --------------------------------------------------------------------------------------------------------


def build(engine: Engine) -> Any:
    pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")
    from face_fusion_pipeline.app.server import build_app, uploads_in

    sessions = Sessions()
    with uploads_in(sessions.uploads):
        config = build_app(engine, sessions).get_config_file()
    sessions.close()
    return [part["props"] for part in config["components"]]


def test_the_section_is_there_where_a_pose_can_be_taken(engine: Engine) -> None:
    for made in (engine, make_engine()):
        parts = {part["elem_id"]: part for part in build(made) if part.get("elem_id")}
        can = made is engine
        assert parts["pose"]["visible"] is can and not parts["pose"]["open"]
        choices = [choice[0] for choice in parts["expression"]["choices"]]
        assert choices == [AS_IN_PHOTO, *(("neutral", "open") if can else ())]
        assert [(parts[name]["minimum"], parts[name]["maximum"]) for name in ("yaw", "pitch", "roll")] == [
            (-45, 45)
        ] * 3


@pytest.fixture
def page(engine: Engine, photo: Path) -> Any:
    pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")
    from test_app_handlers import Page

    page = Page(engine, photo)
    yield page
    page.sessions.close()


def test_a_driver_is_shown_with_its_points_and_taken_and_goes_again(page: Any, tmp_path: Path) -> None:
    w, handlers, session = page.widgets, page.handlers, page.sessions.of("ada")
    DRIVER.save(tmp_path / "bob.png")
    updates = handlers.show_driver(str(tmp_path / "bob.png"), page.request)
    assert updates[w.driver_shown].visible and "image/jpeg" in updates[w.driver_shown].value
    assert updates[w.remove_driver].visible and session.driver.size == (40, 40)
    pose = handlers.read_form(page.values, session).pose
    assert pose.driver is session.driver and pose.turned is None and pose.expression is None
    page.values |= {w.by_numbers: True, w.turns[0]: 30, w.expression: "open", w.pose_strength: 0.7}
    assert handlers.read_form(page.values, session).pose == PoseForm(session.driver, (30, 0, 0), "open", 0.7)
    page.engine.detector._detector.boxes = []
    updates = handlers.show_driver(str(tmp_path / "bob.png"), page.request)
    assert "bob.png: no face found" in page.words(updates, "driver") and str(tmp_path) not in str(updates)
    assert updates[w.pose_section].open and not updates[w.driver_shown].visible and session.driver is None


def test_an_example_goes_without_the_pose_before_it(page: Any, photo: Path) -> None:
    from face_fusion_pipeline.app.avatar_examples import Example
    from face_fusion_pipeline.app.person_handlers import ExampleHandler

    w = page.widgets
    page.handlers.show_driver(str(photo), page.request)
    updates = ExampleHandler(page.handlers, Example("One", ((photo,),), photo, "a cat")).fill(page.request)
    assert page.sessions.of("ada").driver is None and not updates[w.driver_shown].visible
    assert updates[w.by_numbers] is False and updates[w.expression] == AS_IN_PHOTO
    assert page.handlers.show_turns(True).visible and not page.handlers.show_turns(False).visible


def test_what_is_wrong_with_a_pose_opens_its_section(page: Any, photo: Path) -> None:
    w = page.widgets
    page.values |= {w.expression: "open", w.people[1].photos: [(str(photo), None)]}
    updates = page.handlers.start(page.values, page.request)
    assert "one person, and 2 are given" in page.words(updates, "driver") and updates[w.pose_section].open
    page.values |= {w.people[1].photos: None}
    made = page.run(page.start())[-1][w.metadata]
    assert all(entry["posed"] and entry["expression"] == "open" for entry in made)


# --- The command -----------------------------------------------------------------------------------------------------


def loading(
    monkeypatch: pytest.MonkeyPatch,
    weights: Any,  # noqa: F811
    *options: str,
    beside: str | None = None,
    model: Any = None,
) -> Engine:
    """`face-fusion app` with options, on a tiny model with or without FaceSnap beside it."""
    pipe = tiny_models.tiny_pipeline()
    original, parser = pipe.load_face_snap, argparse.ArgumentParser()

    def load(path: str) -> None:
        assert path == "snap"
        monkeypatch.setattr(pipe, "load_face_snap", original)
        loaded(pipe, weights)
        pipe.face_model = None

    pipe.load_face_snap = load
    for name in ("adapter_beside", "controlnet_beside", "studio_beside"):
        monkeypatch.setattr(app_command, name, lambda model: None)
    monkeypatch.setattr(app_command, "snap_beside", lambda model: beside)
    monkeypatch.setattr(app_command, "load_pipeline", lambda *_: pipe)
    if model is not None:
        monkeypatch.setattr(app_command, "face_model", lambda args: model)
    app_command.add_arguments(parser)
    return app_command.load_engine(parser.parse_args([*options, "--detector", "haar"]))


def test_weights_are_named_or_lie_beside_the_model(monkeypatch: pytest.MonkeyPatch, weights: Any) -> None:  # noqa: F811
    assert loading(monkeypatch, weights).expressions is None
    for options, beside in ((["--face-snap", "snap"], None), ([], "snap")):
        engine = loading(monkeypatch, weights, *options, beside=beside, model=ToyModel())
        assert engine.expressions == ("neutral", "open") and not engine.has_control


def test_without_a_face_model_the_page_is_without_poses_and_a_line_says_why(
    monkeypatch: pytest.MonkeyPatch,
    weights: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    for variable in ("FACE_FUSION_FACE_MODEL", "FACE_FUSION_LANDMARKER"):
        monkeypatch.delenv(variable, raising=False)
    engine = loading(monkeypatch, weights, "--model", "somebody/model", beside="snap")
    assert engine.expressions is None and not engine.has_control
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("face-fusion: the page is without poses, see --face-model: ") and "face model" in line


def test_a_face_model_that_is_named_is_one_that_can_be_used(
    monkeypatch: pytest.MonkeyPatch, weights: Any, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    with pytest.raises(FaceFusionError, match="--face-model goes with FaceSnap weights"):
        loading(monkeypatch, weights, "--face-model", "x.safetensors")
    with pytest.raises(FaceFusionError, match="--landmarker goes with FaceSnap weights"):
        loading(monkeypatch, weights, "--landmarker", "x.task")
    with pytest.raises(ModelNotFoundError, match="there is no face model"):
        loading(monkeypatch, weights, "--face-model", str(tmp_path / "absent.safetensors"), beside="snap")

    class NoLandmarker(ToyModel):
        @property
        def landmarker(self) -> Any:
            raise ModelNotFoundError("facial points of photos need a landmark model")

    with pytest.raises(ModelNotFoundError, match="landmark model"):
        loading(monkeypatch, weights, "--face-model", "x", beside="snap", model=NoLandmarker())
