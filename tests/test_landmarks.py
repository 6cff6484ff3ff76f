"""72 facial points: where they are on avatars, what a pose makes of them, dots, face models of photos and avatars."""

import dataclasses
import importlib.util
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from face_fusion_pipeline import face_landmarkers, face_models
from face_fusion_pipeline.avatars import SPLITS, render, sample_scene
from face_fusion_pipeline.avatars import face_model as avatar_models
from face_fusion_pipeline.avatars.world import sheet
from face_fusion_pipeline.avatars.world.render import rotations
from face_fusion_pipeline.cli import face_model as command
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.control_landmarks import driven_faces, landmark_control, within
from face_fusion_pipeline.face_errors import (
    FaceFusionError,
    InvalidLayoutError,
    LandmarksError,
    ModelNotFoundError,
    NoFaceError,
)
from face_fusion_pipeline.face_landmarks import (
    COLOURS,
    PARTS,
    POINTS,
    Pose,
    angles,
    draw_landmarks,
    eyes_of_eight,
    inter_eye_distance,
    landmark_maps,
    posed,
    rotation,
)
from face_fusion_pipeline.face_models import FaceFit, FaceModel, LinearFaceModel, load_face_model, recombined
from face_fusion_pipeline.generation.photos import locate_face


DATA = Path(os.environ.get("FACE_FUSION_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
ICT, YUNET = DATA / "models" / "ict_landmarks72.safetensors", DATA / "models" / "face_detection_yunet_2023mar.onnx"
TEST = SPLITS["test"].start


@pytest.fixture(scope="module")
def exact():
    return avatar_models.AvatarFaceModel(1)


def fits(exact, *people, size=128, **fixed):
    """The people of a scene of the first world, as exact fits."""
    scene = sample_scene(1, list(people), 1, **fixed)
    return exact.of_scene(scene, size, render([scene], size).boxes[0])


@pytest.fixture(scope="module")
def linear():
    """A model of a head's points with two shapes and two expressions."""
    rng = np.random.default_rng(0)
    neutral = avatar_models.AvatarFaceModel(1)
    base = neutral.head(neutral.of_identity(sample_scene(0, [TEST], 1).people[0].identity), np.eye(7)[0]) * 8
    identity = np.zeros((2, POINTS, 3))
    identity[0, :, 0], identity[1, 27:36] = 0.08 * base[:, 0], rng.normal(size=(9, 3)) * 0.3
    expression = np.zeros((2, POINTS, 3))
    expression[0, PARTS["mouth"][0], 1], expression[1, 17:27, 1] = 0.8, 0.7
    return LinearFaceModel(base, identity, expression, ["up", "brows"])


# --- Points of avatars --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_points_lie_on_what_is_drawn(world):
    """Lids at the border of the eyes, lips at the mouth, the jaw on the outline: by the 68 points and the boxes."""
    scenes = [sample_scene(k, [TEST + k], world, style="photo", yaw=0, pitch=0, roll=0) for k in range(6)]
    drawn = render(scenes, 128)
    for points, old, five, box, depth in zip(
        *(drawn.landmarks72, drawn.landmarks68, drawn.landmarks5, drawn.boxes, drawn.depth), strict=True
    ):
        flat = points[0, :, :2]
        assert points.shape == (1, POINTS, 3)
        assert (flat[52] - old[0, 48]).norm() < 1 and (flat[58] - old[0, 54]).norm() < 1  # corners of the mouth
        assert (flat[17:27] - old[0, 17:27]).norm(dim=-1).max() < 2.5  # brows
        assert (flat[[40, 44]].mean(0) - flat[27]).norm() < 6  # between the eyes
        assert abs(flat[8, 1] - box[0, 3]) < 4 and flat[:17, 1].argmax() == 8  # the chin
        assert (flat[:8, 0].sort().values - flat[:8, 0]).abs().max() < 3  # the jaw goes from the left to the chin
        x, y = (flat[30] - 0.5).round().long().tolist()
        assert abs(points[0, 30, 2] / 64 - depth[y, x]) < 0.05  # the tip of the nose lies on the surface
        eyes = torch.stack([flat[PARTS[name][0]].mean(0) for name in ("left eye", "right eye")])
        assert (eyes - five[0, :2]).norm(dim=-1).max() < 3


@pytest.mark.parametrize("world", [1, 2])
def test_the_exact_model_of_avatars_has_the_points_of_the_render(world):
    model = avatar_models.AvatarFaceModel(world)
    assert isinstance(model, FaceModel)
    scene = sample_scene(5, [TEST, TEST + 1], world, yaw=22, pitch=-5, roll=9, expression="laughing")
    drawn = render([scene], 128)
    for fit, true in zip(model.of_scene(scene, 128), drawn.landmarks72[0], strict=True):
        assert np.abs(model.points(fit.shape, fit.expression, fit.pose) - true.numpy()).max() < 1e-3
    with pytest.raises(LandmarksError, match="read no pictures"):
        model.fit(Image.new("RGB", (64, 64)))


def test_recombined_points_are_those_of_the_true_render(exact):
    """The source in the driver's pose and expression, as if it had been drawn there."""
    (source,) = fits(exact, TEST, yaw=-10)
    driving = sample_scene(3, [TEST + 1], 1, yaw=20, pitch=4, expression="surprised")
    (driver,) = exact.of_scene(driving, 128)
    person = driving.people[0]
    truth = sample_scene(3, [TEST], 1, yaw=20, pitch=4, expression="surprised")
    assert truth.people[0].x == person.x and truth.people[0].scale == person.scale
    drawn = render([truth], 128).landmarks72[0][0].numpy()
    assert np.abs(recombined(exact, source, driver) - drawn).max() < 1e-3


# --- Invariants ---------------------------------------------------------------------------------------------------


def test_source_and_driver_alike_give_the_photos_own_points(exact):
    (fit,) = fits(exact, TEST + 2, yaw=15, expression="sad")
    own = exact.points(fit.shape, fit.expression, fit.pose)
    assert np.array_equal(recombined(exact, fit, fit), own)
    drawn = landmark_control(fit, fit, face_model=exact)
    assert drawn.tobytes() == draw_landmarks(own, 128).tobytes()
    assert drawn.tobytes() == landmark_control(fit, face_model=exact).tobytes()


def test_the_neutral_frontal_face_does_not_depend_on_the_driver(exact):
    (source,) = fits(exact, TEST)
    front = {"yaw": 0, "pitch": 0, "roll": 0, "expression": "neutral", "size": (128, 128)}
    (one,) = fits(exact, TEST + 1, yaw=20, expression="angry")
    (two,) = fits(exact, TEST + 1, yaw=-5, expression="smiling")
    box = [one.box]
    pictures = [
        landmark_control(source, driver, face_model=exact, face_boxes=box, **front)
        for driver in (replaced(one, box[0]), replaced(two, box[0]), replaced(one, box[0]))
    ]
    assert len({picture.tobytes() for picture in pictures}) == 1
    assert pictures[0].tobytes() != landmark_control(source, one, face_model=exact).tobytes()


def replaced(fit, box):
    """The fit, with its head in the same place whoever it is."""
    return FaceFit(fit.shape, fit.expression, Pose(fit.pose.yaw, fit.pose.pitch, 0, 64, 64, 40), box, fit.size)


def test_swapped_people_swap_their_points(exact):
    ada, bob = fits(exact, TEST, TEST + 1)
    drivers = fits(exact, TEST + 2, TEST + 3, yaw=12)
    both = landmark_control([ada, bob], drivers, face_model=exact)
    swapped = landmark_control([bob, ada], drivers, face_model=exact)
    assert both.tobytes() != swapped.tobytes()
    left, right = (np.asarray(picture)[:, :64] for picture in (both, swapped))
    alone = np.asarray(landmark_control(bob, drivers[0], face_model=exact))[:, :64]
    assert np.array_equal(right, alone) and not np.array_equal(left, alone)


def test_dots_of_a_batch_equal_single_ones_whatever_the_order_of_faces():
    points = torch.rand(3, 2, POINTS, 2, generator=torch.Generator().manual_seed(0)) * 64
    together = landmark_maps(points, (64, 48))
    assert together.shape == (3, 3, 48, 64) and together.dtype == torch.uint8
    assert all(torch.equal(together[i], landmark_maps(points[i : i + 1], (64, 48))[0]) for i in range(3))
    assert torch.equal(together, landmark_maps(points.flip(1), (64, 48)))
    beyond = points.clone()
    beyond[:, 1] = torch.nan  # nobody
    assert torch.equal(landmark_maps(beyond, (64, 48)), landmark_maps(points[:, :1], (64, 48)))


# --- Dots and poses -----------------------------------------------------------------------------------------------


def test_dots_have_the_colours_of_their_parts():
    points = np.stack([np.arange(POINTS) % 12 * 40 + 20, np.arange(POINTS) // 12 * 40 + 20], 1) + 0.5
    picture = np.asarray(draw_landmarks(points, 512))
    found = picture[(points[:, 1] - 0.5).astype(int), (points[:, 0] - 0.5).astype(int)]
    assert np.array_equal(found, COLOURS.numpy())
    counts = [part.stop - part.start for part, _ in PARTS.values()]
    assert counts == [17, 5, 5, 9, 8, 8, 20] and sum(counts) == POINTS
    assert (picture.max(-1) > 127).sum() == pytest.approx(POINTS * np.pi * 9, rel=0.1)  # a radius of 3 at 512
    assert (np.asarray(draw_landmarks(points[:1].repeat(POINTS, 0), 512)).max(-1) > 0).sum() < 60
    assert draw_landmarks(points, (512, 256)).size == (512, 256)


def test_poses_turn_as_the_renderer_does():
    for yaw, pitch, roll in ((10, 20, 30), (-40, -5, 12), (80, -60, -100)):
        matrix = rotation(yaw, pitch, roll)
        expected = rotations(*(torch.tensor([float(value)]) for value in (yaw, pitch, roll)))[0]
        np.testing.assert_allclose(matrix, expected, atol=1e-6)
        np.testing.assert_allclose(angles(matrix), (yaw, pitch, roll), atol=1e-6)
    nose = posed(np.array([[0.0, 0.0, 1.0]]), Pose(yaw=30, pitch=10, x=50, y=50, scale=10))
    assert nose[0, 0] > 50 and nose[0, 1] < 50  # to the right and up
    assert Pose(x=1, y=2, scale=3).moved(2, 10, 20) == Pose(x=12, y=24, scale=6)


def test_eyes_of_six_become_eyes_of_eight():
    circle = np.array([[-1, 0], [-0.5, 0.75], [0.5, 0.75], [1, 0], [0.5, -0.75], [-0.5, -0.75]])
    points = np.zeros((68, 2))
    points[36:42], points[42:48] = circle, circle + 5
    eight = eyes_of_eight(points)[PARTS["left eye"][0]]
    assert eight.shape == (8, 2) and np.allclose(eight[[0, 4]], [[-1, 0], [1, 0]])
    assert np.allclose(eight[2, 0], 0) and eight[2, 1] > eight[1, 1] and eight[6, 1] < 0
    with pytest.raises(LandmarksError, match=r"\(5, 2\)"):
        eyes_of_eight(np.zeros((5, 2)))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((68, 2)), r"got \(1, 68, 2\)"),
        (np.full((72, 2), np.nan), "not finite"),
        (np.full((72, 2), 500.0), "no point of the face around"),
        ("a face", "numbers"),
        ([[1, 2], [3]], "numbers"),
    ],
)
def test_points_that_are_none_are_refused(points, message):
    with pytest.raises(LandmarksError, match=message):
        draw_landmarks(points, 128)


@pytest.mark.parametrize("bad", [{"yaw": "left"}, {"pitch": 181}, {"roll": float("nan")}, {"scale": 0}, {"x": None}])
def test_poses_that_are_none_are_refused(bad):
    (name,) = bad
    with pytest.raises(LandmarksError, match=name):
        Pose(**bad)


# --- landmark_control ---------------------------------------------------------------------------------------------


def test_a_pose_by_numbers_drives(exact):
    (source,) = fits(exact, TEST)
    turned = landmark_control(source, yaw=25, expression="smiling", face_model=exact)
    expected = exact.points(source.shape, exact.expression_of("smiling"), Pose(25, source.pose.pitch, source.pose.roll,
                            source.pose.x, source.pose.y, source.pose.scale))  # fmt: skip
    assert turned.tobytes() == draw_landmarks(expected, 128).tobytes()
    place = Pose(yaw=10, x=100, y=90, scale=60)
    posed_there = landmark_control(source, place, face_model=exact, size=(200, 160))
    assert posed_there.size == (200, 160)
    with pytest.raises(LandmarksError, match="size="):
        landmark_control(source, place, face_model=exact)
    with pytest.raises(LandmarksError, match="no point of the face"):
        landmark_control(source, Pose(x=900, y=90, scale=60), face_model=exact, size=(128, 128))
    with pytest.raises(LandmarksError, match="yaw must be degrees"):
        landmark_control(source, yaw=999, face_model=exact)
    with pytest.raises(LandmarksError, match="unknown expression 'bored': choose from neutral, smiling"):
        landmark_control(source, expression="bored", face_model=exact)
    with pytest.raises(FaceFusionError, match="a source, a driver or both"):
        landmark_control(face_model=exact)
    with pytest.raises(LandmarksError, match="no face of its own"):
        landmark_control(None, place, face_model=exact, size=(128, 128))


def test_faces_go_into_their_boxes(exact):
    (source,), (driver,) = fits(exact, TEST), fits(exact, TEST + 1, yaw=10)
    boxes = [(10, 10, 50, 60), (70, 20, 110, 70)]
    picture = np.asarray(landmark_control([source, source], driver, face_model=exact, face_boxes=boxes)).max(-1)
    for x0, y0, x1, y1 in boxes:
        rows, columns = np.nonzero(picture[y0 - 5 : y1 + 5, x0 - 5 : x1 + 5])
        assert len(rows) > 50 and abs(columns.mean() - (x1 - x0 + 10) / 2) < 8
    with pytest.raises(InvalidLayoutError, match="1 boxes for 2 faces"):
        landmark_control([source, source], [driver, driver], face_model=exact, face_boxes=boxes[:1])
    with pytest.raises(InvalidLayoutError, match="3 drivers for 2 people"):
        landmark_control([source, source], [driver] * 3, face_model=exact)
    with pytest.raises(InvalidLayoutError, match="lies outside"):
        landmark_control(source, driver, face_model=exact, face_boxes=[(300, 0, 400, 90)])


@pytest.mark.parametrize(
    ("shape", "most", "expected"),
    [((3000, 2000), (512, 512), (512, 344)), ((64, 64), (128, 128), (128, 128)), ((9, 900), (512, 512), (8, 512))],
)
def test_a_picture_is_as_large_as_its_model_draws_and_not_as_its_driver_is(exact, shape, most, expected):
    assert within(shape, most) == expected
    (source,) = fits(exact, TEST)
    large = dataclasses.replace(source, pose=source.pose.moved(4, 0, 0), size=(512, 512))
    large = dataclasses.replace(large, box=tuple(4 * side for side in source.box))
    driven = driven_faces(exact, [source], large, lambda photo: [], default_size=(128, 128))
    assert driven.size == (128, 128)
    np.testing.assert_allclose(driven.points[0], exact.points(source.shape, source.expression, source.pose), atol=1e-6)
    assert driven_faces(exact, [source], large, lambda photo: []).size == (512, 512)  # the dots alone


def test_a_driver_without_a_face_is_refused(exact):
    (source,) = fits(exact, TEST)
    with pytest.raises(NoFaceError, match="no face found in the 64x64 driver"):
        landmark_control(source, Image.new("RGB", (64, 64)), face_model=exact, face_detector="haar")


# --- Linear models ------------------------------------------------------------------------------------------------


def test_a_fit_finds_shape_expression_and_pose(linear):
    pose = Pose(18, -7, 12, 200, 220, 12)
    shape, expression = np.array([1.2, -0.8]), np.array([0.7, 0.0])
    seen = linear.points(shape, expression, pose)
    fit = linear.fit_points(seen)
    np.testing.assert_allclose(fit.shape, shape, atol=0.25)
    np.testing.assert_allclose(fit.expression, expression, atol=0.15)
    np.testing.assert_allclose(angles_of(fit.pose), (18, -7, 12), atol=1.5)
    again = linear.points(fit.shape, fit.expression, fit.pose)
    assert np.abs(again - seen)[:, :2].max() < 0.03 * inter_eye_distance(seen)
    assert isinstance(linear, FaceModel) and linear.expression_of({"up": 0.5}).tolist() == [0.5, 0]
    weights = face_models.default_weights()
    weights[::9] = 0
    apart = linear.fit_points(np.where(weights[:, None] == 0, 0, seen[:, :2]), weights)  # what is unknown is not used
    np.testing.assert_allclose(angles_of(apart.pose), (18, -7, 12), atol=2)


def angles_of(pose):
    return pose.yaw, pose.pitch, pose.roll


def test_what_no_face_has_is_refused(linear):
    rng = np.random.default_rng(1)
    with pytest.raises(LandmarksError, match="take a photo that shows it more from the front"):
        linear.fit_points(rng.random((72, 2)) * 100)
    profile = linear.points(np.zeros(2), np.zeros(2), Pose(yaw=85, x=100, y=100, scale=10))
    with pytest.raises(LandmarksError, match="turned by 8"):
        linear.fit_points(profile)


def test_a_model_learns_where_a_landmarker_sees_its_points(linear):
    """Of faces in many poses, whose points a landmarker sees beside the model's."""
    rng = np.random.default_rng(2)
    beside = np.zeros((POINTS, 3))
    beside[PARTS["nose"][0], 1], beside[PARTS["mouth"][0], 0] = 0.4, -0.3
    other = LinearFaceModel(linear.neutral + beside, linear._modes[:2], linear._modes[2:], ["up", "brows"])
    seen = []
    for _ in range(24):
        pose = Pose(*rng.uniform(-12, 12, 3), 100, 100, 10)
        shape, expression = rng.normal(size=2), np.array([rng.uniform(0, 1), 0])
        seen.append(other.points(shape, expression, pose)[:, :2])
    learned = linear.calibrated([*seen, np.random.default_rng(1).random((72, 2)) * 100])  # the last is no face

    def error(model):
        fits = [model.fit_points(points) for points in seen]
        found = [model.points(fit.shape, fit.expression, fit.pose)[:, :2] for fit in fits]
        return np.mean([np.linalg.norm(a - b, axis=1).mean() for a, b in zip(found, seen, strict=True)])

    assert error(learned) < 0.5 * error(linear)
    assert learned.neutral[:, 2] == pytest.approx(linear.neutral[:, 2] - (linear.neutral - learned.neutral)[0, 2])
    assert np.array_equal(learned._modes, linear._modes) and learned.expressions == linear.expressions
    with pytest.raises(LandmarksError, match="none of 1 faces can be fitted"):
        linear.calibrated([rng.random((72, 2)) * 100])


@pytest.mark.parametrize("found", [19, 20])
def test_the_command_learns_from_photos_of_enough_people(linear, tmp_path, monkeypatch, capsys, found):
    class Finder:
        name = "toy"

        def find(self, image, box):
            return linear.points(np.zeros(2), np.zeros(2), Pose(x=64, y=64, scale=10))[:, :2]

    monkeypatch.setattr(face_landmarkers, "load_landmarker", lambda name: Finder())
    located = iter(range(99))
    photo = SimpleNamespace(image=Image.new("RGB", (9, 9)), face=SimpleNamespace(box=(0, 0, 9, 9)))

    def locate(path, detector):
        if next(located) >= found:
            raise NoFaceError("no face")
        return photo

    monkeypatch.setattr("face_fusion_pipeline.generation.photos.locate_face", locate)
    (tmp_path / "photos").mkdir()
    for number in range(21):
        Image.new("RGB", (9, 9)).save(tmp_path / "photos" / f"{number}.png")
    linear.save(tmp_path / "model.safetensors")
    words = ["face-model", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "out.safetensors")]
    words += ["--photos", str(tmp_path / "photos"), "--detector", "haar"]
    assert main(words) == (2 if found < 20 else 0)
    said = capsys.readouterr()
    if found < 20:
        assert "19 photos show one face, 20 or more are needed" in said.err
    else:
        assert "20 photos" in said.out
        np.testing.assert_allclose(load_face_model(tmp_path / "out.safetensors").neutral, linear.neutral, atol=0.05)
    assert main([*words[:4], "--landmarker", "x"]) == 2 and main([*words[:4], "--photos", "nowhere"]) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [("bored", "unknown expression"), ({"up": 2}, "from 0 to 1"), ([1, 2, 3], "2 finite numbers")],
)
def test_expressions_that_are_none_are_refused(linear, given, message):
    with pytest.raises(LandmarksError, match=message):
        linear.expression_of(given)


