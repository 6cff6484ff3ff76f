"""The one reader of pictures: files, encoded bytes, PIL pictures of any mode, arrays and tensors, as plain RGB."""

import importlib
import io
import os
import stat
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from .face_errors import UnreadableImageError, short
from .face_metadata import without_metadata


if TYPE_CHECKING:  # who only prepares photos does without
    from torch import Tensor

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | np.ndarray | Tensor | Image.Image"

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")  # decoders of others run programs, or are old
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
MIN_SIDE = 16  # pixels: nothing to see below
MAX_PIXELS = 100_000_000  # beyond any camera this is for; a tiny file can claim more and fill the memory
MAX_BYTES = 200_000_000  # of a file
ORIENTATION = 0x0112  # EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNING_INFO = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where PIL finds an orientation


# --- Pictures as RGB ----------------------------------------------------------------------------------------------


def load_image(source: ImageSource, name: str | None = None, min_side: int = MIN_SIDE) -> Image.Image:
    """Any picture as an upright RGB image.

    Args:
        source: path of a regular file of at most 200 MB, encoded file content, PIL image, array (H, W), (H, W, 3) or
            (H, W, 4), or tensor (H, W), (3, H, W) or (4, H, W); arrays and tensors are uint8 in [0, 255] or float in
            [0, 1]. Files are JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF, or HEIC where pillow-heif is installed; of
            several frames the first counts.
        name: what errors call it; default its path.
        min_side: least width and height in pixels.

    Returns:
        RGB image, turned as its EXIF orientation says; transparency becomes white.

    Raises:
        UnreadableImageError: missing, no regular file, empty, broken, of another format, above 200 MB, too
            small, or above 100 megapixels.
    """
    name = name or name_of(source)
    image = open_picture(source, name)
    if min(image.size) < min_side:
        raise UnreadableImageError(
            f"{name} is {image.width}x{image.height} pixels: at least {min_side} a side are needed"
        )
    return _rgb(image, name)


def load_images(sources: Any, min_side: int = MIN_SIDE) -> list[Image.Image]:
    """One or several pictures as by [`load_image`]: a source, a batch of arrays or tensors, or a list of these.

    Raises:
        UnreadableImageError: one that cannot be read, or none at all.
    """
    items = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    singles = [each for item in items for each in (item if getattr(item, "ndim", 0) == 4 else [item])]
    if not singles:
        raise UnreadableImageError("no image given: pass at least one")
    return [load_image(each, min_side=min_side) for each in singles]


def upright_rgb(image: Image.Image) -> Image.Image:
    """A PIL picture of any mode as RGB, turned as its EXIF orientation says.

    16-bit grey is scaled down; the modes `I` and `F` are taken as 8 bits or 16, `F` also as [0, 1], whichever range
    their values fill. Transparency becomes white.

    Raises:
        UnreadableImageError: broken, too large, or a mode or values that cannot be shown.
    """
    return _rgb(open_picture(image), "the image")


def centre_square(image: Image.Image, side: int) -> Image.Image:
    """The largest square in the middle of a picture, resized to `side` pixels."""
    whole = min(image.size)
    left, top = (image.width - whole) // 2, (image.height - whole) // 2
    square = image.crop((left, top, left + whole, top + whole))
    return square if whole == side else square.resize((side, side), Image.Resampling.LANCZOS)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        image = eight_bits(image)
        image = image.convert("LA") if image.mode == "La" else image
        if image.has_transparency_data and image.mode in ("1", "L", "P", "RGB", "LA", "PA", "RGBA", "RGBa"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (ValueError, OSError, MemoryError) as error:  # such as "conversion from LAB to RGB not supported"
        raise UnreadableImageError(f"{name} cannot be shown as RGB: {error}") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """The picture itself, or for 16-bit, integer and float grey the same as `L`.

    Raises:
        UnreadableImageError: values that fill none of the known ranges, or that are not finite.
    """
    if image.mode.startswith("I;16"):  # convert() would clip it to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 65535:
        raise UnreadableImageError(
            f"its values, of mode {image.mode}, go from {low:g} to {high:g}: scale them to [0, 255]"
        )
    scale = 255 if image.mode == "F" and high <= 1 else 1 if high <= 255 else 255 / 65535
    return Image.fromarray((values * scale).round().astype(np.uint8))


# --- Opening ------------------------------------------------------------------------------------------------------


def open_picture(source: ImageSource, name: str | None = None) -> Image.Image:
    """A picture in its own mode, decoded, and turned as its EXIF orientation says.

    EXIF that cannot be understood turns nothing, and is never a reason to refuse the pixels.

    Args:
        source, name: see [`load_image`].

    Raises:
        UnreadableImageError: see [`load_image`]; the smallest size is not checked.
    """
    name = name or name_of(source)
    if isinstance(source, (str, os.PathLike)):
        source = read_file(Path(source), name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF, and of many pixels, for which _check_size is stricter
            if isinstance(source, (bytes, bytearray)):
                image = _decoded(bytes(source), name)
            elif isinstance(source, Image.Image):
                image = _checked(source, name)
            else:
                image = _from_array(source, name)
            return _turned(image)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"{name} is not a picture: give a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC file"
        ) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"{name} is above {MAX_PIXELS:,} pixels in all: scale it down first") from error
    except Exception as error:  # PIL's plug-ins raise anything from OSError to struct.error on a broken file
        reason = short(error) or type(error).__name__
        raise UnreadableImageError(f"{name} is not a picture that can be read: {reason}") from error


