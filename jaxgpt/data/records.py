"""Reading the user's files: text, and JSON whose records know the file and the line, or place, they came from."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import importlib
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

from jaxgpt.errors import UserError, nearest
from jaxgpt.places import local, matching, place

Paths = str | Path | Sequence[str | Path]
_PACKED = (".gz", ".zst", ".xz", ".bz2")
_BLANK = b" \t\r\n\xef\xbb\xbf"  # JSON's white space, and the mark of UTF-8


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object of a JSON Lines file, or of an array that is a whole file."""

    path: str
    line: int | None
    value: dict[str, Any]
    item: int | None = None
    """Its place in the array, from 0."""

    @property
    def where(self) -> str:
        """ "file:line", or "file[item]" in an array, to begin an error with."""
        return f"{self.path}:{self.line}" if self.item is None else f"{self.path}[{self.item}]"

    def text(self, key: str) -> str:
        """The string under `key`; raises UserError where there is none."""
        if key not in self.value:
            raise UserError(
                f'{self.where}: no key "{key}"; the record has {_keys(self.value)}.{nearest(key, self.value)}'
            )
        found = self.value[key]
        if not isinstance(found, str):
            raise UserError(f'{self.where}: "{key}" is {_kind(found)}, expected a string')
        return found


def expand(paths: Paths) -> list[Path]:
    """Looks up files and glob patterns, in the order given (a pattern's files sorted by name), each file once."""
    found: dict[Path, None] = {}
    for pattern in [paths] if isinstance(paths, str | PurePath) else paths:
        path = place(pattern).expanduser()
        if path.is_dir():
            raise UserError(f"{path} is a folder; name its files, for example {path / '*.jsonl'}")
        matches = [path] if path.is_file() else matching(path)
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise UserError(_missing(path))
        found.update(dict.fromkeys(matches))
    if not found:
        raise UserError("no files are named; give a path or a glob pattern")
    return list(found)


def read_jsonl(paths: Paths) -> Iterator[Record]:
    """Reads the objects of JSON Lines files (.jsonl, also .gz, .zst, .xz, .bz2); blank lines are passed over.

    A .json file may be one array of objects instead, which is held in memory.
    """
    for path in expand(paths):
        if _is_array(path):
            yield from _items(path)
            continue
        line = 0
        try:
            with _open(path) as file:
                for line, raw in enumerate(file, start=1):
                    if raw.strip():
                        yield Record(str(path), line, _object(raw, f"{path}:{line}"))
        except (EOFError, OSError, lzma.LZMAError) as error:
            raise UserError(f"{path}: cannot be read after line {line}: {error}") from error


def read_texts(paths: Paths, field: str = "text") -> Iterator[str]:
    """Reads documents: a .txt file is one, a JSON Lines record gives the string under `field`."""
    for path in expand(paths):
        if _is_plain(path):
            yield _whole(path)
        else:
            for record in read_jsonl(path):
                yield record.text(field)


def read_fields(paths: Paths, fields: Sequence[str]) -> Iterator[str]:
    """Reads every string under any of `fields`: lists and messages are walked, roles left out; .txt gives itself."""
    for path in expand(paths):
        if _is_plain(path):
            yield _whole(path)
            continue
        seen: set[str] = set()
        used = False
        for record in read_jsonl(path):
            seen.update(record.value)
            for field in fields:
                if field in record.value:
                    used = True
                    yield from _strings(record.value[field])
        if not used:
            wanted = ", ".join(f'"{field}"' for field in fields)
            hint = nearest(fields[0], seen) if fields else ""
            raise UserError(f"{path}: no record has any of {wanted}; found {_keys(seen)}.{hint}")


def read_object(file: Path) -> dict[str, Any]:
    """Reads a file that is one JSON object. Raises UserError where it is none."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: {_kind(value)}, expected a JSON object")
    return value


def file_hash(paths: Paths) -> str:
    """Reads files whole; SHA-256 (hex) of their contents in order, whatever their names."""
    total = hashlib.sha256()
    for path in expand(paths):
        with local(path).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _open(path: Path) -> IO[bytes]:
    path = local(path)
    match path.suffix:
        case ".gz":
            return gzip.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".bz2":
            return bz2.open(path, "rb")
        case ".zst":
            for module in ("compression.zstd", "zstandard"):  # the first is Python 3.14's own
                try:
                    return importlib.import_module(module).open(path, "rb")
                except ModuleNotFoundError:
                    continue
            raise UserError(f"{path}: .zst needs a package; `pip install zstandard`, or unpack the file")
    return path.open("rb")


def _is_plain(path: Path) -> bool:
    """Whether the file is one document (.txt) rather than JSON Lines."""
    kind = _kind_of(path)
    if kind not in (".txt", ".jsonl", ".json"):
        raise UserError(f"{path}: text comes from .txt or .jsonl files (also .gz, .zst, .xz, .bz2)")
    return kind == ".txt"


def _kind_of(path: Path) -> str:
    """The file's suffix, that of a packed file within."""
    return path.with_suffix("").suffix if path.suffix in _PACKED else path.suffix


def _whole(path: Path) -> str:
    try:
        with _open(path) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it with iconv or the like") from error
    except (EOFError, OSError, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _is_array(path: Path) -> bool:
    """Whether the file is a .json whose first character opens an array."""
    if _kind_of(path) != ".json":
        return False
    try:
        with _open(path) as file:
            start = b" "
            while start and not start.strip(_BLANK):
                start = file.read(64)
    except (EOFError, OSError, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return start.lstrip(_BLANK).startswith(b"[")


def _items(path: Path) -> Iterator[Record]:
    try:
        items = json.loads(_whole(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise UserError(f"{path}: JSON nested too deeply") from error
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise UserError(f"{path}[{number}]: {_kind(item)}, expected an object such as {{...}}")
        yield Record(str(path), None, item, number)


def _object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}; each line is one object") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: {_kind(value)}, expected an object such as {{...}}; each line is one object")
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key != "role":
                yield from _strings(part)


def _missing(path: Path) -> str:
    if glob.has_magic(str(path)):
        return f"no file matches {path}"
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does the folder {path.parent}"
    return f"{path} does not exist.{nearest(path.name, (p.name for p in path.parent.iterdir()))}"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _keys(keys: Any) -> str:
    return ", ".join(f'"{key}"' for key in sorted(keys)) or "no keys"
