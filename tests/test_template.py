"""Promise: a broken tag costs the segment in which it stands, and only that one; every token belongs to one segment;
the three parts of a reward add up as the paper's equations 3–5 say."""
import random
import time

import pytest

from rewards import Parsed, SegmentReward, parse, perception_tokens, response_rewards, segment_reward

O, T, A = "<observation> a cat </observation>", "<think> cats purr </think>", "<answer> B </answer>"
GOOD = f"{O}\n{T}\n{A}"


def formats(text: str) -> tuple[bool, bool]:
    parsed = parse(text)
    return parsed.perception_format, parsed.reasoning_format


class TestParser:
    def test_a_good_response_is_taken_apart(self):
        assert parse(GOOD) == Parsed("a cat", "cats purr", "B", True, True)

    @pytest.mark.parametrize("text", [
        GOOD + "\n", GOOD + " \n\t\n", "\n " + GOOD, f"{O}{T}{A}", f"{O}\r\n\r\n{T}\t{A}",
        "<observation>\na\nb\n</observation><think>\nc\nd</think><answer>\nB\n</answer>",
    ])
    def test_white_space_between_and_around_the_pairs_is_free(self, text):
        assert formats(text) == (True, True)

    @pytest.mark.parametrize("broken", [
        pytest.param("<observation> </observation>", id="empty"),
        pytest.param("a cat </observation>", id="never opened"),
        pytest.param("<observation><observation> a cat </observation>", id="opened twice"),
        pytest.param("<observation> a <think> cat </observation>", id="a think tag inside"),
        pytest.param("<observation> a <answer>B</answer> cat </observation>", id="an answer inside"),
        pytest.param("I see: <observation> a cat </observation>", id="text before it"),
        pytest.param("a cat <observation> </observation>", id="text outside, nothing inside"),
        pytest.param(T + O, id="behind a think"),
        pytest.param("<Observation> a cat </observation>", id="another spelling"),
    ])
    def test_a_broken_perception_fails_alone(self, broken):
        assert formats(f"{broken}\n{T}\n{A}") == (False, True)

    @pytest.mark.parametrize("broken", [
        pytest.param("", id="missing"),
        pytest.param(T, id="no answer"),
        pytest.param(A, id="no think"),
        pytest.param(A + T, id="reordered"),
        pytest.param(T + A + A, id="answer repeated"),
        pytest.param(T + T + A, id="think repeated"),
        pytest.param(f"<think> cats {A} purr </think>", id="answer nested in think"),
        pytest.param(f"<think>{T}</think>{A}", id="think nested in think"),
        pytest.param("<think> </think>" + A, id="empty think"),
        pytest.param(T + "<answer>\n</answer>", id="empty answer"),
        pytest.param("<think> cats purr" + A, id="think left open"),
        pytest.param(T + "<answer> B", id="answer left open"),
        pytest.param(T + "therefore" + A, id="text between"),
        pytest.param(T + A + "I hope this helps.", id="text behind"),
        pytest.param(O + T + A, id="observation repeated"),
        pytest.param("</observation>" + T + A, id="observation closed twice"),
        pytest.param("<observation>" + T + A, id="observation opened again"),
    ])
    def test_a_broken_reasoning_fails_alone(self, broken):
        assert formats(O + broken) == (True, False)

    def test_an_observation_inside_an_observation_leaves_a_stray_tag_on_both_sides(self):
        assert formats(f"<observation> {O} </observation>{T}{A}") == (False, False)

    @pytest.mark.parametrize("text", [T + A, f"\n{T}\n{A}\n"])
    def test_a_text_without_observation_is_read_as_reasoning(self, text):
        assert parse(text) == Parsed(None, "cats purr", "B", False, True)

    def test_an_observation_that_is_never_closed_is_no_perception_and_spoils_the_reasoning(self):
        assert parse("<observation> a cat" + T + A) == Parsed(None, "cats purr", "B", False, False)

    @pytest.mark.parametrize("answers", [
        "<answer>A</answer><answer>B</answer>", "<answer>A<answer>B</answer>", "<answer>A</answer>B</answer>",
        "<answer><answer>B</answer></answer>", "</answer>B<answer>", "<answer>B", "B</answer>", "B", ""])
    def test_two_answers_or_half_a_pair_are_no_answer(self, answers):
        assert parse(O + T + answers).answer is None

    def test_an_answer_inside_the_observation_is_not_the_answer(self):
        assert parse("<observation> <answer>B</answer> </observation>" + T).answer is None

    @pytest.mark.parametrize("unit", [
        "<answer>", "</answer>", "<", "<observation>", "</observation>", "<think></think>", "<observation", " \n",
        "<observation> <think> </think> <answer> </answer> "])
    def test_repeated_garbage_of_100_000_characters_is_parsed_at_once(self, unit):
        started = time.perf_counter()
        parsed = parse(unit * (100_000 // len(unit)))
        assert time.perf_counter() - started < 1
        assert parsed.answer is None and not parsed.reasoning_format

    def test_random_garbage_is_parsed_at_once_and_never_passes(self):
        rng = random.Random(0)
        pieces = [f"<{slash}{tag}>" for tag in ("observation", "think", "answer") for slash in ("", "/")]
        pieces += ["<", ">", "/", "é", " "]
        started = time.perf_counter()
        for _ in range(20):
            assert formats("x" + "".join(rng.choices(pieces, k=12_000))) == (False, False)
        assert time.perf_counter() - started < 2


class TestPerceptionTokens:
    @pytest.mark.parametrize("tokens, count", [
        ([b"<observation>", b"a cat", b"</observ", b"ation>\n", b"<think>"], 4),
        ([b"<observation>", b"a", b"</", b"obs", b"erv", b"ation", b">\n", b"<think>"], 7),
        ([b"a</observation>"], 1),
        ([b"a", b"</observation", b">", b"\n"], 3),
        ([b"a", b"", b"</observation>", b"", b"b"], 3),
        ([b"</observation", b" </observation>", b"b"], 2),
    ])
    def test_the_token_that_completes_the_tag_is_the_last_of_p(self, tokens, count):
        assert perception_tokens(tokens) == count

    def test_every_way_to_cut_a_text_gives_the_token_that_holds_the_last_byte_of_the_tag(self):
        text = f"<observation> un café 猫 🐈 </observation>\n{T}".encode()
        end, rng = text.index(b"</observation>") + len(b"</observation>"), random.Random(0)
        for _ in range(200):
            cuts = sorted({0, len(text), *rng.sample(range(len(text)), rng.randrange(1, 40))})
            count = perception_tokens([text[a:b] for a, b in zip(cuts, cuts[1:])])
            assert cuts[count - 1] < end <= cuts[count]

    def test_characters_may_be_split_over_tokens(self):
        cat = "🐈".encode()
        assert perception_tokens([b"<observation>", cat[:1], cat[1:3], cat[3:], b"</observation>", b"x"]) == 5

    def test_the_first_closing_tag_counts(self):
        assert perception_tokens([b"a", b"</observation>", b"b", b"</observation>"]) == 2

    @pytest.mark.parametrize("tokens", [
        [], [b"<observation>", b"a cat"], [b"</observation", b"<think>"], [b"</think>"]])
    def test_an_observation_that_is_never_closed_has_no_boundary(self, tokens):
        assert perception_tokens(tokens) is None

    @pytest.mark.parametrize("text", [GOOD, O + O + T, "<observation> 猫 </observation> und </observation>" + T])
    def test_text_and_tokens_agree_where_perception_ends(self, text):
        count = perception_tokens([bytes([b]) for b in text.encode()])
        perception = text.encode()[:count].decode()
        assert parse(text).observation == parse(perception).observation
        assert formats(perception + T + A) == (True, True)


class TestRewards:
    @pytest.mark.parametrize("tokens, length", [(127, 0), (128, 0.2), (200, 0.2), (320, 0.2), (321, 0), (0, 0)])
    def test_both_ends_of_the_window_are_inside(self, tokens, length):
        assert segment_reward(1.0, 1.0, tokens, (128, 320)) == SegmentReward(1.0, 1.0, length, tokens)

    @pytest.mark.parametrize("accuracy, format, total", [
        (1.0, 1.0, 2.2), (0.01, 1.0, 1.21), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0)])
    def test_a_good_length_pays_only_with_accuracy_and_format(self, accuracy, format, total):
        assert segment_reward(accuracy, format, 200, (128, 320)).total == pytest.approx(total)

    def rewards(self, text=GOOD, sufficient=True, score=0.75, finished=True, tokens=(128, 319)):
        return response_rewards(parse(text), sufficient, score, finished, tokens, ((128, 320), (320, 512)))

    def test_a_whole_response_by_hand(self):
        """P is 128 tokens long, inside [128, 320]; R is 319 tokens long, one short of [320, 512]."""
        perception, reasoning = self.rewards()
        assert perception == SegmentReward(1, 1, 0.2, 128) and perception.total == pytest.approx(2.2)
        assert reasoning == SegmentReward(0.75, 1, 0, 319) and reasoning.total == pytest.approx(1.75)

    def test_each_segment_has_its_own_window(self):
        assert [r.length for r in self.rewards(tokens=(320, 320))] == [0.2, 0.2]
        assert [r.length for r in self.rewards(tokens=(321, 512))] == [0, 0.2]

    def test_a_wrong_look_and_a_wrong_thought_are_paid_apart(self):
        assert [r.total for r in self.rewards(sufficient=False)] == pytest.approx([1.0, 1.75])
        assert [r.total for r in self.rewards(score=0.0)] == pytest.approx([2.2, 1.0])

    def test_a_truncated_response_keeps_what_its_observation_earned(self):
        perception, reasoning = self.rewards(finished=False, tokens=(128, 400))
        assert perception.total == pytest.approx(2.2)
        assert reasoning == SegmentReward(0, 0, 0, 400)

    def test_a_response_without_observation_can_still_reason(self):
        perception, reasoning = self.rewards(T + A, sufficient=False, tokens=(0, 320))
        assert perception == SegmentReward(0, 0, 0, 0) and reasoning.total == pytest.approx(1.95)
