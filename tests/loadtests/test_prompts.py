"""Prompts are unique from their first words on, and as long as asked."""

from loadtests.prompts import WORDS, Prompts


def test_words_are_distinct() -> None:
    assert len(set(WORDS)) == 256


def test_first_three_words_are_unique_within_a_run() -> None:
    prompts = Prompts(1)
    starts = {tuple(prompts.words(8).split()[:3]) for _ in range(20_000)}
    assert len(starts) == 20_000


def test_two_runs_with_one_seed_share_no_prompt() -> None:
    first, second = ({Prompts.words(p, 6) for _ in range(500)} for p in (Prompts(1), Prompts(1)))
    assert not first & second


def test_length_as_the_engine_counts_it() -> None:
    prompts = Prompts(1)
    # 20 tokens of template, 1.5 tokens a word.
    prompts.calibrate((8, 32), (72, 128))
    assert prompts.overhead == 20
    assert prompts.tokens_per_word == 1.5
    assert len(prompts.draw(80).split()) == 40


def test_shortest_prompt_still_numbers_itself() -> None:
    assert len(Prompts(1).draw(1).split()) == 3
