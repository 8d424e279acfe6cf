"""Who says what a response is worth: a function, a reward model, or a server that compares two.

What a setting names is looked for without jax; a reward model is loaded when it is first asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config.options import Measures
from jaxgpt.errors import UserError
from jaxgpt.evaluate.judge_server import JudgeServer, Question, Verdict
from jaxgpt.evaluate.named import ELSEWHERE, label_of, model_folder
from jaxgpt.evaluate.replies import Asked, Replies
from jaxgpt.graders import load_scorer
from jaxgpt.runs import is_foreign

WORTH: dict[Verdict, float] = {"first": 1.0, "second": 0.0, "tie": 0.5, "unreadable": 0.5}


class Judged(NamedTuple):
    """What a judge said of two models' responses to M prompts."""

    outcomes: np.ndarray
    """1 where the first model's is better, 0 where the second's is, 0.5 for a tie, [M]."""
    scores: tuple[np.ndarray, np.ndarray] | None = None
    """Of either model, [M], where the judge gives scores."""
    asked_twice: dict[str, Any] | None = None
    """Of a judge that was asked in both orders: comparisons, how many flipped, how many replies had no verdict, and
    the share of verdicts for a response that chose the one shown first."""


class Scores:
    """A judge that gives every response a score."""

    def __init__(self, name: str, label: str, score: Callable[[Asked, Replies], np.ndarray]):
        """`score` gives [M] for a response to each prompt; `label` stands in names of files."""
        self.name, self.label, self.score = name, label, score

    def compare(self, asked: Asked, ours: Replies, theirs: Replies) -> Judged:
        """The higher score is better; the same words are a tie, whatever a score's last digit says."""
        from jaxgpt.evaluate.answers import outcomes

        scores = self.score(asked, ours), self.score(asked, theirs)
        same = np.array([a == b for a, b in zip(ours.texts, theirs.texts, strict=True)])
        return Judged(np.where(same, 0.5, outcomes(*scores)), scores)


class InWords:
    """A judge that compares two responses, asked in both orders: what it does not say twice is a tie."""

    def __init__(self, server: JudgeServer):
        self.server, self.name, self.label = server, f"{server.model} at {server.base}", str(server.model)

    def compare(self, asked: Asked, ours: Replies, theirs: Replies) -> Judged:
        """Raises UserError where the server gives no verdict at all."""
        pairs = list(zip(ours.texts, theirs.texts, strict=True))
        differ = [i for i, (a, b) in enumerate(pairs) if a != b]
        questions = []
        for i in differ:
            answer = asked.records[i].get("answer")
            known = None if answer is None else str(answer)
            (a, b), messages = pairs[i], asked.messages[i]
            questions += [Question(messages, a, b, known), Question(messages, b, a, known)]
        verdicts = list(self.server.verdicts(questions))
        told, found = Counter(verdicts), np.full(len(asked), 0.5)
        if verdicts and told["unreadable"] == len(verdicts):
            raise UserError(
                f"judge: none of {len(verdicts)} replies of {self.name} has a verdict, [[A]], [[B]] or [[C]]; "
                "a larger model may follow the instruction"
            )
        flipped = 0
        for i, straight, swapped in zip(differ, verdicts[::2], verdicts[1::2], strict=True):
            one, other = WORTH[straight], 1.0 - WORTH[swapped]
            flipped += one != other and "unreadable" not in (straight, swapped)
            found[i] = one if one == other else 0.5
        decided = told["first"] + told["second"]
        return Judged(
            found,
            asked_twice={
                "compared": len(differ),
                "flipped": flipped,
                "unreadable": told["unreadable"],
                "first_share": told["first"] / decided if decided else None,
            },
        )


def scores_by(word: str, setting: str, wanted: Measures) -> Scores:
    """The judge behind module:function, a folder, or hf:FOLDER. Raises UserError where there is none."""
    named = ":" in word and not is_foreign(word) and not Path(word).expanduser().exists()
    if named:
        scorer = load_scorer(word, setting)
        return Scores(
            word,
            word.rpartition(":")[2],
            lambda asked, replies: np.array(
                [float(scorer(record, text)) for record, text in zip(asked.records, replies.texts, strict=True)]
            ),
        )
    try:
        folder = model_folder(word, setting, "scalar")
    except UserError as error:
        if is_foreign(word) or Path(word).expanduser().exists():
            raise
        raise UserError(f"{error} Expected module:function, the folder of a reward model, or hf:FOLDER") from error
    return _by_model(folder, setting, wanted)


def _by_model(folder: Path, setting: str, wanted: Measures) -> Scores:
    @cache
    def loaded() -> Any:
        from jaxgpt.api import load

        model = load(folder, mesh=wanted.mesh)
        if model.kind != "scalar":
            raise UserError(f"{setting}: {folder} holds a language model, expected a reward model")
        return model

    def score(asked: Asked, replies: Replies) -> np.ndarray:
        from jaxgpt.evaluate.answers import rewards

        model = loaded()
        if model.tokenizer.hash == replies.model.tokenizer.hash:  # the very tokens that were sampled
            return rewards(model, replies.answers, wanted.batch).astype(np.float64)
        talks = [
            [*messages, {"role": "assistant", "content": text}]
            for messages, text in zip(asked.messages, replies.texts, strict=True)
        ]
        parts = [model.score(talks[at : at + wanted.batch]) for at in range(0, len(talks), wanted.batch)]
        return np.concatenate(parts).astype(np.float64)

    return Scores(str(folder), label_of(folder, ELSEWHERE), score)


def find_judge(wanted: Measures, key: str | None) -> Scores | InWords | None:
    """The judge that is asked for; `key` is the server's. A server is asked whether it is there.

    Raises UserError where there is no such judge.
    """
    if wanted.judge is None:
        return None
    if not wanted.asks_server:
        return scores_by(wanted.judge, "judge", wanted)
    if wanted.judge_key is not None and not key:
        raise UserError(f"judge_key: the environment has no variable {wanted.judge_key}")
    server = JudgeServer(wanted.judge, wanted.judge_model, key, wanted.judge_timeout, wanted.judge_parallel)
    server.check()
    return InWords(server)
