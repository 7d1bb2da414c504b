"""Wan's transformer from files: diffusers' names and the original's, and the way back (`models.published`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sora_jax.errors import UserError
from sora_jax.models.published import Layout, Published, renamed
from sora_jax.models.wan import Wan, WanConfig

# Keys of diffusers' config.json by ours, and those that say nothing of the shape or must have one value.
_FIELDS = {
    "layers": "num_layers",
    "heads": "num_attention_heads",
    "head_width": "attention_head_dim",
    "hidden": "ffn_dim",
    "patch": "patch_size",
    "text_width": "text_dim",
    "time_width": "freq_dim",
    "cross_norm": "cross_attn_norm",
    "epsilon": "eps",
    "picture_width": "image_dim",
    "picture_positions": "pos_embed_seq_len",
}
_OTHERS = {"in_channels", "out_channels", "added_kv_proj_dim"}
_FIXED: dict[str, tuple[Any, ...]] = {
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
    r"^img_emb\.emb_pos$": "condition_embedder.image_embedder.pos_embed",
    r"^img_emb\.proj\.0\.": "condition_embedder.image_embedder.norm1.",
    r"^img_emb\.proj\.1\.": "condition_embedder.image_embedder.ff.net.0.proj.",
    r"^img_emb\.proj\.3\.": "condition_embedder.image_embedder.ff.net.2.",
    r"^img_emb\.proj\.4\.": "condition_embedder.image_embedder.norm2.",
    r"^head\.head\.": "proj_out.",
    r"^head\.modulation$": "scale_shift_table",
    r"^(blocks\.\d+)\.modulation$": r"\1.scale_shift_table",
    r"^(blocks\.\d+)\.norm3\.": r"\1.norm2.",
    r"^(blocks\.\d+)\.ffn\.0\.": r"\1.ffn.net.0.proj.",
    r"^(blocks\.\d+)\.ffn\.2\.": r"\1.ffn.net.2.",
    r"^(blocks\.\d+)\.(self|cross)_attn\.o\.": r"\1.\2_attn.to_out.0.",
    r"^(blocks\.\d+)\.(self|cross)_attn\.([qkv])\.": r"\1.\2_attn.to_\3.",
    r"^(blocks\.\d+)\.cross_attn\.([kv])_img\.": r"\1.attn2.add_\2_proj.",
    r"^(blocks\.\d+)\.cross_attn\.norm_k_img\.": r"\1.attn2.norm_added_k.",
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
    channels_in = settings.get("in_channels") or WanConfig.channels
    own["channels"] = settings.get("out_channels") or channels_in
    own["extra_channels"] = channels_in - own["channels"]
    for name, value in settings.items():
        if name in _FIXED and value not in _FIXED[name]:
            raise UserError(
                f"The transformer's config.json says {name}={value!r}, which isn't supported: models of Wan have "
                f"{_FIXED[name][0]!r} there."
            )
        if not (name.startswith("_") or name in (*_FIELDS.values(), *_OTHERS, *_FIXED, *_IGNORED)):
            raise UserError(f"The transformer's config.json has a key that isn't known, {name!r}={value!r}.")
    config = WanConfig(**own, **fields)
    # Keys and values of pictures' states, which are as wide as the model then.
    if settings.get("added_kv_proj_dim") != (config.width if config.picture_width else None):
        raise UserError(
            f"The transformer's config.json says added_kv_proj_dim={settings.get('added_kv_proj_dim')!r} and "
            f"image_dim={settings.get('image_dim')!r}, which isn't supported: models of Wan have {config.width} and "
            "1280, or neither."
        )
    return config


def diffusers_names(names: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under diffusers' names, where they are under the original code's.

    Raises:
      UserError: two of them are of the same parameter.
    """
    named = renamed(names, _RENAMED)
    # A norm of queries for pictures' keys, which old conversions have and nothing uses.
    return {name: value for name, value in named.items() if ".norm_added_q." not in name}


def published_shapes(config: WanConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """diffusers' name and shape of each parameter."""
    D, W = config.width, config.hidden
    linears: dict[str, tuple[int, ...]] = {
        "patch_embedding": (D, config.channels + config.extra_channels, *config.patch),
        "condition_embedder.text_embedder.linear_1": (D, config.text_width),
        "condition_embedder.text_embedder.linear_2": (D, D),
        "condition_embedder.time_embedder.linear_1": (D, config.time_width),
        "condition_embedder.time_embedder.linear_2": (D, D),
        "condition_embedder.time_proj": (6 * D, D),
        "proj_out": (config.patch_width, D),
    }
    yield "scale_shift_table", (1, 2, D)
    if V := config.picture_width:
        image = "condition_embedder.image_embedder."
        linears |= {f"{image}ff.net.0.proj": (V, V), f"{image}ff.net.2": (D, V)}
        for norm, width in (("norm1", V), ("norm2", D)):
            yield from ((f"{image}{norm}.{part}", (width,)) for part in ("weight", "bias"))
        if config.picture_positions:
            yield f"{image}pos_embed", (1, config.picture_positions, V)
    for layer in range(config.layers):
        block = f"blocks.{layer}."
        yield f"{block}scale_shift_table", (1, 6, D)
        for attention in ("attn1", "attn2"):
            linears |= {f"{block}{attention}.{part}": (D, D) for part in ("to_q", "to_k", "to_v", "to_out.0")}
            yield from ((f"{block}{attention}.norm_{part}.weight", (D,)) for part in "qk")
        if config.picture_width:
            linears |= {f"{block}attn2.add_{part}_proj": (D, D) for part in "kv"}
            yield f"{block}attn2.norm_added_k.weight", (D,)
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
    "cross.picture_kv": ("attn2.add_k_proj", "attn2.add_v_proj"),
    "picture_in": ("condition_embedder.image_embedder.ff.net.0.proj",),
    "picture_out": ("condition_embedder.image_embedder.ff.net.2",),
    "up": ("ffn.net.0.proj",),
    "down": ("ffn.net.2",),
}
_TABLES = {
    "modulation": ("scale_shift_table",),
    "qk_scale": ("attn1.norm_q.weight", "attn1.norm_k.weight"),
    "cross.qk_scale": ("attn2.norm_q.weight", "attn2.norm_k.weight"),
    "cross.picture_k_scale": ("attn2.norm_added_k.weight",),
    "picture_place": ("condition_embedder.image_embedder.pos_embed",),
    "picture_norm": tuple(f"condition_embedder.image_embedder.norm1.{part}" for part in ("weight", "bias")),
    "picture_norm_out": tuple(
        f"condition_embedder.image_embedder.norm2.{part}" for part in ("weight", "bias")
    ),
    "cross.norm_scale": ("norm2.weight",),
    "cross.norm_bias": ("norm2.bias",),
}
_ROTATED = frozenset({"attn1.to_q", "attn1.to_k", "attn1.norm_q.weight", "attn1.norm_k.weight"})


def _layout(config: WanConfig) -> Layout:
    return Layout("blocks", _LINEARS, _TABLES, _ROTATED, config.heads, frozenset({"patch_embedding"}))


PUBLISHED_WAN = Published(Wan, diffusers_names, published_shapes, _layout)
