"""Promise: a journal keeps finished work. A kill loses unfinished work only, what is finished is never
done again, and an error is never kept."""
from contextlib import nullcontext

import pytest

import data
from rewards import Claim, Journal, key_of
from serving import Fault, serving

CLAIM = Claim("What is it?", (), "free-form", "a cat", "a small grey animal on a mat")


def complete(journal, numbers=range(40), fails=(), **how):
    """The rows of a journal that doubles numbers, and those that were worked on."""
    done = []

    def work(n):
        done.append(n)
        return {"twice": 2 * n, "error": "too hard" if n in fails else ""}
    rows = journal.complete({key_of(n): n for n in numbers}, work, **how)
    assert [row["twice"] for row in rows.values()] == [2 * n for n in numbers], "in their order"
    return rows, done


# -------------------------------------------------------------------------------- what is finished

def test_what_is_finished_is_never_done_again(tmp_path):
    assert complete(Journal(tmp_path / "w"), range(3))[1] == [0, 1, 2]
    assert complete(Journal(tmp_path / "w"), range(2, 6))[1] == [3, 4, 5]
    assert complete(Journal(tmp_path / "w"), [5, 0, 4])[1] == []


def test_without_a_place_nothing_is_written_and_this_journal_remembers():
    journal = Journal(None)
    assert complete(journal)[1] and not complete(journal)[1]


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
    file.write_bytes(b"{\n" + file.read_bytes())
    with pytest.raises(ValueError, match="w.0.jsonl, line 1: not JSON"):
        Journal(tmp_path / "w")


def test_ranks_write_files_of_their_own_and_read_those_of_all(tmp_path):
    for rank in (0, 1):
        complete(Journal(tmp_path / "w", rank), range(10 * rank, 10 * rank + 10))
    with (tmp_path / "w.1.jsonl").open("a") as neighbour:    # it is writing a line
        neighbour.write('{"key"')
    assert complete(Journal(tmp_path / "w", 0), range(21))[1] == [20]
    assert (tmp_path / "w.1.jsonl").read_text().endswith('{"key"'), "it is not cut short"


def test_whatever_decides_a_row_is_in_its_key():
    keys = [key_of(*decisive) for decisive in (
        ("a", "b"), ("ab",), (["a"], "b"), (CLAIM,), (CLAIM._replace(observation="a mat"),), (1,), ("1",))]
    assert len(set(keys)) == len(keys)
    assert key_of(CLAIM, 0.5) == key_of(Claim(*CLAIM), 0.5)


# ------------------------------------------------------------------------------------------ errors

def test_an_error_is_told_and_not_kept(tmp_path):
    rows, _ = complete(Journal(tmp_path / "w"), fails=[1, 7])
    assert [row["twice"] for row in rows.values() if row["error"]] == [2, 14]
    assert complete(Journal(tmp_path / "w"))[1] == [1, 7]


@pytest.mark.parametrize("count, allowed, stops", [(19, 0.3, False), (20, 0.3, True), (20, 0.5, False)])
def test_too_many_errors_stop_the_work_and_what_is_done_is_kept(count, allowed, stops, tmp_path):
    """Fewer than twenty are a misfortune: they are told and tried again."""
    said = f"reading: {count} of 40 failed, the last for too hard"
    with pytest.raises(ValueError, match=said) if stops else nullcontext():
        complete(Journal(tmp_path / "w"), fails=range(5, 5 + count), title="reading", max_failed=allowed)
    assert len(Journal(tmp_path / "w").rows) == (5 if stops else 40 - count)


# ----------------------------------------------------------------------------- the verdicts of a server

def test_an_equal_question_is_asked_once_also_by_the_next_run(tmp_path):
    """Only verdicts are kept, and other settings are other questions."""
    said = [Fault(500), "Hm.", *(f"{n} <judgement>Yes</judgement>" for n in range(9))]
    with serving(lambda n, request: said[n]) as server:
        def ask(path="", model="m", tokens=5):
            s = data.JudgeSettings(judge=server.url + path, judge_model=model, judge_tokens=tokens, retries=0)
            (verdict,) = data.make_judge(s, tmp_path / "judge")([CLAIM])
            return (verdict.error or verdict.explanation).split(" ")[0]
        assert [ask(), ask(), ask(), ask()] == ["HTTP", "no", "0", "0"]
        assert ask(path="/") == "0", "the model decides, not its address"
        assert [ask(model="n"), ask(tokens=9), ask()] == ["1", "2", "0"]
