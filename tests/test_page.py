"""Promise: PA-GRPO is as small as it looks. An independent loop of 40 lines takes the same steps as `pagrpo.train`, and
a third segment is one more row of a table."""
import shutil
import subprocess
import sys

import pytest
import torch

import data
import pagrpo
import sft
from data import collate
from model import load_model, newest_checkpoint
from toy_runs import ROOT, logged

ALONE = sft.World(0, 1, torch.device("cpu"))


def short_loop(settings, toy, start, steps):
    """PA-GRPO with the project's own functions, without checkpoints, ranks, micro-batches or logs."""
    vocabulary = data.Vocabulary(start)
    policy, reference = (vocabulary.mask_special_tokens(load_model(start)) for _ in range(2))
    optimizer = sft.make_optimizer(policy, settings)
    records = data.read_records(toy / "rl.json")
    questions = data.Examples(records, toy, vocabulary, policy.config, settings)
    judge = data.make_judge(settings)
    for step in range(steps):
        examples = [questions[i] for i in data.step_indices(len(records), settings.questions, step, settings.seed)]
        groups = pagrpo.rollout(policy, examples, vocabulary, settings, f"step {step}")
        verdicts = judge([pagrpo.claim_of(response) for group in groups for response in group])
        parts = pagrpo.reward_tensor(groups, verdicts, settings)                               # (B, G, K, 3)
        advantages = pagrpo.group_advantages(parts.sum(-1), settings.advantage)                # (B, G, K)
        tokens, lengths, segments, weights, _ = pagrpo.collate_responses(groups, "response")
        logprobs, _ = policy.logprobs(collate(examples), tokens, lengths, settings.temperature)     # (B, G, T)
        with torch.no_grad():
            ref_logprobs, _ = reference.logprobs(collate(examples), tokens, lengths, settings.temperature)
        loss, _, _ = pagrpo.pa_grpo_loss(
            logprobs, logprobs.detach(), ref_logprobs, pagrpo.token_advantages(advantages, segments), weights,
            settings.clip_eps, settings.kl_beta)
        loss = loss / lengths.numel()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = sft.learning_rate(step, settings.steps, settings)
        optimizer.step()
        optimizer.zero_grad()
        perception, reasoning = parts[..., 0].flatten(0, 1).mean(0).tolist()
        yield {"loss": loss.item(), "grad_norm": norm.item(), "perception/accuracy": perception,
               "reasoning/accuracy": reasoning}


@pytest.mark.parametrize("advantage", ["pa", "grpo"])
def test_the_short_loop_takes_the_same_steps(advantage, toy, started, tmp_path):
    start = newest_checkpoint(started)
    settings = pagrpo.Settings(**pagrpo.PRESETS["tiny"] | dict(
        data=str(toy / "rl.json"), media=str(toy), model=str(start), out=str(tmp_path), questions=4, group_size=4,
        max_response=48, steps=3, micro_batch=2, advantage=advantage))
    pagrpo.run_stage(settings, ALONE)
    rows = logged(tmp_path / pagrpo.STAGES[advantage])
    for line, expected in zip(rows, short_loop(settings, toy, start, 3), strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


PLAN = """\
Segment("plan", (
        Tag("plan", "Say in a few words how you will find the answer."),
    ), (2, 8), lambda response, verdict: float("it" in (response.parsed.contents["plan"] or ""))),
    """
RUN = """\
import data, pagrpo, sft
data.TOY_TEXTS["plan"] = lambda toy, shown: f"{toy.name} it"
data.TOY_SPLITS.update(captions=8, base=16, sft=64, rl=16, heldout=8)
sft.PRETRAINING.update(captions=2, base=2)
sft.PRESETS["tiny"].update(steps=80, batch=8, lr=3e-3, warmup=4)
windows = "8", "16", "2", "5", "10", "48"
pagrpo.main(["--steps", "2", "--questions", "4", "--windows", *windows, "--transcript-every", "1"])
"""


def test_a_third_segment_is_a_row_of_the_table(tmp_path):
    """A copy of the project, with one row more in rewards.SEGMENTS and one in data.TOY_TEXTS, and nothing else: the
    toy teacher writes the plan, SFT learns it, and two steps of PA-GRPO have an advantage for it."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    table, row = tmp_path / "rewards.py", 'Segment("reasoning", ('
    table.write_text(table.read_text().replace(row, PLAN + row))
    (tmp_path / "run.py").write_text(RUN)
    run = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    trace, *_ = logged(tmp_path / "runs/tiny/cot", "traces.jsonl")
    assert trace["plan"] in {"next it", "count it", "read it", "ends it", "total it"}
    rows = logged(tmp_path / "runs/tiny/pagrpo")
    assert any(row["plan/zero_variance"] < 1 for row in rows), "some group has advantages that are not 0"
    assert "plan        accuracy" in run.stderr + run.stdout
