"""Promise: a broken tag costs the segment in which it stands, and only that one; every token belongs to one segment;
the three parts of a reward add up as the paper's equations 3–5 say."""
import math
import random
import time
from types import SimpleNamespace

import pytest

from rewards import Parsed, Verdict, parse, reward_parts, segment_ids

O, T, A = "<observation> a cat </observation>", "<think> cats purr </think>", "<answer> B </answer>"
GOOD = f"{O}\n{T}\n{A}"
BROKEN_PERCEPTION = {
    "empty": "<observation> </observation>",
    "never opened": "a cat </observation>",
    "a think tag inside": "<observation> a <think> cat </observation>",
    "text before it": "I see: <observation> a cat </observation>",
    "text outside, nothing inside": "a cat <observation> </observation>",
    "after a think": T + O,
    "another spelling": "<Observation> a cat </observation>"}
BROKEN_REASONING = {
    "missing": "",
    "no answer": T,
    "no think": A,
    "reordered": A + T,
    "answer repeated": T + A + A,
    "answer nested in think": f"<think> cats {A} purr </think>",
    "think nested in think": f"<think>{T}</think>{A}",
    "empty think": "<think> </think>" + A,
    "empty answer": T + "<answer>\n</answer>",
    "answer left open": T + "<answer> B",
    "text between": T + "therefore" + A,
    "text after": T + A + "I hope this helps.",
    "observation repeated": O + T + A,
    "observation closed twice": "</observation>" + T + A}


class TestParser:
    @pytest.mark.parametrize("text", [
        f"\n {O}\r\n\r\n{T}\t{A} \n", f"{O}{T}{A}",
        "<observation>\na cat\n</observation><think>cats purr\n</think><answer>\nB\n</answer>"])
    def test_a_good_response_is_split_whatever_white_space_it_has(self, text):
        assert parse(text) == Parsed(dict(observation="a cat", think="cats purr", answer="B"), (True, True))

    @pytest.mark.parametrize("fault", BROKEN_PERCEPTION)
    def test_a_broken_perception_fails_alone(self, fault):
        assert parse(f"{BROKEN_PERCEPTION[fault]}\n{T}\n{A}").formats == (False, True)

    @pytest.mark.parametrize("fault", BROKEN_REASONING)
    def test_a_broken_reasoning_fails_alone(self, fault):
        assert parse(O + BROKEN_REASONING[fault]).formats == (True, False)

    @pytest.mark.parametrize("text, reasoning", [(f"\n{T}\n{A}\n", True), ("<observation> a cat" + T + A, False)])
    def test_a_text_without_a_closed_observation_is_read_as_reasoning(self, text, reasoning):
        parsed = parse(text)
        assert parsed.contents["answer"] == "B" and parsed.formats == (False, reasoning)

    @pytest.mark.parametrize("text", [O + T + answer for answer in (
        "<answer>A</answer><answer>B</answer>", "<answer>A<answer>B</answer>", "</answer>B<answer>", "<answer>B",
        "B")] + [f"<observation> {A} </observation>" + T])
    def test_two_answers_half_a_pair_or_an_answer_in_another_segment_are_no_answer(self, text):
        assert parse(text).contents["answer"] is None

    @pytest.mark.parametrize("unit", [
        "</observation>", "<", "<observation> <think> </think> <answer> </answer> "])
    def test_garbage_of_100_000_characters_never_passes_and_takes_no_time(self, unit):
        text, started = unit * (100_000 // len(unit)), time.perf_counter()
        parsed = parse(text)
        assert time.perf_counter() - started < 1
        assert parsed.contents["answer"] is None and parsed.formats == (False, False)


class TestSegmentIds:
    @pytest.mark.parametrize("tokens, ids", [
        ([b"<observation>", b"a", b"", b"</observ", b"ation>\n", b"", b"b</observation>"], [0] * 5 + [1] * 2),
        ([b"</observation", b"<think>"], [2, 2]), ([], [])])
    def test_the_token_that_completes_the_first_closing_tag_is_the_last_of_perception(self, tokens, ids):
        assert segment_ids(tokens) == ids

    def test_every_way_to_cut_a_text_gives_the_token_that_holds_the_last_byte_of_the_tag(self):
        """Tokens may cut characters too: they are bytes."""
        text = f"<observation> un café 猫 🐈 </observation>\n{T}".encode()
        end, rng = text.index(b"\n"), random.Random(0)
        for _ in range(200):
            cuts = sorted({0, len(text), *rng.sample(range(len(text)), rng.randrange(1, 40))})
            ids = segment_ids([text[a:b] for a, b in zip(cuts, cuts[1:])])
            assert ids == [int(a >= end) for a in cuts[:-1]]


def reward_parts_of(text=GOOD, sufficient=True, finished=True, tokens=(128, 319)):
    """R_acc, R_form, R_len of P and R for a right answer, with the paper's windows."""
    record = SimpleNamespace(problem_type="OCR", reference="B", options=())
    response = SimpleNamespace(example=SimpleNamespace(record=record), parsed=parse(text), finished=finished,
                               segments=[0] * tokens[0] + [1] * tokens[1])
    return reward_parts(response, Verdict(sufficient, ""), (128, 320, 320, 512))


class TestRewards:
    @pytest.mark.parametrize("tokens, length", [((127, 319), 0), ((128, 320), 0.2), ((320, 512), 0.2), ((321, 513), 0)])
    def test_both_ends_of_each_window_are_inside(self, tokens, length):
        assert reward_parts_of(tokens=tokens) == [(1, 1, length)] * 2

    def test_a_good_length_pays_only_with_accuracy_and_format(self):
        assert reward_parts_of(sufficient=False)[0] == (0, 1, 0)
        assert reward_parts_of("I see: " + GOOD)[0] == (1, 0, 0)

    def test_an_unknown_verdict_makes_accuracy_and_length_unknown(self):
        accuracy, format, length = reward_parts_of(sufficient=None)[0]
        assert math.isnan(accuracy) and math.isnan(length) and format == 1

    def test_a_truncated_response_keeps_what_its_observation_earned(self):
        assert reward_parts_of(finished=False, tokens=(128, 400)) == [(1, 1, 0.2), (0, 0, 0)]
