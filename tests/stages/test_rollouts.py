"""Episodes: what is scored, what is learned from, and what decides them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import VOCAB, config, finished, first_state, mesh_of, open_run

from jaxgpt.config.schema import MissingEosConfig, PpoConfig
from jaxgpt.data.prompts import load_prompts
from jaxgpt.data.rankings import load_rankings
from jaxgpt.mesh import put_batch
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.stages import ppo
from jaxgpt.stages.episodes import Actors, Critic, token_scores
from jaxgpt.stages.reward import last_token, score_rows
from jaxgpt.stages.rollouts import learnable

P, N, END, PAD = 6, 5, 2, 3
LENGTHS, ENDED = (5, 3, 1, 5), (True, True, True, False)
PLAIN = PpoConfig(
    prompt_length=P,
    response_length=N,
    batch=4,
    episodes=4,
    whiten_advantages=False,
    gamma=1.0,
    lam=1.0,
    temperature=0.7,
)


@pytest.fixture(scope="module")
def mesh(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        run = open_run(config(home), mesh)
        finished(run, "sft", seed=1, spread=15.0)  # so that responses are of many kinds, and some end
        finished(run, "reward", seed=2, spread=5.0)
    return mesh


def made(home, mesh, **changes):
    c = config(home, **changes)
    return ppo.stage(open_run(c, mesh), c.ppo)


def episodes() -> dict[str, np.ndarray]:
    """Four episodes of prompts of 6, 4, 2, 3 tokens and responses of 5, 3, 1, 5, the last without an end."""
    rng = np.random.default_rng(0)
    tokens, segments = rng.integers(4, VOCAB, (4, P + N)).astype(np.int32), np.zeros((4, P + N), np.int32)
    mask = np.zeros((4, N), np.float32)
    for row, (prompt, length, ended) in enumerate(zip((6, 4, 2, 3), LENGTHS, ENDED, strict=True)):
        segments[row, P - prompt : P + length], mask[row, :length] = 1, 1
        if ended:
            tokens[row, P + length - 1] = END
    return {
        "tokens": tokens,
        "segments": segments,
        "mask": mask,
        "ended": np.array(ENDED),
        "sampler_logp": np.zeros_like(mask),
    }


@pytest.fixture(scope="module")
def models(home, mesh):
    """Policy, value, reference and reward, all different."""
    with jax.set_mesh(mesh):
        c = config(home).model
        init = {"lm": jax.jit(language_model(c, VOCAB).init), "scalar": jax.jit(scalar_model(c, VOCAB).init)}
        kinds = {"policy": "lm", "reference": "lm", "value": "scalar", "reward": "scalar"}
        drawn = {name: init[kind](jax.random.key(seed)) for seed, (name, kind) in enumerate(kinds.items())}
        return jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, drawn)


def actors(home, settings) -> Actors:
    c = config(home).model
    lm, critic = language_model(c, VOCAB), Critic(scalar_model(c, VOCAB))
    return Actors(policy=lm, reference=lm, critic=critic, prompt=P, temperature=settings.temperature)


def learned(home, settings, models, given, coef):
    """PPO's batch and figures of episodes that are scored by the reward model alone."""
    measured = actors(home, settings).measure(models, given)
    last = P - 1 + jnp.sum(given["mask"], axis=1).astype(jnp.int32)
    score = last_token(token_scores(scalar_model(config(home).model, VOCAB), models["reward"], given), last)
    found, _ = learnable(settings, ppo.ppo_estimate(settings), measured, {"total": score}, {"kl_coef": coef})
    return found.batch, found.figures


@pytest.fixture(scope="module")
def gather(home, mesh, models):
    """What is learned, as a function of settings, episodes and coefficient; as NumPy."""

    def call(settings, given, coef=0.0, **changes):
        with jax.set_mesh(mesh):
            whole = jax.jit(lambda models, given, coef: learned(home, settings, models, given, coef))
            return jax.device_get(whole({**models, **changes}, put_batch(given, mesh), jnp.float32(coef)))

    return call


def plain_rows(given) -> dict[str, np.ndarray]:
    """The episodes without their padding, as rows that begin with the prompt."""
    rows = [tokens[segments > 0] for tokens, segments in zip(given["tokens"], given["segments"], strict=True)]
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.stack([np.pad(row, (0, P + N - len(row))) for row in rows])
    positions = np.tile(np.arange(P + N, dtype=np.int32), (4, 1))
    segments = (positions < lengths[:, None]).astype(np.int32)
    return {"tokens": tokens, "segments": segments, "positions": positions, "lengths": lengths}


