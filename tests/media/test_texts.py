"""Text files are read as editors save them, and what is no text is refused with its line."""

import pytest

from sora_jax.errors import UserError
from sora_jax.media.texts import read_text

WORDS = "# prompts of today\na red circle – très joli\n\n青い四角 moves up 🎈\n"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize(
    "mark, encoding",
    [
        (b"", "utf-8"),
        (b"\xef\xbb\xbf", "utf-8"),
        (b"\xff\xfe", "utf-16-le"),
        (b"\xfe\xff", "utf-16-be"),
        (b"\xff\xfe\0\0", "utf-32-le"),
        (b"\0\0\xfe\xff", "utf-32-be"),
    ],
)
def test_every_encoding_that_editors_write(tmp_path, mark, encoding, end):
    data = mark + WORDS.replace("\n", end).encode(encoding)
    (tmp_path / "prompts.txt").write_bytes(data)
    assert read_text(tmp_path / "prompts.txt") == read_text(str(tmp_path / "prompts.txt")) == WORDS
    assert read_text(data) == WORDS


def test_empty_and_joined_files():
    assert read_text(b"") == read_text(b"\xef\xbb\xbf") == read_text(b"\xff\xfe") == ""
    assert read_text(b"\xef\xbb\xbfone\r\n\xef\xbb\xbftwo") == "one\ntwo"


@pytest.mark.parametrize(
    "data, message",
    [
        ("one\r\ntwo\r\ntrès".encode("cp1252"), "not UTF-8 text: the byte 0xE8 in line 3"),
        ("one\rtwo “three”".encode("cp1252"), "the byte 0x93 in line 2"),
        ("東京".encode("shift_jis"), "the byte 0x93 in line 1"),
        (b"\xff\xfea\0\n\0b", "not UTF-16-LE text: the byte 0x62 in line 2"),
        ("one\ntwo".encode("utf-16-le"), "line 1 holds a zero byte"),
        (b"one\ntwo\0three", "line 2 holds a zero byte"),
    ],
)
def test_other_bytes_are_refused_with_their_line(tmp_path, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read_text(tmp_path / "a.txt")
    assert "a.txt" in str(error.value) and "save the file as UTF-8" in str(error.value)
    with pytest.raises(UserError, match="^standard input is not"):
        read_text(data, "standard input")


def test_what_can_not_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="no file .*absent.txt"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="can't be read: Is a directory"):
        read_text(tmp_path)
