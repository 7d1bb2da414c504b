"""Counts to seconds, days and money: a roofline with named assumptions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sora_jax.config import component
from sora_jax.distributed.chips import Topology
from sora_jax.errors import UserError
from sora_jax.media.video import frame_size
from sora_jax.models.tiles import TILES
from sora_jax.models.vae import VAEConfig, decoding_flops
from sora_jax.planner.programs import Built, StepSpec, objective_of, target_of
from sora_jax.planner.published import PublishedSampler

DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of one step on one chip.

    Attributes:
      source: "compiler", or "arithmetic".
      products: operations of matrix products and convolutions that are run, without attention's.
      attention: operations of attention.
      useful: operations that a forward pass and, in training, twice as many backward cost at least: no
        rematerialisation, no padding.
      bytes: read from memory and written.
      network: bytes sent to other chips, by kind of collective.
      calls: how many collectives.
      tokens: without padding, that the whole step, on all chips, trains on or denoises; an autoencoder's latent cells.
      clips: of `config.video`'s duration, that they make up.
    """

    source: str
    products: float
    attention: float
    useful: float
    bytes: float
    network: dict[str, float]
    calls: int
    tokens: float
    clips: int = 1


@dataclasses.dataclass(frozen=True)
class ClipShape:
    """The video of `config.video`, as tokens.

    Attributes:
      frames, height, width: of its pixels.
      tokens: of the transformer.
      words: text tokens.
      decode: operations to decode it, in tiles.
    """

    frames: int
    height: int
    width: int
    tokens: int
    words: int
    decode: float


