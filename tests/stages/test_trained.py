"""A stage with adapters trains them alone; what it hands on is the merged model, like that of any other stage."""

from __future__ import annotations

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console
from small_run import OPTIMIZER, config, finished, first_state, mesh_of, open_run

import jaxgpt
from jaxgpt.config.schema import LoraConfig
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.models.lora import split
from jaxgpt.models.net import Params, count, joined
from jaxgpt.stages import dpo, reward, sft
from jaxgpt.train.checkpoint import load_params, params_meta
from jaxgpt.train.loop import Stage, train
from jaxgpt.train.state import fingerprint
from jaxgpt.train.step import make_step

LORA = {"rank": 2, "alpha": 4.0, "targets": ["q", "v", "o", "down"]}
DPO = {"steps": 12, "batch": 8, "context": 32, "responses": 3, "optimizer": OPTIMIZER, "checkpoint": {"every": 4}}
MAKE = {"sft": sft.stage, "reward": reward.stage, "dpo": dpo.stage}


def settings(home, name: str = "dpo", **changes):
    files = {"path": "{run}/rankings.jsonl", "eval_path": "{run}/rankings_eval.jsonl"}
    sections = {"dpo": {**DPO, "data": files}}
    sections[name] = sections.get(name, {}) | {"lora": LORA, "checkpoint": {"every": 4}} | changes
    return config(home, **sections)


def made(home, mesh, name: str, **changes) -> Stage:
    """Call under `jax.set_mesh(mesh)`."""
    c = settings(home, name, **changes)
    return MAKE[name](open_run(c, mesh), getattr(c, name))


