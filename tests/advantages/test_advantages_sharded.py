import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from rollout_twins import CLOSE, B, T, draw, draw_mask

from jaxgpt.advantages import (
    adaptive_kl,
    episode_kl,
    gae,
    group_relative,
    leave_one_out,
    missing_eos,
    overlong_penalty,
    token_rewards,
    truncate_at_stop,
    value_mask,
    whiten,
)


def rollout(scores, ended, logp, ref, values, mask):
    scores = missing_eos(scores, ended)
    rewards = whiten(token_rewards(scores, logp, ref, mask, 0.05), mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, 0.99, 0.95)
    kl = jnp.mean(episode_kl(logp, ref, mask))
    shaped = scores + overlong_penalty(jnp.sum(mask, axis=1), 6, 3)
    after = token_rewards(shaped, logp, ref, mask, 0.05, place="after", estimator="k3")
    after = whiten(after, value_mask(mask, "after"), variance="unbiased")
    tokens = jnp.abs(jnp.round(4.0 * logp)).astype(jnp.int32)
    cut = truncate_at_stop(tokens, jnp.sum(mask, axis=1), (3, 5), 2)
    groups = group_relative(logp), leave_one_out(logp), episode_kl(logp, ref, mask, "k3", "token-mean")
    return whiten(advantages, mask), returns, adaptive_kl(0.1, kl, 6.0, 1e4, B), after, cut.mask_BN, *groups


def test_sharded_equals_one_device(mesh222):
    ended = np.arange(B) % 2 == 0
    arrays = (draw(0, B), ended, draw(1, B, T), draw(2, B, T), draw(3, B, T), draw_mask(4))
    want = jax.jit(rollout)(*arrays)
    rows = ("data", "fsdp")
    with jax.set_mesh(mesh222):
        put = [jax.device_put(a, P(rows, *[None] * (a.ndim - 1))) for a in arrays]
        got = jax.jit(rollout)(*put)
        assert got[0].sharding.spec == got[1].sharding.spec == P(rows, None)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
