"""Reference faces: one pass through the frozen UNet, and the identity (keys and values) that is kept of it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from .face_adapter import KeysAndValues, read_tensors, same_fingerprint, save_tensors
from .face_attention import (
    attention_layers,
    call_processor,
    check_idle,
    installed_processors,
    is_ip_adapter_processor,
    reference_log_weights,
)
from .face_defaults import FACE_MODES
from .face_errors import FaceFusionError, IdentityMismatchError, InvalidScaleError
from .face_file_checks import check_identity, is_fingerprint, shown
from .face_ownership import OwnThread, own_thread
from .face_pictures import centre_square, load_images
from .face_self_attention import WHOLE_AND_CLEAN, SelfAttentionReference


IDENTITY_FORMAT = "face-fusion-identity"
WITHOUT_SELF_ATTENTION, WITH_SELF_ATTENTION = "1", "2"  # format versions; all of an adapter alone is in the first
MODE_WITH_WEIGHTS = "adapter"  # the mode where weights are loaded and none is asked for: the paper
NOISE_SEED = 0


# --- Reference images --------------------------------------------------------------------------------------------


def face_tensors(images: Any, resolution: int) -> list[Tensor]:
    """One or several face crops as `(1, 3, resolution, resolution)` in [-1, 1], centre-cropped to a square.

    Args:
        images: what `face_pictures.load_image` takes, a batch of arrays or tensors, or a list of these. All kinds of
            one picture give the same tensor, resized as `FacePhoto.crop` does.

    Raises:
        UnreadableImageError: a picture that cannot be read, or no image at all.
    """
    squares = [centre_square(image, resolution) for image in load_images(images, min_side=1)]
    arrays = [torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() for square in squares]
    return [pixels / 255 * 2 - 1 for pixels in arrays]


def quick_format(images: Tensor) -> Tensor:
    """The same images `(B, C, H, W)` in the memory format in which a device convolves them fastest.

    Convolutions follow the format of their input, so the model's weights stay as they are.
    """
    return images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images


def encode_latents(vae: Any, pixels: Tensor) -> Tensor:
    """Scaled latents of images `(B, 3, H, W)` in [-1, 1]: the posterior's mode, or what AutoencoderTiny returns."""
    encoded = vae.encode(quick_format(pixels.to(vae.dtype)))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * vae.config.scaling_factor


def noise_latents(latents: Tensor, alphas_cumprod: Tensor, timestep: int, seed: int = NOISE_SEED) -> Tensor:
    """Latents `(B, c, h, w)` noised to `timestep` (unchanged at 0) with the same seeded noise for every sample.

    Raises:
        FaceFusionError: a timestep that the schedule does not have.
    """
    if timestep == 0:
        return latents
    if timestep >= len(alphas_cumprod):
        raise FaceFusionError(f"a reference cannot be noised to {timestep} of {len(alphas_cumprod)} timesteps")
    noise = torch.randn((1, *latents.shape[1:]), generator=torch.Generator().manual_seed(seed))
    alpha = float(alphas_cumprod[timestep])
    noised = alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise.to(latents.device)
    return noised.to(latents.dtype)


# --- Reference pass ----------------------------------------------------------------------------------------------


class _CaptureProcessor:
    """Notes the input of a layer and leaves its output as it is, without what an IP-Adapter would add.

    Only in the thread of the reference pass: calls of the same UNet in other threads are none of its business.
    """

    def __init__(self, thread: OwnThread) -> None:
        self.thread = thread
        self.hidden_states: Tensor | None = None
        self.original: Any = None
        self.plain: Any = None

    @property
    def acts_here(self) -> bool:
        return self.thread.here

    def take_over(self, original: Any) -> None:
        self.original = original
        self.plain = AttnProcessor2_0() if is_ip_adapter_processor(original) else original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        processor = self.original
        if self.acts_here:
            self.hidden_states, processor = hidden_states, self.plain
        return call_processor(
            processor, attn, hidden_states, encoder_hidden_states, attention_mask, temb, ip_adapter_masks
        )


@contextmanager
def _without_ip_adapter(unet: Any, thread: OwnThread) -> Iterator[None]:
    """An IP-Adapter makes the UNet demand image embeddings; the reference pass, in `thread`, has none of them."""
    unet = getattr(unet, "_orig_mod", unet)
    if unet.config.encoder_hid_dim_type != "ip_image_proj":
        yield
        return
    process = unet.process_encoder_hidden_states

    def text_alone(encoder_hidden_states: Tensor, added_cond_kwargs: dict[str, Any]) -> Any:
        return encoder_hidden_states if thread.here else process(encoder_hidden_states, added_cond_kwargs)

    unet.process_encoder_hidden_states = text_alone
    try:
        yield
    finally:
        del unet.process_encoder_hidden_states


