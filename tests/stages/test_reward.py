"""A reward model's score is of one response alone, learned from all pairs of a prompt, and ends up normalised."""

import json
import math
from collections import Counter

import jax
import numpy as np
import pytest
from small_run import config, finished, first_state, mesh_of, open_run

import jaxgpt
from jaxgpt.config.schema import RewardConfig
from jaxgpt.data.chat import render
from jaxgpt.data.rankings import load_rankings
from jaxgpt.errors import UserError
from jaxgpt.models.heads import scalar_model
from jaxgpt.stages import normalization, reward
from jaxgpt.train.checkpoint import save_params
from jaxgpt.train.state import fingerprint, initial_state
from jaxgpt.train.step import make_step


@pytest.fixture(scope="module")
def mesh(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        finished(open_run(config(home), mesh), "sft", seed=1)
    return mesh


def made(home, mesh, **changes):
    c = config(home, **changes)
    return reward.stage(open_run(c, mesh), c.reward)


@pytest.fixture(scope="module")
def trained(home, mesh):
    """Stage, losses of its steps, last parameters."""
    with jax.set_mesh(mesh):
        stage = made(home, mesh)
        state, losses = first_state(stage), []
        step = make_step(stage.loss, stage.tx, stage.schedule)
        for n in range(stage.steps):
            state, report = step(state, stage.source(n, state).batch, {})
            losses.append({name: float(value) for name, value in report.items()})
    return stage, losses, state.params


@pytest.fixture(scope="module")
def scores(home, mesh):
    """The function from parameters and a ranking batch to scores [B, K]."""
    with jax.set_mesh(mesh):
        net = scalar_model(config(home).model, open_run(config(home), mesh).vocab)
        return jax.jit(lambda params, batch: reward.score_rankings(net.bind(params), batch))


def test_the_loss_begins_at_that_of_a_coin_and_falls(trained, mesh):
    """Detail 27: loss at init is log 2 within 0.05."""
    stage, losses, params = trained
    assert losses[0]["loss"] == pytest.approx(math.log(2), abs=0.05)
    assert losses[-1]["loss"] < 0.4 and losses[-1]["accuracy"] > 0.8 and losses[-1]["margin"] > 0
    with jax.set_mesh(mesh):
        figures = stage.evaluate(params)
    assert figures.keys() == {"loss", "accuracy", "margin"} and stage.quality(figures) == figures["accuracy"]


def test_the_backbone_is_the_parents_and_the_head_is_new(home, mesh):
    """Detail 27: head with deviation 1 / sqrt(d + 1) and bias 0, trunk of the SFT model, no language head."""
    with jax.set_mesh(mesh):
        run, stage = open_run(config(home), mesh), made(home, mesh)
        parent, params = run.load_language("sft"), stage.init()
        assert fingerprint(params["backbone"]) == fingerprint(parent["backbone"])
        assert params.keys() == {"backbone", "head_D", "bias"} and float(params["bias"]) == 0.0
        net = scalar_model(run.config.model, run.vocab)
        heads = jax.jit(jax.vmap(lambda key: net.init(key)["head_D"]))(jax.random.split(jax.random.key(0), 8192))
        assert np.std(heads) == pytest.approx(17**-0.5, rel=0.01) and abs(np.mean(heads)) < 0.003


def test_a_score_does_not_depend_on_padding_or_company(trained, scores, mesh):
    """Details 21 and 22: read at the last real token; the same alone and in any batch."""
    stage, _, params = trained
    with jax.set_mesh(mesh):
        batch = {key: np.asarray(value) for key, value in stage.source(0, first_state(stage)).batch.items()}
        found = np.asarray(scores(params, batch))
        valid = batch["lengths"] > 0
        beyond = np.arange(batch["tokens"].shape[-1]) >= batch["lengths"][..., None]
        garbage = {**batch, "tokens": np.where(beyond, 7, batch["tokens"]).astype(np.int32)}
        np.testing.assert_allclose(np.asarray(scores(params, garbage))[valid], found[valid], atol=1e-6)
        for more in (1, 8, 33):
            longer = {**batch, "tokens": np.pad(batch["tokens"], ((0, 0), (0, 0), (0, more)), constant_values=3)}
            np.testing.assert_allclose(np.asarray(scores(params, longer))[valid], found[valid], atol=1e-6)
        for row in range(2):
            alone = {key: value[row : row + 1] for key, value in batch.items()}
            np.testing.assert_allclose(
                np.asarray(scores(params, alone))[0][valid[row]], found[row][valid[row]], atol=1e-6
            )
        order = np.random.default_rng(0).permutation(len(found))
        shuffled = {key: value[order] for key, value in batch.items()}
        np.testing.assert_allclose(
            np.asarray(scores(params, shuffled))[valid[order]], found[order][valid[order]], atol=1e-6
        )


def test_the_order_of_responses_does_not_matter(trained, mesh):
    """Detail 24: permuting responses and ranks together leaves the loss unchanged."""
    stage, _, params = trained
    with jax.set_mesh(mesh):
        batch = stage.source(0, first_state(stage)).batch
        loss = jax.jit(stage.loss)
        turned = {key: value[:, ::-1] if value.ndim > 1 else value for key, value in batch.items()}
        (one, figures), (other, others) = loss(params, batch), loss(params, turned)
        assert float(one.mean) == pytest.approx(float(other.mean), rel=1e-5)
        for name in figures:
            assert float(figures[name].mean) == pytest.approx(float(others[name].mean), rel=1e-4)


def test_swapping_chosen_and_rejected_flips_the_accuracy(home, trained, scores, mesh, tmp_path):
    """Detail 31: labels never enter the model's input."""
    _, _, params = trained
    pairs = [json.loads(line) for line in (home / "small" / "rankings.jsonl").read_text().splitlines()]
    pairs = [pair for pair in pairs if "chosen" in pair]
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    with jax.set_mesh(mesh):
        run = open_run(config(home), mesh)
        found = []
        for records in (pairs, swapped):
            (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            rows = load_rankings(tmp_path / "a.jsonl", run.tokenizer, 32, 2)
            batch = {key: np.stack([rows[i][key] for i in range(len(rows))]) for key in rows[0]}
            found.append((batch["tokens"], np.asarray(scores(params, batch))))
        (tokens, right), (other, wrong) = found
        assert np.array_equal(tokens, other[:, ::-1])
        np.testing.assert_allclose(right, wrong[:, ::-1], atol=1e-6)
        accuracy = [np.mean(x[:, 0] > x[:, 1]) for x in (right, wrong)]
        assert accuracy[0] == 1 - accuracy[1] > 0.5


def test_each_ranking_is_visited_once_an_epoch_and_the_rate_falls_over_just_that(home, mesh):
    """Detail 28: one epoch unless another number is asked for; the last batch is filled with rows of weight 0."""
    with jax.set_mesh(mesh):
        lines = (home / "small" / "rankings.jsonl").read_text().splitlines()
        for epochs in (1, 3):
            settings = {"batch": 3, "steps": None, "epochs": epochs, "optimizer": {"lr": 1e-2, "schedule": "linear"}}
            stage = made(home, mesh, reward=settings)
            assert stage.steps == -(-epochs * len(lines) // 3)
            assert stage.notes[0].startswith(f"8 rankings, 1 held out, {epochs}.00 epochs, up to 3 responses")
            state = first_state(stage)
            batches = [jax.device_get(stage.source(n, state).batch) for n in range(stage.steps)]
            seen = Counter(
                row.tobytes()
                for batch in batches
                for row, lengths in zip(batch["tokens"], batch["lengths"], strict=True)
                if lengths.any()
            )
            assert set(seen.values()) == {epochs} and len(seen) == len(lines) == 8
            assert float(stage.schedule(stage.steps - 1)) == pytest.approx(1e-3)
            filled = batches[-1]["lengths"].any(axis=1)
            assert filled.sum() == epochs * 8 % 3 or 3
            short = {key: value[filled] for key, value in batches[-1].items()}
            loss = jax.jit(stage.loss)
            whole, part = (float(loss(state.params, given)[0].mean) for given in (batches[-1], short))
            assert whole == pytest.approx(part, rel=1e-5)
            stage.close()
        assert made(home, mesh, reward={"batch": 3, "steps": 7}).steps == 7


def test_two_runs_of_a_seed_are_equal_and_of_two_seeds_are_not(home, mesh):
    """Detail 32: the seed decides the head's first values, whatever was drawn before; an ensemble's differ."""

    def trained_with(seed, steps=4):
        np.random.default_rng().normal(size=3)
        c = config(home).model_copy(update={"seed": seed})
        stage = reward.stage(open_run(c, mesh), c.reward)
        state = first_state(stage)
        head, step = np.asarray(state.params["head_D"]), make_step(stage.loss, stage.tx, stage.schedule)
        for n in range(steps):
            state, _ = step(state, stage.source(n, state).batch, {})
        stage.close()
        return head, fingerprint(stage.finish(state))

    with jax.set_mesh(mesh):
        (head, one), (again, same), (other, second) = (trained_with(seed) for seed in (5, 5, 6))
    assert np.array_equal(head, again) and one == same
    assert not np.array_equal(head, other) and one != second


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"loss": "best_of_k"}, 1),
        ({"loss": "plackett_luce", "centring": 0.01}, 2),
        ({"margin": 0.5, "label_smoothing": 0.1, "ties": "half", "weighting": "pair", "centring": 0.01}, 2),
    ],
)
def test_every_loss_is_the_function_of_its_name(home, trained, scores, mesh, settings, parts):
    _, _, params = trained
    with jax.set_mesh(mesh):
        stage = made(home, mesh, reward=settings)
        batch = jax.device_get(stage.source(0, first_state(stage)).batch)
        batch["margin"] = np.linspace(0, 1, len(batch["margin"]), dtype=np.float32)
        terms, metrics = jax.jit(stage.loss)(params, batch)
        found = scores(params, batch)
        given = (found, batch["ranks"], batch["lengths"] > 0)
        if settings.get("loss") is None:
            names = ("label_smoothing", "ties", "weighting")
            kept = {name: settings[name] for name in names}
            wanted = reward.ranking(*given, margin_B=batch["margin"] + 0.5, **kept)[0]
        else:
            wanted = getattr(reward, settings["loss"])(*given)[0]
        terms = terms if isinstance(terms, tuple) else (terms,)
        assert len(terms) == parts
        assert float(terms[0].mean) == pytest.approx(float(wanted.mean), rel=1e-5)
        if parts == 2:
            centre = reward.centring(found, given[2])
            assert float(terms[1].mean) == pytest.approx(0.01 * float(centre.mean), rel=1e-5)
            assert float(metrics["centring"].mean) == pytest.approx(float(centre.mean), rel=1e-5)
        stage.close()


