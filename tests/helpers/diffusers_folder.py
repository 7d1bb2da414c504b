"""A tiny diffusers pipeline's folder, written from the parity kit's golden file: settings, and weights by name."""

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from helpers.parity import draw_all

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "transformer_2": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "image_encoder": "model.safetensors",
}


def golden(name: str) -> dict[str, Any]:
    """A golden file's arrays, and what it has as JSON."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: json.loads(str(file[key])) if file[key].ndim == 0 else file[key] for key in file}


def write_folder(folder: pathlib.Path, kept: dict[str, Any]) -> pathlib.Path:
    """Writes the folder as `save_pretrained` does."""
    files = {f"{part}/config.json": config for part, config in kept["config"].items()}
    files |= {
        "model_index.json": kept["files"]["model_index.json"],
        "scheduler/scheduler_config.json": kept["files"]["scheduler"],
        "tokenizer/tokenizer.json": kept["files"]["tokenizer"],
    }
    if "image_processor" in kept["files"]:
        files["image_processor/preprocessor_config.json"] = kept["files"]["image_processor"]
    if "transformer_2" in kept["names"]:
        files["transformer_2/config.json"] = kept["config"]["transformer"]
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    for part, names in kept["names"].items():
        weights = draw_all(names, "second." if part == "transformer_2" else "")
        weights |= {name: kept[name] for name in weights if name in kept}  # what isn't drawn
        safetensors.numpy.save_file(weights, folder / part / WEIGHTS[part])
    return folder
