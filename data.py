"""From files to model inputs: media, records, prompts, examples; the toy world; the pipeline of traces for SFT.

    python data.py toy --out runs/tiny/toy            write the toy world: clips, training and held-out records
    python data.py check train.json --media DIR       say what a run would skip or refuse, before the run does
    python data.py cot                                traces for the toy world; for other questions: --data FILE
        --media DIR --teacher https://…/v1 --teacher-model NAME --judge https://…/v1 --judge-model NAME

A record whose media cannot be read is skipped and named; no other clip is substituted.
"""
import argparse
import ast
import base64
import errno
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import struct
import sys
import threading
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

# Before torch, which reads what model.py sets.
from model import (CONFIGS, Config, Prompts, Qwen2_5_VL, compute_dtype, init_weights, load_model, mrope_positions,
                   newest_checkpoint, read_config, save_model, write_config)
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import rewards
from rewards import (COLOURS, LETTERS, PROBLEM_TYPES, SEGMENTS, TAGS, TOY_EVENTS, TOY_QUESTIONS, Claim, Journal, Judge,
                     Verdict, extract_tag, matches_template, parse, read_toy, task_metric, toy_answer)

with suppress(AttributeError):                               # a notebook's output is none
    sys.stdout.reconfigure(errors="replace")                 # an old terminal lacks some characters of ours


def flag(default, help: str, choices: list[str] | None = None):
    """A setting, and its text in --help."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class InputSettings:
    """How media and prompts become model inputs: the same in SFT, RL and evaluation."""
    frames: int = flag(16, "maximum number of frames of a video, the first and the last among them")
    fps: float = flag(2.0, "frames per second of video, as far as --frames allows; 0: always --frames")
    min_pixels: int = flag(128 * 28 * 28, "smaller frames are scaled up to about this size")
    max_pixels: int = flag(128 * 28 * 28, "larger frames are scaled down to at most this size")
    image_max_pixels: int = flag(1024 * 28 * 28, "the same limit for images")
    max_prompt: int = flag(8192, "prompts with more tokens are skipped and counted, never cut")
    prompt: str = flag("full", "full: template; short: no template; direct: bare question", ["full", "short", "direct"])
    template: str = flag("p2r", "tags; p2r: observation, think, answer; think: think, answer; none: SFT on answers",
                         ["p2r", "think", "none"])
    workers: int = flag(2, "threads that read media ahead of the model")
    cache_gb: float = flag(0.5, "host memory in which decoded media are kept for the next epoch")

    def __post_init__(self):
        check_minimum(self, frames=2, fps=0, min_pixels=0, max_pixels=28 * 28, image_max_pixels=28 * 28, max_prompt=1)


# ------------------------------------------------------------------------------------------------ media

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])     # of the official preprocessor_config.json
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
PATCH, TEMPORAL_PATCH, MERGE = 14, 2, 2                      # pixels per side, frames, patches merged per side
MIN_FRAMES = 4
MAX_UNREADABLE = 0.2                                         # share of unreadable media above which a run stops


class MediaError(Exception):
    """A file that is missing or cannot be decoded: the record is skipped."""


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen's rule: multiples of 28, area within the limits, aspect ratio kept as far as possible, at most 200."""
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
    """An even number of frames, evenly spread from the first to the last, as qwen_vl_utils takes them."""
    wanted = int(total / fps * settings.fps) if settings.fps else settings.frames
    wanted = min(max(wanted, MIN_FRAMES), settings.frames, total) // TEMPORAL_PATCH * TEMPORAL_PATCH
    return np.linspace(0, total - 1, max(TEMPORAL_PATCH, wanted)).round().astype(int).tolist()


def read_video(path: Path, settings: InputSettings, bounds: tuple[float, float] | None = None, rate: float = 0.0
               ) -> tuple[np.ndarray, float]:
    """Frames (N, height, width, 3) uint8 and seconds per temporal patch of a file, or a folder with `rate` frames a
    second. `bounds`: start and end in seconds. Raises MediaError."""
    import decord                                            # not at the top: torch must be imported before it
    try:
        if folder := path.is_dir():
            files = [f for f in path.iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
            files.sort(key=lambda f: (len(f.name), f.name))  # 2.png before 10.png
            total, fps = len(files), rate or settings.fps or 2.0
        else:                                                # fault_tol: a frame that cannot be decoded is an error
            reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)
            total, fps = len(reader), float(reader.get_avg_fps())
        if not (total and 0 < fps < math.inf):
            raise MediaError(f"it holds {total} frames at {fps} a second")
        first, last = 0, total - 1
        if bounds:                                           # in a folder, 00001.jpg is the first
            first, last = (min(max(round(time * fps) - folder, 0), total - 1) for time in bounds)
        total = max(last - first, 0) + 1
        indices = [first + i for i in frame_indices(total, fps, settings)]
        if folder:
            frames = np.concatenate([read_image(files[i]) for i in indices])
        else:
            frames = reader.get_batch(indices).asnumpy()
    except (RuntimeError, ValueError, AssertionError, decord.DECORDError, decord.DECORDLimitReachedError) as error:
        reason = (str(error).strip() or "it ends early").splitlines()[-1][:200]
        if "cannot find video stream" in reason:
            reason = "no video, or a codec that decord lacks, such as AV1: convert it to H.264"
        raise MediaError(f"cannot be decoded: {reason}") from None
    return frames, TEMPORAL_PATCH * total / (fps * len(indices))


def read_image(path: Path) -> np.ndarray:
    """(1, height, width, 3) uint8. Raises MediaError."""
    try:
        with Image.open(path) as image:
            if image.has_transparency_data:                  # on white, as the official utility does
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))[None]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"cannot be decoded: {error}") from None


def resize(frames: np.ndarray, min_pixels: int, max_pixels: int) -> np.ndarray:
    h, w = smart_resize(*frames.shape[1:3], min_pixels, max_pixels)
    return np.stack([np.asarray(Image.fromarray(f).resize((w, h), Image.Resampling.BICUBIC)) for f in frames])


