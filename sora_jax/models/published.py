"""Parameters from files as they were published: other names, other orders of axes, one tensor a layer.

Published matrices are [out, in]; ours are [in, out], layers are stacked, queries, keys and values are one matrix, and
the pairs of numbers that RoPE rotates, neighbours in the originals, are the two halves of a head here
(`models.layers.rotate`): the same products, as queries and keys are permuted alike. `Layout` says of a model which
tensors its parameters are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.errors import UserError
from sora_jax.models.int8 import INT8, quantize, with_scales
from sora_jax.models.offload import Offloaded
from sora_jax.models.weights import release

_STRIP = 64  # rows that are cast and transposed at a time: 1.7 times as fast as whole matrices


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which published tensors a model's parameters are.

    Attributes:
      blocks: the published name of the stack of layers, ours being "blocks".
      linears: our linear layers, and the published ones that each consists of, one beside the other.
      tables: our other parameters, and the published ones that are their rows.
      rotated: the published tensors whose first axis RoPE rotates.
      patches: the published layers whose kernels have the axes of a patch, [out, channel, time, height, width].
      heads: of all attention.
    """

    blocks: str
    linears: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, tuple[str, ...]]
    rotated: frozenset[str]
    heads: int
    patches: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Published:
    """A published transformer: its class here, and the tensors of its files.

    Attributes:
      model: the class; a configuration and `rngs` make one.
      names: of tensors by the original code's names or diffusers', the latter.
      shapes: diffusers' name and shape of each parameter, of a configuration.
      layout: which of them ours are, of a configuration.
    """

    model: Callable[..., Any]
    names: Callable[[Mapping[str, Any]], dict[str, Any]]
    shapes: Callable[[Any], Iterator[tuple[str, tuple[int, ...]]]]
    layout: Callable[[Any], Layout]

    def load(
        self,
        config: Any,
        tensors: Mapping[str, np.ndarray],
        where: str = "The transformer's file",
        place: Callable[[str, np.ndarray], Any] = lambda name, array: jnp.asarray(array),
        dtype: Any = np.float32,
    ) -> Any:
        """The transformer of a file's tensors, read one after another.

        Args:
          tensors: by diffusers' names or the original's; memory-mapped ones are read as they are needed.
          where: names the file in errors.
          place: puts a parameter, by our name, on its devices.
          dtype: of the parameters; they are cast while they are read. int8: see `fill`.

        Raises:
          UserError: a tensor is unknown, missing or of another shape: all of them are named, up to three.
        """
        template, tensors = self._checked(config, tensors, where)
        return fill(template, self.layout(config), tensors, place, dtype)

    def offload(
        self,
        config: Any,
        tensors: Mapping[str, np.ndarray],
        where: str = "The transformer's file",
        dtype: Any = np.float32,
        keep: bool | None = None,
    ) -> Offloaded:
        """As `load`, but blocks come to the device when called; `keep` as `fill_offloaded` has it."""
        template, tensors = self._checked(config, tensors, where)
        return fill_offloaded(template, self.layout(config), tensors, dtype, keep)

    def publish(self, config: Any, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The way back: our parameters, by names such as "blocks/qkv/kernel", as diffusers' tensors."""
        return publish(leaves, self.layout(config), dict(self.shapes(config)))

    def publish_lora(self, config: Any, lora: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Low-rank updates, by names such as "blocks/qkv/lora_down": see `publish_lora`."""
        return publish_lora(lora, self.layout(config), dict(self.shapes(config)))

    def _checked(
        self, config: Any, tensors: Mapping[str, np.ndarray], where: str
    ) -> tuple[Any, Mapping[str, np.ndarray]]:
        """The model's shapes, and the tensors by diffusers' names, which are those that it has."""
        tensors = by_names(tensors, self.names)
        check_tensors(dict(self.shapes(config)), tensors, where)
        return jax.eval_shape(lambda: self.model(config, rngs=nnx.Rngs(0))), tensors


def renamed(names: Mapping[str, Any], patterns: Mapping[str, str]) -> dict[str, Any]:
    """The same values by diffusers' names, where they are by the original code's.

    Args:
      patterns: pieces of the original's names, and what diffusers has in their place.

    Raises:
      UserError: two of them are of the same parameter.
    """
    out: dict[str, Any] = {}
    for given, value in names.items():
        name = re.sub(r"^(model\.diffusion_model\.|model\.)", "", given)
        for pattern, replacement in patterns.items():
            name = re.sub(pattern, replacement, name)
        if name in out:
            raise UserError(f"The transformer's file holds {name!r} twice, once as {given!r}.")
        out[name] = value
    return out


def by_names(
    tensors: Mapping[str, np.ndarray], names: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> Mapping[str, np.ndarray]:
    """The tensors by diffusers' names, `names` being a model's `diffusers_names`.

    Those that have them already stay as they are, unread: what a LoRA is merged into is merged when it is read.
    """
    theirs = names({name: name for name in tensors})
    if list(theirs) == list(tensors):
        return tensors
    return {name: tensors[given] for name, given in theirs.items()}


def fill(
    template: Any,
    layout: Layout,
    tensors: Mapping[str, np.ndarray],
    place: Callable[[str, np.ndarray], Any] = lambda name, array: jnp.asarray(array),
    dtype: Any = np.float32,
    prefix: str = "",
) -> Any:
    """A model's parameters of tensors by diffusers' names, read one after another.

    Args:
      template: the model's shapes, or those of one of its blocks.
      place: puts a parameter, by our name, on its devices.
      dtype: of the parameters; they are cast while they are read. int8 is for the matrices of the blocks
        (`models.int8`), and all others are float32.
      prefix: of a block's tensors, such as "blocks.3.".
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    placed, scales = [], {}
    is_int8 = np.dtype(dtype) == INT8
    for path, like in leaves:
        name = _name(path)
        if is_int8 and (prefix or name.startswith("blocks.")) and name.endswith(".kernel"):
            array, scale = _fill_int8(name, like.shape, tensors, layout, prefix)
            scales[name.removesuffix(".kernel").replace(".", "/")] = place(f"{name}_scale", scale)
        else:
            array = np.empty(like.shape, np.float32 if is_int8 else dtype)
            for part, own, block in _layers(array, name, layout):
                _fill_one(part, own, prefix + block, tensors, layout)
        placed.append(place(name, array))
    return with_scales(jax.tree_util.tree_unflatten(structure, placed), scales)


def fill_offloaded(
    template: Any, layout: Layout, tensors: Mapping[str, np.ndarray], dtype: Any, keep: bool | None = None
) -> Offloaded:
    """`fill` of all but the blocks, which are read when they are called.

    Args:
      keep: whether blocks are read once and kept in the host's memory, or read from their file each time; None: as the
        device has memory of its own. A CPU's is the host's, and keeping them there would save nothing.
    """
    blocks, outer = template.blocks, jax.tree.map(lambda leaf: leaf, template)
    outer.blocks = None
    block = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), blocks)

    def read(i: int, place: Callable[[str, np.ndarray], Any]) -> Any:
        return fill(block, layout, tensors, place, dtype, f"{layout.blocks}.{i}.")

    outer = fill(outer, layout, tensors, dtype=dtype)
    if jax.default_backend() != "cpu" if keep is None else keep:
        kept = [read(i, lambda name, array: array) for i in range(template.config.layers)]
        return Offloaded(outer, blocks, lambda i: jax.device_put(kept[i]))
    return Offloaded(outer, blocks, lambda i: read(i, lambda name, array: jax.device_put(array)))


