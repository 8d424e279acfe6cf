"""What can be wrong with any stage, and with those that learn from files, each condition with what to change.

Pure functions of a `Record`; thresholds are its `Limits`.
"""

from __future__ import annotations

from functools import partial

from jaxgpt.health.record import Found, Record, Symptom


def chosen(record: Record) -> Found | None:
    """DPO makes the preferred responses unlikely, only less so than the others."""
    limits, updates = record.limits, record.limits.updates
    reward, margin = record.of("rewards/chosen", 2 * updates), record.of("rewards/margins", 2 * updates)
    if reward is None or margin is None:
        return None
    value, gained = reward.recent(updates), margin.recent(updates)
    limit = -limits.chosen * gained
    if gained <= margin.start or value >= limit:
        return None
    logp = record.of("logps/chosen")
    shown = "" if logp is None else f"; their log-probability went from {logp.start:.4g} to {logp.recent(updates):.4g}"
    text = (
        f"the preferred responses become less likely (rewards/chosen {value:.3g}) while the margin grows to "
        f"{gained:.3g}: what is learned is to avoid both{shown}. Add dpo.sft_coef, raise dpo.beta, lower the learning "
        "rate, or begin with SFT on the preferred responses"
    )
    return Found(value, limit, text)


def loss(record: Record) -> Found | None:
    """A supervised stage diverges; an RL stage's loss says nothing."""
    limits, updates = record.limits, record.limits.updates
    series = record.of("loss", 2 * updates)
    if series is None or record.of("objective/scores") is not None:
        return None
    value, start, lowest = series.recent(updates), series.start, series.lowest
    limit = limits.loss * start
    if start - lowest > 0.3 * abs(start):
        limit = min(limit, (start + lowest) / 2)
    if value <= limit:
        return None
    text = (
        f"the loss is {value:.4g}, mean of {updates} updates; it began at {start:.4g} and has been {lowest:.4g}: lower "
        "the learning rate, lengthen its warmup, or look at the data of these steps"
    )
    return Found(value, limit, text)


def _validation(record: Record, figure: str) -> Found | None:
    """What was learned does not carry over any more."""
    series = record.of(figure, 3)
    if series is None:
        return None
    *before, last, now = series.latest
    low = min(before)
    if not min(last, now) > record.limits.validation * low > 0:
        return None
    text = (
        f"the validation loss has risen from {low:.4g} to {now:.4g}: the stage learns its data by heart. Take fewer "
        "steps, more data or dropout, or hand on the best parameters (best=best)"
    )
    return Found(now, record.limits.validation * low, text)


def gradient(record: Record) -> Found | None:
    """A batch far out of the ordinary."""
    series, updates = record.of("grad_norm", 1 + record.limits.updates), record.limits.updates
    if series is None:
        return None
    before = list(series.latest)[-51:-1]
    mean = sum(before) / len(before)
    if len(before) < updates or series.last <= record.limits.gradient * mean:
        return None
    text = (
        f"the gradient norm is {series.last:.3g} before clipping, {series.last / mean:.0f} times its mean of the "
        f"{len(before)} updates before: look at the batch, and keep optimizer.clip set"
    )
    return Found(series.last, record.limits.gradient * mean, text)


def not_finite(record: Record) -> Found | None:
    """An update was left out."""
    series = record.of("left out")
    if series is None or not (number := sum(series.latest)):
        return None
    text = (
        "loss, gradient or update is not finite, and the update is left out: parameters stay as they were. If it comes "
        "again, lower the learning rate, or try model.dtype=float32"
    )
    return Found(number, 0.0, text)


def skipped(record: Record) -> Found | None:
    """Updates are left out again and again."""
    series, limit = record.of("left out", record.limits.updates), record.limits.skipped
    if series is None or (share := series.recent(100)) <= limit:
        return None
    text = (
        f"{share:.0%} of the last {len(series.latest)} updates were left out, because something was not finite: the "
        "stage does not learn as it should. Lower the learning rate, or set model.dtype=float32"
    )
    return Found(share, limit, text)


SYMPTOMS = (
    Symptom("not finite", "skipped", not_finite),
    Symptom("skipped", "skipped", skipped),
    Symptom("loss", "loss", loss),
    Symptom("validation", "eval/nll", partial(_validation, figure="eval/nll")),
    Symptom("validation loss", "eval/loss", partial(_validation, figure="eval/loss")),
    Symptom("gradient", "grad_norm", gradient),
    Symptom("chosen", "rewards/chosen", chosen),
)
