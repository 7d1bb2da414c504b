"""`sora-jax config`: what a training command would run with."""

from __future__ import annotations

import json

import click

from sora_jax.cli.options import check_overrides, common


@click.command("config", context_settings={"ignore_unknown_options": True})
@click.argument("name", metavar="NAME|FILE")
@click.argument("overrides", metavar="[--config.KEY=VALUE ...]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--json", "as_json", is_flag=True, help="As JSON, which --config takes: sora-jax train --config my.json."
)
@click.option("--flags", "as_flags", is_flag=True, help="As flags that set every key, for the command line.")
@common
def config_command(name: str, overrides: tuple[str, ...], as_json: bool, as_flags: bool) -> None:
    """Show a whole configuration: every key with its value, its type and what it means.

    NAME is a configuration that comes with sora_jax (toyworld_dit, toyworld_dit:Pico), a .py or .json file, or the
    folder of a run. Keys set with --config.KEY=VALUE are marked with a star.
    """
    from sora_jax.train import listing, objectives
    from sora_jax.train.__main__ import make_config, split_overrides

    changes, rest = split_overrides(overrides)
    check_overrides(rest)
    config = make_config(name, changes)
    schema = objectives.schema_of(config)
    if as_json:
        click.echo(json.dumps(config.to_dict(), indent=2, ensure_ascii=False))
    elif as_flags:
        click.echo(listing.as_flags(schema, config))
    else:
        click.echo(listing.list_settings(schema, config, make_config(name, {})))
