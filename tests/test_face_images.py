"""Loading, finding and cropping a face; the detectors on renders and, where they are at hand, on photographs."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from face_fusion_pipeline.face_detectors import Face, FaceDetector, HaarDetector, YuNetDetector, load_detector
from face_fusion_pipeline.face_errors import (
    FaceTooSmallError,
    ModelNotFoundError,
    NoFaceError,
    SeveralFacesError,
    UnreadableImageError,
)
from face_fusion_pipeline.face_images import crop_box, crop_face, detect_faces, find_face
from face_fusion_pipeline.face_pictures import load_image
from face_fusion_pipeline.generation.photos import FacePhoto, prepare_face


Box = tuple[float, float, float, float]


class Fixed:
    """A detector that knows the faces of a 200x100 picture, and sees them only at one size."""

    name = "fixed"
    sizes = (400, 200)

    def __init__(self, *boxes: Box, only: int = 400) -> None:
        self.boxes, self.only = boxes, only

    def detect(self, image: Image.Image) -> list[Face]:
        if max(image.size) != self.only:
            return []
        return [Face(box, 0.9, np.zeros((5, 2))).moved(self.only / 200) for box in self.boxes]


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared)


# --- loading


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("red", (0, 0, 10, 20))  # red on the left; turned clockwise (6) it is on top
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    turned = load_image(tmp_path / "turned.png")
    assert turned.size == (20, 40)
    assert turned.getpixel((10, 2)) == (255, 0, 0) and turned.getpixel((10, 38)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 8, 8))
    loaded = load_image(image.convert(mode))
    assert loaded.mode == "RGB" and loaded.getpixel((20, 20)) == (255, 255, 255)
    assert loaded.getpixel((4, 4)) == (0, 0, 0)


def test_sources_agree(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), png(image), pixels, pixels / 255.0, image):
        assert np.array_equal(np.asarray(load_image(source)), pixels)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.full((20, 20), 128 * 256, dtype=np.uint16)
    assert load_image(png(Image.fromarray(grey))).getpixel((5, 5)) == (128, 128, 128)


def test_unreadable_files_name_the_file(tmp_path: Path) -> None:
    whole = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    contents = {"empty.png": b"", "text.png": b"no picture", "cut.png": whole[: len(whole) // 2]}
    contents["small.png"] = png(Image.new("RGB", (8, 8)))
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for path in [*(tmp_path / name for name in contents), tmp_path / "missing.png", tmp_path]:
        with pytest.raises(UnreadableImageError, match=path.name):
            load_image(path)


def test_decompression_bomb_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png(Image.new("1", (12_000, 12_000)))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnreadableImageError, match="12000x12000"):
        load_image(bomb)


@pytest.mark.parametrize("array", [np.zeros((0, 0, 3), np.uint8), np.full((32, 32), np.nan), np.full((32, 32), 300.0)])
def test_bad_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(UnreadableImageError):
        load_image(array)


# --- cropping


def test_crop_repeats_the_edge_beyond_the_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    crop = np.asarray(crop_box(Image.fromarray(pixels), (-3, -2, 15, 14)))
    assert np.array_equal(crop, np.pad(pixels, ((2, 4), (3, 3), (0, 0)), mode="edge"))
    outside = np.asarray(crop_box(Image.fromarray(pixels), (20, 20, 24, 25)))
    assert outside.shape == (5, 4, 3) and (outside == pixels[-1, -1]).all()


def test_crop_is_square_centred_and_enlarged() -> None:
    image = Image.new("RGB", (300, 300), "black")
    image.paste("white", (120, 100, 160, 160))  # 40 x 60, centre (140, 130)
    crop = np.asarray(crop_face(image, (120, 100, 160, 160), enlarge=1.6, resolution=96).convert("L")) > 127
    rows, columns = np.flatnonzero(crop.any(1)), np.flatnonzero(crop.any(0))
    assert crop.shape == (96, 96)  # one pixel for one: 1.6 x 60 = 96
    assert (len(rows), len(columns)) == (60, 40)
    assert abs(rows.mean() - 47.5) <= 1 and abs(columns.mean() - 47.5) <= 1


def test_beyond_the_picture_a_face_crop_has_no_streaks() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    image, box = Image.fromarray(pixels), (0, 10, 50, 60)  # a crop from -15 to 65, from -5 to 75
    crop, repeated = np.asarray(crop_face(image, box)).astype(int), np.asarray(crop_box(image, (-15, -5, 65, 75)))
    assert np.array_equal(crop[5:, 15:], pixels[:75, :65])  # what is in the picture stays as it is
    left = slice(None), slice(0, 8)
    assert np.abs(np.diff(crop[left], axis=0)).mean() < np.abs(np.diff(repeated[left].astype(int), axis=0)).mean() / 5
    assert np.array_equal(crop_face(image, (30, 30, 60, 60)), crop_box(image, (21, 21, 69, 69)))
    assert (np.asarray(crop_face(image, (500, 500, 540, 540))) == pixels[-1, -1]).all()  # far from the picture


def test_a_prepared_face_keeps_the_pixels_of_the_photo(tmp_path: Path) -> None:
    """Whatever the model: a crop made small for one would be enlarged again for another."""
    pixels = np.random.default_rng(0).integers(0, 256, (1200, 1000, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    face = FacePhoto(photo, Face((400.0, 400.0, 650.0, 800.0), 1.0)).crop()
    assert face.size == (640, 640)  # 1.6 x 400
    assert np.array_equal(np.asarray(face), pixels[280:920, 205:845])
    photo.save(tmp_path / "photo.png")
    whole = prepare_face(tmp_path / "photo.png", detector=None)
    assert whole.size == (1000, 1000) and np.array_equal(np.asarray(whole), pixels[100:1100])
    assert prepare_face(tmp_path / "photo.png", detector=None, resolution=96).size == (96, 96)


# --- choosing


PICTURE = Image.new("RGB", (200, 100))
LEFT, RIGHT, FAR = (10.0, 10.0, 50.0, 60.0), (120.0, 10.0, 160.0, 60.0), (80.0, 10.0, 90.0, 20.0)


def test_the_only_face_is_found_in_the_pixels_of_the_picture() -> None:
    assert find_face(PICTURE, Fixed(LEFT)).box == pytest.approx(LEFT)


def test_another_size_is_tried() -> None:
    assert find_face(PICTURE, Fixed(LEFT, only=200)).box == pytest.approx(LEFT)


def test_a_margin_is_tried_last() -> None:
    class NeedsMargin(Fixed):  # the margin is 0.4 x 200 = 80 pixels a side: 360 x 260, seen at 400 x 289
        def detect(self, image: Image.Image) -> list[Face]:
            seen = [Face(LEFT, 1.0).moved(400 / 360, 80 * 400 / 360, 80 * 400 / 360)]
            return seen if image.size == (400, 289) else []

    assert find_face(PICTURE, NeedsMargin()).box == pytest.approx(LEFT, abs=0.2)  # margins are whole pixels


def test_several_faces_are_listed_from_the_left() -> None:
    with pytest.raises(SeveralFacesError, match=r"--face-index.*0: \(10, 10, 50, 60\), 1: \(120, 10, 160, 60\)"):
        find_face(PICTURE, Fixed(RIGHT, LEFT))
    assert find_face(PICTURE, Fixed(RIGHT, LEFT), face_index=1).box == pytest.approx(RIGHT)
    for index in (2, -1):
        with pytest.raises(NoFaceError, match=f"no face {index}"):
            find_face(PICTURE, Fixed(RIGHT, LEFT), face_index=index)


def test_a_passer_by_does_not_count_but_can_be_chosen() -> None:
    detector = Fixed(FAR, LEFT)
    assert find_face(PICTURE, detector).box == pytest.approx(LEFT)
    assert find_face(PICTURE, detector, face_index=1, min_size=5).box == pytest.approx(FAR)


def test_too_small_and_no_face() -> None:
    with pytest.raises(FaceTooSmallError, match="10x10"):
        find_face(PICTURE, Fixed(FAR))
    with pytest.raises(NoFaceError, match="fixed"):
        find_face(PICTURE, Fixed())


def test_errors_name_the_file(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "nobody.png")
    with pytest.raises(NoFaceError, match="nobody.png"):
        prepare_face(tmp_path / "nobody.png", Fixed())


# --- detectors


def test_load_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FACE_FUSION_YUNET", raising=False)
    monkeypatch.setattr("face_fusion_pipeline.face_detectors.try_to_load_from_cache", lambda *_: None)
    assert load_detector("auto").name == "haar"  # nothing in the cache, nothing fetched, nothing set
    mine = Fixed()
    assert load_detector(mine) is mine and isinstance(mine, FaceDetector)
    with pytest.raises(ValueError, match="mtcnn"):
        load_detector("mtcnn")  # type: ignore[arg-type]
    with pytest.raises(ModelNotFoundError, match="haar"):
        load_detector("yunet")  # offline
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    for name in ("broken.onnx", "absent.onnx"):
        monkeypatch.setenv("FACE_FUSION_YUNET", str(tmp_path / name))
        with pytest.raises(ModelNotFoundError, match=name):
            load_detector("auto")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "face",
    [
        Face((1e20, -INF, 1e20, NAN), 1.0),
        Face((120.0, 10.0, 160.0, 60.0), NAN),
        Face((120.0, 10.0, 160.0, 60.0), 1.0, np.full((5, 2), INF)),
        Face((-1e20, -1e20, 1e20, 1e20), 1.0),
        Face((40.0, 10.0, 40.0, 60.0), 1.0),
        Face((-90.0, 10.0, -50.0, 60.0), 1.0),  # in the margin only
        Face((10.0, 100.0, 50.0, 150.0), 1.0),
    ],
)
def test_a_face_that_can_be_none_of_the_picture_is_dropped(face: Face) -> None:
    class Wrong(Fixed):
        def detect(self, image: Image.Image) -> list[Face]:
            return [face.moved(image.width / 200), *super().detect(image)]

    assert [found.box for found in detect_faces(PICTURE, Wrong(LEFT, RIGHT))] == [
        pytest.approx(LEFT),
        pytest.approx(RIGHT),
    ]
    assert detect_faces(PICTURE, Wrong()) == []


def test_narrow_pictures_have_no_faces_and_the_same_ones_always(test_data: Path) -> None:
    yunet = YuNetDetector(test_data / "models" / "face_detection_yunet_2023mar.onnx")
    shapes, seen = [], yunet._net

    class Net:
        def setInputSize(self, size: tuple[int, int]) -> None:
            shapes.append(size)
            seen.setInputSize(size)

        def detect(self, pixels: np.ndarray) -> object:
            return seen.detect(pixels)

    yunet._net = Net()
    photo = load_image(test_data / "photos" / "astronaut.png")
    first = find_face(photo, yunet)
    for width, height in [(640, 16), (640, 32), (1000, 33), (20, 400), (16, 16)]:
        for _ in range(3):
            for colour in ("white", "black", "grey"):
                assert detect_faces(Image.new("RGB", (width, height), colour), yunet) == []
    again = find_face(photo, yunet)
    assert again.box == first.box and again.score == first.score
    assert min(map(min, shapes)) == 64


def test_a_face_in_a_narrow_view_keeps_its_place(test_data: Path) -> None:
    """What is padded is beyond the right and the lower edge."""
    yunet = YuNetDetector(test_data / "models" / "face_detection_yunet_2023mar.onnx")
    head = load_image(test_data / "photos" / "astronaut.png").crop((150, 30, 300, 210)).resize((40, 48))
    strip = Image.new("RGB", (400, 48), "grey")
    strip.paste(head, (300, 0))
    (face,) = yunet.detect(strip)
    x0, y0, x1, y1 = face.box
    assert 300 < x0 < x1 < 340 and -2 < y0 < y1 < 50


def test_haar_calls_noise_no_face() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert HaarDetector().detect(Image.fromarray(noise).resize((384, 384))) == []


def test_haar_finds_avatars() -> None:
    avatars = pytest.importorskip("face_fusion_pipeline.avatars")
    seeds = range(1_100_000, 1_100_012)
    fixed = {"yaw": 0.0, "style": "photo", "expression": "neutral"}
    scenes = [avatars.sample_scene(seed, identities=[seed], **fixed) for seed in seeds]
    rendered = avatars.render(scenes, size=128)
    found = 0
    for pixels, boxes in zip(rendered.images, rendered.boxes, strict=True):
        faces = detect_faces(load_image(pixels.permute(1, 2, 0).numpy().clip(0, 1)), HaarDetector())
        truth = tuple(map(float, boxes[0]))
        found += any(iou(face.box, truth) > 0.3 for face in faces)  # type: ignore[arg-type]
    assert found >= 6  # 9 as measured; one near the threshold may fall on either side of it by another rounding


@pytest.mark.parametrize("name", ["haar", "yunet"])
def test_photographs(name: str, test_data: Path) -> None:
    yunet = YuNetDetector(test_data / "models" / "face_detection_yunet_2023mar.onnx")
    detector = yunet if name == "yunet" else HaarDetector()
    folder = test_data / "photos"
    for path in [folder / "astronaut.png", *sorted(folder.glob("*/*.jpg"))[::16]]:
        image = load_image(path)
        face, truth = find_face(image, detector), find_face(image, yunet)
        assert iou(face.box, truth.box) > 0.5, path.name  # the box convention holds for both
    assert truth.landmarks5 is not None
    x0, y0, x1, y1 = truth.box
    assert ((truth.landmarks5 > (x0, y0)) & (truth.landmarks5 < (x1, y1))).all()


def test_two_people_in_one_photo(test_data: Path) -> None:
    paths = sorted((test_data / "photos" / "london").glob("*_03.jpg"))[:2]
    both = Image.new("RGB", (800, 400))
    for x, path in zip((0, 400), paths, strict=True):
        both.paste(load_image(path).resize((400, 400)), (x, 0))
    with pytest.raises(SeveralFacesError):
        find_face(both, HaarDetector())
    assert find_face(both, HaarDetector(), face_index=1).box[0] > 400


def test_a_file_that_is_no_picture_is_named_without_internals(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a picture")
    with pytest.raises(UnreadableImageError, match=r"notes\.txt is not a picture: give a JPEG") as caught:
        load_image(tmp_path / "notes.txt")
    assert "BytesIO" not in str(caught.value)
