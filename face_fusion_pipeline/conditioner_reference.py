"""Face Fusion, the mode without training, and both together: references as seen by the frozen UNet itself.

Trained weights make keys and values for the cross-attention of the hidden states that are found there (Eq. 2, the
paper). The model's own weights make some for the self-attention. A reference passes through the UNet once.
"""

import copy
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .conditioner import Conditioner, IdentityOptions, Person, register_conditioner
from .face_adapter import adapter_fingerprint
from .face_errors import FaceFusionError, IdentityMismatchError
from .face_identity import FaceIdentity, check_identity_fits
from .face_self_attention import SelfAttentionReference
from .joint_attention import KeysAndValues, PersonKeys, reference_log_weights
from .reference_pass import (
    capture_hidden_states,
    face_tensors,
    noise_latents,
    reference_passes,
    self_attention_projections,
)
from .unet_family import (
    encode_latents,
    text_conditions,
    training_alphas,
    unet_arguments,
    unet_fingerprint,
    unet_input,
    weights_fingerprint,
)


# What a UNet that is told the guidance hears while it looks: diffusers' default, so that an identity serves calls with
# any; told nothing, it would see what it was never trained with.
LOOKING_GUIDANCE = 7.5


class ReferenceConditioner(Conditioner):
    """Keys and values of the reference's own hidden states, at cross-attention, at self-attention, or at both.

    Args:
        mode: its name.
        cross: by the trained weights that the pipeline has loaded, at every `attn2`.
        own: by the model's own, at those `attn1` that a [`SelfAttentionReference`] names.
    """

    def __init__(self, mode: str, *, cross: bool, own: bool) -> None:
        self.mode, self.cross, self.own = mode, cross, own

    @torch.no_grad()
    def encode(self, pipe: Any, images: Any, options: IdentityOptions) -> FaceIdentity:
        adapter = self._adapter(pipe)
        own = (options.self_attention or SelfAttentionReference()) if self.own else None
        pictures = face_tensors(images, self._resolution(pipe, options.resolution))
        mirrored = options.mirrored
        if mirrored is None:
            mirrored = len(pictures) == 1 and bool(getattr(pipe.face_defaults, "face_mirrored", False))
        pictures += [pixels.flip(-1) for pixels in pictures] if mirrored else []
        # One by one, for an image encodes the same in any company; first all through the VAE: where models take turns
        # on a GPU, each of them comes once.
        device, lora_scale = pipe._execution_device, options.lora_scale
        conditions = text_conditions(pipe, [""], device, lora_scale)
        encoded = [encode_latents(pipe.vae, pixels.to(device)) for pixels in pictures]
        looks = [self._look(pipe, latents, conditions, adapter, own, options) for latents in encoded]
        pipe.maybe_free_model_hooks()
        references, cells = [found for found, *_ in looks], looks[0][1]
        familiar = [logit for *_, logit in looks if logit is not None]
        identity = FaceIdentity(
            keys={name: torch.cat([r[name][0] for r in references]) for name in references[0]},
            values={name: torch.cat([r[name][1] for r in references]) for name in references[0]},
            weights=torch.ones(len(references)),
            mode=self.mode,
            base_fingerprint=unet_fingerprint(pipe.unet),
            adapter_fingerprint=adapter_fingerprint(adapter) if adapter else "",
            self_attention=own,
            cells=cells,
            weights_fingerprint=weights_fingerprint(pipe.unet, 1.0 if lora_scale is None else lora_scale),
            familiarity=sum(familiar) / len(familiar) if familiar else None,
        )
        weights = options.weights
        return identity.with_weights(weights if weights is None or not mirrored else twice(weights))

    def _look(
        self,
        pipe: Any,
        latents: Tensor,
        conditions: dict[str, Tensor],
        adapter: Any,
        own: SelfAttentionReference | None,
        options: IdentityOptions,
    ) -> tuple[KeysAndValues, dict[str, Tensor], float | None]:
        """Keys and values `(1, N_f, inner)` of one reference's latents, the cells that they are of, and how familiar
        the reference is, where that is asked."""
        unet, (height, width) = pipe.unet, (side * pipe.vae_scale_factor for side in latents.shape[-2:])
        arguments = unet_arguments(conditions, height, width)
        if (width := unet.config.time_cond_proj_dim) is not None:
            guidance = torch.tensor([LOOKING_GUIDANCE - 1])
            arguments["timestep_cond"] = pipe.get_guidance_scale_embedding(guidance, width).to(
                latents.device, unet.dtype
            )
        if options.lora_scale is not None:
            arguments["cross_attention_kwargs"] = {"scale": options.lora_scale}
        found: KeysAndValues = {}
        cells: dict[str, Tensor] = {}
        judge, familiar = options.familiarity, None
        passes = reference_passes(adapter.metadata.reference_timestep if adapter else None, own)
        if judge:
            passes.setdefault(judge.noise, [])
        for (timestep, seed), kinds in passes.items():
            judged = judge is not None and judge.noise == (timestep, seed)
            noised = latents.to(unet.dtype)
            if timestep:
                noised = noise_latents(noised, training_alphas(pipe.scheduler), timestep, seed)
            sample = unet_input(noised, unet.config.in_channels)
            looked_at = sorted({*kinds, *(("attn2",) if judged else ())})
            states = capture_hidden_states(unet, sample, timestep, kind=looked_at, **arguments)
            if adapter and "attn2" in kinds:
                found |= at_device(adapter, next(iter(states.values())).device)(states)
            if own and "attn1" in kinds:
                seen, cells = own.chosen({name: h for name, h in states.items() if name.endswith(".attn1")})
                found |= self_attention_projections(unet, seen)
            if judged:
                familiar = float(judge.logits(states))
        return found, cells, familiar

    def _adapter(self, pipe: Any) -> Any:
        if self.cross and pipe._face_adapter is None:
            raise FaceFusionError(f"face_mode={self.mode!r} needs weights; call `load_face_fusion_adapter(...)` first")
        return pipe._face_adapter if self.cross else None

    def _resolution(self, pipe: Any, resolution: Any) -> int:
        if resolution is None:
            adapter = self._adapter(pipe)
            resolution = adapter.metadata.resolution if adapter else pipe._default_resolution()
        factor = pipe.vae_scale_factor
        if not isinstance(resolution, Integral) or resolution <= 0 or resolution % factor:
            raise FaceFusionError(f"face_resolution {resolution!r} must be a positive multiple of {factor}")
        return int(resolution)

    def adjusted(self, pipe: Any, identity: FaceIdentity, options: IdentityOptions) -> FaceIdentity:
        if self.cross and pipe._face_adapter is None:
            raise IdentityMismatchError(
                "this identity needs the adapter it was encoded with; call `load_face_fusion_adapter(...)` first"
            )
        identity.check(
            unet_fingerprint(pipe.unet),
            adapter_fingerprint(pipe._face_adapter) if self.cross else "",
            weights_fingerprint(pipe.unet, 1.0 if options.lora_scale is None else options.lora_scale),
        )
        check_identity_fits(identity, pipe.unet, pipe._face_adapter)
        identity = identity if options.weights is None else identity.with_weights(options.weights)
        return identity if options.self_scale is None else identity.with_self_scale(options.self_scale)

    def keys(self, pipe: Any, person: Person) -> dict[str, PersonKeys]:
        identity = person.identity.to(pipe._execution_device, pipe.unet.dtype)
        used = identity.weights > 0  # log(0): such references are left out
        log_weights = reference_log_weights(identity.weights[used])
        if log_weights is not None:
            log_weights = log_weights.to(pipe._execution_device)
        token_count_bias = self.cross and pipe._face_adapter.metadata.token_count_bias
        return {
            name: PersonKeys(
                key=key[used.to(key.device)][None],
                value=identity.values[name][used.to(key.device)][None],
                log_weights=log_weights,
                scale=person.scale * identity.scale_at(name) * pipe._layer_scale(name),
                token_count_bias=token_count_bias and name.endswith(".attn2"),
                cells=identity.cells.get(name),
            )
            for name, key in identity.keys.items()
            if pipe._layer_scale(name) > 0
        }


def at_device(adapter: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The adapter on a device: itself, or a copy, for pipelines on other devices may share it."""
    return adapter if next(adapter.parameters()).device == device else copy.deepcopy(adapter).to(device)


def twice(weights: Any) -> list[Any]:
    """The weights of images, then those of the same images mirrored."""
    values = weights.flatten().tolist() if hasattr(weights, "flatten") else weights
    return [*values, *values] if isinstance(values, (list, tuple)) else [values, values]


register_conditioner(ReferenceConditioner("adapter", cross=True, own=False))
register_conditioner(ReferenceConditioner("training-free", cross=False, own=True))
register_conditioner(ReferenceConditioner("both", cross=True, own=True))
