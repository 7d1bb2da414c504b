"""Models as files: a folder with `config.json` and safetensors, or a training run's workdir; found by name.

config.json       {"format": 1, "vae": {…}, "dit": {…}, "text": {…}, "limits": {…}, "base_tokens": …,
                  "sampling": {…}, "card": {…}}
vae.safetensors   weights, bfloat16 by default; named as the parameters are, "down.0.kernel"; absent where "vae" is the
                  name of a bundled model that has the same autoencoder, or is pixels (`models.pixels`)
dit.safetensors   (absent in a folder that holds an autoencoder only)
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.checkpoints.components import DTYPES, Bundle, Limits, Sampling, check_choice
from sora_jax.checkpoints.diffusers_folder import INDEX
from sora_jax.checkpoints.knowledge import knowledge_of
from sora_jax.checkpoints.store import load_params, named_leaves, restore_into
from sora_jax.config import component, with_new_names
from sora_jax.errors import UserError, atomic_path, nearest, user_path
from sora_jax.models.dit import DiT
from sora_jax.models.dit_config import DiTConfig
from sora_jax.models.pixels import PIXELS, make_vae
from sora_jax.models.text import TextConfig
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.models.weights import read_weights, write_weights

BUNDLED = pathlib.Path(__file__).parents[1] / "bundled"
FORMAT = 1
# Before 2026-11-29.
RENAMED_PARAMETERS = {"hints_in.kernel": "reference_in.kernel", "hints_in.bias": "reference_in.bias"}
MIN_DEVIATION = 1e-3  # of a latent's channel, in the largest channel's
Module = TypeVar("Module", VAE, DiT)


def save_bundle(
    bundle: Bundle, folder: str | os.PathLike[str], dtype: str = "bfloat16", vae_of: str = ""
) -> None:
    """Writes a bundle's folder, `config.json` last, each file whole or not at all.

    Args:
      dtype: of the weights, a name of `weights.SAVED`.
      vae_of: a bundled model that has the same autoencoder, which is then not written again.

    Raises:
      UserError: there is no such type, or it doesn't hold some weight.
    """
    folder = user_path(folder)
    parts: dict[str, Any] = {"format": FORMAT, "vae": vae_of or dataclasses.asdict(bundle.vae.config)}
    if not vae_of:
        _save_weights(bundle.vae, folder / "vae.safetensors", dtype)
    if bundle.dit is not None:
        _save_weights(bundle.dit, folder / "dit.safetensors", dtype)
        parts["dit"] = dataclasses.asdict(bundle.dit.config)
    for name in ("text", "limits", "sampling"):
        parts[name] = dataclasses.asdict(getattr(bundle, name))
    parts["base_tokens"] = bundle.base_tokens
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(parts | {"card": bundle.card}, indent=2) + "\n")


def load_bundle(name: str | os.PathLike[str] = "toyworld") -> Bundle:
    """Loads a bundled model by name, a bundle's folder, or a training run's workdir (its averaged weights).

    Args:
      name: of one of these; or of `models.pixels.PIXELS`, an autoencoder alone, which has no files.

    Raises:
      UserError: there is no such model, or its files are damaged or of another architecture.
    """
    if name in PIXELS:
        return Bundle(str(name), make_vae(PIXELS[str(name)], rngs=nnx.Rngs(0)))
    folder = find(name)
    if (folder / INDEX).is_file():
        raise UserError(
            f"{folder} is a diffusers pipeline, which is trained further by another configuration: "
            f"--config finetune_wan or finetune_ltx, --config.pretrained={folder}."
        )
    config = with_new_names(_read_json(folder / "config.json"))
    if "objective" in config:
        return _load_run(folder, config)
    if config.get("format") != FORMAT:
        if "format" not in config and "_class_name" in config:
            raise UserError(
                f"{folder} holds original files of a model, and no {INDEX}: `sora-jax convert {folder} --to FOLDER` "
                "makes one that can be loaded."
            )
        raise UserError(
            f"{folder}/config.json is of format {config.get('format')!r}, and this version reads {FORMAT}."
        )
    if isinstance(config["vae"], str):
        vae = load_bundle(config["vae"]).vae
    else:
        vae_config = component(VAEConfig, config["vae"], "vae")
        vae = _load_weights(lambda: make_vae(vae_config, rngs=nnx.Rngs(0)), folder / "vae.safetensors")
    dit = None
    if "dit" in config:
        values = {k: v for k, v in config["dit"].items() if not (config["dit"]["size"] and k in _DERIVED)}
        dit_config = component(DiTConfig, values, "dit")
        dit = _load_weights(lambda: DiT(dit_config, rngs=nnx.Rngs(0)), folder / "dit.safetensors")
    text = component(TextConfig, config.get("text", {}), "text")
    limits = component(Limits, config.get("limits", {}), "limits")
    base_tokens = config.get("base_tokens", Bundle.base_tokens)
    sampling = component(Sampling, config.get("sampling", {}), "sampling")
    return Bundle(folder.name, vae, dit, text, limits, base_tokens, sampling, config.get("card", {}))


def with_dtype(bundle: Bundle, dtype: Any) -> Bundle:
    """The same model with another arithmetic."""
    check_choice("dtype", dtype, DTYPES)
    vae = with_config(bundle.vae, dataclasses.replace(bundle.vae.config, dtype=dtype))
    dit = bundle.dit
    if dit is not None:
        values = {field.name: getattr(dit.config, field.name) for field in dataclasses.fields(dit.config)}
        config = DiTConfig(
            **{k: v for k, v in values.items() if not (values["size"] and k in _DERIVED)} | {"dtype": dtype}
        )
        dit = restore_into(jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))), named_leaves(dit))
    return dataclasses.replace(bundle, vae=vae, dit=dit)


def read_sampling(name: str | os.PathLike[str]) -> Sampling:
    """How a stored model is sampled, without loading it; the default where it can't be read."""
    try:
        folder = find(name)
        config = _read_json(folder / "config.json")
        if "objective" in config:
            config = _read_json(folder / "autoencoder" / "config.json")
        return component(Sampling, config.get("sampling", {}), "sampling")
    except UserError:
        return Sampling()  # loading the model says what is wrong


