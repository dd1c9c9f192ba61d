"""Promise: an answer scores what a careful reader would give it, however it is written down, and never by accident.
All numbers here are worked out by hand."""
import re
import time

import pytest

from rewards import PROBLEM_TYPES, task_metric, words

PETS = ("A. an apple", "B. a cat", "C. a dog", "D. 3")
BARE = ("an apple", "a cat", "a dog", "3")


def names(answer: str, options=PETS) -> str | None:
    """The letter whose score an answer gets; at most one letter may pay for one answer."""
    paying = [r for r in "ABCDEF"[:len(options) or 6] if task_metric("multiple choice", answer, r, options)]
    assert len(paying) <= 1
    return paying[0] if paying else None


# ------------------------------------------------------------------------------------------------ multiple choice

@pytest.mark.parametrize("options", [PETS, BARE, ("(A) an apple", "(B) a cat", "(C) a dog", "(D) 3")])
@pytest.mark.parametrize("answer", [
    "B", " b\n", "B.", "(b)", "[B]", "**B**", "B)", "B:", "B. a cat", "B) A Cat.", "(B) a cat", "B: a  cat", "A cat.",
    '"a cat"'])
def test_one_option_can_be_named_in_many_ways(answer, options):
    assert names(answer, options) == "B"


@pytest.mark.parametrize("answer", [
    "E", "AB", "A, B", "A or B", "cat", "a cat and a dog", "?", "()", "B C", "Because", "4"])
def test_what_names_no_option_scores_nothing(answer):
    assert names(answer) is None


@pytest.mark.parametrize("answer, options, letter", [
    ("An apple", PETS, "A"), ("An apple", ("A. a pear", "B. a cat"), None),                  # "A" as an article
    ("A. a cat", PETS, None), ("C) an apple.", PETS, None),                                  # letter against text
    ("B. a small cat", PETS, "B"),                                                           # a text of no option
    ("3", PETS, "D"),                                                                        # a number as text
    ("(c)", (), "C"), ("a cat", (), None)])                                                  # options in the question
def test_letter_and_text_must_not_contradict_each_other(answer, options, letter):
    assert names(answer, options) == letter


def test_a_text_that_several_letters_share_names_none_of_them():
    shared = ("A. a cat", "B. a dog", "C. a cat")
    answers = ("a cat", "A", "B", "C", "a dog", "A. a cat", "C. a cat")
    assert [names(answer, shared) for answer in answers] == [None, "A", "B", "C", "B", "A", "C"]


def test_a_letter_alone_is_a_letter_even_where_it_is_the_text_of_another_option():
    options = ("A. C", "B. A", "C. B")
    answers = ("A", "b", "(C)", "A. C", "B. A", "A. B")
    assert [names(answer, options) for answer in answers] == ["A", "B", "C", "A", "B", None]


def test_the_reference_may_be_a_text_too():
    assert task_metric("multiple choice", "B", "a cat", PETS) == 1
    assert task_metric("multiple choice", "E", "no such option", PETS) == 0


# ------------------------------------------------------------------------------------------------ numbers

# Spellings of one number, a row each.
NUMBERS = (
    ("1000", "1,000", "1000.0", "1e3"), ("1000.5", "1,000.50"), ("5", "5."), ("0.5", ".5", "1/2"), ("3", "+3"),
    ("-3", "-3.0", "−3"), ("50", "50%"), ("0", "-0"), ("7", "007"), ("0.1", "1e-1"), ("30", "30 cm²"), ("0.1000001",),
    ("12:30", " 12:30. "),
    ("1500000", "1.5 Million people", "1,500,000"), ("5000", "5k", "5K", "5k€"), ("3,000,000", "$3M"),
    ("10K", "10 thousand", "10000"), ("2e9", "2B", "2 billion"), ("1.2e9", "1.2bn"), ("7 billion", "7 bn $"),
    ("7e12", "7 trillion."), ("400", "4 hundred"), ("200,000", "2 hundred thousand"), ("500000", "1/2 million"),
    ("-4e6", "-4 million"), ("30000", "3万", "3万人"), ("1.5e8", "1.5 亿"),
    ("12", "$12", "12 apples", "12 km / h.", "12 m/s^2", "12 s^-1", "12 N·m", "12 kg*m/s", "12 €/kg", "12 °C", "12°",
     "12% of people", "12 km per hour", "12 M", "12 K", "12 k", "12 B", "12 tents", "12 halfpipes", "12 months",
     "12 millimeters", "12 thermometers"))
NO_NUMBERS = ("1,00", "1,0000", "1 000", "1_000", "5 or 6", "5-3", "1.2.3", "twelve", "1/0", "-", "2π",
              "2/π", "5²", "12 km/5", "3 kg 5", "3 tenths", "5 millionths", "2 and a half", "2 dozen", r"\frac{1}{2}")


@pytest.mark.parametrize("spellings", [*NUMBERS, *zip(NO_NUMBERS)], ids=lambda spellings: spellings[0])
def test_spellings_of_one_number_are_equal_and_of_another_or_of_none_are_not(spellings):
    """A reference that is no number is compared as text, without the marks around it."""
    for answer in spellings:
        for reference in [*sum(NUMBERS, ()), *NO_NUMBERS]:
            assert task_metric("numerical", answer, reference) == (reference in spellings), reference


