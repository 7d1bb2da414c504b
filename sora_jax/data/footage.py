"""Video files as a data set: clips of many durations, cut out of the files of a folder."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from sora_jax.data import cuts
from sora_jax.data.cuts import NATIVE, Cut, Span, Spans
from sora_jax.data.frame_cache import Unreadable, cached_frames
from sora_jax.data.reading import Wanted, read_together
from sora_jax.data.survey import Summary, Survey, count, few, survey, without_name
from sora_jax.errors import UserError
from sora_jax.media.clip import Clip
from sora_jax.media.digests import file_digest, value_digest
from sora_jax.media.timing import frame_step
from sora_jax.media.video import Report, Video, frame_size, letterbox, resample, stream_frames

# Mean number of clips that a frame is in: nearly every one is in several, with different neighbours.
CLIPS_PER_MOMENT = 8
ATTEMPTS = 20  # clips drawn in place of one that can't be read


class EmptySplit(UserError):
    """There is no footage for a split: too few files, or too short ones."""


@dataclasses.dataclass(frozen=True)
class Footage:
    """Clips from a folder of videos and pictures (or one file), random-access, deterministic in (fields, index).

    A clip has 1 + 4k frames and sides that are multiples of `multiple`, by cropping the middle. Its caption is the text
    in the `.txt` of the same name, empty where there is none. A picture is a clip of one frame. All files are opened
    once, at construction, and tried (`survey`); a clip that can't be read all the same is replaced by another one, the
    same for the same index, and counted (`summary`).

    Attributes:
      path: a folder, searched with its subfolders, or a file.
      resolution: pixels of the short side, or several, of which a clip draws one.
      aspects: width to height; a clip is cropped to the one that is nearest to its file's own; "native": that is kept.
      durations: seconds, of which a clip draws one (0: an image); less where the file is shorter. Empty: durations are
        drawn evenly from `min_seconds` to `max_seconds`, images in `share_of_images`.
      rates: frames a second, of which a clip draws one. It has the frames that are on show at that rate; a file of a
        lower rate, or one within 1%, keeps its own. Empty: the file's own or, to stay within `max_fps`, every n-th.
      max_frames: longer clips end there; 0: none does.
      split: "train" or "validation": disjoint blocks of ten seconds, of which every tenth is held out, or of fewer than
        five the last one. A single file of less than 15 seconds is all for training.
      clips: the data set's length.
      seed: random seed.
      multiple: of which both sides are multiples.
      crop: (frames, height, width) of every clip instead: a box at a random place of the frame, which is first
        cropped and scaled as `aspects` and `resolution` say, or to more where the box needs it. Durations then have
        no effect.
      letterboxed: whether clips are scaled into the square of their short side, between black bars.
      cache: a folder in which each file is decoded once, at the largest size that is needed, and from then on
        read as a memory map; empty: every clip is decoded from the keyframe before it.
      damaged: "skip" or "refuse", what is done with files that can't be read, see `survey`.

    Raises:
      UserError: a field makes no sense, or there is nothing at `path` that can be read.
      EmptySplit: all of it is too short, or too little to hold a part out.
    """

    path: str
    resolution: int | tuple[int, ...] = 128
    aspects: tuple[str, ...] = (NATIVE,)
    durations: tuple[float, ...] = ()
    min_seconds: float = 1.0
    max_seconds: float = 4.0
    share_of_images: float = 0.0
    rates: tuple[float, ...] = ()
    max_fps: float = 24.0
    max_frames: int = 0
    split: str = "train"
    clips: int = 10_000
    seed: int = 0
    multiple: int = 8
    crop: tuple[int, int, int] | None = None
    letterboxed: bool = False
    cache: str = ""
    damaged: str = "skip"
    _survey: Survey = dataclasses.field(init=False, repr=False, compare=False)
    _moving: Spans = dataclasses.field(init=False, repr=False, compare=False)
    _all: Spans = dataclasses.field(init=False, repr=False, compare=False)
    _damage: Damage = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        found = survey(self.path, self.damaged)
        spans = list(cuts.split_source_files(found.source_files, self.split))
        moving = [span for span in spans if not span.source_file.picture and self._ratios(span)]
        stills = (
            [span for span in spans if span.source_file.picture]
            if self.crop is None or self.crop[0] == 1
            else []
        )
        damage = Damage()
        if self.cache:
            moving = [span for span in moving if self._caches(span, damage)]
        if not (moving or stills):
            raise self._too_little(found, spans)
        object.__setattr__(self, "_survey", found)
        object.__setattr__(self, "_moving", Spans(moving))
        object.__setattr__(self, "_all", Spans(moving + stills))
        object.__setattr__(self, "_damage", damage)

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.clips:
            raise IndexError(f"clip {index} of {self.clips}")
        for attempt in range(ATTEMPTS):
            rng = self._rng(index, attempt)
            cut = self._draw_cut(rng)
            try:
                return self._make_clip(cut, rng)
            except (UserError, OSError) as error:
                source_file = cut.span.source_file
                reason = f"near {cut.start:.1f} seconds: {without_name(error, source_file.path)}"
                if self.damaged == "refuse":
                    raise UserError(
                        f"{source_file.path} can't be read {reason}; fix or remove it, or set "
                        "config.data.damaged='skip' to train on others in its place."
                    ) from error
                self._damage.add(source_file.path, reason)
        raise UserError(
            f"{ATTEMPTS} clips of {self.path} in a row could not be read, the last one of "
            f"{source_file.path} {reason}. Is the disk still there?"
        )

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, Clip]]:
        """Each index with its clip, file by file and in order of time, so that no frame is decoded twice.

        Clips are those that `[index]` gives. What can't be read so, because of damage, is read in that way.
        """
        source_files: dict[str, list[Wanted]] = {}
        for index in indices:
            rng = self._rng(index)
            cut = self._draw_cut(rng)
            crop_box = functools.partial(self._draw_crop_box, rng)
            source_files.setdefault(cut.span.source_file.path, []).append(Wanted(index, cut, crop_box))
        for path in sorted(source_files):
            wanted = source_files[path]
            if self.cache or wanted[0].cut.span.source_file.picture:
                yield from ((clip.index, self[clip.index]) for clip in wanted)
                continue
            for clip, whole in read_together(wanted):
                yield clip.index, self._as_clip(clip.cut, clip.frames) if whole else self[clip.index]

    @property
    def natural_clips(self) -> int:
        """How many clips show nearly all of the split's footage: more of them would be much the same."""
        rates = self.rates or (self.max_fps,)
        longest = self.max_frames or math.inf
        lasting = [min(seconds, longest / rate) for seconds in self._seconds() for rate in rates]
        moving = self._moving.seconds / (sum(lasting) / len(lasting)) / (1 - min(self._share_of_images, 0.9))
        stills = self._all.seconds - self._moving.seconds if self._share_of_images or not moving else 0
        return min(self.clips, max(1, math.ceil(CLIPS_PER_MOMENT * (moving + stills))))

    def contents(self) -> dict[str, str]:
        """What names the files' contents, read whole, and that of their captions."""
        source_files = self._survey.source_files
        return {
            "files": value_digest(
                [(source_file.name, file_digest(source_file.path)) for source_file in source_files]
            ),
            "captions": value_digest(
                [(source_file.name, source_file.caption) for source_file in source_files]
            ),
        }

    def captions(self) -> list[str]:
        """The captions of all files, those of both splits."""
        return [source_file.caption for source_file in self._survey.source_files]

    def caption(self, key: str) -> str:
        """The caption of the file from which the clip of a `Clip.key` was cut."""
        return self._captions[key.rpartition("@")[0]]

    @functools.cached_property
    def _captions(self) -> dict[str, str]:
        return {source_file.name: source_file.caption for source_file in self._survey.source_files}

    def summary(self) -> Summary:
        """What there is, and what of it could not be read until now."""
        source_files = self._survey.source_files
        videos = [source_file for source_file in source_files if not source_file.picture]
        shapes = collections.Counter(
            f"{source_file.width}×{source_file.height}" for source_file in source_files
        )
        rates = collections.Counter(f"{source_file.fps:.4g} fps" for source_file in videos)
        return Summary(
            self.path,
            len(videos),
            len(source_files) - len(videos),
            sum(source_file.seconds for source_file in videos),
            self._survey.captions,
            dict(shapes.most_common()),
            dict(rates.most_common()),
            self._survey.skipped,
            *self._damage.report(),
            (*self._survey.notes, *self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        used = {span.source_file.path for span in self._all.spans}
        other_spans = list(cuts.split_source_files(self._survey.source_files, cuts.OTHER_SPLIT[self.split]))
        others = {span.source_file.path for span in other_spans}
        short = [
            source_file
            for source_file in self._survey.source_files
            if not source_file.picture and source_file.path not in used | others
        ]
        stills = sum(source_file.picture for source_file in self._survey.source_files)
        if self.split == "train":
            held_out = few([span.name for span in other_spans])
            yield f"held out for validation: {held_out or 'nothing, as there is too little'}"
        if short:
            yield f"{count(len(short), 'video')} shorter than the shortest clip that is drawn, {short[0].name} first"
        if stills and self.crop is not None and self.crop[0] > 1:
            yield f"pictures are left out: clips have {self.crop[0]} frames"
        elif stills and not self._share_of_images and self._moving.spans:
            yield "pictures are left out: config.data.durations has no 0, which stands for an image"
        small = sum(
            min(source_file.height, source_file.width) < min(self._resolutions)
            for source_file in self._survey.source_files
        )
        if small:
            yield f"{count(small, 'file')} smaller than {min(self._resolutions)} pixels, which are enlarged"

    def _rng(self, index: int, attempt: int = 0) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.split == "train", index, *[attempt][:attempt]))

    @property
    def _resolutions(self) -> tuple[int, ...]:
        return (self.resolution,) if isinstance(self.resolution, int) else self.resolution

    @property
    def _share_of_images(self) -> float:
        if self.crop is not None:
            return 0.0
        return self.durations.count(0.0) / len(self.durations) if self.durations else self.share_of_images

    def _seconds(self) -> list[float]:
        """Durations that clips which move have: all of a list, or the ends of a range."""
        moving = [seconds for seconds in self.durations if seconds > 0]
        return moving or [self.min_seconds, self.max_seconds]

    def _check(self) -> None:
        demands = {
            "split is train or validation": self.split in cuts.OTHER_SPLIT,
            "min_seconds is above 0 and not above max_seconds": 0 < self.min_seconds <= self.max_seconds,
            "durations are numbers of seconds, 0 or more": all(0 <= d < math.inf for d in self.durations),
            "max_fps and rates are above 0": all(0 < fps < math.inf for fps in (self.max_fps, *self.rates)),
            "max_frames is 0 or more": self.max_frames >= 0,
            "share_of_images is within 0 ... 1": 0 <= self.share_of_images <= 1,
            "clips and multiple are at least 1": min(self.clips, self.multiple) >= 1,
            "resolution is at least multiple": min(self._resolutions, default=0) >= self.multiple,
            "aspects holds one at least": len(self.aspects) > 0,
            "crop is (frames, height, width), with 1 + 4k frames": self.crop is None
            or (len(self.crop) == 3 and min(self.crop) >= 1 and self.crop[0] % 4 == 1),
        }
        for demand, met in demands.items():
            if not met:
                raise UserError(f"The footage in {self.path} can't be used as asked: see that {demand}.")
        for aspect in self.aspects:
            if aspect != NATIVE:
                frame_size(1, aspect)

    def _too_little(self, found: Survey, spans: Sequence[Span]) -> EmptySplit:
        if not spans:
            return EmptySplit(
                f"{self.path} is too little to hold a part of it out for validation: add a second video, or a "
                "longer one."
            )
        if self.crop is not None:
            rate = max(self.rates or (self.max_fps,))
            need = self.crop[0] / rate
            asked = f"{self.crop[0]} frames at {rate:g} a second (config.loss.crop)"
        else:
            need = min(self._seconds())
            asked = f"{need:.3g} seconds (config.data.durations)"
        longest = max((span.seconds for span in spans if not span.source_file.picture), default=0.0)
        of_split = "" if self.split == "train" else " of what is held out for validation"
        return EmptySplit(
            f"{self.path} is too short: a clip takes {asked}, and the longest video{of_split} has {longest:.3g} "
            "seconds; add longer ones or ask for shorter clips."
        )

    def _ratios(self, span: Span) -> list[float]:
        """Native frames to each of the clip's, for every rate at which a clip fits into the span."""
        if self.rates:
            ratios = [cuts.rate_ratio(span.source_file.fps, rate) for rate in self.rates]
        else:
            ratios = [float(frame_step(span.source_file.fps, self.max_fps))]
        return [
            ratio
            for ratio in ratios
            if self._shortest(span.source_file.fps / ratio) <= cuts.most_frames(span.frames, ratio)
        ]

    def _shortest(self, fps: float) -> int:
        """Frames that a clip which moves has at least."""
        if self.crop is not None:
            return self.crop[0]
        count = 1 + 4 * max(0, math.floor((min(self._seconds()) * fps + 1e-6 - 1) / 4))
        return min(count, self.max_frames or count)

    def _draw_cut(self, rng: np.random.Generator) -> Cut:
        still = rng.random() < self._share_of_images or not self._moving.spans
        span = (self._all if still else self._moving).draw(rng)
        if still:
            return Cut(span, span.first + int(rng.integers(span.frames)), 1, 1.0)
        ratios = self._ratios(span)
        ratio = ratios[rng.integers(len(ratios))]
        fps, most = span.source_file.fps / ratio, cuts.most_frames(span.frames, ratio)
        if self.crop is not None:
            frames = self.crop[0]
        elif self.durations:
            seconds = self._seconds()
            # As toyworld counts them.
            frames = 1 + 4 * round(seconds[rng.integers(len(seconds))] * fps / 4)
        else:
            seconds_drawn = rng.uniform(self.min_seconds, self.max_seconds)
            frames = 1 + 4 * max(0, math.floor((seconds_drawn * fps + 1e-6 - 1) / 4))
        most = min(most, self.max_frames or most)
        frames = min(frames, 1 + (most - 1) // 4 * 4)
        first = span.first + int(rng.integers(span.frames - cuts.native_frames(frames, ratio) + 1))
        return Cut(span, first, frames, ratio)

    def _make_clip(self, cut: Cut, rng: np.random.Generator) -> Clip:
        scaled, crop_box, report = [], None, Report()
        for frame in self._read(cut, report):
            crop_box = crop_box or self._draw_crop_box(rng, *frame.shape[:2])
            scaled.append(resample(frame, *crop_box))
        if len(scaled) < cut.count:
            raise UserError("it is damaged or cut off.")
        if report.damage(cut.start, cut.start + (cut.count - 1) / cut.fps):
            raise UserError("its frames can't be decoded whole.")
        return self._as_clip(cut, scaled)

    def _as_clip(self, cut: Cut, frames: Sequence[np.ndarray]) -> Clip:
        source_file = cut.span.source_file
        shown = letterbox(np.stack(frames)) if self.letterboxed else np.stack(frames)
        return Clip(
            Video(shown, cut.fps),
            {"short": source_file.caption},
            ((0.0, source_file.caption),) if source_file.caption else (),
            f"{source_file.name}@{cut.start:.3f}s+{cut.count}",
        )

    def _draw_crop_box(
        self, rng: np.random.Generator, height: int, width: int
    ) -> tuple[int, int, tuple[float, float, float, float]]:
        """(height, width) of the clip, and the box (left, top, right, bottom) of the frame that it shows."""
        high, wide = cuts.crop_to_aspect(height, width, self.aspects)
        short = self._resolutions[rng.integers(len(self._resolutions))]
        scale = short / min(high, wide)
        if self.crop is None:
            y, x = (int(side * scale + 1e-6) // self.multiple * self.multiple for side in (high, wide))
            down = across = 0.5
        else:
            y, x = self.crop[1:]
            scale = max(scale, y / high, x / wide)
            down, across = rng.random(), rng.random()
        top = (height - high) / 2 + down * (high - y / scale)
        left = (width - wide) / 2 + across * (wide - x / scale)
        if scale == 1:
            # Whole pixels stay what they are.
            top, left = round(top), round(left)
        top, left = max(top, 0), max(left, 0)
        return y, x, (left, top, min(left + x / scale, width), min(top + y / scale, height))

    def _read(self, cut: Cut, report: Report) -> Iterator[np.ndarray]:
        source_file = cut.span.source_file
        if self.cache and not source_file.picture:
            frames = self._cached(cut.span)
            numbers = cut.first + np.floor(np.arange(cut.count) * cut.ratio + 1e-6).astype(int)
            return iter(frames[numbers[numbers < len(frames)]])
        shown = stream_frames(source_file.path, cut.start, cut.fps, report, nearest=False)
        return (frame for _, frame in itertools.islice(shown, cut.count))

    def _caches(self, span: Span, damage: Damage) -> bool:
        """Whether the whole file can be decoded into the cache."""
        try:
            self._cached(span)
        except Unreadable as error:
            if self.damaged == "refuse":
                raise
            damage.add(span.source_file.path, without_name(error, span.source_file.path), clips=0)
            return False
        return True

    def _cached(self, span: Span) -> np.ndarray:
        need = max(*self._resolutions, *(self.crop[1:] if self.crop else (0,)))
        return cached_frames(self.cache, span.source_file.path, span.source_file.fps, need)


class Damage:
    """Counts clips that could not be read; threads add to it."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._clips = 0
        self._lock = threading.Lock()

    def add(self, file: str, reason: str, clips: int = 1) -> None:
        with self._lock:
            self._clips += clips
            known = file in self._files
            self._files.setdefault(file, reason)
        if not known:
            tqdm.write(f"note: {file} can't be read: {reason}. Other clips take its place.", file=sys.stderr)

    def report(self) -> tuple[dict[str, str], int]:
        """Files with the first reason of each, and how many clips were replaced."""
        with self._lock:
            return dict(self._files), self._clips

    def __getstate__(self) -> tuple[dict[str, str], int]:
        return self.report()

    def __setstate__(self, state: tuple[dict[str, str], int]) -> None:
        self.__init__()  # type: ignore[misc]
        self._files, self._clips = state
