"""The avatar world: determinism, identity apart from scene, geometry that agrees with the pixels, real evaluators."""

import json
import math

import numpy as np
import pytest
import torch

from face_fusion_pipeline.avatars import (
    CLOTHINGS,
    EXPRESSIONS,
    GENES,
    SPLITS,
    STYLES,
    caption,
    full_caption,
    render,
    sample_identity,
    sample_scene,
    split_of,
)
from face_fusion_pipeline.avatars.world import dataset, identity, raycast, shade, sheet
from face_fusion_pipeline.avatars.world.identity import (
    BEARDS,
    DYED_HAIR,
    EYE_COLOURS,
    GLASSES,
    HAIR_COLOURS,
    HAIR_STYLES,
    SKIN_TONES,
)


# Means of 16 x 16 pixels of one scene of the first world, by channel, as of the release that its weights came with.
FIRST_WORLD = [
    [
        [86.2, 101.1, 95.9, 88.9],
        [76.6, 108.8, 102.6, 79.0],
        [84.1, 104.3, 98.4, 87.7],
        [77.4, 68.4, 68.4, 82.5],
    ],
    [
        [100.5, 63.2, 59.4, 110.4],
        [77.5, 75.5, 69.0, 85.5],
        [121.0, 72.4, 73.3, 127.7],
        [116.5, 82.7, 87.4, 123.8],
    ],
    [
        [171.8, 129.7, 124.9, 184.7],
        [139.7, 102.5, 97.5, 150.3],
        [191.4, 59.5, 68.4, 202.2],
        [195.1, 151.3, 159.4, 203.3],
    ],
]


@pytest.fixture(autouse=True)
def second_world(monkeypatch):
    """What is tested is the world that weights to come are made for."""
    monkeypatch.setattr(identity, "WORLD", 2)


def test_the_first_world_stays_as_the_shipped_weights_know_it():
    """Pixels of a scene as they were when the weights were trained, and everybody's colours."""
    person = sample_identity(7, 1)
    assert person.world == 1 and sample_identity(7).world == 2
    drawn = render([sample_scene(3, [7], 1, style="photo", background="plain blue", expression="sad")], 64)
    found = (drawn.images[0] * 255).round().reshape(3, 4, 16, 4, 16).mean((2, 4))
    expected = torch.tensor(FIRST_WORLD)
    assert torch.allclose(found, expected, atol=0.5)
    with pytest.raises(ValueError, match="world is 3"):
        sample_identity(7, 3)
    with pytest.raises(ValueError, match=r"worlds \[1, 2\]"):
        render([sample_scene(1, [sample_identity(1, 1), sample_identity(2, 2)])], 64)


def test_identity_is_a_function_of_its_seed_and_splits_are_disjoint():
    one, again, other = sample_identity(7), sample_identity(7), sample_identity(8)
    assert torch.equal(one.vector, again.vector)
    assert not torch.equal(one.vector, other.vector)
    assert one.vector.shape == (len(GENES),)
    assert one.vector.min() >= 0 and one.vector.max() <= 1
    seeds = [{r.start, r.stop - 1} for r in SPLITS.values()]
    assert [split_of(s) for pair in seeds for s in sorted(pair)] == [n for n in SPLITS for _ in range(2)]
    with pytest.raises(ValueError, match="9999999"):
        split_of(9_999_999)


def test_same_scene_same_pixels_whatever_else_is_in_the_batch():
    scenes = [sample_scene(k, [k]) for k in range(4)]
    together = render(scenes, 64).images
    alone = render(scenes[2:3], 64).images
    assert torch.equal(together, render(scenes, 64).images)
    assert torch.allclose(together[2], alone[0], atol=2e-3)


def test_pose_and_place_do_not_change_the_person():
    first, second = sample_scene(1, [5]), sample_scene(2, [5])
    assert torch.equal(first.people[0].identity.vector, second.people[0].identity.vector)
    assert (first.people[0].yaw, first.background) != (second.people[0].yaw, second.background)


def test_ray_hits_lie_on_the_ellipsoid_and_normals_point_out():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(1, 3, 3, generator=generator))[0]
    radii, centre = torch.tensor([[0.5, 0.3, 0.4]]), torch.tensor([[0.1, -0.2, 0.3]])
    hits = raycast.cast(centre, axes, radii, torch.zeros(1, dtype=torch.long), batch=1, size=64)
    local = (hits.position - centre) @ axes[0]
    assert torch.allclose((local / radii).square().sum(1), torch.ones(len(local)), atol=1e-4)
    numeric = (local / radii.square()) @ axes[0].T
    assert torch.allclose(hits.normal, torch.nn.functional.normalize(numeric, dim=1), atol=1e-4)
    assert (hits.normal[:, 2] > 0).all()
    # The silhouette of an ellipsoid has the area π √det of the projected quadratic form's inverse.
    q_inverse = (axes[0] * radii.square()) @ axes[0].T
    area = math.pi * torch.linalg.det(q_inverse[:2, :2]).sqrt().item()
    assert len(local) == pytest.approx(area * 32**2, rel=0.03)