def name_of(source: Any) -> str:
    """What errors call a source: its path where it has one."""
    return short(str(source)) if isinstance(source, (str, os.PathLike)) else "the image"


def read_file(path: Path, name: str) -> bytes:
    """The content of a regular file of at most 200 MB; a pipe or a device would be read without end.

    Raises:
        UnreadableImageError: missing, another kind of file, larger, or empty.
    """
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            kind = "a folder" if stat.S_ISDIR(state.st_mode) else "no regular file"
            raise UnreadableImageError(f"cannot read {name}: it is {kind}")
        _check_bytes(state.st_size, name)
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)  # of what grows or hides its size no more than shows that it is too large
    except UnreadableImageError:
        raise
    except (OSError, ValueError) as error:
        raise UnreadableImageError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error


def _check_bytes(size: int, name: str) -> None:
    if size == 0:
        raise UnreadableImageError(f"{name} is empty (0 bytes)")
    if size > MAX_BYTES:
        raise UnreadableImageError(f"{name} is above {MAX_BYTES:,} bytes: too large for a picture, save it smaller")


def _decoded(content: bytes, name: str) -> Image.Image:
    _check_bytes(len(content), name)
    Image.init()
    heif = content[4:8] == b"ftyp" and content[8:12] in HEIF_BRANDS
    if heif and "HEIF" not in Image.OPEN:
        with suppress(Exception):  # by name: a written import would make diffusers demand the package of everybody
            importlib.import_module("pillow_heif").register_heif_opener()
    if heif and "HEIF" not in Image.OPEN:
        raise UnreadableImageError(f"{name} is HEIC: pip install pillow-heif, or save it as JPEG")
    try:
        return _opened(content, name)
    except (UnreadableImageError, Image.DecompressionBombError):
        raise
    except Exception:  # PIL also refuses pixels for what is written beside them
        lean = without_metadata(content)
        if lean != content:
            return _opened(lean, name)
        raise


def _opened(content: bytes, name: str) -> Image.Image:
    image = Image.open(io.BytesIO(content), formats=[known for known in FORMATS if known in Image.OPEN])
    return _checked(image, name)


def _checked(image: Image.Image, name: str) -> Image.Image:
    """The picture decoded, after what its header says was looked at."""
    if image.format not in (None, "MPO", *FORMATS):
        raise UnreadableImageError(
            f"{name} is {image.format}, not one of {', '.join(FORMATS)}: give it converted, `image.convert('RGB')`"
        )
    _check_size(image.size, name)
    image.load()
    return image


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if not width * height:
        raise UnreadableImageError(f"{name} is {width}x{height} pixels: it is empty")
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(
            f"{name} is {width}x{height} pixels, above {MAX_PIXELS:,} in all: scale it down first"
        )


def _turned(image: Image.Image) -> Image.Image:
    """Decoded pixels turned as their EXIF says; unlike `ImageOps.exif_transpose`, EXIF is not written again."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))  # type: ignore[arg-type]
    except Exception:  # a damaged EXIF raises as many kinds of errors as a damaged picture
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {key: value for key, value in image.info.items() if key not in TURNING_INFO}
    return turned


def _from_array(array: Any, name: str) -> Image.Image:
    """An array (H, W, C) or tensor (C, H, W) as a picture."""
    if hasattr(array, "detach"):
        tensor = array.detach().cpu()
        tensor = tensor.float() if tensor.dtype.itemsize < 4 and tensor.is_floating_point() else tensor  # bfloat16 too
        array = tensor.movedim(0, -1).numpy() if tensor.ndim == 3 else tensor.numpy()
    if not isinstance(array, np.ndarray):
        raise UnreadableImageError(
            "an image must be a path, encoded bytes, a PIL image, an array (H, W, 3) or a tensor (3, H, W), got "
            f"{type(array).__name__}"
        )
    kinds = "uint8 in [0, 255] or float in [0, 1]"
    if array.ndim != 2 and array.shape[2:] not in ((3,), (4,)):
        raise UnreadableImageError(
            f"an image array must be (H, W), (H, W, 3) or (H, W, 4), got {array.shape}; tensors (3, H, W)"
        )
    _check_size(array.shape[1::-1], name)
    if array.dtype.kind == "f":
        low, high = array.min(initial=0), array.max(initial=0)
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise UnreadableImageError(f"an image array must be {kinds}, got values from {low} to {high}")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise UnreadableImageError(f"an image array must be {kinds}, got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))
