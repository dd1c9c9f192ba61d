"""Promise: an evaluation is a number one can trust. Its arithmetic is done here by hand, it loses nothing when it is
killed, and two of them can be held against each other question by question."""
import json
import math
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
from eval import (CHANGES, change, compare, make_question, mean, mismatch, numbers, open_answer, sign_test,
                  summarise)
from model import load_model

ROOT = Path(__file__).parent.parent


def row(number: int, score: float, group: str = "a", clip: str = "", options=("x", "y", "z", "w"), **more) -> dict:
    return {"id": str(number), "clip": clip or f"{number}.mp4", "groups": {"task": group}, "metric": "choice",
            "problem_type": "multiple choice" if options else "regression", "question": "?", "options": list(options),
            "reference": "A", "prompt": "p", "frames": 32, "pixels": [28, 28], "response": "r", "finished": True,
            "observation": None, "think": None, "answer": None, "extracted": "A", "score": score, "format": True,
            "perception": None, "judge": None} | more


# ------------------------------------------------------------------------------------------------ arithmetic

def test_rights_and_wrongs_have_wilsons_interval():
    x = mean([row(i, float(i < 3)) for i in range(10)])
    assert (x["value"], x["n"], x["chance"]) == (30.0, 10, 25.0)
    assert (x["low"], x["high"]) == pytest.approx((10.78, 60.32), abs=0.01)   # (3/10; from the formula by hand)


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


def test_questions_about_one_clip_are_drawn_together():
    """Ten clips with ten equal scores each say as much as ten questions, not as a hundred."""
    rng = np.random.default_rng(1)
    scores = rng.random(10)
    many = mean([row(10 * c + i, scores[c] * 0.999, clip=f"{c}") for c in range(10) for i in range(10)])
    few = mean([row(c, scores[c] * 0.999) for c in range(10)])
    assert (many["low"], many["high"]) == pytest.approx((few["low"], few["high"]))
    normal = 100 * 1.96 * scores.std() / math.sqrt(10)
    assert few["high"] - few["value"] == pytest.approx(normal, rel=0.25)


def test_what_was_not_read_counts_as_wrong_and_what_was_not_there_does_not_count():
    rows = [row(0, 1.0), row(1, 0.0, extracted=None), row(2, 0.0, finished=False),
            {k: row(3, 0)[k] for k in ("id", "clip", "groups", "metric")} | {"missing": "media: gone"}]
    s = summarise("mvbench", rows)
    assert s["aggregates"]["all questions"]["value"] == pytest.approx(100 / 3)
    assert (s["questions"], s["scored"], s["unread"], s["cut_off"]) == (4, 3, 1, 1)
    assert "INCOMPLETE: 1 of 4 (25.0%)" in evaluation.report(s)


def test_a_benchmark_of_which_nothing_can_be_read_has_a_table_all_the_same():
    rows = [row(i, 0) | {"missing": "media: gone"} for i in range(3)]
    assert "0 questions scored" in evaluation.report(summarise("mvbench", rows))


def test_so_has_the_held_out_table_of_a_run(toy, base, vocabulary):
    settings, policy = pagrpo.Settings(max_prompt=1), load_model(base)
    held = data.Examples(data.read_records(toy / "heldout.json"), toy, vocabulary, policy.config, settings)
    result = pagrpo.evaluate(policy, held, None, None, settings, 0.0, sft.World(0, 1, "cpu"))
    assert [cell["n"] for cell in result.values()] == [0, 0, 0] and "answer" in pagrpo.results_table({"SFT": result})


@pytest.mark.parametrize("wins, losses, p", [
    (0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 1024), (1, 9, 22 / 1024), (3, 7, 2 * 176 / 1024), (8, 2, 2 * 56 / 1024)])
def test_mcnemar_by_hand(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p)


# ------------------------------------------------------------------------------------------------ reading

@pytest.mark.parametrize("options, answer", [
    (["A. a fish", "C. a dog", "D. a cat"], "C"), (["B. a dog", "A. a cat"], "A"), (["A. x", "C. y", "none"], "C")])
