"""Our side of the table: each piece of work as a function to call, its layers counted, and what peers need of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from roofline import Layer, bert_layers, dit_layers, vae_layers

from sora_jax.checkpoints.store import named_leaves, restore_into
from sora_jax.models import bert
from sora_jax.models.dit import DiT
from sora_jax.models.dit_config import DiTConfig
from sora_jax.models.layers import fourier, rotary_angles
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.tokens.packing import PackedBatch, Segment, pack_batch
from sora_jax.tokens.patches import coordinates

WORDS = 16  # a run
SIGMA = 0.5  # of every token
WAN_WIDTHS = (12,)  # of diffusers' autoencoder: about our decoder's operations
WAN_PUBLISHED = 96  # sixty times as many: for small clips alone
SMALL = 5 * 64 * 64  # pixels
MINILM = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure. `works` of a part that has none of them are left out.

    Attributes:
      lengths: patches of the runs in the transformer's row, longest first.
      clips: (clips, frames, height, width) of the autoencoder's batches.
      captions: (captions, slots each).
      compile: whether PyTorch compiles what is our arithmetic.
    """

    works: tuple[str, ...]
    dtypes: tuple[str, ...]
    size: str
    lengths: tuple[int, ...]
    remat: str
    attention: str
    clips: tuple[tuple[int, int, int, int], ...]
    captions: tuple[int, int]
    compile: bool


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
      name: of the work, without its type.
      once: does it once.
      layers: of its forward pass.
      asked: what peers are told, the file of arrays aside.
      arrays: that file's content, float32: inputs, weights, and the expected result.
    """

    name: str
    work: str
    dtype: str
    once: Callable[[], Any]
    layers: list[Layer]
    asked: dict[str, Any]
    arrays: Callable[[], dict[str, np.ndarray]]


def dit_cases(options: Options) -> Iterator[Case]:
    """A forward pass as the sampler makes one, and a training step with AdamW, of one row."""
    config = DiTConfig(size=options.size, patch=(1, 1, 1), remat=options.remat, attention=options.attention)
    batch = jax.tree.map(jnp.asarray, _row(options.lengths, config))
    model = _build(lambda: DiT(config, rngs=nnx.Rngs(0)))
    sigma = jnp.full(batch.condition_segment_ids.shape, SIGMA).at[:, 0].set(0.0)
    target = jax.random.normal(jax.random.key(2), batch.patches.shape)
    asked = {
        "width": config.width,
        "layers": config.layers,
        "heads": config.heads,
        "lengths": options.lengths,
        "compile": options.compile,
    }
    layers = dit_layers(config, [length + WORDS for length in options.lengths])
    optimizer = optax.adamw(1e-4)

    # The row is an argument: of a constant, XLA would compute ahead what depends on nothing else.
    def forward(model: DiT, batch: PackedBatch, sigma: jax.Array) -> jax.Array:
        return model(batch.patches, batch, sigma)

    def step(state: tuple[DiT, Any], batch: PackedBatch, sigma: jax.Array, target: jax.Array) -> Any:
        model, kept = state
        loss = lambda model: jnp.mean(jnp.square(forward(model, batch, sigma) - target))
        updates, kept = optimizer.update(jax.grad(loss)(model), kept, model)
        return optax.apply_updates(model, updates), kept

    for work in ("forward", "training step"):
        for dtype in options.dtypes:
            if work not in options.works:
                continue
            typed = _typed(model, dtype)
            if work == "forward":
                once = _call(jax.jit(forward), typed, batch, sigma)
            else:
                copied = jax.tree.map(jnp.copy, typed)  # each step is given the last one's memory
                state = (copied, optimizer.init(copied))
                once = _iterate(jax.jit(step, donate_argnums=0), state, batch, sigma, target)

            def arrays() -> dict[str, np.ndarray]:
                told = _told(batch, config) | {"target": target[0]}
                expected = _exact(forward, _typed(model, "float32"), batch, sigma)[0]
                return _as_numpy(told | {"expected": expected} | _weights(model))

            yield Case(f"DiT-{options.size} {work}", work, dtype, once, layers, asked, arrays)


def vae_cases(options: Options) -> Iterator[Case]:
    """The autoencoder that a configuration has where it says nothing."""
    config = VAEConfig()
    model = _build(lambda: VAE(config, rngs=nnx.Rngs(0)))
    time, height, width = config.compression
    calls = {"encode": lambda vae, x: vae.encode(x)[0], "decode": lambda vae, x: vae.decode(x)}
    for clips, frames, rows, columns in options.clips:
        for work, call in calls.items():
            shape = (clips, frames, rows, columns, 3)
            if work == "decode":
                shape = (clips, 1 + (frames - 1) // time, rows // height, columns // width, config.channels)
            x = jax.random.normal(jax.random.key(1), shape)
            layers = vae_layers(config, work, clips, frames, rows, columns)
            small = clips * frames * rows * columns <= SMALL
            asked = {
                "config": dataclasses.asdict(config),
                "wan_widths": (*WAN_WIDTHS, WAN_PUBLISHED) if small else WAN_WIDTHS,
                "compile": options.compile,
            }
            for dtype in options.dtypes:
                if work not in options.works:
                    continue

                def arrays(call=call, x=x) -> dict[str, np.ndarray]:
                    expected = _exact(call, _typed(model, "float32"), x)
                    return _as_numpy({"input": x, "expected": expected} | _weights(model))

                once = _call(jax.jit(call), _typed(model, dtype), x)
                name = f"VAE {work} {clips}×{frames}×{rows}×{columns}"
                yield Case(name, work, dtype, once, layers, asked, arrays)


def text_cases(options: Options) -> Iterator[Case]:
    """MiniLM-L6's sizes; captions of half their slots to all of them. In use, ours is float32 alone."""
    captions, slots = options.captions
    model = _build(lambda: bert.Bert(MINILM, jax.random.key(0)))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, MINILM["vocab_size"], (captions, slots), dtype=np.int32)
    lengths = np.linspace(slots // 2, slots, captions).astype(int)
    mask = np.arange(slots) < lengths[:, None]
    layers = bert_layers(MINILM, captions, slots)

    def forward(model: bert.Bert, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return model(ids, mask)

    def arrays() -> dict[str, np.ndarray]:
        named = {}
        for name, leaf in named_leaves(model).items():
            path = name.replace("/", ".")
            published = bert._published_names(path, MINILM["num_hidden_layers"])
            for place, part in zip(published, leaf if path.startswith("layers.") else [leaf], strict=True):
                named[f"weights/{place}"] = part.T if path.endswith("kernel") else part
        expected = _exact(forward, model, ids, mask) * mask[..., None]
        return _as_numpy({"ids": ids, "mask": mask, "expected": expected} | named)

    for dtype in options.dtypes:
        if "forward" not in options.works:
            continue
        typed = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), model)
        once, name = _call(jax.jit(forward), typed, ids, mask), f"MiniLM-L6 {captions}×{slots}"
        asked = {"config": MINILM, "compile": options.compile}
        yield Case(name, "forward", dtype, once, layers, asked, arrays)


