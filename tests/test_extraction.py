"""Promise: an answer is read as a person would read it, by one rule. Where a person could not tell, neither can we."""
from fractions import Fraction

import pytest

from eval import answer_text, ends_on, first_number, mean_relative_accuracy, open_answer, read_choice

CATS = ("a cat", "a dog", "an apple", "two cats and a dog")
LETTERED = ("A. dunking a basketball", "B. dribbling a basketball", "C. passing a basketball")
TEN = tuple(f"{n} volts" for n in range(10))
YES = ("yes", "no")
BARE = ("3", "13", "30", "none")
CELSIUS = ("20 °C", "25 °C", "30 °C", "35 °C")
AMPERE = ("2 A", "5 A", "7 A", "9 A")
NUMBERS = tuple(str(x) for x in (10, 25, 30, 40, 50, 60, 70, 80, 90, 100))
SEEN = ("a red ball", "a blue box", "a green cone", "a yellow cup")
WAYS = ("left", "right", "up", "down")


@pytest.mark.parametrize("response, options, wanted", [
    # the template, kept
    ("<observation>o</observation><think>t</think><answer>B</answer>", CATS, "B"),
    ("<think>A? No.</think>\n<answer> (b) </answer>", CATS, "B"),
    ("<answer>B. a dog</answer>", CATS, "B"),
    ("<answer>a dog</answer>", CATS, "B"),
    ("<answer>\nC\n</answer>", CATS, "C"),
    ("<answer>B</answer> I mean <answer>C</answer>", CATS, "C"),              # two answers: the last
    ("<answer>B", CATS, "B"),                                                 # cut off just behind it
    ("<answer></answer>", CATS, None),
    # and lost
    ("<think>The man dunks, so it is A", LETTERED, None),                     # cut off mid-think
    ("<observation>I see a cat, B", CATS, None),
    ("<think>so it must be C.</think> B", CATS, "B"),
    ("<think>so it must be C.</think>", CATS, None),
    ("<observation>a dog</observation> B", CATS, "B"),
    ("", CATS, None),
    ("   \n ", CATS, None),
    # a letter alone, dressed up
    ("B", CATS, "B"), ("b", CATS, "B"), ("B.", CATS, "B"), ("(B)", CATS, "B"), ("(B).", CATS, "B"), ("[B]", CATS, "B"),
    ("**B**", CATS, "B"), ("**B.** a dog", CATS, "B"), ("\\boxed{B}", CATS, "B"), ("$\\boxed{\\text{B}}$", CATS, "B"),
    ("B\n\n", CATS, "B"), ("`B`", CATS, "B"), ("“B”", CATS, "B"), ("'B'", CATS, "B"), ("a", CATS, "A"),
    ("B) a dog", CATS, "B"), ("B: a dog", CATS, "B"), ("B - a dog", CATS, "B"), ("(B) a dog", CATS, "B"),
    ("E", CATS, None), ("Z.", CATS, None), ("I", TEN, "I"), ("J.", TEN, "J"),
    # the text of an option
    ("a dog", CATS, "B"), ("A dog.", CATS, "B"), ("An apple", CATS, "C"), ("two cats and a dog", CATS, "D"),
    ("It is an apple, I think.", CATS, "C"), ("dribbling a basketball", LETTERED, "B"),
    ("The man is dribbling a basketball.", LETTERED, "B"), ("13", BARE, "B"), ("none", BARE, "D"),
    # not A
    ("An apple", ("a cat", "a dog"), None), ("A man walks in.", ("a cat", "a dog"), None),
    ("A bird", CATS, None), ("I think so.", TEN, None), ("A", CATS, "A"),
    # prose
    ("The answer is B", CATS, "B"), ("The correct answer is (C).", CATS, "C"), ("Answer: B", CATS, "B"),
    ("The best option is: B", CATS, "B"), ("Final answer: **C**", CATS, "C"),
    ("I sample_token B because it barks.", CATS, "B"),
    ("Therefore, the final answer is: $B$", CATS, "B"),
    ("The answer is A because it purrs.", CATS, "A"),
    ("The answer is B. Wait, the answer is C.", CATS, "C"), ("The answer is a dog.", CATS, "B"),
    ("Option B is right.", CATS, "B"), ("B, because A is a cat.", CATS, "B"), ("B because it barks", CATS, "B"),
    ("Option A shows a cat and option B a dog.\nSo it is B.", CATS, "B"), ("It can only be B", CATS, "B"),
    ("It is not A. It is B.", CATS, "B"), ("The answer is b.", CATS, "B"), ("I would go with C", CATS, "C"),
    # two answers, or none
    ("A or B", CATS, None), ("B, C", CATS, None), ("A and B", CATS, None), ("The answer is B or C.", CATS, None),
    ("Either A or C", CATS, None), ("B/C", CATS, None), ("a) or b)", CATS, None),
    ("a cat or a dog", CATS, None), ("I cannot determine this from the video.", CATS, None),
    ("I'm sorry, I can't help with that.", CATS, None), ("None of the above", CATS, None), ("Not B", CATS, None),
    ("The question is unclear.", CATS, None), ("ABCD", CATS, None),
    # other languages
    ("答案是B", CATS, "B"), ("答案：C", CATS, "C"), ("选B。", CATS, "B"), ("正解はBです", CATS, "B"), ("정답은 C", CATS, "C"),
    ("La respuesta correcta es la B.", CATS, "B"), ("Die Antwort ist C.", CATS, "C"), ("La réponse est (B)", CATS, "B"),
    ("A resposta é B", CATS, "B"), ("Ответ: B", CATS, "B"), ("我不知道", CATS, None),
    # yes and no
    ("Yes", YES, "A"), ("no.", YES, "B"), ("Yes, the man is running.", YES, "A"), ("No, there is no dog.", YES, "B"),
    ("<answer>A</answer>", YES, "A"), ("<answer>B. no</answer>", YES, "B"), ("yes and no", YES, None),
    ("maybe", YES, None),
    ("Yesterday", YES, None),
    # rejected, gone through in turn, joined, doubted
    ("A is correct because the ball is red. C shows a cone.", SEEN, "A"),
    ("Option A is correct. B shows a box.", SEEN, "A"),
    ("B doesn't fit.", SEEN, None), ("B can be format_table out.", SEEN, None), ("B是错误的", SEEN, None), ("A不正确，B正确", SEEN, "B"),
    ("A. a red ball - not seen.\nB. a blue box - seen.\nC. a green cone - no\nD. a yellow cup - not seen.", SEEN, None),
    ("A. a red ball\nB. a blue box\nC. a green cone\nD. a yellow cup", SEEN, None),
    ("1. A - no\n2. B - yes\n3. C - no\nSo the answer is B.", SEEN, "B"),
    ("The answer is neither A nor B.", SEEN, None), ("All except A", SEEN, None),
    ("Die Antwort ist nicht B.", SEEN, None),
    ("La réponse n'est pas B.", SEEN, None), ("La respuesta no es B.", SEEN, None), ("I rule out A.", SEEN, None),
    ("If I had to guess, I'd say B.", SEEN, "B"), ("I don't see a ball so the answer is B", SEEN, "B"),
    ("A, or maybe B.", SEEN, None), ("The answer is B or possibly C", SEEN, None), ("B as well as C", SEEN, None),
    ("The lamp is back-left.", ("left", "right", "back"), None), ("Câu trả lời là B", SEEN, "B"),
    ("blue box", SEEN, "B"),
    ("Hepatitis B", SEEN, None), ("There are no metal objects.", ("yes", "no", "not sure"), None),
    ("Based on the video, yes.", YES, "A"), ("I would say yes.", YES, "A"),
    # units, doubts, corrections, contradictions
    ("The temperature is 25 °C.", CELSIUS, "B"), ("The answer is 25 °C.", CELSIUS, "B"),
    ("Therefore, the current is 5 A.", AMPERE, "B"), ("The result is 10 J", NUMBERS, "A"), ("E = 25", NUMBERS, "B"),
    ("F = 25 N", NUMBERS, "B"), ("\\boxed{5\\,\\text{A}}", AMPERE, "B"),
    ("The answer is C, a green cone.", SEEN, "C"), ("I sample_token B, I think.", SEEN, "B"),
    ("Answer: B, a box that is blue", SEEN, "B"), ("The answer is A, I believe", SEEN, "A"),
    ("I don't think the answer is B.", SEEN, None), ("It's unlikely that the answer is B.", SEEN, None),
    ("The answer cannot be B.", SEEN, None), ("If he had moved left, the answer would be B.", SEEN, None),
    ("My answer is C. I did not sample_token A because it is red.", SEEN, "C"),
    ("Answer: C. The answer A would be wrong.", SEEN, "C"),
    ("The answer is B. Wait, let me re-check. No, it is C.", SEEN, "C"),
    ("At first I'd say the answer is B, but on reflection it is C.", SEEN, "C"), ("A) is wrong.", SEEN, None),
    ("A) is wrong because it is red.\nB) fits, so B is right.", SEEN, "B"),
    ("A. red: not present.\nB. blue: present.\nSo B.", SEEN, "B"),
    ("I, as a model, cannot watch videos.", NUMBERS, None), ("B. a red ball", SEEN, None),
    ("A: a blue box", SEEN, None), ("It is not a red ball.", SEEN, None), ("There is no way to tell", YES, None),
    ("I can not tell; there is no information.", YES, None), ("Right, the answer is left.", WAYS, "A"),
    ("The man moves right.", WAYS, "B"), ("-3", ("3", "4", "5"), None), ("-3", ("-3", "3", "5"), "A"),
    ("1/2", ("1/2", "1/3", "1", "2"), "A"), ("−2", ("-2", "2", "4"), "A"), ("1000", ("1,000", "10", "100"), "A"),
    ("2.24", ("2.24 m", "3 m"), "A"), ("The answer is Point A.", ("Point B", "Point A", "Point D"), "B"),
    ("The answer is A minor.", ("C major", "A minor", "B flat"), "B"), ("I DON'T KNOW", NUMBERS, None),
    ("See Figure B.", SEEN, None), ("Plan B would be to wait.", SEEN, None),
    ("The answer is yes, because there is no doubt.", YES, "A"), ("No", YES, "B"), ("Yes, there is no man", YES, "A"),
    ("答案不是B", SEEN, None), ("The correct answer is **B. a blue box**.", SEEN, "B"),
    ("Based on the video, the correct answer is:\n\nC. a green cone", SEEN, "C"),
    ("The object is a blue box, so the answer is B", SEEN, "B"),
    ("It could be a red ball or a blue box.", SEEN, None), ("So the answer should be option D.", SEEN, "D"),
    ("The answer is: (D) a yellow cup", SEEN, "D"), ("B\nExplanation: the box is blue, not A.", SEEN, "B"),
    ("Only B and C fit.", SEEN, None), ("Both A and B", SEEN, None), ("Both A and B", (*SEEN, "Both A and B"), "E"),
    ("The answer is not A, it is B", SEEN, "B"), ("Answer:B", SEEN, "B"), ("answer: b", SEEN, "B"),
    ("The final answer is $\\boxed{C}$.", SEEN, "C"), ("a red ball, a blue box", SEEN, None),
    ("The video shows a red ball first and then a blue box. Answer: A", SEEN, "A"),
])
def test_what_models_write(response, options, wanted):
    assert read_choice(answer_text(response), options) == wanted