def plain_scores(home, mesh, params, given) -> np.ndarray:
    with jax.set_mesh(mesh):
        net = scalar_model(config(home).model, VOCAB)
        score = jax.jit(lambda params, rows: score_rows(net.bind(params), rows["tokens"], rows["lengths"]))
        return np.array(score(params, put_batch(plain_rows(given), mesh)))


def plain_readings(home, mesh, models, given) -> dict[str, np.ndarray]:
    """By the unpadded texts: log-probabilities of policy and reference, and the value before each response token."""
    plain = plain_rows(given)
    found = {name: np.zeros((4, N)) for name in ("policy", "reference", "value")}
    with jax.set_mesh(mesh):
        lm, scalar = language_model(config(home).model, VOCAB), scalar_model(config(home).model, VOCAB)
        rows = put_batch({name: plain[name] for name in ("tokens", "segments", "positions")}, mesh)

        @jax.jit
        def logits(params, rows):
            model = lm.bind(params)
            return model.logits(model.hidden(**{f"{name}_BT": rows[name] for name in rows}))

        @jax.jit
        def values(params, rows):
            return scalar.bind(params)(**{f"{name}_BT": rows[name] for name in rows})

        read = {name: np.asarray(logits(models[name], rows), np.float64) / 0.7 for name in ("policy", "reference")}
        known = np.asarray(values(models["value"], rows), np.float64)
    for row, (length, total) in enumerate(zip(LENGTHS, plain["lengths"], strict=True)):
        for n in range(length):
            before = total - length + n - 1
            for name, tempered in read.items():
                chosen = tempered[row, before, plain["tokens"][row, before + 1]]
                found[name][row, n] = chosen - np.log(np.exp(tempered[row, before]).sum())
            found["value"][row, n] = known[row, before]
    return found


def test_the_score_is_that_of_the_unpadded_text_at_its_last_token(home, mesh, models, gather):
    """Without KL, discount and whitening, every return is the score that the episode ends with."""
    given = episodes()
    expected = plain_scores(home, mesh, models["reward"], given)
    assert np.std(expected) > 0.1
    for missing in (MissingEosConfig(how="keep"), MissingEosConfig()):
        batch, figures = gather(PLAIN.model_copy(update={"missing_eos": missing}), given)
        if missing.how == "replace":
            expected[3] = -1.0  # in place of the score, for the one without an end
        np.testing.assert_allclose(batch["returns"], expected[:, None] * given["mask"], atol=2e-5)
        assert figures["objective/scores"] == pytest.approx(expected.mean(), abs=1e-5)
    assert figures["objective/length"] == 3.5 and figures["objective/eos_rate"] == 0.75


def test_kl_is_summed_over_the_response_at_the_sampling_temperature(home, mesh, models, gather):
    given = episodes()
    batch, figures = gather(PLAIN, given, coef=0.5)
    read = plain_readings(home, mesh, models, given)
    kl = np.sum(read["policy"] - read["reference"], axis=1)
    assert figures["objective/kl"] == pytest.approx(kl.mean(), rel=1e-3)
    score = plain_scores(home, mesh, models["reward"], given)
    score[3] = -1.0
    np.testing.assert_allclose(batch["returns"][:, 0], score - 0.5 * kl, atol=1e-4)
    assert figures["objective/rlhf_reward"] == pytest.approx(np.mean(score - 0.5 * kl), abs=1e-4)
    _, same = gather(PLAIN, given, coef=0.5, reference=models["policy"])
    assert same["objective/kl"] == 0.0


def white(x: np.ndarray, mask: np.ndarray, keep_mean: bool) -> np.ndarray:
    real = x[mask > 0]
    scaled = (x - real.mean()) / np.sqrt(real.var() + 1e-8) + (real.mean() if keep_mean else 0.0)
    return np.where(mask > 0, scaled, 0.0)


