"""What a model was trained on: its domain, vocabulary, sizes, rates and durations. A part of its card.

Models that were trained on footage have no closed vocabulary, and prompts aren't checked.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sora_jax.toyworld import captions
from sora_jax.toyworld.scene import COLOURS, SHAPES

# English function words. The other words of a prompt are its content.
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
      things: words of both that name what is drawn; a prompt has one of them.
      tones: words of the vocabulary that colour backgrounds only.
      backgrounds: words of both that describe a background, tones among them.
      backdrops: the nouns among them.
      example: a prompt that it draws well.
      resolutions: short sides in pixels; the largest may have been seen in parts of frames alone.
      aspects: width to height.
      rates: frames a second.
      durations: seconds; 0 is a picture.
    """

    domain: str = ""
    vocabulary: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    things: tuple[str, ...] = ()
    tones: tuple[str, ...] = ()
    backgrounds: tuple[str, ...] = ()
    backdrops: tuple[str, ...] = ()
    example: str = ""
    resolutions: tuple[int, ...] = ()
    aspects: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    durations: tuple[float, ...] = ()

    def unknown_words(self, prompt: str) -> tuple[str, ...]:
        """Words of `prompt` that the model doesn't know, each once; none where its vocabulary is open."""
        if not self.vocabulary:
            return ()
        known, _ = _vocabulary((*self.vocabulary, *self.paraphrases))
        tones = _stems(self.tones)
        unknown = []
        for sentence in re.split(r"[.!?;:]\s", prompt):
            words = self._words(sentence)
            background = self._background(words)
            unknown += [
                word
                for place, word in enumerate(words)
                if place not in background and not _is_known(word, known - tones)
            ]
        return tuple(dict.fromkeys(unknown))

    def names_a_thing(self, prompt: str) -> bool:
        """Whether `prompt` names what is drawn; True where that isn't a closed set."""
        things = _stems(self.things)
        return not things or any(
            _stem(part) in things for word in self._words(prompt) for part in (word, *word.split("-"))
        )

    def _words(self, text: str) -> list[str]:
        _, compounds = _vocabulary((*self.vocabulary, *self.paraphrases))
        # "cherry red" is "cherry-red".
        return _words(compounds.sub(lambda match: "-".join(match[0].split()), text))

    def _background(self, words: list[str]) -> set[int]:
        """Which tones of a sentence colour a background: "a dark grey background", "the background is plain white"."""
        tones, joints, nouns, things = map(
            _stems, (self.tones, self.backgrounds, self.backdrops, self.things)
        )
        parts = [[_stem(part) for part in word.split("-")] for word in words]
        is_tone = [not tones.isdisjoint(each) and tones | FUNCTION_WORDS >= set(each) for each in parts]
        found: set[int] = set()
        for place in (i for i, word in enumerate(words) if _stem(word) in nouns):
            for way in (range(place - 1, -1, -1), range(place + 1, len(words))):
                found |= set(itertools.takewhile(lambda i: is_tone[i] or _stem(words[i]) in joints, way))
        # "The background is white and a grey circle moves": the last tone is the circle's.
        for place in reversed(range(len(words))):
            if place + 1 < len(words) and place in found and is_tone[place]:
                after = words[place + 1]
                if _stem(after) in things or (is_tone[place + 1] and place + 1 not in found):
                    found.discard(place)
        return {place for place in found if is_tone[place]}


def knowledge_of(config: Mapping[str, Any]) -> Knowledge:
    """What a model knows that was trained by a configuration, from its `data`."""
    data = config.get("data") or {}
    shapes: dict[str, Any] = {
        name: tuple(dict.fromkeys(data.get(name) or ()))
        for name in ("resolutions", "aspects", "rates", "durations")
    }
    if "native" in shapes["aspects"]:  # files' own, whatever they were
        shapes["aspects"] = ()
    if data.get("source") != "toyworld":
        return Knowledge(domain="footage", **shapes)
    return Knowledge(
        domain=f"{_list(f'{shape}s' for shape in SHAPES)} in {_list(COLOURS)} that move as told (toyworld)",
        vocabulary=captions.vocabulary(),
        paraphrases=captions.vocabulary(paraphrase=True),
        things=captions.things(),
        tones=captions.tones(),
        backgrounds=captions.backgrounds(),
        backdrops=captions.backdrops(),
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
    """Stems of words, and a pattern of those that are written with hyphens, as separate words."""
    apart = [re.escape(word).replace(r"\-", r"\s+") for word in words if "-" in word]
    pattern = rf"\b(?:{'|'.join(apart)})\b" if apart else r"(?!)"
    return _stems(words), re.compile(pattern, re.IGNORECASE)


@functools.lru_cache(32)
def _stems(words: tuple[str, ...]) -> frozenset[str]:
    return frozenset(map(_stem, words))


def _stem(word: str) -> str:
    """A word without plural or inflection: "circles" and "circle", "moving" and "moves" are one."""
    word = SPELLINGS.get(word, word)
    for ending in ("ing", "ed", "es", "s"):
        rest = word.removesuffix(ending)
        if rest != word and len(rest) >= 2 and re.search("[aeiouy]", rest):
            word = rest
            break
    word = re.sub(r"(.)\1$", r"\1", word)
    return re.sub("(ie|i|y)$", "y", word) if word.endswith(("ie", "i", "y")) else word.removesuffix("e")
