"""Promise: a record is read as it was meant or refused by name; one whose medium cannot be read is skipped, counted and
named, and never gets somebody else's clip; the order of records is a pure function of the seed."""
import json
from dataclasses import replace

import pytest
import torch

from data import (Examples, Record, find_media, patchify, read_records, read_video, step_indices, to_record,
                  why_invalid)
from model import read_config

ROW = {"problem_id": 7, "problem": "Which pet?", "options": ["A. a cat", "B. a dog"], "solution": "<answer>B</answer>",
       "path": "./clips/1.mp4", "data_type": "video", "problem_type": "multiple choice",
       "observation": "<observation>a dog barks</observation>", "process": "<think>so it is a dog</think>"}


def lines(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def record_of(**changes):
    return to_record(ROW | changes, traces=False)


# ------------------------------------------------------------------------------------------------ reading

@pytest.mark.parametrize("content", [
    json.dumps([ROW, ROW], indent=2), lines(ROW, ROW) + "\n\n", "\ufeff \n" + json.dumps([ROW, ROW])])
def test_a_list_or_lines_are_the_same_records(content, tmp_path):
    (tmp_path / "any.name").write_text(content, "utf-8")
    first, second = read_records(tmp_path / "any.name", traces=True)
    assert first == second == Record(
        "7", "Which pet?", ("A. a cat", "B. a dog"), "multiple choice", "B", "./clips/1.mp4", "video",
        {"observation": "a dog barks", "think": "so it is a dog"})


@pytest.mark.parametrize("options, read", [
    ('["A. it\'s a cat", "B. a dog"]', ("A. it's a cat", "B. a dog")), ("", ()), (None, ())])
def test_options_are_a_list_or_a_text_that_holds_one(options, read):
    assert record_of(options=options).options == read


@pytest.mark.parametrize("solution, reference", [
    ("<answer> B \n</answer>", "B"), (" B ", "B"), (0.5, "0.5"), (0, "0"),
    ("<answer>The cat < the dog</answer>", "The cat < the dog")])
def test_the_reference_stands_in_tags_or_bare(solution, reference):
    assert record_of(problem_type="free-form", solution=solution).reference == reference


@pytest.mark.parametrize("options, solution", [
    (["A: 3, B: 4", "A: 4, B: 3"], "B"),                     # texts that begin like letters
    (["J. Smith", "R. Brown", "K. Jones"], "B"), (["a cat", "B. a dog", "a cow"], "B"),
    (["A. a cat", "B. a dog", "B. a cow", "D. a fish"], "D"),    # a letter twice: places, as they are shown
    (["a. a cat", "c. a dog"], "B"), (["(A) a cat", "(B) a dog"], "(B)")])
def test_texts_that_begin_like_letters_are_texts(options, solution):
    record = record_of(options=options, solution=solution)
    assert record.options == tuple(options) and not why_invalid(record)


def test_a_line_ends_where_a_line_ends_not_inside_a_text(tmp_path):
    question = "Which pet?\u2028Say\x85it."
    (tmp_path / "a.jsonl").write_text(lines(ROW | {"problem": question}, ROW), "utf-8")
    assert [r.question for r in read_records(tmp_path / "a.jsonl")] == [question, "Which pet?"]


def test_traces_are_needed_only_where_they_are_asked_for():
    assert record_of(observation=None).trace.keys() == {"think"}
    with pytest.raises(ValueError, match="lacks observation"):
        to_record(ROW | {"observation": None}, traces=True)


# ------------------------------------------------------------------------------------------------ refusing

@pytest.mark.parametrize("wrong", [
    {"problem_type": "poem"}, {"data_type": "audio"}, {"problem": "\ud800"}, {"path": " "},
    {"options": "A. a cat"}, {"options": ["A. a cat", 2]}, {"options": ["A. a cat"]},
    {"observation": ["a dog"]}, {"solution": "<answer> </answer>"},
    {"solution": "<answer>A</answer><answer>B</answer>"}, {"solution": ["B"]}, {"solution": float("nan")},
    "a text", [ROW]], ids=repr)
def test_a_wrong_record_is_named_by_file_and_number(wrong, tmp_path):
    row = ROW | wrong if isinstance(wrong, dict) else wrong
    (tmp_path / "train.json").write_text(json.dumps([ROW, ROW, row, ROW]))
    with pytest.raises(ValueError, match="train.json, record 3: "):
        read_records(tmp_path / "train.json")


@pytest.mark.parametrize("options, solution", [
    (["A. a fish", "C. a dog", "D. a cat"], "C"), (["B. a dog", "A. a cat"], "B"),
    (["(B) a dog", "(C) a cat"], "(C)"),
    ("['P: 1', 'Q: 2', 'R: 3', 'S: 4']", "Q"), (["A. a fish", "C. a dog", "none of them"], "C.")])
def test_letters_out_of_place_are_refused(options, solution):
    with pytest.raises(ValueError, match="letters that are not A, B, C"):
        record_of(options=options, solution=solution)


@pytest.mark.parametrize("content, message", [
    (b" \n\n", "no records"), (b"[]", "no records"), (b"PK\x03\x04\xff\xfe\x00", "decode"),
    (json.dumps([ROW, ROW])[:-30].encode(), "Unterminated"),
    (lines(ROW, ROW).encode() + b'\n\n{"problem": "cut o', "record 3: .*Unterminated string")])
def test_a_damaged_file_is_named_with_the_broken_line(content, message, tmp_path):
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"train.json.*{message}"):
        read_records(tmp_path / "train.json")


