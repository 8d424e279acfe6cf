"""Stages without a critic: what is learned from a group of responses, by loops over the formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import config, finished, first_state, mesh_of, open_run

from jaxgpt.config.schema import GrpoConfig, KlConfig, RejectionConfig, RlooConfig
from jaxgpt.mesh import put_batch
from jaxgpt.stages import grpo, rejection, rloo
from jaxgpt.stages.rollouts import learnable

B, G, N = 8, 4, 5
LENGTHS = np.array([5, 3, 1, 5, 2, 5, 4, 5])
ENDED = LENGTHS < N


def measured(seed: int = 0) -> dict[str, np.ndarray]:
    """Two groups of four responses; the second has equal scores in `scores(equal=True)`."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(N) < LENGTHS[:, None]).astype(np.float32)
    drawn = {name: rng.normal(-2, 1, (B, N)).astype(np.float32) for name in ("logp", "reference_logp", "entropy")}
    tokens = rng.integers(4, 30, (B, 3 + N)).astype(np.int32)
    ones = np.concatenate([np.ones((B, 3), np.int32), mask.astype(np.int32)], axis=1)
    return {**drawn, "sampler_logp": drawn["logp"], "mask": mask, "tokens": tokens, "segments": ones, "ended": ENDED}


def scores(equal: bool = False) -> np.ndarray:
    found = np.random.default_rng(1).normal(0, 1, B).astype(np.float32)
    return np.where(np.arange(B) >= G, 1.0, found).astype(np.float32) if equal else found


def learned(settings, estimate, given, score, coef=0.3):
    mesh = mesh_of(2, 1, 2)
    with jax.set_mesh(mesh):
        batch = put_batch({**given, "score": score}, mesh)
        total = {"total": batch.pop("score")}
        function = jax.jit(
            lambda batch, total, coef: learnable(settings, estimate(settings), batch, total, {"kl_coef": coef})[0]
        )
        found = function(batch, total, jnp.float32(coef))
        return jax.device_get(found.batch), {name: float(value) for name, value in found.figures.items()}


def settings(kind, **changes):
    sizes = {"episodes": B, "batch": B if kind is not RejectionConfig else 2, "responses": G, "prompt_length": 3}
    return kind(**{**sizes, "response_length": N, "missing_eos": {"how": "keep"}, **changes})


@pytest.mark.parametrize("std", ["unbiased", "biased", "none"])
def test_grpo_measures_a_response_against_its_group(std):
    c, given, score = settings(GrpoConfig, std=std, std_eps=1e-2), measured(), scores(equal=True)
    batch, figures = learned(c, grpo.grpo_estimate, given, score)
    group = score[:G].astype(np.float64)
    spread = {"unbiased": group.std(ddof=1) + 1e-2, "biased": group.std() + 1e-2, "none": 1.0}[std]
    expected = np.concatenate([(group - group.mean()) / spread, np.zeros(G)])
    np.testing.assert_allclose(batch["advantages"], expected[:, None] * given["mask"], atol=1e-6)
    assert figures["objective/zero_std"] == 0.5
    assert figures["objective/scores"] == pytest.approx(score.mean(), abs=1e-6)


def test_dapo_punishes_long_responses_softly():
    c = settings(GrpoConfig, std="none", overlong_buffer=2)
    batch, _ = learned(c, grpo.grpo_estimate, measured(), np.zeros(B, np.float32))
    penalty = np.clip((3 - LENGTHS) / 2.0, -1.0, 0.0)  # from 3 of 5 tokens on
    expected = penalty - np.repeat(penalty.reshape(2, G).mean(1), G)
    np.testing.assert_allclose(batch["advantages"][:, 0], expected, atol=1e-6)


