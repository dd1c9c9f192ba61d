"""Promise: a record is read as it was meant or refused by name; one whose medium cannot be read is skipped, counted and
named, and never gets somebody else's clip; the order of records is a pure function of the seed."""
import gzip
import json
from dataclasses import replace

import pytest
import torch

import data
from data import (Examples, Record, find_media, patchify, read_records, read_video, step_indices, to_record,
                  why_invalid)
from model import read_config

ROW = {"problem_id": 7, "problem": "Which pet?", "options": ["A. a cat", "B. a dog"], "solution": "<answer>B</answer>",
       "path": "./clips/1.mp4", "data_type": "video", "problem_type": "multiple choice",
       "observation": "<observation>a dog barks</observation>", "process": "<think>so it is a dog</think>"}


def lines(*rows):
    return "\n".join(map(json.dumps, rows))


def record_of(**changes):
    return to_record(ROW | changes, traces=False)


FORMS = {
    "list": json.dumps([ROW, ROW], indent=2).encode(),
    "lines": lines(ROW, ROW).encode(),
    "lines with blanks": (lines(ROW, ROW) + "\n\n").encode(),
    "list with byte order mark": b"\xef\xbb\xbf \n" + json.dumps([ROW, ROW]).encode()}
WHOLE = gzip.compress(json.dumps([ROW] * 50).encode())
DAMAGED = {
    "blank": b" \n\n",
    "empty list": b"[]",
    "half a gzip": WHOLE[:len(WHOLE) // 2],
    "damaged gzip": WHOLE[:40] + bytes(20) + WHOLE[60:],
    "half a list": json.dumps([ROW, ROW])[:-30].encode(),
    "a zip": b"PK\x03\x04\xff\xfe\x00",
    "a web page": b"<html>404</html>"}


class TestReading:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("pack", [bytes, gzip.compress])
    def test_a_list_or_lines_plain_or_gzip_are_the_same_records(self, pack, form, tmp_path):
        (tmp_path / "any.name").write_bytes(pack(FORMS[form]))
        first, second = read_records(tmp_path / "any.name", traces=True)
        assert first == second == Record(
            "7", "Which pet?", ("A. a cat", "B. a dog"), "multiple choice", "B", "./clips/1.mp4", "video",
            {"observation": "a dog barks", "think": "so it is a dog"}), "without tags"

    @pytest.mark.parametrize("options, read", [
        (["A. a cat", "B. a dog"], ("A. a cat", "B. a dog")),
        ('["A. it\'s a cat", "B. a dog"]', ("A. it's a cat", "B. a dog")),
        ("[]", ()), ([], ()), ("", ()), (None, ())])
    def test_options_are_a_list_or_a_text_that_holds_one(self, options, read):
        assert record_of(options=options).options == read

    @pytest.mark.parametrize("solution, reference", [
        ("<answer> B \n</answer>", "B"), (" B ", "B"), (12, "12"), (0.5, "0.5"), (0, "0"),
        ("<answer>The cat < the dog</answer>", "The cat < the dog")])
    def test_the_reference_stands_in_tags_or_bare(self, solution, reference):
        assert record_of(problem_type="free-form", solution=solution).reference == reference

    @pytest.mark.parametrize("options, solution", [
        (["A: 3, B: 4", "A: 4, B: 3"], "B"),                 # texts that begin like letters
        (["J. Smith", "R. Brown", "K. Jones"], "B"), (["J. Smith", "R. Brown", "K. Jones"], "R. Brown"),
        (["E. coli", "a virus", "a fungus"], "C"), (["a cat", "B. a dog", "a cow"], "B"),
        (["A. a cat", "B. a dog", "B. a cow", "D. a fish"], "D"),    # a letter twice: places, as they are shown
        (["a. a cat", "c. a dog"], "B"), (["(A) a cat", "(B) a dog"], "(B)")])
    def test_texts_that_begin_like_letters_are_texts(self, options, solution):
        record = record_of(options=options, solution=solution)
        assert record.options == tuple(options) and not why_invalid(record)

    def test_letters_matter_to_multiple_choice_only(self):
        assert record_of(problem_type="free-form", options=["A. a fish", "C. a dog"], solution="C")

    def test_a_line_ends_where_a_line_ends_not_inside_a_text(self, tmp_path):
        row = ROW | {"problem": "Which pet?\u2028Say\x85it."}
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in (row, ROW)), "utf-8")
        assert [r.question for r in read_records(tmp_path / "a.jsonl")] == [row["problem"], ROW["problem"]]

    def test_traces_are_needed_only_where_they_are_asked_for(self):
        assert record_of(observation=None).trace.keys() == {"think"}
        with pytest.raises(AttributeError):
            to_record(ROW | {"observation": None}, traces=True)