def test_a_question_whose_letters_are_not_its_places_cannot_be_scored(options, answer):
    with pytest.raises(ValueError, match="letters that are not A, B, C"):
        make_question("1", "Which?", options, answer, "a.mp4", {}, [])
    assert make_question("1", "Which?", ["A: 3, B: 4", "A: 4, B: 3"], "B", "a.mp4", {}, []).record.reference == "B"


@pytest.mark.parametrize("text, gold, score", [
    ("about 1.5 million people", "1500000", 1), ("1.5 million", "1.5 million", 1), ("It is 1.5 billion", "1.5 million", 0),
    ("5k", "5000", 1), ("3万", "30000", 1), ("300K", "300", 1), ("300 K", "300", 1), ("0.5M", "0.5", 1),
    ("12 km/h", "12 km/h", 1), ("12", "12 km/h", 1), ("in 10 k-means runs", "10", 1)])
def test_an_open_answer_has_its_magnitude_but_a_capital_may_be_a_unit(text, gold, score):
    assert open_answer(text, gold) == score


def test_a_number_in_a_sentence_has_its_magnitude():
    assert numbers("2 million, 3 thousands and 5k of 7 m") == [2_000_000, 3_000, 5_000, 7]


# ------------------------------------------------------------------------------------------------ running

def bench(toy, model, out, *flags) -> list[str]:
    return ["--bench", "toy", "--data", str(toy), "--model", str(model), "--preset", "tiny", "--out", str(out),
            "--batch", "3", "--max-response", "8", *flags]


def answers(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "toy" / "responses.jsonl").read_text().splitlines()]


def test_a_killed_evaluation_continues_where_it_stopped(toy, base, tmp_path, monkeypatch, capsys):
    evaluation.main(bench(toy, base, tmp_path / "whole"))
    real, asked = pagrpo.rollout, []

    def dies(model, examples, *rest):
        asked.extend(e.record.problem_id for e in examples)
        if len(asked) == 9:
            raise KeyboardInterrupt
        return real(model, examples, *rest)
    monkeypatch.setattr(pagrpo, "rollout", dies)
    with pytest.raises(SystemExit, match="goes on from here"):
        evaluation.main(bench(toy, base, tmp_path / "killed"))
    part = tmp_path / "killed" / "toy" / "responses.0.jsonl"
    assert len(part.read_text().splitlines()) == 6
    with part.open("a") as file:
        file.write('{"id": "cut sho')                        # a kill in the middle of a line
    evaluation.main(bench(toy, base, tmp_path / "killed"))
    assert sorted(asked) == sorted([r["id"] for r in answers(tmp_path / "whole")] + asked[6:9]), "three asked again"
    assert answers(tmp_path / "killed") == answers(tmp_path / "whole") and not part.exists()


