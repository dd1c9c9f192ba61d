"""Promise: nothing is lost. A checkpoint is there whole or not at all, a damaged one is named and the one before taken,
a killed run ends bit for bit as one that never stopped, and whatever ends a run names the last checkpoint."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import data
import pagrpo
import sft
from model import newest_checkpoint
from toy_runs import ENV, ROOT, before_update, command, equal, logged, metrics, rl_flags, same_end, sft_flags, weights

QUIET = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)


def names(folder: Path) -> list[str]:
    return [p.name for p in sorted(folder.glob("step*"))]


# ------------------------------------------------------------------------------------------------ kills

@pytest.mark.parametrize("script, flags, stage", [("sft.py", sft_flags, "sft"), ("pagrpo.py", rl_flags, "pagrpo")])
def test_a_run_killed_at_any_moment_ends_bit_for_bit_as_one_that_was_not(script, flags, stage, toy, base, tmp_path):
    """SIGKILL while it loads, between steps, in the middle of a checkpoint: the same command continues it."""
    long = dict(steps=20, save_every=2) | ({"heldout": ""} if stage == "pagrpo" else {})
    whole, cut = (command(script, flags(tmp_path / out, toy, base, **long)) for out in ("whole", "cut"))
    rng, folder = random.Random(0), tmp_path / "cut" / stage
    uncut = subprocess.Popen(whole, **QUIET)
    for _ in range(2):
        before, process = len(logged(folder)), subprocess.Popen(cut, **QUIET)
        while process.poll() is None and len(logged(folder)) <= before:
            time.sleep(0.01)                                 # until it took a step …
        time.sleep(rng.random() / 2)                         # … and some more
        process.kill()
        process.wait()
    subprocess.run(cut, check=True, **QUIET)
    assert uncut.wait() == 0 and same_end(tmp_path / "whole" / stage, folder)


def test_sigterm_saves_a_checkpoint_and_names_it(toy, base, tmp_path):
    process = subprocess.Popen(command("sft.py", sft_flags(tmp_path, toy, base, steps=500, save_every=2)),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
    while not list((tmp_path / "sft").glob("step-??????")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[0]
    newest = newest_checkpoint(tmp_path / "sft")
    assert process.returncode == 1 and "Stopping after this step" in said
    assert f"The last checkpoint is {newest}; the same command resumes from it." in said.splitlines()[-1]
    assert newest.name == f"step-{metrics(tmp_path / 'sft')[-1]['step']:06d}", "the end of the step that was running"


# ------------------------------------------------------------------------------------------------ damage

def garble(file: Path) -> None:
    """The first bytes of a safetensors file are the length of its header."""
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])


DAMAGE = {
    "weights cut short": lambda f: os.truncate(f / "model.safetensors", 999_999),
    "moments cut short": lambda f: os.truncate(f / "optimizer.safetensors", 999),
    "a header": lambda f: garble(f / "model.safetensors"),
    "no state": lambda f: (f / "state.json").unlink(),
    "half a state": lambda f: os.truncate(f / "state.json", 99),
}


@pytest.fixture
def cut(trained, tmp_path):
    """A copy of the finished run's folder."""
    return shutil.copytree(trained, tmp_path / "cut")


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(how, cut, trained, toy, base, capsys):
    DAMAGE[how](cut / "sft/step-000006")
    sft.main(sft_flags(cut, toy, base, steps=6))
    said = capsys.readouterr()
    assert f"{cut}/sft/step-000006 is damaged and not used: " in said.err and "continues after step 3" in said.out
    assert same_end(trained / "sft", cut / "sft"), "and replaces it"


def test_a_damaged_checkpoint_is_refused_by_its_own_name(cut):
    garble(cut / "sft/step-000006/model.safetensors")
    with pytest.raises(FileNotFoundError, match="step-000006 is neither a model folder .* or they are damaged"):
        newest_checkpoint(cut / "sft/step-000006")


def test_a_damaged_checkpoint_does_not_push_a_whole_one_out(toy, base, tmp_path, monkeypatch):
    """Steps 2 and 4 are saved, 4 is damaged: while 3 is written 2 may go, but 3 must stay."""
    sft.main(sft_flags(tmp_path, toy, base, steps=4, save_every=2, keep=2))
    (tmp_path / "sft/step-000004/state.json").write_text("{")
    before_update(monkeypatch, lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match="Stopped after step 3 of 4. The last checkpoint is .*step-000003"):
        sft.main(sft_flags(tmp_path, toy, base, steps=4, save_every=2, keep=1))
    assert newest_checkpoint(tmp_path / "sft").name == "step-000003"