def test_settings_of_one_loss_are_refused_with_another():
    for name, value in (("margin", 1.0), ("label_smoothing", 0.1), ("ties", "half"), ("weighting", "pair")):
        with pytest.raises(ValueError, match=f"{name} {value} is for loss ranking; best_of_k has none"):
            RewardConfig(loss="best_of_k", **{name: value})
    with pytest.raises(ValueError, match="demonstrations are for normalize demonstrations, which is responses"):
        RewardConfig(demonstrations={"path": "good.jsonl"})
    with pytest.raises(ValueError, match="set eval_path or val_fraction, not both"):
        RewardConfig(data={"path": "a.jsonl", "eval_path": "b.jsonl", "val_fraction": 0.1})


def test_a_share_of_the_prompts_can_be_held_out(home, mesh):
    with jax.set_mesh(mesh):
        stage = made(home, mesh, reward={"data": {"path": "{run}/rankings.jsonl", "val_fraction": 0.3}})
        assert stage.notes[0].startswith(tuple(f"{8 - n} rankings, {n} held out" for n in range(1, 8)))
        assert stage.evaluate(stage.init()).keys() == {"loss", "accuracy", "margin"}


def sequences_of(run, rows):
    return [ids for ranking in rows.rankings for ids in ranking.ids]


@pytest.fixture
def normalized(home, trained, mesh):
    """From settings: the conversations that count, and their scores before and after."""

    def made_with(over, **settings):
        stage = made(home, mesh, reward=settings)
        state = initial_state(trained[2], stage.tx, {})
        after, run = stage.finish(state), open_run(config(home, reward=settings), mesh)
        net = scalar_model(run.config.model, run.vocab)
        rows = load_rankings(run.paths("{run}/rankings.jsonl"), run.tokenizer, 32, 3)
        data = reward.load(run, run.config.reward)
        given = over(run, rows, data)
        scored = [reward.score_sequences(run, net, params, given, 16) for params in (state.params, after)]
        return stage.known()["normalization"], *scored, (run, net, rows, state.params, after)

    return made_with


