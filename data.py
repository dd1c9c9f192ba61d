"""From files to model inputs: media, records, prompts, batches; the toy world, which makes all of them itself; and the
data pipeline, which makes traces for SFT.

    python data.py toy --out runs/tiny/toy            write the toy world: video files, training and held-out records
    python data.py check train.json --media DIR       say what is wrong with anybody's records, before a run does
    python data.py cot                                traces for the toy world; for other questions: --data FILE
        --media DIR --teacher https://…/v1 --teacher-model NAME --judge https://…/v1 --judge-model NAME

Records are those of the VideoP2R release (gzip JSON, JSON or JSON lines): problem, options, solution, path, data_type,
problem_type, and for SFT the trace in observation and process. Prompts follow Qwen's chat layout. Nothing here ever
replaces one clip by another: a record whose media cannot be read is skipped, counted and named.
"""
import argparse
import ast
import base64
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import random
import struct
import sys
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from model import (CONFIGS, Config, Prompts, Qwen2_5_VL, Sampled, init_weights, load_model, mrope_positions,
                   newest_checkpoint, read_config, save_model, write_config)
from rewards import (COLOURS, JUDGEMENT, LETTERS, PRICES, PROBLEM_TYPES, TOY_EVENTS, TOY_QUESTIONS, UNREADABLE, Claim,
                     Client, Journal, Judge, Parsed, Verdict, imap_unordered, local_llm, choice, language_judge,
                     matches_template, extract_tag, parse, rule_judge, server_address, task_metric, toy_answer, toy_asked)


def flag(default, help: str, choices: list[str] | None = None):
    """A setting with its reason: one line in the dataclass, one line in --help."""
    return field(default=default, metadata={"help": help} | ({"choices": choices} if choices else {}))


def add_flags(parser: argparse.ArgumentParser, cls, presets: dict[str, dict] = {}, names: Sequence[str] = ()) -> None:
    """Gives a parser a flag for every setting of a dataclass (or for some), None where it is not given."""
    for f in fields(cls):
        if names and f.name not in names:
            continue
        values = [f"{name} {row[f.name]}" for name, row in presets.items() if f.name in row]
        if (len(values) < len(presets) or not presets) and f.default != "":
            values.insert(0, f"default {f.default!r}" if presets else str(f.default))
        kind = type(f.default)
        how = ({"action": argparse.BooleanOptionalAction} if kind is bool else
               {"nargs": len(f.default), "type": type(f.default[0]), "metavar": "N"} if kind is tuple else
               {"choices": f.metadata["choices"]} if "choices" in f.metadata else
               {"type": kind, "metavar": kind.__name__.upper()})
        about = (f.metadata["help"] + (f" [{'; '.join(values)}]" if values else "")).replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, help=about, **how)


def given_flags(args: argparse.Namespace) -> dict:
    """The settings that were given, as a dataclass takes them."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if v is not None}


HTTP = ("http://", "https://")
FREE = ("out", "workers", "cache_gb", "judge_device", "concurrency", "timeout", "retries", "max_unknown")


def default_settings(settings) -> dict:
    return {f.name: f.default for f in fields(settings)}


def check_settings(folder: Path, settings: dict, defaults: dict, free: Sequence[str]) -> None:
    """Writes settings.json. SystemExit, with the difference, if the folder holds work with other settings."""
    file, now = folder / "settings.json", json.loads(json.dumps(settings))
    if file.is_file():
        try:
            before = dict(json.loads(file.read_text()))
        except (ValueError, TypeError):
            raise SystemExit(f"{file} is damaged: use another --out, or remove the folder") from None
        refuse_changes(folder, before, now, defaults, free)
        if before == now:                                    # a finished run may lie on a read-only disk
            return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(now, indent=2) + "\n")


def refuse_changes(where: Path, before: dict, now: dict, defaults: dict, free: Sequence[str]) -> None:
    """SystemExit with the difference between earlier settings and those of now. A setting that `before` lacks counts
    as its default. Those in FREE and `free`, and the address of a server, may change."""
    before, changed = json.loads(json.dumps(defaults)) | before, []
    for name, value in now.items():
        moved = str(value).startswith(HTTP) and str(before.get(name)).startswith(HTTP)
        if before.get(name) != value and not moved and name not in (*FREE, *free):
            changed.append(f"  --{name.replace('_', '-')} was {before.get(name)!r}, is now {value!r}")
    if changed:
        raise SystemExit("\n".join([f"{where} holds work with other settings:", *changed, "Use the old settings to "
                                    "continue it, another --out to begin anew, or remove the folder."]))


def write_atomically(file: Path, text: str) -> None:
    """Writes a file aside and renames it: it is there whole or not at all."""
    aside = file.with_name(file.name + ".writing")
    aside.write_text(text)
    os.replace(aside, file)


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of a table, a rule below the first; the first column to the left, the others to the
    right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    head, *lines = ["  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))]).rstrip()
                    for row in rows]
    return [head, "─" * max(map(len, (head, *lines))), *lines]


def check_minimum(settings, **least: int) -> None:
    """SystemExit for a setting that would make a run senseless."""
    for name, value in least.items():
        if not getattr(settings, name) >= value:             # NaN is not
            raise SystemExit(f"--{name.replace('_', '-')} must be at least {value}")


@dataclass(frozen=True)
class InputSettings:
    """How media and prompts become model inputs. Every script has these; SFT, RL and evaluation must agree on them."""
    frames: int = flag(16, "most frames taken from a video, always with its first and last (even)")
    fps: float = flag(2.0, "frames taken per second of video, as far as --frames allows; 0: always --frames")
    min_pixels: int = flag(128 * 28 * 28, "smaller frames are scaled up to about this many pixels")
    max_pixels: int = flag(128 * 28 * 28, "larger frames are scaled down to at most this many pixels")
    image_max_pixels: int = flag(1024 * 28 * 28, "the same limit for images, which have a budget of their own")
    max_prompt: int = flag(8192, "prompts with more tokens are skipped and counted, never cut")
    prompt: str = flag("full", "full: explain the template in the prompt; short: leave that to SFT; direct: question "
                       "and options alone", ["full", "short", "direct"])
    template: str = flag("p2r", "p2r: observation, think, answer; think: think, answer (process-agnostic baseline)",
                         ["p2r", "think"])
    workers: int = flag(2, "threads that read media ahead of the model")
    cache_gb: float = flag(0.5, "host memory in which decoded media are kept for the next epoch")

    def __post_init__(self):
        check_minimum(self, frames=2, fps=0, min_pixels=0, max_pixels=28 * 28, image_max_pixels=28 * 28, max_prompt=1)


TOY_INPUT = dict(prompt="short", frames=6, min_pixels=28 * 28, max_pixels=28 * 28)          # what the toy world needs


# ------------------------------------------------------------------------------------------------ media

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])     # of the official preprocessor_config.json
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
PATCH, STEP, MERGE = 14, 2, 2                                # pixels, frames in a grid step, patches merged per side
MIN_FRAMES = 4
SEAL = 84                                                    # where write_avi puts a checksum: AVI leaves it free
MAX_UNREADABLE = 0.2                                              # share of unreadable media at which a run stops


class MediaError(Exception):
    """A file that is missing or cannot be decoded: the record is skipped."""


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen's rule: both sides multiples of 28, the area between the limits, the ratio kept as well as that allows."""
    unit = PATCH * MERGE
    if max(height, width) > 200 * min(height, width):
        raise MediaError(f"{width}×{height} pixels are too narrow: sides may differ by a factor of 200 at most")
    h, w = max(unit, round(height / unit) * unit), max(unit, round(width / unit) * unit)
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(unit, math.floor(side / scale / unit) * unit) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / unit) * unit for side in (height, width))
    return h, w


