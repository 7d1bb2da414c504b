"""Files of the original code, and of ComfyUI: which part of which model a file is, told by its tensors.

A file holds a transformer, an autoencoder or a text encoder, or (LTX-Video's) the first two; none holds a whole model.
What a part is called and shaped in diffusers is said here; `convert` writes a folder of them.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from sora_jax.checkpoints import ltx_vae_weights, wan_vae_weights
from sora_jax.errors import UserError
from sora_jax.models import ltx_weights, wan_weights
from sora_jax.models.ltx_vae_config import LTX_0_9_0, LTX_0_9_1, LTX_0_9_5
from sora_jax.models.pickled import read_tensors
from sora_jax.models.wan_vae_config import WAN_2_1, WAN_2_2

_PREFIX = "model.diffusion_model."  # ComfyUI's, and LTX-Video's files'
_WAN_HEAD = 128  # numbers of a head, in all published models
_LTX_HEADS = 32
# Tensors of models that have the same blocks and more.
_REFUSED = {
    "vace_blocks.0.after_proj.bias": "VACE",
    "motion_encoder.dec.direction.weight": "Wan-Animate",
    "blocks.0.to_gate_compress.weight": "FastWan with sparse attention",
}
_T5 = {
    r"^token_embedding\.": "shared.",
    r"^norm\.": "encoder.final_layer_norm.",
    r"^blocks\.": "encoder.block.",
    r"\.norm1\.": ".layer.0.layer_norm.",
    r"\.norm2\.": ".layer.1.layer_norm.",
    r"\.attn\.([qkvo])\.": r".layer.0.SelfAttention.\1.",
    r"\.pos_embedding\.embedding\.": ".layer.0.SelfAttention.relative_attention_bias.",
    r"\.ffn\.gate\.0\.": ".layer.1.DenseReluDense.wi_0.",
    r"\.ffn\.fc1\.": ".layer.1.DenseReluDense.wi_1.",
    r"\.ffn\.fc2\.": ".layer.1.DenseReluDense.wo.",
}
_PIECES = "spiece_model"  # ComfyUI's text encoders carry SentencePiece's file


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model, by diffusers' names.

    Attributes:
      model: "wan" or "ltx".
      name: the folder that diffusers has it in.
      settings: the contents of its config.json, as far as tensors tell.
      names: diffusers' name of each tensor, and the file's.
      tensors: the file's.
      path: the file.
      pieces: SentencePiece's file, where a text encoder brings it.
    """

    model: str
    name: str
    settings: dict[str, Any]
    names: dict[str, str]
    tensors: Mapping[str, np.ndarray]
    path: pathlib.Path
    pieces: bytes = b""

    @property
    def named(self) -> dict[str, np.ndarray]:
        """The tensors by diffusers' names, as they are in the file."""
        return {name: self.tensors[own] for name, own in self.names.items()}

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors one after another; those that were scaled into float8 as bfloat16 again."""
        for name, own in self.names.items():
            tensor = self.tensors[own]
            if (scale := self.tensors.get(own.removesuffix("weight") + "scale_weight")) is not None:
                tensor = (np.asarray(tensor, np.float32) * np.float32(scale)).astype(ml_dtypes.bfloat16)
            yield name, tensor


def read_parts(path: pathlib.Path) -> list[Part]:
    """What a file holds: safetensors, or what PyTorch saved; it is mapped, not read.

    Raises:
      UserError: it can't be read, or holds no part of a model that can be run.
    """
    return parts_in(path, read_tensors(path, mapped=True))


def parts_in(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> list[Part]:
    """As `read_parts`, of the file's tensors."""
    names = {name.removeprefix(_PREFIX): name for name in tensors}
    for name, model in _REFUSED.items():
        if name in names:
            raise UserError(f"{path} is of {model}, which can't be run here: name another model's file.")
    parts = [part for kind, mark in _MARKS.items() if mark & set(names) for part in [kind(path, tensors)]]
    if not parts:
        raise UserError(
            f"{path} holds no part of Wan or LTX-Video that is known here; its first tensors are "
            f"{', '.join(list(tensors)[:3])}."
        )
    return parts


