"""Promise: a record is read as it was meant or refused by name; one whose medium cannot be read is skipped, counted and
named, and never gets somebody else's clip; the order of records is a pure function of the seed."""
import gzip
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from data import Examples, patchify, read_records, read_video, step_indices, to_record, why_invalid
from model import read_config

ROW = {"problem_id": 7, "problem": "Which pet?", "options": ["A. a cat", "B. a dog"], "solution": "<answer>B</answer>",
       "path": "./clips/1.mp4", "data_type": "video", "problem_type": "multiple choice",
       "observation": "<observation>a dog barks</observation>", "process": "<think>so it is a dog</think>"}


def lines(*rows):
    return "\n".join(map(json.dumps, rows))


class TestReading:
    @pytest.mark.parametrize("content", [
        pytest.param(gzip.compress(json.dumps([ROW, ROW]).encode()), id="gzip list"),
        pytest.param(json.dumps([ROW, ROW], indent=2).encode(), id="list"),
        pytest.param(lines(ROW, ROW).encode(), id="lines"),
        pytest.param((lines(ROW, ROW) + "\n\n").encode(), id="lines with blanks"),
        pytest.param(gzip.compress(lines(ROW, ROW).encode()), id="gzip lines"),
        pytest.param(b"\xef\xbb\xbf" + json.dumps([ROW, ROW]).encode(), id="list with byte order mark"),
        pytest.param(gzip.compress(b"\xef\xbb\xbf \n" + json.dumps([ROW, ROW]).encode()), id="gzip, mark and blanks"),
    ])
    def test_a_list_or_lines_plain_or_gzip_are_the_same_records(self, content, tmp_path):
        (tmp_path / "any.name").write_bytes(content)
        first, second = read_records(tmp_path / "any.name", traces=True)
        assert first == second
        assert (first.problem_id, first.question, first.options) == ("7", "Which pet?", ("A. a cat", "B. a dog"))
        assert (first.problem_type, first.reference, first.path, first.data_type) == \
            ("multiple choice", "B", "./clips/1.mp4", "video")
        assert first.trace == {"observation": "a dog barks", "think": "so it is a dog"}, "without their tags"

    def read(self, folder, **changes):
        (folder / "one.json").write_text(json.dumps([ROW | changes]))
        return read_records(folder / "one.json")[0]

    @pytest.mark.parametrize("options, read", [
        (["A. a cat", "B. a dog"], ("A. a cat", "B. a dog")),
        ("['A. a cat', 'B. a dog']", ("A. a cat", "B. a dog")),
        ('["A. it\'s a cat", "B. a dog"]', ("A. it's a cat", "B. a dog")),
        ("[]", ()), ([], ()), ("", ()), (None, ())])
    def test_options_are_a_list_or_a_text_that_holds_one(self, options, read, tmp_path):
        assert self.read(tmp_path, options=options).options == read

    @pytest.mark.parametrize("solution, reference", [
        ("<answer>B</answer>", "B"), ("<answer> B \n</answer>", "B"), ("B", "B"), (" B ", "B"), (12, "12"),
        (0.5, "0.5"), (0, "0"), ("<answer>The cat < the dog</answer>", "The cat < the dog")])
    def test_the_reference_stands_in_tags_or_bare(self, solution, reference, tmp_path):
        assert self.read(tmp_path, problem_type="free-form", solution=solution).reference == reference

    @pytest.mark.parametrize("options, solution", [
        (["A: 3, B: 4", "A: 4, B: 3"], "B"),                 # texts that begin like letters
        (["J. Smith", "R. Brown", "K. Jones"], "B"), (["J. Smith", "R. Brown", "K. Jones"], "R. Brown"),
        (["E. coli", "a virus", "a fungus"], "C"), (["a cat", "B. a dog", "a cow"], "B"),
        (["A. a cat", "B. a dog", "B. a cow", "D. a fish"], "D"),    # a letter twice: places, as they are shown
        (["a. a cat", "c. a dog"], "B"), (["(A) a cat", "(B) a dog"], "(B)")])
    def test_texts_that_begin_like_letters_are_texts(self, options, solution, tmp_path):
        record = self.read(tmp_path, options=options, solution=solution)
        assert record.options == tuple(options) and not why_invalid(record)

    def test_letters_matter_to_multiple_choice_only(self, tmp_path):
        assert self.read(tmp_path, problem_type="free-form", options=["A. a fish", "C. a dog"], solution="C")

    def test_a_line_ends_where_a_line_ends_not_inside_a_text(self, tmp_path):
        row = ROW | {"problem": "Which pet?\u2028Say\x85it."}
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in (row, ROW)), "utf-8")
        assert [r.question for r in read_records(tmp_path / "a.jsonl")] == [row["problem"], ROW["problem"]]

    def test_traces_are_needed_only_where_they_are_asked_for(self, tmp_path):
        bare = {k: v for k, v in ROW.items() if k not in ("observation", "process")}
        (tmp_path / "rl.json").write_text(json.dumps([bare]))
        assert read_records(tmp_path / "rl.json")[0].trace == {}
        with pytest.raises(ValueError, match="record 1: lacks observation, process"):
            read_records(tmp_path / "rl.json", traces=True)


