"""Our stages against TRL's trainers: the same tiny LLaMA through our export, the same files, order and settings.

Needs environments of their own (Python 3.11):
    python -m venv trl && trl/bin/pip install torch==2.13.0 && trl/bin/pip install trl==1.16
    python -m venv trl-ppo && trl-ppo/bin/pip install torch==2.13.0 && trl-ppo/bin/pip install trl==1.9.2
JAXGPT_TRL_PYTHON and JAXGPT_TRL_PPO_PYTHON name their interpreters; 1.9.2 is for PPO, which later ones do not have.
`pytest -m peers tests/peers/test_trl.py -s` prints the largest differences.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from our_side import DISCOUNT, OPTIMIZER, PPO_OPTIMIZER, PRESET, STEADY, STEPS, UPDATES, Ours

pytestmark = pytest.mark.peers
SIDE = Path(__file__).with_name("trl_side.py")
PROMPT = 32
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


def theirs(python: str, folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What TRL finds."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [python, str(SIDE), str(folder / "jobs.json"), str(folder / "out.json")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment | offline, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "out.json").read_text())


def job(method: str, optimizer: dict[str, Any], **more: Any) -> dict[str, Any]:
    keys = {
        "lr": 0.0,
        "schedule": "",
        "weight_decay": 0.0,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "clip": 1.0,
        "accumulate": 1,
    }
    return {"method": method, **{key: optimizer.get(key, value) for key, value in keys.items()}, **more}


def agree(name: str, found: Any, wanted: Any, most: float) -> None:
    """Compares, and tells the largest difference."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    largest = float(np.max(np.abs(found - wanted)))
    print(f"\n{name}: {found.size} numbers of size {np.abs(wanted).mean():.3g}, largest difference {largest:.1e}")
    assert largest <= most, name


