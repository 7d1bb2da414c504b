"""What the command line is made of: kinds of values, files tried before the work begins, a bar, a table."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from sora_jax.errors import TEMPORARY, UserError, as_user_error, check_names, short_suffix, user_path

VIDEO_SUFFIXES = (".mp4", ".webm", ".gif", ".png", ".jpg", ".jpeg")
NO_CLOBBER, EXISTED = "sora_jax.no_clobber", "sora_jax.existed"  # of a command's context


class Number(click.ParamType):
    """A finite number above `above`; `at_least` where the bound itself will do."""

    name = "number"

    def __init__(self, above: float = -math.inf, at_least: float = -math.inf) -> None:
        self.above, self.at_least = above, at_least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number.", param, ctx)
        if not (math.isfinite(number) and number > self.above and number >= self.at_least):
            least = f"above {self.above:g}" if math.isfinite(self.above) else f"of at least {self.at_least:g}"
            self.fail(f"{value} is not a number {least}.", param, ctx)
        return number


class ListOf(click.ParamType):
    """Values of one type, separated by commas."""

    name = "list"

    def __init__(self, of: click.ParamType) -> None:
        self.of = of

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self.of.convert(part.strip(), param, ctx) for part in value.split(","))


class Place(click.ParamType):
    """first, last or seconds."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        return value if value in ("first", "last") else Number(at_least=0).convert(value, param, ctx)


class Pair(click.ParamType):
    """Two numbers of at least 0 with `sign` between them; where one may stand `alone`, it is both."""

    name = "pair"

    def __init__(self, sign: str, alone: bool = False) -> None:
        self.sign, self.alone = sign, alone

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        first, sign, second = value.partition(self.sign)
        if not sign and not self.alone:
            self.fail(f"{value!r} is not two numbers with {self.sign!r} between.", param, ctx)
        number = Number(at_least=0)
        return number.convert(first, param, ctx), number.convert(second if sign else first, param, ctx)


class Size(click.ParamType):
    """WxH as (height, width)."""

    name = "WxH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,9})[xX×*:](\d{1,9})", value.strip())
        if match is None or not (int(match[1]) and int(match[2])):
            self.fail(f"{value!r} is not a size: write width x height, such as 640x360.", param, ctx)
        return int(match[2]), int(match[1])


class Output(click.ParamType):
    """A file to be written; that it can be is tried before the work begins."""

    name = "file"

    def __init__(self, *suffixes: str) -> None:
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> pathlib.Path:
        path = user_path(value)
        check_output(path, self.suffixes)
        return path


class InputFile(click.Path):
    """A file to be read, which must exist."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


def place_outputs(output: str, wanted: Sequence[tuple[str, int]]) -> list[pathlib.Path]:
    """Where each (prompt, seed) goes; that all can be written is tried."""
    path, paths = user_path(output), []
    if os.path.isdir(path) or output.endswith(("/", os.sep)):
        for prompt, seed in wanted:
            words = "-".join(re.findall(r"\w+", prompt.lower()))[:48].strip("-")
            stem = f"{words or 'clip'}-{seed}"
            place, again = path / f"{stem}.mp4", 1
            while place in paths:
                again += 1
                place = path / f"{stem}-{again}.mp4"
            paths.append(place)
    elif not path.suffix:
        raise UserError(
            f"{output} is neither an existing folder nor a video file: its name must end in "
            f"{' or '.join(VIDEO_SUFFIXES)}, or in / for a new folder."
        )
    elif len(wanted) == 1:
        paths = [path]
    else:
        paths = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, len(wanted) + 1)]
    for path in paths:
        check_output(path, VIDEO_SUFFIXES)
    return paths


def check_output(path: pathlib.Path, suffixes: Sequence[str] = ()) -> None:
    """Raises UserError where `path` has none of the suffixes or can't be written; leaves nothing behind."""
    if os.path.isdir(path):
        raise UserError(f"{path} can't be written: it is a folder; name a file in it.")
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{path} can't be written: its name must end in {' or '.join(suffixes)}.")
    context = click.get_current_context(silent=True)
    if context is not None and os.path.exists(path):
        if context.meta.get(NO_CLOBBER):
            raise UserError(f"{path} is there already: choose another name, or leave out --no-clobber.")
        context.meta.setdefault(EXISTED, set()).add(path)
    target = pathlib.Path(os.path.realpath(path))  # of a link
    folder = target.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        check_names(folder, target)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=TEMPORARY, suffix=short_suffix(target)) as file:
            file.write(bytes(1 << 16))  # a full disk still lets an empty file be made
    except OSError as error:
        raise as_user_error(error, path) from error


@contextlib.contextmanager
def progress_bar(visible: bool, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with speed and time left; yields what is to be called with (done, in all)."""
    from tqdm import tqdm

    bar: tqdm | None = None

    def progress(done: int, in_all: int) -> None:
        nonlocal bar
        if bar is None:  # not before: errors found at the beginning are printed without a bar above them
            often = 0.1 if sys.stderr.isatty() else 10.0
            bar = tqdm(unit=unit, disable=not visible, mininterval=often, dynamic_ncols=True, total=in_all)
        bar.total = in_all
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """Columns under their heads; the last `numbers` of them are flush right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if i >= len(head) - numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
