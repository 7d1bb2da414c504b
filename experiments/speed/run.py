"""Our transformer, autoencoder and text encoder against PyTorch's on the same machine, in one run. See README.md.

python experiments/speed/run.py --json experiments/speed/speed.json [--part dit] [--torch PYTHON | --no-torch]
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

# The peer wants memory of the same accelerator.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import click
import jax
import numpy as np
from ours import CASES, Case, Options
from peer import Peer
from roofline import Roofline, compute_peak, memory_bandwidth, roofline, seconds

from sora_jax.models.attention.dispatch import BACKENDS
from sora_jax.models.dit_config import POLICIES, SIZES

HERE = pathlib.Path(__file__).parent
WORKS = ("forward", "training step", "encode", "decode")
DTYPES = ("float32", "bfloat16")
TOLERANCE = 1e-3  # in standard deviations of the result
# A way whose first call takes so many times the quickest's, and so many seconds, isn't called again.
SLOW, SHORT = 2.5, 2.0


def integers(separator: str) -> Any:
    return lambda context, option, value: tuple(int(part) for part in value.split(separator))


def shapes(context: Any, option: Any, value: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(side) for side in clip.split("x")) for clip in value.split(","))


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice([*CASES]), help="Default: all.")
@click.option("--work", "works", multiple=True, type=click.Choice(WORKS), help="Default: all of a part's.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Default: both.")
@click.option("--size", default="S", type=click.Choice([*SIZES]), help="Of the DiT.")
@click.option(
    "--lengths", default="2048,1024,512,256,128,64,32,32", callback=integers(","), help="Of the DiT's runs."
)
@click.option("--remat", default="dots", type=click.Choice([*POLICIES]), help="Of the DiT.")
@click.option("--attention", default="auto", type=click.Choice(["auto", *BACKENDS]), help="Of the DiT.")
@click.option(
    "--clips", default="4x17x64x64,1x9x256x256,1x5x64x64", callback=shapes, help="Batches for the VAE."
)
@click.option("--captions", default="32x32", callback=integers("x"), help="Captions and slots each.")
@click.option("--compile", is_flag=True, help="Let torch.compile compile what is our arithmetic: minutes.")
@click.option("--repeats", default=3, help="The best of so many is told.")
@click.option("--no-torch", is_flag=True, help="Ours alone.")
@click.option("--torch", "python", default=sys.executable, help="A Python that has torch; default: this one.")
@click.option("--json", "out", type=click.Path(path_type=pathlib.Path), help="Where to write the figures.")
@click.option("--history", default=HERE / "history.jsonl", type=click.Path(path_type=pathlib.Path))
def main(
    parts: tuple[str, ...],
    repeats: int,
    no_torch: bool,
    python: str,
    out: pathlib.Path | None,
    history: pathlib.Path,
    **chosen: Any,
) -> None:
    """Prints seconds of ours and of each way in PyTorch, their ratio, and what the machine allows.

    With --json, the figures go there and, as one line more, to --history.
    """
    defaults = {"works": WORKS, "dtypes": DTYPES}
    chosen = {name: value or defaults.get(name, value) for name, value in chosen.items()}
    options = Options(**chosen | {"lengths": tuple(sorted(chosen["lengths"], reverse=True))})
    parts = parts or tuple(CASES)
    peer = None if no_torch else start_peer(python)
    peaks = {dtype: compute_peak(dtype) for dtype in options.dtypes}
    bandwidth = memory_bandwidth()
    result: dict[str, Any] = describe(peer) | {"parts": parts, **chosen}
    result |= {"peak_gflops": {dtype: peak / 1e9 for dtype, peak in peaks.items()}}
    result |= {"bandwidth_gbps": bandwidth / 1e9, "rows": {}}
    reached = ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
    click.echo(
        f"{result['machine']}: products and convolutions reach {reached}, a copy of memory {bandwidth / 1e9:.0f} GB/s."
    )
    for part in parts:
        for case in CASES[part](options):
            click.echo()
            training = case.work == "training step"
            bound = roofline(case.layers, case.dtype, peaks[case.dtype], bandwidth, training)
            row = measure(case, part, peer, repeats) | {"gflop": bound.flops / 1e9}
            result["rows"][f"{case.name}, {case.dtype}"] = row | judge(row["jax"], bound)
            for line in tell(case, row, bound):
                click.echo(line)
    if peer:
        click.echo()
        for name, row in best_of_both(result["rows"]).items():
            result["rows"][name] = row
            click.echo(f"{name}: JAX {row['jax']:.3g} s, PyTorch {row['torch']:.3g} s, {row['ratio']:.2f}×")
        peer.close()
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
        with history.open("a") as file:
            file.write(json.dumps(result) + "\n")


def measure(case: Case, part: str, peer: Peer | None, repeats: int) -> dict[str, Any]:
    """Seconds of ours and of each way of the peer's, called in turn so that all meet the same noise."""
    seconds(case.once)
    ways: dict[str, Any] = {}
    if peer:
        with tempfile.TemporaryDirectory() as folder:
            arrays = str(pathlib.Path(folder) / "arrays.npz")
            np.savez(arrays, **case.arrays())
            asked = {
                "part": part,
                "work": case.work,
                "dtype": case.dtype,
                "arrays": arrays,
            }
            told = peer.build(asked | case.asked)
        ways = told["ways"]
        for sentence in told["missing"]:
            click.echo(f"note: a peer is missing: {sentence}", err=True)
        for name, way in ways.items():
            if way["difference"] is not None and not way["difference"] < TOLERANCE:
                raise click.ClickException(
                    f"{case.name}: PyTorch's {name} computes something else: {way['difference']:.2g} standard "
                    f"deviations apart, {TOLERANCE} allowed."
                )
    quickest = {
        same: min(way["first"] for way in ways.values() if way["same"] == same)
        for same in {way["same"] for way in ways.values()}
    }
    again = [name for name, way in ways.items() if way["first"] <= max(SHORT, SLOW * quickest[way["same"]])]
    ours, theirs = [], {name: [way["first"]] for name, way in ways.items()}
    for repeat in range(repeats):
        ours.append(seconds(case.once))
        for name in again:
            theirs[name] = [*(theirs[name] if repeat else []), peer.seconds(name)]
    for name, way in ways.items():
        way |= {"seconds": min(theirs[name]), "calls": len(theirs[name]) if name in again else 1}
    return {"jax": min(ours), "torch": ways}


