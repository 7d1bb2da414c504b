"""Scripts of experiments as modules: by name, from their own folder, and forgotten afterwards."""

import contextlib
import importlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


@contextlib.contextmanager
def scripts_of(experiment: str) -> Iterator[Callable[[str], ModuleType]]:
    """Gives a function that imports a script of ``experiments/<experiment>`` by name, as if run from its folder.

    Afterwards `sys.path` and `sys.modules` are as before: other folders have scripts of the same names.
    """
    folder = EXPERIMENTS / experiment
    paths, modules = sys.path.copy(), sys.modules.copy()
    for name in {path.stem for path in EXPERIMENTS.rglob("*.py")}:
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = paths
        for name, module in list(sys.modules.items()):
            if str(EXPERIMENTS) in str(getattr(module, "__file__", "")):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in modules.items() if name not in sys.modules})
