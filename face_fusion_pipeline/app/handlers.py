"""What the widgets do. Every handler gets the session of its own page and nobody else's."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ..face_errors import FaceFusionError
from ..face_familiarity import UNFAMILIAR, is_unfamiliar
from ..generation.prompt_words import unknown_words_line
from .engine import CancelledError
from .form import AS_IN_PHOTO, ONLY_FACE, FieldError, Form, PersonForm, PoseForm, whole_number
from .picture_handlers import PictureHandlers, Updates, message
from .places import drawn_boxes
from .results import save_archive, save_picture, save_sheet
from .session import Run, Session


logger = logging.getLogger(__name__)

UNEXPECTED = "an unexpected error, which this machine has logged: try again, or reload the page"
UNFAMILIAR_HERE = f"{UNFAMILIAR[0].upper()}{UNFAMILIAR[1:]}; “How faces join”, under “More”, decides otherwise."
REFUSED = "a value was refused: choose it again, or reload the page"


@dataclass(frozen=True, repr=False)
class Handlers(PictureHandlers):
    """The event handlers of one page of widgets.

    Gradio calls the generating ones one after another for all users: the pipeline serves one call at a time.
    """

    # --- The form --------------------------------------------------------------------------------------------------

    def form_inputs(self) -> set[Any]:
        """All widgets that [`read_form`] reads."""
        w = self.widgets
        fields = {w.run_id, w.prompt, w.style, w.seed, w.count, w.canvas, w.follow_depth}
        fields |= {
            w.style_scale,
            w.negative_prompt,
            w.steps,
            w.guidance,
            w.low_noise_guidance,
            w.compare,
            w.refine,
            w.mode,
            w.by_numbers,
            *w.turns,
            w.expression,
            w.pose_strength,
        }
        return fields.union(*({p.photos, p.strength, p.which} for p in w.people))

    def read_person(self, values: Updates, number: int, session: Session | None) -> PersonForm:
        """One person as the widgets say."""
        person = self.widgets.people[number - 1]
        photos = tuple(Path(file) for file, _ in values[person.photos] or [])
        identity = None if photos or session is None else session.identities.get(number)
        return PersonForm(
            number, photos, identity, values.get(person.which, ONLY_FACE), values.get(person.strength, 1.0)
        )

    def read_pose(self, values: Updates, session: Session) -> PoseForm:
        """The pose as the widgets say."""
        w, expression = self.widgets, values[self.widgets.expression]
        yaw, pitch, roll = (values[turn] for turn in w.turns)
        return PoseForm(
            session.driver,
            (yaw, pitch, roll) if values[w.by_numbers] else None,
            None if expression == AS_IN_PHOTO else expression,
            values[w.pose_strength],
        )

    def read_form(self, values: Updates, session: Session) -> Form:
        """The form as the widgets say, checked. Raises [`FieldError`]."""
        w = self.widgets
        if values[w.follow_depth] and session.layout is None:
            raise FieldError("places", "add the picture whose depth is to be followed, or clear “Follow the depth”")
        boxes = drawn_boxes(values[w.canvas])
        people = [self.read_person(values, number, session) for number in range(1, len(w.people) + 1)]
        form = Form(
            people=tuple(person for person in people if person.is_given),
            prompt=values[w.prompt] or "",
            style=values[w.style],
            negative_prompt=(values[w.negative_prompt] or "").strip(),
            seed=whole_number("seed", values[w.seed]),
            count=whole_number("count", values[w.count]),
            steps=whole_number("steps", values[w.steps]),
            guidance=values[w.guidance],
            low_noise_guidance=values[w.low_noise_guidance],
            compare=values[w.compare],
            refine=values[w.refine],
            mode=values[w.mode],
            boxes=boxes,
            style_picture=session.style,
            style_scale=values[w.style_scale],
            pose=self.read_pose(values, session),
            control=session.layout if values[w.follow_depth] else None,
            layout_size=session.layout.size if session.layout is not None and boxes else None,
        )
        form.check()
        return form

    # --- Generating ------------------------------------------------------------------------------------------------

    def start(self, values: Updates, request: gr.Request) -> Updates:
        """At once, whoever else is being served: messages and old results go, the Cancel button comes.

        A form that is wrong changes nothing but the messages: what was made before stays.
        """
        w, known = self.widgets, self.sessions.get(request.session_hash)
        kept = {f"person_{number}" for number in known.identities} if known else ()  # the words that one is loaded
        cleared = {beside: message("") for name, beside in w.messages.items() if name not in kept}
        try:
            session = self.sessions.of(request.session_hash)
            form = self.read_form(values, session)
        except FieldError as error:
            return {**cleared, w.run_id: "", **self.show_error(error)}
        words = unknown_words_line(form.full_prompt, self.engine.defaults.vocabulary)
        cleared[w.messages["prompt"]] = message(words[:1].upper() + words[1:] + "." if words else "", "note")
        run = session.new_run()
        empty = {w.results: None, w.sheet: None, w.metadata: None, w.downloads: gr.Column(visible=False)}
        status = {w.status: "<p role='status'>Waiting …</p>", w.run_id: run.id}
        return {**cleared, **empty, **self._buttons(running=True), **status}

    def run(self, values: Updates, request: gr.Request, progress: gr.Progress = gr.Progress()) -> Iterator[Updates]:  # noqa: B008  Gradio finds it by its default
        """Generate the pictures of the run that `start` began; none if another took its place meanwhile."""
        yield gr.skip()  # Gradio empties all widgets after a generator that yields nothing
        session, run = self.sessions.get(request.session_hash), self._run_of(values, request)
        if session is None or run is None or not run.begin():
            return
        words, problem = "Done.", {}
        try:
            yield from self._pictures(values, session, run, progress)
        except CancelledError:
            return  # `cancel` has shown what there is
        except FaceFusionError as error:
            words, problem = "", self.show_error(error)
        except Exception:
            logger.exception("unexpected error")
            words, problem = "", {self.widgets.messages["result"]: message(UNEXPECTED)}
        if not run.cancelled.is_set():
            with suppress(CancelledError):  # cancelled just now
                yield {**problem, **self.finish(run, words)}

    def _pictures(self, values: Updates, session: Session, run: Run, progress: gr.Progress) -> Iterator[Updates]:
        """Picture after picture, each shown as soon as it is there."""
        w, form = self.widgets, self.read_form(values, session)
        progress(0, desc="Looking at the photos")
        crops, bad = [], []
        for person in form.people:
            try:
                crops.append(self.engine.crops(person))
            except FieldError as error:
                bad.append(error)
                continue
            run.references |= {f"person {person.number}" if len(form.people) > 1 else "reference": crops[-1]}
        if bad:
            raise FieldError(bad[0].field, bad[0], bad[1:])
        identities = self.engine.identities(form.people, crops, form.face_mode)
        notes = {
            w.messages[person.field]: message(UNFAMILIAR_HERE, "note")
            for person, identity in zip(form.people, identities, strict=True)
            if is_unfamiliar(identity)
        }
        if notes:
            yield notes
        step = lambda part, words: progress(part, desc=words)  # noqa: E731
        for picture in self.engine.run(form, identities, step, run.cancelled.is_set):
            run.add(picture, partial(save_picture, watermark=self.engine.watermark))
            files = [file for _, file in run.results]
            self._keep(*files)
            yield {w.results: files, w.status: f"<p>{len(files)} of {form.count} …</p>"}

    def failed(self, values: Updates, request: gr.Request) -> Updates:
        """Gradio refused a value before `run` saw it: the form can be used again.

        Gradio calls this after Cancel, too, and then perhaps in the name of the next run.
        """
        session, w = self.sessions.get(request.session_hash), self.widgets
        run = session.failed_run(values[w.run_id]) if session is not None else None
        if run is None or run.begun:
            return gr.skip()
        run.cancelled.set()
        return {**self._buttons(running=False), w.status: "", w.messages["result"]: message(REFUSED)}

    def cancel(self, request: gr.Request) -> Updates:
        """Stop at the next step; the pictures so far stay."""
        session = self.sessions.get(request.session_hash)
        run = session.cancel() if session is not None else None
        if run is None:
            return self._buttons(running=False)
        try:
            shown = self.finish(run, f"Cancelled; {len(run.results)} finished.")
        except CancelledError:  # the next run has begun
            return gr.skip()
        return {self.widgets.messages["result"]: message(""), **shown}

    def finish(self, run: Run, words: str) -> Updates:
        """Contact sheet, ZIP file and metadata of the pictures that there are.

        Raises [`CancelledError`]: the files were removed, by the next run or because the page was closed.
        """
        w = self.widgets
        updates: Updates = {**self._buttons(running=False), w.status: f"<p role='status'>{words}</p>" if words else ""}
        with run.folder.writing() as folder:
            pictures, files = [picture for picture, _ in run.results], [file for _, file in run.results]
            sheet = save_sheet(pictures, run.references, folder, self.engine.watermark)
            if sheet is None:
                return updates
            archive = save_archive([*files, sheet], pictures, folder)
            self._keep(sheet, archive)
        if any(picture.hidden for picture in pictures):
            note = "the model's safety checker blacked out a picture: try another prompt or seed"
            updates[w.messages["result"]] = message(note, "note")
        return {
            **updates,
            w.sheet: str(sheet),
            w.archive: str(archive),
            w.sheet_file: str(sheet),
            w.downloads: gr.Column(visible=True),
            w.metadata: [{key: value for key, value in p.text.items() if value is not None} for p in pictures],
        }

    def _keep(self, *files: Path) -> None:
        """Results go with their session, not after an hour as uploads do."""
        self.widgets.results.keep_in_cache.update(map(str, files))

    def _run_of(self, values: Updates, request: gr.Request) -> Run | None:
        """The run that an event of the page is about, or None: another took its place, or the page was closed."""
        session = self.sessions.get(request.session_hash)
        run = session.run if session is not None else None
        return run if run is not None and run.id == values[self.widgets.run_id] else None

    def _buttons(self, running: bool) -> Updates:
        w = self.widgets
        return {w.generate: gr.Button(interactive=not running), w.cancel: gr.Button(visible=running)}
