"""Promise: nothing is lost. A checkpoint is whole or not there, a damaged one is refused by name, a killed run ends bit
for bit as one that never stopped, and whatever ends a run says what stands."""
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pagrpo
import sft
from model import newest_checkpoint
from test_resume import metrics, rl_flags, sft_flags

ROOT = Path(__file__).parent.parent


def same_end(a: Path, b: Path) -> bool:
    """Are two finished runs equal bit for bit, in weights, moments and metrics (but for times)?"""
    files = ("model.safetensors", "optimizer.safetensors")
    pairs = [[load_file(newest_checkpoint(run) / file) for run in (a, b)] for file in files]
    return metrics(a) == metrics(b) and all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
                                            for x, y in pairs)


# ------------------------------------------------------------------------------------------------ kills

@pytest.mark.parametrize("script, flags, stage", [("sft.py", sft_flags, "sft"), ("pagrpo.py", rl_flags, "pagrpo")])
def test_a_run_killed_at_any_moment_ends_bit_for_bit_as_one_that_was_not(script, flags, stage, toy, base, tmp_path):
    """SIGKILL while it loads, between steps, in the middle of a checkpoint: the same command continues it."""
    long = dict(steps=20, save_every=2, heldout="") if stage == "pagrpo" else dict(steps=20, save_every=2)
    run = lambda out: [sys.executable, str(ROOT / script), *flags(out, toy, base, **long)]
    env, rng = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, random.Random(0)
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    subprocess.run(run(tmp_path / "whole"), check=True, **quiet)
    folder, logged = tmp_path / "cut" / stage, []
    for _ in range(2):
        process = subprocess.Popen(run(tmp_path / "cut"), **quiet)
        before = len(logged)
        while process.poll() is None and len(logged) <= before:              # it took a step …
            logged = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
            time.sleep(0.01)
        time.sleep(rng.random() / 2)                                         # … and some more
        process.kill()
        process.wait()
    subprocess.run(run(tmp_path / "cut"), check=True, **quiet)
    assert same_end(tmp_path / "whole" / stage, folder)


def test_sigterm_says_which_checkpoint_stands(toy, base, tmp_path):
    command = [sys.executable, str(ROOT / "sft.py"), *sft_flags(tmp_path, toy, base, steps=500, save_every=2)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not list((tmp_path / "sft").glob("step-??????")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[0]
    newest = newest_checkpoint(tmp_path / "sft")
    assert process.returncode == 1 and "Stopping after this step" in said
    assert f"Checkpoint {newest} stands; the same command continues from it." in said.splitlines()[-1]
    last = json.loads((tmp_path / "sft/metrics.jsonl").read_text().splitlines()[-1])
    assert newest.name == f"step-{last['step']:06d}", "the boundary it stopped at"


# ------------------------------------------------------------------------------------------------ damage

def flip(file: Path, place: float = 0.7) -> None:
    raw = bytearray(file.read_bytes())
    raw[int(len(raw) * place)] ^= 1
    file.write_bytes(raw)


DAMAGE = {
    "a bit of the weights": (lambda f: flip(f / "model.safetensors"), "model.safetensors changed"),
    "a bit of the moments": (lambda f: flip(f / "optimizer.safetensors"), "optimizer.safetensors changed"),
    "a letter of the state": (lambda f: flip(f / "state.json"), "state.json changed"),
    "the header": (lambda f: flip(f / "model.safetensors", 0), "model.safetensors changed"),
    "cut short": (lambda f: os.truncate(f / "optimizer.safetensors", 999), "optimizer.safetensors changed"),
    "emptied": (lambda f: os.truncate(f / "config.json", 0), "config.json changed"),
    "a file lost": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a file smuggled in": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json is not listed"),
    "no mark": (lambda f: (f / "SHA256SUMS").unlink(), "it has no SHA256SUMS"),
    "an empty mark": (lambda f: os.truncate(f / "SHA256SUMS", 0), "is not listed in SHA256SUMS"),
    "half a mark": (lambda f: os.truncate(f / "SHA256SUMS", 150), ""),
    "a garbled mark": (lambda f: (f / "SHA256SUMS").write_bytes(os.urandom(400)), "SHA256SUMS"),
}


@pytest.fixture(scope="module")
def trained(toy, base, tmp_path_factory):
    """A finished run of six steps with checkpoints of steps 3 and 6."""
    out = tmp_path_factory.mktemp("trained")
    sft.main(sft_flags(out, toy, base, steps=6))
    return out


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_taken(how, trained, tmp_path, capsys):
    shutil.copytree(trained / "sft", tmp_path / "sft")
    harm, why = DAMAGE[how]
    harm(tmp_path / "sft/step-000006")
    assert newest_checkpoint(tmp_path / "sft", optimizer=True).name == "step-000003"
    assert "step-000006 is refused: " in (said := capsys.readouterr().err) and why in said
    if how not in ("no mark", "a bit of the moments", "cut short"):          # what eval.py would read
        with pytest.raises(ValueError, match="step-000006 is refused: "):
            if (tmp_path / "sft/step-000006/config.json").is_file():
                newest_checkpoint(tmp_path / "sft/step-000006")


def test_a_run_goes_on_from_the_checkpoint_before_and_replaces_the_damaged_one(trained, toy, base, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "cut")
    flip(tmp_path / "cut/sft/step-000006/model.safetensors")
    (tmp_path / "cut/sft/results.json").unlink()
    flags = sft_flags(tmp_path / "cut", toy, base, steps=6)
    settings = tmp_path / "cut/sft/settings.json"
    settings.write_text(settings.read_text().replace(str(trained), str(tmp_path / "cut")))
    sft.main(flags)
    assert "continues after step 3" in capsys.readouterr().out
    assert same_end(trained / "sft", tmp_path / "cut/sft")


def test_sha256sum_agrees(trained):
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum on this machine")
    folder = trained / "sft/step-000006"
    assert subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder).returncode == 0


