"""What the widgets of one person do, and the examples that fill in the form."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from PIL import Image

from ..face_errors import FaceFusionError
from .avatar_examples import Example
from .engine import CancelledError
from .form import ONLY_FACE, FieldError
from .handlers import Handlers
from .page import PersonWidgets
from .picture_handlers import Updates, message
from .places import data_url


CROP = 96  # pixels of a face crop on the page


@dataclass(frozen=True, repr=False)
class PersonHandlers:
    """The event handlers of person `number`, 1 to 3."""

    page: Handlers
    number: int

    @property
    def widgets(self) -> PersonWidgets:
        return self.page.widgets.people[self.number - 1]

    @property
    def beside(self) -> gr.HTML:
        """The message beside the photos."""
        return self.page.widgets.messages[f"person_{self.number}"]

    def check_photos(self, values: Updates, request: gr.Request) -> Updates:
        """Say at once what is wrong with a photo; photos take the place of a loaded identity."""
        session = self.page.sessions.get(request.session_hash)
        person = self.page.read_person(values, self.number, session)
        if person.identity is not None:
            return gr.skip()
        words, kind, crops = "", "note", []
        if person.photos:
            self._forget(request)
            try:
                person.check()
                crops = self.page.engine.crops(person)
                words = f"{count(len(crops), 'photo')}, {'each ' * (len(crops) > 1)}with a face."
            except FieldError as error:
                words, kind = str(error), "error"
        shown = {self.beside: message(words, kind), self.widgets.crops: shown_crops(crops)}
        return {**shown, self.widgets.forget: gr.Button(visible=False)}

    def clear_message(self, values: Updates, request: gr.Request) -> Updates:
        """When the last photo goes, so does what was said about it."""
        person = self.page.read_person(values, self.number, self.page.sessions.get(request.session_hash))
        if person.photos:
            return gr.skip()
        hidden = {self.widgets.crops: shown_crops([])}
        return hidden if person.is_given else {self.beside: message(""), **hidden}

    def load_identity(self, file: str, request: gr.Request) -> Updates:
        """An identity file in place of photos."""
        name = Path(file).name
        try:
            identity = self.page.engine.load_identity(Path(file))
            self.page.sessions.of(request.session_hash).identities[self.number] = identity
        except FaceFusionError as error:  # an identity that was loaded before is not what was asked for now
            self._forget(request)
            return {self.beside: message(f"{name}: {error}"), self.widgets.forget: gr.Button(visible=False)}
        words = f"{name}: the identity of {count(identity.n_refs, 'photo')} is used."
        shown = {self.widgets.photos: None, self.widgets.forget: gr.Button(visible=True)}
        return {self.beside: message(words, "note"), **shown}

    def forget_identity(self, request: gr.Request) -> Updates:
        """Back to photos."""
        self._forget(request)
        return {self.beside: message(""), self.widgets.forget: gr.Button(visible=False)}

    def _forget(self, request: gr.Request) -> None:
        if session := self.page.sessions.get(request.session_hash):
            session.identities.pop(self.number, None)

    def save_identity(self, values: Updates, request: gr.Request) -> Updates:
        """The identity as a file, behind the hidden button that downloads it."""
        try:
            session = self.page.sessions.of_open(request.session_hash)
            person = self.page.read_person(values, self.number, session)
            if not person.is_given:
                raise FieldError(person.field, "add a photo of the person first")
            if session is None:  # the page was closed while this waited for its turn, or the connection broke
                raise FieldError(person.field, "the connection was lost: reload the page")
            person.check()
            identity = self.page.engine.identity(person)[1]
            with session.folder.writing() as folder:
                file = folder / f"person_{self.number}.safetensors"
                identity.save(file)
        except CancelledError:  # the page was closed just now
            return gr.skip()
        except FaceFusionError as error:
            return {self.beside: message(str(error)), self.widgets.saved: None}
        return {self.beside: message("The identity file is in your downloads.", "note"), self.widgets.saved: str(file)}


@dataclass(frozen=True, repr=False)
class ExampleHandler:
    """Fills in the form as an example says."""

    page: Handlers
    example: Example

    def fill(self, request: gr.Request) -> Updates:
        """Photos, prompt and style of the example; other people, boxes, identities, style picture and pose go."""
        w, example = self.page.widgets, self.example
        if session := self.page.sessions.get(request.session_hash):
            session.identities.clear()
        updates: Updates = {w.prompt: example.prompt, w.style: example.style, w.tabs: gr.Tabs(selected=1)}
        updates |= self.page.remove_layout(request) | self.page.remove_style(request) | self.page.remove_pose(request)
        for number, person in enumerate(w.people):
            photos = example.people[number] if number < len(example.people) else ()
            updates |= {person.photos: [str(photo) for photo in photos] or None, person.which: ONLY_FACE}
            updates |= {person.strength: 1.0, person.forget: gr.Button(visible=False), person.crops: shown_crops([])}
        return updates


def shown_crops(crops: Sequence[Image.Image]) -> gr.HTML:
    """The update of the row of face crops; none hides it."""
    pictures = "".join(f'<img src="{data_url(crop, CROP)}" alt="face crop {i}">' for i, crop in enumerate(crops, 1))
    return gr.HTML(f"<p>What the model sees:</p>{pictures}" if crops else "", visible=bool(crops))


def count(number: int, what: str) -> str:
    """`1 photo`, `2 photos`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
