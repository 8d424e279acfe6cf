"""safetensors files: what their headers say, and how one is written tensor by tensor.

The format (https://huggingface.co/docs/safetensors): eight bytes give the header's length, little-endian; the header is
JSON, one entry a tensor with dtype, shape and its first and last byte behind the header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgpt.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
OTHER_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
"""Of types that weights cannot have and buffers can."""
LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies."""

    shape: tuple[int, ...]
    dtype: str
    """As the header names it: "BF16"."""
    file: Path
    offset: int
    """Of its first byte in the file."""


def read_header(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file, from its header alone. Raises UserError where the file is cut short or no safetensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > LONGEST_HEADER:
            raise UserError(f"{file}: not a safetensors file")
        if size < 8 + length:
            raise UserError(
                f"{file}: cut short: its header has {length} bytes and the file {size}; copy or download it again"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _tensor(entry, file, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: not a safetensors file ({type(error).__name__}: {error})") from error
    for name, tensor in tensors.items():
        begin, end = header[name]["data_offsets"]
        width = DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else OTHER_BYTES.get(tensor.dtype)
        if width is not None and end - begin != width * math.prod(tensor.shape):
            raise UserError(
                f"{file}: {name} is {list(tensor.shape)} {tensor.dtype}, and its header gives it {end - begin} bytes"
            )
        if 8 + length + end > size:
            raise UserError(
                f"{file}: cut short: {name} ends at byte {8 + length + end} and the file has {size}; copy or download "
                "it again"
            )
    try:
        with safe_open(file, framework="numpy"):  # looks for all else that can be wrong with a header
            return tensors
    except SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file ({error})") from error


def _tensor(entry: Mapping[str, object], file: Path, data: int) -> Tensor:
    (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
        raise ValueError("what should be a whole number is none")
    return Tensor(shape, str(entry["dtype"]), file, data + begin)


def map_tensor(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes as they lie in the file; only what is looked at is read, and forgotten with the array."""
    dtype, raw = DTYPES[tensor.dtype], map_bytes(tensor)
    if tensor.offset % dtype.itemsize:  # allowed by the format, and not by NumPy
        raw = np.array(raw)
    return raw.view(dtype).reshape(tensor.shape)


def map_bytes(tensor: Tensor) -> np.ndarray:
    """As `map_tensor`, the bytes alone, of any type."""
    width = DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else OTHER_BYTES.get(tensor.dtype, 0)
    size = width * math.prod(tensor.shape)
    if not size:
        return np.zeros(0, np.uint8)
    return np.asarray(np.memmap(tensor.file, np.uint8, "r", tensor.offset, (size,)))


def write_tensors(
    file: Path, shapes: Mapping[str, Sequence[int]], dtype: str, value: Callable[[str], np.ndarray]
) -> None:
    """Writes a file, holding one tensor at a time; `value` gives each in turn, as float32 or in `dtype`."""
    width, at, header = DTYPES[dtype].itemsize, 0, {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        end = at + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            array = value(name)
            assert array.shape == tuple(shape), (name, array.shape, shape)
            stream.write(memoryview(np.ascontiguousarray(array, DTYPES[dtype]).reshape(-1).view(np.uint8)))