def frame_indices(total: int, fps: float, settings: InputSettings) -> list[int]:
    """Which frames of a clip are taken: an even number, evenly spread, the first and the last always among them.

    As the paper's base recipe: `settings.fps` a second, clamped to 4 … `settings.frames`, so a short clip gives fewer.
    Seconds per grid step then are 2 · total / (fps · taken), as the official utility computes them.
    """
    by_rate = round(total / fps * settings.fps) if settings.fps else settings.frames
    wanted = min(settings.frames, max(MIN_FRAMES, by_rate), total)
    return np.linspace(0, total - 1, max(STEP, wanted // STEP * STEP)).round().astype(int).tolist()


def clip_bounds(total: int, fps: float, bounds: tuple[float, float] | None, number: int = 0) -> tuple[int, int]:
    """The first frame between two times in seconds, and how many there are. `number` is the first frame's own."""
    if bounds is None:
        return 0, total
    first, last = (min(max(round(seconds * fps) - number, 0), total - 1) for seconds in bounds)
    return first, max(first, last) - first + 1


def read_video(path: Path, settings: InputSettings, bounds: tuple[float, float] | None = None, rate: float = 0.0
               ) -> tuple[np.ndarray, float]:
    """Frames (N, height, width, 3) uint8 and seconds per grid step, of a video file or of a folder of frames (at `rate`
    a second), whole or between two times in seconds."""
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")),
                       key=lambda f: (len(f.name), f.name))                   # 2.png comes before 10.png
        if not files:
            raise MediaError("the folder holds no frames")
        fps = rate or settings.fps or 2.0
        first, total = clip_bounds(len(files), fps, bounds, number=1)              # 00001.jpg is the first
        chosen = frame_indices(total, fps, settings)
        frames = [read_image(files[first + i]) for i in chosen]
        if len({f.shape for f in frames}) > 1:
            raise MediaError("the folder's frames differ in size")
        return np.concatenate(frames), STEP * total / (fps * len(chosen))
    try:
        import decord  # opened, read and dropped inside this function: a reader shared between threads hangs
    except ImportError:
        raise SystemExit("decord is missing: pip install -r requirements.txt (no wheel for ARM Linux: build it there)")
    check_whole(path)
    opened = lambda: decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)  # no stand-ins
    try:
        reader = opened()
        total, fps = len(reader), float(reader.get_avg_fps())
        times = reader.get_frame_timestamp(range(total))[:, 0]
        hidden = int(((-1e6 < times) & (times < 0)).sum())   # frames that a cut has left before the start; none: -9e17
        if total <= hidden or not 0 < fps < math.inf:
            raise MediaError(f"it claims {total - hidden} frames at {fps} a second")
        first, total = clip_bounds(total - hidden, fps, bounds)
        chosen = frame_indices(total, fps, settings)
        wanted = [first + i for i in chosen]
        try:                                                 # decord seeks by time and by key frame, and gets lost
            if hidden or (np.diff(times) <= 0).any() or list(reader.get_key_indices()[:1]) != [0]:
                raise decord.DECORDLimitReachedError         # where frames have no times, or were cut off
            frames = reader.get_batch([*wanted, len(reader) - 1]).asnumpy()[:-1]    # what a seek lost, misses there
        except decord.DECORDLimitReachedError:               # from front to back it is slower and never gets lost
            reader, shown = opened(), {}
            for i in range(wanted[-1] + 1):
                frame = reader.next()
                if i in wanted:
                    shown[i] = frame.asnumpy()
            frames = np.stack([shown[i] for i in wanted])
        return frames, STEP * total / (fps * len(chosen))
    except (RuntimeError, AssertionError, StopIteration, decord.DECORDError, decord.DECORDLimitReachedError) as error:
        said = str(error).strip() or "it ends early"
        raise MediaError(f"cannot be decoded: {said.splitlines()[-1][:200]}") from None


def check_whole(path: Path) -> None:
    """Raises MediaError for a file that is shorter than it says (a download that broke off would play, and end early)
    and for a clip of the toy world that is not as it was written."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise MediaError(f"cannot be read: {error}") from None
    with file:
        head, size = file.read(300), path.stat().st_size
        says, kind = 0, head[:4]
        if kind == b"RIFF":
            says = int.from_bytes(head[4:8], "little") % 0xFFFFFFFF           # some writers count these 8 bytes, too
        elif kind == b"\x1a\x45\xdf\xa3" and 0 <= (at := head.find(b"\x18\x53\x80\x67")) < 280:   # Matroska, WebM
            bits = 7 * (length := 9 - head[at + 4].bit_length())
            says = int.from_bytes(head[at + 4:at + 4 + length], "big") & (1 << bits) - 1
            says = 0 if says == (1 << bits) - 1 else says    # all ones: recorded live, nobody knew
        seal = int.from_bytes(head[SEAL:SEAL + 4], "little") if b"MPNG" in head else 0
        if says > size or seal and seal != zlib.crc32(head[:SEAL] + head[SEAL + 4:] + file.read()):
            raise MediaError(f"damaged: it is {'shorter than it says' if says > size else 'not as it was written'}")


def read_image(path: Path) -> np.ndarray:
    """(1, height, width, 3) uint8"""
    try:
        with Image.open(path) as image:
            if image.has_transparency_data:                                   # on white, as the official utility does
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))[None]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"cannot be decoded: {error}") from None


def resize(frames: np.ndarray, min_pixels: int, max_pixels: int) -> np.ndarray:
    """Frames (N, height, width, 3) uint8 in the size that the model sees."""
    h, w = smart_resize(*frames.shape[1:3], min_pixels, max_pixels)
    if (h, w) == frames.shape[1:3]:
        return frames
    return np.stack([np.asarray(Image.fromarray(f).resize((w, h), Image.Resampling.BICUBIC)) for f in frames])


def patchify(frames: np.ndarray, min_pixels: int, max_pixels: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Resizes, normalises and cuts frames (N, height, width, 3) into the order the vision tower expects.

    Returns patches (S, 3·2·14·14) and their grid (steps, rows, columns). The four patches that will be merged are
    neighbours; a patch holds colour, then two frames, then rows and columns of pixels.
    """
    frames = resize(frames, min_pixels, max_pixels)
    h, w = frames.shape[1:3]
    x = (torch.from_numpy(frames.copy()).float() / 255 - MEAN) / STD          # (N, h, w, 3)
    if len(x) % STEP:
        x = torch.cat([x, x[-1:]])                                            # an image is its own second frame
    t, rows, columns = len(x) // STEP, h // PATCH, w // PATCH
    x = x.view(t, STEP, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    # grid step, merged row, merged column, then the patch in it by row and column, then colour, frame, row, column
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * rows * columns, -1), (t, rows, columns)


# ------------------------------------------------------------------------------------------------ records

@dataclass(frozen=True)
class Record:
    """One question, checked. `reference` is the content of `solution`'s answer tag, or all of it."""
    problem_id: str
    question: str
    options: tuple[str, ...]
    problem_type: str
    reference: str
    path: str                                                # relative to the media root
    data_type: str                                           # image or video
    observation: str = ""                                    # the trace, only in SFT files
    think: str = ""
    data_source: str = ""                                    # where the question comes from
    blind: bool = False                                      # read without its medium
    given: str | None = None                                 # an observation that the answer begins with
    bounds: tuple[float, float] | None = None                # seconds of the video that are meant; None: all of it
    rate: float = 0.0                                        # frames a second in a folder of frames; 0: unknown


