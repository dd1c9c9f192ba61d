"""Damages records and videos at random, in quantity, and counts what became of them. Not a lesson: it ends in 1 if a
promise was broken.

    python tests/soak_data.py                          both; `python tests/soak.py` does the whole
    python tests/soak_data.py records --count 1000 --seed 3

Promise: a damaged record is refused or skipped by name, or read as the same record. A damaged video is refused by name
or read: no crash, no hang.
"""
import argparse
import gzip
import json
import multiprocessing
import os
import random
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402  (found through the line above)
from model import read_config  # noqa: E402

HANG = 20                                                    # seconds
HEADER = 250                                                 # bytes; other sizes in it can end decord's whole process
INPUT = data.InputSettings(prompt="short", frames=6, fps=0, min_pixels=784, max_pixels=100 * 784, cache_gb=0)


def print_table(title: str, kinds: dict[str, Counter], good: set[str]) -> int:
    """Prints how often each kind of damage ended in what. Returns how often that broke the promise."""
    total = sum(kinds.values(), Counter())
    ends = sorted(total)
    rows = [[kind, *(str(row[end]) for end in ends)] for kind, row in (kinds | {"all": total}).items()]
    print("\n".join(data.format_table([[title, *ends], *rows])), flush=True)
    return sum(n for end, n in total.items() if end not in good)


# ------------------------------------------------------------------------------------------------ records

