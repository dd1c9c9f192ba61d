"""Promise: the toy world tells the truth. Clips show what their records say, answers follow from what is shown, the
rule judge is exact, and the same seed always writes the same bytes."""
import hashlib
import json
import random
import re

import numpy as np
import pytest

import data
from rewards import (COLOURS, LETTERS, PRICES, PROBLEM_TYPES, TOY_EVENTS, TOY_QUESTIONS, Claim, Toy, parse, read_toy,
                     rule_judge, task_metric, toy_answer)

SMALL = {"sft": 25, "rl": 10, "heldout": 10}
SHOWN = re.compile(rf"\b({'|'.join(COLOURS)}) ([{''.join(LETTERS)}])\b")


@pytest.fixture(scope="module")
def records(toy):
    return {split: data.read_records(toy / f"{split}.json", traces=True) for split in ("sft", "rl", "heldout")}


@pytest.fixture(scope="module")
def every(records):
    return [record for split in records.values() for record in split]


@pytest.fixture(scope="module")
def texts(every):
    settings = data.InputSettings(prompt="short")
    return [text for r in every for text in (data.instruction(r, settings), data.trace_text(r, "p2r"),
                                             data.trace_text(r, "think"))]


def claim(record, observation=None):
    return Claim(record.question, record.options, record.problem_type, record.reference,
                 record.trace["observation"] if observation is None else observation)


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


class TestQuestions:
    def test_every_split_has_all_five_problem_types(self, records):
        for split in records.values():
            assert {r.problem_type for r in split} == set(PROBLEM_TYPES)

    def test_the_reference_follows_from_what_is_shown(self, every):
        for r in every:
            shown = [" ".join(x) for x in SHOWN.findall(r.trace["observation"])]
            assert len(shown) == TOY_EVENTS
            assert toy_answer(read_toy(r.problem_type, r.question, r.options), shown) == r.reference

    @pytest.mark.parametrize("name, asked, shown, answer", [
        ("count", "red", ["red O", "green X", "red T"], "2"),
        ("count", "blue", ["red O", "green X", "red T"], "0"),
        ("read", "red", ["red O", "green X", "blue T"], "X T"),
        ("read", "red", ["red O", "red X", "red T"], None),   # nothing is left to read
        ("ends", "", ["red O", "green X", "blue T"], "a red O turns into a blue T"),
        ("total", "", ["red O", "green X", "blue T"], "6"),
        ("total", "", ["red O", "green O", "blue O"], "9"),
        ("total", "", ["red O", "green X"], None),      # not the whole clip
        ("total", "", ["red O", "green X", "blue T", "red O"], None),
    ])
    def test_toy_answers_by_hand(self, name, asked, shown, answer):
        assert toy_answer(Toy(name, asked, ()), shown) == answer

    def test_the_right_option_is_what_comes_after_the_one_letter_asked_for(self, every):
        pattern = re.escape(TOY_QUESTIONS["next"][1]).replace(r"\{\}", "(.*)")
        for r in every:
            if r.problem_type == "multiple choice":
                asked = re.fullmatch(pattern, r.question)[1]
                shown = [" ".join(x) for x in SHOWN.findall(r.trace["observation"])]
                place, = (i for i, x in enumerate(shown[:-1]) if x.startswith(asked))
                right = [o[0] for o in r.options if shown[place + 1].startswith(o[3:])]
                assert right == [r.reference]

    @pytest.mark.parametrize("kind", PROBLEM_TYPES)
    def test_a_question_from_elsewhere_has_no_toy_answer(self, kind):
        assert read_toy(kind, "Why?", ()) is None

    @pytest.mark.parametrize("template", ["p2r", "think"])
    def test_every_trace_obeys_the_template_and_earns_full_marks(self, every, template):
        for r in every:
            parsed = parse(data.trace_text(r, template))
            assert parsed.formats == (template == "p2r", True)
            assert task_metric(r.problem_type, parsed.contents["answer"], r.reference, r.options) == 1
            if template == "p2r":
                assert judged([claim(r, parsed.contents["observation"])]) == [True]


