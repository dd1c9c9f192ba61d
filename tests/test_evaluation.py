"""Promise: an evaluation is a number one can trust. Its arithmetic is done here by hand, it loses nothing when it is
killed, and two of them can be held against each other question by question."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
import eval as evaluation
import pagrpo
import sft
from eval import compare, make_question, mean, mismatch, open_answer, read_numbers, sign_test, summarise, summary_text
from model import load_model

ROOT = Path(__file__).parent.parent


def row(number: int, score: float, group: str = "a", clip: str = "", options=("x", "y", "z", "w"), **more) -> dict:
    return {"id": str(number), "clip": clip or f"{number}.mp4", "groups": {"task": group},
            "problem_type": "multiple choice" if options else "regression", "question": "?", "options": list(options),
            "reference": "A", "prompt": "p", "frames": 32, "pixels": [28, 28], "response": "r", "finished": True,
            "observation": None, "think": None, "answer": None, "extracted": "A", "score": score, "format": True,
            "perception": None, "judge": None} | more


def write(folder: Path, rows: list[dict]) -> str:
    """An evaluation's folder with these rows."""
    folder.mkdir(parents=True)
    data.write_rows(folder / "responses.jsonl", rows)
    return str(folder)


# ------------------------------------------------------------------------------------------------ reading

@pytest.mark.parametrize("options, answer", [
    (["A. a fish", "C. a dog", "D. a cat"], "C"), (["B. a dog", "A. a cat"], "A"), (["A. x", "C. y", "none"], "C")])
def test_a_question_whose_letters_are_not_its_places_cannot_be_scored(options, answer):
    row = {"id": 1, "question": "Which?", "answer": answer}
    with pytest.raises(ValueError, match="letters that are not A, B, C"):
        make_question(row, "a.mp4", options, {})
    fine = make_question(row | {"answer": "B"}, "a.mp4", ["A: 3, B: 4", "A: 4, B: 3"], {})
    assert fine.record.reference == "B"


@pytest.mark.parametrize("text, gold, score", [
    ("about 1.5 million people", "1500000", 1), ("1.5 million", "1.5 million", 1), ("It is 1.5 billion", "1.5 million", 0),
    ("5k", "5000", 1), ("3万", "30000", 1), ("300K", "300", 1), ("300 K", "300", 1), ("0.5M", "0.5", 1),
    ("12 km/h", "12 km/h", 1), ("12", "12 km/h", 1), ("in 10 k-means runs", "10", 1)])
def test_an_open_answer_has_its_magnitude_but_a_capital_may_be_a_unit(text, gold, score):
    assert open_answer(text, gold) == score


def test_a_number_in_a_sentence_has_its_magnitude():
    assert read_numbers("2 million, 3 thousands and 5k of 7 m") == [2_000_000, 3_000, 5_000, 7]



# ------------------------------------------------------------------------------------------------ arithmetic

def limits(x: dict) -> list[float]:
    return [x["low"] / 100, x["high"] / 100]


@pytest.mark.parametrize("right, n", [(3, 10), (0, 8), (8, 8), (1, 2)])
def test_independent_rights_and_wrongs_have_wilsons_interval(right, n):
    x = mean([row(i, float(i < right)) for i in range(n)])
    assert (x["value"], x["n"], x["chance"]) == (100 * right / n, n, 25.0)
    assert limits(x) == pytest.approx(pagrpo.wilson(right / n, n))
    if n == 10:
        assert limits(x) == pytest.approx([0.1078, 0.6032], abs=1e-4)         # from the formula by hand


def test_ten_equal_answers_about_one_clip_say_as_much_as_one():
    many = mean([row(i, float(i % 10 < 3), clip=f"{i % 10}") for i in range(100)])
    assert limits(many) == pytest.approx(pagrpo.wilson(0.3, 10)) and many["n"] == 100
    assert limits(mean([row(i, 1.0, clip=f"{i % 5}") for i in range(50)])) == pytest.approx(pagrpo.wilson(1.0, 5))