def test_rloo_takes_the_kl_into_the_reward_and_the_others_as_baseline():
    c, given, score = settings(RlooConfig), measured(), scores()
    batch, figures = learned(c, rloo.rloo_estimate, given, score)
    kl = ((given["logp"] - given["reference_logp"]).astype(np.float64) * given["mask"]).sum(1)
    reward = score - 0.3 * kl
    expected = [reward[i] - np.mean([reward[j] for j in range(i // G * G, i // G * G + G) if j != i]) for i in range(B)]
    np.testing.assert_allclose(batch["advantage"], expected, atol=1e-5)
    np.testing.assert_allclose(batch["advantage"].reshape(2, G).sum(1), 0.0, atol=1e-5)
    assert figures["objective/kl"] == pytest.approx(kl.mean(), abs=1e-5)
    assert figures["objective/rlhf_reward"] == pytest.approx(reward.mean(), abs=1e-5)


def test_rejection_learns_the_best_of_each_prompt():
    given, score = measured(), scores()
    batch, figures = learned(settings(RejectionConfig), rejection.rejection_estimate, given, score)
    best = [int(np.argmax(score[:G])), G + int(np.argmax(score[G:]))]
    assert np.array_equal(batch["tokens"], given["tokens"][best]) and np.array_equal(batch["mask"], given["mask"][best])
    assert figures["objective/best_score"] == pytest.approx(score[best].mean(), abs=1e-6)
    strict = settings(RejectionConfig, kl=KlConfig(coef=10.0))
    kl = ((given["logp"] - given["reference_logp"]) * given["mask"]).sum(1)
    batch, _ = learned(strict, rejection.rejection_estimate, given, score)
    near = [int(np.argmax((score - 10 * kl)[:G])), G + int(np.argmax((score - 10 * kl)[G:]))]
    assert near != best and np.array_equal(batch["tokens"], given["tokens"][near])


def test_the_rule_for_missing_ends_and_the_clip_come_before_what_is_learned():
    for how, value in (("replace", -1.0), ("subtract", 0.5), ("scale", 0.25), ("keep", 9.0)):
        c = settings(RlooConfig, missing_eos={"how": how, "value": value}, reward_clip=0.4, kl=KlConfig(coef=0.0))
        _, figures = learned(c, rloo.rloo_estimate, measured(), scores(), coef=0.0)
        kept = np.clip(scores(), -0.4, 0.4)
        missing = {"replace": np.full(B, -1.0), "subtract": kept - 0.5, "scale": 0.25 * kept, "keep": kept}[how]
        expected = np.where(ENDED, kept, missing)
        assert figures["objective/scores"] == pytest.approx(expected.mean(), abs=1e-6), how


@pytest.fixture(scope="module")
def mesh(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        run = open_run(config(home), mesh)
        finished(run, "sft", seed=1, spread=15.0)
        finished(run, "reward", seed=2, spread=5.0)
    return mesh


def test_responses_of_a_prompt_stand_together_whatever_the_chunks(home, mesh):
    sizes = {"episodes": 16, "responses": 4, "batch": 16, "rollout_batch": 8, "prompt_length": 40}
    (home / "long.jsonl").write_text("".join(f'{{"prompt": "a fox{"!" * n}"}}\n' for n in (30, 0, 20, 1)))
    c = config(home, grpo={**sizes, "data": {"path": str(home / "long.jsonl")}}, model={"context": 64})
    with jax.set_mesh(mesh):
        stage = grpo.stage(open_run(c, mesh), c.grpo)
        chunks = list(stage.source._prompts(0))
        episodes, _ = stage.source._scored(0, first_state(stage).params["policy"])
    rows = np.asarray(episodes["row"]).reshape(4, 4)
    assert np.all(rows == rows[:, :1]) and len(set(rows[:, 0].tolist())) == 4
    widths = [chunk["tokens"].shape for chunk in chunks]
    assert widths == [(8, 16), (8, 40)]  # short prompts are answered in a narrower program
    assert episodes["tokens"].shape == (16, 46)


def test_groups_of_equal_scores_make_room_for_others(home, mesh):
    """Where most responses end, or do not, alike, further rounds replace the groups that teach nothing."""
    found = {}
    for further in (0, 3):
        rewards = [{"type": "regex", "pattern": "[a-f]"}]
        c = config(
            home,
            grpo={
                "episodes": 16,
                "responses": 2,
                "batch": 16,
                "rewards": rewards,
                "dynamic_sampling": further,
                "temperature": 4.0,
            },
        )
        with jax.set_mesh(mesh):
            stage = grpo.stage(open_run(c, mesh), c.grpo)
            drawn = stage.source(0, first_state(stage))
            found[further] = float(drawn.metrics["objective/zero_std"])
            assert drawn.batch["tokens"].shape[0] == 16
    assert found[0] > 0 and found[3] < found[0]
