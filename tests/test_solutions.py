"""Promise: the course's exercises can be solved. Each worked solution in docs/solutions applies to the project as it is
and does what its text says; the five empty functions make the tests red, and the original bodies make them green.

Plain `pytest` leaves these out, so that a student's own edit does not turn them red: python -m pytest -m solutions
"""
import importlib
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import exercises
import pagrpo
from toy_runs import ROOT, logged, rl_flags

pytestmark = pytest.mark.solutions
MODULES = ("model", "rewards", "data", "sft", "pagrpo")


@pytest.fixture
def solved(toy, base, tmp_path, monkeypatch):
    """Applies a solution to a copy of the project. Returns the copy's modules, and what logs a PA-GRPO step of it."""
    def apply(name: str) -> SimpleNamespace:
        for file in ROOT.glob("*.py"):
            shutil.copy(file, tmp_path)
        shutil.copytree(ROOT / "assets", tmp_path / "assets")
        subprocess.run(["git", "apply", ROOT / f"docs/solutions/{name}.diff"], cwd=tmp_path, check=True)
        for module in MODULES:
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        modules = {module: importlib.import_module(module) for module in MODULES}

        def step(*flags: str) -> dict:
            modules["pagrpo"].main(rl_flags(tmp_path / "run", toy, base, steps=1, heldout="") + list(flags))
            return logged(tmp_path / "run/pagrpo")[0]
        return SimpleNamespace(**modules, step=step)
    return apply


def test_dr_grpo_divides_by_no_std_and_no_length(solved):
    changed = solved("dr-grpo").pagrpo
    assert changed.normalize(torch.tensor([[2.0, 2.0, 1.0, 1.0]])).tolist() == [[0.5, 0.5, -0.5, -0.5]]
    group = [SimpleNamespace(tokens=[9] * n, segments=[0] * n, logprobs=torch.zeros(n)) for n in (9, 3)]
    weights = changed.collate_responses([group], "response")[3]
    assert weights[weights > 0].tolist() == [1 / 32] * 12


def test_clip_higher_lets_a_good_token_rise_further(solved):
    modules, one = solved("clip-higher"), torch.ones(1, 1, 1)
    new = torch.tensor(1.25).log() * one
    loss, _, _ = modules.pagrpo.pa_grpo_loss(new, 0 * one, None, one, one, 0.2, 0.0, 0.28)
    assert loss.item() == pytest.approx(-1.25)
    assert "clip_share" in modules.step("--clip-eps-high", "0.3")


def test_the_gradient_of_k2_is_that_of_the_divergence_and_those_of_k3_and_k1_are_not(solved):
    """Over a vocabulary of three tokens every expectation is a sum."""
    logits, reference = torch.tensor([0.5, -1.0, 0.2], requires_grad=True), torch.tensor([0.1, 0.4, -0.9])
    new, ref = (x.log_softmax(0)[None, None] for x in (logits, reference))
    sampled, zero = new.detach(), torch.zeros(1, 1, 3)
    k2, k3 = (module.pa_grpo_loss(new, sampled, ref, zero, sampled.exp(), 0.2, 1.0)[0]
              for module in (solved("kl-estimator").pagrpo, pagrpo))
    k1 = (sampled.exp() * (new - ref)).sum()
    reverse = (new.exp() * (new - ref)).sum()                # KL(π ‖ π_ref)
    forward = (ref.exp() * (ref - new)).sum()                # KL(π_ref ‖ π)
    for loss, expected in ((k2, reverse), (k3, forward), (k1, 0 * forward)):
        gradient, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected))
        assert torch.allclose(gradient, wanted, atol=1e-6)


def test_without_the_stop_token_in_its_mask_sft_does_not_teach_to_stop(solved, toy, vocabulary):
    modules = solved("stop-token")
    examples = [SimpleNamespace(record=r) for r in modules.data.read_records(toy / "sft.json", traces=True)[:3]]
    tokens, lengths = modules.sft.trace_tokens(examples, vocabulary, "p2r")
    assert tokens[range(3), 0, lengths[:, 0]].tolist() == vocabulary.stop_ids[:1] * 3, "the first token without a score"


def test_the_gameable_judge_takes_what_is_relevant_for_what_suffices(solved):
    modules = solved("gameable-judge")
    claim = modules.rewards.Claim("How many letters are X?", (), "numerical", "1", "1 red O, 2 blue X, 3 blue T")
    claims = [claim, claim._replace(observation="1 red X, 2 blue X, 3 red X")]            # the truth, and a lie
    for name, expected in ("rule", [True, False]), ("relevance", [False, True]):
        judge = modules.data.make_judge(modules.data.JudgeSettings(judge=name))
        assert [v.sufficient for v in judge(claims)] == expected


