"""Token shards on disk, and the training rows cut from them.

A source's folder holds ``train.bin`` and ``val.bin`` (little-endian token ids, every document as BOS + text + EOS;
EOS stands in front too where the tokenizer has no BOS), ``train.starts.bin`` and ``val.starts.bin`` (int64: where
documents begin) and ``index.json``.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

from jaxgpt.config.schema import DataConfig
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.places import local, place, publish, remove, scratch

Split = Literal["train", "val"]

_SPLITS: tuple[Split, ...] = ("train", "val")
_VERSION = 1
_BLOCK = 1 << 20  # characters encoded at a time


def write_tokens(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    folder: str | Path,
    val_fraction: float,
    val_split: Literal["document", "tail"],
    source_hash: str = "",
) -> None:
    """Writes a source's shards and index, whole or not at all; documents are streamed, never held together.

    "document" holds out the documents whose hash falls in the fraction, and at least one where there are two or more;
    "tail" holds out the last tokens. Documents without a visible character are dropped and counted.
    """
    folder = place(folder)
    part = scratch(folder)
    try:
        _write(texts, tokenizer, part, folder.name, val_fraction, val_split, source_hash)
        publish(part, folder, "index.json")
    finally:
        remove(part)


def _write(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    part: Path,
    name: str,
    val_fraction: float,
    val_split: Literal["document", "tail"],
    source_hash: str,
) -> None:
    dtype = np.dtype("<u2" if tokenizer.size <= 1 << 16 else "<u4")
    with (part / "all.bin").open("wb") as file:
        documents = _write_stream(texts, tokenizer, dtype, file)
    if not documents.starts:
        raise UserError(f"source {name}: there is no text in its files ({documents.empty} empty documents)")
    stream = np.memmap(part / "all.bin", dtype, mode="r")
    if val_split == "document":
        splits = _by_document(stream, documents, val_fraction, part)
    else:
        splits = _by_tail(stream, documents, val_fraction, part, tokenizer.piece_bytes)
    del stream
    (part / "all.bin").unlink()
    index = {
        "version": _VERSION,
        "dtype": dtype.name,
        "tokenizer": tokenizer.model_hash,
        "source": source_hash,
        "val_fraction": val_fraction,
        "val_split": val_split,
        "empty_documents": documents.empty,
        "unknown_tokens": documents.unknown,
        "splits": splits,
    }
    (part / "index.json").write_text(json.dumps(index, indent=2) + "\n")


def is_current(folder: str | Path, tokenizer: Tokenizer, source_hash: str, config: DataConfig) -> bool:
    """Whether the folder holds, undamaged, what `write_tokens` would write again."""
    try:
        index = _read_index(place(folder))
        for split in _SPLITS:
            Shard.open(folder, split)
    except UserError:
        return False
    found = [index.get(key) for key in ("tokenizer", "source", "val_fraction", "val_split")]
    return found == [tokenizer.model_hash, source_hash, config.val_fraction, config.val_split]


@dataclass(frozen=True)
class Shard:
    """One split of a source: memory-mapped token ids and where its documents start."""

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    bytes: int
    """UTF-8 bytes of text behind the tokens, for bits per byte."""

    @classmethod
    def open(cls, folder: str | Path, split: Split) -> Shard:
        """Maps the files; raises UserError naming the one that is missing or has another size than the index says."""
        folder = place(folder)
        index = _read_index(folder)
        counts = index["splits"][split]
        tokens = _mapped(folder / f"{split}.bin", np.dtype(index["dtype"]).newbyteorder("<"), counts["tokens"])
        starts = _mapped(folder / f"{split}.starts.bin", np.dtype("<i8"), counts["documents"])
        return cls(f"{folder.name} ({split})", tokens, starts, counts["bytes"])

    def __len__(self) -> int:
        return len(self.tokens)


class Rows:
    """Windows of `context` + 1 tokens, one starting where the last one's targets end: every token is a target once.

    Row i holds tokens, targets, segments and positions ([context] int32) and mask ([context] float32). Segments number
    the documents inside the row from 1, positions count from 0 in each; a token that begins a document is no target.
    With `partial` the rest that is shorter than a row becomes a padded one (segment 0, mask 0).
    """

    def __init__(self, shard: Shard, context: int, partial: bool = False):
        self.shard = shard
        self.context = context
        pairs = max(len(shard) - 1, 0)
        self._length = -(-pairs // context) if partial else pairs // context
        if not self._length:
            raise UserError(
                f"source {shard.name} has {len(shard)} tokens, too few for one row of {context} + 1; give it more text "
                "or shorten the context; for the held-out part also see data.val_fraction and data.val_split"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in self.gather(np.array([row])).items()}

    def gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The named rows at once, each array [len(rows), context]."""
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows run from 0 to {len(self) - 1}, got {rows.min()} to {rows.max()}")
        first = rows * self.context
        offsets = np.arange(self.context + 1)
        at = first[:, None] + offsets
        end = len(self.shard)
        whole = not rows.size or at.max() < end
        window = self.shard.tokens[at if whole else np.minimum(at, end - 1)].astype(np.int32)
        begins = self._begins(first)
        segments = np.cumsum(begins, axis=1, dtype=np.int32)
        positions = (offsets - np.maximum.accumulate(np.where(begins, offsets, 0), axis=1)).astype(np.int32)
        row = {
            "tokens": window[:, :-1],
            "targets": window[:, 1:],
            "mask": (~begins[:, 1:]).astype(np.float32),
            "segments": segments[:, :-1],
            "positions": positions[:, :-1],
        }
        if not whole:
            real = at[:, 1:] < end
            row = {key: value * real.astype(value.dtype) for key, value in row.items()}
        return row

    def _begins(self, first: np.ndarray) -> np.ndarray:
        """[rows, context + 1] bool: where a segment begins; each row's first token does."""
        begins = np.zeros((len(first), self.context + 1), bool)
        low = np.searchsorted(self.shard.starts, first)
        count = np.searchsorted(self.shard.starts, first + self.context + 1) - low
        row = np.repeat(np.arange(len(first)), count)
        document = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
        begins[row, self.shard.starts[document] - first[row]] = True
        begins[:, 0] = True
        return begins


