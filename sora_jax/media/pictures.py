"""Still pictures as they are displayed: upright, in sRGB, eight bits a channel; and those that move."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import pathlib
import struct
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps

from sora_jax.errors import UserError
from sora_jax.media.colours import colour_remark
from sora_jax.media.containers import Path

# Background of transparent pixels: the page on which most pictures with alpha are drawn to be seen.
BACKDROP = (255, 255, 255)

# The power by which a PNG says that it is nearly sRGB.
SRGB_GAMMA = 1 / 2.2

# Formats whose several pictures are pages, sizes or views of one, not moments.
PAGES = {"TIFF", "MPO", "ICO", "ICNS", "PSD", "DCX", "MIC", "CUR"}
# Moving pictures that Pillow decodes, which obeys their colour profiles and orientation. Besides, FFmpeg's first
# stream of an AVIF is a still and alpha is another; and it guesses the rate of a WebP or PNG of few pictures.
MOVING = {"AVIF", "PNG", "WEBP"}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that doesn't move.

    Attributes:
      pixels: uint8[Y,X,3], or uint8[Y,X,4] where something may be transparent.
      seconds: for which it is shown, as a still GIF may say; else 1.
      notes: what was left out, a sentence each, without the file's name at the beginning.
    """

    pixels: np.ndarray
    seconds: float = 1.0
    notes: tuple[str, ...] = ()


def read_picture(path: Path) -> Picture | None:
    """The picture in a file; None where the file is none, or one that moves.

    Raises:
      UserError: there is no such file, it is empty, or the picture in it is damaged or of numbers without a scale.
    """
    if not os.path.exists(path):
        raise UserError(f"There is no file {path}: check the name.")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not a video: name a file in it.")
    if os.path.isfile(path) and not os.path.getsize(path):
        raise UserError(f"{path} is empty: its writing or its download failed; do that again.")
    try:
        with Image.open(path) as image:
            # Of these Pillow only knows the name.
            if image.format == "MPEG" or isinstance(image, ImageFile.StubImageFile):
                return None
            several = _several(image)
            if several and image.format not in PAGES:
                return None
            notes = []
            if several:
                notes.append(f"holds {getattr(image, 'n_frames', 2)} pictures, of which the first is used.")
            elif image.format == "JPEG" and b"\xff\xd9\xff\xd8\xff" in pathlib.Path(path).read_bytes():
                notes.append("holds several JPEG pictures, of which the first is used: save a video as mp4.")
            seconds = float(image.info.get("duration") or 1000) / 1000
            array, profile = _displayed(image)
            notes += _colour_notes(path, image, profile)
            return Picture(array, seconds, tuple(notes))
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except Image.UnidentifiedImageError:
        return None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has too many pixels for a picture: make it smaller first.") from error
    except Exception as error:  # a damaged file makes Pillow's plugins stumble in ways of their own
        raise UserError(f"{path} can't be read as a picture: {error}; is the file whole?") from error


def moving_picture(path: Path) -> Sequence[tuple[float, float]] | None:
    """(begin, end) in seconds of each picture in a file that moves and that Pillow decodes; else None."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from error
    return _times(os.fspath(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _times(path: str, *content: int) -> Sequence[tuple[float, float]] | None:
    del content  # another content, other times
    try:
        with Image.open(path) as image:
            if image.format not in MOVING or not _several(image):
                return None
            times, end = [], 0.0  # in milliseconds, whose sums are exact
            for number in range(_first(image), image.n_frames):
                image.seek(number)
                image.load()  # only then is its duration known
                begin, end = end, end + float(image.info.get("duration") or 100)
                times.append((begin / 1000, end / 1000))
            return tuple(times)
    except Image.UnidentifiedImageError:
        return None
    except Exception as error:
        raise UserError(f"{path} can't be read as a moving picture: {error}; is the file whole?") from error


def moving_notes(path: Path) -> tuple[str, ...]:
    """What of a moving picture's colours looks otherwise here, as `Picture.notes`."""
    with Image.open(path) as image:
        return tuple(_colour_notes(path, image, _displayed(image)[1]))


