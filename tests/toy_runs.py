"""Runs of sft.py and pagrpo.py on the small toy world: flags, what they logged, what happens in a step."""
import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sft
from model import newest_checkpoint

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def flags(**settings) -> list[str]:
    return [x for k, v in settings.items() for x in ("--" + k.replace("_", "-"), str(v))]


def sft_flags(out: Path, toy: Path, base: Path, **changes) -> list[str]:
    settings = dict(preset="tiny", out=out, model=base, data=toy / "sft.json", media=toy, steps=8, batch=8,
                    heldout=toy / "heldout.json", save_every=3, warmup=2)
    return flags(**settings | changes)


def rl_flags(out: Path, toy: Path, model: Path, **changes) -> list[str]:
    settings = dict(preset="tiny", out=out, model=model, data=toy / "rl.json", media=toy, steps=5, questions=2,
                    heldout=toy / "heldout.json", group_size=3, max_response=16, save_every=2, transcript_every=100)
    return flags(**settings | changes)


def command(script: str, given: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / script), *given]


def logged(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Whole rows of a log so far."""
    file = folder / name
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def metrics(folder: Path) -> list[dict]:
    """What a run logged, but for times."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in logged(folder)]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "optimizer.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_end(a: Path, b: Path) -> bool:
    """Are two finished runs equal bit for bit, in weights, moments and metrics?"""
    return metrics(a) == metrics(b) and equal(*(weights(newest_checkpoint(run)) for run in (a, b)))


def before_update(monkeypatch, action) -> None:
    """Calls action(number, model) before each update, counted from 1."""
    step, calls = sft.optimizer_step, []

    def patched(model, *rest):
        calls.append(1)
        action(len(calls), model)
        return step(model, *rest)
    monkeypatch.setattr(sft, "optimizer_step", patched)


@contextmanager
def interrupted(step: int, update: int = 0):
    """The run that is started inside gets SIGINT in this step (if it is resumed: before this update of its own), and
    stops after it."""
    update = update or step
    with pytest.MonkeyPatch.context() as patch:
        before_update(patch, lambda n, _: n == update and signal.raise_signal(signal.SIGINT))
        with pytest.raises(SystemExit, match=f"topped after step {step} .*The last checkpoint is .*/step-{step:06d}"):
            yield
