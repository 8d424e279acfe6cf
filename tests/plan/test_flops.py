"""Operations of a token: by a loop over the products, by hand, and by XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.config.schema import LoraConfig, ModelConfig
from jaxgpt.losses import next_token
from jaxgpt.mesh import AXES
from jaxgpt.models.heads import language_model
from jaxgpt.plan.flops import per_token, seen
from jaxgpt.plan.weights import count, weights

SMALL = ModelConfig(
    width=256,
    layers=2,
    context=128,
    attention={"heads": 4, "kv_heads": 2, "windows": (None, 32)},
    mlp={"type": "swiglu", "width": 704},
    tied=False,
    scan_layers=False,
)


def looped(c: ModelConfig, vocab: int, tokens: int, causal: bool) -> float:
    """Forward operations of one row, product by product and key by key, over its tokens."""
    total = 0
    for t in range(tokens):
        for layer in range(c.layers):
            window = c.attention.windows[layer % len(c.attention.windows)] or tokens
            for outputs in (c.attention.heads, c.kv_heads, c.kv_heads):
                total += 2 * c.width * outputs * c.head_dim
            keys = min(t + 1, window) if causal else min(tokens, window)
            total += 2 * 2 * c.attention.heads * c.head_dim * keys
            total += 2 * c.attention.heads * c.head_dim * c.width
            total += 2 * c.width * c.hidden * (3 if c.gated else 2)
        total += 2 * c.width * vocab
    return total / tokens


@pytest.mark.parametrize("causal", [True, False])
def test_forward_is_the_sum_of_its_products(causal):
    flops = per_token(SMALL, weights(SMALL, 512), 128, 128)
    assert flops.forward(full=not causal) == pytest.approx(looped(SMALL, 512, 128, causal), rel=1e-12)
    assert flops.train(full=not causal) == pytest.approx(3 * looped(SMALL, 512, 128, causal), rel=1e-12)


def test_a_window_is_respected():
    assert [seen(8, None), seen(8, 1), seen(8, 3)] == [4.5, 1.0, (1 + 2 + 6 * 3) / 8]


def test_llama_7b_is_near_6n():
    c = ModelConfig(width=4096, layers=32, context=2048, attention={"heads": 32}, mlp={"width": 11008}, tied=False)
    found = weights(c, 32000)
    flops = per_token(c, found, 2048, 2048)
    products = count(found) - 32000 * 4096 - 65 * 4096  # not the table that is looked up, nor norms
    assert flops.train() == 6 * products + 12 * 32 * 4096 * 1024.5
    assert flops.train(full=True) == 6 * products + 12 * 32 * 4096 * 2048
    assert flops.train() / (6 * count(found)) == pytest.approx(1.0204, abs=1e-4)


def test_adapters_spare_the_gradients_of_frozen_matrices():
    lora = LoraConfig(rank=8, targets=("q", "v"))
    adapted = per_token(SMALL, weights(SMALL, 512, lora=lora), 128, 128, adapted=True)
    whole = per_token(SMALL, weights(SMALL, 512), 128, 128)
    adapters = sum(w.size for w in weights(SMALL, 512, lora=lora) if w.part == "adapters")
    assert adapted.frozen == whole.blocks
    assert whole.train() - adapted.train() == whole.blocks - 6 * adapters


@pytest.mark.parametrize("remat", ["none", "full"])
def test_xla_counts_the_same(remat):
    """Of an unrolled model on one CPU device, where attention computes all keys: within 4 %, the rest being norms,
    activations and softmax."""
    c, vocab, (B, T) = SMALL.model_copy(update={"remat": remat}), 512, (4, 128)
    with jax.set_mesh(jax.make_mesh((1, 1, 1, 1), AXES)):
        net = language_model(c, vocab)

        def loss(params, tokens):
            logp = net.bind(params).logp(tokens, jnp.ones_like(tokens), jnp.zeros_like(tokens), tokens)
            return next_token(logp, jnp.ones(tokens.shape))[0].mean

        compiled = jax.jit(jax.grad(loss)).lower(net.abstract, jax.ShapeDtypeStruct((B, T), jnp.int32)).compile()
    found = compiled.cost_analysis()["flops"] / (B * T)
    dense = c.model_copy(update={"attention": c.attention.model_copy(update={"windows": (None,)})})
    ours = per_token(dense, weights(dense, vocab), T, T).hardware(remat, "cpu", flash=False, chunked=False)
    assert found == pytest.approx(ours, rel=0.04)