def test_equal_depths_have_one_winner():
    same = torch.zeros(3, 3)
    hits = raycast.cast(same, torch.eye(3).expand(3, 3, 3), torch.full((3, 3), 0.3), torch.zeros(3).long(), 1, 32)
    assert len(hits.pixel.unique()) == len(hits.pixel) == hits.depth.isfinite().sum()
    assert set(hits.part.tolist()) == {2}


def test_painting_compiles_whole(monkeypatch):
    """Captured in one graph for any number of pixels, as a GPU wants it."""
    scenes = [sample_scene(k, [k], background="library") for k in range(2)]
    eager = render(scenes, 64).images
    for owner, name in ((shade, "paint_face"), (shade, "paint_eye"), (shade, "paint_glasses")):
        compiled = torch.compile(getattr(owner, name), fullgraph=True, dynamic=True, backend="aot_eager")
        monkeypatch.setattr(owner, name, compiled)
    assert torch.allclose(render(scenes, 64).images, eager, atol=1e-4)


def test_nearest_part_wins():
    centre = torch.tensor([[0.0, 0, 0], [0.0, 0, 0.5]])
    hits = raycast.cast(centre, torch.eye(3).expand(2, 3, 3), torch.full((2, 3), 0.3), torch.zeros(2).long(), 1, 32)
    assert set(hits.part.tolist()) == {1}
    assert hits.depth.max().item() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("people", [1, 2, 3])
def test_ground_truth_fits_the_picture(people):
    scene = sample_scene(50 + people, list(range(people)), yaw=0, style="photo")
    r = render([scene], 128)
    assert r.images.shape == (1, 3, 128, 128) and torch.isfinite(r.images).all()
    assert len(r.boxes[0]) == people and r.landmarks5[0].shape == (people, 5, 2)
    assert r.landmarks68[0].shape == (people, 68, 2)
    for k in range(people):
        x0, y0, x1, y1 = r.boxes[0][k].tolist()
        assert 0 <= x0 < x1 <= 128 and 0 <= y0 < y1 <= 128
        inside = (r.landmarks5[0][k] > torch.tensor([x0, y0])) & (r.landmarks5[0][k] < torch.tensor([x1, y1]))
        assert inside.all()
        eye_left, eye_right, nose, mouth_left, mouth_right = r.landmarks5[0][k].tolist()
        assert eye_left[0] < nose[0] < eye_right[0] and mouth_left[0] < mouth_right[0]
        assert eye_left[1] < nose[1] < mouth_left[1]
        # The middle of the face belongs to this person, and lies in front of the background.
        row, column = int((y0 + y1) / 2), int((x0 + x1) / 2)
        assert r.masks[0, k, row, column] and r.depth[0, row, column] > -2
    assert not r.masks[0, people:].any()
    assert not (r.masks[0].sum(0) > 1).any()
    if people > 1:
        centres = r.boxes[0][:, 0]
        assert (centres[1:] > centres[:-1]).all(), "people stand from left to right"


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_eyes_are_whole_for_every_face_and_expression(expression):
    """The pupil is where the landmark says, with white on both sides, between the lids' landmarks."""
    people = range(40, 54)
    scenes = [
        sample_scene(k, [k], expression=expression, style="photo", yaw=0, pitch=0, roll=0, background="plain gray")
        for k in people
    ]
    rendered = render(scenes, 256)
    for k in range(len(scenes)):
        if sample_identity(people[k]).vector[GENES.index("glasses=none")] == 0:
            continue
        for eye, first in ((0, 36), (1, 42)):
            x, y = rendered.landmarks5[k][0, eye].round().long().tolist()
            assert rendered.images[k, :, y, x].max() < 0.35, (k, eye)
            low, high = (rendered.landmarks68[k][0, first + step] for step in (0, 3))
            for corner, step in ((low, 1), (high, -1)):
                inside = corner + 0.10 * (high - low) * step  # between the corner and the iris
                c, r = inside.round().long().tolist()
                patch = rendered.images[k, :, r - 1 : r + 2, c - 1 : c + 2]
                assert patch.amin(0).max() > 0.45 and (patch.amax(0) - patch.amin(0)).min() < 0.3, (k, eye, step)


