"""What a piece of work must at least cost on this machine: operations and bytes, counted layer by layer.

Counted are the matrix products and convolutions. A layer reads its parameters and its input once and writes its
output once; what stands between two of them (norms, activations, modulation, folds) is thought to ride along, in
the same pass. So the bound is a lower one: nothing is thought to stay in a cache from one layer to the next, and
nothing to be read twice.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sora_jax.models.conv import causal_conv
from sora_jax.models.dit_config import DiTConfig
from sora_jax.models.vae import VAEConfig


class Layer(NamedTuple):
    """Floating-point operations, parameters, and numbers that go in and out, of one pass."""

    flops: float
    parameters: float
    moved: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Williams, Waterman and Patterson 2009: no work is faster than its operations, or its bytes, allow.

    Attributes:
      flops, bytes: of the work.
      peak, bandwidth: of the machine, a second.
    """

    flops: float
    bytes: float
    peak: float
    bandwidth: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes

    @property
    def compute_seconds(self) -> float:
        return self.flops / self.peak

    @property
    def memory_seconds(self) -> float:
        return self.bytes / self.bandwidth

    @property
    def seconds(self) -> float:
        """The bound."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def limit(self) -> str:
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"

    def sentence(self, taken: float) -> str:
        """What limits work that took so many seconds, in words."""
        return (
            f"{self.flops / 1e9:.3g} GFLOP over {self.bytes / 1e9:.3g} GB is {self.intensity:.0f} FLOP/byte, and the "
            f"machine balances at {self.peak / self.bandwidth:.0f}: {self.limit} limits it, "
            f"{self.compute_seconds:.3g} s by compute and {self.memory_seconds:.3g} s by memory; it takes "
            f"{taken / self.seconds:.1f} times the bound."
        )


def roofline(
    layers: Sequence[Layer], dtype: str, peak: float, bandwidth: float, training: bool = False
) -> Roofline:
    """The bound of one pass through `layers`, or of a training step with AdamW.

    Parameters are float32 whatever `dtype`, that of the activations. A training step has three passes' operations and
    activations (backward, each product becomes two, and the gradients move as the activations did). It moves its
    parameters ten times: read in both passes, their gradients written; read p, g, m, v and written p, m, v by AdamW.
    """
    flops, parameters, moved = (float(sum(column)) for column in zip(*layers, strict=True))
    passes, copies = (3, 10) if training else (1, 1)
    width = jnp.dtype(dtype).itemsize
    return Roofline(passes * flops, 4 * copies * parameters + width * passes * moved, peak, bandwidth)


def linear(rows: float, width_in: int, width_out: int, taps: int = 1) -> Layer:
    """A matrix product, or a convolution of `taps`, which reads its input once too."""
    matrix = float(taps * width_in * width_out)
    return Layer(2 * rows * matrix, matrix, rows * (width_in + width_out))


def dit_layers(config: DiTConfig, lengths: Iterable[int]) -> list[Layer]:
    """Of a forward pass over runs of so many tokens, words included; the operations are `dit_config.forward_flops`'."""
    D, P = config.width, config.patch_width
    lengths = list(lengths)
    n, pairs = sum(lengths), float(sum(length * length for length in lengths))
    block = [
        Layer(0.0, 6.0 * D * D, 0.0),  # modulation: a table's few rows
        linear(n, D, 3 * D),
        Layer(4 * pairs * D, 0.0, 4.0 * n * D),
        linear(n, D, D),
        linear(n, D, config.mlp_ratio * D),
        linear(n, config.mlp_ratio * D, D),
    ]
    return [linear(n, P, D), *block * config.layers, linear(n, D, P)]


def vae_layers(config: VAEConfig, work: str, clips: int, frames: int, height: int, width: int) -> list[Layer]:
    """Of "encode" or "decode"; the operations of both add up to `vae.reconstruction_flops`."""
    encode = work == "encode"
    widths = config.encoder_widths if encode else config.decoder_widths
    blocks = config.encoder_blocks if encode else config.decoder_blocks
    cells = float(clips * (frames + config.compression[0] - 1) * height * width)
    layers, before = [], 3
    for stride, after, count in zip(config.strides, widths, blocks, strict=True):
        cells /= math.prod(stride)
        layers += [linear(cells, math.prod(stride) * before, after)]
        layers += [linear(cells, after, after, taps=27)] * 2 * count
        before = after
    return [*layers, linear(cells, before, (2 if encode else 1) * config.channels)]


def bert_layers(settings: Mapping[str, Any], captions: int, slots: int) -> list[Layer]:
    """Of a forward pass over captions padded to `slots`, padding counted; the words' table is not."""
    D, hidden = settings["hidden_size"], settings["intermediate_size"]
    n = captions * slots
    layer = [
        *[linear(n, D, D)] * 4,
        Layer(4.0 * n * slots * D, 0.0, 4.0 * n * D),
        linear(n, D, hidden),
        linear(n, hidden, D),
    ]
    return layer * settings["num_hidden_layers"]


def compute_peak(dtype: str, repeats: int = 10) -> float:
    """Operations a second of a plain matrix product or convolution, the fastest of a few: no bound may be beaten."""
    products, cells = ((4224, 384, 1536), (2048, 1024, 1024), (1472, 768, 192)), 16
    if jax.default_backend() != "cpu":
        products, cells = ((8192, 8192, 8192), (16384, 4096, 4096)), 128
    product, convolution = jax.jit(jnp.matmul), jax.jit(causal_conv)
    speeds = []
    for rows, inner, columns in products:
        a, b = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
        flops = linear(rows, inner, columns).flops
        speeds.append(flops / best(lambda a=a, b=b: product(a, b), repeats))
    x, kernel = jnp.ones((1, 6, cells, cells, 160), dtype), jnp.ones((3, 3, 3, 160, 160), dtype)
    flops = linear(4 * cells * cells, 160, 160, taps=27).flops
    return max(*speeds, flops / best(lambda: convolution(x, kernel), repeats))


def memory_bandwidth(mebibytes: int = 256, repeats: int = 5) -> float:
    """Bytes a second, read and written, of a plain copy of an array.

    The copy is negated and goes where the array lay (its buffer is donated): so no time goes into fetching fresh
    pages from the operating system, and no compiler leaves the copy out.
    """
    state = [jnp.ones(mebibytes << 18, jnp.float32)]
    negate = jax.jit(jnp.negative, donate_argnums=0)

    def once() -> Any:
        state[0] = negate(state[0])
        return state[0]

    return 2 * (mebibytes << 20) / best(once, repeats)


def best(function: Callable[[], Any], repeats: int) -> float:
    """Least seconds, the first call not counted."""
    seconds(function)
    return min(seconds(function) for _ in range(repeats))


def seconds(function: Callable[[], Any]) -> float:
    """Of one call, its result waited for."""
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started
