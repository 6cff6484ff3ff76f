"""A small CLIP tokenizer: byte-level BPE learnt from the captions. Any text can be tokenised, at worst by bytes."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer


MAX_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def train_tokenizer(captions: list[str], vocabulary: int = 2000) -> CLIPTokenizer:
    """Learn merges from `captions`; at most `vocabulary` tokens; 514 are the bytes and the special ones."""
    template = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        initial_alphabet=alphabet + [byte + WORD_END for byte in alphabet],
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator(sorted(set(captions)), trainer)
    learnt = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in learnt]
    # The trainer cuts the alphabet to single characters, so the vocabulary is laid out here as CLIP's own is.
    tokens = alphabet + [byte + WORD_END for byte in alphabet]
    merges = merges[: max(0, vocabulary - len(tokens) - 2)]
    tokens += [first + second for first, second in merges]
    tokens = list(dict.fromkeys(tokens)) + [START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")
