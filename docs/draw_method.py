"""The diagram of the method, docs/images/method.svg.

python docs/draw_method.py
"""

import re
from pathlib import Path


OUT = Path(__file__).parent / "images" / "method.svg"
WIDTH, HEIGHT, BOX = 1000, 660, 60  # pixels; height of a box
FROZEN, TRAINED, KEPT, PLAIN = "#e8ebf0", "#ffd9a8", "#cfe6d4", "#ffffff"
COLUMNS = {"input": (20, 110), "encoder": (165, 205), "matrix": (460, 95), "keys": (605, 115)}  # left, width
ROWS = {"face": 45, "prompt": 145, "picture": 245}  # top
OWN_ROWS = {"face": 445, "picture": 545}
ATTENTION = (760, 45, 220, 260)  # left, top, width, height
OWN_ATTENTION = (760, 445, 220, 160)


def words(text: str) -> str:
    """`K_f` with its f lowered, as SVG."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"_(\w+)", r'<tspan dy="4" font-size="11">\1</tspan><tspan dy="-4">&#8203;</tspan>', text)


def label(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 15, fill: str = "#1d2430") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{words(text)}</text>'


def lines(x: float, middle: float, *texts: str) -> list[str]:
    """Lines of text one below the other around `middle`; those after the first are smaller."""
    top = middle + 5 - 10 * (len(texts) - 1)
    return [label(x, top + 20 * i, text, size=15 if i == 0 else 13) for i, text in enumerate(texts)]


def box(x: float, y: float, width: float, height: float, fill: str, *texts: str) -> list[str]:
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="#59657a"/>'
    return [shape, *lines(x + width / 2, y + height / 2, *texts)]


def arrow(points: list[tuple[float, float]], text: str = "") -> list[str]:
    path = " L ".join(f"{x} {y}" for x, y in points)
    drawn = [f'<path d="M {path}" fill="none" stroke="#59657a" stroke-width="1.6" marker-end="url(#head)"/>']
    if text:
        (x0, y0), (x1, _) = points[:2]
        drawn.append(label((x0 + x1) / 2, y0 - 7, text, size=14))
    return drawn


def row(top: int, cells: dict[str, tuple[str, ...]], state: str) -> list[str]:
    """One line of boxes from left to right into the attention; `state` is what the layer gets from the encoder."""
    drawn: list[str] = []
    ends = [*COLUMNS.values(), (ATTENTION[0], 0)]
    for (column, (left, width)), (following, _) in zip(COLUMNS.items(), ends[1:], strict=True):
        fill, *texts = cells[column]
        drawn += box(left, top, width, BOX, fill, *texts)
        text = state if column == "encoder" else ""
        drawn += arrow([(left + width, top + BOX / 2), (following - 2, top + BOX / 2)], text)
    return drawn


def frame(top: int, height: int, title: str) -> list[str]:
    """A dashed frame around what happens inside a layer."""
    shape = (
        f'<rect x="440" y="{top}" width="{WIDTH - 450}" height="{height}" rx="12" fill="none" stroke="#59657a" '
        'stroke-dasharray="6 5"/>'
    )
    return [shape, label(455, top + 23, title, anchor="start", size=14, fill="#59657a")]


def draw() -> str:
    left, top, width, height = ATTENTION
    center = left + width / 2
    middle, bottom = COLUMNS["encoder"][0] + COLUMNS["encoder"][1] / 2, ROWS["picture"] + BOX
    face = {
        "input": (PLAIN, "face", "photo, cropped"),
        "encoder": (FROZEN, "VAE and UNet", "once; no noise, no prompt"),
        "matrix": (TRAINED, "W_kf , W_vf", "trained"),
        "keys": (KEPT, "K_f , V_f", "identity file"),
    }
    prompt = {
        "input": (PLAIN, "prompt"),
        "encoder": (FROZEN, "text encoder"),
        "matrix": (FROZEN, "W_k , W_v"),
        "keys": (PLAIN, "K_c , V_c"),
    }
    picture = {
        "input": (PLAIN, "noise"),
        "encoder": (FROZEN, "the same UNet", "at every step"),
        "matrix": (FROZEN, "W_q"),
        "keys": (PLAIN, "Q"),
    }
    own_face = {
        "input": (PLAIN, "face", "photo, cropped"),
        "encoder": (FROZEN, "VAE and UNet", "once; a little noise"),
        "matrix": (FROZEN, "W_k , W_v"),
        "keys": (KEPT, "K_f , V_f", "face cells only"),
    }
    own_picture = {
        "input": (PLAIN, "noise"),
        "encoder": (FROZEN, "the same UNet", "at every step"),
        "matrix": (FROZEN, "W_q, W_k, W_v"),
        "keys": (PLAIN, "Q , K , V"),
    }
    own_left, own_top, own_width, own_height = OWN_ATTENTION
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">',
        "<title>Face Fusion: the keys and values of a face join those of the prompt in one softmax</title>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M 0 0 L 10 5 L 0 10 z" fill="#59657a"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *frame(8, 320, "in each cross-attention layer: the paper"),
        *frame(410, 215, "in the self-attention layers of the upward half: ours, without training"),
        *row(ROWS["face"], face, "h_f"),
        *row(ROWS["prompt"], prompt, "c"),
        *row(ROWS["picture"], picture, "h"),
        *box(left, top, width, height, PLAIN),
        label(center, top + 55, "K = [ K_c ; K_f ]"),
        label(center, top + 85, "V = [ V_c ; V_f ]"),
        label(center, top + 140, "softmax( M + QKᵀ / √d ) V", size=16),
        label(center, top + 195, "M: strength, weights of photos,", size=13),
        label(center, top + 215, "who may see whom", size=13),
        *arrow([(center, top + height), (center, 350), (middle, 350), (middle, bottom + 2)]),
        label((center + middle) / 2, 370, "into h, and on to the next layer", size=14),
        *row(OWN_ROWS["face"], own_face, "h_f"),
        *row(OWN_ROWS["picture"], own_picture, "h"),
        *box(own_left, own_top, own_width, own_height, PLAIN),
        label(center, own_top + 35, "K' = [ K ; K_f ]"),
        label(center, own_top + 62, "V' = [ V ; V_f ]"),
        label(center, own_top + 100, "softmax( M + QK'ᵀ / √d ) V'", size=15),
        label(center, own_top + 130, "M on K_f: log of the strength", size=13),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
