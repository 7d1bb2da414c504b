"""`sora-jax plan`: what a configuration would take on chips that aren't here."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import click

from sora_jax.cli.options import QUIET, check_overrides, common
from sora_jax.cli.terminal import Number, Output, Size, table
from sora_jax.distributed.chips import CHIPS, GIB, Topology, describe_slices, read_topology
from sora_jax.errors import UserError, atomic_path

DTYPES = ("bfloat16", "float32", "float16")
# libtpu asks the cloud's metadata server where it is, and warns at length where there is none.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans at a time: no chip is used
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def _show_chips(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    head = ("chip", "devices", "TFLOP/s", "GiB", "GB/s", "links GB/s", "$/hour", "slices")
    rows = []
    for name, chip in CHIPS.items():
        parts = (chip.flops / 1e12, chip.memory / GIB, chip.bandwidth / 1e9, chip.network / 1e9)
        numbers = (f"{chip.devices * part:,.0f}" for part in parts)
        rows.append((name, str(chip.devices), *numbers, f"{chip.dollars:.2f}", describe_slices(chip)))
    click.echo(table(head, rows))
    click.echo(
        "\nOf a chip: bfloat16 peak, memory and its bandwidth, what goes out over its links, about its price. "
        "Sources: sora_jax/distributed/chips.py."
    )
    context.exit()


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Any --config.key=value sets a value, as in training.",
)
@click.option("--config", "configs", multiple=True, help="As training takes it; several are compared.")
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    help="A diffusers folder, whose weights need not be there, instead.",
)
@click.option("--size", type=Size(), metavar="WxH", help="Of --model's video.  [default: the model's own]")
@click.option("--frames", type=click.IntRange(1), help="Of --model's video.  [default: the model's own]")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of --model's arithmetic.  [default: of chips bfloat16; of this machine float32, as generate's]",
)
@click.option(
    "--weights", type=click.Choice((*DTYPES, "int8")), help="Of --model in memory.  [default: --dtype]"
)
@click.option(
    "--topology",
    "topologies",
    multiple=True,
    help="v5p:8x8x8, v6e:4x4, tpu7x:2x2x1, h100:64 …; several are compared.",
)
@click.option(
    "--chips", is_flag=True, is_eager=True, expose_value=False, callback=_show_chips,
    help="List known chips and slices.",
)  # fmt: skip
@click.option("--devices", type=click.IntRange(1), help="Simulated devices of this machine, instead.")
@click.option("--step", type=click.Choice(("train", "sample")), default="train", help="Which program.")
@click.option("--tokens", type=Number(above=0), help="Training's budget.  [default: config.steps steps]")
@click.option("--price", type=Number(at_least=0), help="Dollars a chip and hour, instead of the table's.")
@click.option(
    "--assume", "assumptions", multiple=True, help="products, attention, memory, network or hidden=0.7."
)
@click.option("--compare", is_flag=True, help="A table, a line for each plan; always for several plans.")
@click.option(
    "--search/--no-search", default=True, help="If it doesn't fit, search for a change that makes it fit."
)
@click.option("--json", "json_path", type=Output(), help="Write everything here.")
@click.option("--picture", type=Output(".png"), help="Write memory by kind here.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@common
@click.pass_context
def plan(
    context: click.Context,
    configs: tuple[str, ...],
    models: tuple[str, ...],
    size: tuple[int, int] | None,
    frames: int | None,
    dtype: str | None,
    weights: str | None,
    topologies: tuple[str, ...],
    devices: int | None,
    step: str,
    tokens: float | None,
    price: float | None,
    assumptions: tuple[str, ...],
    compare: bool,
    search: bool,
    json_path: pathlib.Path | None,
    picture: pathlib.Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Plan a training run, or the making of a video, for chips that aren't here.

    The real step is compiled for each TPU slice by the TPU's own compiler (pip install libtpu), or for simulated
    devices; for GPUs it is estimated. Reports what fits, how long a step takes, and what the whole costs.

    Of an open model, --model FOLDER: the making of one video. Without chips it is said what that takes of this
    machine's memory.
    """
    check_overrides(overrides)
    if not configs and not models:
        raise click.UsageError("There is nothing to plan: name a --config, or a --model.")
    if models and (overrides or tokens):
        raise click.UsageError("--tokens and --config.key=value are of --config, not of --model.")
    if not models and (size or frames or dtype or weights):
        raise click.UsageError("--size, --frames, --dtype and --weights are of --model, not of --config.")
    wanted = [*map(read_topology, topologies)]
    if devices:
        wanted.append(read_topology(f"cpu:{devices}"))
    if not wanted and models and not configs:
        if compare or json_path or picture or price is not None or assumptions:
            raise click.UsageError(
                "--compare, --json, --picture, --price and --assume are of plans for chips: name --topology h100:1."
            )
        _before_jax(0)
        from sora_jax.cli import plan_report
        from sora_jax.planner.counts import host_needs
        from sora_jax.planner.published import published_config

        for name in models:
            click.echo(
                plan_report.needs(
                    host_needs(published_config(name, size, frames, dtype or "float32", weights or ""))
                )
            )
        return
    if not wanted:
        raise click.UsageError("There are no chips to plan for: name --topology v5e:4x4, or --devices 8.")
    _before_jax(max([one.count for one in wanted if one.kind == "cpu"], default=0))

    from sora_jax.cli import plan_report
    from sora_jax.train.__main__ import parse

    assumed = _assumptions(assumptions)
    quiet = context.meta[QUIET]
    notify = (lambda text: None) if quiet else (lambda text: click.echo(text, err=True))
    plans = []
    named = [
        (_name(path), parse(["--config", path, "--workdir", "none", *overrides])[0], step) for path in configs
    ]
    for name in models:
        from sora_jax.planner.published import published_config

        config = published_config(name, size, frames, dtype or "bfloat16", weights or "")
        named.append((pathlib.Path(config.pretrained).name, config, "sample"))
    for name, config, own in named:
        for topology in wanted:
            plans.append(_plan(name, config, own, topology, tokens, price, assumed, search, notify))
    if compare or len(plans) > 1:
        click.echo(plan_report.compare(plans))
    else:
        click.echo(plan_report.report(plans[0], assumed, price))
    if picture:
        plan_report.picture(plans, picture)
    if json_path:
        with atomic_path(json_path) as temporary:
            temporary.write_text(json.dumps([one.as_dict() for one in plans], indent=2) + "\n")


