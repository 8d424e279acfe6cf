"""How a tensor of a Hugging Face folder holds one of our arrays.

A layout names the dimensions of the other tensor, first to last. Letters that stand together are one dimension, the
first of them varying slowest: `"HK D"` is a matrix of heads times head width rows and model width columns. The letters
are those that end our arrays' names:

    D model width, F feed-forward width, G key/value heads, H query heads, K head width, T positions, V vocabulary

and the small ones say which part of a fused tensor an array is:

    q, k, v  first, second and last third of a dimension         1  the only row
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

THIRDS = {"q": 0, "k": 1, "v": 2}
FIXED = {**dict.fromkeys(THIRDS, 3), "1": 1}
"""Sizes of the dimensions that are not ours."""

Sizes = Mapping[str, int]


def tensor_shape(layout: str, sizes: Sizes) -> tuple[int, ...]:
    """Shape of the tensor; `sizes` holds the length of every letter."""
    return tuple(int(np.prod([_size(letter, sizes) for letter in part])) for part in layout.split())


def view(tensor: np.ndarray, layout: str, letters: str, sizes: Sizes) -> np.ndarray:
    """The part of `tensor` that is our array, with our dimensions `letters` in their order: nothing is copied.

    What is written into it is written into the tensor, whose elements lie in C order.
    """
    assert tensor.flags.c_contiguous
    inner = layout.replace(" ", "")
    split = tensor.reshape([_size(letter, sizes) for letter in inner])
    part = split[tuple(THIRDS.get(letter, 0) if letter in FIXED else slice(None) for letter in inner)]
    kept = [letter for letter in inner if letter not in FIXED]
    return part.transpose([kept.index(letter) for letter in letters])


def letters_of(path: str) -> str:
    """The shape letters that end an array's name: "q_bias_HK" gives "HK"."""
    return path.rpartition("_")[2]


def _size(letter: str, sizes: Sizes) -> int:
    return FIXED[letter] if letter in FIXED else sizes[letter]
