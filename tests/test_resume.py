"""Promise: a stopped run resumes and ends as if it had never stopped; a folder that holds something else is never
overwritten, and changed code never goes unnoticed."""
import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

import model
import pagrpo
import sft
from model import newest_checkpoint

TIMES = ("seconds", "seconds_sampling", "seconds_scoring", "seconds_judging", "seconds_training", "tokens_per_second")


def flags(**settings):
    return [x for k, v in settings.items() for x in ("--" + k.replace("_", "-"), str(v))]


def sft_flags(out, toy, base, **changes):
    return flags(**dict(preset="tiny", out=out, model=base, data=toy / "sft.json", media=toy,
                        heldout=toy / "heldout.json", steps=8, batch=8, save_every=3, warmup=2) | changes)


def rl_flags(out, toy, model, **changes):
    return flags(**dict(preset="tiny", out=out, model=model, data=toy / "rl.json", media=toy, steps=5, questions=2,
                        heldout=toy / "heldout.json", group_size=3, max_response=16, save_every=2,
                        transcript_every=100) | changes)


BOTH = pytest.mark.parametrize("module, flags, stage", [(sft, sft_flags, "sft"), (pagrpo, rl_flags, "pagrpo")])


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def same_end(a, b) -> bool:
    """Are two finished runs equal bit for bit, in weights, moments and metrics (but for times)?"""
    pairs = [[load_file(newest_checkpoint(run) / file) for run in (a, b)]
             for file in ("model.safetensors", "optimizer.safetensors")]
    return metrics(a) == metrics(b) and all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
                                            for x, y in pairs)


def before_update(monkeypatch, action):
    """Calls action(number, model) before each update, counted from 1."""
    step, calls = sft.optimizer_step, []

    def patched(model, *rest):
        calls.append(1)
        action(len(calls), model)
        return step(model, *rest)
    monkeypatch.setattr(sft, "optimizer_step", patched)


def interrupt_in_step(monkeypatch, number):
    before_update(monkeypatch, lambda n, _: n == number and signal.raise_signal(signal.SIGINT))


@BOTH
def test_ctrl_c_ends_at_a_step_and_the_same_command_finishes_the_run(module, flags, stage, toy, base, tmp_path,
                                                                     monkeypatch):
    module.main(flags(tmp_path / "whole", toy, base))
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 4)
        with pytest.raises(SystemExit, match="topped after step 4"):
            module.main(flags(tmp_path / "cut", toy, base))
    module.main(flags(tmp_path / "cut", toy, base))
    assert same_end(tmp_path / "whole" / stage, tmp_path / "cut" / stage), "bit for bit"


def test_the_kl_reference_stays_the_sft_model_after_a_resume(toy, base, tmp_path, monkeypatch):
    built, build = [], model.build_model
    monkeypatch.setattr(model, "build_model",
                        lambda folder, *a, **k: built.append(str(folder)) or build(folder, *a, **k))
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 2)
        with pytest.raises(SystemExit):
            pagrpo.main(rl_flags(tmp_path, toy, base, heldout=""))
    pagrpo.main(rl_flags(tmp_path, toy, base, heldout=""))
    assert [folder.rpartition("/")[2] for folder in sorted(built[2:4])] == ["base", "step-000002"]


def test_other_settings_in_the_same_folder_are_refused_and_named(trained, toy, base):
    with pytest.raises(SystemExit, match=r"--lr was 0.002, is now 0.1"):
        sft.main(sft_flags(trained, toy, base, steps=6, lr=0.1))


def test_a_new_flag_with_its_default_does_not_lock_an_old_run(trained, toy, base, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "a")
    settings = tmp_path / "a/sft/settings.json"
    old = json.loads(settings.read_text())
    del old["blind"], old["beta2"]                           # as if these flags were newer than the run
    settings.write_text(json.dumps(old))
    same = sft_flags(tmp_path / "a", toy, base, steps=6, blind=0.0, beta2=0.999)
    sft.main(same)
    assert "sft is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--blind was 0.0, is now 0.5"):
        sft.main([*same, "--blind", "0.5"])


