"""Weights that PyTorch pickled are read without it, and nothing that a pickle names is run."""

import collections
import io
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest

from sora_jax.errors import UserError
from sora_jax.models.pickled import read_arrays, read_tensors, read_torch


class Storage:
    """A tensor's numbers, which a pickle of PyTorch's refers to."""

    def __init__(self, key: str, array: np.ndarray):
        self.key, self.array = key, array


class Tensor:
    """Pickled as PyTorch pickles one: a call of `_rebuild_tensor_v2`."""

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        self.parts = storage, offset, shape, strides, False, collections.OrderedDict()

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.parts


@pytest.fixture
def torch(monkeypatch):
    """Modules of PyTorch's names, so that pickles of this test name what those of PyTorch name."""
    module, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    module.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})

    def _rebuild_tensor_v2():
        raise AssertionError("a pickle's function was called")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return module


def pickled(tree: object, torch: types.ModuleType, legacy: bool) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if not isinstance(obj, Storage):
                return None
            found = "storage", torch.FloatStorage, obj.key, "cpu", obj.array.size
            return (*found, None) if legacy else found

    file = io.BytesIO()
    Pickler(file, 2).dump(tree)
    return file.getvalue()


def example(torch):
    numbers = np.arange(24, dtype=np.float32)
    storage, other = Storage("0", numbers), Storage("1", np.float32([7, 8, 9]))
    tree = collections.OrderedDict(
        weight=Tensor(storage, 0, (4, 6), (6, 1)),
        turned=Tensor(storage, 2, (3, 2), (1, 6)),  # a view, as of a transposed slice
        nested={"bias": Tensor(other, 0, (3,), (1,)), "epoch": 3},
    )
    wanted = {
        "weight": numbers.reshape(4, 6),
        "turned": numbers.reshape(4, 6)[:2, 2:5].T,
        "nested.bias": np.float32([7, 8, 9]),
    }
    return tree, {"0": storage.array, "1": other.array}, wanted


def write_zip(path, tree, storages, torch):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled(tree, torch, legacy=False))
        archive.writestr("model/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"model/data/{key}", array.tobytes())


def write_legacy(path, tree, storages, torch):
    heads = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    with open(path, "wb") as file:
        for head in heads:
            pickle.dump(head, file, 2)
        file.write(pickled(tree, torch, legacy=True))
        pickle.dump(list(storages), file, 2)
        for array in storages.values():
            file.write(struct.pack("<q", array.size) + array.tobytes())


WRITERS = {"zip": write_zip, "legacy": write_legacy}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_state_dict_is_read(kind, torch, tmp_path):
    tree, storages, wanted = example(torch)
    path = tmp_path / "model.pth"
    WRITERS[kind](path, tree, storages, torch)
    found = read_tensors(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].flags.c_contiguous
    mapped = read_tensors(path, mapped=True)
    assert {name: tensor.tobytes() for name, tensor in mapped.items()} == {
        name: tensor.tobytes() for name, tensor in found.items()
    }
    assert mapped["weight"].flags.owndata == (kind == "legacy")  # of the other kind a view of the file


class Attack:
    def __reduce__(self):
        return eval, ("open('touched', 'w')",)


@pytest.mark.parametrize("kind", WRITERS)
def test_other_functions_are_refused_and_not_run(kind, torch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree, storages, _ = example(torch)
    tree["attack"] = Attack()
    WRITERS[kind](tmp_path / "model.pth", tree, storages, torch)
    with pytest.raises(UserError, match=r"model.pth asks for \w+\.eval, which weights don't need"):
        read_torch(tmp_path / "model.pth")
    (tmp_path / "arrays.ckpt").write_bytes(pickle.dumps({"params": Attack()}))
    with pytest.raises(UserError, match=r"arrays.ckpt asks for builtins.eval"):
        read_arrays(tmp_path / "arrays.ckpt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_is_cut_short_is_refused(kind, torch, tmp_path):
    tree, storages, _ = example(torch)
    path = tmp_path / "model.pth"
    WRITERS[kind](path, tree, storages, torch)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="model.pth|cut short"):
        read_torch(path)


def test_tensors_beyond_their_numbers_are_refused(torch, tmp_path):
    tree = {"weight": Tensor(Storage("0", np.zeros(4, np.float32)), 0, (4, 6), (6, 1))}
    write_zip(tmp_path / "model.pth", tree, {"0": np.zeros(4, np.float32)}, torch)
    with pytest.raises(UserError, match="reaches beyond the numbers"):
        read_torch(tmp_path / "model.pth")


def test_arrays_of_dicts_are_read(tmp_path):
    tree = {"params": {"kernel": np.arange(6.0).reshape(2, 3)}, "n": 3}
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(tree))
    found = read_arrays(tmp_path / "x.ckpt")
    np.testing.assert_array_equal(found["params"]["kernel"], tree["params"]["kernel"])


@pytest.mark.parametrize(
    ("content", "sentence"), [(b"hello", "can't be read as weights"), (pickle.dumps({}), "can't be")]
)
def test_other_files_are_refused(content, sentence, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_tensors(tmp_path / "x.pth")
    with pytest.raises(UserError, match="There is no file of weights"):
        read_tensors(tmp_path / "absent.pth")
