"""One look at all of a folder's videos and captions before any is learned from: what there is, and what is damaged."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import av
from tqdm import tqdm

from sora_jax.data.cuts import SourceFile
from sora_jax.data.files import Found, find_files, read_caption
from sora_jax.errors import UserError
from sora_jax.media.decoding import is_raw, opened, packets
from sora_jax.media.pictures import moving_picture
from sora_jax.media.video import Report, open_reader, stream_frames

POLICIES = ("skip", "refuse")
_END_SECONDS = 1.0  # how long before its end a file is tried
_MISSING_SECONDS = 0.5  # that a file may end before its header says, without being taken for cut off
_NAMED = 20  # files that a summary names


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one look at a folder found.

    Attributes:
      path: the folder or file.
      source_files: what can be learned from, in order of their names.
      skipped: files, captions and folders that can't be read, each with the reason.
      captions: how many of the files have a caption with words in it.
      notes: what else should be known: pictures left out, captions without a video, files of other kinds.
    """

    path: str
    source_files: tuple[SourceFile, ...]
    skipped: Mapping[str, str]
    captions: int
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Summaries:
    """What several data sets are."""

    parts: tuple[Summary, ...]

    def metrics(self) -> dict[str, float]:
        """What belongs into metrics.jsonl: the sums of the parts' numbers."""
        metrics: collections.Counter[str] = collections.Counter()
        for part in self.parts:
            metrics.update(part.metrics())
        return dict(metrics)

    def __str__(self) -> str:
        return "\n".join(map(str, self.parts))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a data set of files is and how much of it could be read.

    Attributes:
      path: the folder or file.
      videos, pictures: how many can be learned from.
      seconds: of all videos together.
      captions: how many of them have words.
      shapes, rates: how many videos and pictures there are of each, as "256×144" and "24 fps".
      skipped: files, captions and folders left out at the start, each with the reason.
      damaged: files that proved damaged while clips were read, each with the first reason.
      replaced: clips for which others were taken.
      notes: what else should be known.
    """

    path: str
    videos: int
    pictures: int
    seconds: float
    captions: int
    shapes: Mapping[str, int]
    rates: Mapping[str, int]
    skipped: Mapping[str, str]
    damaged: Mapping[str, str]
    replaced: int
    notes: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """What belongs into metrics.jsonl."""
        files = self.skipped.keys() | self.damaged.keys()
        return {"data/skipped_files": float(len(files)), "data/replaced_clips": float(self.replaced)}

    def __str__(self) -> str:
        lasting = f"{self.seconds:.1f} seconds" if self.seconds < 600 else f"{self.seconds / 3600:.1f} hours"
        whole = [f"{count(self.videos, 'video')} ({lasting})"] if self.videos else []
        whole += [count(self.pictures, "picture")] if self.pictures else []
        words = f"{self.captions} of {self.videos + self.pictures} with captions"
        shapes = [
            few([f"{number} of {name}" for name, number in kinds.items()])
            for kinds in (self.shapes, self.rates)
        ]
        lines = [f"{self.path}: " + "; ".join([" and ".join(whole), words, *filter(None, shapes)]) + "."]
        if self.skipped:
            lines.append(
                f"skipped {count(len(self.skipped), 'file')} that can't be read: {listed(self.skipped)}."
            )
        if self.damaged:
            lines.append(
                f"{count(self.replaced, 'clip')} replaced, of damaged files: {listed(self.damaged)}."
            )
        return "\n  ".join(lines + [f"note: {note}." for note in self.notes])


def survey(path: str, damaged: str = "skip") -> Survey:
    """Opens every video and caption at `path`, decodes each video at its start and its end.

    Files are looked at in parallel; in one process each is looked at once, as long as it stays as it is.

    Args:
      path: a folder, searched with its subfolders, or a file.
      damaged: "skip" leaves out what can't be read, and says so in the result; "refuse" raises.

    Raises:
      UserError: there is nothing to learn from at `path`, or something can't be read and `damaged` is "refuse".
    """
    if damaged not in POLICIES:
        raise UserError(f"config.data.damaged={damaged!r} is unknown: say {' or '.join(POLICIES)}.")
    found, source_files, captions = find_files(path), [], 0
    skipped = {str(folder): reason for folder, reason in found.closed.items()}
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        looks = pool.map(_look, found.files)
        bar = tqdm(looks, "checking files", len(found.files), unit="file", delay=5, leave=False, disable=None)
        for file, look in zip(found.files, bar, strict=True):
            if isinstance(look, str):
                skipped[str(file)] = look
                continue
            caption = ""
            if file in found.captions:
                try:
                    caption = read_caption(found.captions[file])
                except UserError as error:
                    skipped[str(found.captions[file])] = without_name(error, found.captions[file])
            captions += bool(caption)
            name = file.relative_to(path).as_posix() if os.path.isdir(path) else file.name
            source_files.append(dataclasses.replace(look, name=name, caption=caption))
    if skipped and damaged == "refuse":
        raise UserError(
            f"{count(len(skipped), 'file')} at {path} can't be read: {listed(skipped)}; fix or remove them, or set "
            "config.data.damaged='skip' to train without them."
        )
    if not source_files:
        raise UserError(f"{path} holds no video that can be read: {listed(skipped)}.")
    return Survey(
        str(path), tuple(source_files), skipped, captions, (*_notes(found), *_remarks(source_files))
    )


def inspect(file: str | os.PathLike[str]) -> SourceFile:
    """What a video or picture is, found by opening it and decoding its first frame and its end.

    Raises:
      UserError: it is damaged, cut off or no video.
    """
    report = Report()
    header = open_reader(file, report=report).header
    height, width = header.size
    for _ in stream_frames(file):
        break
    if header.still:
        return SourceFile(str(file), "", 1.0, 1.0, height, width, picture=True, remarks=report.notes)
    seconds = header.seconds
    if moving_picture(file) is None:  # else Pillow has read it whole
        has_duration, end = _find_end(file, seconds)
        if end < seconds - 1.5 / header.fps:
            if has_duration and end < seconds - _MISSING_SECONDS:
                raise UserError(
                    f"{file} ends at {end:.1f} of {seconds:.1f} seconds: it was cut off while it was copied or "
                    "written; copy it again."
                )
            seconds = end
    return SourceFile(str(file), "", header.fps, seconds, height, width, remarks=report.notes)


def listed(reasons: Mapping[str, str], most: int = _NAMED) -> str:
    """Files with their reasons, as text; those beyond `most` are counted."""
    parts = [f"{file} ({reason})" for file, reason in list(reasons.items())[:most]]
    return ", ".join(parts) + (f" and {len(reasons) - most} more" if len(reasons) > most else "")


def count(number: int, noun: str) -> str:
    """'1 file', '2 files'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _look(file: pathlib.Path) -> SourceFile | str:
    """The file, or why it can't be used."""
    try:
        stat = file.stat()
    except OSError as error:
        return f"can't be opened: {error.strerror}"
    return _looked(str(file), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _looked(file: str, size: int, changed: int) -> SourceFile | str:
    del size, changed  # another content, another look
    try:
        return inspect(file)
    except UserError as error:
        return without_name(error, file)
    except Exception as error:  # a damaged file makes decoders stumble in ways of their own
        return f"can't be decoded: {without_name(error, file)}"


def without_name(error: Exception, file: str | os.PathLike[str]) -> str:
    """A sentence about a file without the file's name, nor a full stop."""
    return str(error).removeprefix(f"{file} ").rstrip(". ")


def _find_end(file: str | os.PathLike[str], seconds: float) -> tuple[bool, float]:
    """Whether the header tells the pictures' own duration, and where the last frame that is there ends.

    The last second alone is decoded. Where it isn't there all packets are read, and none is decoded.
    """
    with opened(file) as (container, stream):
        if is_raw(container):  # its duration is the number of its packets
            return False, seconds
        tick, has_duration = float(stream.time_base), bool(stream.duration or "DURATION" in stream.metadata)
        offset = (stream.start_time or 0) * tick
        try:
            if seconds > 2 * _END_SECONDS:
                container.seek(int((seconds - _END_SECONDS + offset) / tick), stream=stream)
            last_second = packets(container, stream)
        except av.FFmpegError:
            last_second = iter(())
        ends = []
        for packet in last_second:
            # Some containers jump to a place from which the first pictures can't be decoded.
            with contextlib.suppress(av.FFmpegError):
                for frame in stream.codec_context.decode(packet):
                    if frame.pts is None:
                        return False, seconds
                    ends.append((frame.pts + (frame.duration or 0)) * tick - offset)
        if ends:
            return has_duration, max(ends)
    with opened(file) as (container, stream):
        ends = [
            (packet.pts + (packet.duration or 0)) * tick - offset
            for packet in packets(container, stream)
            if packet.pts is not None
        ]
    return True, max(ends, default=0.0)


def _notes(found: Found) -> Iterable[str]:
    if found.posters:
        yield f"{count(len(found.posters), 'picture')} named like a video of its folder left out"
    if found.alone:
        names = few([file.name for file in found.alone])
        yield f"{count(len(found.alone), 'text')} without a video of that name: {names}"
    if found.others:
        kinds = collections.Counter(found.others).most_common()
        others = few([f"{number} {suffix}" for suffix, number in kinds])
        yield f"{count(sum(found.others.values()), 'file')} of other kinds left out: {others}"


def _remarks(source_files: Sequence[SourceFile]) -> Iterable[str]:
    """Each remark once, with the files that it is about."""
    about: dict[str, list[str]] = {}
    for source_file in source_files:
        for remark in source_file.remarks:
            about.setdefault(remark.rstrip("."), []).append(source_file.name)
    for remark, names in about.items():
        yield f"each of {few(names)} {remark}" if len(names) > 1 else f"{names[0]} {remark}"


def few(names: Sequence[str], most: int = 5) -> str:
    """The names, or the first `most` of them."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
