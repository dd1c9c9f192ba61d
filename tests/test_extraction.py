"""Promise: an answer is read by one short rule that favours no letter, and numbers are scored as official code does."""
from fractions import Fraction

import numpy as np
import pytest

from eval import answer_text, ends_on, mean_relative_accuracy, open_answer, read_choice, read_numbers

CATS = ("a cat", "a dog", "an apple", "two cats and a dog")
LETTERED = ("A. dunking a basketball", "B. dribbling a basketball", "C. passing a basketball")
TEN = tuple(f"{n} volts" for n in range(10))
YES = ("yes", "no")
BARE = ("3", "13", "30", "none")
AMPERE = ("2 A", "5 A", "7 A", "9 A")
SEEN = ("a red ball", "a blue box", "a green cone", "a yellow cup")
SPEED = ("normal speed", "time-lapse", "slow motion")
GLYPHS = ("C", "E", "A", "F")                                # options that are letters themselves


@pytest.mark.parametrize("response, options, wanted", [
    # where an answer is looked for
    ("<observation>o</observation><think>A? No.</think>\n<answer> (b) </answer>", CATS, "B"),
    ("<answer>B</answer> I mean <answer>C</answer>", CATS, "C"), ("<answer>B", CATS, "B"),
    ("<answer></answer>", CATS, None), ("<think>The man dunks, so it is A", LETTERED, None),
    ("<observation>I see a cat, B", CATS, None),
    ("<think>so it must be C.</think> B", CATS, "B"), ("<think>so it must be C.</think>", CATS, None),
    ("<observation>a dog</observation> B", CATS, "B"), ("", CATS, None), ("   \n ", CATS, None),
    # an exact letter, an exact text
    *[(text, CATS, "B") for text in ("B", "b", "B.", "(B).", "[B]", "**B**", "\\boxed{B}", "$\\boxed{\\text{B}}$",
                                     "`B`", "“B”", "'B'", "a dog", "A dog.")],
    ("E", CATS, None), ("I", TEN, "I"), ("J.", TEN, "J"), ("a", CATS, "A"), ("two cats and a dog", CATS, "D"),
    ("dribbling a basketball", LETTERED, "B"), ("13", BARE, "B"), ("C", GLYPHS, "C"), ("f", GLYPHS, "D"),
    ("−2", ("-2", "2", "4"), "A"), ("-3", ("3", "4", "5"), None), ("1/2", ("1/3", "1/2", "1", "2"), "B"),
    # 1. a letter that begins the text
    *[(text, CATS, "B") for text in ("B) a dog", "B: a dog", "(B) a dog", "**B.** a dog", "b) a dog",
                                     "B, because A purrs", "B\nExplanation: it barks, unlike A.",
                                     "Option B: it barks, unlike A.")],
    ("(D) F", GLYPHS, "D"), ("C. 2.86 A", AMPERE, "C"), ("J. HENRI DE C", TEN, "J"),
    ("I. There is not enough evidence", TEN, "I"),
    # 2. the last "answer is X", or "X is the best"
    ("The correct answer is (C).", CATS, "C"), ("Final answer: **C**", CATS, "C"),
    ("The answer is B, I think", CATS, "B"), ("The answer is B. Wait, the answer is C.", CATS, "C"),
    ("The answer is a dog.", CATS, "B"),
    ("answer: b", CATS, "B"),
    ("The answer is A because it purrs.", CATS, "A"), ("So the answer should be option D.", SEEN, "D"),
    ("Based on the video, the correct answer is:\n\nC. a green cone", SEEN, "C"), ("Answer: (A) C", GLYPHS, "A"),
    ("The answer is l.", ("l", "v", "e"), "A"), ("The answer is A minor.", ("C major", "A minor", "B flat"), "B"),
    ("The answer is: (D) a yellow cup. It is not a red ball", SEEN, "D"), ("Answer: \\boxed{\\text{H}}", TEN, "H"),
    ("A is correct because the ball is red. C shows a cone.", SEEN, "A"),
    ("so option A is the best answer ... so options B and C are not correct", SEEN, "A"),
    # 3. the option whose text is named first
    ("The video is a time-lapse. Clouds fly by. In a normal speed video they would not.", SPEED, "B"),
    ("If you cut it, the form will be changed from supercoiled to linear",
     ("from linear to supercoiled", "from supercoiled to linear"), "B"),
    ("The man is dribbling a basketball.", LETTERED, "B"), ("Therefore, the current is 5 A.", AMPERE, "B"),
    ("most likely it is (D) a yellow cup ... (A) is rare", SEEN, "D"), ("I count 13 of them.", BARE, "B"),
    ("Yes, the man is running.", YES, "A"), ("No, there is no dog.", YES, "B"), ("Yesterday", YES, None),
    # 4. the last capital letter that stands alone
    ("It can only be B", CATS, "B"), ("It is not A. It is B.", CATS, "B"), ("Not B", CATS, None), ("ABCD", CATS, None),
    # neither the article, nor the pronoun, nor a unit
    ("A man walks in.", CATS, None), ("I think so.", TEN, None), ("I'm sorry, I can't help with that.", TEN, None),
    ("I, as a model, cannot watch videos.", TEN, None), ("I DON'T KNOW", TEN, None), ("It is 26 C", SPEED, None),
    ("None of the above", CATS, None)])
