"""Whatever comes from outside ends in a result or in one clear line: never in a raw exception, a hang, or full memory.

A few cases of each kind run with every test; `make fuzz` runs ten thousand of each. A case is its number, so
`FACE_FUSION_FUZZ_FROM=4711 FACE_FUSION_FUZZ=1 pytest tests/fuzz -k pictures` runs one again.
"""

import contextlib
import io
import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import STRANGE, changed_header, damaged, strange_numbers
from PIL import Image
from tiny_models import face, tiny_pipeline, with_adapter

from face_fusion_pipeline import FaceIdentity
from face_fusion_pipeline.cli import build_parser, main
from face_fusion_pipeline.conditioner import IdentityOptions, Person, conditioner_of
from face_fusion_pipeline.face_errors import FaceFusionError
from face_fusion_pipeline.face_layout import given_masks
from face_fusion_pipeline.face_pictures import load_image
from face_fusion_pipeline.reference_pass import face_tensors
from face_fusion_pipeline.training.sources import open_source


CASES = int(os.environ.get("FACE_FUSION_FUZZ", "40"))
FIRST = int(os.environ.get("FACE_FUSION_FUZZ_FROM", "0"))
SECONDS = 10.0
MEMORY = 2 * 2**30


def run_cases(case: Callable[[random.Random], None], kind: str) -> None:
    """Every case ends in time, in little memory, and with nothing but an error of the package that fits one line."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(FIRST, FIRST + CASES):
        start = time.perf_counter()
        try:
            case(random.Random(f"{kind} {number}"))
        except FaceFusionError as error:
            assert "\n" not in str(error) and len(str(error)) < 3000, f"{kind} {number}: {str(error)[:500]}"
        except Exception as error:
            pytest.fail(f"{kind} {number}: {type(error).__name__}: {str(error)[:300]}")
        assert time.perf_counter() - start < SECONDS, f"{kind} {number} took {time.perf_counter() - start:.0f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"{kind}: memory grew by {grown / 2**30:.1f} GiB"


def damage_of(data: bytes, rng: random.Random) -> bytes:
    return rng.choice([damaged, changed_header, changed_header, strange_numbers])(data, rng)


def test_weights(tmp_path: Path) -> None:
    pipe, path = with_adapter(tiny_pipeline()), tmp_path / "face_fusion_adapter.safetensors"
    pipe.save_face_fusion_adapter(tmp_path)
    whole = path.read_bytes()

    def case(rng: random.Random) -> None:
        path.write_bytes(damage_of(whole, rng))
        pipe.load_face_fusion_adapter(path)

    run_cases(case, "weights")


@pytest.mark.parametrize("mode", ["adapter", "both"])
def test_identities(tmp_path: Path, mode: str) -> None:
    pipe, path = with_adapter(tiny_pipeline()), tmp_path / "ada.safetensors"
    pipe.encode_face([face(0), face(1)], face_mode=mode).save(path)
    whole = path.read_bytes()

    def case(rng: random.Random) -> None:
        path.write_bytes(damage_of(whole, rng))
        identity = FaceIdentity.load(path)
        conditioner = conditioner_of(identity.mode)
        identity = conditioner.adjusted(pipe, identity, IdentityOptions())
        conditioner.keys(pipe, Person(identity))

    run_cases(case, f"identities {mode}")


def picture_files() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 4), dtype=np.uint8)
    files = []
    for form, mode in (
        ("PNG", "RGBA"),
        ("PNG", "L"),
        ("JPEG", "RGB"),
        ("WEBP", "RGB"),
        ("GIF", "RGB"),
        ("TIFF", "RGB"),
    ):
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6  # turned
        Image.fromarray(pixels).convert(mode).save(buffer, form, **({"exif": exif} if form != "GIF" else {}))
        files.append(buffer.getvalue())
    return files


def test_pictures() -> None:
    files = picture_files()

    def case(rng: random.Random) -> None:
        image = load_image(damaged(rng.choice(files), rng))
        assert image.mode == "RGB" and min(image.size) >= 16

    run_cases(case, "pictures")


def test_arrays() -> None:
    def case(rng: random.Random) -> None:
        numbers = np.random.default_rng(rng.randrange(2**32))
        shape = [rng.choice([0, 1, 2, 3, 4, 16, 17, 40]) for _ in range(rng.randint(0, 5))]
        kind = rng.choice(["uint8", "float32", "float64", "int64", "bool", "uint16", "complex64"])
        array: Any = (numbers.random(shape) * rng.choice([0, 1, 2, 255, 1e30])).astype(kind)
        if array.size and kind.startswith("float") and rng.random() < 0.3:
            array.flat[rng.randrange(array.size)] = rng.choice([np.nan, np.inf, -1])
        wanted = array if rng.random() < 0.7 else rng.choice(STRANGE)
        if rng.random() < 0.5:
            face_tensors(wanted, 16)
        else:
            given_masks([wanted], 16, 16)

    run_cases(case, "arrays")


def test_metadata(tmp_path: Path) -> None:
    picture = io.BytesIO()
    face(0, 32).save(picture, "PNG")

    def case(rng: random.Random) -> None:
        folder = tmp_path / f"{rng.randrange(2**40):x}"
        (folder / "a").mkdir(parents=True)
        (folder / "1.png").write_bytes(picture.getvalue())
        (folder / "a" / "2.png").write_bytes(damaged(picture.getvalue(), rng) if rng.random() < 0.3 else b"")
        rows = [{"file_name": rng.choice(["1.png", "a/2.png", "../x.png", "/etc/hostname", 7])} for _ in range(3)]
        fields = ["text", "caption", "identity", "box", "landmarks5", "people", "file_name"]
        for row in rows:
            row |= {rng.choice(fields): rng.choice(STRANGE) for _ in range(rng.randint(0, 3))}
        lines = "\n".join(json.dumps(row) for row in rows).encode()
        name = rng.choice(["metadata.jsonl", "metadata.csv"])
        (folder / name).write_bytes(damaged(lines, rng) if rng.random() < 0.5 else lines)
        for piece in open_source(folder):
            str(piece)

    run_cases(case, "metadata")


def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No command runs: what is tested is everything before."""
    import argparse

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    ends = {"-h", "--help", "--version"}
    options = {name: sorted({*parser._option_string_actions} - ends) for name, parser in subparsers.choices.items()}
    monkeypatch.setattr("face_fusion_pipeline.cli._run", lambda args: 0)

    def case(rng: random.Random) -> None:
        command = rng.choice(list(options))
        words = [command]
        for _ in range(rng.randint(0, 5)):
            words += [rng.choice(options[command] or ["--none"])]
            words += [str(rng.choice(STRANGE)) for _ in range(rng.randint(0, 2))]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = main(words)
        assert code in (0, 2), f"{words}: exit {code}"
        assert said.getvalue().count("\n") <= 1 and len(said.getvalue()) < 8000, said.getvalue()[:300]

    run_cases(case, "command lines")