def test_advantages_and_returns_are_those_of_a_loop_over_the_tokens(home, mesh, models, gather):
    """R_t = -coef k1 (+ the score at the end), whitened; A_t = R_t + .9 V_t+1 - V_t + .9 .8 A_t+1; G_t = A_t + V_t."""
    given, settings = episodes(), {"gamma": 0.9, "lam": 0.8, "whiten_rewards": True, "whiten_advantages": True}
    batch, _ = gather(PLAIN.model_copy(update=settings), given, coef=0.3)
    read, mask = plain_readings(home, mesh, models, given), given["mask"]
    score = plain_scores(home, mesh, models["reward"], given)
    score[3] = -1.0
    rewards = -0.3 * (read["policy"] - read["reference"])
    for row, length in enumerate(LENGTHS):
        rewards[row, length - 1] += score[row]
    rewards, advantages, returns = white(rewards, mask, keep_mean=True), np.zeros((4, N)), np.zeros((4, N))
    for row, length in enumerate(LENGTHS):
        later = value_after = 0.0
        for n in reversed(range(length)):
            delta = rewards[row, n] + 0.9 * value_after - read["value"][row, n]
            later, value_after = delta + 0.9 * 0.8 * later, read["value"][row, n]
            advantages[row, n], returns[row, n] = later, later + value_after
    assert np.std(read["value"][mask > 0]) > 0.1 and abs(rewards[mask > 0].mean()) > 0.05
    np.testing.assert_allclose(batch["logp"] * mask, read["policy"], atol=1e-4)
    np.testing.assert_allclose(batch["values"] * mask, read["value"], atol=1e-4)
    np.testing.assert_allclose(batch["returns"], returns, atol=1e-4)
    np.testing.assert_allclose(batch["advantages"], white(advantages, mask, keep_mean=False), atol=1e-4)


def test_the_loss_is_the_clipped_surrogate_and_the_clipped_value_loss_times_its_weight(home, mesh, models, gather):
    settings = PLAIN.model_copy(update={"clip": 0.1, "value_clip": 0.4, "value_coef": 0.3})
    given, moved = episodes(), {"policy": models["reference"], "value": models["reward"]}
    batch, _ = gather(settings, given, coef=0.3)
    now, _ = gather(settings, given, **moved)
    real = given["mask"] > 0
    old, new = ({name: one[name][real].astype(np.float64) for name in ("logp", "values")} for one in (batch, now))
    advantages, returns = batch["advantages"][real], batch["returns"][real]
    ratio, near = np.exp(new["logp"] - old["logp"]), new["values"] - old["values"]
    policy = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.9, 1.1))
    clipped = old["values"] + np.clip(near, -0.4, 0.4)
    value = 0.5 * np.maximum((new["values"] - returns) ** 2, (clipped - returns) ** 2)
    assert np.sum(np.abs(near) > 0.4) > 2 and np.sum(np.abs(ratio - 1) > 0.1) > 2 and value.mean() > 0.1
    with jax.set_mesh(mesh):
        loss = ppo.ppo_loss(settings, actors(home, settings))
        total, figures = jax.device_get(jax.jit(loss)(moved, put_batch(batch, mesh)))
    assert float(sum(term.mean for term in total)) == pytest.approx(policy.mean() + 0.3 * value.mean(), rel=1e-4)
    assert float(figures["loss/policy_avg"].mean) == pytest.approx(policy.mean(), rel=1e-4)
    assert float(figures["loss/value_avg"].mean) == pytest.approx(value.mean(), rel=1e-4)


def test_what_stands_behind_the_end_changes_nothing(gather):
    given = episodes()
    other = {**given, "tokens": np.where(given["segments"] > 0, given["tokens"], 77).astype(np.int32)}
    assert (other["tokens"] != given["tokens"]).sum() > 10
    settings = PLAIN.model_copy(update={"whiten_advantages": True, "whiten_rewards": True})
    (one, figures), (two, others) = gather(settings, given, 0.1), gather(settings, other, 0.1)
    for name in ("logp", "values", "advantages", "returns"):
        np.testing.assert_allclose(one[name] * given["mask"], two[name] * given["mask"], atol=1e-6)
    for name in figures:
        assert figures[name] == pytest.approx(others[name], abs=1e-6), name
    white = one["advantages"][given["mask"] > 0]
    assert white.mean() == pytest.approx(0, abs=1e-6) and white.std() == pytest.approx(1, abs=1e-4)


