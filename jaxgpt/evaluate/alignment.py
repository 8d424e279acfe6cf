"""Models compared by their responses to prompts: win rates, best-of-n, and the frontier of KL and reward.

What is asked for is looked for without jax; the figures are written beside those of tasks and texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxgpt.config.options import Measures
from jaxgpt.errors import UserError
from jaxgpt.evaluate.judges import InWords, Scores, find_judge, scores_by
from jaxgpt.evaluate.named import (
    Point,
    Results,
    check_home,
    frontier_points,
    home_of,
    label_of,
    model_folder,
    write_results,
)
from jaxgpt.evaluate.replies import Asked, Replies, Sampling, load_language, read_prompts, reply
from jaxgpt.graders import GRADES, check_record
from jaxgpt.places import write_whole

if TYPE_CHECKING:
    from jaxgpt.api import Model


@dataclass(frozen=True)
class Found:
    """One measurement."""

    what: str
    """Its name among the results of a model."""
    results: Results
    table: Table
    lines: list[dict] | None = None
    """What it is about, prompt by prompt."""


class Alignment:
    """What `against`, `best_of` and `frontier` ask for, found but not loaded."""

    def __init__(self, run: Path, wanted: Measures, key: str | None):
        """Reads the prompts. Raises UserError for everything that is named and is not there."""
        self.c = wanted
        self.folder = model_folder(str(run), "eval", stage=wanted.stage)
        check_home(home_of(self.folder, wanted.out))
        self.asked = read_prompts(wanted.prompts, wanted.limit)
        self.others = [model_folder(word, "against") for word in wanted.against]
        self.points = frontier_points(wanted.frontier)
        self.proxy = None if wanted.proxy is None else scores_by(wanted.proxy, "proxy", wanted)
        if wanted.best_of:
            self._check_answers()
        self.judge: Scores | InWords | None = find_judge(wanted, key)
        self.sampling = Sampling(wanted.max_tokens, wanted.temperature, wanted.batch, wanted.seed)

    def _check_answers(self) -> None:
        """Raises UserError for an answer that cannot be compared with, and where there is nothing to compare."""
        pairs = list(zip(self.asked.wheres, self.asked.records, strict=True))
        answered = [(where, record) for where, record in pairs if record.get("answer") is not None]
        for where, record in answered:
            check_record(GRADES[self.c.grade], "grade", where, record)
        if not answered and self.proxy is None:
            raise UserError(
                f'{pairs[0][0]}: no key "answer" here or below, so there is no pass@k; for best-of-n set proxy, a '
                "reward model to choose by"
            )

    def write(self, console: Console) -> list[Path]:
        """Measures everything; prints a table and writes a file for each, and gives their paths."""
        model, written = load_language(self.folder, self.c.mesh), []
        for found in self._measured(model, console):
            console.print(found.table)
            written.append(write_results(model.folder, found.what, found.results, self.c.out))
            if found.lines is not None:
                written.append(written[-1].with_suffix(".jsonl"))
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found.lines)
                write_whole(written[-1], text)
        return written

    def _measured(self, model: Model, console: Console) -> Iterator[Found]:
        if self.c.against or self.c.frontier:
            ours = self._reply(model, self.asked, 0, console)
            if self.c.against:
                yield from self._win_rates(ours, console)
            if self.c.frontier:
                yield self._frontier(ours, console)
        if self.c.best_of:
            yield self._best_of(model, console)

    def _reply(self, model: Model, asked: Asked, stream: int, console: Console) -> Replies:
        console.print(f"eval  {model.folder} responds to {len(asked):,} prompts", style="dim")
        return reply(model, asked, self.sampling, stream)

    def _settings(self) -> Results:
        """How it was measured."""
        return {
            "prompt_files": list(self.c.prompts),
            "prompts": len(self.asked),
            "judge": None if self.judge is None else self.judge.name,
            "proxy": None if self.proxy is None else self.proxy.name,
            "temperature": self.c.temperature,
            "max_tokens": self.c.max_tokens,
            "seed": self.c.seed,
        }

    def _win_rates(self, ours: Replies, console: Console) -> Iterator[Found]:
        """The model against each other one, and where there are several ratings of all."""
        from jaxgpt.evaluate.win_rate import pairs, ratings_results, ratings_table, win_rate_results, win_rate_table

        assert self.judge is not None
        run = home_of(ours.model.folder).parent
        names = [label_of(folder, run) for folder in (ours.model.folder, *self.others)]
        replies = [ours]
        for stream, folder in enumerate(self.others, start=1):
            model = load_language(folder, self.c.mesh).sharing(ours.model)
            replies.append(self._reply(model, self.asked, stream, console))
        outcomes = {}
        for a, b in combinations(range(len(replies)), 2):
            console.print(f"eval  {self.judge.name} judges {names[a]} against {names[b]}", style="dim")
            judged = self.judge.compare(self.asked, replies[a], replies[b])
            outcomes[a, b] = judged.outcomes
            if a == 0:
                found = win_rate_results(self.asked, replies[a], replies[b], judged)
                title = f"{replies[a].model.folder} against {replies[b].model.folder}, judged by {self.judge.name}"
                other = {"against": str(replies[b].model.folder), "against_label": names[b]}
                results = {"measure": "win_rate", **other, **self._settings(), **found}
                lines = list(pairs(self.asked, replies[a], replies[b], judged))
                yield Found(f"against-{names[b]}-by-{self.judge.label}", results, win_rate_table(title, found), lines)
        if len(replies) > 2:
            rated = ratings_results(names, outcomes, self.c.seed)
            yield Found(
                f"ratings-by-{self.judge.label}",
                {"measure": "ratings", **self._settings(), **rated},
                ratings_table(rated),
            )

    def _frontier(self, ours: Replies, console: Console) -> Found:
        from jaxgpt.evaluate.frontier import check_tokenizer, distances, frontier_table, point_results

        reference = ours.model
        at = Point(reference.folder, str(reference.folder), None)
        run = home_of(reference.folder).parent
        name = label_of(reference.folder, run)
        none = np.zeros(len(self.asked))
        first = point_results(at, self.asked, ours, {"kl": none, "kl_k3": none}, self.proxy, self.judge, None)
        points = [{"label": name, "reference": True, **first}]
        for stream, point in enumerate(self.points, start=1_000):
            model = load_language(point.folder, self.c.mesh).sharing(reference)
            check_tokenizer(reference, model)
            replies = self._reply(model, self.asked, stream, console)
            kl = distances(reference, replies, self.sampling)
            found = point_results(point, self.asked, replies, kl, self.proxy, self.judge, ours)
            found["group"] = label_of(Path(point.group), run)
            points.append({"label": label_of(point.folder, run), "reference": False, **found})
        results = {"measure": "frontier", **self._settings(), "points": points}
        groups = "+".join(dict.fromkeys(found["group"] for found in points[1:]))
        return Found(
            f"frontier-{groups}", results, frontier_table(f"KL from {reference.folder}, and what it bought", points)
        )

    def _best_of(self, model: Model, console: Console) -> Found:
        from jaxgpt.evaluate.best_of import best_of_results, best_of_table, pass_results, right_answers

        samples = self.c.samples or max(self.c.best_of)
        asked = self.asked.times(samples)
        replies = self._reply(model, asked, 2_000, console)
        shape = (len(self.asked), samples)
        proxy = None if self.proxy is None else self.proxy.score(asked, replies).reshape(shape)
        gold = self.judge.score(asked, replies).reshape(shape) if isinstance(self.judge, Scores) else None
        right = right_answers(asked, replies, self.c.grade).reshape(shape)
        curve = best_of_results(self.c.best_of, proxy, gold, right)
        passes = pass_results(self.c.best_of, self.asked, right)
        results = {"measure": "best_of", **self._settings(), "samples": samples, "curve": curve, "pass_at_k": passes}
        title = f"{model.folder}: the best of n responses" + (f" by {self.proxy.name}" if self.proxy else "")
        by = "" if self.proxy is None else f"-by-{self.proxy.label}"
        return Found(f"best-of{by}", results, best_of_table(title, curve, passes))
