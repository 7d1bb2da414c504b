"""Which cases of a test are run by `pytest -m slow` alone."""

from collections.abc import Sequence
from typing import Any

import pytest


def rest_slow(cases: Sequence[Any], keep: int = 1) -> list[Any]:
    """The cases for `pytest.mark.parametrize`, of which those after the first `keep` are marked slow."""
    as_tuple = lambda case: case if isinstance(case, tuple) else (case,)
    slow = [pytest.param(*as_tuple(case), marks=pytest.mark.slow) for case in cases[keep:]]
    return [*cases[:keep], *slow]
