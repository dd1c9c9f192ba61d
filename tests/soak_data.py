"""What a run must survive, in quantity. Not a lesson: it breaks inputs at random, counts what became of them, and ends
in 1 if a promise was broken.

    python tests/soak_data.py                 records and videos alone; `python tests/soak.py` does the whole
    python tests/soak_data.py records --count 1000 --seed 3

Promise of records and videos: damage is refused by name or changes nothing. No crash, no hang, and nobody's question is
asked about something else.
"""
import argparse
import gzip
import hashlib
import json
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402  (found through the line above)
from model import read_config  # noqa: E402
from rewards import PROBLEM_TYPES  # noqa: E402

SLOW = 10                                                    # seconds after which a file counts as a hang
GOOD = ("refused", "identical", "pixels differ")


class World:
    """A small toy world in a folder, with the tiny model's tokenizer, and all that is on the way out of it."""

    def __init__(self, folder: Path):
        self.root = data.make_toy(folder / "toy", {"sft": 20})
        data.make_toy_model(folder / "base", seed=0)
        self.vocabulary, self.config = data.Vocabulary(folder / "base"), read_config(folder / "base")
        self.rows = json.loads((self.root / "sft.json").read_text())
        (folder / "secret.avi").write_bytes(data.avi_bytes(np.zeros((6, 56, 56, 3), np.uint8), 2))
        os.symlink(folder / "secret.avi", self.root / "link.avi")
        os.symlink(folder, self.root / "up")
        os.symlink("loop", self.root / "loop")
        os.mkfifo(self.root / "pipe.avi")

    def examples(self, records: list[data.Record], frames: int = 6) -> data.Examples:
        settings = data.InputSettings(prompt="short", frames=frames, fps=0, min_pixels=784, max_pixels=784, cache_gb=0)
        return data.Examples(records, self.root, self.vocabulary, self.config, settings)


def print_table(title: str, kinds: dict[str, Counter]) -> int:
    """Prints how often each kind of damage ended in what, and returns how often that broke the promise."""
    ends = sorted({end for row in kinds.values() for end in row} | set(GOOD[:2]), key=lambda e: (e not in GOOD, e))
    total = sum(kinds.values(), Counter())
    rows = [[title, *ends], *([kind, *(str(row[end]) for end in ends)] for kind, row in kinds.items()),
            ["all", *(str(total[end]) for end in ends)]]
    print("\n".join(data.format_table(rows)), flush=True)
    return sum(n for end, n in total.items() if end not in GOOD)


# ------------------------------------------------------------------------------------------------ records

def without(name):
    return lambda row, rng: {k: v for k, v in row.items() if k != name}


def with_one_of(name, *values):
    return lambda row, rng: row | {name: rng.choice(values)}


NEEDED = ("problem", "problem_type", "solution", "path", "data_type", "observation", "process")
NESTED = {"a": [{"b": [None, {"c": [[]]}]}]}
# How a row is damaged, by what must become of it. Refused: a ValueError that names file and record.
REFUSED = {
    **{f"no {name}": without(name) for name in NEEDED},
    **{f"{name} of another kind": with_one_of(name, None, 5, 0.5, True, [], ["x"], {}, NESTED) for name in NEEDED
       if name != "solution"},
    "solution of another kind": with_one_of("solution", None, True, False, [], ["B"], {}, NESTED,
                                            float("nan"), float("inf"), -float("inf")),
    "solution without an answer": with_one_of("solution", "", "  ", "<answer></answer>", "<answer> </answer>",
                                              "<answer>A", "A</answer>", "<answer>A</answer><answer>B</answer>"),
    "unknown problem type": with_one_of("problem_type", "poem", "Multiple Choice", "ocr", "multiple choice "),
    "unknown data type": with_one_of("data_type", "audio", "Video", "video\0", "videos"),
    "options that are no list": with_one_of("options", "A. a cat", "['A. a cat'", "{}", "print(1)", "[1, 2]", "None",
                                            {"A": "x"}, ["A. x", 2], [None], NESTED, 5, False, "[" * 5000, "-" * 99999,
                                            "1_", "{[]: 1}", "\0"),
    "one option": lambda row, rng: row | {"problem_type": "multiple choice", "options": ["A. a cat"]},
    "half a character": lambda row, rng: row | {rng.choice(["problem", "note"]): "\ud800"},
    "no object": lambda row, rng: rng.choice([None, 5, "text", [], [row], True]),
}
# Skipped: read, but no example; counted with a reason.
SKIPPED = {
    "answer that is no option": lambda row, rng: row | {
        "problem_type": "multiple choice", "options": ["A. a cat", "B. a dog", "C. a cow"],
        "solution": rng.choice(["<answer>D</answer>", "Z", "<answer>a horse</answer>", "A. a dog"])},
    "number that is none": lambda row, rng: row | {
        "problem_type": "regression",
        "solution": rng.choice(["NaN", "-Infinity", "<answer>many</answer>", "9" * 5000])},
    "tags in a trace": lambda row, rng: row | {
        (name := rng.choice(["observation", "process"])): row[name] + rng.choice(
            ["<think>", "</observation>", "<answer>B</answer>", "<observation>x</observation>", "</think><think>"])},
    "path out of the root": with_one_of("path", "/etc/passwd", "..", "../secret.avi", "link.avi", "up/secret.avi",
                                        "sft/../../secret.avi", "/", "/dev/zero", "/dev/stdin"),
    "path to nothing": with_one_of("path", "sft/gone.avi", "gone/00000.avi", "sft/00000.avi/x", "a\0b.avi",
                                   "loop/x.avi", "x" * 300, "y/" * 3000, "sft", ".",
                                   "pipe.avi", "http://x.org/a.avi", "sft/*.avi",
                                   "sft.json"),
    "question without end": lambda row, rng: row | {"problem": "What? " * 20_000},
    "video said to be an image": lambda row, rng: row | {"data_type": "image"},
}
# Identical: not what a record is about.
IDENTICAL = {
    "order of keys": lambda row, rng: dict(rng.sample(sorted(row.items()), len(row))),
    "unknown fields": lambda row, rng: row | {f"extra{rng.random()}": rng.choice([None, NESTED, float("nan")])},
    "options as a text": lambda row, rng: row | {"options": rng.choice([repr, json.dumps])(row["options"])},
    "solution without its tags": lambda row, rng: row | {"solution": row["answer"]},
    "space around": lambda row, rng: row | {"solution": row["solution"].replace("</", " \n</") + " "},
    "trace in its tags": lambda row, rng: row | {"process": f"<think>{row['process']}</think>"},
}


