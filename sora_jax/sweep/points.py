"""From a sweep's file to its points: whole configurations, each checked as a training command's is, and named."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sora_jax import config as configurations
from sora_jax import values
from sora_jax.errors import UserError, nearest, user_path
from sora_jax.media.digests import value_digest
from sora_jax.sweep.algebra import SEED, Choice
from sora_jax.sweep.evaluations import Evaluation
from sora_jax.train import config_files, objectives

DEBUG = "debug"
_KEY = 12  # letters
# What makes the loss of two runs the same quantity, whatever they were trained with.
_PLAIN = {"flow.text_dropout": 0.0, "flow.text_noise": 0.0, "flow.routing": 0.0, "flow.contrast": 0.0}
# Keys that came after sweeps had been run, with their defaults: left out of hashes, so that finished runs stay valid.
_YOUNGER = (
    ("dit", "caption", "tokens"),
    ("pipeline", "caption_noise", 0.0),
    ("pipeline", "buckets", False),
)
_OWN = ("dit", "text", "autoencoder")  # of the run, not of what all arms have in common


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep's `get_sweep` returns.

    Attributes:
      base: the configuration that all points begin with, as `--config` takes it: "toyworld_dit:small".
      points: of `sweep.algebra`.
      fixed: overrides of all points, under those of the command line and of the points. The debug form of a sweep that
        has none of its own leaves them out.
      evaluations: what is measured of each finished run besides what training logs.
    """

    base: str
    points: Sequence[Choice]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluations: Sequence[Evaluation] = ()

    def __post_init__(self) -> None:
        if not self.points:
            raise UserError("The sweep has no points: give at least one, such as seeds(3).")


@dataclasses.dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
      index: its place in the sweep.
      labels: what it is called on each axis.
      base: the configuration that it begins with.
      overrides: of that, as text, as flags of a training command have it.
      config: all of it, every key filled in.
      common: the same without what this point alone changes: what all arms are measured by.
      evaluations: what is measured of it.
    """

    index: int
    labels: dict[str, str]
    base: str
    overrides: dict[str, str]
    config: ConfigDict
    common: ConfigDict
    evaluations: tuple[Evaluation, ...]

    @property
    def run_key(self) -> str:
        """Names what training depends on, but the code."""
        return _digest(_settings(self.config))

    @property
    def sweep_key(self) -> str:
        """Names what the points of a sweep have in common: results of other settings aren't compared with these."""
        return _digest([_settings(self.common), [dataclasses.asdict(one) for one in self.evaluations]])

    @property
    def key(self) -> str:
        """Names what the result depends on, but the code: the same key, the same result."""
        return _digest([self.run_key, self.sweep_key])

    def describe(self, sweep: str) -> dict[str, Any]:
        """What its row begins with; `sweep` is that one's name."""
        return {
            "key": self.key,
            "sweep": sweep,
            "sweep_key": self.sweep_key,
            "index": self.index,
            "labels": self.labels,
            "base": self.base,
            "overrides": self.overrides,
            "seed": self.config.get("seed", 0),
        }

    @property
    def title(self) -> str:
        """The labels as words: "native, seed 0"."""
        words = [f"seed {text}" if axis == SEED else text for axis, text in self.labels.items()]
        return ", ".join(words) or "the only run"

    @property
    def folder(self) -> str:
        """The name of its workdir: what is measured may change, and it isn't trained again."""
        words = re.sub(r"[^\w.=-]+", "-", self.title).strip("-")
        return f"{words[:60]}-{self.run_key}"


def shipped() -> dict[str, pathlib.Path]:
    """The sweeps that come with the package, by name."""
    configs = next(iter(config_files.shipped().values())).parent
    return {path.stem: path for path in sorted((configs / "ablations").glob("*.py")) if path.stem[0] != "_"}


def name_of(file: str) -> str:
    """What a sweep is called, whose FILE[:ARGUMENT] this is: "resolution-debug"."""
    path, argument = _find(file)
    return f"{path.stem}-{argument}" if argument else path.stem


def load(file: str, debug: bool = False) -> Sweep:
    """The sweep in a Python file.

    Args:
      file: the name of one that comes with sora_jax ("resolution"), or a Python file with a function `get_sweep`, with
        an argument for that after a colon if it takes one: "resolution:Nano".
      debug: its debug form, a run of all parts of every arm, in which nothing is learned: `get_sweep("debug")` where it
        takes an argument; else the debug form of its base. Every arm has its first seed alone then, and evaluations
        are as short as they go.

    Raises:
      UserError: there is none, or it gives no sweep.
    """
    path, argument = _find(file)
    debug = debug or argument == DEBUG
    if debug and argument not in ("", DEBUG):
        raise UserError(f"{file} can't be had in its debug form too: leave out :{argument}, or --debug.")
    try:
        sweep = _run(path, DEBUG if debug else argument, debug)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # the file's own code may raise anything
        reason = (str(error).strip().splitlines() or ["no more is known"])[-1].rstrip(".")
        raise UserError(f"{path} gives no sweep: {type(error).__name__}: {reason}.") from error
    if not isinstance(sweep, Sweep):
        raise UserError(f"{path} gives no sweep: get_sweep returns {type(sweep).__name__}, not a Sweep.")
    if debug:
        arms = {_arm(point): point for point in reversed(sweep.points)}  # each with its first seed
        evaluations = [one.debug() for one in sweep.evaluations]
        sweep = dataclasses.replace(sweep, points=list(arms.values())[::-1], evaluations=evaluations)
    return sweep


