"""What a step does on one chip: operations, bytes, collectives; from the compiled program, or by arithmetic.

Attention's kernels are counted by arithmetic in both: the compiled program doesn't show them. Sequences are taken to be
full of clips of `config.video`'s duration, each with its caption; without it each to be one clip, the most attention.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from sora_jax.checkpoints.diffusers_folder import free_memory
from sora_jax.distributed.chips import Topology
from sora_jax.models.dit_config import DiTConfig, forward_flops, published_flops
from sora_jax.models.vae import reconstruction_flops
from sora_jax.planner.estimate import ClipShape, Counts, HostNeeds, clip_of
from sora_jax.planner.programs import (
    Built,
    StepSpec,
    estimate_memory,
    make_step_spec,
    objective_of,
    positions_of,
)
from sora_jax.train.finetune import FinetuneObjective

# Of a decoder's finest activation, how many are in memory at once: a residual block's input, what it normalized, its
# convolution's padded input and output. With what XLA keeps beside them `generate` was seen to take about as much.
_ACTIVATIONS = 4
# Products of a block of logits with a block of keys or values: two forward, seven in the two backward kernels, which
# recompute the logits.
FORWARD, BACKWARD = 2, 7
# Bytes of memory that a token's activations move in one layer, per number of the model's width and pass over it: about
# what compiled programs of the ladder do (experiments/scale). Arithmetic's only measured constant.
TRAFFIC = 140


def count(built: Built) -> Counts:
    """From the compiled program."""
    assert built.program is not None
    spec, program = built.spec, built.program
    network: dict[str, float] = {}
    for one in program.collectives:
        network[one.kind] = network.get(one.kind, 0.0) + one.sent * one.times
    _, attention, useful, tokens = _work(spec)
    return Counts(
        "compiler",
        program.flops,
        attention if program.kernels else 0.0,  # else it is among the products
        useful,
        program.bytes + (_attention_bytes(spec) if program.kernels else 0.0),
        network,
        sum(one.times for one in program.collectives),
        tokens,
        clips_of(spec),
    )


def estimate_counts(spec: StepSpec) -> Counts:
    """By arithmetic alone."""
    objective = objective_of(spec.config)
    products, attention, useful, tokens = _work(spec)
    if spec.config.objective == "vae":
        model = jax.eval_shape(objective.init, jax.random.key(0))
        weights = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
        shared = {"all-reduce": 2 * weights * (1 - 1 / spec.topology.count)}
        traffic = products / 50 + 10 * weights  # convolutions at fifty operations a byte
        return Counts("arithmetic", products, 0.0, useful, traffic, shared, 0, tokens)
    dit, sizes = objective.dit, spec.mesh
    passes, chips = _passes(spec), spec.topology.count
    if not isinstance(dit, DiTConfig):
        parameters = published_flops(dit, 1, 0, 1) / 2
    else:  # of the 18 a third computes modulations, once a condition; cross-attention has four more
        parameters = (18 + 4 * (dit.caption == "cross")) * dit.width**2 * dit.layers
    positions = spec.batch_size * spec.passes * positions_of(spec)
    own = positions / (sizes["data"] * sizes["fsdp"] * sizes["sequence"])
    kept = chips / sizes["data"]
    gathered = 2 * parameters / sizes["tensor"]
    learned = _lora_parameters(objective) or parameters
    traffic = passes * (gathered + TRAFFIC * own * dit.width * dit.layers)
    # Activations go forward, backward, and once more where the forward pass is recomputed; weights are gathered twice.
    directions, times = (1, 1) if spec.step == "sample" else (2 + (dit.remat == "none"), 2)
    width = 2 * own * dit.width * dit.layers
    tensor, sequence = sizes["tensor"], sizes["sequence"]
    network = {
        "all-gather": times * gathered * (1 - 1 / kept) if kept > 1 else 0.0,
        "all-to-all": 4 * directions * width / tensor * (1 - 1 / sequence),
        "all-reduce": 4 * directions * width * (1 - 1 / tensor),
    }
    if spec.step == "train":
        traffic += 40 * learned / kept  # moments, averages and parameters, read and written
        # Over copies of the model a TPU's compiler sums gradients whole.
        kind, twice = ("all-reduce", 2) if sizes["data"] > 1 else ("reduce-scatter", 1)
        network[kind] = network.get(kind, 0.0) + twice * (2 * learned / tensor) * (
            1 - 1 / (kept * sizes["data"])
        )
    return Counts(
        "arithmetic", products, attention, useful, traffic + _attention_bytes(spec), network, 0, tokens
    )


def clips_of(spec: StepSpec) -> int:
    """How many clips the batch of a step holds."""
    clip = clip_of(spec)
    return spec.batch_size * (_segments(spec, clip) if clip else 1)


def _segments(spec: StepSpec, clip: ClipShape) -> int:
    """How many clips a sequence holds."""
    row = spec.config.pipeline
    return max(min(row.seq_len // clip.tokens, row.get("max_segments") or row.seq_len), 1)


def _passes(spec: StepSpec) -> int:
    """Products in forward passes: one of a sampler; of training `_directions`, and one more where it is recomputed."""
    if spec.step == "sample":
        return 1
    objective = objective_of(spec.config)
    return _directions(objective) + (objective.dit.remat == "none")


def _directions(objective: Any) -> int:
    """Forward, and backward to the layers before; to their weights too, but below a LoRA."""
    return 2 if _lora_parameters(objective) else 3


def _lora_parameters(objective: Any) -> int:
    """How many numbers a LoRA has; 0: none is trained."""
    if not isinstance(objective, FinetuneObjective) or not objective.lora.rank:
        return 0
    return sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(objective.init, jax.random.key(0)))
    )


def _work(spec: StepSpec) -> tuple[float, float, float, float]:
    """Products and attention that are run, and useful operations, on a chip; tokens of the whole step."""
    objective, chips = objective_of(spec.config), spec.topology.count
    if spec.config.objective == "vae":
        loss = objective.loss_config
        T, Y, X = loss.crop
        cost = 3 * reconstruction_flops(objective.vae, spec.batch_size, T, Y, X) / chips
        time, height, width = objective.vae.compression
        cells = spec.batch_size * (1 + (T - 1) // time) * (Y // height) * (X // width)
        return cost, 0.0, cost, float(cells)
    dit, row = objective.dit, spec.config.pipeline
    clip = clip_of(spec)
    segments = _segments(spec, clip) if clip else 1
    tokens, words = (clip.tokens, clip.words) if clip else (row.seq_len, row.text_len)
    words = min(words, row.text_len // segments)
    # States of pictures are projected and reached across as a caption's are.
    pictures = row.get("picture_len", 0)
    sequences = spec.batch_size * spec.passes / chips
    factor = _directions(objective) if spec.step == "train" else 1
    attention_pairs = sequences * segments * (tokens + dit.text_positions(words)) ** 2
    flops = forward_flops if isinstance(dit, DiTConfig) else published_flops
    inside, beside = (tokens, words + pictures) if dit.caption == "cross" else (tokens + words, 0)
    useful = factor * sequences * segments * flops(dit, inside, inside**2, beside, tokens * beside)
    positions = sequences * positions_of(spec)
    # Cross-attention is dense, in plain products.
    beside = sequences * (row.text_len + pictures) if dit.caption == "cross" else 0.0
    passes = _passes(spec)
    once = flops(dit, 0, attention_pairs)
    kernels = 1 if spec.step == "sample" else 1 + (dit.remat == "none") + BACKWARD / FORWARD
    products = passes * flops(dit, positions, 0, beside, row.seq_len * beside)
    return products, kernels * once, useful, spec.batch_size * float(segments * tokens)


def _attention_bytes(spec: StepSpec) -> float:
    """Of attention's kernels, which a program doesn't show: keys and values, read again for each block of queries."""
    if spec.config.objective == "vae":
        return 0.0
    _, attention, _, _ = _work(spec)
    # A block of 512 queries reads each byte of keys and values once, 2 operations a byte.
    return attention / 512


def host_needs(config: ConfigDict) -> HostNeeds:
    """Of a `published.published_config`.

    Raises:
      UserError: the folder's settings can't be read.
    """
    spec = make_step_spec(config, "sample", Topology("cpu:1", "cpu", 1))
    sampler, clip = objective_of(config), clip_of(spec)
    assert clip is not None
    parts = estimate_memory(spec).memory
    counts = estimate_counts(spec)
    size = lambda tree: float(
        sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    )
    weights = {"transformer": parts["parameters"], "autoencoder": size(sampler.bundle.vae)}
    kept = sum(weights.values())
    text = json.loads((pathlib.Path(config.pretrained) / "text_encoder" / "config.json").read_text())
    inner = text["num_heads"] * text["d_kv"]
    layer = text["d_model"] * (4 * inner + 3 * text["d_ff"])
    activation = sampler.decoding_bytes(clip.frames, clip.height, clip.width)
    stages = {
        # A layer as it is read and as it is computed with, in float32.
        "text": 2 * 4.0 * layer,
        "sampling": kept + parts["batch"] + parts["temporaries"],
        "decoding": kept + _ACTIVATIONS * activation + 3.0 * clip.frames * clip.height * clip.width,
    }
    card = sampler.bundle.card
    return HostNeeds(
        card["summary"],
        card["licence"],
        clip,
        config.video.steps,
        config.video.passes,
        stages,
        weights,
        free_memory(),
        counts.products + counts.attention,
    )
