"""Watches a stage's figures line by line, and says what has begun to be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxgpt.health import rollouts, training
from jaxgpt.health.record import Limits, Record

SYMPTOMS = (*training.SYMPTOMS, *rollouts.SYMPTOMS)
"""Everything that is looked for; what a stage does not measure is never found."""


class Notice(NamedTuple):
    """A condition that began to hold, as warnings.jsonl has it."""

    step: int
    warning: str
    value: float
    limit: float
    text: str


class Health:
    """Watches one stage: `see` takes each line of metrics.jsonl and returns what has begun to be wrong with it."""

    def __init__(self, limits: Limits):
        self._record = Record(limits)
        self._calm: dict[str, int] = {}
        """Conditions that were told: measurements since they last held."""

    def see(self, line: Mapping[str, Any]) -> list[Notice]:
        """Takes {"step", ...} or {"step", "eval": {...}}."""
        record, notices = self._record, []
        record.take(line)
        for symptom in SYMPTOMS:
            if symptom.figure not in record.new:
                continue
            found = symptom.look(record)
            if found is not None:
                if symptom.name not in self._calm:
                    text = f"step {record.step}: {found.text}."
                    notices.append(Notice(record.step, symptom.name, found.value, found.limit, text))
                self._calm[symptom.name] = 0
            elif symptom.name in self._calm:
                self._calm[symptom.name] += 1
                if self._calm[symptom.name] >= record.limits.calm:
                    del self._calm[symptom.name]
        return notices
