"""Open models as diffusers writes them: a folder with `model_index.json`, and a folder for each component.

Wan2.1 and 2.2 (text to video, and TI2V-5B) can be read. A folder carries its autoencoder, text encoder and schedule;
what the files don't say is in `wan_pipeline`. Weights are memory-mapped and go to their devices one after another.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from sora_jax.checkpoints.bundle import find, load_bundle, with_dtype
from sora_jax.checkpoints.bundle import read_sampling as read_own_sampling
from sora_jax.checkpoints.components import DTYPES, Bundle, Limits, Sampling, Transformer, check_choice
from sora_jax.checkpoints.diffusers_folder import (
    INDEX,
    REFERENCES,
    WEIGHTS,
    Reference,
    free_memory,
    is_pretrained,
    parts_of,
    read_json,
)
from sora_jax.checkpoints.hub import resolve
from sora_jax.checkpoints.lora import merge_loras
from sora_jax.checkpoints.wan_pipeline import family_of, sampling_of
from sora_jax.checkpoints.wan_vae_weights import load_wan_vae
from sora_jax.distributed.chips import GIB
from sora_jax.errors import UserError
from sora_jax.models.int8 import INT8, weight_bytes
from sora_jax.models.pixels import PIXELS
from sora_jax.models.text import TextConfig
from sora_jax.models.wan import Wan, WanConfig, WanPair
from sora_jax.models.wan_vae import WanVAE
from sora_jax.models.wan_vae_config import WanVAEConfig
from sora_jax.models.wan_weights import diffusers_names, load_wan, offload_wan, published_shapes, wan_config
from sora_jax.models.weights import map_weights

TEXT_TOKENS = 512  # to which captions are padded
STORED = (*DTYPES, "int8")  # types of a transformer's parameters in memory


def load_model(
    name: str | os.PathLike[str] = "toyworld",
    dtype: str = "",
    reference: Reference = "diffusers",
    loras: Sequence[tuple[str, float]] = (),
    weights: str = "",
    offload: bool = False,
) -> Bundle:
    """Loads any model: this package's own (`bundle.load_bundle`), or a diffusers pipeline's folder.

    Args:
      dtype: of the arithmetic; "" is the model's own, of a diffusers folder float32.
      reference, loras, weights, offload: see `load_pretrained`.

    Raises:
      UserError: there is no such model, or its files are damaged, of another architecture, or not supported.
    """
    check_choice("reference", reference, REFERENCES)
    if name not in PIXELS and is_pretrained(folder := find(name)):
        return load_pretrained(folder, reference, dtype or "float32", loras, weights, offload)
    if weights or offload:
        asked = f"weights={weights}" if weights else "offload"
        raise UserError(f"{asked} is for diffusers pipelines, and {name} is none: leave it out.")
    if loras:
        raise UserError(f"{loras[0][0]} can't be merged into {name}: LoRA files are for diffusers pipelines.")
    bundle = load_bundle(name)
    return with_dtype(bundle, dtype) if dtype else bundle


def read_sampling(name: str | os.PathLike[str], reference: Reference = "diffusers") -> Sampling:
    """How a stored model is sampled, without loading it; the default where it can't be read."""
    try:
        if is_pretrained(folder := find(name)):
            return read_pretrained_sampling(folder, reference)
    except UserError:
        return Sampling()  # loading the model says what is wrong
    return read_own_sampling(name)


def pretrained_folder(name: str | os.PathLike[str]) -> pathlib.Path:
    """The diffusers folder of a name, which may be "hf:OWNER/NAME".

    Raises:
      UserError: there is none.
    """
    folder = find(resolve(name))
    if not is_pretrained(folder):
        raise UserError(f"{name} is no diffusers pipeline: its folder has a {INDEX}.")
    return folder