class _Block(NamedTuple):
    text: str
    first: bool
    last: bool


@dataclass
class _Documents:
    """What is remembered of each document while the stream is written."""

    starts: array = field(default_factory=lambda: array("q"))
    bytes: array = field(default_factory=lambda: array("q"))
    hashes: array = field(default_factory=lambda: array("Q"))
    empty: int = 0
    unknown: int = 0


def _write_stream(texts: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype, file: IO[bytes]) -> _Documents:
    documents = _Documents()
    written = 0
    for batch in _batches(_blocks(texts, documents)):
        for block, ids in zip(batch, tokenizer.encode([block.text for block in batch]), strict=True):
            if block.first:
                documents.starts.append(written)
            tokens = np.array([tokenizer.start] * block.first + ids + [tokenizer.eos] * block.last, dtype)
            documents.unknown += 0 if tokenizer.unk is None else int((tokens == tokenizer.unk).sum())
            written += len(tokens)
            file.write(tokens.tobytes())
    return documents


def _blocks(texts: Iterable[str], documents: _Documents) -> Iterator[_Block]:
    """Documents, long ones cut in front of a line so that encoding takes little memory."""
    for text in texts:
        if not text.strip():
            documents.empty += 1
            continue
        data = text.encode(errors="replace")
        documents.bytes.append(len(data))
        documents.hashes.append(int.from_bytes(hashlib.sha256(data).digest()[:8], "big"))
        at = 0
        while at < len(text):
            end = at + _BLOCK
            if end < len(text):
                end = max(text.rfind("\n", at + 1, end), 0) or end
            yield _Block(text[at:end], at == 0, end >= len(text))
            at = end


def _batches(blocks: Iterable[_Block]) -> Iterator[list[_Block]]:
    batch: list[_Block] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += len(block.text)
        if size >= _BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _by_document(stream: np.ndarray, documents: _Documents, fraction: float, folder: Path) -> dict[str, dict[str, int]]:
    starts = np.array(documents.starts, np.int64)
    hashes = np.array(documents.hashes, np.uint64)
    held = hashes.astype(np.float64) / 2.0**64 < fraction
    if fraction > 0 and not held.any():
        held = hashes == hashes.min()  # copies of a document stay on one side
    if held.all():
        held[np.argmax(hashes)] = False
    lengths = np.diff(starts, append=len(stream))
    sizes = np.array(documents.bytes, np.int64)
    splits = {}
    for split, chosen in zip(_SPLITS, (~held, held), strict=True):
        with (folder / f"{split}.bin").open("wb") as file:
            numbers = np.flatnonzero(chosen)
            for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
                if len(run):
                    file.write(stream[starts[run[0]] : starts[run[-1]] + lengths[run[-1]]])
        inside = lengths[chosen]
        splits[split] = _written(folder, split, inside.sum(), np.cumsum(inside) - inside, sizes[chosen].sum())
    return splits


def _by_tail(
    stream: np.ndarray, documents: _Documents, fraction: float, folder: Path, piece_bytes: np.ndarray
) -> dict[str, dict[str, int]]:
    starts = np.array(documents.starts, np.int64)
    cut = len(stream) - round(len(stream) * fraction)
    parts = [stream[:cut], stream[cut:]]
    inside = [starts[starts < cut], np.union1d([cut], starts[starts >= cut]) - cut if cut < len(stream) else starts[:0]]
    held = sum(int(piece_bytes[parts[1][i : i + _BLOCK]].sum()) for i in range(0, len(parts[1]), _BLOCK))
    splits = {}
    for split, part, begin, size in zip(_SPLITS, parts, inside, (sum(documents.bytes) - held, held), strict=True):
        with (folder / f"{split}.bin").open("wb") as file:
            file.write(part)
        splits[split] = _written(folder, split, len(part), begin, size)
    return splits


def _written(folder: Path, split: str, tokens: int, starts: np.ndarray, size: int) -> dict[str, int]:
    """Writes where documents start; the split's entry in the index."""
    starts.astype("<i8").tofile(folder / f"{split}.starts.bin")
    return {"tokens": int(tokens), "documents": len(starts), "bytes": int(size)}


def _read_index(folder: Path) -> dict:
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; tokenize the source again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged; remove {folder} to tokenize the source again") from error
    if index.get("version") != _VERSION:
        raise UserError(f"{path} is of another version; remove {folder} to tokenize the source again")
    return index


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    kept = local(path) if path.is_file() else None
    size = None if kept is None else kept.stat().st_size
    if size != count * dtype.itemsize:
        found = "is missing" if size is None else f"has {size} bytes"
        raise UserError(f"{path} {found}, expected {count * dtype.itemsize}; remove {path.parent} to tokenize it again")
    return np.memmap(kept, dtype, mode="r") if count else np.empty(0, dtype)
