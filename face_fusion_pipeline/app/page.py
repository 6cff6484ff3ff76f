"""The page: all widgets and where they are, without what they do."""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ..face_defaults import FaceDefaults
from ..generation.arguments import MAX_PROMPT, guidance_scales
from ..generation.prompt_words import Vocabulary, groups_of_words
from .avatar_examples import Example
from .form import (
    AS_WRITTEN,
    MAX_PEOPLE,
    MAX_PICTURES,
    MAX_STEPS,
    MODES,
    MORE_STYLES,
    ONLY_FACE,
    RECOMMENDED,
    STYLES,
    WHICH_FACE,
)
from .places import canvas_value


STATIC = Path(__file__).parent / "static"
IMAGES = ["image"]

INTRO = """<h1>Face Fusion</h1>
<p>New pictures of the same person, from one photo or several and a prompt. Photos stay on the machine that
runs this page, in a folder that is removed. Use photos of people who agreed to it, and say that the pictures are
generated.</p>"""

WELCOME = "<p>Add a photo and a prompt, or take an example on this page.</p>"

PERSON_CHIPS = "".join(
    f'<button type="button" class="places-person-{number}" data-person>Person {number}</button>'
    for number in range(1, MAX_PEOPLE + 1)
)
CANVAS = f"""<div class="places-chips" role="group" aria-label="whose box is drawn">{PERSON_CHIPS}
<button type="button" data-clear>Clear boxes</button></div><div class="places-area"></div>"""

# System fonts: nothing is fetched from elsewhere.
THEME = gr.themes.Default(
    primary_hue="blue",
    font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
    font_mono=("ui-monospace", "monospace"),
).set(body_text_color_subdued="*neutral_600")


@dataclass(frozen=True, repr=False)
class PersonWidgets:
    """Widgets of one person. `saved` is the hidden button whose click downloads the identity file."""

    photos: gr.Gallery
    strength: gr.Slider
    which: gr.Dropdown
    crops: gr.HTML
    load: gr.UploadButton
    save: gr.Button
    saved: gr.DownloadButton
    forget: gr.Button


@dataclass(frozen=True, repr=False)
class Widgets:
    """All widgets that events read or change.

    `messages` are by the names of fields, see `form.FieldError`. `run_id` is hidden: the run that the page last began.
    """

    tabs: gr.Tabs
    people: list[PersonWidgets]
    prompt: gr.Textbox
    style: gr.Radio
    seed: gr.Number
    dice: gr.Button
    count: gr.Slider
    layout: gr.UploadButton
    remove_layout: gr.Button
    follow_depth: gr.Checkbox
    canvas: gr.HTML
    negative_prompt: gr.Textbox
    steps: gr.Slider
    guidance: gr.Slider
    low_noise_guidance: gr.Checkbox
    mode: gr.Dropdown
    compare: gr.Checkbox
    refine: gr.Checkbox
    places_section: gr.Accordion
    more_section: gr.Accordion
    generate: gr.Button
    cancel: gr.Button
    run_id: gr.Textbox
    status: gr.HTML
    results: gr.Gallery
    downloads: gr.Column
    sheet: gr.Image
    archive: gr.DownloadButton
    sheet_file: gr.DownloadButton
    metadata: gr.JSON
    examples: list[gr.Button]
    messages: dict[str, gr.HTML]


