"""What a response is worth: the template, the task metrics, and the two rewards of a response (paper, eq. 3–5).

    <observation> what is seen </observation> <think> what follows </think> <answer> … </answer>
    └──────── perception segment P ─────────┘ └──────────── reasoning segment R ────────────────┘

    R_k = R_acc,k + R_form,k + R_len,k      for k in {P, R}                                        (eq. 5)
    R_acc,P   1 if a judge finds that the observation alone suffices for the correct answer, else 0
    R_acc,R   the metric of the problem type, in [0, 1]
    R_form,k  1 if the segment obeys the template, else 0
    R_len,k   0.2 if accuracy and format of the segment are both non-zero and its length is in its window, else 0

No tensors here: everything works on text, on the bytes of the sampled tokens, and on counts of tokens.
"""
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Callable, NamedTuple, Sequence

PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
LENGTH_REWARD = 0.2


# ------------------------------------------------------------------------------------------------ template

TAG = re.compile(r"(</?(?:observation|think|answer)>)")
CLOSING = "</observation>"


class Parsed(NamedTuple):
    """A response taken apart. Contents are None where a segment does not hold exactly one such pair of tags."""
    observation: str | None
    think: str | None
    answer: str | None
    perception_format: bool
    reasoning_format: bool


def only(tag: str, text: str) -> str | None:
    """The content of the one pair <tag>…</tag> in text; None if the pair is missing, repeated or left open.

    A second answer is a hedge, not an answer: it must not be enough that one of the two is right.
    """
    if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
        return None
    inside = re.search(f"<{tag}>(.*)</{tag}>", text, re.DOTALL)
    return inside and inside[1].strip()


def obeys(text: str, *tags: str) -> bool:
    """Is text nothing but these pairs of tags in this order, each around something?

    "<think>a</think> <answer>b</answer>" splits into ["", <think>, "a", </think>, " ", <answer>, "b", </answer>, ""]:
    tags stand at odd places, and of the texts at even places every second one lies inside a pair.
    """
    pieces = TAG.split(text)
    wanted = [f"<{slash}{tag}>" for tag in tags for slash in ("", "/")]
    return pieces[1::2] == wanted and all(bool(p.strip()) == (i % 2 == 1) for i, p in enumerate(pieces[::2]))


def parse(text: str) -> Parsed:
    """Splits a response behind its first `</observation>` and checks each side by itself.

    A segment obeys the template if it is exactly its tags in order, with nothing but white space between them, and
    every pair holds text that is not empty and has no template tag in it. So a tag that is nested, repeated or out of
    order fails the segment in which it stands, and only that one. Without a closed observation there is no perception
    segment, and the whole text is read as reasoning (which is what the process-agnostic template writes).
    """
    end = text.find(CLOSING) + len(CLOSING) if CLOSING in text else 0
    perception, reasoning = text[:end], text[end:]
    return Parsed(only("observation", perception), only("think", reasoning), only("answer", reasoning),
                  obeys(perception, "observation"), obeys(reasoning, "think", "answer"))


def perception_tokens(token_bytes: Sequence[bytes]) -> int | None:
    """How many tokens belong to P: all up to and including the one in which `</observation>` is completed.

    Works on the bytes of the sampled tokens, because encoding the text again may cut it elsewhere. A token that closes
    the tag and carries more, such as b">\\n", belongs to P. None if the observation is never closed.
        [b"<observation>", b"a cat", b"</observ", b"ation>\\n", b"<think>", …] → 4
    """
    end = b"".join(token_bytes).find(CLOSING.encode())
    if end < 0:
        return None
    end, seen = end + len(CLOSING), 0
    for count, token in enumerate(token_bytes, start=1):
        seen += len(token)
        if seen >= end:
            return count


# ------------------------------------------------------------------------------------------------ task metrics

