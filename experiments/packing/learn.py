"""What is learned in equal time: padding, buckets and packing on toyworld's clips, compiling included. See README.md.

    python experiments/packing/learn.py --json experiments/packing/learn.json

Each way runs in a process of its own. What is measured on the way (loss of clips held out, oracle's accuracy) is not
counted as time.
"""

from __future__ import annotations

import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import time
from typing import Any

import click
import jax
import numpy as np
from streams import ROOT
from ways import WAYS, batches

from sora_jax.checkpoints.components import Bundle
from sora_jax.config import component
from sora_jax.data.encode import encode_sources
from sora_jax.data.pipeline import SEGMENT_CONDITIONS, draw_segment
from sora_jax.evaluation.report import evaluate_toyworld
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.tokens.packing import Segment, first_fit_decreasing, pack_batch
from sora_jax.train.dit import DiTObjective
from sora_jax.train.loop import make_steps
from sora_jax.train.optim import OptimConfig

HELD_OUT = 128  # clips, the last of the cache
ROOM = (256, 32)  # text tokens and segments of a packed sequence


class Clips:
    """Runs of the records of a cache, each drawn in the same way whenever it is asked for."""

    def __init__(self, records: Any, config: Any, begin: int, end: int) -> None:
        self.records, self.config, self.begin, self.end = records, config, begin, end

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, index: int) -> Segment:
        place = self.begin + index
        return draw_segment(self.records[place], np.random.default_rng(place), self.config)


@click.command()
@click.option("--json", "out", type=click.Path(path_type=pathlib.Path), help="Where to write the figures.")
@click.option("--size", default="Nano", help="Of the transformer, see models/dit.py.")
@click.option("--seconds", default=420.0, help="Of training each way, compiling included.")
@click.option("--clips", default=4000, help="Encoded for it.")
@click.option("--latents", type=click.Path(path_type=pathlib.Path), help="A folder to keep them in.")
@click.option("--prompts", default=64, help="That the oracle reads at the end; 0: none.")
@click.option("--slots", default=1280, help="Of a step.")
@click.option("--lr", default=2e-3, help="The same for all; reached in the first 100 steps.")
@click.option("--one", hidden=True, type=click.Choice(WAYS), help="Measure that alone, and print it.")
def main(out: pathlib.Path | None, one: str | None, latents: pathlib.Path | None, **options: Any) -> None:
    """Prints loss and accuracy of each way."""
    with tempfile.TemporaryDirectory() as folder:
        latents = latents or pathlib.Path(folder)
        if one:
            click.echo(json.dumps(learn(one, latents, **options)))
            return
        arguments = [f"--{name}={value}" for name, value in options.items()]
        result: dict[str, Any] = {"jax": jax.__version__, **options, "ways": {}}
        click.echo(
            f"{'way':8} {'steps':>6} {'clips':>7} {'tokens':>9} {'compiled':>12} {'loss':>7}  accuracy, %"
        )
        for way in WAYS:
            command = [sys.executable, __file__, f"--one={way}", f"--latents={latents}", *arguments]
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
            if done.returncode:
                raise click.ClickException(f"{way} ended with {done.returncode}: see above.")
            row = result["ways"][way] = json.loads(done.stdout.strip().splitlines()[-1])
            read = ", ".join(f"{name} {share:.0%}" for name, share in row["accuracy"].items())
            click.echo(
                f"{way:8} {row['steps']:6} {row['clips']:7} {row['tokens']:9} {row['compile_seconds']:6.1f} s/"
                f"{row['compilations']:<3} {row['curve'][-1][1]:7.4f}  {read}"
            )
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
        plot(result, out.with_suffix(".png"))