class TestRefusing:
    @pytest.mark.parametrize("wrong", [
        {"problem_type": "poem"}, {"data_type": "audio"}, {"data_type": None}, {"problem": None}, {"problem": 5},
        {"problem": "\ud800"}, {"path": " "}, {"options": "A. a cat"}, {"options": ["A. a cat", 2]},
        {"options": "print('hello')"}, {"options": ["A. a cat"]}, {"observation": ["a dog"]},
        *[{"solution": solution} for solution in (
            "", "<answer> </answer>", "<answer>A</answer><answer>B</answer>", "A</answer>", ["B"], float("nan"))],
        "a text", 5, None, [ROW]], ids=repr)
    @pytest.mark.parametrize("write", [json.dumps, lambda rows: lines(*rows)], ids=["list", "lines"])
    def test_a_wrong_record_is_named_by_file_and_number(self, write, wrong, tmp_path):
        row = ROW | wrong if isinstance(wrong, dict) else wrong
        (tmp_path / "train.json").write_text(write([ROW, ROW, row, ROW]))
        with pytest.raises(ValueError, match="train.json, record 3: "):
            read_records(tmp_path / "train.json")

    @pytest.mark.parametrize("options, solutions", [
        (["A. a fish", "C. a dog", "D. a cat"], ["C", "A", "D", "B", "<answer>C</answer>", "C. a dog"]),
        (["B. a dog", "A. a cat"], ["B"]), (["(B) a dog", "(C) a cat"], ["(C)"]),
        ("['P: 1', 'Q: 2', 'R: 3', 'S: 4']", ["Q"]), (["A. a fish", "C. a dog", "none of them"], ["C."])])
    def test_letters_out_of_place_are_refused(self, options, solutions):
        for solution in solutions:
            with pytest.raises(ValueError, match="letters that are not A, B, C"):
                record_of(options=options, solution=solution)

    def test_a_broken_line_is_named_by_its_number(self, tmp_path):
        (tmp_path / "train.jsonl").write_text(lines(ROW, ROW) + '\n\n{"problem": "cut o')
        with pytest.raises(ValueError, match="train.jsonl, record 3: Unterminated string"):
            read_records(tmp_path / "train.jsonl")

    @pytest.mark.parametrize("damage", DAMAGED)
    def test_a_file_that_holds_no_records_is_named(self, damage, tmp_path):
        (tmp_path / "train.json").write_bytes(DAMAGED[damage])
        with pytest.raises(ValueError, match="train.json"):
            read_records(tmp_path / "train.json")


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
    return [replace(r, path=f"./sft/gone{i}.avi") if i in lost else r for i, r in enumerate(records)]


class TestSkipping:
    def test_a_missing_medium_is_skipped_counted_and_named(self, records, load, tmp_path):
        examples = load(without_media(records, {2, 5}))
        found = [examples[i] for i in range(12)]
        assert [i for i, example in enumerate(found) if example is None] == [2, 5] == sorted(examples.skipped)
        logged = [line.split("\t") for line in (tmp_path / "skipped.txt").read_text().splitlines()]
        assert logged == [[f"./sft/gone{i}.avi", "media: no such file"] for i in (2, 5)]

    @pytest.mark.parametrize("changes, reason", [
        (dict(problem_type="multiple choice", options=("A. a cat", "B. a dog"), reference="C"), "solution: 'C'"),
        (dict(problem_type="multiple choice", options=("A. dog", "B. dog"), reference="dog"), "solution: 'dog'"),
        (dict(problem_type="regression", reference="many"), "solution: 'many'"),
        (dict(problem_type="numerical", reference=r"\frac{1}{2}"), "solution: '\\\\frac{1}{2}' is no number"),
        (dict(trace=dict(observation="a dog", think="so it is</think> a dog")), "trace: "),
        (dict(trace=dict(observation="a dog <answer>B</answer>", think="so")), "trace: ")],
        ids=["no option", "two options", "no number", "LaTeX", "a tag in the reasoning", "a tag in the observation"])
    def test_a_record_from_which_nobody_can_learn_is_skipped(self, records, load, changes, reason, tmp_path):
        examples = load([replace(records[0], **changes), records[1]])
        assert examples[0] is None and examples.skipped[0].startswith(reason) and examples[1] is not None
        assert (tmp_path / "skipped.txt").read_text().startswith(f"{records[0].path}\t{reason}")

    @pytest.mark.parametrize("reference", [
        "0", "1/2", "-3.5", "1.5 million", "12 km/h", "12:30", "3:2", "12:30 PM"])   # the last three as text
    def test_a_numerical_solution_is_a_number_a_time_or_a_ratio(self, reference):
        assert not why_invalid(record_of(problem_type="numerical", solution=reference))

    @pytest.mark.parametrize("reference", ["two", "x = 3", r"\sqrt{2}", "2π", "1 1/2", "10^{-3}"])
    def test_another_text_is_no_numerical_solution(self, reference):
        assert why_invalid(record_of(problem_type="numerical", solution=reference))

    def test_every_question_keeps_its_own_clip(self, records, load, toy, tiny_settings):
        examples = load(without_media(records, {1, 4, 6}))
        steps = [range(0, 5), range(5, 10), range(10, 20)]
        yielded = [example for step in examples.prefetch(steps) for example in step]
        assert [e.record for e in yielded] == [r for i, r in enumerate(records[:20]) if i not in (1, 4, 6)]
        for e in yielded:
            frames, _ = read_video(toy / e.record.path, tiny_settings)
            assert torch.equal(e.pixels, patchify(frames, 784, 784)[0])

    def test_too_many_missing_media_stop_the_run_with_a_hint(self, records, load):
        examples = load(without_media(records, {0, 3, 6, 9, 12}))
        with pytest.raises(ValueError, match=r"5 of 20 media .*gone0\.avi.*right media folder\?"):
            list(examples.prefetch([range(20)]))

    def test_a_few_records_are_no_evidence(self, records, load):
        examples = load(without_media(records, range(5)))
        assert [len(step) for step in examples.prefetch([range(5), range(5, 10)])] == [0, 5]

    def test_a_prompt_that_is_too_long_is_skipped_and_counted_never_cut(self, records, load):
        whole = load(records)
        lengths = [len(whole[i].ids) for i in range(20)]
        limit = (min(lengths) + max(lengths)) // 2
        examples = load(records, max_prompt=limit)
        step, = examples.prefetch([range(20)])
        assert [len(e.ids) for e in step] == [n for n in lengths if n <= limit] and 0 < len(step) < 20
        assert len(examples.skipped) == 20 - len(step), "long prompts are no missing media"
        assert all(reason.startswith("prompt: ") for reason in examples.skipped.values())


