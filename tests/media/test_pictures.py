"""Pictures are read as they are displayed, whatever their numbers mean; or refused in words, never black."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from sora_jax.errors import UserError
from sora_jax.media import video as V
from sora_jax.media.pictures import read_picture
from sora_jax.media.reader import read_media

# Primaries as XYZ at D50, and the exponent of the curve.
PROFILES = {
    "Display P3": (
        (0.51512, 0.24120, -0.00105),
        (0.29198, 0.69225, 0.04189),
        (0.15710, 0.06657, 0.78407),
        2.2,
    ),
    "Adobe RGB": (
        (0.60974, 0.31111, 0.01947),
        (0.20528, 0.62567, 0.06087),
        (0.14919, 0.06322, 0.74457),
        2.19921875,
    ),
}
SRGB_FROM_XYZ = np.array(  # at D50
    [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
)


def profile(red, green, blue, gamma) -> bytes:
    """An ICC profile of three primaries and one curve."""

    def fixed(number):
        return struct.pack(">i", round(number * 65536))

    def xyz(numbers):
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, numbers))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    name = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78
    tags = {b"wtpt": xyz((0.9642, 1, 0.8249)), b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue)}
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"cprt": b"text\0\0\0\0x\0\0\0"}
    tags[b"desc"] = name + b"\0" * (-len(name) % 4)
    table, body, begin = b"", b"", 132 + 12 * len(tags)
    for key, value in tags.items():
        table += key + struct.pack(">II", begin + len(body), len(value))
        body += value
    white = fixed(0.9642) + fixed(1) + fixed(0.8249)
    head = struct.pack(">I", begin + len(body)) + b"none" + struct.pack(">I", 0x02400000) + b"mntrRGB XYZ "
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + white
    return head + b"\0" * (128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def in_srgb(colour, red, green, blue, gamma) -> np.ndarray:
    """What a colour of such a profile is in sRGB, by IEC 61966-2-1."""
    linear = SRGB_FROM_XYZ @ np.array([red, green, blue]).T @ (np.array(colour) / 255) ** gamma
    linear = linear.clip(0, 1)
    return np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.tif", "a.avif"])
@pytest.mark.parametrize("space", PROFILES)
@pytest.mark.parametrize("colour", [(200, 80, 60), (90, 180, 90), (128, 128, 128)])
def test_colour_profiles_become_srgb(tmp_path, name, space, colour):
    icc, primaries = profile(*PROFILES[space]), PROFILES[space]
    lossless = {"lossless": True} if name == "a.webp" else {"quality": 100}
    Image.new("RGB", (32, 32), colour).save(tmp_path / name, icc_profile=icc, **lossless)
    wanted = in_srgb(colour, *primaries)
    for frames in (
        read_media(tmp_path / name).video.frames,
        V.read_video(tmp_path / name).frames,
        np.stack([frame for _, frame in V.stream_frames(tmp_path / name)]),
        read_media(Image.open(tmp_path / name)).video.frames,
    ):
        assert np.abs(frames[0, 5, 5] - wanted).max() < 3.5
    assert read_media(tmp_path / name).notes == ()


def test_profiles_with_transparency_palettes_and_greys(tmp_path):
    icc, primaries = profile(*PROFILES["Display P3"]), PROFILES["Display P3"]
    wanted = in_srgb((200, 80, 60), *primaries)
    clear = Image.new("RGBA", (8, 8), (200, 80, 60, 255))
    clear.putpixel((0, 0), (200, 80, 60, 0))
    clear.save(tmp_path / "alpha.tif", icc_profile=icc)
    Image.new("RGB", (8, 8), (200, 80, 60)).quantize(4).save(tmp_path / "palette.tif", icc_profile=icc)
    for name in ("alpha.tif", "palette.tif"):
        assert np.abs(V.read_video(tmp_path / name).frames[0, 5, 5] - wanted).max() < 3.5, name
    assert (V.read_video(tmp_path / "alpha.tif").frames[0, 0, 0] == 255).all()
    grey = Image.new("L", (8, 8), 128)
    grey.save(tmp_path / "grey.tif", icc_profile=icc)  # a profile of colours on greys
    assert (
        np.abs(V.read_video(tmp_path / "grey.tif").frames[0, 5, 5] - in_srgb((128,) * 3, *primaries)).max()
        < 3.5
    )


def test_jpegs_one_after_the_other_are_said(tmp_path):
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(tmp_path / f"{number}.jpg")
    stream = b"".join((tmp_path / f"{number}.jpg").read_bytes() for number in range(3))
    (tmp_path / "a.mjpeg").write_bytes(stream)
    assert "several JPEG pictures" in read_media(tmp_path / "a.mjpeg").notes[0]
    assert read_media(tmp_path / "0.jpg").notes == ()


MOVING = ("a.png", "a.webp")


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("space", PROFILES)
def test_colour_profiles_of_moving_pictures(tmp_path, monkeypatch, name, space):
    """The profile is given to what Pillow has opened: PyAV 19 crashes on PNG files that have one."""
    primaries, colours = PROFILES[space], [(200, 80, 60), (90, 180, 90), (60, 90, 200)]
    images = [Image.new("RGB", (32, 32), colour) for colour in colours]
    kind = {"lossless": True} if name == "a.webp" else {}
    kind |= {"save_all": True, "append_images": images[1:], "duration": 500}
    images[0].save(tmp_path / name, **kind)
    icc, opened = profile(*primaries), Image.open

    def with_profile(path):
        image = opened(path)
        image.info["icc_profile"] = icc
        return image

    monkeypatch.setattr("sora_jax.media.pictures.Image.open", with_profile)
    read = read_media(tmp_path / name)
    assert len(read.video) == 3 and read.notes == ()
    for frame, colour in zip(read.video.frames, colours, strict=True):
        assert np.abs(frame[5, 5] - in_srgb(colour, *primaries)).max() < 5.5
    icc = icc[:200]
    images[0].save(tmp_path / f"broken_{name}", **kind)
    assert "a colour profile that can't be used" in read_media(tmp_path / f"broken_{name}").notes[0]


@pytest.mark.parametrize("name", MOVING)
def test_moving_pictures_are_upright(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise
    images = [Image.new("RGB", (64, 48), (40 * i, 0, 0)) for i in range(3)]
    for image in images:
        image.paste((0, 255, 0), (0, 0, 32, 24))
    kind = {"lossless": True} if name == "a.webp" else {"quality": 100}
    images[0].save(
        tmp_path / name, save_all=True, append_images=images[1:], duration=500, exif=exif.tobytes(), **kind
    )
    assert V.probe(tmp_path / name).size == (64, 48)
    frames = read_media(tmp_path / name).video.frames
    assert frames.shape == (3, 64, 48, 3)
    assert frames[:, 5, 40, 1].min() > 200 and frames[:, 5, 5, 1].max() < 50


def with_chunk(path, name: bytes, data: bytes):
    """The PNG with another chunk after its first."""
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + chunk + whole[33:])
    return path


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize(
    "primaries, transfer, words",
    [
        (9, 16, "HDR"),
        (9, 18, "HDR"),
        (12, 13, "wide-gamut"),
        (9, 14, "wide-gamut"),
        (1, 8, "linear"),
        (1, 13, ""),
    ],
)
def test_code_points_of_pictures_are_said(tmp_path, moves, primaries, transfer, words):
    images = [Image.new("RGB", (32, 32), (200, 80 * i, 60)) for i in range(2)]
    images[0].save(
        tmp_path / "a.png", save_all=moves, append_images=images[1:] if moves else [], duration=500
    )
    with_chunk(tmp_path / "a.png", b"cICP", bytes([primaries, transfer, 0, 1]))
    images[0].save(
        tmp_path / "a.avif", save_all=moves, append_images=images[1:] if moves else [], duration=500
    )
    data = (tmp_path / "a.avif").read_bytes()
    place = data.index(b"colrnclx") + 8
    code = struct.pack(">HH", primaries, transfer)
    (tmp_path / "a.avif").write_bytes(data[:place] + code + data[place + 4 :])
    for name in ("a.png", "a.avif"):
        notes = read_media(tmp_path / name).notes
        assert len(notes) == bool(words) and words in "".join(notes), name


@pytest.mark.parametrize("gamma", [1.0, 0.55556, 0.45455, 0.0])
def test_the_gamma_of_a_png_is_obeyed(tmp_path, gamma):
    colour = np.array([200, 80, 60])
    Image.new("RGB", (32, 32), tuple(map(int, colour))).save(tmp_path / "a.png")
    with_chunk(tmp_path / "a.png", b"gAMA", struct.pack(">I", round(gamma * 100000)))
    wanted = colour
    if gamma > 0.5:
        linear = (colour / 255) ** (1 / gamma)
        wanted = 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(read_media(tmp_path / "a.png").video.frames[0, 5, 5] - wanted).max() < 1
    with_chunk(tmp_path / "a.png", b"sRGB", b"\0")  # which overrules it
    assert (read_media(tmp_path / "a.png").video.frames[0, 5, 5] == colour).all()


def test_srgb_stays_and_broken_profiles_are_noted(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(picture).save(tmp_path / "srgb.tif", icc_profile=srgb)
    assert (V.read_video(tmp_path / "srgb.tif").frames[0] == picture).all()
    Image.fromarray(picture).save(tmp_path / "broken.tif", icc_profile=srgb[:200])
    read = read_media(tmp_path / "broken.tif")
    assert (read.video.frames[0] == picture).all() and "a colour profile that can't be used" in read.notes[0]


RAMP = np.linspace(0, 1, 48 * 64).reshape(48, 64)


@pytest.mark.parametrize(
    "array",
    [
        RAMP.astype(np.float32),
        (RAMP * 65535).astype(np.uint16),
        (RAMP * 65535).astype(np.int32),
        (RAMP * 255).round().astype(np.uint8),
    ],
    ids=["float32", "uint16", "int32", "uint8"],
)
def test_numbers_of_every_kind_come_at_their_scale(tmp_path, array):
    Image.fromarray(array).save(tmp_path / "a.tif")
    back = read_media(tmp_path / "a.tif").video.frames[0].astype(int)
    assert np.abs(back - RAMP[..., None] * 255).max() <= 1


@pytest.mark.parametrize("array", [RAMP * 200, RAMP * np.nan, RAMP - 0.5, (RAMP * 1e9), (RAMP * -9)])
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_scale_are_refused(tmp_path, array, kind):
    with np.errstate(invalid="ignore"):
        array = array.astype(kind)
    if kind == np.int32 and array.min() >= 0 and array.max() < 65536:
        return
    Image.fromarray(array).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif is a picture of .*: save it with 8 or 16 bits"):
        read_media(tmp_path / "a.tif")
    with pytest.raises(UserError, match="The picture is a picture of|The picture is"):
        read_media(Image.open(tmp_path / "a.tif"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "LAB", "RGBA"])
def test_modes_of_every_kind(tmp_path, mode):
    image = Image.new("RGB", (64, 48), (30, 160, 220))
    image.paste((240, 240, 240), (0, 0, 64, 24))
    if mode == "LAB":
        spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        moded = ImageCms.profileToProfile(image, *spaces, outputMode="LAB")
    else:
        moded = image.convert(mode)
    moded.save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as saved:
        assert saved.mode == mode
    frame = V.read_video(tmp_path / "a.tif").frames[0].astype(int)
    wanted = np.asarray((image.convert("L") if mode in ("1", "L", "LA") else image).convert("RGB")).astype(
        int
    )
    if mode == "1":
        assert frame[:20].mean() > 220 and set(np.unique(frame)) <= {0, 255}
    else:
        assert np.abs(frame - wanted).mean() < (25 if mode == "P" else 3)


def test_floats_from_other_decoders_are_refused(tmp_path):
    """A TIFF of float colours, which Pillow doesn't read and FFmpeg cuts at 1."""
    values = np.stack([RAMP, RAMP, RAMP], -1).astype("<f4").tobytes()
    entries = [
        (256, 3, 1, 64),
        (257, 3, 1, 48),
        (258, 3, 3, 134),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 146),
    ]
    entries += [(277, 3, 1, 3), (278, 4, 1, 48), (279, 4, 1, len(values)), (339, 3, 3, 140)]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    head += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    head += struct.pack("<3H", 32, 32, 32) + struct.pack("<3H", 3, 3, 3)
    (tmp_path / "a.tif").write_bytes(head + values)
    with pytest.raises(UserError, match="a.tif has floating-point pixels"):
        read_media(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.tif", "a.mpo"])
def test_pages_are_not_moments(tmp_path, name):
    images = [Image.new("RGB", (64, 48), (60 * i, 0, 0)) for i in range(1, 4)]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:])
    read = read_media(tmp_path / name)
    assert len(read.video) == 1 and abs(int(read.video.frames[0, 5, 5, 0]) - 60) < 5
    assert read.notes == (f"{tmp_path / name} holds 3 pictures, of which the first is used.",)


