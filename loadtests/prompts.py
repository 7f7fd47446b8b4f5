"""Prompts of about an asked length, no two of which share their first tokens.

A prefix cache answers a prompt that it has seen in no time, so each is unique from its first
words on, per request and per run. The words are short and common: about one token each in any
vocabulary. How many tokens they really are the engine says (`usage`), before the run.
"""

import random
from dataclasses import dataclass

# 256 words: three of them count to 16.7 million.
_TEXT = (
    "able above act add after again age air all along also animal answer any apple arm art ask "
    "away baby back bad ball band bank base bear beat bed before began best big bird black blue "
    "boat body bone book born both box boy break bring brown build busy call came camp car card "
    "care carry case cat catch cause cell cent chair chance change check child city claim class "
    "clean clear close cloud coat cold color come common cook cool copy corn cost count cover "
    "cow cross crowd cry cup cut dance dark day dead deal dear deep desk door double down draw "
    "dream dress drink drive drop dry ear early earth east easy eat edge egg eight empty end "
    "enemy engine enter equal even event ever exact eye face fact fair fall family farm fast fat "
    "father favor fear feed feel feet fell few field fight fill final find fine finger fire fish "
    "fit five flat floor flow flower fly follow food foot force forest form forward found four "
    "free fresh friend front fruit full fun game garden gas gather gave general gentle girl give "
    "glad glass gold good govern grand grass gray great green grew ground group grow guess guide "
    "gun hair half hand happy hard hat head hear heart heat heavy held help high hill history hit "
    "hold hole home hope horse hot hour house huge human hundred hunt hurry ice idea inch "
    "industry insect island job join joy judge jump keep key kid kind king kitchen knee know lady "
    "lake lamp"
)
WORDS = _TEXT.split()


@dataclass(frozen=True)
class Tokens:
    """What a word, and the chat template's own text, cost in tokens."""

    per_word: float = 1.0
    template: float = 0.0


def calibrated(few: tuple[int, int], many: tuple[int, int]) -> Tokens:
    """From two prompts' (words, tokens as the engine counted them)."""
    per_word = max(0.1, (many[1] - few[1]) / (many[0] - few[0]))
    return Tokens(per_word, max(0.0, many[1] - per_word * many[0]))


def text(run: str, key: int, words: int) -> str:
    """`words` words, at least three: those number it by its `key`, below 256³."""
    first = [WORDS[key >> shift & 255] for shift in (0, 8, 16)]
    rest = random.Random(f"{run} {key}").choices(WORDS, k=max(0, words - 3))
    return " ".join([*first, *rest])