def test_a_configuration_that_differs_from_the_checkpoints_is_shown(trained, toy, base, tmp_path):
    shutil.copytree(trained, tmp_path / "a")
    (tmp_path / "a/sft/settings.json").unlink()              # the checkpoint itself knows, too
    with pytest.raises(SystemExit, match=r"step-000006 holds work with other settings:\n  --lr was 0.002, is now 0.5"):
        sft.main(sft_flags(tmp_path / "a", toy, base, steps=6, lr=0.5))


def test_a_folder_in_use_can_be_protected(trained, toy, base):
    with pytest.raises(SystemExit, match="holds a run: leave out --no-resume"):
        sft.main([*sft_flags(trained, toy, base, steps=6), "--no-resume"])


def test_two_processes_never_share_a_folder(trained, toy, base, tmp_path):
    from data import lock_folder
    with lock_folder(tmp_path / "sft"), pytest.raises(SystemExit, match="Another process works in"):
        sft.main(sft_flags(tmp_path, toy, base, steps=1))


# ------------------------------------------------------------------------------------------------ what is kept

def test_the_last_ones_and_the_best_are_kept(toy, base, tmp_path, monkeypatch):
    losses = iter([9.0, 5.0, 1.0, 4.0, 3.0, 2.5, 2.0])       # before, after steps 2, 4, 6, 8, 10, at the end
    monkeypatch.setattr(sft, "heldout_loss", lambda *_: next(losses))
    sft.main(sft_flags(tmp_path, toy, base, steps=10, save_every=1, keep=2, eval_every=2))
    assert [p.name for p in sorted((tmp_path / "sft").glob("step*"))] == ["step-000004", "step-000009", "step-000010"]
    assert sft.best_of(list((tmp_path / "sft").glob("step*"))).name == "step-000004"
    assert [row.get("heldout_loss") for row in metrics(tmp_path / "sft")][1::2] == [5.0, 1.0, 4.0, 3.0, 2.5]