@pytest.mark.parametrize("alpha", [False, True])
def test_avif_moves(tmp_path, alpha):
    images = [Image.new("RGBA", (64, 48), (40 * i, 0, 0, 255)) for i in range(6)]
    for image in images:
        image.paste((0, 0, 0, 0), (0, 0, 32, 48)) if alpha else None
    images[0].save(tmp_path / "a.avif", save_all=True, append_images=images[1:], duration=100, quality=90)
    read = read_media(tmp_path / "a.avif")
    assert [round(int(value) / 40) for value in read.video.frames[:, 24, 56, 0]] == list(range(6))
    assert read.video.fps == pytest.approx(10) and read.source_frames == 6
    assert (read.video.frames[:, :, :24] > 250).all() == alpha and len(read.notes) == alpha
    late = [frame for _, frame in V.stream_frames(tmp_path / "a.avif", 0.35)]
    assert [round(int(frame[24, 56, 0]) / 40) for frame in late] == [3, 4, 5]
    assert V.probe(tmp_path / "a.avif").size == (48, 64)
    images[3].save(tmp_path / "still.avif", quality=90)
    assert len(V.read_video(tmp_path / "still.avif")) == 1 and read_picture(tmp_path / "a.avif") is None
    data = (tmp_path / "a.avif").read_bytes()
    (tmp_path / "cut.avif").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut.avif"):
        read_media(tmp_path / "cut.avif")


def test_pictures_in_memory_are_read_likewise():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 80, 60)).save(file, "TIFF", icc_profile=profile(*PROFILES["Adobe RGB"]))
    frame = read_media(Image.open(file)).video.frames[0]
    assert np.abs(frame[4, 4] - in_srgb((200, 80, 60), *PROFILES["Adobe RGB"])).max() < 3.5
