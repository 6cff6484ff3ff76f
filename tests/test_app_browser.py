"""The web app in a real browser, on the embedded model: Debian's Chromium, driven by Playwright.

$FACE_FUSION_CHROMIUM names another browser. With $FACE_FUSION_SCREENSHOTS=FOLDER every test leaves a picture there.
"""

import argparse
import io
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from face_fusion_pipeline.avatars import render, sample_scene
from face_fusion_pipeline.avatars.face_model import load_avatar_face_model
from face_fusion_pipeline.avatars.world.sheet import portrait, to_pil
from face_fusion_pipeline.cli import app as app_command
from face_fusion_pipeline.face_attached import detach_module, save_attached
from face_fusion_pipeline.face_embedders import load_face_embedder
from face_fusion_pipeline.face_snap import FaceMixer, new_mixer, new_network, save_network
from face_fusion_pipeline.face_studio import studio_left_out
from face_fusion_pipeline.generation.avatar_model import embedded_model
from face_fusion_pipeline.generation.loading import SNAP_FILE, STUDIO_FOLDER


pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[test]'")
CHROMIUM = os.environ.get("FACE_FUSION_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("no browser: apt-get install chromium, or set FACE_FUSION_CHROMIUM", allow_module_level=True)

ADA, BOB = 1_100_007, 1_100_004
PATIENCE = 180_000  # milliseconds; a busy machine is slow
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# Remembers what stood in #status: on a quick machine the steps of a picture pass between two looks.
WATCH_STATUS = """() => {
    window.statuses = [];
    const look = () => window.statuses.push(document.querySelector("#status")?.innerText ?? "");
    new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""
expect = sync_api.expect
expect.set_options(timeout=PATIENCE)


class SpiedPipeline:
    """A pipeline that notes what it is called with, and counts its steps."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.calls, self.steps = pipe, [], 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __call__(self, prompt: str, callback_on_step_end: Any, **settings: Any) -> Any:
        self.calls.append({"prompt": prompt, **settings})

        def count(pipe: Any, step: int, timestep: int, tensors: Any) -> Any:
            self.steps += 1
            return callback_on_step_end(pipe, step, timestep, tensors)

        return self.pipe(prompt, callback_on_step_end=count, **settings)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As `face-fusion app` makes it without options; with random weights of FaceSnap where the package has none."""
    parser = argparse.ArgumentParser()
    app_command.add_arguments(parser)
    engine = app_command.load_engine(parser.parse_args(["--device", "cpu"]))
    if engine.expressions is None:
        load_random_snap(engine.pipe, tmp_path_factory.mktemp("snap"))
    return engine


def load_random_snap(pipe: Any, folder: Path) -> None:
    """FaceSnap that has learned nothing, with the face model of avatars."""
    torch.manual_seed(0)
    embedder = load_face_embedder(Path(embedded_model()) / STUDIO_FOLDER / "face_embedder.safetensors")
    sizes = {"image_width": pipe.image_encoder.config.hidden_size, "face_width": embedder.width}
    new_mixer(pipe.unet, **sizes, tokens=2, depth=1, face_embedder=embedder.name)
    save_attached(pipe.unet, FaceMixer, folder / SNAP_FILE)
    detach_module(pipe.unet, FaceMixer.NAME)
    with studio_left_out(pipe.unet):
        save_network(new_network(pipe.unet, pipe.vae_scale_factor), folder)
    pipe.load_face_snap(folder, face_embedder=embedder)
    pipe.face_model = load_avatar_face_model()


@pytest.fixture
def pipe(engine: Any, monkeypatch: pytest.MonkeyPatch) -> SpiedPipeline:
    spied = SpiedPipeline(engine.pipe)
    monkeypatch.setattr(engine, "pipe", spied)
    return spied


@pytest.fixture(scope="module")
def address(engine: Any) -> Iterator[str]:
    from face_fusion_pipeline.app.server import serving

    with serving(engine, port=0, steps=2, max_upload_mb=4) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Opens the app as another user each time; at the end no page may have complained or asked another host."""
    pages: list[Any] = []
    complaints: list[str] = []

    def listen(page: Any) -> None:
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        elsewhere = re.compile(r"(?!http://127\.0\.0\.1[:/])(https?|wss?)://")
        page.on("request", lambda asked: complaints.append(asked.url) if elsewhere.match(asked.url) else None)

    def open_app(size: dict[str, int] = DESKTOP) -> Any:
        context = browser.new_context(viewport=size, accept_downloads=True)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        listen(page)
        page.goto(address)
        expect(page.locator("#generate")).to_be_visible()
        expect(page.locator("#places")).to_be_visible()
        pages.append(page)
        return page

    yield open_app
    if folder := os.environ.get("FACE_FUSION_SCREENSHOTS"):
        for index, page in enumerate(pages):
            if page.is_closed():
                continue
            page.wait_for_timeout(1000)
            name = re.sub(r"\W+", "_", request.node.name)
            page.screenshot(path=str(Path(folder) / f"{name}_{index}.png"), full_page=True)
    for page in pages:
        page.context.close()
    assert complaints == []


def png(image: Image.Image, name: str = "photo.png") -> dict[str, Any]:
    """A picture as a file to upload."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}


def upload(page: Any, *files: dict[str, Any], person: int = 1) -> None:
    """Add photos to a person."""
    page.get_by_role("tab", name=f"Person {person}").click()
    page.locator(f"#photos_{person} input[type=file]").first.set_input_files(list(files))


def beside(page: Any, field: str) -> Any:
    return page.locator(f"#message_{field}")


def set_pictures(page: Any, count: int) -> None:
    page.locator("#count input[type=number]").fill(str(count))
    page.locator("#count input[type=number]").press("Tab")


def set_steps(page: Any, steps: int) -> None:
    """Unfolds “More”, once."""
    field = page.get_by_label("number input for Denoising steps")
    if not field.is_visible():
        page.get_by_role("button", name="More").click()
        page.wait_for_timeout(500)  # the section unfolds
    field.fill(str(steps))
    field.press("Tab")
    expect(field).to_have_value(str(steps))


def unfold_places(page: Any) -> None:
    page.get_by_role("button", name="Where people go").click()
    page.locator(".places-area").scroll_into_view_if_needed()
    page.wait_for_timeout(500)  # the section unfolds


def upload_layout(page: Any, image: Image.Image) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator("#layout").click()
    chooser.value.set_files(png(image, "layout.png"))


def drag(page: Any, x0: float, y0: float, x1: float, y1: float) -> None:
    """Draw a box, in [0, 1] of the area."""
    area = page.locator(".places-area")
    area.scroll_into_view_if_needed()
    frame = area.bounding_box()
    points = [(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]) for x, y in ((x0, y0), (x1, y1))]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=3)
    page.mouse.up()


def assert_boxes(text: dict[str, Any], *wanted: list[int]) -> None:
    """The boxes in pixels that a picture was made with, to two pixels."""
    boxes = [[int(value) for value in box.split(", ")] for box in text["face_boxes"].split("; ")]
    assert text["face_boxes_source"] == "drawn" and text["people"] == len(wanted)
    for box, goals in zip(boxes, wanted, strict=True):
        assert all(abs(value - goal) <= 2 for value, goal in zip(box, goals, strict=True)), boxes


def finished(page: Any, count: int) -> list[dict[str, Any]]:
    """Wait for the results, and give what the archive says of them."""
    expect(page.locator("#status")).to_contain_text("Done.")
    expect(page.locator("#results img")).to_have_count(count)
    expect(page.locator("#generate")).to_have_text("Generate")
    expect(page.locator("#generate")).to_be_enabled()
    with page.expect_download() as download:
        page.locator("#archive").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert {f"image_{index:03d}.png" for index in range(count)} | {"contact_sheet.png"} < set(archive.namelist())
        with Image.open(io.BytesIO(archive.read("image_000.png"))) as image:
            assert "generated by AI" in image.text["description"]  # type: ignore[attr-defined]
        return json.loads(archive.read("metadata.json"))


EXAMPLES = {
    "One photo": "red shirt",
    "Two photos": "astronaut suit",
    "Two people": "a crown",
    "Watercolor": ", watercolor",
}


@pytest.mark.parametrize(("label", "size"), [*((label, DESKTOP) for label in EXAMPLES), ("One photo", PHONE)])
def test_an_example_works_at_first_click(
    open_page: Any, pipe: SpiedPipeline, label: str, size: dict[str, int]
) -> None:
    page = open_page(size)
    page.evaluate(WATCH_STATUS)
    assert page.locator(".examples button").count() == len(EXAMPLES)
    page.get_by_role("button", name=label).click()
    expect(page.locator("#generate")).to_be_in_viewport()
    text = finished(page, 2)
    assert any(re.search(r"Picture \d of 2", said) for said in page.evaluate("window.statuses"))  # the progress bar
    assert [entry["seed"] for entry in text] == [0, 1] and EXAMPLES[label] in text[0]["prompt"]
    assert pipe.steps == 2 * len(pipe.calls) == 2 * 2 * 2  # each without the face, too; of two people it is the draft
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing sticks out


def test_upload_and_generate(open_page: Any) -> None:
    page = open_page()
    upload(page, png(portrait(BOB), "bob.png"))
    expect(beside(page, "person_1")).to_have_text("1 photo, with a face.")
    expect(page.locator("#crops_1 img")).to_have_count(1)
    expect(page.locator("#model")).to_contain_text("Draws avatars, 128 × 128 pixels")
    page.locator("#prompt textarea").fill("a person in a suit on a beach")
    page.get_by_label("pencil sketch").check()
    page.locator("#seed input").fill("7")
    set_pictures(page, 1)
    page.locator("#generate").click()
    (text,) = finished(page, 1)
    assert text["prompt"] == "a person in a suit on a beach, pencil sketch" and text["seed"] == 7


def test_messages_stand_beside_their_fields(open_page: Any) -> None:
    page = open_page()
    page.locator("#generate").click()
    expect(beside(page, "person_1")).to_contain_text("add a photo")
    broken = {"mimeType": "image/png", "buffer": b"no picture"}
    upload(page, {"name": "bad <b>.png", **broken}, png(portrait(ADA)), {"name": "worse.png", **broken})
    expect(beside(page, "person_1")).to_contain_text("bad b.png: the image is not a picture")
    expect(beside(page, "person_1")).to_contain_text("worse.png: the image is not a picture")
    if folder := os.environ.get("FACE_FUSION_SCREENSHOTS"):
        for size in (DESKTOP, PHONE):
            page.set_viewport_size(size)
            page.screenshot(path=str(Path(folder) / f"bad_photos_{size['width']}.png"), full_page=True)
        page.set_viewport_size(DESKTOP)
    page.locator("#photos_1").get_by_role("button", name="Clear").click()
    expect(beside(page, "person_1")).to_have_count(0)
    upload(page, png(Image.new("RGB", (64, 64), "white"), "wall.png"))
    expect(beside(page, "person_1")).to_contain_text("wall.png: no face found")
    assert "/" not in beside(page, "person_1").inner_text()  # no path of the server
    page.locator("#photos_1").get_by_role("button", name="Clear").click()
    upload(page, png(portrait(ADA)))
    expect(beside(page, "person_1")).to_contain_text("with a face")
    page.locator("#generate").click()
    expect(beside(page, "prompt")).to_contain_text("not empty")
    expect(page.locator("#cancel")).to_be_hidden()
    page.locator("#prompt textarea").fill("a person")
    page.locator("#seed input").fill("-3")
    page.locator("#generate").click()
    expect(beside(page, "seed")).to_contain_text("-3")
    expect(beside(page, "prompt")).to_have_count(0)


def test_on_a_phone_a_message_far_above_the_button_comes_into_sight(open_page: Any) -> None:
    page = open_page(PHONE)
    unfold_places(page)
    page.locator("#more").scroll_into_view_if_needed()
    expect(page.locator("#photos_1")).not_to_be_in_viewport()
    expect(page.locator("#generate")).to_be_in_viewport()  # wherever one is
    page.locator("#generate").click()
    expect(beside(page, "person_1")).to_be_in_viewport()
    page.wait_for_timeout(1000)  # it scrolls
    message, actions = beside(page, "person_1").bounding_box(), page.locator("#actions").bounding_box()
    assert message["y"] + message["height"] <= actions["y"]  # and not behind the button
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing sticks out


def test_on_a_phone_what_came_out_is_above_the_form(open_page: Any) -> None:
    page = open_page(PHONE)
    expect(page.locator("#generate")).to_be_in_viewport()
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    last, actions = (page.locator(f"#{name}").bounding_box() for name in ("more", "actions"))
    assert last["y"] + last["height"] <= actions["y"]  # nothing of the form is behind the buttons
    tops = [page.locator(f"#{name}").bounding_box()["y"] for name in ("model", "status", "people")]
    assert tops == sorted(tops)
    desktop = open_page()
    left, right = (desktop.locator(f"#{name}").bounding_box()["x"] for name in ("people", "status"))
    assert left < right
    desktop.evaluate("window.scrollTo(0, 500)")  # beside the form, too, the button stays in sight
    expect(desktop.locator("#generate")).to_be_in_viewport(ratio=1)


def test_a_file_above_the_limit_is_refused(open_page: Any) -> None:
    page = open_page()
    noise = Image.effect_noise((2400, 2400), 100).convert("RGB")
    assert len(png(noise)["buffer"]) > 4 * 2**20
    upload(page, png(noise, "noise.png"), png(portrait(ADA)), png(noise, "more.png"))
    message = page.locator(".over-limit")
    expect(message).to_contain_text(re.compile(r"noise\.png: \d.* MB, more\.png: "))
    expect(message).to_contain_text("above the limit of 4.0 MB")
    expect(page.locator("#photos_1 img")).to_have_count(0)
    upload(page, png(portrait(ADA)))
    expect(beside(page, "person_1")).to_contain_text("with a face")
    expect(message).to_have_count(0)


def test_several_people_in_boxes(open_page: Any) -> None:
    page = open_page()
    upload(page, png(portrait(ADA)), person=1)
    upload(page, png(portrait(BOB)), person=2)
    expect(beside(page, "person_2")).to_contain_text("with a face")
    page.locator("#prompt textarea").fill("a photo of two people, a person in a suit and a person in a crown")
    set_pictures(page, 1)
    unfold_places(page)
    drag(page, 0.125, 0.25, 0.375, 0.625)
    expect(page.locator(".places-box")).to_have_count(1)
    page.locator("#generate").click()
    expect(beside(page, "places")).to_contain_text("person 2 has no box")
    drag(page, 0.875, 0.625, 0.625, 0.25)  # from below right
    expect(page.locator(".places-box")).to_have_text(["1", "2"])
    page.locator("#generate").click()
    (text,) = finished(page, 1)
    assert_boxes(text, [16, 32, 48, 80], [80, 32, 112, 80])


def test_faces_of_a_layout_picture_become_boxes(open_page: Any) -> None:
    page = open_page()
    scene = sample_scene(3, [ADA, BOB], expression="neutral", background="plain gray", style="photo", yaw=0)
    upload(page, png(portrait(ADA)), person=1)
    upload(page, png(portrait(BOB)), person=2)
    expect(beside(page, "person_2")).to_contain_text("with a face")
    unfold_places(page)
    upload_layout(page, to_pil(render([scene], 256).images[0]))
    expect(page.locator(".places-box")).to_have_text(["1", "2"])
    expect(beside(page, "places")).to_contain_text("2 faces found")
    page.get_by_role("button", name="Clear boxes").click()
    expect(page.locator(".places-box")).to_have_count(0)
    drag(page, 0.125, 0.25, 0.375, 0.625)
    drag(page, 0.625, 0.25, 0.875, 0.625)
    expect(page.locator(".places-box")).to_have_text(["1", "2"])
    page.locator("#prompt textarea").fill("a photo of two people")
    set_pictures(page, 1)
    page.locator("#generate").click()
    (text,) = finished(page, 1)
    assert_boxes(text, [16, 32, 48, 80], [80, 32, 112, 80])
    assert text["control"] is None  # the picture was for its places only


def test_the_depth_of_a_picture_is_followed(open_page: Any, pipe: SpiedPipeline) -> None:
    page = open_page()
    upload(page, png(portrait(ADA)))
    expect(beside(page, "person_1")).to_contain_text("with a face")
    page.locator("#prompt textarea").fill("a person in a suit")
    set_pictures(page, 1)
    unfold_places(page)
    page.get_by_label("Follow the depth of this picture").check()
    page.locator("#generate").click()
    expect(beside(page, "places")).to_contain_text("add the picture")
    upload_layout(page, Image.linear_gradient("L").resize((256, 128)))
    expect(beside(page, "places")).to_contain_text("0 faces found")
    page.locator("#generate").click()
    (text,) = finished(page, 1)
    assert text["control"] and [call["control_image"].size for call in pipe.calls] == [(256, 128)] * 2
    assert page.locator("#results img").first.evaluate("image => image.naturalWidth / image.naturalHeight") == 2


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_style_of_a_picture_is_taken(open_page: Any, pipe: SpiedPipeline, size: dict[str, int]) -> None:
    page = open_page(size)
    upload(page, png(portrait(ADA)))
    expect(beside(page, "person_1")).to_contain_text("with a face")
    page.locator("#prompt textarea").fill("a person in a suit on a beach")
    set_pictures(page, 1)
    page.get_by_role("button", name="Style from a picture").click()
    for file in ({"name": "bad.png", "mimeType": "image/png", "buffer": b"no"}, png(portrait(BOB, 304), "bob.png")):
        with page.expect_file_chooser() as chooser:
            page.locator("#style_picture").click()
        chooser.value.set_files(file)
        if file["name"] == "bad.png":
            expect(beside(page, "style_picture")).to_contain_text("bad.png")
    expect(page.locator("#style_shown img")).to_have_count(1)
    expect(beside(page, "style_picture")).to_have_count(0)
    field = page.locator("#style_scale input[type=number]")
    field.fill("0.75")
    field.press("Tab")
    page.locator("#generate").click()
    (text,) = finished(page, 1)
    assert text["style_image"] and text["style_scale"] == 0.75 and "bob" not in json.dumps(text)
    assert [call["style_scale"] for call in pipe.calls] == [0.75] * 2  # without the face, too
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing sticks out


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_pose_of_another_photo_is_taken(open_page: Any, pipe: SpiedPipeline, size: dict[str, int]) -> None:
    page = open_page(size)
    upload(page, png(portrait(ADA)))
    expect(beside(page, "person_1")).to_contain_text("with a face")
    page.locator("#prompt textarea").fill("a person in a suit on a beach")
    set_pictures(page, 1)
    page.get_by_role("button", name=re.compile("^Pose")).click()
    wall = png(Image.new("RGB", (64, 64), "white"), "wall.png")
    for file, wrong in ((wall, "wall.png: no face found"), (png(portrait(BOB, 304), "bob.png"), None)):
        with page.expect_file_chooser() as chooser:
            page.locator("#driver").click()
        chooser.value.set_files(file)
        if wrong:
            expect(beside(page, "driver")).to_contain_text(wrong)
    expect(page.locator("#driver_shown img")).to_have_count(1)
    expect(beside(page, "driver")).to_have_count(0)
    expect(page.locator("#yaw")).to_have_count(0)
    page.get_by_label("Turn the head by numbers").check()
    for name, value in (("yaw", "30"), ("pose_strength", "0.75")):
        field = page.locator(f"#{name} input[type=number]")
        field.fill(value)
        field.press("Tab")
    page.get_by_label("Expression", exact=True).click()
    page.get_by_role("option", name="smiling").click()
    page.locator("#generate").click()
    (text,) = finished(page, 1)
    wanted = {"posed": True, "yaw": 30, "pitch": 0, "roll": 0, "expression": "smiling", "control_scale": 0.75}
    assert {name: text[name] for name in wanted} == wanted and "bob" not in json.dumps(text)
    assert [call["driver_image"].shape for call in pipe.calls] == [(72, 2)] * 2  # without the face, too
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing sticks out
    upload(page, png(portrait(BOB)), person=2)
    expect(beside(page, "person_2")).to_contain_text("with a face")
    page.locator("#generate").click()
    expect(beside(page, "driver")).to_contain_text("a pose is for one person, and 2 are given")
    page.get_by_role("button", name="Remove pose photo").click()
    expect(page.locator("#driver_shown img")).to_have_count(0)


def test_the_strength_of_each_person_reaches_the_pipeline(open_page: Any, pipe: SpiedPipeline) -> None:
    page = open_page()
    for person, identity, strength in ((1, ADA, "0.5"), (2, BOB, "1.25")):
        upload(page, png(portrait(identity)), person=person)
        expect(beside(page, f"person_{person}")).to_contain_text("with a face")
        field = page.locator(f"#strength_{person} input[type=number]")
        field.fill(strength)
        field.press("Tab")
    page.locator("#prompt textarea").fill("a photo of two people")
    set_pictures(page, 1)
    page.locator("#generate").click()
    (text,) = finished(page, 1)
    assert [call.get("face_scale") for call in pipe.calls] == [None, [0.5, 1.25]]  # the draft is without faces
    assert text["face_scale"] == "0.5, 1.25"


def test_the_same_example_again_while_it_is_being_made(open_page: Any, pipe: SpiedPipeline) -> None:
    page = open_page()
    set_steps(page, 150)
    page.get_by_role("button", name="One photo").click()
    expect(page.locator("#status")).to_contain_text("Picture 1 of 2")
    set_steps(page, 2)
    set_pictures(page, 1)
    page.evaluate(WATCH_STATUS)
    page.get_by_role("button", name="One photo").click()
    assert [entry["steps"] for entry in finished(page, 1)] == [2]
    assert any("Picture 1 of 1" in said for said in page.evaluate("window.statuses"))  # its progress bar, too
    assert [call["num_inference_steps"] for call in pipe.calls] == [150, 2, 2] and pipe.steps < 150


def test_another_example_while_the_first_waits_for_another_user(open_page: Any, pipe: SpiedPipeline) -> None:
    ada, bob = open_page(), open_page()
    set_steps(ada, 150)
    ada.get_by_role("button", name="One photo").click()
    expect(ada.locator("#status")).to_contain_text("Picture 1 of 2")
    bob.get_by_role("button", name="Two photos").click()
    expect(bob.locator("#cancel")).to_be_visible()
    bob.wait_for_timeout(500)  # it is in the queue
    bob.get_by_role("button", name="Watercolor").click()
    bob.wait_for_timeout(500)
    ada.locator("#cancel").click()
    assert all("watercolor" in entry["prompt"] for entry in finished(bob, 2))
    made = [call["prompt"] for call in pipe.calls]
    assert len(made) == 5 and "red shirt" in made[0] and all("watercolor" in prompt for prompt in made[1:])


def test_nothing_of_a_page_is_left_when_it_is_closed(open_page: Any) -> None:
    page, uploads = open_page(), Path(os.environ["GRADIO_TEMP_DIR"])
    page.get_by_role("button", name="One photo").click()
    finished(page, 2)
    with page.expect_download():
        page.locator("#save_1").click()

    def results() -> list[Path]:
        names = ("image_*.png", "contact_sheet.png", "*.zip", "*.safetensors")
        # os.walk passes over folders that the app deletes meanwhile; rglob raises.
        files = [Path(folder) / file for folder, _, files in os.walk(uploads) for file in files]
        return [file for file in files if any(file.match(name) for name in names)]

    assert len(results()) >= 5 and all(path.relative_to(uploads).parts[0].startswith("user_") for path in results())
    page.close()
    patience = time.monotonic() + PATIENCE / 1000
    while (left := results() + list(uploads.glob("user_*"))) and time.monotonic() < patience:
        time.sleep(0.2)
    assert left == []


def test_a_value_that_is_refused_leaves_the_form_usable(open_page: Any) -> None:
    page = open_page()
    page.route("**/queue/join*", lambda route: route.continue_(
        post_data=route.request.post_data.replace('"the only one"', '"nobody"')))  # fmt: skip
    page.get_by_role("button", name="One photo").click()
    expect(beside(page, "result")).to_contain_text("refused")
    expect(page.locator("#cancel")).to_be_hidden()
    page.unroute("**/queue/join*")
    page.locator("#generate").click()
    finished(page, 2)


def test_cancel_keeps_what_there_is(open_page: Any, pipe: SpiedPipeline) -> None:
    page = open_page()
    set_steps(page, 150)
    page.get_by_role("button", name="One photo").click()
    expect(page.locator("#status")).to_contain_text("Picture 1 of 2")
    page.locator("#cancel").click()
    expect(page.locator("#status")).to_contain_text("Cancelled")
    expect(page.locator("#generate")).to_be_enabled()
    assert len(pipe.calls) == 1
    set_steps(page, 2)
    page.locator("#generate").click()
    assert len(finished(page, 2)) == 2  # the pipeline is free again
    assert len(pipe.calls) == 5 and pipe.steps < 150  # it stopped in the middle of the first picture


def test_two_users_at_once(open_page: Any) -> None:
    ada, bob = open_page(), open_page()
    ada.get_by_role("button", name="One photo").click()
    bob.get_by_role("button", name="Watercolor").click()
    for page, words in ((ada, "red shirt"), (bob, "watercolor")):
        assert all(words in entry["prompt"] for entry in finished(page, 2))
    assert ada.locator("#prompt textarea").input_value() != bob.locator("#prompt textarea").input_value()


def test_identity_file_saved_and_loaded(open_page: Any, tmp_path: Path) -> None:
    page = open_page()
    upload(page, png(portrait(ADA)), png(portrait(ADA, 224), "again.png"))
    expect(beside(page, "person_1")).to_have_text("2 photos, each with a face.")
    with page.expect_download() as download:
        page.locator("#save_1").click()
    file = tmp_path / "ada.safetensors"
    download.value.save_as(file)

    other = open_page()
    with other.expect_file_chooser() as chooser:
        other.get_by_role("button", name="Load identity file").first.click()
    chooser.value.set_files(file)
    expect(beside(other, "person_1")).to_contain_text("identity of 2 photos")
    other.locator("#prompt textarea").fill("a person in a green shirt")
    set_pictures(other, 1)
    other.locator("#generate").click()
    assert finished(other, 1)[0]["face_mode"] == "both"
