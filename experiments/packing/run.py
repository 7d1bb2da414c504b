"""Padding, buckets or packing: the same model, stream and budget of slots a step. See README.md.

    python experiments/packing/run.py --json experiments/packing/packing.json

Each way runs in a process of its own, so that compilations and memory are its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
import platform
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click
import jax
import numpy as np
from packers import PACKERS, Capacity
from streams import ROOT, STREAMS, Stream
from ways import WAYS, batches

from sora_jax.models.dit_config import DiTConfig, forward_flops
from sora_jax.tokens.packing import PackedBatch, Segment

HERE = pathlib.Path(__file__).parent
SLOTS = 4096  # a step's, for every way
AHEAD = 3000  # clips that are read before the clock starts, so that every way is past its beginning
SAMPLE = 1000  # clips whose batches are measured
# Text tokens and segments of a packed sequence: enough that tokens are what fills it.
ROOMS = {"toyworld": (320, 32), "web": (256, 32), "hostile": (1024, 128)}
# Buckets' latent frames: a clip is cut to the longest that it fills, as Open-Sora does. All of toyworld's are there.
LENGTHS = (1, 3, 5, 7, 10, 14, 20, 31)
# Padding as most codes run it, whose attention computes every pair of a padded sequence and masks what it doesn't want.
ALL_PAIRS = "padding, all pairs"


@click.command()
@click.option("--json", "out", type=click.Path(path_type=pathlib.Path), help="Where to write the figures.")
@click.option("--stream", "names", multiple=True, type=click.Choice([*STREAMS]), help="Default: all.")
@click.option("--way", "chosen", multiple=True, type=click.Choice([ALL_PAIRS, *WAYS]), help="Default: all.")
@click.option("--size", default="Ti", help="Of the transformer, see models/dit.py.")
@click.option("--seconds", default=60.0, help="Of training steps, for each stream and way.")
@click.option("--segments", default=4000, help="Segments that packers are compared on; 0: not.")
@click.option("--one", hidden=True, help="stream:way: measure that alone, and print it.")
def main(
    out: pathlib.Path | None,
    names: tuple[str, ...],
    chosen: tuple[str, ...],
    size: str,
    seconds: float,
    segments: int,
    one: str | None,
) -> None:
    """Prints a table of packers and a table of ways to batch."""
    if one:
        stream, way = one.split(":")
        click.echo(json.dumps(measure(stream, way, size, seconds)))
        return
    names = names or tuple(STREAMS)
    result: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "jax": jax.__version__,
        "size": size,
        "slots": SLOTS,
        "packers": compare_packers(names, segments) if segments else {},
        "ways": {},
    }
    click.echo(
        f"\n{'stream':9} {'way':18} {'real':>6} {'a clip':>7} {'useful/s':>9} {'packing':>8} {'counted':>8} "
        f"{'compile':>12} {'peak':>8}"
    )
    for stream in names:
        rows = {way: _apart(stream, way, size, seconds) for way in chosen or (ALL_PAIRS, *WAYS)}
        result["ways"][stream] = rows
        for way, row in rows.items():
            ratios = {
                name: f"{rows['packing'][name] / row[name]:7.2f}×" if "packing" in rows else f"{'–':>8}"
                for name in ("useful_a_second", "useful_a_gflop")
            }
            click.echo(
                f"{stream:9} {way:18} {row['real']:6.1%} {row['tokens_a_clip']:7.0f} "
                f"{row['useful_a_second']:9.0f} {ratios['useful_a_second']} {ratios['useful_a_gflop']} "
                f"{row['compile_seconds']:6.1f} s/{row['compilations']:<3} {row['peak_mib']:5.0f} MiB"
            )
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
        plot(result, out.with_suffix(".png"))


def compare_packers(names: tuple[str, ...], segments: int) -> dict[str, dict[str, float]]:
    """Share of slots filled by each packer, by number of open sequences."""
    table: dict[str, dict[str, float]] = {}
    click.echo(f"{'share of slots filled, %':24}" + "".join(f"{name:>24}" for name in names))
    for packer, pack in PACKERS.items():
        for window in (16, 64, 256):
            label, filled = f"{packer}, {window} rows", {}
            for name in names:
                sizes = [(shape.tokens, shape.text_tokens) for shape in Stream(name).shapes(segments)]
                if sum(tokens for tokens, _ in sizes) < 3 * window * SLOTS:
                    continue  # too few to tell: what is open at the end would count
                sequences = list(pack(sizes, Capacity(SLOTS, *ROOMS[name]), window))[:-window]
                filled[name] = sum(tokens for sequence in sequences for tokens, _ in sequence) / (
                    len(sequences) * SLOTS
                )
            table[label] = filled
            cells = (f"{filled[name]:24.1%}" if name in filled else f"{'–':>24}" for name in names)
            click.echo(f"{label:24}" + "".join(cells))
    return table


def measure(stream: str, way: str, size: str, seconds: float) -> dict[str, Any]:
    """Trains for so many seconds of steps; compilations are timed apart."""
    from sora_jax.config import component
    from sora_jax.train.dit import DiTObjective
    from sora_jax.train.loop import make_steps
    from sora_jax.train.optim import OptimConfig

    config = runpy.run_path(str(ROOT / "configs" / "toyworld_dit.py"))["get_config"](size)
    segments = Stream(stream, LENGTHS if way == "buckets" else ())
    longest, words = (
        max(sizes) for sizes in zip(*((s.tokens, s.text_tokens) for s in segments.shapes(4000)), strict=True)
    )
    config.pipeline.max_segments = 1 if way != "packing" else ROOMS[stream][1]
    batched = "padding" if way == ALL_PAIRS else way
    with tempfile.TemporaryDirectory() as folder:
        objective = DiTObjective(config, pathlib.Path(folder))
    init, step = make_steps(objective, component(OptimConfig, dict(config.optim) | {"steps": 1000}, "optim"))
    key = jax.random.key(0)
    state = jax.jit(init)(key)
    programs: dict[Any, Any] = {}
    spent = compiling = 0.0
    useful = slots = steps = clips = text = 0
    gflop = 0.0
    read = Count(segments)
    stream_of_batches = batches(read, batched, SLOTS, longest, words, ROOMS[stream])
    while batched != "padding" and read.count < AHEAD:
        next(stream_of_batches)
    for batch in evenly(stream_of_batches, read, objective.dit):
        shape = batch.patches.shape
        useful += int(np.count_nonzero(batch.segment_ids))
        clips += int(np.count_nonzero(batch.condition_segment_ids))
        text += int(np.count_nonzero(batch.text_segment_ids))
        slots, steps = slots + batch.segment_ids.size + batch.text_segment_ids.size, steps + 1
        if way == ALL_PAIRS:
            batch = attend_all(batch)
        gflop += operations(batch, objective.dit) / 1e9
        batch = jax.tree.map(jax.numpy.asarray, batch)
        if shape not in programs:
            started = time.perf_counter()
            programs[shape] = jax.jit(step, donate_argnums=0).lower(state, batch, key).compile()
            compiling += time.perf_counter() - started
        started = time.perf_counter()
        state, metrics = programs[shape](state, batch, key)
        loss = float(metrics["loss"])
        spent += time.perf_counter() - started
        assert np.isfinite(loss)
        if spent >= seconds:
            break
    return {
        "real": (useful + text) / slots,
        "tokens_a_clip": useful / clips,
        "useful_a_second": useful / spent,
        "useful_a_gflop": useful / gflop,
        "clips_a_second": clips / spent,
        "steps": steps,
        "compilations": len(programs),
        "compile_seconds": compiling,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def attend_all(batch: PackedBatch) -> PackedBatch:
    """Empty slots become those of each sequence's one segment: what is learned is nonsense, what it costs is not."""
    one = lambda ids: np.ones_like(ids)
    return dataclasses.replace(
        batch, segment_ids=one(batch.segment_ids), text_segment_ids=one(batch.text_segment_ids)
    )