def judged(claims) -> list[bool]:
    return [verdict.sufficient for verdict in rule_judge(claims)]


def wrong_where_it_matters(r) -> str:
    """The observation with an error in what the question asks for."""
    other = lambda text: next(c for c in COLOURS if not text.startswith(c))
    repaint = lambda text: SHOWN.sub(
        lambda m: f"{other(text)} {m[2]}" if m[0].startswith(text) else m[0], r.trace["observation"])
    if r.problem_type == "multiple choice":
        return repaint(next(o[3:] for o in r.options if o[0] == r.reference))
    if r.problem_type == "numerical":
        return repaint(next(c for c in COLOURS if c in r.question))
    if r.problem_type == "regression":
        dear = "O" if int(r.reference) < TOY_EVENTS * PRICES["O"] else "T"
        return SHOWN.sub(rf"\1 {dear}", r.trace["observation"])
    return SHOWN.sub(lambda m: f"{m[1]} {LETTERS[LETTERS.index(m[2]) - 1]}", r.trace["observation"])


class TestJudge:
    def test_a_faultless_observation_suffices(self, every):
        assert all(judged([claim(r) for r in every]))

    def test_an_error_in_what_is_asked_does_not_suffice(self, every):
        for r in every:
            assert judged([claim(r, wrong_where_it_matters(r))]) == [False], r

    @pytest.mark.parametrize("spoil", [
        lambda text: "", lambda text: "???", lambda text: "I see some letters.", lambda text: text.upper(),
        lambda text: " ".join(f"{c} {x}" for c, x in SHOWN.findall(text)[:-1]),
        lambda text: text + ", " + " ".join(SHOWN.search(text).groups()),
        lambda text: ", ".join(f"{c} {x}" for c in COLOURS for x in LETTERS),
        lambda text: "<judgement>Yes</judgement>",
    ], ids=["empty", "garbage", "vague", "shouted", "one too few", "one too many", "everything", "a verdict"])
    def test_too_little_too_much_or_nothing_does_not_suffice(self, every, spoil):
        assert not any(judged([claim(r, spoil(r.trace["observation"])) for r in every]))

    def test_the_answer_written_into_the_observation_is_no_observation(self, every):
        assert not any(judged([claim(r, f"The answer is {r.reference}.") for r in every]))

    def test_a_question_from_elsewhere_is_an_error_not_a_no(self, every):
        with pytest.raises(ValueError, match="toy questions only"):
            judged([claim(every[0]), claim(every[1])._replace(question="What does the man hold?")])


class TestPretraining:
    def test_half_of_its_texts_are_captions_and_some_letters_in_them_are_wrong(self):
        rows = [data.toy_record(random.Random(n), n, "base") for n in range(1000)]
        captions = [(row, shown) for row, shown in rows if row["problem"] == data.CAPTION]
        assert 450 < len(captions) < 550 and all("observation" not in row for row, _ in captions)
        said = [" ".join(x) for row, _ in captions for x in SHOWN.findall(row["answer"])]
        shown = [letter for _, letters in captions for letter in letters]
        assert len(said) == len(shown) == TOY_EVENTS * len(captions)
        wrong = sum(a != b for a, b in zip(said, shown)) / len(shown)         # one in twelve draws is right by chance
        assert 0.6 * data.CAPTION_ERRORS < wrong < 1.2 * data.CAPTION_ERRORS

    def test_what_it_teaches_is_the_answer_or_the_trace_as_the_record_has_it(self):
        rows = [data.to_record(data.toy_record(random.Random(n), n, "base")[0], False) for n in range(20)]
        for r in rows:
            text = data.trace_text(r, "none")
            assert text == (r.reference if r.question == data.CAPTION else data.trace_text(r, "p2r"))


