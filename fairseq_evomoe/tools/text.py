"""How the tools read text: lines end at a line feed, and text is UTF-8."""

from pathlib import Path


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file without their ends, also without carriage returns there.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, or a line is not UTF-8 text (a byte order mark is allowed).
    """
    found = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            found.append(raw.rstrip(b"\r").decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not UTF-8 text: {error}") from error
    if not found[-1]:
        found.pop()
    if not found:
        raise ValueError(f"{path} is empty")
    return found
