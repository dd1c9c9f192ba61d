"""Promise: a stopped run resumes and ends as if it had never stopped; a folder that holds something else is never
overwritten, and changed code never goes unnoticed."""
import json
import shutil

import pytest
import torch

import data
import model
import pagrpo
import sft
from toy_runs import before_update, interrupt_in_step, metrics, rl_flags, same_end, sft_flags

BOTH = pytest.mark.parametrize("module, flags, stage", [(sft, sft_flags, "sft"), (pagrpo, rl_flags, "pagrpo")])


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
    built, build, command = [], model.build_model, rl_flags(tmp_path, toy, base, heldout="")
    monkeypatch.setattr(model, "build_model", lambda folder, *a, **k: built.append(folder) or build(folder, *a, **k))
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 2)
        with pytest.raises(SystemExit):
            pagrpo.main(command)
    pagrpo.main(command)
    assert set(map(str, built[2:4])) == {str(base), str(tmp_path / "pagrpo/step-000002")}


def test_other_settings_in_the_same_folder_are_refused_and_named(trained, toy, base):
    with pytest.raises(SystemExit, match=r"--lr was 0.002, is now 0.1\n.*another --out"):
        sft.main(sft_flags(trained, toy, base, steps=6, lr=0.1))


def test_settings_of_an_earlier_version_do_not_lock_its_run(tmp_path):
    """A new setting counts as its default, a setting that is gone for nothing, and windows have been two settings."""
    now, file = pagrpo.Settings(windows=(8, 16, 10, 48)), tmp_path / "settings.json"
    old = json.loads(json.dumps(vars(now)))
    del old["windows"], old["beta2"]
    old |= dict(perception_window=[8, 16], reasoning_window=[10, 48], shards=0, patience=6.0, resume=True)
    file.write_text(json.dumps(old))
    for changed, why in (dict(beta2=0.9), "--beta2 was 0.999, is now 0.9"), (dict(windows=(8, 16, 10, 47)), "--windows"):
        with pytest.raises(SystemExit, match=why):
            data.check_settings(tmp_path, pagrpo.Settings(**vars(now) | changed))
    data.check_settings(tmp_path, now)
    assert json.loads(file.read_text()) == json.loads(json.dumps(vars(now)))


@pytest.mark.parametrize("damage", ["", "[1]"])
def test_damaged_settings_are_named(damage, toy, base, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/settings.json").write_text(damage)
    with pytest.raises(SystemExit, match="settings.json is damaged"):
        sft.main(sft_flags(tmp_path, toy, base))


@BOTH
@pytest.mark.parametrize("wrong", ["model", "heldout"])
def test_a_mistyped_path_does_not_claim_the_folder(module, flags, stage, wrong, toy, base, tmp_path):
    with pytest.raises(SystemExit):
        module.main([*flags(tmp_path, toy, base), f"--{wrong}", str(tmp_path / "mistyped")])
    assert not (tmp_path / stage).exists()


@pytest.mark.parametrize("left, said", [(["step-000003", "step-000006"], "sft is finished"),
                                        (["step-000003"], "continues after step 3")])
def test_changed_code_is_named(left, said, trained, toy, base, tmp_path, monkeypatch, capsys):
    """A finished run shows what the old code gave, an unfinished one goes on with the new code; both say so."""
    shutil.copytree(trained, tmp_path / "run")
    for checkpoint in (tmp_path / "run/sft").glob("step-*"):
        if checkpoint.name not in left:
            shutil.rmtree(checkpoint)
    hashes = sft.code_hashes
    monkeypatch.setattr(sft, "code_hashes", lambda settings: hashes(settings) | {"rewards.py": "edited"})
    sft.main(sft_flags(tmp_path / "run", toy, base, steps=6))
    out = capsys.readouterr().out
    assert f"rewards.py changed since {tmp_path}/run/sft/{left[-1]}: " in out and said in out
    assert "the old code's, what follows is the new code's. Another --out begins anew" in out


def test_a_finished_run_shows_its_table_and_trains_nothing(toy, base, tmp_path, capsys, monkeypatch):
    command = rl_flags(tmp_path, toy, base, steps=1)
    pagrpo.main(command)
    first, results = capsys.readouterr().out, tmp_path / "pagrpo/results.json"
    monkeypatch.setattr(sft, "optimizer_step", None)
    pagrpo.main(command)
    again, whole = capsys.readouterr().out, results.read_text()
    assert "is finished" in again
    assert first[first.index("percent of"):first.index("Report:")] == again[again.index("percent of"):]
    results.write_text(whole[:40])                           # damaged: made again
    pagrpo.main(command)
    assert results.read_text() == whole


# ------------------------------------------------------------------------------------------------ broken gradients

def poison(monkeypatch, updates: range) -> None:
    """Gradients of these updates (from 1) are not numbers."""
    def to_nan(number, model):
        for p in model.parameters() if number in updates else ():
            p.grad = torch.full_like(p, float("nan"))
    before_update(monkeypatch, to_nan)


@BOTH
def test_gradients_that_stay_broken_stop_the_run_a_few_do_not(module, flags, stage, toy, base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, range(2, 6))                           # four in a row: left out, counted
        module.main(flags(tmp_path / "some", toy, base, steps=7))
    rows = metrics(tmp_path / "some" / stage)
    assert [row["skipped_updates"] for row in rows] == [0, 1, 1, 1, 1, 0, 0] and "grad_norm" not in rows[1]
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