@pytest.fixture(scope="module")
def files(trl: str, ours: Ours, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """TRL on the methods that learn from files."""
    rows = {"steps": STEPS, "batch": 4}
    jobs = {
        "sft": job(
            "sft", OPTIMIZER, model=ours.exported("sft"), rows=ours.drawn("sft"), **rows | {"batch": 8}
        ),
        "reward": job(
            "reward", OPTIMIZER, model=ours.exported("reward"), rows=ours.drawn("reward"), centring=None, **rows
        ),
        "centred": job(
            "reward", OPTIMIZER, model=ours.exported("reward"), rows=ours.drawn("reward"), centring=0.01,
            **rows | {"steps": 1},
        ),
    }  # fmt: skip
    for name, settings in DPO.items():
        coef, smoothing = settings.get("sft_coef", 0.0), settings.get("label_smoothing", 0.0)
        # TRL's sigmoid has no smoothing; its aot has, and is cDPO where a batch is one pair
        kind, parts = ("aot", {"batch": 1, "accumulate": 4}) if smoothing else (settings.get("loss", "sigmoid"), {})
        jobs[name] = job(
            "dpo", OPTIMIZER, model=ours.exported("sft"), rows=ours.drawn("dpo"), beta=settings.get("beta", 0.1),
            loss_type=[kind, *(["sft"] if coef else [])], loss_weights=[1.0, *([coef] if coef else [])],
            label_smoothing=smoothing, **rows | parts,
        )  # fmt: skip
    found = theirs(trl, tmp_path_factory.mktemp("files"), list(jobs.values()))
    return dict(zip(jobs, found, strict=True))


def test_sft_has_trls_loss_for_twenty_steps(files: dict[str, dict[str, Any]], ours: Ours) -> None:
    """Ours packs two conversations a row, TRL pads one: masks, positions and the mean over tokens are the same."""
    with jax.set_mesh(ours.mesh):
        reports, _ = ours.learned(ours.stage("sft", init="sft"))
    losses = [report["loss"] for report in reports]
    assert losses[-1] < losses[0] - 0.5
    agree("SFT loss", losses, files["sft"]["losses"], 1e-4)


def test_reward_models_have_trls_loss_for_twenty_steps(files: dict[str, dict[str, Any]], ours: Ours) -> None:
    with jax.set_mesh(ours.mesh):
        reports, _ = ours.learned(ours.stage("reward"))
        centred, _ = ours.learned(ours.stage("reward", centring=0.01), steps=1)
    agree("reward loss", [report["loss"] for report in reports], files["reward"]["losses"], 1e-4)
    # only the first: our head has a bias, which centring trains
    agree("centred reward loss", [centred[0]["loss"]], files["centred"]["losses"], 1e-5)


@pytest.mark.parametrize("name", DPO)
def test_dpo_has_trls_loss_for_twenty_steps(files: dict[str, dict[str, Any]], ours: Ours, name: str) -> None:
    with jax.set_mesh(ours.mesh):
        reports, _ = ours.learned(ours.stage("dpo", **DPO[name]))
    losses = [report["loss"] for report in reports]
    agree(f"DPO loss, {name}", losses, files[name]["losses"], 1e-4)
    logs = [line for line in files[name]["logs"] if "rewards/margins" in line]
    for figure in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        if name != "ipo":  # TRL logs sums there, and we what the loss takes, means over tokens
            agree(f"{figure}, {name}", [r[figure] for r in reports], [line[figure] for line in logs], 1e-3)


@pytest.fixture(scope="module")
def grpo(trl: str, ours: Ours, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both sides' losses and advantages of GRPO's variants: several updates on the same responses."""
    jobs, own = [], []
    for name, settings in GRPO.items():
        with jax.set_mesh(ours.mesh):
            reports, (batch, _) = ours.learned(ours.stage("grpo", **settings), policy="dpo", steps=UPDATES)
        asked, answers = ours.episodes(batch, PROMPT)
        order = sorted(range(16), key=lambda i: asked[i])
        groups = [asked[i] for i in order]
        assert all(groups[n] == groups[n // 4 * 4] for n in range(16)) and len({tuple(g) for g in groups}) == 4
        own.append(([report["loss"] for report in reports], batch["advantages"].max(axis=1, where=batch["mask"] > 0,
                    initial=-np.inf)[order], answers))  # fmt: skip
        jobs.append(job(
            "grpo", STEADY, steps=UPDATES, batch=16, model=ours.exported("dpo"), reference=ours.exported("sft"),
            prompts=groups, completions=[answers[i] for i in order], rows=ours.data["prompts"][:4], group=4,
            longest=12, temperature=0.9, beta=settings.get("kl", {"coef": 0.04})["coef"], clip_low=0.2,
            clip_high=settings.get("clip_high", 0.2), loss_type=name,
            scale="none" if settings.get("std") == "none" else "group",
        ))  # fmt: skip
    found = theirs(trl, tmp_path_factory.mktemp("grpo"), jobs)
    return {name: (*mine, other) for name, mine, other in zip(GRPO, own, found, strict=True)}


@pytest.mark.parametrize("name", GRPO)
def test_grpo_has_trls_advantages_and_losses_on_the_same_responses(grpo: dict[str, Any], name: str) -> None:
    losses, advantages, answers, other = grpo[name]
    assert len({len(answer) for answer in answers}) > 2
    agree(f"{name} advantages", advantages, other["advantages"], 1e-5)
    agree(f"{name} loss, {UPDATES} updates", losses, other["losses"], 1e-4)


PPO = {
    "first update": {"epochs": 1},
    "policy alone": {"value_coef": 0.0},
    "whitened": {"epochs": 1, "whiten_rewards": True},
}


@pytest.fixture(scope="module")
def ppo(trl_ppo: str, ours: Ours, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both sides of PPO: the policy has gone on from the reference, critic and reward model begin as one."""
    jobs, own = [], []
    for settings in PPO.values():
        updates = settings.get("epochs", UPDATES)
        with jax.set_mesh(ours.mesh):
            reports, (batch, figures) = ours.learned(ours.stage("ppo", **settings), policy="dpo", steps=updates)
        asked, answers = ours.episodes(batch, PROMPT)
        own.append((reports, batch, {key: float(value) for key, value in figures.items()}, answers))
        jobs.append(job(
            "ppo", PPO_OPTIMIZER, steps=updates, batch=16, model=ours.exported("dpo"), reference=ours.exported("sft"),
            reward=ours.exported("reward"), prompts=asked, completions=answers, longest=12, temperature=0.9,
            missing_eos=PRESET["missing_eos"]["value"], kl_coef=PRESET["kl"]["coef"], kl_estimator="k1",
            clip_low=PRESET["clip"], value_clip=PRESET["value_clip"],
            value_coef=settings.get("value_coef", PRESET["value_coef"]), gamma=DISCOUNT, lam=PRESET["lam"],
            whiten_rewards=settings.get("whiten_rewards", False),
        ))  # fmt: skip
    found = theirs(trl_ppo, tmp_path_factory.mktemp("ppo"), jobs)
    return {name: (*mine, other) for name, mine, other in zip(PPO, own, found, strict=True)}


@pytest.mark.parametrize("name", PPO)
def test_ppo_has_trls_advantages_and_losses_on_the_same_responses(ppo: dict[str, Any], name: str) -> None:
    reports, batch, figures, answers, other = ppo[name]
    ended = [len(answer) < 12 for answer in answers]
    assert any(ended) and not all(ended)
    agree(f"PPO advantages, {name}", batch["advantages"] * batch["mask"], other["advantages"], 1e-4)
    agree(f"PPO loss, {name}", [report["loss"] for report in reports], other["losses"], 1e-4)
    logs = other["logs"][0]
    for figure in ("kl", "scores", "non_score_reward", "rlhf_reward"):
        agree(f"objective/{figure}", [figures[f"objective/{figure}"]], [logs[f"objective/{figure}"]], 1e-4)
    if len(reports) == 1:
        for figure in ("loss/policy_avg", "loss/value_avg", "val/ratio"):
            agree(figure, [reports[0][figure]], [logs[figure]], 1e-4)