def test_answers_about_one_clip_that_differ_by_chance_widen_the_interval_little():
    """Two clips of four questions, three right of the first, one of the second. By hand: deviations ±1/8 of each sum to
    (3 - 2) / 8 and (1 - 2) / 8, their squares to 1/32, so that n = (1/4) / (1/32) = 8."""
    rows = [row(i, float(i in (0, 1, 2, 4)), clip="one" if i < 4 else "two") for i in range(8)]
    assert limits(mean(rows)) == pytest.approx(pagrpo.wilson(0.5, 8))


def test_a_mean_of_parts_has_the_error_of_its_parts():
    """Half of the weight on 1, 0, 1, 0, half on 1, 1, 1, 0: squared errors (1/4)(1/16) and (1/4)(3/64)."""
    rows = [row(i, x, "a") for i, x in enumerate((1.0, 0.0, 1.0, 0.0))]
    rows += [row(i + 4, x, "b") for i, x in enumerate((1.0, 1.0, 1.0, 0.0))]
    x = mean([*rows, row(8, 0.0, "c")], ((1, ("a",)), (1, ("b",)), (1, ("not there",))))
    assert (x["value"], x["n"]) == (62.5, 8)
    assert limits(x) == pytest.approx(pagrpo.wilson(0.625, 0.625 * 0.375 / (1 / 64 + 3 / 256)))


def test_scores_between_right_and_wrong_have_the_normal_interval_where_there_are_many():
    scores = np.random.default_rng(1).random(400)
    x = mean([row(i, score) for i, score in enumerate(scores)])
    assert limits(x) == pytest.approx(scores.mean() + 1.96 * scores.std() / 20 * np.array([-1, 1]), abs=1e-3)


def test_vsi_bench_has_two_means_and_they_differ():
    """Two of three numeric questions at MRA 0.5, one at 1; direction easy 1, medium 0, hard 1; order 1.

    paper     (3/4 + 2/3) / 2                                                  = 70.8
    official  counting 0.5, room size 1, direction 2/3, order 1: of the four tasks that are there, 79.2
    """
    rows = [row(0, 0.5, "object_counting", options=()), row(1, 0.5, "object_counting", options=()),
            row(2, 1.0, "room_size_estimation", options=()), row(3, 1.0, "object_rel_direction_easy"),
            row(4, 0.0, "object_rel_direction_medium"), row(5, 1.0, "object_rel_direction_hard"),
            row(6, 1.0, "obj_appearance_order")]
    values = {name: x["value"] / 100 for name, x in summarise("vsibench", rows)["aggregates"].items()}
    assert values == pytest.approx({
        "mean of multiple choice and MRA (paper)": (3 / 4 + 2 / 3) / 2, "multiple choice": 3 / 4, "MRA": 2 / 3,
        "mean of eight tasks (official)": (0.5 + 1 + 2 / 3 + 1) / 4, "all questions": 5 / 7})


def test_what_was_not_read_counts_as_wrong_and_what_was_not_there_does_not_count():
    rows = [row(0, 1.0), row(1, 0.0, extracted=None), row(2, 0.0, finished=False),
            {k: row(3, 0)[k] for k in ("id", "clip", "groups")} | {"missing": "media: gone"}]
    s = summarise("mvbench", rows)
    assert s["aggregates"]["all questions"]["value"] == pytest.approx(100 / 3)
    assert (s["questions"], s["scored"], s["unread"], s["cut_off"]) == (4, 3, 1, 1)
    assert "INCOMPLETE: 1 of 4 (25.0%)" in summary_text(s)


def test_a_benchmark_of_which_nothing_can_be_read_has_a_table_all_the_same():
    rows = [row(i, 0) | {"missing": "media: gone"} for i in range(3)]
    assert "0 questions scored" in summary_text(summarise("mvbench", rows))


def test_so_has_the_held_out_table_of_a_run(toy, base, vocabulary):
    settings, policy = pagrpo.Settings(max_prompt=1), load_model(base)
    held = data.Examples(data.read_records(toy / "heldout.json"), toy, vocabulary, policy.config, settings)
    result = pagrpo.evaluate(policy, held, None, settings, 0.0, sft.World(0, 1, "cpu"))
    assert [cell["n"] for cell in result.values()] == [0, 0, 0] and "answer" in pagrpo.results_table({"SFT": result})