def test_what_models_write(response, options, wanted):
    assert read_choice(answer_text(response), options) == wanted


@pytest.mark.parametrize("sentence", ["{} is correct.", "Option {} is the correct answer.", "So {} fits best.", "({})",
                                      "It is {} because of the colour.", "{} seems right", "I pick {}, then."])
def test_all_letters_are_read_alike(sentence):
    assert [read_choice(sentence.format(letter), SEEN) for letter in "ABCD"] == [*"ABCD"]


def test_a_response_that_was_cut_off_has_no_answer_but_a_begun_one():
    for prose in ("Option A: the ball is not seen.\nOption B: a blue", "We first consider B, which"):
        assert answer_text(prose, finished=False) is None
    assert read_choice(answer_text("<think>t</think> <answer>B, as", finished=False), SEEN) == "B"


def test_a_text_that_two_options_share_needs_its_letter():
    same = ("a cat", "a cat", "a dog")
    assert [read_choice(x, same) for x in ("A", "B. a cat", "a cat", "a dog")] == ["A", "B", None, "C"]


@pytest.mark.parametrize("think, options, wanted", [
    ("The man dunks, so it is A", LETTERED, "A"), ("It might be A. But no: B.", LETTERED, "B"),
    ("He is passing a basketball, no, dribbling a basketball.", LETTERED, "B"),
    ("red T? A red T no, B red O no, C red X yes", ("red T", "red O", "red X"), "C"),
    ("next red T: A red O no, C red T yes", ("red T", "red O", "red X"), "C"),  # the letter stands for both
    ("A man walks in.", ("a cat", "a dog"), None), ("It is not B", ("a cat", "a dog"), None), ("", CATS, None),
    ("It could be B, but A is right.", ("a cat", "a dog"), "A"),
    ("two cats and a dog", CATS, "D"), ("a cat", ("a cat", "a cat"), None)])
def test_a_think_ends_on_the_option_it_mentions_last(think, options, wanted):
    assert ends_on(think, options) == wanted


@pytest.mark.parametrize("text, wanted", [
    ("4", 4), ("4.5", Fraction(9, 2)), ("about 3.5 meters", Fraction(7, 2)), ("1,200 cm", 1200), ("-2", -2), ("3.", 3),
    ("none that I can see", None), ("4 m × 5 m = 20 m²", 20), ("In frame 12 the answer is 4", 4), ("$\\boxed{7}$", 7),
    ("between 2 and 3", 2), ("", None)])
def test_the_first_number_is_the_answer(text, wanted):
    assert next(iter(read_numbers(text)), None) == wanted


@pytest.mark.parametrize("predicted, wanted, score", [
    (4, 4, 1.0), (5, 4, 0.6), (10, 8, 0.6), (4, 5, 0.6), (2, 4, 0.1), (100, 4, 0.0), (-4, 4, 0.0), (0, 0, 1.0),
    (1, 0, 0.0)])
def test_mra_of_counts(predicted, wanted, score):
    assert mean_relative_accuracy(predicted, wanted) == score


def test_mra_equals_the_official_formula_bit_for_bit():
    def official(predicted, wanted):
        return (abs(predicted - wanted) / wanted <= 1 - np.linspace(0.5, 0.95, int((0.95 - 0.5) / 0.05 + 2))).mean()
    pairs = [(float(a), float(b)) for a in range(100) for b in range(1, 100)]
    pairs += np.random.default_rng(0).uniform(0.01, 50, (5000, 2)).tolist()
    assert all(mean_relative_accuracy(*pair) == official(*pair) for pair in pairs)


@pytest.mark.parametrize("text, gold, wanted", [
    ("3.14159", "3.14", 1), ("The area is 12 m²", "12", 1), ("x = 5, so the answer is 7.5", "7.5", 1), ("5", "5.01", 0),
    ("about 3.43", "['24/7', '3.429', '3.43']", 1), ("24/7", "[24/7, 3.429, 3.43]", 1), ("4", "[24/7, 3.429, 3.43]", 0),
    ("A", "A", 1), ("Point A", "A", 1), ("<answer>Point A</answer>", "A", 1), ("The answer is C.", "C", 1),
    ("a camel", "C", 0), ("Paris, of course", "Paris", 1), ("", "7", 0)])
def test_open_questions(text, gold, wanted):
    assert open_answer(text, gold) == wanted


@pytest.mark.parametrize("text, named", [
    ("answer is " * 5000, None), ("A" * 20000, None), ("(" * 20000, None), ("the " * 9000 + "B", "B"),
    ("a cat " * 3000, "A"), ("1," * 9000, None), ("answer" + " " * 20000, None), ("[*" * 9000, None),
    ("answer: " * 5000 + "B", "B"), ("3" * 20000, None)])
def test_floods_are_read_like_anything_else(text, named):
    """Patterns that backtrack would take minutes here."""
    assert (answer_text(text), read_choice(text, CATS), ends_on(text, CATS)) == (text, named, named)
    assert read_numbers(text) == [] and open_answer(text, "7") == 0
