"""Everything that may happen to a run, in numbers that a test suite has no time for: `python tests/soak.py`.

    kills         SIGKILL at random moments; the run must end bit for bit as one that was never killed
    records       damaged record files must be refused by name, or be read as if nothing had happened
    videos        damaged video files likewise

Promise: no crash without a message, no hang, no silent acceptance. Exits with 1 where one of them is broken.
"""
import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import data  # noqa: E402  (found through the line above)
import soak_data  # noqa: E402
from toy_runs import ENV, command, logged, rl_flags, same_end  # noqa: E402


class Broken(Exception):
    """A promise that was not kept."""


def run(words: list[str], timeout: float = 300) -> None:
    """Broken if the command fails."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV,
                          timeout=timeout)
    if done.returncode:
        raise Broken(f"{' '.join(words[1:3])} ended with {done.returncode}:\n{done.stdout[-3000:]}")


def kills(count: int, rng: random.Random, world: Path) -> Counter:
    """Kills while it loads, between steps, while a checkpoint is written: wherever a random moment falls."""
    def words(out: Path) -> list[str]:
        return command("pagrpo.py", rl_flags(out, world / "toy", world / "base", heldout="", questions=4, group_size=4,
                                             max_response=24, steps=40, save_every=3, keep=3))
    done, whole = Counter(), world / "whole"
    run(words(whole))
    attempt = 0
    while done["killed"] < count:
        out, attempt = world / f"cut{attempt}", attempt + 1
        while True:                                          # until it gets through before it is killed
            process = subprocess.Popen(words(out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
            at = len(logged(out / "pagrpo"))
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
                done["killed before a step"] += len(logged(out / "pagrpo")) <= at
        if not same_end(whole / "pagrpo", out / "pagrpo"):
            raise Broken(f"{whole} and {out} differ")
        done["runs that ended bit for bit as the one without kills"] += 1
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"kills": 20, "records": 500, "videos": 200}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"how many [{size}]; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    broken = False
    for name in ("records", "videos"):
        if count := getattr(args, name):
            began = time.monotonic()
            lost = getattr(soak_data, name)(count, args.seed)
            broken = broken or lost > 0
            print(f"{name}: {lost} promises broken, in {time.monotonic() - began:.0f} s\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        world, began, done = Path(folder), time.monotonic(), {}
        data.make_toy(world / "toy", {"sft": 20, "rl": 30, "heldout": 20})
        data.make_toy_model(world / "base", seed=0)
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
