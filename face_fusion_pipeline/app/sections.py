"""The folded sections of the form: a style picture, a pose, where people go, and what is seldom changed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..conditioner_face_studio import STYLE_SCALE
from ..face_defaults import FaceDefaults
from ..face_landmarks import ANGLES
from ..generation.arguments import MAX_PROMPT, guidance_scales
from .form import AS_IN_PHOTO, MAX_PEOPLE, MAX_STEPS, MODES, MOST_POSED, MOST_TURNED, RECOMMENDED, TURNS
from .places import canvas_value


STATIC = Path(__file__).parent / "static"
IMAGES = ["image"]

PERSON_CHIPS = "".join(
    f'<button type="button" class="places-person-{number}" data-person>Person {number}</button>'
    for number in range(1, MAX_PEOPLE + 1)
)
CANVAS = f"""<div class="places-chips" role="group" aria-label="whose box is drawn">{PERSON_CHIPS}
<button type="button" data-clear>Clear boxes</button></div><div class="places-area"></div>"""


def message_beside(field: str) -> gr.HTML:
    """What is said beside a field; nothing yet."""
    return gr.HTML(visible=False, elem_id=f"message_{field}", elem_classes="message", apply_default_css=False)


def one_picture(widgets: dict[str, Any], messages: dict[str, gr.HTML], field: str, name: str, label: str) -> None:
    """A button that takes one picture, one that takes it away, and where it is shown; the last two hidden."""
    with gr.Row():
        widgets[field] = gr.UploadButton(label, file_types=IMAGES, size="sm", min_width=120, elem_id=field)
        widgets[f"remove_{name}"] = gr.Button(f"Remove {label.lower()}", size="sm", min_width=120, visible=False)
    messages[field] = message_beside(field)
    widgets[f"{name}_shown"] = gr.HTML(
        visible=False, elem_id=f"{name}_shown", elem_classes="crops", apply_default_css=False
    )


def style_section(widgets: dict[str, Any], messages: dict[str, gr.HTML], has_style: bool) -> None:
    """A picture whose style is taken; hidden where no weights can do that."""
    section = gr.Accordion("Style from a picture", open=False, visible=has_style, elem_id="style_picture_section")
    with section as widgets["style_section"]:
        gr.HTML(
            "<p>A picture whose style, clothing and surroundings the new ones take. The person stays the one of the "
            "photos.</p>",
            apply_default_css=False,
        )
        one_picture(widgets, messages, "style_picture", "style", "Style picture")
        widgets["style_scale"] = gr.Slider(
            *(0, 1, STYLE_SCALE),
            step=0.05,
            label="How much of it",
            info="0 the prompt alone, 1 the picture alone",
            elem_id="style_scale",
        )


def pose_section(widgets: dict[str, Any], messages: dict[str, gr.HTML], expressions: Sequence[str] | None) -> None:
    """Another photo, or numbers, whose pose and expression are taken; hidden where no weights can do that."""
    section = gr.Accordion("Pose", open=False, visible=expressions is not None, elem_id="pose")
    with section as widgets["pose_section"]:
        gr.HTML(
            "<p>For one person: a photo whose pose and expression the new pictures take. The person keeps the shape "
            "of their own face.</p>",
            apply_default_css=False,
        )
        one_picture(widgets, messages, "driver", "driver", "Pose photo")
        widgets["by_numbers"] = gr.Checkbox(
            False,
            label="Turn the head by numbers",
            info="in place of the pose in that photo, or in the person's own where there is none",
            elem_id="by_numbers",
        )
        with gr.Column(visible=False) as widgets["turns_shown"]:
            directions = ("degrees; above 0 is to the right of the picture", "above 0 is up", "above 0 is clockwise")
            widgets["turns"] = [
                gr.Slider(-MOST_TURNED, MOST_TURNED, 0, step=1, label=label, info=info, elem_id=name)
                for label, info, name in zip(TURNS, directions, ANGLES, strict=True)
            ]
        with gr.Row():
            widgets["expression"] = gr.Dropdown(
                [AS_IN_PHOTO, *(expressions or ())],
                value=AS_IN_PHOTO,
                label="Expression",
                info="that of the photo, or another",
                min_width=160,
                elem_id="expression",
            )
            widgets["pose_strength"] = gr.Slider(
                *(0, MOST_POSED, 1),
                step=0.05,
                label="Strength",
                info="0 off",
                min_width=160,
                elem_id="pose_strength",
            )


def places_section(widgets: dict[str, Any], messages: dict[str, gr.HTML], ratio: float, has_control: bool) -> None:
    """Boxes drawn over a picture or an empty area."""
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
        messages["places"] = message_beside("places")
        widgets["canvas"] = gr.HTML(
            canvas_value(ratio=ratio),
            html_template=CANVAS,
            js_on_load=(STATIC / "canvas.js").read_text(),
            elem_id="canvas",
            apply_default_css=False,
        )


def more_section(widgets: dict[str, Any], messages: dict[str, gr.HTML], steps: int, defaults: FaceDefaults) -> None:
    """What suits most as it is."""
    with gr.Accordion("More", open=False, elem_id="more") as widgets["more_section"]:
        widgets["negative_prompt"] = gr.Textbox(label="What not to show", lines=1, max_length=MAX_PROMPT)
        messages["negative_prompt"] = message_beside("negative_prompt")
        with gr.Row():
            widgets["steps"] = gr.Slider(1, MAX_STEPS, steps, step=1, label="Denoising steps", min_width=160)
            widgets["guidance"] = gr.Slider(
                *(1, 20, guidance_scales(None, None, defaults)[0]),
                step=0.5,
                label="Guidance",
                info="1 is off; more follows the prompt closer",
                min_width=160,
            )
        messages["steps"], messages["guidance"] = message_beside("steps"), message_beside("guidance")
        widgets["low_noise_guidance"] = gr.Checkbox(
            defaults.low_noise_guidance is not None,
            label="Half the guidance at low noise",
            info="in the later steps, so that details are less overdrawn; suits the avatars",
        )
        widgets["mode"] = gr.Dropdown(
            list(MODES), value=RECOMMENDED, label="How faces join", info="trained weights, the model's own, or both"
        )
        messages["mode"] = message_beside("mode")
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
