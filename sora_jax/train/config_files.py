"""Finding a run's configuration: a shipped one by its name, a Python or JSON file, or a run's folder."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from sora_jax.errors import UserError, nearest


def shipped() -> dict[str, pathlib.Path]:
    """The configurations that come with the package, by name."""
    package = pathlib.Path(__file__).parents[1]
    # A wheel has them inside; in a checkout they are next to the package.
    folder = next((one for one in (package / "configs", package.parent / "configs") if one.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def summaries() -> dict[str, str]:
    """The first line of each shipped configuration's docstring, by name."""
    return {
        name: path.read_text(encoding="utf-8").split("\n")[0].strip('"') for name, path in shipped().items()
    }


def load(name: str) -> Mapping[str, Any]:
    """What `--config NAME` stands for, as it was written: nothing is filled in.

    Args:
      name: a shipped configuration (`toyworld_dit`), a Python file with a function `get_config`, either with an
        argument for it (`toyworld_dit:Pico`); a file of JSON; or the folder of a run, whose config.json is meant.

    Raises:
      UserError: there is none, or it gives no configuration.
    """
    path, argument = _find(name)
    try:
        is_code = path.suffix == ".py"
        given = _run(path, argument) if is_code else json.loads(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # the file's own code may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")
        raise UserError(f"{name} gives no configuration: {reason}.") from error
    if argument and path.suffix != ".py":
        raise UserError(f"{path} takes no argument, as Python files do: leave out :{argument}.")
    if not hasattr(given, "items"):
        raise UserError(f"{name} gives no configuration: it is {type(given).__name__}, no table of keys.")
    return given


def _find(name: str) -> tuple[pathlib.Path, str]:
    stem, _, argument = name.partition(":")
    if pathlib.Path(name).is_file():
        return pathlib.Path(name), ""
    if pathlib.Path(stem).is_file():
        return pathlib.Path(stem), argument
    if stem in shipped():
        return shipped()[stem], argument
    if (pathlib.Path(name) / "config.json").is_file():
        return pathlib.Path(name) / "config.json", ""
    file = pathlib.Path(stem)
    if file.suffix or file.parent != pathlib.Path():
        others = [str(other) for other in file.parent.glob("*") if other.suffix in (".py", ".json")]
        # configs/toyworld_dit.py from a folder that isn't the checkout: it is shipped too, under its name.
        near = file.stem if file.stem in shipped() else nearest(str(file), others, 0)
        hint = f": did you mean {near}?" if near else "."
        raise UserError(f"There is no configuration file {file}{hint}")
    near = nearest(stem, shipped())
    hint = f"did you mean {near}?" if near else f"those that come with sora_jax are {', '.join(shipped())}."
    raise UserError(f"There is no configuration {stem}: {hint}")


def _run(path: pathlib.Path, argument: str) -> Any:
    name = f"sora_jax_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
        return module.get_config(argument) if argument else module.get_config()
    finally:
        del sys.modules[name]