def test_a_model_is_saved_and_read(linear, tmp_path, monkeypatch):
    linear.save(tmp_path / "face.safetensors")
    read = load_face_model(tmp_path / "face.safetensors")
    pose = Pose(5, x=10, y=10, scale=3)
    args = np.array([1.0, 0.5]), np.array([0.2, 0.3]), pose
    np.testing.assert_allclose(read.points(*args), linear.points(*args), atol=1e-3)
    assert load_face_model(read) is read
    monkeypatch.setenv("FACE_FUSION_FACE_MODEL", str(tmp_path / "face.safetensors"))
    assert load_face_model().expressions == ("up", "brows")
    monkeypatch.delenv("FACE_FUSION_FACE_MODEL")
    with pytest.raises(ModelNotFoundError, match="face-fusion face-model"):
        load_face_model()
    with pytest.raises(ModelNotFoundError, match="there is no face model"):
        load_face_model(tmp_path / "none.safetensors")
    with pytest.raises(FaceFusionError, match="has `fit`"):
        load_face_model(3)
    for tensors, metadata in (
        ({"weight": torch.zeros(2)}, {}),
        ({name: torch.zeros(2, 72, 3) for name in ("neutral", "identity", "expression")}, {}),
        ({"neutral": torch.zeros(68, 3), "identity": torch.zeros(1, 68, 3), "expression": torch.zeros(1, 68, 3)},
         {"expression_names": '["a"]'}),
    ):  # fmt: skip
        save_file(tensors, tmp_path / "other.safetensors", metadata)
        with pytest.raises(LandmarksError, match="face model"):
            load_face_model(tmp_path / "other.safetensors")


