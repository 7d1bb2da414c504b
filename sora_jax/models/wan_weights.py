"""Wan's transformer from files: diffusers' names and the original's, and the way back.

Published matrices are [out, in]; ours are [in, out], layers are stacked, queries, keys and values are one matrix, and
the pairs of numbers that RoPE rotates, neighbours in the original, are the two halves of a head here
(`models.layers.rotate`): the same products, as queries and keys are permuted alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.errors import UserError
from sora_jax.models.wan import Wan, WanConfig
from sora_jax.models.weights import release

# Keys of diffusers' config.json by ours, and those that say nothing of the shape or must have one value.
_FIELDS = {
    "layers": "num_layers",
    "heads": "num_attention_heads",
    "head_width": "attention_head_dim",
    "hidden": "ffn_dim",
    "channels": "in_channels",
    "channels_out": "out_channels",
    "patch": "patch_size",
    "text_width": "text_dim",
    "time_width": "freq_dim",
    "cross_norm": "cross_attn_norm",
    "epsilon": "eps",
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "image_dim": (None,),
    "added_kv_proj_dim": (None,),
    "pos_embed_seq_len": (None,),
    "window_size": ((-1, -1), [-1, -1]),
    "add_img_emb": (False,),
    "qk_norm": ("rms_norm_across_heads", True),
}
_IGNORED = {"rope_max_seq_len", "quantization_config"}

# The original code's names, as patterns, and diffusers' in their place. The norm before cross-attention is norm3 there.
_RENAMED = {
    r"^text_embedding\.0\.": "condition_embedder.text_embedder.linear_1.",
    r"^text_embedding\.2\.": "condition_embedder.text_embedder.linear_2.",
    r"^time_embedding\.0\.": "condition_embedder.time_embedder.linear_1.",
    r"^time_embedding\.2\.": "condition_embedder.time_embedder.linear_2.",
    r"^time_projection\.1\.": "condition_embedder.time_proj.",
    r"^head\.head\.": "proj_out.",
    r"^head\.modulation$": "scale_shift_table",
    r"^(blocks\.\d+)\.modulation$": r"\1.scale_shift_table",
    r"^(blocks\.\d+)\.norm3\.": r"\1.norm2.",
    r"^(blocks\.\d+)\.ffn\.0\.": r"\1.ffn.net.0.proj.",
    r"^(blocks\.\d+)\.ffn\.2\.": r"\1.ffn.net.2.",
    r"^(blocks\.\d+)\.(self|cross)_attn\.o\.": r"\1.\2_attn.to_out.0.",
    r"^(blocks\.\d+)\.(self|cross)_attn\.([qkv])\.": r"\1.\2_attn.to_\3.",
    r"^(blocks\.\d+)\.self_attn\.": r"\1.attn1.",
    r"^(blocks\.\d+)\.cross_attn\.": r"\1.attn2.",
}


def wan_config(settings: Mapping[str, Any], **fields: Any) -> WanConfig:
    """The configuration of a diffusers `config.json`.

    Args:
      fields: others of ours, such as `dtype`.

    Raises:
      UserError: it is of another architecture, or a key isn't known.
    """
    own = {ours: settings[theirs] for ours, theirs in _FIELDS.items() if settings.get(theirs) is not None}
    own["patch"] = tuple(own.get("patch", WanConfig.patch))
    own.setdefault("channels_out", own.get("channels", WanConfig.channels))
    for name, value in settings.items():
        if name in _FIXED and value not in _FIXED[name]:
            raise UserError(
                f"The transformer's config.json says {name}={value!r}, which isn't supported: text-to-video models of "
                f"Wan have {_FIXED[name][0]!r} there."
            )
        if not (name.startswith("_") or name in (*_FIELDS.values(), *_FIXED, *_IGNORED)):
            raise UserError(f"The transformer's config.json has a key that isn't known, {name!r}={value!r}.")
    return WanConfig(**own, **fields)


def diffusers_names(names: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under diffusers' names, where they are under the original code's.

    Raises:
      UserError: two of them are of the same parameter.
    """
    out: dict[str, Any] = {}
    for given, value in names.items():
        name = re.sub(r"^(model\.diffusion_model\.|model\.)", "", given)
        for pattern, replacement in _RENAMED.items():
            name = re.sub(pattern, replacement, name)
        if name in out:
            raise UserError(f"The transformer's file holds {name!r} twice, once as {given!r}.")
        out[name] = value
    return out


