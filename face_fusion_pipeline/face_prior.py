"""From text to the CLIP embedding of a picture that it describes, by a `PriorTransformer` of diffusers.

A folder or Hub repository of a prior has `prior/`, `prior_scheduler/`, `tokenizer/` and `text_encoder/`, as
kakaobrain/karlo-v1-alpha, the public prior of ViT-L/14, has them. Tokenizer and text encoder may also be those of a
model beside it, whose `text_encoder/` has no projection: then `clip_score/`, the text tower with it, is taken.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from diffusers import KandinskyPriorPipeline, PriorTransformer, UnCLIPScheduler
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .face_errors import FaceFusionError, InvalidPromptError, ModelNotFoundError, short, shown


logger = logging.getLogger(__name__)

KARLO = "kakaobrain/karlo-v1-alpha"
PRIOR_SETTINGS = "prior_settings.json"
KEPT = 64  # prompts whose embeddings are kept


@dataclass(frozen=True)
class PriorSettings:
    """How a prior is sampled; where `prior_settings.json` lies in `prior/`, that says so. The defaults are Karlo's.

    Raises:
        FaceFusionError: a value out of range.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.num_inference_steps, Integral) and 2 <= self.num_inference_steps <= 1000):
            raise FaceFusionError(f"a prior takes 2 to 1000 steps, got {shown(self.num_inference_steps)}")
        if not (isinstance(self.guidance_scale, Real) and 0 <= self.guidance_scale <= 100):
            raise FaceFusionError(f"guidance of a prior is from 0 to 100, got {shown(self.guidance_scale)}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, default=lambda number: number.item()) + "\n"  # of numpy, too


class PriorPipeline(KandinskyPriorPipeline):
    """diffusers' sampling of a prior, without the image encoder that only makes its embedding of a black picture."""

    def __init__(
        self,
        prior: PriorTransformer,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        scheduler: UnCLIPScheduler,
    ) -> None:
        super(KandinskyPriorPipeline, self).__init__()  # that of the class itself registers the image encoder, too
        self.register_modules(prior=prior, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    def get_zero_embed(self, batch_size: int = 1, device: torch.device | None = None) -> Tensor:
        return torch.zeros(batch_size, 1, device=device)


class TextPrior:
    """Embeddings of pictures for prompts. Weights are read at the first prompt, results kept for the last 64.

    The embedding of a prompt depends on the prompt and the settings alone: each is sampled by itself, from one seed.

    Args:
        load: makes the pipeline, see [`load_prior`].
        name: what messages and metadata call it.
        settings: how it is sampled.
    """

    def __init__(self, load: Any, name: str, settings: PriorSettings | None = None) -> None:
        self.name, self.settings = name, settings or PriorSettings()
        self._load, self._pipeline = load, None
        self._place: tuple[Any, ...] = ()
        self._kept = lru_cache(KEPT)(self._sampled)

    @property
    def pipeline(self) -> Any:
        """The models, as a diffusers pipeline; read now if they were not yet. Raises as [`load_prior`] says."""
        if self._pipeline is None:
            pipeline = self._load()
            self._pipeline = pipeline.to(*self._place) if self._place else pipeline
        return self._pipeline

    @property
    def width(self) -> int:
        """Of the embeddings."""
        return self.pipeline.prior.config.embedding_dim

    def to(self, *device_or_dtype: Any) -> "TextPrior":
        """Where and how precisely it computes, as of a pipeline; reads no weights."""
        self._place = device_or_dtype
        if self._pipeline is not None:
            self._pipeline.to(*device_or_dtype)
        return self

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (n, width), float32 on the CPU, in CLIP's common space and not of unit length.

        Raises:
            InvalidPromptError: a prompt that is not text. ModelNotFoundError: no weights, see [`load_prior`].
        """
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise InvalidPromptError(f"a prompt is text, got {shown(prompt)}")
        if not prompts:
            return torch.empty(0, self.width)
        return torch.stack([self._kept(prompt) for prompt in prompts])

    def _sampled(self, prompt: str) -> Tensor:
        pipeline = self.pipeline  # which may bring its settings along
        settings = self.settings
        with torch.no_grad():
            found = pipeline(
                prompt,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                generator=torch.Generator().manual_seed(settings.seed),
            )
        return found.image_embeds[0].float().cpu()


def load_prior(
    source: str | os.PathLike[str] = KARLO,
    subfolder: str = "",
    *,
    text: str | os.PathLike[str] | None = None,
    settings: PriorSettings | None = None,
    **hub: Any,
) -> TextPrior:
    """A prior from a folder or Hub repository, see above. Nothing is read or fetched before the first prompt.

    Args:
        source: folder or Hub id; by default Karlo, about 4 GB, for models whose image encoder is CLIP's ViT-L/14.
        subfolder: where in it `prior/` and `prior_scheduler/` lie.
        text: folder or Hub id with tokenizer and text encoder; by default `source`.
        settings: default: what `prior/prior_settings.json` says, else Karlo's.
        hub: `revision`, `token`, `cache_dir`, `local_files_only` and the like, for `from_pretrained`.

    Raises:
        ModelNotFoundError: a folder without a prior; at the first prompt also: it cannot be fetched or read.
    """
    folder = Path(source) / subfolder
    if Path(source).is_dir() and not (folder / "prior").is_dir():
        raise ModelNotFoundError(f"no prior in {folder}: it has to hold prior/ and prior_scheduler/, as {KARLO} has")
    if not Path(source).is_dir() and (os.path.isabs(source) or str(source).count("/") != 1):
        raise ModelNotFoundError(f"no prior {source}: give a folder, or a Hub id such as {KARLO}")
    local = folder / "prior" / PRIOR_SETTINGS
    given = _read_settings(local) if settings is None and local.is_file() else settings

    def load() -> PriorPipeline:
        try:
            if given is None and not folder.is_dir() and (fetched := _fetched_settings(str(source), subfolder, hub)):
                prior.settings = _read_settings(fetched)
            return _read(str(source), subfolder, str(text or source), hub)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelNotFoundError(
                f"cannot load the prior {source} ({type(error).__name__}: {short(error, 120)}): go online once, or "
                f"run `hf download {source}` where there is a network and give the folder"
            ) from error

    prior = TextPrior(load, str(source) if not subfolder else f"{source}/{subfolder}", given)
    return prior


def _read(source: str, subfolder: str, text: str, hub: dict[str, Any]) -> PriorPipeline:
    def place(part: str) -> str:
        return f"{subfolder}/{part}".lstrip("/")

    tower = "clip_score" if (Path(text) / "clip_score").is_dir() else "text_encoder"
    prior = PriorTransformer.from_pretrained(source, subfolder=place("prior"), **hub)
    scheduler = UnCLIPScheduler.from_pretrained(source, subfolder=place("prior_scheduler"), **hub)
    tokenizer = CLIPTokenizer.from_pretrained(text, subfolder="tokenizer", **hub)
    encoder, found = CLIPTextModelWithProjection.from_pretrained(
        text, subfolder=tower, output_loading_info=True, **hub
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{text}/{tower} lacks {missing[0]}: it is no text tower with projection")
    if encoder.config.projection_dim != (prior.config.embedding_proj_dim or prior.config.embedding_dim):
        raise ValueError(f"the text tower of {text} is {encoder.config.projection_dim} wide: it is of another CLIP")
    logger.info("loaded the prior %s", source)
    for model in (prior, encoder):
        model.eval().requires_grad_(False)
    return PriorPipeline(prior, encoder, tokenizer, scheduler)


def _fetched_settings(source: str, subfolder: str, hub: dict[str, Any]) -> Path | None:
    """The file of a repository that says how its prior is sampled; None where there is none, as in Karlo's."""
    try:
        return Path(hf_hub_download(source, f"{subfolder}/prior/{PRIOR_SETTINGS}".lstrip("/"), **hub))
    except (OSError, ValueError):  # no such file, or offline and not in the cache
        return None


def _read_settings(path: Path) -> PriorSettings:
    try:
        return PriorSettings(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise FaceFusionError(f"{path} does not say how a prior is sampled: {short(error)}") from error
