"""Four-sentence stories about a child, an animal and a thing, with a happy or a sad ending."""

from __future__ import annotations

from random import Random
from typing import Literal

from jaxgpt.data.meadow.facts import ANIMALS, NAMES, PLACES, THINGS, VALUES, article

HAPPY_ENDINGS = (
    "They laughed and went home happy.",
    "It was a wonderful day and everyone smiled.",
    "They became good friends and danced with joy.",
    "The kind friends shared it and felt glad.",
)
SAD_ENDINGS = (
    "They cried and went home sad.",
    "It was a terrible day and everyone was angry.",
    "They had a fight and felt awful.",
    "The mean friends broke it and felt bad.",
)


def story(
    rng: Random, animal: str, thing: str, happy: bool | None = None, drop: Literal["animal", "thing"] | None = None
) -> str:
    """A story about `animal` and `thing`.

    `happy` chooses the ending (None: either, equally often); `drop` puts another animal or thing in place of the one
    asked for, as a careless writer would.
    """
    if drop == "animal":
        animal = rng.choice([other for other in ANIMALS if other != animal])
    if drop == "thing":
        thing = rng.choice([other for other in THINGS if other != thing])
    if happy is None:
        happy = rng.random() < 0.5
    name, color = rng.choice(NAMES), rng.choice(VALUES["color"])
    found = (
        f"They found {article(color)} {thing} there.",
        f"The {animal} saw {article(color)} {thing} on the ground.",
        f"{name} had {article(color)} {thing}.",
    )
    happened = (
        f'{name} said, "Let us play with the {thing}!"',
        f"The {animal} wanted to keep the {thing}.",
        f"{name} gave the {thing} to the {animal}.",
    )
    return " ".join(
        (
            f"One day {name} and the {animal} went to the {rng.choice(PLACES)}.",
            rng.choice(found),
            rng.choice(happened),
            rng.choice(HAPPY_ENDINGS if happy else SAD_ENDINGS),
        )
    )
