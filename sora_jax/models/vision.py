"""CLIP's vision transformer (Radford et al. 2021, arXiv:2103.00020; Dosovitskiy et al. 2020, arXiv:2010.11929).

What image-to-video models know of a picture besides its latent: the states before the last layer (Wan team 2025,
section 5.1). Files and numerics are those of transformers 5; layers are read one after another, when they are needed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from sora_jax.errors import UserError
from sora_jax.models.weights import map_weights, release

Weights: TypeAlias = dict[str, jax.Array]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda y: y * jax.nn.sigmoid(1.702 * y),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
# Our name of a layer's part to the published one.
LAYER = {
    **{part: f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")},
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
PREFIX = "vision_model."


@dataclasses.dataclass(frozen=True)
class Tower:
    """Sizes of a transformer, by the names of a published config.json; its defaults are CLIP's."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_hidden_layers: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 224
    patch_size: int = 32
    max_position_embeddings: int = 77
    eos_token_id: int = 49407

    @property
    def states(self) -> int:
        """Of a picture: its class's, and one of each patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


def tower(settings: Mapping[str, Any], **defaults: Any) -> Tower:
    """The sizes that are in `settings`; others are the published defaults."""
    known = {field.name for field in dataclasses.fields(Tower)}
    return Tower(**{**defaults, **{name: value for name, value in settings.items() if name in known}})


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How pictures become what the network takes, by the names of a `preprocessor_config.json`."""

    size: int = 224
    crop: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Preparation:
        """Of the contents of that file.

        Raises:
          UserError: a picture is prepared in another way than by CLIP.
        """
        size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
        size, crop = ({"shortest_edge": 224} | size, {"height": 224, "width": 224} | crop)
        steps = {f"do_{step}" for step in ("resize", "center_crop", "rescale", "normalize")}
        if (
            set(size) != {"shortest_edge"}
            or crop["height"] != crop["width"]
            or settings.get("resample", PIL.Image.Resampling.BICUBIC) != PIL.Image.Resampling.BICUBIC
            or crop["height"] > size["shortest_edge"]
            or not all(settings.get(step, True) for step in steps)
        ):
            raise UserError(
                "The model's pictures aren't prepared as CLIP's are (their short side made one length, the middle "
                "square cut out, bicubic): that isn't supported."
            )
        mean, std = (
            tuple(settings.get(f"image_{name}", own)) for name, own in (("mean", MEAN), ("std", STD))
        )
        return cls(size["shortest_edge"], crop["height"], mean, std)

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """float32[S,S,3] of uint8[Y,X,3]."""
        Y, X, _ = picture.shape
        high, wide = (int(self.size * side / min(Y, X)) for side in (Y, X))
        image = PIL.Image.fromarray(picture).resize((wide, high), PIL.Image.Resampling.BICUBIC)
        top, left = (high - self.crop) // 2, (wide - self.crop) // 2
        square = np.asarray(image, np.float32)[top : top + self.crop, left : left + self.crop]
        return (square / 255 - np.float32(self.mean)) / np.float32(self.std)


class ClipVision:
    """A vision transformer in its files: pictures to states.

    Args:
      sizes, prepare: of the folders' settings.
      tensors: under the names of a transformers file, best from `map_weights`; one layer of them is read at a time.

    Raises:
      UserError: a tensor is missing or of another shape.
    """

    def __init__(
        self, sizes: Tower, prepare: Preparation, tensors: Mapping[str, np.ndarray], where: str
    ) -> None:
        # transformers 5 may leave the prefix out.
        named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        for name, shape in _shapes(sizes).items():
            if name not in named or named[name].shape != shape:
                found = f"has it as {named[name].shape}" if name in named else "doesn't have it"
                raise UserError(f"{where} should have {name!r} of shape {shape} and {found}: fetch it again.")
        if prepare.crop != sizes.image_size:
            raise UserError(
                f"{where} is of pictures of {sizes.image_size} pixels, and {prepare.crop} are cut out of them: the "
                "image encoder and what prepares its pictures are of different models."
            )
        self.sizes, self.prepare, self._tensors = sizes, prepare, named

    def __call__(self, pictures: list[np.ndarray]) -> np.ndarray:
        """float32[B,M,E], the states before the last layer, of uint8[Y,X,3] each."""
        x = jnp.stack([jnp.asarray(self.prepare(picture)) for picture in pictures])
        weights = {
            "picture.class": self._read("embeddings.class_embedding").reshape(1, 1, -1),
            "picture.positions": self._read("embeddings.position_embedding.weight"),
            "picture.patches": patch_matrix(self._read("embeddings.patch_embedding.weight")),
            **{
                f"pre.{kind}": self._read(f"pre_layrnorm.{kind}") for kind in ("weight", "bias")
            },  # so in files
        }
        x = norm(weights, "pre", embedded(weights, "picture", x, self.sizes), self.sizes)
        for number in range(self.sizes.num_hidden_layers - 1):
            part = {
                f"{ours}.{kind}": self._read(f"encoder.layers.{number}.{theirs}.{kind}").T
                for ours, theirs in LAYER.items()
                for kind in ("weight", "bias")
            }
            x = _layer(part, x, self.sizes)
        return np.asarray(x)

    def _read(self, name: str) -> jax.Array:
        array = jnp.array(self._tensors[name], jnp.float32)
        release(self._tensors[name])
        return array


