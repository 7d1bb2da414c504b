"""What the ladder's rungs cost, and how cost grows: the TPU compiler's word beside arithmetic.

    python experiments/scale/run.py ladder      # every rung compiled; ladder.json, ladder.png
    python experiments/scale/run.py agreement   # those by the compiler over those by arithmetic
    python experiments/scale/run.py exchanges   # one rung on 4 to 128 chips; exchanges.json, exchanges.png
    python experiments/scale/run.py curves      # duration, resolution, size, chips, by arithmetic; curves.png

Needs libtpu (pip install libtpu, best into a virtual environment of its own). What is in a JSON file is not compiled
again; delete the file to begin again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = "configs/ladder.py"
SLICES = runpy.run_path(str(ROOT / CONFIG))["SLICES"]
SAMPLING = {"Ti": "v5e:1x1", "XL": "v6e:2x4", "14B": "v5p:2x4x4", "14B-24fps": "v5p:2x4x4"}
AUTOENCODERS = {"vae-4x8x8": "v5e:2x4", "vae-4x16x16": "v6e:8x8"}
GIB, DAY = 2**30, 86_400


def plan(name: str, topology: str, *more: str) -> dict[str, Any]:
    """One plan, in a process of its own: a compiler's memory goes with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "plan.json")
        command = [sys.executable, "-m", "sora_jax.cli.main", "plan", "--config", f"{CONFIG}:{name}"]
        command += ["--topology", topology, "--json", str(path), *more]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(path.read_text())[0]


def gather(path: pathlib.Path, jobs: dict[str, tuple[str, ...]]) -> dict[str, dict[str, Any]]:
    """Plans by key: those in the file, and the others compiled one after the other, each written at once."""
    found = json.loads(path.read_text()) if path.exists() else {}
    for key, (name, topology, *more) in jobs.items():
        if key not in found:
            print(f"{key} ...", flush=True)
            found[key] = plan(name, topology, *more)
            path.write_text(json.dumps(found, indent=1) + "\n")
    return {key: found[key] for key in jobs}