def test_two_ranks_score_the_same_questions_once_each(toy, base, tmp_path):
    evaluation.main(bench(toy, base, tmp_path / "one"))
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "eval.py")]
    done = subprocess.run(ranks + bench(toy, base, tmp_path / "two"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = answers(tmp_path / "one"), answers(tmp_path / "two")
    assert [(r["id"], r["response"], r["score"]) for r in one] == [(r["id"], r["response"], r["score"]) for r in two]
    assert sorted(p.name for p in (tmp_path / "two" / "toy").iterdir()) == [
        "lock", "responses.jsonl", "settings.json", "summary.json"]


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


def test_other_settings_and_other_weights_do_not_mix_in_one_folder(toy, base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    evaluation.main(bench(toy, tmp_path / "model", tmp_path))
    with pytest.raises(SystemExit, match="temperature was 0.01, is now 1.0"):
        evaluation.main(bench(toy, tmp_path / "model", tmp_path, "--temperature", "1"))
    (tmp_path / "model" / "model.safetensors").touch()
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    with pytest.raises(SystemExit, match="weights was .* bytes of 1'"):
        evaluation.main(bench(toy, tmp_path / "model", tmp_path))


def test_a_question_that_is_worded_anew_is_asked_anew(toy, base, tmp_path, capsys):
    shutil.copytree(toy, tmp_path / "world")
    evaluation.main(bench(tmp_path / "world", base, tmp_path))
    before, file = answers(tmp_path), tmp_path / "world" / "heldout.json"
    rows = json.loads(file.read_text())
    rows[0]["options"] = rows[0]["options"][::-1] or ["a", "b"]
    rows[0]["options"] = [f"{letter}. {o[3:]}" for letter, o in zip("ABC", rows[0]["options"])]
    file.write_text(json.dumps(rows))
    evaluation.main(bench(tmp_path / "world", base, tmp_path))
    assert [a != b for a, b in zip(before, answers(tmp_path))] == [True] + [False] * 19


def test_a_judge_that_is_lost_stops_the_evaluation_before_its_verdicts_are(toy, started, tmp_path):
    flags = ["--bench", "toy", "--data", str(toy), "--model", str(started), "--out", str(tmp_path), "--limit", "4"]
    with pytest.raises(SystemExit, match="verdicts stayed unknown.*goes on from here"):
        evaluation.main([*flags, "--judge", "http://127.0.0.1:9/v1", "--judge-model", "m", "--retries", "0"])
    assert not (tmp_path / "toy" / "responses.jsonl").exists()


@pytest.mark.parametrize("flags, complaint", [
    (["--temperature", "nan"], "--temperature, --limit"), (["--top-p", "0"], "--top-p above 0"),
    (["--limit", "-1"], "--limit and --batch must be 0 or more"), (["--batch", "-1"], "--batch must be 0 or more"),
    (["--limit", "some"], "invalid int"), (["--prompt", "direct"], "--direct is for"),
    (["--direct"], "--direct is for the seven"), (["--frames", "1"], "--frames must be at least 2"),
    (["--fps", "nan"], "--fps must be at least 0"), (["--max-pixels", "0"], "--max-pixels must be at least 784")])
def test_senseless_flags_are_refused(flags, complaint, toy, base, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluation.main(bench(toy, base, tmp_path, *flags))
    assert complaint in str(ended.value) + capsys.readouterr().err and not (tmp_path / "toy").exists()


@pytest.mark.parametrize("content", ['{"a": 1}', "[]", '{"id": "heldout-0"}', '{"id": "x", "missing": "y"}', "7",
                                     '{"id": "x", "clip": "c", "groups": {}, "question": "q", "response": "r", '
                                     '"perception": null, "score": null}'])
def test_files_that_hold_no_responses_are_named(content, toy, base, tmp_path):
    (tmp_path / "toy").mkdir()
    file = tmp_path / "toy" / "responses.jsonl"
    file.write_text(content + "\n")
    for command in (bench(toy, base, tmp_path), ["--compare", str(file), str(file)],
                    bench(toy, base, tmp_path / "x", "--perception-from", str(file))):
        with pytest.raises(SystemExit, match="responses.jsonl, line 1: "):
            evaluation.main(command)


def test_without_a_model_the_newest_finished_run_is_taken(toy, started, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="python pagrpo.py"):
        evaluation.main(["--bench", "toy"])
    for name, age in (("old", 100), ("new", 10), ("unfinished", 0)):
        shutil.copytree(started, tmp_path / "runs" / name / "sft")
        state = next((tmp_path / "runs" / name / "sft").glob("step-*/state.json"))
        os.utime(state, (os.stat(state).st_mtime - age,) * 2)
    file = tmp_path / "runs" / "unfinished" / "sft" / "settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": 9999}))
    evaluation.main(["--bench", "toy", "--data", str(toy), "--limit", "2", "--max-response", "4"])
    said = capsys.readouterr().out
    assert "Model runs/new/sft/step-000040 (the newest finished run)" in said and "ONLY 2 of them" in said


# ------------------------------------------------------------------------------------------------ analyses

def test_mismatch_counts_answers_that_do_not_follow():
    said = [("so it is B", "B"), ("so it is B", "C"), ("B, no, it must be C.", "C"), ("hard to tell", "A"), (None, "A")]
    said = mismatch([row(i, 0, think=think, answer=answer, options=["a cat", "a dog", "a bird"])
                     for i, (think, answer) in enumerate(said)])
    assert "33.3" in said and "of 3 multiple-choice" in said and "2 of 5 are not counted" in said
    assert "  1: reasoning B, answer C" in said


def verdicts(number: int, score: float, perception, **more) -> dict:
    return row(number, score, perception=perception, observation=f"saw {number}", think="t", answer="B", **more)


PAIRS = [((0, False), (1, True)), ((0, True), (1, True)), ((1, True), (0, False)), ((1, True), (0, True)),
         ((0, False), (1, False)), ((1, True), (1, False)), ((0, False), (0, False)), ((1, True), (1, True))]


def test_comparing_says_whether_it_was_perception_or_reasoning(tmp_path):
    a, b = ([verdicts(i, *pair[k]) for i, pair in enumerate(PAIRS)] for k in (0, 1))
    assert [change(x, y) for x, y in zip(a, b)] == [
        *CHANGES[:4], "reasoning fixed", "right by luck", None, None]
    for name, rows in (("a", a), ("b", b)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    said = compare(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    for words in ("B wins 3 and loses 2: p = 1 ", "1 perception fixed, 2 reasoning fixed",
                  "── perception fixed: 0 ", "A  r"):
        assert words in said
    table = [line.split()[-4:] for line in said.splitlines() if line.startswith("perception ")]
    assert table == [["4", "1", "3", "1"], ["0", "3", "2", "2"]]


def test_what_cannot_be_compared_is_said(tmp_path):
    write = lambda name, rows: (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    write("a", [row(0, 1.0), row(1, 0.0)]), write("b", [row(0, 1.0, prompt="q")]), write("c", [row(7, 1.0)])
    write("d", [row(0, 1.0, question="another")])
    said = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert "NOT comparable: 1 questions" in said and "(A has 2, B 1)" in said
    assert next(line for line in said.splitlines() if line.startswith("not judged")).split()[2:] == ["1", "0", "1", "0"]
    for other, complaint in (("c", "no question in common"), ("d", "another text"), ("e", "no question in common")):
        with pytest.raises(SystemExit, match=complaint):
            evaluation.main(["--compare", str(tmp_path / "a"), str(tmp_path / other)])


def test_the_observation_of_one_run_can_be_given_to_another(toy, started, tmp_path, capsys):
    """What the model gets in each of the four rows, seen from inside: media or none, an observation or none."""
    theirs = [row(0, 1.0, id=r["problem_id"], observation=r["observation"])
              for r in json.loads((toy / "heldout.json").read_text())[:4]]
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in theirs))
    given = {r["id"]: r["observation"] for r in theirs}
    real, seen = pagrpo.rollout, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagrpo, "rollout", lambda model, examples, vocabulary, *rest: (
            seen.append([(e.pixels is None, vocabulary.decode(e.ids.tolist()).endswith(
                f"assistant\n<observation> {given[e.record.problem_id]} </observation>\n")) for e in examples]),
            real(model, examples, vocabulary, *rest))[1])
        evaluation.main(["--bench", "toy", "--data", str(toy), "--model", str(started), "--out", str(tmp_path / "out"),
                         "--perception-from", str(tmp_path / "theirs.jsonl")])
    assert seen == [[(True, False)] * 4, [(True, True)] * 4, [(False, False)] * 4, [(False, True)] * 4]
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith(("question", "video"))]
    assert [line.split("  ")[0] for line in rows] == ["question", "question and observation", "video",
                                                      "video and observation"]
    assert all(" 4 " in line for line in rows) and "16.7" in rows[0]


def test_the_newest_reason_why_a_question_is_missing_counts(tmp_path):
    missing = {"id": "1", "clip": "a", "groups": {}}
    for file, reason in (("responses.jsonl", "old"), ("responses.0.jsonl", "new")):
        (tmp_path / file).write_text(json.dumps(missing | {"missing": reason}) + "\n")
    assert evaluation.read_rows(str(tmp_path))["1"]["missing"] == "new"
