"""Promise: the course's exercises can be solved. Each worked solution in docs/solutions applies to the project as it is
and does what its text says; the five empty functions make the tests red, and the original bodies make them green.

Plain `pytest` leaves these out, so that a student's own edit does not turn them red: python -m pytest -m solutions
"""
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import exercises
import pagrpo
from toy_runs import ROOT, rl_flags

pytestmark = pytest.mark.solutions
MODULES = ("model", "rewards", "data", "sft", "pagrpo")


@pytest.fixture
def solved(tmp_path, monkeypatch):
    """Applies a solution to a copy of the project. Returns the copy's modules."""
    def apply(name: str) -> SimpleNamespace:
        for file in ROOT.glob("*.py"):
            shutil.copy(file, tmp_path)
        shutil.copytree(ROOT / "assets", tmp_path / "assets")
        diff = ROOT / "docs/solutions" / f"{name}.diff"
        run = subprocess.run(["git", "apply", str(diff)], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, f"{name}.diff does not apply any more: {run.stderr}"
        for module in MODULES:
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))
        return SimpleNamespace(**{module: importlib.import_module(module) for module in MODULES})
    return apply


@pytest.fixture
def take_a_step(toy, base, tmp_path):
    """Takes a PA-GRPO step with a copy's modules. Returns its metrics."""
    def run(modules: SimpleNamespace, *flags: str) -> dict:
        modules.pagrpo.main(rl_flags(tmp_path / "run", toy, base, steps=1, heldout="") + list(flags))
        return json.loads((tmp_path / "run/pagrpo/metrics.jsonl").read_text())
    return run


def response(tokens: int, boundary: int) -> pagrpo.Response:
    segments = [0] * boundary + [1] * (tokens - boundary)
    return pagrpo.Response(None, [9] * tokens, segments, torch.zeros(tokens), True, "", pagrpo.rewards.parse(""))


def one_token_loss(loss_function, change: float, *more) -> tuple[float, bool]:
    """The loss of a token with advantage 1 whose log-probability rose by `change`, and whether it was clipped."""
    one = torch.ones(1, 1, 1)
    loss, _, clipped = loss_function(one * change, one * 0, None, one, one, 0.2, 0.0, *more)
    return loss.item(), clipped.item()


def test_dr_grpo_divides_by_no_std_and_no_length(solved):
    changed = solved("dr-grpo").pagrpo
    assert changed.normalize(torch.tensor([[2.0, 2.0, 1.0, 1.0]])).tolist() == [[0.5, 0.5, -0.5, -0.5]]
    weights = changed.collate_responses([[response(9, 4), response(3, 1)]], "response")[3]
    assert weights[weights > 0].tolist() == [1 / 32] * 12


def test_clip_higher_lets_a_good_token_rise_further(solved, take_a_step):
    modules = solved("clip-higher")
    ratio = torch.tensor(1.25).log().item()
    assert one_token_loss(modules.pagrpo.pa_grpo_loss, ratio, 0.2) == (pytest.approx(-1.2), True)
    assert one_token_loss(modules.pagrpo.pa_grpo_loss, ratio, 0.28) == (pytest.approx(-1.25), False)
    assert "clip_share" in take_a_step(modules, "--updates-per-rollout", "2", "--clip-eps-high", "0.3")


def test_the_gradient_of_k2_is_that_of_the_divergence_and_those_of_k3_and_k1_are_not(solved):
    """Over a vocabulary of three tokens every expectation is a sum."""
    k2, k3 = solved("kl-estimator").pagrpo.pa_grpo_loss, pagrpo.pa_grpo_loss
    logits, reference = torch.tensor([0.5, -1.0, 0.2], requires_grad=True), torch.tensor([0.1, 0.4, -0.9])

    def gradient(of) -> list[float]:
        return torch.autograd.grad(of(logits.log_softmax(0), reference.log_softmax(0)), logits)[0].tolist()

    def estimate(loss):
        def expected(new, ref):                              # the probabilities are those of sampling, without gradient
            none = torch.zeros(1, 1, 3)
            one = new[None, None]
            return loss(one, one.detach(), ref[None, None], none, one.detach().exp(), 0.2, 1.0)[0]
        return expected

    reverse = gradient(lambda new, ref: (new.exp() * (new - ref)).sum())      # KL(π ‖ π_ref)
    forward = gradient(lambda new, ref: (ref.exp() * (ref - new)).sum())      # KL(π_ref ‖ π)
    assert gradient(estimate(k2)) == pytest.approx(reverse, abs=1e-6)
    assert gradient(estimate(k3)) == pytest.approx(forward, abs=1e-6)
    assert gradient(lambda new, ref: (new.detach().exp() * (new - ref)).sum()) == pytest.approx([0] * 3, abs=1e-6)