def test_a_segment_ratio_is_the_product_of_its_tokens_ratios(solved):
    modules = solved("segment-ratios")
    old, segments = torch.zeros(1, 1, 6), torch.tensor([[[0, 0, 0, 1, 1, 1]]])
    loss, _, _ = modules.pagrpo.pa_grpo_loss(old + 0.1, old, None, old - 1, old + 1 / 3, 0.2, 0.0, segments)
    assert loss.item() == pytest.approx(2 * math.exp(0.3))
    assert "clip_share" in modules.step("--updates-per-rollout", "2", "--token-mean", "segment")


def test_a_plan_is_a_segment_with_flags_format_and_accuracy_of_its_own(solved, toy):
    modules = solved("plan-segment")
    text = "<observation> a </observation><plan> count it </plan><think> b </think><answer> 2 </answer>"
    parsed = modules.rewards.parse(text)
    for r in modules.data.read_records(toy / "rl.json"):
        response = SimpleNamespace(parsed=parsed, example=SimpleNamespace(record=r))
        assert modules.rewards.plan_is_right(response, None) == r.question.startswith("How many")
    assert "plan/zero_variance" in modules.step("--windows", "8", "16", "2", "8", "10", "48")


def test_the_temporal_bonus_needs_answers_that_are_better_in_order(solved):
    modules = solved("t-grpo")
    ordered, mixed = torch.tensor([[1.0, 0]] * 2), torch.tensor([[0.0], [1.0]])
    bonus = modules.pagrpo.temporal_bonus(ordered, mixed)
    assert torch.allclose(bonus, torch.tensor([[0.3, 0], [0, 0]]))
    pixels = torch.arange(12.0).view(12, 1)
    example = modules.data.Example(None, None, None, 0, pixels, (3, 2, 2), 1.0)
    shuffled = modules.pagrpo.shuffle_frames(example, 1).pixels
    assert sorted(shuffled.view(3, 4).tolist()) == pixels.view(3, 4).tolist(), "frames move as a whole"
    assert "temporal" in modules.step()


def test_a_dynamic_window_follows_the_group(solved):
    modules = solved("dynamic-length")
    parts, lengths = torch.ones(1, 4, 1, 3), torch.tensor([20.0, 24, 40, 24])[None, :, None]
    parts[0, 3, 0, 0] = 0                                    # not accurate
    assert modules.pagrpo.dynamic_length(parts, lengths).flatten().tolist() == pytest.approx([0.2, 0.2, 0, 0])
    assert "perception/length" in modules.step()


def test_a_new_toy_question_has_answers_traces_and_an_exact_judge(solved, tmp_path):
    modules = solved("toy-question")
    folder = modules.data.make_toy(tmp_path / "toy", {"sft": 40})
    records = [r for r in modules.data.read_records(folder / "sft.json", traces=True) if "different" in r.question]
    claims = [modules.data.claim_about(r, r.trace["observation"]) for r in records]
    assert records and all(v.sufficient for v in modules.data.rule_judge(claims))
    assert records[0].trace["think"].endswith(records[0].reference)


def test_the_empty_functions_are_red_and_the_original_ones_green(tmp_path):
    folder, words = tmp_path / "exercises", [sys.executable, "-m", "pytest", "-q"]
    exercises.main(["start", str(folder)])
    assert set(exercises.check(folder).values()) == {"open"}
    with pytest.raises(SystemExit, match="is not empty and stays as it is"):
        exercises.start(folder)
    assert subprocess.run(words, cwd=folder).returncode == 1
    for name in ("rewards.py", "pagrpo.py"):
        shutil.copy(ROOT / name, folder)
    assert subprocess.run(words, cwd=folder).returncode == 0


def test_a_wrong_function_is_told_from_those_that_use_it(tmp_path, capsys):
    """A wrong `normalize` makes tests of `group_advantages` red; beside the original `normalize`, it is right."""
    folder = tmp_path / "exercises"
    exercises.start(folder)
    source = (ROOT / "pagrpo.py").read_text()
    (folder / "pagrpo.py").write_text(source.replace("return torch.where(known", "return 2 * torch.where(known"))
    (folder / "rewards.py").write_text("def extract_tag(:")
    states, said = exercises.check(folder), capsys.readouterr().out
    assert states == {"extract_tag": "wrong", "normalize": "wrong", "group_advantages": "solved",
                      "segment_ids": "wrong", "pa_grpo_loss": "solved"}
    assert "test_normalize_by_hand" in said


def test_the_course_names_every_solution_and_only_tests_that_exist():
    course = (ROOT / "docs/course.md").read_text()
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert all(f"`{diff.name}`" in course for diff in (ROOT / "docs/solutions").glob("*.diff"))
    named = set(re.findall(r"`(test_\w+|Test\w+)`", course))
    assert len(named) > 12 and named <= set(re.findall(r"(?:def|class) (\w+)", tests))
