"""What the plan counts is what the models have: every array of every published size, with its sharding."""

import math
from pathlib import Path

import jax
import pytest

from jaxgpt.config.load import load
from jaxgpt.config.schema import LoraConfig, ModelConfig
from jaxgpt.mesh import AXES, LAYOUT
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.plan import weights as plan
from jaxgpt.plan.weights import Mesh, Weight, by_part, count, weights

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
EVERY = ("q", "k", "v", "o", "up", "gate", "down")
ODD = ModelConfig(
    width=64,
    layers=3,
    tied=False,
    attention={"heads": 4, "kv_heads": 2, "head_dim": 8, "qkv_bias": True, "out_bias": True, "qk_norm": True},
    mlp={"type": "geglu", "bias": True},
    norm={"type": "layernorm", "bias": True},
)


def published(name: str) -> ModelConfig:
    return load(CONFIGS / "shakespeare.yaml", [f"model={name}", "pretrain.context=64"]).config.model


def leaves(abstract) -> dict[str, tuple]:
    found = jax.tree_util.tree_leaves_with_path(abstract)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, tuple(leaf.sharding.spec))
        for path, leaf in found
    }


def counted(found: list[Weight]) -> dict[str, tuple]:
    def spec(weight: Weight) -> tuple:
        axes = tuple(LAYOUT[axis] if axis else None for axis in weight.axes)
        return (None, *axes) if weight.layers else axes

    return {w.path: ((w.layers, *w.shape) if w.layers else w.shape, spec(w)) for w in found}


def same(left: dict[str, tuple], right: dict[str, tuple]) -> None:
    def plain(spec: tuple) -> list:
        return [axis if axis is None or isinstance(axis, tuple) else (axis,) for axis in spec]

    assert left.keys() == right.keys()
    for path, (shape, spec) in left.items():
        assert (path, shape) == (path, right[path][0])
        assert plain(spec) == plain(right[path][1]), path


@pytest.fixture(scope="module")
def one():
    """A mesh of one device, which every size divides by."""
    return jax.make_mesh((1, 1, 1, 1), AXES)


def test_the_layout_is_that_of_the_mesh():
    assert {name: LAYOUT[name] for name in plan.LAYOUT} == plan.LAYOUT


@pytest.mark.parametrize("name", MODELS)
def test_every_array_of_every_published_model(name, one):
    c = published(name)
    vocab = c.vocab or 1024
    with jax.set_mesh(one):
        same(counted(weights(c, vocab)), leaves(language_model(c, vocab).abstract))
        same(counted(weights(c, vocab, "scalar")), leaves(scalar_model(c, vocab).abstract))


@pytest.mark.parametrize("kind", ["language", "scalar"])
def test_biases_and_adapters_of_every_matrix(kind, one):
    lora = LoraConfig(rank=4, targets=EVERY)
    with jax.set_mesh(one):
        net = language_model(ODD, 96, lora=lora) if kind == "language" else scalar_model(ODD, 96, lora)
    same(counted(weights(ODD, 96, kind, lora)), leaves(net.abstract))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("llama-7b", 6_738_415_616),
        ("gpt3-175b", 174_604_259_328),
        ("palm-540b", 540_356_474_880),
    ],
)
def test_published_counts(name, parameters):
    c = published(name)
    assert count(weights(c, c.vocab)) == parameters


def test_the_parts_of_gpt2_by_hand():
    c = published("gpt2")
    D, L, V, T = 768, 12, 50257, 1024
    assert by_part(weights(c, V)) == {
        "embedding": (V + T) * D,
        "attention": L * (4 * D * D + 4 * D),
        "mlp": L * (8 * D * D + 5 * D),
        "norms": (2 * L + 1) * 2 * D,
    }


def test_a_devices_share_is_what_jax_puts_on_it():
    mesh = jax.make_mesh((1, 2, 2, 2), AXES)
    with jax.set_mesh(mesh):
        net = language_model(ODD, 96)
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(net.abstract)
        if leaf.sharding is not None
    )
    assert sum(weight.share(Mesh(1, 2, 2, 2)) for weight in weights(ODD, 96)) == held
