"""Prompts for a model that knows few words: which it knows, and which of a prompt it does not.

Nothing here needs torch: `--help` lists the words.
"""

import difflib
import re
from collections.abc import Mapping, Sequence


Vocabulary = Mapping[str, Sequence[str]]  # group -> words and phrases, as in `face_defaults.FaceDefaults`
NAMED = 8  # unknown words in a sentence: finding what is near takes its time
OTHER = "other words"  # a group that belongs to sentences rather than to what is shown


def words_of(text: str) -> list[str]:
    """The words of a text in small letters, without what is between them."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower().replace("’", "'"))


def unknown_words(prompt: str, vocabulary: Vocabulary | None, most: int | None = None) -> dict[str, str | None]:
    """Each word of the prompt that is not in the vocabulary -> the most similar known word, or None: nothing is near.

    Without a vocabulary (None) every word may be known. With `most` the words after the first so many are left out.
    """
    if vocabulary is None:
        return {}
    known = {word for phrases in vocabulary.values() for phrase in phrases for word in words_of(phrase)}
    unknown = list(dict.fromkeys(word for word in words_of(prompt) if word not in known))[:most]
    return {word: next(iter(difflib.get_close_matches(word, sorted(known), 1)), None) for word in unknown}


def unknown_words_line(prompt: str, vocabulary: Vocabulary | None) -> str:
    """A sentence about the words that the model does not know, or the first of many; empty, if it knows all."""
    words = [
        f"“{word}”" + (f" (nearest: “{near}”)" if near else "")
        for word, near in unknown_words(prompt, vocabulary, NAMED + 1).items()
    ]
    words[NAMED:] = ["and more"] * (len(words) > NAMED)
    return f"the model does not know {', '.join(words)}, and draws what the other words say" if words else ""


def groups_of_words(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Group and its words as text, for a list to be read; other words are left out."""
    return [(group, ", ".join(phrases)) for group, phrases in vocabulary.items() if group != OTHER]
