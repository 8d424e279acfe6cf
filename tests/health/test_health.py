"""Each warning comes when it should, once, with its figures and what to change; a healthy run hears nothing."""

from __future__ import annotations

import pytest
from series import UPDATES, evaluations, rollout_lines, supervised_lines, told

from jaxgpt.health import Health, Limits

STEPS, TURN = 400, 200
"""Length of a series, and the step at which it goes wrong."""


def after(before, then, turn=TURN):
    return lambda step: before if step <= turn else then


def rising(start, slope, turn=TURN):
    return lambda step: start + slope * max(0, step - turn)


@pytest.mark.parametrize("limits", [Limits(longest=48), Limits(longest=48, updates=5, rollouts=3)])
def test_healthy_stages_hear_nothing(limits):
    steady = {"gold": 1.0, "gold_error": 0.1, "win_rate": 0.6, "win_rate_error": 0.03}
    assert told(evaluations(rollout_lines(STEPS), 40, lambda step: steady), limits) == []
    assert told(evaluations(supervised_lines(STEPS), 50, lambda step: {"nll": 0.55 + 5 / step}), limits) == []


SICK = [
    (
        "negative kl",
        {"objective/kl": after(0.3, -0.3)},
        "the KL from the reference is -0.18 nats a response, mean of 10",
    ),
    ("large kl", {"objective/kl": rising(1.0, 1.0)}, "nats a response (24 tokens), above 25"),
    ("kl_coef", {"objective/kl_coef": lambda step: 0.05 * 1.02**step}, "has moved kl.coef from 0.051 to 1.54"),
    ("kl_coef", {"objective/kl_coef": lambda step: 0.05 * 0.98**step}, "lower kl.target, or begin with a smaller"),
    ("ratio gap", {"val/ratio_gap": after(1e-6, 0.3)}, "the ratio is off 1 by up to 0.3"),
    ("sampler gap", {"val/sampler_gap": after(1e-6, 0.3)}, "differ by up to 0.3 nats"),
    ("ratio", {"val/ratio_max": after(2.0, 1e6)}, "has grown 1e+06-fold since the rollout"),
    ("approxkl", {"policy/approxkl_avg": after(0.01, 0.4)}, "moves 0.107 nats (k2)"),
    ("clipped", {"policy/clipfrac_avg": after(0.1, 0.8)}, "52% of the tokens are clipped, mean of 20 updates"),
    ("entropy", {"objective/entropy": after(0.4, 0.01)}, "has collapsed to 0.088 nats a token, from 0.4"),
    ("eos", {"objective/eos_rate": after(0.9, 0.1)}, "only 42% of the responses end by themselves, 90% did"),
    ("eos", {"objective/eos_rate": after(0.01, 0.01)}, "only 1% of the responses end by themselves"),
    ("length", {"objective/length": rising(20, 0.5)}, "responses have grown from 20 to 44 tokens"),
    ("explained variance", {"val/explained_variance": after(0.5, -3.0)}, "explains -1.25 of the returns' variance"),
    ("value loss", {"loss/value_avg": after(0.1, 5.0)}, "the value loss has grown from 0.1 to 1.08"),
    ("equal scores", {"objective/scores_std": after(0.5, 0.0)}, "all responses of three rollouts score the same"),
    ("equal groups", {"objective/zero_std": after(0.3, 1.0)}, "in 100% of the groups all responses score the same"),
    ("gradient", {"grad_norm": lambda step: 500.0 if step == TURN else 1.0}, "500 before clipping, 500 times its mean"),
]


@pytest.mark.parametrize(("name", "spoil", "text"), SICK, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(SICK)])
def test_each_illness_of_a_rollout_stage_is_told_once_with_its_figures(name, spoil, text):
    notices = told(rollout_lines(STEPS, spoil), Limits(longest=48))
    assert [notice.warning for notice in notices] == [name]
    assert text in notices[0].text and notices[0].text.startswith(f"step {notices[0].step}: ")
    assert notices[0].text.endswith(".")
    assert notices[0].step <= TURN + 15 * UPDATES or name in ("large kl", "length")


def test_figures_that_are_measured_on_rollouts_are_judged_on_rollouts():
    """A ratio far from 1 is ordinary on later updates; on the first one it is not."""
    lines = rollout_lines(40, {"val/ratio_gap": lambda step: 0.0 if step % UPDATES == 1 else 5.0})
    assert told(lines) == []


def test_the_limits_of_low_precision_are_wider():
    lines = rollout_lines(40, {"val/ratio_gap": lambda step: 0.05, "val/sampler_gap": lambda step: 0.07})
    assert {notice.warning for notice in told(lines)} == {"ratio gap", "sampler gap"}
    assert told(lines, Limits(ratio_gap=0.1, sampler_gap=0.5)) == []


def test_a_little_noise_below_zero_is_no_negative_kl():
    assert told(rollout_lines(200, {"objective/kl": lambda step: 0.2 if step % 8 == 1 else -0.15})) == []
    assert told(rollout_lines(200, {"objective/kl": lambda step: 0.0})) == []


def test_a_long_response_may_have_a_larger_kl():
    spoil = {"objective/kl": lambda step: 60.0}
    assert [n.warning for n in told(rollout_lines(200, spoil))] == ["large kl"]
    assert told(rollout_lines(200, spoil | {"objective/length": lambda step: 1000.0})) == []


