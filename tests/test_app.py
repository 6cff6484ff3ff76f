"""The web app without a browser: forms, places, users kept apart, files, and what the engine makes of a form."""

import argparse
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from test_controlnet import tiny_controlnet
from test_face_studio import random_weights, toy_encoder, toy_prior
from test_several_people import FakeDetector

from face_fusion_pipeline import FaceFusionError, FaceIdentity, create_adapter
from face_fusion_pipeline.app import session
from face_fusion_pipeline.app.avatar_examples import draw_examples
from face_fusion_pipeline.app.engine import CancelledError, Engine, Picture
from face_fusion_pipeline.app.form import (
    MAX_PHOTOS,
    ONLY_FACE,
    WHICH_FACE,
    WHOLE_PHOTO,
    FieldError,
    Form,
    PersonForm,
    whole_number,
)
from face_fusion_pipeline.app.places import boxes_of_people, canvas_value, drawn_boxes, read_picture
from face_fusion_pipeline.app.results import save_archive, save_picture, save_sheet
from face_fusion_pipeline.app.session import Sessions
from face_fusion_pipeline.cli import app as app_command
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.face_defaults import FaceDefaults
from face_fusion_pipeline.face_errors import IdentityMismatchError
from face_fusion_pipeline.generation.loading import controlnet_beside, load_pipeline
from face_fusion_pipeline.generation.photos import locate_face


ROOT = Path(__file__).parents[1]
FORM = Form(people=(PersonForm(1, (Path("ada.png"),)),), prompt="a cat", steps=2, count=2, seed=7)
LEFT, RIGHT = (0.05, 0.25, 0.4, 0.75), (0.6, 0.25, 0.95, 0.75)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    tiny_models.face(1, size=32).save(tmp_path / "ada.png")
    return tmp_path / "ada.png"


def make_engine(adapter: bool = True, **detector: Any) -> Engine:
    pipe = tiny_models.tiny_pipeline()
    if adapter:
        torch.manual_seed(1)
        pipe.set_face_fusion_adapter(create_adapter(pipe.unet, "xavier", metadata={"resolution": 16}))
    return Engine(pipe, "somebody/model", None, FakeDetector(*detector.get("faces", [(4, 4, 28, 28)]), size=32))


def run(engine: Engine, form: Form, **watch: Any) -> list[Picture]:
    """All pictures of a form whose photos are cropped to the face."""
    people = tuple(replace(person, which=WHOLE_PHOTO) for person in form.people)
    form = replace(form, people=people)
    identities = [engine.identity(person)[1] for person in people]
    on_step, cancelled = watch.get("on_step", lambda part, words: None), watch.get("cancelled", lambda: False)
    return list(engine.run(form, identities, on_step, cancelled))


def differ(a: Picture, b: Picture) -> bool:
    return np.abs(np.asarray(a.image).astype(int) - np.asarray(b.image)).max() > 1


# --- Form and places -------------------------------------------------------------------------------------------------