def test_a_clone_of_ict_facekit_becomes_a_model(tmp_path, capsys):
    folder = tmp_path / "ICT-FaceKit" / "FaceXModel"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    vertices = rng.random((max(command.VERTICES) + 10, 3)).round(3)
    meshes = {"generic_neutral_mesh": vertices, "identity000": vertices + 1, "jawOpen": vertices + [0, 0.5, 0]}
    for name, rows in meshes.items():
        lines = ["# a mesh", *(f"v {x:.3f} {y:.3f} {z:.3f}" for x, y, z in rows), "f 1/1 2/2 3/3"]
        (folder / f"{name}.obj").write_text("\n".join(lines))
    out = tmp_path / "face.safetensors"
    assert main(["face-model", str(folder.parent), "--out", str(out)]) == 0
    arrays, names = face_models.read_face_model(out)
    assert names == ["jawOpen"] and arrays["identity"].shape == (1, 72, 3)
    np.testing.assert_allclose(arrays["expression"][0], np.tile([0, 0.5, 0], (72, 1)), atol=1e-5)
    (folder / "jawOpen.obj").write_text("v 1 2 3\n")
    assert main(["face-model", str(folder), "--out", str(out)]) == 2
    assert main(["face-model", str(tmp_path), "--out", str(out)]) == 2
    assert main(["face-model", str(folder), "--out", str(tmp_path / "face.bin")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "jawOpen.obj has 1 vertices" in said[0]
    assert "no generic_neutral_mesh.obj" in said[1] and ".safetensors file" in said[2]


# --- Landmarkers --------------------------------------------------------------------------------------------------


def test_landmarkers_that_are_not_there_say_the_way(tmp_path, monkeypatch):
    monkeypatch.delenv("FACE_FUSION_LANDMARKER", raising=False)
    with pytest.raises(ModelNotFoundError, match="FACE_FUSION_LANDMARKER"):
        face_landmarkers.load_landmarker()
    with pytest.raises(ModelNotFoundError, match="there is no landmark model"):
        face_landmarkers.load_landmarker(tmp_path / "none.tflite")
    with pytest.raises(FaceFusionError, match="`name` and `find`"):
        face_landmarkers.load_landmarker(3)
    task = tmp_path / "face.task"
    with zipfile.ZipFile(task, "w") as archive:
        archive.writestr("other.tflite", b"x")
    with pytest.raises(ModelNotFoundError, match=r"has no face_landmarks_detector\.tflite"):
        face_landmarkers.load_landmarker(task)
    (tmp_path / "no.tflite").write_bytes(b"nothing")
    with pytest.raises(ModelNotFoundError, match=r"\[landmarks\]|cannot|no model"):
        face_landmarkers.load_landmarker(tmp_path / "no.tflite")
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert", None)
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ModelNotFoundError, match=r"pip install 'face-fusion-pipeline\[landmarks\]'"):
        face_landmarkers.load_landmarker(tmp_path / "no.tflite")
    monkeypatch.setitem(__import__("sys").modules, "insightface", None)
    monkeypatch.setitem(__import__("sys").modules, "insightface.app", None)
    with pytest.raises(ModelNotFoundError, match=r"\[insightface\]"):
        face_landmarkers.load_landmarker("insightface")


needs_photos = pytest.mark.skipif(
    not (ICT.is_file() and YUNET.is_file() and os.environ.get("FACE_FUSION_LANDMARKER")
         and importlib.util.find_spec("ai_edge_litert")),
    reason="needs the test data, ai-edge-litert, and MediaPipe's face_landmark.tflite in $FACE_FUSION_LANDMARKER",
)  # fmt: skip


@pytest.fixture(scope="module")
def photo_model():
    return load_face_model(ICT, os.environ["FACE_FUSION_LANDMARKER"])


@needs_photos
def test_photos_are_fitted_and_turned(photo_model, monkeypatch):
    monkeypatch.setenv("FACE_FUSION_YUNET", str(YUNET))
    held, errors = np.arange(18, 72, 6), []
    for path in sorted((DATA / "photos" / "synthetic").glob("sfhq_*.jpg"))[:6]:
        photo = locate_face(path)
        seen = photo_model.landmarker.find(photo.image, photo.face.box)
        weights = face_models.default_weights()
        weights[held] = 0
        fit = photo_model.fit_points(seen, weights)
        found = photo_model.points(fit.shape, fit.expression, fit.pose)[:, :2]
        errors.append(np.linalg.norm(found - seen, axis=1)[held].mean() / inter_eye_distance(seen))
        assert abs(fit.pose.yaw) < 20 and abs(fit.pose.roll) < 10
        neutral = photo_model.expression_of("neutral")
        heads = [photo_model.points(fit.shape, neutral, Pose(yaw=yaw)) for yaw in (0, 30)]
        np.testing.assert_allclose(heads[0] @ rotation(0, 0, 0), heads[0])
        back = (heads[1] * [1, -1, 1]) @ rotation(30, 0, 0) * [1, -1, 1]
        np.testing.assert_allclose(back, heads[0], atol=1e-6)  # a head that is turned keeps its shape
    assert np.median(errors) < 0.06


@needs_photos
def test_two_photos_of_a_person_have_nearer_shapes(photo_model, monkeypatch):
    monkeypatch.setenv("FACE_FUSION_YUNET", str(YUNET))
    paths = sorted((DATA / "photos" / "london").glob("*.jpg"))
    shapes = [photo_model.fit(locate_face(path).image).shape for path in paths]
    neutral = photo_model.expression_of("neutral")
    heads = [photo_model.points(shape, neutral, Pose()) for shape in shapes]
    still = np.stack([points[:52].ravel() for points in heads])  # all but the mouth
    still -= still.mean(0)
    still /= np.linalg.norm(still, axis=1, keepdims=True)
    alike = still @ still.T
    people = [path.name[:3] for path in paths]
    pairs = [(i, j) for i in range(len(paths)) for j in range(i)]
    same = np.array([alike[i, j] for i, j in pairs if people[i] == people[j]])
    other = np.array([alike[i, j] for i, j in pairs if people[i] != people[j]])
    assert (same[:, None] > other).mean() >= 0.75


# --- The command generate -----------------------------------------------------------------------------------------


def words_of(folder, *more):
    words = ["--face", str(folder / "ada.png"), "--prompt", "a photo of a person", "--out", str(folder / "out")]
    return ["generate", *words, "--steps", "1", "--num-images", "1", "--no-sheet", *more]


@pytest.fixture(scope="module")
def portraits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("portraits")
    sheet.portrait(TEST + 4).save(folder / "ada.png", format="PNG")
    return folder


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--yaw", "20", "--model", "MODEL"], "has no weights that see a pose"),
        (["--control-scale", "1"], "--control-scale goes with --driver or a pose"),
        (["--driver", "nobody.png"], "there is no driver nobody.png"),
        (["--yaw", "200"], "--yaw must be"),
        (["--face", "ada.safetensors", "--yaw", "2"], "identity"),
    ],
)
def test_a_pose_that_cannot_be_taken_is_refused_in_one_line(portraits, more, message, capsys):
    model = portraits / "model"  # a folder that holds none
    model.mkdir(exist_ok=True)
    (model / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert main(words_of(portraits, *(str(model) if word == "MODEL" else word for word in more))) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0]


