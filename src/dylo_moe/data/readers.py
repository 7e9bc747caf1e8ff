"""Readers for the user's files: rows one by one, each with its location, in memory that does not grow with the file."""

import codecs
import csv
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import datasets
from datasets.exceptions import DatasetGenerationError

from dylo_moe.data.formats import Row
from dylo_moe.durable import sha256_of
from dylo_moe.errors import DatasetError, first_line

_MAX_ROW_BYTES = 8 * 2**20
"""Longest row; a longer one most likely means that the file is of another kind."""

_CHUNK = 2**20
_JSON_LINES, _JSON, _CSV, _PARQUET = (".jsonl", ".ndjson"), (".json",), (".csv",), (".parquet",)
_TEXT = (*_JSON_LINES, *_JSON, *_CSV)
SUFFIXES = (*_TEXT, *_PARQUET, *(f"{suffix}.gz" for suffix in _TEXT))

LocatedRow = tuple[str, Row]
"""Location of a row, such as ``rows.jsonl line 3``, and the row."""


def data_files(path: Path) -> list[Path]:
    """Return the data files at a path: the file itself, or all files in the folder and below, sorted by name.

    Raises:
        DatasetError: There is no data file, the file is of an unknown kind, or links form a cycle.
    """
    if not _resolved(path).is_dir():
        if not path.is_file() or not path.name.lower().endswith(SUFFIXES):
            raise DatasetError(f"{path} is not a data file; give a folder or a file of {', '.join(SUFFIXES)}")
        return [path]
    found = list(_files_below(path, ()))
    if not found:
        raise DatasetError(f"the folder {path} has no data file ({', '.join(SUFFIXES)})")
    return found


def _files_below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    here = _resolved(folder)
    if here in above:
        raise DatasetError(f"the link {folder} leads back to {here}, which contains it; remove it")
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if _resolved(entry).is_dir():
            yield from _files_below(entry, (*above, here))
        elif entry.is_file() and entry.name.lower().endswith(SUFFIXES):
            yield entry


def _resolved(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except FileNotFoundError as error:
        raise DatasetError(f"there is no file or folder {path}") from error
    except (OSError, RuntimeError) as error:  # Python versions differ in how they report a cycle of links
        raise DatasetError(f"{path} cannot be followed: {first_line(error)}") from error


def digest_of(files: list[Path]) -> str:
    """Return one SHA-256 of the names and contents of files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with _reading(path):
            digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


def rows_of(path: Path) -> Iterator[LocatedRow]:
    """Yield the rows of a data file.

    Raises:
        DatasetError: The file cannot be read; the message names file and line.
    """
    name = path.name.lower()
    if name.endswith(_PARQUET):
        yield from _parquet_rows(path)
        return
    with _reading(path), cast(BinaryIO, gzip.open(path) if name.endswith(".gz") else path.open("rb")) as file:
        kind = name.removesuffix(".gz")
        if kind.endswith(_CSV):
            yield from _csv_rows(path, file)
        elif kind.endswith(_JSON_LINES) or not _is_array(file):
            yield from _json_lines(path, file)
        else:
            yield from _json_array(path, file)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise DatasetError(f"{path} cannot be read: {first_line(error)}") from error


def _is_array(file: BinaryIO) -> bool:
    """Return whether JSON begins with ``[`` (some ``.json`` files hold lines), and rewind the file."""
    start = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(_MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > _MAX_ROW_BYTES:
            raise DatasetError(_too_long(f"{path} line {number}"))
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(_not_utf8(f"{path} line {number}", error)) from error


def _json_lines(path: Path, file: BinaryIO) -> Iterator[LocatedRow]:
    for number, line in _lines(path, file):
        if line.strip():
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DatasetError(f"{where} is broken JSON: {first_line(error)}") from error
            yield where, _object(where, row)


def _json_array(path: Path, file: BinaryIO) -> Iterator[LocatedRow]:
    """Yield the objects of one large array without holding the array."""
    text = _TextWindow(path, file)
    text.skip(_BEFORE_ARRAY)
    while text.skip(_BETWEEN_ROWS) not in ("]", ""):
        where = f"{path} line {text.line}"
        yield where, _object(where, text.decode(where))
    if not text.skip(_BETWEEN_ROWS):
        raise DatasetError(f"{path} line {text.line} is broken JSON: the list does not end")


_BEFORE_ARRAY, _BETWEEN_ROWS = re.compile(r"[ \t\r\n]*\["), re.compile(r"[ \t\r\n,]*")


class _TextWindow:
    """Window on the text of a file, with a position in it.

    Args:
        path: Path of the file, for messages.
        file: The file, open at its start.

    Attributes:
        line: Line of the position, from 1.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.line = 1
        self._path = path
        self._file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._position, self._ended = "", 0, False

    def skip(self, pattern: "re.Pattern[str]") -> str:
        """Move past a match of the pattern; return the next character, or "" at the end of the file."""
        while True:
            match = pattern.match(self._text, self._position)
            self._move_to(match.end() if match else self._position)
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._read()

    def decode(self, where: str) -> object:
        """Return the JSON value at the position and move past it."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._position)
            except (json.JSONDecodeError, RecursionError) as error:
                if self._ended:
                    raise DatasetError(f"{where} is broken JSON: {_without_place(error)}") from error
                if len(self._text) - self._position > _MAX_ROW_BYTES:
                    raise DatasetError(f"{_too_long(where)} ({_without_place(error)})") from error
                self._read()
            else:
                self._move_to(end)
                return value

    def _move_to(self, end: int) -> None:
        self.line += self._text.count("\n", self._position, end)
        self._position = end

    def _read(self) -> None:
        """Double the window, so that a long row is scanned a few times rather than once for each chunk."""
        rest = self._text[self._position :]
        chunk = self._file.read(max(_CHUNK, len(rest)))
        self._ended = not chunk
        try:
            self._text, self._position = rest + self._utf8.decode(chunk, final=self._ended), 0
        except UnicodeDecodeError as error:
            line = self.line + rest.count("\n") + error.object[: error.start].count(b"\n")
            raise DatasetError(_not_utf8(f"{self._path} line {line}", error)) from error


def _without_place(error: Exception) -> str:
    """Return the message of an error without its line number, which counts from the start of the row."""
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)


def _csv_rows(path: Path, file: BinaryIO) -> Iterator[LocatedRow]:
    csv.field_size_limit(_MAX_ROW_BYTES)
    reader = csv.DictReader((line for _, line in _lines(path, file)), strict=True)
    while True:
        where = f"{path} line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DatasetError(f"{where} is broken CSV: {first_line(error)}") from error
        if row is None:
            return
        if None in row or None in row.values():
            raise DatasetError(f"{where} does not have as many fields as the header of the file")
        yield where, row


def _parquet_rows(path: Path) -> Iterator[LocatedRow]:
    try:
        rows = datasets.Dataset.from_parquet(str(path))
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise DatasetError(f"{path} is not a Parquet file: {first_line(error.__cause__ or error)}") from error
    for number, row in enumerate(rows, start=1):
        where = f"{path} row {number}"
        if sum(len(value) for value in row.values() if isinstance(value, str)) > _MAX_ROW_BYTES:
            raise DatasetError(_too_long(where))
        yield where, row


def _object(where: str, row: object) -> Row:
    if not isinstance(row, dict):
        raise DatasetError(f"{where} must be an object with columns, got a {type(row).__name__}")
    return row


def _too_long(where: str) -> str:
    return f"{where} is longer than {_MAX_ROW_BYTES // 2**20} MB, the longest row allowed; split it or leave it out"


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{where} is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8"
