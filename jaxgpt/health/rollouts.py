"""What can be wrong with a stage that learns from its own responses, each condition with what to change.

Pure functions of a `Record`; thresholds are its `Limits`. What they tell of is the field's experience: Huang et al.,
"The N implementation details of RLHF with PPO", and arXiv 2403.17031; arXiv 2210.10760 for scores that rise while gold
falls.
"""

from __future__ import annotations

from jaxgpt.health.record import Found, Record, Symptom


def negative_kl(record: Record) -> Found | None:
    """KL below 0 by more than noise."""
    limits, number = record.limits, 2 * record.limits.rollouts
    kl = record.of("objective/kl", number)
    if kl is None or (value := kl.recent(number)) >= -max(limits.negative_kl, 2.0 * kl.error(number)):
        return None
    text = (
        f"the KL from the reference is {value:.3g} nats a response, mean of {number} rollouts, and a KL "
        "cannot be negative. The responses were not drawn from the distribution that they are scored under, or "
        "tokens behind the end are counted: sample at the plain temperature, and look at temperature and stop"
    )
    return Found(value, -limits.negative_kl, text)


def large_kl(record: Record) -> Found | None:
    """The policy is far from the reference."""
    limits, kl, length = record.limits, record.of("objective/kl", record.limits.rollouts), record.of("objective/length")
    if kl is None:
        return None
    value = kl.recent(limits.rollouts)
    tokens = length.recent(limits.rollouts) if length is not None else 0.0
    limit = max(limits.kl, limits.kl_per_token * tokens)
    if value <= limit:
        return None
    text = (
        f"the KL from the reference is {value:.3g} nats a response ({tokens:.0f} tokens), above {limit:.3g}: the "
        "reward model is asked about responses unlike those it learned from. Raise kl.coef, lower the learning rate, "
        "or stop earlier"
    )
    return Found(value, limit, text)


def kl_coef(record: Record) -> Found | None:
    """The controller of the KL penalty has run away."""
    coef, factor = record.of("objective/kl_coef"), record.limits.coef_factor
    if coef is None or coef.first[0] <= 0 or coef.first[0] / factor < coef.last < coef.first[0] * factor:
        return None
    up = coef.last > coef.first[0]
    text = (
        f"the KL controller has moved kl.coef from {coef.first[0]:.3g} to {coef.last:.3g} and does not reach its "
        f"target: {'raise' if up else 'lower'} kl.target, or begin with a {'larger' if up else 'smaller'} kl.coef"
    )
    return Found(coef.last, coef.first[0] * factor if up else coef.first[0] / factor, text)


def ratio_gap(record: Record) -> Found | None:
    """The first update after a rollout does not see the probabilities that the rollout did."""
    gap, limit = record.of("first ratio_gap"), record.limits.ratio_gap
    if gap is None or gap.last <= limit:
        return None
    text = (
        f"on the first update of a rollout the ratio is off 1 by up to {gap.last:.3g}, where nothing has changed yet "
        f"(expected: below {limit:.3g}). Rollout and update compute different probabilities: dropout, another "
        "temperature, padding or precision (model.dtype)"
    )
    return Found(gap.last, limit, text)


def sampler_gap(record: Record) -> Found | None:
    """Cached decoding and the full forward pass disagree."""
    gap, limit = record.of("val/sampler_gap"), record.limits.sampler_gap
    if gap is None or gap.last <= limit:
        return None
    text = (
        f"the sampler and the trainer differ by up to {gap.last:.3g} nats on a sampled token (expected: below "
        f"{limit:.3g}), so the episodes are not quite the policy's own. Try model.dtype=float32; jaxgpt doctor looks "
        "for the cause"
    )
    return Found(gap.last, limit, text)


