"""Weights as files: safetensors of any floating type, in one file or in several with an index.

Safetensors' own reader of numpy arrays knows no float8 and maps nothing into memory, so the header is read here; the
format is a length of 8 bytes, a header in JSON, and the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import mmap
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from sora_jax.errors import UserError, atomic_path

# By their names in a file; integers are no weights, but may be stored with them.
_TYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
PART_BYTES = 2 * 10**9  # of a file, where there are several
SAVED = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file by their names, each of its own type; read-only.

    Where the file is absent and `<path>.index.json` exists, the files that it lists are read.

    Raises:
      UserError: a file is missing or damaged, or a tensor's type is unknown.
    """
    return _tensors_of([path] if path.is_file() else _parts(path), pathlib.Path.read_bytes)


def map_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """As `read_weights`, but nothing is read until it is used: the arrays are views of the files mapped into memory.

    Where `<path>.index.json` exists, the files that it lists are mapped, even if `path` exists too: transformers and
    diffusers leave an old single file in place when they save in parts, and the parts are what was saved last.
    Transformers' folders name it `model.safetensors`, diffusers' `diffusion_pytorch_model.safetensors`.

    What has been used stays in memory, and counts as the process's, until `release` is called or all views of its file
    are gone. The files must not be written to meanwhile.

    Raises:
      UserError: a file is missing or damaged, or a tensor's type is unknown.
    """
    return _tensors_of(_parts(path), _map)


def release(tensor: np.ndarray) -> None:
    """Gives back the memory that holds what was read so far of a mapped tensor's file; it's read again when used."""
    owner: Any = tensor
    while isinstance(owner, np.ndarray):
        owner = owner.base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # Windows has none
        owner.madvise(mmap.MADV_DONTNEED)


def _parts(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that `<path>.index.json` lists, or `path` where there is none."""
    index = path.with_name(path.name + ".index.json")
    if not index.is_file():
        return [path]
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} can't be read ({error!r}): fetch it again.") from error
    if outside := [name for name in files if pathlib.PurePath(name).name != name]:
        raise UserError(f"{index} names {outside[0]!r}, which is not in its folder: fetch it again.")
    return [path.with_name(file) for file in files]


def _map(path: pathlib.Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _tensors_of(
    files: list[pathlib.Path], load: Callable[[pathlib.Path], bytes | mmap.mmap]
) -> dict[str, np.ndarray]:
    return {name: tensor for file in files for name, tensor in _tensors(file, load).items()}


def _tensors(path: pathlib.Path, load: Callable[[pathlib.Path], bytes | mmap.mmap]) -> dict[str, np.ndarray]:
    try:
        data = load(path)
        start = 8 + int.from_bytes(data[:8], "little")
        if not 8 < start <= len(data):
            raise ValueError("the header is incomplete")
        entries = json.loads(data[8:start].decode("utf-8"))
        entries.pop("__metadata__", None)
        unknown = [(name, entry["dtype"]) for name, entry in entries.items() if entry["dtype"] not in _TYPES]
        tensors = {} if unknown else _views(data, start, entries)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the model's folder is incomplete; fetch it again.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} can't be read, it is damaged or cut short ({error}): fetch it again."
        ) from error
    for name, dtype in unknown:
        raise UserError(
            f"{path} holds {name!r} as {dtype}, which can't be read: convert it to one of {', '.join(SAVED)}."
        )
    return tensors


def _views(
    data: bytes | mmap.mmap, start: int, entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """The tensors of a file's bytes, which must fill it from `start` on.

    Raises:
      ValueError: they don't.
    """
    tensors, filled = {}, start
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, (first, end) = _TYPES[entry["dtype"]], entry["data_offsets"]
        if start + first != filled or end - first != math.prod(entry["shape"]) * dtype.itemsize:
            raise ValueError(f"{name!r} is not where the header says")
        if start + end > len(data):
            raise ValueError(f"{name!r} ends at byte {start + end} of {len(data)}")
        tensors[name] = np.ndarray(entry["shape"], dtype, data, start + first)
        filled = start + end
    if filled != len(data):
        raise ValueError(f"the tensors end at byte {filled} of {len(data)}")
    return {name: tensors[name] for name in entries}


def write_weights(
    tensors: Mapping[str, np.ndarray],
    path: pathlib.Path,
    dtype: str | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as one type, of `SAVED`, or each as its own with None; the file is complete or absent.

    `metadata`: texts for the file's header.

    Raises:
      UserError: there is no such type, or it doesn't hold some weight.
    """
    if dtype not in (None, *SAVED):
        raise UserError(f"Weights can't be saved as {dtype!r}: choose one of {', '.join(SAVED)}.")
    out = {}
    for name, tensor in tensors.items():
        kept = _saved_type(tensor, dtype)
        with np.errstate(over="ignore"):  # refused below
            out[name] = np.asarray(tensor).astype(kept, order="C")  # as files store them
        lost = np.isfinite(tensor) & ~np.isfinite(out[name].astype(np.float32))
        if lost.any():
            raise UserError(
                f"{name!r} reaches {np.abs(np.asarray(tensor))[lost].max():g}, and {dtype} holds up to "
                f"{float(ml_dtypes.finfo(kept).max):g}: save the weights as bfloat16."
            )
    with atomic_path(path) as temporary:
        safetensors.numpy.save_file(out, temporary, None if metadata is None else dict(metadata))


def _saved_type(tensor: np.ndarray, dtype: str | None) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, dtype, dtype)) if dtype else tensor.dtype


def write_parts(
    tensors: Iterable[tuple[str, np.ndarray]],
    path: pathlib.Path,
    dtype: str | None = None,
    part_bytes: int = PART_BYTES,
) -> None:
    """Writes tensors into one file, or several with an index, as transformers and diffusers do; one is in memory.

    Args:
      tensors: by name, each taken when its turn comes.
      path: of the one file; of several, "-00001-of-00003" and so on stand before its suffix.
      dtype: of `SAVED`; None keeps each one's own.
      part_bytes: of a file, at most, but for a tensor that is larger.

    Raises:
      UserError: as `write_weights`.
    """
    part: dict[str, np.ndarray] = {}
    files: list[tuple[pathlib.Path, list[str]]] = []
    size = total = 0

    def flush() -> None:
        nonlocal size
        file = path.with_name(f"{path.stem}-{len(files) + 1:05d}.part")
        write_weights(part, file, dtype, {"format": "pt"})
        files.append((file, list(part)))
        for tensor in part.values():
            release(tensor)
        part.clear()
        size = 0

    for name, tensor in tensors:
        count = tensor.size * _saved_type(tensor, dtype).itemsize
        if part and size + count > part_bytes:
            flush()
        part[name] = tensor
        size, total = size + count, total + count
    flush()
    places: dict[str, str] = {}
    for number, (file, names) in enumerate(files, 1):
        last = f"{path.stem}-{number:05d}-of-{len(files):05d}{path.suffix}" if len(files) > 1 else path.name
        file.replace(path.with_name(last))
        places |= dict.fromkeys(names, last)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        path.with_name(path.name + ".index.json").write_text(json.dumps(index, indent=2) + "\n")
