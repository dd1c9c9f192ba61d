"""Promise: a stopped run resumes and ends as if it had never stopped; a folder that holds something else is never
overwritten, and changed code never goes unnoticed."""
import json
import shutil
from dataclasses import replace

import pytest
import torch

import data
import model
import pagrpo
import sft
from toy_runs import before_update, interrupted, logged, rl_flags, same_end, sft_flags

BOTH = pytest.mark.parametrize("module, flags, stage", [(sft, sft_flags, "sft"), (pagrpo, rl_flags, "pagrpo")])


@BOTH
def test_ctrl_c_ends_at_a_step_and_the_same_command_finishes_the_run(module, flags, stage, toy, base, tmp_path):
    module.main(flags(tmp_path / "whole", toy, base))
    with interrupted(4):
        module.main(flags(tmp_path / "cut", toy, base))
    module.main(flags(tmp_path / "cut", toy, base))
    assert same_end(tmp_path / "whole" / stage, tmp_path / "cut" / stage), "bit for bit"


def test_the_kl_reference_stays_the_sft_model_after_a_resume(toy, base, tmp_path, monkeypatch):
    built, build, command = [], model.build_model, rl_flags(tmp_path, toy, base, heldout="")

    def watched(folder, *rest, **more):
        built.append(str(folder))
        return build(folder, *rest, **more)
    with interrupted(2):
        pagrpo.main(command)
    monkeypatch.setattr(model, "build_model", watched)
    pagrpo.main(command)
    assert set(built) == {str(base), str(tmp_path / "pagrpo/step-000002")}


def test_other_settings_in_the_same_folder_are_refused_and_named(trained, toy, base):
    with pytest.raises(SystemExit, match=r"--lr was 0.001, is now 0.1\n.*another --out"):
        sft.main(sft_flags(trained, toy, base, steps=6, lr=0.1))


def test_a_toy_world_of_another_seed_is_refused_before_its_clips_are_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "make_toy", lambda *args, **named: pytest.fail("written anew"))
    settings = sft.Settings(out=str(tmp_path), stage="base")
    data.check_settings(tmp_path / "base", settings)
    with pytest.raises(SystemExit, match=r"--seed was 0, is now 1\n.*another --out"):
        sft.make_toy_files([replace(settings, seed=1, stage=stage) for stage in ("captions", "base")])


def test_a_setting_that_is_new_counts_as_its_default_and_one_that_is_gone_for_nothing(tmp_path):
    now, file = sft.Settings(), tmp_path / "settings.json"
    old = vars(now) | {"patience": 6.0}
    del old["beta2"]
    file.write_text(json.dumps(old))
    with pytest.raises(SystemExit, match="--beta2 was 0.999, is now 0.9"):
        data.check_settings(tmp_path, sft.Settings(beta2=0.9))
    data.check_settings(tmp_path, now)
    assert json.loads(file.read_text()) == vars(now)


@BOTH
@pytest.mark.parametrize("wrong", ["model", "heldout"])
def test_a_mistyped_path_does_not_claim_the_folder(module, flags, stage, wrong, toy, base, tmp_path):
    with pytest.raises(SystemExit):
        module.main([*flags(tmp_path, toy, base), f"--{wrong}", "mistyped"])
    assert not (tmp_path / stage).exists()


@pytest.mark.parametrize("lost, said", [([], "sft is finished"), ([6], "continues after step 3")])
def test_changed_code_is_named(lost, said, trained, toy, base, tmp_path, monkeypatch, capsys):
    """A finished run shows what the old code gave, an unfinished one goes on with the new code; both say so."""
    shutil.copytree(trained, tmp_path / "run")
    for step in lost:
        shutil.rmtree(tmp_path / f"run/sft/step-{step:06d}")
    hashes = sft.code_hashes
    monkeypatch.setattr(sft, "code_hashes", lambda settings: hashes(settings) | {"rewards.py": "edited"})
    sft.main(sft_flags(tmp_path / "run", toy, base, steps=6))
    out = capsys.readouterr().out
    assert "rewards.py changed since " in out and said in out


def test_a_finished_run_shows_its_table_and_trains_nothing(toy, base, tmp_path, capsys, monkeypatch):
    command, results = rl_flags(tmp_path, toy, base, steps=1), tmp_path / "pagrpo/results.json"
    pagrpo.main(command)
    first, whole = capsys.readouterr().out, results.read_text()
    monkeypatch.setattr(sft, "optimizer_step", None)
    pagrpo.main(command)
    again = capsys.readouterr().out
    assert "is finished" in again and again[again.index("percent of"):] in first
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
    assert [row["skipped_updates"] for row in logged(tmp_path / "some" / stage)] == [0, 1, 1, 1, 1, 0, 0]
    poison(monkeypatch, range(4, 99))
    with pytest.raises(SystemExit, match="5 steps in a row were NaN or infinite, up to step 8.*step-00000[36]"):
        module.main(flags(tmp_path / "all", toy, base, steps=20, save_every=3))


def test_steps_without_an_update_leave_no_trace_in_the_moments(toy, base, tmp_path, monkeypatch):
    """Saving must change nothing: also where every update so far was left out."""
    for save_every in (1, 99):
        with monkeypatch.context() as patch:
            poison(patch, range(1, 4))
            sft.main(sft_flags(tmp_path / str(save_every), toy, base, steps=5, save_every=save_every))
    assert same_end(tmp_path / "1/sft", tmp_path / "99/sft")
