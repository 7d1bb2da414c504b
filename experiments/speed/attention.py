"""Attention of packed rows: ours against what else there is, side by side on the machine at hand.

python experiments/speed/attention.py --json FILE [--tokens 32768 --heads 16 --head-width 72 --dtype bfloat16]

Each contender is first compared with the reference on a short row, output and gradients: one that mixes runs is named,
not timed. What isn't on this machine, or doesn't fit into its memory, is a line with the reason.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import itertools
import json
import pathlib
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.models.attention import dispatch, gpu

HERE = pathlib.Path(__file__).parent
MIXED = (0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.0078125)  # of a row, as run.py has them
SHORT = (201, 130, 97, 51)  # of 512 slots, the rest empty: what each contender is examined with
TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}  # of the largest number; float32 may be TF32
WORK = ("forward", "with gradient")

Contender = Callable[..., jax.Array]  # (q, k, v, segment_ids) -> output


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of `tokens` slots with runs of these lengths in it, the rest empty; heads of these."""

    lengths: tuple[int, ...]
    tokens: int
    heads: int
    width: int
    dtype: str

    def flops(self, work: str) -> float:
        """Worth doing: two products of Σ n² by the width, seven with gradients (two forward, five back)."""
        return 4.0 * self.width * self.heads * sum(n * n for n in self.lengths) * (1, 3.5)[WORK.index(work)]


@click.command()
@click.option("--json", "out", type=click.Path(path_type=pathlib.Path), help="Where to write the figures.")
@click.option("--tokens", default=32768)
@click.option("--heads", default=16)
@click.option("--head-width", "width", default=72)
@click.option("--dtype", default="bfloat16", type=click.Choice([*TOLERANCE]))
@click.option("--runs", default="mixed", help="mixed, one, or the lengths of the runs: 8192,8192,…")
@click.option("--repeats", default=5, help="The best of so many is told.")
@click.option("--sweep", is_flag=True, help="Our GPU kernel with other tiles too.")
def main(
    out: pathlib.Path | None,
    tokens: int,
    heads: int,
    width: int,
    dtype: str,
    runs: str,
    repeats: int,
    sweep: bool,
):
    """Prints milliseconds, TFLOP/s of work worth doing, and the ratio to ours."""
    case = Case(run_lengths(runs, tokens), tokens, heads, width, dtype)
    short = dataclasses.replace(case, lengths=SHORT, tokens=512)
    machine = jax.devices()[0].device_kind
    rows: dict[str, dict[str, Any]] = {}
    click.echo(f"{tokens:,} tokens, {len(case.lengths)} runs, {heads} heads of {width}, {dtype}, {machine}")
    click.echo(f"{'':34}{'':>14}{'ms':>10}{'TFLOP/s':>9}{'÷ ours':>8}")
    pairs = zip(contenders(case, sweep).items(), contenders(short, sweep).values())
    for ((name, contender), small), work in itertools.product(pairs, WORK):
        reason = examine(small, short, work)
        seconds = reason or seconds_of(contender, case, work, repeats)
        if isinstance(seconds, str):
            row: dict[str, Any] = {"reason": seconds}
            told = f"  {seconds}"
        else:
            row = {"ms": seconds * 1e3, "tflops": case.flops(work) / seconds / 1e12}
            told = f"{row['ms']:10.2f}{row['tflops']:9.2f}"
            ours = next(iter(rows.values()), {work: row}).get(work, row)  # the first contender
            if "ms" in ours:
                row["ratio"] = row["ms"] / ours["ms"]
                told += f"{row['ratio']:8.2f}"
        rows.setdefault(name, {})[work] = row
        click.echo(f"{name:34}{work:>14}{told}")
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
        ).stdout.strip(),
        "machine": machine,
        "jax": jax.__version__,
        **dataclasses.asdict(case),
        "rows": rows,
    }
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def run_lengths(runs: str, tokens: int) -> tuple[int, ...]:
    """Tokens of each run."""
    if runs in ("mixed", "one"):
        parts = MIXED if runs == "mixed" else (1.0,)
        lengths = tuple(int(tokens * part) for part in parts)
    else:
        lengths = tuple(int(length) for length in runs.split(","))
    if sum(lengths) > tokens or min(lengths) < 1:
        raise click.UsageError(
            f"Runs of {lengths} tokens don't fit into --tokens {tokens}: give other --runs."
        )
    return lengths


