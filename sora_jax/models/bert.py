"""BERT's encoder: Devlin et al. 2018 (arXiv:1810.04805).

Axis letters: `B` captions, `M` text positions, `E` text width, `H` heads, `F` width of a head, `L` layers.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.models.weights import read_weights

_NOT_READ = {"embeddings.position_ids"}  # position indices, which some files carry
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


@jax.jit
def bert_states(model: Bert, ids_bm: jax.Array, mask_bm: jax.Array) -> jax.Array:
    """`model(ids_bm, mask_bm)`, compiled for each shape."""
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


def _layer_norm(settings: Mapping[str, Any], rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x²] − E[x]², loses digits to cancellation.
    width, epsilon = settings["hidden_size"], settings["layer_norm_eps"]
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)
