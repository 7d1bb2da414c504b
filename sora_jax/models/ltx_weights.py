"""LTX-Video's transformer from files: diffusers' names and the original's, and the way back (`models.published`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sora_jax.errors import UserError
from sora_jax.models.ltx import LTX, TIME_WIDTH, LTXConfig
from sora_jax.models.published import Layout, Published, renamed

# Keys of diffusers' config.json by ours, and those that must have one value.
_FIELDS = {
    "layers": "num_layers",
    "heads": "num_attention_heads",
    "head_width": "attention_head_dim",
    "channels": "in_channels",
    "channels_out": "out_channels",
    "text_width": "caption_channels",
    "epsilon": "norm_eps",
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "patch_size": (1,),
    "patch_size_t": (1,),
    "activation_fn": ("gelu-approximate",),
    "qk_norm": ("rms_norm_across_heads",),
    "norm_elementwise_affine": (False,),
    "attention_bias": (True,),
    "attention_out_bias": (True,),
}
_IGNORED = {"cross_attention_dim", "quantization_config"}

# The original code's names, as patterns, and diffusers' in their place.
_RENAMED = {
    r"^patchify_proj\.": "proj_in.",
    r"^adaln_single\.": "time_embed.",
    r"\.q_norm\.": ".norm_q.",
    r"\.k_norm\.": ".norm_k.",
}

# Our linear layers by diffusers' names; several are one beside the other.
_LINEARS = {
    "patch_in": ("proj_in",),
    "text_in": ("caption_projection.linear_1",),
    "text_out": ("caption_projection.linear_2",),
    "time_in": ("time_embed.emb.timestep_embedder.linear_1",),
    "time_out": ("time_embed.emb.timestep_embedder.linear_2",),
    "condition": ("time_embed.linear",),
    "patch_out": ("proj_out",),
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "out": ("attn1.to_out.0",),
    "cross.q": ("attn2.to_q",),
    "cross.kv": ("attn2.to_k", "attn2.to_v"),
    "cross.out": ("attn2.to_out.0",),
    "up": ("ff.net.0.proj",),
    "down": ("ff.net.2",),
}
_TABLES = {
    "modulation": ("scale_shift_table",),
    "qk_scale": ("attn1.norm_q.weight", "attn1.norm_k.weight"),
    "cross.qk_scale": ("attn2.norm_q.weight", "attn2.norm_k.weight"),
}
_ROTATED = frozenset({"attn1.to_q", "attn1.to_k", "attn1.norm_q.weight", "attn1.norm_k.weight"})


def ltx_config(settings: Mapping[str, Any], **fields: Any) -> LTXConfig:
    """The configuration of a diffusers `config.json`.

    Args:
      fields: others of ours, such as `dtype`.

    Raises:
      UserError: it is of another architecture, or a key isn't known.
    """
    own = {ours: settings[theirs] for ours, theirs in _FIELDS.items() if settings.get(theirs) is not None}
    own.setdefault("channels_out", own.get("channels", LTXConfig.channels))
    for name, value in settings.items():
        if name in _FIXED and value not in _FIXED[name]:
            raise UserError(
                f"The transformer's config.json says {name}={value!r}, which isn't supported: LTX-Video 0.9 has "
                f"{_FIXED[name][0]!r} there."
            )
        if not (name.startswith("_") or name in (*_FIELDS.values(), *_FIXED, *_IGNORED)):
            raise UserError(f"The transformer's config.json has a key that isn't known, {name!r}={value!r}.")
    config = LTXConfig(**own, **fields)
    if settings.get("cross_attention_dim", config.width) != config.width:
        raise UserError(
            f"The transformer's config.json says cross_attention_dim={settings['cross_attention_dim']!r}, and its "
            f"captions are projected to {config.width}: such models of LTX-Video aren't supported."
        )
    return config


def diffusers_names(names: Mapping[str, Any]) -> dict[str, Any]:
    """The same values by diffusers' names, where they are by the original code's.

    An original file holds the autoencoder too, as `vae.…`: these are left out.

    Raises:
      UserError: two of them are of the same parameter.
    """
    return renamed({name: value for name, value in names.items() if not name.startswith("vae.")}, _RENAMED)


def published_shapes(config: LTXConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """diffusers' name and shape of each parameter."""
    D, W = config.width, config.hidden
    linears: dict[str, tuple[int, ...]] = {
        "proj_in": (D, config.channels),
        "caption_projection.linear_1": (D, config.text_width),
        "caption_projection.linear_2": (D, D),
        "time_embed.emb.timestep_embedder.linear_1": (D, TIME_WIDTH),
        "time_embed.emb.timestep_embedder.linear_2": (D, D),
        "time_embed.linear": (6 * D, D),
        "proj_out": (config.channels_out, D),
    }
    yield "scale_shift_table", (2, D)
    for layer in range(config.layers):
        block = f"transformer_blocks.{layer}."
        yield f"{block}scale_shift_table", (6, D)
        for attention in ("attn1", "attn2"):
            linears |= {f"{block}{attention}.{part}": (D, D) for part in ("to_q", "to_k", "to_v", "to_out.0")}
            yield from ((f"{block}{attention}.norm_{part}.weight", (D,)) for part in "qk")
        linears |= {f"{block}ff.net.0.proj": (W, D), f"{block}ff.net.2": (D, W)}
    for name, shape in linears.items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


def _layout(config: LTXConfig) -> Layout:
    return Layout("transformer_blocks", _LINEARS, _TABLES, _ROTATED, config.heads)


PUBLISHED_LTX = Published(LTX, diffusers_names, published_shapes, _layout)