# ------------------------------------------------------------------------------------------------ skipping

@pytest.fixture(scope="module")
def records(toy):
    return read_records(toy / "sft.json")


@pytest.fixture
def load(toy, base, vocabulary, tiny_settings, tmp_path):
    """Examples over the toy world, with a log in skipped.txt."""
    def build(records, **changes):
        return Examples(records, toy, vocabulary, read_config(base), replace(tiny_settings, **changes),
                        log=tmp_path / "skipped.txt")
    return build


def without_media(records, lost):
    return [replace(r, path=f"./sft/gone{i}.mp4") if i in lost else r for i, r in enumerate(records)]


def test_a_missing_medium_is_skipped_counted_and_named(records, load, tmp_path):
    examples = load(without_media(records, {2, 5}))
    assert [i for i in range(12) if examples[i] is None] == [2, 5] == sorted(examples.skipped)
    assert (tmp_path / "skipped.txt").read_text().splitlines() == [
        f"./sft/gone{i}.mp4\tmedia: no such file" for i in (2, 5)]


@pytest.mark.parametrize("changes, reason", [
    (dict(problem_type="multiple choice", options=("A. a cat", "B. a dog"), reference="C"), "solution: 'C'"),
    (dict(problem_type="multiple choice", options=("A. dog", "B. dog"), reference="dog"), "solution: 'dog'"),
    (dict(trace=dict(observation="a dog <answer>B</answer>", think="so")), "trace: ")])
def test_a_record_from_which_nobody_can_learn_is_skipped(records, load, changes, reason):
    examples = load([replace(records[0], **changes)])
    assert examples[0] is None and examples.skipped[0].startswith(reason)


@pytest.mark.parametrize("valid, references", [
    (True, ["0", "1/2", "-3.5", "1.5 million", "12 km/h", "12:30", "3:2", "12:30 PM"]),    # the last three as text
    (False, ["two", "x = 3", r"\sqrt{2}", r"\frac{1}{2}", "2π", "1 1/2", "10^{-3}"])])
def test_a_numerical_solution_is_a_number_a_time_or_a_ratio(valid, references):
    for reference in references:
        assert valid == (not why_invalid(record_of(problem_type="numerical", solution=reference))), reference


def test_every_question_keeps_its_own_clip_and_its_place(records, load, toy, tiny_settings):
    order = step_indices(40, 20, 0, seed=1)
    lost = order[1], order[4], order[6]
    examples = load(without_media(records, lost), workers=4)
    yielded = [example for step in examples.prefetch([order[:5], order[5:10], order[10:]]) for example in step]
    assert [e.record for e in yielded] == [records[i] for i in order if i not in lost]
    for e in yielded:
        frames, _ = read_video(toy / e.record.path, tiny_settings)
        assert torch.equal(e.pixels, patchify(frames, 784, 784)[0])


def test_too_many_missing_media_stop_the_run_with_a_hint_but_a_few_records_are_no_evidence(records, load):
    examples = load(without_media(records, range(5)))
    assert [len(step) for step in examples.prefetch([range(5), range(5, 10)])] == [0, 5]
    with pytest.raises(ValueError, match=r"5 of 20 media .*gone\d\.mp4.*right media folder\?"):
        list(examples.prefetch([range(20)]))


def test_a_prompt_that_is_too_long_is_skipped_and_counted_never_cut(records, load):
    long = replace(records[0], question=100 * "Which letter?")
    examples = load([long, records[1]], max_prompt=200)
    step, = examples.prefetch([range(2)])                    # a long prompt is no missing medium
    assert [e.record for e in step] == [records[1]] and examples.skipped[0].startswith("prompt: ")


def test_kept_media_stay_under_the_limit(records, load):
    examples = load(records)
    examples.room = 3.5 * load(records)[0].pixels.nbytes
    assert [examples[i] is examples[i] for i in range(5)] == [True] * 3 + [False] * 2


# ------------------------------------------------------------------------------------------------ finding, order

def test_records_without_media_are_left_out_counted_and_stay_out(records, toy, tmp_path, capsys):
    some, kept = without_media(records, {2, 5}), tmp_path / "run/records.json"
    some[5] = replace(some[5], blind=True)                   # it needs none
    there = [i for i in range(40) if i != 2]
    assert find_media(records, toy, kept) == list(range(40))
    assert find_media(some, toy, kept) == there         # the run has not begun
    assert "39 of 40 records have their media" in capsys.readouterr().out
    (tmp_path / "run/settings.json").touch()                 # the run has begun
    assert find_media(records, toy, kept) == there      # more media have arrived
    assert find_media(records[:9], toy, kept) == there[:8]      # fewer records were made anew


def test_where_all_media_are_missing_the_command_that_fetches_them_is_said(records, tmp_path):
    with pytest.raises(SystemExit, match="hf download Video-R1/Video-R1-data"):
        find_media(records, tmp_path / "elsewhere", tmp_path / "run/records.json")
    assert not (tmp_path / "run").exists()


def test_every_epoch_is_a_shuffle_of_all_records():
    flat = [i for step in range(7) for i in step_indices(10, 3, step, seed=0)]
    first, second = flat[:10], flat[10:20]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