def ratio_max(record: Record) -> Found | None:
    """A probability has grown out of all proportion within a rollout's updates."""
    ratio, limit = record.of("val/ratio_max"), record.limits.ratio
    if ratio is None or ratio.last <= limit:
        return None
    text = (
        f"a probability has grown {ratio.last:.3g}-fold since the rollout (val/ratio_max): lower the learning rate, "
        "take fewer epochs on a rollout, or larger batches"
    )
    return Found(ratio.last, limit, text)


def approx_kl(record: Record) -> Found | None:
    """The policy moves too far on one rollout."""
    limits, moved = record.limits, record.of("policy/approxkl_avg", record.limits.updates)
    if moved is None or (value := moved.recent(limits.updates)) <= limits.approx_kl:
        return None
    text = (
        f"the policy moves {value:.3g} nats (k2) from the one that made the episodes, mean of {limits.updates} "
        "updates: lower the learning rate, take fewer epochs, or set ppo.stop_kl"
    )
    return Found(value, limits.approx_kl, text)


def clip_fraction(record: Record) -> Found | None:
    """Most tokens are clipped, so most of the batch teaches nothing."""
    limits, clipped = record.limits, record.of("policy/clipfrac_avg", record.limits.updates)
    if clipped is None or (value := clipped.recent(limits.updates)) <= limits.clipped:
        return None
    text = (
        f"{value:.0%} of the tokens are clipped, mean of {limits.updates} updates, and teach nothing: lower the "
        "learning rate or take fewer epochs on a rollout"
    )
    return Found(value, limits.clipped, text)


def entropy(record: Record) -> Found | None:
    """The policy has stopped exploring."""
    limits, series = record.limits, record.of("objective/entropy", 2 * record.limits.rollouts)
    if series is None:
        return None
    value, limit = series.recent(limits.rollouts), limits.entropy * series.start
    if value >= limit:
        return None
    text = (
        f"the policy's entropy has collapsed to {value:.3g} nats a token, from {series.start:.3g} in the first "
        "rollouts: its responses hardly vary any more. Raise kl.coef (or ppo.entropy_coef), or lower the learning rate"
    )
    return Found(value, limit, text)


def eos_rate(record: Record) -> Found | None:
    """Responses no longer end."""
    limits, series = record.limits, record.of("objective/eos_rate", record.limits.rollouts)
    if series is None:
        return None
    value, limit = series.recent(limits.rollouts), max(limits.eos * series.start, limits.eos_floor)
    if value >= limit:
        return None
    text = (
        f"only {value:.0%} of the responses end by themselves, {series.start:.0%} did in the first rollouts: see that "
        "the SFT data train the end token, punish missing ends (missing_eos), or raise response_length"
    )
    return Found(value, limit, text)


def length(record: Record) -> Found | None:
    """Responses grow until they are cut."""
    limits, series = record.limits, record.of("objective/length", record.limits.rollouts)
    if series is None or limits.longest is None:
        return None
    value, limit = series.recent(limits.rollouts), limits.length * limits.longest
    if value <= limit or value <= 1.2 * series.start:
        return None
    text = (
        f"responses have grown from {series.start:.0f} to {value:.0f} tokens, and response_length is "
        f"{limits.longest}: the reward may like length for its own sake. Add a length reward, or raise response_length"
    )
    return Found(value, limit, text)


def explained_variance(record: Record) -> Found | None:
    """The critic is worse than a constant."""
    limits, number = record.limits, 2 * record.limits.rollouts
    series = record.of("val/explained_variance", number)
    if series is None or (value := series.middle(number)) >= limits.explained:
        return None
    text = (
        f"the critic explains {value:.3g} of the returns' variance, median of {number} rollouts: it is worse than a "
        "constant, and advantages are noise. Train it first (ppo.critic_warmup), with a rate of its own "
        "(ppo.value_lr), or from the reward model (ppo.critic_init)"
    )
    return Found(value, limits.explained, text)


