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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import newest_checkpoint
from toy_runs import ENV, ROOT, command, equal, logged, rl_flags, sft_flags, weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def launch(ranks: int, script: str, given: list[str]) -> None:
    """Runs a script as the README says, with `ranks` ranks on this machine's cores."""
    words = command(script, given)
    if ranks > 1:
        words = [*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}", *words[1:]]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120, env=ENV)
    assert result.returncode == 0, result.stderr[-2000:]


def begin(words: list) -> subprocess.Popen:
    return subprocess.Popen([*TORCHRUN, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=ENV)


def rl(out: Path, toy: Path, model: Path, **changes) -> list[str]:
    return rl_flags(out, toy, model, **dict(questions=3, group_size=4, max_response=24, heldout="") | changes)


@pytest.mark.parametrize("script, stage, flags", [
    ("sft.py", "sft", lambda *places: sft_flags(*places, steps=2, batch=5)),   # one rank has three traces, one two
    ("pagrpo.py", "pagrpo", lambda *places: rl_flags(*places, steps=2, questions=3, max_response=12))])
def test_two_ranks_take_the_same_steps_as_one(script, stage, flags, toy, base, tmp_path):
    with ThreadPoolExecutor() as pool:                       # both at once
        list(pool.map(lambda ranks: launch(ranks, script, flags(tmp_path / str(ranks), toy, base)), (1, 2)))
    one, two = (tmp_path / str(ranks) / stage for ranks in (1, 2))
    for a, b in zip(logged(one), logged(two), strict=True):
        times = [name for name in a if "second" in name]
        assert a == pytest.approx(b | {name: a[name] for name in times}, rel=2e-4, abs=1e-6)
    a, b = (weights(newest_checkpoint(run)) for run in (one, two))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)


@pytest.fixture(scope="module")
def steps(toy, base, started, tmp_path_factory):
    """What tests/one_step.py writes on 1, 2 and 4 ranks: folder by number of ranks and of shards."""
    out = tmp_path_factory.mktemp("steps")
    for ranks in (1, 2, 4):
        launch(ranks, "tests/one_step.py", list(map(str, (newest_checkpoint(started), base, toy, out / str(ranks)))))
    return {(ranks, shards): out / str(ranks) / str(shards) for ranks, shards in ((1, 1), (2, 2), (4, 4), (4, 2))}


SITUATIONS = ["uneven", "one question", "none", "video and picture", "video and text", "text alone", "zero variance"]


@pytest.mark.parametrize("ranks, shards", [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_step_is_the_same_whatever_falls_to_each_rank(situation, ranks, shards, steps):
    """Also with two replicas of two shards, and the KL reference in host memory."""
    def parts(*which):
        return [json.loads((steps[which] / f"{situation}.{rank}.json").read_text()) for rank in range(which[0])]
    alone, together = parts(1, 1)[0], parts(ranks, shards)
    tokens = {k: v for part in together for k, v in part["tokens"].items()}
    assert tokens == alone["tokens"], "random numbers belong to the question, not to the rank"
    assert all(part["metrics"] == together[0]["metrics"] for part in together), "every rank knows the whole step's"
    assert together[0]["metrics"] == pytest.approx(alone["metrics"], rel=1e-5, abs=1e-5)
    a, b = (load_file(steps[which] / f"{situation}.safetensors") for which in ((1, 1), (ranks, shards)))
    assert (len(a) > 0) == (situation != "none") and a.keys() <= b.keys()
    for name, gradient in b.items():                         # sharded towers have zeros where one process has nothing
        assert torch.allclose(a.get(name, torch.zeros_like(gradient)), gradient, rtol=0, atol=1e-6), name


def test_two_machines_train_together_and_one_goes_on_alone(toy, started, tmp_path):
    """Two launches that know each other by address, one rank each, weights whole on each of them. They are stopped, and
    one rank ends the run: its steps are those of a run that was never anything else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch(1, "pagrpo.py", rl(tmp_path / "alone", toy, started, steps=4))
    both, folder = rl(tmp_path / "both", toy, started, steps=4, save_every=1, keep=9), tmp_path / "both/pagrpo"
    machines = [begin(["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
                       "--rdzv_id=lesson", ROOT / "pagrpo.py", *both]) for _ in range(2)]
    said = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    before = logged(folder)
    for step in (3, 4):                                      # as after a kill in step 3
        shutil.rmtree(folder / f"step-{step:06d}")
    launch(1, "pagrpo.py", both)
    for a, b, c in zip(logged(tmp_path / "alone/pagrpo"), logged(folder), before, strict=True):
        assert a["step"] == b["step"] and a["tokens"] == b["tokens"] == c["tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ lost ranks

def kill(run: subprocess.Popen, rank: int, number: signal.Signals) -> int:
    """Sends a signal to a rank of a torchrun. Returns its process id."""
    for pid in map(int, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()):
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
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
    common, folder = dict(steps=12, save_every=2, keep=9), tmp_path / "cut/pagrpo"
    launch(2, "pagrpo.py", rl(tmp_path / "whole", toy, started, **common))
    run = begin(["--standalone", "--nproc_per_node=2", "--max-restarts=1", ROOT / "pagrpo.py",
                 *rl(tmp_path / "cut", toy, started, **common)])
    wait_until(run, lambda: len(logged(folder)) >= 3)
    kill(run, 1, signal.SIGKILL)                             # this time torchrun may restart …
    wait_until(run, (folder / "step-000008").exists)
    kill(run, 1, signal.SIGKILL)                             # … and this time not
    began, said = time.monotonic(), run.communicate(timeout=60)[0]
    assert run.returncode != 0 and time.monotonic() - began < 45 and "continues after step" in said, said
    lines = re.findall(r"Rank 0: (.*)", said)
    assert len(lines) == 2 and all(re.match("Lost another rank.* last checkpoint is .*/step-0000", x) for x in lines), said
    a, b = logged(tmp_path / "whole/pagrpo")[:8], logged(folder)[:8]
    assert [row["step"] for row in b] == list(range(1, 9)) and [x["loss"] for x in a] == [y["loss"] for y in b]
    assert equal(*(weights(tmp_path / name / "pagrpo/step-000008") for name in ("whole", "cut")))


@linux
def test_a_rank_that_hangs_is_not_waited_for_without_end(toy, started, tmp_path):
    impatient = tmp_path / "pagrpo.py"                       # ranks wait 3 s for each other
    impatient.write_text(f"import datetime, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport pagrpo, sft\n"
                         "sft.TIMEOUT = datetime.timedelta(seconds=3)\npagrpo.main()\n")
    run = begin(["--standalone", "--nproc_per_node=2", impatient, *rl(tmp_path, toy, started, steps=500)])
    wait_until(run, lambda: len(logged(tmp_path / "pagrpo")) >= 2)
    hanging = kill(run, 1, signal.SIGSTOP)
    time.sleep(4)
    os.kill(hanging, signal.SIGCONT)                         # so that torchrun can end it at once
    said = run.communicate(timeout=60)[0]
    assert len(re.findall("Rank 0: Lost another rank, or waited 0:00:03 for it", said)) == 1, said