@pytest.mark.parametrize("answer, reference, score", [
    ("10", "10", 1), ("9", "10", 0.9), ("15 cm", "10", 0.5), ("25", "10", 0), ("-10", "10", 0), ("-9", "-10", 0.9),
    ("ten", "10", 0), ("10", "ten", 0), ("-0", "0", 1), ("0.001", "0", 0)])
def test_regression_is_one_minus_the_relative_error(answer, reference, score):
    assert task_metric("regression", answer, reference) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("reference", ["5", "0", "-1"])
def test_what_is_not_a_finite_number_scores_nothing_and_takes_no_time(reference):
    started = time.perf_counter()
    for answer in ("nan", "-inf", "Infinity", "1e1000000", "e5", "9" * 400, "1e999", "9" * 20_000 + "!",
                   "$" + " " * 20_000 + "!", "1" + ",000" * 5_000, "7" + " " * 98 + "!", "7" + " a" * 49 + "!",
                   "7" + "k" * 98 + "!", "7 " + "m/" * 48 + "!", "7" + " million" * 11 + "!", "7" + "万" * 98 + "!"):
        assert task_metric("regression", answer, reference) == 0, answer[:30]
    assert time.perf_counter() - started < 1


# ------------------------------------------------------------------------------------------------ texts

@pytest.mark.parametrize("answer, reference, score", [
    ("  the \n cat  sat ", "the cat sat", 1),
    ("the cat", "the cat sat", 2 / 3),                       # one deleted of three
    ("the big cat sat", "the cat sat", 2 / 3),               # one inserted
    ("the dog sat", "the cat sat", 2 / 3),                   # one replaced
    ("sat the cat", "the cat sat", 1 / 3),                   # one inserted, one deleted
    ("a b c d e", "the cat", 0),                             # worse than nothing is nothing
    ("The cat sat", "the cat sat", 2 / 3),                   # case counts
    # without spaces each character is a word
    ("出口左", "出口", 1 / 2), ("ทางออ", "ทางออก", 5 / 6), ("出口 EXIT", "出口EXIT", 1), ("3番出口", "2番出口", 3 / 4),
    ("출구 왼쪽", "출구", 0)])                                # Korean has spaces: two words, one of them inserted
def test_ocr_is_one_minus_the_word_error_rate(answer, reference, score):
    assert task_metric("OCR", answer, reference) == pytest.approx(score)


@pytest.mark.parametrize("answer, reference, score", [
    ("the cat sat", "the cat sat down", (6 / 7 + 4 / 5 + 6 / 7) / 3),      # words 3 of 3 and 4, pairs 2 of 2 and 3
    ("a b c", "c b a", (1 + 0 + 1 / 3) / 3),                 # all words, no pair, one word in order
    ("the the the", "the cat", (2 / 5 + 0 + 2 / 5) / 3),     # a word counts as often as the reference has it
    ("a x b y c", "a b c", (6 / 8 + 0 + 6 / 8) / 3),         # in order, but never side by side
    ("dogs bark", "the cat sat", 0),
    ("a cat", "cat", 2 / 3),                                 # a reference of one word has no pairs
    ("The cat, it SAT", "the cat; it sat.", 1),              # case and punctuation do not count
    # without spaces each character is a word: 6 of 9 characters, 4 pairs of 5 and 8
    ("一只猫在睡觉", "一只猫在沙发上睡觉", (12 / 15 + 8 / 13 + 12 / 15) / 3),
    ("一只猫在睡觉。", "一只猫，在睡觉", 1), ("猫cat", "猫 cat", 1), ("狗", "猫", 0)])
def test_free_form_is_the_mean_of_rouge_1_2_and_l(answer, reference, score):
    assert task_metric("free-form", answer, reference) == pytest.approx(score)


@pytest.mark.parametrize("text", [
    "The cat,\tit SAT at 10:12 on_the mat — naïve №5 ²!", "Кошка спит на диване.", "고양이가 소파에서 자고 있다",
    "قطة تنام على الأريكة", "बिल्ली सो रही है", "γάτα\u3000κοιμάται\x85x\x1cy 🐈", ""])
def test_words_between_spaces_stay_as_they_are(text):
    assert words(text, r"\S") == text.split()
    assert words(text) == re.findall(r"\w+", text)


# ------------------------------------------------------------------------------------------------ all types

@pytest.mark.parametrize("kind, reference", [
    ("multiple choice", "d"), ("multiple choice", "B. a cat"), ("regression", "0"), ("OCR", r"\frac { 1 } { 2 }"),
    ("OCR", "don't walk"), ("free-form", "cat"), ("free-form", "猫 和 狗"), ("free-form", "a a a")])
def test_every_reference_scores_one_against_itself(kind, reference):
    assert task_metric(kind, reference, reference, PETS) == 1


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_no_answer_scores_nothing(kind):
    for answer in (None, "", " \n\t"):
        assert task_metric(kind, answer, "0", PETS) == 0
