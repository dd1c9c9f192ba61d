"""Promise: any number of ranks does what one does. They sample the same tokens, have the same gradients and write the
same metrics, whatever falls to each of them; two machines are ranks like any others; nobody waits without end.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import newest_checkpoint
from toy_runs import ENV, ROOT, equal, logged, metrics, rl_flags, sft_flags, weights


def begin(*words) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=ENV)


def torchrun(ranks: int, *words) -> subprocess.Popen:
    return begin("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *words)


def finish(*runs: subprocess.Popen) -> None:
    for run in runs:
        said, _ = run.communicate(timeout=120)
        assert run.returncode == 0, said[-2000:]


def rl(out: Path, toy: Path, model: Path, **changes) -> list:
    common = dict(questions=3, group_size=4, max_response=24, heldout="")
    return [ROOT / "pagrpo.py", *rl_flags(out, toy, model, **common | changes)]


def test_two_ranks_take_the_same_steps_as_one(toy, base, tmp_path):
    """Of five traces one rank has three, the other one two."""
    one, two = (tmp_path / ranks for ranks in ("one", "two"))
    words = [[ROOT / "sft.py", *sft_flags(out, toy, base, steps=2, batch=5)] for out in (one, two)]
    finish(begin(*words[0]), torchrun(2, *words[1]))         # both at once
    for a, b in zip(metrics(one / "sft"), metrics(two / "sft"), strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=1e-6)
    a, b = (weights(newest_checkpoint(out / "sft")) for out in (one, two))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)


@pytest.fixture(scope="module")
def steps(toy, base, started, tmp_path_factory):
    """What tests/one_step.py writes on 1, 2 and 4 ranks: OUT/ranks/shards."""
    out, start = tmp_path_factory.mktemp("steps"), newest_checkpoint(started)
    for ranks in (1, 2, 4):
        finish(torchrun(ranks, ROOT / "tests/one_step.py", start, base, toy, out / str(ranks)))
    return out


SITUATIONS = ["uneven", "one question", "none", "video and picture", "video and text", "text alone", "zero variance"]


@pytest.mark.parametrize("ranks, shards", [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_step_is_the_same_whatever_falls_to_each_rank(situation, ranks, shards, steps):
    """Also with two replicas of two shards, and the KL reference in host memory."""
    one, several = steps / "1/1", steps / f"{ranks}/{shards}"
    alone, *together = (json.loads((folder / f"{situation}.{rank}.json").read_text())
                        for folder, rank in [(one, 0), *((several, rank) for rank in range(ranks))])
    tokens = {k: v for part in together for k, v in part["tokens"].items()}
    assert tokens == alone["tokens"], "random numbers belong to the question, not to the rank"
    for part in together:                                    # every rank knows the whole step's
        assert part["metrics"] == pytest.approx(alone["metrics"], rel=1e-5, abs=1e-5)
    a, b = (load_file(folder / f"{situation}.safetensors") for folder in (one, several))
    assert (len(a) > 0) == (situation != "none") and a.keys() <= b.keys()
    for name, gradient in b.items():                         # sharded towers have zeros where one process has nothing
        assert torch.allclose(a.get(name, torch.zeros_like(gradient)), gradient, rtol=0, atol=1e-6), name


def test_two_machines_train_together_and_one_goes_on_alone(toy, started, tmp_path):
    """Two launches that know each other by address, one rank each, weights whole on each of them. They are stopped, and
    one rank ends the run: its steps are those of a run that was never anything else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{}".format(free.getsockname()[1])
    alone, both = tmp_path / "alone", tmp_path / "both"
    words = rl(both, toy, started, steps=4, save_every=1, keep=9)
    finish(begin(*rl(alone, toy, started, steps=4)))
    finish(*(begin("-m", "torch.distributed.run", "--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={address}",
                   *words) for _ in range(2)))
    before = logged(both / "pagrpo")
    for step in (3, 4):                                      # as after a kill in step 3
        shutil.rmtree(both / f"pagrpo/step-{step:06d}")
    finish(begin(*words))
    for a, b, c in zip(logged(alone / "pagrpo"), logged(both / "pagrpo"), before, strict=True):
        assert a["step"] == b["step"] and a["tokens"] == b["tokens"] == c["tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ lost ranks

def kill(run: subprocess.Popen, number: signal.Signals) -> int:
    """Sends a signal to rank 1 of a torchrun. Returns its process id."""
    for pid in map(int, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()):
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(pid, number)
            return pid


def wait_until(run: subprocess.Popen, happened) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert run.poll() is None and time.monotonic() < end, run.communicate()
        time.sleep(0.02)


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@linux
def test_a_rank_that_dies_ends_the_run_everywhere_and_torchrun_goes_on_from_the_last_checkpoint(toy, started, tmp_path):
    common = dict(steps=12, save_every=2, keep=9)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(torchrun(2, *rl(whole, toy, started, **common)))
    run = torchrun(2, "--max-restarts=1", *rl(cut, toy, started, **common))
    wait_until(run, lambda: len(logged(cut / "pagrpo")) >= 3)
    kill(run, signal.SIGKILL)                                # this time torchrun may restart …
    wait_until(run, (cut / "pagrpo/step-000008").exists)
    kill(run, signal.SIGKILL)                                # … and this time not
    said, _ = run.communicate(timeout=45)
    assert run.returncode != 0 and "continues after step" in said, said
    assert len(re.findall("Rank 0: Lost another rank.* last checkpoint is .*/step-0000", said)) == 2, said
    assert metrics(cut / "pagrpo")[:8] == metrics(whole / "pagrpo")[:8]
    assert equal(*(weights(out / "pagrpo/step-000008") for out in (whole, cut)))


@linux
def test_a_rank_that_hangs_is_not_waited_for_without_end(toy, started, tmp_path):
    impatient = tmp_path / "pagrpo.py"                       # ranks wait 3 s for each other
    impatient.write_text(f"import datetime, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport pagrpo, sft\n"
                         "sft.TIMEOUT = datetime.timedelta(seconds=3)\npagrpo.main()\n")
    run = torchrun(2, impatient, *rl(tmp_path, toy, started, steps=500)[1:])
    wait_until(run, lambda: len(logged(tmp_path / "pagrpo")) >= 2)
    hanging = kill(run, signal.SIGSTOP)
    time.sleep(4)
    os.kill(hanging, signal.SIGCONT)                         # so that torchrun can end it at once
    said, _ = run.communicate(timeout=60)
    assert "Rank 0: Lost another rank, or waited 0:00:03 for it" in said, said
