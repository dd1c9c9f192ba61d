"""Promise: the miniature runs what its table says, and its intervals and sentences are right."""
import math
import random
from pathlib import Path

import pytest

import data
import eval as evaluation
import miniature
import miniature_tables as tables
import pagrpo
import rewards
import sft

SLIPS = [miniature.at_level(name, 0.3) for name in miniature.COMPARED]
EVERY_ROW = (*miniature.ROWS, *miniature.JUDGES, miniature.FAILED, *SLIPS)
URL = "http://127.0.0.1:1/v1"


@pytest.fixture
def args(tmp_path):
    """The miniature's own flags, as its main fills them in."""
    return miniature.parse_args(["--out", str(tmp_path), "--seeds", "1", "2"])


def parsed(command):
    script, *flags = command
    module = {"sft.py": sft, "pagrpo.py": pagrpo}[script]
    return sft.parse_flags(module.Settings, module.PRESETS, flags, "")


@pytest.mark.parametrize("row", EVERY_ROW, ids=lambda row: row.name)
def test_every_row_is_a_real_command_and_ends_where_its_evaluation_looks(row, args):
    home = args.out / "seed1"
    shared, *own = map(parsed, miniature.training(row, 1, args, URL))
    assert Path(shared.out) == home and not shared.data, "makes clips, traces, base and SFT"
    there, ends = {str(home / "base"), str(home / "sft")}, home / ("base" if row.sft is None else "sft")
    for settings in own:
        assert settings.seed == 1 and settings.model in there
        ends = Path(settings.out) / (pagrpo.STAGES[settings.advantage] if hasattr(settings, "advantage") else "sft")
        there = {str(ends)}
    _, *flags = miniature.evaluating(row, 1, args, args.out)
    assert evaluation.parse_args(flags).model == str(ends)


@pytest.mark.parametrize("name, differing", [
    ("grpo", {"advantage"}), ("joint", {"advantage"}), ("gdpo", {"advantage"}), ("no-reasoning", {"reward_off"}),
    ("no-length", {"reward_off"}), ("rl-only", {"model"}), ("lr-x10", {"lr"}), ("judge-18", {"judge", "judge_model"})])
def test_a_row_differs_from_pa_grpo_in_what_its_name_says_only(name, differing, args):
    here, full = (vars(parsed(miniature.training(row, 1, args, URL)[-1]))
                  for wanted in (name, "full") for row in EVERY_ROW if row.name == wanted)
    assert {k for k in here if here[k] != full[k]} == differing | {"out"}


def test_each_row_is_run_once_and_judges_on_one_seed(args):
    plan = miniature.jobs(args)
    rows = len(miniature.ROWS) + 1 + len(miniature.LEVELS) * len(miniature.COMPARED)
    assert len(plan) == len(set(plan)) == 2 * rows + len(miniature.JUDGES) + 1


def test_a_share_of_the_traces_slips_and_what_they_see_stays(toy):
    records = data.read_records(toy / "sft.json", traces=True)
    wrong = {}
    for share in (0.0, 0.4, 0.8, 1.0):
        rows = [data.to_record(row, True) for row in miniature.with_slips(records, share, 0)]
        assert [r.trace["observation"] for r in rows] == [r.trace["observation"] for r in records]
        wrong[share] = {r.path for r, old in zip(rows, records) if data.answer_score(old, r.reference) < 1}
        assert wrong[share] == {r.path for r, old in zip(rows, records) if r.trace["think"] != old.trace["think"]}
    assert len(wrong[0.0]) == 0 < len(wrong[0.4]) < len(wrong[0.8]) < len(wrong[1.0]) == len(records)
    assert wrong[0.4] <= wrong[0.8], "a larger share slips in the same traces"


# ------------------------------------------------------------------------------------------------ statistics

def test_the_interval_of_a_mean_by_hand():
    """Three seeds have a standard deviation of 25, and t of two degrees of freedom is 4.303; one seed has 100 clips."""
    results = {"row": {str(n): {tables.ANSWER: [value, 100]} for n, value in enumerate((50, 75, 100))}}
    found = tables.mean(results, "row", tables.ANSWER)
    assert found.value == 75 and found.half == pytest.approx(4.303 * 25 / math.sqrt(3), abs=0.01)
    one = tables.mean({"row": {"0": results["row"]["0"]}}, "row", tables.ANSWER)
    assert one.half == pytest.approx(196 * math.sqrt(0.25 / 100), abs=0.01)


def test_a_difference_is_taken_on_the_same_seed():
    """Seeds differ much, the two rows always by two points, one seed has one of them only: no doubt is left."""
    one = {seed: {tables.ANSWER: [value, 512]} for seed, value in (("0", 50), ("1", 70), ("2", 90))}
    other = {seed: {tables.ANSWER: [one[seed][tables.ANSWER][0] - 2, 512]} for seed in ("0", "1")}
    found = tables.mean({"one": one, "other": other}, "one", tables.ANSWER, "other")
    assert found.value == pytest.approx(2) and found.half == pytest.approx(0) and found.by_seed.keys() == {"0", "1"}


@pytest.mark.parametrize("here, half, seeds, said", [
    (-5.0, 3.0, 3, "agrees"), (5.0, 3.0, 3, "disagrees: the opposite sign"), (-1.0, 3.0, 3, "not resolved"),
    (-5.0, 3.0, 1, "not resolved")])
def test_a_sign_counts_only_outside_its_interval_over_seeds(here, half, seeds, said):
    assert tables.verdict(-2.3, tables.Mean(here, half, dict.fromkeys(range(seeds), 0))) == said


def test_a_finished_row_is_kept_and_rows_of_another_budget_are_refused(args, tmp_path, monkeypatch):
    args.results, calls = tmp_path / "results", []
    args.results.mkdir()
    args.seeds = [1]
    monkeypatch.setattr(miniature, "run_row", lambda row, seed, args: calls.append(row.name) or {"answer": [50, 2]})
    monkeypatch.setattr(miniature, "run_sufficiency", lambda seed, args: 1 / 0)
    for new in (len(miniature.jobs(args)) - 1, 0):           # the row that failed is tried again
        failures = miniature.run_all(args, miniature.read_kept(args))
        assert len(calls) == new and failures == ["sufficiency, seed 1: division by zero"]
        calls.clear()
    args.steps = 7
    with pytest.raises(SystemExit, match="steps was 0, is now 7"):
        miniature.read_kept(args)


# ------------------------------------------------------------------------------------------------ the judge that errs

def test_judges_err_at_their_rates_a_better_one_in_a_part_of_the_claims():
    """Toy claims with an observation that suffices."""
    claims, wrong = set(), []
    for n in range(600):
        r = data.to_record(data.toy_record(random.Random(n), n, "judged")[0], True)
        claims.add(data.claim_about(r, rewards.clean(r.trace["observation"])))
    for row in miniature.JUDGES:
        play = miniature.erring_judge(row.error)
        replies = {claim: play(0, {"messages": rewards.judge_chat(claim)}) for claim in claims}
        wrong.append({claim for claim in claims if not rewards.read_verdict(rewards.Reply(replies[claim])).sufficient})
        spread = math.sqrt(row.error * (1 - row.error) / len(claims))
        assert len(wrong[-1]) / len(claims) == pytest.approx(row.error, abs=3 * spread)
    assert all(better < worse for worse, better in zip(wrong, wrong[1:]))
