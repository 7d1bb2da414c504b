"""What a model knows: the world that it learned, its words, sizes, rates and durations. A part of its card.

Models that learned from footage have no closed vocabulary, and nothing is said of a prompt's words.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sora_jax.data import captions
from sora_jax.data.scene import COLOURS, SHAPES

# English words that carry no picture of their own. What is left of a prompt is what it asks for.
_FUNCTION_WORDS = """
a about again all also an and another are as at away be been being both but by can do does each every for from
has have here in into is it its just of off on one onto or other out over please show shows so some something
starting than that the their them then there these they thing things this those through to too under until very
was were where which while who will with within
animation clip image movie picture scene video
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
SPELLINGS = {"gray": "grey", "color": "colour", "colored": "coloured", "center": "centre"}


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """What a model saw in training; empty fields say nothing.

    Attributes:
      domain: what it draws, to stand in a sentence: "circles and squares that move (toyworld)".
      vocabulary: all words of training's captions, where these are a closed set.
      paraphrases: words that no caption had, and which the text encoder brings near to those of the vocabulary.
      example: a prompt that it draws well.
      resolutions: short sides in pixels; the largest may have been seen in parts of frames alone.
      aspects: width to height.
      rates: frames a second.
      durations: seconds; 0 is a picture.
    """

    domain: str = ""
    vocabulary: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    example: str = ""
    resolutions: tuple[int, ...] = ()
    aspects: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    durations: tuple[float, ...] = ()

    def unknown_words(self, prompt: str) -> tuple[str, ...]:
        """Words of `prompt` of which the model knows nothing, each once; none where its vocabulary is open."""
        if not self.vocabulary:
            return ()
        known, compounds = _vocabulary((*self.vocabulary, *self.paraphrases))
        # "cherry red" is "cherry-red".
        prompt = compounds.sub(lambda match: "-".join(match[0].split()), prompt)
        return tuple(dict.fromkeys(word for word in _words(prompt) if not _is_known(word, known)))


def knowledge_of(config: Mapping[str, Any]) -> Knowledge:
    """What a model knows that was trained by a configuration, from its `data`."""
    data = config.get("data") or {}
    shapes: dict[str, Any] = {
        name: tuple(dict.fromkeys(data.get(name) or ()))
        for name in ("resolutions", "aspects", "rates", "durations")
    }
    if data.get("source") != "toyworld":
        return Knowledge(domain="footage", **shapes)
    return Knowledge(
        domain=f"{_list(f'{shape}s' for shape in SHAPES)} in {_list(COLOURS)} that move as told (toyworld)",
        vocabulary=captions.vocabulary(),
        paraphrases=captions.vocabulary(paraphrase=True),
        example="a red circle moves left",
        **shapes,
    )


def _list(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}"


def _words(text: str) -> list[str]:
    """Its words in small letters; what is no letter or digit counts where there is nothing else."""
    words = re.findall(r"[^\W_]+(?:-[^\W_]+)*", text.lower().replace("’", "'").replace("'s", ""))
    return words or text.split()


def _is_known(word: str, known: frozenset[str]) -> bool:
    parts = (word, *word.split("-")) if "-" in word else (word,)
    whole, *rest = (part in FUNCTION_WORDS or _stem(part) in known for part in parts)
    return whole or (bool(rest) and all(rest))


@functools.lru_cache(8)
def _vocabulary(words: tuple[str, ...]) -> tuple[frozenset[str], re.Pattern[str]]:
    """Stems of words, and a pattern of those that are written with hyphens, their parts apart."""
    apart = [re.escape(word).replace(r"\-", r"\s+") for word in words if "-" in word]
    pattern = rf"\b(?:{'|'.join(apart)})\b" if apart else r"(?!)"
    return frozenset(map(_stem, words)), re.compile(pattern, re.IGNORECASE)


def _stem(word: str) -> str:
    """A word without plural or inflection: "circles" and "circle", "moving" and "moves" are one."""
    word = SPELLINGS.get(word, word)
    for ending in ("ing", "ed", "es", "s"):
        if (
            len(word) - len(ending) >= 2
            and word.endswith(ending)
            and re.search("[aeiouy]", word[: -len(ending)])
        ):
            word = word[: -len(ending)]
            break
    word = re.sub(r"(.)\1$", r"\1", word)
    return re.sub("(ie|i|y)$", "y", word) if word.endswith(("ie", "i", "y")) else word.removesuffix("e")
