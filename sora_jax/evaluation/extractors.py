"""Feature extractors by name: networks with their weights, run in batches of one size on all devices."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sora_jax.errors import UserError, nearest, user_path
from sora_jax.evaluation.metrics import frame_blocks
from sora_jax.evaluation.networks import efficientnet, i3d, inception, transformers
from sora_jax.evaluation.networks.layers import Weights, conv, loaded, resize
from sora_jax.media.digests import array_digest, file_digest, value_digest
from sora_jax.models.pickled import read_tensors

# Rises when features of the same weights change: statistics of before are refused then.
PROTOCOL = 1
_RANDOM_SIDE, _RANDOM_WIDTHS = 48, (16, 32, 32)

Kind = Literal["video", "image"]


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A frozen network that gives each clip, or each frame, a row of numbers.

    Attributes:
      name: what it is asked for by.
      label: what a figure made with it says of it.
      version: names its weights and how frames are prepared: what differs in it can't be compared.
      kind: whether a row belongs to a clip ("video") or to a frame ("image").
      width: D, numbers a row.
      least_frames: of a clip.
      prepare: frames f[B,Y,X,3] in 0..255 to what the network takes.
      network: (weights, prepared frames [B,S,S,3] or clips [B,T,S,S,3]) to rows f[B,D].
      weights: the network's.
      batch: clips or frames a device takes at once.
    """

    name: str
    label: str
    version: str
    kind: Kind
    width: int
    least_frames: int
    prepare: Callable[[jax.Array], jax.Array]
    network: Callable[[Weights, jax.Array], jax.Array]
    weights: Weights
    batch: int

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        """Rows f32[B,G,D] of clips uint8[B,T,Y,X,3]: G is 1 for a network of videos, T for one of images.

        Raises:
          UserError: the clips have too few frames.
        """
        count, frames, *size = clips.shape
        if frames < self.least_frames:
            raise UserError(
                f"{self.label} needs clips of at least {self.least_frames} frames, and these have {frames}."
            )
        blocks = frame_blocks([clips.reshape(-1, *size)], 1 << 20)
        prepare = _prepared(self.prepare)
        prepared = jnp.concatenate([prepare(block)[:number] for number, (block,) in blocks])
        if self.kind == "video":
            prepared = prepared.reshape(count, frames, *prepared.shape[1:])
        rows = np.concatenate([self._rows(prepared, i) for i in range(0, len(prepared), self._at_once)])
        return rows.reshape(count, -1, self.width)

    @functools.cached_property
    def _at_once(self) -> int:
        return self.batch * len(jax.devices())

    @functools.cached_property
    def _placed(self) -> Weights:
        return jax.device_put(self.weights, NamedSharding(_mesh(), PartitionSpec()))

    def _rows(self, prepared: jax.Array, start: int) -> np.ndarray:
        """The rows of a batch; a last one that is short is filled up, so that there is one program."""
        part = prepared[start : start + self._at_once]
        short = self._at_once - len(part)
        padded = jnp.pad(part, [(0, short)] + [(0, 0)] * (part.ndim - 1)) if short else part
        placed = jax.device_put(padded, NamedSharding(_mesh(), PartitionSpec("data")))
        return np.asarray(_split(self.network)(self._placed, placed))[: len(part)]


@functools.cache
def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",))


@functools.lru_cache(maxsize=16)  # so that extractors made again share what was compiled
def _prepared(prepare: Callable[[jax.Array], jax.Array]) -> Callable[[np.ndarray], jax.Array]:
    return jax.jit(lambda block: prepare(block.astype(jnp.float32)))


@functools.lru_cache(maxsize=16)
def _split(network: Callable[[Weights, jax.Array], jax.Array]) -> Callable[[Weights, jax.Array], jax.Array]:
    """The network with its batch split over all devices."""
    split, whole = PartitionSpec("data"), PartitionSpec()
    return jax.jit(
        jax.shard_map(network, mesh=_mesh(), in_specs=(whole, split), out_specs=split, check_vma=False)
    )


def load_extractor(name: str, path: str | pathlib.Path | None = None) -> Extractor:
    """The extractor of a name.

    Args:
      name: of `EXTRACTORS`.
      path: its local weights, which all but those that a package brings need.

    Raises:
      UserError: there is no such extractor, its weights aren't given or aren't its, or its package isn't installed.
    """
    if name not in EXTRACTORS:
        hint = nearest(name, EXTRACTORS)
        meant = f"did you mean {hint}?" if hint else f"choose one of {', '.join(EXTRACTORS)}."
        raise UserError(f"There are no features called {name!r}: {meant}")
    if path is not None and name.startswith("random"):
        raise UserError(f"The features {name} have no weights to be read: leave {path} out.")
    if path is None and name in NEED_WEIGHTS:
        raise UserError(
            f"The features {name} need local weights, {NEED_WEIGHTS[name]}: pass --weights {name}=PATH."
        )
    return EXTRACTORS[name](None if path is None else user_path(path))


def _i3d(path: pathlib.Path | None) -> Extractor:
    weights, digest, source = i3d.load_i3d(path)
    label = f"I3D (Kinetics-400) logits, weights of {source}, not compared with the reference port"
    return _extractor(
        "i3d", label, digest, "video", i3d.WIDTH, i3d.prepare, i3d.logits, weights, 4, i3d.LEAST_FRAMES
    )


