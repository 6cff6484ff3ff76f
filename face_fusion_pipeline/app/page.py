"""The page: all widgets and where they are, without what they do."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..face_defaults import FaceDefaults
from ..generation.arguments import MAX_PROMPT
from ..generation.prompt_words import Vocabulary, groups_of_words
from .avatar_examples import Example
from .form import (
    AS_WRITTEN,
    MAX_PEOPLE,
    MAX_PICTURES,
    MORE_STYLES,
    ONLY_FACE,
    STYLES,
    WHICH_FACE,
)
from .sections import IMAGES, message_beside, more_section, places_section, pose_section, style_section


INTRO = """<h1>Face Fusion</h1>
<p>New pictures of the same person, from one photo or several and a prompt. Photos stay on the machine that
runs this page, in a folder that is removed. Use photos of people who agreed to it, and say that the pictures are
generated.</p>"""

WELCOME = "<p>Add a photo and a prompt, or take an example on this page.</p>"

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
    `turns` are yaw, pitch and roll.
    """

    tabs: gr.Tabs
    people: list[PersonWidgets]
    prompt: gr.Textbox
    style: gr.Radio
    seed: gr.Number
    dice: gr.Button
    count: gr.Slider
    style_picture: gr.UploadButton
    remove_style: gr.Button
    style_shown: gr.HTML
    style_scale: gr.Slider
    driver: gr.UploadButton
    remove_driver: gr.Button
    driver_shown: gr.HTML
    by_numbers: gr.Checkbox
    turns_shown: gr.Column
    turns: list[gr.Slider]
    expression: gr.Dropdown
    pose_strength: gr.Slider
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
    style_section: gr.Accordion
    pose_section: gr.Accordion
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

    def section_of(self, field: str) -> gr.Accordion | None:
        """The folded section that a field of a message lies in, or None."""
        sections = dict.fromkeys(("negative_prompt", "steps", "guidance", "mode"), self.more_section)
        sections |= {"style_picture": self.style_section, "driver": self.pose_section, "places": self.places_section}
        return sections.get(field)


def build_page(
    examples: list[Example],
    ratio: float,
    steps: int,
    defaults: FaceDefaults,
    has_control: bool,
    has_style: bool,
    expressions: Sequence[str] | None = None,
    described: str = "",
) -> Widgets:
    """Lay out all widgets; call it inside `gr.Blocks()`.

    Args:
        ratio: width / height of the pictures.
        steps: denoising steps at the beginning.
        defaults: what the model recommends, and the words that it knows, if they are few.
        has_control: whether the model can follow the depth of a picture.
        has_style: whether the model can take the style of a picture.
        expressions: that a person can be given with a pose; None: the model cannot follow one.
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
            style_section(widgets, messages, has_style)
            pose_section(widgets, messages, expressions)
            places_section(widgets, messages, ratio, has_control)
            more_section(widgets, messages, steps, defaults)
        with gr.Column(min_width=320, elem_id="outcome"):
            with gr.Row(elem_id="actions"):
                widgets["generate"] = gr.Button("Generate", variant="primary", elem_id="generate")
                widgets["cancel"] = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel")
            widgets["run_id"] = gr.Textbox(visible="hidden")
            messages["result"] = message_beside("result")
            widgets["status"] = gr.HTML(WELCOME, elem_id="status", elem_classes="status", min_height=48)
            _results(widgets)
    return Widgets(messages=messages, **widgets)


def _example(example: Example) -> gr.Button:
    button = gr.Button(f"{example.label}\n{example.prompt}", size="sm", icon=example.card)
    assert button.icon is not None
    button.keep_in_cache.add(button.icon["path"])  # or it would be removed with old uploads
    return button


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
        messages[f"person_{number}"] = message_beside(f"person_{number}")
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
    messages["prompt"] = message_beside("prompt")
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
    messages["count"], messages["seed"] = message_beside("count"), message_beside("seed")


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