def build_page(
    examples: list[Example], ratio: float, steps: int, defaults: FaceDefaults, has_control: bool, described: str = ""
) -> Widgets:
    """Lay out all widgets; call it inside `gr.Blocks()`.

    Args:
        ratio: width / height of the pictures.
        steps: denoising steps at the beginning.
        defaults: what the model recommends, and the words that it knows, if they are few.
        has_control: whether the model can follow the depth of a picture.
        described: what draws the pictures.
    """
    widgets: dict[str, Any] = {}
    messages: dict[str, gr.HTML] = {}
    model = f'<p id="model">{html.escape(described)}</p>'
    gr.HTML(INTRO + model, elem_classes="intro", apply_default_css=False)
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            gr.HTML("<h2>Examples, with avatars</h2>", apply_default_css=False, elem_classes="heading")
            with gr.Row(elem_classes="examples"):
                widgets["examples"] = [_example(example) for example in examples]
            with gr.Tabs(elem_id="people") as widgets["tabs"]:
                widgets["people"] = [_person(number, messages) for number in range(1, MAX_PEOPLE + 1)]
            _prompt(widgets, messages, defaults.vocabulary)
            _places(widgets, messages, ratio, has_control)
            _more(widgets, messages, steps, defaults)
        with gr.Column(min_width=320, elem_id="outcome"):
            with gr.Row(elem_id="actions"):
                widgets["generate"] = gr.Button("Generate", variant="primary", elem_id="generate")
                widgets["cancel"] = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel")
            widgets["run_id"] = gr.Textbox(visible="hidden")
            messages["result"] = _message("result")
            widgets["status"] = gr.HTML(WELCOME, elem_id="status", elem_classes="status", min_height=48)
            _results(widgets)
    return Widgets(messages=messages, **widgets)


def _example(example: Example) -> gr.Button:
    button = gr.Button(f"{example.label}\n{example.prompt}", size="sm", icon=example.card)
    assert button.icon is not None
    button.keep_in_cache.add(button.icon["path"])  # or it would be removed with old uploads
    return button


def _message(field: str) -> gr.HTML:
    return gr.HTML(visible=False, elem_id=f"message_{field}", elem_classes="message", apply_default_css=False)


def _person(number: int, messages: dict[str, gr.HTML]) -> PersonWidgets:
    with gr.Tab(f"Person {number}", id=number):
        photos = gr.Gallery(
            label=f"Photos of person {number}",
            file_types=IMAGES,
            interactive=True,
            columns=4,
            fit_columns=False,
            height=170,
            object_fit="cover",
            buttons=[],
            elem_id=f"photos_{number}",
            elem_classes="photos",
        )
        messages[f"person_{number}"] = _message(f"person_{number}")
        crops = gr.HTML(visible=False, elem_id=f"crops_{number}", elem_classes="crops", apply_default_css=False)
        with gr.Row():
            strength = gr.Slider(
                0,
                3,
                1,
                step=0.05,
                label="Strength",
                info="0 off, 1 as in the paper",
                min_width=200,
                elem_id=f"strength_{number}",
            )
            which = gr.Dropdown(
                list(WHICH_FACE), value=ONLY_FACE, label="Which face", info="if photos show several", min_width=200
            )
        with gr.Row():
            load = gr.UploadButton("Load identity file", file_types=[".safetensors"], size="sm", min_width=120)
            save = gr.Button("Save identity file", size="sm", min_width=120, elem_id=f"save_{number}")
            forget = gr.Button("Remove identity", size="sm", min_width=120, visible=False)
            saved = gr.DownloadButton(visible="hidden", elem_id=f"saved_{number}")
    return PersonWidgets(photos, strength, which, crops, load, save, saved, forget)


def _prompt(widgets: dict[str, Any], messages: dict[str, gr.HTML], vocabulary: Vocabulary | None) -> None:
    widgets["prompt"] = gr.Textbox(
        label="Prompt",
        placeholder="a photo of a smiling person in a red shirt in a garden",
        lines=2,
        max_lines=6,
        max_length=MAX_PROMPT,
        elem_id="prompt",
    )
    messages["prompt"] = _message("prompt")
    if vocabulary is not None:
        rows = "".join(
            f"<p><b>{html.escape(group)}</b>: {html.escape(words)}</p>" for group, words in groups_of_words(vocabulary)
        )
        with gr.Accordion("Words that this model knows", open=False, elem_id="words"):
            gr.HTML(rows, apply_default_css=False)
    styles = STYLES + MORE_STYLES if vocabulary is None else STYLES
    widgets["style"] = gr.Radio(list(styles), value=AS_WRITTEN, label="Style", elem_id="style")
    with gr.Row():
        widgets["count"] = gr.Slider(
            1, MAX_PICTURES, 2, step=1, label="Pictures", info="how many", min_width=160, elem_id="count"
        )
        with gr.Column(min_width=160):
            widgets["seed"] = gr.Number(0, label="Seed", info="same seed, same picture", precision=0, elem_id="seed")
            widgets["dice"] = gr.Button("Another seed", size="sm")
    messages["count"], messages["seed"] = _message("count"), _message("seed")


