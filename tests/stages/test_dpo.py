"""DPO learns which response is preferred, from the log-probabilities of whole responses beside the reference's."""

import math

import jax
import numpy as np
import pytest
from small_run import config, finished, first_state, mesh_of, open_run

from jaxgpt.errors import UserError
from jaxgpt.mesh import put_batch
from jaxgpt.models.heads import language_model
from jaxgpt.stages import dpo
from jaxgpt.train.step import make_step

VARIANTS = {
    "sigmoid": {},
    "cdpo": {"label_smoothing": 0.2, "beta": 0.4},
    "ipo": {"loss": "ipo", "beta": 0.3},
    "ipo of sums": {"loss": "ipo", "length_normalized": False},
    "with an sft term": {"sft_coef": 0.7},
}


@pytest.fixture(scope="module")
def mesh(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        finished(open_run(config(home), mesh), "sft", seed=1)
    return mesh


def made(home, mesh, **changes):
    c = config(home, **changes)
    return dpo.stage(open_run(c, mesh), c.dpo)


def learned(stage, steps: int, accumulate: int = 1):
    """The figures of the first steps, and the state behind them."""
    state, reports = first_state(stage), []
    step = make_step(stage.loss, stage.tx, stage.schedule, accumulate)
    for n in range(steps):
        state, report = step(state, stage.source(n, state).batch, {})
        reports.append({name: float(value) for name, value in report.items()})
    return reports, state


@pytest.fixture(scope="module")
def trained(home, mesh):
    with jax.set_mesh(mesh):
        stage = made(home, mesh)
        return stage, *learned(stage, stage.steps)


def test_at_the_start_the_loss_is_log_two(trained):
    """The policy is the reference, token for token: every reward is 0 and every pair a draw."""
    first = trained[1][0]
    assert first["loss"] == np.float32(math.log(2.0))
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0
    assert first["rewards/accuracies"] == 0.5


def test_it_learns_what_is_preferred(trained, mesh):
    stage, reports, state = trained
    assert reports[-1]["loss"] < 0.3 and reports[-1]["rewards/accuracies"] > 0.9
    assert reports[-1]["rewards/margins"] == pytest.approx(
        reports[-1]["rewards/chosen"] - reports[-1]["rewards/rejected"], abs=1e-5
    )
    with jax.set_mesh(mesh):
        before, after = stage.evaluate(stage.init()), stage.evaluate(state.params)
    assert before["loss"] == pytest.approx(math.log(2.0), abs=1e-6) and after["loss"] < 0.6
    assert stage.quality(after) == after["rewards/accuracies"] == 1.0


def test_the_reference_stays_the_model_of_the_start(trained, mesh):
    stage, _, state = trained
    with jax.set_mesh(mesh):
        first = stage.source(0, first_state(stage)).batch["reference"]
        np.testing.assert_array_equal(stage.source(0, state).batch["reference"], first)


def responses(batch):
    """(ids, first position of the response, rank) of every response of every ranking of a batch, without padding."""
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    for b in range(len(arrays["ranks"])):
        ranking = []
        for k, rank in enumerate(arrays["ranks"][b]):
            length = int(arrays["segments"][b, k].sum())
            if length:
                ids = [int(arrays["tokens"][b, k, 0]), *map(int, arrays["targets"][b, k, :length])]
                ranking.append((ids, 1 + int(np.argmax(arrays["mask"][b, k])), int(rank)))
        yield ranking


def logps(net, params, ids, start):
    """Log-probability of each token of a response, read alone, in float64."""
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(ids)] = ids
    places = np.arange(32, dtype=np.int32)[None]
    row = {"tokens": tokens, "segments": (places < len(ids)).astype(np.int32), "positions": places}
    logits = np.asarray(net(params, put_batch(row, mesh_of())), np.float64)[0]
    return [logits[t - 1, ids[t]] - math.log(sum(math.exp(x) for x in logits[t - 1])) for t in range(start, len(ids))]


