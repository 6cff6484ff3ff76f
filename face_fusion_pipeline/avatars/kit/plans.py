"""Scenes and their tokenised captions, planned by processes beside the one that draws."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from ..training.rendered import WINDOW, scenes
from ..world.caption import caption, full_caption
from ..world.dataset import PER_IDENTITY, plan
from ..world.scene import Scene


WORLD = 2


class Planned(NamedTuple):
    """A window of scenes and the tokens (n, 2, tokens) of each one's plain and full caption."""

    scenes: list[Scene]
    tokens: Tensor


def plan_windows(tokenizer: Path, split: str, workers: int = 1) -> Iterator[Planned]:
    """Windows of a split without end; in the training split people who stand together also have portraits there."""
    tasks = ((str(tokenizer), split, number) for number in range(1_000_000))
    if workers <= 1:
        yield from map(_unpacked, map(_planned, tasks))
        return
    # A pool would plan ahead without end: it is asked for a few windows more than are used.
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        waiting = [pool.apply_async(_planned, (next(tasks),)) for _ in range(2 * workers)]
        while True:
            done = waiting.pop(0).get()
            waiting.append(pool.apply_async(_planned, (next(tasks),)))
            yield _unpacked(done)


_tokenizers: dict[str, CLIPTokenizer] = {}  # of a worker


def _planned(task: tuple[str, str, int]) -> tuple[bytes, np.ndarray]:
    folder, split, number = task
    if folder not in _tokenizers:
        _tokenizers[folder] = CLIPTokenizer.from_pretrained(folder)
    window = range(number * WINDOW, (number + 1) * WINDOW)
    found = list(scenes(window, WORLD)) if split == "train" else [plan(split, i, PER_IDENTITY, WORLD) for i in window]
    captions = list(chain.from_iterable((caption(scene), full_caption(scene)) for scene in found))
    tokens = _tokenizers[folder](captions, padding="max_length", truncation=True, return_tensors="np").input_ids
    # Tensors would each pass through a file of their own.
    return pickle.dumps(found), tokens.astype(np.int32).reshape(len(found), 2, -1)


def _unpacked(packed: tuple[bytes, np.ndarray]) -> Planned:
    return Planned(pickle.loads(packed[0]), torch.from_numpy(packed[1]))