def _places(widgets: dict[str, Any], messages: dict[str, gr.HTML], ratio: float, has_control: bool) -> None:
    with gr.Accordion("Where people go", open=False, elem_id="places") as widgets["places_section"]:
        gr.HTML(
            "<p>For several people: draw a box around where each face goes, on the empty area or over a picture "
            "whose faces are found for you. Without boxes the places come from a draft.</p>",
            apply_default_css=False,
        )
        with gr.Row():
            widgets["layout"] = gr.UploadButton(
                "Layout picture" + (" or depth map" if has_control else ""),
                file_types=IMAGES,
                size="sm",
                min_width=120,
                elem_id="layout",
            )
            widgets["remove_layout"] = gr.Button("Remove picture", size="sm", min_width=120, visible=False)
        widgets["follow_depth"] = gr.Checkbox(False, label="Follow the depth of this picture", visible=has_control)
        messages["places"] = _message("places")
        widgets["canvas"] = gr.HTML(
            canvas_value(ratio=ratio),
            html_template=CANVAS,
            js_on_load=(STATIC / "canvas.js").read_text(),
            elem_id="canvas",
            apply_default_css=False,
        )


def _more(widgets: dict[str, Any], messages: dict[str, gr.HTML], steps: int, defaults: FaceDefaults) -> None:
    with gr.Accordion("More", open=False, elem_id="more") as widgets["more_section"]:
        widgets["negative_prompt"] = gr.Textbox(label="What not to show", lines=1, max_length=MAX_PROMPT)
        messages["negative_prompt"] = _message("negative_prompt")
        with gr.Row():
            widgets["steps"] = gr.Slider(1, MAX_STEPS, steps, step=1, label="Denoising steps", min_width=160)
            widgets["guidance"] = gr.Slider(
                *(1, 20, guidance_scales(None, None, defaults)[0]),
                step=0.5,
                label="Guidance",
                info="1 is off; more follows the prompt closer",
                min_width=160,
            )
        messages["steps"], messages["guidance"] = _message("steps"), _message("guidance")
        widgets["low_noise_guidance"] = gr.Checkbox(
            defaults.low_noise_guidance is not None,
            label="Half the guidance at low noise",
            info="in the later steps, so that details are less overdrawn; suits the avatars",
        )
        widgets["mode"] = gr.Dropdown(
            list(MODES), value=RECOMMENDED, label="How faces join", info="trained weights, the model's own, or both"
        )
        messages["mode"] = _message("mode")
        widgets["compare"] = gr.Checkbox(
            True,
            label="Also without the face",
            info="in the contact sheet, from the same seed: shows what the face changes, and takes twice the time",
            elem_id="compare",
        )
        widgets["refine"] = gr.Checkbox(
            False,
            label="Draw small faces again",
            info="each by itself and larger: for several people, and for pictures of the whole body",
            elem_id="refine",
        )


def _results(widgets: dict[str, Any]) -> None:
    widgets["results"] = gr.Gallery(
        show_label=False,
        columns=2,
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="results",
    )
    with gr.Column(visible=False) as widgets["downloads"]:
        with gr.Row():
            widgets["archive"] = gr.DownloadButton("All as ZIP", size="sm", min_width=120, elem_id="archive")
            widgets["sheet_file"] = gr.DownloadButton("Contact sheet", size="sm", min_width=120)
        gr.HTML("<h2>Contact sheet</h2>", apply_default_css=False, elem_classes="heading")
        widgets["sheet"] = gr.Image(
            type="filepath", format="png", interactive=False, show_label=False, buttons=[], elem_id="sheet"
        )
        with gr.Accordion("How they were made", open=False):
            widgets["metadata"] = gr.JSON(show_label=False, elem_id="metadata")
