"""Plans as text, as a table and as a picture."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from sora_jax.cli.terminal import table
from sora_jax.distributed.chips import GIB
from sora_jax.errors import UserError, atomic_path
from sora_jax.planner.estimate import DAY, Assumptions, HostNeeds, PlannedStep

KINDS = ("parameters", "base", "average", "optimizer", "batch", "activations", "temporaries", "code")


def report(plan: PlannedStep, assumed: Assumptions, dollars: float | None) -> str:
    """One plan in full."""
    spec, counts, found, bill = plan.spec, plan.counts, plan.estimate, plan.bill
    sizes = " x ".join(f"{axis} {size}" for axis, size in spec.mesh.items() if size > 1) or "unsharded"
    chips, devices = spec.topology.chips, spec.topology.count
    several = devices > chips  # devices a chip
    where = (
        f"{spec.topology.name}, {chips} chip{'s' * (chips > 1)}{f' of {devices} devices' * several} ({sizes})"
    )
    one = "device" if several else "chip"
    lines = [f"{plan.name}: a {spec.step} step of {spec.batch_size} sequences on {where}"]
    by = f"by the compiler, in {plan.compiling:.0f} s" if plan.word == "compiler" else "by arithmetic"
    room = f" of {plan.room / GIB:.1f}" if plan.room else ""
    total = sum(plan.memory.values()) / GIB
    verdict = "fits" if plan.fits else "does NOT fit"
    lines += ["", f"memory a {one}: {total:.2f}{room} GiB, {verdict} ({by})"]
    lines += [f"  {kind:<13}{plan.memory[kind] / GIB:9.2f} GiB" for kind in KINDS if plan.memory.get(kind)]
    if plan.change:
        then = f", {sum(plan.changed.values()) / GIB:.2f} GiB a {one}" if plan.changed else ""
        lines += [f"  what makes it fit: {plan.change}{then}"]
    if counts:
        lines += [
            "",
            f"a step, on each {one} (by {'the compiler' if counts.source == 'compiler' else 'arithmetic'})",
            f"  products     {_short(counts.products)}FLOP",
            f"  memory       {_short(counts.bytes)}B"
            + (", attention's by arithmetic" if counts.attention else ""),
        ]
        if counts.attention:
            lines.insert(-1, f"  attention    {_short(counts.attention)}FLOP, by arithmetic")
        for kind, sent in sorted(counts.network.items(), key=lambda one: -one[1]):
            if sent:
                lines += [f"  {kind:<19}{_short(sent)}B sent"]
    if found and counts:
        lines += [
            "",
            f"a step takes {duration(found.seconds)}: compute {duration(found.compute)}, memory "
            f"{duration(found.memory)}, network {duration(found.network)}; never less than {duration(found.best)}",
            f"  {found.utilisation:.0%} of peak usefully",
            f"  {_short(found.tokens_a_day)}tokens a day",
        ]
        if bill:
            cost = f"{duration(bill.seconds)}, ${bill.dollars:,.2f}"
            lines += [f"{bill.what}: {_short(bill.tokens)}tokens, {cost}"]
        lines += ["", "assumed: " + _assumed(plan, assumed, dollars)]
    return "\n".join(lines)


def needs(found: HostNeeds) -> str:
    """What an open model takes of this machine."""
    clip = found.clip
    verdict = "fits" if found.peak <= found.free else "does NOT fit"
    free = f" of {found.free / GIB:.1f} free" if math.isfinite(found.free) else ""
    lines = [
        f"{found.summary} ({found.licence})",
        f"a video of {clip.frames} frames of {clip.width}x{clip.height}: {clip.tokens:,} tokens, {found.steps} steps "
        f"of {found.passes} pass{'es' * (found.passes > 1)}",
        "",
        f"memory: {found.peak / GIB:.1f}{free} GiB, {verdict} (by arithmetic)",
        *(f"  {name:<13}{size / GIB:9.2f} GiB of weights" for name, size in found.weights.items()),
        *(f"  {name:<13}{size / GIB:9.2f} GiB at most" for name, size in found.stages.items()),
        "",
        f"operations: a step {_short(found.step_flops)}FLOP, decoding {_short(clip.decode)}FLOP, the video "
        f"{_short(found.flops)}FLOP; a machine of 1 TFLOP/s takes {duration(found.flops / 1e12)}",
        "for chips: --topology v5e:2x4, h100:1 …; --chips lists them",
    ]
    return "\n".join(lines)


def compare(plans: Sequence[PlannedStep]) -> str:
    """Several plans as a table."""
    rows = []
    for plan in plans:
        found, bill = plan.estimate, plan.bill
        rows.append(
            (
                plan.name,
                plan.spec.step,
                plan.spec.topology.name,
                f"{sum(plan.memory.values()) / GIB:.1f}" + ("" if plan.fits else " no"),
                duration(found.seconds) if found else "",
                f"{found.utilisation:.0%}" if found else "",
                found.bound if found else "",
                _short(found.tokens_a_day) if found else "",
                duration(bill.seconds) if bill else "",
                f"${bill.dollars:,.2f}" if bill else "",
                plan.word,
            )
        )
    head = [
        "config",
        "step",
        "chips",
        "GiB",
        "a step",
        "of peak",
        "bound",
        "tokens/day",
        "in all",
        "cost",
        "by",
    ]
    return table(head, rows)


def picture(plans: Sequence[PlannedStep], path: pathlib.Path) -> None:
    """Memory by kind, a bar a plan, with what a chip has.

    Raises:
      UserError: matplotlib is missing.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError("A picture needs matplotlib: pip install 'sora_jax[eval]'.") from error
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.55 * len(plans)), layout="constrained")
    labels = [f"{plan.name}, {plan.spec.step}\n{plan.spec.topology.name}" for plan in plans]
    left = [0.0] * len(plans)
    colours: Any = plt.colormaps["tab10"].colors
    for kind, colour in zip(KINDS, colours, strict=False):
        sizes = [plan.memory.get(kind, 0.0) / GIB for plan in plans]
        axes.barh(labels, sizes, left=left, label=kind, color=colour, height=0.6)
        left = [have + more for have, more in zip(left, sizes, strict=True)]
    for place, plan in enumerate(plans):
        if plan.room:
            axes.plot([plan.room / GIB] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
    axes.set_xlabel("GiB a chip (a black line: what it has)")
    axes.invert_yaxis()
    axes.legend(ncols=4, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def _assumed(plan: PlannedStep, assumed: Assumptions, dollars: float | None) -> str:
    chip = plan.spec.topology.chip
    assert chip is not None
    price = f"${dollars:.2f} as given" if dollars is not None else f"${chip.dollars:.2f}, {chip.price}"
    clip = plan.clip
    full = (
        f"sequences full of clips of {clip.frames} frames of {clip.width}x{clip.height}, {clip.tokens:,} tokens and "
        f"{clip.words} words each"
        if clip
        else "sequences of one clip each"
        if plan.spec.config.objective != "vae"
        else "no padding"
    )
    return (
        f"{assumed.products:.0%} of peak in products, {assumed.attention:.0%} in attention, {assumed.memory:.0%} of "
        f"memory's and {assumed.network:.0%} of the links' bandwidth, {assumed.hidden:.0%} of exchanges hidden "
        "(--assume); "
        f"{full}; a chip-hour at {price} (--price)."
    )


def _short(number: float) -> str:
    """1.23e12 as "1.23 T"."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 2 * DAY else f"{seconds / DAY:,.3g} days"
