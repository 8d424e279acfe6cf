"""Our stages against TRL's trainers: the same tiny LLaMA through our export, the same files, order and settings.

Needs two environments of their own (Python 3.11), for PPO is in TRL up to 1.9.2 and not in later ones:
    python -m venv trl && trl/bin/pip install torch==2.13.0 && trl/bin/pip install trl==1.16
    python -m venv trl-ppo && trl-ppo/bin/pip install torch==2.13.0 && trl-ppo/bin/pip install trl==1.9.2
Then, from the top of the repository (without one of the two variables its tests are skipped):
    export JAXGPT_TRL_PYTHON=trl/bin/python JAXGPT_TRL_PPO_PYTHON=trl-ppo/bin/python
    pytest -m peers tests/peers/test_trl.py -s       # -s prints the largest differences: the table of the README

our_side.py makes models, data and our figures; trl_side.py runs TRL's trainers, in those environments.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from our_side import (
    DISCOUNT,
    GROUP,
    OPTIMIZER,
    PPO_OPTIMIZER,
    PRESET,
    RESPONSE,
    STEADY,
    STEPS,
    TEMPERATURE,
    UPDATES,
    Ours,
)

from jaxgpt.config.schema import DpoConfig, GrpoConfig, OptimizerConfig, PpoConfig

pytestmark = pytest.mark.peers
SIDE = Path(__file__).with_name("trl_side.py")
Job = dict[str, Any]
DPO = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.1, "beta": 0.3},
    "ipo": {"loss": "ipo", "beta": 0.2},
    "with an sft term": {"sft_coef": 0.5},
}
GRPO = {
    "grpo": {"aggregation": "seq-mean-token-mean"},
    "dapo": {"aggregation": "token-mean", "clip_high": 0.28, "kl": {"coef": 0.0, "estimator": "k3"}},
    "dr_grpo": {"aggregation": "fixed-norm", "std": "none"},
}
PPO = {
    # With a value loss the first update alone: it trains our critic's bias, and TRL's critic has none.
    "first update": {"epochs": 1},
    "policy alone": {"value_coef": 0.0},
    "whitened": {"epochs": 1, "whiten_rewards": True},
}


# --- both sides -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Ours:
    return Ours.make(tmp_path_factory.mktemp("peers"))


def interpreter(variable: str) -> str:
    python = os.environ.get(variable)
    if python is None:
        pytest.skip(f"{variable} does not name the Python of an environment with TRL")
    return python


@pytest.fixture(scope="module")
def trl() -> str:
    return interpreter("JAXGPT_TRL_PYTHON")


@pytest.fixture(scope="module")
def trl_ppo() -> str:
    return interpreter("JAXGPT_TRL_PPO_PYTHON")


def theirs(python: str, folder: Path, jobs: dict[str, Job]) -> dict[str, Job]:
    """What TRL finds, by the jobs' names."""
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [python, str(SIDE), str(folder / "jobs.json"), str(folder / "out.json")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment | offline, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(jobs, json.loads((folder / "out.json").read_text()), strict=True))


def job(method: str, optimizer: dict[str, Any], **settings: Any) -> Job:
    """Settings of one of TRL's trainers, by our names."""
    c = OptimizerConfig(**optimizer)
    names = ("lr", "schedule", "weight_decay", "b1", "b2", "eps", "clip")
    return {"method": method, "accumulate": 1, **{name: getattr(c, name) for name in names}, **settings}


