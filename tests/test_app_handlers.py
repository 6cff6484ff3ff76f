"""The handlers of the web app without a browser: runs that are replaced, cancelled or refused, pages that close."""

import dataclasses
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from PIL import Image
from test_app import make_engine
from test_several_people import FakeDetector

from face_fusion_pipeline import SelfAttentionReference
from face_fusion_pipeline.app import session
from face_fusion_pipeline.app.engine import CancelledError, Engine, Picture
from face_fusion_pipeline.app.form import WHOLE_PHOTO, Form, PersonForm
from face_fusion_pipeline.app.session import Sessions
from face_fusion_pipeline.face_attention import attention_layers
from face_fusion_pipeline.face_familiarity import Familiarity
from face_fusion_pipeline.unet_family import unet_fingerprint


gr = pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")

from face_fusion_pipeline.app.avatar_examples import Example  # noqa: E402
from face_fusion_pipeline.app.handlers import Handlers  # noqa: E402  without Gradio these tests skip
from face_fusion_pipeline.app.page import build_page  # noqa: E402
from face_fusion_pipeline.app.person_handlers import ExampleHandler, PersonHandlers  # noqa: E402
from face_fusion_pipeline.face_defaults import FaceDefaults  # noqa: E402
from face_fusion_pipeline.generation.avatar_model import AVATAR_DEFAULTS  # noqa: E402


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    tiny_models.face(1, size=32).save(tmp_path / "ada.png")
    return tmp_path / "ada.png"


class Page:
    """The page without a browser: what its widgets hold, and the events of user "ada"."""

    def __init__(self, engine: Engine, photo: Path) -> None:
        self.engine, self.sessions = engine, Sessions()
        with gr.Blocks():
            self.widgets = w = build_page([], 1.0, 2, AVATAR_DEFAULTS, True, True)
        self.handlers = Handlers(engine, self.sessions, w)
        self.request: Any = type("Request", (), {"session_hash": "ada"})()
        self.values = {widget: getattr(widget, "value", None) for widget in self.handlers.form_inputs()}
        self.values |= {w.prompt: "a cat", w.people[0].photos: [(str(photo), None)], w.people[0].which: WHOLE_PHOTO}

    def handlers_of_person(self, number: int = 1) -> Any:
        """Those of one person."""
        return PersonHandlers(self.handlers, number)

    def start(self) -> dict[Any, Any]:
        """Press Generate; gives what the page now holds."""
        return {
            **self.values,
            self.widgets.run_id: self.handlers.start(self.values, self.request)[self.widgets.run_id],
        }

    def run(self, values: dict[Any, Any]) -> list[dict[Any, Any]]:
        """The turn of a run has come; gives all updates."""
        updates = list(self.handlers.run(values, self.request))
        assert updates.pop(0) == gr.skip()  # without it Gradio would empty all widgets
        return updates

    def words(self, updates: dict[Any, Any], field: str) -> str:
        """What is said beside a field."""
        return updates[self.widgets.messages[field]].value


@pytest.fixture
def page(photo: Path) -> Iterator[Page]:
    page = Page(make_engine(), photo)
    yield page
    page.sessions.close()


def test_a_run_shows_each_picture_and_then_all_files(page: Page) -> None:
    w = page.widgets
    updates = page.run(page.start())
    assert [len(update[w.results]) for update in updates[:-1]] == [1, 2]
    last = updates[-1]
    assert last[w.status] == "<p role='status'>Done.</p>"
    assert last[w.generate].interactive and not last[w.cancel].visible
    with zipfile.ZipFile(last[w.archive]) as archive:
        assert archive.namelist() == ["image_000.png", "image_001.png", "contact_sheet.png", "metadata.json"]


def test_of_several_runs_of_a_page_only_the_last_is_made(page: Page) -> None:
    w = page.widgets
    first, second = page.start(), {**page.start(), w.prompt: "the sea"}
    assert page.run(first) == []  # its turn comes after the second was asked for
    made = page.run(second)
    assert {entry["prompt"] for entry in made[-1][w.metadata]} == {"the sea"}
    assert page.run(second) == []  # both events of the page may hold the last id


