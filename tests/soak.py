"""Everything that may happen to a run, in numbers that a test suite has no time for: `python tests/soak.py`.

    records       damaged record files must be refused by name, or be read as if nothing had happened
    videos        damaged clips must be refused by name, or be read
    kills         SIGKILL at random moments; the run must end bit for bit as one that was never killed

Promise: no crash without a message, no hang, no silent acceptance. Exits with 1 where one of them is broken.
"""
import argparse
import json
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
import data  # noqa: E402  (found through the line above)
from model import read_config  # noqa: E402
from toy_runs import ENV, command, rl_flags, same_end  # noqa: E402

data.HANG = 5                                                # seconds, for the pipe among the clips
INPUT = data.InputSettings(prompt="short", frames=6, fps=0, min_pixels=784, max_pixels=100 * 784, max_prompt=5000)


def soak(plans: list[tuple], trial, count: int, seed: int) -> int:
    """Calls `trial(rng, *plan)`, which returns how it ended or raises, and prints how often each plan ended in what.
    Returns how often the promise was broken."""
    ends, broken = Counter(), 0
    for n in range(count):
        plan = plans[n % len(plans)]
        try:
            end = trial(random.Random(f"{seed}/{n}"), *plan)
        except Exception as error:
            print(f"{plan}, trial {n}: {type(error).__name__}: {error}")
            end = "BROKEN"
            broken += 1
        ends[f"{', '.join(plan)}: {end}"] += 1
    show(ends)
    return broken


def show(counts: Counter) -> None:
    for what, n in counts.items():
        print(f"{n:>5}  {what}", flush=True)


# ------------------------------------------------------------------------------------------------ records

# What must become of a record with this value in this field: refused with its number, skipped because it gives no
# example, or read as the same. A value may be made from the row. A damaged file must be refused.
NEEDED = ("problem", "problem_type", "solution", "path", "data_type", "observation", "process")
RECORDS = {
    "file": {
        "cut": lambda raw, rng: raw[:rng.randrange(len(raw) - 2)],
        "no UTF-8": lambda raw, rng: raw[:99] + b"\xff\xfe" + raw[99:],
        "no records": lambda raw, rng: rng.choice([b"", b" \n", b"[]", b"{}", b"null"]),
        "something else": lambda raw, rng: rng.choice([b"<html>404</html>", b"PK\3\4" + rng.randbytes(200)])},
    "refused": {name: [None, [], ["x"], {}] for name in NEEDED} | {
        "problem": [None, 5, " "], "problem_type": [None, "poem", "ocr"], "data_type": ["audio", "Video", 5],
        "solution": ["", "<answer> </answer>", "A</answer>", "<answer>A</answer><answer>B</answer>", ["B"], True,
                     float("nan")],
        "options": ["A. a cat", "['A. a cat'", "print(1)", "[1, 2]", {"A": "x"}, ["A. x", 2]]},
    "skipped": {
        "solution": ["<answer>D</answer>", "a horse"],
        "process": ["so </think> it is", "<answer>B</answer>", "<think>"],
        "path": ["/etc/passwd", "..", "../secret.apng", "link.apng", "up/secret.apng", "/dev/zero", "sft/gone.apng",
                 "a\0b.apng", "loop/x.apng", "x" * 300, "sft", ".", "pipe.apng", "sft.json"],
        "problem": ["What? " * 20_000]},
    "same": {
        "options": [lambda row: repr(row["options"]), lambda row: json.dumps(row["options"])],
        "solution": [lambda row: row["answer"], lambda row: f" <answer> {row['answer']}\n</answer> "],
        "process": [lambda row: f"<think>{row['process']}</think>"], "extra": [[{"a": None}]]},
}


