"""Which cases of a test are run by `pytest -m slow` alone."""

from collections.abc import Sequence
from typing import Any

import pytest


def rest_slow(cases: Sequence[Any], keep: int = 1, several: bool = False) -> list[Any]:
    """The cases for `pytest.mark.parametrize`, of which those after the first `keep` are marked slow.

    `several`: whether a case is a tuple of several arguments.
    """
    slow = [pytest.param(*(case if several else (case,)), marks=pytest.mark.slow) for case in cases[keep:]]
    return [*cases[:keep], *slow]