def test_anger_leaves_the_colour_of_the_skin_to_be_seen():
    calm, angry = (
        render([sample_scene(9, [k], expression=e, style="photo", yaw=0) for k in range(12)], 128).images
        for e in ("neutral", "angry")
    )
    places = render([sample_scene(9, [k], yaw=0) for k in range(12)], 128).landmarks68
    for k in range(12):
        x, y = places[k][0, 27].long().tolist()  # the root of the nose
        assert (calm[k, :, y, x] - angry[k, :, y, x]).abs().max() < 0.08


def test_depth_is_the_nearest_surface_and_far_outside():
    r = render([sample_scene(3, [3], yaw=0, pitch=0, roll=0)], 128)
    nose = r.landmarks5[0][0, 2].long()
    chest = r.depth[0, 127, 64]
    assert r.depth[0, nose[1], nose[0]] > chest > -2
    assert (r.depth[0, 0, 0] == -2) and not r.masks[0, :, 0, 0].any()


def test_captions_name_the_scene_and_never_the_identity():
    forbidden = set(HAIR_STYLES) | {f"{g} glasses" for g in GLASSES} | set(BEARDS[1:])
    forbidden |= {"hair", "beard", "glasses", "nose", "skin", "elderly", "young", "freckles", "eyes", "bald"}
    wordings = set()
    for k in range(300):
        scene = sample_scene(k, [k, k + 1, k + 2][: 1 + k % 3])
        text = caption(scene)
        assert text == caption(scene)
        words = text.replace(",", "").split()
        assert not forbidden & set(words), text
        assert all(p.clothing in text for p in scene.people)
        assert scene.background.removeprefix("plain ") in text
        assert scene.style == "photo" or scene.style in text or scene.style.split()[0] in text
        if len(scene.people) > 1:
            assert ("two", "three")[len(scene.people) - 2] in text
        wordings.add(text.split(" ")[0] + str(len(words)))
        plain = caption(scene, plain=True)
        assert not {"man", "woman", "child", "men", "women", "children"} & set(plain.replace(",", "").split())
    assert len(wordings) > 12


def _named(gene, prefix, colours):
    found = torch.tensor([gene[f"{prefix}_{c}"] for c in "rgb"])
    return min(colours, key=lambda name: (torch.tensor(colours[name]) - found).square().sum())


def test_full_captions_name_what_is_to_be_seen_of_a_person():
    counts = dict.fromkeys(("hair", "eyes", "skin", "glasses", "beard", "freckles"), 0)
    due = dict.fromkeys(counts, 0)
    for k in range(300):
        scene = sample_scene(k, [k])
        person, text = scene.people[0], full_caption(scene)
        gene = dict(zip(GENES, person.identity.vector.tolist(), strict=True))
        assert text == full_caption(sample_scene(k, [k]))
        assert person.clothing in text and scene.background.removeprefix("plain ") in text
        assert person.identity.kind in text.split() or f" {person.identity.kind}," in text
        coloured = scene.style not in ("pencil sketch", "line art")
        covered = person.clothing in ("crown", "chef's hat", "astronaut suit")
        bald = gene["hair=bald"] > 0
        assert ("a bald head" in text or "no hair" in text) <= bald
        colour = _named(gene, "hair", HAIR_COLOURS)
        for name in HAIR_COLOURS:  # no other colour of hair than the person's
            other = name != colour and not colour.endswith(f" {name}")
            assert not (other and f" {name} hair" in text), (text, colour)
        due["hair"] += not covered
        counts["hair"] += not covered and (bald or not coloured or colour in text)
        eye = _named(gene, "eye", EYE_COLOURS)
        assert not any(f"{name} eyes" in text for name in EYE_COLOURS if name != eye), text
        due["eyes"] += coloured and gene["glasses=tinted"] == 0
        counts["eyes"] += f"{eye} eyes" in text
        tone = list(SKIN_TONES)[round(gene["skin_light"] * 4)]
        due["skin"] += coloured
        counts["skin"] += f"{tone} skin" in text
        for trait, has in (
            ("glasses", gene["glasses=none"] == 0),
            ("freckles", gene["freckles"] > 0),
            ("beard", gene["beard=full"] > 0),
        ):
            assert (trait in text) <= has, text
            due[trait] += has
            counts[trait] += trait in text
        for word, low in (("a long nose", 0.8), ("large ears", 0.8), ("thick brows", 0.8), ("a wide mouth", 0.8)):
            if word in text:
                name = {"nose": "nose_length", "ears": "ear_size", "brows": "brow_thick", "mouth": "mouth_width"}
                assert gene[name[word.split()[-1]]] > low
        for side, sign in (("left", -1), ("right", 1)):
            if f"turned to the {side}" in text or f"facing {side}" in text:
                assert person.yaw * sign > 0
            if f"from the {side}" in text:
                assert scene.light.azimuth * sign > 0
        if not coloured:
            words = (*EYE_COLOURS, *SKIN_TONES)
            assert not any(f"{name} {part}" in text for name in words for part in ("eyes", "skin", "hair"))
    shares = {trait: counts[trait] / due[trait] for trait in due}
    assert shares["hair"] > 0.95 and shares["glasses"] == 1 and shares["beard"] == 1, shares
    assert all(share > 0.6 for share in shares.values()), shares