def agree(name: str, found: Any, wanted: Any, most: float) -> None:
    """Compares, and tells the largest difference."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    largest = float(np.max(np.abs(found - wanted)))
    print(f"\n{name}: {found.size} numbers of size {np.abs(wanted).mean():.3g}, largest difference {largest:.1e}")
    assert largest <= most, name


# --- methods that learn from files ----------------------------------------------------------------------------------
def dpo_job(ours: Ours, settings: dict[str, Any]) -> Job:
    c = DpoConfig(**settings)
    # TRL's sigmoid has no smoothing; its aot has, and is cDPO where a batch is one pair.
    kind, batch = ("aot", 1) if c.label_smoothing else (c.loss, 4)
    terms = {kind: 1.0} | ({"sft": c.sft_coef} if c.sft_coef else {})
    return job(
        "dpo",
        OPTIMIZER,
        model=ours.exported("sft"),
        rows=ours.drawn("dpo"),
        steps=STEPS,
        batch=batch,
        accumulate=4 // batch,
        beta=c.beta,
        loss_type=list(terms),
        loss_weights=list(terms.values()),
        label_smoothing=c.label_smoothing,
    )


@pytest.fixture(scope="module")
def from_files(trl: str, ours: Ours, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """What TRL finds, by method or by loss of DPO."""
    pairs = {"model": ours.exported("reward"), "rows": ours.drawn("reward"), "batch": 4}
    jobs = {
        "sft": job("sft", OPTIMIZER, model=ours.exported("sft"), rows=ours.drawn("sft"), steps=STEPS, batch=8),
        "reward": job("reward", OPTIMIZER, **pairs, steps=STEPS, centring=None),
        "centred": job("reward", OPTIMIZER, **pairs, steps=1, centring=0.01),
        **{name: dpo_job(ours, settings) for name, settings in DPO.items()},
    }
    return theirs(trl, tmp_path_factory.mktemp("from_files"), jobs)


def test_sft_has_trls_loss_for_twenty_steps(from_files: dict[str, Job], ours: Ours) -> None:
    """Ours packs two conversations a row, TRL pads one: masks, positions and the mean over tokens are the same."""
    losses = [report["loss"] for report in ours.learned("sft", {"init": "sft"}).reports]
    assert losses[-1] < losses[0] - 0.5
    agree("SFT loss", losses, from_files["sft"]["losses"], 1e-4)


def test_reward_models_have_trls_loss_for_twenty_steps(from_files: dict[str, Job], ours: Ours) -> None:
    losses = [report["loss"] for report in ours.learned("reward").reports]
    agree("reward loss", losses, from_files["reward"]["losses"], 1e-4)
    # Only the first: our head has a bias, which centring trains.
    first = ours.learned("reward", {"centring": 0.01}, steps=1).reports[0]["loss"]
    agree("centred reward loss", [first], from_files["centred"]["losses"], 1e-5)


@pytest.mark.parametrize("name", DPO)
def test_dpo_has_trls_loss_for_twenty_steps(from_files: dict[str, Job], ours: Ours, name: str) -> None:
    reports, found = ours.learned("dpo", DPO[name]).reports, from_files[name]
    agree(f"DPO loss, {name}", [report["loss"] for report in reports], found["losses"], 1e-4)
    logs = [line for line in found["logs"] if "rewards/margins" in line]
    for figure in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        if name != "ipo":  # TRL logs sums there, and we what the loss takes, means over tokens
            agree(f"{figure}, {name}", [r[figure] for r in reports], [line[figure] for line in logs], 1e-3)


# --- methods that learn from responses ------------------------------------------------------------------------------
class Episodes(NamedTuple):
    """Both sides' updates on the same responses; the policy that answers has gone on from the reference."""

    reports: list[dict[str, float]]
    """Ours, of every update."""
    advantages: np.ndarray
    """Ours: of every response, or of every token, 0 where there is none."""
    figures: dict[str, float]
    """Ours, of the rollout."""
    lengths: list[int]
    """Tokens of each response."""
    trl: Job
    """What TRL finds."""


def grpo_settings(name: str, settings: dict[str, Any]) -> Job:
    c = GrpoConfig(**settings)
    return {
        "steps": UPDATES,
        "group": GROUP,
        "beta": c.kl.coef,
        "clip_low": c.clip,
        "clip_high": c.clip_high or c.clip,
        "loss_type": name,
        "scale": "none" if c.std == "none" else "group",
    }


