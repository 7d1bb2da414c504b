"""Open models as diffusers writes them: a folder with `model_index.json`, and a folder for each component.

Wan2.1 and 2.2 (text to video, and TI2V-5B) and LTX-Video 0.9 can be read, see `KINDS`. A folder carries its
autoencoder, text encoder and schedule; what the files don't say is in `wan_pipeline` and `ltx_pipeline`. Weights are
memory-mapped and go to their devices one after another.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from sora_jax.checkpoints import ltx_pipeline, ltx_vae_weights, wan_pipeline, wan_vae_weights
from sora_jax.checkpoints.bundle import find, load_bundle, with_dtype
from sora_jax.checkpoints.bundle import read_sampling as read_own_sampling
from sora_jax.checkpoints.components import (
    DTYPES,
    Autoencoder,
    Bundle,
    Limits,
    Sampling,
    Transformer,
    check_choice,
)
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
from sora_jax.checkpoints.pipeline_kind import PipelineKind
from sora_jax.distributed.chips import GIB
from sora_jax.errors import UserError
from sora_jax.models import ltx_weights, wan_weights
from sora_jax.models.int8 import INT8, weight_bytes
from sora_jax.models.ltx_vae import LTXVAE
from sora_jax.models.ltx_vae_config import LTXVAEConfig
from sora_jax.models.pixels import PIXELS
from sora_jax.models.vision import load_clip_vision, read_tower
from sora_jax.models.wan import WanPair
from sora_jax.models.wan_vae import WanVAE
from sora_jax.models.wan_vae_config import WanVAEConfig
from sora_jax.models.weights import map_weights

STORED = (*DTYPES, "int8")  # types of a transformer's parameters in memory
# By the `_class_name` of a model_index.json.
KINDS = {
    "WanPipeline": PipelineKind(
        models="Wan2.1 and 2.2 text to video, and TI2V-5B",
        transformer=wan_weights.PUBLISHED_WAN,
        read_config=wan_weights.wan_config,
        autoencoder=WanVAE,
        read_vae_config=WanVAEConfig.read,
        load_vae=wan_vae_weights.load_wan_vae,
        vae_shapes=wan_vae_weights.stored_shapes,
        publish_vae=wan_vae_weights.published_tensors,
        family=wan_pipeline.family_of,
        sampling=wan_pipeline.sampling_of,
        text=wan_pipeline.text_of,
        adapt=wan_pipeline.adapt,
    ),
    "LTXPipeline": PipelineKind(
        models="LTX-Video 0.9",
        transformer=ltx_weights.PUBLISHED_LTX,
        read_config=ltx_weights.ltx_config,
        autoencoder=LTXVAE,
        read_vae_config=LTXVAEConfig.read,
        load_vae=ltx_vae_weights.load_ltx_vae,
        vae_shapes=ltx_vae_weights.stored_shapes,
        publish_vae=ltx_vae_weights.published_tensors,
        family=ltx_pipeline.family_of,
        sampling=ltx_pipeline.sampling_of,
        text=ltx_pipeline.text_of,
        adapt=ltx_pipeline.adapt,
        adapt_vae=ltx_pipeline.adapt_vae,
    ),
}
KINDS[ltx_pipeline.CONDITION] = dataclasses.replace(
    KINDS["LTXPipeline"],
    models="LTX-Video 0.9.5 and later",
    text=ltx_pipeline.condition_text_of,
    adapt=ltx_pipeline.adapt_condition,
)
# FastWan, which has Wan's files; those with weights of sparse attention (to_gate_compress) are refused.
KINDS[wan_pipeline.FEW_STEPS] = dataclasses.replace(
    KINDS["WanPipeline"], models="FastWan with full attention"
)
# TI2V-5B comes as this too; it has no channels for a picture.
KINDS[wan_pipeline.IMAGE_TO_VIDEO] = dataclasses.replace(
    KINDS["WanPipeline"], models="Wan2.1 and 2.2 image to video"
)


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


def pretrained_folder(name: str | os.PathLike[str], weights: bool = True) -> pathlib.Path:
    """The diffusers folder of a name, which may be "hf:OWNER/NAME".

    `weights`: whether they are fetched too, where the folder is on the hub.

    Raises:
      UserError: there is none.
    """
    folder = find(resolve(name, weights))
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
      reference: whose arithmetic, schedule and defaults are followed where the original code and diffusers differ.
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
    encoder = load_clip_vision(*picture_folders(folder)) if config.picture_width else None
    return dataclasses.replace(bundle, vae=load_vae(folder, dtype, reference), dit=dit, image_encoder=encoder)


def read_shapes(folder: pathlib.Path, reference: Reference = "diffusers", dtype: str = "float32") -> Bundle:
    """A diffusers folder's model, its networks shapes alone, as `jax.eval_shape` gives them: no weights are read.

    Raises:
      UserError: as `load_pretrained`, of what its settings say.
    """
    check_choice("reference", reference, REFERENCES)
    check_choice("dtype", dtype, DTYPES)
    kind, index = kind_of(folder), read_json(folder / INDEX)
    _check_parts(folder, index)
    settings = {
        part: read_json(folder / part / "config.json") for part in ("transformer", "vae", "text_encoder")
    }
    vae_config = kind.read_vae_config(settings["vae"], dtype)
    config = kind.read_config(settings["transformer"], dtype=dtype)
    name, family = kind.family(config, index)
    sampling = kind.sampling(folder, family, index, reference)
    vae_config = kind.adapt_vae(vae_config, reference)
    config = kind.adapt(config, vae_config, sampling, reference)
    _check_together(folder, config, vae_config, settings["text_encoder"])
    is_pair = "transformer_2" in parts_of(index)
    text = dataclasses.replace(kind.text(reference), name=str(folder))
    limits = Limits(
        tokens=family.tokens,
        latent_frames=family.latent_frames,
        resolution=family.resolution,
        fps=family.fps,
        text=text.max_tokens,
        text_len=text.max_tokens,
        seq_multiple=256,
        pictures=_picture_states(folder, config, index),
    )
    summary = f"{name}: {config.layers} layers of {config.width}, {config.channels} latent channels"

    def networks() -> tuple[Autoencoder, Transformer]:
        one = lambda: kind.transformer.model(config, rngs=nnx.Rngs(0))
        boundary = float(index.get("boundary_ratio") or 0)
        dit = WanPair(one(), one(), boundary) if is_pair else one()
        return kind.autoencoder(vae_config, rngs=nnx.Rngs(0)), dit

    vae, dit = jax.eval_shape(networks)
    return Bundle(
        folder.name,
        vae,
        dit,
        text,
        limits,
        sampling=sampling,
        card={"summary": summary, "licence": family.licence, "reference": reference},
    )


def load_vae(folder: pathlib.Path, dtype: str = "float32", reference: Reference = "diffusers") -> Autoencoder:
    """The autoencoder of a diffusers folder.

    Raises:
      UserError: its files are missing, damaged, or of another architecture.
    """
    kind = kind_of(folder)
    vae = kind.load_vae(read_json(folder / "vae" / "config.json"), map_weights(folder / "vae" / WEIGHTS))
    vae.config = kind.adapt_vae(dataclasses.replace(vae.config, dtype=dtype), reference)
    return vae


def load_transformer(
    folder: pathlib.Path,
    config: Any,
    loras: Sequence[tuple[str, float]] = (),
    weights: str = "",
    place: Callable[[str, np.ndarray], Any] = lambda name, array: jnp.asarray(array),
    part: str = "transformer",
    offload: bool = False,
) -> Any:
    """The transformer of a diffusers folder.

    Args:
      loras, weights, offload: see `load_pretrained`.
      place: puts a parameter, by our name, where it is used.
      part: the folder of its files.

    Raises:
      UserError: as `load_pretrained`; or it is more than this machine's memory holds.
    """
    kind, stored = kind_of(folder), _stored(config, weights)
    check_memory(folder, config, stored, 1, offload)
    tensors: Mapping[str, np.ndarray] = map_weights(folder / part / WEIGHTS)
    if loras:
        tensors = merge_loras(kind.transformer.names(tensors), loras, kind.transformer.names)
    if offload:
        return kind.transformer.offload(config, tensors, str(folder / part), stored)
    return kind.transformer.load(config, tensors, str(folder / part), place, stored)


def _stored(config: Any, weights: str) -> np.dtype:
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
    kind, index = kind_of(folder), read_json(folder / INDEX)
    _, family = kind.family(kind.read_config(read_json(folder / "transformer" / "config.json")), index)
    return kind.sampling(folder, family, index, reference)


def pretrained_summary(folder: pathlib.Path) -> str:
    """One line on a model, from its settings alone.

    Raises:
      UserError: they can't be read, or are of another architecture.
    """
    kind = kind_of(folder)
    config = kind.read_config(read_json(folder / "transformer" / "config.json"))
    name, family = kind.family(config, read_json(folder / INDEX))
    return f"{name}, {family.licence}; {config.layers} layers of {config.width}"


def check_memory(
    folder: pathlib.Path, config: Any, stored: np.dtype, copies: int = 1, offload: bool = False
) -> None:
    """Raises UserError where the transformer's weights are more than this machine's free memory.

    Of accelerators only the host's is looked at, through which weights pass one by one: nothing is refused there.

    Args:
      stored: type of its parameters.
      copies: how many transformers of this shape there are.
      offload: whether two of its blocks at most are in memory.
    """
    shapes = kind_of(folder).transformer.shapes
    need = copies * weight_bytes(shapes(config), stored)
    if offload:
        outer, two = (weight_bytes(shapes(dataclasses.replace(config, layers=n)), stored) for n in (0, 2))
        need = two + (copies - 1) * outer
    if jax.default_backend() == "cpu" and need > (free := free_memory()):
        ways = ["--weights bfloat16, which halves it"] if stored.itemsize == 4 else []
        ways += [f"--weights int8, which {'quarters' if ways else 'halves'} it"] if stored != INT8 else []
        ways += [] if offload else ["--offload, which reads a layer when it is needed"]
        raise UserError(
            f"The transformer of {folder} takes {need / GIB:.1f} GiB and {free / GIB:.1f} GiB are free here: use "
            f"{', '.join([*ways, 'or a machine with more' if ways else 'a machine with more'])}."
        )


def kind_of(folder: pathlib.Path) -> PipelineKind:
    """Which kind of pipeline a folder holds.

    Raises:
      UserError: one that can't be loaded.
    """
    name = read_json(folder / INDEX).get("_class_name")
    if name not in KINDS:
        known = " and ".join(f"{name} ({kind.models})" for name, kind in KINDS.items())
        raise UserError(f"{folder / INDEX} is of a {name}: of diffusers' pipelines {known} can be loaded.")
    return KINDS[name]


def _check_parts(folder: pathlib.Path, index: Mapping[str, Any]) -> None:
    if missing := [part for part in parts_of(index) if not (folder / part).is_dir()]:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: the model's folder is incomplete; fetch it again."
        )


def _check_together(folder: pathlib.Path, config: Any, vae: Any, text: Mapping[str, Any]) -> None:
    """Raises UserError where parts are of different models."""
    if vae.channels != config.channels:
        raise UserError(
            f"{folder}: the autoencoder's latents have {vae.channels} channels and the transformer takes "
            f"{config.channels}: they are of different models."
        )
    wanted = vae.compression[0] + vae.channels
    if config.extra_channels not in (0, wanted):
        raise UserError(
            f"{folder}: the transformer takes {config.extra_channels} channels beside the latent's, and a picture is "
            f"given to models of Wan as {wanted} (a mask, and its latent): other models aren't supported."
        )
    if text.get("d_model") != config.text_width:
        raise UserError(
            f"{folder}: the text encoder's states are {text.get('d_model')} wide and the transformer takes "
            f"{config.text_width}: they are of different models."
        )


def picture_folders(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Of an image encoder, and of what prepares its pictures."""
    return folder / "image_encoder", folder / "image_processor"


def _picture_states(folder: pathlib.Path, config: Any, index: Mapping[str, Any]) -> int:
    """How many states of its image encoder a transformer is given with a segment; 0: it takes none.

    Raises:
      UserError: the image encoder is missing or of another model.
    """
    if not config.picture_width:
        return 0
    encoder, _ = picture_folders(folder)
    if missing := {"image_encoder", "image_processor"} - set(parts_of(index)):
        raise UserError(
            f"{folder}: the transformer takes an image encoder's states, and {INDEX} has no "
            f"{' and no '.join(sorted(missing))}: fetch the model again."
        )
    sizes = read_tower(encoder)
    if sizes.hidden_size != config.picture_width or config.picture_positions not in (0, 2 * sizes.states):
        raise UserError(
            f"{folder}: the image encoder gives {sizes.states} states of {sizes.hidden_size} numbers a picture and the "
            f"transformer takes others: they are of different models."
        )
    return config.picture_positions or sizes.states
