"""Damages records and videos at random and counts what became of them. `python tests/soak.py` runs this.

Promise: a damaged record is refused or skipped by name, or read as the same record. A damaged video is refused by name
or read: no crash, no hang.
"""
import gzip
import json
import multiprocessing
import os
import random
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import data
from model import read_config

HANG = 20                                                    # seconds
HEADER = 250                                                 # bytes; other sizes in it can end decord's whole process
INPUT = data.InputSettings(prompt="short", frames=6, fps=0, min_pixels=784, max_pixels=100 * 784)


def soak(title: str, plans: list[tuple], trial, count: int, seed: int) -> int:
    """Calls `trial(rng, *plan)`, which returns how it ended or raises, and prints how often each plan ended in what.
    Returns how often the promise was broken."""
    kinds = {", ".join(plan): Counter() for plan in plans}
    for n in range(count):
        plan = plans[n % len(plans)]
        try:
            end = trial(random.Random(f"{seed}/{n}"), *plan)
        except multiprocessing.TimeoutError:
            print(f"{plan}, trial {n}: the process that reads hangs or died; no further trials")
            kinds[", ".join(plan)]["broken"] += 1
            break
        except Exception as error:
            print(f"{plan}, trial {n}: {type(error).__name__}: {error}")
            end = "broken"
        kinds[", ".join(plan)][end] += 1
    total = sum(kinds.values(), Counter())
    ends = sorted(total)
    rows = [[kind, *(str(row[end]) for end in ends)] for kind, row in (kinds | {"all": total}).items()]
    print("\n".join(data.format_table([[title, *ends], *rows])), flush=True)
    return total["broken"]


# ------------------------------------------------------------------------------------------------ records

# What must become of a record with this value in this field: refused with its number, skipped because it gives no
# example, or read as the same. A value may be made from the row.
NEEDED = ("problem", "problem_type", "solution", "path", "data_type", "observation", "process")
RECORDS = {
    "refused": {name: [None, [], ["x"], {}] for name in NEEDED} | {
        "problem": [None, 5, " "], "problem_type": [None, "poem", "ocr"], "data_type": ["audio", "Video", 5],
        "solution": ["", "<answer> </answer>", "A</answer>", "<answer>A</answer><answer>B</answer>", ["B"], True,
                     float("nan")],
        "options": ["A. a cat", "['A. a cat'", "print(1)", "[1, 2]", {"A": "x"}, ["A. x", 2]]},
    "skipped": {
        "solution": ["<answer>D</answer>", "a horse"],
        "process": ["so </think> it is", "<answer>B</answer>", "<think>"],
        "path": ["/etc/passwd", "..", "../secret.avi", "link.avi", "up/secret.avi", "/dev/zero", "sft/gone.avi",
                 "a\0b.avi", "loop/x.avi", "x" * 300, "sft", ".", "pipe.avi", "sft.json"],
        "problem": ["What? " * 20_000]},
    "same": {
        "options": [lambda row: repr(row["options"]), lambda row: json.dumps(row["options"])],
        "solution": [lambda row: row["answer"], lambda row: f" <answer> {row['answer']}\n</answer> "],
        "process": [lambda row: f"<think>{row['process']}</think>"], "extra": [[{"a": None}]]},
}
FILES = {
    "cut": lambda raw, rng: raw[:rng.randrange(len(raw) - 2)],
    "gzip cut": lambda raw, rng: gzip.compress(raw)[:rng.randrange(20, 500)],
    "no UTF-8": lambda raw, rng: raw[:99] + b"\xff\xfe" + raw[99:],
    "UTF-16": lambda raw, rng: raw.decode().encode("utf-16"),
    "no records": lambda raw, rng: rng.choice([b"", b" \n", b"[]", b"{}", b"null", gzip.compress(b"")]),
    "something else": lambda raw, rng: rng.choice([b"<html>404</html>", b"PK\3\4" + rng.randbytes(200)]),
}


def make_world(folder: Path) -> Path:
    """A small toy world, and paths that lead out of it or nowhere."""
    root = data.make_toy(folder / "toy", {"sft": 20})
    (folder / "secret.avi").write_bytes((root / "sft" / "00000.avi").read_bytes())
    os.symlink(folder / "secret.avi", root / "link.avi")
    os.symlink(folder, root / "up")
    os.symlink("loop", root / "loop")
    os.mkfifo(root / "pipe.avi")
    return root


