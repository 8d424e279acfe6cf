"""Where files lie: folders of this machine, or a bucket (gs://BUCKET/...), named by paths of one kind.

Reads and writes files. Nothing here needs jax. A bucket has no folders to rename: what is to be there whole is made on
this machine and put there, the file that says so last; what is to be mapped into memory is fetched.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath

from jaxgpt.errors import UserError

BUCKET = "gs://"


def in_bucket(path: str | Path) -> bool:
    """Whether a path is of a bucket."""
    return str(path).startswith(BUCKET)


def place(path: str | Path) -> Path:
    """The path of a name; of a bucket's, one that reads and writes there like any other (etils.epath).

    Raises UserError where that needs a package which is not installed.
    """
    if not in_bucket(path):
        return Path(path)
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{path}: a bucket needs the package gcsfs; pip install 'jaxgpt[gcs]'")
    from etils import epath

    return epath.Path(str(path))  # type: ignore[return-value]


def absolute(path: Path) -> Path:
    """The path from the root on."""
    return path if in_bucket(path) else path.absolute()


def local(path: Path) -> Path:
    """A file of this machine with the same contents: the path itself, or a copy that is fetched once."""
    if not in_bucket(path):
        return path
    told = path.stat()
    mark = hashlib.sha256(f"{path} {told.length} {told.mtime}".encode()).hexdigest()[:16]  # type: ignore[attr-defined]
    kept = Path(tempfile.gettempdir()) / f"jaxgpt-{os.getuid()}" / mark / path.name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f"{kept.name}.{os.getpid()}.part")
        path.copy(part, overwrite=True)  # type: ignore[attr-defined]
        part.replace(kept)
    return kept


def written(path: Path) -> float:
    """When a file was written last, seconds since 1970."""
    told = path.stat()
    return told.mtime if in_bucket(path) else told.st_mtime  # type: ignore[attr-defined]


def matching(pattern: Path) -> list[Path]:
    """The files that a pattern names, sorted."""
    if not in_bucket(pattern):
        return [Path(found) for found in sorted(glob.glob(str(pattern), recursive=True))]
    parts = PurePosixPath(str(pattern).removeprefix(BUCKET)).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return sorted(place(BUCKET + "/".join(parts[:fixed])).glob("/".join(parts[fixed:])))


def write_whole(path: Path, data: str | bytes) -> None:
    """Writes a file whole or not at all, as a bucket always does."""
    whole = data.encode() if isinstance(data, str) else data
    if in_bucket(path):
        path.write_bytes(whole)
        return
    part = path.with_name(path.name + ".part")
    part.write_bytes(whole)
    part.replace(path)


def remove(folder: Path) -> None:
    """Removes a folder with all that is in it, where it is there."""
    if not in_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.rmtree()  # type: ignore[attr-defined]


def scratch(folder: Path) -> Path:
    """An empty folder of this machine, to make another one in; `publish` brings it there."""
    if in_bucket(folder):
        return Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))


def publish(made: Path, folder: Path, last: str) -> None:
    """Puts what was made in the place of a folder, whole or not at all: `last` is the file that says it is whole."""
    if in_bucket(folder):
        remove(folder)
        files = sorted((path for path in made.rglob("*") if path.is_file()), key=lambda path: path.name == last)
        for path in files:
            there = folder / path.relative_to(made).as_posix()
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(path.read_bytes())
        shutil.rmtree(made)
        return
    made.chmod(0o755)
    old = made.with_name(made.name + "-old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(made, folder)
    shutil.rmtree(old, ignore_errors=True)
