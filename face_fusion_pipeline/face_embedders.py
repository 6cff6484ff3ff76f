"""Face embedders: networks that say who is in a face crop, as one vector; what FaceStudio knows a person by.

A crop is the square around a face that `face_images.crop_face` cuts: 1.6 times as high as the box. In it the face
stands where the box puts it, or where a detector finds its landmarks.
"""

import logging
import os
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .face_detectors import FaceDetector
from .face_errors import AdapterMismatchError, FaceFusionError, ModelNotFoundError, short, shown
from .face_files import read_tensors
from .face_images import detect_faces
from .face_pictures import centre_square, upright_rgb
from .face_recognisers import OnnxRecogniser, align_faces, insightface_recogniser, name_with_digest


logger = logging.getLogger(__name__)

WEIGHTS_NAME = "face_embedder.safetensors"
FORMAT = "face-fusion-face-embedder"
FORMATS = (FORMAT, "face-fusion-training-recogniser")  # the networks are the same
SIDE = 144  # pixels of a crop: the aligned face of 112 pixels in it is about as large
CROP = 96  # pixels of the aligned faces that the towers see
ZOOMS = {"head": 0.55, "features": 1.1}  # of the aligned face: below 1 hair, ears and chin are in it
WIDTHS = (32, 64, 96, 160)
EMBEDDING = 128
# Where eyes, nose and corners of the mouth are in a crop, on average over avatars; shares of its side.
PLACES = torch.tensor([[0.377, 0.466], [0.625, 0.466], [0.503, 0.561], [0.395, 0.678], [0.608, 0.678]])


@runtime_checkable
class FaceEmbedder(Protocol):
    """Anything with these three members is a face embedder.

    Attributes:
        name: what weights that were trained with it remember; another network has another name.
        width: of its embeddings.
    """

    name: str
    width: int

    def __call__(self, faces: Sequence[Image.Image]) -> Tensor:
        """Face crops to embeddings (n, width), float32 on the CPU, of length 1."""
        ...


class CheckedEmbedder:
    """A [`FaceEmbedder`] whose pictures are RGB squares, and whose embeddings are what they should be.

    Args:
        embed: crops, RGB and `side` pixels a side, to embeddings (n, width) of any length, as array or tensor.
        side: 0 leaves crops in their own size.

    Raises:
        FaceFusionError: no name or no width; when it is called: embeddings of another shape, or not finite.
    """

    def __init__(self, name: Any, width: Any, embed: Callable[[list[Image.Image]], Any], side: int = 0) -> None:
        if not isinstance(name, str) or not name or not isinstance(width, Integral) or width < 1:
            raise FaceFusionError(
                f"a face embedder has a name and a width of 1 or more, got {shown(name)} and {shown(width)}"
            )
        self.name, self.width, self._embed, self._side = name, int(width), embed, side

    def __call__(self, faces: Sequence[Image.Image]) -> Tensor:
        if not faces:
            return torch.empty(0, self.width)
        pictures = [upright_rgb(face) for face in faces]
        squares = [centre_square(picture, self._side or min(picture.size)) for picture in pictures]
        with torch.no_grad():
            found = torch.as_tensor(self._embed(squares)).detach().cpu().float()
        if found.shape != (len(faces), self.width):
            raise FaceFusionError(
                f"the face embedder {self.name} gives {tuple(found.shape)} for {len(faces)} faces, not "
                f"{(len(faces), self.width)}: give its width as it is"
            )
        if not found.isfinite().all():
            raise FaceFusionError(f"the face embedder {self.name} gives values that are NaN or infinite")
        return F.normalize(found, dim=-1)


# --- The avatars' own ---------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """x↓ + f(x) at half the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(inputs, outputs, 1)
        self.body = nn.Sequential(
            nn.GroupNorm(8, inputs),
            nn.SiLU(),
            nn.Conv2d(inputs, outputs, 3, 2, 1),
            nn.GroupNorm(8, outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(F.avg_pool2d(x, 2)) + self.body(x)


class _Tower(nn.Module):
    """Embedding (B, 128) of aligned crops (B, 3, 96, 96) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 5, 2, 2)
        self.blocks = nn.Sequential(*(_Residual(a, b) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)))
        self.norm = nn.GroupNorm(8, WIDTHS[-1])
        self.attention = nn.Conv2d(WIDTHS[-1], 8, 1)  # eight places that are looked at
        self.head = nn.Linear(8 * WIDTHS[-1], EMBEDDING)

    def forward(self, faces: Tensor) -> Tensor:
        x = F.silu(self.norm(self.blocks(self.stem(faces - 0.5)))).flatten(2)
        weights = self.attention(x.unflatten(2, (CROP // 16, -1))).flatten(2).softmax(-1)  # (B, 8, cells)
        return self.head((weights @ x.mT).flatten(1))


class FaceTowers(nn.Module):
    """Two towers, of which one sees the whole head and the other the features twice as large."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({name: _Tower() for name in ZOOMS})

    def see(self, name: str, images: Tensor, landmarks5: Tensor) -> Tensor:
        """What the tower `name` finds, (B, 128) of length 1."""
        with torch.autocast(images.device.type, enabled=False):  # in bf16 a place would be half a pixel off
            faces = align_faces(images.float(), landmarks5.float(), CROP, zoom=ZOOMS[name])
        return F.normalize(self.towers[name](faces).float(), dim=-1)

    def look(self, images: Tensor, landmarks5: Tensor) -> dict[str, Tensor]:
        """What each tower finds of images (B, 3, H, W) in [0, 1] and landmarks (B, 5, 2) in their pixels."""
        return {name: self.see(name, images, landmarks5) for name in self.towers}


class AvatarEmbedder(FaceTowers):
    """The avatars' own face embedder: an embedding is the two towers' side by side."""

    name = "avatars"
    width = EMBEDDING * len(ZOOMS)
    metadata = {"format": FORMAT, "format_version": "1"}

    def embed(self, images: Tensor, landmarks5: Tensor | None = None) -> Tensor:
        """(B, 256) of length 1, of crops (B, 3, H, H) in [0, 1]; without landmarks (B, 5, 2) the face is in place."""
        if landmarks5 is None:
            landmarks5 = (PLACES * (images.shape[-1] - 1)).to(images).expand(len(images), 5, 2)
        return F.normalize(torch.cat(list(self.look(images, landmarks5).values()), -1), dim=-1)

    def forward(self, faces: Sequence[Image.Image]) -> Tensor:
        """As [`FaceEmbedder`] says, for RGB crops that are all of one size."""
        return self.embed(_stacked(faces))


def _stacked(faces: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(face) for face in faces])).permute(0, 3, 1, 2).float() / 255


