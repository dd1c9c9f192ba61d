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

EVERY_ROW = (*miniature.ROWS, *miniature.JUDGES, miniature.FAILED)
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
    ends = home / "base"
    for command in miniature.training(row, 1, args, URL):
        settings = parsed(command)
        assert settings.seed == 1 and settings.model in ("", str(ends), str(home / "sft")), "where the last one ended"
        ends = Path(settings.out) / ("sft" if command[0] == "sft.py" else pagrpo.STAGES[settings.advantage])
    _, *flags = miniature.evaluating(row, 1, args, args.out)
    assert evaluation.parse_args(flags).model == str(ends)


@pytest.mark.parametrize("name, differing", [
    ("grpo", {"advantage"}), ("joint", {"advantage"}), ("gdpo", {"advantage"}), ("no-reasoning", {"reward_off"}),
    ("no-length", {"reward_off"}), ("rl-only", {"model"}), ("lr-x10", {"lr"}), ("judge-18", {"judge", "judge_model"})])
def test_a_row_differs_from_pa_grpo_in_what_its_name_says_only(name, differing, args):
    here, full = (vars(parsed(miniature.training(row, 1, args, URL)[-1]))
                  for wanted in (name, "full") for row in EVERY_ROW if row.name == wanted)
    assert {k for k in here if here[k] != full[k]} == differing | {"out"}


def test_rows_wait_for_what_they_need_and_judges_have_one_seed(args):
    plan = miniature.jobs(args)
    order = [(row.name, seed) for row, seed, _ in plan]
    assert len(set(order)) == 2 * len(miniature.ROWS) + len(miniature.JUDGES) + 3
    for i, (_, seed, needed) in enumerate(plan):
        assert {(name, seed) for name in needed} <= set(order[:i])


# ------------------------------------------------------------------------------------------------ statistics

def test_the_two_intervals_of_a_mean_by_hand():
    """Seeds of 50, 75 and 100 percent over four clips, whose means over the seeds are 1, 1, 2/3, 1/3."""
    found = tables.mean({str(n): dict(zip("abcd", right))
                         for n, right in enumerate(((1, 1, 0, 0), (1, 1, 1, 0), (1, 1, 1, 1)))})
    assert found.value == pytest.approx(75) and found.by_seed == {"0": 50, "1": 75, "2": 100}
    # Over clips: deviations 1/4, 1/4, -1/12, -5/12 have squares that sum to 0.30556; std sqrt(0.30556 / 3) = 0.31914.
    assert found.clips == pytest.approx(100 * 1.96 * 0.31914 / 2, abs=0.01)
    # Over seeds: the standard deviation is 25, and t of two degrees of freedom is 4.303.
    assert found.seeds == pytest.approx(4.303 * 25 / math.sqrt(3), abs=0.01)


def test_a_difference_is_taken_clip_by_clip():
    """Both rows are right on the same half of the clips: the difference is exactly 0, without a doubt."""
    results = {name: {"0": {tables.ANSWER: dict(zip("abcd", (1, 1, 0, 0)))}} for name in ("one", "other")}
    found = tables.mean(tables.scores(results, "one", tables.ANSWER, "other"))
    assert found.value == found.clips == 0 and math.isinf(found.seeds)


@pytest.mark.parametrize("here, seeds, said", [
    (-5.0, 3.0, "agrees"), (5.0, 3.0, "disagrees: the opposite sign"), (-1.0, 3.0, "not resolved"),
    (-5.0, 9.0, "not resolved over seeds (the same sign for these models)"),
    (5.0, math.inf, "not resolved over seeds (the opposite sign for these models)")])
def test_a_sign_counts_only_outside_both_intervals(here, seeds, said):
    assert tables.verdict(-2.3, tables.Mean(here, 2.0, seeds, {}, 100)) == said


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
