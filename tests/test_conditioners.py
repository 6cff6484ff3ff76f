"""Another way to condition on a reference is one class and one registration; calls, places and batches come along."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from test_several_people import LEFT, RIGHT
from tiny_models import face, generate, tiny_pipeline, with_adapter

from face_fusion_pipeline import conditioner as conditioners
from face_fusion_pipeline.conditioner import Conditioner, IdentityOptions, Person, conditioner_of, register_conditioner
from face_fusion_pipeline.face_attention import attention_layers
from face_fusion_pipeline.face_errors import FaceFusionError, IdentityMismatchError
from face_fusion_pipeline.joint_attention import PersonKeys, reference_log_weights


@dataclass(frozen=True)
class Tint:
    """The mean colours of some pictures, (n_refs, 3)."""

    colours: torch.Tensor
    weights: torch.Tensor
    mode: str = "tint"

    @property
    def n_refs(self) -> int:
        return len(self.colours)


class TintConditioner(Conditioner):
    """One token of context for each reference: its mean colour, repeated to the width of the text."""

    mode = "tint"

    def encode(self, pipe: Any, images: Any, options: IdentityOptions) -> Tint:
        pictures = images if isinstance(images, list) else [images]
        colours = torch.stack([torch.from_numpy(np.asarray(p).mean((0, 1))) for p in pictures]).float() / 255
        return Tint(colours, torch.ones(len(colours)))

    def adjusted(self, pipe: Any, identity: Tint, options: IdentityOptions) -> Tint:
        return identity if options.weights is None else replace(identity, weights=torch.tensor(options.weights))

    def keys(self, pipe: Any, person: Person) -> dict[str, PersonKeys]:
        bias, found = reference_log_weights(person.identity.weights), {}
        for name, layer in attention_layers(pipe.unet, "attn2").items():
            tokens = person.identity.colours.repeat(1, layer.to_k.in_features)[None, :, None, : layer.to_k.in_features]
            found[name] = PersonKeys(layer.to_k(tokens), layer.to_v(tokens), bias, person.scale)
        return found


A, B = face(0), face(1)


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr(conditioners, "_conditioners", dict(conditioners._conditioners))
    register_conditioner(TintConditioner())
    return with_adapter(tiny_pipeline())


def test_a_new_one_is_a_mode_of_the_call(pipe):
    tinted = generate(pipe, face_image=A, face_mode="tint")
    assert not torch.allclose(tinted, generate(pipe), atol=1e-4)
    assert torch.equal(tinted, generate(pipe, face_image=pipe.encode_face(A, face_mode="tint")))
    assert torch.equal(generate(pipe, face_image=A, face_mode="tint", face_scale=0), generate(pipe))
    assert not torch.allclose(tinted, generate(pipe, face_image=A), atol=1e-4)


def test_places_weights_and_batches_come_along(pipe):
    one, other = (pipe.encode_face(picture, face_mode="tint") for picture in (A, B))
    swapped = {"face_image": [other, one], "face_boxes": [RIGHT, LEFT]}
    here = generate(pipe, face_image=[one, other], face_boxes=[LEFT, RIGHT])
    torch.testing.assert_close(here, generate(pipe, **swapped), atol=1e-4, rtol=1e-3)
    pair = pipe.encode_face([A, B], face_mode="tint")
    torch.testing.assert_close(
        generate(pipe, face_image=pair, face_weights=[1.0, 0.0]), generate(pipe, face_image=one), atol=1e-4, rtol=1e-3
    )
    batch = generate(pipe, ["a cat", "a dog"], face_image=[[one], [other]])
    torch.testing.assert_close(batch[1], generate(pipe, "a dog", 1, face_image=other)[0], atol=1e-4, rtol=1e-3)


def test_kinds_do_not_mix_and_unknown_ones_are_named(pipe):
    with pytest.raises(IdentityMismatchError, match="one mode, got .*encode_people"):
        generate(
            pipe, face_image=[pipe.encode_face(A, face_mode="tint"), pipe.encode_face(B)], face_boxes=[LEFT, RIGHT]
        )
    with pytest.raises(FaceFusionError, match="must be one of .*tint.* or None, got 'ink'"):
        conditioner_of("ink")
    with pytest.raises(FaceFusionError, match="or None, got ''"):
        generate(pipe, face_image=A, face_mode="")
