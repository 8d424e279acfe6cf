"""Decoding with a cache gives the logits of the full forward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB, assert_close, drawn, logits, mesh_of, place, rows, tiny

from jaxgpt.mesh import put_batch
from jaxgpt.models.decode import decoder
from jaxgpt.models.heads import language_model

LAYOUTS = {
    "grouped queries and windows": (
        tiny(
            layers=3,
            attention={"kv_heads": 2, "windows": (3, None), "softcap": 2.0, "qkv_bias": True, "qk_norm": True},
            tied=False,
            logit_softcap=4.0,
            embedding_scale=2.0,
        ),
        (2, 2, 2),
    ),
    "one key head, learned positions": (
        tiny(
            norm={"type": "layernorm", "bias": True},
            positions={"type": "learned"},
            attention={"kv_heads": 1, "out_bias": True},
            mlp={"type": "gelu", "bias": True},
            residual="parallel",
        ),
        (1, 2, 2),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_decoding_equals_the_full_forward_pass(layout):
    c, shape = LAYOUTS[layout]
    mesh, batch, prompt = mesh_of(*shape), rows(4, 9), 5
    for row, pad in enumerate((0, 1, 2, 4)):  # prompts behind left padding
        batch["segments"][row, :pad] = 0
        batch["positions"][row] = np.maximum(batch["positions"][row] - pad, 0)

    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        net = language_model(c, VOCAB)
        params = drawn(net, mesh)
        expected = np.asarray(jax.jit(lambda p, b: logits(net, p, b))(params, place(batch, mesh)))

        @jax.jit
        def extend(params, new, cache, slots_BS, first):
            d = decoder(net.bind(params))
            return d.extend(*new, d.empty(4, 12) if cache is None else cache, slots_BS, first)

        unwritten = np.ones((4, 12 - 9), np.int32)
        slots_BS = put_batch({"slots": np.concatenate([batch["segments"], unwritten], axis=1)}, mesh)["slots"]
        found, cache = [], None
        for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, 9))]:
            new = place({key: value[:, start:stop] for key, value in batch.items()}, mesh)
            logits_BV, cache = extend(params, new, cache, slots_BS, jnp.int32(start))
            found.append(np.asarray(logits_BV))
    assert_close(np.stack(found, axis=1), expected[:, prompt - 1 :])
