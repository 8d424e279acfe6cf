"""Lower bounds by hand: arithmetic, memory and network of a step over datasheet rates."""

from pathlib import Path

import pytest

from jaxgpt.config.load import load
from jaxgpt.plan.chips import parse_target
from jaxgpt.plan.roofline import Time, times
from jaxgpt.plan.weights import Mesh, count
from jaxgpt.plan.work import work

CONFIGS = Path(__file__).parents[2] / "configs"


def step(file: str, target: str, mesh: tuple[int, ...], *words: str, slices: int = 1) -> tuple[Time, int]:
    """The update's times, and the parameters."""
    plan = work(load(CONFIGS / f"{file}.yaml", ["mesh=null", *words]).config, "pretrain")
    return times(plan, Mesh(*mesh), parse_target(target, slices))[0], count(plan.models["policy"].weights)


def test_one_chip_has_no_network():
    found, _ = step("meadow", "v5e:1x1", (1, 1, 1, 1))
    assert (found.ici, found.dcn) == (0.0, 0.0)


def test_arithmetic_of_65_billion_on_128_chips():
    """Eight products for each parameter and token with full recomputation, and attention; 4 million tokens."""
    found, parameters = step("scale/llama-65b", "v5p:4x4x8", (1, 32, 1, 4))
    assert found.compute == pytest.approx(8 * parameters * 2048 * 2048 / 128 / 459e12, rel=0.06)
    assert found.by == "compute"


def test_tensor_parallel_traffic_of_65_billion():
    """Four exchanges of the activations in each layer, forward, recomputed and backward, on a ring of two links of 100
    GB/s; and over 32 devices on 8 and 4 of them weights gathered twice and gradients scattered."""
    found, parameters = step("scale/llama-65b", "v5p:4x4x8", (1, 32, 1, 4), "pretrain.accumulate=1")
    activations = 2048 / 32 * 2048 * 8192 * 2 * 3 / 4
    tensor = 80 * 4 * 3 * activations / 200e9
    weights = 3 * parameters / 4 * 2 * 31 / 32 / 400e9
    assert found.ici == pytest.approx(tensor + weights, rel=0.01)


def test_slices_exchange_their_gradients_on_the_slow_network():
    """Each part of a batch: an all-reduce of a sixteenth of the gradients in bfloat16 over two slices."""
    one, parameters = step("scale/gpt2-xl", "v5e:4x4", (2, 16, 1, 1), slices=2)
    assert one.dcn == pytest.approx(8 * 2 * (parameters * 2 / 16) / 2 / 3.125e9, rel=0.01)
    assert step("scale/gpt2-xl", "v5e:4x4", (1, 16, 1, 1))[0].dcn == 0.0


def test_hosts_of_gpus_share_their_network_cards():
    """Gathering over 64 GPUs reaches 8 cards of 50 GB/s, over 8 of one host NVLink's 450 GB/s."""
    far, parameters = step("scale/llama-65b", "h100x64", (1, 64, 1, 1))
    near, _ = step("scale/llama-65b", "h100x8", (1, 8, 1, 1))
    assert far.ici == pytest.approx(8 * 3 * parameters * 2 * 63 / 64 / 400e9, rel=0.01)
    assert near.ici == pytest.approx(8 * 3 * parameters * 2 * 7 / 8 / 450e9, rel=0.01)


def test_drawing_tokens_is_bound_by_memory():
    """Every token of a response reads all weights and the cache once."""
    plan = work(load(CONFIGS / "scale" / "llama-7b.yaml").config, "ppo")
    sample = times(plan, Mesh(1, 16, 1, 4), parse_target("v5e:8x8"))[0]
    assert sample.by == "hbm"
    weights = (6_738_415_616 - 131_072_000 - 266_240) * 2 / 4
    cache = 2 * 32 * (256 // 16) * 8 * 1024 * 128 * 2
    assert sample.hbm == pytest.approx(512 * (weights + cache) / 819e9, rel=0.05)


def test_what_is_expected_is_never_below_the_bound():
    time = Time("update", compute=1.0, counted=0.8, hbm=0.5, ici=0.9, dcn=0.0)
    assert time.bound == 1.0
    assert time.expected(mfu=0.4, reached=0.7) == 2.0
    assert time.expected(mfu=1.0, reached=0.6) == 1.5
    assert time.expected(mfu=1.0, reached=1.0) == 1.0
