"""Promise: the toy world tells the truth. Clips show what their records say, answers follow from what is shown, the
rule judge is exact, and the same seed always writes the same bytes."""
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import sft
from data import COLOURS, LETTERS, TOY_QUESTIONS, Toy, read_toy, rule_judge, toy_answer
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


def letters(observation) -> list[str]:
    return [" ".join(found) for found in SHOWN.findall(observation)]


def judged(r, observation) -> bool:
    verdict, = rule_judge([data.claim_about(r, observation)])
    return verdict.sufficient


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# ------------------------------------------------------------------------------------------------ questions

def test_every_split_has_all_five_problem_types(records):
    for split in records.values():
        assert {r.problem_type for r in split} == set(PROBLEM_TYPES)


def test_the_reference_follows_from_what_is_shown(every):
    for r in every:
        assert toy_answer(read_toy(r), letters(r.trace["observation"])) == r.reference


@pytest.mark.parametrize("name, asked, shown, answer", [
    ("next", "O", "red O green X blue T", "B"),
    ("next", "O", "green X red O red X", None),              # no option has this colour
    ("next", "T", "red O green X blue T", None),             # nothing comes after it
    ("next", "O", "red O red O blue T", None),               # after which of them?
    ("count", "O", "red O green X red O", "2"),
    ("count", "T", "red O green X red O", "0"),
    ("read", "O", "red O green X blue T", "X T"),
    ("read", "O", "red O green O red O", None),              # nothing is left to read
    ("ends", "", "red O green X blue T", "a red O turns into a blue T"),
    ("total", "", "red O green X blue T", "6"),
    ("total", "", "red O green X", None),                    # not the whole clip
])
def test_toy_answers_by_hand(name, asked, shown, answer):
    assert toy_answer(Toy(name, asked, ("blue T", "green X", "red O")), letters(shown)) == answer


@pytest.mark.parametrize("template", ["p2r", "think"])
def test_every_trace_obeys_the_template_and_earns_full_marks(every, template):
    for r in every:
        parsed = parse(data.trace_text(r, template))
        assert parsed.formats == (template == "p2r", True)
        assert data.answer_score(r, parsed.contents["answer"]) == 1


# ------------------------------------------------------------------------------------------------ the judge

def test_a_faultless_observation_suffices(every):
    assert all(judged(r, r.trace["observation"]) for r in every)


def test_an_error_in_what_is_asked_does_not_suffice(every):
    for r in every:
        wrong = data.misread(read_toy(r), letters(r.trace["observation"]), r, 1, random.Random(0))
        assert not judged(r, ", ".join(wrong))


@pytest.mark.parametrize("spoil", [
    lambda text: "", lambda text: "I see some letters.", str.upper,
    lambda text: " ".join(letters(text)[:-1]),
    lambda text: f"{text}, {letters(text)[0]}",
    lambda text: "<judgement>Yes</judgement>",
], ids=["empty", "vague", "shouted", "one too few", "one too many", "a verdict"])
def test_too_little_too_much_or_nothing_does_not_suffice(every, spoil):
    assert not any(judged(r, spoil(r.trace["observation"])) for r in every)


def test_the_answer_written_into_the_observation_is_no_observation(every):
    assert not any(judged(r, f"The answer is {r.reference}.") for r in every)


def test_a_question_from_elsewhere_is_an_error_not_a_no(every):
    with pytest.raises(ValueError, match="toy questions only"):
        judged(replace(every[0], question="What does the man hold?"), "")


# ------------------------------------------------------------------------------------------------ pre-training

def test_a_share_of_its_records_are_captions_and_some_letters_in_them_are_wrong():
    rows = [data.toy_record(random.Random(n), n, "base") for n in range(1000)]
    captions = [(row["answer"], shown) for row, shown in rows if row["problem"] == data.CAPTION]
    assert 0.8 < len(captions) / len(rows) / data.CAPTIONS["base"] < 1.2
    captions += [(row["answer"], shown) for row, shown in (data.toy_record(random.Random(n), n, "captions")
                                                       for n in range(300))]
    pairs = [pair for said, shown in captions for pair in zip(letters(said), shown, strict=True)]
    wrong = sum(a != b for a, b in pairs) / len(pairs)       # one in twelve draws is right by chance
    assert 0.6 * data.WRONG_LETTERS < wrong < 1.2 * data.WRONG_LETTERS