def test_checkpoints_of_earlier_versions_and_models_from_elsewhere_load(cut, trained, toy, base):
    """Earlier versions wrote sizes and scores, and no hashes of the code; a model from elsewhere has no state.json."""
    shutil.rmtree(cut / "sft/step-000006")
    file = cut / "sft/step-000003/state.json"
    state = json.loads(file.read_text()) | {"files": {"model.safetensors": 1}, "score": -1.0}
    del state["code"]
    file.write_text(json.dumps(state))
    (cut / "sft/records.json").unlink()
    assert newest_checkpoint(base) == base
    sft.main(sft_flags(cut, toy, base, steps=6))
    assert same_end(trained / "sft", cut / "sft")


# ------------------------------------------------------------------------------------------------ folders

def test_two_processes_never_share_a_folder(toy, base, tmp_path):
    with data.lock_folder(tmp_path / "sft"), pytest.raises(SystemExit, match="Another process works in"):
        sft.main(sft_flags(tmp_path, toy, base, steps=1))


def test_rl_does_not_start_from_an_unfinished_run_by_accident(cut, toy, base, tmp_path):
    shutil.rmtree(cut / "sft/step-000006")
    with pytest.raises(SystemExit, match="is not finished: step-000003 is the newest of 6 steps"):
        pagrpo.main(rl_flags(tmp_path, toy, cut / "sft", steps=1))
    pagrpo.main(rl_flags(tmp_path, toy, cut / "sft/step-000003", steps=1))
    assert names(tmp_path / "pagrpo") == ["step-000001"]


def test_the_last_ones_are_kept(toy, base, tmp_path):
    sft.main(sft_flags(tmp_path, toy, base, steps=6, save_every=1, keep=2))
    assert names(tmp_path / "sft") == ["step-000005", "step-000006"]


# ------------------------------------------------------------------------------------------------ faults

def test_a_full_disk_ends_the_run_and_names_the_last_checkpoint(toy, base, tmp_path):
    """A real limit of the operating system: no file may grow beyond two thirds of an optimizer's size."""
    resource = pytest.importorskip("resource")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, 8_000_000))
    words = command("sft.py", sft_flags(tmp_path, toy, base, steps=9, save_every=2))
    result = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit, timeout=60, env=ENV)
    assert result.returncode == 1 and "step-000002.writing cannot be written" in result.stderr, result.stderr
    assert "There is no checkpoint yet" in result.stderr and "Traceback" not in result.stderr
    assert not names(tmp_path / "sft"), "nothing half-written is left"
    subprocess.run(words, check=True, timeout=60, **QUIET)
    assert newest_checkpoint(tmp_path / "sft").name == "step-000009"


def test_a_step_without_a_usable_question_changes_nothing(toy, base, tmp_path, capsys):
    rows = json.loads((toy / "rl.json").read_text())
    for i in data.step_indices(len(rows), 2, 1, seed=0):     # what step 2 will ask for
        rows[i]["path"] = "rl.json"                          # a file, and no video
    (tmp_path / "rl.json").write_text(json.dumps(rows))
    pagrpo.main(rl_flags(tmp_path, toy, base, data=tmp_path / "rl.json", steps=3, heldout="", save_every=1, keep=3))
    assert "The media of none of this step's questions can be read" in capsys.readouterr().out
    assert [row["skipped"] for row in metrics(tmp_path / "pagrpo")] == [0, 2, 0]
    assert equal(*(weights(tmp_path / f"pagrpo/step-00000{n}") for n in (1, 2)))


@pytest.mark.parametrize("flag, value", [("--keep", 0), ("--eval-every", -1), ("--lr", "nan"), ("--clip-norm", 0)])
def test_senseless_settings_are_refused(flag, value, toy, base, tmp_path):
    with pytest.raises(SystemExit, match=f"{flag} must be at least "):
        sft.main([*sft_flags(tmp_path, toy, base), flag, str(value)])


def test_nothing_is_unpickled_and_no_network_is_used(cut, toy, base, monkeypatch):
    import pickle
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("unpickling, or a connection")
    for file in ROOT.glob("*.py"):
        assert not re.search(r"import pickle|torch\.load\(|\bmarshal\b|(?<![.\w])(eval|exec)\(", file.read_text()), file
    shutil.rmtree(cut / "sft/step-000006")
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (socket, "getaddrinfo"),
                         *((socket.socket, name) for name in ("connect", "connect_ex", "sendto"))):
        monkeypatch.setattr(module, name, refuse)
    sft.main(sft_flags(cut, toy, base, steps=6))
    assert newest_checkpoint(cut / "sft").name == "step-000006"
