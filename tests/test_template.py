"""Promise: a broken tag costs the segment in which it stands, and only that one; every token belongs to one segment;
the three parts of a reward add up as the paper's equations 3–5 say."""
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
    "opened twice": "<observation><observation> a cat </observation>",
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
    "think left open": "<think> cats purr" + A,
    "answer left open": T + "<answer> B",
    "text between": T + "therefore" + A,
    "text after": T + A + "I hope this helps.",
    "observation repeated": O + T + A,
    "observation closed twice": "</observation>" + T + A}


def contents(observation, think, answer):
    return {"observation": observation, "think": think, "answer": answer}


class TestParser:
    @pytest.mark.parametrize("text", [
        GOOD + " \n\t\n", "\n " + GOOD, f"{O}{T}{A}", f"{O}\r\n\r\n{T}\t{A}",
        "<observation>\na cat\n</observation><think>cats purr\n</think><answer>\nB\n</answer>"])
    def test_a_good_response_is_split_whatever_white_space_it_has(self, text):
        assert parse(text) == Parsed(contents("a cat", "cats purr", "B"), (True, True))

    @pytest.mark.parametrize("fault", BROKEN_PERCEPTION)
    def test_a_broken_perception_fails_alone(self, fault):
        assert parse(f"{BROKEN_PERCEPTION[fault]}\n{T}\n{A}").formats == (False, True)

    @pytest.mark.parametrize("fault", BROKEN_REASONING)
    def test_a_broken_reasoning_fails_alone(self, fault):
        assert parse(O + BROKEN_REASONING[fault]).formats == (True, False)

    def test_an_observation_inside_an_observation_leaves_a_stray_tag_on_both_sides(self):
        assert parse(f"<observation> {O} </observation>{T}{A}").formats == (False, False)

    @pytest.mark.parametrize("text, reasoning", [(f"\n{T}\n{A}\n", True), ("<observation> a cat" + T + A, False)])
    def test_a_text_without_a_closed_observation_is_read_as_reasoning(self, text, reasoning):
        assert parse(text) == Parsed(contents(None, "cats purr", "B"), (False, reasoning))

    @pytest.mark.parametrize("text", [O + T + answer for answer in (
        "<answer>A</answer><answer>B</answer>", "<answer>A<answer>B</answer>", "<answer>A</answer>B</answer>",
        "</answer>B<answer>", "<answer>B", "B</answer>", "B")] + [f"<observation> {A} </observation>" + T])
    def test_two_answers_half_a_pair_or_an_answer_in_another_segment_are_no_answer(self, text):
        assert parse(text).contents["answer"] is None

    @pytest.mark.parametrize("units", [
        "<answer>", "</answer>", "<", "<observation>", "</observation>", "<think></think>", " \n",
        "<observation> <think> </think> <answer> </answer> ", ("<observation>", "</observation>", "<think>", "<", "é", " ")])
    def test_garbage_of_100_000_characters_never_passes_and_takes_no_time(self, units):
        text = "".join(random.Random(0).choices(units, k=20_000))
        if isinstance(units, str):
            text = units * (100_000 // len(units))
        started = time.perf_counter()
        parsed = parse(text)
        assert time.perf_counter() - started < 1
        assert parsed.contents["answer"] is None and parsed.formats == (False, False)


def perception_tokens(tokens: list[bytes]) -> int | None:
    """How many tokens belong to the first segment; None if it was never closed."""
    ids = segment_ids(tokens)
    assert ids == sorted(ids) and len(ids) == len(tokens)
    return None if 2 in ids or not ids else ids.count(0)


class TestSegmentIds:
    @pytest.mark.parametrize("tokens, count", [
        ([b"<observation>", b"a", b"</", b"obs", b"erv", b"ation", b">\n", b"<think>"], 7),
        ([b"a</observation>"], 1),
        ([b"a", b"", b"</observation>", b"", b"b"], 3),
        ([b"</observation", b" </observation>", b"b"], 2),
        ([b"a", b"</observation>", b"b", b"</observation>"], 2),
        ([], None), ([b"<observation>", b"a cat"], None), ([b"</observation", b"<think>"], None)])
    def test_the_token_that_completes_the_first_closing_tag_is_the_last_of_perception(self, tokens, count):
        assert perception_tokens(tokens) == count

    def test_every_way_to_cut_a_text_gives_the_token_that_holds_the_last_byte_of_the_tag(self):
        """Tokens may cut characters too: they are bytes."""
        text = f"<observation> un café 猫 🐈 </observation>\n{T}".encode()
        end, rng = text.index(b"</observation>") + len(b"</observation>"), random.Random(0)
        for _ in range(200):
            cuts = sorted({0, len(text), *rng.sample(range(len(text)), rng.randrange(1, 40))})
            count = perception_tokens([text[a:b] for a, b in zip(cuts, cuts[1:])])
            assert cuts[count - 1] < end <= cuts[count]


def reward_parts_of(text=GOOD, sufficient=True, finished=True, tokens=(128, 319), answer="B", segments=None):
    """R_acc, R_form, R_len of P and R for a multiple choice whose answer is B, with the paper's windows."""
    record = SimpleNamespace(problem_type="multiple choice", reference=answer, options=("a cow", "a cat"))
    response = SimpleNamespace(example=SimpleNamespace(record=record), parsed=parse(text), finished=finished,
                               segments=segments or [0] * tokens[0] + [1] * tokens[1])
    return reward_parts(response, Verdict(sufficient, ""), (128, 320, 320, 512))


class TestRewards:
    @pytest.mark.parametrize("tokens, lengths", [
        ((127, 319), (0, 0)), ((128, 320), (0.2, 0.2)), ((320, 512), (0.2, 0.2)), ((321, 513), (0, 0))])
    def test_both_ends_of_each_window_are_inside(self, tokens, lengths):
        assert reward_parts_of(tokens=tokens) == [(1, 1, lengths[0]), (1, 1, lengths[1])]

    def test_a_good_length_pays_only_with_accuracy_and_format(self):
        assert reward_parts_of(sufficient=False)[0] == (0, 1, 0)
        assert reward_parts_of("I see: " + GOOD)[0] == (1, 0, 0)
        assert reward_parts_of(answer="A", tokens=(128, 400))[1] == (0, 1, 0)

    def test_an_unknown_verdict_makes_accuracy_and_length_unknown(self):
        accuracy, format, length = reward_parts_of(sufficient=None)[0]
        assert accuracy != accuracy and length != length and format == 1

    def test_a_truncated_response_keeps_what_its_observation_earned(self):
        assert reward_parts_of(finished=False, tokens=(128, 400)) == [(1, 1, 0.2), (0, 0, 0)]

    def test_in_a_response_without_observation_all_tokens_count_as_reasoning(self):
        assert reward_parts_of(T + A, sufficient=False, segments=[2] * 320) == [(0, 0, 0), (1, 1, 0.2)]