def pair_accuracy(run, net, rows, params):
    found = iter(reward.score_sequences(run, net, params, sequences_of(run, rows), 16).tolist())
    scores = [[next(found) for _ in ranking.ids] for ranking in rows.rankings]
    pairs = [
        (a - b) * (rank_b - rank_a) > 0
        for one, ranking in zip(scores, rows.rankings, strict=True)
        for a, rank_a in zip(one, ranking.ranks, strict=True)
        for b, rank_b in zip(one, ranking.ranks, strict=True)
        if rank_a < rank_b
    ]
    return sum(pairs), len(pairs)


def test_training_responses_score_mean_0_and_deviation_1(home, mesh, normalized):
    """Detail 29: mean below 1e-6, deviation 1, the same order, accuracy unchanged."""
    with jax.set_mesh(mesh):
        known, before, after, (run, net, rows, old, new) = normalized(lambda run, rows, data: sequences_of(run, rows))
        assert abs(np.mean(after, dtype=np.float64)) < 1e-6 and np.std(after, dtype=np.float64) == pytest.approx(
            1, 1e-6
        )
        np.testing.assert_allclose(after, (before - before.mean()) / before.std(), atol=1e-5)
        np.testing.assert_allclose(after, known["gain"] * before + known["offset"], atol=1e-5)
        assert known["gain"] == pytest.approx(1 / before.std(), rel=1e-5)
        assert pair_accuracy(run, net, rows, old) == pair_accuracy(run, net, rows, new)
        plain = made(home, mesh, reward={"normalize": "none"})
        assert plain.finish(initial_state(old, plain.tx, {})) is old and plain.known() == {}