def load_wan(
    config: WanConfig,
    tensors: Mapping[str, np.ndarray],
    where: str = "The transformer's file",
    place: Callable[[str, np.ndarray], Any] = lambda name, array: jnp.asarray(array),
    dtype: Any = np.float32,
) -> Wan:
    """The transformer of a file's tensors, read one after another.

    Args:
      tensors: by diffusers' names or the original's; memory-mapped ones are read as they are needed.
      where: names the file in errors.
      place: puts a parameter, by our name, on its devices.
      dtype: of the parameters; they are cast while they are read.

    Raises:
      UserError: a tensor is unknown, missing or of another shape: all of them are named, up to three.
    """
    tensors = diffusers_names(tensors)
    check_tensors(dict(published_shapes(config)), tensors, where)
    template = jax.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    placed = []
    for path, like in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        array = np.empty(like.shape, dtype)
        _fill(array, name, tensors, config)
        placed.append(place(name, array))
    return jax.tree_util.tree_unflatten(structure, placed)


def check_tensors(
    wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray], where: str
) -> None:
    """Raises UserError where the tensors aren't exactly those wanted, by name and shape."""
    faults = [f"{name!r} is missing" for name in wanted if name not in tensors]
    faults += [f"{name!r} is unknown" for name in tensors if name not in wanted]
    faults += [
        f"{name!r} is {tuple(tensors[name].shape)} where config.json says {tuple(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"{where} doesn't belong to its config.json: {', '.join(faults[:3])}{more}. Fetch the model again."
        )


