"""`face-fusion ablate`: each variant is what it says, all are trained alike, and the figures say what the rows say."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from tiny_models import GUIDED
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from face_fusion_pipeline import create_adapter, save_adapter
from face_fusion_pipeline.avatars.ablations import training
from face_fusion_pipeline.avatars.ablations.added_attention import face_attention
from face_fusion_pipeline.avatars.ablations.conditioners import create_conditioning
from face_fusion_pipeline.avatars.ablations.conditioning import Conditioning, References
from face_fusion_pipeline.avatars.ablations.encoders import (
    FaceEmbedderEncoder,
    ImageEncoder,
    Photo,
    check_independent,
    load_conditioner,
    load_evaluator,
)
from face_fusion_pipeline.avatars.ablations.ip_adapter import EncoderTokens
from face_fusion_pipeline.avatars.ablations.laboratory import Run
from face_fusion_pipeline.avatars.ablations.pictures import Sampling, make_pictures, reference_photos
from face_fusion_pipeline.avatars.ablations.questions import QUESTIONS, Condition
from face_fusion_pipeline.avatars.ablations.report import draw, fill, sentences, table
from face_fusion_pipeline.avatars.ablations.summary import difference, equal_accuracy, summarise
from face_fusion_pipeline.avatars.ablations.training import Budget, Trainer, VariantTask
from face_fusion_pipeline.avatars.ablations.unet_features import UNetFeatures, central_cells
from face_fusion_pipeline.avatars.ablations.variants import METHOD, NO_FACE, VARIANTS, Variant, chosen_layers
from face_fusion_pipeline.avatars.evaluation.avatar_table import CEILING, FLOOR
from face_fusion_pipeline.avatars.evaluation.evaluators import SHIPPED, Evaluators, load_evaluators
from face_fusion_pipeline.avatars.evaluation.trials import FIRST_TEST_IDENTITY, portraits
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.conditioner import Person, PictureRow, register_conditioner
from face_fusion_pipeline.face_adapter import ADAPTER_WEIGHTS_NAME
from face_fusion_pipeline.face_attention import FaceCall, attention_layers
from face_fusion_pipeline.face_errors import FaceFusionError
from face_fusion_pipeline.training.base_model import base_of
from face_fusion_pipeline.training.latent_cache import encode
from face_fusion_pipeline.training.loop import Part, data_order
from face_fusion_pipeline.training.pairs import Pairs, split_people
from face_fusion_pipeline.training.preparation import PrepareOptions, prepare, read_report, read_rows
from face_fusion_pipeline.training.selection import SelectionOptions
from face_fusion_pipeline.training.sources import DataError, open_source
from face_fusion_pipeline.training.task import FaceFusionOptions, FaceFusionTask


SIDE = 16
SELECTION = SelectionOptions(resolution=SIDE, reference_resolution=SIDE, min_side=SIDE, min_face=4, min_sharpness=0)
CONDITIONED = [variant for variant in VARIANTS.values() if variant.encoder != "none"]
TRAINED = [variant for variant in CONDITIONED if variant.trained]


def pipeline_with_image_encoder() -> Any:
    pipe = tiny_models.tiny_pipeline()
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=12,
    )
    pipe.register_modules(image_encoder=CLIPVisionModelWithProjection(config).eval())
    return pipe


@pytest.fixture(scope="module")
def base() -> Any:
    return base_of(pipeline_with_image_encoder(), "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, base: Any) -> Path:
    """Four people with two photos each, prepared and encoded."""
    root = tmp_path_factory.mktemp("data")
    (root / "photos").mkdir()
    lines = []
    for index, name in enumerate(("ada", "bob", "ada", "cy", "bob", "cy", "dan", "dan")):
        pixels = np.random.default_rng(index).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{index}.png")
        landmarks = [[9, 10], [15, 10], [12, 12], [10, 15], [14, 15]]
        row = {"file_name": f"{index}.png", "text": f"photo {'ab'[index % 2]}", "box": [6, 6, 18, 18]}
        lines.append(json.dumps({**row, "identity": name, "landmarks5": landmarks}))
    (root / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    prepare(open_source(root / "photos"), root / "data", PrepareOptions(SELECTION), progress=False)
    encode(root / "data", base, progress=False)
    return root / "data"


def pairs_of(data: Path, base: Any, **options: Any) -> Pairs:
    return Pairs(data, encode(data, base, progress=False), split_people(read_rows(data), 0, seed=0)[0], **options)


def conditioning_of(base: Any, data: Path, variant: Variant) -> Conditioning:
    torch.manual_seed(0)
    return create_conditioning(base, variant, data)


def part_of(task: FaceFusionTask, step: int = 3) -> dict[str, torch.Tensor]:
    indices = data_order(0, step, 4, task.size)
    return task.part(Part(0, step, 4, torch.arange(4), indices), torch.Generator(), 0.0)


def photo(seed: int) -> Photo:
    picture = tiny_models.face(seed, 24)
    return Photo(picture, picture, torch.tensor([[9.0, 10.0], [15.0, 10.0], [12.0, 12.0], [10.0, 15.0], [14.0, 15.0]]))


def states_of(conditioning: Conditioning, *seeds: int) -> dict[str, torch.Tensor]:
    """Of one person with these reference photos: (1, references, tokens, width)."""
    states = conditioning.states(conditioning.from_photos([photo(seed) for seed in seeds]))
    return {name: state[None] for name, state in states.items()}


def shown(conditioning: Conditioning, states: dict[str, torch.Tensor], scale: float = 1.0, call: Any = None) -> Any:
    """Within it the UNet of a pipeline sees the person with these `states_of`."""
    person = Person(References({name: state[0] for name, state in states.items()}, conditioning.mode), scale)
    return conditioning.installed(SimpleNamespace(unet=conditioning.unet), [PictureRow((person,))], call or FaceCall())


def predict(base: Any, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=generator).expand(rows, -1, -1, -1)
    text = torch.randn(1, 12, tiny_models.TEXT_WIDTH, generator=generator).expand(rows, -1, -1)
    with torch.no_grad():
        return base.unet(latents, 500, encoder_hidden_states=text).sample


# --- What each variant is ----------------------------------------------------------------------------------------


def test_face_attention_is_its_formula_and_nothing_for_rows_without_a_face() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 3, 4, generator=generator, dtype=torch.float64) for n in (5, 6, 6))
    bias = torch.randn(1, 1, 1, 6, generator=generator, dtype=torch.float64).repeat(2, 1, 1, 1)
    bias[1] = -torch.inf
    query.requires_grad_()
    found = face_attention(query, key, value, bias)
    logits = torch.einsum("qhd,khd->hqk", query[0], key[0]) / 2 + bias[0, 0]
    expected = torch.einsum("hqk,khd->qhd", logits.softmax(-1), value[0])
    torch.testing.assert_close(found[0], expected)
    assert not found[1].any()
    found.sum().backward()
    assert query.grad is not None and query.grad.isfinite().all() and not query.grad[1].any()


@pytest.mark.parametrize("variant", CONDITIONED, ids=lambda variant: variant.name)
def test_a_face_changes_the_picture_and_a_hidden_one_or_scale_zero_does_not(
    variant: Variant, base: Any, data: Path
) -> None:
    conditioning, plain = conditioning_of(base, data, variant), predict(base)
    processors = dict(base.unet.attn_processors)
    states = states_of(conditioning, 1)
    if variant.init == "zero_v":  # values of zero still take attention from the text
        assert not any(weight.any() for name, weight in conditioning.adapter.state_dict().items() if "to_v" in name)
    with conditioning.applied(states, torch.tensor([True, False])):
        first, second = predict(base)
    assert (first - plain[0]).abs().max() > 1e-4
    if variant.encoder == "unet":  # IP-Adapter's hidden image is zeros, which still are tokens
        torch.testing.assert_close(second, plain[1], atol=1e-5, rtol=1e-5)
    with shown(conditioning, states, 0.0):
        torch.testing.assert_close(predict(base), plain)
    with shown(conditioning, states, call=FaceCall(GUIDED)):
        half, seen = predict(base)
    torch.testing.assert_close(seen, first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half, second, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="stop"), shown(conditioning, states):
        raise RuntimeError("stop")
    assert dict(base.unet.attn_processors) == processors and torch.equal(predict(base), plain)


@pytest.mark.parametrize("name", [METHOD, "added-attention", "training-free", "ip-adapter", "ip-adapter-plus"])
def test_a_photo_given_twice_counts_once_and_two_photos_are_both_seen(name: str, base: Any, data: Path) -> None:
    conditioning = conditioning_of(base, data, VARIANTS[name])
    pictures = []
    for seeds in ((1,), (1, 1), (1, 2), (2, 1), (2,)):
        with conditioning.applied(states_of(conditioning, *seeds)):
            pictures.append(predict(base, 1))
    once, twice, both, turned, other = pictures
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both, turned, atol=1e-5, rtol=1e-5)
    assert (both - once).abs().max() > 1e-6 and (both - other).abs().max() > 1e-6


def test_the_joint_variant_is_face_fusion(base: Any, data: Path) -> None:
    """The same loss as the task of `face-fusion train`, to the bit."""
    conditioning = conditioning_of(base, data, VARIANTS[METHOD])
    assert isinstance(conditioning, UNetFeatures)
    adapter = create_adapter(base.unet, metadata={"resolution": SIDE, "token_count_bias": True})
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), conditioning.adapter.parameters(), strict=True))
    options, pairs = FaceFusionOptions(), pairs_of(data, base)
    ours, theirs = VariantTask(base, conditioning, pairs, None, options), FaceFusionTask(base, adapter, pairs)
    assert ours(part_of(ours))[0].item() == theirs(part_of(theirs))[0].item()


@pytest.mark.parametrize("name", [METHOD, "noised-reference", "no-count-bias", "layers-up", "training-free"])
def test_variants_of_the_method_generate_what_its_pipeline_does(name: str, base: Any, data: Path) -> None:
    conditioning, pipe = conditioning_of(base, data, VARIANTS[name]), base.pipeline
    register_conditioner(conditioning)
    photos = [photo(1), photo(2)]
    with torch.inference_mode():
        identity = pipe.encode_face(photos, face_mode=conditioning.mode)
        found = tiny_models.generate(pipe, face_image=identity, face_scale=2.0)
    if VARIANTS[name].trained:
        pipe.set_face_fusion_adapter(conditioning.adapter)
    faces = [photo(1).face, photo(2).face]
    expected = tiny_models.generate(pipe, face_image=faces, face_scale=2.0, face_mode=None)
    pipe.unload_face_fusion_adapter()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)  # ten times the rounding of any processor
    assert not torch.allclose(found, tiny_models.generate(pipe), atol=1e-2)


def test_ip_adapters_are_those_of_diffusers(base: Any, data: Path) -> None:
    """What the pipeline makes of `ip_adapter_image_embeds` is what the variant makes; its keys start as the text's."""
    conditioning = conditioning_of(base, data, VARIANTS["ip-adapter"])
    assert isinstance(conditioning, EncoderTokens)
    register_conditioner(conditioning)
    tokens = states_of(conditioning, 1)["tokens"][0].double()
    unet, adapter = base.unet, conditioning.adapter.double()
    plain = dict(unet.attn_processors)
    layers = attention_layers(unet, "attn2")
    own = dict(zip((f"{name}.processor" for name in layers), adapter.processors, strict=True))
    try:
        base.pipeline.to(torch.float64)  # rounding adds up from step to step
        found = tiny_models.generate(base.pipeline, face_image=References({"tokens": tokens}, conditioning.mode))
        assert not torch.allclose(found, tiny_models.generate(base.pipeline), atol=1e-2)
        unet.encoder_hid_proj, unet.config.encoder_hid_dim_type = adapter.image_projection, "ip_image_proj"
        unet.set_attn_processor({**plain, **own})
        both = torch.stack([torch.zeros_like(tokens), tokens])[:, :, 0]
        expected = tiny_models.generate(base.pipeline, ip_adapter_image_embeds=[both])
    finally:
        unet.set_attn_processor(plain)
        unet.encoder_hid_proj, unet.config.encoder_hid_dim_type = None, None
        base.pipeline.to(torch.float32)
    torch.testing.assert_close(found, expected)
    first = next(iter(layers.values()))
    assert torch.equal(adapter.processors[0].to_v_ip[0].weight.float(), first.to_v.weight)