def test_demonstrations_score_mean_0_and_the_scale_stays(mesh, normalized):
    """Detail 30: mean r(demonstrations) is 0; the gain is 1."""
    with jax.set_mesh(mesh):
        known, before, after, (run, net, rows, old, new) = normalized(
            lambda run, rows, data: data.demonstrations, normalize="demonstrations"
        )
        assert known["gain"] == 1.0 and known["over"] == len(after) == 32
        assert abs(np.mean(after, dtype=np.float64)) < 1e-6
        np.testing.assert_allclose(after, before - before.mean(), atol=1e-5)
        assert np.array_equal(old["head_D"], new["head_D"])
        assert pair_accuracy(run, net, rows, old) == pair_accuracy(run, net, rows, new)


def test_samples_of_the_policy_score_mean_0_and_deviation_1(mesh, normalized):
    """Detail 29, as lm-human-preferences does it: over 256 responses of the model that training starts from."""
    settings = {"normalize": "policy", "normalize_over": 256}
    with jax.set_mesh(mesh):
        known, before, after, _ = normalized(
            lambda run, rows, data: normalization.policy_samples(run, run.config.reward, rows), **settings
        )
        assert known["over"] == len(after) == 256 and np.std(before) > 0
        assert abs(np.mean(after, dtype=np.float64)) < 1e-6 and np.std(after, dtype=np.float64) == pytest.approx(
            1, 1e-6
        )


def test_samples_of_the_policy_answer_the_training_prompts(home, mesh):
    with jax.set_mesh(mesh):
        run = open_run(config(home, reward={"normalize": "policy", "normalize_over": 40}), mesh)
        rows = load_rankings(run.paths("{run}/rankings.jsonl"), run.tokenizer, 32, 3)
        asked = {tuple(render(run.tokenizer, r.messages, add_generation_prompt=True)[0]) for r in rows.rankings}
        samples = [ids.tolist() for ids in normalization.policy_samples(run, run.config.reward, rows)]
        begun = [next(ask for ask in asked if tuple(ids[: len(ask)]) == ask) for ids in samples]
        assert len(samples) == 40 and set(begun) == asked
        assert all(len(ask) < len(ids) <= 32 for ask, ids in zip(begun, samples, strict=True))
        assert all(
            end not in ids[len(ask) : -1] for ask, ids in zip(begun, samples, strict=True) for end in run.tokenizer.ends
        )
        again = [ids.tolist() for ids in normalization.policy_samples(run, run.config.reward, rows)]
        assert again == samples and len({tuple(ids) for ids in samples}) > 20


def test_a_reloaded_model_keeps_gain_and_offset(home, mesh, normalized):
    """Detail 29: they are in the parameters, and beside them."""
    with jax.set_mesh(mesh):
        known, _, after, (run, _, rows, _, new) = normalized(lambda run, rows, data: sequences_of(run, rows))
        folder = run.folder / "kept" / "params"
        save_params(folder, new, {**run.meta("scalar"), "normalization": known})
    model = jaxgpt.load(folder.parent)
    assert model.gain == known["gain"]
    found = model.score_tokens([ids.tolist() for ids in sequences_of(run, rows)])
    np.testing.assert_allclose(found, after, atol=1e-5)


def test_prompts_on_both_sides_are_refused(home, mesh):
    shared = home / "small" / "shared.jsonl"
    line = (home / "small" / "rankings.jsonl").read_text().splitlines()[2]
    shared.write_text(line + "\n")
    both = {"path": "{run}/rankings.jsonl", "eval_path": str(shared)}
    with (
        jax.set_mesh(mesh),
        pytest.raises(UserError, match=r"shared.jsonl:1: its prompt is also at .*rankings.jsonl:3"),
    ):
        made(home, mesh, reward={"data": both})