def test_generate_draws_the_person_in_a_pose(portraits):
    from diffusers import UNet2DConditionModel

    from face_fusion_pipeline import embedded_model
    from face_fusion_pipeline.avatars.training.controlnet import create_controlnet

    unet = UNet2DConditionModel.from_pretrained(embedded_model() / "unet")
    create_controlnet(unet, reads_text=False).save_pretrained(portraits / "net")
    avatar_models.save_estimator(avatar_models.FaceEstimator(), portraits / "landmarks.safetensors", {"world": 1})
    more = ["--driver", str(portraits / "ada.png"), "--yaw", "10", "--expression", "smiling"]
    more += ["--controlnet", str(portraits / "net"), "--face-model", str(portraits / "landmarks.safetensors")]
    assert main(words_of(portraits, *more)) == 0
    (picture,) = (portraits / "out").glob("*.png")
    with Image.open(picture) as image:
        assert image.size == (128, 128)
        written = json.dumps({name: str(value) for name, value in image.info.items()})
    assert "posed" in written and "smiling" in written and "ada.png" not in written


# --- The estimator of avatars -------------------------------------------------------------------------------------


def test_the_estimator_is_trained_by_one_command_saved_and_read(tmp_path):
    words = ["--data", str(tmp_path / "data"), "--render", "24", "--size", "64", "--world", "2", "--threads", "1"]
    words += ["--batch-size", "6", "--precision", "no"]
    out = tmp_path / "out"
    assert main(["avatars-train", "landmarks", *words, "--out", str(out), "--steps", "2"]) == 0
    model = avatar_models.load_avatar_face_model(out)
    assert model.world == 2 and isinstance(model, FaceModel)
    scene = sample_scene(1, [TEST], 2, style="photo")
    drawn = render([scene], 64)
    photo = Image.fromarray((drawn.images[0] * 255).round().byte().permute(1, 2, 0).numpy())
    fit = model.fit(photo, tuple(drawn.boxes[0][0].tolist()))
    assert fit.size == (64, 64) and fit.expression.sum() == 1 and 0 <= fit.shape.min() <= fit.shape.max() <= 1
    assert model.points(fit.shape, fit.expression, fit.pose).shape == (POINTS, 3)
    report = json.loads((out / "training.json").read_text())
    assert "landmarks" in report
    next_words = [*words, "--out", str(tmp_path / "next"), "--steps", "1", "--continue-from", str(out)]
    assert main(["avatars-train", "landmarks", *next_words]) == 0
    save_file({"weight": torch.zeros(2)}, tmp_path / "landmarks.safetensors")
    with pytest.raises(LandmarksError, match="no face model of avatars"):
        avatar_models.load_avatar_face_model(tmp_path)
    with pytest.raises(ModelNotFoundError, match="avatars-train landmarks"):
        avatar_models.load_avatar_face_model(tmp_path / "nothing.safetensors")


