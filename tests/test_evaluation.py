"""Promise: an evaluation is a number one can trust. Its arithmetic is done here by hand, it loses nothing when it is
killed, and two of them can be held against each other question by question."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
import eval as evaluation
import pagrpo
from eval import compare, mean, mismatch, open_answer, read_numbers, read_rows, sign_test, summarise, summary_text
from toy_runs import ENV, ROOT


def row(number: int, score: float, group: str = "a", **more) -> dict:
    return {"id": str(number), "clip": str(number), "groups": {"task": group}, "question": "?",
            "options": ["x", "y", "z", "w"], "reference": "A", "prompt": "p", "frames": 32, "pixels": [28, 28],
            "finished": True, "think": None, "answer": None, "extracted": "A", "score": score, "format": True,
            "perception": None} | more


def write(folder: Path, rows: list[dict]) -> str:
    """An evaluation's folder with these rows."""
    folder.mkdir()
    data.write_rows(folder / "responses.jsonl", rows)
    return str(folder)


# ------------------------------------------------------------------------------------------------ reading

@pytest.mark.parametrize("text, gold, score", [
    ("about 1.5 million people", "1500000", 1), ("It is 1.5 billion", "1.5 million", 0), ("5k", "5000", 1),
    ("300K", "300", 1), ("12", "12 km/h", 1), ("in 10 k-means runs", "10", 1)])
def test_an_open_answer_has_its_magnitude_but_a_capital_may_be_a_unit(text, gold, score):
    assert open_answer(text, gold) == score


def test_a_number_in_a_sentence_has_its_magnitude():
    assert read_numbers("2 million, 3 thousands and 5k of 7 m") == [2_000_000, 3_000, 5_000, 7]


# ------------------------------------------------------------------------------------------------ arithmetic

def limits(x: dict) -> list[float]:
    return [x["low"] / 100, x["high"] / 100]


@pytest.mark.parametrize("right, n, wanted", [(3, 10, [0.1078, 0.6032]), (0, 8, [0, 0.3244])])
def test_independent_rights_and_wrongs_have_wilsons_interval(right, n, wanted):
    x = mean([row(i, float(i < right)) for i in range(n)])
    assert (x["value"], x["n"], x["chance"]) == (100 * right / n, n, 25)
    assert limits(x) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("right", [3, 10])
def test_ten_equal_answers_about_one_clip_say_as_much_as_one(right):
    rows = [row(i, float(i % 10 < right), clip=str(i % 10)) for i in range(100)]
    assert limits(mean(rows)) == pytest.approx(limits(pagrpo.wilson(right / 10, 10)))