def contenders(case: Case, sweep: bool) -> dict[str, Contender | str]:
    """By name, the machine's own first; a sentence where one can't be had. They may know the runs' lengths."""
    here = jax.default_backend()
    on_gpu = here == "gpu"
    best = dispatch.choose("auto", case.dtype, case.width)
    found: dict[str, Contender | str] = {
        f"ours, {best}": dispatch.BACKENDS[best],
        "ours, reference": dispatch.reference,
    }
    if on_gpu and sweep and best == "gpu":
        for own, walked, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
            tile = gpu.BlockSizes(own, walked, warps, stages)
            tiled = functools.partial(gpu.flash, configs=gpu.KernelBlocks(tile, tile, tile))
            found[f"ours, {own}×{walked}, {warps} warps, {stages} stages"] = tiled
    found["jax.nn, mask, xla"] = functools.partial(masked, "xla")
    found["jax.nn, mask, cudnn"] = functools.partial(masked, "cudnn") if on_gpu else "needs an NVIDIA GPU"
    found["cudnn, packed"] = cudnn_packed(case.lengths) if on_gpu else "needs an NVIDIA GPU"
    found["jax's Pallas Triton op"] = pallas_op() if on_gpu else "needs an NVIDIA GPU"
    found["tokamax, mask"] = tokamax_op()
    return found


def masked(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    mask = ids[:, None, :, None] == ids[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def cudnn_packed(lengths: Sequence[int]) -> Contender | str:
    """cuDNN's layout of sequences one after another; JAX has it in private, and it may change."""
    try:
        module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        op, padding = module.dot_product_attention, module.MaskType.PADDING
    except (ImportError, AttributeError) as error:
        return f"not in this JAX: {error}"
    # One entry more than there are runs: it tells by their number whether rows are packed.
    sizes = jnp.array([[*lengths, -1]], jnp.int32)
    offsets = jnp.array([[0, *np.cumsum(lengths), -1]], jnp.int32)
    return lambda q, k, v, ids: op(
        q,
        k,
        v,
        q_seqlen=sizes,
        kv_seqlen=sizes,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=padding,
    )


def pallas_op() -> Contender | str:
    """JAX's own flash attention in Pallas with Triton, deprecated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            op = importlib.import_module("jax.experimental.pallas.ops.gpu.attention").mha
    except (ImportError, AttributeError) as error:
        return f"not in this JAX: {error}"
    return lambda q, k, v, ids: op(q, k, v, ids, sm_scale=q.shape[-1] ** -0.5)


def tokamax_op() -> Contender | str:
    try:
        op = importlib.import_module("tokamax").dot_product_attention
    except (ImportError, AttributeError) as error:
        return f"not installed: {error}"
    return lambda q, k, v, ids: op(q, k, v, mask=ids[:, None, :, None] == ids[:, None, None])


def examine(contender: Contender | str, case: Case, work: str) -> str | None:
    """Why this contender is not to be timed: absent, failing, or another result than the reference's."""
    if isinstance(contender, str):
        return contender
    arrays, ids = packed_row(case)
    try:
        got = jax.tree.leaves(compiled(contender, work)(*arrays, ids))
    except Exception as error:  # whatever a contender's library raises
        return f"fails: {first_line(error)}"
    exact = compiled(dispatch.reference, work)(*(x.astype(jnp.float32) for x in arrays), ids)
    filled = np.asarray(ids > 0)
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, jax.tree.leaves(exact)):
        ours, theirs = (np.asarray(x, np.float32)[filled] for x in (a, b))
        off = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if not off <= TOLERANCE[case.dtype]:  # not a number is wrong too
            return f"wrong: its {name} is off by {off:.0%} of the largest number, so it isn't timed"
    return None


def seconds_of(contender: Any, case: Case, work: str, repeats: int) -> float | str:
    """The least mean seconds of some calls in a row, the first not counted; or why there is none."""
    arrays, ids = packed_row(case)
    function = compiled(contender, work)

    def timed(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            result = function(*arrays, ids)
        jax.block_until_ready(result)
        return (time.perf_counter() - started) / calls

    try:
        timed(1)
        calls = max(1, min(50, int(0.2 / timed(1))))
        return min(timed(calls) for _ in range(repeats))
    except Exception as error:  # out of memory, mostly
        return f"fails: {first_line(error)}"


@functools.lru_cache
def compiled(contender: Contender, work: str) -> Callable[..., Any]:
    if work == "forward":
        return jax.jit(lambda q, k, v, back, ids: contender(q, k, v, ids))

    def gradients(q, k, v, back, ids):
        out, pull = jax.vjp(lambda q, k, v: contender(q, k, v, ids), q, k, v)
        return out, *pull(back)

    return jax.jit(gradients)


def packed_row(case: Case) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(q, k, v, the gradient that comes back) and segment ids; nothing comes back into empty slots."""
    ids = np.zeros((1, case.tokens), np.int32)
    ids[0, : sum(case.lengths)] = np.repeat(np.arange(1, len(case.lengths) + 1), case.lengths)
    keys = jax.random.split(jax.random.key(0), 4)
    drawn = [jax.random.normal(key, (1, case.tokens, case.heads, case.width)) for key in keys]
    drawn[3] = drawn[3] * (ids > 0)[:, :, None, None]
    return tuple(x.astype(case.dtype) for x in drawn), jnp.asarray(ids)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


if __name__ == "__main__":
    main()