def ladder() -> None:
    jobs = {f"{name} train": (name, chips) for name, chips in SLICES.items()}
    jobs |= {f"{name} sample": (name, chips, "--step", "sample") for name, chips in SAMPLING.items()}
    jobs |= {f"{name} train": (name, chips) for name, chips in AUTOENCODERS.items()}
    found = gather(HERE / "ladder.json", jobs)
    from sora_jax.cli.plan_report import duration

    print(
        "| rung | slice | GiB a chip | a step | of peak | tokens a day | in all | cost | compiled in |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for key, one in found.items():
        guess, bill = one["estimate"], one["bill"]
        print(
            f"| {key} | {one['topology']} | {sum(one['memory_bytes'].values()) / GIB:.1f} of "
            f"{one['memory_room_bytes'] / GIB:.0f} | {duration(guess['seconds'])} | {guess['utilisation']:.0%} | "
            f"{guess['tokens_a_day'] / 1e9:.3g} G | {duration(bill['seconds'])} | ${bill['dollars']:,.2f} | "
            f"{one['compiled_in_seconds']:.0f} s |"
        )
    plt = _plots()
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    kinds, left = [*next(iter(found.values()))["memory_bytes"]], [0.0] * len(found)
    for kind in kinds:
        sizes = [one["memory_bytes"][kind] / one["memory_room_bytes"] for one in found.values()]
        axes.barh([f"{key}\n{one['topology']}" for key, one in found.items()], sizes, left=left, label=kind)
        left = [have + more for have, more in zip(left, sizes, strict=True)]
    axes.axvline(1.0, color="black")
    axes.invert_yaxis()
    axes.set(xlabel="share of a chip's memory, by the TPU's compiler", title="Memory of the ladder's rungs")
    axes.legend(ncols=4, fontsize="small")
    figure.savefig(HERE / "ladder.png", dpi=110)


def agreement() -> None:
    """The compiler's word over arithmetic, of what `ladder` compiled."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from sora_jax.distributed.chips import read_topology
    from sora_jax.planner import counts, programs
    from sora_jax.train.__main__ import parse

    print("| rung | products | bytes | exchanges | memory |\n|---|---|---|---|---|")
    for key, one in json.loads((HERE / "ladder.json").read_text()).items():
        name, step = key.split()
        if name in AUTOENCODERS:
            continue
        config = parse(["--config", f"{CONFIG}:{name}", "--workdir", "none"])[0]
        spec = programs.make_step_spec(config, step, read_topology(one["topology"]))
        found, estimated, memory = (
            one["counts"],
            counts.estimate_counts(spec),
            programs.estimate_memory(spec).memory,
        )
        sent = sum(found["network"].values()) / max(sum(estimated.network.values()), 1)
        print(
            f"| {key} | {found['products'] / estimated.products:.2f} | {found['bytes'] / estimated.bytes:.2f} | "
            f"{f'{sent:.2f}' if sum(estimated.network.values()) else ''} | "
            f"{sum(one['memory_bytes'].values()) / sum(memory.values()):.2f} |"
        )


def exchanges() -> None:
    """Strong scaling: 64 sequences on more and more chips. Weak scaling: two sequences a chip."""
    slices = {4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4", 32: "v5e:4x8", 64: "v5e:8x8", 128: "v5e:8x16"}
    jobs = {}
    for chips, name in slices.items():
        fsdp = f"--config.mesh.fsdp={min(chips, 8)}"
        kinds = {"weak": 2 * chips} | ({"strong": 64} if 8 <= chips <= 64 else {})
        for kind, rows in kinds.items():
            jobs[f"{kind} {chips}"] = ("B", name, fsdp, f"--config.pipeline.batch_size={rows}")
    every = gather(HERE / "exchanges.json", jobs)
    for key, one in every.items():
        if not one["fits"]:
            print(f"{key} chips: doesn't fit; {one['change']} would")
    found = {key: one for key, one in every.items() if one["fits"]}
    plt = _plots()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axes, kind in zip(panels, ("weak", "strong"), strict=True):
        own = {
            int(key.split()[1]): one["counts"]["network"]
            for key, one in found.items()
            if key.startswith(kind)
        }
        kinds = sorted({name for network in own.values() for name in network})
        for name in [*kinds, "all"]:
            sent = [sum(net.values()) if name == "all" else net.get(name, 0.0) for net in own.values()]
            if max(sent) > 1e7:
                axes.plot(
                    [*own], [number / 1e9 for number in sent], "o-", label=name, lw=3 if name == "all" else 1
                )
        rows = "two rows a chip" if kind == "weak" else "64 rows"
        axes.set(
            xscale="log",
            xlabel="v5e chips",
            ylabel="GB a chip sends a step",
            title=f"{kind} scaling, B, {rows}",
        )
        axes.set_xticks([*own], [*map(str, own)])
        axes.xaxis.set_minor_locator(plt.NullLocator())
        axes.legend(loc="center right")
        print(
            kind,
            {chips: round(sum(net.values()) / 1e9, 3) for chips, net in own.items()},
            "GB a chip and step",
        )
    figure.savefig(HERE / "exchanges.png", dpi=110)


def curves() -> None:
    """By arithmetic alone, with the ladder's compiled rungs as points where they are known."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from ml_collections import ConfigDict

    from sora_jax.distributed.chips import read_topology
    from sora_jax.planner import counts, estimate, programs
    from sora_jax.train.__main__ import parse

    assumed = estimate.Assumptions()

    def dollars(rung: str, topology: str, step: str, values: dict[str, Any]) -> float:
        """Of one video; of training, per million clips."""
        config: ConfigDict = parse(["--config", f"{CONFIG}:{rung}", "--workdir", "none"])[0]
        for key, value in values.items():
            part, _, field = key.partition(".")
            config[part][field] = value
        spec = programs.make_step_spec(config, step, read_topology(topology))
        clip = estimate.clip_of(spec)
        if "pipeline.seq_len" not in values:
            with config.unlocked():
                config.pipeline.seq_len = -(-clip.tokens // 512) * 512
            spec = dataclasses.replace(spec, config=config)
        found = counts.estimate_counts(spec)
        guess = estimate.estimate(found, spec.topology, assumed)
        bill = estimate.bill(spec, found, guess, spec.topology.chip.dollars, 1e6 * clip.tokens, assumed)
        return bill.dollars

    plt = _plots()
    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    both = (("train", "training, a million clips"), ("sample", "making one video"))

    def draw(
        axes: Any, label: str, xs: list[Any], of: Callable[[Any, str], float], xlog: bool = True
    ) -> None:
        for step, words in both:
            axes.plot(xs, [of(x, step) for x in xs], "o-", label=words)
        axes.set(yscale="log", xlabel=label, ylabel="dollars")
        if xlog:
            axes.set_xscale("log")
            axes.set_xticks(xs, [*map(str, xs)])
            axes.xaxis.set_minor_locator(plt.NullLocator())
        axes.grid(alpha=0.3)
        axes.legend()

    cube = {"train": "v5p:8x8x8", "sample": "v5p:2x4x4"}
    draw(
        panels[0, 0],
        "seconds of 1080p at 12 frames a second (14B, one row a clip)",
        [2, 5, 10, 20, 40, 60],
        lambda seconds, step: dollars("14B", cube[step], step, {"video.seconds": float(seconds)}),
    )
    draw(
        panels[0, 1],
        "short side in pixels (14B, 10 s at 12 frames a second)",
        [240, 360, 480, 720, 1080],
        lambda side, step: dollars(
            "14B", cube[step], step, {"video.resolution": side, "video.seconds": 10.0}
        ),
    )
    sizes = ["B", "L", "XL", "3B", "7B", "14B"]
    meshes = {"fsdp": 16, "tensor": 1, "sequence": 1}
    one = {f"mesh.{axis}": size for axis, size in meshes.items()}
    draw(
        panels[1, 0],
        "size (480p, 10 s at 16 frames a second; v5p)",
        sizes,
        lambda size, step: dollars(
            "XL", "v5p:4x4x4", step, {"dit.size": size, "pipeline.batch_size": 64} | one
        ),
        xlog=False,
    )
    axes = panels[1, 1]
    slices = ["v5p:8x8x8", "v5p:8x8x16", "v5p:8x16x16", "v5p:16x16x16"]
    chips = [read_topology(name).count for name in slices]
    days = []
    for name in slices:
        config = parse(["--config", f"{CONFIG}:14B", "--workdir", "none"])[0]
        config.pipeline.batch_size = 16 * read_topology(name).count // 512
        spec = programs.make_step_spec(config, "train", read_topology(name))
        found = counts.estimate_counts(spec)
        guess = estimate.estimate(found, spec.topology, assumed)
        days.append(1e12 / guess.tokens_a_day)
    axes.plot(chips, days, "o-", label="14B, a million million tokens, rows with the chips")
    axes.set(xscale="log", yscale="log", xlabel="v5p chips", ylabel="days")
    axes.set_xticks(chips, [*map(str, chips)])
    axes.xaxis.set_minor_locator(plt.NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle("By arithmetic, with the planner's assumptions; no compiler, no measurement")
    figure.savefig(HERE / "curves.png", dpi=110)


def _plots() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("ladder", "agreement", "exchanges", "curves"))
    {"ladder": ladder, "agreement": agreement, "exchanges": exchanges, "curves": curves}[
        parser.parse_args().what
    ]()
