import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from loss_twins import AGGREGATIONS, CLOSE, NORM, B, T, V, draw, draw_mask, rankings

from jaxgpt.losses import (
    best_of_k,
    centring,
    dpo,
    kl_penalty,
    next_token,
    plackett_luce,
    ppo_policy,
    ppo_value,
    ranking,
    ratio_gap,
    sequence_logp,
    token_entropy,
    token_logp,
)


def everything(logits, tokens, mask, scores, ranks):
    logp = token_logp(logits, tokens, 0.7)
    old, advantage = logp + 0.3 * jnp.sin(logp), token_entropy(logits)
    losses = [
        next_token(logp, mask),
        ranking(scores, ranks, scores > -1.0),
        ranking(scores, ranks, scores > -1.0, margin_B=advantage[:, 0], ties="half", weighting="pair"),
        best_of_k(scores, ranks, scores > -1.0),
        plackett_luce(scores, ranks, scores > -1.0),
        *(
            ppo_policy(logp, old, advantage, mask, 0.2, clip_high=0.3, aggregation=how, norm=NORM)
            for how in AGGREGATIONS
        ),
        ppo_value(logp, old, advantage, mask, 0.2),
        dpo(*(sequence_logp(x, mask) for x in (logp, 1.5 * old, old, logp)), 0.1),
    ]
    terms = [loss.mean for loss, _ in losses]
    terms += [kl_penalty(logp, 1.5 * old, mask).mean, centring(scores, scores > -1.0).mean]
    figures = [{name: m.reported for name, m in found.items()} for _, found in losses]
    return sum(terms, jnp.float32(0.0)), [*figures, {"gap": ratio_gap(logp, old, mask)}]


def test_sharded_equals_one_device(mesh222):
    rows = ("data", "fsdp")
    tokens = np.random.default_rng(1).integers(0, V, (B, T), dtype=np.int32)
    scores, ranks, _ = rankings(4)
    arrays = (draw(0, B, T, V, scale=2.0), tokens, draw_mask(2), scores, ranks)
    run = jax.value_and_grad(everything, argnums=(0, 3), has_aux=True)
    (want, metrics), slopes = jax.jit(run)(*arrays)
    for logits_spec in (P(rows, None, "tensor"), P(rows, None, None)):
        with jax.set_mesh(mesh222):
            specs = (logits_spec, *[P(rows, None)] * 4)
            put = [jax.device_put(a, s) for a, s in zip(arrays, specs, strict=True)]
            (got, sharded_metrics), sharded = jax.jit(run)(*put)
            assert sharded[0].sharding.spec == logits_spec
        np.testing.assert_allclose(got, want, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), (sharded_metrics, sharded), (metrics, slopes)
        )
