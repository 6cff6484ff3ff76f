"""What the widgets of pictures do that are followed: of a style, of a pose, of places; and messages beside fields."""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..face_errors import FaceFusionError
from .engine import Engine
from .form import AS_IN_PHOTO, FieldError
from .page import Widgets
from .places import boxes_of_people, canvas_value, data_url, read_picture
from .session import Sessions


Updates = dict[Any, Any]

THUMBNAIL = 160  # pixels of a picture on the page


def message(text: str, kind: str = "error") -> Any:
    """The update of a message beside a field; an empty text hides it. Whatever a user wrote stays text."""
    role = "alert" if kind == "error" else "status"
    lines = "<br>".join(html.escape(line) for line in text.split("\n"))
    return gr.HTML(f'<p class="{kind}" role="{role}">{lines}</p>' if text else "", visible=bool(text))


def shown_picture(place: Any, remove: Any, picture: Image.Image, words: str) -> Updates:
    """A picture, small, described by `words`, in its place beside the button that takes it away."""
    image = f'<img src="{data_url(picture, THUMBNAIL)}" alt="{words}">'
    return {place: gr.HTML(image, visible=True), remove: gr.Button(visible=True)}


def no_picture(place: Any, remove: Any) -> Updates:
    """The opposite of [`shown_picture`]."""
    return {place: gr.HTML("", visible=False), remove: gr.Button(visible=False)}


@dataclass(frozen=True, repr=False)
class PictureHandlers:
    """The event handlers of the pictures that new ones follow, and how an error is shown beside its field."""

    engine: Engine
    sessions: Sessions
    widgets: Widgets

    def show_error(self, error: FaceFusionError) -> Updates:
        """The message beside each field that the error is about, with the first of them in sight."""
        updates: Updates = {}
        for other in reversed(error.also if isinstance(error, FieldError) else ()):
            updates |= self.show_error(other)
        w, name = self.widgets, error.field if isinstance(error, FieldError) else "result"
        updates[w.messages.get(name, w.messages["result"])] = message(str(error))
        if name.startswith("person_"):
            updates[w.tabs] = gr.Tabs(selected=int(name.removeprefix("person_")))
        elif (section := w.section_of(name)) is not None:
            updates[section] = gr.Accordion(open=True)
        return updates

    def show_style(self, file: str, request: gr.Request) -> Updates:
        """A style picture, small, beside its button; one that was there before is not what was asked for now."""
        w, updates = self.widgets, self.remove_style(request)
        try:
            picture = read_picture(file, "style_picture")
            self.sessions.of(request.session_hash).style = picture
        except FieldError as error:
            return {**updates, **self.show_error(error)}
        return {**updates, **shown_picture(w.style_shown, w.remove_style, picture, "style picture")}

    def remove_style(self, request: gr.Request) -> Updates:
        """The style of the prompt alone again."""
        w = self.widgets
        if session := self.sessions.get(request.session_hash):
            session.style = None
        return {**no_picture(w.style_shown, w.remove_style), w.messages["style_picture"]: message("")}

    def show_driver(self, file: str, request: gr.Request) -> Updates:
        """The face whose pose is taken, with its points; one that was there before is not what was asked for now."""
        w, updates = self.widgets, self.remove_driver(request)
        try:
            picture = read_picture(file, "driver")
            fit = self.engine.fit_driver(picture, Path(file).name)
            self.sessions.of(request.session_hash).driver = fit
        except FieldError as error:
            return {**updates, **self.show_error(error)}
        face, words = self.engine.with_points(picture, fit), "face whose pose is taken, with its points"
        return {**updates, **shown_picture(w.driver_shown, w.remove_driver, face, words)}

    def remove_driver(self, request: gr.Request) -> Updates:
        """No pose of another photo."""
        w = self.widgets
        if session := self.sessions.get(request.session_hash):
            session.driver = None
        return {**no_picture(w.driver_shown, w.remove_driver), w.messages["driver"]: message("")}

    def remove_pose(self, request: gr.Request) -> Updates:
        """No pose at all."""
        return {**self.remove_driver(request), self.widgets.by_numbers: False, self.widgets.expression: AS_IN_PHOTO}

    def show_turns(self, by_numbers: bool) -> Any:
        """The numbers of a pose, where they are used."""
        return gr.Column(visible=by_numbers)

    def show_layout(self, file: str, request: gr.Request) -> Updates:
        """A layout picture behind the boxes, with the faces found in it as boxes."""
        w = self.widgets
        try:
            picture = read_picture(file)
            self.sessions.of(request.session_hash).layout = picture
        except FieldError as error:
            return self.show_error(error)
        boxes = boxes_of_people(self.engine.find_boxes(picture), picture.size)
        words = f"{len(boxes)} face{'s' * (len(boxes) != 1)} found; draw over them to change a place."
        return {
            w.canvas: canvas_value(picture, boxes),
            w.messages["places"]: message(words, "note"),
            w.remove_layout: gr.Button(visible=True),
        }

    def remove_layout(self, request: gr.Request) -> Updates:
        """An empty area again."""
        w, (width, height) = self.widgets, self.engine.size()
        if session := self.sessions.get(request.session_hash):
            session.layout = None
        empty = {w.canvas: canvas_value(ratio=width / height), w.messages["places"]: message("")}
        return {**empty, w.remove_layout: gr.Button(visible=False), w.follow_depth: False}