@pytest.mark.parametrize("wins, losses, p", [
    (0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 1024), (1, 9, 22 / 1024), (3, 7, 2 * 176 / 1024), (8, 2, 2 * 56 / 1024)])
def test_mcnemar_by_hand(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p)


# ------------------------------------------------------------------------------------------------ running

def bench(toy, model, out, *flags) -> list[str]:
    return ["--bench", "toy", "--data", str(toy), "--model", str(model), "--preset", "tiny", "--out", str(out),
            "--batch", "3", "--max-response", "8", *flags]


def answers(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "toy" / "responses.jsonl").read_text().splitlines()]


@pytest.fixture
def asked(monkeypatch):
    """The examples that the model was asked, in order."""
    examples, real = [], pagrpo.rollout

    def watched(policy, batch, *rest):
        examples.extend(batch)
        return real(policy, batch, *rest)
    monkeypatch.setattr(pagrpo, "rollout", watched)
    return examples


def test_a_killed_evaluation_continues_where_it_stopped(toy, base, tmp_path, monkeypatch, capsys):
    evaluation.main(bench(toy, base, tmp_path / "whole"))
    real, ids = pagrpo.rollout, []

    def dies(policy, batch, *rest):
        ids.extend(e.record.problem_id for e in batch)
        if len(ids) == 9:
            raise KeyboardInterrupt
        return real(policy, batch, *rest)
    monkeypatch.setattr(pagrpo, "rollout", dies)
    with pytest.raises(SystemExit, match="goes on from here"):
        evaluation.main(bench(toy, base, tmp_path / "killed"))
    part = tmp_path / "killed" / "toy" / "work.0.jsonl"
    assert len(part.read_text().splitlines()) == 6 and not (part.parent / "responses.jsonl").exists()
    with part.open("a") as file:
        file.write('{"id": "cut sho')                        # a kill in the middle of a line
    evaluation.main(bench(toy, base, tmp_path / "killed"))
    assert sorted(ids) == sorted([r["id"] for r in answers(tmp_path / "whole")] + ids[6:9]), "three asked again"
    assert answers(tmp_path / "killed") == answers(tmp_path / "whole")


