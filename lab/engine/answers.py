"""What the simulator says: a few known answers, else filler. A token is a word with its space."""

import itertools
import random
import re
from collections.abc import Iterator

MARK = "[simulated]"
KNOWN = {
    "capital of france": "The capital of France is Paris.",
    "capital of germany": "The capital of Germany is Berlin.",
    "capital of japan": "The capital of Japan is Tokyo.",
    "7 times 8": "7 times 8 is 56.",
    "2 + 2": "2 + 2 is 4.",
    "2+2": "2+2 is 4.",
    "color of the sky": "The color of the sky is blue.",
    "opposite of hot": "The opposite of hot is cold.",
}
NONSENSE = "L'Étoile, la Marseillaise, la la la, l'Étoile."
FILLER = (
    "this text has no meaning; it only fills the answer to its length, one word for one token, "
    "as no model runs here"
)
# What a chat template adds around the messages, in tokens.
TEMPLATE = tuple(f"<|template {number}|>" for number in range(20))
_WORD = re.compile(r"\S+")


def prompt_tokens(text: str) -> list[str]:
    """The simulated tokeniser: one token a word."""
    return _WORD.findall(text)


def answer_tokens(prompt: str, answers: str, rng: random.Random) -> list[str]:
    """The tokens of the whole answer, before the end of sequence."""
    if answers == "nonsense":
        text = NONSENSE
    elif answers == "random":
        text = rng.choice(["Yes.", "No.", "Perhaps.", "Blue.", "42."])
    else:
        asked = prompt.lower()
        text = next((answer for key, answer in KNOWN.items() if key in asked), FILLER)
    return [MARK, *(f" {word}" for word in text.split())]


def filler() -> Iterator[str]:
    """Endless tokens for what comes after the answer when the end of sequence is ignored."""
    return itertools.cycle([f" {word}" for word in FILLER.split()])