CASES = {"dit": dit_cases, "vae": vae_cases, "text": text_cases}


def _row(lengths: tuple[int, ...], config: DiTConfig) -> PackedBatch:
    rng = np.random.default_rng(0)
    noise = lambda *sides: rng.standard_normal(sides, np.float32)
    runs = [
        Segment(
            noise(n, config.patch_width),
            coordinates((1, 1, n), (1, 1, 1), fps=8.0),
            np.ones(n, np.float32),
            np.zeros(n, np.float32),
            noise(WORDS, config.text_width),
            np.zeros(WORDS, np.float32),
        )
        for n in lengths
    ]
    runs.sort(key=lambda run: -len(run.patches))
    return pack_batch([runs], 1, sum(lengths), WORDS * len(runs), len(runs))[0]


def _told(batch: PackedBatch, config: DiTConfig) -> dict[str, Any]:
    """The row as a list of runs, in the order in which it holds them, with the tables that a peer need not compute."""
    runs = batch.text.reshape(-1, WORDS, config.text_width)
    sizes = np.bincount(np.asarray(batch.segment_ids[0]))[1:]
    ends = np.cumsum(sizes)
    coords = [
        part
        for start, end in zip(ends - sizes, ends, strict=True)
        for part in (jnp.zeros((WORDS, 5)), batch.coords[0, start:end])
    ]
    cos, sin = rotary_angles(jnp.concatenate(coords)[None], config.width // config.heads, config.rope_periods)
    sigma = fourier(jnp.full(len(runs), SIGMA), 256, longest=4.0, shortest=2e-3)
    return {"patches": batch.patches[0], "words": runs, "sigma": sigma, "cos": cos[0], "sin": sin[0]}


def _build(model: Callable[[], Any]) -> Any:
    """Drawn by NumPy, which compiles nothing, and no parameter zero: it would hide what it takes part in."""
    template = jax.eval_shape(model)
    rng = np.random.default_rng(3)

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        noise = rng.standard_normal(shape, np.float32)
        if name.endswith("kernel"):  # of a convolution, or perhaps of all layers at once
            return jnp.asarray(noise / math.sqrt(math.prod(shape[:-1] if len(shape) == 5 else shape[-2:-1])))
        return jnp.asarray(0.02 * noise + name.endswith("scale"))

    return restore_into(
        template, {name: draw(name, leaf.shape) for name, leaf in named_leaves(template).items()}
    )


def _typed(model: Any, dtype: str) -> Any:
    """The same parameters, arithmetic in `dtype`."""
    config = dataclasses.replace(model.config, dtype=dtype)
    template = jax.eval_shape(lambda: type(model)(config, rngs=nnx.Rngs(0)))
    return jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(model))


def _weights(model: Any) -> dict[str, Any]:
    return {f"weights/{name}": leaf for name, leaf in named_leaves(model).items()}


def _as_numpy(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in arrays.items()}


def _exact(function: Callable[..., Any], *arguments: Any) -> Any:
    """Its result; accelerators round the factors of float32 products unless told not to."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(function)(*arguments)


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _iterate(function: Callable[..., Any], state: Any, *arguments: Any) -> Callable[[], Any]:
    kept = [state]

    def once() -> Any:
        kept[0] = function(kept[0], *arguments)
        return kept[0]

    return once