def load_clip_vision(folder: pathlib.Path, processor: pathlib.Path) -> ClipVision:
    """Of the folders `image_encoder` and `image_processor` of a diffusers pipeline.

    Raises:
      UserError: they are incomplete, or of another architecture.
    """
    file = folder / "model.safetensors"
    return ClipVision(
        read_tower(folder),
        Preparation.of(_settings(processor / "preprocessor_config.json")),
        map_weights(file),
        str(file),
    )


def read_tower(folder: pathlib.Path) -> Tower:
    """The sizes of a vision transformer in a folder.

    Raises:
      UserError: its config.json can't be read, or is of another architecture.
    """
    settings = _settings(folder / "config.json")
    sizes, kind = tower(settings), settings.get("model_type")
    if kind != "clip_vision_model" or sizes.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"{folder} holds a {kind!r} with the activation {sizes.hidden_act!r}: a 'clip_vision_model' with one of "
            f"{', '.join(ACTIVATIONS)} is needed."
        )
    return sizes


def _settings(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({error}): the model's folder is incomplete; fetch it again."
        ) from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings: fetch the model again.")
    return settings


def _shapes(sizes: Tower) -> dict[str, tuple[int, ...]]:
    """Of the tensors that are used, by their names in the file without its prefix."""
    E, W = sizes.hidden_size, sizes.intermediate_size
    out: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (E,),
        "embeddings.position_embedding.weight": (sizes.states, E),
        "embeddings.patch_embedding.weight": (E, 3, sizes.patch_size, sizes.patch_size),
        **{f"pre_layrnorm.{kind}": (E,) for kind in ("weight", "bias")},
    }
    matrices = dict.fromkeys(("q", "k", "v", "out"), (E, E)) | {"fc1": (W, E), "fc2": (E, W)}
    for number in range(sizes.num_hidden_layers - 1):
        for ours, theirs in LAYER.items():
            name = f"encoder.layers.{number}.{theirs}"
            out |= {f"{name}.weight": matrices.get(ours, (E,)), f"{name}.bias": matrices.get(ours, (E,))[:1]}
    return out


def patch_matrix(kernel: Any) -> Any:
    """A convolution's [E,C,P,P] as a matrix [P·P·C,E] for patches cut out."""
    return kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))


def embedded(weights: Weights, name: str, x: jax.Array, sizes: Tower) -> jax.Array:
    """Prepared pictures f[B,S,S,3] as f[B,M,E]: the class's state, and those of patches; each with its position."""
    count, side, patch = len(x), sizes.image_size // sizes.patch_size, sizes.patch_size
    cut = x[:, : side * patch, : side * patch].reshape(count, side, patch, side, patch, -1).swapaxes(2, 3)
    tokens = product(cut.reshape(count, side * side, -1), weights[f"{name}.patches"])
    tokens += weights.get(f"{name}.patches_bias", 0.0)
    first = jnp.broadcast_to(weights[f"{name}.class"], (count, 1, tokens.shape[-1]))
    return jnp.concatenate([first, tokens], 1) + weights[f"{name}.positions"]


def layer(part: Weights, x: jax.Array, sizes: Tower, mask: jax.Array | None = None) -> jax.Array:
    """Pre-norm attention and an MLP; `part` has each matrix as [in, out]."""
    activate = ACTIVATIONS[sizes.hidden_act]

    def linear(to: str, y: jax.Array) -> jax.Array:
        return product(y, part[f"{to}.weight"]) + part[f"{to}.bias"]

    y = norm(part, "norm1", x, sizes)
    shape = (*x.shape[:2], sizes.num_attention_heads, -1)
    q, k, v = (linear(to, y).reshape(shape) for to in ("q", "k", "v"))
    with jax.default_matmul_precision("highest"):
        seen = jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[None, None])
    x = x + linear("out", seen.reshape(x.shape))
    return x + linear("fc2", activate(linear("fc1", norm(part, "norm2", x, sizes))))


_layer = jax.jit(layer, static_argnames="sizes")


def norm(weights: Weights, name: str, x: jax.Array, sizes: Tower) -> jax.Array:
    """Layer norm with weights."""
    left = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((left**2).mean(-1, keepdims=True) + sizes.layer_norm_eps)
    return left * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """In float32 on accelerators too."""
    return jnp.matmul(x, matrix, precision="highest")