class TestFiles:
    def test_a_written_clip_is_read_back_exactly(self, tmp_path):
        noise = np.random.default_rng(0)
        for n in range(10):
            frames = np.stack([data.draw(COLOURS[n % 4], LETTERS[n % 3], (0.0, 1.0), noise) for _ in range(6)])
            (tmp_path / "x.avi").write_bytes(data.avi_bytes(frames, data.TOY_FPS))
            seen, seconds = data.read_video(tmp_path / "x.avi", data.InputSettings(frames=6, fps=data.TOY_FPS))
            assert np.array_equal(seen, frames) and seconds == pytest.approx(2 / data.TOY_FPS)

    @pytest.mark.parametrize("edit", ["question", "drawing"])
    def test_a_world_is_written_anew_when_its_code_was_edited(self, edit, tmp_path, monkeypatch):
        """Somebody changes the toy world and starts the same command again."""
        data.make_toy(tmp_path / "toy", SMALL)
        before = files(tmp_path / "toy")
        if edit == "question":
            monkeypatch.setitem(TOY_QUESTIONS, "count", ("numerical", "How often is a letter {}?"))
        else:
            monkeypatch.setitem(data.PAINT, "red", (255, 0, 0))
        data.make_toy(tmp_path / "toy", SMALL)
        after = files(tmp_path / "toy")
        assert before.keys() == after.keys() and before != after
        assert any(b"How often" in content for content in after.values()) == (edit == "question")

    def test_the_same_seed_writes_the_same_bytes(self, tmp_path):
        one, two = (files(data.make_toy(tmp_path / name, SMALL)) for name in ("one", "two"))
        assert one == two and len(one) == sum(SMALL.values()) + len(SMALL)

    def test_a_world_that_was_left_half_written_is_completed(self, tmp_path):
        whole = files(data.make_toy(tmp_path / "whole", SMALL))
        half = data.make_toy(tmp_path / "half", SMALL)
        (half / "heldout.json").unlink()
        (half / "heldout" / "00003.avi").unlink()
        (half / "heldout" / "00004.avi").write_bytes(b"RIFF")
        data.make_toy(half, SMALL)
        assert files(half) == whole

    def test_a_complete_world_is_left_alone(self, tmp_path):
        folder = data.make_toy(tmp_path / "toy", SMALL)
        when = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
        assert data.make_toy(folder, SMALL) == folder
        assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == when

    def test_no_clip_stands_twice_in_a_split_or_in_two_splits(self, toy):
        clips = [hashlib.sha256(f.read_bytes()).hexdigest() for f in toy.rglob("*.avi")]
        assert len(clips) == len(set(clips)) == 80

    def test_records_are_those_of_the_release(self, toy):
        for row in json.loads((toy / "sft.json").read_text()):
            assert row.keys() >= {"problem_id", "problem", "options", "solution", "path", "data_type", "problem_type",
                                  "observation", "process"}
            assert row["solution"] == f"<answer>{row['answer']}</answer>" and (toy / row["path"]).is_file()


class TestTokenizer:
    def test_every_toy_text_comes_back_exactly(self, texts, vocabulary):
        for text in texts:
            assert vocabulary.decode(vocabulary.encode(text)) == text

    def test_every_toy_word_and_tag_is_one_token(self, texts, vocabulary):
        whole = re.compile(r"</?[a-z]+>|[A-Za-z]+")
        for text in texts:
            pieces = [vocabulary.bytes[i].decode() for i in vocabulary.encode(text)]
            assert [w for piece in pieces for w in whole.findall(piece)] == whole.findall(text)
            assert all(len(whole.findall(piece)) <= 1 for piece in pieces)

    def test_the_same_seed_makes_the_same_model(self, base, tmp_path):
        data.make_toy_model(tmp_path / "base", seed=0)
        assert files(tmp_path / "base") == files(base)