def read_records(file: str | Path, traces: bool = False) -> list[Record]:
    """Reads a record file: a JSON list or JSON lines, gzip or plain. `traces`: observation and process are needed too.

    Raises ValueError with the file and the record's number for anything that is not as it should be.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    raw = file.read_bytes()
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, gzip.zlib.error) as error:
        raise ValueError(f"{file}: neither text nor whole gzip: {error}") from None
    once = lambda pairs: found if len(found := dict(pairs)) == len(pairs) else pairs      # which of two would count?
    if text.lstrip().startswith("["):
        try:
            rows = list(enumerate(json.loads(text, object_pairs_hook=once), start=1))
        except (ValueError, RecursionError) as error:        # a number of 5,000 digits is a bare ValueError
            raise ValueError(f"{file}: not JSON: {error}") from None
    else:
        rows = []
        for n, line in enumerate(text.split("\n"), start=1):       # splitlines also cuts at U+2028, inside a text
            try:
                rows += [(n, json.loads(line, object_pairs_hook=once))] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {n}: not JSON: {error}") from None
    if not rows:
        raise ValueError(f"{file}: holds no records")
    records = []
    for n, row in rows:
        try:
            records.append(to_record(row, traces))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file}, record {n}: {error}") from None
    return records


def to_record(row: dict, traces: bool) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"is a {type(row).__name__}, not an object with each key once")
    json.dumps(row, ensure_ascii=False).encode()             # half a character (ValueError) could not be written
    needed = ["problem", "problem_type", "solution", "path", "data_type"] + ["observation", "process"] * traces
    if missing := [name for name in needed if row.get(name) is None or not str(row[name]).strip()]:   # 0 is a solution
        raise ValueError(f"lacks {', '.join(missing)}")
    if wrong := [name for name in ("problem", "path", "observation", "process")
                 if not isinstance(row.get(name), str | None)]:
        raise ValueError(f"{' and '.join(wrong)}: not a text")
    if row["problem_type"] not in PROBLEM_TYPES:
        raise ValueError(f"unknown problem_type {row['problem_type']!r}; known are {', '.join(PROBLEM_TYPES)}")
    if row["data_type"] not in ("image", "video"):
        raise ValueError(f"data_type is {row['data_type']!r}, not image or video")
    options = [] if row.get("options") in (None, "") else row["options"]
    if isinstance(options, str):                             # the RL file of the release holds every value as a string
        try:
            options = ast.literal_eval(options)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            options = None
    if not isinstance(options, (list, tuple)) or not all(isinstance(o, str) for o in options):
        raise ValueError(f"options are no list of texts: {row['options']!r:.80}")
    kind = type(row["solution"])
    if kind not in (str, int, float) or kind is float and not math.isfinite(row["solution"]):   # Python's JSON has NaN
        raise ValueError(f"solution is neither a text nor a number: {row['solution']!r:.80}")
    reference = extract_tag("answer", str(row["solution"]))
    if reference is None:
        reference = str(row["solution"]).strip()
    if not reference or "<answer>" in reference or "</answer>" in reference:
        raise ValueError(f"solution holds no answer, or several: {row['solution']!r:.80}")
    if row["problem_type"] == "multiple choice" and options and len(options) < 2:
        raise ValueError("a multiple choice with one option")
    bare = lambda tag, text: extract_tag(tag, text) if matches_template(text, tag) else text.strip()
    return Record(str(row.get("problem_id", "")), row["problem"], tuple(options), row["problem_type"], reference,
                  row["path"], row["data_type"], bare("observation", str(row.get("observation") or "")),
                  bare("think", str(row.get("process") or "")), str(row.get("data_source") or ""))


def to_row(r: Record) -> dict:
    """A record as the release writes it."""
    return dict(problem_id=r.problem_id, problem=r.question, options=list(r.options), problem_type=r.problem_type,
                solution=f"<answer>{r.reference}</answer>", answer=r.reference, path=r.path, data_type=r.data_type,
                data_source=r.data_source, observation=r.observation, process=r.think)


def write_rows(file: Path, rows: Iterable[dict]) -> None:
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))


def media_path(root: Path, path: str) -> Path:
    """Where a record's file lies under the media root. A path that would leave the root is refused."""
    try:
        full = (root / path).resolve()
        inside, there = full.is_relative_to(root.resolve()), full.is_file() or full.is_dir()      # a pipe never ends
    except (OSError, ValueError, RuntimeError) as error:     # a name too long, a zero byte in it, a link to itself
        raise MediaError(f"no file can have this path: {error}") from None
    if not inside:
        raise MediaError("its path, or a link on it, leads out of the media folder")
    if not there:
        raise MediaError("no such file")
    return full


def read_media(r: Record, root: Path, settings: InputSettings) -> tuple[np.ndarray, float, int]:
    """A record's frames, seconds per grid step (0 for an image), and most pixels of a frame. Raises MediaError."""
    path = media_path(root, r.path)
    return (*read_video(path, settings, r.bounds, r.rate), settings.max_pixels) if r.data_type == "video" else (
        read_image(path), 0.0, settings.image_max_pixels)


# ------------------------------------------------------------------------------------------------ prompts

PARTS = {
    "p2r": """Answer in three parts, in this order and with exactly these tags:
<observation>Start with "Based on the question, I need to notice", name what matters for the question, then write down \
what the {medium} shows of it: so completely that somebody who cannot see the {medium} could answer from this part \
alone. Draw no conclusions yet.</observation>
<think>Start with "Based on the observations,", then reason step by step, talking to yourself, and check the result \
before you wait_for_writer on it.</think>
<answer>The final answer and nothing else.</answer>""",
    "think": """Answer in two parts, in this order and with exactly these tags:
<think>Reason step by step about what the {medium} shows, talking to yourself, and check the result before you wait_for_writer \
on it.</think>
<answer>The final answer and nothing else.</answer>""",
}
TYPE_LINES = {
    "multiple choice": "Answer with the letter of the correct option.",
    "numerical": "Answer with one exact number.",
    "OCR": "Answer with the text that is written there.",
    "free-form": "Answer with one short sentence.",
    "regression": "Answer with one number, as close as you can.",
}


def instruction(record: Record, settings: InputSettings) -> str:
    """The user's text: question, options, what is expected. The same for data generation, SFT, RL and evaluation."""
    lines = [record.question]
    if record.options:
        lines += ["Options:"] + [o if o.lstrip("( ")[:1] == chr(65 + i) and o.lstrip("( ")[1:2] in ".):"
                                 else f"{chr(65 + i)}. {o}" for i, o in enumerate(record.options)]
    if settings.prompt == "full":
        lines.append(PARTS[settings.template].format(medium=record.data_type))
    return "\n".join(lines + [TYPE_LINES[record.problem_type]] * (settings.prompt != "direct"))


def observation_prefix(observation: str) -> str:
    return f"<observation> {observation} </observation>\n"


def trace_text(record: Record, template: str) -> str:
    """What SFT teaches the model to say. The baseline sees the same data without the observation segment; an
    observation that is given is not said again."""
    seen = "" if template == "think" or record.given is not None else observation_prefix(record.observation)
    return f"{seen}<think> {record.think} </think>\n<answer> {record.reference} </answer>"


def byte_characters() -> dict[int, str]:
    """Byte-level BPE writes each byte as one printable character: itself if it is printable, else one from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Vocabulary:
    """A tokenizer and what there is to know about it: bytes, stop tokens, and ids that may never be sampled."""

    def __init__(self, folder: str | Path):
        """Reads tokenizer.json of a checkpoint folder. Raises FileNotFoundError without one."""
        if not (Path(folder) / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        from transformers import PreTrainedTokenizerFast  # slow to import, and only needed here
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        added = {i: t.content for i, t in self.tokenizer.added_tokens_decoder.items()}
        pieces = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        to_byte = {char: byte for byte, char in byte_characters().items()}
        self.bytes = [added[i].encode() if i in added else bytes(to_byte[c] for c in piece)
                      for i, piece in enumerate(pieces)]
        self.id = {text: i for i, text in added.items()}
        self.stop_ids = [self.id["<|im_end|>"], self.id["<|endoftext|>"]]
        self.placeholders = [i for text, i in self.id.items() if any(w in text for w in ("vision", "image", "video"))]

    def encode(self, text: str) -> list[int]:
        """Plain text only: "<|im_end|>" in somebody's question stays text and cannot end the turn."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled tokens, from their bytes, without the stop token at the end."""
        ids = ids[:-1] if len(ids) and ids[-1] in self.stop_ids else ids
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", errors="replace")

    def mask_special_tokens(self, model: Qwen2_5_VL) -> Qwen2_5_VL:
        """Takes placeholders and the padded end of the vocabulary out of the model's distribution, on every path."""
        padding = range(len(self.bytes), model.config.vocab_size)
        model.masked_token_ids = torch.tensor([*self.placeholders, *padding], dtype=torch.long)
        return model


class Example(NamedTuple):
    """A record as the model gets it."""
    record: Record
    ids: Tensor                                              # (P,)
    positions: Tensor                                        # (3, P)
    next_position: int
    pixels: Tensor | None                                    # (S, 1176), None for text alone
    grid: tuple[int, int, int] | None
    seconds: float                                           # per grid step, 0 for an image


def chat(medium: list[int], text: str, v: Vocabulary, settings: InputSettings) -> list[int]:
    """Qwen's chat layout up to where the answer begins. The short prompt leaves out the system line as well."""
    start, end, newline = [v.id["<|im_start|>"]], [v.id["<|im_end|>"]], v.encode("\n")
    system = [*start, *v.encode("system\nYou are a helpful assistant."), *end, *newline]
    return [*system * (settings.prompt != "short"), *start, *v.encode("user\n"), *medium, *v.encode(text), *end,
            *newline, *start, *v.encode("assistant\n")]


@lru_cache(maxsize=4)                                        # benchmarks ask several questions about one clip in a row
def media_patches(medium: Record, root: Path, settings: InputSettings) -> tuple[Tensor, tuple[int, int, int], float]:
    """Patches, grid and seconds per grid step of a record's medium, whatever is asked about it. Raises MediaError."""
    frames, seconds, limit = read_media(medium, root, settings)
    return (*patchify(frames, min(settings.min_pixels, limit), limit), seconds)