def test_without_the_stop_token_in_its_mask_sft_does_not_teach_to_stop(solved, toy, vocabulary):
    modules = solved("stop-token")
    examples = [SimpleNamespace(record=r) for r in modules.data.read_records(toy / "sft.json", traces=True)[:3]]
    tokens, lengths = modules.sft.trace_tokens(examples, vocabulary, "p2r")
    assert tokens[range(3), 0, lengths[:, 0]].tolist() == vocabulary.stop_ids[:1] * 3, "the first token without a score"


def test_the_gameable_judge_takes_what_is_relevant_for_what_suffices(solved):
    modules = solved("gameable-judge")
    claim = modules.rewards.Claim("How many letters are red?", (), "numerical", "1", "1 red O, 2 blue X, 3 blue T")
    claims = [claim, claim._replace(observation="1 red O, 2 red X, 3 red T")]            # the truth, and a lie
    for name, expected in ("rule", [True, False]), ("relevance", [False, True]):
        judge = modules.data.make_judge(modules.data.JudgeSettings(judge=name))
        assert [v.sufficient for v in judge(claims)] == expected


def test_a_segment_ratio_is_the_product_of_its_tokens_ratios(solved, take_a_step):
    modules = solved("segment-ratios")
    old, weights = torch.zeros(1, 1, 6), torch.full((1, 1, 6), 1 / 3)
    new, segments = old + 0.1, torch.tensor([[[0, 0, 0, 1, 1, 1]]])
    advantages = torch.tensor([[[1.0, 1, 1, -1, -1, -1]]])
    loss, _, clipped = modules.pagrpo.pa_grpo_loss(new, old, None, advantages, weights, 0.2, 0.0, segments)
    product = torch.tensor(0.3).exp().item()                 # of three ratios of e^0.1, which leaves 1 ± 0.2
    assert loss.item() == pytest.approx(-1.2 + product)
    assert clipped[0, 0].tolist() == [True] * 3 + [False] * 3
    row = take_a_step(modules, "--updates-per-rollout", "2", "--token-mean", "segment")
    assert 0 <= row["clip_share"] <= 1


def test_a_plan_is_a_segment_with_flags_format_and_accuracy_of_its_own(solved, take_a_step, toy):
    modules = solved("plan-segment")
    text = "<observation> a </observation><plan> count it </plan><think> b </think><answer> 2 </answer>"
    parsed = modules.rewards.parse(text)
    assert parsed.formats == (True, True, True) and parsed.contents["plan"] == "count it"
    pieces = [piece.encode() + b">" for piece in text.split(">")[:-1]]
    assert modules.rewards.segment_ids(pieces) == [0, 0, 1, 1, 2, 2, 2, 2]
    for r in modules.data.read_records(toy / "rl.json"):
        response = SimpleNamespace(parsed=parsed, example=SimpleNamespace(record=r))
        assert modules.rewards.plan_is_right(response, None) == r.question.startswith("How many")
    row = take_a_step(modules, "--windows", "8", "16", "2", "8", "10", "48")
    assert {"plan/accuracy", "plan/zero_variance", "plan/tokens"} <= row.keys()