def _colour_notes(path: Path, image: Image.Image, profile: bool) -> list[str]:
    if not profile:
        return ["has a colour profile that can't be used: its colours are taken as sRGB."]
    if image.info.get("icc_profile"):
        return []
    notes = []
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    # Pillow passes over these code points.
    if head.startswith(b"\x89PNG") and (place := head.partition(b"IDAT")[0].find(b"\0\0\0\4cICP")) > 0:
        notes.append(colour_remark(*head[place + 8 : place + 10]))
    if head[4:8] == b"ftyp" and 0 < (place := head.find(b"colrnclx")) < len(head) - 12:
        notes.append(colour_remark(*struct.unpack(">HH", head[place + 8 : place + 12])))
    return list(filter(None, notes))


def moving_frames(
    path: Path, times: Sequence[tuple[float, float]], start: float
) -> Iterator[tuple[float, float, np.ndarray]]:
    """(begin, end, pixels as `Picture.pixels`) from the picture on show at `start` seconds on."""
    with Image.open(path) as image:
        for number, (begin, end) in enumerate(times, _first(image)):
            if end > start + 1e-6:
                image.seek(number)
                yield begin, end, picture_pixels(image)


def _first(image: Image.Image) -> int:
    """The number of the first picture that moves: a PNG may have one before it for what can't show moving ones."""
    return int(bool(image.info.get("default_image")))


def _several(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a GIF that is cut off between frames
        return True


def picture_pixels(image: Image.Image) -> np.ndarray:
    """uint8[Y,X,3], or uint8[Y,X,4] where something may be transparent; upright and in sRGB.

    EXIF's orientation and the colour profile are obeyed.

    Raises:
      UserError: its numbers have no scale that is known: floats beyond 0..1, integers beyond 16 bits.
    """
    try:
        return _displayed(image)[0]
    except UserError as error:
        raise UserError(f"The picture {error}") from error


def _displayed(image: Image.Image) -> tuple[np.ndarray, bool]:
    """`picture_pixels`, and whether no colour profile had to be passed over."""
    profile = image.info.get("icc_profile")
    gamma = SRGB_GAMMA if "srgb" in image.info else image.info.get("gamma", SRGB_GAMMA)
    image = _eight_bits(ImageOps.exif_transpose(image))
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        colours, good = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"), True
    elif profile:
        colours, good = _in_srgb(image, profile)
    else:
        colours, good = _from_gamma(image.convert("RGB"), gamma), True
    if alpha is not None:
        colours.putalpha(alpha)
    return np.asarray(colours), good


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips larger numbers and floats where it converts them."""
    if image.mode == "F":
        array = np.asarray(image)
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise UserError(
                f"is a picture of floats from {low:.4g} to {high:.4g}, and only those in 0..1 have a known "
                f"scale: save it with 8 or 16 bits a channel."
            )
        return Image.fromarray((array.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    if image.mode.startswith("I"):
        array = np.asarray(image).astype(np.int64)
        if array.min() < 0 or array.max() > 65535:
            raise UserError(
                f"is a picture of integers from {array.min()} to {array.max()}, and only those of 16 bits have a "
                f"known scale: save it with 8 or 16 bits a channel."
            )
        return Image.fromarray((array // 256).astype(np.uint8))
    return image


def _from_gamma(image: Image.Image, gamma: float) -> Image.Image:
    """RGB in sRGB of RGB whose numbers are brightness to the power of `gamma`, as a PNG may say."""
    if abs(gamma - SRGB_GAMMA) < 0.01 or not 0.1 < gamma < 10:
        return image
    linear = np.linspace(0, 1, 256) ** (1 / gamma)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return image.point([int(value) for value in (255 * curve).round()] * 3)


def _in_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, bool]:
    """RGB in sRGB, and whether the profile could be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[space]
        if (mode == "CMYK") != (image.mode == "CMYK"):
            return image.convert("RGB"), False
        image = image.convert(mode)
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB":  # what is sRGB already stays as it is
            levels = np.linspace(0, 255, 6).astype(np.uint8)
            steps = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(6, -1, 3)
            cube = Image.fromarray(steps)
            if np.abs(np.asarray(transform.apply(cube)).astype(int) - steps).max() <= 2:
                return image, True
        return transform.apply(image), True
    except (ImageCms.PyCMSError, KeyError, OSError, ValueError):
        return image.convert("RGB"), False


def opaque(array: np.ndarray) -> np.ndarray:
    """uint8[...,3] of uint8[...,3 or 4]: transparent pixels are put on `BACKDROP`."""
    if array.shape[-1] == 3:
        return array
    alpha = array[..., 3:].astype(np.uint16)
    return ((array[..., :3] * alpha + np.uint16(BACKDROP) * (255 - alpha) + 127) // 255).astype(np.uint8)