def _efficientnet(path: pathlib.Path | None) -> Extractor:
    path = path or efficientnet.packaged()
    weights = loaded(efficientnet.convert, read_tensors(path), "EfficientNet-Lite0", str(path))
    label = "EfficientNet-Lite0 (ImageNet) features, not those of the standard protocol"
    network, prepare, width = efficientnet.features, efficientnet.prepare, efficientnet.WIDTH
    return _extractor("efficientnet", label, file_digest(path), "image", width, prepare, network, weights, 16)


def _inception(path: pathlib.Path | None) -> Extractor:
    path = _given(path)
    weights = loaded(inception.convert, read_tensors(path), "Inception-v3", str(path))
    label, width = f"Inception-v3 features, weights {path.name}", inception.WIDTH
    network, prepare = inception.features, inception.prepare
    return _extractor("inception", label, file_digest(path), "image", width, prepare, network, weights, 16)


def _clip(path: pathlib.Path | None) -> Extractor:
    folder, vision, weights = load_clip(path)
    prepare = functools.partial(transformers.prepare_clip, sizes=vision)
    network = functools.partial(transformers.clip_image, sizes=vision)
    label, width = f"CLIP image features, weights {folder.path.name}", weights["vision.projection"].shape[1]
    return _extractor("clip", label, file_digest(folder.file), "image", width, prepare, network, weights, 16)


def load_clip(path: str | pathlib.Path | None) -> tuple[transformers.Folder, transformers.Tower, Weights]:
    """(folder, sizes of the vision tower, weights of both towers) of a CLIP in a local folder."""
    folder = transformers.read_folder(_given(path), "clip")
    vision, text = transformers.clip_towers(folder.settings)
    convert = functools.partial(transformers.convert_clip, vision=vision, text=text)
    return folder, vision, loaded(convert, folder.tensors, "a CLIP of its config.json", str(folder.file))


def _dino(path: pathlib.Path | None) -> Extractor:
    folder = transformers.read_folder(_given(path), "vit")
    sizes = transformers.tower(folder.settings, hidden_act="gelu", layer_norm_eps=1e-12, patch_size=16)
    convert = functools.partial(transformers.convert_dino, sizes=sizes)
    weights = loaded(convert, folder.tensors, "a ViT of its config.json", str(folder.file))
    prepare = functools.partial(transformers.prepare_dino, sizes=sizes)
    network = functools.partial(transformers.dino, sizes=sizes)
    label, width = f"DINO features, weights {folder.path.name}", weights["vision.post.weight"].shape[0]
    return _extractor("dino", label, file_digest(folder.file), "image", width, prepare, network, weights, 16)


def _random(kind: Kind) -> Callable[[pathlib.Path | None], Extractor]:
    def make(_: pathlib.Path | None) -> Extractor:
        axes, rng, channels = 3 if kind == "video" else 2, np.random.default_rng(0), 3
        weights: Weights = {}
        for layer, width in enumerate(_RANDOM_WIDTHS):
            shape = (*(3,) * axes, channels, width)
            numbers = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
            weights[f"{layer}.kernel"], channels = jnp.asarray(numbers, jnp.float32), width
        label = f"features of an untrained network of {kind}s, for comparisons among themselves alone"
        digest, width = array_digest(weights.values()), 2 * channels
        return _extractor(
            f"random-{kind}", label, digest, kind, width, _random_prepare, _random_network, weights, 8
        )

    return make


def _random_prepare(frames: jax.Array) -> jax.Array:
    return resize(frames, _RANDOM_SIDE, _RANDOM_SIDE, antialias=True) / 127.5 - 1


def _random_network(weights: Weights, x: jax.Array) -> jax.Array:
    """Means and deviations over time and space of the last activations."""
    for layer in range(len(_RANDOM_WIDTHS)):
        x = jax.nn.relu(conv(weights, str(layer), x, 2 if layer else 1))
    axes = tuple(range(1, x.ndim - 1))
    return jnp.concatenate([x.mean(axes), x.std(axes)], -1)


def _extractor(
    name: str,
    label: str,
    digest: str,
    kind: Kind,
    width: int,
    prepare: Callable[[jax.Array], jax.Array],
    network: Callable[[Weights, jax.Array], jax.Array],
    weights: Weights,
    batch: int,
    least_frames: int = 1,
) -> Extractor:
    version = value_digest([PROTOCOL, name, digest])
    return Extractor(name, label, version, kind, width, least_frames, prepare, network, weights, batch)


def _given(path: str | pathlib.Path | None) -> pathlib.Path:
    if path is None:
        raise UserError("Local weights are needed and none are named: pass --weights NAME=PATH.")
    return user_path(path)


EXTRACTORS: Mapping[str, Callable[[pathlib.Path | None], Extractor]] = {
    "i3d": _i3d,
    "efficientnet": _efficientnet,
    "inception": _inception,
    "clip": _clip,
    "dino": _dino,
    "random-video": _random("video"),
    "random-image": _random("image"),
}
NEED_WEIGHTS = {
    "inception": "pytorch-fid's pt_inception-2015-12-05-6726825d.pth or another of that network",
    "clip": "the folder of a CLIP in transformers' layout",
    "dino": "the folder of a ViT in transformers' layout, such as facebook/dino-vitb16",
}
