"""The latent cache: every clip encoded once by the frozen VAE and text encoder, kept in ArrayRecord shards."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import datetime
import hashlib
import json
import os
import pathlib
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import grain
import jax
import numpy as np
from array_record.python import array_record_module
from flax import serialization
from tqdm import tqdm

from sora_jax.distributed.hosts import assert_equal_across_hosts, barrier
from sora_jax.errors import UserError, as_user_error, atomic_path, locked
from sora_jax.media.clip import Clip, ClipSource, read_clips

Item = TypeVar("Item")
Record = dict[str, Any]
"""latent: float16[t,y,x,c]; fps: float; key: str; captions: {kind: {text: float16[m,E], time: float16[m]}};
ends: int32[t], first: bool[t], given: bool[t]: its spans (see `canvas.Canvas`), and the layout's conditioning
frames."""


class Records(Protocol):
    """A random-access sequence of records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


_META, _LOCK = "meta.json", ".lock"
_FORMAT = 2
_CLIPS_PER_SHARD = 1000
_PATIENCE = 120.0  # seconds
# The time that is left is reported after so many clips and seconds.
_TIMED_CLIPS, _TIMED_SECONDS = 32, 5.0


class LatentCache:
    """A finished latent cache: a random-access sequence of `Record`s, picklable.

    Attributes:
      mean, std: float32[c], of each latent channel over all clips, every position counting once.
      fingerprint: names what encoded it.

    Raises:
      UserError: the folder holds no finished cache, or one of its files is gone.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = pathlib.Path(folder)
        try:
            meta = json.loads((self.folder / _META).read_text())
        except (OSError, ValueError):
            raise UserError(f"{folder} holds no finished latent cache: encode the clips first.") from None
        if meta["format"] != _FORMAT:
            raise UserError(
                f"{folder} is a latent cache of another version of sora_jax: encode the clips again."
            )
        paths = [self.folder / name for name in meta["shards"]]
        for path in paths:
            if not path.exists():
                raise UserError(
                    f"{path} is missing: delete the rest of this latent cache and encode the clips again."
                )
        self.mean = np.array(meta["mean"], np.float32)
        self.std = np.array(meta["std"], np.float32)
        self.fingerprint: str = meta["fingerprint"]
        self._clips: int = meta["clips"]
        self._bytes = _open_shards(paths)

    def __len__(self) -> int:
        return self._clips

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return serialization.msgpack_restore(self._bytes[index])

    def __repr__(self) -> str:
        return f"LatentCache({str(self.folder)!r}, clips={self._clips})"


def write_latents(
    source: ClipSource,
    encode: Callable[[list[Clip]], list[Record]],
    folder: str | os.PathLike[str],
    fingerprint: str,
    clips: int | None = None,
    batch: int = 8,
    progress: bool = True,
    parts: Mapping[str, str] | None = None,
    known: Callable[[int], Record] | None = None,
) -> LatentCache:
    """Encodes the first `clips` clips of `source` (default: all) into a latent cache in `folder`.

    A finished cache of the same `fingerprint` and number of clips is returned as it is. An interrupted one goes on
    where it stopped: each batch is appended to its shard's `.part`, and `meta.json`, which makes a cache finished, is
    written last. Several hosts of one job, which share the folder, split its shards; another job that wants the same
    waits, where files can be locked.

    Args:
      source: read in order, or as its own `read` gives the clips of a shard; they may differ in shape.
      encode: takes exactly `batch` clips of one shape, so it compiles once per shape, and returns a record for each.
        The rest of a shape is padded with copies of its last clip, whose records are dropped.
      fingerprint: names everything the records depend on: what the data set holds, its configuration, and both
        encoders' weights.
      progress: whether to show progress and the time left.
      parts: stored with the latents: what `fingerprint` is made of, see `earlier_cache`.
      known: gives the record of a clip by its index, where none has to be encoded.

    Raises:
      UserError: the folder holds another cache, it can't be written, the source is too short, or a latent isn't finite.
    """
    folder = pathlib.Path(folder)
    clips = len(source) if clips is None else clips
    if not 0 < clips <= len(source):
        raise UserError(f"{clips} clips can't be encoded: the data set has {len(source)}.")
    if cache := _finished(folder, fingerprint, clips):
        return cache
    with contextlib.ExitStack() as closing:
        if jax.process_index() == 0:
            waiting = f"note: another process is encoding the clips in {folder}: waiting for it"
            closing.enter_context(locked(folder / _LOCK, waiting))
        barrier()
        return _finished(folder, fingerprint, clips) or _write(
            source, encode, folder, fingerprint, clips, batch, progress, parts or {}, known
        )


def _finished(folder: pathlib.Path, fingerprint: str, clips: int) -> LatentCache | None:
    """The cache in the folder; None where it isn't finished."""
    finished = (folder / _META).exists()
    assert_equal_across_hosts(
        finished, f"Only some hosts see a latent cache in {folder}: it must be in a folder that they share."
    )
    if not finished:
        return None
    cache = LatentCache(folder)
    if (cache.fingerprint, len(cache)) != (fingerprint, clips):
        raise UserError(
            f"{folder} holds {len(cache)} latents of {cache.fingerprint!r}, not {clips} of {fingerprint!r}: "
            "delete it or choose another folder."
        )
    return cache


