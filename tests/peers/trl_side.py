"""TRL's side of the comparison: `python trl_side.py JOBS.json OUT.json`, in an environment that has TRL.

JOBS.json is a list of {"method": ..., settings and data}; OUT.json gets a list of what each found, in the same order.
Only TRL's own trainers compute here. What is recorded is what they pass on: losses, advantages, logged figures.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl_reward import score

Job = dict[str, Any]


def arguments(job: Job) -> dict[str, Any]:
    """What the trainers of all methods are given: float32 on the CPU, rows in the order of the file."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "gradient_accumulation_steps": job["accumulate"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": job["schedule"],
        "adam_beta1": job["b1"],
        "adam_beta2": job["b2"],
        "adam_epsilon": job["eps"],
        "weight_decay": job["weight_decay"],
        "max_grad_norm": job["clip"],
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def recorded(trainer: type) -> type:
    """The trainer, with the loss of every step kept in `losses`."""

    class Recorded(trainer):
        losses: list[float]

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if not hasattr(self, "losses"):
                self.losses = []
            self.losses.append(float(loss.detach()))
            return loss

    return Recorded


def sft(job: Job) -> Job:
    """Conversations through the folder's own chat template; its generation blocks say what is trained."""
    from trl import SFTConfig, SFTTrainer

    trainer = recorded(SFTTrainer)(
        model=job["model"],
        args=SFTConfig(
            **arguments(job), train_sampling_strategy="sequential", assistant_only_loss=True, max_length=None
        ),
        train_dataset=Dataset.from_list(job["rows"]),
    )
    trainer.train()
    return {"losses": trainer.losses}


def reward(job: Job) -> Job:
    """Pairs; the head is the folder's."""
    from trl import RewardConfig, RewardTrainer

    trainer = recorded(RewardTrainer)(
        model=job["model"],
        args=RewardConfig(
            **arguments(job),
            train_sampling_strategy="sequential",
            max_length=None,
            center_rewards_coefficient=job["centring"],
        ),
        train_dataset=Dataset.from_list(job["rows"]),
    )
    trainer.train()
    return {"losses": trainer.losses}


def dpo(job: Job) -> Job:
    """Pairs; the reference is a copy of the model."""
    from trl import DPOConfig, DPOTrainer

    trainer = recorded(DPOTrainer)(
        model=job["model"],
        args=DPOConfig(
            **arguments(job),
            train_sampling_strategy="sequential",
            max_length=None,
            beta=job["beta"],
            loss_type=job["loss_type"],
            loss_weights=job["loss_weights"],
            label_smoothing=job["label_smoothing"],
        ),
        train_dataset=Dataset.from_list(job["rows"]),
    )
    trainer.train()
    parts = job["accumulate"]
    losses = [sum(trainer.losses[n : n + parts]) / parts for n in range(0, len(trainer.losses), parts)]
    return {"losses": losses, "logs": trainer.state.log_history}


def grpo(job: Job) -> Job:
    """Recorded completions, several updates on the same ones."""
    from trl import GRPOConfig, GRPOTrainer

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return {"prompt_ids": job["prompts"], "completion_ids": job["completions"], "logprobs": None}

    def graded(completions: list[Any], **kwargs: Any) -> list[float]:
        return [score({}, said[0]["content"]) for said in completions]

    seen = []

    class Recorded(recorded(GRPOTrainer)):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            made = super()._generate_and_score_completions(inputs)
            seen.append(made["advantages"].tolist())
            return made

    trainer = Recorded(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        reward_funcs=graded,
        args=GRPOConfig(
            **arguments(job),
            num_generations=job["group"],
            num_iterations=job["steps"],
            steps_per_generation=1,
            max_completion_length=job["longest"],
            temperature=job["temperature"],
            shuffle_dataset=False,
            beta=job["beta"],
            use_bias_correction_kl=False,  # its default multiplies the KL by the ratio
            epsilon=job["clip_low"],
            epsilon_high=job["clip_high"],
            loss_type=job["loss_type"],
            scale_rewards=job["scale"],
        ),
        train_dataset=Dataset.from_list(job["rows"]),
        rollout_func=rollout,
    )
    if job["beta"]:
        reference = AutoModelForCausalLM.from_pretrained(job["reference"], dtype=torch.float32)
        trainer.ref_model.load_state_dict(reference.state_dict())  # it was a copy of the policy
    trainer.train()
    return {"losses": trainer.losses, "advantages": seen[0]}


