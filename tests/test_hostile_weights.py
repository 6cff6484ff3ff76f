"""Weights and identities of others: bounded metadata, checked contents, header first, no pickles, short messages."""

import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import face, generate, tiny_pipeline, with_adapter

from face_fusion_pipeline import face_files
from face_fusion_pipeline.face_adapter import AdapterMetadata, load_adapter, save_adapter
from face_fusion_pipeline.face_errors import (
    AdapterMismatchError,
    FaceFusionError,
    IdentityMismatchError,
    ModelNotFoundError,
)
from face_fusion_pipeline.face_files import read_tensors
from face_fusion_pipeline.face_identity import FaceIdentity, check_identity_fits
from face_fusion_pipeline.generation.loading import load_pipeline
from face_fusion_pipeline.training.averaging import average_adapters
from face_fusion_pipeline.training.base_model import load_base


@pytest.fixture(scope="module")
def pipe():
    return with_adapter(tiny_pipeline())


@pytest.fixture
def file(pipe, tmp_path) -> Path:
    save_adapter(pipe._face_adapter, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def rewritten(path: Path, change=lambda tensors: None, **metadata: str) -> Path:
    with safe_open(path, "pt") as content:
        strings = content.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {**strings, **metadata})
    return path


def refused(error: type[FaceFusionError], work, *words: str) -> None:
    with pytest.raises(error) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert all(word in message for word in words), message


# --- Metadata -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("face_crop", "1000"),
        ("face_crop", "0"),
        ("face_crop", "-1.6"),
        ("face_crop", "nan"),
        ("face_crop", "inf"),
        ("face_crop", "1e999"),
        ("face_crop", "wide"),
        ("resolution", "0"),
        ("resolution", "-8"),
        ("resolution", "100000"),
        ("resolution", "9" * 5000),
        ("reference_timestep", "5000"),
        ("reference_timestep", "-1"),
        ("reference_mode", "x" * 100_000),
        ("base_family", "x" * 100_000),
        ("base_fingerprint", "x y"),
        ("base_fingerprint", "1 nan"),
        ("token_count_bias", "y" * 100_000),
        ("format", "z" * 100_000),
        ("format_version", "2" * 100_000),
    ],
)
def test_metadata_out_of_range_are_refused_and_shown_in_short(pipe, file, name, value):
    metadata = {"reference_mode": "noised"} if name == "reference_timestep" else {}
    rewritten(file, **metadata, **{name: value})
    refused(AdapterMismatchError, lambda: pipe.load_face_fusion_adapter(file))


@pytest.mark.parametrize("change", [{"face_crop": 0.5}, {"face_crop": 5}, {"resolution": 2048}, {"resolution": 8}])
def test_the_ends_of_the_ranges_are_inside(change):
    assert vars(AdapterMetadata("sd1", **change)).items() >= change.items()
    noised = AdapterMetadata("sd1", reference_mode="noised", reference_timestep=999)
    assert AdapterMetadata.from_strings(noised.to_strings()) == noised


# --- Contents of adapters -----------------------------------------------------------------------------------------


def spoiled(value: float):
    def change(tensors):
        next(iter(tensors.values()))[0, 0] = value

    return change


def cast(dtype: torch.dtype, all_of_them: bool = True):
    def change(tensors):
        for name in list(tensors)[: None if all_of_them else 1]:
            tensors[name] = tensors[name].to(dtype)

    return change


BAD_CONTENTS = [
    (spoiled(float("nan")), "NaN"),
    (spoiled(float("inf")), "infinite"),
    (cast(torch.int32), "int32"),
    (cast(torch.bool), "bool"),
    (cast(torch.float16, all_of_them=False), "float16 and torch.float32"),
]


@pytest.mark.parametrize(("change", "words"), BAD_CONTENTS, ids=["NaN", "Inf", "integers", "bools", "mixed"])
def test_contents_that_are_no_weights_are_refused_before_any_use(pipe, file, change, words):
    before = pipe._face_adapter
    rewritten(file, change)
    refused(AdapterMismatchError, lambda: pipe.load_face_fusion_adapter(file), words)
    refused(AdapterMismatchError, lambda: pipe.load_face_fusion_adapter(load_file(file)), words)
    refused(AdapterMismatchError, lambda: average_adapters(file, file, 0.5, file.parent / "mean"), words)
    assert pipe._face_adapter is before and not (file.parent / "mean").exists()


def test_layers_of_another_shape_are_refused(pipe, file):
    def swap(tensors):
        narrow = next(name for name in tensors if tensors[name].shape == (16, 16))
        wide = next(name for name in tensors if tensors[name].shape == (32, 32))
        tensors[narrow], tensors[wide] = tensors[wide], tensors[narrow]

    if {weight.shape for weight in load_file(file).values()} >= {(16, 16), (32, 32)}:
        rewritten(file, swap)
    else:  # all layers of the tiny model are alike
        rewritten(file, lambda tensors: tensors.update({min(tensors): torch.zeros(16, 17)}))
    refused(AdapterMismatchError, lambda: pipe.load_face_fusion_adapter(file), "shape")


