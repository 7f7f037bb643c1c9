"""Reads and writes the text of the recipes. No other step opens a text file.

A line ends at a line feed; carriage returns before it are dropped. Text is UTF-8, with or without a
byte order mark. Compressed files (.gz, .xz, .bz2, .zst) are read as what they hold, and a member of
an archive is written "file.zip!member". Everything else stops the step with a sentence that names
the flag, the file and, for a wrong byte, the line.
"""

import bz2
import gzip
import json
import lzma
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

CHUNK = 2**20
DAMAGED = (
    *(EOFError, OSError, lzma.LZMAError, zlib.error),
    *(tarfile.TarError, zipfile.BadZipFile),
)
"""What the readers of compressed files and archives raise for bytes that they cannot read."""


def stop(where: str | Path, flag: str, what: str) -> NoReturn:
    """End the step with one line about a file; `flag` is the option that named it."""
    sys.exit(f"{flag}: {where} {what}" if flag else f"{where} {what}")


def _zstd(raw: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        sys.exit("reading .zst needs zstandard: pip install zstandard")
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        while data := raw.read(CHUNK):
            while data:
                yield frame.decompress(data)
                data = frame.unused_data
                if data:
                    frame = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if not frame.eof:
        raise EOFError("the last frame has no end")


def _streamed(open_stream: Callable[[IO[bytes]], Any]) -> Callable[[IO[bytes]], Iterator[bytes]]:
    def chunks(raw: IO[bytes]) -> Iterator[bytes]:
        with open_stream(raw) as stream:
            while data := stream.read(CHUNK):
                yield data

    return chunks


FORMATS: dict[str, tuple[bytes, Callable[[IO[bytes]], Iterator[bytes]]]] = {
    ".gz": (b"\x1f\x8b", _streamed(gzip.open)),
    ".xz": (b"\xfd7zXZ\x00", _streamed(lzma.open)),
    ".bz2": (b"BZh", _streamed(bz2.open)),
    ".zst": (b"\x28\xb5\x2f\xfd", _zstd),
}
"""Suffix of compressed text -> its first bytes, and the function that decompresses it."""


def existing(where: str | Path) -> str:
    """Return the file's name, or that of its compressed form if only that exists."""
    names = (f"{where}{suffix}" for suffix in ("", *FORMATS))
    return next((name for name in names if Path(name).exists()), str(where))


ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2")


def _open(where: str, stack: ExitStack) -> IO[bytes]:
    """Open a file, or a member of an archive, without decompressing it."""
    name, _, member = where.rpartition("!")
    if not member or not name or Path(where).exists():
        return stack.enter_context(Path(where).open("rb"))
    if name.endswith(".zip"):
        zipped = stack.enter_context(zipfile.ZipFile(name))
        return stack.enter_context(zipped.open(member))
    found = stack.enter_context(tarfile.open(name)).extractfile(member)  # noqa: SIM115
    if found is None:
        raise KeyError(member)
    return found


def _chunks(where: str, flag: str) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file."""
    if where.endswith(ARCHIVES) and Path(where).is_file():
        stop(where, flag, f'is an archive; name the file in it, as in "{where}!text"')
    try:
        with ExitStack() as stack:
            raw: Any = _open(where, stack)
            start = raw.peek(8)
            for suffix, (magic, decompress) in FORMATS.items():
                if start.startswith(magic):
                    yield from decompress(raw)
                    return
                if start and where.endswith(suffix):
                    stop(where, flag, f"is not a {suffix} file, or is damaged")
            while data := raw.read(CHUNK):
                yield data
    except FileNotFoundError:
        stop(where, flag, "does not exist")
    except IsADirectoryError:
        stop(where, flag, "is a folder, not a file")
    except PermissionError:
        stop(where, flag, "may not be read: permission denied")
    except KeyError:
        stop(where, flag, "does not exist in its archive")
    except DAMAGED as error:
        stop(where, flag, f"is cut or damaged: {error}")


def _byte_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    held: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        held.append(first)
        if others:
            yield b"".join(held)
            yield from others[:-1]
            held = [others[-1]]
    if last := b"".join(held):
        yield last


def _decoded(raw: bytes) -> str | None:
    """Return the text of a line; None if it is not UTF-8 or has a NUL byte."""
    try:
        return None if b"\0" in raw else raw.rstrip(b"\r").decode("utf-8")
    except UnicodeDecodeError:
        return None


def decodable_lines(where: str | Path, flag: str = "") -> Iterator[str | None]:
    """Yield the lines of a file, and None for a line that is not UTF-8 text.

    Raises:
        SystemExit: the file is missing, empty, cut, or in UTF-16.
    """
    number = 0
    where = existing(where)
    for raw in _byte_lines(_chunks(where, flag)):
        if not number and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            stop(where, flag, "is UTF-16; convert it: iconv -f utf-16 -t utf-8")
        if not number:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        number += 1
        yield _decoded(raw)
    if not number:
        stop(where, flag, "is empty")


def lines(where: str | Path, flag: str = "") -> Iterator[str]:
    """Yield the lines of a file without their ends.

    Args:
        where: a file, or "archive!member".
        flag: the option that named it, for the message.

    Raises:
        SystemExit: the file is missing, empty, cut, or not UTF-8 text.
    """
    for number, line in enumerate(decodable_lines(where, flag), 1):
        if line is None:
            stop(
                f"{where}, line {number},",
                flag,
                "is not UTF-8 text; convert the file (iconv -f latin1 -t utf-8) or mend the line",
            )
        yield line


def read(where: str | Path, flag: str = "") -> list[str]:
    """Return all lines of a file; the errors are those of `lines`."""
    return list(lines(where, flag))


def whole(where: str | Path, flag: str = "") -> str:
    """Return the text of a file as one string; the errors are those of `lines`."""
    return "\n".join(lines(where, flag)) + "\n"


@contextmanager
def writing(*paths: Path) -> Iterator[list[IO[str]]]:
    """Open text files for writing. They get their names when all of them are complete."""
    partial = [p.with_name(p.name + ".partial") for p in paths]
    files = [p.open("w", encoding="utf-8", newline="\n") for p in partial]
    try:
        yield files
    except BaseException:
        for f, p in zip(files, partial, strict=True):
            f.close()
            p.unlink()
        raise
    for f, p, path in zip(files, partial, paths, strict=True):
        f.close()
        p.replace(path)


def write(path: Path, text: str) -> None:
    """Write one text file, which gets its name when it is complete."""
    with writing(path) as (f,):
        f.write(text)


def append_json(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


# Format characters that are part of how a word is written, each with what must stand before it.
JOINERS = "\u200c\u200d"
TAGS = range(0xE0020, 0xE0080)
VISIBLE = {
    *range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD,
    *range(0x13430, 0x13440),
}  # fmt: skip
"""Format characters that are drawn, such as Arabic number signs and hieroglyph joiners."""
BREAKING = (range(0xE00, 0xF00), range(0x1000, 0x10A0), range(0x1780, 0x1800))
"""Thai and Lao, Myanmar, Khmer: a zero-width space is written between words."""


def _belongs(c: str, before: str) -> bool:
    """Whether a format character belongs to the spelling, given the character before it."""
    code, previous = ord(c), ord(before or " ")
    if c in JOINERS:
        # scripts before U+0590 (Latin, Greek, Cyrillic, Armenian) use it for ligatures alone
        return previous >= 0x590 and not before.isspace() and before not in JOINERS
    if c == "\u200b":
        return any(previous in block for block in BREAKING)
    if c == "\u180e":
        return 0x1800 <= previous < 0x18B0
    if code in TAGS:
        return previous == 0x1F3F4 or previous in TAGS
    return code in VISIBLE


def normalise(line: str) -> str:
    """Apply NFKC, drop what is not text, and collapse spaces.

    Control and private-use characters, and sentencepiece's own sign for a space, become spaces.
    Format characters go without leaving a space (soft hyphens, direction marks, byte order marks),
    except those that belong to the spelling: joiners in Persian, Indic scripts and emoji.
    """
    kept: list[str] = []
    for c in unicodedata.normalize("NFKC", line):
        category = unicodedata.category(c)
        if c == "\u2581" or category in ("Cc", "Co"):
            kept.append(" ")
        elif category == "Cf":
            if _belongs(c, kept[-1] if kept else ""):
                kept.append(c)
        elif category != "Cn" or not _noncharacter(ord(c)):
            # other unassigned characters may be newer than Python's table, as new emoji are
            kept.append(c)
    # what has lost a character between two others may compose with its new neighbour
    return " ".join(unicodedata.normalize("NFKC", "".join(kept)).split())


def _noncharacter(code: int) -> bool:
    return code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
