"""`sora-jax train`, and `python -m sora_jax.train`, which is the same: from a configuration to a trained model."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
import jax
from absl import logging
from ml_collections import ConfigDict

from sora_jax import config as configurations
from sora_jax.backend import __version__, check_version, restart_with_huge_pages
from sora_jax.distributed.hosts import Hosts, fail, join, leave, wait_for_loss_report
from sora_jax.errors import UserError, nearest, user_path
from sora_jax.train import config_files, listing
from sora_jax.train.stopping import Terminated, terminations

if TYPE_CHECKING:
    from sora_jax.train.loop import TrainState

PROGRAM = "sora-jax train"
USAGE = f"usage: {PROGRAM} --config NAME|FILE[:argument] --workdir FOLDER [--config.key=value ...]"
_OVERRIDE = re.compile(r"--?config\.")


def parse(argv: Sequence[str]) -> tuple[ConfigDict, pathlib.Path, Hosts]:
    """The whole configuration with its overrides, the workdir, and the hosts.

    Args:
      argv: the arguments without the program's name.

    Raises:
      UserError: an unknown flag or key (with the nearest known one), a value of the wrong type, no such file.
    """
    changes, rest = split_overrides(argv)
    flags = _flags(rest)
    if not flags["config"]:
        raise UserError(f"--config is missing; {USAGE}")
    given = config_files.load(flags["config"])
    if not flags["workdir"]:
        raise UserError(f"--workdir is missing; {USAGE}")
    # Hosts meet before a configuration without an objective is refused.
    config = _fill(given, changes, objective=False)
    hosts = Hosts(**{field.name: flags[field.name] for field in dataclasses.fields(Hosts)})
    return config, user_path(flags["workdir"]), hosts


def make_config(name: str, changes: dict[str, str]) -> ConfigDict:
    """The configuration `--config=name` with `--config.<key>=<text>` for each of `changes`, every key filled in.

    Raises:
      UserError: there is none, a key is unknown, or a value is none that its key takes.
    """
    return _fill(config_files.load(name), changes)


def _fill(given: Mapping[str, Any], changes: Mapping[str, str], objective: bool = True) -> ConfigDict:
    from sora_jax.train import objectives  # with models and data: seconds

    config = objectives.complete(configurations.override(objectives.schema_of(given), given, changes))
    if objective or "objective" in config:
        objectives.check_run(config)
    return config.lock()


def split_overrides(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`--config.key=value`, `--config.key value` and, of what is true or false, `--config.key`; and all the rest."""
    changes, rest, words = {}, [], list(argv)
    while words:
        word = words.pop(0)
        if not _OVERRIDE.match(word):
            rest.append(word)
            continue
        key, sign, text = _OVERRIDE.sub("", word, count=1).partition("=")
        if not sign:
            is_value = words and (not words[0].startswith("-") or re.match(r"-[\d.]", words[0]))
            text = words.pop(0) if is_value else "true"
        changes[key] = text
    return changes, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 after `error: <sentence>` on stderr, 130 or 143 when stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--traceback" not in argv:
        # Libraries log the traceback of what they then raise; the sentence is enough.
        logging.set_verbosity(logging.FATAL)
    workdir: pathlib.Path | None = None
    try:
        check_version()
        if not argv or {"--help", "-h"} & set(argv):
            print(help_text(argv))
            return 0
        config, workdir, hosts = parse(argv)
        join(hosts, _digest(config))
        with terminations():
            state = run(config, workdir)
        first, step = jax.process_index() == 0, int(state.step)
        leave()
        if first and (onward := _onward(config, workdir, step, argv)):
            print(onward, file=sys.stderr)
    except UserError as error:
        if "--traceback" in argv:
            fail(2, error, traceback=True)
            raise
        print(f"error: {error}", file=sys.stderr)
        fail(2, error)
        return 2
    except KeyboardInterrupt as error:
        print(_broken_off(workdir, argv), file=sys.stderr)
        status = 143 if isinstance(error, Terminated) else 130
        fail(status, error)
        return status
    except BaseException as error:
        if isinstance(error, Exception):
            wait_for_loss_report()
        fail(1, error, traceback=True)
        raise
    return 0


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> TrainState:
    """Trains what `config.objective` names, or goes on with it, in `workdir`; see `train.loop.train`."""
    from sora_jax.train.loop import train  # with models and data: seconds
    from sora_jax.train.objectives import make_objective
    from sora_jax.train.sheets import ClipSheets

    return train(config, workdir, make_objective(config, workdir, ClipSheets))


