"""Pixels without what is written beside them: damaged metadata are no reason to refuse a picture."""

import struct
from collections.abc import Iterator


PNG = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")  # eXIf may say how the camera was held
ADOBE = b"Adobe"  # a segment of JPEG that says which colours the numbers mean
# How the pixels of a TIFF are stored: sizes, compression, strips and tiles, colours.
TIFF_TAGS = {*range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326)}
TIFF_TAGS |= {332, 338, 339, 347, *range(512, 522), *range(529, 533)}


def without_metadata(content: bytes) -> bytes:
    """A PNG, JPEG or TIFF file with no more than its pixels, their colours and their orientation; others as they are.

    What is damaged beyond that is left for the decoder to find.
    """
    try:
        if content.startswith(PNG):
            return b"".join([PNG, *_png_chunks(content)])
        if content.startswith(b"\xff\xd8"):
            return b"".join([b"\xff\xd8", *_jpeg_segments(content)])
        if content[:4] in (b"II*\0", b"MM\0*"):
            return _lean_tiff(content)
    except (struct.error, IndexError):  # it ends inside a length
        pass
    return content


def _png_chunks(content: bytes) -> Iterator[bytes]:
    place = len(PNG)
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        if content[place + 4 : place + 8] in PNG_CHUNKS:
            yield content[place : place + 12 + length]
        place += 12 + length


def _jpeg_segments(content: bytes) -> Iterator[bytes]:
    """Segments up to the first scan, then all the rest; of those that applications write EXIF and Adobe's."""
    place = 2
    while content[place] == 0xFF and content[place + 1] != 0xDA:
        marker = content[place + 1]
        if marker == 0xFF:  # filling
            place += 1
            continue
        (length,) = struct.unpack_from(">H", content, place + 2)
        body = content[place + 4 : place + 2 + length]
        exif, adobe = marker == 0xE1 and body.startswith(b"Exif\0"), marker == 0xEE and body.startswith(ADOBE)
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or exif or (adobe and len(body) == 12):
            yield content[place : place + 2 + length]
        place += 2 + length
    yield content[place:]


def _lean_tiff(content: bytes) -> bytes:
    """The same file whose first directory lists the tags of its pixels alone, and that has no further pictures."""
    order = "<" if content.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    entries = [content[place : place + 12] for place in range(start + 2, start + 2 + 12 * count, 12)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in TIFF_TAGS]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return content[:start] + directory + content[start + len(directory) :]
