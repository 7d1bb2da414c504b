"""Small films as other people's programs write them, whose frames and sounds can be told apart."""

import fractions
import pathlib
import struct

import av
import numpy as np

from sora_jax.media.video import Video

FAST = {
    "libx264": {"preset": "ultrafast", "crf": "15"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=error"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "15"},
}


def pictures(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Grey frames whose brightness is ten times their number (it wraps after 25), red in their upper left part."""
    frames = [np.full((height, width, 3), 10 * (i % 25), np.uint8) for i in range(count)]
    for frame in frames:
        frame[: height // 4, : width // 4] = (250, 0, 0)
    return frames


def numbers(video: Video) -> list[int]:
    return [round(float(frame[-8:, -8:].mean()) / 10) for frame in video.frames]


def write(
    path, frames, fps=25, codec="libx264", pix_fmt="yuv420p", times_ms=None, sound=None, sar=None, form=None
):
    """Writes with PyAV alone; `sound` is (codec, rate, the second of a click), `form` FFmpeg's name of a container."""
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(
            codec, fractions.Fraction(fps), options={"g": "10"} | FAST.get(codec, {})
        )
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if sar:
            stream.codec_context.sample_aspect_ratio = sar
        if times_ms is not None:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        voice = sound and container.add_stream(sound[0], rate=sound[1], layout="mono")
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, "rgba" if array.shape[-1] == 4 else "rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = i, 1 / fractions.Fraction(fps)
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[i], fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            _, rate, second = sound
            samples = np.zeros((1, int(len(frames) / fps * rate)), np.float32)
            first = int(second * rate)
            samples[0, first : first + rate // 50] = 0.8 * np.sin(np.arange(rate // 50) * 6283 / rate)
            frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
            frame.sample_rate, frame.pts = rate, 0
            container.mux(voice.encode(frame))
            container.mux(voice.encode(None))
    return path


def click(path) -> float:
    """The second of the sound's first loud sample, counted from the first frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        offset = float((stream.start_time or 0) * stream.time_base)
        resampler = av.AudioResampler("flt", "mono")
        for decoded in container.decode(container.streams.audio[0]):
            for frame in resampler.resample(decoded):
                loud = np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.15)
                if len(loud):
                    return float(frame.pts * frame.time_base) + loud[0] / frame.sample_rate - offset
    return float("nan")


# (a, b, c, d) of the display matrices that keep pixels pixels: a point (x, y) is shown at (a x + c y, b x + d y).
MATRICES = {
    "as stored": (1, 0, 0, 1),
    "mirrored": (-1, 0, 0, 1),
    "upside down, mirrored": (1, 0, 0, -1),
    "half a turn": (-1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "a quarter clockwise": (0, 1, -1, 0),
    "a quarter back": (0, -1, 1, 0),
    "transposed, half a turn": (0, -1, -1, 0),
}


def with_matrix(path: pathlib.Path, matrix: tuple[int, int, int, int]) -> pathlib.Path:
    """Writes a display matrix into an mp4's track header, as phones do."""
    data, one = path.read_bytes(), 1 << 16
    a, b, c, d = (one * number for number in matrix)
    place = data.index(struct.pack(">5i", one, 0, 0, 0, one), data.index(b"tkhd"))
    path.write_bytes(data[:place] + struct.pack(">5i", a, b, 0, c, d) + data[place + 20 :])
    return path


def shown_by(matrix: tuple[int, int, int, int], frame: np.ndarray) -> np.ndarray:
    """What a player shows of a stored frame, point by point."""
    a, b, c, d = matrix
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    result = np.zeros((down.max() + 1, right.max() + 1, 3), np.uint8)
    result[down, right] = frame[y, x]
    return result