def cut(text: bytes, rng: random.Random) -> bytes:
    return text[:rng.randrange(len(text) - 2)]


def twice(text: bytes, rng: random.Random) -> bytes:
    """One key stands twice in one object."""
    key = rng.choice(NEEDED).encode()
    places = [i for i in range(len(text)) if text.startswith(b'"' + key + b'": ', i)]
    at = rng.choice(places)
    return text[:at] + b'"' + key + b'": "A", ' + text[at:]


def damaged(text: bytes, rng: random.Random) -> bytes:
    packed = gzip.compress(text)
    at = rng.randrange(10, len(packed))
    return packed[:at] + bytes([packed[at] ^ rng.randrange(1, 256)]) + packed[at + 1:]


# How a file's bytes are damaged: refused with a ValueError that names the file.
FILES = {
    "file cut": cut,
    "gzip cut": lambda text, rng: cut(gzip.compress(text), rng),
    "gzip damaged": damaged,
    "no UTF-8": lambda text, rng: text[:(at := rng.randrange(len(text)))] + b"\xff\xfe" + text[at:],
    "UTF-16": lambda text, rng: text.decode().encode("utf-16"),
    "zero byte": lambda text, rng: text[:(at := rng.randrange(len(text)))] + b"\0" + text[at:],
    "key stands twice": twice,
    "deep nesting": lambda text, rng: text.replace(b'"options"', b'"x": ' + b"[" * 10 ** 5 + b', "options"', 1),
    "number without end": lambda text, rng: text.replace(b'"options"', b'"x": 1' + b"0" * 9999 + b', "options"', 1),
    "empty": lambda text, rng: rng.choice([b"", b" \n", b"[]", b"{}", b"null", gzip.compress(b"")]),
    "something else": lambda text, rng: rng.choice([b"<html>404</html>", b"PK\3\4" + rng.randbytes(200),
                                                    rng.randbytes(500)]),
}


def become_of(world: World, file: Path, at: int, clean: list[data.Record]) -> str:
    """Reads a record file and the example at `at`. Returns what became of it, in a word or two."""
    try:
        records = data.read_records(file, traces=True)
    except ValueError as error:
        return "refused" if str(file) in str(error) else f"unnamed: {error}"
    if len(records) != len(clean) or any(a != b for i, (a, b) in enumerate(zip(records, clean)) if i != at):
        return "other records"
    examples = world.examples(records)
    if examples[at] is None:
        return "skipped" if len(examples.skipped[at]) > 10 else "skipped without a reason"
    return "identical" if records[at] == clean[at] else "accepted"


