"""T5 v1.1 and UMT5 encoders, streamed from their files layer by layer: 5.7 billion parameters in under 3 GB.

Text encoders of open video models: UMT5-XXL of Wan, T5-XXL of LTX-Video. Raffel et al. 2020 (arXiv:1910.10683), its
version 1.1 (Shazeer 2020, arXiv:2002.05202: gated GELU) and Chung et al. 2023 (arXiv:2304.09151: UMT5, whose layers
have a table of relative positions each). Files and numerics are those of transformers 5. Axis letters: `B` captions,
`M` (queries) and `N` (keys) text positions, `E` text width, `H` heads, `F` width of a head, `A` = H × F, `W` hidden
width of the MLP.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import UserError
from sora_jax.media.digests import array_digest, value_digest
from sora_jax.models.weights import map_weights, release

BATCH_TOKENS = 1024  # of a batch: what activations take stays under that of a layer's weights
_ARCHITECTURES = {
    "umt5": True,
    "t5": False,
    "mt5": False,
}  # by model_type: has each layer a table of positions?
_LAYER = {
    "attention_norm": "layer.0.layer_norm",
    "query": "layer.0.SelfAttention.q",
    "key": "layer.0.SelfAttention.k",
    "value": "layer.0.SelfAttention.v",
    "attention_out": "layer.0.SelfAttention.o",
    "positions": "layer.0.SelfAttention.relative_attention_bias",
    "mlp_norm": "layer.1.layer_norm",
    "mlp_gate": "layer.1.DenseReluDense.wi_0",
    "mlp_in": "layer.1.DenseReluDense.wi_1",
    "mlp_out": "layer.1.DenseReluDense.wo",
}
_PRECISE = {"attention_norm", "mlp_norm", "positions"}  # float32 whatever the products are
_TABLES = (
    "encoder.embed_tokens.weight",
    "shared.weight",
)  # where a file has both, transformers uses the first
_FINAL_NORM = "encoder.final_layer_norm.weight"


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder, under the names of a transformers `config.json`.

    Attributes:
      layer_positions: each layer has a table of relative positions of its own (UMT5), or all have the first one's.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    pad_token_id: int = 0
    eos_token_id: int = 1
    layer_positions: bool = True

    @classmethod
    def from_file(cls, path: pathlib.Path) -> T5Config:
        """Reads a `config.json`.

        Raises:
          UserError: it is missing or damaged, lacks a size, or is of another architecture.
        """
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            kind = settings.get("model_type")
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is missing: the model's folder is incomplete; fetch it again."
            ) from error
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path} can't be read ({error}): fetch it again.") from error
        if kind not in _ARCHITECTURES:
            raise UserError(
                f"{path} is of a model of type {kind!r}: a text encoder of type {', '.join(_ARCHITECTURES)} is needed."
            )
        # What files of T5 1.0 say, or leave out, as "relu" is the default there.
        usual = "gated-gelu" if kind == "umt5" else "relu"
        expected = {"dense_act_fn": "gelu_new", "is_gated_act": True, "is_decoder": False}
        given = {"feed_forward_proj": settings.get("feed_forward_proj", usual)}
        given |= {name: settings.get(name, value) for name, value in expected.items()}
        for name, value in {"feed_forward_proj": "gated-gelu", **expected}.items():
            if given[name] != value:
                raise UserError(
                    f"{path} has {name} {given[name]!r}: only encoders of T5 1.1 and UMT5, where it is {value!r}, "
                    "can be read."
                )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {name: settings[name] for name in fields if name in settings}
        for name, field in fields.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise UserError(f"{path} has no {name}: fetch it again.")
            kinds = (int, float) if field.type == "float" else (int,)
            if name in values and (not isinstance(values[name], kinds) or isinstance(values[name], bool)):
                raise UserError(f"{path} has {name} {values[name]!r}, which is no number: fetch it again.")
        return cls(**values | {"layer_positions": _ARCHITECTURES[kind]})

    def layer_shapes(self, layer: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """A layer's parameters by our names: each one's name in the file, and its shape there, [out, in]."""
        inner = self.num_heads * self.d_kv
        shapes: dict[str, tuple[int, ...]] = {
            "positions": (self.relative_attention_num_buckets, self.num_heads),
            "attention_out": (self.d_model, inner),
            "mlp_out": (self.d_model, self.d_ff),
            **dict.fromkeys(("attention_norm", "mlp_norm"), (self.d_model,)),
            **dict.fromkeys(("query", "key", "value"), (inner, self.d_model)),
            **dict.fromkeys(("mlp_gate", "mlp_in"), (self.d_ff, self.d_model)),
        }
        owner = {"positions": layer if self.layer_positions else 0}
        return {
            name: (f"encoder.block.{owner.get(name, layer)}.{_LAYER[name]}.weight", shape)
            for name, shape in shapes.items()
        }


class T5Encoder:
    """Token ids to states of the last layer. One layer's weights are in memory at a time.

    Attributes:
      config: its `T5Config`.
      dtype: of the products: "float32", or "bfloat16", where sums, norms, softmax and the residual stay float32.
    """

    def __init__(
        self,
        config: T5Config,
        tensors: Mapping[str, np.ndarray],
        dtype: str = "float32",
        keep: bool = False,
        place: str = "The text encoder's file",
    ) -> None:
        """Takes the tensors under the names of a transformers file, best from `map_weights`.

        Args:
          keep: layers stay on the device after their first use, which takes the memory of all of them.
          place: where the tensors are from, for errors.

        Raises:
          UserError: a tensor of the encoder is missing, of another shape, not of a floating type, or unknown.
        """
        self.config, self.dtype = config, dtype
        self._kept: dict[int, dict[str, jax.Array]] | None = {} if keep else None
        table = next((name for name in _TABLES if name in tensors), _TABLES[1])
        shapes = {table: (config.vocab_size, config.d_model), _FINAL_NORM: (config.d_model,)}
        for layer in range(config.num_layers):
            shapes |= dict(config.layer_shapes(layer).values())
        # A decoder's tensors, of a file of the whole model, are ignored; all that belongs to the encoder is checked.
        inside = {name for name in tensors if name.startswith("encoder.")} | (shapes.keys() & tensors.keys())
        for differing, verdict in (
            (shapes.keys() - inside, "lacks"),
            (inside - shapes.keys(), "holds more than config.json says,"),
        ):
            if differing:
                first, *rest = sorted(differing)
                more = f" and {len(rest)} more" if rest else ""
                raise UserError(f"{place} {verdict} {first!r}{more}: fetch it again.")
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise UserError(
                    f"{place} holds {name!r} of shape {tensors[name].shape} where config.json says {shape}: fetch both "
                    "again."
                )
            if not jnp.issubdtype(tensors[name].dtype, jnp.floating):
                raise UserError(
                    f"{place} holds {name!r} as {tensors[name].dtype}, which is no type for weights: fetch float32 or "
                    "bfloat16 ones."
                )
        self._tensors = {name: tensors[name] for name in shapes}
        self._table = table

    def __call__(self, ids_bm: np.ndarray, mask_bm: np.ndarray) -> np.ndarray:
        """Maps ids i32[B,M] and their mask bool[B,M] to states f32[B,M,E].

        Positions where the mask is false are attended to by none; their own states mean nothing.

        Raises:
          UserError: an id is outside of the vocabulary.
        """
        return self.encode([(ids_bm, mask_bm)])[0]

    def encode(self, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """`__call__` for batches of several shapes, with each layer read once for all of them."""
        scale = self._tensors[_FINAL_NORM].astype(np.float32)
        # After `_hidden`, since JAX gives back memory that it used where it is at one of its next operations.
        return [np.asarray(_norm(x, scale, self.config.layer_norm_epsilon)) for x in self._hidden(batches)]

    @functools.cached_property
    def digest(self) -> str:
        """Names the weights by names, types, shapes and the first numbers of each: reading all would take minutes."""
        first = array_digest(tensor.reshape(-1)[:1024] for tensor in self._tensors.values())
        shapes = [[name, tensor.shape] for name, tensor in self._tensors.items()]
        for tensor in self._tensors.values():
            release(tensor)
        return value_digest([dataclasses.asdict(self.config), shapes, first])

    def _hidden(self, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[jax.Array]:
        states = [self._embed(ids_bm) for ids_bm, _ in batches]
        room: dict[str, np.ndarray] = {}
        for layer in range(self.config.num_layers if batches else 0):
            weights = self._weights(layer, room)
            states = [
                _layer(weights, x_bme, mask_bm, self.config, self.dtype)
                for x_bme, (_, mask_bm) in zip(states, batches)
            ]
            jax.block_until_ready(states)  # before the next layer's weights take the same memory
        return states

    def _embed(self, ids_bm: np.ndarray) -> jax.Array:
        size = self.config.vocab_size
        if (outside := ids_bm[(ids_bm < 0) | (ids_bm >= size)]).size:
            raise UserError(
                f"The tokenizer gives the token {outside[0]} and the text encoder knows {size}: they are not of the "
                "same model."
            )
        rows_bme = self._tensors[self._table][ids_bm].astype(np.float32)  # only these rows are read
        release(self._tensors[self._table])
        return jnp.asarray(rows_bme)

    def _weights(self, layer: int, room: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A layer's weights, on the device.

        Each layer is read into the same memory, `room`, which JAX on CPUs computes from where it is: giving back a
        layer's memory and taking it again would cost more than the products for a short prompt.
        """
        if self._kept is not None and layer in self._kept:
            return self._kept[layer]
        weights = {}
        for name, (given, shape) in self.config.layer_shapes(layer).items():
            if self._kept is not None or name not in room:
                room[name] = _aligned(shape, "float32" if name in _PRECISE else self.dtype)
            weights[name] = self._read(given, room[name])
        if self._kept is not None:
            self._kept[layer] = weights
        return weights

    def _read(self, given: str, out: np.ndarray) -> jax.Array:
        np.copyto(out, self._tensors[given], casting="unsafe")
        release(self._tensors[given])
        return jax.device_put(out)


