"""CLIP's two towers and DINO's vision transformer, from local weights in the layout of Hugging Face's `transformers`.

CLIP: Radford et al. 2021, arXiv:2103.00020. DINO: Caron et al. 2021, arXiv:2104.14294; the transformer: Dosovitskiy
et al. 2020, arXiv:2010.11929.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import UserError
from sora_jax.evaluation.networks.layers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Tensors,
    Weights,
    normalize,
    resize_and_crop,
)
from sora_jax.models.pickled import read_tensors
from sora_jax.models.vision import (
    ACTIVATIONS,
    LAYER,
    MEAN,
    PREFIX,
    STD,
    Tower,
    embedded,
    layer,
    norm,
    patch_matrix,
    tower,
)

FILES = ("model.safetensors", "pytorch_model.bin")
# Our name of a layer's part to DINO's.
_VIT_LAYER = {
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "out": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a folder of a published model holds: its tensors, and its settings."""

    path: pathlib.Path
    file: pathlib.Path
    settings: Mapping[str, Any]
    tensors: Tensors


def read_folder(path: pathlib.Path, model_type: str) -> Folder:
    """Reads `config.json` and the weights (safetensors, or PyTorch's) of a folder.

    Raises:
      UserError: one is missing or damaged, or they are of another type of model.
    """
    file = next(
        (path / name for name in FILES if (path / name).is_file() or (path / f"{name}.index.json").is_file()),
        None,
    )
    if file is None:
        raise UserError(f"{path} has neither {' nor '.join(FILES)}: name the folder of a {model_type} model.")
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} has no config.json that can be read ({error}): fetch the model again."
        ) from error
    if settings.get("model_type") != model_type:
        raise UserError(
            f"{path} holds a model of type {settings.get('model_type')!r}, not {model_type!r}: name another folder."
        )
    return Folder(path, file, settings, read_tensors(file))


def clip_towers(settings: Mapping[str, Any]) -> tuple[Tower, Tower]:
    """(vision, text) of a CLIP's settings."""
    vision = tower(settings.get("vision_config") or {})
    return vision, tower(settings.get("text_config") or {}, num_attention_heads=8)


def prepare_clip(frames: jax.Array, sizes: Tower) -> jax.Array:
    """Frames f[B,Y,X,3] in 0..255 as CLIP takes them: the middle square, bicubic, normalized."""
    return normalize(resize_and_crop(frames, sizes.image_size, "cubic", antialias=True), MEAN, STD)


def clip_image(weights: Weights, x: jax.Array, sizes: Tower) -> jax.Array:
    """Unit vectors f[B,P] of prepared frames."""
    x = norm(weights, "vision.pre", embedded(weights, "vision", x, sizes), sizes)
    x = _layers(weights, "vision", x, sizes)
    return _unit(norm(weights, "vision.post", x[:, 0], sizes) @ weights["vision.projection"])


def clip_text(weights: Weights, ids: jax.Array, sizes: Tower) -> jax.Array:
    """Unit vectors f[B,P] of token ids i[B,M], each text's end token at its end."""
    length = ids.shape[1]
    x = weights["text.words"][ids] + weights["text.positions"][:length]
    x = _layers(weights, "text", x, sizes, jnp.tril(jnp.ones((length, length), bool)))
    # Configurations of before 2023 name another end token; it is the one of the largest id.
    end = ids.argmax(-1) if sizes.eos_token_id == 2 else (ids == sizes.eos_token_id).argmax(-1)
    pooled = jnp.take_along_axis(norm(weights, "text.post", x, sizes), end[:, None, None], 1)[:, 0]
    return _unit(pooled @ weights["text.projection"])


def prepare_dino(frames: jax.Array, sizes: Tower) -> jax.Array:
    """Frames f[B,Y,X,3] in 0..255 as DINO takes them: the middle square, bilinear, normalized."""
    return normalize(resize_and_crop(frames, sizes.image_size), IMAGENET_MEAN, IMAGENET_STD)


def dino(weights: Weights, x: jax.Array, sizes: Tower) -> jax.Array:
    """The class token's state f[B,E] of prepared frames."""
    x = _layers(weights, "vision", embedded(weights, "vision", x, sizes), sizes)
    return norm(weights, "vision.post", x[:, 0], sizes)


def convert_clip(tensors: Tensors, vision: Tower, text: Tower) -> dict[str, np.ndarray]:
    """Published tensors under our names."""
    eyes, words = PREFIX, "text_model."
    out = {
        "vision.class": tensors[f"{eyes}embeddings.class_embedding"].reshape(1, 1, -1),
        "vision.positions": tensors[f"{eyes}embeddings.position_embedding.weight"],
        "vision.patches": patch_matrix(tensors[f"{eyes}embeddings.patch_embedding.weight"]),
        "vision.projection": tensors["visual_projection.weight"].T,
        "text.words": tensors[f"{words}embeddings.token_embedding.weight"],
        "text.positions": tensors[f"{words}embeddings.position_embedding.weight"],
        "text.projection": tensors["text_projection.weight"].T,
    }
    for ours, theirs in {
        "vision.pre": f"{eyes}pre_layrnorm",  # so in files
        "vision.post": f"{eyes}post_layernorm",
        "text.post": f"{words}final_layer_norm",
    }.items():
        out |= {f"{ours}.{part}": tensors[f"{theirs}.{part}"] for part in ("weight", "bias")}
    out |= _stacked(tensors, "vision", f"{eyes}encoder.layers.", LAYER, vision)
    return out | _stacked(tensors, "text", f"{words}encoder.layers.", LAYER, text)


def convert_dino(tensors: Tensors, sizes: Tower) -> dict[str, np.ndarray]:
    """Published tensors of a ViTModel under our names."""
    tensors = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    out = {
        "vision.class": tensors["embeddings.cls_token"],
        "vision.positions": tensors["embeddings.position_embeddings"][0],
        "vision.patches": patch_matrix(tensors["embeddings.patch_embeddings.projection.weight"]),
        "vision.patches_bias": tensors["embeddings.patch_embeddings.projection.bias"],
        "vision.post.weight": tensors["layernorm.weight"],
        "vision.post.bias": tensors["layernorm.bias"],
    }
    return out | _stacked(tensors, "vision", "encoder.layer.", _VIT_LAYER, sizes)


def _stacked(
    tensors: Tensors, ours: str, prefix: str, names: Mapping[str, str], sizes: Tower
) -> dict[str, np.ndarray]:
    """A layer's parts, stacked over layers: matrices as [L,in,out]."""
    out = {}
    for part, published in names.items():
        for kind in ("weight", "bias"):
            rows = [
                tensors[f"{prefix}{layer}.{published}.{kind}"] for layer in range(sizes.num_hidden_layers)
            ]
            stacked = np.stack(rows)
            out[f"{ours}.layers.{part}.{kind}"] = stacked.swapaxes(1, 2) if stacked.ndim == 3 else stacked
    return out


def _layers(
    weights: Weights, name: str, x: jax.Array, sizes: Tower, mask: jax.Array | None = None
) -> jax.Array:
    """Pre-norm attention and MLP, one layer's program for all."""
    prefix = f"{name}.layers."
    stacked = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if sizes.hidden_act not in ACTIVATIONS:
        raise UserError(f"The activation {sizes.hidden_act!r} isn't known: {', '.join(ACTIVATIONS)} are.")
    return jax.lax.scan(lambda x, part: (layer(part, x, sizes, mask), None), x, stacked)[0]


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
