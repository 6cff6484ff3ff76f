"""From text to the embedding of a picture: priors of diffusers, and the small one that is trained for avatars."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from face_fusion_pipeline import face_prior
from face_fusion_pipeline.avatars.training import presets
from face_fusion_pipeline.avatars.training.clip import create_clip
from face_fusion_pipeline.avatars.training.data import load_avatars, render_avatars
from face_fusion_pipeline.avatars.training.prior import PriorTask, agreement, create_prior, describe
from face_fusion_pipeline.avatars.training.tokenizer import train_tokenizer
from face_fusion_pipeline.avatars.world.dataset import write
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.evaluation.clip_score import load_clip
from face_fusion_pipeline.face_errors import FaceFusionError, InvalidPromptError, ModelNotFoundError
from face_fusion_pipeline.face_prior import PRIOR_SETTINGS, PriorSettings, TextPrior, load_prior
from face_fusion_pipeline.generation.avatar_model import embedded_model
from face_fusion_pipeline.training.loop import TrainingError


SIZE, WIDTH = 32, 32


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the CLIP of a few avatars, and a prior that was trained for two steps."""
    folder = tmp_path_factory.mktemp("work")
    for split in ("train", "validation"):
        write(folder / "data" / split, split, 12, size=SIZE, progress=False)
    captions = load_avatars(folder / "data", "train").captions
    tokenizer = train_tokenizer(captions)
    tokenizer.model_max_length = 48
    torch.manual_seed(0)
    clip = create_clip(tokenizer, SIZE, WIDTH, 1, 32, 1, WIDTH)
    text = CLIPTextModelWithProjection(clip.config.text_config)
    text.load_state_dict(clip.state_dict(), strict=False)
    text.save_pretrained(folder / "model" / "clip_score")
    tokenizer.save_pretrained(folder / "model" / "tokenizer")
    from transformers import CLIPTextModel, CLIPVisionModelWithProjection

    vision = CLIPVisionModelWithProjection(clip.config.vision_config)
    vision.load_state_dict(clip.state_dict(), strict=False)
    vision.save_pretrained(folder / "model" / "image_encoder")
    CLIPTextModel(clip.config.text_config).save_pretrained(folder / "model" / "text_encoder")
    words = ["--data", str(folder / "data"), "--out", str(folder / "model"), "--threads", "1", "--batch-size", "4"]
    with pytest.MonkeyPatch.context() as patch:
        small = presets.Preset({"width": 32, "layers": 1}, presets.PRESETS["prior"]["cpu"].loop)
        patch.setitem(presets.PRESETS["prior"], "cpu", small)
        assert main(["avatars-train", "prior", *words, "--steps", "2"]) == 0
    return folder