def value_loss(record: Record) -> Found | None:
    """The critic diverges."""
    limits, series = record.limits, record.of("loss/value_avg", 2 * record.limits.updates)
    if series is None:
        return None
    value, limit = series.recent(limits.updates), limits.value_loss * series.start
    if value <= limit:
        return None
    text = (
        f"the value loss has grown from {series.start:.3g} to {value:.3g}: lower ppo.value_lr, or keep the scores "
        "small (reward_clip, or a normalized reward model)"
    )
    return Found(value, limit, text)


def equal_scores(record: Record) -> Found | None:
    """The reward does not tell one response from another."""
    series, limit = record.of("objective/scores_std", 3), record.limits.scores_std
    if series is None or (value := max(list(series.latest)[-3:])) > limit:
        return None
    scores = record.of("objective/scores")
    text = (
        f"all responses of three rollouts score the same{'' if scores is None else f', {scores.last:.3g}'}: there is "
        "nothing to learn from. Look at samples.jsonl, at the reward, and at reward_clip and missing_eos, which can "
        "make different scores equal"
    )
    return Found(value, limit, text)


def equal_groups(record: Record) -> Found | None:
    """Nearly no group has a better and a worse response."""
    limits, series = record.limits, record.of("objective/zero_std", record.limits.rollouts)
    if series is None or (value := series.recent(limits.rollouts)) <= limits.zero_std:
        return None
    text = (
        f"in {value:.0%} of the groups all responses score the same, mean of {limits.rollouts} rollouts, and they "
        "teach nothing: take prompts that are neither too hard nor too easy, larger groups (responses), or "
        "grpo.dynamic_sampling"
    )
    return Found(value, limits.zero_std, text)


def _gold(record: Record, name: str, what: str) -> Found | None:
    seen, errors = record.evaluated.get(name, []), record.limits.errors
    if len(seen) < 3:
        return None
    best = max(seen[:-2], key=lambda one: one.value)
    late = seen[-2:]
    if best.score is None or late[-1].score is None or late[-1].score <= best.score:
        return None
    limits = [best.value - errors * (best.error**2 + one.error**2) ** 0.5 for one in late]
    if any(one.value >= limit for one, limit in zip(late, limits, strict=True)):
        return None
    text = (
        f"{what} has fallen from {best.value:.3g} (step {best.step}) to {late[-1].value:.3g} while the reward rose "
        f"from {best.score:.3g} to {late[-1].score:.3g}: the policy exploits the reward. Stop there (best=best hands "
        "on the best evaluation), raise kl.coef, or train the reward model on responses of this policy"
    )
    return Found(late[-1].value, limits[-1], text)


def gold(record: Record) -> Found | None:
    """The reward rises and what it stands for falls."""
    return _gold(record, "gold", "the gold score of held-out prompts")


def win_rate(record: Record) -> Found | None:
    """The same of the share of prompts that are answered better than at the start, where that is all there is."""
    return None if gold(record) is not None else _gold(record, "win_rate", "the win rate against the start")


SYMPTOMS = (
    Symptom("negative kl", "objective/kl", negative_kl),
    Symptom("large kl", "objective/kl", large_kl),
    Symptom("kl_coef", "objective/kl_coef", kl_coef),
    Symptom("ratio gap", "first ratio_gap", ratio_gap),
    Symptom("sampler gap", "val/sampler_gap", sampler_gap),
    Symptom("ratio", "val/ratio_max", ratio_max),
    Symptom("approxkl", "policy/approxkl_avg", approx_kl),
    Symptom("clipped", "policy/clipfrac_avg", clip_fraction),
    Symptom("entropy", "objective/entropy", entropy),
    Symptom("eos", "objective/eos_rate", eos_rate),
    Symptom("length", "objective/length", length),
    Symptom("explained variance", "val/explained_variance", explained_variance),
    Symptom("value loss", "loss/value_avg", value_loss),
    Symptom("equal scores", "objective/scores_std", equal_scores),
    Symptom("equal groups", "objective/zero_std", equal_groups),
    Symptom("gold", "eval/gold", gold),
    Symptom("win rate", "eval/win_rate", win_rate),
)