@pytest.mark.parametrize("bad", [{"a": "b"}, {3: torch.zeros(1)}, {"x" * 10_000: torch.zeros(1)}, {}])
def test_a_state_dict_of_something_else_is_refused(pipe, bad):
    refused(AdapterMismatchError, lambda: pipe.load_face_fusion_adapter(bad), "keys")
    whole = {**pipe._face_adapter.state_dict(), min(pipe._face_adapter.state_dict()): "text"}
    refused(AdapterMismatchError, lambda: load_adapter(pipe.unet, whole), "not a tensor")


# --- Identities ---------------------------------------------------------------------------------------------------


MODES = ["adapter", "training-free", "both"]


@pytest.fixture(params=MODES)
def identity(pipe, tmp_path, request) -> Path:
    pipe.encode_face([face(1), face(2)], face_mode=request.param).save(tmp_path / "face.safetensors")
    return tmp_path / "face.safetensors"


def of_one(suffix: str, change):
    def changed(tensors):
        name = min(name for name in tensors if name.endswith(suffix))
        tensors[name] = change(tensors[name])

    return changed


def moved(tensors):
    """One layer under the name of a layer that no model has."""
    layer = min(name for name in tensors if name.endswith(".key")).removesuffix(".key")
    for name in [name for name in tensors if name.startswith(layer)]:
        tensors[f"elsewhere.{name}"] = tensors.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        of_one(".key", lambda t: t * float("nan")),
        of_one(".value", lambda t: t / 0),
        of_one(".key", lambda t: t.int()),
        of_one(".key", lambda t: t.half()),
        of_one(".key", lambda t: t[0]),
        of_one(".value", lambda t: t[:, :1]),
        of_one(".value", lambda t: t[..., :3]),
        of_one(".key", lambda t: t[:1]),
        of_one("weights", lambda t: torch.ones(3)),
        of_one("weights", lambda t: torch.ones(1, 2)),
        of_one("weights", lambda t: torch.zeros(2)),
        of_one("weights", lambda t: torch.tensor([1.0, -1.0])),
        of_one("weights", lambda t: torch.tensor([1.0, float("nan")])),
        of_one("weights", lambda t: torch.tensor([1, 1])),
        lambda tensors: tensors.pop("weights"),
        lambda tensors: tensors.pop(min(name for name in tensors if name.endswith(".key"))),
        lambda tensors: tensors.update(extra=torch.zeros(1)),
    ],
)
def test_damaged_identities_are_refused_when_read(identity, change):
    rewritten(identity, change)
    refused(IdentityMismatchError, lambda: FaceIdentity.load(identity), identity.name)


@pytest.mark.parametrize(
    "metadata",
    [
        {"mode": "anything"},
        {"mode": "x" * 100_000},
        {"base_fingerprint": "x y"},
        {"adapter_fingerprint": "1 inf"},
        {"weights_fingerprint": "x" * 100_000},
        {"format": "other"},
        {"format_version": "9" * 100_000},
    ],
)
def test_identities_with_damaged_metadata_are_refused_when_read(identity, metadata):
    rewritten(identity, **metadata)
    refused(IdentityMismatchError, lambda: FaceIdentity.load(identity))


@pytest.mark.parametrize("other", MODES)
def test_an_identity_with_another_mode_than_its_layers_is_refused(identity, other):
    own = FaceIdentity.load(identity).mode
    rewritten(identity, mode=other)
    if other != own:
        refused(IdentityMismatchError, lambda: FaceIdentity.load(identity), identity.name)


def test_cells_that_are_not_those_of_the_keys_are_refused(pipe, tmp_path):
    path = tmp_path / "face.safetensors"
    for change in (lambda t: t | True, lambda t: t.float(), lambda t: t.flatten(), lambda t: torch.zeros_like(t)):
        pipe.encode_face(face(1), face_mode="training-free").save(path)
        rewritten(path, of_one(".cells", change))
        refused(IdentityMismatchError, lambda: FaceIdentity.load(path), "cells")


def test_layers_that_the_model_does_not_have_are_refused_before_use(pipe, identity):
    whole = FaceIdentity.load(identity)
    check_identity_fits(whole, pipe.unet, pipe._face_adapter)
    rewritten(identity, moved)
    other = FaceIdentity.load(identity)
    refused(IdentityMismatchError, lambda: generate(pipe, face_image=other), "unknown layers", "elsewhere")
    first, *rest = whole.keys
    missing = replace(whole, keys={n: whole.keys[n] for n in rest}, values={n: whole.values[n] for n in rest})
    refused(IdentityMismatchError, lambda: generate(pipe, face_image=missing), "missing layers", first)
    wide = replace(whole, keys={n: torch.cat([k, k], -1) for n, k in whole.keys.items()})
    refused(IdentityMismatchError, lambda: generate(pipe, face_image=wide), "wide")
    generate(pipe, face_image=whole)  # nothing is left of them