def records(count: int, seed: int, folder: Path) -> int:
    """Damages rows and files of records, and reads them as a run does."""
    root, file = data.make_toy(folder / "toy", {"sft": 20}), folder / "train.json"
    (folder / "secret.apng").write_bytes((root / "sft" / "00000.apng").read_bytes())
    os.symlink(folder / "secret.apng", root / "link.apng")
    os.symlink(folder, root / "up")
    os.symlink("loop", root / "loop")
    os.mkfifo(root / "pipe.apng")
    data.make_toy_model(folder / "base", seed=0)
    tokens = data.Vocabulary(folder / "base"), read_config(folder / "base")
    rows = json.loads((root / "sft.json").read_text())
    clean = data.read_records(root / "sft.json", traces=True)

    def trial(rng: random.Random, name: str, wanted: str) -> str:
        at, change = 2 * rng.randrange(10), RECORDS[wanted][name]      # every second toy question has options
        if wanted == "file":
            named, wanted = str(file), "refused"
            file.write_bytes(change(json.dumps(rows).encode(), rng))
        else:
            named, value = f"{file}, record {at + 1}: ", rng.choice(change)
            changed = list(rows)
            changed[at] = rows[at] | {name: value(rows[at]) if callable(value) else value}
            file.write_text("\n".join(map(json.dumps, changed)) if rng.random() < 0.5 else json.dumps(changed))
        try:
            read, end = data.read_records(file, traces=True), "accepted"
        except ValueError as error:
            assert wanted == "refused" and named in str(error), (error, file.read_bytes()[:200])
            return "refused"
        assert read[:at] + read[at + 1:] == clean[:at] + clean[at + 1:], "other records changed"
        if data.Examples(read, root, *tokens, INPUT)[at] is None:
            end = "skipped"
        elif read[at] == clean[at]:
            end = "same"
        assert end == wanted, (end, file.read_bytes()[:200])
        return end
    plans = [(name, wanted) for wanted, table in RECORDS.items() for name in table]
    return soak(plans, trial, count, seed)


# ------------------------------------------------------------------------------------------------ videos

def change_bytes(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 64)):
        changed[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
    return changed


def leave_out(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw) - 512)
    return raw[:at] + raw[at + 512:]


VIDEOS = {
    "bytes": change_bytes,
    "block missing": leave_out,
    "cut": lambda raw, rng: raw[:rng.randrange(1, len(raw))],
    "something else": lambda raw, rng: rng.choice([b"", bytes(5000), rng.randbytes(5000), b"<html>404</html>"]),
}


def videos(count: int, seed: int, folder: Path) -> int:
    """Damages clips of the toy world and reads them. A crash of the decoder ends this process, too."""
    clips, broken = sorted((data.make_toy(folder, {"sft": 20}) / "sft").iterdir()), folder / "broken.apng"

    def trial(rng: random.Random, kind: str) -> str:
        clip = rng.choice(clips)
        broken.write_bytes(VIDEOS[kind](clip.read_bytes(), rng))
        whole, _ = data.read_video(clip, INPUT)
        try:
            frames, _ = data.read_video(broken, INPUT)
        except data.MediaError:
            return "refused"
        return "identical" if frames.tobytes() == whole.tobytes() else "frames differ"
    return soak([(kind,) for kind in VIDEOS], trial, count, seed)


# ------------------------------------------------------------------------------------------------ kills

def kills(count: int, seed: int, folder: Path) -> int:
    """Kills while a run loads, between steps, while a checkpoint is written: wherever a random moment falls."""
    toy, rng, done = data.make_toy(folder / "toy", {"rl": 30}), random.Random(seed), Counter()
    data.make_toy_model(folder / "base", seed=0)

    def ends(out: Path, wait: float | None = None) -> bool:
        """Starts or continues a run, and kills it after so many seconds. Has it ended before?"""
        words = command("pagrpo.py", rl_flags(out, toy, folder / "base", heldout="", questions=4, group_size=4,
                                              max_response=24, steps=40, save_every=3, keep=3))
        try:
            run = subprocess.run(words, capture_output=True, text=True, env=ENV, timeout=wait)
        except subprocess.TimeoutExpired:                    # it got SIGKILL
            return False
        if run.returncode:
            sys.exit(f"BROKEN: {out} ended by itself:\n{run.stdout[-1000:]}{run.stderr[-3000:]}")
        return True
    whole = folder / "whole"
    ends(whole)
    while done["killed"] < count:
        out = folder / f"cut{done.total()}"
        while not ends(out, rng.uniform(0, 7) if done["killed"] < count else None):
            done["killed"] += 1
            done["killed while a checkpoint was written"] += any((out / "pagrpo").glob("step-*.writing"))
        if not same_end(whole / "pagrpo", out / "pagrpo"):
            sys.exit(f"BROKEN: {whole} and {out} differ")
        done["runs that ended bit for bit as the one without kills"] += 1
    show(done)
    return 0


PARTS = {"records": (records, 500), "videos": (videos, 200), "kills": (kills, 20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (_, size) in PARTS.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"how many [{size}]; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    args, broken = parser.parse_args(), 0
    for name, (part, _) in PARTS.items():
        if count := getattr(args, name):
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                lost = part(count, args.seed, Path(folder))
            broken += lost
            print(f"{name}: {lost} promises broken, in {time.monotonic() - began:.0f} s\n", flush=True)
    sys.exit("A promise is broken." if broken else None)


if __name__ == "__main__":
    main()