def publish(
    leaves: Mapping[str, Any], layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The way back: our parameters, by names such as "blocks/qkv/kernel", as diffusers' tensors, of their types.

    Args:
      shapes: of each of those.
    """
    out: dict[str, np.ndarray] = {}
    for name, leaf in leaves.items():
        for part, own, prefix in _layers(np.asarray(leaf), name.replace("/", "."), layout):
            for theirs, value in _take_apart(part, own, layout):
                shape = shapes[prefix + theirs]
                if theirs.removesuffix(".weight") in layout.patches:
                    value = _channels_first(value, shape)
                out[prefix + theirs] = np.ascontiguousarray(value.reshape(shape))
    return out


def publish_lora(
    lora: Mapping[str, Any], layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Low-rank updates (`models.low_rank`) by published module, each as PEFT's A [rank, in] and B [out, rank].

    Args:
      lora: by names such as "blocks/qkv/lora_down".
      shapes: of the published tensors.
    """
    parts = {
        (prefix, own): part
        for name, leaf in lora.items()
        for part, own, prefix in _layers(np.asarray(leaf, np.float32), name.replace("/", "."), layout)
    }
    out = {}
    for (prefix, name), up in parts.items():
        layer, part = name.rsplit(".", 1)
        if part != "lora_up":
            continue
        sources = layout.linears[layer]
        down = np.split(parts[prefix, f"{layer}.lora_down"], len(sources), -1)
        for theirs, a, b in zip(sources, down, np.split(up, len(sources)), strict=True):
            a, b = a.T, _neighbours(b.T, theirs, layout)
            if theirs in layout.patches:  # a convolution, and a second of one cell
                a, b = _channels_first(a, shapes[f"{prefix}{theirs}.weight"]), b[:, :, None, None, None]
            out[prefix + theirs] = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return out


def _channels_first(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of a token's numbers (time, height, width, channel) as kernels of a convolution of that shape."""
    return np.moveaxis(rows.reshape(len(rows), *shape[2:], shape[1]), -1, 1)


def check_tensors(
    wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray], where: str
) -> None:
    """Raises UserError where the tensors aren't exactly those wanted, by name and shape."""
    faults = [f"{name!r} is missing" for name in wanted if name not in tensors]
    faults += [f"{name!r} is unknown" for name in tensors if name not in wanted]
    faults += [
        f"{name!r} is {tuple(tensors[name].shape)} where config.json says {tuple(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"{where} doesn't belong to its config.json: {', '.join(faults[:3])}{more}. Fetch the model again."
        )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _layers(array: np.ndarray, name: str, layout: Layout) -> list[tuple[np.ndarray, str, str]]:
    """A parameter as (part, our name in its layer, the published prefix), one for each layer."""
    if not name.startswith("blocks."):
        return [(array, name, "")]
    name = name.removeprefix("blocks.")
    return [(part, name, f"{layout.blocks}.{i}.") for i, part in enumerate(array)]


def _fill_int8(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, np.ndarray], layout: Layout, prefix: str
) -> tuple[np.ndarray, np.ndarray]:
    """int8[…, in, out] and float32[…, out] of a matrix, or of a stack; one of them at a time is float32."""
    kernel, scale = np.empty(shape, np.int8), np.empty((*shape[:-2], shape[-1]), np.float32)
    matrix = np.empty(shape[-2:], np.float32)
    scales = (part for part, *_ in _layers(scale, name, layout))
    for (part, own, block), own_scale in zip(_layers(kernel, name, layout), scales, strict=True):
        _fill_one(matrix, own, prefix + block, tensors, layout)
        part[...], own_scale[...] = quantize(matrix)
    return kernel, scale


