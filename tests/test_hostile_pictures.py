"""Pictures as they come from outside: damaged metadata, odd modes, other formats, what is no file, masks, turns."""

import io
import os
import struct
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from tiny_models import face, generate, tiny_pipeline

from face_fusion_pipeline import face_pictures
from face_fusion_pipeline.app.form import FieldError
from face_fusion_pipeline.app.places import read_picture
from face_fusion_pipeline.avatars import render, sample_scene
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.control_pictures import control_depth
from face_fusion_pipeline.evaluation.faces import FaceFinder
from face_fusion_pipeline.face_detectors import Face, YuNetDetector
from face_fusion_pipeline.face_errors import InvalidLayoutError, UnreadableImageError
from face_fusion_pipeline.face_images import crop_box, crop_face
from face_fusion_pipeline.face_layout import given_masks, read_mask
from face_fusion_pipeline.face_pictures import FORMATS, load_image, upright_rgb
from face_fusion_pipeline.generation.photos import find_upright, locate_face, prepare_face, upright_faces
from face_fusion_pipeline.reference_pass import face_tensors
from face_fusion_pipeline.training.selection import SelectionOptions, select
from face_fusion_pipeline.training.sources import Photo


PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(image: Image.Image = PICTURE, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


# --- Metadata -----------------------------------------------------------------------------------------------------


def phone_exif() -> bytes:
    """Orientation 6, and a tag with a value that Pillow reads but cannot write back: -1 as a LONG8."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x8769, 4, 1, struct.pack("<I", 38))]
    directory = struct.pack("<H", 2) + b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in entries) + bytes(4)
    sub = struct.pack("<H", 1) + struct.pack("<HHI", 0x9203, 10, 1) + struct.pack("<I", 56) + bytes(4)
    return b"Exif\0\0II*\0\x08\0\0\0" + directory + sub + struct.pack("<ii", -99999, 0)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_read_whatever_else_the_exif_holds(form, monkeypatch):
    """EXIF is never written again: what Pillow cannot write back is no reason to refuse the pixels."""

    def cannot(*_):
        raise struct.error("'L' format requires 0 <= number <= 4294967295")

    content = encoded(PICTURE, form, exif=phone_exif(), **({} if form != "WEBP" else {"lossless": True}))
    monkeypatch.setattr(Image.Exif, "tobytes", cannot)
    turned = load_image(content)
    assert turned.size == (24, 40)
    for source in (Image.open(io.BytesIO(content)), turned, load_image(turned)):
        assert np.array_equal(np.asarray(upright_rgb(source)), np.asarray(turned))  # turned once
    assert torch.equal(face_tensors(Image.open(io.BytesIO(content)), 16)[0], face_tensors(turned, 16)[0])


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0" * 40])
def test_an_exif_that_is_none_turns_nothing(exif):
    head, tail = encoded(form="JPEG")[:2], encoded(form="JPEG")[2:]
    assert load_image(head + segment(0xE1, exif) + tail).size == (40, 24)
    lying = Image.open(io.BytesIO(encoded()))
    lying.info["exif"] = exif
    assert np.array_equal(np.asarray(upright_rgb(lying)), PIXELS)


def test_damaged_exif_never_costs_the_pixels():
    rng = np.random.default_rng(0)
    for _ in range(60):
        exif = bytearray(phone_exif())
        for place in rng.integers(6, len(exif), 3):
            exif[place] = rng.integers(256)
        assert sorted(load_image(encoded(exif=bytes(exif))).size) == [24, 40]


@pytest.mark.parametrize(
    "chunks",
    [
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"iCCP", b"x\0\1abc"),
        chunk(b"pHYs", b"1"),
        chunk(b"gAMA", b"1"),
        chunk(b"cHRM", b"1"),
        chunk(b"sRGB", b""),
        chunk(b"acTL", b"1"),
        chunk(b"tEXt", b"k\0v")[:-1] + b"!",
    ],
    ids=lambda chunks: f"{chunks[4:8].decode()} {len(chunks)}",
)
def test_chunks_beside_the_pixels_of_a_png_never_cost_them(chunks):
    content = encoded()
    assert np.array_equal(np.asarray(load_image(content[:33] + chunks + content[33:])), PIXELS)


@pytest.mark.parametrize(
    ("marker", "data"),
    [(0xE2, b"ICC_PROFILE\0\5"), (0xED, b"Photoshop 3.0\0008BIM\x03\xed"), (0xEE, b"Adobe"), (0xE0, b"JFIF")],
)
def test_segments_beside_the_pixels_of_a_jpeg_never_cost_them(marker, data):
    content = encoded(form="JPEG", exif=phone_exif())
    assert np.array_equal(
        np.asarray(load_image(content[:2] + segment(marker, data) + content[2:])), np.asarray(load_image(content))
    )


@pytest.mark.parametrize("tag", [271, 306, 33432])
def test_tags_beside_the_pixels_of_a_tiff_never_cost_them(tag):
    content = bytearray(encoded(form="TIFF", tiffinfo={tag: "some text", 274: 6}))
    (start,) = struct.unpack_from("<I", content, 4)
    places = range(start + 2, len(content), 12)
    place = next(place for place in places if struct.unpack_from("<H", content, place)[0] == tag)
    struct.pack_into("<HII", content, place + 2, 5, 2**30, 2**31)
    assert load_image(bytes(content)).size == (24, 40)


def test_what_is_damaged_in_the_pixels_is_refused():
    for form in ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "AVIF"):
        content = encoded(form=form)
        for length in (3, 12, 40, len(content) // 2):
            with pytest.raises(UnreadableImageError):
                load_image(content[:length])


# --- Modes --------------------------------------------------------------------------------------------------------


RAMP = np.arange(40 * 24, dtype=np.float64).reshape(24, 40) / (40 * 24 - 1)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RAMP.astype(np.float32)),
        Image.fromarray((RAMP * 255).astype(np.float32)),
        Image.fromarray((RAMP * 65535).astype(np.float32)),
        Image.fromarray((RAMP * 255).astype(np.int32)),
        Image.fromarray((RAMP * 65535).astype(np.int32)),
        Image.fromarray((RAMP * 65535).astype(np.uint16)),
    ],
    ids=lambda image: f"{image.mode} to {image.getextrema()[1]:g}",
)
def test_grey_of_many_bits_is_scaled_by_what_it_holds(image):
    loaded = np.asarray(load_image(image))[..., 0]
    assert np.abs(loaded - RAMP * 255).max() <= 1
    form = "TIFF" if image.mode in ("F", "I") else "PNG"
    assert np.array_equal(np.asarray(load_image(encoded(image, form)))[..., 0], loaded)


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 1e9), (0, np.nan), (-np.inf, 0)])
def test_values_that_mean_nothing_known_are_refused_with_their_range(low, high):
    values = np.full((24, 40), low, np.float32)
    values[0, 0] = high
    with pytest.raises(UnreadableImageError, match="of mode F, go from"):
        load_image(Image.fromarray(values))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
)
def test_every_mode_is_shown(mode):
    assert load_image(Image.new(mode, (32, 32))).mode == "RGB"
    assert read_mask(Image.new(mode, (32, 32))).shape == (32, 32)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 24, 24, 3), np.uint8), "shape|got \\(2, 24"),
        (np.zeros((24, 24, 2), np.uint8), "24, 24, 2"),
        (np.zeros((24, 24, 3), np.uint16), "uint16"),
        (np.zeros((24, 24, 3), bool), "bool"),
        (np.full((24, 24, 3), None), "object"),
        (np.full((24, 24, 3), 1.5), "0.0 to 1.5"),
        (np.zeros((0, 24, 3), np.uint8), "empty"),
        (torch.zeros(24, 24, 3), "24"),
        (3, "int"),
        (None, "NoneType"),
    ],
)
def test_arrays_that_are_no_picture_are_refused_with_the_reason(array, message):
    with pytest.raises(UnreadableImageError, match=message):
        load_image(array)


# --- Formats and files --------------------------------------------------------------------------------------------


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"


def test_only_the_formats_of_the_list_are_decoded(tmp_path, monkeypatch):
    """A "photo.png" that is EPS would start Ghostscript."""
    (tmp_path / "photo.png").write_bytes(EPS)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    for source in (tmp_path / "photo.png", str(tmp_path / "photo.png"), EPS):
        with pytest.raises(UnreadableImageError, match="is not a picture: give a JPEG, PNG"):
            load_image(source)
    with pytest.raises(UnreadableImageError, match="is EPS, not one of JPEG"):
        face_tensors(Image.open(io.BytesIO(EPS)), 16)
    for form in ("PPM", "TGA", "ICO", "PCX", "SGI", "PDF"):
        with pytest.raises(UnreadableImageError, match="is not a picture"):
            load_image(encoded(form=form))


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "HEIF"])
def test_the_formats_of_the_list_are_decoded(form):
    assert load_image(encoded(form=form)).size == (40, 24)


def test_heic_is_read_where_a_plugin_is_there(monkeypatch):
    content = b"\0\0\0\x18ftypheic\0\0\0\0" + encoded()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnreadableImageError, match="is HEIC: pip install pillow-heif"):
        load_image(content)

    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (40, 24), "RGB"

        def load(self):
            self._im = PICTURE.im

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))

    def register():
        Image.register_open("HEIF", Heif, lambda prefix: prefix[4:8] == b"ftyp")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    assert np.array_equal(np.asarray(load_image(content)), PIXELS)


def within(seconds: float, work) -> BaseException | None:
    """What `work` raises; fails where it takes longer."""
    raised: list[BaseException] = []

    def run():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits without end"
    return raised[0] if raised else None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes and devices here")
def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        for read in (load_image, prepare_face, control_depth, read_mask):
            error = within(20, lambda read=read, path=path: read(path))
            assert isinstance(error, UnreadableImageError) and path.name in str(error)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(200 * 2**30)
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(UnreadableImageError, match="sparse.png is above 200,000,000 bytes"):
        load_image(tmp_path / "sparse.png")


def test_a_file_that_hides_its_size_is_read_no_further_than_the_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(face_pictures, "MAX_BYTES", 100)
    (tmp_path / "grown.png").write_bytes(encoded())
    monkeypatch.setattr(face_pictures.os, "stat", lambda *_: SimpleNamespace(st_mode=0o100644, st_size=50))
    with pytest.raises(UnreadableImageError, match="above 100 bytes"):
        load_image(tmp_path / "grown.png")
    with pytest.raises(UnreadableImageError, match="above 100 bytes"):
        load_image(encoded())


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_what_claims_too_many_pixels_is_refused_in_every_way_in(side):
    bomb = bytearray(encoded())
    bomb[16:24] = struct.pack(">II", side, side)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    for read in (load_image, control_depth, read_mask, prepare_face):
        with pytest.raises(UnreadableImageError, match="above 100,000,000"):
            read(bytes(bomb))
    with pytest.raises(UnreadableImageError, match="above 100,000,000"):
        load_image(np.broadcast_to(np.uint8(0), (side, side, 3)))


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000, "https://example.com/face.png", ""])
def test_a_path_that_cannot_be_one_is_named_in_short(name):
    with pytest.raises(UnreadableImageError) as caught:
        load_image(name)
    assert len(str(caught.value)) < 500


# --- Every way in -------------------------------------------------------------------------------------------------


def test_one_picture_is_encoded_alike_in_every_form(tmp_path):
    PICTURE.save(tmp_path / "face.png")
    chw = torch.from_numpy(PIXELS).permute(2, 0, 1)
    first = face_tensors(PICTURE, 16)[0]
    for source in (
        tmp_path / "face.png",
        str(tmp_path / "face.png"),
        encoded(),
        PIXELS,
        PIXELS / 255,
        (PIXELS / 255).astype(np.float32),
        chw,
        chw / 255,
        PICTURE.convert("RGBA"),
        prepare_face(PICTURE, detector=None),
    ):
        assert torch.equal(face_tensors(source, 16)[0], first)
    grey = PICTURE.convert("L")
    assert torch.equal(face_tensors(np.asarray(grey), 16)[0], face_tensors(grey, 16)[0])
    assert len(face_tensors(np.stack([PIXELS] * 2), 16)) == 2


def test_the_call_takes_a_path_and_refuses_what_is_no_picture(tmp_path):
    pipe = tiny_pipeline()
    face(1).save(tmp_path / "face.png")
    a = generate(pipe, face_image=str(tmp_path / "face.png"))
    assert torch.equal(a, generate(pipe, face_image=face(1)))
    assert torch.equal(a, generate(pipe, face_image=[tmp_path / "face.png"]))
    (tmp_path / "photo.png").write_bytes(EPS)
    with pytest.raises(UnreadableImageError, match="photo.png is not a picture"):
        generate(pipe, face_image=tmp_path / "photo.png")
    for argument in ("face_image", "image"):
        options = {"face_image": face(1), "face_boxes": [(4, 4, 8, 8)], argument: tmp_path / "photo.png"}
        with pytest.raises(UnreadableImageError, match="photo.png is not a picture"):
            pipe.refine_faces(options.pop("image", face(2)), "a cat", **options)
    with pytest.raises(UnreadableImageError, match="photo.png is not a picture"):
        generate(pipe, face_image=[[face(1)], [face(2)]], face_layout=tmp_path / "photo.png")
    with pytest.raises(UnreadableImageError, match="photo.png is not a picture"):
        generate(pipe, face_image=[[face(1)], [face(2)]], face_masks=[tmp_path / "photo.png"] * 2)


def test_the_command_and_the_page_refuse_in_one_line_without_a_path_where_that_is_private(tmp_path, capsys):
    (tmp_path / "photo.png").write_bytes(EPS)
    assert main(["generate", "--face", str(tmp_path / "photo.png"), "--prompt", "x", "--out", str(tmp_path)]) == 2
    assert "photo.png is not a picture" in capsys.readouterr().err.splitlines()[-1]
    for name in ("photo.png", "missing.png"):
        with pytest.raises(FieldError, match=name) as caught:
            read_picture(tmp_path / name)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("kind", ["auto", "photo", "depth", "map"])
def test_control_images_come_through_the_same_reader(kind, tmp_path):
    PICTURE.save(tmp_path / "map.png")
    expected = control_depth(PICTURE, kind, lambda image: np.asarray(image.convert("L")))
    for source in (tmp_path / "map.png", str(tmp_path / "map.png")):
        found = control_depth(source, kind, lambda image: np.asarray(image.convert("L")))
        assert np.array_equal(np.asarray(found), np.asarray(expected))
    with pytest.raises(UnreadableImageError, match="EPS"):
        control_depth(Image.open(io.BytesIO(EPS)), kind)


def test_a_map_of_sixteen_bits_is_not_clipped():
    deep = Image.fromarray(np.full((16, 16), 128 * 256, np.uint16))
    assert control_depth(deep, "map").getpixel((0, 0)) == (128, 128, 128)


def test_a_crop_that_would_fill_the_memory_is_refused():
    for box in ((0, 0, 1e6, 1e6), (0, 0, np.inf, 10), (np.nan, 0, 1, 1)):
        with pytest.raises(UnreadableImageError, match="crop"):
            crop_box(PICTURE, box)
    with pytest.raises(UnreadableImageError, match="crop"):
        crop_face(PICTURE, (0, 0, 40, 40), enlarge=1000)


# --- Masks --------------------------------------------------------------------------------------------------------


INSIDE = np.zeros((8, 12), bool)
INSIDE[2:6, 3:9] = True


def transparent(mode: str, hidden: int = 255) -> Image.Image:
    """Inside white and opaque; outside transparent over the colour `hidden`."""
    grey = np.where(INSIDE, 255, hidden).astype(np.uint8)
    image = Image.fromarray(np.stack([grey, np.where(INSIDE, 255, 0).astype(np.uint8)], -1), "LA")
    return image.convert("RGBA") if mode == "RGBa" else image.convert(mode)


@pytest.mark.parametrize(
    "mask",
    [
        transparent("LA"),
        transparent("RGBA"),
        transparent("RGBA", hidden=0),
        transparent("RGBa").convert("RGBa"),
        Image.fromarray(INSIDE),
        Image.fromarray(np.uint8(255) * INSIDE),
        Image.fromarray(np.uint8(255) * INSIDE).convert("RGB"),
        Image.fromarray(np.uint8(255) * INSIDE).convert("P"),
        Image.fromarray(INSIDE.astype(np.float32)),
        Image.fromarray(255 * INSIDE.astype(np.float32)),
        Image.fromarray(np.uint16(65535) * INSIDE),
        Image.fromarray(np.int32(65535) * INSIDE),
        Image.fromarray(np.int32(255) * INSIDE),
        INSIDE,
        INSIDE.astype(np.uint8),
        INSIDE.astype(np.int64),
        np.uint8(255) * INSIDE,
        np.uint16(65535) * INSIDE,
        INSIDE * 255.0,
        INSIDE * 1.23,
        INSIDE * 1.4 - 0.2,
        torch.from_numpy(INSIDE),
        torch.from_numpy(INSIDE).bfloat16(),
        torch.from_numpy(INSIDE) * 255,
    ],
    ids=lambda mask: str(mask.mode if isinstance(mask, Image.Image) else mask.dtype),
)
def test_a_mask_means_the_same_in_every_type(mask):
    assert np.array_equal((read_mask(mask) > 0.5).numpy(), INSIDE)


def test_what_resizing_leaves_beyond_the_range_is_clipped():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    resized = torch.nn.functional.interpolate(mask, (64, 64), mode="bicubic")[0, 0]
    assert resized.max() > 1.1 and resized.min() < -0.05
    found = read_mask(resized)
    assert found.min() == 0 and found.max() == 1
    assert torch.equal(given_masks([resized], 64, 64)[0], resized > 0.5)
    grey = Image.fromarray(mask[0, 0].numpy()).resize((64, 64), Image.Resampling.BICUBIC)
    assert grey.mode == "F" and given_masks([grey], 64, 64)[0].sum() == pytest.approx(32 * 32, rel=0.05)


def test_half_transparent_is_half_inside():
    image = Image.new("RGBA", (4, 4), (255, 255, 255, 51))
    assert read_mask(image).unique().tolist() == pytest.approx([0.2])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((4, 4), np.nan), "not finite"),
        (np.full((4, 4), np.inf), "not finite"),
        (np.full((4, 4), "a"), "numbers"),
        (np.ones((0, 4)), r"\(0, 4\)"),
        (np.ones((4, 4, 3)), r"\(4, 4, 3\)"),
        (torch.ones(1, 4, 4), r"\(1, 4, 4\)"),
        (np.zeros((4, 4), complex), "complex"),
        ("nowhere.png", "nowhere.png"),
    ],
)
def test_what_is_no_mask_is_refused_with_the_reason(mask, message):
    with pytest.raises((InvalidLayoutError, UnreadableImageError), match=message):
        given_masks([mask], 8, 8)


def test_people_do_not_mix_through_transparent_masks(tmp_path):
    """As two people whose masks are arrays."""
    pipe, people = tiny_pipeline(), [[face(1)], [face(2)]]
    left = np.zeros((16, 16), bool)
    left[:, :8] = True
    sides = [left, ~left]
    layers = []
    for number, side in enumerate(sides):
        alpha = (255 * side).astype(np.uint8)
        layers.append(Image.fromarray(np.stack([np.full_like(alpha, 255), alpha], -1), "LA"))
        layers[-1].save(tmp_path / f"{number}.png")
    expected = generate(pipe, face_image=people, face_masks=sides)
    assert torch.equal(generate(pipe, face_image=people, face_masks=layers), expected)
    assert torch.equal(
        generate(pipe, face_image=people, face_masks=[str(tmp_path / f"{i}.png") for i in (0, 1)]), expected
    )


# --- Turned faces -------------------------------------------------------------------------------------------------


QUARTERS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


class Scored:
    """A detector of one face whose score follows from where the red edge of a picture lies: above, it is upright."""

    name, sizes, clear, turned = "scored", (80,), 0.9, 0.85

    def __init__(self, upright: float, lying: float) -> None:
        self.upright, self.lying, self.calls = upright, lying, 0

    def detect(self, image: Image.Image) -> list[Face]:
        self.calls += 1
        pixels = np.asarray(image).astype(int)
        red = np.argwhere((pixels[..., 0] > 200) & (pixels[..., 1] < 100)).mean(0) / pixels.shape[:2]
        score = self.upright if red[0] < 0.35 else self.lying
        middle, size = np.array(image.size) / 2, max(image.size) / 8
        return [Face((*(middle - size), *(middle + size)), score)] if score else []


def standing() -> Image.Image:
    image = Image.new("RGB", (80, 80), "black")
    image.paste((255, 0, 0), (0, 0, 80, 12))
    return image


@pytest.mark.parametrize("turn", QUARTERS)
@pytest.mark.parametrize("lying", [0.0, 0.8])
def test_a_lying_face_is_turned_and_said_in_one_line(turn, lying, caplog):
    caplog.set_level("INFO", "face_fusion_pipeline")
    image = standing().transpose(turn)
    found = locate_face(image, Scored(0.95, lying), min_size=1)
    assert np.array_equal(np.asarray(found.image), np.asarray(standing()))
    (line,) = [message for message in caplog.messages if "turned" in message]
    assert f"turned by {90 * (3 - QUARTERS.index(turn))} degrees (sureness 0.95, as it was {lying:.2f})" in line


@pytest.mark.parametrize(("upright", "lying"), [(0.91, 1.0), (0.8, 0.82), (0.5, 0.84), (0.8, 0.8)])
def test_a_picture_is_left_as_it_is_where_turning_is_not_surer(upright, lying):
    """Clear as it is; hardly surer turned; turned as unsure; the same."""
    found = locate_face(standing(), Scored(upright, lying), min_size=1)
    assert np.array_equal(np.asarray(found.image), np.asarray(standing()))


def test_a_clear_face_costs_one_look_and_a_detector_without_scores_for_it_none():
    clear = Scored(0.95, 0.5)
    locate_face(standing(), clear, min_size=1)
    assert clear.calls == 1
    other = Scored(0.6, 0.5)
    other.clear = None
    locate_face(standing(), other, min_size=1)
    assert other.calls == 1


def portraits(test_data: Path) -> list[Path]:
    photos = sorted((test_data / "photos" / "london").glob("*.jpg"))[::9]
    return [test_data / "photos" / "astronaut.png", *photos]


def test_turned_photographs_are_found_upright_and_upright_ones_never_turned(test_data):
    yunet = YuNetDetector(test_data / "models" / "face_detection_yunet_2023mar.onnx")
    for path in portraits(test_data):
        photo = load_image(path).resize((400, 400))
        image, truth = find_upright(photo, yunet)
        assert image is photo, path.name
        for turn in QUARTERS:
            image, found = find_upright(photo.transpose(turn), yunet)
            assert np.array_equal(np.asarray(image), np.asarray(photo)), path.name
            assert found.box == pytest.approx(truth.box)


def test_renders_are_never_turned(test_data):
    yunet = YuNetDetector(test_data / "models" / "face_detection_yunet_2023mar.onnx")
    rendered = render([sample_scene(seed, identities=[seed]) for seed in range(1_100_000, 1_100_006)], size=128)
    for pixels in rendered.images:
        image = load_image(pixels.clamp(0, 1))
        assert upright_faces(image, yunet)[0] is image


def test_prepare_and_evaluate_keep_turned_photographs_upright(test_data):
    yunet = YuNetDetector(test_data / "models" / "face_detection_yunet_2023mar.onnx")
    photo = load_image(test_data / "photos" / "astronaut.png")
    hanging = Photo("hanging", encoded(photo.transpose(Image.Transpose.ROTATE_180)))
    options = SelectionOptions(64, 64, min_side=64, min_face=24, min_sharpness=0)
    example = select(hanging, options, lambda: yunet)
    upright = select(replace(hanging, content=encoded(photo)), options, lambda: yunet)
    for name in ("image", "crop"):
        assert np.array_equal(np.asarray(getattr(example, name)), np.asarray(getattr(upright, name)))
    assert example.box == upright.box
    image, _ = FaceFinder(yunet).photo(hanging)
    assert np.array_equal(np.asarray(image), np.asarray(photo))