@pytest.mark.parametrize("people", [1, 2])
def test_pictures_of_one_and_of_several_people(people: int, base: Any, data: Path, tmp_path: Path) -> None:
    """Every variant draws by one way; people in one picture keep their places, as many pictures of one go together."""
    sampling, condition = Sampling(identities=1, prompts=2, steps=2), Condition(people=people, references=2)
    trials = sampling.trials(people, set())
    drawn = {}
    for name in (NO_FACE, METHOD, "added-attention", "ip-adapter"):
        conditioning = None if name == NO_FACE else conditioning_of(base, data, VARIANTS[name])
        paths = make_pictures(base, conditioning, trials, condition, sampling, tmp_path / name)
        drawn[name] = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(float)
    assert drawn[NO_FACE].shape[0] == len(trials) == 2
    for name in drawn.keys() - {NO_FACE}:
        assert np.abs(drawn[name] - drawn[NO_FACE]).max(axis=(1, 2, 3)).min() > 0, name
    assert make_pictures(base, None, trials, condition, sampling, tmp_path / METHOD) == [
        tmp_path / METHOD / path.relative_to(tmp_path / "ip-adapter") for path in paths
    ]
    again = np.asarray(Image.open(tmp_path / METHOD / paths[0].relative_to(tmp_path / "ip-adapter")))
    assert np.array_equal(again, drawn[METHOD][0]), "what exists is not made again"