def patchify(frames: np.ndarray, min_pixels: int, max_pixels: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames (N, height, width, 3) uint8 → patches (S, 3·2·14·14), resized, normalized, in the vision tower's order,
    and their grid (temporal patches, rows, columns). The four patches that will be merged are neighbours."""
    frames = resize(frames, min_pixels, max_pixels)
    h, w = frames.shape[1:3]
    x = (torch.from_numpy(frames.copy()).float() / 255 - MEAN) / STD          # (N, h, w, 3)
    if len(x) % TEMPORAL_PATCH:
        x = torch.cat([x, x[-1:]])                           # an image fills its temporal patch twice
    t, rows, columns = len(x) // TEMPORAL_PATCH, h // PATCH, w // PATCH
    x = x.view(t, TEMPORAL_PATCH, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    # temporal patch, merged row, merged column, then the patch in it by row and column, then colour, frame, row, column
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * rows * columns, -1), (t, rows, columns)


# ------------------------------------------------------------------------------------------------ records

TRACE_TAGS = [tag for tag in TAGS if tag != "answer"]         # what SFT trains apart from the answer
TRACE_FIELDS = {tag: "process" if tag == "think" else tag for tag in TRACE_TAGS}     # their names in record files


@dataclass(frozen=True)
class Record:
    """One checked question. `reference` is the content of `solution`'s answer tag, or all of it."""
    problem_id: str
    question: str
    options: tuple[str, ...]
    problem_type: str
    reference: str
    path: str                                                # relative to the media root
    data_type: str                                           # image or video
    trace: dict[str, str] = field(default_factory=dict, hash=False)           # tag → text, only in SFT files
    data_source: str = ""                                    # where the question comes from
    blind: bool = False                                      # the model does not see the medium
    given: str | None = None                                 # an observation that the response begins with
    bounds: tuple[float, float] | None = None                # the part of the video, in seconds; None: all of it
    rate: float = 0.0                                        # frames a second in a folder of frames; 0: unknown


def read_records(file: str | Path, traces: bool = False) -> list[Record]:
    """Reads a JSON list or JSON lines, gzip or plain. `traces`: each record must have one. Raises ValueError."""
    where = f"{file}"
    try:
        raw = Path(file).read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig").strip()
        rows = json.loads(text) if text[:1] == "[" else [line for line in text.split("\n") if line.strip()]
        for i, row in enumerate(rows):                       # splitlines would also cut at U+2028, inside a text
            where = f"{file}, record {i + 1}"
            rows[i] = to_record(row if text[:1] == "[" else json.loads(row), traces)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{where}: {error}") from None
    if not rows:
        raise ValueError(f"{file}: holds no records")
    return rows


def to_record(row: dict, traces: bool) -> Record:
    """Checks a row of a record file. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"is a {type(row).__name__}, not an object")
    json.dumps(row, ensure_ascii=False).encode()             # ValueError for a lone surrogate
    needed = ["problem", "problem_type", "solution", "path", "data_type", *(TRACE_FIELDS.values() if traces else [])]
    if missing := [name for name in needed if row.get(name) is None or not str(row[name]).strip()]:   # 0 is a solution
        raise ValueError(f"lacks {', '.join(missing)}")
    if wrong := [name for name in ("problem", "path", *TRACE_FIELDS.values()) if type(row.get(name, "")) is not str]:
        raise ValueError(f"{wrong[0]}: not a text")
    for name, known in (("problem_type", PROBLEM_TYPES), ("data_type", ("image", "video"))):
        if row[name] not in known:
            raise ValueError(f"unknown {name} {row[name]!r}; known are {', '.join(known)}")
    options, solution, answer = row.get("options") or [], row["solution"], str(row["solution"]).strip()
    if isinstance(options, str):                             # the RL file of the release holds every value as a string
        with suppress(ValueError, SyntaxError):
            options = ast.literal_eval(options)
    if not isinstance(options, list | tuple) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"options are no list of texts: {options!r:.80}")
    if row["problem_type"] == "multiple choice" and len(options) == 1:
        raise ValueError("a multiple choice has one option")
    reference = extract_tag("answer", answer) if "answer>" in answer else answer
    if type(solution) not in (str, int, float) or solution != solution or not reference:      # Python's JSON has NaN
        raise ValueError(f"solution is not one answer, a text or a number: {solution!r:.80}")
    if row["problem_type"] == "multiple choice":
        rewards.check_letters(options, reference)
    trace = {tag: row[name].strip() for tag, name in TRACE_FIELDS.items() if row.get(name)}
    for tag, text in trace.items():                          # in its tags or without them
        trace[tag] = extract_tag(tag, text) if matches_template(text, [tag]) else text
    return Record(str(row.get("problem_id", "")), row["problem"], tuple(options), row["problem_type"], reference,
                  row["path"], row["data_type"], trace, str(row.get("data_source") or ""))


def to_row(r: Record) -> dict:
    return dict(problem_id=r.problem_id, problem=r.question, options=list(r.options), problem_type=r.problem_type,
                solution=f"<answer>{r.reference}</answer>", answer=r.reference, path=r.path, data_type=r.data_type,
                data_source=r.data_source) | {name: r.trace.get(tag, "") for tag, name in TRACE_FIELDS.items()}


def read_media(r: Record, root: Path, settings: InputSettings) -> tuple[np.ndarray, float, int]:
    """Frames, seconds per temporal patch (0 for an image), and most pixels of a frame. Raises MediaError."""
    path = root / r.path
    try:
        root, target = root.resolve(), path.resolve()
        there = target.is_file() or target.is_dir()          # no pipe, no device
    except (OSError, ValueError, RuntimeError) as error:     # too long, a zero byte, a link to itself
        raise MediaError(f"no file can have this path: {error}") from None
    # In a Hugging Face cache, what lies below snapshots/ are links into blobs/ beside it.
    blobs = [folder.parent / "blobs" for folder in root.parents if folder.name == "snapshots"]
    inside = any(target.is_relative_to(folder) for folder in [root, *blobs])
    if not (inside and there):
        raise MediaError("no such file" if inside else "its path, or a link on it, leads out of the media folder")
    if r.data_type == "image":
        return read_image(path), 0.0, settings.image_max_pixels
    return *read_video(path, settings, r.bounds, r.rate), settings.max_pixels


# ------------------------------------------------------------------------------------------------ prompts

THINK_ALONE = ("Reason step by step about what the {medium} shows, talking to yourself, and check the result before "
               "you settle on it.")                          # without an observation before it
TYPE_LINES = {
    "multiple choice": "Answer with the letter of the correct option.", "numerical": "Answer with one exact number.",
    "OCR": "Answer with the text that is written there.", "free-form": "Answer with one short sentence.",
    "regression": "Answer with one number, as close as you can."}


def template_tags(template: str) -> list[rewards.Tag]:
    """The tags of a response in order. `think`, the process-agnostic baseline, has the last segment only."""
    segments = SEGMENTS[-1:] if template == "think" else SEGMENTS
    return [tag for segment in segments for tag in segment.tags]


def instruction(record: Record, settings: InputSettings) -> str:
    """The user's text: question, options, what is expected. The same for data generation, SFT, RL and evaluation."""
    lines = [record.question]
    if record.options:
        lines += ["Options:", *rewards.letter_options(record.options)]
    if settings.prompt == "full":
        lines.append("Answer in these parts, in this order and with exactly these tags:")
        for tag in template_tags(settings.template):
            alone = settings.template == "think" and tag.name == "think"
            text = (THINK_ALONE if alone else tag.instruction).format(medium=record.data_type)
            lines.append(f"<{tag.name}>{text}</{tag.name}>")
    if settings.prompt != "direct":
        lines.append(TYPE_LINES[record.problem_type])
    return "\n".join(lines)


def trace_text(record: Record, template: str) -> str:
    """The response that SFT teaches: every tag of the template with its text. A given observation is in the prompt.
    Template `none`: a record without a trace has its bare answer."""
    if template == "none" and not record.trace:
        return record.reference
    texts = record.trace | {"answer": record.reference}
    tags = [tag.name for tag in template_tags(template) if record.given is None or tag.name != "observation"]
    return "\n".join(f"<{name}> {texts[name]} </{name}>" for name in tags)


def byte_characters() -> dict[int, str]:
    """Byte-level BPE writes each byte as one character: itself if it is printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


class Vocabulary:
    """A checkpoint's tokenizer with the bytes of each token, stop tokens, and tokens that are never sampled."""

    def __init__(self, folder: str | Path):
        if not (Path(folder) / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        from transformers import PreTrainedTokenizerFast     # slow to import
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        self.id, self.bytes = self.tokenizer.get_added_vocab(), []            # special tokens; bytes of all
        to_byte = {char: byte for byte, char in byte_characters().items()}
        for piece in self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer))):
            self.bytes.append(piece.encode() if piece in self.id else bytes(to_byte[char] for char in piece))
        self.stop_ids = [self.id["<|im_end|>"], self.id["<|endoftext|>"]]

    def encode(self, text: str) -> list[int]:
        """Special tokens written in the text are encoded as ordinary text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled tokens, without the stop token at the end."""
        ids = ids[:-1] if len(ids) and ids[-1] in self.stop_ids else ids
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", errors="replace")

    def mask_special_tokens(self, model: Qwen2_5_VL) -> Qwen2_5_VL:
        """Takes placeholders and the padded end of the vocabulary out of the model's distribution."""
        placeholders = [i for text, i in self.id.items() if re.search("vision|image|video", text)]
        model.masked_token_ids = torch.tensor([*placeholders, *range(len(self.bytes), model.config.vocab_size)])
        return model


