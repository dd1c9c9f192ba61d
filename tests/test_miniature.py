"""Promise: the miniature runs what its table says, and its intervals and sentences are right."""
import math
import random

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
    ends, commands = args.out / "seed1" / "base", miniature.training(row, 1, args, URL)
    for command in commands:
        settings = parsed(command)
        stage = "sft" if command[0] == "sft.py" else pagrpo.STAGES[settings.advantage]
        assert settings.seed == 1 and settings.preset == "tiny"
        assert settings.model in ("", str(ends), str(args.out / "seed1" / "sft")), "it starts where the last one ended"
        ends = args.out.__class__(settings.out) / stage
    for how, flags in miniature.DECODING.items():
        asked = evaluation.parse_args(miniature.evaluating(row, 1, args, args.out / how, *flags)[1:])
        assert asked.model == str(ends) and (asked.temperature == 1) == (how == "sampled")


def test_a_row_differs_from_pa_grpo_in_what_its_name_says_only(args):
    def rl(name):
        row = next(row for row in EVERY_ROW if row.name == name)
        return vars(parsed(miniature.training(row, 1, args, URL)[-1]))
    full, differing = rl("full"), {}
    for name in ("grpo", "joint", "gdpo", "no-reasoning", "no-length", "rl-only", "lr-x10", "judge-18"):
        differing[name] = {k: v for k, v in rl(name).items() if v != full[k] and k != "out"}
    base = str(args.out / "seed1" / "base")
    assert differing == {
        "grpo": {"advantage": "grpo"}, "joint": {"advantage": "joint"}, "gdpo": {"advantage": "gdpo"},
        "no-reasoning": {"reward_off": "reasoning"}, "no-length": {"reward_off": "length"}, "rl-only": {"model": base},
        "lr-x10": {"lr": pytest.approx(10 * full["lr"])}, "judge-18": {"judge": URL, "judge_model": "judge-18"}}


def test_rows_wait_for_the_sft_model_of_their_seed_and_judges_have_one_seed(args):
    plan = miniature.jobs(args)
    order = [(row.name, seed) for row, seed, _ in plan]
    assert len(order) == len(set(order)) == 2 * (len(miniature.ROWS) + 1) + len(miniature.JUDGES) + 1
    for i, (_, seed, needed) in enumerate(plan):
        assert all(order.index((name, seed)) < i for name in needed)


def test_another_budget_in_the_same_folder_is_refused(tmp_path):
    miniature.check_budget(miniature.parse_args(["--out", str(tmp_path), "--steps", "5"]))
    with pytest.raises(SystemExit, match="--steps was 5, is now 6"):
        miniature.main(["--out", str(tmp_path), "--steps", "6"])


# ------------------------------------------------------------------------------------------------ statistics

def test_the_two_intervals_of_a_mean_by_hand():
    """Seeds of 50, 75 and 100 percent over four clips, whose means over the seeds are 1, 1, 2/3, 1/3."""
    scores = {"0": dict(zip("abcd", (1, 1, 0, 0))), "1": dict(zip("abcd", (1, 1, 1, 0))),
              "2": dict(zip("abcd", (1, 1, 1, 1)))}
    found = tables.mean(scores)
    assert found.value == pytest.approx(75) and found.by_seed == {"0": 50, "1": 75, "2": 100} and found.n == 4
    # Over clips: deviations 1/4, 1/4, -1/12, -5/12 have squares that sum to 0.30556; std sqrt(0.30556 / 3) = 0.31914.
    assert found.clips == pytest.approx(100 * 1.96 * 0.31914 / 2, abs=0.01)
    # Over seeds: the standard deviation is 25, and t of two degrees of freedom is 4.303.
    assert found.seeds == pytest.approx(4.303 * 25 / math.sqrt(3), abs=0.01)


def test_a_difference_is_taken_clip_by_clip():
    """Both rows are right on half of the clips: if on the same ones, the difference is exactly 0, without a doubt."""
    rights = {"one": (1, 1, 0, 0), "same": (1, 1, 0, 0), "other": (0, 0, 1, 1)}
    results = {name: {"0": {tables.ANSWER: dict(zip("abcd", right))}} for name, right in rights.items()}
    for name, width in (("same", 0), ("other", 1.96 * 100 * math.sqrt(4 / 3) / 2)):
        found = tables.mean(tables.scores(results, "one", tables.ANSWER, name))
        assert found.value == 0 and found.clips == pytest.approx(width) and math.isinf(found.seeds)


@pytest.mark.parametrize("here, seeds, said", [
    (-5.0, 3.0, "agrees"), (5.0, 3.0, "disagrees: the opposite sign"), (-1.0, 3.0, "not resolved"),
    (-5.0, 9.0, "not resolved over seeds (the same sign for these models)"),
    (5.0, math.inf, "not resolved over seeds (the opposite sign for these models)")])
def test_a_sign_counts_only_outside_both_intervals(here, seeds, said):
    assert tables.verdict(-2.3, tables.Mean(here, 2.0, seeds, {}, 100)) == said


def test_disagreements_are_sentences_computed_from_the_numbers():
    """GRPO is below PA-GRPO in the paper. Here it is above it on nine clips of ten, with every seed."""
    def row(right):
        return {tables.ANSWER: {str(i): float(i < right) for i in range(100)}}
    results = {"full": {s: row(10) for s in "012"}, "grpo": {s: row(100) for s in "012"}}
    rows = [r for r in miniature.ROWS if r.name in ("full", "grpo")]
    assert tables.disagreements(rows, results, rows[-1:]) == [
        "Of 1 differences 0 agree with the paper's sign. The others:", "",
        "- GRPO: process-agnostic RL less PA-GRPO: paper -2.3, here +90.0 ±5.9 ±0.0: disagrees: the opposite sign."]


# ------------------------------------------------------------------------------------------------ the judge that errs

def test_judges_err_at_their_rates_a_better_one_in_a_part_of_the_claims():
    """Toy claims with an observation that suffices. Equal claims get equal verdicts."""
    claims, wrong = {}, {}
    for n in range(600):
        r = data.to_record(data.toy_record(random.Random(n), n, "judged")[0], True)
        claim = data.claim_about(r, rewards.clean(r.trace["observation"]))
        claims[claim] = {"messages": rewards.judge_chat(claim)}
    for row in miniature.JUDGES:
        play, wrong[row.error] = miniature.erring_judge(row.error), set()
        for claim, request in claims.items():
            reply = play(0, request)
            assert reply == play(1, request)
            if rewards.read_verdict(rewards.Reply(reply)).sufficient != data.rule_judge([claim])[0].sufficient:
                wrong[row.error].add(claim)
        spread = math.sqrt(row.error * (1 - row.error) / len(claims))
        assert abs(len(wrong[row.error]) / len(claims) - row.error) < 3 * spread
    worst_first = [wrong[error] for error in sorted(wrong, reverse=True)]
    assert all(better < worse for worse, better in zip(worst_first, worst_first[1:]))
