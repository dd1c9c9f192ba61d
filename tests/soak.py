"""Everything that may happen to a run, in numbers that a test suite has no time for: `python tests/soak.py`.

    kills         SIGKILL at random moments; the run must end bit for bit as one that was never killed
    records       damaged record files must be refused by name, or be read as if nothing had happened
    videos        damaged video files likewise

Promise: no crash without a message, no hang, no silent acceptance. Exits with 1 where one of them is broken.
"""
import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Broken(Exception):
    """A promise that was not kept."""


def flags_of(out: Path, world: Path, **changes) -> list[str]:
    flags = dict(preset="tiny", out=out, model=world / "base", data=world / "toy/rl.json", media=world / "toy",
                 questions=4, group_size=4, max_response=24, steps=40, save_every=3, keep=3) | changes
    return [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))]


def run(command: list[str], timeout: float = 300) -> str:
    """What a command prints. Broken if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV,
                          timeout=timeout)
    if done.returncode:
        raise Broken(f"{' '.join(command[1:3])} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def steps_logged(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def equal(a: Path, b: Path) -> None:
    """Broken unless two finished runs are equal bit for bit: weights, moments, metrics but for times and memory."""
    from model import newest_checkpoint
    from test_resume import metrics
    if metrics(a) != metrics(b):
        raise Broken(f"metrics of {a} and {b} differ")
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = (newest_checkpoint(folder) / file for folder in (a, b))
        if one.read_bytes() != two.read_bytes():
            raise Broken(f"{one} and {two} differ")


def kills(count: int, rng: random.Random, world: Path) -> Counter:
    """Kills while it loads, between steps, while a checkpoint is written: wherever a random moment falls."""
    program, done, whole = [sys.executable, str(ROOT / "pagrpo.py")], Counter(), world / "whole"
    run([*program, *flags_of(whole, world)])
    attempt = 0
    while done["killed"] < count:
        out, attempt = world / f"cut{attempt}", attempt + 1
        while True:                                          # until it gets through before it is killed
            process = subprocess.Popen([*program, *flags_of(out, world)], stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, text=True, env=ENV)
            at = steps_logged(out / "pagrpo")
            wait = rng.choice([rng.uniform(0, 3), rng.uniform(3, 7)])
            try:
                said = process.communicate(timeout=wait if done["killed"] < count else None)[0]
                if process.returncode:
                    raise Broken(f"it ended by itself:\n{said[-3000:]}")
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                left = [p.name for p in (out / "pagrpo").glob("step-*.writing")]
                done["killed"] += 1
                done["killed while a checkpoint was written"] += bool(left)
                done["killed before a step"] += steps_logged(out / "pagrpo") <= at
        equal(whole / "pagrpo", out / "pagrpo")
        done["runs that ended bit for bit as the one without kills"] += 1
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"kills": 20, "records": 500, "videos": 200}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"how many [{size}]; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from data import make_toy, make_toy_model
    broken = False
    import soak_data
    for name in ("records", "videos"):
        if count := getattr(args, name):
            began = time.monotonic()
            lost = getattr(soak_data, name)(count, args.seed)
            broken = broken or lost > 0
            print(f"{name}: {lost} promises broken, in {time.monotonic() - began:.0f} s\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        world, began, done = Path(folder), time.monotonic(), {}
        make_toy(world / "toy", {"sft": 20, "rl": 30, "heldout": 20})
        make_toy_model(world / "base", seed=0)
        try:
            done = kills(args.kills, random.Random(args.seed), world) if args.kills else {}
        except Broken as error:
            broken, done = True, {f"BROKEN: {error}": 1}
        print(f"kills, in {time.monotonic() - began:.0f} s")
        for what, n in done.items():
            print(f"  {n:>5}  {what}", flush=True)
    sys.exit("A promise is broken." if broken else None)


if __name__ == "__main__":
    main()