def test_a_run_that_is_replaced_in_a_picture_says_nothing_more(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    original = page.engine.run

    def interrupted(form: Form, identities: Any, on_step: Any, cancelled: Any) -> Iterator[Picture]:
        for picture in original(form, identities, on_step, cancelled):
            page.start()  # after the picture was decoded
            yield picture

    monkeypatch.setattr(page.engine, "run", interrupted)
    assert page.run(page.start()) == []
    session = page.sessions.of("ada")
    assert session.run and [path.name for path in session.folder.path.iterdir()] == [session.run.folder.path.name]
    assert list(session.run.folder.path.iterdir()) == []


def test_a_form_that_is_wrong_leaves_what_was_made_before(page: Page) -> None:
    w = page.widgets
    files = page.run(page.start())[-2][w.results]
    assert files and all(Path(file).is_file() for file in files)
    page.values[w.seed] = -3
    updates = page.handlers.start(page.values, page.request)
    assert "seed must be from 0" in page.words(updates, "seed") and w.results not in updates
    assert page.run({**page.values, w.run_id: updates[w.run_id]}) == []
    assert all(Path(file).is_file() for file in files)
    page.values[w.seed] = 3
    page.start()
    assert not any(Path(file).is_file() for file in files)


def test_depth_is_estimated_once_for_all_pictures(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    estimated, given = [], []

    def depth(picture: Image.Image) -> Image.Image:
        estimated.append(picture)
        return picture.convert("L")

    def denoise(form: Form, *_: Any) -> Any:
        given.append(form.control.mode)
        return type("Output", (), {"images": [Image.new("RGB", (16, 16))]})

    monkeypatch.setattr("face_fusion_pipeline.app.engine.control_depth", depth)
    monkeypatch.setattr(page.engine, "_denoise", denoise)
    form = page.handlers.read_form(page.values, page.sessions.of("ada"))
    form = dataclasses.replace(form, control=Image.new("RGB", (16, 16), "red"), count=2)
    identity = page.engine.identity(form.people[0])[1]
    assert len(list(page.engine.run(form, [identity], lambda *_: None, lambda: False))) == 2
    assert len(estimated) == 1 and given == ["L"] * 4  # each without the face, too


def test_words_that_the_model_does_not_know_are_named(page: Page) -> None:
    w = page.widgets
    page.values[w.prompt] = "a gardn"
    for vocabulary, shown in (
        (None, ""),
        ({"places": ("a garden",)}, "The model does not know “gardn” (nearest: “garden”)"),
    ):
        page.engine.pipe.face_defaults = FaceDefaults(vocabulary=vocabulary)
        beside = page.handlers.start(page.values, page.request)[w.messages["prompt"]]
        assert (shown in beside.value) and bool(beside.value) is bool(shown) and beside.visible is bool(shown)


@pytest.mark.parametrize("late", [False, True])
def test_guidance_interval_is_as_its_box_says(page: Page, late: bool) -> None:
    page.values[page.handlers.widgets.low_noise_guidance] = late
    assert page.handlers.read_form(page.values, page.sessions.of("ada")).low_noise_guidance is late


def test_an_identity_that_cannot_be_loaded_takes_the_one_before_away(page: Page, tmp_path: Path) -> None:
    page.sessions.of("ada").identities[1] = "the one before"
    (tmp_path / "broken.safetensors").write_bytes(b"no identity")
    updates = page.handlers_of_person().load_identity(str(tmp_path / "broken.safetensors"), page.request)
    assert "broken.safetensors" in page.words(updates, "person_1") and not page.sessions.of("ada").identities


def test_too_many_photos_are_said_at_once(page: Page, photo: Path) -> None:
    person = page.widgets.people[0]
    page.values[person.photos] = [(str(photo), None)] * 9
    assert "9 photos: keep the best 8" in page.words(
        page.handlers_of_person().check_photos(page.values, page.request), "person_1"
    )


def test_the_face_crops_are_shown_and_go(page: Page, photo: Path) -> None:
    person, handlers = page.widgets.people[0], page.handlers_of_person()
    page.values[person.photos] = [(str(photo), None)] * 2
    shown = handlers.check_photos(page.values, page.request)
    assert page.words(shown, "person_1").count("2 photos") == 1
    assert shown[person.crops].visible and shown[person.crops].value.count('<img src="data:image/jpeg') == 2
    assert handlers.clear_message(page.values, page.request) == gr.skip()
    page.values[person.photos] = []
    assert not handlers.clear_message(page.values, page.request)[person.crops].visible
    page.values[person.photos] = [(str(photo.with_name("absent.png")), None)]
    assert not handlers.check_photos(page.values, page.request)[person.crops].visible


def test_every_bad_photo_of_every_person_is_named(page: Page, tmp_path: Path) -> None:
    for number, names in enumerate((("a.png", "b <i>.png"), ("c.png",))):
        files = [tmp_path / name for name in names]
        for file in files:
            file.write_text("no picture")
        page.values[page.widgets.people[number].photos] = [(str(file), None) for file in files]
    said = page.words(page.handlers_of_person().check_photos(page.values, page.request), "person_1")
    assert re.search(r"a\.png: .*<br>b &lt;i&gt;\.png: ", said)
    (update,) = page.run(page.start())
    assert "a.png" in page.words(update, "person_1") and "<br>b &lt;i&gt;.png" in page.words(update, "person_1")
    assert "c.png" in page.words(update, "person_2") and update[page.widgets.tabs].selected == 1
    assert update[page.widgets.generate].interactive


def test_a_page_too_many_is_told_so(page: Page, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_SESSIONS", 1)
    page.sessions.of("bob")
    page.sessions.connect("bob")
    updates = page.handlers.start(page.values, page.request)
    assert "1 pages are open" in page.words(updates, "result") and page.run({**page.values, **updates}) == []
    assert "pages are open" in page.words(page.handlers.show_layout(str(photo), page.request), "result")
    identity = page.engine.identity(PersonForm(1, (photo,), which=WHOLE_PHOTO))[1]
    identity.save(photo.with_suffix(".safetensors"))
    loaded = page.handlers_of_person().load_identity(str(photo.with_suffix(".safetensors")), page.request)
    assert "pages are open" in page.words(loaded, "person_1")


def test_looking_at_photos_and_clearing_fields_keeps_nothing(page: Page) -> None:
    person = page.handlers_of_person()
    person.check_photos(page.values, page.request)
    person.clear_message(page.values, page.request)
    person.forget_identity(page.request)
    page.handlers.remove_layout(page.request)
    page.handlers.cancel(page.request)
    assert len(page.sessions) == 0


def test_a_layout_takes_little_memory(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (9000, 9000)).save(tmp_path / "bomb.png")
    page.handlers.show_layout(str(tmp_path / "bomb.png"), page.request)
    assert page.sessions.of("ada").layout.size == (1024, 1024)


def test_a_run_of_a_closed_page_leaves_nothing(page: Page) -> None:
    w = page.widgets
    values = page.start()
    page.sessions.drop("ada")
    assert page.run(values) == [] and len(page.sessions) == 0
    saved = page.handlers_of_person().save_identity(values, page.request)
    assert "reload the page" in page.words(saved, "person_1") and saved[w.people[0].saved] is None
    assert len(page.sessions) == 0 and list(page.sessions.uploads.iterdir()) == []


def test_cancel_and_the_end_of_a_run_at_once(page: Page) -> None:
    w = page.widgets
    updates = page.handlers.run(page.start(), page.request)
    assert [bool(next(updates).get(w.results)) for _ in range(2)] == [False, True]
    ada = page.sessions.of("ada").run
    assert ada is not None
    shown: list[Any] = []
    threads = [
        threading.Thread(target=lambda: shown.append(page.handlers.finish(ada, "Done."))),
        threading.Thread(target=lambda: shown.append(page.handlers.cancel(page.request))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for update in shown:
        with zipfile.ZipFile(update[w.archive]) as archive:
            assert archive.testzip() is None and "image_000.png" in archive.namelist()
    assert list(updates) == [] and len(ada.results) == 1
    page.start()
    with pytest.raises(CancelledError):
        page.handlers.finish(ada, "Done.")


def test_an_unexpected_error_is_logged_and_not_shown(
    page: Page, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> Iterator[Picture]:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(page.engine, "run", fail)
    (update,) = page.run(page.start())
    words = page.words(update, "result")
    assert "unexpected error" in words and "secret" not in words and "RuntimeError" not in words
    assert update[page.widgets.generate].interactive and "/secret/path" in caplog.text
    caplog.clear()

    def fail_late(*args: Any) -> Iterator[Picture]:
        page.handlers.cancel(page.request)
        return fail()

    monkeypatch.setattr(page.engine, "run", fail_late)
    assert page.run(page.start()) == []  # Cancel has said what there is


def test_a_value_that_gradio_refuses_gives_the_buttons_back(page: Page) -> None:
    w = page.widgets
    first = page.start()
    values = page.start()
    skipped = page.handlers.failed(first, page.request)
    assert w.generate not in skipped  # another run took its place
    update = page.handlers.failed(values, page.request)
    assert update[w.generate].interactive and not update[w.cancel].visible and update[w.status] == ""
    assert "refused" in page.words(update, "result")
    values = page.start()
    page.handlers.cancel(page.request)
    assert w.generate not in page.handlers.failed(values, page.request)  # `cancel` has said all
    values, run = page.start(), page.sessions.of("ada").run
    assert run is not None and run.begin()
    assert w.generate not in page.handlers.failed(values, page.request)  # late, of the run that was cancelled before
    assert not run.cancelled.is_set()


def test_a_failure_that_is_said_late_does_not_stop_the_next_run(page: Page) -> None:
    w = page.widgets
    page.start()
    page.handlers.cancel(page.request)
    values = page.start()  # it waits until the first has stopped, of which Gradio says only now that it failed
    assert w.generate not in page.handlers.failed(values, page.request)
    assert page.run(values)[-1][w.status] == "<p role='status'>Done.</p>"
    values = page.start()
    assert "refused" in page.words(page.handlers.failed(values, page.request), "result"), "that was said once"


def test_depth_without_a_picture_is_refused(page: Page) -> None:
    (update,) = page.run({**page.start(), page.widgets.follow_depth: True})
    assert "add the picture" in page.words(update, "places") and update[page.widgets.places_section].open


def test_a_style_picture_is_shown_and_taken_and_goes_again(page: Page, photo: Path, tmp_path: Path) -> None:
    w, handlers = page.widgets, page.handlers
    updates = handlers.show_style(str(photo), page.request)
    assert updates[w.style_shown].visible and updates[w.remove_style].visible
    page.values[w.style_scale] = 0.3
    form = handlers.read_form(page.values, page.sessions.of("ada"))
    assert form.style_of_picture["style_image"].size == (32, 32) and form.style_of_picture["style_scale"] == 0.3
    (tmp_path / "notes.png").write_text("no picture")
    updates = handlers.show_style(str(tmp_path / "notes.png"), page.request)
    assert page.words(updates, "style_picture").count("notes.png") == 1 and str(tmp_path) not in str(updates)
    assert updates[w.style_section].open and not updates[w.style_shown].visible
    assert handlers.read_form(page.values, page.sessions.of("ada")).style_of_picture == {}
    handlers.show_style(str(photo), page.request)
    ExampleHandler(handlers, Example("One", ((photo,),), photo, "a cat")).fill(page.request)
    assert page.sessions.of("ada").style is None
    handlers.show_style(str(photo), page.request)
    assert not handlers.remove_style(page.request)[w.style_shown].visible and page.sessions.of("ada").style is None


def test_an_identity_that_does_not_fit_is_named_beside_its_person(page: Page, tmp_path: Path, photo: Path) -> None:
    other = Engine(tiny_models.tiny_pipeline(seed=5), detector=FakeDetector())
    other.identity(PersonForm(1, (photo,), which=WHOLE_PHOTO))[1].save(tmp_path / "other.safetensors")
    update = page.handlers_of_person().load_identity(str(tmp_path / "other.safetensors"), page.request)
    assert "another base model" in page.words(update, "person_1")


def test_results_stay_while_their_page_is_open(page: Page) -> None:
    w = page.widgets
    last = page.run(page.start())[-1]
    files = {last[w.archive], last[w.sheet], *(str(file) for _, file in page.sessions.of("ada").run.results)}
    assert files <= w.results.keep_in_cache  # Gradio removes uploads of an hour ago, and must not remove these


def test_a_face_that_the_model_does_not_know_is_said_beside_its_photos(page: Page, tmp_path: Path) -> None:
    w, pipe = page.widgets, page.engine.pipe
    layers = attention_layers(pipe.unet, "attn2")
    judge = Familiarity(
        {name: torch.zeros(2, layer.to_q.in_features) for name, layer in layers.items()},
        -1.0, 150, 0, (0.5, 0.5), SelfAttentionReference(1.5), unet_fingerprint(pipe.unet),
    )  # fmt: skip
    judge.save(tmp_path / "judge.safetensors")
    pipe.face_defaults = FaceDefaults(face_mode="both", face_familiarity="judge.safetensors", folder=tmp_path)
    updates = page.run(page.start())
    said = page.words(updates[0], "person_1")
    assert "unlike the pictures" in said and "“How faces join”" in said
    assert {entry["face_mode"] for entry in updates[-1][w.metadata]} == {"training-free"}
    page.values |= {w.mode: "both"}
    with_weights = page.run(page.start())
    assert w.messages["person_1"] not in with_weights[0]
    assert {entry["face_mode"] for entry in with_weights[-1][w.metadata]} == {"both"}


def test_a_mode_that_cannot_be_is_said_beside_it(page: Page) -> None:
    page.engine.pipe.unload_face_fusion_adapter()
    page.values |= {page.widgets.mode: "adapter"}
    (updates,) = page.run(page.start())
    assert "needs weights" in page.words(updates, "mode") and updates[page.widgets.more_section].open