def records(count: int, seed: int) -> int:
    """Damages rows and files of records, and reads them as a run does. Returns how often the promise was broken."""
    with tempfile.TemporaryDirectory() as folder:
        world, kinds = World(Path(folder)), {}
        file = Path(folder) / "train.json"
        plans = [(kind, change, wanted) for wanted, some in (("refused", REFUSED), ("skipped", SKIPPED),
                 ("identical", IDENTICAL), ("file", FILES)) for kind, change in some.items()]
        file.write_text(json.dumps(world.rows))
        clean = data.read_records(file, traces=True)
        assert {r.problem_type for r in clean} == set(PROBLEM_TYPES)
        for n in range(count):
            rng = random.Random(f"{seed}/{n}")
            kind, change, wanted = plans[n % len(plans)]
            at, lines = rng.randrange(len(clean)), rng.random() < 0.5 and kind not in (*FILES, "no object")
            if wanted == "file":
                file.write_bytes(change(json.dumps(world.rows).encode(), rng))
            else:
                rows = [change(row, rng) if i == at else row for i, row in enumerate(world.rows)]
                file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
            try:
                end = become_of(world, file, at, clean)
                if end == "refused" and wanted == "refused":
                    try:
                        data.read_records(file, traces=True)
                    except ValueError as error:
                        end = end if f"record {at + 1}: " in str(error) else f"names no record: {error}"
            except Exception as error:                       # a traceback is what nobody may see
                end = f"crash: {type(error).__name__}"
            right = {"refused": ["refused"], "file": ["refused"], "skipped": ["skipped"], "identical": ["identical"]}
            if end in right[wanted]:
                end = "refused" if end == "skipped" else end
            else:
                print(f"{kind}: {end:.100}", file.read_bytes()[:100] if wanted == "file" else f"{rows[at]!r:.300}")
                end = end.split(":")[0] if end.split(":")[0] not in GOOD else f"wrongly {end}"
            kinds.setdefault(kind, Counter())[end] += 1
        return print_table(f"{count} damaged records", kinds)


# ------------------------------------------------------------------------------------------------ videos

def flip(raw: bytes, rng: random.Random, count: int, first: int = 0, last: int | None = None) -> bytes:
    changed = bytearray(raw)
    for _ in range(count):
        changed[rng.randrange(first, last or len(raw))] ^= rng.randrange(1, 256)
    return bytes(changed)


def part(raw: bytes, rng: random.Random) -> tuple[int, int]:
    first = rng.randrange(len(raw) - 1)
    return first, min(len(raw), first + rng.choice([1, 16, 512, 4096]))


def swapped(raw: bytes, rng: random.Random) -> bytes:
    n, half = rng.choice([4, 64, 1024]), len(raw) // 2
    a, b = rng.randrange(half - 1024), rng.randrange(half, len(raw) - 1024)
    return raw[:a] + raw[b:b + n] + raw[a + n:b] + raw[a:a + n] + raw[b + n:]


def number_at(*places: tuple[bytes, int]):
    """Another 32-bit number some bytes behind a name in the header, such as the length of the whole."""
    def change(raw: bytes, rng: random.Random) -> bytes:
        name, behind = rng.choice(places)
        at = rng.choice([i for i in range(len(raw)) if raw.startswith(name, i)]) + behind
        return raw[:at] + struct.pack("<I", rng.choice([0, 1, 3, 100, 5000, 2 ** 31, 2 ** 32 - 1])) + raw[at + 4:]
    return change


