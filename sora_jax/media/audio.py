"""A video file gets the sound of another."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import av

from sora_jax.errors import UserError, atomic_path, user_path
from sora_jax.media.containers import Path, open_container
from sora_jax.media.decoding import header, opened, packets, taken_from
from sora_jax.media.writing import comment_of

# By suffix: the sound that goes into the file as it is, and what other sound becomes. Containers take more than
# these, players don't.
SOUND = {
    ".mp4": ({"aac", "mp3", "opus", "flac", "alac", "ac3"}, "aac"),
    ".m4v": ({"aac", "mp3", "alac", "ac3"}, "aac"),
    ".mov": ({"aac", "mp3", "alac", "ac3", "pcm_s16le"}, "aac"),
    ".webm": ({"opus", "vorbis"}, "libopus"),
}


def keep_sound(source: Path, video_path: Path, start: float = 0.0, at: float = 0.0) -> bool:
    """Puts the sound of `source` into the video at `video_path`, in place of any that it has.

    The sound ends with the video. It is copied as it is where players take it in such a file, and becomes AAC
    (Opus in WebM) where not; it is cut at its own packets, so silence of up to some hundredths of a second may
    stand at a cut, but nothing shifts.

    Args:
      source: the file that was read.
      video_path: mp4, m4v, mov or webm, which is replaced.
      start: the second of the source from which its pictures were read. Where it falls between two frames, sound
        begins with the one on show there, as the pictures do.
      at: the second of the video at which it begins.

    Returns:
      False, with nothing written, where there is no sound to keep or `video_path` is of a kind that has none.

    Raises:
      UserError: there is no such file, or the video can't be read or written.
    """
    source, path = user_path(source), user_path(video_path)
    for file in (source, path):
        if not os.path.isfile(file):
            raise UserError(f"There is no file {file}: check the name.")
    if path.suffix.lower() not in SOUND:
        return False
    with contextlib.suppress(UserError):  # a file of sound alone has no frames
        start = taken_from(source, start)
    try:
        return _join(source, path, start, at, copy=True)
    except av.FFmpegError:
        # Packets too damaged for the container: what can be decoded of them is not.
        try:
            return _join(source, path, start, at, copy=False)
        except av.FFmpegError as error:
            raise UserError(f"The sound of {source} can't be put into {path}: {error.strerror}.") from error


def _join(source: Path, path: pathlib.Path, start: float, at: float, copy: bool) -> bool:
    kept, encoder = SOUND[path.suffix.lower()]
    with contextlib.ExitStack() as stack:
        try:
            container = stack.enter_context(open_container(source))
        except (av.FFmpegError, OSError):
            return False
        sound = container.streams.best("audio")
        if sound is None or sound.codec_context is None:
            return False
        if start > 0:
            with contextlib.suppress(av.FFmpegError):
                container.seek(int(start * av.time_base))
        copied = copy and sound.codec_context.codec.canonical_name in kept
        shown = next(iter(container.streams.video), sound)
        shift = at - start - float((shown.start_time or 0) * shown.time_base)
        pieces = _pieces(container, sound, shift, at, header(path).seconds, copied)
        first = next(pieces, None)
        if first is None:
            return False
        # The index in front, so that browsers play the file while it loads.
        options = {} if path.suffix.lower() == ".webm" else {"movflags": "faststart"}
        with (
            atomic_path(path) as temporary,
            opened(path) as (video, stream),
            open_container(temporary, "w", options=options) as out,
        ):
            if comment := comment_of(video):  # what the video says of how it was made
                out.metadata["comment"] = comment
            video_out = out.add_stream_from_template(stream)
            if copied:
                sound_out = out.add_stream_from_template(sound)
            else:
                layout = "mono" if sound.channels == 1 else "stereo"
                sound_out = out.add_stream(encoder, rate=48000, layout=layout)
            pictures = _written((packet for packet in packets(video, stream) if packet.size), video_out, True)
            sounds = _written(itertools.chain([first], pieces), sound_out, copied)
            for packet in heapq.merge(pictures, sounds, key=lambda packet: packet.dts * packet.time_base):
                out.mux(packet)
    return True


def _pieces(
    container: Any, stream: Any, shift: float, at: float, until: float, copied: bool
) -> Iterator[Any]:
    """The sound's packets, or its frames where these are to be re-encoded, between `at` and `until`."""
    for packet in packets(container, stream):
        pieces = [packet] if copied else []
        if not copied:
            with contextlib.suppress(av.FFmpegError):
                pieces = packet.decode()
        for piece in pieces:
            if piece.pts is None:
                continue
            begin = float(piece.pts * piece.time_base) + shift
            if begin >= until:
                return
            if begin < at:
                continue
            piece.pts += round(shift / piece.time_base)
            if copied:
                piece.dts = piece.pts
            yield piece


def _written(pieces: Iterable[Any], stream: Any, copied: bool) -> Iterator[Any]:
    """Packets for `stream`, of packets or of frames to be encoded."""
    for piece in pieces:
        if copied:
            piece.stream = stream
            yield piece
        else:
            yield from stream.encode(piece)
    if not copied:
        yield from stream.encode(None)
