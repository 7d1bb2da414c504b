"""Prompts to token ids: how the originals clean them, and their tokenizers."""

from __future__ import annotations

import html
import importlib
import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping

import tokenizers

from sora_jax.errors import UserError
from sora_jax.models.sentencepiece import read_sentencepiece


def tokenizer_file(folder: pathlib.Path) -> pathlib.Path:
    """The file of a tokenizer's folder that is read: `tokenizer.json`, or `spiece.model` where that is all there is."""
    whole, pieces = folder / "tokenizer.json", folder / "spiece.model"
    return pieces if pieces.is_file() and not whole.is_file() else whole


def load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer of a model's folder, which neither cuts nor pads.

    It is what `tokenizer.json` says. Of a T5's, transformers 5 takes the vocabulary and the map of characters alone,
    splits at white space first and knows no bytes for characters that are in no piece; prompts of usual characters with
    single spaces, as `clean_wan` leaves them, give the same tokens.

    Raises:
      UserError: there is none that can be read.
    """
    path = tokenizer_file(folder)
    try:
        if path.suffix == ".model":
            return read_sentencepiece(path)
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the model's folder is incomplete; fetch it again.") from error
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path} holds no tokenizer that can be read ({error}): fetch it again.") from error
    # The file may carry settings that truncate and pad silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def clean_wan(prompt: str) -> str:
    """A prompt as Wan's pipelines clean it: one space wherever there is any, HTML's names of characters as themselves.

    Wrongly decoded characters and curly quotes are repaired with ftfy first where that package is installed, as in
    diffusers; the original needs it.
    """
    if importlib.util.find_spec("ftfy"):
        prompt = importlib.import_module("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


# By TextConfig.clean. LTX-Video's own pipeline makes prompts small letters; diffusers' doesn't.
CLEANERS: Mapping[str, Callable[[str], str]] = {
    "none": lambda prompt: prompt,
    "wan": clean_wan,
    "lower": lambda prompt: prompt.lower().strip(),
}
