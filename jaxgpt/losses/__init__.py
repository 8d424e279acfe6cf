"""Losses as pure functions of arrays; every mean is kept as a sum and its weight.

Dimension key: B batch, T time, V vocabulary, K responses of one prompt (twice for pairs: winner, loser); B stands for
any leading dimensions. Everything is float32 inside. Position t of a token array stands for one predicted token: its
log-probability, advantage and mask, which is bool or 0/1. Losses are to be minimised, in nats where they are of
likelihoods: `loss, metrics = ranking(...)`, and `loss.mean` is the number. NumPy arrays of any number type do as well.
Where published recipes differ, the choice has a name; the default is lm-human-preferences' or InstructGPT's.
"""

from jaxgpt.losses.language import next_token, sequence_logp
from jaxgpt.losses.policy import kl_penalty, ppo_policy, ppo_value, ratio_gap
from jaxgpt.losses.preference import DpoKind, dpo
from jaxgpt.losses.rankings import Ties, Weighting, best_of_k, centring, plackett_luce, ranking
from jaxgpt.losses.ratio import Aggregation, Largest, Metrics, Ratio, aggregate
from jaxgpt.models.vocabulary import token_entropy, token_logp

__all__ = [
    "Aggregation",
    "DpoKind",
    "Largest",
    "Metrics",
    "Ratio",
    "Ties",
    "Weighting",
    "aggregate",
    "best_of_k",
    "centring",
    "dpo",
    "kl_penalty",
    "next_token",
    "plackett_luce",
    "ppo_policy",
    "ppo_value",
    "ranking",
    "ratio_gap",
    "sequence_logp",
    "token_entropy",
    "token_logp",
]
