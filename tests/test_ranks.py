"""Promise: any number of ranks does what one does. They sample the same tokens, have the same gradients and write the
same metrics, whatever falls to each of them; two machines are ranks like any others; nobody waits without end.
"""
import json
import os
import re
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

ROOT = Path(__file__).parent.parent
BARE = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def launch(ranks: int, script: str, *flags) -> str:
    """Runs a script as the README says, with `ranks` ranks on this machine's cores. Returns what it printed."""
    command = [*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]
    result = subprocess.run([*command, str(ROOT / script), *map(str, flags)], capture_output=True, text=True,
                            timeout=120, env=BARE)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def rl(out, toy, model, **changes) -> list[str]:
    flags = dict(preset="tiny", out=out, model=model, data=toy / "rl.json", media=toy, questions=3, group_size=4,
                 max_response=24) | changes
    return [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))]


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script, stage, flags", [
    ("sft.py", "sft", ("--steps", 2, "--batch", 5)),         # 5 traces: one rank has three, the other two
    ("pagrpo.py", "pagrpo", ("--steps", 2, "--questions", 3, "--group-size", 2, "--max-response", 12))])
def test_two_ranks_take_the_same_steps_as_one(script, stage, flags, toy, base, tmp_path):
    data = toy / ("sft.json" if stage == "sft" else "rl.json")
    common = ["--preset", "tiny", "--model", base, "--data", data, "--media", toy,
              "--heldout", toy / "heldout.json", *flags]
    with ThreadPoolExecutor() as pool:                       # both at once
        list(pool.map(lambda ranks: launch(ranks, script, "--out", tmp_path / str(ranks), *common), (1, 2)))
    one, two = (logged(tmp_path / str(ranks) / stage) for ranks in (1, 2))
    same = ("loss", "perception/reward", "reasoning/reward", "reasoning/tokens", "reasoning/reward_std", "kl",
            "entropy", "grad_norm", "tokens", "questions", "truncated", "perception/zero_variance")
    for a, b in zip(one, two):
        assert {k: a[k] for k in same if k in a} == pytest.approx({k: b[k] for k in same if k in b}, rel=2e-4, abs=1e-6)
    a, b = (load_file(newest_checkpoint(tmp_path / str(ranks) / stage) / "model.safetensors") for ranks in (1, 2))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)


@pytest.fixture(scope="module")
def steps(toy, base, started, tmp_path_factory):
    """What tests/one_step.py writes on 1, 2 and 4 ranks: folder by number of ranks and of shards (0: as many)."""
    out = tmp_path_factory.mktemp("steps")
    for ranks in (1, 2, 4):
        launch(ranks, "tests/one_step.py", newest_checkpoint(started), base, toy, out / str(ranks))
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
    for name, value in alone["metrics"].items():
        assert together[0]["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    a, b = (load_file(steps[n] / f"{situation}.safetensors") for n in ((1, 1), (ranks, shards)))
    assert (len(a) > 0) == (situation != "none") and a.keys() <= b.keys()
    for name, gradient in b.items():                         # sharded towers have zeros where one process has nothing
        assert torch.allclose(a.get(name, torch.zeros_like(gradient)), gradient, rtol=0, atol=1e-6), name


def test_two_machines_train_together_and_one_goes_on_alone(toy, started, tmp_path):
    """Two launches that know each other by address, one rank each, weights whole on each of them. They are stopped, and
    one rank ends the run: its steps are those of a run that was never anything else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
               f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=lesson", str(ROOT / "pagrpo.py")]
    launch(1, "pagrpo.py", *rl(tmp_path / "alone", toy, started, steps=4))
    both = rl(tmp_path / "both", toy, started, steps=4, save_every=1, keep=9)
    machines = [subprocess.Popen([*command, *both], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                 env=BARE) for _ in range(2)]
    said = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    folder = tmp_path / "both/pagrpo"
    before = logged(folder)
    for step in (3, 4):                                      # as after a kill in step 3
        subprocess.run(["rm", "-r", folder / f"step-{step:06d}"], check=True)
    launch(1, "pagrpo.py", *both)
    for a, b, c in zip(logged(tmp_path / "alone/pagrpo"), logged(folder), before, strict=True):
        assert a["step"] == b["step"] and a["tokens"] == b["tokens"] == c["tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def begin(ranks: int, flags: list[str], *how: str, script=ROOT / "pagrpo.py") -> subprocess.Popen:
    return subprocess.Popen([*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}", *how, str(script), *flags],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=BARE)


def ranks_of(run: subprocess.Popen) -> list[int]:
    """Process ids of a torchrun's ranks, by rank."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    mine = {}
    for pid in children:
        if b"pagrpo.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
            mine[int(re.search(rb"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())[1])] = int(pid)
    return [mine[rank] for rank in sorted(mine)]


def after_step(run: subprocess.Popen, folder: Path, step: int) -> None:
    """Waits until a run has logged a step."""
    end = time.monotonic() + 60
    while not (folder / "metrics.jsonl").is_file() or len(logged_so_far(folder)) < step:
        assert run.poll() is None and time.monotonic() < end, run.communicate()
        time.sleep(0.02)


def logged_so_far(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().split("\n")[:-1]


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@linux
def test_a_rank_that_dies_ends_the_run_everywhere_and_torchrun_goes_on_from_the_last_checkpoint(toy, started, tmp_path):
    common = dict(steps=12, save_every=2, keep=9)
    launch(2, "pagrpo.py", *rl(tmp_path / "whole", toy, started, **common))
    run, folder = begin(2, rl(tmp_path / "cut", toy, started, **common), "--max-restarts=1"), tmp_path / "cut/pagrpo"
    after_step(run, folder, 3)
    os.kill(ranks_of(run)[1], signal.SIGKILL)                # this time torchrun may restart …
    while not (folder / "step-000008").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    os.kill(ranks_of(run)[1], signal.SIGKILL)                # … and this time not
    began, said = time.monotonic(), run.communicate(timeout=60)[0]
    assert run.returncode != 0 and time.monotonic() - began < 45 and "continues after step" in said, said
    assert said.count("Rank 0: Lost another rank") >= 1 and "step-00000" in said, said
    a, b = logged(tmp_path / "whole/pagrpo")[:8], logged(folder)[:8]
    assert [row["step"] for row in b] == list(range(1, 9)) and [x["loss"] for x in a] == [y["loss"] for y in b]
    a, b = (load_file(tmp_path / name / "pagrpo/step-000008/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@linux
def test_a_rank_that_hangs_is_not_waited_for_without_end(toy, started, tmp_path):
    impatient = tmp_path / "pagrpo.py"                       # ranks wait 3 s for each other
    impatient.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom datetime import timedelta\nimport pagrpo\n"
                         "pagrpo.sft.TIMEOUT = timedelta(seconds=3)\npagrpo.main()\n")
    run = begin(2, rl(tmp_path, toy, started, steps=500), script=impatient)
    after_step(run, tmp_path / "pagrpo", 2)
    hanging = ranks_of(run)[1]
    os.kill(hanging, signal.SIGSTOP)
    time.sleep(4)
    os.kill(hanging, signal.SIGCONT)                         # so that torchrun can end it at once
    said = run.communicate(timeout=60)[0]
    assert re.search(r"Rank 0: Lost another rank, or waited 0:00:03 for it", said), said
