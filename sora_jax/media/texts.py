"""Text files as people's editors save them: prompts, captions and storyboards."""

from __future__ import annotations

import codecs
import os

from sora_jax.errors import UserError, user_path

# A byte order mark says which encoding follows it. UTF-32's begins with UTF-16's, so the longer comes first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(source: str | os.PathLike[str] | bytes, name: str | None = None) -> str:
    r"""The text of a file or of its bytes, with "\n" at the ends of lines and no byte order mark.

    UTF-8 with and without a byte order mark is read, and UTF-16 and UTF-32 with one (what Windows Notepad calls
    "Unicode"). Lines may end with LF, CRLF or CR. Split it by "\n": `str.splitlines` splits at form feeds too.

    Args:
      source: the path, or the bytes that were read from it.
      name: what messages call it; None for the path.

    Raises:
      UserError: there is no such file, it can't be read, or it is none of these: the sentence names the line.
    """
    if isinstance(source, bytes):
        data, name = source, name or "The text"
    else:
        name = name or os.fspath(source)
        try:
            data = user_path(source).read_bytes()
        except FileNotFoundError as error:
            raise UserError(f"There is no file {name}: check the name.") from error
        except OSError as error:
            raise UserError(f"{name} can't be read: {error.strerror}; a text file is needed.") from error
    mark, encoding = next(((m, e) for m, e in MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        read = _unix(error.object[: error.start].decode(encoding))
        byte = f"0x{error.object[error.start]:02X}"
        raise UserError(
            f"{name} is not {encoding.upper()} text: the byte {byte} in line {read.count(chr(10)) + 1} is none of "
            f"it; save the file as UTF-8 in your editor."
        ) from error
    text = _unix(text)
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{name} is not UTF-8 text: line {line} holds a zero byte; save the file as UTF-8.")
    # Files that were joined carry a mark at each seam.
    return text.replace("\ufeff", "")


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