VIDEOS = {
    "one byte": lambda raw, rng: flip(raw, rng, 1),
    "2 to 64 bytes": lambda raw, rng: flip(raw, rng, rng.randint(2, 64)),
    "bytes in the middle": lambda raw, rng: flip(raw, rng, rng.randint(1, 20), len(raw) // 4, len(raw) // 2),
    "header garbled": lambda raw, rng: flip(raw, rng, rng.randint(1, 8), 0, 250),
    "index garbled": lambda raw, rng: flip(raw, rng, rng.randint(1, 8), len(raw) - 100),
    "cut": lambda raw, rng: raw[:rng.randrange(1, len(raw))],
    "block of zeros": lambda raw, rng: raw[:(p := part(raw, rng))[0]] + bytes(p[1] - p[0]) + raw[p[1]:],
    "block missing": lambda raw, rng: raw[:(p := part(raw, rng))[0]] + raw[p[1]:],
    "block twice": lambda raw, rng: raw[:(p := part(raw, rng))[1]] + raw[p[0]:],
    "blocks swapped": swapped,
    "wrong lengths": number_at((b"RIFF", 4), (b"00dc", 4), (b"LIST", 4), (b"idx1", 4)),
    "wrong frame counts": number_at((b"avih", 24), (b"strh", 40)),
    "wrong rates": number_at((b"avih", 8), (b"strh", 28), (b"strh", 32)),
    "wrong sizes": number_at((b"avih", 40), (b"strf", 12), (b"strf", 16), (b"strf", 20)),
    "something else": lambda raw, rng: rng.choice([b"", b"\0" * 5000, rng.randbytes(5000), b"<html>404</html>",
                                                   raw[:12], b"RIFF" + rng.randbytes(5000),
                                                   json.dumps([1] * 999).encode()]),
}


def worker(folder: Path) -> None:
    """Reads clips named on stdin as a run does, and answers each with a line: a child, because it may hang or die."""
    vocabulary, config = data.Vocabulary(folder / "base"), read_config(folder / "base")
    for line in sys.stdin:
        path, frames = json.loads(line)
        record = data.Record("", "Which?", (), "free-form", "x", path, "video")
        settings = data.InputSettings(frames=frames, fps=0, min_pixels=784, max_pixels=100 * 784, prompt="short")
        try:
            examples = data.Examples([record], folder, vocabulary, config, settings)
            if (example := examples[0]) is None:
                reply = {"end": "refused" if len(examples.skipped[0]) > 10 else "skipped without a reason"}
            else:
                pixels = hashlib.sha256(example.pixels.numpy().tobytes()).hexdigest()
                reply = {"end": "read", "pixels": pixels, "shape": [*example.grid, example.seconds]}
        except Exception as error:
            reply = {"end": f"crash: {type(error).__name__}: {error}"}
        print("\n" + json.dumps(reply), flush=True)


class Child:
    """Asks a worker, and starts another one where it hangs or dies."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, None

    def ask(self, path: Path, frames: int) -> dict:
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, __file__, "--worker", str(self.folder)], cwd=ROOT,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.process.stdin.write(json.dumps([str(path.relative_to(self.folder)), frames]).encode() + b"\n")
        self.process.stdin.flush()
        text = b""
        while not (text.endswith(b"}\n")):
            ready = select.select([self.process.stdout], [], [], SLOW)[0]
            piece = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not piece:
                self.close()
                return {"end": "death" if ready else "hang"}
            text += piece
        return json.loads(text.splitlines()[-1])

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


def videos(count: int, seed: int, clips: list[str] = ()) -> int:
    """Damages clips of the toy world and reads them in a child. Returns how often the promise was broken.

    `clips` are damaged in addition: of other codecs, whose payload carries no checksum. There "pixels differ" is what
    nobody can notice, as long as number and times of the frames are right.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder, kinds = Path(folder), {}
        whole = World(folder).root / "sft"
        noise = np.random.default_rng(seed).integers(0, 256, (20, 42, 56, 3), dtype=np.uint8)
        (whole / "long.avi").write_bytes(data.avi_bytes(noise, 5))
        child = Child(folder)
        child.ask(next(whole.iterdir()), 2)                  # the first answer waits for torch to be imported
        own = [(f, "") for f in sorted(whole.iterdir())] + [(whole / "long.avi", "")] * 10
        jobs = [(*random.Random(f"{seed}/{n}").choice(own), n) for n in range(count)]
        for clip in clips:
            (folder / Path(clip).name).write_bytes(Path(clip).read_bytes())
            jobs += [(folder / Path(clip).name, f"{Path(clip).name}, ", n) for n in range(count)]
        for clip, name, n in jobs:
            rng, kind = random.Random(f"{seed}/{clip.name}/{n}"), [*VIDEOS][n % (10 if name else len(VIDEOS))]
            raw, frames = clip.read_bytes(), rng.choice([4, 6, 16])
            broken = folder / f"{n}-{clip.name}"             # a name of its own: the last clips are kept in memory
            broken.write_bytes(VIDEOS[kind](raw, rng))
            was, now = child.ask(clip, frames), child.ask(broken, frames)
            broken.unlink()
            assert was["end"] == "read", f"{clip} cannot be read before it is damaged: {was}"
            end = now["end"]
            if end == "read":
                same_pixels, same_shape = now["pixels"] == was["pixels"], now["shape"] == was["shape"]
                end = ("identical" if same_pixels and same_shape else
                       "pixels differ" if name and same_shape else "accepted")
            if end.split(":")[0] not in GOOD:
                print(f"{name}{kind} ({n}): {end}", now)
            kinds.setdefault(name + (kind if not name else "any damage"), Counter())[end.split(":")[0]] += 1
        child.close()
        return print_table(f"{len(jobs)} damaged videos", kinds)


# ------------------------------------------------------------------------------------------------ command line

SECTIONS = {"records": (records, 500), "videos": (videos, 200)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} [all]")
    parser.add_argument("--count", type=int, help="how often each section breaks something "
                        f"[{', '.join(f'{name} {count}' for name, (_, count) in SECTIONS.items())}]")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other damage [0]")
    parser.add_argument("--clip", action="append", default=[], help="damage this video, too: of any format")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        return worker(Path(args.worker))
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}")
    broken = 0
    for name in args.sections or SECTIONS:
        section, count = SECTIONS[name]
        extra = [args.clip] if name == "videos" else []
        broken += section(args.count or count, args.seed, *extra)
        print()
    sys.exit(f"A promise was broken {broken} times." if broken else 0)


if __name__ == "__main__":
    main()
