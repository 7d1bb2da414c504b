"""What an open model takes of the machine that it would run on here, before anything is loaded: by arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import jax
from ml_collections import ConfigDict

from sora_jax.checkpoints.diffusers_folder import free_memory
from sora_jax.distributed.chips import Topology
from sora_jax.planner.counts import estimate_counts
from sora_jax.planner.estimate import ClipShape, clip_of
from sora_jax.planner.programs import estimate_memory, make_step_spec, objective_of

# Of a decoder's finest activation, how many are in memory at once: a residual block's input, what it normalized, its
# convolution's padded input and output. With what XLA keeps beside them `generate` was seen to take about as much.
_ACTIVATIONS = 4


@dataclasses.dataclass(frozen=True)
class HostNeeds:
    """Memory in bytes and operations, of making one video.

    Attributes:
      summary, licence: of the model.
      clip: the video.
      steps, passes: of the solver, and of the model in each.
      stages: the most that each stage takes; the text encoder's is freed before the next.
      weights: of the transformer and the autoencoder, which stay.
      free: what programs can still take on this machine.
      step_flops: of a step, all passes.
    """

    summary: str
    licence: str
    clip: ClipShape
    steps: int
    passes: int
    stages: dict[str, float]
    weights: dict[str, float]
    free: float
    step_flops: float

    @property
    def peak(self) -> float:
        return max(self.stages.values())

    @property
    def flops(self) -> float:
        """Of the whole video, without its text."""
        return self.steps * self.step_flops + self.clip.decode


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
    tiles, vae = sampler.bundle.vae.tiles, sampler.vae
    time, high, wide = vae.compression
    cells = tiles.shape(-(-clip.height // high), -(-clip.width // wide))
    finest = time * math.prod(cells) * high * wide / (vae.patch_size or 1) ** 2
    activation = 4.0 * finest * vae.decoder_widths[-1]
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