def test_references_of_an_ablation_count_equally(base: Any, data: Path) -> None:
    conditioning = conditioning_of(base, data, VARIANTS[METHOD])
    register_conditioner(conditioning)
    with pytest.raises(FaceFusionError, match="count equally"):
        base.pipeline.encode_face([photo(1), photo(2)], weights=[1, 2], face_mode=conditioning.mode)


def test_the_face_region_is_the_middle_of_the_crop(base: Any, data: Path) -> None:
    assert central_cells(16, 1 / 1.6).tolist() == [5, 6, 9, 10]
    assert central_cells(9, 0.1).tolist() == [4] and len(central_cells(64, 1.0)) == 64
    whole, region = (states_of(conditioning_of(base, data, VARIANTS[name]), 1) for name in (METHOD, "face-region"))
    counts = {whole[name].shape[2]: state.shape[2] for name, state in region.items()}
    assert counts == {64: 36, 16: 4}  # 6 of 8 and 2 of 4 cells a side
    for name, state in whole.items():
        assert torch.equal(region[name], state[:, :, central_cells(state.shape[2], 1 / 1.6)])


def test_layers_of_variants(base: Any, data: Path) -> None:
    names = list(attention_layers(base.unet, "attn2"))
    up, down, half = (chosen_layers(names, which) for which in ("up", "down and middle", "every second"))
    assert sorted(up + down) == sorted(names) and up and down and half == names[::2]
    conditioning = conditioning_of(base, data, VARIANTS["layers-up"])
    assert isinstance(conditioning, UNetFeatures) and list(states_of(conditioning, 1)) == up
    assert {key.rpartition(".to_")[0] for key in conditioning.adapter.state_dict()} == set(up)


