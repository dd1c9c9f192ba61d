"""Promise: two ranks do what one does. They sample the same tokens, take the same step and write the same metrics."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sft import newest_checkpoint

ROOT = Path(__file__).parent.parent


def launch(ranks: int, script: str, *flags: str) -> str:
    """Runs a script as the README says, with `ranks` ranks on this machine's cores. Returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] * (ranks > 1)
    result = subprocess.run([*(command or [sys.executable]), str(ROOT / script), *map(str, flags)], capture_output=True,
                            text=True, timeout=120, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("judge", ["rule", "reference"])
def test_a_rank_without_a_question_keeps_in_step_and_changes_nothing(judge, toy, started, tmp_path):
    """One question a step: the second rank has none and must neither hang nor change anything."""
    common = ["--preset", "tiny", "--model", started, "--data", toy / "rl.json", "--media", toy, "--questions", 1,
              "--group-size", 2, "--max-response", 20, "--steps", 2, "--judge", judge]
    launch(1, "pagrpo.py", "--out", tmp_path / "1", *common)
    launch(2, "pagrpo.py", "--out", tmp_path / "2", *common)
    one, two = (logged(tmp_path / ranks / "pagrpo") for ranks in "12")
    for a, b in zip(one, two, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["tokens"] == b["tokens"]
        assert a["judge/claims"] == b["judge/claims"] > 0, "the other rank has something to judge"
    a, b = (load_file(newest_checkpoint(tmp_path / ranks / "pagrpo") / "optimizer.safetensors") for ranks in "12")
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


@pytest.mark.parametrize("script, stage, flags", [
    ("sft.py", "sft", ("--steps", 2, "--batch", 5)),         # 5 traces: one rank has three, the other two
    ("pagrpo.py", "pagrpo", ("--steps", 2, "--questions", 3, "--group-size", 2, "--max-response", 12))])
def test_two_ranks_take_the_same_steps_as_one(script, stage, flags, toy, base, tmp_path):
    data = toy / ("sft.json" if stage == "sft" else "rl.json")
    common = ["--preset", "tiny", "--model", base, "--data", data, "--media", toy,
              "--heldout", toy / "heldout.json", *flags]
    for ranks in (1, 2):
        launch(ranks, script, "--out", tmp_path / str(ranks), *common)
    one, two = (logged(tmp_path / str(ranks) / stage) for ranks in (1, 2))
    same = ("loss", "perception/reward", "reasoning/reward", "reasoning/tokens", "reasoning/reward_std", "kl",
            "entropy", "grad_norm", "tokens", "questions", "truncated", "perception/zero_variance")
    for a, b in zip(one, two):
        assert {k: a[k] for k in same if k in a} == pytest.approx({k: b[k] for k in same if k in b}, rel=2e-4, abs=1e-6)
    a, b = (load_file(newest_checkpoint(tmp_path / str(ranks) / stage) / "model.safetensors") for ranks in (1, 2))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)