def _write(
    source: ClipSource,
    encode: Callable[[list[Clip]], list[Record]],
    folder: pathlib.Path,
    fingerprint: str,
    clips: int,
    batch: int,
    progress: bool,
    parts: Mapping[str, str],
    known: Callable[[int], Record] | None,
) -> LatentCache:
    # The name identifies what wrote a shard, so that none of an interrupted run of another encoder is reused.
    identity = hashlib.sha256(f"{_FORMAT} {clips} {fingerprint}".encode()).hexdigest()[:10]
    starts = range(0, clips, _CLIPS_PER_SHARD)
    paths = [
        folder / f"latents-{identity}-{i:05d}-of-{len(starts):05d}.arrayrecord" for i in range(len(starts))
    ]
    if jax.process_index() == 0:
        kept = {*paths, *map(_part, paths)}
        for stale in {*folder.glob("*latents-*.arrayrecord"), *folder.glob("latents-*.part")} - kept:
            stale.unlink()
    barrier()
    own = slice(jax.process_index(), None, jax.process_count())
    total = sum(min(_CLIPS_PER_SHARD, clips - start) for start in starts[own])
    shown = progress and jax.process_index() == 0
    with _ProgressBar(total=total, desc="latents", unit="clip", disable=not shown) as bar:
        for path, start in zip(paths[own], starts[own], strict=True):
            indices = range(start, min(start + _CLIPS_PER_SHARD, clips))
            if path.exists():
                bar.update(len(indices))
                continue
            if known is None:
                _write_shard(path, _encode(source, encode, indices, batch, bar, _part(path)))
                _part(path).unlink(missing_ok=True)
            else:
                _write_shard(path, [_checked(known(index)) for index in indices])
                bar.update(len(indices))

    barrier()
    if jax.process_index() == 0:
        _finish(folder, paths, fingerprint, clips, parts)
    barrier()
    # A network file system may report a file as absent for a while after it was written.
    until = time.monotonic() + _PATIENCE
    while not (folder / _META).exists() and time.monotonic() < until:
        time.sleep(0.5)
    return LatentCache(folder)


def earlier_cache(
    folder: str | os.PathLike[str], parts: Mapping[str, str], replaceable: Collection[str] = ()
) -> tuple[pathlib.Path, list[str]] | None:
    """The finished latent cache of the same `source` in which fewest of `parts` differ, and which of them do.

    One in which only parts of `replaceable` differ is preferred, and a newer one to an older one. None
    where there is no cache.
    """
    found = []
    for path in pathlib.Path(folder).glob(f"*/{_META}"):
        try:
            meta = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        before = meta.get("parts", {})
        if meta.get("format") == _FORMAT and before.get("source") == parts.get("source"):
            changed = [name for name, value in parts.items() if before.get(name) != value]
            order = set(changed) <= set(replaceable), -len(changed), os.path.getmtime(path)
            found.append((order, path.parent, changed))
    return max(found)[1:] if found else None


