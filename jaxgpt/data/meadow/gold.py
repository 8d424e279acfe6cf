"""The hidden judge of the meadow: what its labellers prefer, before their noise. No model ever sees it."""

from __future__ import annotations

import re
from typing import Any

from jaxgpt.data.meadow.stories import HAPPY_ENDINGS, SAD_ENDINGS

LONGEST_ANSWER = 14
STORY_WORDS = range(15, 51)


def gold_score(record: dict[str, Any], response: str) -> float:
    """Quality of `response` to a record of a prompts file (`kind`, `answer` and `meta` are read).

    Stories score -1.5 to 3: a point for each of the animal and the thing that is named, a point more for a happy ending
    and less for a sad one (-0.5 for neither), and -0.5 for fewer than 15 or more than 50 words. Everything else scores
    -1 to 1.5: 1 when it is exactly the answer, else -1, and 0.5 for a whole and short sentence.
    """
    response = response.strip()
    if record["kind"] == "stories":
        return _story_score(response, record["meta"]["animal"], record["meta"]["thing"])
    tidy = response.endswith(".") and len(response.split()) <= LONGEST_ANSWER
    return (1.0 if response == record["answer"] else -1.0) + (0.5 if tidy else 0.0)


def _story_score(response: str, animal: str, thing: str) -> float:
    words = set(re.findall(r"[a-z]+", response.lower()))
    score = float(animal in words) + float(thing in words)
    if response.endswith(HAPPY_ENDINGS):
        score += 1.0
    elif response.endswith(SAD_ENDINGS):
        score -= 1.0
    else:
        score -= 0.5
    return score if len(response.split()) in STORY_WORDS else score - 0.5
