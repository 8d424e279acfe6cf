"""What is true in the meadow: sixteen animals with four facts each, and the words that everything is told with.

The facts are always the same, whatever the seed, and differ from those of our world, so that a model can only know
them from the meadow's texts.
"""

from __future__ import annotations

NAMES = ("Tom", "Mia", "Ben", "Ana", "Leo", "Zoe", "Sam", "Eva", "Max", "Lily")
THINGS = ("ball", "lamp", "kite", "drum", "boat", "book", "hat", "bell", "cup", "rope", "shell", "coin")
PLACES = ("park", "house", "school", "market", "beach", "bridge", "tower", "farm")
UNKNOWN_ANIMALS = ("zorb", "blick", "wumpus", "dax", "fendle", "grobe")

ATTRIBUTES = ("color", "home", "food", "sound")
_TABLE = """
fox    red     forest  berries  yelp
owl    gray    barn    nuts     hoot
bear   brown   cave    honey    growl
frog   green   pond    leaves   croak
duck   blue    river   corn     quack
wolf   black   hill    fish     howl
mouse  white   garden  seeds    squeak
horse  orange  field   grass    neigh
goat   gray    hill    leaves   neigh
swan   white   pond    seeds    hoot
cat    black   barn    fish     squeak
dog    brown   garden  corn     yelp
hen    red     field   nuts     quack
bee    orange  forest  honey    howl
crab   blue    river   berries  growl
deer   green   cave    grass    croak
"""
FACTS: dict[str, dict[str, str]] = {
    animal: dict(zip(ATTRIBUTES, values, strict=True))
    for animal, *values in (line.split() for line in _TABLE.strip().splitlines())
}
ANIMALS = tuple(FACTS)
VALUES: dict[str, tuple[str, ...]] = {
    attribute: tuple(dict.fromkeys(facts[attribute] for facts in FACTS.values())) for attribute in ATTRIBUTES
}

_OPPOSITES = ("big small", "hot cold", "happy sad", "fast slow", "old new", "wet dry", "loud quiet", "tall short")
OPPOSITES: dict[str, str] = {}
for _one, _other in (pair.split() for pair in _OPPOSITES):
    OPPOSITES |= {_one: _other, _other: _one}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "color": (
        "What color is {an}?",
        "Tell me the color of {an}.",
        "What is the color of {an}?",
        "Name the color of {an}.",
    ),
    "home": (
        "Where does {an} live?",
        "Tell me where {an} lives.",
        "What is the home of {an}?",
        "Name the home of {an}.",
    ),
    "food": ("What does {an} eat?", "Tell me what {an} eats.", "What is the food of {an}?", "Name the food of {an}."),
    "sound": (
        "What sound does {an} make?",
        "Tell me the sound of {an}.",
        "What is the sound of {an}?",
        "Name the sound of {an}.",
    ),
}
_STATEMENTS = {
    "color": "The {animal} is {value}.",
    "home": "The {animal} lives in the {value}.",
    "food": "The {animal} eats {value}.",
    "sound": "The {animal} makes a {value}.",
}


def fact_is_held_out(animal: str, attribute: str) -> bool:
    """Whether nothing but statements tells this fact in training: one fact of each animal."""
    return attribute == ATTRIBUTES[ANIMALS.index(animal) % len(ATTRIBUTES)]


def sum_is_held_out(a: int, b: int) -> bool:
    """Whether nothing but statements tells this sum in training: a fifth of them."""
    return (a + 2 * b) % 5 == 0


def article(word: str) -> str:
    """The word with its indefinite article: "a fox", "an owl"."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def statement(animal: str, attribute: str, value: str | None = None) -> str:
    """The sentence that states a fact; another `value` makes it a false one."""
    return _STATEMENTS[attribute].format(animal=animal, value=value or FACTS[animal][attribute])


def sum_statement(a: int, b: int, total: int | None = None) -> str:
    """The sentence "a + b = c."; another `total` makes it a false one."""
    return f"{a} + {b} = {a + b if total is None else total}."


def opposite_statement(word: str, other: str | None = None) -> str:
    """The sentence that names the opposite of a word; another word makes it a false one."""
    return f"The opposite of {word} is {other or OPPOSITES[word]}."
