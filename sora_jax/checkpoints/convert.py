"""A diffusers folder of original files: their tensors under diffusers' names, and the settings that files don't have.

No single original file is a model: the text encoder is always another. So they are not loaded as they are, but become
a folder once, which diffusers reads too.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.checkpoints.diffusers_folder import INDEX, PARTS, WEIGHTS, read_json
from sora_jax.checkpoints.original_files import Part, read_parts
from sora_jax.checkpoints.pretrained import KINDS, pretrained_folder, read_shapes
from sora_jax.checkpoints.vae_tensors import check_shapes
from sora_jax.checkpoints.wan_pipeline import IMAGE_TO_VIDEO
from sora_jax.errors import UserError
from sora_jax.models import t5
from sora_jax.models.prompts import tokenizer_file
from sora_jax.models.published import check_tensors
from sora_jax.models.weights import write_parts

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_TOKENIZERS = ("google/umt5-xxl", "tokenizer")  # where original folders have it
_CLASSES: dict[str, dict[str, Any]] = {
    "wan": {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    },
    "ltx": {
        "_class_name": "LTXPipeline",
        "transformer": ["diffusers", "LTXVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLLTXVideo"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
}
# As the publishers' diffusers folders have them; Wan's shift is 5 for TI2V.
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "wan": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    "ltx": {
        "use_dynamic_shifting": True,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "shift_terminal": 0.1,
        "num_train_timesteps": 1000,
        "time_shift_type": "exponential",
    },
}
_BOUNDARY, _PICTURE_BOUNDARY = 0.875, 0.9  # of Wan2.2's two transformers, text to video and image to video


def convert(
    sources: Sequence[pathlib.Path],
    to: pathlib.Path,
    base: str = "",
    tokenizer: pathlib.Path | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> pathlib.Path:
    """Writes a diffusers folder of original files, and returns it. One tensor is in memory at a time, and one shard.

    Args:
      sources: files, or folders whose files are taken.
      to: the folder to write; absent, or empty.
      base: a diffusers folder (or "hf:OWNER/NAME") of the same model, from which what the files lack is copied.
      tokenizer: a folder with `tokenizer.json` or `spiece.model`, where it isn't among the sources.
      dtype: of the weights, of `weights.SAVED`; None keeps each tensor's own.
      progress: is called with (bytes done, bytes in all).

    Raises:
      UserError: a file is of no model that is known, files are of different ones, parts are missing, tensors don't
        fit, or `to` isn't empty.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} is there already: name a folder that isn't, or an empty one.")
    folder = pretrained_folder(base) if base else None
    parts = _gather([part for file in _files(sources) for part in read_parts(file)])
    model = next(iter(parts.values())).model
    tokenizer = tokenizer or _tokenizer(sources)
    _check_complete(parts, folder, tokenizer, sources)
    settings = {name: _settings(part, folder) for name, part in parts.items()}
    total = sum(part.tensors[own].nbytes for part in parts.values() for own in part.names.values())
    done = 0

    def counted(items: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        nonlocal done
        for name, tensor in items:
            yield name, tensor
            done += tensor.nbytes
            progress(min(done, total), total)

    try:
        for name, part in parts.items():
            (to / name).mkdir(parents=True)
            file = "model.safetensors" if name == "text_encoder" else WEIGHTS
            write_parts(counted(part.read()), to / name / file, dtype)
            _write_json(to / name / "config.json", settings[name])
        pieces = parts["text_encoder"].pieces if "text_encoder" in parts else b""
        if tokenizer is not None:
            shutil.copytree(tokenizer, to / "tokenizer")
        elif pieces:
            (to / "tokenizer").mkdir()
            (to / "tokenizer" / "spiece.model").write_bytes(pieces)
        if folder is not None:
            for place in sorted(folder.iterdir()):
                if place.is_dir() and not (to / place.name).exists():
                    shutil.copytree(place, to / place.name)
            index = read_json(folder / INDEX)
        else:
            index, scheduler = _index(model, parts, settings)
            _write_json(to / "scheduler" / "scheduler_config.json", scheduler)
        t5.load_t5(to / "text_encoder")
        _write_json(to / INDEX, index)  # last: it makes the folder a model
        read_shapes(to)
    except BaseException:
        shutil.rmtree(to, ignore_errors=True)  # a part of a model is none
        raise
    return to


def _files(sources: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The files of weights, of folders those in them; of files with an index, what stands for all of them."""
    files: list[pathlib.Path] = []
    for source in sources:
        if source.is_dir():
            found = sorted(file for file in source.rglob("*") if file.suffix in SUFFIXES)
            indices = sorted(source.rglob("*.safetensors.index.json"))
            whole = [index.with_name(index.name.removesuffix(".index.json")) for index in indices]
            parts = {
                index.with_name(name)
                for index in indices
                for name in read_json(index).get("weight_map", {}).values()
            }
            files += [*whole, *(file for file in found if file not in parts)]
        else:
            files.append(source)
    if not files:
        raise UserError(
            f"There are no files of weights in {', '.join(map(str, sources))}: {', '.join(SUFFIXES)}."
        )
    return list(dict.fromkeys(files))


def _gather(found: list[Part]) -> dict[str, Part]:
    """The parts by diffusers' names of their folders."""
    models = {part.model for part in found if part.name != "text_encoder"} or {found[0].model}
    if len(models) > 1:
        raise UserError(
            "The files are of Wan and of LTX-Video: " + ", ".join(sorted(str(part.path) for part in found))
        )
    (model,) = models
    parts: dict[str, Part] = {}
    pair = [part for part in found if part.name == "transformer"]
    if len(pair) == 2 and model == "wan":
        high, low = ([part for part in pair if word in _own_path(part, pair)] for word in ("high", "low"))
        if [len(high), len(low)] != [1, 1]:
            raise UserError(
                f"Of two transformers one is for high noise and one for low: {pair[0].path} and {pair[1].path} don't "
                "say which in their names."
            )
        parts = {"transformer": high[0], "transformer_2": low[0]}
        found = [part for part in found if part.name != "transformer"]
    for part in found:
        if part.name in parts:
            raise UserError(
                f"{parts[part.name].path} and {part.path} both hold a {part.name}: name one of them."
            )
        parts[part.name] = part
    return {name: dataclasses.replace(part, model=model, name=name) for name, part in parts.items()}


def _own_path(part: Part, pair: list[Part]) -> str:
    """What of a file's path is its own, in small letters."""
    other = next(each for each in pair if each is not part).path
    return " ".join(piece for piece in part.path.parts if piece not in other.parts).lower()


def _check_complete(
    parts: Mapping[str, Part],
    folder: pathlib.Path | None,
    tokenizer: pathlib.Path | None,
    sources: Sequence[pathlib.Path],
) -> None:
    """Raises UserError where neither files nor the base have a part."""
    have = {*parts, "scheduler"} | ({"tokenizer"} if tokenizer else set())
    if "text_encoder" in parts and parts["text_encoder"].pieces:
        have.add("tokenizer")
    if folder is None and (missing := [name for name in PARTS if name not in have]):
        ways = {"tokenizer": "name its folder with --tokenizer"}
        raise UserError(
            f"{', '.join(map(str, sources))} {'holds' if len(sources) == 1 else 'hold'} no {' and no '.join(missing)}: "
            f"{ways.get(missing[0], 'name its file too')}, or a diffusers folder that has it with --base."
        )
    if tokenizer is not None and not tokenizer_file(tokenizer).is_file():
        raise UserError(
            f"{tokenizer} has no tokenizer.json and no spiece.model: name the tokenizer's folder."
        )


def _tokenizer(sources: Sequence[pathlib.Path]) -> pathlib.Path | None:
    """A tokenizer's folder among the sources."""
    places = [source / place for source in sources if source.is_dir() for place in _TOKENIZERS]
    return next((place for place in places if tokenizer_file(place).is_file()), None)


def _settings(part: Part, folder: pathlib.Path | None) -> dict[str, Any]:
    """Of a part's config.json: the base's, where its tensors are of that shape, else as the tensors tell.

    Raises:
      UserError: the tensors aren't those of such a model.
    """
    if folder is not None and (file := folder / part.name / "config.json").is_file():
        try:
            _check(part, own := read_json(file))
            return own
        except UserError:
            pass
    _check(part, part.settings)
    return part.settings


def _check(part: Part, settings: Mapping[str, Any]) -> None:
    """Raises UserError where a part's tensors aren't those that its settings say."""
    kind = KINDS[_CLASSES[part.model]["_class_name"]]
    if part.name.startswith("transformer"):
        config = kind.read_config(settings)
        check_tensors(dict(kind.transformer.shapes(config)), part.named, str(part.path))
    elif part.name == "vae":
        config = kind.read_vae_config(settings, "float32")
        check_shapes(
            kind.vae_shapes(config),
            {name: tuple(tensor.shape) for name, tensor in part.named.items()},
        )


def _index(
    model: str, parts: Mapping[str, Part], settings: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of model_index.json, and of the scheduler's file."""
    index: dict[str, Any] = {**_CLASSES[model], "tokenizer": ["transformers", "T5TokenizerFast"]}
    scheduler = {"_class_name": index["scheduler"][1], **_SCHEDULERS[model]}
    if "transformer_2" in parts:
        index |= {"transformer_2": index["transformer"], "boundary_ratio": _BOUNDARY}
    own = settings["transformer"]
    if model == "wan" and own.get("in_channels") != own.get("out_channels"):
        index["_class_name"] = IMAGE_TO_VIDEO
        if "transformer_2" in parts:
            index["boundary_ratio"] = _PICTURE_BOUNDARY
    if model == "wan" and own.get("in_channels") == 48:
        index["expand_timesteps"] = True
        scheduler["flow_shift"] = 5.0
    return index, scheduler


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