NEEDED = ("problem", "problem_type", "solution", "path", "data_type", "observation", "process")
# field → values that must be refused with the record's number
REFUSED = {
    **{name: [None, [], ["x"], {}] for name in NEEDED},
    "problem": [None, 5, " "], "problem_type": [None, "poem", "ocr"], "data_type": ["audio", "Video", 5],
    "solution": ["", "<answer> </answer>", "A</answer>", "<answer>A</answer><answer>B</answer>", ["B"], True,
                 float("nan")],
    "options": ["A. a cat", "['A. a cat'", "print(1)", "[1, 2]", {"A": "x"}, ["A. x", 2]],
}
# field → values that are read, but give no example
SKIPPED = {
    "solution": ["<answer>D</answer>", "a horse"],
    "process": ["so </think> it is", "<answer>B</answer>", "<think>"],
    "path": ["/etc/passwd", "..", "../secret.avi", "link.avi", "up/secret.avi", "/dev/zero", "sft/gone.avi",
             "a\0b.avi", "loop/x.avi", "x" * 300, "sft", ".", "pipe.avi", "sft.json"],
    "problem": ["What? " * 20_000],
}
# field → values that mean the same
SAME = {
    "options": [lambda row: repr(row["options"]), lambda row: json.dumps(row["options"])],
    "solution": [lambda row: row["answer"], lambda row: f" <answer> {row['answer']}\n</answer> "],
    "process": [lambda row: f"<think>{row['process']}</think>"], "extra": [lambda row: [{"a": None}]],
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
        root, file, kinds = make_world(Path(folder)), Path(folder) / "train.json", {}
        data.make_toy_model(Path(folder) / "base", seed=0)
        tokens = data.Vocabulary(Path(folder) / "base"), read_config(Path(folder) / "base")
        rows = json.loads((root / "sft.json").read_text())
        clean = data.read_records(root / "sft.json", traces=True)
        plans = [(name, "file") for name in FILES]
        for wanted, table in (("refused", REFUSED), ("skipped", SKIPPED), ("same", SAME)):
            plans += [(name, wanted) for name in table]
        for n in range(count):
            rng, (name, wanted) = random.Random(f"{seed}/{n}"), plans[n % len(plans)]
            at = rng.randrange(10) * 2                       # every second toy question is a multiple choice
            if wanted == "file":
                file.write_bytes(FILES[name](json.dumps(rows).encode(), rng))
                named, good = str(file), "refused"
            else:
                value = rng.choice({"refused": REFUSED, "skipped": SKIPPED, "same": SAME}[wanted][name])
                value = value(rows[at]) if callable(value) else value
                changed = [row | {name: value} if i == at else row for i, row in enumerate(rows)]
                file.write_text("\n".join(map(json.dumps, changed)) if rng.random() < 0.5 else json.dumps(changed))
                named, good = f"{file}, record {at + 1}: ", wanted
            try:
                end = outcome(file, named, at, clean, root, tokens)
            except Exception as error:                       # a traceback is what nobody may see
                end = f"crash: {type(error).__name__}: {error}"
            if end != good:
                print(f"{name} ({wanted}): {end:.200}", file.read_bytes()[:200])
            kinds.setdefault(f"{name}, {wanted}", Counter())[end if end == good else "broken"] += 1
        return print_table(f"{count} damaged records", kinds, {"refused", "skipped", "same"})


def outcome(file: Path, named: str, at: int, clean: list[data.Record], root: Path, tokens: tuple) -> str:
    """What becomes of a record file and of the record at `at`."""
    try:
        read = data.read_records(file, traces=True)
    except ValueError as error:
        return "refused" if named in str(error) else f"not named: {error}"
    if len(read) != len(clean) or any(a != b for i, (a, b) in enumerate(zip(read, clean)) if i != at):
        return "other records changed"
    if data.Examples(read, root, *tokens, replace(INPUT, max_prompt=5000))[at] is None:
        return "skipped"
    return "same" if read[at] == clean[at] else "accepted"


# ------------------------------------------------------------------------------------------------ videos

def flip(raw: bytes, rng: random.Random, count: int, first: int, last: int) -> bytes:
    changed = bytearray(raw)
    for _ in range(count):
        changed[rng.randrange(first, last)] ^= rng.randrange(1, 256)
    return bytes(changed)


VIDEOS = {
    "bytes": lambda raw, rng: flip(raw, rng, rng.randint(1, 64), HEADER, len(raw)),
    "index": lambda raw, rng: flip(raw, rng, rng.randint(1, 8), len(raw) - 100, len(raw)),
    "cut": lambda raw, rng: raw[:rng.randrange(1, len(raw))],
    "block missing": lambda raw, rng: raw[:(at := rng.randrange(HEADER, len(raw)))] + raw[at + 512:],
    "block of zeros": lambda raw, rng: raw[:(at := rng.randrange(HEADER, len(raw) - 512))] + bytes(512) + raw[at + 512:],
    "something else": lambda raw, rng: rng.choice([b"", bytes(5000), rng.randbytes(5000), b"<html>404</html>"]),
}


def read(path: Path):
    """Frames of a clip, or why it is refused; in a process of its own, because it may hang or die."""
    try:
        frames, seconds = data.read_video(path, INPUT)
        return frames.tobytes(), seconds
    except data.MediaError as error:
        return f"{error}"


def videos(count: int, seed: int, clips: list[str] = ()) -> int:
    """Damages clips of the toy world, and `clips`, and reads them. Returns how often the promise was broken."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        world, kinds = make_world(Path(folder)) / "sft", {}
        for n in range(count):
            rng, kind = random.Random(f"{seed}/{n}"), [*VIDEOS][n % len(VIDEOS)]
            clip = Path(rng.choice([*clips] or sorted(world.iterdir())))
            broken = Path(folder) / f"{n}{clip.suffix}"
            broken.write_bytes(VIDEOS[kind](clip.read_bytes(), rng))
            try:
                was, now = (pool.apply_async(read, (path,)).get(HANG) for path in (clip, broken))
                end = "refused" if isinstance(now, str) else "identical" if now == was else "frames differ"
            except multiprocessing.TimeoutError:
                return print(f"{kind} ({n}): the reader hangs or died") or 1
            except Exception as error:
                print(f"{kind} ({n}): {type(error).__name__}: {error}")
                end = "crash"
            kinds.setdefault(kind, Counter())[end] += 1
            broken.unlink()
        return print_table(f"{count} damaged videos", kinds, {"refused", "identical", "frames differ"})


SECTIONS = {"records": (records, 500), "videos": (videos, 200)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} [all]")
    parser.add_argument("--count", type=int, help="how often each section damages something [500 records, 200 videos]")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other damage [0]")
    parser.add_argument("--clip", action="append", default=[], help="damage this video instead: of any format")
    args, broken = parser.parse_args(), 0
    for name in args.sections or SECTIONS:
        section, count = SECTIONS[name]
        broken += section(args.count or count, args.seed, *([args.clip] if name == "videos" else []))
    sys.exit(f"A promise was broken {broken} times." if broken else 0)


if __name__ == "__main__":
    main()