def test_the_temporal_bonus_needs_answers_that_are_better_in_order(solved, take_a_step):
    modules = solved("t-grpo")
    ordered, mixed = torch.tensor([[1.0, 1, 0, 0]] * 2), torch.tensor([[1.0, 0], [1, 1]])
    bonus = modules.pagrpo.temporal_bonus(ordered, mixed)
    assert bonus[0].tolist() == pytest.approx([0.3, 0.3, 0, 0]) and bonus[1].tolist() == [0] * 4
    pixels = torch.arange(12.0).view(12, 1)
    example = modules.data.Example(None, None, None, 0, pixels, (3, 2, 2), 1.0)
    shuffled = modules.pagrpo.shuffle_frames(example, 1).pixels.view(3, 4)
    assert sorted(shuffled[:, 0].tolist()) == [0, 4, 8] and (shuffled.diff() == 1).all(), "frames move as a whole"
    assert 0 <= take_a_step(modules)["temporal"] <= 1


def test_a_dynamic_window_follows_the_group(solved, take_a_step):
    modules = solved("dynamic-length")
    parts = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]], dtype=torch.float)[None, :, None]
    lengths = torch.tensor([20.0, 24, 40, 24, 24])[None, :, None]
    assert modules.pagrpo.dynamic_length(parts, lengths)[0, :, 0].tolist() == pytest.approx([0.2, 0.2, 0, 0, 0])
    nobody = parts * torch.tensor([0, 1, 1])
    assert modules.pagrpo.dynamic_length(nobody, lengths).sum() == 0
    assert "perception/length" in take_a_step(modules)


def test_a_new_toy_question_has_answers_traces_and_an_exact_judge(solved, tmp_path):
    modules = solved("toy-question")
    folder = modules.data.make_toy(tmp_path / "toy", {"sft": 40})
    records = [r for r in modules.data.read_records(folder / "sft.json", traces=True) if "different" in r.question]
    assert records and not any(modules.data.why_invalid(r) for r in records)
    claims = [modules.data.claim_about(r, r.trace["observation"]) for r in records]
    assert all(v.sufficient for v in modules.data.rule_judge(claims))
    assert records[0].trace["think"].endswith(records[0].reference)


def run_tests(folder: Path) -> tuple[int, str]:
    words = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider"]
    run = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    return run.returncode, run.stdout


def test_the_empty_functions_are_red_and_the_original_ones_green(tmp_path, capsys):
    folder = tmp_path / "exercises"
    exercises.main(["start", str(folder)])
    assert set(exercises.check(folder).values()) == {"open"}
    with pytest.raises(SystemExit, match="is not empty and stays as it is"):
        exercises.main(["start", str(folder)])
    status, said = run_tests(folder)
    assert status == 1 and all(name in said for name in ("TestParser", "TestSegmentIds", "TestAdvantages", "TestLoss"))
    for name in {exercise.file for exercise in exercises.EXERCISES}:
        shutil.copy(ROOT / name, folder)
    assert run_tests(folder)[0] == 0


def test_a_wrong_function_is_told_from_those_that_use_it(tmp_path, capsys):
    """A wrong `normalize` makes tests of `group_advantages` red; beside the original `normalize`, it is right."""
    folder = tmp_path / "exercises"
    exercises.start(folder)
    original = (ROOT / "pagrpo.py").read_text()
    source = exercises.with_function((folder / "pagrpo.py").read_text(), "normalize", original)
    source = exercises.with_function(source, "group_advantages", original)
    (folder / "pagrpo.py").write_text(source.replace("return torch.where(known", "return 2 * torch.where(known"))
    (folder / "rewards.py").write_text("def extract_tag(:")
    states, said = exercises.check(folder), capsys.readouterr().out
    assert states == {"extract_tag": "wrong", "normalize": "wrong", "group_advantages": "solved",
                      "segment_ids": "wrong", "pa_grpo_loss": "open"}
    assert "test_normalize_by_hand" in said and "rewards.py, line 1: " in said


def test_the_course_names_every_solution_and_only_tests_that_exist():
    course = (ROOT / "docs/course.md").read_text()
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    for diff in (ROOT / "docs/solutions").glob("*.diff"):
        assert f"`{diff.name}`" in course
    named = re.findall(r"`(test_\w+|Test\w+)`", course)
    assert len(named) > 12
    assert [name for name in named if f"{name}(" not in tests and f"class {name}:" not in tests] == []
