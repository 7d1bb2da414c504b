"""Train from a configuration file: `python -m sora_jax.train --config configs/x.py --workdir runs/x`.

`--config configs/x.py:tiny` hands "tiny" to the file's get_config, `--config.optim.lr=3e-4` sets a value.

On several hosts the same command runs on each, with one more flag where a TPU pod, SLURM or Open MPI says who is who
(--hosts=auto), and else three: --coordinator=ADDRESS:PORT of host 0, --hosts=2, and --host=0 or --host=1. Instead of
them the environment may have JAX_COORDINATOR_ADDRESS, SORA_JAX_HOSTS and SORA_JAX_HOST. Hosts wait --join_timeout=300
seconds for each other, and take one for gone of which they heard nothing for --host_timeout=60. See docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.metadata
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

import sora_jax
from sora_jax.backend import check_version
from sora_jax.errors import UserError
from sora_jax.hosts import Hosts, await_loss, fail, join, leave

USAGE = (
    "usage: python -m sora_jax.train --config configs/x.py[:arg] --workdir runs/x [--config.key=value ...]"
)


def parse(argv: Sequence[str]) -> tuple[ml_collections.ConfigDict, pathlib.Path, Hosts]:
    """The configuration with its overrides, the workdir, and the hosts.

    Args:
      argv: the arguments without the program's name.

    Raises:
      UserError: an unknown flag or key (with the nearest known one), a value of the wrong type, no such file.
    """
    overrides = [flag.lstrip("-").partition("=")[0] for flag in argv if re.match(r"--?config\.", flag)]
    if (path := _value(argv, "config")) is None:
        raise UserError(f"--config is missing; {USAGE}")
    known = list(_keys(_load(path)))
    for key in (name.removeprefix("config.") for name in overrides):
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0)
            raise UserError(f"config.{key} is no key of {path}: did you mean config.{near[0]}?")

    arguments = ["train", *argv]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_boolean("traceback", False, "Show tracebacks.", flag_values=values)
    for field in dataclasses.fields(Hosts):
        define = flags.DEFINE_float if isinstance(field.default, float) else flags.DEFINE_string
        define(field.name, field.default, "See sora_jax.hosts.Hosts.", flag_values=values)
    try:
        rest = values(arguments)[1:]
    except (flags.Error, LookupError, TypeError, ValueError) as error:
        raise UserError(f"The command line can't be read: {_last_line(error)}; {USAGE}") from error
    if rest:
        raise UserError(f"{rest[0]!r} is no flag of the training command; {USAGE}")
    if values.workdir is None:
        raise UserError(f"--workdir is missing; {USAGE}")
    hosts = Hosts(**{field.name: values[field.name].value for field in dataclasses.fields(Hosts)})
    return values.config, pathlib.Path(values.workdir), hosts


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 2 after `error: <sentence>` on stderr."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"--help", "-h"} & set(argv):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    if "--traceback" not in argv:
        # Libraries log the traceback of what they then raise; the sentence is enough.
        logging.set_verbosity(logging.FATAL)
    try:
        check_version()
        config, workdir, hosts = parse(argv)
        join(hosts, _digest(config))
        from sora_jax.train.loop import train

        train(config, workdir)
        leave()
    except UserError as error:
        if "--traceback" in argv:
            fail(2, error, traceback=True)
            raise
        print(f"error: {error}", file=sys.stderr)
        fail(2, error)
        return 2
    except BaseException as error:
        if isinstance(error, Exception):
            await_loss()
        fail(1, error, traceback=True)
        raise
    return 0


def _digest(config: ml_collections.ConfigDict) -> str:
    """What hosts must have alike to compute alike."""
    versions = [sora_jax.__version__, importlib.metadata.version("jax"), importlib.metadata.version("jaxlib")]
    return hashlib.sha256(repr([config.to_json(sort_keys=True), versions]).encode()).hexdigest()


def _value(argv: Sequence[str], name: str) -> str | None:
    """The value of a flag, written `--name=value` or `--name value`."""
    for flag, following in zip(argv, [*argv[1:], None], strict=True):
        if flag.startswith("-") and flag.lstrip("-").partition("=")[0] == name:
            return flag.partition("=")[2] or following
    return None


def _load(path: str) -> ml_collections.ConfigDict:
    file = pathlib.Path(path.split(":", 1)[0])
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [other.name for other in file.parent.glob("*.py")], 1, 0)
        hint = f": did you mean {file.parent / near[0]}?" if near else "."
        raise UserError(f"There is no configuration file {file}{hint}")
    try:
        return config_flags.config_flags.ConfigFileFlagParser("config").parse(path)
    except Exception as error:
        # What a configuration raises comes wrapped, as the same type, with its traceback for a text.
        last = _last_line(error).removeprefix("sora_jax.errors.UserError: ")
        raise UserError(f"{path} gives no configuration: {last}.") from error


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