def _aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes, as JAX needs it to use it without copying."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(jnp.dtype(dtype)).reshape(shape)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _layer(
    weights: dict[str, jax.Array], x_bme: jax.Array, mask_bm: jax.Array, config: T5Config, dtype: str
) -> jax.Array:
    """One layer: self-attention, then a gated MLP, each of the normalised states and added to them (pre-norm)."""

    def linear(x: jax.Array, name: str, out: str = dtype) -> jax.Array:
        """Matrices are [out, in], as the file has them."""
        return jnp.einsum("bmi,oi->bmo", x.astype(dtype), weights[name], preferred_element_type=out)

    length = x_bme.shape[1]
    # Accelerators round the factors of f32 products by default; these states should not depend on it.
    with jax.default_matmul_precision("highest"):
        normed = _norm(x_bme, weights["attention_norm"], config.layer_norm_epsilon)
        q, k, v = (
            linear(normed, name).reshape(*x_bme.shape[:2], config.num_heads, config.d_kv)
            for name in ("query", "key", "value")
        )
        bias_mnh = weights["positions"][position_buckets(length, config)]
        # No scaling by √F: it is in the weights.
        logits_bhmn = jnp.einsum("bmhf,bnhf->bhmn", q, k, preferred_element_type=jnp.float32)
        logits_bhmn = jnp.where(
            mask_bm[:, None, None, :],
            logits_bhmn + bias_mnh.transpose(2, 0, 1),
            jnp.finfo(jnp.float32).min,  # not -inf: rows that pad a batch are masked whole
        )
        attended = jnp.einsum("bhmn,bnhf->bmhf", jax.nn.softmax(logits_bhmn).astype(dtype), v)
        x_bme = x_bme + linear(attended.reshape(*x_bme.shape[:2], -1), "attention_out", "float32")
        normed = _norm(x_bme, weights["mlp_norm"], config.layer_norm_epsilon)
        hidden_bmw = jax.nn.gelu(linear(normed, "mlp_gate"), approximate=True) * linear(normed, "mlp_in")
        return x_bme + linear(hidden_bmw, "mlp_out", "float32")