@pytest.fixture(scope="module")
def mesh(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        for seed, name in enumerate(("pretrain", "sft")):
            finished(open_run(config(home), mesh), name, seed=seed)
    return mesh


def run(stage: Stage, folder, c, meta) -> dict:
    folder.mkdir(exist_ok=True)
    return train(stage, folder, c, meta, Console(file=io.StringIO()))


def whole(home, mesh, name: str, folder, **changes) -> tuple[Stage, dict]:
    """A stage trained to its end in a folder of its own."""
    c = settings(home, name, **changes)
    opened = open_run(c, mesh)
    stage = MAKE[name](opened, getattr(c, name))
    meta = opened.meta("scalar" if name == "reward" else "language") | opened.adapted(name)
    return stage, run(stage, folder, getattr(c, name), meta)


@pytest.mark.parametrize(("name", "parent"), [("sft", "pretrain"), ("reward", "sft"), ("dpo", "sft")])
def test_adapters_alone_are_trained_and_have_an_optimizer(home, mesh, name, parent):
    with jax.set_mesh(mesh):
        stage, opened = made(home, mesh, name), open_run(config(home), mesh)
        base, state = stage.frozen(), first_state(stage)
        before, first = fingerprint(base), fingerprint(state.params)
        plain = opened.load_language(opened.folder.joinpath(parent).as_posix())
        kept = plain if name != "reward" else {"backbone": plain["backbone"]}
        assert before == fingerprint(kept)
        adapters, head = split(state.params)
        assert head.keys() == ({"head_D", "bias"} if name == "reward" else set())
        assert count(adapters) == 2 * ((16 + 16) * 3 + 16 + 16)  # rank times inputs and outputs: q, v, o, down
        moments = [leaf for leaf in jax.tree.leaves(state.opt) if leaf.dtype == np.float32]
        assert sum(leaf.nbytes for leaf in moments) == 2 * 4 * count(state.params)
        step = make_step(stage.loss, stage.tx, stage.schedule)
        losses = []
        for n in range(stage.steps):
            state, report = step(state, stage.source(n, state).batch, base)
            losses.append(float(report["loss"]))
        assert min(losses[-3:]) < losses[0] - 0.02
        assert fingerprint(base) == before and fingerprint(state.params) != first
        assert stage.frozen() is base


def test_the_first_loss_is_that_of_the_base_bit_for_bit(home, mesh):
    with jax.set_mesh(mesh):
        for name in ("sft", "reward"):
            adapted, plain = made(home, mesh, name), made(home, mesh, name, lora=None)
            state = first_state(adapted)
            batch = adapted.source(0, state).batch
            found, expected = (
                jax.jit(lambda params, batch, stage=stage: stage.loss(params, batch)[0].mean)(params, batch)
                for stage, params in (
                    (adapted, joined(adapted.frozen(), state.params)),
                    (plain, first_state(plain).params),
                )
            )
            assert float(found) == float(expected) > 0


def test_the_reference_of_dpo_is_the_base_itself(home, mesh):
    with jax.set_mesh(mesh):
        stage = made(home, mesh, "dpo")
        held = jax.tree.leaves(stage.source._reference)
        assert all(a is b for a, b in zip(held, jax.tree.leaves(stage.frozen()), strict=True))
        state = first_state(stage)
        loss = stage.loss(joined(stage.frozen(), state.params), stage.source(0, state).batch)[0]
        assert float(loss.mean) == pytest.approx(np.log(2), abs=1e-6)


@pytest.fixture(scope="module")
def tuned(home, mesh, tmp_path_factory):
    """An SFT stage trained by the loop: the stage, its folder (in a run's) and what it says of itself."""
    place = home / "tuned" / "sft"
    place.parent.mkdir()
    (place.parent / "tokenizer").symlink_to(home / "small" / "tokenizer")
    with jax.set_mesh(mesh):
        stage, done = whole(home, mesh, "sft", place)
    return stage, place, done


def last_logits(params: Params, lora: LoraConfig | None, batch, model, vocab: int) -> np.ndarray:
    lm = language_model(model, vocab, lora=lora)

    @jax.jit
    def run(params, batch):
        bound = lm.bind(params)
        return bound.logits(bound.hidden(batch["tokens"], batch["segments"], batch["positions"]))

    return np.asarray(run(params, batch))


def test_what_is_handed_on_is_the_merged_model_with_the_adapters_beside_it(home, mesh, tuned):
    stage, place, done = tuned
    with jax.set_mesh(mesh):
        opened = open_run(config(home), mesh)
        plain = language_model(opened.config.model, opened.vocab)
        handed = load_params(place / "params", plain.abstract)
        adapters = load_params(place / "adapters", stage.abstract)
        assert done["params"] == count(handed) and done["fingerprint"] == fingerprint(handed)
        meta = {name: params_meta(place / name) for name in ("params", "adapters")}
        assert (meta["params"]["kind"], meta["adapters"]["kind"]) == ("language", "adapters")
        assert meta["params"]["lora"]["rank"] == 2 and meta["params"]["base"].endswith("small/pretrain")
        batch, c = stage.source(0, first_state(stage)).batch, (opened.config.model, opened.vocab)
        merged_ = last_logits(handed, None, batch, *c)
        adapted = last_logits(joined(stage.frozen(), adapters), LoraConfig(**LORA), batch, *c)
        base = last_logits(stage.frozen(), None, batch, *c)
    np.testing.assert_allclose(merged_, adapted, atol=1e-5)
    assert np.abs(merged_ - base).max() > 0.1
    evaluated = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    with jax.set_mesh(mesh):
        again = made(home, mesh, "sft", lora=None).evaluate(handed)["nll"]
    assert again == pytest.approx([line for line in evaluated if "eval" in line][-1]["eval"]["nll"], rel=1e-5)


def test_a_checkpoint_of_adapters_is_read_in_the_model_they_are_for(tuned):
    _, place, done = tuned
    asked = ("a fox?", 8, 0.0)
    last = jaxgpt.load(place / "checkpoints" / str(done["step"]))
    whole_ = jaxgpt.load(place)
    assert last.generate(*asked)[0].tokens == whole_.generate(*asked)[0].tokens
    np.testing.assert_allclose(last.logits([[5, 6, 7]]), whole_.logits([[5, 6, 7]]), atol=1e-5)
    early = jaxgpt.load(place / "checkpoints" / "8")
    assert np.abs(early.logits([[5, 6, 7]]) - whole_.logits([[5, 6, 7]])).max() > 1e-3


def test_a_reward_model_gets_a_new_head_and_a_frozen_trunk(home, mesh, tmp_path):
    with jax.set_mesh(mesh):
        stage, _ = whole(home, mesh, "reward", tmp_path / "reward")
        opened, state = open_run(config(home), mesh), first_state(stage)
        net = scalar_model(opened.config.model, opened.vocab)
        params = load_params(tmp_path / "reward" / "params", net.abstract)
        scores = [
            np.asarray(jax.jit(lambda p, b: reward.score_rankings(net.bind(p), b))(params, batch))[
                np.asarray(batch["lengths"]) > 0
            ]
            for batch in (stage.source(n, state).batch for n in range(3))
        ]
        adapters = load_params(tmp_path / "reward" / "adapters", split(stage.abstract)[0])
        same = {"embed_VD": True, "norm": True}
        for part in same:
            a, b = (jax.tree.leaves(tree["backbone"][part]) for tree in (params, stage.frozen()))
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        blocks, base = params["backbone"]["blocks"], stage.frozen()["backbone"]["blocks"]
        assert np.array_equal(blocks["attention"]["k_DGK"], base["attention"]["k_DGK"])
        q = adapters["backbone"]["blocks"]["attention"]["lora_q"]
        expected = np.einsum("ndl,nlhk->ndhk", *(np.asarray(q[leaf], np.float64) for leaf in ("a_IL", "b_LO")))
        found = np.asarray(blocks["attention"]["q_DHK"], np.float64) - np.asarray(base["attention"]["q_DHK"])
        np.testing.assert_allclose(found, 2.0 * expected, atol=1e-6)  # alpha / rank
    joint = np.concatenate(scores)
    assert abs(joint.mean()) < 0.3 and joint.std() == pytest.approx(1.0, abs=0.3)


class Cut(Exception):
    """The power goes."""


def test_a_run_that_was_cut_is_bit_for_bit_the_one_that_was_not(home, mesh, tuned, tmp_path):
    c = settings(home, "sft").sft
    with jax.set_mesh(mesh):
        stage = made(home, mesh, "sft")

        def broken(n, state):
            if n == 10:
                raise Cut
            return stage.source(n, state)

        with pytest.raises(Cut):
            run(dataclasses.replace(stage, source=broken), tmp_path, c, {})
        done = run(made(home, mesh, "sft"), tmp_path, c, {})
    assert done["fingerprint"] == tuned[2]["fingerprint"]
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (tuned[1], tmp_path)]
    losses = [[json.loads(line).get("loss") for line in some] for some in lines]
    assert losses[0] == losses[1]


def test_meshes_agree(home):
    found = []
    for shape in ((1, 1, 1), (1, 4, 2), (2, 2, 2)):
        mesh = mesh_of(*shape)
        with jax.set_mesh(mesh):
            stage = made(home, mesh, "sft")
            state, step, losses = first_state(stage), make_step(stage.loss, stage.tx, stage.schedule), []
            for n in range(4):
                state, report = step(state, stage.source(n, state).batch, stage.frozen())
                losses.append(float(report["loss"]))
            found.append((losses, stage.finish(state)))
    for losses, params in found[1:]:
        np.testing.assert_allclose(losses, found[0][0], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(found[0][1]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