def published_shapes(config: WanConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """diffusers' name and shape of each parameter."""
    D, W = config.width, config.hidden
    linears: dict[str, tuple[int, ...]] = {
        "patch_embedding": (D, config.channels, *config.patch),
        "condition_embedder.text_embedder.linear_1": (D, config.text_width),
        "condition_embedder.text_embedder.linear_2": (D, D),
        "condition_embedder.time_embedder.linear_1": (D, config.time_width),
        "condition_embedder.time_embedder.linear_2": (D, D),
        "condition_embedder.time_proj": (6 * D, D),
        "proj_out": (config.patch_width, D),
    }
    yield "scale_shift_table", (1, 2, D)
    for layer in range(config.layers):
        block = f"blocks.{layer}."
        yield f"{block}scale_shift_table", (1, 6, D)
        for attention in ("attn1", "attn2"):
            linears |= {f"{block}{attention}.{part}": (D, D) for part in ("to_q", "to_k", "to_v", "to_out.0")}
            yield from ((f"{block}{attention}.norm_{part}.weight", (D,)) for part in "qk")
        linears |= {f"{block}ffn.net.0.proj": (W, D), f"{block}ffn.net.2": (D, W)}
        if config.cross_norm:
            yield from ((f"{block}norm2.{part}", (D,)) for part in ("weight", "bias"))
    for name, shape in linears.items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


# Our linear layers by diffusers' names; several are one beside the other.
_LINEARS = {
    "patch_in": ("patch_embedding",),
    "text_in": ("condition_embedder.text_embedder.linear_1",),
    "text_out": ("condition_embedder.text_embedder.linear_2",),
    "time_in": ("condition_embedder.time_embedder.linear_1",),
    "time_out": ("condition_embedder.time_embedder.linear_2",),
    "condition": ("condition_embedder.time_proj",),
    "patch_out": ("proj_out",),
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "out": ("attn1.to_out.0",),
    "cross.q": ("attn2.to_q",),
    "cross.kv": ("attn2.to_k", "attn2.to_v"),
    "cross.out": ("attn2.to_out.0",),
    "up": ("ffn.net.0.proj",),
    "down": ("ffn.net.2",),
}
_TABLES = {
    "modulation": ("scale_shift_table",),
    "qk_scale": ("attn1.norm_q.weight", "attn1.norm_k.weight"),
    "cross.qk_scale": ("attn2.norm_q.weight", "attn2.norm_k.weight"),
    "cross.norm_scale": ("norm2.weight",),
    "cross.norm_bias": ("norm2.bias",),
}
_ROTATED = {"attn1.to_q", "attn1.to_k", "attn1.norm_q.weight", "attn1.norm_k.weight"}


def published_tensors(config: WanConfig, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `load_wan`: our parameters, by names such as "blocks/qkv/kernel", as diffusers' tensors."""
    shapes, out = dict(published_shapes(config)), {}
    for name, prefix, array in _by_layer(leaves):
        if name in _TABLES:
            rows = array.reshape(len(_TABLES[name]), -1)
            for row, theirs in zip(rows, _TABLES[name], strict=True):
                out[prefix + theirs] = _neighbours(row, theirs, config)
            continue
        layer, part = name.rsplit(".", 1)
        for theirs, columns in zip(_LINEARS[layer], np.split(array, len(_LINEARS[layer]), -1), strict=True):
            published = f"{prefix}{theirs}.{'bias' if part == 'bias' else 'weight'}"
            rows = _neighbours(columns.T, theirs, config)
            if theirs == "patch_embedding" and part == "kernel":
                rows = _channels_first(rows, config)
            out[published] = rows
    return {name: np.ascontiguousarray(out[name].reshape(shape)) for name, shape in shapes.items()}


def published_lora(config: WanConfig, lora: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Low-rank updates (`models.low_rank`) by diffusers' module, each as PEFT's A [rank, in] and B [out, rank].

    Args:
      lora: by names such as "blocks/qkv/lora_down".
    """
    downs = {
        f"{prefix}{name}": array for name, prefix, array in _by_layer(lora) if name.endswith("lora_down")
    }
    out = {}
    for name, prefix, up in _by_layer(lora):
        layer, part = name.rsplit(".", 1)
        if part != "lora_up":
            continue
        sources = _LINEARS[layer]
        down = np.split(downs[f"{prefix}{layer}.lora_down"], len(sources), -1)
        for theirs, a, b in zip(sources, down, np.split(up, len(sources)), strict=True):
            a, b = a.T, _neighbours(b.T, theirs, config)
            if theirs == "patch_embedding":  # a convolution, and a second of one cell
                a, b = _channels_first(a, config), b[:, :, None, None, None]
            out[prefix + theirs] = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return out


def _by_layer(leaves: Mapping[str, Any]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(our name in a block, diffusers' prefix, array) of each parameter of each layer."""
    for name, leaf in leaves.items():
        array, plain = np.asarray(leaf, np.float32), name.replace("/", ".")
        if plain.startswith("blocks."):
            for layer, own in enumerate(array):
                yield plain.removeprefix("blocks."), f"blocks.{layer}.", own
        else:
            yield plain, "", array


def _fill(array: np.ndarray, name: str, tensors: Mapping[str, np.ndarray], config: WanConfig) -> None:
    """Writes our parameter of a name, layer by layer."""
    if name.startswith("blocks."):
        for layer, part in enumerate(array):
            _fill_one(part, name.removeprefix("blocks."), f"blocks.{layer}.", tensors, config)
    else:
        _fill_one(array, name, "", tensors, config)


def _fill_one(
    array: np.ndarray, name: str, prefix: str, tensors: Mapping[str, np.ndarray], config: WanConfig
) -> None:
    if name in _TABLES:
        rows = array.reshape(len(_TABLES[name]), -1)
        for row, theirs in zip(rows, _TABLES[name], strict=True):
            tensor = tensors[prefix + theirs]
            row[...] = _rotated(tensor.reshape(-1), theirs, config)
            release(tensor)
        return
    layer, part = name.rsplit(".", 1)
    sources = _LINEARS[layer]
    width = array.shape[-1] // len(sources)
    for i, theirs in enumerate(sources):
        given = tensor = tensors[f"{prefix}{theirs}.{'bias' if part == 'bias' else 'weight'}"]
        if theirs == "patch_embedding" and part == "kernel":
            tensor = tensor.transpose(0, 2, 3, 4, 1)  # a token's numbers: (time, height, width, channel)
        if part == "kernel":
            tensor = tensor.reshape(len(tensor), -1)
        array[..., i * width : (i + 1) * width] = _rotated(tensor, theirs, config).T
        release(given)  # of what is mapped, only one tensor is in memory at a time


def _rotated(tensor: np.ndarray, theirs: str, config: WanConfig) -> np.ndarray:
    """Rows [H F, …] of queries and keys, neighbours as halves; others as they are."""
    if theirs not in _ROTATED:
        return tensor
    pairs = tensor.reshape(config.heads, config.head_width // 2, 2, -1)
    return np.swapaxes(pairs, 1, 2).reshape(tensor.shape)


def _neighbours(rows: np.ndarray, theirs: str, config: WanConfig) -> np.ndarray:
    """The inverse of `_rotated`."""
    if theirs not in _ROTATED:
        return rows
    pairs = rows.reshape(config.heads, 2, config.head_width // 2, -1)
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


def _channels_first(rows: np.ndarray, config: WanConfig) -> np.ndarray:
    """Rows of a token's numbers (time, height, width, channel) as a convolution's kernels."""
    return np.moveaxis(rows.reshape(len(rows), *config.patch, config.channels), -1, 1)