@pytest.fixture(scope="module")
def grpo(trl: str, ours: Ours, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Episodes]:
    jobs, own = {}, {}
    for name, settings in GRPO.items():
        learned = ours.learned("grpo", settings, policy="dpo", steps=UPDATES)
        asked, answers = ours.episodes(learned.batch)
        order = sorted(range(len(asked)), key=lambda i: asked[i])  # TRL's groups stand together, ours were shuffled
        prompts, completions = [asked[i] for i in order], [answers[i] for i in order]
        assert all(prompts[n] == prompts[n // GROUP * GROUP] for n in range(len(prompts)))
        jobs[name] = job(
            "grpo",
            STEADY,
            batch=len(prompts),
            model=ours.exported("dpo"),
            reference=ours.exported("sft"),
            prompts=prompts,
            completions=completions,
            rows=ours.data["prompts"][: len(prompts) // GROUP],
            longest=RESPONSE,
            temperature=TEMPERATURE,
            **grpo_settings(name, settings),
        )
        advantages = learned.batch["advantages"][order, 0]  # of a response's first token, as of all
        own[name] = (learned.reports, advantages, learned.figures, list(map(len, completions)))
    found = theirs(trl, tmp_path_factory.mktemp("grpo"), jobs)
    return {name: Episodes(*own[name], found[name]) for name in GRPO}


@pytest.mark.parametrize("name", GRPO)
def test_grpo_has_trls_advantages_and_losses_on_the_same_responses(grpo: dict[str, Episodes], name: str) -> None:
    found = grpo[name]
    assert len(set(found.lengths)) > 2
    agree(f"{name} advantages", found.advantages, found.trl["advantages"], 1e-5)
    losses = [report["loss"] for report in found.reports]
    agree(f"{name} loss, {UPDATES} updates", losses, found.trl["losses"], 1e-4)


@pytest.fixture(scope="module")
def ppo(trl_ppo: str, ours: Ours, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Episodes]:
    """The critic begins as the reward model."""
    jobs, own = {}, {}
    for name, settings in PPO.items():
        c = PpoConfig(**{**PRESET, "epochs": UPDATES, **settings})
        learned = ours.learned("ppo", settings, policy="dpo", steps=c.epochs)
        asked, answers = ours.episodes(learned.batch)
        jobs[name] = job(
            "ppo",
            PPO_OPTIMIZER,
            steps=c.epochs,
            batch=len(asked),
            model=ours.exported("dpo"),
            reference=ours.exported("sft"),
            reward=ours.exported("reward"),
            prompts=asked,
            completions=answers,
            longest=RESPONSE,
            temperature=TEMPERATURE,
            missing_eos=c.missing_eos.value,
            kl_coef=c.kl.coef,
            kl_estimator=c.kl.estimator,
            clip_low=c.clip,
            value_clip=c.value_clip,
            value_coef=c.value_coef,
            gamma=DISCOUNT,
            lam=c.lam,
            whiten_rewards=c.whiten_rewards,
        )
        advantages = learned.batch["advantages"] * learned.batch["mask"]
        own[name] = (learned.reports, advantages, learned.figures, list(map(len, answers)))
    found = theirs(trl_ppo, tmp_path_factory.mktemp("ppo"), jobs)
    return {name: Episodes(*own[name], found[name]) for name in PPO}


@pytest.mark.parametrize("name", PPO)
def test_ppo_has_trls_advantages_and_losses_on_the_same_responses(ppo: dict[str, Episodes], name: str) -> None:
    found = ppo[name]
    ended = [length < RESPONSE for length in found.lengths]
    assert any(ended) and not all(ended)
    agree(f"PPO advantages, {name}", found.advantages, found.trl["advantages"], 1e-4)
    agree(f"PPO loss, {name}", [report["loss"] for report in found.reports], found.trl["losses"], 1e-4)
    logs = found.trl["logs"][0]
    for figure in ("objective/kl", "objective/scores", "objective/non_score_reward", "objective/rlhf_reward"):
        agree(f"{figure}, {name}", [found.figures[figure]], [logs[figure]], 1e-4)
    if len(found.reports) == 1:  # TRL logs means over the updates of a rollout
        for figure in ("loss/policy_avg", "loss/value_avg", "val/ratio"):
            agree(f"{figure}, {name}", [found.reports[0][figure]], [logs[figure]], 1e-4)
