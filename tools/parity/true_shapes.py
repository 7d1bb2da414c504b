"""A diffusers folder of a real model's shapes with random weights, to measure memory and speed on: OUT/…

    python tools/parity/true_shapes.py OUT [--model 1.3B] [--dtype bfloat16] [--layers 4] [--no-text] [--vae-only]

Not for looking at: what it makes is noise. Of the 1.3B model in bfloat16: 14.5 GB, 11.4 of them the text encoder's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tokenizers
from flax import nnx

from sora_jax.checkpoints.store import named_leaves
from sora_jax.checkpoints.wan_vae_weights import stored_name, stored_shape
from sora_jax.models.t5 import T5Config
from sora_jax.models.wan_vae import WanVAE
from sora_jax.models.wan_vae_config import WAN_2_1, WAN_2_2, WanVAEConfig
from sora_jax.models.wan_weights import published_shapes, wan_config

# What differs of the transformers; UMT5-XXL is everyone's text encoder.
TRANSFORMERS = {
    "1.3B": {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960, "channels": 16},
    "14B": {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824, "channels": 16},
    "5B": {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "channels": 48},
}
UMT5_XXL = {
    "model_type": "umt5",
    "architectures": ["UMT5EncoderModel"],
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
TYPES = {"bfloat16": ("BF16", ml_dtypes.bfloat16), "float32": ("F32", np.float32)}
BLOCK = 1 << 22


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--model", choices=TRANSFORMERS, default="1.3B")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16")
    parser.add_argument("--layers", type=int, help="fewer than the model's")
    parser.add_argument("--vae-only", action="store_true", help="weights of the autoencoder alone")
    parser.add_argument("--no-text", action="store_true", help="leave out the text encoder's weights")
    arguments = parser.parse_args()
    out, dtype = arguments.out, arguments.dtype
    own = dict(TRANSFORMERS[arguments.model])
    channels = own.pop("channels")
    own["num_layers"] = arguments.layers or own["num_layers"]
    settings: dict[str, Any] = own | {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": 128,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "freq_dim": 256,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    }
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "flow_shift": 5.0 if channels == 48 else 3.0,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "solver_order": 2,
        "solver_type": "bh2",
    }
    parts = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}
    index = {name: ["diffusers", kind] for name, kind in parts.items()} | {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer_2": [None, None],
        "boundary_ratio": None,
        "expand_timesteps": channels == 48,
    }
    vae = WAN_2_2 if channels == 48 else WAN_2_1
    write_json(out / "model_index.json", index)
    write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    write_json(out / "transformer" / "config.json", settings)
    write_json(out / "vae" / "config.json", vae_settings(vae))
    stem = "diffusion_pytorch_model"
    write_json(out / "text_encoder" / "config.json", UMT5_XXL)
    write_tokenizer(out / "tokenizer")
    write_random(out / "vae", stem, vae_shapes(vae), "float32", shards=1)
    if arguments.vae_only:
        return
    write_random(out / "transformer", stem, dict(published_shapes(wan_config(settings))), dtype, shards=2)
    if not arguments.no_text:
        write_random(out / "text_encoder", "model", text_shapes(out / "text_encoder"), dtype, shards=5)


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes it, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def vae_settings(config: WanVAEConfig) -> dict[str, Any]:
    """As diffusers' `config.json` has them."""
    return {"_class_name": "AutoencoderKLWan"} | {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.init and field.name not in ("dtype", "remat")
    }


def vae_shapes(config: WanVAEConfig) -> dict[str, tuple[int, ...]]:
    """diffusers' names and shapes of an autoencoder's tensors."""
    template = jax.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    return {
        stored_name(name, config): stored_shape(name, leaf.shape)
        for name, leaf in named_leaves(template).items()
    }


def text_shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """transformers' names and shapes of the text encoder's tensors."""
    config = T5Config.from_file(folder / "config.json")
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (config.vocab_size, config.d_model)}
    for layer in range(config.num_layers):
        shapes |= dict(config.layer_shapes(layer).values())
    return shapes | {"encoder.final_layer_norm.weight": (config.d_model,)}


def write_random(
    folder: pathlib.Path, stem: str, shapes: Mapping[str, tuple[int, ...]], dtype: str, shards: int
) -> None:
    """Weights in so many shards with an index, or in one file, block by block: no tensor is in memory whole."""
    name_of_type, kind = TYPES[dtype]
    sizes = {name: math.prod(shape) * np.dtype(kind).itemsize for name, shape in shapes.items()}
    parts: list[list[str]] = [[]]
    used, total = 0, sum(sizes.values())
    for name in shapes:
        if used > total / shards * len(parts):
            parts.append([])
        parts[-1].append(name)
        used += sizes[name]
    block = np.random.default_rng(0).standard_normal(BLOCK, np.float32)
    where = {}
    for number, names in enumerate(parts, 1):
        file = (
            f"{stem}.safetensors" if len(parts) == 1 else f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
        )
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            header[name] = {
                "dtype": name_of_type,
                "shape": shapes[name],
                "data_offsets": [at, at + sizes[name]],
            }
            at += sizes[name]
            where[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                values = block * _deviation(name, shapes[name])
                if re.search(r"norm.*weight$|gamma$", name):
                    values = np.ones_like(block)
                data, left = values.astype(kind).tobytes(), sizes[name]
                while left:
                    left -= stream.write(data[: min(left, len(data))])
    if len(parts) > 1:
        write_json(
            folder / f"{stem}.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": where},
        )


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    """Such that activations stay of order one; text attention isn't scaled, so its queries are small."""
    if len(shape) == 1 or "table" in name:
        return 0.02
    return (0.1 if name.endswith("SelfAttention.q.weight") else 1.0) / math.sqrt(math.prod(shape[1:]))


def write_tokenizer(folder: pathlib.Path) -> None:
    """A word for each token: w3, w4, …"""
    words = {f"w{i}": i for i in range(3, UMT5_XXL["vocab_size"])}
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2} | words, unk_token="<unk>")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | special)


if __name__ == "__main__":
    main()