def by_hand(c, policy, reference, rankings):
    """The objective of a batch, pair by pair."""
    losses, said = [], []
    for ranking in rankings:
        own = [policy(ids, start) for ids, start, _ in ranking]
        other = [reference(ids, start) for ids, start, _ in ranking]
        if c.loss == "ipo" and c.length_normalized:
            gains = [sum(a) / len(a) - sum(b) / len(b) for a, b in zip(own, other, strict=True)]
        else:
            gains = [sum(a) - sum(b) for a, b in zip(own, other, strict=True)]
        ranks, terms = [rank for *_, rank in ranking], []
        for i in range(len(ranking)):
            for j in range(len(ranking)):
                if ranks[i] < ranks[j]:
                    h = gains[i] - gains[j]
                    wins = 1.0 / (1.0 + math.exp(-c.beta * h))
                    e = c.label_smoothing
                    ipo = (h - 1.0 / (2.0 * c.beta)) ** 2
                    terms.append(ipo if c.loss == "ipo" else -(1 - e) * math.log(wins) - e * math.log(1 - wins))
        losses.append(sum(terms) / len(terms))
        said += [-x for row, rank in zip(own, ranks, strict=True) if rank == min(ranks) for x in row]
    return sum(losses) / len(losses) + c.sft_coef * sum(said) / len(said)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_stage_is_a_loop_over_pairs(home, trained, mesh, name):
    """Through the rendered files, the batch and both models; the policy has trained for twelve updates."""
    with jax.set_mesh(mesh):
        stage, c = made(home, mesh, dpo=VARIANTS[name]), config(home, dpo=VARIANTS[name]).dpo
        run, params = open_run(config(home), mesh), trained[2].params
        net, parent = language_model(run.config.model, run.vocab), run.load_language("sft")
        batch = stage.source(0, first_state(stage)).batch
        terms, _ = jax.jit(stage.loss)(params, batch)
        found = sum(float(term.mean) for term in (terms if isinstance(terms, tuple) else (terms,)))

        @jax.jit
        def logits(params, row):
            lm = net.bind(params)
            return lm.logits(lm.hidden(row["tokens"], row["segments"], row["positions"]))

        want = by_hand(
            c, lambda *row: logps(logits, params, *row), lambda *row: logps(logits, parent, *row), responses(batch)
        )
    assert found == pytest.approx(want, rel=2e-6)


def test_a_pair_weighs_less_the_longer_its_ranking(home, mesh):
    weights = np.asarray(dpo.pair_weights(np.array([[1, 3, 2], [2, 1, 0], [1, 1, 2]], np.int32)))
    assert weights[0].sum() == pytest.approx(1.0) and weights[0, 0, 1] == pytest.approx(1 / 3)
    assert weights[1].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert weights[2].tolist() == [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]


def test_cuts_and_meshes_agree(home, mesh):
    changes = {"sft_coef": 0.5, "optimizer": {"lr": 1e-2, "eps": 1e-3}}
    with jax.set_mesh(mesh):
        want, _ = learned(made(home, mesh, dpo=changes), 3)
    for shape, accumulate in (((1, 1, 1), 4), ((2, 2, 2), 2)):
        other = mesh_of(*shape)
        with jax.set_mesh(other):
            found, _ = learned(made(home, other, dpo=changes), 3, accumulate)
        for n, (a, b) in enumerate(zip(found, want, strict=True)):
            if n == 0:  # all gains are 0 but for rounding, which decides the pairs
                a, b = ({**x, "rewards/accuracies": 0.5} for x in (a, b))
            assert a == pytest.approx(b, rel=2e-5, abs=2e-5)


def test_prompts_on_both_sides_are_refused(home, mesh):
    shared = home / "small" / "shared_pairs.jsonl"
    shared.write_text((home / "small" / "rankings.jsonl").read_text().splitlines()[2] + "\n")
    both = {"path": "{run}/rankings.jsonl", "eval_path": str(shared)}
    with (
        jax.set_mesh(mesh),
        pytest.raises(UserError, match=r"shared_pairs.jsonl:1: its prompt is also at .*rankings.jsonl:3"),
    ):
        made(home, mesh, dpo={"data": both})


def test_smoothed_labels_of_ipo_are_refused(home):
    with pytest.raises(ValueError, match=r"label_smoothing 0.1 is for loss sigmoid; ipo has none"):
        config(home, dpo={"loss": "ipo", "label_smoothing": 0.1})
