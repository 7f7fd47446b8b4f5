"""Prompts of about an asked length, no two of which share their first tokens.

A prefix cache answers a prompt that it has seen in no time, so each is unique from its first
words on, per request and per run. The words are short and common: about one token each in any
vocabulary. How many tokens they really are the engine says (`usage`), before the run.
"""

import random
import secrets

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


class Prompts:
    """Draws prompts for one run. `tokens_per_word` and `overhead` come from calibrate()."""

    def __init__(self, seed: int) -> None:
        # Two runs with one seed offer the same load, but must not share prompts.
        self._next = secrets.randbelow(256**3)
        self._rng = random.Random(f"{seed} {self._next}")
        self.tokens_per_word = 1.0
        self.overhead = 0.0

    def words(self, count: int) -> str:
        """A prompt of `count` words; the first three number it."""
        self._next = (self._next + 0x9E3779) % 256**3
        first = [WORDS[self._next >> shift & 255] for shift in (0, 8, 16)]
        return " ".join([*first, *self._rng.choices(WORDS, k=max(0, count - 3))])

    def calibrate(self, few: tuple[int, int], many: tuple[int, int]) -> None:
        """From two (words, tokens as the engine counted them): what a word and the chat
        template's own text cost."""
        self.tokens_per_word = max(0.1, (many[1] - few[1]) / (many[0] - few[0]))
        self.overhead = max(0.0, many[1] - self.tokens_per_word * many[0])

    def draw(self, tokens: int) -> str:
        """A prompt that the engine counts as about `tokens` tokens, template included."""
        return self.words(max(3, round((tokens - self.overhead) / self.tokens_per_word)))