def records(count: int, seed: int) -> int:
    """Damages rows and files of records, and reads them as a run does. Returns how often the promise was broken."""
    with tempfile.TemporaryDirectory() as folder:
        root, file = make_world(Path(folder)), Path(folder) / "train.json"
        data.make_toy_model(Path(folder) / "base", seed=0)
        tokens = data.Vocabulary(Path(folder) / "base"), read_config(Path(folder) / "base")
        rows = json.loads((root / "sft.json").read_text())
        clean = data.read_records(root / "sft.json", traces=True)

        def trial(rng: random.Random, name: str, wanted: str) -> str:
            at = rng.randrange(10) * 2                       # every second toy question is a multiple choice
            if wanted == "file":
                named, wanted = str(file), "refused"
                file.write_bytes(FILES[name](json.dumps(rows).encode(), rng))
            else:
                named, value = f"{file}, record {at + 1}: ", rng.choice(RECORDS[wanted][name])
                value = value(rows[at]) if callable(value) else value
                changed = [row | {name: value} if i == at else row for i, row in enumerate(rows)]
                file.write_text("\n".join(map(json.dumps, changed)) if rng.random() < 0.5 else json.dumps(changed))
            try:
                read, end = data.read_records(file, traces=True), "accepted"
            except ValueError as error:
                assert wanted == "refused" and named in str(error), (error, file.read_bytes()[:200])
                return "refused"
            assert read[:at] + read[at + 1:] == clean[:at] + clean[at + 1:], "other records changed"
            if data.Examples(read, root, *tokens, replace(INPUT, max_prompt=5000))[at] is None:
                end = "skipped"
            elif read[at] == clean[at]:
                end = "same"
            assert end == wanted, (end, file.read_bytes()[:200])
            return end
        plans = [(name, "file") for name in FILES]
        for wanted, table in RECORDS.items():
            plans += [(name, wanted) for name in table]
        return soak(f"{count} damaged records", plans, trial, count, seed)


# ------------------------------------------------------------------------------------------------ videos

def flip(raw: bytes, rng: random.Random, count: int, first: int) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(1, count)):
        changed[rng.randrange(first, len(raw))] ^= rng.randrange(1, 256)
    return bytes(changed)


def overwrite(raw: bytes, rng: random.Random, block: bytes) -> bytes:
    at = rng.randrange(HEADER, len(raw) - 512)
    return raw[:at] + block + raw[at + 512:]


VIDEOS = {
    "bytes": lambda raw, rng: flip(raw, rng, 64, HEADER),
    "index": lambda raw, rng: flip(raw, rng, 8, len(raw) - 100),
    "cut": lambda raw, rng: raw[:rng.randrange(1, len(raw))],
    "block missing": lambda raw, rng: overwrite(raw, rng, b""),
    "block of zeros": lambda raw, rng: overwrite(raw, rng, bytes(512)),
    "something else": lambda raw, rng: rng.choice([b"", bytes(5000), rng.randbytes(5000), b"<html>404</html>"]),
}


def read(path: Path):
    """Frames of a clip, or why it is refused; in a process of its own, because it may hang or die."""
    try:
        frames, seconds = data.read_video(path, INPUT)
        return frames.tobytes(), seconds
    except data.MediaError as error:
        return f"{error}"


def videos(count: int, seed: int) -> int:
    """Damages clips of the toy world and reads them. Returns how often the promise was broken."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        clips = sorted((make_world(Path(folder)) / "sft").iterdir())

        def trial(rng: random.Random, kind: str) -> str:
            clip = rng.choice(clips)
            broken = Path(folder) / f"broken{clip.suffix}"
            broken.write_bytes(VIDEOS[kind](clip.read_bytes(), rng))
            was, now = (pool.apply_async(read, (path,)).get(HANG) for path in (clip, broken))
            if isinstance(now, str):
                return "refused"
            return "identical" if now == was else "frames differ"
        return soak(f"{count} damaged videos", [(kind,) for kind in VIDEOS], trial, count, seed)
