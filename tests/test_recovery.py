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
from toy_runs import ENV, ROOT, command, equal, interrupted, logged, rl_flags, same_end, sft_flags, weights

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
    said, _ = process.communicate(timeout=30)
    newest = newest_checkpoint(tmp_path / "sft")
    assert process.returncode == 1 and "Stopping after this step" in said
    assert said.endswith(f"The last checkpoint is {newest}; the same command resumes from it.\n")
    assert int(newest.name[-6:]) == logged(tmp_path / "sft")[-1]["step"], "the end of the step that was running"


# ------------------------------------------------------------------------------------------------ damage

@pytest.fixture
def cut(trained, tmp_path):
    """A copy of the finished run's folder."""
    return shutil.copytree(trained, tmp_path / "cut")


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(cut, trained, toy, base, capsys):
    os.truncate(cut / "sft/step-000006/optimizer.safetensors", 999)
    sft.main(sft_flags(cut, toy, base, steps=6))
    said = capsys.readouterr()
    assert f"{cut}/sft/step-000006 is damaged and not used: " in said.err and "continues after step 3" in said.out
    assert same_end(trained / "sft", cut / "sft"), "and replaces it"


def test_a_damaged_checkpoint_does_not_push_a_whole_one_out(toy, base, tmp_path):
    """Steps 2 and 4 are saved, 4 is damaged: while 3 is written 2 may go, but 3 must stay."""
    sft.main(sft_flags(tmp_path, toy, base, steps=4, save_every=2, keep=2))
    (tmp_path / "sft/step-000004/state.json").write_text("{")
    with interrupted(3, 1):
        sft.main(sft_flags(tmp_path, toy, base, steps=4, save_every=2, keep=1))
    assert newest_checkpoint(tmp_path / "sft").name == "step-000003"


# ------------------------------------------------------------------------------------------------ folders

def test_two_processes_never_share_a_folder(toy, base, tmp_path):
    with data.lock_folder(tmp_path / "sft"), pytest.raises(SystemExit, match="Another process works in"):
        sft.main(sft_flags(tmp_path, toy, base, steps=1))


def test_rl_does_not_start_from_an_unfinished_run_by_accident(cut, toy, tmp_path):
    shutil.rmtree(cut / "sft/step-000006")
    with pytest.raises(SystemExit, match="is not finished: step-000003 is the newest of 6 steps"):
        pagrpo.main(rl_flags(tmp_path, toy, cut / "sft", steps=1))
    pagrpo.main(rl_flags(tmp_path, toy, cut / "sft/step-000003", steps=1, heldout=""))


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
    said = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit, env=ENV).stderr
    assert "step-000002.writing cannot be written" in said and "There is no checkpoint yet" in said
    assert "Traceback" not in said and not names(tmp_path / "sft"), "nothing half-written is left"


def test_a_step_without_a_usable_question_changes_nothing(toy, base, tmp_path, capsys):
    rows = json.loads((toy / "rl.json").read_text())
    for i in data.step_indices(len(rows), 2, 1, seed=0):     # what step 2 will ask for
        rows[i]["path"] = "rl.json"                          # a file, and no video
    (tmp_path / "rl.json").write_text(json.dumps(rows))
    pagrpo.main(rl_flags(tmp_path, toy, base, data=tmp_path / "rl.json", steps=3, heldout="", save_every=1, keep=3))
    assert "The media of none of this step's questions can be read" in capsys.readouterr().out
    assert [row["skipped"] for row in logged(tmp_path / "pagrpo")] == [0, 2, 0]
    assert equal(*(weights(tmp_path / f"pagrpo/step-00000{n}") for n in (1, 2)))


@pytest.mark.parametrize("flag, value", [("--keep", "0"), ("--lr", "nan")])
def test_senseless_settings_are_refused(flag, value):
    with pytest.raises(SystemExit, match=f"{flag} must be at least "):
        sft.main([flag, value])


def test_nothing_is_unpickled_and_no_network_is_used(cut, toy, base, monkeypatch):
    import pickle
    import socket

    for file in ROOT.glob("*.py"):
        assert not re.search(r"import pickle|torch\.load\(|\bmarshal\b|(?<![.\w])(eval|exec)\(", file.read_text()), file
    shutil.rmtree(cut / "sft/step-000006")
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (socket, "getaddrinfo"),
                         (socket.socket, "connect"), (socket.socket, "sendto")):
        monkeypatch.setattr(module, name, pytest.fail)
    sft.main(sft_flags(cut, toy, base, steps=6))