def test_two_ranks_score_the_same_questions_once_each(toy, base, tmp_path, asked):
    evaluation.main(bench(toy, base, tmp_path / "one"))
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "eval.py")]
    done = subprocess.run(ranks + bench(toy, base, tmp_path / "two"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    work = [(tmp_path / f"two/toy/work.{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert [len(lines) for lines in work] == [10, 10]
    one, two = answers(tmp_path / "one"), answers(tmp_path / "two")
    assert [(r["id"], r["response"], r["score"]) for r in one] == [(r["id"], r["response"], r["score"]) for r in two]
    asked.clear()
    evaluation.main(bench(toy, base, tmp_path / "two"))
    assert answers(tmp_path / "two") == two and not asked, "one rank goes on from the rows of two"


def test_media_that_come_later_are_asked_about_then(toy, base, tmp_path, capsys):
    world = tmp_path / "world"
    shutil.copytree(toy, world)
    clips = sorted((world / "heldout").glob("*.avi"))
    away, broken = clips[0].read_bytes(), clips[1].read_bytes()
    clips[0].unlink(), clips[1].write_bytes(b"x" * 100)
    evaluation.main(bench(world, base, tmp_path))
    assert "18 questions scored; INCOMPLETE" in capsys.readouterr().out
    clips[0].write_bytes(away), clips[1].write_bytes(broken)
    evaluation.main(bench(world, base, tmp_path))
    assert "20 questions scored" in (said := capsys.readouterr().out) and "INCOMPLETE" not in said
    assert not any("missing" in r for r in answers(tmp_path))


def test_rows_of_other_settings_and_other_weights_do_not_count_and_are_kept(toy, base, tmp_path, asked):
    weights = shutil.copytree(base, tmp_path / "model") / "model.safetensors"
    os.utime(weights, (2, 2))
    command = bench(toy, tmp_path / "model", tmp_path)
    counts = []
    for flags in ([], ["--temperature", "1"], [], ["--limit", "4"]):
        asked.clear()
        evaluation.main([*command, *flags])
        counts.append(len(asked))
    assert counts == [20, 20, 0, 0] and len(answers(tmp_path)) == 4
    os.utime(weights, (1, 1))
    evaluation.main(command)
    assert len(asked) == 20


def test_a_question_that_is_worded_anew_is_asked_anew(toy, base, tmp_path, asked):
    shutil.copytree(toy, tmp_path / "world")
    evaluation.main(bench(tmp_path / "world", base, tmp_path))
    before, file = answers(tmp_path), tmp_path / "world" / "heldout.json"
    rows = json.loads(file.read_text())
    rows[0]["options"] = rows[0]["options"][::-1] or ["a", "b"]
    rows[0]["options"] = [f"{letter}. {o[3:]}" for letter, o in zip("ABC", rows[0]["options"])]
    rows[1]["solution"] = "<answer>another reference</answer>"
    file.write_text(json.dumps(rows))
    asked.clear()
    evaluation.main(bench(tmp_path / "world", base, tmp_path))
    assert [a != b for a, b in zip(before, answers(tmp_path))] == [True, True] + [False] * 18 and len(asked) == 2


def test_a_judge_that_is_lost_stops_the_evaluation_before_its_verdicts_are(toy, started, tmp_path):
    flags = ["--bench", "toy", "--data", str(toy), "--model", str(started), "--out", str(tmp_path), "--limit", "4"]
    with pytest.raises(SystemExit, match="verdicts stayed unknown.*goes on from here"):
        evaluation.main([*flags, "--judge", "http://127.0.0.1:9/v1", "--judge-model", "m", "--retries", "0"])
    assert not (tmp_path / "toy" / "responses.jsonl").exists()


def test_the_model_itself_can_be_the_judge(toy, started, tmp_path, capsys):
    evaluation.main(["--bench", "toy", "--data", str(toy), "--model", str(started), "--out", str(tmp_path), "--judge",
                     "reference", "--limit", "6"])
    assert "judge: reference" in capsys.readouterr().out
    assert all("answering blind" in r["judge"] for r in answers(tmp_path) if r["observation"])


@pytest.mark.parametrize("flags, complaint", [
    (["--temperature", "nan"], "--temperature must be at least 0"), (["--top-p", "0"], "--top-p must be at least"),
    (["--limit", "-1"], "--limit must be at least 0"), (["--batch", "0"], "--batch must be at least 1"),
    (["--limit", "some"], "invalid int"), (["--frames", "1"], "--frames must be at least 2"),
    (["--fps", "nan"], "--fps must be at least 0"), (["--max-pixels", "0"], "--max-pixels must be at least 784"),
    (["--video", "x.mp4"], "not allowed with argument"), (["--direct"], "unrecognized arguments")])
def test_senseless_flags_are_refused(flags, complaint, toy, base, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluation.main(bench(toy, base, tmp_path, *flags))
    assert complaint in str(ended.value) + capsys.readouterr().err and not (tmp_path / "toy").exists()


def test_without_a_model_the_newest_finished_run_is_taken(toy, started, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="python pagrpo.py"):
        evaluation.main(["--bench", "toy"])
    for name, age in (("old", 100), ("new", 10), ("unfinished", 0)):
        shutil.copytree(started, tmp_path / "runs" / name / "sft")
        file = next((tmp_path / "runs" / name / "sft").glob("step-*/state.json"))
        state = json.loads(file.read_text()) | ({"steps": 9999} if name == "unfinished" else {})
        written = os.stat(file).st_mtime - age
        file.write_text(json.dumps(state))
        os.utime(file, (written, written))
    evaluation.main(["--bench", "toy", "--data", str(toy), "--limit", "2", "--max-response", "4"])
    said = capsys.readouterr().out
    assert "Model runs/new/sft/step-000040\n" in said and "ONLY 2 of them" in said


# ------------------------------------------------------------------------------------------------ analyses

def test_mismatch_counts_answers_that_do_not_follow():
    said = [("so it is B", "B"), ("so it is B", "C"), ("B, no, it must be C.", "C"), ("hard to tell", "A"), (None, "A")]
    rows = [row(i, 0, think=think, answer=answer, options=["a cat", "a dog", "a bird"])
            for i, (think, answer) in enumerate(said)]
    x = mismatch([*rows, row(5, 1.0, options=(), think="so it is B", answer="A")])
    assert (x["value"], x["n"]) == (pytest.approx(100 / 3), 3)
    assert "name different options: 33.3" in summary_text(summarise("mvbench", rows))
    assert "different options" not in summary_text(summarise("toy", [row(0, 1.0, options=())]))


PAIRS = [((0, False), (1, True)), ((0, True), (1, True)), ((1, True), (0, False)), ((1, True), (0, True)),
         ((0, False), (1, False)), ((1, True), (1, False)), ((0, False), (0, False)), ((1, True), (1, True))]


def test_comparing_counts_wins_and_losses_and_where_the_errors_are(tmp_path):
    a, b = ([row(i, pair[k][0], perception=pair[k][1]) for i, pair in enumerate(PAIRS)] for k in (0, 1))
    said = compare(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert "8 questions are in both (A has 8, B 8). B wins 3 and loses 2: p = 1 " in said and "NOT" not in said
    head, _, first, second = (line.split() for line in said.splitlines()[:4])
    assert "perception and answer right" in said.splitlines()[0] and head[-3:] == ["answer", "only", "neither"]
    assert first[-4:] == ["4", "1", "0", "3"] and second[-4:] == ["3", "1", "2", "2"]


def test_what_cannot_be_compared_is_said(tmp_path):
    write(tmp_path / "a", [row(0, 1.0), row(1, 0.0)])
    write(tmp_path / "b", [row(0, 1.0, prompt="q")])
    write(tmp_path / "c", [row(7, 1.0)])
    write(tmp_path / "d", [row(0, 1.0, question="another")])
    said = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert "NOT comparable: 1 questions" in said and "(A has 2, B 1)" in said
    assert said.splitlines()[2].split()[-4:] == ["0"] * 4, "nothing was judged"
    for other, complaint in (("c", "no question in common"), ("d", "another text"), ("e", "no question in common")):
        with pytest.raises(SystemExit, match=complaint):
            evaluation.main(["--compare", str(tmp_path / "a"), str(tmp_path / other)])


def test_the_observation_of_one_run_can_be_given_to_another(toy, started, tmp_path, capsys, vocabulary, asked):
    """What the model gets with each pair of flags, seen from inside: media or none, an observation or none."""
    rows = json.loads((toy / "heldout.json").read_text())
    given = {r["problem_id"]: r["observation"] for r in rows[:4]}
    theirs = write(tmp_path / "theirs", [row(0, 1.0, id=key, observation=given[key]) for key in given])
    command = ["--bench", "toy", "--data", str(toy), "--model", str(started), "--out", str(tmp_path / "out")]
    for flags, folder in ((["--blind"], "toy-blind"), (["--blind", "--given", theirs], "toy-blind-given"),
                          ([], "toy"), (["--given", theirs], "toy-given")):
        asked.clear()
        evaluation.main([*command, *flags])
        assert len(asked) == (4 if "--given" in flags else 20)
        for example in asked:
            opening = f"assistant\n<observation> {given.get(example.record.problem_id)} </observation>\n"
            assert (example.pixels is None) == ("--blind" in flags)
            assert vocabulary.decode(example.ids.tolist()).endswith(opening) == ("--given" in flags)
        summary = json.loads((tmp_path / "out" / folder / "summary.json").read_text())
        assert bool(summary["aggregates"]["all questions"]["perception"]["n"]) == (not flags), "else no judge"
    assert "the 4 with an observation in" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds no observation"):
        evaluation.main([*command, "--given", write(tmp_path / "none", [row(0, 1.0)])])