def position_buckets(length: int, config: T5Config) -> np.ndarray:
    """i[M,N]: which row of the table of positions holds for a query at m and a key at n.

    Half of the rows are for keys after the query. Of either half, half are for single distances, the rest for ranges
    that grow geometrically up to the largest distance, beyond which the last row holds.
    """
    rows = config.relative_attention_num_buckets // 2
    single = rows // 2
    distance_mn = np.arange(length)[None, :] - np.arange(length)[:, None]
    far_mn = np.maximum(np.abs(distance_mn), 1).astype(np.float32)
    # In float32 as PyTorch computes it, since the edges of ranges are powers of two that rounding could move.
    share_mn = np.log(far_mn / np.float32(single)) / np.float32(
        math.log(config.relative_attention_max_distance / single)
    )
    ranges_mn = single + (share_mn * np.float32(rows - single)).astype(np.int32)
    row_mn = np.where(np.abs(distance_mn) < single, np.abs(distance_mn), np.minimum(ranges_mn, rows - 1))
    return row_mn + rows * (distance_mn > 0)


def load_t5(folder: pathlib.Path, dtype: str = "float32", keep: bool = False) -> T5Encoder:
    """An encoder of a transformers folder, such as `text_encoder` of a diffusers pipeline.

    Raises:
      UserError: its `config.json` or weights are missing, damaged, or not those of a T5 1.1 or UMT5 encoder.
    """
    config = T5Config.from_file(folder / "config.json")
    file = folder / "model.safetensors"
    return T5Encoder(config, map_weights(file), dtype, keep, str(file))


def _norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Divides the last axis by its root mean square, in float32 (Raffel et al. 2020, section 2.1)."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * scale).astype(x.dtype)