@pytest.mark.parametrize("sentence", ["{} is correct.", "Option {} is the correct answer.", "So {} fits best.", "({})",
                                      "It is {} because of the colour.", "{} seems right", "I pick {}, then."])
def test_all_letters_are_read_alike(sentence):
    assert [read_choice(sentence.format(letter), SEEN) for letter in "ABCD"] == [*"ABCD"]


def test_a_response_that_was_cut_off_has_no_answer_but_a_begun_one():
    for prose in ("Option A: the ball is not seen.\nOption B: a blue", "We first consider B, which"):
        assert answer_text(prose, finished=False) is None
    assert read_choice(answer_text("<think>t</think> <answer>B or", finished=False), SEEN) == "B"


@pytest.mark.parametrize("response, wanted", [
    ("Option 1 since Option 2 says it barks", "A"), ("The answer is 1", "A"), ("The best option is 2.", "B"),
    ("Option 2 matches better than Option 1.", "B"), ("Option 2", "B"), ("Option 2: a dog barks", "B"), ("2", "B"),
    ("option 1.", "A"), ("The answer is Option 2", "B"),
    ("a dog barks", "B"), ("B", "B"), ("Option 3", None), ("Option 1 or Option 2", None)])
def test_options_may_have_names(response, wanted):
    assert read_choice(response, ("a cat sleeps", "a dog barks"), ("Option 1", "Option 2")) == wanted