def learn(
    way: str,
    latents: pathlib.Path,
    size: str,
    seconds: float,
    clips: int,
    prompts: int,
    slots: int,
    lr: float,
) -> dict[str, Any]:
    """Trains for so many seconds, compilations among them."""
    config = runpy.run_path(str(ROOT / "configs" / "toyworld_dit.py"))["get_config"](size)
    config.latents.clips, config.latents.layouts = clips, {}
    config.pipeline.canvases, config.pipeline.temporal_crop_prob = {}, 0.0
    config.pipeline.seq_len, config.pipeline.max_segments = slots, ROOM[1] if way == "packing" else 1
    with tempfile.TemporaryDirectory() as folder:
        objective = DiTObjective(config, pathlib.Path(folder))
        vae = objective.vae
    records = encode_sources(
        objective.latents, objective.data_config, vae, objective.text, latents, objective.sources
    )
    train = Clips(records, objective.pipeline, 0, len(records) - HELD_OUT)
    held_out = Clips(records, objective.pipeline, len(train), len(records))
    longest = max(len(part[i].patches) for part in (train, held_out) for i in range(len(part)))
    # A rate that stays, so that every moment of the curve is a fair end.
    settings = dict(config.optim) | {"schedule": "constant", "lr": lr, "ema_decay": 0.0, "steps": 10**6}
    init, step = make_steps(objective, component(OptimConfig, settings, "optim"))
    key = jax.random.key(0)
    state = jax.jit(init)(key)
    measure = _loss(config, held_out, slots)
    programs: dict[Any, Any] = {}
    spent = compiling = 0.0
    steps = seen = tokens = 0
    curve: list[tuple[float, float]] = []
    stream = batches(train, way, slots, longest, 64, ROOM, SEGMENT_CONDITIONS)
    while spent < seconds:
        batch = jax.tree.map(jax.numpy.asarray, next(stream))
        started = time.perf_counter()
        if batch.patches.shape not in programs:
            programs[batch.patches.shape] = jax.jit(step, donate_argnums=0).lower(state, batch, key).compile()
            compiling += time.perf_counter() - started
        state, _ = jax.block_until_ready(programs[batch.patches.shape](state, batch, key))
        spent += time.perf_counter() - started
        steps += 1
        seen += sum(len(np.unique(ids)) - (0 in ids) for ids in np.asarray(batch.segment_ids))
        tokens += int(np.count_nonzero(batch.segment_ids))
        if spent > seconds * (len(curve) + 1) / 20:
            curve.append((spent, measure(state.params)))
    bundle = Bundle(
        "learned", vae, state.params, objective.text, objective.limits, objective.flow.base_tokens
    )
    accuracy = {}
    if prompts:
        read = evaluate_toyworld(Pipeline(bundle), split="validation", clips=prompts)["accuracy"]
        accuracy = {name: read[name]["share"] for name in ("colour", "shape", "direction", "size", "count")}
    return {
        "steps": steps,
        "clips": seen,
        "tokens": tokens,
        "compilations": len(programs),
        "compile_seconds": compiling,
        "curve": curve,
        "accuracy": accuracy,
    }


def _loss(config: Any, held_out: Clips, slots: int) -> Any:
    """The loss of clips held out, at the same levels and with the same noise for every way; always packed."""
    config = config.copy_and_resolve_references()
    config.pipeline.max_segments = ROOM[1]
    config.flow.text_dropout = config.flow.text_noise = 0.0
    with tempfile.TemporaryDirectory() as folder:
        objective = DiTObjective(config, pathlib.Path(folder))
    segments = [held_out[i] for i in range(len(held_out))]
    conditions = SEGMENT_CONDITIONS * ROOM[1]
    packed = [[segments[i] for i in row] for row in first_fit_decreasing(segments, slots, *ROOM, conditions)]
    whole, _ = pack_batch(packed, len(packed), slots, ROOM[0], conditions)
    fixed = [
        jax.tree.map(lambda x, i=i: jax.numpy.asarray(x[i : i + 1]), whole) for i in range(len(whole.patches))
    ]
    generated = [int(np.count_nonzero((batch.segment_ids > 0) & ~batch.conditioning_mask)) for batch in fixed]
    compiled = jax.jit(lambda model, batch, key: objective.loss(model, batch, key)[0])
    keys = jax.random.split(jax.random.key(1), len(fixed))
    return lambda model: float(
        np.average(
            [compiled(model, batch, key) for batch, key in zip(fixed, keys, strict=True)], weights=generated
        )
    )


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Loss against seconds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for way, row in result["ways"].items():
        axes.plot(*zip(*row["curve"], strict=True), marker=".", label=way)
    axes.set(
        xlabel="seconds of training, compiling included",
        ylabel="loss of clips held out",
        title=f"DiT-{result['size']}, {result['slots']} slots a step",
    )
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
