"""Targets are read from words, and wrong ones answered with what was expected."""

import pytest

from jaxgpt.errors import UserError
from jaxgpt.plan.chips import CHIPS, GIB, parse_target


@pytest.mark.parametrize(
    ("text", "name", "chips", "devices", "near"),
    [
        ("v5p:4x4x8", "v5p:4x4x8", 128, 128, 128),
        ("v5e:16x16", "v5e:16x16", 256, 256, 256),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 4, 8, 8),
        ("h100x8", "h100x8", 8, 8, 8),
        ("h200:64", "h200x64", 64, 64, 8),
        ("a100", "a100", 1, 1, 8),
        ("cpu", "cpu", 1, 1, 1),
    ],
)
def test_targets(text, name, chips, devices, near):
    found = parse_target(text)
    assert (found.name, found.chips, found.devices, found.near) == (name, chips, devices, near)


def test_slices_multiply():
    found = parse_target("v5e:16x16", 2)
    assert (found.chips, found.topology, found.name) == (512, "v5e:16x16", "2 slices of v5e:16x16")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v7:2x2", "no such machine. Did you mean 'v4'? Expected something like v5p:4x4x8"),
        ("v5p:4x4", "found 2 sizes; slices of v5p have 3: v5p:4x4x4"),
        ("v5e:0x4", "a size of 0"),
        ("h100x8x8", "expected a number of chips, as in h100x8"),
    ],
)
def test_wrong_targets(text, said):
    with pytest.raises(UserError, match="target=") as raised:
        parse_target(text)
    assert said in str(raised.value)


def test_a_program_has_what_the_compiler_says_of_v5e():
    assert CHIPS["v5e"].hbm == 15.75 * GIB


def test_a_core_of_tpu7x_is_a_device():
    one, docs = CHIPS["tpu7x"], 2307e12
    assert (one.flops, one.devices) == (docs / 2, 2)