def test_rl_is_measured_by_held_out_answers(toy, base, tmp_path):
    pagrpo.main(rl_flags(tmp_path, toy, base, steps=4, eval_every=2, save_every=99))
    rows = metrics(tmp_path / "pagrpo")
    assert ["heldout/answer" in row for row in rows] == [False, True, False, True]
    state = json.loads((newest_checkpoint(tmp_path / "pagrpo") / "state.json").read_text())
    assert state["score"] == rows[-1]["heldout/answer"] and state["source"] == str(base) and state["step"] == 4


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(toy, base, tmp_path, monkeypatch):
    """The writer waits until the next step is done: were training to wait for the writer, neither would end."""
    save_model, log, went_on = sft.save_model, sft.Run.log, threading.Event()

    def slow(*args, **kwargs):
        assert went_on.wait(timeout=20), "training stood still"
        save_model(*args, **kwargs)

    def logged(run, row):
        log(run, row)
        if row["step"] == 4:
            went_on.set()
    sft.main(sft_flags(tmp_path / "plain", toy, base, steps=5, save_every=3))
    monkeypatch.setattr(sft, "save_model", slow)
    monkeypatch.setattr(sft.Run, "log", logged)
    sft.main(sft_flags(tmp_path / "beside", toy, base, steps=5, save_every=3))
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(tmp_path / run / "sft/step-000003" / file) for run in ("plain", "beside"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_damaged_checkpoint_does_not_push_a_whole_one_out(toy, base, tmp_path, monkeypatch):
    """Steps 2 and 4 are saved, 4 is damaged: while 3 is written 2 may go, but whatever is counted, 3 must stay."""
    sft.main(sft_flags(tmp_path, toy, base, steps=4, save_every=2, keep=2))
    (tmp_path / "sft/step-000004/state.json").write_text("{")
    (tmp_path / "sft/results.json").unlink()
    update = sft.optimizer_step

    def stop(*args):
        signal.raise_signal(signal.SIGTERM)
        return update(*args)
    monkeypatch.setattr(sft, "optimizer_step", stop)
    with pytest.raises(SystemExit, match="Stopped after step 3 of 4. Checkpoint .*step-000003 stands"):
        sft.main(sft_flags(tmp_path, toy, base, steps=4, save_every=2, keep=1))
    assert newest_checkpoint(tmp_path / "sft").name == "step-000003"


def test_a_writer_that_fails_for_any_reason_ends_the_run(toy, base, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise MemoryError("no room for a copy")
    monkeypatch.setattr(sft, "save_model", broken)
    with pytest.raises(SystemExit, match="step-000003 could not be written: no room for a copy.* no checkpoint yet"):
        sft.main(sft_flags(tmp_path, toy, base, steps=30))
    assert len(metrics(tmp_path / "sft")) <= 6


def test_steps_without_an_update_leave_no_trace_in_the_moments(toy, base, tmp_path, monkeypatch):
    """Saving must change nothing: also where every update so far was left out."""
    update = sft.optimizer_step

    def run(out, save_every):
        calls = []

        def poisoned(model, *rest):
            calls.append(1)
            if len(calls) < 4:
                for p in model.parameters():
                    p.grad = torch.full_like(p, float("nan"))
            return update(model, *rest)
        monkeypatch.setattr(sft, "optimizer_step", poisoned)
        sft.main(sft_flags(out, toy, base, steps=5, save_every=save_every))
    run(tmp_path / "often", 1)
    run(tmp_path / "seldom", 99)
    assert same_end(tmp_path / "often/sft", tmp_path / "seldom/sft")


def test_a_renamed_checkpoint_is_not_believed(trained, toy, base, tmp_path):
    shutil.copytree(trained, tmp_path / "a")
    (tmp_path / "a/sft/step-000006").rename(tmp_path / "a/sft/step-000300")
    with pytest.raises(SystemExit, match="step-000300 holds step 6"):
        sft.main(sft_flags(tmp_path / "a", toy, base, steps=6))


def test_rl_does_not_start_from_an_unfinished_run_by_accident(trained, toy, base, tmp_path):
    shutil.copytree(trained / "sft", tmp_path / "sft")
    shutil.rmtree(tmp_path / "sft/step-000006")
    with pytest.raises(SystemExit, match="is not finished: step-000003 is the newest of 6 steps"):
        pagrpo.main(rl_flags(tmp_path / "a", toy, tmp_path / "sft", steps=1))
    pagrpo.main(rl_flags(tmp_path / "a", toy, tmp_path / "sft/step-000003", steps=1))
    assert newest_checkpoint(tmp_path / "a/pagrpo").name == "step-000001"


def test_a_damaged_report_is_made_again(toy, base, tmp_path, capsys):
    pagrpo.main(rl_flags(tmp_path, toy, base, steps=1))
    report = tmp_path / "pagrpo/results.json"
    whole = report.read_text()
    report.write_text(whole[:40])
    pagrpo.main(rl_flags(tmp_path, toy, base, steps=1))
    assert report.read_text() == whole


def test_weights_that_are_no_numbers_are_refused_by_name(base, tmp_path):
    from safetensors.torch import save_file

    from model import load_model
    shutil.copytree(base, tmp_path / "bad")
    (tmp_path / "bad/SHA256SUMS").unlink()
    tensors = load_file(tmp_path / "bad/model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "bad/model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight holds numbers that are NaN or infinite"):
        load_model(tmp_path / "bad")


@pytest.mark.parametrize("flag, value", [("--keep", 0), ("--keep", -1), ("--patience", 0), ("--eval-every", -1),
                                         ("--lr", "nan"), ("--clip-norm", 0), ("--shards", -1), ("--beta2", 1.5)])
def test_senseless_settings_are_refused(flag, value, toy, base, tmp_path):
    with pytest.raises(SystemExit, match=f"{flag} must be "):
        sft.main([*sft_flags(tmp_path, toy, base), flag, str(value)])


# ------------------------------------------------------------------------------------------------ faults

def test_a_full_disk_ends_the_run_and_the_last_checkpoint_stands(toy, base, tmp_path):
    """A real limit of the operating system: no file may grow beyond two thirds of an optimizer's size."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, 8_000_000))
    command = [sys.executable, str(ROOT / "sft.py"), *sft_flags(tmp_path, toy, base, steps=9, save_every=2)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=60, env=env)
    assert result.returncode == 1 and "step-000002 could not be written" in result.stderr, result.stderr
    assert "There is no checkpoint yet" in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "sft").glob("step*")), "nothing half-written is left"
    subprocess.run(command, check=True, capture_output=True, timeout=60, env=env)
    assert newest_checkpoint(tmp_path / "sft").name == "step-000009"


def test_a_folder_that_cannot_be_written_is_said(toy, base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="Error: .*file"):
        sft.main(sft_flags(tmp_path / "file", toy, base, steps=1))


def test_a_step_without_a_usable_question_is_said_and_changes_nothing(toy, base, tmp_path, capsys):
    rows = json.loads((toy / "rl.json").read_text())[:20]
    order = sft.step_indices(20, 2, 1, seed=0)               # what step 2 will ask for
    for i in order:
        rows[i]["path"] = "not/there.avi"
    (tmp_path / "rl.json").write_text(json.dumps(rows))
    pagrpo.main(rl_flags(tmp_path, toy, base, data=tmp_path / "rl.json", steps=3, heldout="", save_every=1, keep=3))
    assert "Step 2: the media of none of its questions can be read; nothing was learned." in capsys.readouterr().out
    assert [row["skipped"] for row in metrics(tmp_path / "pagrpo")] == [0, 2, 0]
    a, b = (load_file(tmp_path / f"pagrpo/step-00000{n}/model.safetensors") for n in (1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_nothing_is_unpickled(trained, toy, base, tmp_path, monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("unpickling")
    for file in ROOT.glob("*.py"):
        assert not re.search(r"import pickle|torch\.load\(|\bmarshal\b|(?<![.\w])(eval|exec)\(", file.read_text()), file
    shutil.copytree(trained / "sft", tmp_path / "sft")
    shutil.rmtree(tmp_path / "sft/step-000006")
    (tmp_path / "sft/settings.json").unlink()
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    flags = sft_flags(tmp_path, toy, base, steps=6)
    sft.main(flags)
    assert newest_checkpoint(tmp_path / "sft").name == "step-000006"


def test_no_network_is_used(toy, base, tmp_path, monkeypatch):
    import socket

    def refuse(*args):
        raise AssertionError("a connection")
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    pagrpo.main(rl_flags(tmp_path, toy, base, steps=1))
    assert newest_checkpoint(tmp_path / "pagrpo").name == "step-000001"