def load_avatar_embedder(path: str | os.PathLike[str]) -> AvatarEmbedder:
    """The avatars' own from a file, frozen; a recogniser that `avatars-train recogniser` wrote is one, too.

    Raises:
        ModelNotFoundError: no such file. AdapterMismatchError: other weights.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") not in FORMATS:
        raise AdapterMismatchError(
            f"{path} is no face embedder: its metadata say format {shown(metadata.get('format'))}, expected {FORMAT}"
        )
    network = AvatarEmbedder()
    try:
        network.load_state_dict({name: weight.float() for name, weight in tensors.items()})
    except RuntimeError as error:
        raise AdapterMismatchError(f"{path} has other weights than a face embedder: {short(error)}") from error
    network.name = name_with_digest(Path(path))
    return network.requires_grad_(False).eval()


# --- By name ------------------------------------------------------------------------------------------------------


def load_face_embedder(
    source: "str | os.PathLike[str] | FaceEmbedder", *, detector: FaceDetector | None = None
) -> FaceEmbedder:
    """A face embedder.

    Args:
        source: a folder with `face_embedder.safetensors` or such a file; an ONNX file of a network that takes aligned
            crops of 112 pixels, as ArcFace does; `"insightface"`, or `"insightface:PACK"`, whose models are for
            non-commercial research only; or any callable with `name` and `width`. Files are called by their name and
            a digest of their content.
        detector: finds the landmarks by which the face is aligned, for a file. None, or where it finds none: the face
            is where the crop puts it, which is as good for the avatars' own and less so for networks of photographs.

    Raises:
        ModelNotFoundError: no such file, or a package or its models are missing.
        FaceFusionError: something else; AdapterMismatchError for weights of another format.
    """
    if not isinstance(source, (str, os.PathLike)):
        if not callable(source) or not hasattr(source, "name") or not hasattr(source, "width"):
            raise FaceFusionError(f"a face embedder is a callable with `name` and `width`, got {shown(source)}")
        return CheckedEmbedder(source.name, source.width, source)
    package, _, pack = str(source).partition(":")
    if package == "insightface":
        return _of_onnx(insightface_recogniser(pack or "buffalo_l"), detector)
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise ModelNotFoundError(
            f"no face embedder {path}: give a folder with {WEIGHTS_NAME}, a .safetensors or .onnx file, "
            "or 'insightface'"
        )
    if path.suffix == ".onnx":
        return _of_onnx(OnnxRecogniser(path), detector)
    if path.suffix != ".safetensors":
        raise FaceFusionError(f"{path} is no face embedder: give a .safetensors or .onnx file")
    network = load_avatar_embedder(path)
    return _aligned(network.name, network.width, network.embed, detector)


def _of_onnx(recogniser: OnnxRecogniser, detector: FaceDetector | None) -> FaceEmbedder:
    try:
        grey = recogniser.embed(torch.full((1, 3, SIDE, SIDE), 0.5), PLACES[None] * SIDE)
    except Exception as error:  # onnxruntime's own types, which have no common base
        raise FaceFusionError(f"{recogniser.path} cannot be run: {short(error, 120)}") from error
    if grey.ndim != 2:
        raise FaceFusionError(f"{recogniser.path} gives {grey.shape[1:]} for a face, not one vector")
    name = name_with_digest(recogniser.path)
    return _aligned(name, grey.shape[1], recogniser.embed, detector)


def _aligned(
    name: str, width: int, embed: Callable[[Tensor, Tensor], Any], detector: FaceDetector | None
) -> CheckedEmbedder:
    """An embedder by a network of images and landmarks."""
    usual = PLACES * (SIDE - 1)

    def found(face: Image.Image) -> Tensor:
        faces = [one for one in detect_faces(face, detector) if one.landmarks5 is not None] if detector else []
        best = max(faces, key=lambda one: one.height, default=None)
        return usual if best is None else torch.as_tensor(best.landmarks5, dtype=torch.float32)

    def embed_all(faces: list[Image.Image]) -> Any:
        return embed(_stacked(faces), torch.stack([found(face) for face in faces]))

    return CheckedEmbedder(name, width, embed_all, SIDE)