def _plan(
    name: str,
    config: Any,
    step: str,
    topology: Topology,
    tokens: float | None,
    price: float | None,
    assumed: Any,
    search: bool,
    notify: Callable[[str], None],
) -> Any:
    from sora_jax.planner import counts, estimate, programs
    from sora_jax.planner.published import OBJECTIVE
    from sora_jax.planner.search import find_fit

    compiled = topology.is_tpu or topology.kind == "cpu"
    build = programs.build if compiled else programs.estimate_memory

    def counted(built: programs.Built) -> counts.Counts | None:
        if built.program:
            return counts.count(built)
        return None if compiled else counts.estimate_counts(built.spec)

    spec = programs.make_step_spec(config, step, topology)
    notify(f"{'compiling' if compiled else 'estimating'} {name} for {topology.name} ...")
    built = build(spec)
    found = estimate.plan_step(name, built, counted(built), price, tokens, assumed)
    if built.fits or not search:
        return found
    if config.objective == OBJECTIVE:
        return found.with_change("--weights int8, a smaller --size, fewer --frames, or more chips", None)
    change, other = find_fit(
        spec,
        build,
        lambda change: notify(f"it doesn't fit; trying {change} ..."),
        guess=programs.estimate_memory,
    )
    return found.with_change(
        change or "nothing that was tried: fewer tokens a row, or a smaller model", other
    )


def _before_jax(devices: int) -> None:
    """What must be settled before JAX starts its backends."""
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    import jax

    jax.config.update("jax_platforms", "cpu")
    # Programs for other machines can't be read again.
    jax.config.update("jax_enable_compilation_cache", False)
    if devices > 1:
        try:
            jax.config.update("jax_num_cpu_devices", devices)
        except RuntimeError as error:
            raise UserError(
                f"JAX runs already with {jax.device_count()} devices: plan for others in a process of its own."
            ) from error


def _assumptions(texts: tuple[str, ...]) -> Any:
    from sora_jax.planner.estimate import Assumptions

    given: dict[str, float] = {}
    names = list(Assumptions.__dataclass_fields__)
    for text in texts:
        name, _, value = text.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            name = ""
        if name not in names:
            raise click.UsageError(
                f"--assume {text} is no assumption: write one of {', '.join(names)} as name=0.7."
            )
    return Assumptions(**given)


def _name(path: str) -> str:
    file, _, argument = path.partition(":")
    return argument or pathlib.Path(file).stem