def test_a_text_that_two_options_share_needs_its_letter():
    same = ("a cat", "a cat", "a dog")
    assert [read_choice(x, same) for x in ("A", "B. a cat", "a cat", "a dog")] == ["A", "B", None, "C"]


@pytest.mark.parametrize("think, options, wanted", [
    ("The man dunks, so it is A", LETTERED, "A"),
    ("It might be A. But no: B.", LETTERED, "B"),
    ("He is passing a basketball, no, dribbling a basketball.", LETTERED, "B"),
    ("red T? A red T no, B red O no, C red X yes", ("red T", "red O", "red X"), "C"),
    ("next red T: A red O no, C red T yes", ("red T", "red O", "red X"), "C"),  # the letter stands for both
    ("A man walks in.", ("a cat", "a dog"), None), ("It is not B", ("a cat", "a dog"), None),
    ("It could be B, but A is right.", ("a cat", "a dog"), "A"),
    ("two cats and a dog", CATS, "D"), ("a cat", ("a cat", "a cat"), None)])
def test_a_think_ends_on_the_option_it_mentions_last(think, options, wanted):
    assert ends_on(think, options) == wanted


@pytest.mark.parametrize("text, wanted", [
    ("4", 4), ("4.5", Fraction(9, 2)), ("about 3.5 meters", Fraction(7, 2)), ("There are four chairs.", 4),
    ("1,200 cm", 1200), ("-2", -2), ("two or three", 2), ("none that I can see", None), ("Zero", 0), ("3.", 3),
    ("twenty-one", None), ("4 m × 5 m = 20 m²", 20), ("In frame 12 the answer is 4", 4),
    ("around 1,5 m", Fraction(3, 2)), ("12,5", Fraction(25, 2)), ("between 2 and 3", 2),
    ("someone", None), ("", None)])
