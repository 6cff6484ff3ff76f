"""Random damage to files and values, the same for the same seed."""

import json
import random
import struct
from typing import Any


STRANGE: list[Any] = [
    *("", " ", "nan", "inf", "-inf", "0", "-1", "1e999", "1" * 5000, "\x00", "é", "../..", "true", "{}", "[]", "None"),
    *(0, -1, 1.5, 10**30, float("nan"), float("inf"), True, None, [], {}, [[]], [1, 2, 3, 4], {"a": 1}),
]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut off, doubled, or put in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0 and changed:
            for _ in range(rng.randint(1, 30)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = rng.randbytes(rng.randint(1, 64))
        elif kind == 3:
            changed += changed[: rng.randint(0, 1000)]
        else:
            del changed[place : place + rng.randint(1, 200)]
    return bytes(changed)


def changed_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says something else: metadata, types, shapes, offsets, names."""
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(rng.randint(1, 3)):
        metadata = header.get("__metadata__", {})
        tensors = [name for name in header if name != "__metadata__"]
        name = rng.choice(tensors)
        kind = rng.randrange(7)
        if kind <= 2 and metadata:
            metadata[rng.choice(list(metadata))] = str(rng.choice(STRANGE))
        elif kind == 3 and metadata:
            del metadata[rng.choice(list(metadata))]
        elif kind == 4:
            header[name]["dtype"] = rng.choice(["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "X"])
        elif kind == 5:
            shape = header[name].get("shape")
            shape = shape if isinstance(shape, list) else []
            header[name]["shape"] = rng.choice([[], [0], [*shape, 1], shape[::-1], [-1], [2**40], rng.choice(STRANGE)])
        else:
            header[rng.choice([name + ".x", "weights", "", "a" * 300])] = header.pop(name)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def strange_numbers(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file some of whose numbers are not finite or out of all measure."""
    size = 8 + struct.unpack("<Q", data[:8])[0]
    changed = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        place = size + 4 * rng.randrange((len(data) - size) // 4)
        changed[place : place + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf"), 3e38]))
    return bytes(changed)