def help_text(argv: Sequence[str]) -> str:
    """The command's flags; with --config among `argv` every key of that configuration too."""
    changes, rest = split_overrides(argv)
    flags = _flags([word for word in rest if word not in ("--help", "-h")])
    command = _command()
    flags_of_help = ["-h", "--help"]
    context = click.Context(
        command, info_name=PROGRAM, max_content_width=100, help_option_names=flags_of_help
    )
    text = f"{command.get_help(context)}\n\n"
    if flags["config"]:
        from sora_jax.train import objectives

        config = make_config(flags["config"], changes)
        listed = listing.list_settings(objectives.schema_of(config), config)
        return f"{text}Keys of {flags['config']}, each set with --config.KEY=VALUE:\n\n{listed}"
    names = "\n".join(f"  {name:14} {line}" for name, line in config_files.summaries().items())
    return f"{text}Configurations that come with sora_jax:\n{names}\n\n{click.wrap_text(_KEYS, 100)}"


_KEYS = (
    f"Every key of a configuration can be set; {PROGRAM} --config toyworld_dit --help lists them with what they mean, "
    "and sora-jax config toyworld_dit --config.optim.lr=3e-4 shows what a command would run with."
)


def _command() -> click.Command:
    """The flags; they are read apart from the overrides, whose names only the configuration knows."""
    docs = configurations.docs_of(Hosts)
    hosts = [
        click.Option(
            [f"--{field.name}"],
            default=field.default,
            type=float if isinstance(field.default, float) else str,
            show_default=isinstance(field.default, float),
            metavar="SECONDS" if isinstance(field.default, float) else "TEXT",
            help=_sentence(docs[field.name]),
        )
        for field in dataclasses.fields(Hosts)
    ]
    return click.Command(
        "train",
        params=[
            click.Option(
                ["--config"],
                metavar="NAME|FILE",
                help="A configuration that comes with sora_jax (toyworld_dit), a .py or .json file, or a run's folder; "
                "NAME:ARGUMENT hands the argument to it (toyworld_dit:Pico).",
            ),
            click.Option(
                ["--workdir"],
                metavar="FOLDER",
                help="Of the run: checkpoints, metrics, sheets. One that holds a run goes on with it.",
            ),
            *hosts,
            click.Option(["--traceback"], is_flag=True, help="Show where an error arose."),
        ],
        context_settings={"help_option_names": ["-h", "--help"], "allow_extra_args": True},
        options_metavar="--config NAME --workdir FOLDER [--config.KEY=VALUE ...]",
        help="Train a model, or go on with training it.\n\nCtrl-C and SIGTERM finish the step, save and end; the same "
        "command goes on from there. On several hosts the same command runs on each, with --hosts=auto where a TPU "
        "pod, SLURM or Open MPI says who is who, and else with --coordinator, --hosts and --host: see docs/scaling.md.",
    )


def _flags(rest: Sequence[str]) -> dict[str, Any]:
    command = _command()
    try:
        context = command.make_context(PROGRAM, list(rest))
    except click.NoSuchOption as error:
        name = error.option_name.lstrip("-")
        near = nearest(name, [parameter.name or "" for parameter in command.params], 0.7)
        hint = (
            f"Did you mean '--{near}'?" if near else f"A key of the configuration is --config.{name}=VALUE."
        )
        raise UserError(f"No such option {error.option_name!r}. {hint} See {PROGRAM} --help.") from error
    except click.ClickException as error:
        what = error.format_message().rstrip(".")
        raise UserError(f"The command line can't be read: {what}; {USAGE}") from error
    if context.args:
        raise UserError(f"{context.args[0]!r} is no flag of the training command; {USAGE}")
    return context.params


def _digest(config: ConfigDict) -> str:
    """What hosts must have alike to compute alike."""
    versions = [__version__, importlib.metadata.version("jax"), importlib.metadata.version("jaxlib")]
    return hashlib.sha256(repr([config.to_json(sort_keys=True), versions]).encode()).hexdigest()


def _onward(config: ConfigDict, workdir: pathlib.Path, step: int, argv: Sequence[str]) -> str:
    """What to do when training has returned at `step`."""
    if step < config.steps:
        return f"to go on: {PROGRAM} {shlex.join(argv)}"
    from sora_jax.train.objectives import NEXT

    toyworld = config.objective in ("dit", "distill") and config.data.source.startswith("toyworld")
    lines = NEXT["dit on toyworld"] if toyworld else NEXT.get(config.objective, ())
    if not lines:
        return ""
    data = (
        "" if config.data.source == "toyworld" else f"--config.data.source={shlex.quote(config.data.source)}"
    )
    commands = [
        line.replace("DATA", data).replace("WORKDIR", shlex.quote(str(workdir))).rstrip() for line in lines
    ]
    return "\n".join(("next:", *(f"  {line}" for line in commands)))


def _broken_off(workdir: pathlib.Path | None, argv: Sequence[str]) -> str:
    """What to say of a run that was ended at once, or before its first step."""
    from sora_jax.checkpoints.store import newest_step

    step = newest_step(workdir) if workdir else 0
    where = f"the newest checkpoint is {workdir}/checkpoints/{step}" if step else "there is no checkpoint yet"
    return f"stopped; {where}. To go on: {PROGRAM} {shlex.join(argv)}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
