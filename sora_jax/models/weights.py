"""Weights as files: safetensors of any floating type, in one file or in several with an index.

Safetensors' own reader of numpy arrays knows no float8; its parser gives the bytes, and ml_dtypes has the types.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from sora_jax.errors import UserError, atomic_path

# By their names in a file; integers are no weights, but may be stored with them.
_TYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "BOOL": np.bool_,
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
SAVED = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file by their names, each of its own type; read-only.

    Where the file is absent and `<path>.index.json` exists, the files that it lists are read.

    Raises:
      UserError: a file is missing or damaged, or a tensor's type is unknown.
    """
    index = path.with_name(path.name + ".index.json")
    if not path.is_file() and index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} can't be read ({error!r}): fetch it again.") from error
        if outside := [name for name in files if pathlib.PurePath(name).name != name]:
            raise UserError(f"{index} names {outside[0]!r}, which is not in its folder: fetch it again.")
        return {name: tensor for file in files for name, tensor in read_weights(path.with_name(file)).items()}
    try:
        parts = safetensors.deserialize(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the model's folder is incomplete; fetch it again.") from error
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} can't be read, it is damaged or cut short ({error}): fetch it again."
        ) from error
    for name, part in parts:
        if part["dtype"] not in _TYPES:
            raise UserError(
                f"{path} holds {name!r} as {part['dtype']}, which can't be read: convert it to one of "
                f"{', '.join(SAVED)}."
            )
    return {
        name: np.frombuffer(part["data"], _TYPES[part["dtype"]]).reshape(part["shape"])
        for name, part in parts
    }


def write_weights(tensors: Mapping[str, np.ndarray], path: pathlib.Path, dtype: str) -> None:
    """Writes tensors as one type, of `SAVED`; the file is complete or absent.

    Raises:
      UserError: there is no such type, or it doesn't hold some weight.
    """
    if dtype not in SAVED:
        raise UserError(f"Weights can't be saved as {dtype!r}: choose one of {', '.join(SAVED)}.")
    kept = np.dtype(getattr(ml_dtypes, dtype, dtype))
    out = {}
    for name, tensor in tensors.items():
        with np.errstate(over="ignore"):  # refused below
            out[name] = np.asarray(tensor).astype(kept, order="C")  # as files store them
        lost = np.isfinite(tensor) & ~np.isfinite(out[name].astype(np.float32))
        if lost.any():
            raise UserError(
                f"{name!r} reaches {np.abs(np.asarray(tensor))[lost].max():g}, and {dtype} holds up to "
                f"{float(ml_dtypes.finfo(kept).max):g}: save the weights as bfloat16."
            )
    with atomic_path(path) as temporary:
        safetensors.numpy.save_file(out, temporary)
