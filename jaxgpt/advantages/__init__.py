"""From a rollout's log-probabilities, scores and values to rewards, advantages and returns.

Dimension key: B batch (episodes), T time, N response tokens, P prompts, G responses of one prompt. B stands for any
leading dimensions. Position t of every [B, T] array stands for token t of an episode; the mask is 1 on response tokens,
end token included, and 0 on prompt and padding. `values_BT[:, t]` is V before token t, read at the position of token
t - 1. Results are float32, and 0 where the mask is 0; what masked positions hold is ignored. NumPy arrays do as well.
Where published recipes differ, the choice has a name, and the default is lm-human-preferences' one.
"""

from jaxgpt.advantages.estimates import VARIANCE_FLOOR, gae, group_relative, leave_one_out, whiten
from jaxgpt.advantages.kl import KlKind, adaptive_kl, episode_kl, kl_estimate
from jaxgpt.advantages.rewards import (
    MissingEos,
    Place,
    Truncated,
    missing_eos,
    overlong_penalty,
    token_rewards,
    truncate_at_stop,
    value_mask,
)

__all__ = [
    "VARIANCE_FLOOR",
    "KlKind",
    "MissingEos",
    "Place",
    "Truncated",
    "adaptive_kl",
    "episode_kl",
    "gae",
    "group_relative",
    "kl_estimate",
    "leave_one_out",
    "missing_eos",
    "overlong_penalty",
    "token_rewards",
    "truncate_at_stop",
    "value_mask",
    "whiten",
]