def _wan(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> Part:
    names = wan_weights.diffusers_names(_own_names(tensors))
    shape = _shape_of(path, tensors, names)
    width, channels, *patch = shape("patch_embedding.weight")
    pictures = "condition_embedder.image_embedder.norm1.weight"
    places = "condition_embedder.image_embedder.pos_embed"
    settings = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": patch,
        "num_attention_heads": max(width // _WAN_HEAD, 1),
        "attention_head_dim": min(width, _WAN_HEAD),
        "in_channels": channels,
        "out_channels": shape("proj_out.weight")[0] // int(np.prod(patch)),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": _layers(names, "blocks"),
        "cross_attn_norm": "blocks.0.norm2.weight" in names,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": shape(pictures)[0] if pictures in names else None,
        "added_kv_proj_dim": width if pictures in names else None,
        "pos_embed_seq_len": shape(places)[1] if places in names else None,
    }
    return Part("wan", "transformer", settings, names, tensors, path)


def _ltx(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> Part:
    names = ltx_weights.diffusers_names(_own_names(tensors))
    shape = _shape_of(path, tensors, names)
    width, channels = shape("proj_in.weight")
    settings = {
        "_class_name": "LTXVideoTransformer3DModel",
        "in_channels": channels,
        "out_channels": shape("proj_out.weight")[0],
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": _LTX_HEADS,
        "attention_head_dim": width // _LTX_HEADS,
        "cross_attention_dim": shape("transformer_blocks.0.attn2.to_k.weight")[1],
        "num_layers": _layers(names, "transformer_blocks"),
        "caption_channels": shape("caption_projection.linear_1.weight")[1],
        "qk_norm": "rms_norm_across_heads",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_out_bias": True,
    }
    return Part("ltx", "transformer", settings, names, tensors, path)


def _wan_vae(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> Part:
    for config in (WAN_2_1, WAN_2_2):
        names = {wan_vae_weights.diffusers_name(name, config): name for name in tensors}
        shape = _shape_of(path, tensors, names)
        base, pixels = shape("encoder.conv_in.weight")[:2]
        if (shape("post_quant_conv.weight")[0], pixels) == (config.z_dim, config.in_channels):
            own = {"_class_name": "AutoencoderKLWan", **dataclasses.asdict(config), "base_dim": base}
            if config.decoder_base_dim:
                own["decoder_base_dim"] = shape("decoder.conv_out.weight")[1]
            for name in ("dtype", "remat"):
                del own[name]
            return Part("wan", "vae", own, names, tensors, path)
    raise UserError(
        f"{path} is an autoencoder of Wan's kind with {shape('post_quant_conv.weight')[0]} latent channels, whose mean "
        "and deviation aren't in the file: those of Wan 2.1 (16) and 2.2 (48) are known."
    )


def _ltx_vae(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> Part:
    for config in (LTX_0_9_0, LTX_0_9_1, LTX_0_9_5):
        names = ltx_vae_weights.diffusers_names(tensors, config)
        if set(names) == set(ltx_vae_weights.stored_shapes(config)):
            skipped = ("dtype", "remat", "decode_timestep", "decode_noise", "latents_mean", "latents_std")
            own = {key: value for key, value in dataclasses.asdict(config).items() if key not in skipped}
            return Part("ltx", "vae", {"_class_name": "AutoencoderKLLTXVideo", **own}, names, tensors, path)
    raise UserError(
        f"{path} holds an autoencoder that is none of LTX-Video 0.9.0, 0.9.1 and 0.9.5 to 0.9.8: name another file for "
        "it, or a folder with --base."
    )


def _t5(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> Part:
    patterns = _T5 if "token_embedding.weight" in tensors else {}
    names = {}
    for own in _own_names(tensors):
        name = own
        for pattern, replacement in patterns.items():
            name = re.sub(pattern, replacement, name)
        names[name] = own
    names.pop(_PIECES, None)
    shape = _shape_of(path, tensors, names)
    table = "shared.weight" if "shared.weight" in names else "encoder.embed_tokens.weight"
    attention = "encoder.block.{}.layer.0.SelfAttention.{}.weight"
    buckets, heads = shape(attention.format(0, "relative_attention_bias"))
    inner, width = shape(attention.format(0, "q"))
    own_positions = attention.format(1, "relative_attention_bias") in names
    settings = {
        "architectures": ["UMT5EncoderModel" if own_positions else "T5EncoderModel"],
        "model_type": "umt5" if own_positions else "t5",
        "vocab_size": shape(table)[0],
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": _layers(names, "encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_decoder": False,
        "is_encoder_decoder": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    pieces = np.asarray(tensors[_PIECES]).tobytes() if _PIECES in tensors else b""
    return Part("wan" if own_positions else "ltx", "text_encoder", settings, names, tensors, path, pieces)


# What tells a part, without ComfyUI's prefix: a tensor of the original's names, and of diffusers'.
_MARKS: dict[Callable[[pathlib.Path, Mapping[str, np.ndarray]], Part], set[str]] = {
    _wan: {"head.modulation", "condition_embedder.time_proj.weight"},
    _ltx: {"adaln_single.linear.weight", "time_embed.linear.weight"},
    _wan_vae: {"decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"},
    _ltx_vae: {"vae.per_channel_statistics.mean-of-means", "per_channel_statistics.mean-of-means"},
    _t5: {"token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight"},
}


def _own_names(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Each tensor's name by itself, without what stands beside tensors that were scaled into float8."""
    beside = (".scale_weight", ".scale_input")
    return {name: name for name in tensors if not name.endswith(beside) and not name.endswith("scaled_fp8")}


def _layers(names: Mapping[str, str], stack: str) -> int:
    """How many layers are numbered in names such as "blocks.0.…"."""
    numbers = (re.match(rf"{re.escape(stack)}\.(\d+)\.", name) for name in names)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def _shape_of(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], names: Mapping[str, str]
) -> Callable[[str], tuple[int, ...]]:
    """A function of diffusers' names that says a tensor's shape, or refuses the file."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in names:
            raise UserError(
                f"{path} has no tensor {name!r} (by diffusers' names): it isn't whole; fetch it again."
            )
        return tuple(tensors[names[name]].shape)

    return shape
