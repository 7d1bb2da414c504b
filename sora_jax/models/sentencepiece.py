"""SentencePiece's own files, read without its package: LTX-Video's tokenizer comes as `spiece.model` alone.

The file is a protobuf message: pieces with scores and types, the trainer's settings, the normaliser's. Kudo and
Richardson 2018 (arXiv:1808.06226); sentencepiece_model.proto has the numbers of the fields.
"""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Iterator

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

_PIECES, _TRAINER, _NORMALISER = 1, 2, 3  # fields of the message
_PIECE, _SCORE, _TYPE = 1, 2, 3  # of a piece
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35  # of the trainer
_CHARSMAP = 2  # of the normaliser
_UNIGRAM = 1
_UNKNOWN, _CONTROL = 2, 3
_FIXED = {1: 8, 5: 4}  # bytes of values by their kind


def read_sentencepiece(path: pathlib.Path, end: str = "</s>") -> tokenizers.Tokenizer:
    """A unigram model as T5's tokenizers use it: Unicode normalised, split at white space, `end` after each text.

    T5's sentinels, `<extra_id_0>` to `<extra_id_99>`, which no prompt has, are left out.

    Raises:
      ValueError: the file is damaged or another kind of model, or has no `end`.
      OSError: it can't be read.
    """
    pieces: list[tuple[str, float]] = []
    special: list[str] = []
    unknown, trainer, charsmap = None, {}, b""
    for field, value in _fields(path.read_bytes()):
        if field == _PIECES:
            piece = dict(_fields(_bytes(value)))
            text, kind = _bytes(piece[_PIECE]).decode("utf-8"), piece.get(_TYPE, 1)
            unknown = len(pieces) if kind == _UNKNOWN else unknown
            special += [text] if kind in (_UNKNOWN, _CONTROL) else []
            pieces.append((text, struct.unpack("<f", _bytes(piece.get(_SCORE, bytes(4))))[0]))
        elif field == _TRAINER:
            trainer = dict(_fields(_bytes(value)))
        elif field == _NORMALISER:
            charsmap = _bytes(dict(_fields(_bytes(value))).get(_CHARSMAP, b""))
    if trainer.get(_MODEL_TYPE, _UNIGRAM) != _UNIGRAM or unknown is None:
        raise ValueError("it is no unigram model")
    names = [text for text, _ in pieces]
    if end not in names:
        raise ValueError(f"it has no piece {end!r}")
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unknown, bool(trainer.get(_BYTE_FALLBACK, 0))))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, names.index(end))]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a field is of another kind")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields; integers as such, all others as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _varint(data, at)
        elif key & 7 in _FIXED:
            size = _FIXED[key & 7]
        else:
            raise ValueError("it is no protobuf message")
        if at + size > len(data):
            raise ValueError("it is cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and where the next value begins."""
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    raise ValueError("it is cut short")