def _fill_one(
    array: np.ndarray, name: str, prefix: str, tensors: Mapping[str, np.ndarray], layout: Layout
) -> None:
    if name in layout.tables:
        rows = array.reshape(len(layout.tables[name]), -1)
        for row, theirs in zip(rows, layout.tables[name], strict=True):
            tensor = tensors[prefix + theirs]
            row[...] = _halves(tensor.reshape(-1), theirs, layout)
            release(tensor)
        return
    layer, part = name.rsplit(".", 1)
    sources = layout.linears[layer]
    width = array.shape[-1] // len(sources)
    for i, theirs in enumerate(sources):
        given = tensor = tensors[f"{prefix}{theirs}.{'bias' if part == 'bias' else 'weight'}"]
        if theirs in layout.patches and part == "kernel":
            tensor = tensor.transpose(0, 2, 3, 4, 1)  # a token's numbers: (time, height, width, channel)
        if part == "kernel":
            tensor = tensor.reshape(len(tensor), -1)
        rows, columns = _halves(tensor, theirs, layout), array[..., i * width : (i + 1) * width]
        for at in range(0, width, _STRIP):
            columns[..., at : at + _STRIP] = rows[at : at + _STRIP].astype(array.dtype).T
        release(given)  # of what is mapped, only one tensor is in memory at a time


def _take_apart(array: np.ndarray, name: str, layout: Layout) -> list[tuple[str, np.ndarray]]:
    """The published tensors of one layer's parameter, by their names there."""
    if name in layout.tables:
        theirs = layout.tables[name]
        rows = array.reshape(len(theirs), -1)
        return [(own, _neighbours(row, own, layout)) for own, row in zip(theirs, rows, strict=True)]
    layer, part = name.rsplit(".", 1)
    theirs = layout.linears[layer]
    columns = np.split(array.reshape(*array.shape[: part == "kernel"], -1), len(theirs), axis=-1)
    stored = "bias" if part == "bias" else "weight"
    return [
        (f"{own}.{stored}", _neighbours(value.T, own, layout))
        for own, value in zip(theirs, columns, strict=True)
    ]


def _halves(tensor: np.ndarray, theirs: str, layout: Layout) -> np.ndarray:
    """Rows [H F, …] that RoPE rotates, neighbours as halves; others as they are."""
    if theirs not in layout.rotated:
        return tensor
    pairs = tensor.reshape(layout.heads, len(tensor) // layout.heads // 2, 2, -1)
    return np.swapaxes(pairs, 1, 2).reshape(tensor.shape)


def _neighbours(tensor: np.ndarray, theirs: str, layout: Layout) -> np.ndarray:
    """Undoes `_halves`."""
    if theirs not in layout.rotated:
        return tensor
    halves = tensor.reshape(layout.heads, 2, len(tensor) // layout.heads // 2, -1)
    return np.swapaxes(halves, 1, 2).reshape(tensor.shape)
