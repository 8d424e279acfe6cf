"""Adapters: y = x W + (x A) B alpha / rank, at first nothing, beside the matrices of every layout and on every mesh."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_reference as reference
from tiny_models import VOCAB, assert_close, drawn, exact, logits, mesh_of, mixed, place, rows, tiny

from jaxgpt.config.schema import LoraConfig, ModelConfig
from jaxgpt.mesh import put_batch
from jaxgpt.models import kernels
from jaxgpt.models.decode import decoder
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.models.lora import merged, split
from jaxgpt.models.net import Params, joined
from jaxgpt.optim import decayed

MODELS = {
    "llama": tiny(attention={"kv_heads": 2}, tied=False),
    "gpt2": tiny(
        norm={"type": "layernorm", "bias": True},
        positions={"type": "learned"},
        attention={"qkv_bias": True, "out_bias": True},
        mlp={"type": "gelu_tanh", "bias": True},
    ),
    "palm": tiny(layers=4, attention={"kv_heads": 1, "windows": (None, 3)}, residual="parallel", init_std="fan_in"),
    "qwen3": tiny(layers=1, attention={"head_dim": 6, "qk_norm": True, "qkv_bias": True}),
}
WEIGHTS = {
    "q": ("attention", "q_DHK", 1),
    "k": ("attention", "k_DGK", 1),
    "v": ("attention", "v_DGK", 1),
    "o": ("attention", "o_HKD", 2),
    "up": ("mlp", "up_DF", 1),
    "gate": ("mlp", "gate_DF", 1),
    "down": ("mlp", "down_FD", 1),
}
"""Where the matrix of a target lies, and how many of its dimensions are inputs."""


def lora(c: ModelConfig, rank: int = 3, alpha: float = 5.0) -> LoraConfig:
    """Adapters of all matrices of a model."""
    return LoraConfig(rank=rank, alpha=alpha, targets=tuple(t for t in WEIGHTS if t != "gate" or c.gated))


def added(params: Params, config: LoraConfig) -> dict[str, Any]:
    """The plain model's parameters in float64: each matrix with alpha / rank times the product beside it."""
    plain = exact(split(params)[1])
    for target in config.targets:
        part, name, inputs = WEIGHTS[target]
        adapter = exact(params["backbone"]["blocks"][part][f"lora_{target}"])
        block = plain["backbone"]["blocks"][part]
        for layer, (a, b) in enumerate(zip(adapter["a_IL"], adapter["b_LO"], strict=True)):
            assert a.shape[:-1] + b.shape[1:] == block[name][layer].shape and a.ndim == inputs + 1
            delta = a.reshape(-1, config.rank) @ b.reshape(config.rank, -1)
            block[name][layer] += config.alpha / config.rank * delta.reshape(block[name][layer].shape)
    return plain


