"""Measures of avatars: traits, drawing, the distances and the rule by which weights are chosen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from face_fusion_pipeline.avatars import SPLITS, render, sample_identity, sample_scene
from face_fusion_pipeline.avatars.evaluation.evaluators import load_evaluators
from face_fusion_pipeline.avatars.measures import damage, portraits
from face_fusion_pipeline.avatars.measures.agreement import agreement, drawn_anew, renders_passed
from face_fusion_pipeline.avatars.measures.choice import Candidate, candidate, choose, read_table
from face_fusion_pipeline.avatars.measures.crops import eye_bands, features, heads, locate
from face_fusion_pipeline.avatars.measures.drawing import EyeEvaluator, EyeNetwork, load_eye_evaluator
from face_fusion_pipeline.avatars.measures.figures import distances, summarise_measures, trait_fraction
from face_fusion_pipeline.avatars.measures.looks import MEASURES, TRAITS, WORDS, Look
from face_fusion_pipeline.avatars.measures.panel import Seen, load_measures
from face_fusion_pipeline.avatars.measures.traits import SHIPPED, load_traits
from face_fusion_pipeline.avatars.measures.verdicts import Verdicts, read_verdicts, write_verdicts
from face_fusion_pipeline.avatars.training.data import landmarks5
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.evaluation.distribution import kid
from face_fusion_pipeline.evaluation.metrics import bootstrap_normalised
from face_fusion_pipeline.face_errors import FaceFusionError, ModelNotFoundError


VERDICTS = Path(__file__).parent / "data" / "eye_verdicts"
TEST = SPLITS["test"].start


def look(clothing: str = "red shirt", yaw: float = 0.0, **genes: float) -> Look:
    """A person whose genes are all 0 but those given; categories are the first ones."""
    found = Look(torch.zeros(len(sample_identity(0).vector)).tolist(), clothing, yaw)
    found.genes.update(genes)
    return found


# --- What a person looks like ------------------------------------------------------------------------------------


def test_look_reads_what_the_renderer_draws() -> None:
    identity = sample_identity(TEST + 3)
    scene = sample_scene(1, [identity])
    found = Look.of_scene(scene)
    assert found.word("hair style") == found.choice["hair"] and found.genes[f"hair={found.choice['hair']}"] == 1
    assert found.measure("eye spacing") == pytest.approx(float(found.genes["eye_spacing"]))
    assert all(found.word(trait) in WORDS[trait] for trait in WORDS)
    assert all(0 <= found.measure(trait) <= 1 for trait in MEASURES)
    assert look(eye_r=0.2, eye_g=0.45, eye_b=0.75).word("eye colour") == "blue"
    assert look(freckles=0.2).word("freckles") == "yes" and look().word("mole") == "no"
    assert look(age=0.45).measure("lines of age") == 0 and look(age=1.0).measure("lines of age") == 1


def test_only_what_a_picture_can_show_counts() -> None:
    assert look().visible("hair style") and not look("crown").visible("hair style")
    turned = look(yaw=15, mole_x=0.9)
    assert not turned.visible("mole") and look(yaw=-15, mole_x=0.9).visible("mole")
    bearded = look()
    bearded.choice["beard"] = "full"
    assert not bearded.visible("jaw width") and not bearded.visible("mole") and bearded.visible("nose length")
    assert look(eye_spacing=0.5).shows("eye spacing", 0.6) and not look(eye_spacing=0.5).shows("eye spacing", 0.7)
    assert look().shows("mole", "no") and not look().shows("mole", "yes")


# --- Crops, damage, portraits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [128, 256])
def test_eyes_lie_in_the_band_and_heads_are_whole(size: int) -> None:
    scene = sample_scene(3, [TEST + 1], style="photo", yaw=0, pitch=0, roll=0)
    drawn = render([scene], size)
    points = drawn.landmarks5[0][:1]
    image = torch.zeros(1, 3, size, size)
    for x, y in points[0, :2].round().long().tolist():
        image[0, :, y, x] = 1
    band = eye_bands(image, points)
    assert band.shape[-2:] == (48 * size // 128, 112 * size // 128)
    columns, rows = band[0, 0].amax(0), band[0, 0].amax(1)
    halves = columns.chunk(2)
    assert all(half.max() > 0.2 for half in halves) and 0.35 < rows.argmax() / len(rows) < 0.65
    assert (
        heads(drawn.images, points).shape
        == features(drawn.images, points).shape
        == (1, 3, 3 * size // 4, 3 * size // 4)
    )
    assert (locate(load_evaluators(), drawn.images)[0] - points[0]).norm(dim=-1).mean() < 4 * size / 128


@pytest.mark.parametrize("way", damage.WAYS, ids=lambda way: way.__name__)
def test_damage_is_done_to_the_eye_that_is_chosen(way: damage.Damage) -> None:
    drawn = render([sample_scene(k, [TEST + k], style="photo", yaw=0) for k in range(2)])
    points = torch.cat([found[:1] for found in drawn.landmarks5])
    dice = damage.Dice(2, torch.Generator().manual_seed(0), torch.device("cpu"))
    changed = (way(drawn.images, points, torch.tensor([[1.0, 0.0]] * 2), dice) - drawn.images).abs().amax(1)
    for difference, (left, right) in zip(changed, points[:, :2], strict=True):
        (x, y), (u, v) = left.round().long().tolist(), right.round().long().tolist()
        assert difference[y - 5 : y + 6, x - 5 : x + 6].max() > 0.05
        assert difference[v - 2 : v + 3, u - 2 : u + 3].mean() < 0.05 and difference[-20:].max() < 0.02


def test_damage_is_the_same_for_the_same_generator() -> None:
    drawn = render([sample_scene(k, [TEST + k], style="photo") for k in range(6)], 64)
    points = torch.cat([found[:1] for found in drawn.landmarks5])
    first, second, other = (damage.damaged(drawn.images, points, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert all((first[k] - drawn.images[k]).abs().max() > 0.05 for k in range(6))


def test_portraits_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portraits, "PART", 4)
    drawn = portraits.draw_portraits(tmp_path, "validation", 10, size=32, world=2)
    people = [record["identities"] for record in drawn.records]
    assert people == [[SPLITS["validation"].start + k] for k in range(10)]
    assert {record["style"] for record in drawn.records} == {"photo"}
    assert landmarks5(drawn).shape == (10, 5, 2)
    parts = sorted(tmp_path.rglob("*.safetensors"))
    parts[1].unlink()
    kept = parts[0].stat().st_mtime_ns
    again = portraits.draw_portraits(tmp_path, "validation", 12, size=32, world=2)  # two more, too
    assert torch.equal(again.pixels[:10], drawn.pixels) and len(again) == 12
    assert parts[0].stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="unknown split 'tests'"):
        portraits.draw_portraits(tmp_path, "tests", 1)
    with pytest.raises(ValueError, match="200000 portraits of the split test"):
        portraits.draw_portraits(tmp_path, "test", 200_000)


# --- Training ----------------------------------------------------------------------------------------------------


def test_both_measures_are_trained_by_one_command_each_in_either_world(tmp_path: Path) -> None:
    words = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--render", "24", "--size", "64"]
    words += ["--world", "2", "--threads", "1", "--batch-size", "6", "--precision", "no"]
    assert main(["avatars-train", "traits", *words, "--steps", "2"]) == 0
    assert main(["avatars-train", "drawing", *words, "--steps", "2"]) == 0
    measures = load_measures(load_evaluators(), tmp_path / "out")
    assert measures is not None and measures.size == 64
    traits, drawing = measures.traits.about, measures.drawing.about
    assert traits["world"] == drawing["world"] == 2 and drawing["verdicts"] == 0
    assert set(traits["held_out"]) == set(TRAITS) == set(traits["kept"]) | set(traits["dropped"])
    assert drawing["held_out"]["renders_good"] >= 0.95
    scene = sample_scene(0, [TEST], 2, style="photo")
    seen = measures.look(render([scene], 64).images, [Look.of_scene(scene)])
    assert len(seen) == 1 and set(seen[0].shown) <= set(traits["kept"])
    words[3] = str(tmp_path / "next")
    assert main(["avatars-train", "traits", *words, "--steps", "1", "--continue-from", str(tmp_path / "out")]) == 0
    assert "continues" in json.loads((tmp_path / "next" / "training.json").read_text())["traits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vae", "--world", "2"], "--world is for the stages traits, drawing, landmarks"),
        (["traits", "--images", "5"], "say how many with --render"),
        (["traits", "--verdicts", "x"], "--verdicts is for the stage drawing"),
        (["drawing", "--size", "72"], "a multiple of 32"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["avatars-train", *words, "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_verdicts_are_read_as_they_were_written(tmp_path: Path) -> None:
    bands = torch.rand(13, 3, 1, 1).expand(-1, -1, 48, 112)
    pictures = [{"person": k, "good": k % 2 == 0, "sure": k > 3} for k in range(13)]
    write_verdicts(tmp_path / "eyes", bands, {"weights": "abc", "steps": 2, "pictures": pictures})
    found = read_verdicts(tmp_path / "eyes")
    assert (found.bands - bands).abs().mean() < 0.03 and found.about["steps"] == 2
    assert found.good.tolist() == [p["good"] for p in pictures] and found.sure.tolist() == [k > 3 for k in range(13)]
    (tmp_path / "eyes.webp").unlink()
    with pytest.raises(ModelNotFoundError, match=r"eyes\.webp does not exist"):
        read_verdicts(tmp_path / "eyes")


def test_agreement_by_hand() -> None:
    network = EyeNetwork()
    with torch.no_grad():  # the logit is the brightness
        network.forward = lambda bands: bands.mean((1, 2, 3))  # type: ignore[method-assign]
    bands = torch.tensor([0.9, 0.2, 0.1, 0.8])[:, None, None, None].expand(-1, 3, 48, 112)
    verdicts = Verdicts(bands, torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 1]).bool(), {})
    found = agreement(EyeEvaluator(network, 0.5, {}), verdicts)
    assert found == {"broken_caught": 0.5, "good_passed": 0.5, "broken_caught_sure": 0.5, "good_passed_sure": 1.0}
    with pytest.raises(FaceFusionError, match="weights abc"):
        about = {
            "weights": "abc",
            "steps": 1,
            "guidance_scale": 4.0,
            "low_noise_guidance": 2.0,
            "self_scale": 4.0,
            "seed": 0,
        }
        drawn_anew(Verdicts(bands, verdicts.good, verdicts.sure, about), "nowhere", Path("out"), "cpu")


# --- The measures of the package -----------------------------------------------------------------------------------


def test_missing_measures_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ModelNotFoundError, match="avatars-train traits"):
        load_traits(tmp_path)
    with pytest.raises(ModelNotFoundError, match="avatars-train drawing"):
        load_eye_evaluator(tmp_path)
    assert load_measures(load_evaluators(), tmp_path) is None and "avatars-train traits" in caplog.text


def test_shipped_measures_are_small_and_know_true_renders() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.safetensors")) < 5_000_000
    measures = load_measures(load_evaluators())
    assert measures is not None
    scenes = [portraits.portrait_scene("test", 500 + k, 1) for k in range(48)]
    images = torch.cat([render(scenes[start : start + 16]).images for start in range(0, 48, 16)])
    own = measures.look(images, [Look.of_scene(scene) for scene in scenes])
    strange = measures.look(images, [Look.of_scene(scene) for scene in scenes[1:] + scenes[:1]])
    fractions = [np.mean([trait_fraction({"traits": seen.shown}) for seen in found]) for found in (own, strange)]
    assert fractions[0] > 0.85 and fractions[1] < 0.6
    assert np.mean([seen.eyes for seen in own]) > 0.88, "some eyes of the first world do not show"
    wrong = damage.damaged(images, torch.cat([locate(measures.evaluators, images)]), torch.Generator().manual_seed(0))
    assert np.mean([seen.eyes for seen in measures.look(wrong, [Look.of_scene(scenes[0])])]) < 0.4


def test_shipped_evaluator_of_eyes_agrees_with_verdicts_by_eye(capsys: pytest.CaptureFixture[str]) -> None:
    """On 100 pictures of weights that it never learned from, some with a verdict that is not sure."""
    verdicts, evaluator = read_verdicts(VERDICTS), load_eye_evaluator()
    assert len(verdicts) == 100 and int((~verdicts.good).sum()) >= 30
    assert {p["method"] for p in verdicts.about["pictures"]} == {"none", "adapter", "both-mirrored"}
    fractions = agreement(evaluator, verdicts)
    assert (
        fractions["broken_caught_sure"] >= 0.82
        and fractions["broken_caught"] >= 0.62
        and fractions["good_passed"] >= 0.9
    )
    assert renders_passed(evaluator, 96)[0] >= 0.96
    assert main(["avatars-evaluate", "eyes", str(VERDICTS), "--renders", "8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fractions"]["broken_caught"] == fractions["broken_caught"] and result["drawn_anew"] is False


# --- Figures and choice --------------------------------------------------------------------------------------------


def test_kid_of_equal_and_of_other_distributions() -> None:
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(30), 2)
    truth, same = rng.normal(size=(2, 60, 8))
    near, far = (kid(same + shift, people, truth, people, draws=200) for shift in (0.0, 1.0))
    assert near.low < 0 < near.high and far.low > near.high
    own = kid(truth, people, truth, people, draws=200)
    assert abs(own.mean) < 1e-6, "the same pictures, without the pairs of one person"
    assert kid(5 * truth, people, 5 * truth + 0, people, draws=10).mean == pytest.approx(own.mean, abs=1e-6)
    assert np.isnan(kid(same, np.zeros(60), truth, people).mean)


def test_normalised_similarity_has_an_interval_over_people() -> None:
    people = np.repeat(np.arange(20), 2)
    rng = np.random.default_rng(1)
    person = rng.normal(size=20)[people] * 0.1
    found = bootstrap_normalised((0.6 + person, people), (0.2 + person, people), (1.0 + person, people))
    assert found.mean == pytest.approx(0.5) and found.low == pytest.approx(0.5) and found.high == pytest.approx(0.5)
    loose = bootstrap_normalised((0.6 + 3 * person, people), (0.2 + person, people), (1.0 + person, people))
    assert loose.low < loose.mean < loose.high
    one = np.zeros(4)
    assert np.isnan(bootstrap_normalised((one + 1, one), (one, one), (one + 2, one)).low)


def test_measures_are_summed_up() -> None:
    def rows(*fractions: float) -> list[dict]:
        return [
            {"person": k, "eyes": k % 2 == 0, "traits": {t: i < 10 * share for i, t in enumerate(TRAITS[:10])}}
            for k, share in enumerate(fractions)
        ]

    found = summarise_measures(rows(0.5, 0.7), rows(0.2, 0.2), rows(1.0, 1.0))
    assert found["eyes"]["mean"] == 0.5 and found["traits"]["fraction"]["mean"] == pytest.approx(0.6)
    assert found["traits"]["normalised"]["mean"] == pytest.approx(0.5)
    assert found["traits"]["by_trait"][TRAITS[0]] == 1 and found["traits"]["by_trait"][TRAITS[6]] == 0.5
    rng = np.random.default_rng(0)
    seen = [Seen({}, True, rng.normal(size=4), rng.normal(size=4)) for _ in range(6)]
    figures = distances(seen, seen, np.arange(6) // 2)
    assert set(figures) == {"kid_head", "kid_eye"} and abs(figures["kid_eye"]["mean"]) < 1e-6


def table(eyes: float, traits: float, *published: float) -> dict:
    names = [f"r{k}" for k in range(len(published))]
    similarity = {name: {"normalised": share} for name, share in zip(names, published, strict=True)}
    mine = {"drawing": {"eyes": {"mean": eyes}}, "traits": {"normalised": {"mean": traits}}}
    own = {"avatar recogniser": {"normalised": 1.0}}
    return {
        "published": names,
        "methods": {
            "none": {"drawing": {"eyes": {"mean": 0.6}}},
            "adapter": {**mine, "similarity": {**similarity, **own}},
        },
    }


def test_weights_are_chosen_by_drawing_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {
        "well": table(0.59, 0.5, 0.2, 0.3),
        "like": table(0.58, 0.7, 0.2, 0.2),
        "bad": table(0.57, 1.0, 1.0, 1.0),
    }
    for name, content in tables.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.json").write_text(json.dumps(content))
    found = {name: candidate(read_table(tmp_path / name), "adapter", name) for name in tables}
    assert [found[name].drawn_well for name in tables] == [True, True, False]
    assert found["well"].published == pytest.approx(0.25)
    best = choose(list(found.values()))
    assert best is not None and best.name == "like", "the most likeness of those that are drawn well"
    words = [str(tmp_path / name) for name in tables]
    assert main(["avatars-evaluate", "choose", *words, "--method", "adapter"]) == 0
    assert f"Ships: {tmp_path / 'like'}" in capsys.readouterr().out


def test_where_all_draw_worse_likeness_has_to_suffice() -> None:
    some = [
        Candidate("a", 0.3, 0.6, 0.9, 0.29),
        Candidate("b", 0.2, 0.6, 0.1, 0.30),
        Candidate("c", 0.1, 0.6, 1.0, 0.9),
    ]
    best = choose(some)
    assert best is not None and best.name == "b"
    assert choose(some[:1]) is None


def test_a_table_without_what_the_rule_needs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FaceFusionError, match="no method both-mirrored, only none, adapter"):
        candidate(table(1, 1, 1), "both-mirrored", "t")
    with pytest.raises(FaceFusionError, match="t lacks a published recogniser"):
        candidate(table(1, 1), "adapter", "t")
    with pytest.raises(FaceFusionError, match="is no table"):
        read_table(tmp_path)
