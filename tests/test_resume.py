"""Promise: a stopped run goes on where it stopped and ends as if it had never stopped; a folder that holds something
else is never overwritten."""
import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

import pagrpo
import sft
from sft import newest_checkpoint

TIMES = ("seconds", "seconds_sampling", "seconds_scoring", "seconds_judging", "seconds_training", "judge/seconds",
         "judge/share", "tokens_per_second", "peak_memory_gb")


def sft_flags(out, toy, base, **changes):
    flags = dict(preset="tiny", out=out, model=base, data=toy / "sft.json", media=toy, heldout=toy / "heldout.json",
                 steps=8, batch=8, save_every=3, warmup=2) | changes
    return [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))]


def rl_flags(out, toy, model, **changes):
    flags = dict(preset="tiny", out=out, model=model, data=toy / "rl.json", media=toy, heldout=toy / "heldout.json",
                 steps=5, questions=2, group_size=3, max_response=16, save_every=2, transcript_every=100) | changes
    return [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))]


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def interrupt_in_step(monkeypatch, module, number):
    """Sends Ctrl-C while step `number` computes its update."""
    update, calls = module.optimizer_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return update(*args)
    monkeypatch.setattr(module, "optimizer_step", interrupted)


@pytest.mark.parametrize("module, flags, stage", [(sft, sft_flags, "sft"), (pagrpo, rl_flags, "pagrpo")])
def test_ctrl_c_ends_at_a_step_and_the_same_command_finishes_the_run(module, flags, stage, toy, base,
                                                                     tmp_path, monkeypatch):
    module.main(flags(tmp_path / "whole", toy, base))
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, module, 4)
        with pytest.raises(SystemExit, match="topped after step 4"):
            module.main(flags(tmp_path / "cut", toy, base))
    module.main(flags(tmp_path / "cut", toy, base))
    whole, cut = (tmp_path / name / stage for name in ("whole", "cut"))
    assert metrics(whole) == metrics(cut)
    a, b = (load_file(newest_checkpoint(folder) / "model.safetensors") for folder in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), "bit for bit"


def test_a_run_killed_between_checkpoints_takes_its_steps_again_and_logs_them_once(toy, base, tmp_path):
    sft.main(sft_flags(tmp_path / "whole", toy, base))
    sft.main(sft_flags(tmp_path / "cut", toy, base, steps=8, save_every=3))
    folder = tmp_path / "cut" / "sft"
    shutil.rmtree(newest_checkpoint(folder))                 # what a kill in step 8 leaves: a checkpoint of step 6, …
    sft.main(sft_flags(tmp_path / "six", toy, base, save_every=6, batch=8) + [])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')                        # … and a line cut short
    sft.main(sft_flags(tmp_path / "cut", toy, base))
    assert metrics(folder) == metrics(tmp_path / "whole" / "sft")


def test_a_half_written_checkpoint_does_not_count(toy, base, tmp_path):
    sft.main(sft_flags(tmp_path, toy, base, steps=2))
    half = tmp_path / "sft" / "step-000009.writing"
    shutil.copytree(newest_checkpoint(tmp_path / "sft"), half)
    assert newest_checkpoint(tmp_path / "sft").name == "step-000002"


def test_the_kl_reference_stays_the_sft_model_after_a_resume(toy, base, tmp_path, monkeypatch):
    built = []
    build = pagrpo.build_model
    monkeypatch.setattr(pagrpo, "build_model",
                        lambda folder, *a, **k: built.append(str(folder)) or build(folder, *a, **k))
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, pagrpo, 2)
        with pytest.raises(SystemExit):
            pagrpo.main(rl_flags(tmp_path, toy, base, heldout=""))
    pagrpo.main(rl_flags(tmp_path, toy, base, heldout=""))
    reference, policy = built[2:4]
    assert policy.endswith("step-000002") and reference == str(base)


def test_other_settings_in_the_same_folder_are_refused_and_named(toy, base, tmp_path):
    sft.main(sft_flags(tmp_path, toy, base, steps=2))
    with pytest.raises(SystemExit, match=r"--lr was 0.002, is now 0.1"):
        sft.main(sft_flags(tmp_path, toy, base, steps=2, lr=0.1))


def test_a_finished_run_shows_its_table_and_trains_nothing(toy, base, tmp_path, capsys, monkeypatch):
    pagrpo.main(rl_flags(tmp_path, toy, base, steps=1))
    first = capsys.readouterr().out
    monkeypatch.setattr(pagrpo, "optimizer_step", None)
    pagrpo.main(rl_flags(tmp_path, toy, base, steps=1))
    again = capsys.readouterr().out
    assert "is finished" in again and first[first.index("Percent of"):] == again[again.index("Percent of"):]


def poison(monkeypatch, module, steps):
    """Gradients of these updates (from 1) are not numbers."""
    update, calls = module.optimizer_step, []

    def poisoned(model, *rest):
        calls.append(1)
        if len(calls) in steps:
            for p in model.parameters():
                p.grad = torch.full_like(p, float("nan"))
        return update(model, *rest)
    monkeypatch.setattr(module, "optimizer_step", poisoned)


@pytest.mark.parametrize("module, flags, stage", [(sft, sft_flags, "sft"), (pagrpo, rl_flags, "pagrpo")])
def test_gradients_that_stay_broken_stop_the_run_a_few_do_not(module, flags, stage, toy, base, tmp_path, monkeypatch):
    poison(monkeypatch, module, range(2, 6))                 # four in a row: left out, counted
    module.main(flags(tmp_path / "some", toy, base, steps=7))
    lines = metrics(tmp_path / "some" / stage)
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1, 1, 1, 0, 0] and lines[1]["grad_norm"] is None
    monkeypatch.undo()
    poison(monkeypatch, module, range(4, 99))
    with pytest.raises(SystemExit, match="5 steps in a row were NaN or infinite, up to step 8.*step-00000[36]"):
        module.main(flags(tmp_path / "all", toy, base, steps=20, save_every=3))
    assert len(metrics(tmp_path / "all" / stage)) == 8