def test_fingerprints_that_are_no_numbers_match_nothing(pipe):
    whole = pipe.encode_face(face(1))
    for name in ("base_fingerprint", "adapter_fingerprint", "weights_fingerprint"):
        strange = replace(whole, **{name: "x y"})
        refused(IdentityMismatchError, lambda strange=strange: generate(pipe, face_image=strange))


# --- Order of checks ----------------------------------------------------------------------------------------------


def safetensors(header: object, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
HEADERS = {
    "many tensors": safetensors({f"{number}": EMPTY for number in range(20_000)}),
    "long header": safetensors(b"{}", 2**23),
    "endless header": safetensors(b"{}", 2**63),
    "huge tensors": safetensors({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}),
    "deep": safetensors(b"[" * 200_000),
    "a list": safetensors([]),
    "no offsets": safetensors({"a": {}}),
    "offsets of text": safetensors({"a": {**EMPTY, "data_offsets": ["x", "y"]}}),
    "metadata of numbers": safetensors({"__metadata__": {"format": 1}}),
    "metadata of a list": safetensors({"__metadata__": [1]}),
    "long number": safetensors(b'{"a": {"data_offsets": [0, ' + b"9" * 100_000 + b"]}}"),
    "no text": safetensors(b"\xff\xfe"),
    "short": b"\x08",
    "empty": b"",
    "pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_the_header_is_bounded_before_anything_is_read(pipe, tmp_path, monkeypatch, content):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(content)
    monkeypatch.setattr(face_files, "safe_open", lambda *_, **__: pytest.fail("opened"))
    refused(AdapterMismatchError, lambda: pipe.load_face_fusion_adapter(path), "not a readable safetensors file")
    refused(IdentityMismatchError, lambda: FaceIdentity.load(path), "not a readable safetensors file")


def test_no_tensor_is_read_of_a_file_of_another_format(pipe, file, monkeypatch):
    rewritten(file, format="other")
    monkeypatch.setattr(face_files, "safe_open", lambda *_, **__: pytest.fail("opened"))
    refused(AdapterMismatchError, lambda: pipe.load_face_fusion_adapter(file), "'other'")
    refused(AdapterMismatchError, lambda: average_adapters(file, file, 0.5, file.parent / "mean"), "'other'")
    refused(IdentityMismatchError, lambda: FaceIdentity.load(file), "'other'")


def test_a_long_name_of_a_tensor_is_cut_in_the_message(pipe, file):
    rewritten(file, lambda tensors: tensors.update({"n" * 100_000: torch.zeros(1)}))
    refused(AdapterMismatchError, lambda: pipe.load_face_fusion_adapter(file), "unknown keys")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_file_is_refused_at_once(pipe, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(AdapterMismatchError, lambda: read_tensors(tmp_path / "pipe.safetensors"), "no regular file")
    refused(AdapterMismatchError, lambda: read_tensors(tmp_path), "no regular file")
    with pytest.raises(ModelNotFoundError, match="no such file"):
        read_tensors(tmp_path / "missing.safetensors")
    assert not list(tmp_path.glob("*.tmp"))


# --- Pickles ------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["FACE_FUSION_BOMB"]),))


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_pickled_weights_are_refused_in_one_line(tmp_path, monkeypatch, part):
    monkeypatch.setenv("FACE_FUSION_BOMB", str(tmp_path / "ran"))
    model = tmp_path / "model"
    tiny_pipeline().save_pretrained(model)
    (weights,) = (model / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    (model / part / name).write_bytes(pickle.dumps(Bomb()))
    for load in (load_pipeline, load_base):
        refused(ModelNotFoundError, lambda load=load: load(str(model)), "safetensors")
    assert not (tmp_path / "ran").exists()


def test_safetensors_are_taken_where_a_pickle_lies_beside_them(tmp_path):
    model = tmp_path / "model"
    tiny_pipeline().save_pretrained(model)
    (model / "text_encoder" / "pytorch_model.bin").write_bytes(b"no weights")
    assert load_pipeline(str(model)).text_encoder is not None


def test_weights_of_another_precision_than_the_unet_make_an_identity_that_loads(tmp_path: Path) -> None:
    pipe = with_adapter(tiny_pipeline())
    pipe._face_adapter.half()
    identity = pipe.encode_face(face(), face_mode="both")
    assert len({key.dtype for key in identity.keys.values()}) == 2
    identity.save(tmp_path / "ada.safetensors")
    loaded = FaceIdentity.load(tmp_path / "ada.safetensors")
    assert torch.equal(generate(pipe, face_image=loaded), generate(pipe, face_image=identity))