def squash(text: str) -> str:
    """Lower case, single spaces, no punctuation at the ends: for comparing short answers."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'()[]`*")


def option_texts(options: Sequence[str]) -> dict[str, str]:
    """["A. a cat", "B. a dog"] → {"A": "a cat", "B": "a dog"}; options without letters are lettered in order."""
    texts = {}
    for i, option in enumerate(options):
        lettered = re.match(r"\s*\(?([A-Z])\)?\s*[.):]\s*(.*)", option, re.DOTALL)
        follows = lettered and lettered[1] == chr(65 + i)
        texts[chr(65 + i)] = squash(lettered[2] if follows else option)
    return texts


def choice(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer names: "B", "b", "(b)", "B.", "B. a cat" and "a cat" all give "B".

    None if it names no option, or names a text that several options share, or puts one letter before another's text.
    """
    texts = option_texts(options) or {chr(65 + i): "" for i in range(26)}     # options may stand in the question only
    if (alone := squash(answer).upper()) in texts:           # a letter alone is a letter, whatever the options say
        return alone
    same = [letter for letter, text in texts.items() if text and text == squash(answer)]
    if same:
        return same[0] if len(same) == 1 else None
    named = re.fullmatch(r"\W*([A-Za-z])\W*|\s*\(?([A-Za-z])[.):]+\s*(.*)", answer.strip(), re.DOTALL)
    letter = named and (named[1] or named[2]).upper()
    if letter not in texts:
        return None
    rest = squash(named[3] or "")
    other_text = rest and rest != texts[letter] and rest in texts.values()
    return None if other_text else letter


def number(text: str) -> Fraction | None:
    """Reads "1,000", "-3.50", "1e3", "3/4", "$12", "12 apples" exactly. None for anything else: NaN and infinities too.

    Exact fractions, so that "1000" equals "1,000" equals "1000.0" without a tolerance.
    """
    text = text.strip()
    match = len(text) <= 100 and re.fullmatch(              # no number is longer, and a flood of digits costs no time
        r"[$€£]?\s*([-+−]?)\s*[$€£]?(\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)(e[-+]?\d{1,3})?"
        r"(?:\s*/\s*([1-9]\d*))?\s*(?:%|°?[^\W\d_]*[²³]?(?:\s+[^\W\d_]+)*)\.?", text, re.I)
    if not match:
        return None
    sign, digits, exponent, divisor = match.groups()
    value = Fraction(digits.replace(",", "").rstrip(".") + (exponent or "")) / int(divisor or 1)
    return -value if sign in ("-", "−") and sign else value


def numerical(answer: str, reference: str) -> float:
    """1 if both are the same number; a reference that is no number is compared as text. Units are not compared."""
    wanted = number(reference)
    return float(squash(answer) == squash(reference) if wanted is None else number(answer) == wanted)


