"""Promise: a journal keeps finished work. A kill loses unfinished work only, what is finished is never
done again, and an error is never kept."""
import json
import threading

import pytest

import data
from rewards import Claim, Journal, key_of
from serving import Fault, serving

ITEMS = {key_of(n): n for n in range(40)}


class Work:
    """Doubles numbers, and writes down which; it fails for some of them."""

    def __init__(self, fails=()):
        self.fails, self.seen, self.parts = fails, [], []

    def __call__(self, numbers):
        self.parts.append(numbers)
        self.seen += numbers
        return [{"twice": 2 * n, "error": "too hard" if n in self.fails else ""} for n in numbers]


def doubled(rows):
    return [row["twice"] for row in rows.values()]


def complete(journal, numbers=range(40), fails=(), **how):
    """The rows of a journal for these numbers, and the numbers that were worked on."""
    work = Work(fails)
    rows = journal.complete({key_of(n): n for n in numbers}, work, **how)
    assert doubled(rows) == [2 * n for n in numbers], "one for each, in their order"
    return rows, work.seen


# -------------------------------------------------------------------------------- what is finished

def test_what_is_finished_is_never_done_again(tmp_path):
    assert complete(Journal(tmp_path / "w"), range(3))[1] == [0, 1, 2]
    for _ in range(2):                                       # also by the next start
        journal = Journal(tmp_path / "w")
        complete(journal, range(2, 6))
    assert complete(journal, [5, 0, 4])[1] == []
    lines = (tmp_path / "w.0.jsonl").read_text().splitlines()
    assert [json.loads(line)["twice"] for line in lines] == [0, 2, 4, 6, 8, 10]


def test_without_a_place_nothing_is_written_and_this_journal_remembers():
    journal = Journal(None)
    assert complete(journal)[1] and not complete(journal)[1]


def test_what_breaks_off_loses_unfinished_work_only(tmp_path):
    def breaks(numbers):
        if numbers == [3]:
            raise RuntimeError("the machine is on fire")
        return Work()(numbers)
    with pytest.raises(RuntimeError, match="on fire"):
        Journal(tmp_path / "w").complete(ITEMS, breaks)
    assert complete(Journal(tmp_path / "w"))[1] == [*range(3, 40)]


def test_a_line_that_a_kill_cut_short_is_done_again(tmp_path):
    complete(Journal(tmp_path / "w"))
    file = tmp_path / "w.0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert complete(Journal(tmp_path / "w"))[1] == [39]
    assert file.read_bytes() == whole


def test_any_other_broken_line_is_named(tmp_path):
    complete(Journal(tmp_path / "w"))
    file = tmp_path / "w.0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:30] + b"\n" + whole[30:])
    with pytest.raises(ValueError, match="w.0.jsonl, line 1: not JSON"):
        Journal(tmp_path / "w")


def test_ranks_write_files_of_their_own_and_read_those_of_all(tmp_path):
    for rank in (0, 1):
        journal = Journal(tmp_path / "w", rank)
        complete(journal, range(10 * rank, 10 * rank + 10))
    (tmp_path / "w.1.jsonl").write_bytes((tmp_path / "w.1.jsonl").read_bytes() + b'{"key"')
    again = Journal(tmp_path / "w", 0)                       # its neighbour is writing a line
    assert complete(again, range(21))[1] == [20]
    assert (tmp_path / "w.1.jsonl").read_bytes().endswith(b'{"key"'), "it is not cut short"


def test_whatever_decides_a_row_is_in_its_key():
    claim = Claim("What?", ("a", "b"), "free-form", "a cat", "a grey animal")
    keys = [key_of(*decisive) for decisive in (
        (), ("a", "b"), ("ab",), (["a"], "b"), (claim,), (claim._replace(observation="a mat"),), (1,),
        ("1",))]
    assert len(set(keys)) == len(keys)
    assert key_of(claim, 0.5) == key_of(Claim(*claim), 0.5)


# ------------------------------------------------------------------------------------------ errors

def test_an_error_is_told_and_not_kept(tmp_path):
    rows, _ = complete(Journal(tmp_path / "w"), fails=[1, 7])
    assert [row["twice"] for row in rows.values() if row["error"]] == [2, 14]
    assert complete(Journal(tmp_path / "w"))[1] == [1, 7]


@pytest.mark.parametrize("count, stops", [(19, False), (20, True)])
def test_too_many_errors_stop_the_work_and_what_is_done_is_kept(count, stops, tmp_path):
    """Fewer than twenty are a misfortune: they are told and tried again."""
    work, journal = Work(range(5, 5 + count)), Journal(tmp_path / "w")
    if stops:
        with pytest.raises(ValueError, match=f"reading: {count} of 40 failed, most often for too hard"):
            journal.complete(ITEMS, work, title="reading", max_failed=0.3)
    else:
        journal.complete(ITEMS, work, title="reading", max_failed=0.3)
    left = set(complete(Journal(tmp_path / "w"))[1])
    assert not left & set(range(5)) and left >= set(range(5, 5 + count))


def test_a_share_of_errors_that_is_allowed_does_not_stop_it():
    journal = Journal(None)
    complete(journal, fails=range(30), max_failed=0.8)
    assert len(journal.rows) == len(ITEMS) - 30


# --------------------------------------------------------------------------------- several at once

def test_work_comes_in_batches(tmp_path):
    complete(Journal(tmp_path / "w"), [1])
    work = Work()
    Journal(tmp_path / "w").complete(ITEMS, work, batch=16)
    assert [len(part) for part in work.parts] == [16, 16, 7] and 1 not in work.seen


def test_threads_work_at_once_and_no_more_of_them_than_allowed(tmp_path):
    together, under_way, most = threading.Barrier(4), [], []

    def work(numbers):
        under_way.extend(numbers)
        together.wait(10)                                    # breaks unless four are here
        most.append(len(under_way))
        together.wait(10)
        under_way.remove(numbers[0])
        together.wait(10)
        return [{"twice": 2 * numbers[0]}]
    rows = Journal(tmp_path / "w").complete(ITEMS, work, threads=4)
    assert doubled(rows) == [2 * n for n in range(40)], "in the order of the items"
    assert set(most) == {4} and len((tmp_path / "w.0.jsonl").read_text().splitlines()) == 40


# ----------------------------------------------------------------------------- the verdicts of a server

def test_an_equal_question_is_asked_once_also_by_the_next_run(tmp_path):
    """Only verdicts are kept, and other settings are other questions."""
    said = [Fault(500), "Hm.", *(f"{n} <judgement>Yes</judgement>" for n in range(9))]
    claim = Claim("What is it?", (), "free-form", "a cat", "a small grey animal on a mat")
    with serving(lambda n, request: said[n]) as server:
        def ask(path="", **changes):
            s = data.JudgeSettings(**dict(judge=server.url + path, judge_model="m", retries=0) | changes)
            (verdict,) = data.make_judge(s, tmp_path / "judge")([claim])
            return verdict.error.split(" ")[0] or verdict.explanation.split(" ")[0]
        assert [ask(), ask(), ask(), ask()] == ["HTTP", "no", "0", "0"]
        assert ask(path="/") == "0", "the model decides, not its address"
        assert [ask(judge_model="n"), ask(judge_tokens=9), ask()] == ["1", "2", "0"]