def test_the_reward_may_rise_only_while_gold_does_not_fall():
    def gold(step):
        return {"gold": 1.0 + step / 200 if step <= TURN else 2.0 - (step - TURN) / 100, "gold_error": 0.05}

    notices = told(evaluations(rollout_lines(STEPS), 40, gold))
    assert [(n.warning, n.step) for n in notices] == [("gold", 280)]
    assert "has fallen from 2 (step 200) to 1.2 while the reward rose from 0.4" in notices[0].text
    falling = {"objective/scores": lambda step: -step / 100}
    assert told(evaluations(rollout_lines(STEPS, falling), 40, gold)) == []
    unsure = told(evaluations(rollout_lines(STEPS), 40, lambda step: gold(step) | {"gold_error": 2.0}))
    assert unsure == []
    wins = told(evaluations(rollout_lines(STEPS), 40, lambda step: {"win_rate": gold(step)["gold"] / 3}))
    assert [n.warning for n in wins] == ["win rate"]


def test_gold_may_fall_from_the_start_on():
    def gold(step):
        return {"gold": 0.5, "gold_error": 0.05, "gold_start": 1.0, "win_rate": 0.3, "win_rate_error": 0.02}

    (notice,) = told(evaluations(rollout_lines(STEPS), 40, gold))
    assert (notice.warning, notice.step) == ("gold", 80)
    assert "has fallen from 1 (step 0) to 0.5 while the reward rose from" in notice.text


def test_one_bad_evaluation_is_not_yet_a_fall():
    once = evaluations(rollout_lines(STEPS), 40, lambda step: {"gold": 0.2 if step == 240 else 2.0, "gold_error": 0.05})
    assert told(once) == []


def test_a_loss_that_rises_above_its_start_is_told():
    notices = told(supervised_lines(STEPS, {"loss": lambda step: 2.0 + 0.01 * step}))
    assert [n.warning for n in notices] == ["loss"]
    assert "it began at 2.105 and has been 2.105" in notices[0].text
    flat = told(supervised_lines(STEPS, {"loss": lambda step: 0.69 + 0.05 * (-1) ** step}))
    assert flat == []


def test_a_loss_that_loses_half_of_what_it_gained_is_told_well_below_its_start():
    diverging = supervised_lines(TURN) + [line | {"loss": 4.5} for line in supervised_lines(STEPS)[TURN:]]
    (notice,) = told(diverging)
    assert notice.warning == "loss" and notice.value < 4.5 and TURN < notice.step <= TURN + 20


def test_an_rl_loss_may_go_anywhere():
    assert told(rollout_lines(STEPS, {"loss": rising(0.1, 0.1)})) == []


def test_learning_by_heart_shows_in_the_validation_loss():
    curve = evaluations(
        supervised_lines(STEPS), 50, lambda step: {"nll": 1.0 if step <= TURN else 1.0 + (step - TURN) / 300}
    )
    assert [(n.warning, n.step) for n in told(curve)] == [("validation", 300)]


def test_what_is_not_finite_is_told_at_once_and_again_where_it_is_common():
    once = supervised_lines(STEPS, {"skipped": after(0, 1), "loss": lambda step: None if step == TURN + 1 else 1.0})
    assert [(n.warning, n.step) for n in told(once)] == [("not finite", TURN + 1)]
    often = supervised_lines(STEPS, {"skipped": lambda step: max(0, step - TURN) // 10})
    assert [n.warning for n in told(often)] == ["not finite", "skipped"]
    assert "6% of the last 100 updates" in told(often)[1].text


def preference_lines(chosen, margin):
    return [
        {"step": n, "loss": 0.69, "skipped": 0, "rewards/chosen": chosen(n), "rewards/margins": margin(n),
         "logps/chosen": -40 + 10 * chosen(n)}
        for n in range(1, STEPS + 1)
    ]  # fmt: skip


def test_dpo_that_makes_both_responses_unlikely_is_told():
    (notice,) = told(preference_lines(rising(0.0, -0.02, 0), rising(0.0, 0.015, 0)))
    assert notice.warning == "chosen"
    assert "their log-probability went from -42.1 to -46.1" in notice.text and "dpo.sft_coef" in notice.text
    assert told(preference_lines(rising(0.0, 0.01, 0), rising(0.0, 0.03, 0))) == []
    assert told(preference_lines(rising(0.0, -0.001, 0), rising(0.0, 0.03, 0))) == []


def test_a_condition_is_told_again_only_after_it_was_over():
    def entropy(step):
        return 0.001 if 100 < step <= 160 or step > 320 else 0.4

    notices = told(rollout_lines(STEPS, {"objective/entropy": entropy}))
    assert [n.warning for n in notices] == ["entropy", "entropy"]
    assert notices[0].step <= 130 and 320 < notices[1].step <= 350
    flickering = rollout_lines(STEPS, {"val/ratio_max": lambda step: 1e3 if step % 5 == 0 else 2.0})
    assert len(told(flickering)) == 1


def test_what_is_said_depends_on_the_lines_alone():
    """A watch that begins anew with the lines so far goes on as if it had never stopped."""
    lines = rollout_lines(STEPS, {"objective/entropy": after(0.4, 0.01), "grad_norm": after(1.0, 90.0)})
    whole = [(n.step, n.warning, n.text) for n in told(lines)]
    for cut in (50, TURN, TURN + 30):
        health, found = Health(Limits()), []
        for line in lines[:cut]:
            health.see(line)
        for line in lines[cut:]:
            found += [(n.step, n.warning, n.text) for n in health.see(line)]
        assert found == [one for one in whole if one[0] > lines[cut - 1]["step"]]
