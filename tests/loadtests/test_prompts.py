"""Prompts are unique from their first words on, and as long as asked."""

from loadtests.plan import KEYS, Planner
from loadtests.prompts import WORDS, Tokens, calibrated, text
from tests.loadtests.samples import make_profile


def test_words_are_distinct() -> None:
    assert len(set(WORDS)) == 256


def test_first_three_words_are_unique_within_a_run() -> None:
    planner = Planner(make_profile())
    keys = [planner.key() for _ in range(20_000)]
    starts = {tuple(text("run", key, 8).split()[:3]) for key in keys}
    assert len(starts) == len(keys)
    assert max(keys) < KEYS


def test_two_runs_share_no_prompt() -> None:
    first, second = ({text(run, key, 6) for key in range(500)} for run in ("a", "b"))
    assert not first & second


def test_a_key_is_the_same_text_wherever_it_is_made() -> None:
    assert text("a", 7, 12) == text("a", 7, 12)
    assert text("a", 7, 12) != text("a", 8, 12)


def test_words_and_template_as_the_engine_counts_them() -> None:
    # 20 tokens of template, 1.5 tokens a word.
    assert calibrated((8, 32), (72, 128)) == Tokens(per_word=1.5, template=20)


def test_shortest_prompt_still_numbers_itself() -> None:
    assert len(text("a", 1, 1).split()) == 3