def test_encoders(base: Any) -> None:
    image_encoder = base.pipeline.image_encoder
    pooled, patches = ImageEncoder(image_encoder), ImageEncoder(image_encoder, patches=True)
    assert pooled([photo(1), photo(2)]).shape == (2, 1, 12) and patches([photo(1)]).shape == (1, 5, 16)
    faces = FaceEmbedderEncoder(load_conditioner(None))
    check_independent(load_conditioner(None), load_evaluator(None))
    found = faces([photo(1), photo(2)])
    assert found.shape == (2, 1, 256)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 1))
    with pytest.raises(FaceFusionError, match="no image_encoder"):
        ImageEncoder(None)


# --- Training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", TRAINED, ids=lambda variant: variant.name)
def test_all_of_a_variant_learns_and_only_that(variant: Variant, base: Any, data: Path) -> None:
    conditioning = conditioning_of(base, data, variant)
    pairs = pairs_of(data, base, same_photo=variant.same_photo)
    task = VariantTask(base, conditioning, pairs, None, FaceFusionOptions(keep_references=True)).train()
    batch = part_of(task)
    batch["has_face"][:] = True
    loss, _ = task(batch)
    loss.backward()
    gradients = {name: p.grad for name, p in task.named_parameters() if p.requires_grad}
    assert gradients and all(name.startswith("adapter.") for name in gradients)
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())


def test_all_variants_get_the_same_pictures_and_noise(base: Any, data: Path) -> None:
    batches = []
    for name in (METHOD, "ip-adapter", "same-photo"):
        conditioning = conditioning_of(base, data, VARIANTS[name])
        pairs = pairs_of(data, base, same_photo=VARIANTS[name].same_photo)
        batches.append(part_of(VariantTask(base, conditioning, pairs)))
    for key in ("latents", "timesteps", "noise", "text", "has_face"):
        assert torch.equal(batches[0][key], batches[1][key]) and torch.equal(batches[0][key], batches[2][key])
    assert not torch.equal(batches[0]["reference"], batches[2]["reference"])


def test_the_same_photo_is_its_own_reference(data: Path, base: Any) -> None:
    assert pairs_of(data, base).references[0] == [(2, 0)]
    assert pairs_of(data, base, same_photo=True).references[0] == [(0, 0)]
    conditioning = conditioning_of(base, data, VARIANTS["ip-adapter"])
    with pytest.raises(DataError, match="single photo"):
        conditioning.from_data(pairs_of(data, base), [(0, 1)])


