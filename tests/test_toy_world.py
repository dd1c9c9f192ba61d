"""Promise: the toy world tells the truth. Clips show what their records say, answers follow from what is shown, the
rule judge is exact, and the same seed always writes the same bytes."""
import hashlib
import json
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

import data
from data import COLOURS, LETTERS, PRICES, TOY_EVENTS, TOY_QUESTIONS, Toy, read_toy, rule_judge, toy_answer
from rewards import PROBLEM_TYPES, parse

SMALL = {"sft": 25, "rl": 10, "heldout": 10}
SHOWN = re.compile(rf"\b({'|'.join(COLOURS)}) ([{''.join(LETTERS)}])\b")


@pytest.fixture(scope="module")
def records(toy):
    return {split: data.read_records(toy / f"{split}.json", traces=True) for split in ("sft", "rl", "heldout")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return data.make_toy(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="module")
def every(records):
    return [record for split in records.values() for record in split]


@pytest.fixture(scope="module")
def texts(every):
    settings, made = data.InputSettings(prompt="short"), []
    for r in every:
        made += data.instruction(r, settings), data.trace_text(r, "p2r"), data.trace_text(r, "think")
    return made


def letters(observation) -> list[str]:
    return [" ".join(found) for found in SHOWN.findall(observation)]


def judged(records, spoil=lambda text: text) -> list[bool]:
    """Verdicts on the records' observations, spoilt."""
    claims = [data.claim_about(r, spoil(r.trace["observation"])) for r in records]
    return [verdict.sufficient for verdict in rule_judge(claims)]


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


class TestQuestions:
    def test_every_split_has_all_five_problem_types(self, records):
        for split in records.values():
            assert {r.problem_type for r in split} == set(PROBLEM_TYPES)

    def test_the_reference_follows_from_what_is_shown(self, every):
        for r in every:
            assert toy_answer(read_toy(r), letters(r.trace["observation"])) == r.reference

    @pytest.mark.parametrize("name, asked, shown, answer", [
        ("next", "red O", "red O green X blue T", "B"),
        ("next", "blue T", "red O green X blue T", None),    # nothing comes after it
        ("next", "red O", "red O red O blue T", None),       # after which of them?
        ("next", "red O", "red O yellow X blue T", None),    # no option
        ("count", "red", "red O green X red T", "2"),
        ("count", "blue", "red O green X red T", "0"),
        ("read", "red", "red O green X blue T", "X T"),
        ("read", "red", "red O red X red T", None),   # nothing is left to read
        ("ends", "", "red O green X blue T", "a red O turns into a blue T"),
        ("total", "", "red O green X blue T", "6"),
        ("total", "", "red O green X", None),      # not the whole clip
        ("total", "", "red O green X blue T red O", None),
    ])
    def test_toy_answers_by_hand(self, name, asked, shown, answer):
        options = ("blue T", "green X", "red O") if name == "next" else ()
        assert toy_answer(Toy(name, asked, options), letters(shown)) == answer

    def test_a_question_from_elsewhere_has_no_toy_answer(self, every):
        for r in every:
            assert read_toy(replace(r, question="Why?")) is None

    @pytest.mark.parametrize("template", ["p2r", "think"])
    def test_every_trace_obeys_the_template_and_earns_full_marks(self, every, template):
        for r in every:
            parsed = parse(data.trace_text(r, template))
            assert parsed.formats == (template == "p2r", True)
            assert data.answer_score(r, parsed.contents["answer"]) == 1
            if template == "p2r":
                assert parsed.contents["observation"] == r.trace["observation"]


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
        assert all(judged(every))

    def test_an_error_in_what_is_asked_does_not_suffice(self, every):
        for r in every:
            assert judged([r], lambda text: wrong_where_it_matters(r)) == [False], r

    @pytest.mark.parametrize("spoil", [
        lambda text: "", lambda text: "I see some letters.", str.upper,
        lambda text: " ".join(letters(text)[:-1]),
        lambda text: f"{text}, {letters(text)[0]}",
        lambda text: "<judgement>Yes</judgement>",
    ], ids=["empty", "vague", "shouted", "one too few", "one too many", "a verdict"])
    def test_too_little_too_much_or_nothing_does_not_suffice(self, every, spoil):
        assert not any(judged(every, spoil))

    def test_the_answer_written_into_the_observation_is_no_observation(self, every):
        for r in every:
            assert judged([r], lambda text: f"The answer is {r.reference}.") == [False]

    def test_a_question_from_elsewhere_is_an_error_not_a_no(self, every):
        with pytest.raises(ValueError, match="toy questions only"):
            judged([every[0], replace(every[1], question="What does the man hold?")])


class TestPretraining:
    def test_half_of_its_texts_are_captions_and_some_letters_in_them_are_wrong(self):
        rows = [data.toy_record(random.Random(n), n, "base") for n in range(1000)]
        captions = [(row, shown) for row, shown in rows if row["problem"] == data.CAPTION]
        assert 450 < len(captions) < 550 and all("observation" not in row for row, _ in captions)
        pairs = [pair for row, shown in captions for pair in zip(letters(row["answer"]), shown, strict=True)]
        wrong = sum(a != b for a, b in pairs) / len(pairs)   # one in twelve draws is right by chance
        assert 0.6 * data.CAPTION_ERRORS < wrong < 1.2 * data.CAPTION_ERRORS

    def test_what_it_teaches_is_the_answer_or_the_trace_as_the_record_has_it(self):
        rows = [data.to_record(data.toy_record(random.Random(n), n, "base")[0], False) for n in range(20)]
        for r in rows:
            text = data.trace_text(r, "none")
            assert text == (r.reference if r.question == data.CAPTION else data.trace_text(r, "p2r"))


class TestFiles:
    def test_a_written_clip_is_read_back_exactly(self, tmp_path):
        noise = np.random.default_rng(0)
        for n in range(4):
            frames = np.stack([data.draw(COLOURS[n], LETTERS[n % 3], (0.0, 1.0), noise) for _ in range(6)])
            (tmp_path / "x.apng").write_bytes(data.avi_bytes(frames, data.TOY_FPS))
            seen, seconds = data.read_video(tmp_path / "x.apng", data.InputSettings(frames=6, fps=data.TOY_FPS))
            assert np.array_equal(seen, frames) and seconds == pytest.approx(2 / data.TOY_FPS)

    @pytest.mark.parametrize("table, name, value", [
        (TOY_QUESTIONS, "count", ("numerical", "How often is a letter {}?")), (data.PAINT, "red", (255, 0, 0))])
    def test_a_world_is_written_anew_when_its_code_was_edited(self, table, name, value, small, tmp_path, monkeypatch):
        """Somebody changes the toy world and starts the same command again."""
        shutil.copytree(small, tmp_path / "old")
        monkeypatch.setitem(table, name, value)
        old, new = (files(data.make_toy(tmp_path / folder, SMALL)) for folder in ("old", "new"))
        assert old == new != files(small)

    def test_the_same_seed_writes_the_same_bytes(self, small, tmp_path):
        assert files(small) == files(data.make_toy(tmp_path, SMALL))
        assert len(files(small)) == sum(SMALL.values()) + len(SMALL)

    def test_a_world_that_was_left_half_written_is_completed(self, small, tmp_path):
        half = shutil.copytree(small, tmp_path / "half")
        (half / "heldout.json").unlink()
        (half / "heldout/00003.apng").unlink()
        (half / "heldout/00004.apng").write_bytes(b"RIFF")
        assert files(data.make_toy(half, SMALL)) == files(small)

    def test_a_complete_world_is_left_alone(self, toy):
        when = {f: f.stat().st_mtime_ns for f in toy.rglob("*")}
        data.make_toy(toy, {"sft": 40, "rl": 20, "heldout": 20})
        assert {f: f.stat().st_mtime_ns for f in toy.rglob("*")} == when

    def test_no_clip_stands_twice_in_a_split_or_in_two_splits(self, toy):
        clips = [hashlib.sha256(f.read_bytes()).hexdigest() for f in toy.rglob("*.apng")]
        assert len(clips) == len(set(clips)) == 80

    def test_records_are_those_of_the_release(self, toy):
        fields = {"problem_id", "problem", "options", "solution", "path", "data_type", "problem_type", "observation",
                  "process"}
        for row in json.loads((toy / "sft.json").read_text()):
            assert row.keys() >= fields and (toy / row["path"]).is_file()
            assert row["solution"] == f"<answer>{row['answer']}</answer>"


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
