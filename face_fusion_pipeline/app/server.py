"""The app as a local web server: page and handlers connected, nothing fetched from or sent to anywhere else."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from gradio.blocks import Block
from starlette.middleware import Middleware

from ..face_errors import FaceFusionError
from .avatar_examples import Example, draw_examples
from .engine import Engine
from .guard import Guard
from .handlers import Handlers
from .page import THEME, build_page
from .person_handlers import ExampleHandler, PersonHandlers
from .sections import STATIC
from .session import Sessions


HOUR = 3600  # seconds
OFTEN = 60  # seconds between two looks for pages that were left
WAITING = 100  # events of all pages in the queue
QUOTA = 10  # of the largest file's size: what the files of all users may take together
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "unet"}
# a button cannot download what its own click has yet to make: a hidden one is clicked when the file is there
CLICK_SAVED = "() => { document.querySelector('#saved_%d').click(); }"
# on a phone the results are above the form
SHOW_STATUS = "() => { document.querySelector('#status').scrollIntoView({behavior: 'smooth', block: 'nearest'}); }"
# And a message may be far above the button. A tab or section that was opened for it takes a moment to unfold. It goes
# to the middle: the page may still be on its way to the status, and a message that it passes would not stop it.
SHOW_ERROR = """() => setTimeout(() => {
    document.querySelector("[id^=message_] .error")?.scrollIntoView({behavior: "smooth", block: "center"});
}, 200)"""
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build_app(engine: Engine, sessions: Sessions, steps: int = 25) -> gr.Blocks:
    """The page with everything connected; draws the examples."""
    examples = draw_examples(sessions.examples)
    width, height = engine.size()
    blocks = gr.Blocks(title="Face Fusion", analytics_enabled=False, delete_cache=(HOUR, HOUR))
    with blocks:
        can = (engine.has_control, engine.has_style, engine.expressions)
        widgets = build_page(examples, width / height, steps, engine.defaults, *can, engine.described)
        connect(Handlers(engine, sessions, widgets), examples)

        blocks.queue(max_size=WAITING)

        def close_page(request: gr.Request) -> None:
            sessions.drop(request.session_hash)

        blocks.unload(close_page)
    return blocks


def connect(handlers: Handlers, examples: list[Example]) -> None:
    """Connect the widgets with their handlers, inside `gr.Blocks()`."""
    w = handlers.widgets
    messages = list(w.messages.values())
    shown = [
        w.results,
        w.sheet,
        w.archive,
        w.sheet_file,
        w.metadata,
        w.downloads,
        w.status,
        w.run_id,
        w.generate,
        w.cancel,
        *messages,
    ]
    sections = [w.tabs, w.style_section, w.pose_section, w.places_section, w.more_section]

    def generate_after(listener: Callable[..., Any]) -> Any:
        """`start` at once and `run` in the queue; returns the latter, for the Cancel button."""
        start = listener(
            handlers.start,
            inputs=handlers.form_inputs(),
            outputs=[*shown, *sections],
            queue=False,
            **HIDDEN,
        )
        start.then(None, js=SHOW_STATUS)
        run = start.then(
            handlers.run,
            inputs=handlers.form_inputs(),
            outputs=[*shown, *sections],
            show_progress_on=w.status,
            api_visibility="private",
            trigger_mode="multiple",  # also while the run before waits or stops: only the last one is made
            **ONE_AT_A_TIME,
        )
        run.failure(handlers.failed, {w.run_id}, shown, queue=False, **HIDDEN)
        run.then(None, js=SHOW_ERROR)
        return run

    runs = [generate_after(w.generate.click)]
    filled = [w.prompt, w.style, w.tabs, w.canvas, w.remove_layout, w.follow_depth, w.messages["places"]]
    style = [w.style_shown, w.messages["style_picture"], w.remove_style]
    driver = [w.driver_shown, w.messages["driver"], w.remove_driver]
    filled += [*style, *driver, w.by_numbers, w.expression]
    filled += [widget for p in w.people for widget in (p.photos, p.which, p.strength, p.forget, p.crops)]
    for example, button in zip(examples, w.examples, strict=True):
        fill = button.click(ExampleHandler(handlers, example).fill, outputs=filled, queue=False, **HIDDEN)
        runs.append(generate_after(fill.then))
    w.cancel.click(handlers.cancel, outputs=shown, cancels=runs, queue=False, **HIDDEN)

    w.dice.click(None, outputs=w.seed, js="() => Math.floor(Math.random() * 2 ** 31)")
    _connect_pictures(handlers, style, driver)
    for number in range(1, len(w.people) + 1):
        _connect_person(PersonHandlers(handlers, number))


def _connect_pictures(handlers: Handlers, style: list[Any], driver: list[Any]) -> None:
    """The pictures that new ones follow; `style` and `driver` are what is shown of one."""
    w = handlers.widgets
    places = [w.canvas, w.messages["places"], w.remove_layout, w.places_section]
    w.layout.upload(handlers.show_layout, w.layout, places, api_visibility="private", show_progress_on=w.canvas)
    w.remove_layout.click(handlers.remove_layout, outputs=[*places, w.follow_depth], **HIDDEN)
    w.style_picture.upload(handlers.show_style, w.style_picture, [*style, w.style_section], **HIDDEN)
    w.remove_style.click(handlers.remove_style, outputs=style, **HIDDEN)
    w.driver.upload(handlers.show_driver, w.driver, [*driver, w.pose_section], **HIDDEN)
    w.remove_driver.click(handlers.remove_driver, outputs=driver, **HIDDEN)
    w.by_numbers.change(handlers.show_turns, w.by_numbers, w.turns_shown, queue=False, **HIDDEN)


def _connect_person(handlers: PersonHandlers) -> None:
    w, beside = handlers.widgets, handlers.beside
    fields: set[Block] = {w.photos, w.strength, w.which}
    changes = [w.photos.upload, w.photos.delete, w.which.input]
    gr.on(changes, handlers.check_photos, fields, [beside, w.crops, w.forget], **HIDDEN)
    w.photos.change(handlers.clear_message, fields, [beside, w.crops], **HIDDEN)
    w.load.upload(handlers.load_identity, w.load, [beside, w.photos, w.forget], **HIDDEN)
    w.forget.click(handlers.forget_identity, outputs=[beside, w.forget], **HIDDEN)
    saved = w.save.click(handlers.save_identity, fields, [beside, w.saved], **HIDDEN, **ONE_AT_A_TIME)
    saved.then(None, js=CLICK_SAVED % handlers.number)


@contextmanager
def uploads_in(folder: Any) -> Iterator[None]:
    """Gradio keeps uploads in `folder`, and asks nobody for a newer version."""
    wanted = {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def expiring(sessions: Sessions) -> Iterator[None]:
    """Sessions of pages that were left end, now and then."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(OFTEN):
            sessions.expire()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def serving(
    engine: Engine, host: str = "127.0.0.1", port: int = 7860, steps: int = 25, max_upload_mb: float = 400
) -> Iterator[str]:
    """Serve the app in the background and give its address; at the end nothing of any user is left.

    Args:
        port: 0 takes any free one.
        steps: denoising steps that the page begins with.
        max_upload_mb: largest file that a user may upload; the files of all users may take ten times as much.

    Raises:
        FaceFusionError: the port is taken, or the page cannot be reached from here.
    """
    sessions, limit = Sessions(), int(max_upload_mb * 2**20)
    guard = Middleware(Guard, sessions=sessions, host=host, quota=QUOTA * limit)
    with uploads_in(sessions.uploads), expiring(sessions):
        try:
            blocks = build_app(engine, sessions, steps)
            try:
                _, address, _ = blocks.launch(
                    server_name=host,
                    server_port=port or None,
                    max_file_size=limit,
                    app_kwargs={"middleware": [guard]},
                    prevent_thread_lock=True,
                    share=False,
                    quiet=True,
                    ssr_mode=False,
                    enable_monitoring=False,
                    run_history=False,
                    footer_links=[],
                    theme=THEME,
                    css_paths=STATIC / "app.css",
                    head=f"<script>const LIMIT = {limit};\n{(STATIC / 'upload_limit.js').read_text()}</script>",
                )
            except OSError as error:
                raise FaceFusionError(f"cannot listen on {host}:{port}: {error}; take another --port") from error
            except ValueError as error:  # Gradio has asked its own page, and waited for some seconds
                blocks.close(verbose=False)
                words = "this machine does not reach its own page: it is too busy now, or a proxy is in the way"
                raise FaceFusionError(f"{words} (set NO_PROXY=127.0.0.1,localhost)") from error
            try:
                yield address
            finally:
                blocks.close(verbose=False)
        finally:
            sessions.close()