def find(name: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a bundled model, or `name` itself where it is a folder that holds a model.

    Raises:
      UserError: it is neither.
    """
    for folder in (BUNDLED / name, user_path(name)):
        if any(os.path.isfile(folder / file) for file in ("config.json", INDEX)):
            return folder
    path = user_path(name)
    if os.path.isfile(path):  # pathlib raises where a name is too long
        raise UserError(
            f"{path} is a file, of a part of a model: `sora-jax convert` makes a folder of it and the other parts."
        )
    others = [str(file.parent) for known in ("config.json", INDEX) for file in path.parent.glob(f"*/{known}")]
    near = nearest(str(path), [*bundled(), *others])
    hint = f"did you mean {near}? Name" if near else "name"
    known = ", ".join(bundled()) or "none"
    raise UserError(
        f"There is no model {str(name)!r}: {hint} a bundled one ({known}), or a folder that holds a model, a "
        "training run or a diffusers pipeline."
    )


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(config.parent.name for config in BUNDLED.glob("*/config.json"))


def measure_latents(vae: VAE, clips: Iterable[np.ndarray]) -> VAE:
    """The same autoencoder with `latent_mean` and `latent_std` measured over uint8[T,Y,X,3] clips of 1+4k frames.

    A channel that says nothing, of a deviation below a thousandth of the largest, takes that as its deviation: its
    latents stay near 0 instead of becoming noise, or no numbers at all.

    Raises:
      UserError: there is no clip, or no channel differs from cell to cell: the autoencoder codes nothing.
    """
    cells = [
        np.asarray(_encode(vae, clip[None] / np.float32(127.5) - 1)).reshape(-1, vae.config.channels)
        for clip in clips
    ]
    if not cells:
        raise UserError("There is no clip to measure the autoencoder's latents on: give at least one.")
    everything = np.concatenate(cells).astype(np.float64)
    deviation = everything.std(0)
    if not deviation.max() > 1e-6:  # NaN too
        raise UserError(
            f"The autoencoder codes {len(cells)} clips as the same numbers everywhere (largest deviation "
            f"{deviation.max():.2g}): train it further, or measure it on clips that differ."
        )
    deviation = np.maximum(deviation, MIN_DEVIATION * deviation.max())
    mean = tuple(np.round(everything.mean(0), 5).tolist())
    std = tuple(float(f"{one:.6g}") for one in deviation)
    return with_config(vae, dataclasses.replace(vae.config, latent_mean=mean, latent_std=std))


@jax.jit
def _encode(vae: VAE, clips: jax.Array) -> jax.Array:
    return vae.encode(clips)[0]


def with_config(vae: VAE, config: VAEConfig) -> VAE:
    """The same weights under another configuration of equal architecture."""
    template = jax.eval_shape(lambda: make_vae(config, rngs=nnx.Rngs(0)))
    return restore_into(template, named_leaves(vae))


def take_weights(fresh: Module, name: str, part: str) -> Module:
    """The weights of a stored model's "vae" or "dit" in place of `fresh`'s, to go on learning from them.

    A layer that the stored model lacks, of a field switched on since, stays as `fresh` has it.

    Raises:
      UserError: there is no such model, it has no such part, or that is of another architecture.
    """
    stored = getattr(load_bundle(name), part)
    if stored is None:
        raise UserError(f"config.init_from: the model {name!r} has no {part}.")
    ours, theirs = named_leaves(fresh), named_leaves(stored)
    for key, _, there in _differences(ours, theirs):
        if there is not None:
            raise UserError(
                f"config.init_from: the {part} of {name!r} is of another architecture, beginning at {key!r}."
            )
    return restore_into(fresh, ours | theirs)


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...] | None, tuple[int, ...] | None]]:
    """(name, our shape, their shape) of each parameter that isn't alike in both; None where one is absent."""
    for key in dict.fromkeys([*ours, *theirs]):
        here, there = (leaves[key].shape if key in leaves else None for leaves in (ours, theirs))
        if here != there:
            yield key, here, there


def _load_run(folder: pathlib.Path, config: dict[str, Any]) -> Bundle:
    """A training run: its own configuration and its newest checkpoint."""
    if config["objective"] == "vae":
        vae_config = component(VAEConfig, config["vae"], "vae")
        vae = load_params(folder, jax.eval_shape(lambda: VAE(vae_config, rngs=nnx.Rngs(0))))
        return Bundle(folder.name, vae, card={"run": str(folder)})
    if config["objective"] == "finetune":
        raise UserError(
            f"{folder} was trained on top of an open model: it makes videos, but can't be used here yet."
        )
    if config["objective"] not in ("dit", "distill"):
        raise UserError(
            f"{folder} is a run of objective {config['objective']!r}, which is no model that can be loaded."
        )
    if not (folder / "autoencoder" / "config.json").is_file():
        raise UserError(f"{folder} has no autoencoder yet: let the training start first.")
    parts = load_bundle(folder / "autoencoder")
    dit_config = component(DiTConfig, config["dit"], "dit")
    dit = load_params(folder, jax.eval_shape(lambda: DiT(dit_config, rngs=nnx.Rngs(0))))
    card = {"run": str(folder), "knows": dataclasses.asdict(knowledge_of(config))}
    return dataclasses.replace(parts, name=folder.name, dit=dit, card=card)


_DERIVED = ("width", "layers", "heads")  # of DiTConfig.size


def _save_weights(model: Any, path: pathlib.Path, dtype: str) -> None:
    if weights := {name.replace("/", "."): leaf for name, leaf in named_leaves(model).items()}:
        write_weights(weights, path, dtype)


def _load_weights(build: Callable[[], Module], path: pathlib.Path) -> Module:
    template = jax.eval_shape(build)
    if not jax.tree.leaves(template):  # pixels
        return template
    wanted = {name.replace("/", "."): leaf for name, leaf in named_leaves(template).items()}
    tensors = {RENAMED_PARAMETERS.get(name, name): value for name, value in read_weights(path).items()}
    if differing := list(_differences(wanted, tensors)):
        name, here, there = differing[0]
        others = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
        raise UserError(
            f"{path} is of another architecture than its config.json: {name!r} is {there or 'absent'} in the file "
            f"and {here or 'absent'} in the configuration{others}."
        )
    with jax.ensure_compile_time_eval():  # training builds its model under jit; files are read outside of it
        arrays = {
            name: jnp.asarray(tensors[key].astype(np.float32))
            for name, key in zip(named_leaves(template), wanted)
        }
    return restore_into(template, arrays)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} can't be read ({error}): the model's folder is damaged; fetch it again."
        ) from error