def clip_of(spec: StepSpec) -> ClipShape | None:
    """The clip of `config.video`; None where a configuration has none."""
    config, video = spec.config, target_of(spec.config)
    if video is None:
        return None
    objective = objective_of(config)
    dit, is_published = objective.dit, isinstance(objective, PublishedSampler)
    vae = objective.vae if is_published else component(VAEConfig, video.vae, "video.vae")
    height, width = frame_size(video.resolution, video.aspect)
    stride = vae.compression[0]
    frames = 1 + stride * math.ceil((video.seconds * video.fps - 1) / stride)
    grid = [
        math.ceil(side / (pixels * by))
        for side, pixels, by in zip((height, width), vae.compression[1:], dit.patch[1:], strict=True)
    ]
    tokens = (1 + (frames - 1) // stride) // dit.patch[0] * math.prod(grid)
    cells = [count * by for count, by in zip(grid, dit.patch[1:], strict=True)]
    pixels = [count * by for count, by in zip(cells, vae.compression[1:], strict=True)]
    if tokens > config.pipeline.seq_len:
        raise UserError(
            f"A clip of config.video is {tokens:,} tokens and a sequence holds {config.pipeline.seq_len:,}: make "
            "config.pipeline.seq_len at least as many, or the clip shorter or smaller."
        )
    if is_published:
        decode = objective.decoding_flops(frames, *pixels) * objective.bundle.vae.tiles.cost(*cells)
    else:
        decode = decoding_flops(vae, 1, frames, *pixels) * TILES.cost(*cells)
    words = min(config.text.max_tokens, config.pipeline.text_len)
    return ClipShape(frames, height, width, tokens, words, decode)


@dataclasses.dataclass(frozen=True)
class HostNeeds:
    """What an open model takes of the machine that it runs on: bytes and operations of making one video.

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


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Share of its peak that a chip reaches. Nothing here was measured by us on a TPU.

    Attributes:
      products: of its peak, in matrix products.
      attention: of its peak, in attention's kernels.
      memory: of its bandwidth.
      network: of its links' bandwidth.
      hidden: the share of the collectives' time that is overlapped with compute.
    """

    products: float = 0.65
    attention: float = 0.45
    memory: float = 0.8
    network: float = 0.7
    hidden: float = 0.5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0.0 if field.name == "hidden" else 0.01
            if not least <= getattr(self, field.name) <= 1:
                raise UserError(f"The assumption {field.name}={getattr(self, field.name)} is no share of 1.")


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """Time of a step.

    Attributes:
      compute, memory, network: seconds of each alone, with the assumptions.
      seconds: of a step: the larger of the first two, and what of the third isn't hidden.
      bound: "compute", "memory" or "network", the one that takes longest.
      best: seconds with every chip at its peak and full overlap: a lower bound.
      utilisation: useful operations a second, of the peak.
      tokens_a_day: of the whole topology, trained on or generated.
    """

    compute: float
    memory: float
    network: float
    seconds: float
    bound: str
    best: float
    utilisation: float
    tokens_a_day: float


def estimate(counts: Counts, topology: Topology, assumptions: Assumptions, steps: int = 1) -> StepEstimate:
    """The roofline of a step; `steps` of them make a token (a sampler's)."""
    chip, sent = topology.chip, sum(counts.network.values())
    assert chip is not None
    links = chip.links(topology.count)
    compute = (counts.products / assumptions.products + counts.attention / assumptions.attention) / chip.flops
    memory = counts.bytes / (chip.bandwidth * assumptions.memory)
    network = sent / (links * assumptions.network)
    seconds = max(compute, memory) + (1 - assumptions.hidden) * network
    best = max((counts.products + counts.attention) / chip.flops, counts.bytes / chip.bandwidth, sent / links)
    longest = max(("compute", compute), ("memory", memory), ("network", network), key=lambda one: one[1])
    return StepEstimate(
        compute,
        memory,
        network,
        seconds,
        longest[0],
        best,
        counts.useful / seconds / chip.flops,
        counts.tokens / (seconds * steps) * DAY,
    )


@dataclasses.dataclass(frozen=True)
class Bill:
    """Days and money.

    Attributes:
      what: "training" or "a video".
      seconds: of all chips.
      dollars: for that.
      tokens: trained on, or generated.
    """

    what: str
    seconds: float
    dollars: float
    tokens: float


def bill(
    spec: StepSpec,
    counts: Counts,
    step: StepEstimate,
    dollars: float,
    tokens: float | None,
    assumptions: Assumptions,
) -> Bill | None:
    """What the whole run costs: training's budget of tokens, or one video; None where no video is named.

    Args:
      dollars: an hour of one chip.
      tokens: of training; None is `config.steps` steps.
    """
    chip = spec.topology.chip
    assert chip is not None
    if spec.step == "train":
        total = tokens if tokens is not None else spec.config.steps * counts.tokens
        seconds = total / counts.tokens * step.seconds
        return Bill("training", seconds, seconds * spec.topology.chips * dollars / 3600, total)
    clip, target = clip_of(spec), target_of(spec.config)
    if clip is None or target is None:
        return None
    # Videos are generated in parallel; each is decoded by the devices that made it, tile by tile.
    share = spec.topology.count / counts.clips
    seconds = target.steps * step.seconds + clip.decode / share / (chip.flops * assumptions.products)
    return Bill("a video", seconds, seconds * share / chip.devices * dollars / 3600, clip.tokens)


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """The estimate of one step; `as_dict` is machine-readable.

    Attributes:
      name: of the configuration.
      memory: bytes on a chip by kind, see `programs.Built`.
      word: "compiler" where memory and counts come from the compiled program, else "arithmetic".
      compiling: seconds.
      change: configuration that makes it fit, where it doesn't.
      changed: memory a chip with it, by kind.
    """

    name: str
    spec: StepSpec
    fits: bool
    memory: dict[str, float]
    word: str
    compiling: float
    counts: Counts | None = None
    estimate: StepEstimate | None = None
    bill: Bill | None = None
    clip: ClipShape | None = None
    change: str = ""
    changed: dict[str, float] = dataclasses.field(default_factory=dict)

    def with_change(self, words: str, built: Built | None) -> PlannedStep:
        """This estimate, with the change that makes it fit."""
        return dataclasses.replace(self, change=words, changed=built.memory if built else {})

    @property
    def room(self) -> float | None:
        """Bytes that a chip has."""
        return self.spec.topology.chip.memory if self.spec.topology.chip else None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text."""
        whole: dict[str, Any] = {
            "config": self.name,
            "step": self.spec.step,
            "topology": self.spec.topology.name,
            "chips": self.spec.topology.chips,
            "devices": self.spec.topology.count,
            "mesh": self.spec.mesh,
            "batch_size": self.spec.batch_size,
            "fits": self.fits,
            "memory_bytes": self.memory,
            "memory_room_bytes": self.room,
            "memory_by": self.word,
            "compiled_in_seconds": round(self.compiling, 1),
            "change": self.change,
            "memory_bytes_then": self.changed,
        }
        for name in ("counts", "estimate", "bill", "clip"):
            part = getattr(self, name)
            whole[name] = None if part is None else dataclasses.asdict(part)
        return whole


def plan_step(
    name: str,
    built: Built,
    counts: Counts | None,
    dollars: float | None,
    tokens: float | None,
    assumptions: Assumptions,
) -> PlannedStep:
    """The estimate of a step from its compiled program, or from arithmetic."""
    spec, chip = built.spec, built.spec.topology.chip
    word = "compiler" if built.program or counts is None else "arithmetic"
    plan = PlannedStep(name, spec, built.fits, built.memory, word, built.seconds, counts, clip=clip_of(spec))
    if counts is None or chip is None:
        return plan
    target = target_of(spec.config) if spec.step == "sample" else None
    step = estimate(counts, spec.topology, assumptions, target.steps if target else 1)
    price = chip.dollars if dollars is None else dollars
    costs = bill(spec, counts, step, price, tokens, assumptions)
    return dataclasses.replace(plan, estimate=step, bill=costs)