def regression(answer: str, reference: str) -> float:
    """1 − relative error, at least 0. For a reference of 0 only 0 is right: there every other error is infinite."""
    predicted, wanted = number(answer), number(reference)
    if predicted is None or wanted is None:
        return 0.0
    if wanted == 0:
        return float(predicted == 0)
    return float(max(0, 1 - abs(predicted - wanted) / abs(wanted)))          # a huge error fits no float: cut it first


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Least number of inserted, deleted and replaced words that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def ocr(answer: str, reference: str) -> float:
    """1 − word error rate, at least 0."""
    said, written = answer.split(), reference.split()
    return max(0.0, 1 - edit_distance(said, written) / len(written)) if written else float(not said)


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge(answer: str, reference: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over lower-cased words. ROUGE-2 is left out for a reference of one word:
    it has no pair of words, and a perfect answer would otherwise score 2/3."""
    said, wanted = (re.findall(r"\w+", text.casefold()) for text in (answer, reference))
    f1 = lambda hits, n, m: 2 * hits / (n + m) if hits else 0.0
    scores = [f1(longest_common_subsequence(said, wanted), len(said), len(wanted))]
    for n in (1, 2) if len(wanted) > 1 else (1,):
        a, b = (Counter(zip(*(words[i:] for i in range(n)))) for words in (said, wanted))
        scores.append(f1((a & b).total(), a.total(), b.total()))
    return sum(scores) / len(scores)


def task_metric(problem_type: str, answer: str | None, reference: str, options: Sequence[str] = ()) -> float:
    """Accuracy of an answer in [0, 1] under its problem type; no answer scores 0. ValueError for an unknown type."""
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"unknown problem_type {problem_type!r}; known are {', '.join(PROBLEM_TYPES)}")
    if answer is None or not answer.strip():
        return 0.0
    if problem_type == "multiple choice":
        letter = choice(answer, options)
        return float(letter is not None and letter == choice(reference, options))
    metric = {"numerical": numerical, "regression": regression, "OCR": ocr, "free-form": rouge}[problem_type]
    return metric(answer, reference)


# ------------------------------------------------------------------------------------------------ the sum

@dataclass(frozen=True)
class SegmentReward:
    """R_acc, R_form and R_len of one segment, and the segment's length in tokens."""
    accuracy: float
    format: float
    length: float
    tokens: int

    @property
    def total(self) -> float:                                # eq. 5
        return self.accuracy + self.format + self.length


def segment_reward(accuracy: float, format: float, tokens: int, window: tuple[int, int]) -> SegmentReward:
    in_window = accuracy > 0 and format > 0 and window[0] <= tokens <= window[1]
    return SegmentReward(accuracy, format, LENGTH_REWARD * in_window, tokens)


def response_rewards(parsed: Parsed, sufficient: bool, answer_score: float, finished: bool, tokens: tuple[int, int],
                     windows: tuple[tuple[int, int], tuple[int, int]]) -> tuple[SegmentReward, SegmentReward]:
    """(R_P, R_R) of a response. `tokens` and `windows` hold counts and (least, most) tokens for P and R.

    A response cut off by the token limit keeps what its closed observation earned; its reasoning earns nothing.
    """
    return (segment_reward(float(sufficient), float(parsed.perception_format), tokens[0], windows[0]),
            segment_reward(answer_score * finished, float(parsed.reasoning_format and finished), tokens[1], windows[1]))


# ------------------------------------------------------------------------------------------------ the toy world's judge

class Claim(NamedTuple):
    """What a perception judge gets to see: never the video, never think or answer."""
    question: str
    options: tuple[str, ...]
    problem_type: str
    reference: str                                           # the correct answer
    observation: str


Judge = Callable[[list[Claim]], list[bool]]                  # does the observation suffice for the correct answer?

COLOURS, LETTERS = ("red", "green", "blue", "yellow"), ("O", "X", "T")
PRICES = {"O": 3, "X": 2, "T": 1}
TOY_EVENTS = 3                                               # letters shown one after the other in every clip
TOY_QUESTIONS = {  # one of each problem type; the judge reads the question back, so both live in this table
    "multiple choice": "Which letter comes right after the {}?",
    "numerical": "How many letters are {}?",
    "OCR": "Read the letters that are not {}.",
    "free-form": "How does the clip begin and end?",
    "regression": "O costs 3, X costs 2, T costs 1. What is the total?",
}


def toy_answer(problem_type: str, question: str, options: Sequence[str], shown: list[str]) -> str | None:
    """Solves a toy question from the letters shown, such as ["red O", "blue X", "red T"]. No other place knows how.

    The world makes its answers with it, and the judge applies it to what an observation claims. None: unanswerable.
    """
    asked = re.fullmatch(re.escape(TOY_QUESTIONS[problem_type]).replace(r"\{\}", "(.*)"), question)
    if asked is None or len(shown) != TOY_EVENTS:
        return None
    colours = [x.split()[0] for x in shown]
    if problem_type == "multiple choice":
        if shown[:-1].count(asked[1]) != 1:
            return None
        return choice(shown[shown.index(asked[1]) + 1], options)
    if problem_type == "numerical":
        return str(colours.count(asked[1]))
    if problem_type == "OCR":
        return " ".join(x[-1] for x in shown if not x.startswith(asked[1])) or None
    if problem_type == "free-form":
        return f"a {shown[0]} turns into a {shown[-1]}"
    return str(sum(PRICES[x[-1]] for x in shown))


def rule_judge(claims: list[Claim]) -> list[bool]:
    """Judges toy observations exactly: derives the answer from the observation's text alone and compares.

    Raises ValueError for a question that is not the toy world's: silence would look like "insufficient".
    """
    def suffices(c: Claim) -> bool:
        if not re.fullmatch(re.escape(TOY_QUESTIONS[c.problem_type]).replace(r"\{\}", ".*"), c.question):
            raise ValueError(f"the rule judge knows toy questions only, not {c.question!r}: take --judge reference")
        shown = [" ".join(x) for x in re.findall(rf"\b({'|'.join(COLOURS)}) ([{''.join(LETTERS)}])\b", c.observation)]
        derived = toy_answer(c.problem_type, c.question, c.options, shown)
        return derived is not None and derived == c.reference
    return [suffices(c) for c in claims]