def test_numbers_of_a_pose_go_both_ways():
    pose, square = Pose(10, -5, 3, 61, 70, 44), (5.0, 8.0, 110.0)
    again = avatar_models.pose_of_numbers(avatar_models.pose_numbers(pose, square), square)
    np.testing.assert_allclose([*angles_of(again), again.x, again.y, again.scale], [10, -5, 3, 61, 70, 44])
    from face_fusion_pipeline.avatars.training.landmarks import in_square

    numbers = in_square(torch.tensor([[10.0, -5, 3, 61, 70, 44]]), torch.tensor([square]))
    np.testing.assert_allclose(numbers[0], avatar_models.pose_numbers(pose, square), atol=1e-5)


def test_the_dots_of_everybody_are_what_a_controlnet_of_landmarks_learns_from(tmp_path):
    from face_fusion_pipeline.avatars.training.controlnet import load_dots
    from face_fusion_pipeline.avatars.training.data import render_avatars
    from face_fusion_pipeline.training.errors import TrainingError

    data = render_avatars(tmp_path, "train", 9, "cpu", 64)
    dots = load_dots(data)
    assert dots.shape == (9, 3, 64, 64) and dots.dtype == torch.uint8
    alone = [row for row, record in enumerate(data.records) if record["people"] == 1][0]
    points = np.array(data.records[alone]["landmarks72"])
    assert np.array_equal(dots[alone].permute(1, 2, 0).numpy(), np.asarray(draw_landmarks(points, 64)))
    assert max(record["people"] for record in data.records) == 2
    del data.records[0]["landmarks72"]
    with pytest.raises(TrainingError, match="no 72 facial points: write the dataset again"):
        load_dots(data)