def test_every_episode_is_used_once_in_every_epoch(home, mesh):
    with jax.set_mesh(mesh):
        stage = made(home, mesh)
        state, drawn = first_state(stage), []
        for n in range(8):
            drawn.append(jax.device_get(stage.source(n, state)))
            assert bool(drawn[n].metrics) == (n % 4 == 0) and stage.boundary(n) == (n % 4 == 0)
    rows = [[row.tobytes() for row in one.batch["values"]] for one in drawn]
    epochs = [rows[n] + rows[n + 1] for n in range(0, 8, 2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert sorted(epochs[0]) == sorted(epochs[1]) and sorted(epochs[2]) == sorted(epochs[3])
    assert epochs[0] != epochs[1] and not set(epochs[0]) & set(epochs[2])


def test_the_episodes_in_hand_are_not_needed_after_a_boundary(home, mesh):
    with jax.set_mesh(mesh):
        whole, late = made(home, mesh), made(home, mesh)
        state = first_state(whole)
        for n in range(6):
            expected = jax.device_get(whole.source(n, state))
        for n in (4, 5):
            found = jax.device_get(late.source(n, state))
        assert found.batch.keys() == expected.batch.keys()
        assert all(np.array_equal(found.batch[name], expected.batch[name]) for name in found.batch)
        with pytest.raises(AssertionError, match="update 5 stands inside a rollout that was not made"):
            made(home, mesh).source(5, state)


def rolled(home, shape) -> tuple[dict, dict]:
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        stage = made(home, mesh)
        first = stage.source(0, first_state(stage))
        other = stage.source(1, first_state(stage))
        batch = jax.tree.map(lambda a, b: np.concatenate([a, b]), *map(jax.device_get, (first.batch, other.batch)))
        return batch, jax.device_get(first.metrics)


@pytest.fixture(scope="module")
def rollout(home, mesh) -> tuple[dict, dict]:
    """Eight episodes and their figures, on one device."""
    return rolled(home, (1, 1, 1))


def test_a_rollout_does_not_depend_on_the_mesh(home, rollout):
    (one, figures), (other, others) = rollout, rolled(home, (2, 2, 2))
    assert np.array_equal(one["tokens"], other["tokens"]) and np.array_equal(one["mask"], other["mask"])
    for name in ("logp", "values", "advantages", "returns"):
        np.testing.assert_allclose(one[name], other[name], atol=1e-4, err_msg=name)
    for name in figures:
        assert figures[name] == pytest.approx(others[name], abs=1e-4), name


def test_a_response_is_what_was_sampled_up_to_its_end_and_with_it(rollout):
    batch, figures = rollout
    lengths = batch["mask"].sum(1).astype(int)
    assert lengths.min() >= 1 and len({row.tobytes() for row in batch["tokens"]}) == 8
    assert figures["objective/length"] == lengths.mean() and 0 < figures["objective/eos_rate"] < 1
    for row, mask, length in zip(batch["tokens"], batch["mask"], lengths, strict=True):
        response = row[14:]
        assert not np.any(response[: length - 1] == END) and (length == 6 or response[length - 1] == END)
        assert mask.tolist() == [1] * length + [0] * (6 - length) and np.all(response[length:] == PAD)


def test_the_coefficient_moves_where_it_is_adaptive_and_stays_where_it_is_not(home, mesh):
    with jax.set_mesh(mesh):
        for controller, factor in (("fixed", 1.0), ("adaptive", 1 - 0.2 * 8 / 100)):
            stage = made(home, mesh, ppo={"kl": {"coef": 0.2, "controller": controller, "horizon": 100}})
            drawn = stage.source(0, first_state(stage))  # KL is 0, far below its target
            assert float(drawn.metrics["objective/kl_coef"]) == pytest.approx(0.2)  # as this rollout was rewarded
            assert float(drawn.extras["kl_coef"]) == pytest.approx(0.2 * factor, rel=1e-6)
            later = stage.source(1, dataclasses.replace(first_state(stage), extras=drawn.extras))
            assert float(later.extras["kl_coef"]) == pytest.approx(0.2 * factor, rel=1e-6)  # once a rollout


def test_rankings_and_episodes_are_scored_alike(home, mesh):
    """The reward model sees in PPO the very tokens that it sees for a ranking: prompt, response, end."""
    with jax.set_mesh(mesh):
        run = open_run(config(home), mesh)
        rows = load_rankings(run.paths("{run}/rankings.jsonl"), run.tokenizer, 32, 3)
        ranked = rows[0]["tokens"][0][: rows[0]["lengths"][0]]
        prompt = load_prompts(run.paths("{run}/prompts.jsonl"), run.tokenizer, 14).prompts[0]
        assert ranked[-1] == run.tokenizer.eos and ranked[0] == prompt[0] == run.tokenizer.bos
        assert prompt[-1] == run.tokenizer.control["<|assistant|>"] and prompt[-1] in ranked