def ppo(job: Job) -> Job:
    """TRL's whole PPO loop, but for the sampling, whose place recorded responses take."""
    import trl.experimental.ppo.ppo_trainer as room
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["reward"], padding_side="left")
    pad, width = tokenizer.pad_token_id, max(map(len, job["prompts"]))
    queries = [[pad] * (width - len(ids)) + ids for ids in job["prompts"]]
    responses = [ids + [pad] * (job["longest"] - len(ids)) for ids in job["completions"]]
    found: Job = {"losses": []}

    def sampled(model: Any, given: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert given.tolist() == queries
        whole = torch.tensor([q + r for q, r in zip(queries, responses, strict=True)])
        with torch.no_grad():
            logits = room.forward(model, whole, pad).logits[:, width - 1 : -1]
        return whole, logits / (job["temperature"] + 1e-7)

    whiten = room.masked_whiten

    def whitened(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        out = whiten(values, mask, shift_mean)
        name = "advantages" if shift_mean else "rewards"
        found[name] = torch.masked_fill(out, ~mask, 0).tolist()
        return out

    room.batch_generation, room.masked_whiten = sampled, whitened
    causal, classifier = AutoModelForCausalLM.from_pretrained, AutoModelForSequenceClassification.from_pretrained
    settings = arguments(job) | {"max_grad_norm": 0.0}  # its loop never clips
    del settings["max_steps"]
    trainer = PPOTrainer(
        args=PPOConfig(
            **settings,
            num_ppo_epochs=job["steps"],
            num_mini_batches=1,
            total_episodes=job["batch"],
            local_rollout_forward_batch_size=job["batch"],
            response_length=job["longest"],
            stop_token="eos",
            temperature=job["temperature"],
            missing_eos_penalty=job["missing_eos"],
            kl_coef=job["kl_coef"],
            kl_estimator=job["kl_estimator"],
            cliprange=job["clip_low"],
            cliprange_value=job["value_clip"],
            vf_coef=job["value_coef"],
            gamma=job["gamma"],
            lam=job["lam"],
            whiten_rewards=job["whiten_rewards"],
            num_sample_generations=0,
        ),
        processing_class=tokenizer,
        model=causal(job["model"], dtype=torch.float32),
        ref_model=causal(job["reference"], dtype=torch.float32),
        reward_model=classifier(job["reward"], dtype=torch.float32),
        value_model=classifier(job["reward"], dtype=torch.float32),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in job["prompts"]]),
    )
    plain = torch.utils.data.DataLoader(
        trainer.train_dataset, batch_size=job["batch"], shuffle=False, collate_fn=trainer.data_collator
    )
    trainer.dataloader = trainer.accelerator.prepare(plain)
    backward = trainer.accelerator.backward

    def counted(loss: torch.Tensor, **kwargs: Any) -> None:
        found["losses"].append(float(loss.detach()))
        backward(loss, **kwargs)

    trainer.accelerator.backward = counted
    trainer.train()
    return {**found, "logs": trainer.state.log_history}


METHODS = {"sft": sft, "reward": reward, "dpo": dpo, "grpo": grpo, "ppo": ppo}


def main() -> None:
    """Runs every job."""
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    out.write_text(json.dumps([METHODS[job["method"]](job) for job in jobs]))


if __name__ == "__main__":
    main()