@pytest.mark.parametrize("name", MODELS)
def test_the_first_adapters_change_no_bit(name):
    c, mesh = MODELS[name], mesh_of(1, 2, 2)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        plain, adapted = language_model(c, VOCAB), language_model(c, VOCAB, lora=lora(c))
        first = jax.jit(lambda key: split(adapted.init(key))[0])(jax.random.key(1))
        base, batch = drawn(plain, mesh), place(mixed(), mesh)
        found = jax.jit(partial(logits, adapted))(joined(base, first), batch)
        expected = jax.jit(partial(logits, plain))(base, batch)
    np.testing.assert_array_equal(found, expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(first):
        values, name = np.asarray(leaf), jax.tree_util.keystr(path)
        if "b_LO" in name:
            assert not values.any()
        else:  # uniform within 1 / sqrt(inputs), another matrix for each layer
            bound = np.prod(values.shape[1:-1]) ** -0.5
            assert 0.8 * bound < np.abs(values).max() <= bound
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.25)
            assert len({layer.tobytes() for layer in values}) == c.layers


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "palm"])
def test_outputs_and_gradient_are_those_of_the_merged_matrices(name, shape):
    c, mesh, batch = MODELS[name], mesh_of(*shape), rows(8, 8)
    config, weights_BTV = lora(c), np.random.default_rng(1).standard_normal((8, 8, VOCAB)).astype(np.float32)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        plain, adapted = language_model(c, VOCAB), language_model(c, VOCAB, lora=config)
        adapters, base = split(drawn(adapted, mesh))
        adapters = jax.tree.map(lambda leaf: 0.3 * leaf, adapters)  # or softmax is too sharp for 5 digits

        def both(function):
            def value(adapters, base, batch):
                logits_BTV = function(joined(base, adapters), batch)
                return (weights_BTV * logits_BTV).sum(), logits_BTV

            return jax.jit(jax.value_and_grad(value, has_aux=True))(adapters, base, place(batch, mesh))

        (_, found), gradient = both(partial(logits, adapted))
        (_, through), expected = both(lambda params, batch: logits(plain, merged(params, config), batch))
    assert_close(found, reference.logits(c, added(joined(base, adapters), config), *batch.values()))
    assert_close(found, through)
    assert_close(gradient, expected)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, split(adapted.abstract)[0])
    assert jax.tree.map(lambda leaf: leaf.sharding.spec, gradient) == specs


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "plain"])
@pytest.mark.parametrize("target", WEIGHTS)
def test_each_target_alone(target, by_hand, monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", lambda: by_hand)
    config, batch, mesh = LoraConfig(rank=1, alpha=2.0, targets=(target,)), mixed(), mesh_of(1, 2, 2)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        net = language_model(MODELS["qwen3"], VOCAB, lora=config)
        params = drawn(net, mesh)
        found = jax.jit(partial(logits, net))(params, place(batch, mesh))
    part, name, _ = WEIGHTS[target]
    assert [*split(params)[0]["backbone"]["blocks"]] == [part]
    assert [*split(params)[0]["backbone"]["blocks"][part]] == [f"lora_{target}"]
    assert_close(found, reference.logits(MODELS["qwen3"], added(params, config), *batch.values()))
    weight = params["backbone"]["blocks"][part][name].sharding.spec
    adapter = params["backbone"]["blocks"][part][f"lora_{target}"]
    a, b = (tuple(adapter[leaf].sharding.spec) for leaf in ("a_IL", "b_LO"))
    assert (*a[:-1], *b[2:]) == tuple(weight)  # split over the mesh as the matrix is
    assert a[-1] is None and b[1] is None  # the rank is whole


def test_a_scalar_model_has_them_too():
    c, mesh, batch = MODELS["llama"], mesh_of(2, 2, 2), rows(4, 8)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        net = scalar_model(c, VOCAB, lora=lora(c))
        params = drawn(net, mesh)
        found = jax.jit(lambda params, batch: net.bind(params)(*batch))(params, place(batch, mesh))
    assert_close(found, reference.scores(c, added(params, lora(c)), *batch.values()))


def test_in_bfloat16_they_stay_near_and_are_kept_in_float32():
    mesh, batch, found = mesh_of(1, 2, 2), mixed(), {}
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        for dtype in ("float32", "bfloat16"):
            net = language_model(tiny(dtype=dtype), VOCAB, lora=lora(tiny()))
            params = drawn(net, mesh)
            assert net.bind(net.abstract).backbone.blocks.mlp.lora_up.a_IL.dtype == jnp.float32
            run = jax.jit(lambda params, batch, net=net: net.bind(params).hidden(*batch))
            found[dtype] = run(params, place(batch, mesh))
    assert found["bfloat16"].dtype == jnp.bfloat16
    assert_close(found["bfloat16"], found["float32"], 0.1)


def test_split_and_joined_are_inverse_and_all_adapters_decay():
    with jax.set_mesh(mesh_of()):
        net = language_model(MODELS["gpt2"], VOCAB, lora=lora(MODELS["gpt2"]))
        adapters, base = split(net.abstract)
        assert base == language_model(MODELS["gpt2"], VOCAB).abstract
        assert joined(base, adapters) == net.abstract
        assert split(base) == ({}, base) and split(adapters) == (adapters, {})
        assert all(jax.tree.leaves(decayed(adapters)))


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "plain"])
def test_no_product_is_spent_on_frozen_matrices_and_remat_keeps_no_outer_one(monkeypatch, by_hand):
    monkeypatch.setattr(kernels, "on_cpu", lambda: by_hand)
    mesh = mesh_of()

    def products(remat: str, config: LoraConfig | None) -> tuple[int, int]:
        """Matrix products of a gradient: as written, and as compiled."""
        with jax.set_mesh(mesh):
            net = language_model(tiny(layers=1, remat=remat, scan_layers=False), VOCAB, lora=config)
            adapters, base = split(net.abstract)
            trained, frozen = (base, {}) if config is None else (adapters, base)
            batch = place(rows(1, 4), mesh)

            def total(trained, frozen, *batch):
                return logits(net, joined(frozen, trained), batch).sum()

            written = str(jax.make_jaxpr(jax.grad(total))(trained, frozen, *batch)).count("dot_general[")
            compiled = jax.jit(jax.grad(total)).lower(trained, frozen, *batch).compile().as_text().count(" dot(")
        return written, compiled

    (_, whole), (none, adapted), (dots, _) = (
        products(*case) for case in (("none", None), ("none", lora(tiny())), ("dots", lora(tiny())))
    )
    forward, of_adapters, of_inputs = 2 * 7, 3 * 7, 4  # the first layer's q, k and v pass no gradient on
    assert adapted - whole == forward + of_adapters + of_inputs - 8 - 3  # 7 matrices' gradients, the output's, q, k, v
    assert dots - none == (2 if by_hand else 1) + 6  # of attention; and outer products, but for that of down


@pytest.mark.parametrize("name", ["llama", "palm"])
def test_cached_decoding_equals_the_full_forward_pass_and_the_merged_model(name):
    c, mesh, batch, prompt = MODELS[name], mesh_of(1, 2, 2), rows(4, 9), 5
    config = lora(c)
    for row, pad in enumerate((0, 1, 2, 4)):  # prompts behind left padding
        batch["segments"][row, :pad] = 0
        batch["positions"][row] = np.maximum(batch["positions"][row] - pad, 0)

    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        net, plain = language_model(c, VOCAB, lora=config), language_model(c, VOCAB)
        params = drawn(net, mesh)
        full = np.asarray(jax.jit(partial(logits, net))(params, place(batch, mesh)))
        slots_BS = put_batch({"slots": np.pad(batch["segments"], ((0, 0), (0, 3)), constant_values=1)}, mesh)["slots"]

        def decoded(net, params):
            @jax.jit
            def extend(params, new, cache, slots_BS, first):
                d = decoder(net.bind(params))
                return d.extend(*new, d.empty(4, 12) if cache is None else cache, slots_BS, first)

            found, cache = [], None
            for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, 9))]:
                new = place({key: value[:, start:stop] for key, value in batch.items()}, mesh)
                logits_BV, cache = extend(params, new, cache, slots_BS, jnp.int32(start))
                found.append(np.asarray(logits_BV))
            return np.stack(found, axis=1)

        found = decoded(net, params)
        assert_close(found, full[:, prompt - 1 :])
        assert_close(found, decoded(plain, jax.jit(merged, static_argnums=1)(params, config)))