def resolve(sweep: Sweep, changes: Mapping[str, str] | None = None) -> list[Point]:
    """The sweep's points, each checked as a training command's configuration is; points that are one run are one.

    Args:
      changes: further overrides of all points, as text, of the command line.

    Raises:
      UserError: a key is unknown (the nearest is named) or has a value that it doesn't take, a point and the command
        line set the same one, or two points of other names are the same run.
    """
    given = config_files.load(sweep.base)
    shared = {key: _text(value) for key, value in sweep.fixed.items()} | dict(changes or {})
    common = _complete(given, shared, "")
    for one in sweep.evaluations:
        _check_evaluation(one, common)
    points: dict[str, Point] = {}
    for choice in sweep.points:
        own = {key: _text(value) for key, value in choice.overrides.items()}
        if same := sorted(set(own) & set(changes or {})):
            raise UserError(f"config.{same[0]} is what the sweep varies: leave it out of the command line.")
        labels = dict(choice.labels)
        config = _complete(given, shared | own, ", ".join(f"{axis}={text}" for axis, text in labels.items()))
        point = Point(len(points), labels, sweep.base, shared | own, config, common, tuple(sweep.evaluations))
        there = points.setdefault(point.key, point)
        if there.labels != labels:
            raise UserError(
                f"{there.title!r} and {point.title!r} are the same run under two names: leave one of them out."
            )
    return list(points.values())


def _arm(point: Choice) -> tuple[tuple[str, str], ...]:
    return tuple((axis, text) for axis, text in point.labels.items() if axis != SEED)


def loss_config(
    common: ConfigDict, run: ConfigDict, overrides: Mapping[str, Any], own: Sequence[str] = ()
) -> ConfigDict:
    """The configuration by which a run's loss is measured: clips, packing and sigmas of all arms, the run's model.

    Args:
      common: what the sweep's arms are changes of.
      run: the run's own.
      overrides: keys and values that are measured with, such as {"data.resolutions": (128,)}.
      own: keys that stay the run's own, such as "pipeline.seq_len" where patches differ.

    Raises:
      UserError: a key isn't one of the configuration, or a value none of its type.
    """
    schema, trained = objectives.schema_of(common), run.to_dict()
    changes = {key: _get(trained, key) for key in own} | _PLAIN | dict(overrides)
    given = common.to_dict() | {name: trained[name] for name in _OWN}
    written = {key: _text(value) for key, value in changes.items()}
    config = objectives.complete(configurations.override(schema, given, written))
    objectives.check_run(config)
    return config


def latents_folder(config: ConfigDict, latents: str | os.PathLike[str]) -> str:
    """Where the encoded clips of a configuration are kept: one folder for all runs that read the same clips.

    It is named after everything that decides which they are, so a cache of other clips is never in the way.
    """
    if config.get("latents") is None:
        return ""
    own = {name: config.to_dict()[name] for name in ("data", "latents", "text", "autoencoder")}
    return config.latents.folder or str(pathlib.Path(latents) / _digest(own))


def training_config(point: Point, latents: str | os.PathLike[str]) -> ConfigDict:
    """The point's configuration with the latents of all runs that read the same clips in one place."""
    config = ConfigDict(point.config.to_dict())
    if folder := latents_folder(config, latents):
        config.latents.folder = folder
    return config


def _check_evaluation(one: Evaluation, common: ConfigDict) -> None:
    if one.kind != "loss":
        return
    if common.objective != "dit":
        raise UserError(
            f"The loss is compared of transformers alone, and this sweep trains objective {common.objective!r}: "
            "leave the evaluation 'loss' out; the held-out loss of each run's own data is recorded in any case."
        )
    loss_config(common, common, one.settings.get("overrides", {}), one.settings.get("own", ()))


def _get(config: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        if part not in config:
            raise UserError(
                f"config.{key} is no key of this configuration: leave it out of the loss's own keys."
            )
        config = config[part]
    return config


def _settings(config: ConfigDict) -> dict[str, Any]:
    own = config.to_dict()
    own.get("latents", {}).pop("folder", None)  # where clips are kept changes nothing
    for section, name, default in _YOUNGER:
        if own.get(section, {}).get(name) == default:
            del own[section][name]
    return own


def _digest(value: Any) -> str:
    return value_digest(value)[:_KEY]


def _complete(given: Mapping[str, Any], changes: Mapping[str, str], where: str) -> ConfigDict:
    try:
        schema = objectives.schema_of(given)
        config = objectives.complete(configurations.override(schema, given, changes))
        objectives.check_run(config)
    except UserError as error:
        raise UserError(f"In the sweep's point {where}: {error}" if where else str(error)) from error
    return config


def _text(value: Any) -> str:
    return value if isinstance(value, str) else values.write(values.fixed(value))


def _find(file: str) -> tuple[pathlib.Path, str]:
    if user_path(file).is_file():
        return user_path(file), ""
    stem, _, argument = file.partition(":")
    if user_path(stem).is_file():
        return user_path(stem), argument
    known = shipped()
    if stem in known:
        return known[stem], argument
    near = nearest(pathlib.Path(stem).stem, known)
    hint = f"did you mean {near}?" if near else f"those that come with sora_jax are {', '.join(known)}."
    raise UserError(f"There is no sweep {stem}: {hint}")


def _run(path: pathlib.Path, argument: str, debug: bool) -> Any:
    name = f"sora_jax_sweep_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError("a sweep is a Python file, whose name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
        if not callable(get := getattr(module, "get_sweep", None)):
            raise UserError("it has no function get_sweep, which returns the sweep.")
        if inspect.signature(get).parameters:
            return get(argument) if argument else get()
        if argument and not debug:
            raise UserError(f"its get_sweep takes no argument: leave out :{argument}.")
        sweep = get()
        if debug and isinstance(sweep, Sweep):
            base = sweep.base.partition(":")[0]
            sweep = dataclasses.replace(sweep, base=f"{base}:{DEBUG}", fixed={})
        return sweep
    finally:
        del sys.modules[name]
