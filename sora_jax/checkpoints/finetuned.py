"""Runs on top of a diffusers folder (`train.finetune`): loading them, and writing them as diffusers reads them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.checkpoints import pretrained
from sora_jax.checkpoints.base_model import check_base
from sora_jax.checkpoints.bundle import find
from sora_jax.checkpoints.components import Bundle, Sampling, check_choice
from sora_jax.checkpoints.diffusers_folder import INDEX, WEIGHTS, Reference
from sora_jax.checkpoints.pretrained import (
    STORED,
    kind_of,
    load_pretrained,
    load_vae,
    pretrained_folder,
    read_shapes,
)
from sora_jax.checkpoints.store import load_params, read_config
from sora_jax.config import component
from sora_jax.errors import UserError
from sora_jax.models.int8 import to_int8
from sora_jax.models.low_rank import LoRA, LoRAConfig, merge_lora, with_lora
from sora_jax.models.pixels import PIXELS
from sora_jax.models.weights import write_parts, write_weights

OBJECTIVE, VAE_OBJECTIVE = "finetune", "finetune_vae"  # of a transformer, and of an autoencoder
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def load_model(
    name: str | os.PathLike[str] = "toyworld",
    dtype: str = "",
    reference: Reference = "diffusers",
    loras: Sequence[tuple[str, float]] = (),
    weights: str = "",
    offload: bool = False,
) -> Bundle:
    """As `pretrained.load_model`, and the workdir of a run on top of a diffusers folder: what it learned is merged in.

    Into int8 weights a LoRA isn't merged, so that nothing of it is rounded: it stays beside them.

    Raises:
      UserError: as there; or the run's base isn't where it was.
    """
    if name in PIXELS or not is_finetuned(workdir := find(name)):
        return pretrained.load_model(name, dtype, reference, loras, weights, offload)
    if objective_of(workdir) == VAE_OBJECTIVE:
        base = load_pretrained(base_folder(workdir), reference, dtype or "float32", loras, weights, offload)
        vae = load_params(workdir, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base.vae))
        return dataclasses.replace(base, name=workdir.name, vae=vae, card=base.card | {"run": str(workdir)})
    if offload:
        raise UserError(f"{workdir} is a training run: export it first, and name that folder with offload.")
    folder, config = base_folder(workdir), lora_config(workdir)
    if config.rank:
        base = load_pretrained(folder, reference, dtype or "float32", loras, weights)
        join = with_lora if weights == "int8" else merge_lora
        dit = join(base.dit, load_lora(workdir), config)
    elif loras:
        raise UserError(
            f"{loras[0][0]} can't be merged into {workdir}: export it first, and name that folder."
        )
    else:
        base = read_shapes(folder, reference, dtype or "float32")
        base = dataclasses.replace(base, vae=load_vae(folder, dtype or "float32"))
        assert base.dit is not None
        check_choice("weights", weights or base.dit.config.dtype, STORED)
        is_int8 = weights == "int8"  # which is made of all that was learned
        shapes = base.dit
        kind = jnp.dtype("float32" if is_int8 else weights or base.dit.config.dtype)
        dit = load_params(workdir, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind), shapes))
        dit = to_int8(dit) if is_int8 else dit
    return dataclasses.replace(base, name=workdir.name, dit=dit, card=base.card | {"run": str(workdir)})


def read_sampling(name: str | os.PathLike[str], reference: Reference = "diffusers") -> Sampling:
    """As `pretrained.read_sampling`; of a run on top of a folder that folder's."""
    try:
        if name not in PIXELS and is_finetuned(workdir := find(name)):
            return pretrained.read_sampling(base_folder(workdir), reference)
    except UserError:
        return Sampling()  # loading the model says what is wrong
    return pretrained.read_sampling(name, reference)


def is_finetuned(folder: pathlib.Path) -> bool:
    """Whether a folder is the workdir of a run on top of a diffusers folder."""
    return objective_of(folder) in (OBJECTIVE, VAE_OBJECTIVE)