def load_pretrained(
    folder: pathlib.Path,
    reference: Reference = "diffusers",
    dtype: str = "float32",
    loras: Sequence[tuple[str, float]] = (),
    weights: str = "",
    offload: bool = False,
) -> Bundle:
    """Loads a diffusers folder.

    Args:
      reference: whose arithmetic, schedule and defaults are followed where Wan's original code and diffusers differ.
      dtype: of the arithmetic of transformer and autoencoder.
      loras: (file, scale) each, merged into the transformer while it is read.
      weights: type of the transformer's parameters in memory, of `STORED`; "" is `dtype`. Of "int8" see `models.int8`.
      offload: blocks of the transformer come to the device one by one (`models.offload`).

    Raises:
      UserError: a part is missing, damaged, of another architecture, or one that isn't supported.
    """
    bundle = read_shapes(folder, reference, dtype)
    assert bundle.dit is not None
    config = bundle.dit.config
    if is_pair := isinstance(bundle.dit, WanPair):
        check_memory(folder, config, _stored(config, weights), 2, offload)
    load = lambda part: load_transformer(folder, config, loras, weights, part=part, offload=offload)
    dit = load("transformer")
    if is_pair:
        dit = WanPair(dit, load("transformer_2"), bundle.dit.boundary)
    return dataclasses.replace(bundle, vae=load_vae(folder, dtype), dit=dit)


def read_shapes(folder: pathlib.Path, reference: Reference = "diffusers", dtype: str = "float32") -> Bundle:
    """A diffusers folder's model, its networks shapes alone, as `jax.eval_shape` gives them: no weights are read.

    Raises:
      UserError: as `load_pretrained`, of what its settings say.
    """
    check_choice("reference", reference, REFERENCES)
    check_choice("dtype", dtype, DTYPES)
    index = read_json(folder / INDEX)
    _check_parts(folder, index)
    settings = {
        part: read_json(folder / part / "config.json") for part in ("transformer", "vae", "text_encoder")
    }
    vae_config = WanVAEConfig.read(settings["vae"], dtype)
    config = wan_config(settings["transformer"], dtype=dtype, reference=reference)
    name, family = family_of(config.channels, config.heads, index)
    sampling, whole = sampling_of(folder, family, index, reference)
    config = dataclasses.replace(config, whole_timesteps=whole)
    _check_together(folder, config, vae_config, settings["text_encoder"])
    is_pair = "transformer_2" in parts_of(index)
    limits = Limits(
        tokens=family.tokens,
        latent_frames=family.latent_frames,
        resolution=family.resolution,
        fps=family.fps,
        text=TEXT_TOKENS,
        text_len=TEXT_TOKENS,
        seq_multiple=256,
    )
    summary = f"{name}: {config.layers} layers of {config.width}, {config.channels} latent channels"

    def networks() -> tuple[WanVAE, Wan | WanPair]:
        one = lambda: Wan(config, rngs=nnx.Rngs(0))
        boundary = float(index.get("boundary_ratio") or 0)
        return WanVAE(vae_config, rngs=nnx.Rngs(0)), WanPair(one(), one(), boundary) if is_pair else one()

    vae, dit = jax.eval_shape(networks)
    return Bundle(
        folder.name,
        vae,
        dit,
        TextConfig(kind="t5", name=str(folder), max_tokens=TEXT_TOKENS, clean="wan"),
        limits,
        sampling=sampling,
        card={"summary": summary, "licence": family.licence, "reference": reference},
    )


def load_vae(folder: pathlib.Path, dtype: str = "float32") -> WanVAE:
    """The autoencoder of a diffusers folder.

    Raises:
      UserError: its files are missing, damaged, or of another architecture.
    """
    vae = load_wan_vae(read_json(folder / "vae" / "config.json"), map_weights(folder / "vae" / WEIGHTS))
    vae.config = dataclasses.replace(vae.config, dtype=cast(Any, dtype))
    return vae