def build_example(record: Record, root: Path, vocabulary: Vocabulary, config: Config, settings: InputSettings
                  ) -> Example:
    """Reads the medium and lays out the prompt as Qwen's chat template does, up to an observation that is given. Raises
    MediaError."""
    v, shown, pixels, grids, times = vocabulary, [], None, [], []
    if not record.blind:
        medium = Record("", "", (), "", "", record.path, record.data_type, bounds=record.bounds, rate=record.rate)
        pixels, grid, seconds = media_patches(medium, root, settings)
        grids, times = [grid], [seconds]
        pad = config.video_token_id if record.data_type == "video" else config.image_token_id
        shown = [v.id["<|vision_start|>"], *[pad] * (len(pixels) // MERGE ** 2), v.id["<|vision_end|>"]]
    begun = [] if record.given is None else v.encode(observation_prefix(record.given))
    ids = torch.tensor(chat(shown, instruction(record, settings), v, settings) + begun)
    return Example(record, ids, *mrope_positions(ids, grids, times, config), pixels, *(grids or [None]),
                   *(times or [0.0]))


def blank_example(vocabulary: Vocabulary, config: Config) -> Example:
    """A black picture and no question: keeps a rank that has nothing to do in step with the others."""
    ids = torch.tensor([vocabulary.id["<|vision_start|>"], config.image_token_id, vocabulary.id["<|vision_end|>"]])
    grid, pixels = (1, MERGE, MERGE), torch.zeros(MERGE ** 2, 3 * STEP * PATCH ** 2)
    record = Record("", "", (), "numerical", "0", "", "image")
    return Example(record, ids, *mrope_positions(ids, [grid], [0.0], config), pixels, grid, 0.0)


def why_invalid(r: Record) -> str:
    """Why nobody can learn from a record: even its own solution would not be right, or its trace breaks the rules."""
    if r.reference and task_metric(r.problem_type, r.reference, r.reference, r.options) < 1:
        return f"solution: {r.reference!r:.60} would itself score no full mark, as an option or a number would"
    taught = r.observation and r.think and r.given is None
    return "trace: it breaks the template" if taught and not all(parse(trace_text(r, "p2r"))[3:]) else ""


class Examples:
    """Records that turn into examples when asked for; what cannot is None, counted, and named in a log file."""

    def __init__(self, records: list[Record], root: str | Path, vocabulary: Vocabulary, config: Config,
                 settings: InputSettings, log: Path | None = None, max_unreadable: float = MAX_UNREADABLE, teaching: bool = True):
        """`teaching`: leave out what nobody could learn from. An evaluation asks whatever it is given."""
        self.records, self.root, self.vocabulary = records, Path(root), vocabulary
        self.config, self.settings, self.log, self.max_unreadable = config, settings, log, max_unreadable
        self.teaching = teaching
        self.asked, self.skipped = set(), {}                 # indices; index → reason
        self.kept, self.room = {}, settings.cache_gb * 2 ** 30                # index → example; bytes left for more
        self.lock = threading.Lock()                         # for what follows a read: the threads of `ahead` share it

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example | None:
        if i in self.kept or i in self.skipped:
            return self.kept.get(i)
        self.asked.add(i)
        if self.teaching and (reason := why_invalid(self.records[i])):
            return self.skip(i, reason)
        try:
            example = build_example(self.records[i], self.root, self.vocabulary, self.config, self.settings)
        except MediaError as error:
            return self.skip(i, f"media: {error}")
        if len(example.ids) > self.settings.max_prompt:
            return self.skip(i, f"prompt: {len(example.ids)} tokens, over --max-prompt {self.settings.max_prompt}")
        with self.lock:
            size = 0 if example.pixels is None else example.pixels.nbytes
            if i not in self.kept and size <= self.room:     # real clips fill this soon
                self.room -= size
                self.kept[i] = example
        return example

    def skip(self, i: int, reason: str) -> None:
        with self.lock:
            if self.log and i not in self.skipped:
                with self.log.open("a") as file:
                    file.write(f"{self.records[i].path}\t{reason}\n")
            self.skipped[i] = reason

    def check_losses(self) -> None:
        """Raises ValueError once more than `max_unreadable` of at least 20 records had to be skipped for their media."""
        with self.lock:
            lost = [i for i, reason in self.skipped.items() if reason.startswith("media")]
        if len(self.asked) >= min(20, len(self)) and len(lost) > self.max_unreadable * len(self.asked):
            example = self.records[lost[0]]
            raise ValueError(f"{len(lost)} of {len(self.asked)} media under {self.root} cannot be read, for example "
                             f"{example.path} ({self.skipped[lost[0]]}). Is this the right media folder? To train on "
                             f"the part that is there: `python data.py check FILE --media DIR --keep PART.jsonl`.")

    def prefetch(self, steps: Iterable[Sequence[int]]) -> Iterator[list[Example]]:
        """Yields the readable examples of each step's indices, while threads read the steps that follow."""
        with ThreadPoolExecutor(max(1, self.settings.workers)) as pool:
            waiting = deque()
            try:
                for indices in steps:
                    waiting.append([pool.submit(self.__getitem__, i) for i in indices])
                    if len(waiting) > 2:
                        yield self.ready(waiting.popleft())
                while waiting:
                    yield self.ready(waiting.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def ready(self, futures) -> list[Example]:
        found = [future.result() for future in futures]
        self.check_losses()
        return [example for example in found if example is not None]


def step_indices(count: int, size: int, step: int, seed: int) -> list[int]:
    """Which records step `step` uses: epoch after epoch, each a shuffle of its own. A pure function, so that a resumed
    run needs no saved sampler, and the order does not depend on the number of ranks."""
    places = range(step * size, (step + 1) * size)
    return [epoch_order(count, place // count, seed)[place % count] for place in places]


@lru_cache(maxsize=2)
def epoch_order(count: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def collate(examples: Sequence[Example]) -> Prompts:
    """Pads prompts at their ends and joins the media, in prompt order."""
    longest = max(len(e.ids) for e in examples)
    pad = lambda x: torch.nn.functional.pad(x, (0, longest - x.shape[-1]))
    pixels = [e.pixels for e in examples if e.pixels is not None]
    return Prompts(ids=torch.stack([pad(e.ids) for e in examples]),
                   lengths=torch.tensor([len(e.ids) for e in examples]),
                   positions=torch.stack([pad(e.positions) for e in examples], dim=1),
                   next_position=torch.tensor([e.next_position for e in examples]),
                   pixels=torch.cat(pixels) if pixels else None, grid=[e.grid for e in examples if e.grid])


# ------------------------------------------------------------------------------------------------ the toy world

TOY_SIZE, TOY_FPS = 56, 2                                    # pixels, frames a second; two frames for each letter
PAINT = {"red": (215, 50, 45), "green": (50, 170, 70), "blue": (55, 85, 220), "yellow": (220, 190, 40)}


def draw(colour: str, letter: str, rng: np.random.Generator) -> np.ndarray:
    """One frame (56, 56, 3) uint8: a letter somewhere near the middle, larger or smaller, brighter or darker, noisy."""
    y, x = np.mgrid[:TOY_SIZE, :TOY_SIZE] - TOY_SIZE / 2 - rng.uniform(-2, 2, (2, 1, 1))
    r, thick = rng.uniform(17, 20), rng.uniform(3.5, 4.5)
    ink = {"O": abs(np.hypot(x, y) - r + thick) < thick,
           "X": (abs(abs(x) - abs(y)) < 1.4 * thick) & (abs(x) < r) & (abs(y) < r),
           "T": (abs(y) < r) & (abs(x) < thick) | (abs(x) < r) & (abs(y + r - thick) < thick)}[letter]
    frame = np.where(ink[..., None], np.array(PAINT[colour]) * rng.uniform(0.75, 1.1), rng.uniform(20, 50))
    noise = rng.integers(-1, 2, (TOY_SIZE // 2, TOY_SIZE // 2)).repeat(2, 0).repeat(2, 1) * 16   # coarse: small files
    return (frame + noise[..., None]).clip(0, 255).astype(np.uint8)


def write_avi(path: Path, frames: np.ndarray, fps: int) -> None:
    """Writes frames (N, h, w, 3) as PNG pictures in an AVI file: lossless, and decord reads it back exactly."""
    chunk = lambda tag, body: tag + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    listed = lambda kind, body: chunk(b"LIST", kind + body)
    n, h, w, _ = frames.shape
    pictures = []
    for frame in frames:
        Image.fromarray(frame).save(buffer := io.BytesIO(), "PNG", compress_level=1)
        pictures.append(buffer.getvalue())
    largest = max(map(len, pictures))
    header = struct.pack("<14I", 1_000_000 // fps, largest * fps, 0, 0x10, n, 0, 1, largest, w, h, 0, 0, 0, 0)
    stream = struct.pack("<4s4sIHHIIIIIIIIHHHH", b"vids", b"MPNG", 0, 0, 0, 0, 1, fps, 0, n, largest, 0, 0, 0, 0, w, h)
    bitmap = struct.pack("<IiiHH4sIiiII", 40, w, h, 1, 24, b"MPNG", w * h * 3, 0, 0, 0, 0)
    at, index = 4, b""
    for picture in pictures:
        index += struct.pack("<4sIII", b"00dc", 0x10, at, len(picture))
        at += 8 + len(picture) + len(picture) % 2
    body = listed(b"hdrl", chunk(b"avih", header) + listed(b"strl", chunk(b"strh", stream) + chunk(b"strf", bitmap)))
    body += listed(b"movi", b"".join(chunk(b"00dc", p) for p in pictures)) + chunk(b"idx1", index)
    raw = chunk(b"RIFF", b"AVI " + body)
    path.write_bytes(raw[:SEAL] + struct.pack("<I", zlib.crc32(raw[:SEAL] + raw[SEAL + 4:])) + raw[SEAL + 4:])


def toy_observation(shown: list[str]) -> str:
    return ", ".join(f"{i} {x}" for i, x in enumerate(shown, start=1))


def toy_think(problem_type: str, asked: str, options: Sequence[str], shown: list[str]) -> str:
    """Reasoning in steps that can be taken one at a time: a small model learns to walk, not to jump to a result.

    Every comparison reads the same, "green red? no": one skill, practised by three types of problem.
    """
    compare = lambda x, y: f"{x} {y}? {'yes' if x == y else 'no'}"
    colours = [x.split()[0] for x in shown]
    if problem_type == "multiple choice":
        at = shown.index(asked) + 1
        steps = [f"{x} {'yes' if x == asked else 'no'}" for x in shown[:at]] + [f"next {shown[at]}"]
        for letter, option in zip("ABC", options):
            steps.append(f"{letter} {option} {'yes' if option == shown[at] else 'no'}")
            if option == shown[at]:
                break
    elif problem_type == "numerical":
        steps = [f"{compare(c, asked)} {colours[:i].count(asked)}" for i, c in enumerate(colours, start=1)]
    elif problem_type == "OCR":
        kept = lambda i: " ".join(x[-1] for x in shown[:i] if not x.startswith(asked))
        steps = [f"{x[-1]} {compare(c, asked)} {kept(i + 1)}".strip() for i, (x, c) in enumerate(zip(shown, colours))]
    elif problem_type == "free-form":
        steps = [f"first {shown[0]}", f"last {shown[-1]}"]
    else:
        steps = [f"{x} {sum(PRICES[y[-1]] for y in shown[:i])}" for i, x in enumerate(shown, start=1)]
    return ", ".join(steps)


# Half of the questions are multiple choice, as most of the paper's data are.
TOY_MIX = [t for other in PROBLEM_TYPES[1:] for t in (PROBLEM_TYPES[0], other)]


def toy_record(rng: random.Random, number: int, split: str) -> tuple[dict, list[str]]:
    """A question about three letters, with its answer and a faultless trace. Returns the record and what is shown."""
    problem_type = TOY_MIX[number % len(TOY_MIX)]
    everything = [f"{c} {l}" for c in COLOURS for l in LETTERS]
    while True:
        shown = [rng.choice(everything) for _ in range(TOY_EVENTS)]
        asked, options = rng.choice(shown).split()[0], []
        if problem_type == "multiple choice":
            asked, right = rng.choice([shown[:2], shown[1:]])
            options = rng.sample([x for x in everything if x != right], 2)
            options.insert(rng.randrange(3), right)
        question = TOY_QUESTIONS[problem_type].format(asked)
        lettered = [f"{letter}. {x}" for letter, x in zip("ABC", options)]
        answer = toy_answer(problem_type, question, lettered, shown)
        if answer is not None:                               # for some draws a question has no answer: draw again
            break
    return {"problem_id": f"{split}-{number}", "problem": question, "options": lettered, "data_type": "video",
            "problem_type": problem_type, "solution": f"<answer>{answer}</answer>", "answer": answer,
            "path": f"./{split}/{number:05d}.avi", "data_source": "toy",
            "observation": toy_observation(shown),
            "process": toy_think(problem_type, asked, options, shown)}, shown


TOY_SPLITS = {"sft": 1000, "rl": 3000, "heldout": 512}


def make_toy(folder: str | Path, splits: dict[str, int] = TOY_SPLITS, seed: int = 0) -> Path:
    """Writes the toy world: clips and `<split>.json`, unless it is there already. Every clip has a seed of its own,
    made of the split's name and its number, so that no held-out clip is ever a training clip."""
    folder = Path(folder)
    there = {split: folder / f"{split}.json" for split in splits}
    if all(file.is_file() and len(json.loads(file.read_text())) == splits[split] for split, file in there.items()):
        return folder
    bar = tqdm(total=sum(splits.values()), desc="toy clips", unit="clip", file=sys.stderr)
    for split, count in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        records = []
        for number in range(count):
            rng = random.Random(f"{seed}/{split}/{number}")
            record, shown = toy_record(rng, number, split)
            noise = np.random.default_rng(rng.getrandbits(64))
            frames = [draw(*x.split(), noise) for x in shown for _ in range(2)]
            write_avi(folder / record["path"], np.stack(frames), TOY_FPS)
            records.append(record)
            bar.update()
        write_atomically(folder / f"{split}.json", json.dumps(records, indent=1))  # they appear when their clips are there
    bar.close()
    return folder


def make_toy_model(folder: str | Path, seed: int, config: Config = CONFIGS["tiny"]) -> None:
    """Writes a random tiny twin of Qwen2.5-VL with a byte-level tokenizer that holds the toy world's words whole."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    cut = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?</?[a-z]+>\n?| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    rng = random.Random(0)
    rows = [toy_record(rng, n, "words")[0] for n in range(500)]
    texts = ["system\nYou are a helpful assistant.\n", "user\n", "assistant\n", "0123456789"]
    for record in (to_record(row, True) for row in rows):
        texts += [instruction(record, InputSettings(prompt="short")), trace_text(record, "p2r")]
    words = {piece for text in texts for piece, _ in cut.pre_tokenize_str(text)}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                "<|image_pad|>", "<|video_pad|>"]
    pieces = specials + sorted(byte_characters().values()) + sorted(w for w in words if len(w) > 1)
    # ignore_merges: a piece that stands in the vocabulary is one token, anything else falls apart into bytes.
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    model = init_weights(Qwen2_5_VL(config), seed)
    assert len(pieces) <= model.config.vocab_size

    def write_extra(where: Path) -> None:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
                                ).save_pretrained(str(where))
        write_config(model.config, where, stop_ids=[2, 0])

    save_model(dict(model.named_parameters()), folder, write_extra=write_extra)


# ------------------------------------------------------------------------------------------------ judges and teachers

@dataclass(frozen=True)
class JudgeSettings:
    """Who judges observations, in the data pipeline and in RL, and how patient requests over http are."""
    judge: str = flag("rule", "who decides whether an observation suffices: rule (the toy world's own), reference (the "
                      "KL reference answers from the observation alone), a folder with a language model, or an address "
                      "http(s)://…/v1")
    judge_model: str = flag("", "name of the model behind an http judge, whose key comes from the environment variable "
                            "JUDGE_API_KEY; for `data.py cot --judge reference` the checkpoint that answers")
    judge_device: str = flag("", "where a judge from a folder runs, such as cuda:1, for all ranks; default: where the "
                             "rank runs")
    judge_tokens: int = flag(512, "most tokens of a judge's reply; one that thinks aloud needs more")
    refuse_leaks: bool = flag(True, "an observation that is nothing but an answer is insufficient, whatever a judge "
                              "might say; --no-refuse-leaks leaves it to the judge, as the paper does")
    concurrency: int = flag(64, "most requests over http under way at once, for each rank")
    timeout: float = flag(60.0, "seconds that one request may take")
    retries: int = flag(5, "further tries of a request that failed: 1, 2, 4 … seconds apart, or as the server asks")
    max_unknown: float = flag(0.2, "largest share of verdicts, or of a teacher's traces, that may be missing; above it "
                              "the run stops")

    def __post_init__(self):
        check_minimum(self, concurrency=1, retries=0, timeout=0.01, max_unknown=0, judge_tokens=1)
        self.need("judge", ("rule", "reference"))

    def need(self, name: str, words: tuple[str, ...]) -> None:
        """SystemExit for a judge or teacher that is none, before anything is computed or written."""
        value, option = getattr(self, name), f"--{name}"
        if value.startswith(HTTP):
            try:
                server_address(value)
            except ValueError as error:
                raise SystemExit(f"{option}: {error}") from None
            if not getattr(self, name + "_model"):
                raise SystemExit(f"{option} {value} needs {option}-model: a server knows its models by name")
        elif value not in words and not Path(value).is_dir():
            raise SystemExit(f"{option} {value}: neither {', '.join(words)}, a folder that is there, nor an address "
                             f"http(s)://…/v1")


def key_from(variable: str) -> str:
    """An API key from the environment, the only place it may come from. ValueError for a broken one, without it."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{variable} holds characters that no key can have")
    return key


def make_judge(s: JudgeSettings, cache: Path | None = None,
               reference: Callable[[list[Claim]], list[Verdict]] | None = None, device: str = "") -> Judge:
    """The judge that --judge names. `cache` is a file for replies over http; `reference` answers blind."""
    if s.judge in ("rule", "reference"):
        return Judge(rule_judge if s.judge == "rule" else reference, s.refuse_leaks)
    if s.judge.startswith(HTTP):
        client = Client(s.judge, s.judge_model, key_from("JUDGE_API_KEY"), s.concurrency, s.timeout, s.retries, cache,
                        dict(max_tokens=s.judge_tokens, temperature=0), keep=JUDGEMENT.search)
        return Judge(language_judge(client.ask_all), s.refuse_leaks, background=True, counts=client.counts)
    device = s.judge_device or device or ("cuda" if torch.cuda.is_available() else "cpu")
    # On the CPU its threads and those of training would only wait for each other.
    speaker = local_llm(s.judge, device, s.judge_tokens)
    return Judge(language_judge(speaker), s.refuse_leaks, background=device != "cpu")


def question_uniforms(seed: int, stream: str, r: Record, group: int, tokens: int) -> Tensor:
    """The random numbers of a question's responses, (G, T). They belong to the seed, the step and the question, not to
    a process: any number of ranks draws the same ones."""
    key = f"{seed}/{stream}/{r.problem_id}/{r.path}/{r.question}".encode()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)
    return torch.rand(group, tokens, generator=generator)


THRESHOLD = 0.6                                              # a score from which an answer counts as reached (paper)


def blind_answers(model: Qwen2_5_VL, vocabulary: Vocabulary, claims: list[Claim], settings: InputSettings, tokens: int,
                  batch: int, device) -> list[Verdict]:
    """Judging by answering: the model gets question and observation without the media, finishes think and answer
    greedily, and the task metric says whether it got there (0.6, the threshold of the data pipeline).

    The paper asks a large language model instead. This needs no second model and has no verdict that could be faked;
    in return weak reasoning of the model is blamed on the observation, and an observation that merely states the answer
    passes, unless it is caught as a leak.
    """
    verdicts = []
    for i in range(0, len(claims), batch):
        some = claims[i:i + batch]
        records = [Record("", c.question, c.options, c.problem_type, c.reference, "", c.data_type, blind=True,
                          given=c.observation) for c in some]
        prompts = collate([build_example(r, Path(), vocabulary, model.config, settings) for r in records]).to(device)
        out = model.generate(prompts, torch.zeros(len(some), 1, tokens), vocabulary.stop_ids, temperature=0.0)
        for c, text in zip(some, first_texts(out, vocabulary)):
            score = task_metric(c.problem_type, parse(text).answer, c.reference, c.options)
            said = " ".join(text.split())
            verdicts.append(Verdict(score >= THRESHOLD, f"answering blind: {said} (score {score:.2f})"))
    return verdicts


def first_texts(out: Sampled, vocabulary: Vocabulary) -> list[str]:
    """The text of each prompt's first response."""
    return [vocabulary.decode(ids[:n]) for ids, n in zip(out.tokens[:, 0].tolist(), out.lengths[:, 0].tolist())]


class Draft(NamedTuple):
    """What a teacher made of a record. No output: it is tried again when the pipeline is run again."""
    output: str | None
    error: str = ""                                          # why there is none
    mistakes: tuple[str, ...] = ()                           # that the scripted teacher made on purpose


def api_teacher(s: "CotSettings") -> Callable[[list[Record]], list[Draft]]:
    """Any server that speaks OpenAI's protocol and takes pictures: frames go as data URLs, in the size set here."""
    client = Client(s.teacher, s.teacher_model, key_from("TEACHER_API_KEY"), s.concurrency, s.timeout, s.retries,
                    body=dict(max_tokens=s.max_response, temperature=s.temperature, seed=s.seed))

    def teach(records: list[Record]) -> list[Draft]:
        (record,) = records
        try:
            frames, _, limit = read_media(record, Path(s.media), s)
        except MediaError as error:
            return [Draft(None, f"media: {error}")]
        content = []
        for frame in resize(frames, min(s.min_pixels, limit), limit):
            Image.fromarray(frame).save(buffer := io.BytesIO(), "JPEG", quality=92)
            url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": instruction(record, s)})
        reply = client.ask([{"role": "user", "content": content}])
        return [Draft(reply.text, reply.error)]
    return teach


def local_teacher(s: "CotSettings") -> Callable[[list[Record]], list[Draft]]:
    """A checkpoint of this project or of Qwen2.5-VL, through model.py."""
    vocabulary, model, device = load_local(s.teacher)

    def teach(records: list[Record]) -> list[Draft]:
        found = {}
        for i, record in enumerate(records):
            try:
                found[i] = build_example(record, Path(s.media), vocabulary, model.config, s)
            except MediaError as error:
                found[i] = Draft(None, f"media: {error}")
        ready = {i: e for i, e in found.items() if isinstance(e, Example)}
        if ready:
            uniforms = torch.stack([question_uniforms(s.seed, "teacher", e.record, 1, s.max_response)
                                    for e in ready.values()])
            out = model.generate(collate([*ready.values()]).to(device), uniforms, vocabulary.stop_ids, s.temperature)
            found |= zip(ready, map(Draft, first_texts(out, vocabulary)))
        return [found[i] for i in range(len(records))]
    return teach


def load_local(folder: str) -> tuple[Vocabulary, Qwen2_5_VL, str]:
    path, device = newest_checkpoint(folder), "cuda" if torch.cuda.is_available() else "cpu"
    vocabulary = Vocabulary(path)
    model = load_model(path, torch.bfloat16 if device == "cuda" else torch.float32, device)
    return vocabulary, vocabulary.mask_special_tokens(model), device


def toy_teacher(s: "CotSettings") -> Callable[[list[Record]], list[Draft]]:
    """The toy world's scripted teacher: knows what was shown, from the record, and makes mistakes at known rates.

    A mistake always matters: another answer would follow from what it saw, or its answer scores below the threshold.
    A mistake in perception leads to the right answer all the same with the rate `luck`: reasoning that belongs to
    what was shown, not to what was noted down. That is the trace which only step 3 can catch.
    """
    def misread(r: Record, shown: list[str], rng: random.Random, below: float) -> list[str]:
        while True:
            other = list(shown)
            for i in rng.sample(range(TOY_EVENTS), rng.randint(1, TOY_EVENTS)):
                other[i] = f"{rng.choice(COLOURS)} {rng.choice(LETTERS)}"
            answer = toy_answer(r.problem_type, r.question, r.options, other)
            if answer is not None and task_metric(r.problem_type, answer, r.reference, r.options) < below:
                return other

    def teach_one(r: Record) -> Draft:
        rng, mistakes = random.Random(f"{s.seed}/{r.problem_id}/{r.path}"), []
        if not r.observation:
            raise ValueError(f"the toy teacher learns what was shown from the record; {r.path} does not say it")
        seen = reasoned = shown = [item.partition(" ")[2] for item in r.observation.split(", ")]
        if toy_observation(shown) != r.observation or len(shown) != TOY_EVENTS:
            raise ValueError(f"{r.path}: {r.observation!r:.60} is no observation of the toy world")
        if rng.random() < s.perception_mistakes:
            mistakes.append("perception")
            seen = misread(r, shown, rng, below=1 - 1e-9)
            reasoned = shown if rng.random() < s.luck else seen
        if rng.random() < s.reasoning_mistakes:
            mistakes.append("reasoning")
            reasoned = misread(r, shown, rng, below=THRESHOLD)
        think = toy_think(r.problem_type, toy_asked(r.problem_type, r.question), [o[3:] for o in r.options], reasoned)
        answer = toy_answer(r.problem_type, r.question, r.options, reasoned)
        text = trace_text(replace(r, observation=toy_observation(seen), think=think, reference=answer), "p2r")
        if rng.random() < s.template_mistakes:
            mistakes.append("template")
            text = text[:rng.randrange(len(text))]           # cut off: no </answer>
        return Draft(text, mistakes=tuple(mistakes))
    return lambda records: [teach_one(r) for r in records]


# ------------------------------------------------------------------------------------------------ the data pipeline

@dataclass(frozen=True)
class CotSettings(InputSettings, JudgeSettings):
    """`python data.py cot`. Without --data: the toy world with its scripted teacher."""
    data: str = flag("", "record file with questions (toy: made when missing)")
    media: str = flag("", "folder to which the records' paths are relative [the folder of --data]")
    out: str = flag("", "folder for the work and for traces.jsonl [runs/cot; toy: runs/tiny/cot]")
    limit: int = flag(0, "only the first N records; 0: all")
    teacher: str = flag("toy", "who writes traces: toy (scripted), a checkpoint folder, or an address http(s)://…/v1")
    teacher_model: str = flag("", "name of the model behind an http teacher, whose key comes from TEACHER_API_KEY")
    temperature: float = flag(0.0, "of a teacher's sampling; 0 is greedy")
    max_response: int = flag(1024, "most tokens of a trace")
    batch: int = flag(16, "records that a local teacher, or the reference as judge, works on at once")
    seed: int = flag(0, "decides a teacher's sampling, and the scripted teacher's mistakes")
    perception_mistakes: float = flag(0.1, "share of the toy teacher's traces that note down other letters")
    luck: float = flag(0.5, "share of these whose answer is right all the same")
    reasoning_mistakes: float = flag(0.1, "share of its traces that reason to a wrong answer")
    template_mistakes: float = flag(0.02, "share of its traces that are cut off")

    def __post_init__(self):
        InputSettings.__post_init__(self)
        JudgeSettings.__post_init__(self)
        check_minimum(self, batch=1, max_response=1, limit=0, temperature=0, luck=0, perception_mistakes=0,
                 reasoning_mistakes=0, template_mistakes=0)
        self.need("teacher", ("toy",))
        if self.template != "p2r":
            raise SystemExit("--template think has no observation that could be judged: traces are made with p2r")
        if self.judge == "reference" and not self.judge_model:
            raise SystemExit("--judge reference needs --judge-model: the checkpoint folder that answers blind")


FEWEST_LOSSES = 20                                           # from here on their share counts


def run_resumable(items: dict[str, Any], make_worker: Callable[["CotSettings"], Callable[[list], Sequence]], who: str,
                 file: Path, what: str, s: "CotSettings") -> tuple[dict[str, dict], dict[str, str]]:
    """Does what is left to do, concurrently, and notes every finished item in an append-only file at once.

    items: key → what to work on. A worker takes a list of them (one, and many lists at a time, if `who` is a server)
    and returns named tuples whose `lost` says why there is no result. Returns key → result, and key → reason for what
    could not be done: that is not noted down, so that the next run tries it again. Raises ValueError once too large a
    share of it is lost.
    """
    journal = Journal(file)
    done = {row["key"]: row for row in journal.rows if row.get("key") in items}
    todo, lost, tried = [key for key in items if key not in done], {}, 0
    if not todo:
        return done, lost
    work, (threads, size) = make_worker(s), (s.concurrency, 1) if who.startswith(HTTP) else (1, s.batch)
    parts = (todo[i:i + size] for i in range(0, len(todo), size))
    with tqdm(total=len(items), initial=len(done), desc=what, unit="record") as bar:
        for keys, results in imap_unordered(lambda keys: work([items[k] for k in keys]), parts, threads):
            tried += len(keys)
            bar.update(len(keys))
            for key, result in zip(keys, results, strict=True):
                if result.error:
                    lost[key] = result.error
                else:
                    done[key] = {"key": key} | result._asdict()
                    journal.add(done[key])
            if len(lost) >= FEWEST_LOSSES and len(lost) > s.max_unknown * tried:
                (reason, n), = Counter(lost.values()).most_common(1)
                raise ValueError(f"{what}: {len(lost)} of {tried} records came to nothing, {n} of them because: "
                                 f"{reason}. {len(done)} are kept; the same command goes on from there.")
    return done, lost


def verify(record: Record, output: str) -> tuple[Parsed, float, str]:
    """Step 2: the parts of a trace, the score of its answer, and why it is dropped ("" if it is not)."""
    parsed = parse(output)
    score = task_metric(record.problem_type, parsed.answer, record.reference, record.options)
    if not (parsed.perception_format and parsed.reasoning_format):
        return parsed, score, "template broken"
    return parsed, score, "" if score >= THRESHOLD else "answer wrong"


STEPS = ("records", "generated", "template", "answer", "observation")         # what a record has come through
REASONS = {"media unreadable": "generated", "no reply from the teacher": "generated", "template broken": "template",
           "answer wrong": "answer", "observation insufficient": "observation", "verdict unreadable": "observation",
           "verdict missing": "observation"}                 # why it was dropped → which step it did not come through
UNFINISHED = ("media unreadable", "no reply from the teacher", "verdict unreadable", "verdict missing")


def cot(s: CotSettings) -> Path:
    """Makes process-aware traces in three steps (paper, stage 1), and returns the file that SFT reads.

    Everything lies in --out: 1-generated.jsonl and 3-judged.jsonl grow by a line for each finished record (step 2 is
    arithmetic and needs no file); traces.jsonl (kept) and dropped.jsonl (with reasons) are written at the end, in the
    order of the records. Killed at any moment and started again, it asks for what is missing and ends in the same
    files.
    """
    with lock_folder(Path(s.out)):
        return make_traces(replace(s, media=s.media or str(Path(s.data).parent)), Path(s.out))


@contextmanager
def lock_folder(folder: Path):
    """Two processes in one folder would ask, and pay, everything twice: SystemExit for the second one."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            import fcntl                                     # not on Windows
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError:
            raise SystemExit(f"Another process works in {folder}.") from None
        yield


def make_traces(s: CotSettings, folder: Path) -> Path:
    """The three steps, the files and the funnel."""
    records = {record_key(r): r for r in read_records(s.data)[:s.limit or None]}              # equal records are one
    if (s.judge == "rule" or s.teacher == "toy") and not is_toy(records.values()):
        raise SystemExit("The toy teacher and the rule judge know toy records only: give --teacher and --judge.")
    if s.judge.startswith(HTTP):                             # before a teacher is paid: can its traces be judged?
        key_from("JUDGE_API_KEY")
    elif s.judge == "reference":
        newest_checkpoint(s.judge_model)
    made, judged = folder / "1-generated.jsonl", folder / "3-judged.jsonl"    # what is not begun may still change
    check_settings(folder, asdict(s), default_settings(s), asdict(s) if not made.exists() else
                  ("limit", "batch") + ("judge", "judge_model") * (not judged.exists()))

    # Step 1, generate: a teacher writes a trace for every record.
    drafts, unanswered = run_resumable(records, make_teacher, s.teacher, made, "1 generate", s)
    why = {key: "media unreadable" if lost.startswith("media") else "no reply from the teacher"
           for key, lost in unanswered.items()}

    # Step 2, verify: the template, and the answer's score.
    traces = {key: verify(r, drafts[key]["output"]) for key, r in records.items() if key in drafts}
    why |= {key: reason for key, (_, _, reason) in traces.items() if reason}

    # Step 3, observation sufficiency: the judge reads nothing else, and equal claims once.
    claims = {key: claim_about(records[key], trace.observation) for key, (trace, _, reason) in traces.items()
              if not reason}
    verdicts, silent = run_resumable({hashed(claim): claim for claim in claims.values()}, make_cot_judge, s.judge,
                                    judged, "3 observation sufficiency", s)
    kept = {key for key, claim in claims.items() if verdicts.get(hashed(claim), {}).get("sufficient")}
    for key in claims.keys() - kept:
        lost = silent.get(hashed(claims[key]), "")
        why[key] = ("observation insufficient" if not lost else
                    "verdict unreadable" if lost == UNREADABLE else "verdict missing")

    def row(key: str) -> dict:
        parsed, score, _ = traces.get(key, (parse(""), 0.0, ""))
        trace = dict(observation=parsed.observation, process=parsed.think, output=drafts.get(key, {}).get("output"),
                     reward=score, select=key in kept)
        return to_row(records[key]) | trace | ({} if key in kept else {"reason": why[key]})
    write_rows(folder / "traces.jsonl", (row(key) for key in records if key in kept))
    write_rows(folder / "dropped.jsonl", (row(key) for key in records if key not in kept))
    print(funnel(records, why, {key: draft["mistakes"] for key, draft in drafts.items()}), flush=True)
    print(f"{folder / 'traces.jsonl'}: {len(kept)} traces for SFT")
    if unfinished := sum(reason in UNFINISHED for reason in why.values()):
        (cause, _), = Counter([*unanswered.values(), *silent.values()]).most_common(1)
        print(f"{unfinished} records are unfinished (most often: {cause}); the same command tries them again.")
    return folder / "traces.jsonl"


def hashed(something) -> str:
    """A name that stays the same from run to run."""
    return hashlib.sha256(json.dumps(something).encode()).hexdigest()[:20]


def record_key(r: Record) -> str:
    """Names a question by what it is, so that finished work is found again whatever else a file holds."""
    return hashed([r.problem_id, r.path, r.question, r.options, r.problem_type, r.reference])


def is_toy(records: Iterable[Record]) -> bool:
    return all(toy_asked(r.problem_type, r.question) is not None for r in records)


def claim_about(r: Record, observation: str) -> Claim:
    return Claim(r.question, r.options, r.problem_type, r.reference, observation, r.data_type)


def make_teacher(s: CotSettings) -> Callable[[list[Record]], list[Draft]]:
    """The teacher that --teacher names."""
    return (toy_teacher if s.teacher == "toy" else api_teacher if s.teacher.startswith(HTTP) else local_teacher)(s)


def make_cot_judge(s: CotSettings) -> Judge:
    """The judge that --judge names. The reference that answers blind is the checkpoint named by --judge-model."""
    reference = None
    if s.judge == "reference":
        vocabulary, model, device = load_local(s.judge_model)
        reference = lambda claims: blind_answers(model, vocabulary, claims, s, s.max_response, s.batch, device)
    return make_judge(s, reference=reference)


def funnel(records: dict[str, Record], why: dict[str, str], mistakes: dict[str, Sequence[str]]) -> str:
    """What came through each step, by medium and problem type; why the rest was dropped; and, where the teacher's
    mistakes are known, precision and recall of the steps that should have caught them."""
    reached = {key: STEPS.index(REASONS[why[key]]) if key in why else len(STEPS) for key in records}
    names = {key: f"{r.data_type}, {r.problem_type}" for key, r in records.items()}
    line = lambda name, cells: name.ljust(24) + "".join(f"{cell:>13}" for cell in cells)
    lines = ["Records that came through each step:", line("", [*STEPS, "kept"])]
    order = [f"{medium}, {kind}" for medium in ("image", "video") for kind in PROBLEM_TYPES]
    for name in [n for n in order if n in names.values()] + ["all"]:
        some = [reached[key] for key in records if name in ("all", names[key])]
        counts = [sum(n > i for n in some) for i in range(len(STEPS))]
        lines.append(line(name, [*counts, f"{counts[-1] / len(some):.1%}"]))
    for reason in dict.fromkeys(r for r in REASONS if r in why.values()):
        by_kind = Counter(names[key] for key, r in why.items() if r == reason)
        told = ", ".join(f"{n} {kind}" for kind, n in sorted(by_kind.items(), key=lambda x: (-x[1], x[0])))
        lines.append(f"Dropped, {reason}: {by_kind.total()} ({told})")

    made = lambda *kinds: {key for key, some in mistakes.items() if set(kinds) & set(some)}
    share = lambda part, whole: f"{len(part) / len(whole):.3f} ({len(part)} of {len(whole)})" if whole else "–"
    for name, met, wanted, blamed, reasons in (
            # A wrong look makes wrong answers too: step 2 is right to drop them.
            ("step 2 against mistakes in reasoning", 2, made("reasoning"), made("perception", "reasoning", "template"),
             ("template broken", "answer wrong")),
            ("step 3 against mistakes in perception", 4, made("perception"), made("perception"),
             ("observation insufficient",))):
        dropped = {key for key, reason in why.items() if reason in reasons}
        wanted = {key for key in wanted if reached[key] >= met and why.get(key) not in UNFINISHED}
        if any(mistakes.values()):
            lines.append(f"{name}: precision {share(dropped & blamed, dropped)}, "
                         f"recall {share(dropped & wanted, wanted)}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ command line

def quantiles(values: list[int]) -> str:
    found = np.quantile(values, [0, 0.5, 0.95, 1]).astype(int)
    return "  ".join(f"{name} {value}" for name, value in zip(("least", "median", "95 %", "most"), found))


def check(file: str, media: str, model: str | None, limit: int, keep: str | None, settings: InputSettings) -> bool:
    """Reads every record and its media, and prints what a run would meet. Returns False if a run would stop."""
    records = read_records(file)
    print(f"{file}: {len(records)} records, all well formed")
    for (data_type, problem_type), n in sorted(Counter((r.data_type, r.problem_type) for r in records).items()):
        print(f"  {n:8}  {data_type}, {problem_type}")
    traces = [r for r in records if r.observation and r.think]
    broken = [r for r in traces if not all(parse(trace_text(r, "p2r"))[3:])]
    wrong = [r for r in records if r.problem_type == "multiple choice" and choice(r.reference, r.options) is None]
    print(f"  {len(traces):8}  with a trace for SFT")
    for some, what in ((broken, "traces break the template"), (wrong, "solutions are none of their options")):
        if some:
            print(f"  {len(some):8}  {what}, such as problem {some[0].problem_id}: {some[0].reference!r:.60}")
    chosen = random.Random(0).sample(records, limit) if 0 < limit < len(records) else records
    tokens = (Vocabulary(model), read_config(model)) if model else None
    print("" if tokens else "Token lengths need a tokenizer: --model DIR\n", end="")
    prompts, responses, lost, kept = [], [], [], []

    def look(record: Record) -> int:                         # a length, not the clip: futures keep what they return
        if tokens:
            return len(build_example(record, Path(media), *tokens, settings).ids)
        path = media_path(Path(media), record.path)
        frames = read_video(path, settings)[0] if record.data_type == "video" else read_image(path)
        return sum(smart_resize(*frames.shape[1:3], settings.min_pixels, settings.max_pixels))

    with ThreadPoolExecutor(settings.workers) as pool:
        jobs = [pool.submit(look, r) for r in chosen]
        for record, job in tqdm(zip(chosen, jobs), total=len(chosen), desc="reading media", unit="record"):
            try:
                prompts.append(job.result())
                kept.append(record)
                if tokens and record.observation and record.think:
                    responses.append(len(tokens[0].encode(trace_text(record, settings.template))) + 1)
            except MediaError as error:
                lost.append((record, error))
    for record, error in lost[:20]:
        print(f"  {record.path}: {error}")
    print(f"{len(lost)} of {len(chosen)} media cannot be read" + (" (20 shown)" if len(lost) > 20 else ""))
    for name, lengths in (("prompt", prompts if tokens else []), ("trace", responses)):
        if lengths:
            print(f"tokens of a {name}:  {quantiles(lengths)}")
    if tokens and (too_long := sum(n > settings.max_prompt for n in prompts)):
        print(f"{too_long} prompts are longer than --max-prompt {settings.max_prompt}: they would be skipped")
    if keep:
        write_rows(Path(keep), map(to_row, kept))
        print(f"{keep}: the {len(kept)} records whose media can be read")
    stops = len(lost) > MAX_UNREADABLE * len(chosen)
    print("A run would stop: too many media are missing" * stops + "A run would start" * (not stops))
    return not stops


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the toy world")
    toy.add_argument("--out", default="runs/tiny/toy", help="folder [runs/tiny/toy]")
    for split, count in TOY_SPLITS.items():
        toy.add_argument(f"--{split}", type=int, default=count, help=f"clips for {split} [{count}]")
    checker = commands.add_parser("check", help="say what is wrong with a record file and its media")
    checker.add_argument("file", help="gzip JSON, JSON or JSON lines")
    checker.add_argument("--media", required=True, help="folder to which the records' paths are relative")
    checker.add_argument("--model", help="checkpoint folder whose tokenizer counts the tokens")
    checker.add_argument("--limit", type=int, default=0, help="read the media of N records only, drawn at random [all]")
    checker.add_argument("--keep", help="write the records whose media can be read to this file: a subset to train on")
    add_flags(checker, InputSettings, names=("frames", "max_pixels", "max_prompt", "workers"))
    maker = commands.add_parser("cot", help="make traces for SFT: generate, verify, judge", allow_abbrev=False,
                                description=inspect.cleandoc(cot.__doc__),
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(maker, CotSettings, names=[f.name for f in fields(CotSettings) if f.name not in
                                         ("workers", "cache_gb", "max_prompt", "template")])  # these mean nothing here
    given = given_flags(parser.parse_args(argv))
    command = given.pop("command")
    try:
        if command == "toy":
            print(make_toy(given["out"], {split: given[split] for split in TOY_SPLITS}))
        elif command == "check":
            names = ("file", "media", "model", "limit", "keep")
            settings = InputSettings(**{k: v for k, v in given.items() if k not in names})
            sys.exit(not check(*(given.get(name) for name in names), settings))
        else:
            toy = {} if "data" in given else {"out": "runs/tiny/cot"}
            if toy and not given.get("teacher", "").startswith(HTTP):         # a large teacher gets a large picture
                toy |= TOY_INPUT
            settings = CotSettings(**{"out": "runs/cot"} | toy | given)
            if toy:
                settings = replace(settings, data=str(make_toy(Path(settings.out).parent / "toy") / "sft.json"))
            if not cot(settings).stat().st_size:
                sys.exit("No trace was kept.")
    except (ValueError, OSError) as error:                   # a full disk, too, ends in a line
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. Finished work is kept; the same command goes on from there.")


if __name__ == "__main__":
    main()