def test_answers_about_one_clip_that_differ_by_chance_widen_the_interval_little():
    """Two clips of four questions, three right of the first, one of the second. By hand: deviations ±1/8 of each sum to
    (3 - 2) / 8 and (1 - 2) / 8, their squares to 1/32, so that n = (1/4) / (1/32) = 8."""
    rows = [row(i, float(i in (0, 1, 2, 4)), clip=str(i // 4)) for i in range(8)]
    assert limits(mean(rows)) == pytest.approx(limits(pagrpo.wilson(0.5, 8)))


def test_a_mean_of_parts_has_the_error_of_its_parts():
    """Half of the weight on 1, 0, 1, 0, half on 1, 1, 1, 0: squared errors (1/4)(1/16) and (1/4)(3/64)."""
    rows = [row(i, float(i not in (1, 3, 7)), "ab"[i // 4]) for i in range(8)]
    x = mean([*rows, row(8, 0.0, "c")], ((1, ("a",)), (1, ("b",)), (1, ("not there",))))
    assert (x["value"], x["n"]) == (62.5, 8)
    n = 0.625 * 0.375 / (1 / 64 + 3 / 256)
    assert limits(x) == pytest.approx(limits(pagrpo.wilson(0.625, n)))


def test_vsi_bench_has_two_means_and_they_differ():
    """Two of three numeric questions at MRA 0.5, one at 1; direction easy 1, medium 0, hard 1; order 1.

    paper     (3/4 + 2/3) / 2                                                  = 70.8
    official  counting 0.5, room size 1, direction 2/3, order 1: of the four tasks that are there, 79.2
    """
    scores = [("object_counting", 0.5), ("object_counting", 0.5), ("room_size_estimation", 1.0),
              ("object_rel_direction_easy", 1.0), ("object_rel_direction_medium", 0.0),
              ("object_rel_direction_hard", 1.0), ("obj_appearance_order", 1.0)]
    s = summarise("vsibench", [row(i, score, task) for i, (task, score) in enumerate(scores)])
    paper, official, *_ = [x["value"] / 100 for x in s["aggregates"].values()]
    assert paper == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert official == pytest.approx((0.5 + 1 + 2 / 3 + 1) / 4)


def test_what_was_not_read_counts_as_wrong_and_what_was_not_there_does_not_count():
    gone = row(3, 0) | {"missing": "media: gone"}
    s = summarise("mvbench", [row(0, 1.0), row(1, 0.0, extracted=None), row(2, 0.0, finished=False), gone])
    assert s["aggregates"]["all questions"]["value"] == pytest.approx(100 / 3)
    assert (s["questions"], s["scored"], s["unread"], s["cut_off"]) == (4, 3, 1, 1)
    assert "INCOMPLETE: 1 of 4 (25.0%)" in summary_text(s)
    assert "0 questions scored" in summary_text(summarise("mvbench", [gone]))


@pytest.mark.parametrize("wins, losses, p", [(0, 0, 1), (10, 0, 2 / 1024), (3, 7, 2 * 176 / 1024)])
def test_mcnemar_by_hand(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p)


# ------------------------------------------------------------------------------------------------ running

def words(world: Path, model: Path, out: Path, *flags) -> list[str]:
    return ["--bench", "toy", "--data", str(world), "--model", str(model), "--preset", "tiny", "--out", str(out),
            "--batch", "3", "--max-response", "8", *flags]


def run(*args) -> dict[str, dict]:
    """id → row of an evaluation with these words."""
    evaluation.main(words(*args))
    return read_rows(args[2] / "toy")


@pytest.fixture
def asked(monkeypatch):
    """The examples that the model was asked, in order."""
    examples, real = [], pagrpo.rollout

    def watched(policy, batch, *rest):
        examples.extend(batch)
        return real(policy, batch, *rest)
    monkeypatch.setattr(pagrpo, "rollout", watched)
    return examples


def test_a_killed_evaluation_continues_where_it_stopped(toy, base, tmp_path, monkeypatch, asked):
    whole, watched = run(toy, base, tmp_path / "whole"), pagrpo.rollout
    asked.clear()

    def dies(*args):
        if len(asked) == 6:
            raise KeyboardInterrupt
        return watched(*args)
    with monkeypatch.context() as killed, pytest.raises(SystemExit, match="goes on from here"):
        killed.setattr(pagrpo, "rollout", dies)
        run(toy, base, tmp_path)
    assert not read_rows(tmp_path / "toy")
    with (tmp_path / "toy" / "work.0.jsonl").open("a") as file:
        file.write('{"id": "cut sho')                        # a kill in the middle of a line
    assert run(toy, base, tmp_path) == whole
    assert len(asked) == 20


def test_two_ranks_score_the_same_questions_once_each(toy, base, tmp_path, asked):
    one, two = run(toy, base, tmp_path / "one"), tmp_path / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "eval.py"]
    subprocess.run(launcher + words(toy, base, two), check=True, timeout=120, env=ENV)
    work = [(two / f"toy/work.{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert [len(lines) for lines in work] == [10, 10]
    assert read_rows(two / "toy") == one
    asked.clear()
    assert run(toy, base, two) == one and not asked, "one rank goes on from the rows of two"


def test_media_that_come_later_are_asked_about_then(toy, base, tmp_path, capsys):
    world = shutil.copytree(toy, tmp_path / "world")
    clip = next(world.glob("heldout/*.apng"))
    away = clip.rename(tmp_path / "away")
    run(world, base, tmp_path)
    assert "19 questions scored; INCOMPLETE" in capsys.readouterr().out
    away.rename(clip)
    run(world, base, tmp_path)
    assert "20 questions scored\n" in capsys.readouterr().out


def test_rows_of_other_settings_and_other_weights_do_not_count_and_are_kept(toy, base, tmp_path, asked):
    model = shutil.copytree(base, tmp_path / "model")
    counts = []
    for flags in ([], ["--temperature", "1"], [], ["--limit", "4"]):
        asked.clear()
        rows = run(toy, model, tmp_path, *flags)
        counts.append(len(asked))
    assert counts == [20, 20, 0, 0] and len(rows) == 4
    os.utime(model / "model.safetensors", (1, 1))
    run(toy, model, tmp_path)
    assert len(asked) == 20


def test_a_question_that_is_worded_anew_is_asked_anew(toy, base, tmp_path, asked):
    world = shutil.copytree(toy, tmp_path / "world")
    before, file = run(world, base, tmp_path), world / "heldout.json"
    rows = json.loads(file.read_text())
    rows[0]["options"] = ["A. red T", "B. red O"]
    rows[1]["solution"] = "another reference"
    file.write_text(json.dumps(rows))
    asked.clear()
    after = run(world, base, tmp_path)
    assert [before[key] != after[key] for key in before] == [True, True] + [False] * 18
    assert len(asked) == 2


def test_a_judge_that_is_lost_stops_the_evaluation_before_its_verdicts_are(toy, started, tmp_path):
    with pytest.raises(SystemExit, match="verdicts stayed unknown.*goes on from here"):
        run(toy, started, tmp_path, "--judge", "http://127.0.0.1:9/v1", "--judge-model", "m", "--retries", "0",
            "--max-response", "64")
    assert not read_rows(tmp_path / "toy")


def test_the_model_itself_can_be_the_judge(toy, started, tmp_path, capsys):
    rows = run(toy, started, tmp_path, "--judge", "reference", "--limit", "6", "--max-response", "64")
    assert "judge: reference" in capsys.readouterr().out
    assert all("answering blind" in r["judge"] for r in rows.values() if r["observation"])


def test_an_evaluation_does_not_sample_at_the_temperature_of_rl(tmp_path):
    for flags, wanted in ([], 0.01), (["--temperature", "1"], 1.0):
        args = evaluation.parse_args(["--bench", "toy", "--preset", "tiny", *flags])
        assert evaluation.find_settings(tmp_path, args).temperature == wanted


@pytest.mark.parametrize("flags, complaint", [
    (["--temperature", "nan"], "--temperature must be at least 0"), (["--limit", "-1"], "--limit must be at least 0"),
    (["--video", "x.mp4"], "not allowed with argument")])
def test_senseless_flags_are_refused(flags, complaint, toy, base, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(toy, base, tmp_path, *flags)
    assert complaint in str(ended.value) + capsys.readouterr().err


def test_without_a_model_the_newest_finished_run_is_taken(toy, started, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="python pagrpo.py"):
        evaluation.main(["--bench", "toy"])
    for age, (name, steps) in enumerate([("old", 40), ("new", 40), ("unfinished", 9999)]):
        file = shutil.copytree(started, tmp_path / "runs" / name / "sft") / "step-000040/state.json"
        state = json.loads(file.read_text())
        file.write_text(json.dumps(state | {"steps": steps}))
        os.utime(file, (age, age))
    evaluation.main(["--bench", "toy", "--data", str(toy), "--limit", "2", "--max-response", "4"])
    said = capsys.readouterr().out
    assert "Model runs/new/sft/step-000040\n" in said and "ONLY 2 of them" in said


# ------------------------------------------------------------------------------------------------ analyses

def test_mismatch_counts_answers_that_do_not_follow():
    said = [("so it is B", "B"), ("so it is B", "C"), ("B, no, it must be C.", "C"), ("hard to tell", "A"), (None, "A")]
    rows = [row(i, 0, think=think, answer=answer) for i, (think, answer) in enumerate(said)]
    x = mismatch(rows)
    assert (x["value"], x["n"]) == (pytest.approx(100 / 3), 3)
    assert "name different options: 33.3" in summary_text(summarise("mvbench", rows))


# (score, perception) in one evaluation and in the other
PAIRS = [((0, False), (1, True)), ((0, True), (1, True)), ((1, True), (0, False)), ((1, True), (0, True)),
         ((0, False), (1, False)), ((1, True), (1, False)), ((0, False), (0, False)), ((1, True), (1, True))]


def test_comparing_counts_wins_and_losses_and_where_the_errors_are(tmp_path):
    a, b = ([row(i, score, perception=seen) for i, (score, seen) in enumerate(side)] for side in zip(*PAIRS))
    said = compare(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert "8 questions are in both (A has 8, B 8). B wins 3 and loses 2: p = 1 " in said and "NOT" not in said
    first, second = (line.split()[-4:] for line in said.splitlines()[2:4])
    assert first == ["4", "1", "0", "3"] and second == ["3", "1", "2", "2"]      # both, perception, answer, neither


def test_what_cannot_be_compared_is_said(tmp_path):
    a = write(tmp_path / "a", [row(0, 1.0), row(1, 0.0)])
    b = write(tmp_path / "b", [row(0, 1.0, prompt="q")])
    assert "NOT comparable: 1 questions" in compare(a, b)
    for other, complaint in ((row(7, 1.0), "no question in common"), (row(0, 1.0, question="another"), "another text")):
        with pytest.raises(SystemExit, match=complaint):
            evaluation.main(["--compare", a, write(tmp_path / complaint, [other])])


def test_the_observation_of_one_run_can_be_given_to_another(toy, base, tmp_path, vocabulary, asked):
    """What the model gets with each pair of flags, seen from inside: media or none, an observation or none."""
    records = data.read_records(toy / "heldout.json")
    given = {r.problem_id: r.trace["observation"] for r in records[:4]}
    theirs = write(tmp_path / "theirs", [row(0, 1.0, id=key, observation=given[key]) for key in given])
    for blind, giving in ([], []), (["--blind"], []), ([], ["--given", theirs]), (["--blind"], ["--given", theirs]):
        asked.clear()
        evaluation.main(words(toy, base, tmp_path, *blind, *giving))
        assert len(asked) == (4 if giving else 20)
        for example in asked:
            opening = f"assistant\n<observation> {given.get(example.record.problem_id)} </observation>\n"
            assert (example.pixels is None) == bool(blind)
            assert vocabulary.decode(example.ids.tolist()).endswith(opening) == bool(giving)
        rows = read_rows(tmp_path / f"toy{'-blind' * len(blind)}{'-given' * bool(giving)}")
        assert all((r["perception"] is None) == bool(blind or giving) for r in rows.values()), "not seen, not judged"
    with pytest.raises(SystemExit, match="holds no observation"):
        run(toy, base, tmp_path, "--given", write(tmp_path / "none", [row(0, 1.0)]))