@torch.no_grad()
def capture_hidden_states(
    unet: Any,
    latents: Tensor,
    timestep: int | Tensor,
    encoder_hidden_states: Tensor,
    kind: str | Sequence[str] = "attn2",
    **unet_kwargs: Any,
) -> dict[str, Tensor]:
    """h_f of Eq. 2: what enters every attention layer when the UNet sees the reference.

    Args:
        latents: `(B, c, h, w)`, scaled.
        timestep: of the reference pass.
        encoder_hidden_states: `(B or 1, N_c, text width)`, of the empty prompt.
        kind: `"attn2"` for a trained adapter, `"attn1"` for the training-free mode, or both of one pass.
        unet_kwargs: further arguments of the UNet, such as `added_cond_kwargs`.

    Returns:
        layer name -> `(B, N_f, C)`.

    Raises:
        FaceFusionError: there are faces in the UNet, which would show in the reference.
    """
    check_idle(unet)
    thread = own_thread()
    kinds = [kind] if isinstance(kind, str) else kind
    layers = {name: layer for each in kinds for name, layer in attention_layers(unet, each).items()}
    captures = {name: _CaptureProcessor(thread) for name in layers}
    cross = attention_layers(unet, "attn2")
    bystanders = {name: _CaptureProcessor(thread) for name in cross if name not in layers}
    ip_adapter = {name: p for name, p in bystanders.items() if is_ip_adapter_processor(cross[name].processor)}
    text = encoder_hidden_states.expand(latents.shape[0], -1, -1)
    with _without_ip_adapter(unet, thread), installed_processors(unet, {**captures, **ip_adapter}):
        unet(quick_format(latents), timestep, encoder_hidden_states=text, return_dict=False, **unet_kwargs)
    return {name: capture.hidden_states for name, capture in captures.items() if capture.hidden_states is not None}


def reference_passes(
    adapter_timestep: int | None, own: SelfAttentionReference | None
) -> dict[tuple[int, int], list[str]]:
    """(timestep, seed) of the noise -> kinds of attention that read that pass: one, where one level serves both.

    Args:
        adapter_timestep: that of a trained adapter, None without.
        own: of the self-attention, None without.
    """
    passes: dict[tuple[int, int], list[str]] = {}
    if adapter_timestep is not None:
        passes.setdefault((adapter_timestep, NOISE_SEED if adapter_timestep else 0), []).append("attn2")
    if own is not None:
        passes.setdefault(own.noise, []).append("attn1")
    return passes


def self_attention_projections(unet: Any, hidden_states: Mapping[str, Tensor]) -> KeysAndValues:
    """Training-free keys and values: the model's own `to_k`, `to_v` of each `attn1` on the reference's states."""
    layers = attention_layers(unet, "attn1")
    return {name: (layers[name].to_k(h), layers[name].to_v(h)) for name, h in hidden_states.items()}