def test_changed_code_is_named(trained, toy, base, tmp_path, monkeypatch, capsys):
    """A finished run shows what the old code gave, an unfinished one goes on with the new code; both say so."""
    shutil.copytree(trained, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/sft/step-000006")
    hashes = sft.code_hashes
    monkeypatch.setattr(sft, "code_hashes", lambda settings: hashes(settings) | {"rewards.py": "edited"})
    sft.main(sft_flags(trained, toy, base, steps=6))
    said = capsys.readouterr().out
    assert "rewards.py changed since" in said and "Another --out begins anew" in said and "sft is finished" in said
    sft.main(sft_flags(tmp_path / "cut", toy, base, steps=6))
    said = capsys.readouterr().out
    assert "rewards.py changed since" in said and "the old code's, what follows is the new code's" in said


def test_a_finished_run_shows_its_table_and_trains_nothing(toy, base, tmp_path, capsys, monkeypatch):
    pagrpo.main(rl_flags(tmp_path, toy, base, steps=1))
    first = capsys.readouterr().out
    monkeypatch.setattr(sft, "optimizer_step", None)
    pagrpo.main(rl_flags(tmp_path, toy, base, steps=1))
    again = capsys.readouterr().out
    table = first[first.index("percent of"):first.index("Report:")]
    assert "is finished" in again and table == again[again.index("percent of"):]
    report = tmp_path / "pagrpo/results.json"
    whole = report.read_text()
    report.write_text(whole[:40])                            # damaged: made again
    pagrpo.main(rl_flags(tmp_path, toy, base, steps=1))
    assert report.read_text() == whole


def poison(monkeypatch, updates):
    """Gradients of these updates (from 1) are not numbers."""
    def to_nan(number, model):
        for p in model.parameters() if number in updates else ():
            p.grad = torch.full_like(p, float("nan"))
    before_update(monkeypatch, to_nan)


@BOTH
def test_gradients_that_stay_broken_stop_the_run_a_few_do_not(module, flags, stage, toy, base, tmp_path, monkeypatch):
    poison(monkeypatch, range(2, 6))                 # four in a row: left out, counted
    module.main(flags(tmp_path / "some", toy, base, steps=7))
    lines = metrics(tmp_path / "some" / stage)
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1, 1, 1, 0, 0] and "grad_norm" not in lines[1]
    monkeypatch.undo()
    poison(monkeypatch, range(4, 99))
    with pytest.raises(SystemExit, match="5 steps in a row were NaN or infinite, up to step 8.*step-00000[36]"):
        module.main(flags(tmp_path / "all", toy, base, steps=20, save_every=3))
    assert len(metrics(tmp_path / "all" / stage)) == 8


def test_steps_without_an_update_leave_no_trace_in_the_moments(toy, base, tmp_path, monkeypatch):
    """Saving must change nothing: also where every update so far was left out."""
    for out, save_every in (("often", 1), ("seldom", 99)):
        with monkeypatch.context() as patch:
            poison(patch, range(1, 4))
            sft.main(sft_flags(tmp_path / out, toy, base, steps=5, save_every=save_every))
    assert same_end(tmp_path / "often/sft", tmp_path / "seldom/sft")


@BOTH
@pytest.mark.parametrize("wrong", ["model", "heldout"])
def test_a_mistyped_path_does_not_claim_the_folder(module, flags, stage, wrong, toy, base, tmp_path):
    command = flags(tmp_path, toy, base)
    command[command.index(f"--{wrong}") + 1] = str(tmp_path / "mistyped")
    with pytest.raises(SystemExit):
        module.main(command)
    assert not (tmp_path / stage).exists()


def test_damaged_settings_are_named(toy, base, tmp_path):
    (tmp_path / "sft").mkdir()
    for damage in ("", "[1]"):
        (tmp_path / "sft/settings.json").write_text(damage)
        with pytest.raises(SystemExit, match="settings.json is damaged"):
            sft.main(sft_flags(tmp_path, toy, base))
