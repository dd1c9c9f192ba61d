"""Promise: a broken tag costs the segment in which it stands, and only that one; every token belongs to one segment;
the three parts of a reward add up as the paper's equations 3–5 say."""
import random
import time

import pytest

from types import SimpleNamespace

from rewards import Parsed, Verdict, parse, reward_parts, segment_ids

O, T, A = "<observation> a cat </observation>", "<think> cats purr </think>", "<answer> B </answer>"
GOOD = f"{O}\n{T}\n{A}"


def formats(text: str) -> tuple[bool, bool]:
    return parse(text).formats


def contents(observation, think, answer):
    return {"observation": observation, "think": think, "answer": answer}


class TestParser:
    def test_a_good_response_is_taken_apart(self):
        assert parse(GOOD) == Parsed(contents("a cat", "cats purr", "B"), (True, True))

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
        assert parse(text) == Parsed(contents(None, "cats purr", "B"), (False, True))

    def test_an_observation_that_is_never_closed_is_no_perception_and_spoils_the_reasoning(self):
        assert parse("<observation> a cat" + T + A) == Parsed(contents(None, "cats purr", "B"), (False, False))

    @pytest.mark.parametrize("answers", [
        "<answer>A</answer><answer>B</answer>", "<answer>A<answer>B</answer>", "<answer>A</answer>B</answer>",
        "<answer><answer>B</answer></answer>", "</answer>B<answer>", "<answer>B", "B</answer>", "B", ""])
    def test_two_answers_or_half_a_pair_are_no_answer(self, answers):
        assert parse(O + T + answers).contents["answer"] is None

    def test_an_answer_inside_the_observation_is_not_the_answer(self):
        assert parse("<observation> <answer>B</answer> </observation>" + T).contents["answer"] is None

    @pytest.mark.parametrize("unit", [
        "<answer>", "</answer>", "<", "<observation>", "</observation>", "<think></think>", "<observation", " \n",
        "<observation> <think> </think> <answer> </answer> "])
    def test_repeated_garbage_of_100_000_characters_is_parsed_at_once(self, unit):
        started = time.perf_counter()
        parsed = parse(unit * (100_000 // len(unit)))
        assert time.perf_counter() - started < 1
        assert parsed.contents["answer"] is None and not parsed.formats[1]

    def test_random_garbage_is_parsed_at_once_and_never_passes(self):
        rng = random.Random(0)
        pieces = [f"<{slash}{tag}>" for tag in ("observation", "think", "answer") for slash in ("", "/")]
        pieces += ["<", ">", "/", "é", " "]
        started = time.perf_counter()
        for _ in range(20):
            assert formats("x" + "".join(rng.choices(pieces, k=12_000))) == (False, False)
        assert time.perf_counter() - started < 2


def perception_tokens(tokens: list[bytes]) -> int | None:
    """How many tokens belong to the first segment; None if nobody can say."""
    ids = segment_ids(tokens)
    assert ids == sorted(ids) and len(ids) == len(tokens)
    return None if 2 in ids or not ids else ids.count(0)


class TestSegmentIds:
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
        assert parse(text).contents["observation"] == parse(perception).contents["observation"]
        assert formats(perception + T + A) == (True, True)


def reward_parts_of(text=GOOD, sufficient=True, finished=True, tokens=(128, 319), answer="B"):
    """R_acc, R_form, R_len of P and R for a multiple choice whose answer is B, under the paper's windows."""
    record = SimpleNamespace(problem_type="multiple choice", reference=answer, options=("a cow", "a cat"))
    response = SimpleNamespace(example=SimpleNamespace(record=record), parsed=parse(text), finished=finished,
                               segments=[0] * tokens[0] + [1] * tokens[1])
    return reward_parts(response, Verdict(sufficient, ""), [(128, 320), (320, 512)])


class TestRewards:
    @pytest.mark.parametrize("tokens, length", [(127, 0), (128, 0.2), (200, 0.2), (320, 0.2), (321, 0), (0, 0)])
    def test_both_ends_of_the_window_are_inside(self, tokens, length):
        assert reward_parts_of(tokens=(tokens, 0))[0] == (1, 1, length)

    def test_a_whole_response_by_hand(self):
        """P is 128 tokens long, inside [128, 320]; R is 319 tokens long, one short of [320, 512]."""
        assert reward_parts_of() == [(1, 1, 0.2), (1, 1, 0)]
        assert reward_parts_of(tokens=(321, 512)) == [(1, 1, 0), (1, 1, 0.2)]

    def test_a_good_length_pays_only_with_accuracy_and_format(self):
        assert reward_parts_of(sufficient=False)[0] == (0, 1, 0)
        assert reward_parts_of("I see: " + GOOD)[0] == (1, 0, 0)
        assert reward_parts_of(answer="A", tokens=(128, 400))[1] == (0, 1, 0)

    def test_an_unknown_verdict_makes_accuracy_and_length_unknown(self):
        accuracy, format, length = reward_parts_of(sufficient=None)[0]
        assert accuracy != accuracy and length != length and format == 1

    def test_a_truncated_response_keeps_what_its_observation_earned(self):
        assert reward_parts_of(finished=False, tokens=(128, 400)) == [(1, 1, 0.2), (0, 0, 0)]

    def test_a_response_without_observation_can_still_reason(self):
        """Nobody can say which tokens belong to which segment (id 2): all of them count as reasoning."""
        record = SimpleNamespace(problem_type="multiple choice", reference="B", options=())
        response = SimpleNamespace(example=SimpleNamespace(record=record), parsed=parse(T + A), finished=True,
                                   segments=[2] * 320)
        assert reward_parts(response, Verdict(False, ""), [(128, 320), (320, 512)]) == [(0, 0, 0), (1, 1, 0.2)]