# --- Identity ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FaceIdentity:
    """The face of one person, ready to use: encode once, generate with any prompt (Eq. 2 and 6).

    Attributes:
        keys, values: layer name -> `(n_refs, N_f, inner)`.
        weights: `(n_refs,)`, >= 0; only their ratios matter.
        mode: `"adapter"` (layers are `attn2`), `"training-free"` (`attn1`) or `"both"`.
        base_fingerprint, adapter_fingerprint: the models it was made with (see `face_adapter.fingerprint`).
        self_attention: what its `attn1` layers see of the references and how strongly; None in mode `"adapter"`.
        cells: layer name -> bool `(h_f, w_f)`, the cells of a reference that N_f are; all where a name is missing.
    """

    keys: dict[str, Tensor]
    values: dict[str, Tensor]
    weights: Tensor
    mode: str
    base_fingerprint: str = ""
    adapter_fingerprint: str = ""
    self_attention: SelfAttentionReference | None = None
    cells: dict[str, Tensor] = field(default_factory=dict)

    @property
    def needs_adapter(self) -> bool:
        """Whether it was projected by trained weights, and so goes with these alone."""
        return self.mode != "training-free"

    @property
    def n_refs(self) -> int:
        """Number of reference images."""
        return next(iter(self.keys.values())).shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "FaceIdentity":
        """The identity on a device and in a precision."""
        keys, values = ({n: t.to(device, dtype) for n, t in kv.items()} for kv in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def with_weights(self, weights: Any) -> "FaceIdentity":
        """The same references in another proportion; `None` means equal. Checked against the number of references."""
        if weights is None:
            return replace(self, weights=torch.ones(self.n_refs))
        try:
            tensor = torch.as_tensor(weights, dtype=torch.float32).cpu().flatten()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidScaleError(f"face weights must be numbers, got {weights!r}") from error
        if tensor.numel() != self.n_refs:
            raise InvalidScaleError(f"{tensor.numel()} face weights for {self.n_refs} face images; give one for each")
        reference_log_weights(tensor)  # raises on negative or all-zero weights
        return replace(self, weights=tensor)

    def with_self_scale(self, scale: float) -> "FaceIdentity":
        """The same with another strength at the self-attention, in [0, 100].

        Raises:
            InvalidScaleError: out of range, or an identity of mode `"adapter"`, which has no such part.
        """
        if self.self_attention is None:
            raise InvalidScaleError(
                f"face_self_scale={scale:g} is of the modes 'both' and 'training-free': this face is in 'adapter'"
            )
        return replace(self, self_attention=self.self_attention.with_scale(scale))

    def scale_at(self, name: str) -> float:
        """Strength at a layer, which the strengths of the call multiply."""
        return self.self_attention.scale if self.self_attention and name.endswith(".attn1") else 1.0

    def check(self, base_fingerprint: str, adapter_fingerprint: str) -> None:
        """Raise [`IdentityMismatchError`] unless the models are those the identity was made with."""
        if not same_fingerprint(self.base_fingerprint, base_fingerprint):
            raise IdentityMismatchError(
                "this identity was encoded with another base model; encode the face again with `pipe.encode_face(...)`"
            )
        if self.needs_adapter and not same_fingerprint(self.adapter_fingerprint, adapter_fingerprint):
            raise IdentityMismatchError(
                "this identity was encoded with other adapter weights; load those, or encode the face again"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the fingerprints as metadata."""
        tensors = {f"{name}.key": key for name, key in self.keys.items()}
        tensors |= {f"{name}.value": value for name, value in self.values.items()}
        tensors |= {f"{name}.cells": cells for name, cells in self.cells.items()}
        metadata = {
            "format": IDENTITY_FORMAT,
            "format_version": WITHOUT_SELF_ATTENTION if self.self_attention is None else WITH_SELF_ATTENTION,
            "mode": self.mode,
            "base_fingerprint": self.base_fingerprint,
            "adapter_fingerprint": self.adapter_fingerprint,
            **({} if self.self_attention is None else self.self_attention.to_strings()),
        }
        save_tensors(path, {"weights": self.weights, **tensors}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FaceIdentity":
        """Read what `save` wrote.

        Raises:
            ModelNotFoundError: no such file.
            IdentityMismatchError: not an identity, damaged, or of another format version.
        """
        tensors, metadata = read_tensors(path, IdentityMismatchError, lambda strings: _check_metadata(strings, path))
        keys, values, cells = (
            {name.removesuffix(suffix): tensor for name, tensor in tensors.items() if name.endswith(suffix)}
            for suffix in (".key", ".value", ".cells")
        )
        if "weights" not in tensors or keys.keys() != values.keys() or not keys:
            raise IdentityMismatchError(
                f"{path} lacks weights, or a key and a value for each layer: it is damaged; encode the face again "
                "with `pipe.encode_face(...)`"
            )
        if len(tensors) != 1 + 2 * len(keys) + len(cells):
            raise IdentityMismatchError(f"{path} has tensors that are of no identity: it is damaged")
        mode, fingerprints = metadata["mode"], (metadata["base_fingerprint"], metadata["adapter_fingerprint"])
        own = None
        if metadata["format_version"] == WITH_SELF_ATTENTION:
            own = SelfAttentionReference.from_strings(metadata)
        elif mode == "training-free":
            own = WHOLE_AND_CLEAN
        identity = cls(keys, values, tensors["weights"], mode, *fingerprints, own, cells)
        check_identity(identity, str(path))
        return identity


def _check_metadata(strings: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    """Raise [`IdentityMismatchError`] unless these are the metadata of an identity file that can be read."""
    form, version = strings.get("format"), strings.get("format_version")
    if form != IDENTITY_FORMAT or version not in (WITHOUT_SELF_ATTENTION, WITH_SELF_ATTENTION):
        raise IdentityMismatchError(
            f"{path} has format {shown(form)} version {shown(version)}, expected {IDENTITY_FORMAT!r} version "
            f"{WITHOUT_SELF_ATTENTION} or {WITH_SELF_ATTENTION}"
        )
    if lacking := [name for name in ("mode", "base_fingerprint", "adapter_fingerprint") if name not in strings]:
        raise IdentityMismatchError(
            f"{path} lacks {', '.join(lacking)}: it is damaged; encode the face again with `pipe.encode_face(...)`"
        )
    if strings["mode"] not in FACE_MODES:
        raise IdentityMismatchError(
            f"{path} has mode {shown(strings['mode'])}, expected one of {', '.join(FACE_MODES)}"
        )
    if wrong := [name for name in ("base_fingerprint", "adapter_fingerprint") if not is_fingerprint(strings[name])]:
        raise IdentityMismatchError(f"{path} has the {wrong[0]} {shown(strings[wrong[0]])}, not numbers of a model")