def load_transformer(
    folder: pathlib.Path,
    config: WanConfig,
    loras: Sequence[tuple[str, float]] = (),
    weights: str = "",
    place: Callable[[str, np.ndarray], Any] = lambda name, array: jnp.asarray(array),
    part: str = "transformer",
    offload: bool = False,
) -> Transformer:
    """The transformer of a diffusers folder.

    Args:
      loras, weights, offload: see `load_pretrained`.
      place: puts a parameter, by our name, where it is used.
      part: the folder of its files.

    Raises:
      UserError: as `load_pretrained`; or it is more than this machine's memory holds.
    """
    stored = _stored(config, weights)
    check_memory(folder, config, stored, 1, offload)
    tensors: Mapping[str, np.ndarray] = map_weights(folder / part / WEIGHTS)
    if loras:
        tensors = merge_loras(diffusers_names(tensors), loras, diffusers_names)
    if offload:
        return offload_wan(config, tensors, str(folder / part), stored)
    return load_wan(config, tensors, str(folder / part), place, stored)


def _stored(config: WanConfig, weights: str) -> np.dtype:
    """The type of the transformer's parameters.

    Raises:
      UserError: there is no such type.
    """
    kind = weights or config.dtype
    check_choice("type of weights", kind, STORED)
    return np.dtype(getattr(ml_dtypes, kind, kind))


def read_pretrained_sampling(folder: pathlib.Path, reference: Reference = "diffusers") -> Sampling:
    """How such a model is sampled, without loading it.

    Raises:
      UserError: a file of settings can't be read.
    """
    index, config = read_json(folder / INDEX), wan_config(read_json(folder / "transformer" / "config.json"))
    _, family = family_of(config.channels, config.heads, index)
    return sampling_of(folder, family, index, reference)[0]


def pretrained_summary(folder: pathlib.Path) -> str:
    """One line on a model, from its settings alone.

    Raises:
      UserError: they can't be read, or are of another architecture.
    """
    config = wan_config(read_json(folder / "transformer" / "config.json"))
    name, family = family_of(config.channels, config.heads, read_json(folder / INDEX))
    return f"{name}, {family.licence}; {config.layers} layers of {config.width}"


def check_memory(
    folder: pathlib.Path, config: WanConfig, stored: np.dtype, copies: int = 1, offload: bool = False
) -> None:
    """Raises UserError where the transformer's weights are more than this machine's free memory.

    Of accelerators only the host's is looked at, through which weights pass one by one: nothing is refused there.

    Args:
      stored: type of its parameters.
      copies: how many transformers of this shape there are.
      offload: whether two of its blocks at most are in memory.
    """
    need = copies * weight_bytes(published_shapes(config), stored)
    if offload:
        outer, two = (
            weight_bytes(published_shapes(dataclasses.replace(config, layers=n)), stored) for n in (0, 2)
        )
        need = two + (copies - 1) * outer
    if jax.default_backend() == "cpu" and need > (free := free_memory()):
        ways = ["--weights bfloat16, which halves it"] if stored.itemsize == 4 else []
        ways += [f"--weights int8, which {'quarters' if ways else 'halves'} it"] if stored != INT8 else []
        ways += [] if offload else ["--offload, which reads a layer when it is needed"]
        raise UserError(
            f"The transformer of {folder} takes {need / GIB:.1f} GiB and {free / GIB:.1f} GiB are free here: use "
            f"{', '.join([*ways, 'or a machine with more' if ways else 'a machine with more'])}."
        )


def _check_parts(folder: pathlib.Path, index: Mapping[str, Any]) -> None:
    kind = index.get("_class_name")
    if kind != "WanPipeline":
        raise UserError(
            f"{folder / INDEX} is of a {kind}: of diffusers' pipelines only WanPipeline can be loaded (Wan2.1 and 2.2 "
            "text to video, and TI2V-5B)."
        )
    if missing := [part for part in parts_of(index) if not (folder / part).is_dir()]:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: the model's folder is incomplete; fetch it again."
        )


def _check_together(
    folder: pathlib.Path, config: WanConfig, vae: WanVAEConfig, text: Mapping[str, Any]
) -> None:
    """Raises UserError where parts are of different models."""
    if vae.channels != config.channels:
        raise UserError(
            f"{folder}: the autoencoder's latents have {vae.channels} channels and the transformer takes "
            f"{config.channels}: they are of different models."
        )
    if text.get("d_model") != config.text_width:
        raise UserError(
            f"{folder}: the text encoder's states are {text.get('d_model')} wide and the transformer takes "
            f"{config.text_width}: they are of different models."
        )