def test_full_captions_fit_the_text_context_and_share_it_between_people():
    longest = 0
    for k in range(1500):
        scene = dataset.plan("train", k, 5)
        text = full_caption(scene)
        longest = max(longest, len(text.split()) + text.count(",") + text.count("'"))
        assert all(p.clothing in text for p in scene.people), text
        if len(scene.people) > 1:
            assert text.count(" with ") >= len(scene.people) - 1, text
    assert 60 < longest <= 75


def test_three_quarters_of_the_people_have_natural_hair():
    dyed = 0
    for k in range(1000):
        gene = dict(zip(GENES, sample_identity(k).vector.tolist(), strict=True))
        dyed += _named(gene, "hair", HAIR_COLOURS) in DYED_HAIR
    assert 0.1 < dyed / 1000 < 1 / 3


def test_every_expression_outfit_and_style_changes_the_picture():
    def images(**options):
        return [render([sample_scene(9, [9], **{"style": "photo", **options, name: v})], 64).images for v in values]

    for name, values in (("expression", EXPRESSIONS), ("clothing", CLOTHINGS), ("style", STYLES)):
        seen = images()
        for a in range(len(seen)):
            for b in range(a):
                assert (seen[a] - seen[b]).abs().max() > 0.05, (name, values[a], values[b])


@pytest.mark.parametrize(
    ("options", "word"),
    [({"expression": "bored"}, "bored"), ({"hat": "red"}, "hat"), ({"clothing": ["suit", "crown"]}, "2 clothings")],
)
def test_bad_scene_options_name_the_bad_value(options, word):
    with pytest.raises(ValueError, match=word):
        sample_scene(0, [0], **options)
    with pytest.raises(ValueError, match="4"):
        sample_scene(0, [0, 1, 2, 3])


def test_dataset_resumes_and_equals_an_uninterrupted_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert dataset.write(whole, "test", 120, size=32, progress=False) == 120
    assert dataset.write(broken, "test", 100, size=32, progress=False) == 100
    (broken / "metadata.jsonl").unlink()
    assert dataset.write(broken, "test", 120, size=32, progress=False) == 20
    assert (whole / "metadata.jsonl").read_text() == (broken / "metadata.jsonl").read_text()
    rows = [json.loads(line) for line in (whole / "metadata.jsonl").open()]
    assert [r["people"] for r in rows[:10]] == [1] * 7 + [2, 2, 3]
    assert all((whole / r["file_name"]).is_file() and split_of(r["identities"][0]) == "test" for r in rows)
    singles = [r["identities"][0] for r in rows if r["people"] == 1]
    assert singles.count(singles[0]) == 5
    with pytest.raises(ValueError, match="other|begun"):
        dataset.write(whole, "test", 120, size=64, progress=False)


def test_grid_is_labelled():
    grid = sheet.identity_grid(2, 3, size=32)
    assert grid.size == (92 + 3 * 36, 2 * 62)
    assert np.asarray(grid).min() < 60


def test_real_detector_and_recognisers_agree(test_data):
    """YuNet finds ≥ 99 % of near-frontal avatars, IoU ≥ 0.5; photo-trained recognisers tell 100 identities apart."""
    pytest.importorskip("onnxruntime")
    from face_fusion_pipeline.avatars.evaluation.recognition import measure_recognition
    from face_fusion_pipeline.face_detectors import load_detector
    from face_fusion_pipeline.face_recognisers import OnnxRecogniser

    models = test_data / "models"
    recognisers = [OnnxRecogniser(models / f"{name}.onnx") for name in ("mobilefacenet_foamliu", "mobileface_v2")]
    detector = load_detector("yunet", models / "face_detection_yunet_2023mar.onnx")
    report = measure_recognition(recognisers, detector, identities=100, portraits=4)
    assert report["detector"]["found"] >= 0.99
    assert report["detector"]["iou_above_half"] >= 0.99
    assert len(report["auc"]) == 2
    for name, auc in report["auc"].items():
        assert auc >= 0.95, (name, auc)
