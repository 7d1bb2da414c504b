"""CLIP's two towers and DINO's vision transformer, from local weights in the layout of Hugging Face's `transformers`.

CLIP: Radford et al. 2021, arXiv:2103.00020. DINO: Caron et al. 2021, arXiv:2104.14294; the transformer: Dosovitskiy
et al. 2020, arXiv:2010.11929.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
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

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda y: y * jax.nn.sigmoid(1.702 * y),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
FILES = ("model.safetensors", "pytorch_model.bin")
# Our name of a layer's part to the published one.
_CLIP_LAYER = {
    **{part: f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")},
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
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
class Tower:
    """Sizes of a transformer, by the names of a published config.json; its defaults are CLIP's."""

    num_attention_heads: int = 12
    num_hidden_layers: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 224
    patch_size: int = 32
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


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


def tower(settings: Mapping[str, Any], **defaults: Any) -> Tower:
    """The sizes that are in `settings`; others are the published defaults."""
    known = {field.name for field in dataclasses.fields(Tower)}
    return Tower(**{**defaults, **{name: value for name, value in settings.items() if name in known}})


def clip_towers(settings: Mapping[str, Any]) -> tuple[Tower, Tower]:
    """(vision, text) of a CLIP's settings."""
    vision = tower(settings.get("vision_config") or {})
    return vision, tower(settings.get("text_config") or {}, num_attention_heads=8)


def prepare_clip(frames: jax.Array, sizes: Tower) -> jax.Array:
    """Frames f[B,Y,X,3] in 0..255 as CLIP takes them: the middle square, bicubic, normalized."""
    return normalize(
        resize_and_crop(frames, sizes.image_size, "cubic", antialias=True), _CLIP_MEAN, _CLIP_STD
    )


def clip_image(weights: Weights, x: jax.Array, sizes: Tower) -> jax.Array:
    """Unit vectors f[B,P] of prepared frames."""
    x = _norm(weights, "vision.pre", _embedded(weights, "vision", x, sizes), sizes)
    x = _layers(weights, "vision", x, sizes)
    return _unit(_norm(weights, "vision.post", x[:, 0], sizes) @ weights["vision.projection"])


def clip_text(weights: Weights, ids: jax.Array, sizes: Tower) -> jax.Array:
    """Unit vectors f[B,P] of token ids i[B,M], each text's end token at its end."""
    length = ids.shape[1]
    x = weights["text.words"][ids] + weights["text.positions"][:length]
    x = _layers(weights, "text", x, sizes, jnp.tril(jnp.ones((length, length), bool)))
    # Configurations of before 2023 name another end token; it is the one of the largest id.
    end = ids.argmax(-1) if sizes.eos_token_id == 2 else (ids == sizes.eos_token_id).argmax(-1)
    pooled = jnp.take_along_axis(_norm(weights, "text.post", x, sizes), end[:, None, None], 1)[:, 0]
    return _unit(pooled @ weights["text.projection"])


def prepare_dino(frames: jax.Array, sizes: Tower) -> jax.Array:
    """Frames f[B,Y,X,3] in 0..255 as DINO takes them: the middle square, bilinear, normalized."""
    return normalize(resize_and_crop(frames, sizes.image_size), IMAGENET_MEAN, IMAGENET_STD)


def dino(weights: Weights, x: jax.Array, sizes: Tower) -> jax.Array:
    """The class token's state f[B,E] of prepared frames."""
    x = _layers(weights, "vision", _embedded(weights, "vision", x, sizes), sizes)
    return _norm(weights, "vision.post", x[:, 0], sizes)


def convert_clip(tensors: Tensors, vision: Tower, text: Tower) -> dict[str, np.ndarray]:
    """Published tensors under our names."""
    eyes, words = "vision_model.", "text_model."
    out = {
        "vision.class": tensors[f"{eyes}embeddings.class_embedding"].reshape(1, 1, -1),
        "vision.positions": tensors[f"{eyes}embeddings.position_embedding.weight"],
        "vision.patches": _patches(tensors[f"{eyes}embeddings.patch_embedding.weight"]),
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
    out |= _stacked(tensors, "vision", f"{eyes}encoder.layers.", _CLIP_LAYER, vision)
    return out | _stacked(tensors, "text", f"{words}encoder.layers.", _CLIP_LAYER, text)


def convert_dino(tensors: Tensors, sizes: Tower) -> dict[str, np.ndarray]:
    """Published tensors of a ViTModel under our names."""
    tensors = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    out = {
        "vision.class": tensors["embeddings.cls_token"],
        "vision.positions": tensors["embeddings.position_embeddings"][0],
        "vision.patches": _patches(tensors["embeddings.patch_embeddings.projection.weight"]),
        "vision.patches_bias": tensors["embeddings.patch_embeddings.projection.bias"],
        "vision.post.weight": tensors["layernorm.weight"],
        "vision.post.bias": tensors["layernorm.bias"],
    }
    return out | _stacked(tensors, "vision", "encoder.layer.", _VIT_LAYER, sizes)


def _patches(kernel: np.ndarray) -> np.ndarray:
    """A convolution's [E,C,P,P] as a matrix [P·P·C,E] for patches cut out."""
    return np.moveaxis(kernel, 0, -1).transpose(1, 2, 0, 3).reshape(-1, len(kernel))


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


def _embedded(weights: Weights, name: str, x: jax.Array, sizes: Tower) -> jax.Array:
    count, side, patch = len(x), sizes.image_size // sizes.patch_size, sizes.patch_size
    cut = x[:, : side * patch, : side * patch].reshape(count, side, patch, side, patch, -1).swapaxes(2, 3)
    tokens = _product(cut.reshape(count, side * side, -1), weights[f"{name}.patches"])
    tokens += weights.get(f"{name}.patches_bias", 0.0)
    first = jnp.broadcast_to(weights[f"{name}.class"], (count, 1, tokens.shape[-1]))
    return jnp.concatenate([first, tokens], 1) + weights[f"{name}.positions"]


def _layers(
    weights: Weights, name: str, x: jax.Array, sizes: Tower, mask: jax.Array | None = None
) -> jax.Array:
    """Pre-norm attention and MLP, one layer's program for all."""
    prefix = f"{name}.layers."
    stacked = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if sizes.hidden_act not in _ACTIVATIONS:
        raise UserError(f"The activation {sizes.hidden_act!r} isn't known: {', '.join(_ACTIVATIONS)} are.")
    activate = _ACTIVATIONS[sizes.hidden_act]

    def layer(x: jax.Array, part: Weights) -> tuple[jax.Array, None]:
        def linear(to: str, y: jax.Array) -> jax.Array:
            return _product(y, part[f"{to}.weight"]) + part[f"{to}.bias"]

        y = _norm(part, "norm1", x, sizes)
        shape = (*x.shape[:2], sizes.num_attention_heads, -1)
        q, k, v = (linear(to, y).reshape(shape) for to in ("q", "k", "v"))
        with jax.default_matmul_precision("highest"):
            seen = jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[None, None])
        x = x + linear("out", seen.reshape(x.shape))
        return x + linear("fc2", activate(linear("fc1", _norm(part, "norm2", x, sizes)))), None

    return jax.lax.scan(layer, x, stacked)[0]


def _norm(weights: Weights, name: str, x: jax.Array, sizes: Tower) -> jax.Array:
    left = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((left**2).mean(-1, keepdims=True) + sizes.layer_norm_eps)
    return left * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.matmul(x, matrix, precision="highest")


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