def operations(batch: PackedBatch, config: DiTConfig) -> float:
    """Floating-point operations of a forward pass: linear layers at every slot, attention within segments."""
    ids = np.concatenate([batch.segment_ids, batch.text_segment_ids], axis=1)
    pairs = sum(float(np.square(np.bincount(own)[1:], dtype=float).sum()) for own in ids)
    return forward_flops(config, ids.size, pairs)


def evenly(stream: Iterator[PackedBatch], read: Count, config: DiTConfig) -> Iterator[PackedBatch]:
    """The batches of the next `SAMPLE` clips, again and again, dear and cheap ones in turn.

    In whatever order they come, a few dozen would hold more or fewer long clips than the stream does.
    """
    last = read.count + SAMPLE
    found = list(itertools.takewhile(lambda _: read.count <= last, stream))
    found.sort(key=lambda batch: operations(batch, config))
    golden = (math.sqrt(5) - 1) / 2
    for number in itertools.count():
        yield found[int((number + 0.5) * golden % 1 * len(found))]


class Count:
    """A sequence that counts what is read of it."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments, self.count = segments, 0

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> Segment:
        self.count += 1
        return self.segments[index]


def _apart(stream: str, way: str, size: str, seconds: float) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--one",
        f"{stream}:{way}",
        "--size",
        size,
        "--seconds",
        str(seconds),
    ]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise click.ClickException(f"{stream}, {way}: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Useful tokens a second of each way, by stream."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    ways = list(next(iter(result["ways"].values())))
    for number, way in enumerate(ways):
        values = [rows[way]["useful_a_second"] for rows in result["ways"].values()]
        places = np.arange(len(values)) + 0.22 * (number - (len(ways) - 1) / 2)
        bars = axes.bar(places, values, 0.2, label=way)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], fontsize=7)
    axes.set_xticks(range(len(result["ways"])), [*result["ways"]])
    axes.set(ylabel="useful tokens a second", title=f"DiT-{result['size']}, {result['machine']}")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