def test_the_first_number_is_the_answer(text, wanted):
    assert first_number(text) == wanted


@pytest.mark.parametrize("predicted, wanted, score", [
    (4, 4, 1.0), (5, 4, 0.6),                     # error 25 %: within 50, 45, 40, 35, 30 and, on the edge, 25
    (2, 4, 0.1), (6, 4, 0.1),                     # 50 %: the widest, on its edge
    (Fraction(21, 20), 1, 1.0),                   # 5 %, on the edge of the narrowest; floats would put 9.5 outside
    (Fraction(95, 10), 10, 1.0), (Fraction(99, 10), 10, 1.0), (9, 10, 0.9), (100, 4, 0.0), (0, 4, 0.0), (-4, 4, 0.0),
    (0, 0, 1.0), (1, 0, 0.0)])
def test_mra_by_hand(predicted, wanted, score):
    assert mean_relative_accuracy(Fraction(predicted), Fraction(wanted)) == pytest.approx(score)


def test_mra_against_its_definition_in_floats():
    """Away from the edges, the official formula with numpy's thresholds says the same."""
    import numpy as np
    rng = np.random.default_rng(0)
    for predicted, wanted in rng.integers(1, 997, (300, 2)):
        error = abs(predicted - wanted) / wanted
        steps = 1 - np.linspace(0.5, 0.95, 10)
        if np.abs(error - steps).min() > 1e-6:
            assert mean_relative_accuracy(Fraction(int(predicted)), Fraction(int(wanted))) == pytest.approx(
                np.mean(error <= steps))


@pytest.mark.parametrize("text, gold, wanted", [
    ("3.14159", "3.14", 1), ("The area is 12 m²", "12", 1), ("x = 5, so the answer is 7.5", "7.5", 1), ("5", "5.01", 0),
    ("about 3.43", "['24/7', '3.429', '3.43']", 1), ("24/7", "[24/7, 3.429, 3.43]", 1), ("4", "[24/7, 3.429, 3.43]", 0),
    ("A", "A", 1), ("The answer is C.", "C", 1), ("a camel", "C", 0), ("Paris, of course", "Paris", 1), ("", "7", 0)])
def test_open_questions(text, gold, wanted):
    assert open_answer(text, gold) == wanted


@pytest.mark.parametrize("text, named", [
    ("answer is " * 5000, None), ("A" * 20000, None), ("(" * 20000, None), ("the " * 9000 + "B", "B"),
    ("a cat " * 3000, "A"), ("1," * 9000, None), ("answer" + " " * 20000, None), ("[*" * 9000, None),
    ("A" + " " * 20000 + "x", None), ("3" * 20000, None)])
def test_floods_are_read_like_anything_else(text, named):
    """Patterns that backtrack would take minutes here."""
    assert (answer_text(text), read_choice(text, CATS), ends_on(text, CATS)) == (text, named, named)
    assert first_number(text) is None and open_answer(text, "7") == 0