# ------------------------------------------------------------------------------------------------ examples

class Example(NamedTuple):
    """A tokenized record with its patches."""
    record: Record
    ids: Tensor                                              # (P,)
    positions: Tensor                                        # (3, P)
    next_position: int
    pixels: Tensor | None                                    # (S, 1176), None without a medium
    grid: tuple[int, int, int] | None
    seconds: float                                           # per temporal patch, 0 for an image


@lru_cache(maxsize=4)                                        # benchmarks ask several questions about one clip in a row
def media_patches(medium: Record, root: Path, settings: InputSettings) -> tuple[Tensor, tuple[int, int, int], float]:
    frames, seconds, max_pixels = read_media(medium, root, settings)
    return *patchify(frames, min(settings.min_pixels, max_pixels), max_pixels), seconds


def build_example(r: Record, root: Path, v: Vocabulary, config: Config, settings: InputSettings) -> Example:
    """Reads the medium and lays out the prompt, Qwen's chat up to the response. Raises MediaError."""
    pixels, grids, times, medium = None, [], [], []
    if not r.blind:
        clip = Record("", "", (), "", "", r.path, r.data_type, bounds=r.bounds, rate=r.rate)  # of any question
        pixels, grid, seconds = media_patches(clip, root, settings)
        grids, times = [grid], [seconds]
        pad = config.video_token_id if r.data_type == "video" else config.image_token_id
        medium = [v.id["<|vision_start|>"], *[pad] * (len(pixels) // MERGE ** 2), v.id["<|vision_end|>"]]
    start, end = [v.id["<|im_start|>"]], [v.id["<|im_end|>"], *v.encode("\n")]
    system = [*start, *v.encode("system\nYou are a helpful assistant."), *end] if settings.prompt != "short" else []
    user = [*start, *v.encode("user\n"), *medium, *v.encode(instruction(r, settings)), *end]
    given = [] if r.given is None else v.encode(f"<observation> {r.given} </observation>\n")
    ids = torch.tensor([*system, *user, *start, *v.encode("assistant\n"), *given])
    return Example(r, ids, *mrope_positions(ids, grids, times, config), pixels, *(grids or [None]), *(times or [0.0]))


def blank_example(v: Vocabulary, config: Config) -> Example:
    """A picture without a question, for a rank without questions: all ranks must run the same passes."""
    ids = torch.tensor([v.id["<|vision_start|>"], config.image_token_id, v.id["<|vision_end|>"]])
    grid, pixels = (1, MERGE, MERGE), torch.zeros(MERGE ** 2, 3 * TEMPORAL_PATCH * PATCH ** 2)
    record = Record("", "", (), "numerical", "0", "", "image")
    return Example(record, ids, *mrope_positions(ids, [grid], [0.0], config), pixels, grid, 0.0)


def answer_score(r: Record, answer: str | None) -> float:
    return task_metric(r.problem_type, answer, r.reference, r.options)


def why_invalid(r: Record) -> str:
    """Why nothing can be learned from a record; "" if it can."""
    if r.reference and answer_score(r, r.reference) < 1:
        return f"solution: {r.reference!r:.60} would itself not score 1"
    if r.problem_type == "numerical" and rewards.number(r.reference) is None:
        # It is compared as text, which "12:30" or "3:2" can pass. \frac{1}{2} is answered with 0.5.
        if not re.fullmatch(r"[\d:]*(?: ?[aApP][mM])?", r.reference):
            return f"solution: {r.reference!r:.60} is no number"
    whole = len(r.trace) == len(TRACE_TAGS) and r.given is None
    return "trace: it breaks the template" if whole and not all(parse(trace_text(r, "p2r")).formats) else ""


class Examples:
    """Records that become examples when asked for. One that cannot is None, counted, and named in the file `log`."""

    def __init__(self, records: list[Record], root: str | Path, vocabulary: Vocabulary, config: Config,
                 settings: InputSettings, log: Path | None = None, max_unreadable: float = MAX_UNREADABLE,
                 teaching: bool = True):                     # False: also those that `why_invalid` names
        self.records, self.root, self.vocabulary, self.config = records, Path(root), vocabulary, config
        self.settings, self.log, self.max_unreadable, self.teaching = settings, log, max_unreadable, teaching
        self.asked, self.skipped, self.cache = set(), {}, {}                  # indices; index → reason, → example
        self.lock, self.room = threading.Lock(), settings.cache_gb * 2 ** 30  # room: bytes left in the cache

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example | None:
        if i in self.cache or i in self.skipped:
            return self.cache.get(i)
        r, example, limit = self.records[i], None, self.settings.max_prompt
        reason = why_invalid(r) if self.teaching else ""
        try:
            if not reason:
                example = build_example(r, self.root, self.vocabulary, self.config, self.settings)
                if len(example.ids) > limit:
                    example, reason = None, f"prompt: {len(example.ids)} tokens, over --max-prompt {limit}"
        except MediaError as error:
            reason = f"media: {error}"
        size = example.pixels.nbytes if example and example.pixels is not None else 0
        with self.lock:
            self.asked.add(i)
            if example and i not in self.cache and size <= self.room:
                self.cache[i], self.room = example, self.room - size
            elif reason:
                self.skipped[i] = reason
            if reason and self.log:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(f"{r.path}\t{reason}\n")
        return example

    def prefetch(self, steps: Iterable[Sequence[int]]) -> Iterator[list[Example]]:
        """Yields the examples of each step's indices, while threads read those of the next two steps."""
        waiting, pool = [], ThreadPoolExecutor(max(1, self.settings.workers))
        try:
            for indices in [*steps, (), ()]:
                waiting.append([pool.submit(self.__getitem__, i) for i in indices])
                if len(waiting) < 3:
                    continue
                examples = [future.result() for future in waiting.pop(0)]
                lost = [i for i, reason in list(self.skipped.items()) if reason.startswith("media")]
                if len(self.asked) >= min(20, len(self)) and len(lost) > self.max_unreadable * len(self.asked):
                    example = f"{self.records[lost[0]].path} ({self.skipped[lost[0]]})"
                    raise ValueError(f"{len(lost)} of {len(self.asked)} media cannot be read, such as {example}. Is "
                                     f"{self.root} the right media folder? `data.py check --keep` keeps the rest.")
                yield [example for example in examples if example]
        finally:
            pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=2)
def epoch_order(count: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def step_indices(count: int, size: int, step: int, seed: int) -> list[int]:
    """The records of a step: epoch after epoch, each shuffled anew. No sampler has to be saved."""
    places = range(step * size, (step + 1) * size)
    return [epoch_order(count, place // count, seed)[place % count] for place in places]


def collate(examples: Sequence[Example]) -> Prompts:
    """Pads prompts on the right and joins their media, in the order of prompts."""
    pad = torch.nn.utils.rnn.pad_sequence
    pixels = [e.pixels for e in examples if e.pixels is not None]
    return Prompts(ids=pad([e.ids for e in examples], batch_first=True),
                   lengths=torch.tensor([len(e.ids) for e in examples]),
                   positions=pad([e.positions.T for e in examples]).permute(2, 1, 0),           # (3, B, P)
                   next_position=torch.tensor([e.next_position for e in examples]),
                   pixels=torch.cat(pixels) if pixels else None, grid=[e.grid for e in examples if e.grid])


def question_uniforms(seed: int, stream: str, r: Record, group: int, tokens: int) -> Tensor:
    """The random numbers of a question's responses, (G, T): the same ones on any number of ranks."""
    key = f"{seed}/{stream}/{r.problem_id}/{r.path}/{r.question}".encode()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)
    return torch.rand(group, tokens, generator=generator)


# ------------------------------------------------------------------------------------------------ the toy world

TOY_INPUT = dict(prompt="short", frames=6, min_pixels=28 * 28, max_pixels=28 * 28)            # settings
TOY_SIZE, TOY_FPS = 56, 2                                    # pixels, frames a second; two frames for each letter
TOY_SPLITS = {"base": 2000, "sft": 1000, "rl": 3000, "heldout": 512}           # clips
# How bright the letter behind is, next to the one in front. Clips for pre-training and SFT are clear.
TOY_BEHIND = {"base": (0.0, 0.3), "sft": (0.0, 0.3), "rl": (0.7, 1.0), "heldout": (0.7, 1.0)}
CAPTION, CAPTION_ERRORS = "What does the clip show?", 0.1    # of pre-training; share of letters
TOY_MIX = [t for other in PROBLEM_TYPES[1:] for t in (PROBLEM_TYPES[0], other)]       # half is multiple choice
PAINT = {"red": (215, 50, 45), "green": (50, 170, 70), "blue": (55, 85, 220), "yellow": (220, 190, 40)}


def draw(colour: str, letter: str, behind: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """One frame (56, 56, 3) uint8: a letter near the middle, of varying size and brightness, with noise. Behind it is
    another one, whose brightness is between the two numbers of `behind`."""
    frame = np.full((TOY_SIZE, TOY_SIZE, 3), rng.uniform(20, 50))
    other = rng.choice(COLOURS), rng.choice(LETTERS), rng.uniform(*behind)
    for paint, shape, strength in (other, (colour, letter, 1)):
        y, x = np.mgrid[:TOY_SIZE, :TOY_SIZE] - TOY_SIZE / 2 - rng.uniform(-2, 2, (2, 1, 1))
        r, thick = rng.uniform(17, 20), rng.uniform(3.5, 4.5)
        ink = {"O": abs(np.hypot(x, y) - r + thick) < thick,
               "X": (abs(abs(x) - abs(y)) < 1.4 * thick) & (abs(x) < r) & (abs(y) < r),
               "T": (abs(y) < r) & (abs(x) < thick) | (abs(x) < r) & (abs(y + r - thick) < thick)}[shape]
        frame += strength * ink[..., None] * (np.array(PAINT[paint]) * rng.uniform(0.75, 1.1) - frame)
    noise = rng.integers(-1, 2, (TOY_SIZE // 2, TOY_SIZE // 2)).repeat(2, 0).repeat(2, 1) * 16   # coarse: small files
    return (frame + noise[..., None]).clip(0, 255).astype(np.uint8)


def avi_bytes(frames: np.ndarray, fps: int) -> bytes:
    """Frames (N, h, w, 3) as PNG pictures in an AVI file: lossless."""
    def chunk(tag: bytes, body: bytes) -> bytes:
        return tag + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)

    (n, h, w, _), movie, index, largest = frames.shape, b"movi", b"", 0
    for frame in frames:
        Image.fromarray(frame).save(buffer := io.BytesIO(), "PNG", compress_level=1)
        picture = buffer.getvalue()
        index += struct.pack("<4sIII", b"00dc", 0x10, len(movie), len(picture))
        movie, largest = movie + chunk(b"00dc", picture), max(largest, len(picture))
    header = struct.pack("<14I", 1_000_000 // fps, largest * fps, 0, 0x10, n, 0, 1, largest, w, h, 0, 0, 0, 0)
    stream = struct.pack("<4s4sIHHIIIIIIIIHHHH", b"vids", b"MPNG", 0, 0, 0, 0, 1, fps, 0, n, largest, 0, 0, 0, 0, w, h)
    bitmap = struct.pack("<IiiHH4sIiiII", 40, w, h, 1, 24, b"MPNG", w * h * 3, 0, 0, 0, 0)
    streams = chunk(b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", bitmap))
    body = chunk(b"LIST", b"hdrl" + chunk(b"avih", header) + streams) + chunk(b"LIST", movie) + chunk(b"idx1", index)
    return chunk(b"RIFF", b"AVI " + body)


def toy_record(rng: random.Random, number: int, split: str) -> tuple[dict, list[str]]:
    """A question about three letters, with its answer and a correct trace; and the letters shown."""
    problem_type = TOY_MIX[number % len(TOY_MIX)]
    texts = [text for kind, text in TOY_QUESTIONS.values() if kind == problem_type]
    text = texts[number // len(TOY_MIX) % len(texts)]
    everything = [f"{colour} {letter}" for colour in COLOURS for letter in LETTERS]
    answer = None
    while answer is None:                                    # some draws have no answer
        shown = [rng.choice(everything) for _ in range(TOY_EVENTS)]
        asked, options = rng.choice(shown).split()[0], []
        if problem_type == "multiple choice":
            asked, right = rng.choice([shown[:2], shown[1:]])
            options = rng.sample([x for x in everything if x != right], 2)
            options.insert(rng.randrange(3), right)
        question = text.format(asked)
        toy = read_toy(problem_type, question, options)
        answer = toy_answer(toy, shown)
    trace = {TRACE_FIELDS[tag.name]: tag.toy(toy, shown) for tag in template_tags("p2r") if tag.name in TRACE_FIELDS}
    if split == "base" and rng.random() < 0.5:               # a caption, with errors as captions have them
        said = [rng.choice(everything) if rng.random() < CAPTION_ERRORS else x for x in shown]
        problem_type, question, options, trace = "free-form", CAPTION, [], {}
        answer = rewards.toy_observation(toy, said)
    return {"problem_id": f"{split}-{number}", "problem": question,
            "options": rewards.letter_options(options), "data_type": "video", "problem_type": problem_type,
            "solution": f"<answer>{answer}</answer>", "answer": answer, "path": f"./{split}/{number:05d}.avi",
            "data_source": "toy", **trace}, shown


def toy_clip(seed: int, split: str, number: int) -> bytes:
    """The clip of a record. Each record has a seed of its own: no held-out clip is a training clip."""
    rng = random.Random(f"{seed}/{split}/{number}")
    _, shown = toy_record(rng, number, split)
    noise = np.random.default_rng(rng.getrandbits(64))
    return avi_bytes(np.stack([draw(*x.split(), TOY_BEHIND[split], noise) for x in shown for _ in range(2)]), TOY_FPS)


def make_toy(folder: str | Path, splits: dict[str, int] = TOY_SPLITS, seed: int = 0) -> Path:
    """Writes clips and `<split>.json`, unless they are there as the code would write them now."""
    for split, count in splits.items():
        file, clips = Path(folder) / f"{split}.json", Path(folder) / split
        rows = [toy_record(random.Random(f"{seed}/{split}/{n}"), n, split)[0] for n in range(count)]
        first, text = clips / "00000.avi", json.dumps(rows, indent=1)
        if file.is_file() and file.read_text() == text and first.is_file():
            if first.read_bytes() == toy_clip(seed, split, 0):
                continue
        file.unlink(missing_ok=True)                         # it is written again when its clips are there
        clips.mkdir(parents=True, exist_ok=True)
        for number in tqdm(range(count), f"toy clips, {split}", unit="clip"):
            (clips / f"{number:05d}.avi").write_bytes(toy_clip(seed, split, number))
        write_atomically(file, text)
    return Path(folder)


def make_toy_model(folder: str | Path, seed: int, config: Config = CONFIGS["tiny"]) -> None:
    """Writes a random tiny Qwen2.5-VL, and a byte-level tokenizer with a token for each word of the toy world."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    cut = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?</?[a-z]+>\n?| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    rng, texts = random.Random(0), ["system\nYou are a helpful assistant.\n", "user\n", "assistant\n", "0123456789"]
    for number in range(500):
        record = to_record(toy_record(rng, number, "words")[0], True)
        texts += [CAPTION, instruction(record, InputSettings(prompt="short")), trace_text(record, "p2r")]
    words = {piece for text in texts for piece, _ in cut.pre_tokenize_str(text) if len(piece) > 1}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                "<|image_pad|>", "<|video_pad|>"]
    pieces = specials + sorted(byte_characters().values()) + sorted(words)
    assert len(pieces) <= config.vocab_size
    # ignore_merges: a piece of the vocabulary is one token, any other is split into its bytes.
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")

    def write_extra(where: Path) -> None:
        tokenizer.save_pretrained(str(where))
        write_config(config, where, stop_ids=[2, 0])
    save_model(dict(init_weights(Qwen2_5_VL(config), seed).named_parameters()), folder, write_extra=write_extra)


# ================================ a first reader may stop here ================================

HTTP = ("http://", "https://")
THRESHOLD = 0.6                                              # lowest score of a correct answer in the pipeline (paper)


@dataclass(frozen=True)
class JudgeSettings:
    """The judge of observations, and how long a server is tried."""
    judge: str = flag("rule", "rule (toy world), reference (RL: the KL reference), a model's folder, or http(s)://…/v1")
    judge_model: str = flag("", "name of an http judge's model (key: JUDGE_API_KEY); outside RL, reference's folder")
    judge_device: str = flag("", "device of a judge from a folder, such as cuda:1; default: the rank's")
    judge_tokens: int = flag(512, "maximum number of tokens in a judge's reply; a reasoning model needs more")
    refuse_leaks: bool = flag(True, "an observation that only states an answer is refused without a judge")
    concurrency: int = flag(64, "maximum number of concurrent requests to a server, for each rank")
    timeout: float = flag(60.0, "seconds without data after which a request is tried again")
    retries: int = flag(24, "retries of a failed request, 0.5 to 8 s apart: 24 outlast an outage of two minutes")
    max_unknown: float = flag(0.2, "largest share of missing verdicts or traces; above it the run stops")

    def __post_init__(self):
        check_minimum(self, concurrency=1, retries=0, timeout=0.01, max_unknown=0, judge_tokens=1)
        self.check_source("judge", ("rule", "reference"))

    def check_source(self, name: str, built_in: tuple[str, ...]) -> None:
        """SystemExit if --judge or --teacher names nothing that exists."""
        value = getattr(self, name)
        if not value.startswith(HTTP):
            if value not in built_in and not Path(value).is_dir():
                known = ", ".join(built_in)
                raise SystemExit(f"--{name} {value}: neither {known}, a folder that is there, nor an address")
        elif not re.fullmatch(r"https?://[^/:@?#][^@?#]*", value):            # it may hold a key: do not show it
            raise SystemExit(f"--{name}: an address is like https://host:port/v1; keys come from the environment")
        elif not (getattr(self, name + "_model") and find_spec("openai")):
            raise SystemExit(f"--{name} {value} needs --{name}-model, and `pip install openai`")


def chat_client(s: JudgeSettings, name: str, **options) -> rewards.ChatClient:
    """The server that --judge or --teacher names, with its key from JUDGE_API_KEY or TEACHER_API_KEY."""
    key = os.environ.get(f"{name.upper()}_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):            # such a key fits no header; do not show it
        raise ValueError(f"{name.upper()}_API_KEY holds characters that no key can have")
    url, model = getattr(s, name), getattr(s, f"{name}_model")
    return rewards.ChatClient(url, model, key, s.concurrency, s.timeout, s.retries, **options)


def make_judge(s: JudgeSettings, cache: Path | None = None,
               reference: Callable[[list[Claim]], list[Verdict]] | None = None, device: str = "") -> Judge:
    """The judge that --judge names. cache: file for a server's replies. reference: what --judge reference calls."""
    if s.judge.startswith(HTTP):
        keep = rewards.find_verdict
        client = chat_client(s, "judge", cache=cache, keep=keep, max_tokens=s.judge_tokens, temperature=0)
        return Judge(rewards.language_judge(client.ask_all), s.refuse_leaks, background=True, counts=client.counts)
    if s.judge in ("rule", "reference"):
        return Judge(rewards.rule_judge if s.judge == "rule" else reference, s.refuse_leaks)
    device = s.judge_device or device or ("cuda" if torch.cuda.is_available() else "cpu")
    decide = rewards.language_judge(rewards.local_llm(s.judge, device, s.judge_tokens))
    return Judge(decide, s.refuse_leaks, background=device != "cpu")          # on a CPU it would slow the training


def blind_answers(model: Qwen2_5_VL, vocabulary: Vocabulary, claims: list[Claim], settings: InputSettings, tokens: int,
                  batch: int, device) -> list[Verdict]:
    """Judges by answering: the model reads question and observation, without the media, and writes think and answer.
    The observation suffices if the answer's score reaches THRESHOLD: weak reasoning counts against it."""
    verdicts = []
    for i in range(0, len(claims), batch):
        records = [Record("", c.question, c.options, c.problem_type, c.reference, "", c.data_type, blind=True,
                          given=c.observation) for c in claims[i:i + batch]]
        examples = [build_example(r, Path(), vocabulary, model.config, settings) for r in records]
        texts = respond(model, vocabulary, examples, torch.zeros(len(examples), 1, tokens), 0.0, device)
        for r, text in zip(records, texts):
            score = answer_score(r, parse(text).contents["answer"])
            explanation = f"answering blind: {' '.join(text.split())} (score {score:.2f})"
            verdicts.append(Verdict(score >= THRESHOLD, explanation))
    return verdicts


def respond(model: Qwen2_5_VL, vocabulary: Vocabulary, examples: Sequence[Example], uniforms: Tensor,
            temperature: float, device) -> list[str]:
    """A response to each example, sampled with uniforms (B, 1, T)."""
    out = model.generate(collate(examples).to(device), uniforms, vocabulary.stop_ids, temperature)
    return [vocabulary.decode(ids[:n]) for ids, n in zip(out.tokens[:, 0].tolist(), out.lengths[:, 0].tolist())]


def load_local(folder: str) -> tuple[Vocabulary, Qwen2_5_VL, str]:
    """Vocabulary, model and device of the newest checkpoint in a folder."""
    path, device = newest_checkpoint(folder), "cuda" if torch.cuda.is_available() else "cpu"
    vocabulary = Vocabulary(path)
    model = load_model(path, compute_dtype(torch.device(device), read_config(path)), device)
    return vocabulary, vocabulary.mask_special_tokens(model), device


def picture(frame: np.ndarray) -> str:
    """A frame (height, width, 3) uint8 as a data address, for servers and pages."""
    Image.fromarray(frame).save(buffer := io.BytesIO(), "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class Draft(NamedTuple):
    """A teacher's trace for a record."""
    output: str | None
    error: str = ""                                          # why there is no output
    mistakes: tuple[str, ...] = ()                           # that the toy teacher made on purpose


def make_teacher(s: "CotSettings") -> Callable[[list[Record]], list[Draft]]:
    """The teacher that --teacher names: the toy teacher, a server, or a checkpoint."""
    if s.teacher == "toy":
        return lambda records: [toy_draft(r, s) for r in records]
    root, http = Path(s.media), s.teacher.startswith(HTTP)
    if http:
        client = chat_client(s, "teacher", patience=(s.retries + 1) * (s.timeout + 8), max_tokens=s.max_response,
                             temperature=s.temperature, seed=s.seed)
    else:
        vocabulary, model, device = load_local(s.teacher)

    def prepare(r: Record) -> Example | list[dict]:
        if not http:
            return build_example(r, root, vocabulary, model.config, s)
        (frames, _, limit), content = read_media(r, root, s), []
        for frame in resize(frames, min(s.min_pixels, limit), limit):
            content.append({"type": "image_url", "image_url": {"url": picture(frame)}})
        return [{"role": "user", "content": [*content, {"type": "text", "text": instruction(r, s)}]}]

    def teach(records: list[Record]) -> list[Draft]:
        inputs, drafts = {}, {}
        for r in records:
            try:
                inputs[r] = prepare(r)
            except MediaError as error:
                drafts[r] = Draft(None, f"media: {error}")
        if http:
            for r, (text, error) in zip(inputs, client.ask_all([*inputs.values()])):
                drafts[r] = Draft(text, "" if text else error)       # step 2 checks one cut off
        elif inputs:
            uniforms = torch.stack([question_uniforms(s.seed, "teacher", r, 1, s.max_response) for r in inputs])
            texts = respond(model, vocabulary, [*inputs.values()], uniforms, s.temperature, device)
            drafts |= zip(inputs, map(Draft, texts))
        return [drafts[r] for r in records]
    return teach


def toy_draft(r: Record, s: "CotSettings") -> Draft:
    """The toy teacher's trace, with mistakes at known rates. Each changes the answer, but a share `luck` of those in
    perception does not: there the reasoning follows what was shown, and only step 3 can catch it."""
    rng, toy = random.Random(f"{s.seed}/{r.problem_id}/{r.path}"), read_toy(r.problem_type, r.question, r.options)
    observation, mistakes = r.trace.get("observation", ""), []
    seen = reasoned = shown = [item.partition(" ")[2] for item in observation.split(", ")]    # "1 red O, 2 blue X, …"
    if rewards.toy_observation(toy, shown) != observation or len(shown) != TOY_EVENTS:
        raise ValueError(f"{r.path}: the toy teacher finds no letters in the observation {observation!r:.60}")
    if rng.random() < s.perception_mistakes:
        mistakes.append("perception")
        seen = misread(toy, shown, r, 1, rng)
        reasoned = shown if rng.random() < s.luck else seen
    if rng.random() < s.reasoning_mistakes:
        mistakes.append("reasoning")
        reasoned = misread(toy, shown, r, THRESHOLD, rng)
    texts = {tag.name: tag.toy(toy, reasoned) for tag in template_tags("p2r")}
    texts |= {tag.name: tag.toy(toy, seen) for tag in SEGMENTS[0].tags}
    text = trace_text(replace(r, trace=texts, reference=texts["answer"]), "p2r")
    if rng.random() < s.template_mistakes:
        mistakes.append("template")
        text = text[:rng.randrange(len(text))]               # cut off: no </answer>
    return Draft(text, mistakes=tuple(mistakes))


def misread(toy: rewards.Toy, shown: list[str], r: Record, below: float, rng: random.Random) -> list[str]:
    """Other letters than those shown, from which an answer follows that scores less than `below`."""
    while True:
        other = list(shown)
        for i in rng.sample(range(TOY_EVENTS), rng.randint(1, TOY_EVENTS)):
            other[i] = f"{rng.choice(COLOURS)} {rng.choice(LETTERS)}"
        answer = toy_answer(toy, other)
        if answer is not None and answer_score(r, answer) < below:
            return other


# ------------------------------------------------------------------------------------------------ the data pipeline

@dataclass(frozen=True)
class CotSettings(InputSettings, JudgeSettings):
    """`python data.py cot`. Without --data: the toy world with the toy teacher."""
    data: str = flag("", "record file with questions (toy: made when missing)")
    media: str = flag("", "folder to which the records' paths are relative [the folder of --data]")
    out: str = flag("", "folder for the work and for traces.jsonl [runs/cot; toy: runs/tiny/cot]")
    limit: int = flag(0, "only the first N records; 0: all")
    teacher: str = flag("toy", "who writes traces: toy (toy world), a checkpoint folder, or http(s)://…/v1")
    teacher_model: str = flag("", "name of an http teacher's model (key: TEACHER_API_KEY)")
    temperature: float = flag(0.0, "of a teacher's sampling; 0 is greedy")
    max_response: int = flag(1024, "maximum number of tokens in a trace")
    batch: int = flag(16, "records that a local teacher or judge works on at once")
    seed: int = flag(0, "decides a teacher's sampling, and the toy teacher's mistakes")
    perception_mistakes: float = flag(0.1, "share of the toy teacher's traces that observe other letters")
    luck: float = flag(0.5, "share of these whose answer is right all the same")
    reasoning_mistakes: float = flag(0.1, "share of its traces that reason to a wrong answer")
    template_mistakes: float = flag(0.02, "share of its traces that are cut off")

    def __post_init__(self):
        InputSettings.__post_init__(self)
        JudgeSettings.__post_init__(self)
        check_minimum(self, batch=1, max_response=1, limit=0, temperature=0)
        self.check_source("teacher", ("toy",))
        if self.judge == "reference" and not self.judge_model:
            raise SystemExit("--judge reference needs --judge-model: the checkpoint folder that answers blind")


# What a reasoning teacher writes before the template. Its <think> may stand in the prompt.
OWN_REASONING = r"(?s)\A\s*(?:<think>.*?|(?:(?!<observation>).)*?)</think>\s*(?=<observation>)"
STEPS = ("records", "generated", "template", "answer", "observation")         # what a record passes
DROPPED = {"not generated": 1, "template broken": 2, "answer wrong": 3, "not judged": 4, "observation insufficient": 4}
CAUGHT = (2, "reasoning", ("template broken", "answer wrong")), (3, "perception", ("observation insufficient",))


def cot(s: CotSettings) -> Path:
    """Makes process-aware traces in three steps (paper, stage 1), and returns the file that SFT reads.

    1-generated.jsonl and 3-judged.jsonl in --out grow by a line for each finished record; traces.jsonl (kept) and
    dropped.jsonl (with reasons) come at the end. Started again after a kill, it does what is missing.
    """
    s, folder = replace(s, media=s.media or str(Path(s.data).parent)), Path(s.out)
    with lock_folder(folder):
        records = {}                                         # equal records are one
        for r in read_records(s.data)[:s.limit or None]:
            trace = [r.trace] if r.trace else []
            key = [r.problem_id, r.path, r.question, r.options, r.problem_type, r.reference, *trace]
            records[short_hash(key)] = r
        if (s.judge == "rule" or s.teacher == "toy") and not is_toy(records.values()):
            raise SystemExit("The toy teacher and the rule judge know toy records only: give --teacher and --judge.")
        made, judged = folder / "1-generated.jsonl", folder / "3-judged.jsonl"
        free = ["limit", "batch"] + ["judge", "judge_model"] * (not judged.exists())          # before step 3 begins
        check_settings(folder, asdict(s), default_settings(s), free if made.exists() else [*asdict(s)])

        # Step 1, generate: a teacher writes a trace for every record.
        drafts = run_resumable(records, make_teacher, s.teacher, made, "1 generate", s)

        # Step 2, verify: the template, and the answer's score.
        rows, claims = {}, {}
        for key, r in records.items():
            output, error, reason = drafts[key]["output"], drafts[key]["error"], ""
            output = output and re.sub(OWN_REASONING, "", output)
            contents, formats = parse(output or "")
            score = answer_score(r, contents["answer"])
            if error:
                reason = "not generated"
            elif not all(formats):
                reason = "template broken"
            elif score < THRESHOLD:
                reason = "answer wrong"
            else:
                claims[key] = claim_about(r, contents["observation"])
            row = to_row(replace(r, trace={tag: contents.get(tag) or "" for tag in TRACE_TAGS}))
            rows[key] = row | dict(output=output, reward=score, select=not reason, reason=reason, error=error)

        # Step 3, observation sufficiency: the judge reads nothing else, and equal claims once.
        names = {key: short_hash(claim) for key, claim in claims.items()}
        claims = dict(zip(names.values(), claims.values()))
        verdicts = run_resumable(claims, make_cot_judge, s.judge, judged, "3 observation sufficiency", s)
        for key, name in names.items():
            if not verdicts[name]["sufficient"]:
                error = verdicts[name]["error"]
                reason = "not judged" if error else "observation insufficient"
                rows[key] |= dict(select=False, reason=reason, error=error)

        for name, select in (("traces", True), ("dropped", False)):
            write_rows(folder / f"{name}.jsonl", [row for row in rows.values() if row["select"] == select])
        print(*funnel([(row["reason"], drafts[key]["mistakes"]) for key, row in rows.items()]), sep="\n")
        print(f"{folder / 'traces.jsonl'}: {sum(row['select'] for row in rows.values())} traces for SFT", flush=True)
        errors = [row["error"] for row in rows.values() if row["error"]]
        for error, _ in Counter(errors).most_common(1):
            print(f"{len(errors)} records are unfinished (most often: {error}); the same command tries them again.")
    return folder / "traces.jsonl"


def run_resumable(items: dict[str, Any], make_worker: Callable, who: str, file: Path, what: str, s: CotSettings
                  ) -> dict[str, dict]:
    """Results of items by key, from `file` or a worker, which takes a list of them (one, in many threads, if `who` is a
    server) and returns named tuples. One without `error` is written to `file` at once. ValueError if many fail."""
    journal, errors = Journal(file), []
    results = {row["key"]: row for row in journal.rows if row.get("key") in items}
    todo, before = [key for key in items if key not in results], len(results)
    if not todo:
        return results
    work, (threads, size) = make_worker(s), (s.concurrency, 1) if who.startswith(HTTP) else (1, s.batch)

    def finish(keys: list[str]) -> None:                     # in a thread: Ctrl-C waits for it and loses nothing
        for key, result in zip(keys, work([items[key] for key in keys]), strict=True):
            results[key] = {"key": key} | result._asdict()
            if result.error:
                errors.append(result.error)
            else:
                journal.add(results[key])

    pool = ThreadPoolExecutor(threads)
    futures = [pool.submit(finish, todo[i:i + size]) for i in range(0, len(todo), size)]
    try:
        for future in tqdm(as_completed(futures), what, len(futures)):
            future.result()
            if len(errors) >= 20 and len(errors) > s.max_unknown * (len(results) - before):
                error, kept = Counter(errors).most_common(1)[0][0], len(results) - len(errors)
                raise ValueError(f"{what}: {len(errors)} records failed, most often for {error}. {kept} are done and "
                                 f"kept; the same command goes on from there.")
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def short_hash(something) -> str:
    return hashlib.sha256(json.dumps(something).encode()).hexdigest()[:20]


def is_toy(records: Iterable[Record]) -> bool:
    return all(read_toy(r.problem_type, r.question, r.options) for r in records)


def claim_about(r: Record, observation: str) -> Claim:
    return Claim(r.question, r.options, r.problem_type, r.reference, observation, r.data_type)


def make_cot_judge(s: CotSettings) -> Judge:
    if s.judge != "reference":
        return make_judge(s)
    vocabulary, model, device = load_local(s.judge_model)    # answers blind
    return make_judge(s, reference=lambda claims: blind_answers(model, vocabulary, claims, s, s.max_response, s.batch,
                                                                device))


def funnel(outcomes: list[tuple[str, Sequence[str]]]) -> list[str]:
    """How many records passed each step. outcomes: why each was dropped, or "", and the mistakes in its trace."""
    reasons = Counter(reason for reason, _ in outcomes)
    passed = [len(outcomes)] * len(STEPS)
    for reason, step in DROPPED.items():
        for i in range(step, len(STEPS)):
            passed[i] -= reasons[reason]
    lines = format_table([[*STEPS, "kept"], [*map(str, passed), f"{passed[-1] / len(outcomes):.1%}"]])
    lines += [f"Dropped, {reason}: {reasons[reason]}" for reason in DROPPED if reasons[reason]]
    met = [(reason, made) for reason, made in outcomes if reason != "not judged"]
    for step, target, own in CAUGHT if any(made for _, made in outcomes) else ():
        dropped = [made for reason, made in met if reason in own]
        caught, wanted = sum(target in made for made in dropped), sum(target in made for _, made in met)
        lines.append(f"step {step} against mistakes in {target}: precision {sum(map(bool, dropped))} of "
                     f"{len(dropped)}, recall {caught} of {wanted}")
        met = [(reason, made) for reason, made in met if reason not in own]
    return lines


# ------------------------------------------------------------------------------------------------ flags and commands

def check_minimum(settings, **minimum: float) -> None:
    for name, value in minimum.items():
        if not getattr(settings, name) >= value:             # true for NaN
            raise SystemExit(f"--{name.replace('_', '-')} must be at least {value}")


def add_flags(parser: argparse.ArgumentParser, cls, presets: dict[str, dict] = {}, names: Iterable[str] = ()) -> None:
    """A flag for each setting of a dataclass (or those in `names`), None if not given."""
    for f in [f for f in fields(cls) if not names or f.name in names]:
        values = [f"default {f.default}"] * (f.default != "")
        values += [f"{name} {row[f.name]}" for name, row in presets.items() if f.name in row]
        about = f"{f.metadata['help']} [{'; '.join(values)}]".replace(" []", "").replace("%", "%%")
        options = {"type": type(f.default), "choices": f.metadata["choices"]}
        if isinstance(f.default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(f.default, tuple):
            options = {"type": type(f.default[0]), "nargs": len(f.default)}
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, help=about, **options)


def given_flags(args: argparse.Namespace) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if v is not None}


def default_settings(settings) -> dict:
    return {f.name: f.default for f in fields(settings)}


def check_settings(folder: Path, settings: dict, defaults: dict, free: Sequence[str]) -> None:
    """Writes settings.json. SystemExit, with the difference, if the folder holds work with other settings. One that is
    missing there counts as its default; those in `free`, and what cannot change results, may differ."""
    file, now = folder / "settings.json", json.loads(json.dumps(settings))
    free = {"out", "workers", "cache_gb", "judge_device", "concurrency", "timeout", "retries", "max_unknown", *free}
    try:
        saved = dict(json.loads(file.read_text())) if file.is_file() else {}
    except (ValueError, TypeError):
        raise SystemExit(f"{file} is damaged: use another --out, or remove the folder") from None
    before, changed = json.loads(json.dumps(defaults)) | saved, []
    for name, value in now.items() if saved else ():
        moved = str(value).startswith(HTTP) and str(before.get(name)).startswith(HTTP)
        if before.get(name) != value and not moved and name not in free:
            changed.append(f"  --{name.replace('_', '-')} was {before.get(name)!r}, is now {value!r}\n")
    if changed:
        raise SystemExit(f"{folder} holds work with other settings:\n{''.join(changed)}Use those or another --out.")
    if saved != now:                                         # a finished run may lie on a read-only disk
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(now, indent=2) + "\n")


def write_atomically(file: Path, text: str) -> None:
    """After a kill the old text or the whole new one is there."""
    aside = file.with_name(file.name + ".writing")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)


def write_rows(file: Path, rows: Iterable[dict]) -> None:
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table with a rule below its head, the first column to the left, the others to the right."""
    widths, lines = [max(map(len, column)) for column in zip(*rows)], []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return [lines[0], "─" * max(map(len, lines)), *lines[1:]]


@contextmanager
def lock_folder(folder: Path):
    """SystemExit while another process works in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            import fcntl                                     # Windows has none: no lock there
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"Another process works in {folder}.") from None
        except ImportError:
            pass
        except OSError as error:                             # some network disks have none either
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            warnings.warn(f"This disk has no locks ({error}): two runs in one folder go unnoticed.")   # shown once
        yield


def check(file: str, media: str, keep: str | None, settings: InputSettings) -> bool:
    """Prints which records a run would skip. Returns False if it would stop."""
    def fault(r: Record) -> str:
        try:
            read_media(r, Path(media), settings)
            return why_invalid(r)
        except MediaError as error:
            return f"media: {error}"

    records = read_records(file)
    kinds = Counter(f"{r.data_type}, {r.problem_type}" for r in records)
    traces = sum(len(r.trace) == len(TRACE_TAGS) for r in records)
    print(f"{file}: {len(records)} records, {traces} with a trace for SFT")
    print(*(f"{n:10}  {kind}" for kind, n in sorted(kinds.items())), sep="\n")
    with ThreadPoolExecutor(settings.workers) as pool:
        faults = list(tqdm(pool.map(fault, records), "reading media", len(records)))
    skipped = [f"\n  {r.path}: {reason}" for r, reason in zip(records, faults) if reason]
    print(f"A run would skip {len(skipped)}:", *skipped[:20], sep="")
    if keep:
        write_rows(Path(keep), [to_row(r) for r, reason in zip(records, faults) if not reason])
    starts = sum(reason.startswith("media") for reason in faults) <= MAX_UNREADABLE * len(records)
    print("A run would start" if starts else "A run would stop: too many media are missing")
    return starts


def main(argv: Sequence[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the toy world")
    toy.add_argument("--out", default="runs/tiny/toy", help="folder [runs/tiny/toy]")
    for split, count in TOY_SPLITS.items():
        toy.add_argument(f"--{split}", type=int, default=count, help=f"clips for {split} [{count}]")
    checker = commands.add_parser("check", help="say which records a run would skip")
    checker.add_argument("file", help="JSON list or JSON lines, gzip or plain")
    checker.add_argument("--media", required=True, help="folder to which the records' paths are relative")
    checker.add_argument("--keep", help="write the records that a run would use to this file")
    add_flags(checker, InputSettings, names=("frames", "workers"))
    maker = commands.add_parser("cot", help="make traces for SFT: generate, verify, judge", allow_abbrev=False,
                                description=cot.__doc__, formatter_class=layout)
    unused = {"workers", "cache_gb", "max_prompt", "template"}
    add_flags(maker, CotSettings, names={f.name for f in fields(CotSettings)} - unused)
    given = given_flags(parser.parse_args(argv))
    command = given.pop("command")
    try:
        if command == "toy":
            print(make_toy(given.pop("out"), given))
        elif command == "check":
            own = [given.pop(name, None) for name in ("file", "media", "keep")]
            raise SystemExit(not check(*own, InputSettings(**given)))
        else:
            if "data" not in given:                          # the toy world, beside --out
                small = {} if given.get("teacher", "").startswith(HTTP) else TOY_INPUT
                given = {"out": "runs/tiny/cot"} | small | given
                CotSettings(**given)                         # refuses wrong flags before the world is made
                given["data"] = str(make_toy(Path(given["out"]).parent / "toy") / "sft.json")
            if not cot(CotSettings(**{"out": "runs/cot"} | given)).stat().st_size:
                raise SystemExit("No trace was kept.")
    except (ValueError, OSError) as error:                   # also a full disk
        raise SystemExit(f"{error}")
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. Finished work is kept; the same command goes on from there.")


if __name__ == "__main__":
    main()