def judge(taken: float, bound: Roofline) -> dict[str, Any]:
    """The figures of a row that the roofline gives."""
    return {
        "utilisation": bound.compute_seconds / taken,
        "gigabytes": bound.bytes / 1e9,
        "intensity": bound.intensity,
        "compute_seconds": bound.compute_seconds,
        "memory_seconds": bound.memory_seconds,
        "limit": bound.limit,
        "times_the_bound": taken / bound.seconds,
    }


def tell(case: Case, row: dict[str, Any], bound: Roofline) -> Iterator[str]:
    """A row of the table, in lines: ours, each way of the peer's, and what limits it."""
    rate = lambda gflop, taken: f"{gflop:7.4g} GFLOP at {gflop / taken:5.0f}/s"
    yield f"{case.name}, {case.dtype}"
    share = f"{bound.compute_seconds / row['jax']:.0%} of peak"
    yield f"  {'JAX':34}{row['jax']:9.4f} s {'':8} {rate(row['gflop'], row['jax'])}, {share}"
    for name, way in sorted(row["torch"].items(), key=lambda item: (not item[1]["same"], item[1]["seconds"])):
        told = f"{way['seconds'] / row['jax']:7.2f}× {rate(way['gflop'], way['seconds'])}"
        label = f"PyTorch, {name}" + ("" if way["same"] else " *")
        once = ", called once" if way["calls"] == 1 else ""
        apart = "" if way["difference"] is None else f", {way['difference']:.0e} apart"
        size = f"{way['parameters'] / 1e6:.1f} M parameters"
        yield f"  {label:34}{way['seconds']:9.4f} s {told}, {size}{apart}{once}"
    if not all(way["same"] for way in row["torch"].values()):
        yield "  * another architecture, random weights"
    yield "  " + bound.sentence(row["jax"])


def best_of_both(rows: dict[str, Any]) -> dict[str, Any]:
    """For each work, each side in the type in which it is faster; the peer's arithmetic is ours."""
    works: dict[str, list[dict[str, Any]]] = {}
    for name, row in rows.items():
        works.setdefault(name.rpartition(", ")[0], []).append(row)
    found = {}
    for work, both in works.items():
        ours = min(row["jax"] for row in both)
        same = [way["seconds"] for row in both for way in row["torch"].values() if way["same"]]
        if same:
            found[f"{work}, best of both"] = {"jax": ours, "torch": min(same), "ratio": min(same) / ours}
    return found


def start_peer(python: str) -> Peer | None:
    try:
        return Peer(python)
    except click.ClickException as error:
        click.echo(f"note: nothing to compare with: {error.message}", err=True)
        return None


def describe(peer: Peer | None) -> dict[str, Any]:
    """When, what and where."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    accelerator = "" if jax.default_backend() == "cpu" else f", {jax.devices()[0].device_kind}"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{cores} cores, {platform.machine()}, {jax.default_backend()}{accelerator}",
        "jax": jax.__version__,
        "torch": peer.torch if peer else None,
    }


if __name__ == "__main__":
    main()