class _ProgressBar(tqdm):
    """Progress; after a few batches one line reports the time left."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._began: float | None = None
        self._done = 0
        self._reported = self.disable

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if self._reported:
            return shown
        now = time.monotonic()
        if self._began is None:
            self._began, self._done = now, int(self.n)  # programs are compiled before
        clips, seconds = self.n - self._done, now - self._began
        if clips >= _TIMED_CLIPS and seconds > _TIMED_SECONDS:
            self._reported = True
            rate = clips / seconds
            left = datetime.timedelta(seconds=round(((self.total or 0) - self.n) / rate))
            self.write(
                f"latents: {self.total} clips are encoded before the first step, about {rate:.2g} a second: "
                f"{left} (h:mm:ss) to go",
                file=sys.stderr,
            )
        return shown


def _finish(
    folder: pathlib.Path,
    paths: Sequence[pathlib.Path],
    fingerprint: str,
    clips: int,
    parts: Mapping[str, str],
) -> None:
    mean, std = _statistics(_open_shards(paths))
    meta = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "parts": dict(parts),
        "clips": clips,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "shards": [path.name for path in paths],
    }
    with atomic_path(folder / _META) as temporary:
        temporary.write_text(json.dumps(meta, indent=2))


def _encode(
    source: ClipSource,
    encode: Callable[[list[Clip]], list[Record]],
    indices: range,
    batch: int,
    bar: tqdm,
    part: pathlib.Path,
) -> list[Record]:
    """The records of a shard; those that `part` has aren't encoded again, and each batch is appended to it.

    Batches are filled in the order of reading, shape by shape, so those that are left are the same as without a stop.
    """
    records = _read_part(part)
    bar.update(len(records))
    waiting: dict[tuple[int, ...], list[tuple[int, Clip]]] = {}

    def flush(group: list[tuple[int, Clip]]) -> None:
        clips = [clip for _, clip in group]
        encoded = encode(clips + clips[-1:] * (batch - len(clips)))
        done = {
            index: _checked(record) for (index, _), record in zip(group, encoded[: len(group)], strict=True)
        }
        records.update(done)
        _append(part, done)
        bar.update(len(group))
        group.clear()

    left = [index for index in indices if index not in records]
    for index, clip in _prefetch(read_clips(source, left), batch):
        group = waiting.setdefault(clip.video.frames.shape, [])
        group.append((index, clip))
        if len(group) == batch:
            flush(group)
    for group in waiting.values():
        if group:
            flush(group)
    return [records[index] for index in indices]


def _part(path: pathlib.Path) -> pathlib.Path:
    """The file of an unfinished shard's batches: for each its length in bytes, and {index: record}."""
    return path.with_suffix(".part")


def _append(part: pathlib.Path, records: Mapping[int, Record]) -> None:
    data = serialization.msgpack_serialize({str(index): record for index, record in records.items()})
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            file.write(struct.pack("<Q", len(data)) + data)
    except OSError as error:
        raise as_user_error(error, part) from error


def _read_part(part: pathlib.Path) -> dict[int, Record]:
    """The records of complete batches; an incomplete last one is cut off."""
    records: dict[int, Record] = {}
    if not part.exists():
        return records
    with part.open("r+b") as file:
        place, size = 0, os.fstat(file.fileno()).st_size
        while len(head := file.read(8)) == 8 and (end := place + 8 + struct.unpack("<Q", head)[0]) <= size:
            batch = serialization.msgpack_restore(file.read(end - place - 8))
            records |= {int(index): record for index, record in batch.items()}
            place = end
        file.truncate(place)
    return records


def _prefetch(items: Iterator[Item], count: int) -> Iterator[Item]:
    """The items, up to `count` of which are made by a thread while those before are worked on."""
    end: Any = object()
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        waiting = collections.deque(pool.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def _checked(record: Record) -> Record:
    """The record as it is stored: float16, and finite."""
    latent = np.asarray(record["latent"]).astype(np.float16)
    if not np.isfinite(latent).all():
        raise UserError(
            f"The latent of clip {record['key']!r} is not finite in float16: the VAE isn't trained or diverged."
        )
    captions = {
        kind: {name: np.asarray(caption[name]).astype(np.float16) for name in ("text", "time")}
        for kind, caption in record["captions"].items()
    }
    layout = {
        name: np.asarray(record[name]).astype(dtype)
        for name, dtype in (("ends", np.int32), ("first", bool), ("given", bool))
    }
    own = {"latent": latent, "fps": float(record["fps"]), "key": str(record["key"]), "captions": captions}
    return own | layout


def _write_shard(path: pathlib.Path, records: Sequence[Record]) -> None:
    with atomic_path(path) as temporary:
        # One record a group, so that reading one at random decodes one; float16 latents hardly compress anyway.
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for record in records:
            writer.write(serialization.msgpack_serialize(record))
        writer.close()


def _open_shards(paths: Sequence[pathlib.Path]) -> grain.sources.ArrayRecordDataSource:
    return grain.sources.ArrayRecordDataSource([str(path) for path in paths])


def _statistics(shards: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    count, total, squares = 0, 0.0, 0.0
    for index in range(len(shards)):
        latent = serialization.msgpack_restore(shards[index])["latent"].astype(np.float64)
        numbers = latent.reshape(-1, latent.shape[-1])
        count += len(numbers)
        total = total + numbers.sum(axis=0)
        squares = squares + (numbers**2).sum(axis=0)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