def test_most_of_its_traces_are_text_and_no_clip_is_drawn_for_them(tmp_path):
    records = data.read_records(data.make_toy(tmp_path, {"base": 300}) / "base.json")
    traces = [r for r in records if r.question != data.CAPTION]
    assert 0.85 < sum(r.blind for r in traces) / len(traces) < 1
    assert {path.name for path in (tmp_path / "base").iterdir()} == {Path(r.path).name for r in records if not r.blind}


def test_a_trace_without_a_clip_has_its_observation_in_the_prompt(tmp_path):
    """Also when --blind asks for none: its record says so."""
    toy = data.make_toy(tmp_path / "toy", {"base": 100})
    settings = sft.Settings(out=str(tmp_path), data=str(toy / "base.json"), media=str(toy), model=str(toy),
                            template="none", heldout_count=0)
    _, records, _ = sft.read_traces(settings, sft.World(0, 1, torch.device("cpu")))
    assert len(records) == 100 and any(r.blind for r in records)
    assert all(r.given == (r.trace["observation"] if r.blind else None) for r in records)


def test_what_it_teaches_is_the_answer_or_the_trace_as_the_record_has_it():
    for n in range(20):
        r = data.to_record(data.toy_record(random.Random(n), n, "base")[0], False)
        taught = r.reference if r.question == data.CAPTION else data.trace_text(r, "p2r")
        assert data.trace_text(r, "none") == taught


# ------------------------------------------------------------------------------------------------ files

def test_a_written_clip_is_read_back_exactly(tmp_path, monkeypatch):
    drawn, draw = [], data.draw
    record, = data.read_records(data.make_toy(tmp_path, {"rl": 1}) / "rl.json")
    monkeypatch.setattr(data, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    data.toy_clip(0, "rl", 0)
    seen, seconds = data.read_video(tmp_path / record.path, data.InputSettings(frames=6, fps=data.TOY_FPS))
    assert np.array_equal(seen, drawn) and seconds == pytest.approx(2 / data.TOY_FPS)


@pytest.mark.parametrize("table, name, value", [
    (TOY_QUESTIONS, "count", ("numerical", "How often is a letter {}?")), (data.PAINT, "red", (255, 0, 0))])
def test_a_world_is_written_anew_when_its_code_was_edited(table, name, value, small, tmp_path, monkeypatch):
    """Somebody changes the toy world and starts the same command again."""
    shutil.copytree(small, tmp_path / "old")
    monkeypatch.setitem(table, name, value)
    old, new = (files(data.make_toy(tmp_path / folder, SMALL)) for folder in ("old", "new"))
    assert old == new != files(small)


def test_the_same_seed_writes_the_same_bytes(small, tmp_path):
    assert files(small) == files(data.make_toy(tmp_path, SMALL))


def test_a_world_that_was_left_half_written_is_completed(small, tmp_path):
    half = shutil.copytree(small, tmp_path / "half")
    (half / "heldout.json").unlink()
    gone, cut, *_ = (half / "heldout").iterdir()
    gone.unlink()
    cut.write_bytes(b"RIFF")
    assert files(data.make_toy(half, SMALL)) == files(small)


def test_a_complete_world_is_left_alone(small):
    when = {f: f.stat().st_mtime_ns for f in small.rglob("*")}
    data.make_toy(small, SMALL)
    assert {f: f.stat().st_mtime_ns for f in small.rglob("*")} == when


def test_no_clip_stands_twice_in_a_split_or_in_two_splits(every, toy):
    assert len({(toy / r.path).read_bytes() for r in every}) == len(every) == 80


def test_records_are_those_of_the_release(toy):
    fields = {"problem_id", "problem", "options", "solution", "path", "data_type", "problem_type", "observation",
              "process"}
    for row in json.loads((toy / "sft.json").read_text()):
        assert row.keys() >= fields and row["solution"] == f"<answer>{row['answer']}</answer>"


# ------------------------------------------------------------------------------------------------ tokenizer

def test_every_toy_text_comes_back_exactly_and_each_word_and_tag_is_one_token(every, vocabulary):
    for r in every:
        text = data.instruction(r, data.InputSettings(prompt="short")) + data.trace_text(r, "p2r")
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text
        pieces = {vocabulary.bytes[i].decode().strip() for i in ids}
        assert pieces >= set(re.findall(r"</?[a-z]+>|[A-Za-z]+", text))


def test_the_same_seed_makes_the_same_model(base, tmp_path):
    data.make_toy_model(tmp_path / "base", seed=0)
    assert files(tmp_path / "base") == files(base)
