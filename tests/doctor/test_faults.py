"""Faults that are planted, one at a time, and the check that finds each."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax
import pytest
from examined import setup, told
from small_run import mesh_of, open_run

from jaxgpt.models import transformer
from jaxgpt.models.heads import language_model
from jaxgpt.stages import dpo, reward, roles, rollouts, sft
from jaxgpt.stages.episodes import Actors
from jaxgpt.train.checkpoint import save_params

KL = {"KL at step 0, k1", "KL at step 0, k3"}
ANSWER = "{{ '<|assistant|>' }}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}"
TRAINED = "{{ '<|assistant|>' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"


def template(answer: str, before: str = "{{ bos_token }}", inside: str = "") -> str:
    return (
        f"{before}{{% for m in messages %}}{inside}{{% if m.role == 'assistant' %}}{answer}{{% else %}}"
        "{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        (template(ANSWER), {"rows with an end not trained"}),
        (template(TRAINED, inside="{{ bos_token }}"), {"BOS that the template writes", "rows without exactly one BOS"}),
        (template(TRAINED, before="{{ bos_token + bos_token }}"), {"BOS that the template writes"}),
        (
            template(TRAINED.replace("m.content", "m.content[1:]")),
            {"answers that are not the trained text"},
        ),
    ],
)
def test_a_template_that_is_wrong(untrained, tmp_path, text, failed):
    (tmp_path / "chat.jinja").write_text(text)
    given = {"template": str(tmp_path / "chat.jinja")}
    data = {"path": str(untrained / "small" / "talks.jsonl")}
    c = setup(untrained, ("sft",), tokenizer=given, sft={"data": data}).model_copy(update={"runs": str(tmp_path)})
    found = told(c)
    assert (found.code, found.failed) == (1, failed)


def test_prompts_that_are_too_long(trained):
    found = told(setup(trained, ("ppo",), ppo={"prompt_length": 6}))
    assert (found.code, found.failed) == (1, {"prompts too long", "the stage cannot begin"})
    assert "by up to 6 tokens" in found.line("prompts too long")
    assert "raise ppo.prompt_length (now 6) to 12" in found.line("prompts too long")


def test_conversations_that_are_cut(trained):
    found = told(setup(trained, ("sft",), sft={"init": "random", "context": 16}))
    assert found.failed == {"rows cut at the context"}


def test_a_reward_model_that_sees_its_padding(trained, monkeypatch):
    def at_the_end(model, tokens_BT, lengths_B):
        time_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        return model(tokens_BT, jnp.ones_like(tokens_BT), jnp.zeros_like(tokens_BT) + time_T)[:, -1]

    monkeypatch.setattr(reward, "score_rows", at_the_end)
    found = told(setup(trained, ("reward",)))
    assert found.code == 1
    assert "scores with padding of other tokens" in found.failed
    assert any("pads more" in name for name in found.failed)
    assert "scores in another order" not in found.failed


def test_a_reward_model_that_sees_its_batch(trained, monkeypatch):
    plain = reward.score_rows
    monkeypatch.setattr(reward, "score_rows", lambda *given: plain(*given) - jnp.mean(plain(*given)))
    assert "scores of a ranking alone" in told(setup(trained, ("reward",))).failed


def test_a_reference_that_is_not_the_policy(trained, monkeypatch):
    plain = roles._cast
    moved = lambda params, dtype: jax.tree.map(lambda leaf: 1.01 * leaf, plain(params, dtype))  # noqa: E731
    monkeypatch.setattr(roles, "_cast", moved)
    found = told(setup(trained, ("ppo",)))
    assert KL <= found.failed <= KL | {"rollout's score - plain score"}


def test_a_temperature_that_the_reference_does_not_have(trained, monkeypatch):
    plain = Actors.measure

    def measure(self, params, episodes):
        known = plain(self, params, episodes)
        if self.reference is not None:
            warm = plain(dataclasses.replace(self, temperature=1.0), params, episodes)
            known["reference_logp"] = warm["reference_logp"]
        return known

    monkeypatch.setattr(Actors, "measure", measure)
    failed = told(setup(trained, ("ppo",), ppo={"temperature": 0.7})).failed
    assert failed - {"responses that end"} == KL  # of random parameters a few responses need not end


def test_a_sampler_of_another_temperature(trained, monkeypatch):
    plain = rollouts.generate
    hot = lambda *given, temperature, **named: plain(*given, temperature=2 * temperature, **named)  # noqa: E731
    monkeypatch.setattr(rollouts, "generate", hot)
    assert told(setup(trained, ("ppo",))).failed == {"sampler - trainer, nats a token"}


def test_a_weight_that_is_no_number(trained, tmp_path):
    mesh, c = mesh_of(), setup(trained, ("ppo",), ppo={"init": str(tmp_path / "sft")})
    with jax.set_mesh(mesh):
        run = open_run(c, mesh)
        params = jax.jit(language_model(c.model, run.vocab).init)(jax.random.key(1))
        norm = params["backbone"]["norm"]
        name = next(iter(norm))
        spoilt = {**norm, name: norm[name].at[3].set(jnp.nan)}
        params = {**params, "backbone": {**params["backbone"], "norm": spoilt}}
        mark = save_params(tmp_path / "sft" / "params", params, run.meta("language"))
        (tmp_path / "sft" / "done.json").write_text(json.dumps({"fingerprint": mark}))
    found = told(c)
    assert {"not finite: parameters", "not finite: reference", "first gradient's norm"} <= found.failed
    assert "the first is in policy/backbone/norm/" in found.line("not finite: parameters")


def test_documents_that_see_each_other(trained, monkeypatch):
    plain = transformer.attend

    def everywhere(q, k, v, segments_BT, segments_BS, **named):
        return plain(q, k, v, jnp.minimum(segments_BT, 1), jnp.minimum(segments_BS, 1), **named)

    monkeypatch.setattr(transformer, "attend", everywhere)
    found = told(setup(trained, ("pretrain",), pretrain={"init": str(trained / "small" / "sft")}))
    assert {"packed - alone, nats a token", "gradient into other documents"} <= found.failed


def test_an_optimizer_that_moves_at_rate_0(trained, monkeypatch):
    monkeypatch.setattr(sft, "adamw", lambda config, steps: optax.sgd(1e-3))
    found = told(setup(trained, ("sft",), sft={"init": "random"}))
    assert found.failed == {"drift at lr = 0"}


def test_dpo_with_another_reference(trained, monkeypatch):
    plain = dpo.WithReference.complete
    moved = lambda self, batch: {**plain(self, batch), "reference": 1.5 * plain(self, batch)["reference"]}  # noqa: E731
    monkeypatch.setattr(dpo.WithReference, "complete", moved)
    assert told(setup(trained, ("dpo",))).failed == {"loss at init, nats a ranking"}


def test_a_parent_that_is_named_and_not_there(trained):
    from jaxgpt.errors import UserError

    with pytest.raises(UserError, match="nowhere: no finished stage there"):
        told(setup(trained, ("ppo",), ppo={"init": "nowhere"}))