def objective_of(folder: pathlib.Path) -> str:
    """What a folder's config.json says is trained; "" where it says nothing of it."""
    try:
        return str(json.loads((folder / "config.json").read_text()).get("objective", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def base_folder(workdir: pathlib.Path) -> pathlib.Path:
    """The diffusers folder that a run began with.

    Raises:
      UserError: it isn't there, or holds another model by now.
    """
    name = read_config(workdir)["pretrained"]
    try:
        folder = pretrained_folder(name)
    except UserError as error:
        raise UserError(
            f"{workdir} was trained on top of {name!r}, which isn't there: put it back, or set "
            f'"pretrained" in {workdir / "config.json"} to where it is. ({error})'
        ) from error
    check_base(workdir, folder, "vae" if objective_of(workdir) == VAE_OBJECTIVE else "transformer")
    return folder


def lora_config(workdir: pathlib.Path) -> LoRAConfig:
    """Of a run."""
    return component(LoRAConfig, read_config(workdir)["lora"], "lora")


def load_lora(workdir: pathlib.Path) -> LoRA:
    """The updates that a run learned, averaged where it has averages.

    Raises:
      UserError: there is no checkpoint, or it can't be read.
    """
    lora: LoRA = {}
    for name, array in load_params(workdir).items():
        layer, part = name.rsplit("/", 1)
        lora.setdefault(layer, {})[part] = array
    return lora


def export_run(
    workdir: pathlib.Path,
    to: pathlib.Path,
    dtype: str = "float32",
    average: bool = True,
    step: int | None = None,
) -> pathlib.Path:
    """Writes what a run learned as diffusers reads it, and returns the file, or the folder, that it names.

    A LoRA becomes a file in PEFT's layout; a model that was trained as a whole a folder, with the other parts of its
    base.

    Args:
      to: the folder to write; absent, or empty.
      dtype: of the weights, a name of `weights.SAVED`.
      average: the averaged weights where there are such.
      step: which checkpoint; default: the newest.

    Raises:
      UserError: the run is of another kind or has no checkpoint, the base isn't there, or `to` isn't empty.
    """
    if not is_finetuned(workdir):
        objective = read_config(workdir).get("objective", "none: it is a model")
        raise UserError(
            f"{workdir} is of objective {objective}: runs on top of a diffusers folder (--config finetune_wan or "
            "finetune_ltx) can be exported."
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} is there already: name a folder that isn't, or an empty one.")
    folder, is_vae = base_folder(workdir), objective_of(workdir) == VAE_OBJECTIVE
    kind, base = kind_of(folder), read_shapes(folder).dit
    assert base is not None
    learned = load_params(workdir, ema=average, step=step)
    if is_vae:
        return _export_part("vae", kind.publish_vae(load_vae(folder).config, learned), folder, to, dtype)
    if (config := lora_config(workdir)).rank:
        path = to / LORA_WEIGHTS
        write_lora(kind.transformer.publish_lora(base.config, learned), config, path, dtype)
        return path
    return _export_part("transformer", kind.transformer.publish(base.config, learned), folder, to, dtype)


def _export_part(
    name: str, tensors: Mapping[str, np.ndarray], folder: pathlib.Path, to: pathlib.Path, dtype: str
) -> pathlib.Path:
    """Writes a part's tensors beside copies of the base's other parts."""
    for part in sorted(folder.iterdir()):
        if part.is_dir() and part.name != name:
            shutil.copytree(part, to / part.name)
    (to / name).mkdir(parents=True)
    write_parts(tensors.items(), to / name / WEIGHTS, dtype)
    shutil.copy(folder / name / "config.json", to / name)
    shutil.copy(folder / INDEX, to)  # last: it makes the folder a model
    return to


def write_lora(
    modules: Mapping[str, tuple[np.ndarray, np.ndarray]], config: LoRAConfig, path: pathlib.Path, dtype: str
) -> None:
    """Writes a LoRA file as diffusers' `save_lora_weights` does, with PEFT's settings in its metadata.

    Args:
      modules: by diffusers' names, PEFT's A and B.
    """
    tensors: dict[str, np.ndarray] = {}
    for module, (a, b) in modules.items():
        tensors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
    # Of all layers alike: PEFT's targets are the ends of modules' names.
    targets = {re.sub(r"^\w*blocks\.\d+\.", "", name) for name in modules}
    alpha = int(config.alpha) if config.alpha == math.floor(config.alpha) else config.alpha
    settings = {"r": config.rank, "lora_alpha": alpha, "target_modules": sorted(targets)}
    written = json.dumps({f"transformer.{name}": value for name, value in settings.items()}, indent=2)
    write_weights(tensors, path, dtype, {"format": "pt", "lora_adapter_metadata": written})