def test_everybody_learns_from_people_who_are_alone_and_have_another_photo(
    base: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_rows(data)
    changed = {0: {"others": [[0, 0, 4, 4]]}, 3: {"own_reference": True}, 4: {"others": []}}
    monkeypatch.setattr(training, "read_rows", lambda _: [{**row, **changed.get(i, {})} for i, row in enumerate(rows)])
    seen = []
    monkeypatch.setattr(training, "train", lambda task, *_: seen.append(task))
    trainer = Trainer(base, data, tmp_path, Budget(steps=1, batch_size=4))
    monkeypatch.setattr(training, "split_people", lambda *_, **__: split_people(rows, 0, seed=0))
    with pytest.raises(KeyError):  # nothing was trained
        trainer.trained(VARIANTS[METHOD], 0)
    identities = [rows[index]["identity"] for index in seen[0].pairs.targets]
    assert identities == ["bob", "bob", "dan", "dan"], "ada stands beside somebody, cy's reference was named"


def test_a_finished_training_is_loaded(base: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(base, data, tmp_path, Budget(steps=2, batch_size=4))
    first, record = trainer.trained(VARIANTS[METHOD], 1)
    other, _ = trainer.trained(VARIANTS[METHOD], 2)
    assert first is not None and other is not None and record["steps"] == 2 and record["trained_parameters"] > 0
    monkeypatch.setattr(training, "train", lambda *args: pytest.fail("trained again"))
    again, known = trainer.trained(VARIANTS[METHOD], 1)
    assert again is not None and known == record
    for key, weight in first.adapter.state_dict().items():
        assert torch.equal(weight, again.adapter.state_dict()[key])
    assert any(
        not torch.equal(a, b) for a, b in zip(first.adapter.parameters(), other.adapter.parameters(), strict=True)
    )
    assert trainer.trained(VARIANTS[NO_FACE], 0) == (None, {})
    trainer.budget = Budget(steps=2, batch_size=4, rates={METHOD: 1e-3})
    with pytest.raises(FaceFusionError, match=r"learning rate 0.0015, not 0.001"):
        trainer.trained(VARIANTS[METHOD], 1)


@pytest.mark.parametrize("name", ["ip-adapter", "ip-adapter-plus", "ip-adapter-faceid"])
def test_encoders_of_tokens_are_trained_by_the_same_loop(name: str, base: Any, data: Path, tmp_path: Path) -> None:
    conditioning, record = Trainer(base, data, tmp_path, Budget(steps=1, batch_size=4)).trained(VARIANTS[name], 0)
    assert conditioning is not None and record["steps"] == 1


def test_all_variants_learn_from_one_teacher(base: Any, data: Path, tmp_path: Path) -> None:
    """The reference is seen once for all of them, and the method itself has nothing to learn of its own weights."""
    torch.manual_seed(0)
    weights = {"resolution": SIDE, "token_count_bias": True}
    save_adapter(create_adapter(base.unet, metadata=weights), tmp_path / ADAPTER_WEIGHTS_NAME)
    trainer = Trainer(base, data, tmp_path / "out", Budget(steps=1, batch_size=4), None, True, teacher=tmp_path)
    for variant in TRAINED:
        if variant.same_photo:
            with pytest.raises(FaceFusionError, match="cannot learn from a teacher"):
                trainer.trained(variant, 0)
            continue
        conditioning, record = trainer.trained(variant, 0)
        assert conditioning is not None and record["steps"] == 1
        assert 0 < len(trainer.feature_cache.rows) <= len(read_rows(data))
        task = VariantTask(
            base, conditioning, pairs_of(data, base), None, teacher=trainer.teaching,
            feature_cache=trainer.feature_cache, options=FaceFusionOptions(keep_references=True),
        )  # fmt: skip
        batch = part_of(task)
        batch["has_face"][:] = True
        assert ("own_reference" in batch) == (variant.encoder != "unet" or variant.reference_noise > 0)
        if variant.name != METHOD:
            assert task(batch)[0].item() > 1e-9
    assert 0 < len(trainer.feature_cache.rows) <= len(read_rows(data))  # nobody who is set aside
    method = conditioning_of(base, data, VARIANTS[METHOD])
    task = VariantTask(base, method, pairs_of(data, base), None, teacher=trainer.teaching)
    assert task(part_of(task))[0].item() == pytest.approx(0, abs=1e-6)  # it starts with the weights of the teacher


def test_an_identity_loss_is_part_of_the_budget(base: Any, data: Path, tmp_path: Path) -> None:
    weights = {}
    for weight in (0.0, 1.0):
        budget = Budget(steps=2, batch_size=4, identity_loss_weight=weight)
        folder = tmp_path / str(weight)
        found, _ = Trainer(base, data, folder, budget).trained(VARIANTS[METHOD], 0)
        assert found is not None
        weights[weight] = torch.cat([value.flatten() for value in found.adapter.parameters()])
    assert not torch.equal(weights[0.0], weights[1.0])


# --- Evaluators and people -------------------------------------------------------------------------------------------


def test_who_conditions_does_not_evaluate(tmp_path: Path) -> None:
    with pytest.raises(FaceFusionError, match="cannot evaluate"):
        check_independent(load_evaluator(None), load_evaluator(None))
    torch.manual_seed(0)
    Evaluators.new(load_evaluators().labels).save(tmp_path / "other")
    second = load_evaluator(str(tmp_path / "other"))
    check_independent(load_evaluator(None), second)
    assert second.name == "avatar recogniser other"


def test_more_references_begin_with_the_first() -> None:
    one, three = reference_photos(FIRST_TEST_IDENTITY, 1), reference_photos(FIRST_TEST_IDENTITY, 3)
    assert np.array_equal(np.asarray(one[0].face), np.asarray(three[0].face))
    assert not np.array_equal(np.asarray(three[1].picture), np.asarray(three[0].picture))
    other = portraits(FIRST_TEST_IDENTITY).other
    assert three[0].landmarks5.shape == (5, 2) and other.shape == (3, 128, 128)


# --- Figures -----------------------------------------------------------------------------------------------------


def run_of(variant: str, likeness: float, right: float = 1.0, seed: int = 0, **condition: Any) -> Run:
    """Ten people whose likeness is `likeness` less or more a little, and one prompt in ten wrong less than `right`."""
    rows = [
        {
            "trial": f"{person}_000",
            "person": person,
            "likeness": likeness + 0.01 * (person % 2) + 0.02 * seed,
            "to_reference": likeness,
            "face_height": 50.0,
            "right": {"clothing": person < 10 * right, "background": person < 10 * right},
            "copied": {"clothing": person == 0} if person < 5 else {},
        }
        for person in range(10)
    ]
    return Run(variant, seed, Condition(**condition), rows, {})


def test_figures_of_rows() -> None:
    runs = [run_of(CEILING, 0.9), run_of(FLOOR, 0.1), run_of(NO_FACE, 0.1)]
    runs += [run_of(METHOD, 0.5), run_of(METHOD, 0.5, seed=1), run_of("added-attention", 0.3)]
    cells = summarise(runs)
    method, added = cells[METHOD, Condition()], cells["added-attention", Condition()]
    assert method.seeds == 2 and method.figures["likeness"].mean == pytest.approx(0.515)
    assert method.spread["likeness"] == pytest.approx(0.02 / 2**0.5) and np.isnan(added.spread["likeness"])
    assert added.figures["copied"].mean == pytest.approx(0.2) and added.figures["copied"].count == 5
    assert difference(added, method).mean == pytest.approx(-0.21)
    assert sentences(QUESTIONS["attention"], cells) == [
        "added-attention against face-fusion: less likeness (-0.210 [-0.210, -0.210]), no difference in accuracy "
        "found, no difference in traits copied found."
    ]
    lines = table(QUESTIONS["attention"], cells).splitlines()
    assert len(lines) == 2 + 5 and "| 51 % |" in lines[5] and "| 25 % |" in lines[6] and "-0.210" in lines[6]


def test_a_difference_has_to_be_larger_than_that_of_seeds() -> None:
    """Two trainings a side whose own means lie further apart than the sides do."""
    known = {"trained_parameters": 1, "options": {"lr": 1.0}, "seconds": 1, "steps": 1}

    def said(*runs: Run) -> str:
        bounds = [run_of(CEILING, 0.9), run_of(FLOOR, 0.1), run_of(NO_FACE, 0.1)]
        return sentences(
            QUESTIONS["attention"], summarise([*bounds, *(replace(run, training=known) for run in runs)])
        )[0]

    method = [run_of(METHOD, 0.5), run_of(METHOD, 0.7, seed=1)]
    other = [run_of("added-attention", 0.45), run_of("added-attention", 0.65, seed=1)]
    assert "no difference in likeness found" in said(*method, *other)
    assert "less likeness (-0.4" in said(*method, *(run_of("added-attention", 0.2, seed=seed) for seed in (0, 1)))
    assert "less likeness" in said(*method, other[0]) and "one training a side" in said(*method, other[0])


def test_equal_accuracy_compares_the_best_scales_that_are_accurate_enough() -> None:
    plain = [run_of(CEILING, 0.9), run_of(FLOOR, 0.1), run_of(NO_FACE, 0.0)]
    ours = [run_of(METHOD, 0.6, 1.0, scale=1.0), run_of(METHOD, 0.8, 0.5, scale=4.0)]
    tokens = [run_of("ip-adapter", 0.3, 1.0, scale=1.0), run_of("ip-adapter-plus", 0.2, 1.0, scale=2.0)]
    cells = summarise([*plain, *ours, *tokens])
    found = equal_accuracy(cells, 0.95)
    assert found is not None and found.tokens.variant == "ip-adapter" and found.method.condition.scale == 1
    assert found.ratio == pytest.approx(0.395 / 0.695) and found.low <= found.ratio <= found.high
    loose = equal_accuracy(cells, 0.5)
    assert loose is not None and loose.method.condition.scale == 4
    assert sum("of at most 0.7 holds" in text for text in sentences(QUESTIONS["scale"], cells)) == 3
    worse = summarise([*plain, run_of(METHOD, 0.25, scale=1.0), *tokens])
    assert all("does not hold" in text for text in sentences(QUESTIONS["scale"], worse))
    never = summarise([*plain, run_of(METHOD, 0.6, 0.1, scale=1.0), *tokens])
    assert equal_accuracy(never, 0.9) is None


def test_curves_are_drawn(tmp_path: Path) -> None:
    runs = [run_of(CEILING, 0.9), run_of(FLOOR, 0.1), run_of(NO_FACE, 0.1)]
    runs += [
        run_of(name, 0.2 * scale, 1 - 0.2 * scale, scale=scale) for name in (METHOD, "ip-adapter") for scale in (1, 2)
    ]
    runs += [run_of(METHOD, 0.1 * count, references=count) for count in (2, 3, 5)]
    sizes = []
    for name in ("scale", "references"):
        draw(QUESTIONS[name], summarise(runs), tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as plot:
            sizes.append(plot.size)
            assert len(plot.convert("RGB").getcolors(1 << 20) or []) > 20  # lines and letters, not an empty sheet
    assert sizes == [(720, 504)] * 2


def test_answers_go_between_their_markers(tmp_path: Path) -> None:
    page, plot = tmp_path / "page.md", tmp_path / "plot.png"
    plot.write_bytes(b"png")
    page.write_text(
        "a\n<!-- ablation: pairs -->\nold\n<!-- /ablation -->\n<!-- ablation: scale --><!-- /ablation -->\nb\n"
    )
    fill(page, QUESTIONS["pairs"], r"new \1", plot)
    fill(page, QUESTIONS["scale"], "curve", plot)
    text = page.read_text()
    assert "old" not in text and "new \\1" in text and text.startswith("a\n") and text.endswith("\nb\n")
    assert "images/ablation_scale.png" in text and (tmp_path / "images" / "ablation_scale.png").read_bytes() == b"png"
    with pytest.raises(FaceFusionError, match="no place"):
        fill(page, QUESTIONS["layers"], "text", plot)
    assert page.read_text() == text


def test_every_question_has_its_place_in_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "ablations.md").read_text()
    assert all(f"<!-- ablation: {name} -->" in page for name in QUESTIONS)


# --- Command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipeline_with_image_encoder().save_pretrained(folder)
    return folder


def command(model: Path, data: Path, out: Path, *words: str) -> list[str]:
    small = ["--steps", "2", "--batch-size", "2", "--identities", "2", "--prompts", "1", "--inference-steps", "1"]
    return ["ablate", *words, "--model", str(model), "--data", str(data), "--out", str(out), *small]


def test_a_question_is_answered_once(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(model, data, tmp_path, "attention", "--seeds", "0", "1")
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "| added-attention |" in printed and "seeds 0, 1;" in printed
    answer = json.loads((tmp_path / "answers" / "attention.json").read_text())
    counted = {cell["variant"]: cell["seeds"] for cell in answer["cells"]}
    assert counted == {CEILING: 1, FLOOR: 1, NO_FACE: 1, METHOD: 2, "added-attention": 2}
    assert answer["cells"][3]["trained_parameters"] > 0
    monkeypatch.setattr(training, "train", lambda *args: pytest.fail("trained again"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert main(words) == 0 and capsys.readouterr().out == printed
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} and len(before) == 10
    assert main([*words, "--prompts", "2"]) == 2
    assert "holds runs with another sampling" in capsys.readouterr().err
    assert main([*words, "--rate", f"{METHOD}=1e-2"]) == 2
    assert "learning rate 0.0015, not 0.01" in capsys.readouterr().err


def test_given_weights_are_measured_without_training(
    model: Path, data: Path, base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    metadata = {"resolution": SIDE, "face_crop": read_report(data)["settings"]["face_crop"]}
    given = create_adapter(base.unet, "xavier", metadata=metadata)
    save_adapter(given, tmp_path / "given" / ADAPTER_WEIGHTS_NAME)
    start = ["--init-adapter", str(tmp_path / "given")]
    free = [*command(model, data, tmp_path / "out", "training", *start), "--steps", "0"]
    assert main(free) == 2
    assert "init-zero-v cannot begin with the weights" in capsys.readouterr().err
    chosen = ["--variants", METHOD, "training-free", "face-region"]
    assert main([*free, *chosen]) == 0
    answer = json.loads((tmp_path / "out" / "answers" / "training.json").read_text())
    assert [cell["variant"] for cell in answer["cells"]][3:] == [METHOD, "training-free", "face-region"]
    assert all(cell["seeds"] == 1 and cell["trained_parameters"] == 0 for cell in answer["cells"])
    assert "No training: the weights `given`;" in capsys.readouterr().out
    other = create_adapter(base.unet, "attn1", metadata=metadata)
    save_adapter(other, tmp_path / "other" / ADAPTER_WEIGHTS_NAME)
    again = [str(tmp_path / "other") if word == start[1] else word for word in (*free, *chosen)]
    assert main(again) == 2 and "holds runs with another start" in capsys.readouterr().err
    assert main([*command(model, data, tmp_path / "out", "scale"), "--variants", METHOD, "--steps", "0"]) == 2
    assert "--steps must be at least 1, or 0 with --init-adapter" in capsys.readouterr().err


def test_training_begins_with_the_given_weights(data: Path, base: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    metadata = {"resolution": SIDE, "face_crop": read_report(data)["settings"]["face_crop"]}
    given = create_adapter(base.unet, "xavier", metadata=metadata)
    save_adapter(given, tmp_path / ADAPTER_WEIGHTS_NAME)
    budget = Budget(1, batch_size=2, learning_rate=1e-9)
    trainer = Trainer(base, data, tmp_path / "out", budget, start=tmp_path)
    for name in (METHOD, "layers-up", "added-attention"):
        conditioning, record = trainer.trained(VARIANTS[name], 0)
        assert conditioning is not None and record["steps"] == 1
        weights = conditioning.adapter.state_dict()
        assert name != "layers-up" or 0 < len(weights) < len(given.state_dict())
        for key, value in weights.items():
            torch.testing.assert_close(value, given.state_dict()[key], atol=1e-5, rtol=0)


def test_several_people_are_placed(model: Path, data: Path, tmp_path: Path) -> None:
    assert main(command(model, data, tmp_path, "face-size", "--seeds", "0")) == 0
    with Image.open(tmp_path / "answers" / "face-size.png") as plot:
        assert min(plot.size) > 300
    cells = json.loads((tmp_path / "answers" / "face-size.json").read_text())["cells"]
    heights = [cell["face_height"] for cell in cells if cell["variant"] == METHOD]
    assert len(heights) == 3 and heights == sorted(heights, reverse=True)


def test_bad_input_of_the_command(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*QUESTIONS, *VARIANTS))
    start = command(model, data, tmp_path, "attention")
    cases = {
        "no question 'colour'": ["ablate", "colour"],
        "no question given": ["ablate"],
        "--data is missing": ["ablate", "pairs"],
        "--seeds must be different": command(model, data, tmp_path, "pairs", "--seeds", "1", "1"),
        "--rate 'colour=1': write": command(model, data, tmp_path, "pairs", "--rate", "colour=1"),
        "--rate 'ip-adapter=x': the rate must be": command(model, data, tmp_path, "pairs", "--rate", "ip-adapter=x"),
        "--identity-loss-weight must be a number from 0": command(
            model, data, tmp_path, "pairs", "--identity-loss-weight", "-1"
        ),
        "no variant 'colour'": command(model, data, tmp_path, "pairs", "--variants", "colour"),
        "--variants needs face-fusion": command(model, data, tmp_path, "pairs", "--variants", "same-photo"),
        "--scales must be a number above 0": command(model, data, tmp_path, "scale", "--scales", "0"),
        "cannot evaluate pictures": command(model, data, tmp_path, "encoders", "--condition-embedder", str(SHIPPED)),
        "--teacher teaches nothing": [*start, "--teacher", str(model), "--init-adapter", str(model), "--steps", "0"],
    }
    for message, words in cases.items():
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())