class TestRefusing:
    @pytest.mark.parametrize("changes, reason", [
        ({"problem_type": "poem"}, "unknown problem_type 'poem'"),
        ({"data_type": "audio"}, "unknown data_type 'audio'"),
        ({"problem": None}, "lacks problem"),
        ({"solution": ""}, "lacks solution"),
        ({"path": None, "data_type": ""}, "lacks path, data_type"),
        ({"options": "A. a cat"}, "options are no list"),
        ({"options": ["A. a cat", 2]}, "options are no list"),
        ({"options": "print('hello')"}, "options are no list"),
        ({"options": ["A. a cat"]}, "one option"),
        *[({"options": ["A. a fish", "C. a dog", "D. a cat"], "solution": solution}, "letters that are not A, B, C")
          for solution in ("C", "A", "D", "B", "<answer>C</answer>", "C. a dog")],
        ({"options": ["B. a dog", "A. a cat"], "solution": "B"}, "letters that are not A, B, C"),
        ({"options": ["(B) a dog", "(C) a cat"], "solution": "(C)"}, "letters that are not A, B, C"),
        ({"options": "['P: 1', 'Q: 2', 'R: 3', 'S: 4']", "solution": "Q"}, "letters that are not A, B, C"),
        ({"options": ["A. a fish", "C. a dog", "none of them"], "solution": "C."}, "letters that are not A, B, C"),
        ({"problem": 5}, "problem: not a text"),
        ({"problem": "\ud800"}, "surrogates not allowed"),
        ({"solution": "<answer> </answer>"}, "solution is not one answer"),
        ({"solution": "<answer>A</answer><answer>B</answer>"}, "solution is not one answer"),
        ({"solution": "A</answer>"}, "solution is not one answer"),
        ({"solution": ["B"]}, "solution is not one answer"),
        ({"solution": float("nan")}, "solution is not one answer"),
        ({"observation": ["a dog"]}, "observation: not a text"),
    ])
    @pytest.mark.parametrize("write", [lambda rows: json.dumps(rows), lambda rows: lines(*rows)], ids=["list", "lines"])
    def test_a_wrong_record_is_named_by_file_and_number(self, write, changes, reason, tmp_path):
        (tmp_path / "train.json").write_text(write([ROW, ROW, ROW | changes, ROW]))
        with pytest.raises(ValueError, match=f"train.json, record 3: .*{reason}"):
            read_records(tmp_path / "train.json")

    @pytest.mark.parametrize("row", ["a text", 5, None, [ROW]])
    def test_what_is_no_object_is_no_record(self, row, tmp_path):
        (tmp_path / "train.json").write_text(json.dumps([ROW, row]))
        with pytest.raises(ValueError, match="train.json, record 2: is a .*, not an object"):
            read_records(tmp_path / "train.json")

    def test_a_broken_line_is_named_by_its_number(self, tmp_path):
        (tmp_path / "train.jsonl").write_text(lines(ROW, ROW) + '\n\n{"problem": "cut o')
        with pytest.raises(ValueError, match="train.jsonl, record 3: Unterminated string"):
            read_records(tmp_path / "train.jsonl")

    whole = gzip.compress(json.dumps([ROW] * 50).encode())

    @pytest.mark.parametrize("content, reason", [
        pytest.param(b" \n\n", "holds no records", id="blank"),
        pytest.param(b"[]", "holds no records", id="empty list"),
        pytest.param(whole[:len(whole) // 2], "Compressed file ended", id="half a gzip"),
        pytest.param(whole[:40] + bytes(20) + whole[60:], "Error -3 while decompressing", id="damaged gzip"),
        pytest.param(json.dumps([ROW, ROW])[:-30].encode(), "Unterminated string", id="half a list"),
        pytest.param(b"PK\x03\x04\xff\xfe\x00", "can't decode byte", id="a zip"),
        pytest.param(b"<html>404</html>", "record 1: Expecting value", id="a web page"),
    ])
    def test_a_file_that_holds_no_records_is_named(self, content, reason, tmp_path):
        (tmp_path / "train.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"train.json.*{reason}"):
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
        assert all(reason.startswith("media: ") for reason in examples.skipped.values())
        logged = (tmp_path / "skipped.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in logged] == ["./sft/gone2.avi", "./sft/gone5.avi"]
        assert all("no such file" in line for line in logged)

    @pytest.mark.parametrize("changes, reason", [
        (dict(problem_type="multiple choice", options=("A. a cat", "B. a dog"), reference="C"), "solution: 'C'"),
        (dict(problem_type="multiple choice", options=("A. dog", "B. dog"), reference="dog"), "solution: 'dog'"),
        (dict(problem_type="regression", reference="many"), "solution: 'many'"),
        (dict(problem_type="regression", reference=r"\frac{1}{2}"), "solution: '\\\\frac{1}{2}'"),
        (dict(problem_type="numerical", reference=r"\frac{1}{2}"), "solution: '\\\\frac{1}{2}' is no number"),
        (dict(trace=dict(observation="a dog", think="so it is</think> a dog")), "trace: "),
        (dict(trace=dict(observation="a dog <answer>B</answer>", think="so")), "trace: ")],
        ids=["no option", "two options", "no number", "no regression", "LaTeX", "a tag in the reasoning", "a tag in the observation"])
    def test_a_record_from_which_nobody_can_learn_is_skipped(self, records, load, changes, reason, tmp_path):
        examples = load([replace(records[0], **changes), records[1]])
        assert examples[0] is None and examples.skipped[0].startswith(reason) and examples[1] is not None
        assert (tmp_path / "skipped.txt").read_text().startswith(f"{records[0].path}\t{reason}")

    @pytest.mark.parametrize("reference, valid", [
        ("0", True), ("1/2", True), ("-3.5", True), ("1.5 million", True), ("12 km/h", True), ("5 €", True),
        ("12:30", True), ("3:2", True), ("12:30 PM", True),  # as text: nobody would write them otherwise
        ("two", False), ("x = 3", False), (r"\sqrt{2}", False), ("2π", False), ("1 1/2", False), ("10^{-3}", False)])
    def test_a_numerical_solution_is_a_number_a_time_or_a_ratio(self, reference, valid):
        record = to_record(ROW | {"problem_type": "numerical", "solution": reference}, traces=False)
        assert (why_invalid(record) == "") == valid

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
        with pytest.raises(ValueError, match=r"5 of 20 media .*gone0\.avi.*right media folder\?.*data.py check"):
            list(examples.prefetch([range(20)]))

    def test_a_few_records_are_no_evidence(self, records, load):
        examples = load(without_media(records, range(5)))
        assert [len(step) for step in examples.prefetch([range(5), range(5, 10)])] == [0, 5]

    def test_a_prompt_that_is_too_long_is_skipped_and_counted_never_cut(self, records, load, tmp_path):
        whole = load(records)
        lengths = [len(whole[i].ids) for i in range(20)]
        limit = (min(lengths) + max(lengths)) // 2
        examples = load(records, max_prompt=limit)
        assert 0 < sum(n > limit for n in lengths) < 20
        for i, n in enumerate(lengths):
            assert examples[i] is None if n > limit else torch.equal(examples[i].ids, whole[i].ids)
        assert Counter(reason.split(":")[0] for reason in examples.skipped.values()) == \
            {"prompt": sum(n > limit for n in lengths)}
        assert str(limit) in (tmp_path / "skipped.txt").read_text()
        assert len(list(examples.prefetch([range(20)]))) == 1, "long prompts are no missing media"


class TestPrefetch:
    @pytest.mark.parametrize("workers", [1, 4])
    def test_steps_come_in_order(self, records, load, workers):
        steps = [step_indices(40, 6, step, seed=1) for step in range(8)]
        for indices, examples in zip(steps, load(records, workers=workers).prefetch(steps), strict=True):
            assert [e.record for e in examples] == [records[i] for i in indices]


class TestCache:
    def test_kept_media_stay_under_the_limit(self, records, load):
        one = load(records)[0].pixels.nbytes
        examples = load(records, cache_gb=3.5 * one / 2 ** 30)
        first = [examples[i] for i in range(10)]
        assert len(examples.cache) == 3 and sum(e.pixels.nbytes for e in examples.cache.values()) <= 3.5 * one
        again = [examples[i] for i in range(10)]
        assert [a is b for a, b in zip(first, again)] == [True] * 3 + [False] * 7
        assert all(torch.equal(a.ids, b.ids) and torch.equal(a.pixels, b.pixels) for a, b in zip(first, again))


class TestOrder:
    @pytest.mark.parametrize("count, size", [(10, 1), (10, 3), (10, 10), (7, 20)])
    def test_every_epoch_is_a_shuffle_of_all_records(self, count, size):
        flat = [i for step in range(3 * count) for i in step_indices(count, size, step, seed=0)]
        for epoch in range(3):
            assert sorted(flat[epoch * count:(epoch + 1) * count]) == list(range(count))
        assert flat[:count] != flat[count:2 * count]