BAD = {
    "nobody": ({"people": ()}, "person_1"),
    "too many photos": ({"people": (PersonForm(2, (Path("a.png"),) * 9),)}, "person_2"),
    "strength below zero": ({"people": (PersonForm(3, (Path("a.png"),), strength=-1),)}, "person_3"),
    "empty prompt": ({"prompt": "  "}, "prompt"),
    "undecodable prompt": ({"prompt": "a \udcff"}, "prompt"),
    "endless prompt": ({"prompt": "word " * 2_000_000}, "prompt"),
    "endless negative prompt": ({"negative_prompt": "word " * 2_000_000}, "negative_prompt"),
    "bad negative prompt": ({"negative_prompt": "a\0b"}, "negative_prompt"),
    "seed below zero": ({"seed": -1}, "seed"),
    "seed too large": ({"seed": 2**63}, "seed"),
    "no pictures": ({"count": 0}, "count"),
    "too many pictures": ({"count": 9}, "count"),
    "no steps": ({"steps": 0}, "steps"),
    "too few steps to draw faces again": ({"refine": True, "steps": 2}, "steps"),
    "guidance that is no number": ({"guidance": float("nan")}, "guidance"),
    "no guidance": ({"guidance": None}, "guidance"),
    "no strength": ({"people": (PersonForm(1, (Path("a.png"),), strength=None),)}, "person_1"),
    "style beyond all": ({"style_picture": Image.new("RGB", (8, 8)), "style_scale": 1.5}, "style_picture"),
    "box of nobody": ({"boxes": {1: LEFT, 2: RIGHT}}, "places"),
    "picture to follow too long": ({"control": Image.new("RGB", (500, 100))}, "places"),
    "picture to follow too high": ({"control": Image.new("RGB", (100, 401))}, "places"),
    "somebody without a box": (
        {"people": (PersonForm(1, (Path("a"),)), PersonForm(2, (Path("b"),))), "boxes": {1: LEFT}},
        "places",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_form_names_its_field(case: str) -> None:
    FORM.check()
    replace(FORM, control=Image.new("RGB", (400, 100))).check()
    changes, field = BAD[case]
    with pytest.raises(FieldError) as caught:
        replace(FORM, **changes).check()
    assert caught.value.field == field


def test_style_and_boxes_of_a_form() -> None:
    assert FORM.full_prompt == "a cat"
    assert replace(FORM, style="watercolor").full_prompt == "a cat, watercolor"
    people = (PersonForm(3, (Path("c"),)), PersonForm(1, (Path("a"),)))
    assert replace(FORM, people=people, boxes={1: LEFT, 3: RIGHT}).face_boxes == [RIGHT, LEFT]
    assert FORM.face_boxes is None and replace(FORM, boxes={}).face_boxes is None


def test_guidance_is_halved_in_the_low_noise_half_if_it_then_is_guidance() -> None:
    assert replace(FORM, guidance=5.0).guidance_in_low_noise_half is None
    assert replace(FORM, guidance=5.0, low_noise_guidance=True).guidance_in_low_noise_half == 2.5
    assert replace(FORM, guidance=2.0, low_noise_guidance=True).guidance_in_low_noise_half is None


def test_which_face_is_an_index_from_the_left() -> None:
    assert [PersonForm(1, which=which).face_index for which in WHICH_FACE] == [None, 0, 1, 2, 3, None]


@pytest.mark.parametrize("value", [None, "7", 1.5, True, float("nan"), float("inf")])
def test_a_number_field_without_a_whole_number(value: Any) -> None:
    assert whole_number("seed", 7.0) == 7
    with pytest.raises(FieldError, match="whole number"):
        whole_number("seed", value)


def test_drawn_boxes_are_checked() -> None:
    assert drawn_boxes(canvas_value()) == {}
    assert drawn_boxes({"boxes": [None, list(LEFT), None]}) == {2: LEFT}
    for bad in (None, "boxes", {"boxes": 3}, {"boxes": [None] * 4}, {"boxes": [[0.5, 0, 0.1, 1]]}, {"boxes": [["x"]]}):
        with pytest.raises(FieldError) as caught:
            drawn_boxes(bad)
        assert caught.value.field == "places"


def test_boxes_found_in_a_layout_are_shown_over_it() -> None:
    found = [(0, 0, 10, 10), (60, 10, 110, 40), (20, 0, 40, 20), (50, 30, 52, 32)]
    boxes = boxes_of_people(found, (100, 50))
    assert boxes == [(0, 0, 0.1, 0.2), (0.2, 0, 0.4, 0.4), (0.6, 0.2, 1.0, 0.8)]  # the largest, left to right, inside
    value = canvas_value(Image.new("RGB", (1000, 500)), boxes[:2])
    assert value["ratio"] == 2 and value["boxes"][2] is None and value["person"] == 2
    assert value["picture"].startswith("data:image/jpeg;base64,") and len(value["picture"]) < 20_000
    assert drawn_boxes(json.loads(json.dumps(value))) == {1: boxes[0], 2: boxes[1]}


def test_a_layout_is_kept_in_the_size_that_is_needed(tmp_path: Path) -> None:
    Image.new("RGB", (5000, 2500), "white").save(tmp_path / "large.png")
    Image.new("RGB", (300, 200), "white").save(tmp_path / "small.png")
    assert (tmp_path / "large.png").stat().st_size < 100_000  # a small file of many pixels
    assert read_picture(tmp_path / "large.png").size == (1024, 512)
    assert read_picture(tmp_path / "small.png").size == (300, 200)


def test_a_bad_layout_is_named_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "plan.png").write_text("no picture")
    for name in ("plan.png", "absent.png"):
        with pytest.raises(FieldError) as caught:
            read_picture(tmp_path / name)
        assert name in str(caught.value)
    assert caught.value.field == "places"


# --- Engine ----------------------------------------------------------------------------------------------------------


def test_pictures_come_one_by_one_with_text(photo: Path) -> None:
    form = replace(FORM, people=(PersonForm(1, (photo,), strength=1.5),), style="line art")
    steps: list[tuple[float, str]] = []
    engine = make_engine()
    pictures = run(engine, form, on_step=lambda part, words: steps.append((part, words)))
    assert [picture.text["seed"] for picture in pictures] == [7, 8] and differ(*pictures)
    text = pictures[0].text
    assert text["prompt"] == "a cat, line art" and text["face_scale"] == "1.5" and text["face_mode"] == "adapter"
    assert text["watermark"] is False
    assert text["model"] == "somebody/model" and "generated by AI" in str(text["description"])
    assert len(steps) >= form.steps * form.count  # the page hears of every step
    parts = [part for part, _ in steps]
    assert parts == sorted(parts) and parts[-1] == 1 and {"Picture 1 of 2", "Picture 2 of 2"} == {w for _, w in steps}
    assert not differ(run(engine, replace(form, seed=8, count=1))[0], pictures[1])  # its own seed only
    assert differ(run(engine, replace(form, people=(PersonForm(1, (photo,), strength=0),)))[0], pictures[0])


def test_guidance_interval_is_of_the_picture_and_in_its_text(photo: Path) -> None:
    engine, person = make_engine(), PersonForm(1, (photo,))
    form = replace(FORM, people=(person,), count=1, steps=4, guidance=20.0)
    (before,), (late,) = run(engine, form), run(engine, replace(form, low_noise_guidance=True))
    assert not np.array_equal(np.asarray(before.image), np.asarray(late.image))
    assert (before.text["low_noise_guidance"], late.text["low_noise_guidance"]) == (None, form.guidance / 2)


def test_compare_gives_the_picture_without_a_face(photo: Path) -> None:
    engine, form = make_engine(), replace(FORM, people=(PersonForm(1, (photo,)),), count=1)
    (compared,) = run(engine, replace(form, compare=True))
    (off,) = run(engine, replace(form, people=(PersonForm(1, (photo,), strength=0),)))
    assert compared.plain is not None and np.array_equal(np.asarray(compared.plain), np.asarray(off.image))
    assert run(engine, form)[0].plain is None and differ(compared, off)


def test_small_faces_are_drawn_again(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    monkeypatch.setattr(engine, "size", lambda shape=None: (64, 64))  # the model draws 16 x 16
    form = replace(FORM, people=(PersonForm(1, (photo,)),), count=1, steps=4)
    boxes = [(4, 4, 9, 10), (40, 40, 46, 47)]
    monkeypatch.setattr(engine, "find_boxes", lambda picture: boxes)
    said: list[str] = []
    (before,), (after,) = (
        run(engine, replace(form, refine=refine), on_step=lambda part, words: said.append(words))
        for refine in (False, True)
    )
    difference = (np.asarray(before.image) != np.asarray(after.image)).any(-1)
    assert difference[40:47, 40:46].any() and not difference[:30].any()  # the largest face, and nothing else
    assert (before.text["refine_faces"], after.text["refine_faces"]) == (False, True)
    assert "Picture 1 of 1, faces again" in said
    boxes.clear()
    assert not differ(run(engine, replace(form, refine=True))[0], before)
    cancelled = iter([False] * 6 + [True] * 99)  # at a step of the second pass
    boxes.append((4, 4, 10, 11))
    with pytest.raises(CancelledError):
        run(engine, replace(form, refine=True), cancelled=lambda: next(cancelled))


def test_what_is_said_where_faces_are_drawn_again() -> None:
    people = tuple(PersonForm(number, (Path("a.png"),)) for number in (1, 2))
    form = replace(FORM, prompt="a person in a suit", style="watercolor", people=people[:1])
    assert form.prompt_of_one == "a person in a suit, watercolor"
    assert replace(form, people=people).prompt_of_one == "a photo of a person, watercolor"


def test_the_page_says_what_draws(photo: Path) -> None:
    engine = make_engine()
    assert engine.described == (
        "Draws with somebody/model, 16 × 16 pixels, training-free, a weaker likeness than with weights."
    )
    engine.adapter = str(photo.parent)
    assert engine.described.endswith(f"with the weights {photo.parent.name}.")
    engine.model = None
    assert engine.described.startswith("Draws avatars, 16 × 16 pixels")


def test_several_people_in_drawn_boxes_or_in_a_draft(photo: Path) -> None:
    people = (PersonForm(1, (photo,)), PersonForm(2, (photo, photo), strength=0.5))
    form = replace(FORM, people=people, count=1)
    (drawn,) = run(make_engine(), replace(form, boxes={1: LEFT, 2: RIGHT}))
    assert drawn.boxes == [pytest.approx([16 * value for value in box]) for box in (LEFT, RIGHT)]
    assert drawn.plain is None and drawn.text["face_boxes_source"] == "drawn" and drawn.text["face_scale"] == "1, 0.5"
    (draft,) = run(make_engine(faces=[(20, 8, 30, 24), (2, 8, 12, 24)]), form)
    assert draft.plain is not None and draft.text["face_boxes_source"] == "draft"
    assert draft.boxes == [(1, 4, 6, 12), (10, 4, 15, 12)]  # the detector looks at twice the size
    (even,) = run(make_engine(faces=[(2, 8, 12, 24)]), form)
    assert even.text["face_boxes_source"] == "even" and len(even.boxes or []) == 2
    assert differ(drawn, even)


def test_the_depth_of_a_picture_is_followed_in_its_shape(photo: Path) -> None:
    engine = make_engine()
    assert not engine.has_control
    net = tiny_controlnet(engine.pipe.unet)
    for parameter in net.parameters():
        parameter.data *= 4  # a depth that shows in 8 bits
    engine.pipe.register_modules(controlnet=net)
    assert engine.has_control
    people = (PersonForm(1, (photo,)), PersonForm(2, (photo,)))
    form = replace(FORM, people=people, count=1, boxes={1: LEFT, 2: RIGHT})
    depth = Image.fromarray(np.linspace(0, 255, 512, dtype=np.uint8).reshape(16, 32)).convert("RGB")
    flat, deep = (run(engine, replace(form, control=control))[0] for control in (Image.new("RGB", (32, 16)), depth))
    assert flat.image.size == (16, 8) and differ(flat, deep)
    assert deep.boxes and deep.boxes[1] == pytest.approx([9.6, 2, 15.2, 6]) and deep.text["control"]
    assert run(engine, form)[0].image.size == (16, 16)
    drawn = run(engine, replace(form, layout_size=(300, 150)))[0]  # boxes on a picture keep their shape without depth
    assert drawn.image.size == (16, 8) and drawn.boxes and drawn.boxes[1] == pytest.approx([9.6, 2, 15.2, 6])


def test_a_picture_brings_the_style_and_the_photo_the_person(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    assert not engine.has_style
    plain_form = replace(FORM, people=(PersonForm(1, (photo,)),), count=1)
    (before,) = run(engine, plain_form)
    random_weights(engine.pipe.unet, picture_mask=1.0)
    engine.pipe.register_modules(image_encoder=toy_encoder())
    engine.pipe._studio_parts = {"prior": toy_prior}
    assert engine.has_style
    looked: list[Any] = []
    monkeypatch.setattr(engine.pipe, "_detect_boxes", lambda image, detector: looked.append(detector) or [])
    assert not differ(run(engine, plain_form)[0], before)  # as if it were not there
    style = Image.effect_noise((40, 32), 90).convert("RGB")
    form = replace(plain_form, style_picture=style, compare=True)
    half, whole = (run(engine, replace(form, style_scale=scale))[0] for scale in (0.5, 1.0))
    assert differ(half, before) and not np.array_equal(np.asarray(whole.image), np.asarray(half.image))
    assert (half.text["style_image"], half.text["style_scale"], before.text["style_image"]) == (True, 0.5, None)
    assert half.plain is not None and not np.array_equal(np.asarray(half.plain), np.asarray(half.image))
    assert looked and all(detector is engine.detector for detector in looked)  # which all threads may ask
    assert form.style_of_picture["style_context"] == "replace"  # of one person 1 is the picture alone
    assert replace(form, people=form.people * 2).style_of_picture["style_context"] is None  # several keep the words
    engine.pipe.unload_face_fusion_adapter()
    (training_free,) = run(engine, form)
    assert training_free.text["face_mode"] == "training-free"  # FaceStudio brings the style alone


def test_cancelling_keeps_the_pictures_so_far(photo: Path) -> None:
    engine, form = make_engine(), replace(FORM, people=(PersonForm(1, (photo,), which=WHOLE_PHOTO),), count=3)
    identities, stop, made = [engine.identity(form.people[0])[1]], threading.Event(), []

    def on_step(part: float, words: str) -> None:
        if words.startswith("Picture 2"):
            stop.set()

    with pytest.raises(CancelledError):
        for picture in engine.run(form, identities, on_step, stop.is_set):
            made.append(picture)
    assert len(made) == 1
    steps: list[float] = []
    with pytest.raises(CancelledError):  # in the middle of a picture
        list(
            engine.run(replace(form, steps=50), identities, lambda part, _: steps.append(part), lambda: len(steps) > 3)
        )
    assert len(steps) == 4
    assert len(run(engine, form)) == 3  # the pipeline is as it was


def test_two_users_at_once_get_what_each_would_get_alone(photo: Path) -> None:
    engine, results = make_engine(), {}
    forms = [replace(FORM, people=(PersonForm(1, (photo,)),), prompt=prompt) for prompt in ("a cat", "the sea")]
    threads = [
        threading.Thread(target=lambda form=form: results.update({form.prompt: run(engine, form)})) for form in forms
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for form in forms:
        assert not any(differ(*pair) for pair in zip(results[form.prompt], run(engine, form), strict=True))


def test_photos_that_do_not_do_are_named(tmp_path: Path, photo: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    two = make_engine(faces=[(2, 4, 14, 28), (18, 4, 30, 28)])
    cases = (
        (make_engine(), "bad.png", ONLY_FACE, "not a picture"),
        (make_engine(), "absent.png", ONLY_FACE, "No such file"),
        (make_engine(faces=[]), "ada.png", ONLY_FACE, "no face"),
        (make_engine(faces=[(4, 4, 8, 8)]), "ada.png", ONLY_FACE, "4x4"),
        (two, "ada.png", ONLY_FACE, "Which face"),
        (two, "ada.png", WHICH_FACE[3], "no such face"),
    )
    for engine, name, which, words in cases:
        with pytest.raises(FieldError) as caught:
            list(engine.photos(PersonForm(2, (tmp_path / name,), which=which)))
        assert caught.value.field == "person_2" and str(caught.value).startswith(f"{name}: ")
        assert words in str(caught.value) and str(tmp_path) not in str(caught.value) and "--" not in str(caught.value)
    left, right = (next(two.photos(PersonForm(1, (photo,), which=which))).face for which in WHICH_FACE[1:3])
    assert left is not None and right is not None and left.box[0] < right.box[0]
    assert next(make_engine(faces=[]).photos(PersonForm(1, (photo,), which=WHOLE_PHOTO))).face is None


def test_every_photo_that_does_not_do_is_named(tmp_path: Path, photo: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    person = PersonForm(1, (tmp_path / "bad.png", photo, tmp_path / "empty.png"))
    engine, seen = make_engine(), []
    with pytest.raises(FieldError) as caught:
        seen += engine.photos(person)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["bad.png", "empty.png"] and caught.value.field == "person_1"
    with pytest.raises(FieldError, match="bad.png.*\n.*empty.png"):
        engine.identity(person)


def test_identity_files(tmp_path: Path, photo: Path) -> None:
    engine, person = make_engine(), PersonForm(1, (photo,), which=WHOLE_PHOTO)
    crops, identity = engine.identity(person)
    assert [crop.size for crop in crops] == [(16, 16)]
    identity.save(tmp_path / "ada.safetensors")
    loaded = engine.load_identity(tmp_path / "ada.safetensors")
    assert isinstance(loaded, FaceIdentity) and engine.identity(PersonForm(2, identity=loaded)) == ([], loaded)
    with pytest.raises(FaceFusionError, match="--adapter"):
        make_engine(adapter=False).load_identity(tmp_path / "ada.safetensors")
    other = Engine(tiny_models.tiny_pipeline(seed=5), detector=FakeDetector())
    other.identity(person)[1].save(tmp_path / "other.safetensors")
    with pytest.raises(IdentityMismatchError, match="another base model"):
        make_engine().load_identity(tmp_path / "other.safetensors")
    (tmp_path / "bad.safetensors").write_text("no identity")
    with pytest.raises(FaceFusionError, match="no identity") as caught:
        engine.load_identity(tmp_path / "bad.safetensors")
    assert str(tmp_path) not in str(caught.value)


def test_identities_of_two_modes_are_named_beside_the_person(photo: Path) -> None:
    engine, person = make_engine(), PersonForm(1, (photo,), which=WHOLE_PHOTO)
    identity = engine.identity(person)[1]
    other = PersonForm(3, identity=replace(identity, mode="training-free"))
    with pytest.raises(FieldError, match="training-free") as caught:
        run(engine, replace(FORM, people=(person, other), count=1))
    assert caught.value.field == "person_3"


def test_a_watermark_that_has_no_room_is_named_beside_the_picture_to_follow(photo: Path) -> None:
    engine = make_engine()
    engine.watermark = True
    form = replace(FORM, people=(PersonForm(1, (photo,)),), control=Image.new("RGB", (32, 16)))
    with pytest.raises(FieldError, match="watermark") as caught:
        run(engine, form)
    assert caught.value.field == "places"


# --- Users and files -------------------------------------------------------------------------------------------------


def test_users_have_folders_and_runs_of_their_own() -> None:
    sessions = Sessions()
    ada, bob = sessions.of("ada"), sessions.of("../bob")
    assert sessions.of("ada") is ada and ada is not bob and len(sessions) == 2
    assert ada.folder.path.parent == bob.folder.path.parent == sessions.uploads  # a name from outside is no path
    first = ada.new_run()
    (first.folder.path / "image.png").touch()
    bob_run, second = bob.new_run(), ada.new_run()
    assert first.cancelled.is_set() and not first.folder.path.exists() and ada.run is second
    assert not second.cancelled.is_set() and not bob_run.cancelled.is_set() and bob_run.folder.path.is_dir()
    assert first.id != second.id and not first.begin() and second.begin() and not second.begin()
    sessions.drop("ada")
    sessions.drop("nobody")
    assert second.cancelled.is_set() and not ada.folder.path.exists() and bob.folder.path.is_dir()
    assert sessions.get("ada") is None and sessions.get("../bob") is bob and len(sessions) == 1
    sessions.close()
    assert not sessions.root.exists()


def test_sessions_of_pages_that_were_left_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, now = Sessions(), [1000.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    for name in ("open", "left", "script"):
        sessions.of(name)
    sessions.connect("open")
    for _ in range(2):  # it may come back before it has gone
        sessions.connect("left")
        sessions.disconnect("left")
    sessions.expire()
    assert len(sessions) == 3
    now[0] += session.IDLE + 1
    assert sessions.get("script") is not None  # in use
    sessions.expire()
    assert sessions.get("left") is None and len(sessions) == 2
    assert len(list(sessions.uploads.iterdir())) == 2
    half, whole = sessions.uploads / "tmp123", sessions.uploads / "abc" / "photo.png"
    whole.parent.mkdir()
    for file in (half, whole):
        file.touch()
        os.utime(file, (0, 0))
    sessions.expire()
    assert not half.exists() and whole.exists()  # Gradio removes the other one itself
    sessions.close()


def test_there_is_room_for_so_many_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_SESSIONS", 3)
    sessions = Sessions()
    oldest = sessions.of("oldest")
    for name in ("a", "b"):
        sessions.of(name)
        sessions.connect(name)
    sessions.of("c")  # the one that is not connected goes
    assert sessions.get("oldest") is None and not oldest.folder.path.exists() and len(sessions) == 3
    sessions.connect("c")
    with pytest.raises(FieldError, match="3 pages are open"):
        sessions.of("d")
    assert sessions.of("a") and len(sessions) == 3
    sessions.disconnect("b")
    assert sessions.of("d") and sessions.get("b") is None
    sessions.close()


def test_what_a_killed_app_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, sys; from face_fusion_pipeline.app.session import Sessions; s = Sessions(); "
        "(s.of('ada').folder.path / 'photo.png').touch(); print(s.root, flush=True); sys.stdin.read()"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "TMPDIR": str(tmp_path)}
    apps = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        for _ in range(2)
    ]
    roots = [Path(app.stdout.readline().strip()) for app in apps if app.stdout]
    apps[0].kill()
    apps[0].wait(60)
    assert all(list(root.rglob("photo.png")) for root in roots)
    mine = Sessions()
    assert not roots[0].exists() and list(roots[1].rglob("photo.png")), "the other one is alive"
    assert mine.root.is_dir() and mine.root.stat().st_mode & 0o777 == 0o700
    apps[1].communicate("", 60)
    mine.close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_saved_for_a_run_that_is_over() -> None:
    sessions, picture = Sessions(), Picture(Image.new("RGB", (8, 8)), None, None, False, {})
    ada = sessions.of("ada")
    cancelled = ada.new_run()
    cancelled.add(picture, save_picture)
    cancelled.cancelled.set()
    with pytest.raises(CancelledError):
        cancelled.add(picture, save_picture)
    assert [file.name for _, file in cancelled.results] == ["image_000.png"] and len(cancelled.results) == 1
    replaced = ada.new_run()
    ada.new_run()
    closed = sessions.of("bob").new_run()
    sessions.drop("bob")
    for over in (cancelled, replaced, closed):
        over.cancelled.clear()  # as if it had been set a moment later
        with pytest.raises(CancelledError):
            over.add(picture, save_picture)
        assert not over.folder.path.exists()
    sessions.close()


def test_removing_a_folder_waits_for_who_is_writing_into_it() -> None:
    sessions, picture = Sessions(), Picture(Image.new("RGB", (8, 8)), None, None, False, {})
    run, removal = sessions.of("ada").new_run(), threading.Thread(target=sessions.drop, args=("ada",))

    def save(picture: Picture, folder: Path, index: int) -> Path:
        removal.start()
        removal.join(0.2)
        return save_picture(picture, folder, index)  # makes the folder again if it is gone

    run.add(picture, save)
    removal.join(60)
    assert not run.folder.path.exists() and list(sessions.uploads.iterdir()) == []
    sessions.close()


def test_files_say_what_they_are(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    text = {"prompt": "café 猫", "seed": 7, "description": "generated by AI", "face_boxes": None}
    pictures = [Picture(red, blue, None, False, text), Picture(red, blue, None, False, {**text, "seed": 8})]
    files = [save_picture(picture, tmp_path, index) for index, picture in enumerate(pictures)]
    sheet = save_sheet(pictures, {"reference": [blue], "person 2": []}, tmp_path)
    assert sheet is not None and Image.open(sheet).size == (8 + 3 * 264, 28 + 2 * 264)
    for file in (files[1], sheet):
        assert Image.open(file).text["prompt"] == "café 猫"  # type: ignore[attr-defined]
    with zipfile.ZipFile(save_archive([*files, sheet], pictures, tmp_path)) as archive:
        names = ["image_000.png", "image_001.png", "contact_sheet.png", "metadata.json"]
        assert archive.namelist() == names and archive.testzip() is None
        assert [entry["seed"] for entry in json.loads(archive.read("metadata.json"))] == [7, 8]
    assert save_sheet([], {"reference": [blue]}, tmp_path) is None


def test_an_archive_takes_the_place_of_the_one_before_at_once(tmp_path: Path) -> None:
    picture = Picture(Image.new("RGB", (16, 16)), None, None, False, {"seed": 7})
    with save_archive([save_picture(picture, tmp_path, 0)], [picture], tmp_path).open("rb") as download:
        length = tmp_path.joinpath("face_fusion.zip").stat().st_size
        save_archive([], [], tmp_path)
        assert len(download.read()) == length  # who is downloading gets all of it
    assert not list(tmp_path.glob("*.tmp"))


def test_examples_are_found_and_always_the_same(tmp_path: Path) -> None:
    examples = draw_examples(tmp_path)
    assert len({example.label for example in examples}) == len(examples) >= 3
    files = {photo for example in examples for person in example.people for photo in person}
    assert all(locate_face(photo, "haar").face is not None for photo in files)
    assert [Image.open(example.card).width // 96 for example in examples] == [
        sum(map(len, example.people)) for example in examples
    ]
    before = {file: file.read_bytes() for file in files}
    draw_examples(tmp_path)
    assert before == {file: file.read_bytes() for file in files}


# --- Command and page ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, named",
    [
        ("--port=70000", "--port"),
        ("--steps=0", "--steps"),
        ("--max-upload=0", "--max-upload"),
        ("--max-upload=nan", "--max-upload"),
        ("--model=some/where/else", "some/where/else"),
        ("--max-upload=inf", "--max-upload"),
        ("--model=./nowhere", "there is no folder ./nowhere"),
    ],
)
def test_bad_arguments(flag: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["app", flag]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("face-fusion: error: ") and named in lines[0]


def test_without_gradio_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("server", "page", "handlers", "person_handlers"):
        monkeypatch.delitem(sys.modules, f"face_fusion_pipeline.app.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert "face-fusion-pipeline[app]" in capsys.readouterr().err


def test_the_avatar_model_brings_adapter_and_controlnet(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    app_command.add_arguments(parser)
    engine = app_command.load_engine(parser.parse_args(["--device", "cpu"]))
    assert engine.has_control and engine.pipe._adapter_fingerprint()
    assert controlnet_beside(str(tmp_path)) is None  # most models have none beside them
    (tmp_path / "controlnet").mkdir()
    (tmp_path / "controlnet" / "config.json").touch()
    assert controlnet_beside(str(tmp_path)) == str(tmp_path / "controlnet")


def test_a_file_above_the_limit_is_refused_by_the_server() -> None:
    pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")
    from face_fusion_pipeline.app.server import serving

    def upload(address: str, length: int) -> int:
        head = '--edge\r\nContent-Disposition: form-data; name="files"; filename="ada.safetensors"\r\n\r\n'
        body = head.encode() + bytes(length) + b"\r\n--edge--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=edge"}
        asked = urllib.request.Request(f"{address}gradio_api/upload", body, headers)
        try:
            return urllib.request.urlopen(asked, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code

    with serving(make_engine(), port=0, max_upload_mb=1) as address:
        assert upload(address, 2**20 - 1) == 200
        assert upload(address, 2**20 + 1) == 413


def test_the_default_limit_lets_identities_of_stable_diffusion_through() -> None:
    pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")
    from face_fusion_pipeline.app.server import serving

    parser = argparse.ArgumentParser()
    app_command.add_arguments(parser)
    # keys and values of SD 1.5's self-attention at 512 pixels, in half precision: (N_f, C) of each of its layers
    layers = 5 * [(4096, 320)] + 5 * [(1024, 640)] + 5 * [(256, 1280)] + [(64, 1280)]
    largest = MAX_PHOTOS * sum(2 * 2 * tokens * width for tokens, width in layers)
    for limit in (
        parser.parse_args([]).max_upload,
        inspect.signature(serving).parameters["max_upload_mb"].default,
    ):
        assert limit * 2**20 > largest


def test_a_bad_controlnet_is_named(tmp_path: Path) -> None:
    with pytest.raises(FaceFusionError, match="ControlNet .*nothing"):
        load_pipeline(controlnet=str(tmp_path / "nothing"))


def test_the_page_fits_the_model() -> None:
    pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")
    from gradio.route_utils import delete_files_created_by_app

    from face_fusion_pipeline.app.server import build_app, uploads_in

    engine, sessions = make_engine(), Sessions()
    with uploads_in(sessions.uploads):
        page = build_app(engine, sessions, steps=9)
        config = page.get_config_file()
        delete_files_created_by_app(page, None)  # what happens to old uploads
        icons = [part["props"]["icon"] for part in config["components"] if part["props"].get("icon")]
        assert len(icons) == len(draw_examples(sessions.examples))
        assert all(Path(icon["path"]).is_relative_to(sessions.root) and Path(icon["path"]).is_file() for icon in icons)
        engine.pipe.register_modules(controlnet=tiny_controlnet(engine.pipe.unet))
        engine.pipe.face_defaults = FaceDefaults(vocabulary={"places": ("garden", "library")})
        with_control = build_app(Engine(engine.pipe, None, None, engine.detector), sessions).get_config_file()
    sessions.close()

    def widget(config: Any, **known: Any) -> dict[str, Any]:
        props = [part["props"] for part in config["components"]]
        return next(p for p in props if all(p.get(name) == value for name, value in known.items()))

    styles = [[choice[0] for choice in widget(page, label="Style")["choices"]] for page in (config, with_control)]
    assert "oil painting" in styles[0] and "oil painting" not in styles[1]  # the avatars know their own styles only
    texts = [str([part["props"].get("value") for part in of["components"]]) for of in (config, with_control)]
    assert "garden, library" in texts[1] and "garden, library" not in texts[0]
    depth = {"label": "Follow the depth of this picture"}
    assert not widget(config, **depth)["visible"] and widget(with_control, **depth)["visible"]
    assert widget(config, label="Denoising steps")["value"] == 9
    assert widget(config, elem_id="compare")["value"] and not widget(config, elem_id="refine")["value"]
    assert "Draws with somebody/model" in texts[0] and "Draws avatars" in texts[1]
    assert "One photo\\na photo of a smiling person" in texts[0]  # the card of an example has its prompt
    assert not [fn for fn in config["dependencies"] if fn["api_visibility"] == "public"]  # nothing for other programs


def test_a_port_that_is_taken_is_named() -> None:
    pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")
    from face_fusion_pipeline.app.server import serving

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FaceFusionError, match=f"{port}.*--port"), serving(make_engine(), port=port):
            pass


def test_a_page_that_this_machine_does_not_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")
    from gradio import networking

    from face_fusion_pipeline.app.server import serving

    monkeypatch.setattr(networking, "url_ok", lambda url: False)
    with pytest.raises(FaceFusionError, match="NO_PROXY"), serving(make_engine(), port=0):
        pass


def test_the_command_serves_this_machine_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")
    command = [sys.executable, "-m", "face_fusion_pipeline", "app", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as app:
        assert app.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/", app.stdout.readline())
        assert address
        assert urllib.request.urlopen(address[0], timeout=60).status == 200
        assert len(list(tmp_path.glob("face_fusion_app_*"))) == 1
        app.send_signal(signal.SIGTERM)
        assert app.wait(60) == 0
    assert list(tmp_path.glob("face_fusion_app_*")) == []