def test_the_command_writes_a_prior_and_says_how_it_agrees(work: Path) -> None:
    model = work / "model"
    assert json.loads((model / "prior" / PRIOR_SETTINGS).read_text())["num_inference_steps"] >= 2
    with safe_open(model / "prior" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_tensor("proj_in.weight").dtype == torch.float16
        assert float(file.get_tensor("clip_std").min()) > 0
    lines = [json.loads(line) for line in (model / "logs" / "prior" / "metrics.jsonl").read_text().splitlines()]
    assert -1 <= lines[-1]["validation_cosine"] <= 1 and 0 <= lines[-1]["validation_found"] <= 1
    assert json.loads((model / "training.json").read_text())["prior"]["steps"] == 2


def test_a_prompt_has_one_embedding_whatever_is_beside_it(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = load_prior(work / "model")
    assert prior.settings == PriorSettings(2, 1.0)
    both = prior(["a person in a red shirt", "a person in space"])
    assert both.shape == (2, WIDTH) and both.dtype == torch.float32 and prior.width == WIDTH
    assert not torch.allclose(both[0], both[1])
    again = load_prior(work / "model")
    assert torch.equal(again(["a person in space"])[0], both[1])
    assert again([]).shape == (0, WIDTH)
    assert load_prior(work / "model", settings=PriorSettings(3, 2.0, seed=1))(["a"]).isfinite().all()
    with pytest.raises(InvalidPromptError, match="got 3"):
        prior(["a", 3])  # type: ignore[list-item]
    monkeypatch.setattr(type(prior.pipeline), "__call__", lambda *_, **__: pytest.fail("it was kept"))
    assert torch.equal(prior(["a person in space"])[0], both[1])


def test_a_repository_says_how_its_prior_is_sampled(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a repository of the Hub stands the folder that is downloaded from it."""
    pipeline = load_prior(work / "model").pipeline
    asked = []

    def download(source: str, file: str, **hub: object) -> str:
        asked.append((source, file, hub))
        if source == "somebody/none":
            raise OSError("no such file")
        return str(work / "model" / "prior" / PRIOR_SETTINGS)

    monkeypatch.setattr(face_prior, "hf_hub_download", download)
    monkeypatch.setattr(face_prior, "_read", lambda *_: pipeline)
    prior = load_prior("somebody/prior", "studio", revision="main")
    assert asked == []
    assert torch.equal(prior(["a"]), load_prior(work / "model")(["a"])) and prior.settings == PriorSettings(2, 1.0)
    assert asked == [("somebody/prior", f"studio/prior/{PRIOR_SETTINGS}", {"revision": "main"})]
    other = load_prior("somebody/none")
    assert other.pipeline is pipeline and other.settings == PriorSettings()


def test_nothing_is_read_before_the_first_prompt() -> None:
    def load() -> None:
        raise RuntimeError("asked")

    prior = TextPrior(load, "mine").to("cpu")
    with pytest.raises(RuntimeError, match="asked"):
        prior(["a"])


def test_a_prior_lies_in_a_subfolder_and_takes_the_text_tower_of_the_model(work: Path, tmp_path: Path) -> None:
    for part in ("prior", "prior_scheduler"):
        shutil.copytree(work / "model" / part, tmp_path / "studio" / part)
    found = load_prior(tmp_path, "studio", text=work / "model", settings=PriorSettings(2, 1.0))(["a"])
    assert torch.equal(found, load_prior(work / "model")(["a"]))
    shutil.copytree(work / "model" / "tokenizer", tmp_path / "studio" / "tokenizer")
    shutil.copytree(work / "model" / "text_encoder", tmp_path / "studio" / "text_encoder")
    with pytest.raises(ModelNotFoundError, match="text_encoder lacks text_projection"):
        load_prior(tmp_path / "studio")(["a"])


def test_what_is_no_prior_is_refused_in_one_line(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match="it has to hold prior/ and prior_scheduler/"):
        load_prior(tmp_path)
    with pytest.raises(ModelNotFoundError, match="give a folder, or a Hub id such as"):
        load_prior(tmp_path / "nowhere")
    offline = load_prior("somebody/prior")
    with pytest.raises(ModelNotFoundError, match="go online once, or run `hf download somebody/prior`") as caught:
        offline(["a"])
    assert "\n" not in str(caught.value)
    (tmp_path / "prior").mkdir()
    (tmp_path / "prior" / PRIOR_SETTINGS).write_text('{"steps": 3}')
    with pytest.raises(FaceFusionError, match=f"{PRIOR_SETTINGS} does not say"):
        load_prior(tmp_path)
    for wrong in ({"num_inference_steps": 1}, {"num_inference_steps": 2.5}, {"guidance_scale": -1}):
        with pytest.raises(FaceFusionError, match="got"):
            PriorSettings(**wrong)
    assert face_prior.KARLO in str(load_prior().name)
    with pytest.raises(FaceFusionError, match="train the stage `clip` first"):
        main_raises(["avatars-train", "prior", "--data", str(work / "data"), "--out", str(tmp_path), "--steps", "1"])


def main_raises(words: list[str]) -> None:
    import argparse

    from face_fusion_pipeline.cli import avatars_train

    parser = argparse.ArgumentParser()
    avatars_train.add_arguments(parser)
    avatars_train.run(parser.parse_args(words[1:]))


def test_it_learns_what_captions_say(work: Path) -> None:
    """On the few scenes it is trained with, an own caption tells the embedding better than another one."""
    data = load_avatars(work / "data", "train")
    clip, tokenizer = load_clip(work / "model"), CLIPTokenizer.from_pretrained(work / "model" / "tokenizer")
    torch.manual_seed(0)
    task = PriorTask(create_prior(clip, 64, 2), clip, tokenizer, data, data)
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], 3e-3)
    for step in range(60):
        batch = task.batch(torch.arange(len(data)), torch.Generator().manual_seed(step), 0.0)
        loss, measured = task(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert measured.keys() == {"error_from_noise"}
    figures = task.eval().sample(work / "nothing.png")
    assert figures["validation_found"] > 0.5
    assert figures["validation_cosine"] > figures["validation_cosine_of_another"]


def test_captions_without_their_padding_give_the_same(work: Path) -> None:
    """The training leaves padding out; the pipeline does not."""
    data = load_avatars(work / "data", "train")
    clip, tokenizer = load_clip(work / "model"), CLIPTokenizer.from_pretrained(work / "model" / "tokenizer")
    task = PriorTask(create_prior(clip, 32, 1), clip, tokenizer, data, data).eval()
    torch.nn.init.normal_(task.prior.positional_embedding)
    batch = task.batch(torch.arange(4), torch.Generator().manual_seed(0), 0.0)
    batch["timesteps"] = torch.full((4,), 500)
    width = tokenizer.model_max_length - batch["states"].shape[1]
    padded = batch | {
        "states": torch.nn.functional.pad(batch["states"], (0, 0, 0, width)),
        "words": torch.nn.functional.pad(batch["words"], (0, width)),
    }
    assert width > 0
    with torch.no_grad():
        torch.testing.assert_close(task(batch)[0], task(padded)[0])
    known = describe(clip, tokenizer, data)
    assert known.caption.min() > 0 and not known.words[0][2:].any()  # the first is the empty caption


def test_the_shipped_prior_knows_what_unseen_scenes_look_like(tmp_path: Path) -> None:
    model = embedded_model()
    weights = model / "face_studio" / "prior" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 4_000_000
    scenes = render_avatars(tmp_path, "test", 24, "cpu")
    known = describe(load_clip(model), CLIPTokenizer.from_pretrained(model / "tokenizer"), scenes)
    found = load_prior(model / "face_studio", text=model)(scenes.captions)
    figures = agreement(found, known.images, known.images.mean(0, keepdim=True), scenes.captions)
    assert figures["cosine"] > 0.85 and figures["cosine_of_another"] < 0.4 and figures["found"] > 0.6, figures


def test_figures_of_agreement() -> None:
    true = torch.eye(3)
    mean = true.mean(0, keepdim=True)
    right = agreement(true, true, mean, ["a", "b", "c"])
    assert right["found"] == right["cosine"] == 1 and right["centred_cosine"] == pytest.approx(1)
    assert right["cosine_of_another"] == 0 and right["cosine_of_mean"] == pytest.approx(3**-0.5)
    assert agreement(true.roll(1, 0), true, mean, ["a", "b", "c"])["found"] == 0


def test_a_clip_of_two_widths_is_refused(work: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(work / "model" / "tokenizer")
    with pytest.raises(TrainingError, match="the text tower is 32 wide and the common space 16"):
        create_prior(create_clip(tokenizer, SIZE, 32, 1, 32, 1, 16), 32, 1)