class TestPrefetch:
    @pytest.mark.parametrize("workers", [1, 4])
    def test_steps_come_in_order(self, records, load, workers):
        steps = [step_indices(40, 6, step, seed=1) for step in range(8)]
        for indices, examples in zip(steps, load(records, workers=workers).prefetch(steps), strict=True):
            assert [e.record for e in examples] == [records[i] for i in indices]


class TestCache:
    def test_kept_media_stay_under_the_limit(self, records, load, monkeypatch):
        one = load(records)[0].pixels.nbytes
        monkeypatch.setattr(data, "CACHE_BYTES", 3.5 * one)
        examples = load(records)
        first, again = ([examples[i] for i in range(5)] for _ in range(2))
        assert [a is b for a, b in zip(first, again)] == [True] * 3 + [False] * 2
        assert all(torch.equal(a.ids, b.ids) and torch.equal(a.pixels, b.pixels) for a, b in zip(first, again))


class TestFinding:
    def test_records_without_media_are_left_out_counted_and_stay_out(self, records, toy, tmp_path, capsys):
        some, kept = without_media(records, {2, 5}), tmp_path / "run/records.json"
        some[5] = replace(some[5], blind=True)               # it needs none
        there = [i for i in range(40) if i != 2]
        assert find_media(some, toy, kept) == there and "39 of 40 records have their media" in capsys.readouterr().out
        (tmp_path / "run/settings.json").touch()             # the run has begun
        assert find_media(records, toy, kept) == there, "more media have arrived"
        assert find_media(records[:9], toy, kept) == [i for i in there if i < 9], "fewer records were made anew"

    def test_a_list_of_a_run_that_never_began_is_made_anew(self, records, toy, tmp_path):
        kept = tmp_path / "run/records.json"
        find_media(without_media(records, {2}), toy, kept)
        assert find_media(records, toy, kept) == list(range(40))

    def test_where_all_media_are_missing_the_command_that_fetches_them_is_said(self, records, tmp_path):
        with pytest.raises(SystemExit, match="hf download Video-R1/Video-R1-data"):
            find_media(records, tmp_path / "elsewhere", tmp_path / "run/records.json")
        assert not (tmp_path / "run").exists()


class TestOrder:
    @pytest.mark.parametrize("count, size", [(10, 1), (10, 3), (10, 10), (7, 20)])
    def test_every_epoch_is_a_shuffle_of_all_records(self, count, size):
        flat = [i for step in range(3 * count) for i in step_indices(count, size, step, seed=0)]
        for epoch in range(3):
            assert sorted(flat[epoch * count:(epoch + 1) * count]) == list(range(count))
        assert flat[:count] != flat[count:2 * count]
