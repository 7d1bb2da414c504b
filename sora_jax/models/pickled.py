"""Weights in pickles, read without PyTorch and without running what a pickle asks for.

A pickle may name any function of any module to be called while it is read. Here a few names are known, those of
arrays and of PyTorch's tensors; any other is refused before it is looked up.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import mmap
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sora_jax.errors import UserError
from sora_jax.models.weights import map_weights, read_weights

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_NUMPY_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")  # its name before and since NumPy 2


def read_tensors(path: pathlib.Path, mapped: bool = False) -> dict[str, np.ndarray]:
    """The tensors of a local file by their names: safetensors by that suffix, else what PyTorch saved.

    Args:
      mapped: they are views of the file, which is read when they are used; of PyTorch's older format they are not.

    Raises:
      UserError: there is no such file, it is damaged, or it holds something else than tensors.
    """
    if not path.is_file() and not path.with_name(path.name + ".index.json").is_file():
        raise UserError(f"There is no file of weights {path}: check the name.")
    if path.suffix == ".safetensors":
        return map_weights(path) if mapped else read_weights(path)
    return read_torch(path, mapped)


def read_torch(path: pathlib.Path, mapped: bool = False) -> dict[str, np.ndarray]:
    """The state dict of a file that `torch.save` wrote, in either of its two formats.

    Tensors inside nested dicts are named with dots between; what is no tensor is left out.

    Args:
      mapped: as `read_tensors` has it; the file's checksums aren't looked at then.

    Raises:
      UserError: it is damaged or was written by something else, or it holds objects of other classes.
    """
    try:
        with open(path, "rb") as file:
            tree = _read_zip(file, path, mapped) if zipfile.is_zipfile(file) else _read_legacy(file, path)
    except UserError:
        raise
    except Exception as error:  # damaged pickles fail in many ways
        raise UserError(
            f"{path} can't be read as weights that PyTorch saved ({type(error).__name__}: {error}): it is damaged or "
            "another kind of file; fetch it again, or convert it to safetensors."
        ) from error
    tensors = {name: tensor.array() for name, tensor in _flat(tree) if isinstance(tensor, _Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors: save the model's state dict.")
    return tensors


def read_arrays(path: pathlib.Path) -> dict[str, Any]:
    """What a pickle of dicts of NumPy's arrays holds, as it is.

    Raises:
      UserError: it is missing or damaged, or holds something else.
    """
    known: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for core in _NUMPY_CORES:
        known[core, "_reconstruct"] = _empty_array
    try:
        with open(path, "rb") as file:
            return Unpickler(file, known, path).load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} can't be read ({type(error).__name__}: {error}): install its package again."
        ) from error


class Unpickler(pickle.Unpickler):
    """Knows the names in `known` alone: (module, name) to what stands for it."""

    def __init__(
        self,
        file: BinaryIO,
        known: Mapping[tuple[str, str], Any],
        path: pathlib.Path,
        storage: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(file, encoding="latin1")
        self._known, self._path, self._storage = known, path, storage

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name that the pickle asks for."""
        if (module, name) not in self._known:
            raise UserError(
                f"{self._path} asks for {module}.{name}, which weights don't need, and was not read: convert it to "
                "safetensors where you trust it."
            )
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """What a reference to data outside of the pickle means."""
        if self._storage is None:
            raise UserError(
                f"{self._path} refers to data outside of it, which weights don't: fetch it again."
            )
        return self._storage(pid)


@dataclasses.dataclass
class _Storage:
    """A tensor's numbers, which legacy files have after all tensors."""

    dtype: np.dtype
    count: int
    data: bytes | memoryview = b""


@dataclasses.dataclass
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """A copy that is contiguous; of a mapped file's what is contiguous as it is."""
        numbers = np.frombuffer(self.storage.data, self.storage.dtype)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and not (
            0 <= self.offset <= last < len(numbers) and min(self.strides, default=0) >= 0
        ):
            raise UserError(
                "A tensor reaches beyond the numbers that are there: the file is cut short; fetch it again."
            )
        strides = [step * numbers.itemsize for step in self.strides]
        view = np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides)
        return np.ascontiguousarray(view) if isinstance(self.storage.data, memoryview) else view.copy()


def _rebuild(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


_TORCH: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "Size"): tuple,
    **{("torch", name): np.dtype(dtype) for name, dtype in _STORAGES.items()},
}


def _read_zip(file: BinaryIO, path: pathlib.Path, mapped: bool) -> Any:
    with zipfile.ZipFile(file) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order).strip() != b"little":
            raise UserError(
                f"{path} has its bytes in the order of another machine: save it again on this kind."
            )
        storages: dict[str, _Storage] = {}
        pages = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if mapped else None

        def numbers(name: str) -> bytes | memoryview:
            info = archive.getinfo(name)
            if pages is None or info.compress_type != zipfile.ZIP_STORED:
                return archive.read(name)
            # After the file's own header (APPNOTE.TXT 4.3.7), whose name and extra field may be of other lengths there.
            begin = info.header_offset
            begin += 30 + sum(struct.unpack("<HH", pages[begin + 26 : begin + 30]))
            return pages[begin : begin + info.file_size]

        def storage(pid: Any) -> _Storage:
            _, dtype, key, _, count = pid[:5]
            if key not in storages:
                storages[key] = _Storage(dtype, count, numbers(f"{folder}data/{key}"))
            return storages[key]

        return Unpickler(io.BytesIO(archive.read(pickled)), _TORCH, path, storage).load()


def _read_legacy(file: BinaryIO, path: pathlib.Path) -> Any:
    """Pickles one after another (a magic number, a version, the machine, the tree, storages' keys), then numbers."""
    file.seek(0)
    magic, version, machine = (Unpickler(file, {}, path).load() for _ in range(3))
    if (magic, version) != (_LEGACY_MAGIC, _LEGACY_VERSION):
        raise ValueError("it is no file of torch.save")
    if not machine.get("little_endian", True):
        raise UserError(f"{path} has its bytes in the order of another machine: save it again on this kind.")
    storages: dict[str, _Storage] = {}

    def storage(pid: Any) -> _Storage:
        _, dtype, key, _, count, view = pid
        if view is not None:
            raise ValueError("its tensors are views of views")
        return storages.setdefault(key, _Storage(dtype, count))

    tree = Unpickler(file, _TORCH, path, storage).load()
    for key in Unpickler(file, {}, path).load():
        (count,) = struct.unpack("<q", file.read(8))
        if count != storages[key].count:
            raise ValueError("its storages have other sizes than its tensors")
        storages[key].data = file.read(count * storages[key].dtype.itemsize)
    return tree


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        return [
            item
            for name, part in tree.items()
            for item in _flat(part, f"{prefix}.{name}" if prefix else str(name))
        ]
    return [(prefix, tree)]


def _empty_array(kind: type[np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that the pickle fills afterwards, as NumPy's own function of this name makes it."""
    if kind is not np.ndarray:
        raise UserError("A pickle of arrays holds objects of another class, and was not read.")
    return np.ndarray(shape, dtype)
