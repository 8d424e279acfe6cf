"""Direct preference optimization: a policy learned from pairs of responses without a reward model."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxgpt.losses.ratio import Metrics, Ratio

DpoKind = Literal["sigmoid", "ipo"]
"""DPO's own loss, or IPO's squared distance from a margin."""


def dpo(
    chosen_B: jax.Array,
    rejected_B: jax.Array,
    ref_chosen_B: jax.Array,
    ref_rejected_B: jax.Array,
    beta: float,
    *,
    kind: DpoKind = "sigmoid",
    label_smoothing: float = 0.0,
    weight_B: jax.Array | None = None,
) -> tuple[Ratio, Metrics]:
    """Loss of pairs of responses to one prompt, mean over pairs; with h the gain of the chosen over the rejected one,

        h = (chosen - ref_chosen) - (rejected - ref_rejected)
        sigmoid:  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)     (DPO, arXiv 2305.18290, eq. 7)
        ipo:      (h - 1 / (2 beta))^2                                      (IPO, arXiv 2310.12036, eq. 17)

    At the start, where the policy is the reference, the first is exactly log 2 and the second 1 / (2 beta)^2.

    Args:
        chosen_B: log-probability of each preferred response under the policy, nats: `sequence_logp` of its tokens,
            prompt excluded. DPO takes the sum over tokens. IPO takes the mean, `sequence_logp(..., mean=True)`, in TRL
            and as the default of our stage, and the sum in its paper and OpenRLHF: the numbers differ much.
        rejected_B: the same of the other response.
        ref_chosen_B: of the preferred response under the reference. No gradient flows into it.
        ref_rejected_B: the same of the other response.
        beta: strength of the pull to the reference; IPO's tau.
        kind: "sigmoid" or "ipo".
        label_smoothing: e, the chance that a label is wrong, 0 to 0.5 (conservative DPO); of "sigmoid" alone.
        weight_B: of each pair in the mean of the loss; a pair of weight 0 is none, and may hold any finite numbers.
            Unset means 1.

    Returns:
        The loss, and metrics with TRL's names, means over pairs whatever their weight: "rewards/chosen" and
        "rewards/rejected", beta times the log-probability's gain over the reference; "rewards/margins", their
        difference; "rewards/accuracies", the share of pairs whose chosen one has the larger reward, equal ones counting
        half; "logps/chosen" and "logps/rejected". Raises ValueError for another kind, or smoothing with IPO.
    """
    chosen_B, rejected_B = (jnp.asarray(x).astype(jnp.float32) for x in (chosen_B, rejected_B))
    ref_chosen_B, ref_rejected_B = (
        jax.lax.stop_gradient(jnp.asarray(x).astype(jnp.float32)) for x in (ref_chosen_B, ref_rejected_B)
    )
    gain_chosen_B, gain_rejected_B = chosen_B - ref_chosen_B, rejected_B - ref_rejected_B
    gain_B = gain_chosen_B - gain_rejected_B
    match kind:
        case "sigmoid":
            right_B, wrong_B = -jax.nn.log_sigmoid(beta * gain_B), -jax.nn.log_sigmoid(-beta * gain_B)
            loss_B = (1.0 - label_smoothing) * right_B + label_smoothing * wrong_B
        case "ipo":
            if label_smoothing != 0.0:
                raise ValueError(f"dpo: label_smoothing is {label_smoothing}; 'ipo' has none")
            loss_B = jnp.square(gain_B - 1.0 / (2.0 * beta))
        case _:
            raise ValueError(f"dpo: kind is {kind!r}; it must be 'sigmoid' or 'ipo'")
    weight_B = jnp.ones_like(loss_B) if weight_B is None else jnp.asarray(weight_B).astype(jnp.float32)
    loss, one_B = Ratio.of(loss_B, weight_B), (weight_B != 0.0).astype(jnp.float32)
    return loss, {
        "rewards/chosen": Ratio.of(beta * gain_chosen_B, one_B),
        "rewards/rejected": Ratio.of(beta * gain_rejected_B, one_B),
        "rewards/accuracies": Ratio.of(0.5 * (1.0 + jnp.sign(gain_B)), one_B),
        "rewards/margins": Ratio.of(beta * gain_B, one_B),
        "logps/chosen": Ratio.of(chosen_B, one_B),
        "logps/rejected": Ratio.of(rejected_B, one_B),
    }
