"""From files to model inputs: media, records, prompts, examples; the toy world; the pipeline of traces.

    python data.py toy --out runs/tiny/toy            write the toy world: clips and records
    python data.py cot                                traces for the toy world; for other questions:
    python data.py cot --data FILE --media DIR --teacher https://…/v1 --teacher-model NAME \\
        --judge https://…/v1 --judge-model NAME

A record whose media cannot be read is skipped and named; no other clip is substituted.
"""
from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import sys
import threading
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

# Before torch, which reads what model.py sets.
from model import (CONFIGS, Config, Prompts, Qwen2_5_VL, init_weights, mrope_positions, save_model,
                   write_config)
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import rewards
from rewards import (PROBLEM_TYPES, SEGMENTS, TAGS, Claim, Judge, Reply, Verdict, extract_tag, key_of,
                     matches_template, parse, task_metric)

with suppress(AttributeError):                               # a notebook's output is none
    sys.stdout.reconfigure(errors="replace")                 # old terminals lack some characters


def flag(default, help: str, choices: list[str] | None = None, minimum: float | None = None,
         built_in: tuple[str, ...] = (), may_change: bool = False):
    """A setting: its default, its text in --help, the values it takes (one of `choices`; at least
    `minimum`; one of `built_in` or the address of a server), and whether a run may go on with
    another value."""
    return field(default=default, metadata=dict(help=help, choices=choices, minimum=minimum,
                                                built_in=built_in, may_change=may_change))


@dataclass(frozen=True)
class InputSettings:
    """How media and prompts become model inputs: the same in SFT, RL and evaluation."""
    frames: int = flag(16, "maximum number of frames of a video, the first and the last among them",
                       minimum=2)
    fps: float = flag(2.0, "frames per second of video, as far as --frames allows; 0: always "
                      "--frames", minimum=0)
    min_pixels: int = flag(128 * 28 * 28, "smaller frames are scaled up to about this size",
                           minimum=0)
    max_pixels: int = flag(128 * 28 * 28, "larger frames are scaled down to at most this size",
                           minimum=28 * 28)
    image_max_pixels: int = flag(1024 * 28 * 28, "the same limit for images", minimum=28 * 28)
    max_prompt: int = flag(8192, "prompts with more tokens are skipped and counted, never cut",
                           minimum=1)
    prompt: str = flag("full", "full: with the template; short: without",
                       choices=["full", "short"])
    template: str = flag("p2r", "tags; p2r: observation, think, answer; think: think, answer; none: "
                         "SFT on answers", choices=["p2r", "think", "none"])
    workers: int = flag(2, "threads that read media ahead of the model", minimum=1, may_change=True)

    def __post_init__(self):
        """SystemExit for a value that is too small, and for a source that does not exist."""
        for f in fields(self):
            name, value = "--" + f.name.replace("_", "-"), getattr(self, f.name)
            least, built_in = f.metadata["minimum"], f.metadata["built_in"]
            if least is not None and not value >= least:     # also NaN
                raise SystemExit(f"{name} must be at least {least}")
            if built_in and value not in built_in:
                check_address(name, value, built_in, getattr(self, f"{f.name}_model"))


# ------------------------------------------------------------------------------------------ media

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])     # of the official preprocessor_config.json
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
PATCH, TEMPORAL_PATCH, MERGE = 14, 2, 2                      # pixels a side, frames, patches a side
MIN_FRAMES = 4
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
READ_ON = 2000                                               # frames of a clip that is not seeked in
HANG = 60                                                    # seconds without a frame



class MediaError(Exception):
    """A file that is missing or cannot be decoded: the record is skipped."""


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen's rule: multiples of 28, area within the limits, aspect ratio kept as far as possible, at
    most 200."""
    unit = PATCH * MERGE
    if max(height, width) > 200 * min(height, width):
        raise MediaError(f"{width}×{height} pixels are too narrow: sides may differ by a factor of "
                         "200 at most")
    h, w = (max(unit, round(side / unit) * unit) for side in (height, width))
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(unit, math.floor(side / scale / unit) * unit) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / unit) * unit for side in (height, width))
    return h, w


def frame_indices(total: int, fps: float, settings: InputSettings) -> tuple[list[int], float]:
    """An even number of frames, evenly spread from the first to the last, as qwen_vl_utils takes
    them; and seconds per temporal patch."""
    if not (total and 0 < fps < 500):                        # 600: an AVI whose header has no rate
        raise MediaError(f"it holds {total} frames at {fps} a second")
    wanted = int(total / fps * settings.fps) if settings.fps else settings.frames
    wanted = min(max(wanted, MIN_FRAMES), settings.frames, total)
    count = max(TEMPORAL_PATCH, wanted // TEMPORAL_PATCH * TEMPORAL_PATCH)
    indices = np.linspace(0, total - 1, count).round().astype(int).tolist()
    return indices, TEMPORAL_PATCH * total / (fps * count)


def read_video(path: Path, settings: InputSettings, rate: float = 0.0) -> tuple[np.ndarray, float]:
    """Frames (N, height, width, 3) uint8, as a viewer shows them, and seconds per temporal patch of
    a file, or of a folder of pictures with `rate` a second.

    Raises MediaError, also where nothing comes for HANG seconds. That depends on the machine: for
    such a clip the rule that any number of ranks has the same samples does not hold.
    """
    if path.is_dir():
        return read_folder(path, settings, rate)
    events = SimpleQueue()                                   # None for each frame, then the result

    def read() -> None:
        try:
            events.put(decode(path, settings, partial(events.put, None)))
        except Exception as error:
            events.put(error)

    # A read that hangs is left behind, and a program that ends does not wait for it.
    threading.Thread(target=read, daemon=True).start()
    try:
        while (result := events.get(timeout=HANG)) is None:
            pass
    except Empty:
        raise MediaError(f"reading it hangs: nothing came for {HANG} seconds") from None
    if not isinstance(result, Exception):
        return result
    if isinstance(result, (MediaError, ImportError)):
        raise result
    said = str(result).strip() or "it ends early"
    reason = said.splitlines()[-1].split("ERROR ")[-1]       # without a place in decord's source
    raise MediaError(f"cannot be decoded: {reason:.200}. If a player shows it, convert it to MP4 "
                     "(H.264)")


def read_folder(path: Path, settings: InputSettings, rate: float) -> tuple[np.ndarray, float]:
    """`read_video` of a folder of pictures."""
    files = [file for file in path.iterdir() if file.suffix.lower() in PICTURES]
    files.sort(key=lambda file: (len(file.name), file.name))  # 2.png before 10.png
    fps = rate or settings.fps or 2.0
    indices, seconds = frame_indices(len(files), fps, settings)
    frames = [read_image(files[i])[0] for i in indices]
    if len({frame.shape for frame in frames}) > 1:
        raise MediaError("its pictures differ in size")
    return np.stack(frames), seconds


def read_image(path: Path) -> np.ndarray:
    """(1, height, width, 3) uint8, turned as its EXIF data say. Raises MediaError."""
    try:
        with Image.open(path) as image:
            with suppress(Exception):                        # damaged EXIF data do not matter
                image = ImageOps.exif_transpose(image)
            return to_rgb(image)[None]
    except Exception as error:                               # a damaged file can cause any
        raise MediaError(f"cannot be decoded: {error}") from None


def to_rgb(image: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8. What is transparent becomes white, as in the official utility."""
    if image.mode in ("I", "F"):
        raise MediaError("grey values of 32 bits, whose range is not known")
    if image.mode.startswith("I;16"):                        # Pillow would cut off above 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def resize(frames: np.ndarray, min_pixels: int, max_pixels: int) -> np.ndarray:
    h, w = smart_resize(*frames.shape[1:3], min_pixels, max_pixels)
    images = map(Image.fromarray, frames)
    return np.stack([image.resize((w, h), Image.BICUBIC) for image in images])


def patchify(frames: np.ndarray, min_pixels: int, max_pixels: int
             ) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames (N, height, width, 3) uint8 → patches (S, 3·2·14·14), resized, normalized, in the
    vision tower's order, and their grid (temporal patches, rows, columns). The four patches that
    will be merged are neighbours."""
    frames = resize(frames, min_pixels, max_pixels)
    h, w = frames.shape[1:3]
    x = (torch.from_numpy(frames).float() / 255 - MEAN) / STD          # (N, h, w, 3)
    if len(x) % TEMPORAL_PATCH:
        x = torch.cat([x, x[-1:]])                           # an image fills its patch twice
    t, rows, columns = len(x) // TEMPORAL_PATCH, h // PATCH, w // PATCH
    x = x.view(t, TEMPORAL_PATCH, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    # temporal patch, merged row, merged column, then the patch in it by row and column, then
    # colour, frame, row, column
    x = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return x.reshape(t * rows * columns, -1), (t, rows, columns)


# ---------------------------------------------------------------------------------------- records

# What SFT trains apart from the answer: tag → name in record files.
TRACE_FIELDS = {tag: "process" if tag == "think" else tag for tag in TAGS if tag != "answer"}


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
    trace: dict[str, str] = field(default_factory=dict, hash=False)   # tag → text, in SFT files
    data_source: str = ""                                    # where the question comes from
    blind: bool = False                                      # the model does not see the medium
    given: str | None = None                                 # an observation the response begins with
    rate: float = 0.0                                        # frames a second of a folder; 0: unknown


def read_records(file: str | Path, traces: bool = False) -> list[Record]:
    """Reads a JSON list or JSON lines. `traces`: each record must have one. Raises ValueError,
    naming the record."""
    records = []
    try:
        for row in json_rows(Path(file)):
            records.append(to_record(row, traces))
    except Exception as error:                               # a row of another form can cause any
        where = f"{file}, record {len(records) + 1}"
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from None
    if not records:
        raise ValueError(f"{file}: holds no records")
    return records


def json_rows(file: Path) -> Iterator:
    """The rows of a JSON list, or of JSON lines."""
    text = file.read_text("utf-8-sig").strip()
    if text.startswith("["):
        yield from json.loads(text)
        return
    for line in text.split("\n"):                            # splitlines would also cut at U+2028
        if line.strip():
            yield json.loads(line)


def to_record(row: dict, traces: bool) -> Record:
    """Checks a row of a record file: what would pay a wrong answer, or none, is refused. Raises
    ValueError, or what Python raises for a row of another form."""
    json.dumps(row, ensure_ascii=False).encode()             # ValueError for a lone surrogate
    for name, known in (("problem_type", PROBLEM_TYPES), ("data_type", ("image", "video"))):
        if row[name] not in known:
            raise ValueError(f"unknown {name} {row[name]!r}; known are {', '.join(known)}")
    solution = row["solution"]
    reference = str(solution).strip()
    if "answer>" in reference:
        reference = extract_tag("answer", reference)
    if type(solution) not in (str, int, float) or solution != solution or not reference:   # NaN
        raise ValueError(f"solution is not one answer, a text or a number: {solution!r:.80}")
    options = read_options(row.get("options"))
    if row["problem_type"] == "multiple choice":
        if len(options) == 1:
            raise ValueError("a multiple choice has one option")
        rewards.check_letters(options, reference)
    for name in ("problem", "path", *(TRACE_FIELDS.values() if traces else ())):
        if not (row[name] or "").strip():
            raise ValueError(f"lacks {name}")
    trace = {}
    for tag, name in TRACE_FIELDS.items():
        if text := (row.get(name) or "").strip():            # in its tags or without them
            trace[tag] = extract_tag(tag, text) if matches_template(text, [tag]) else text
    return Record(str(row.get("problem_id", "")), row["problem"], options, row["problem_type"],
                  reference, row["path"], row["data_type"], trace,
                  str(row.get("data_source") or ""), bool(row.get("blind")))


def read_options(options) -> tuple[str, ...]:
    """Options as texts. In the RL file of the release every value is a string, a list too."""
    if isinstance(options, str) and options:
        options = ast.literal_eval(options)
    options = options or []
    texts = isinstance(options, list | tuple) and all(isinstance(x, str) for x in options)
    if not texts:
        raise ValueError(f"options are no list of texts: {options!r:.80}")
    return tuple(options)


def to_row(r: Record) -> dict:
    row = dict(problem_id=r.problem_id, problem=r.question, options=list(r.options),
               problem_type=r.problem_type, solution=f"<answer>{r.reference}</answer>",
               answer=r.reference, path=r.path, data_type=r.data_type, data_source=r.data_source)
    return row | {name: r.trace.get(tag) for tag, name in TRACE_FIELDS.items()}


def read_media(r: Record, root: Path, settings: InputSettings) -> tuple[np.ndarray, float, int]:
    """Frames, seconds per temporal patch (0 for an image), and most pixels of a frame. Raises
    MediaError."""
    path = root / r.path
    try:
        root, target = root.resolve(), path.resolve()
        there = target.is_file() or target.is_dir()          # no pipe, no device
    except (OSError, ValueError, RuntimeError) as error:     # too long, a zero byte, a cycle
        raise MediaError(f"no file can have this path: {error}") from None
    # In a Hugging Face cache, what lies below snapshots/ are links into blobs/ beside it.
    blobs = [folder.parent / "blobs" for folder in root.parents if folder.name == "snapshots"]
    if not any(target.is_relative_to(folder) for folder in [root, *blobs]):
        raise MediaError("its path, or a link on it, leads out of the media folder")
    if not there:
        raise MediaError("no such file")
    if r.data_type == "image":
        return read_image(path), 0.0, settings.image_max_pixels
    return *read_video(path, settings, r.rate), settings.max_pixels


# ---------------------------------------------------------------------------------------- prompts

THINK_ALONE = ("Reason step by step about what the {medium} shows, talking to yourself, and check "
               "the result before you settle on it.")        # without an observation before it
TYPE_LINES = {
    "multiple choice": "Answer with the letter of the correct option.",
    "numerical": "Answer with one exact number.",
    "OCR": "Answer with the text that is written there.",
    "free-form": "Answer with one short sentence.",
    "regression": "Answer with one number, as close as you can."}


def template_tags(template: str) -> list[rewards.Tag]:
    """The tags of a response in order. `think`, the process-agnostic baseline, has the last segment
    only."""
    segments = SEGMENTS[-1:] if template == "think" else SEGMENTS
    return [tag for segment in segments for tag in segment.tags]


def instruction(record: Record, settings: InputSettings) -> str:
    """The user's text: question, options, what is expected. The same for data generation, SFT, RL
    and evaluation."""
    lines = [record.question]
    if record.options:
        lines += ["Options:", *rewards.letter_options(record.options)]
    if settings.prompt == "full":
        lines.append("Answer in these parts, in this order and with exactly these tags:")
        for tag in template_tags(settings.template):
            alone = settings.template == "think" and tag.name == "think"
            text = THINK_ALONE if alone else tag.instruction
            lines.append(f"<{tag.name}>{text.format(medium=record.data_type)}</{tag.name}>")
    return "\n".join([*lines, TYPE_LINES[record.problem_type]])


def trace_text(record: Record, template: str) -> str:
    """The response that SFT teaches: every tag of the template with its text. A given observation
    is in the prompt. Template `none`: a record without a trace has its bare answer."""
    if template == "none" and not record.trace:
        return record.reference
    texts, lines = record.trace | {"answer": record.reference}, []
    for tag in template_tags(template):
        if record.given is None or tag.name != "observation":
            lines.append(f"<{tag.name}> {texts[tag.name]} </{tag.name}>")
    return "\n".join(lines)


class Vocabulary:
    """A checkpoint's tokenizer with the bytes of each token, stop tokens, and tokens that are never
    sampled."""

    def __init__(self, folder: str | Path):
        if not (Path(folder) / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        from transformers import PreTrainedTokenizerFast     # slow to import
        from transformers.convert_slow_tokenizer import bytes_to_unicode
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        self.id, self.bytes = self.tokenizer.get_added_vocab(), []     # special tokens; all bytes
        to_byte = {char: byte for byte, char in bytes_to_unicode().items()}
        for piece in self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer))):
            special = piece in self.id
            self.bytes.append(piece.encode() if special else bytes(map(to_byte.get, piece)))
        self.stop_ids = [self.id["<|im_end|>"], self.id["<|endoftext|>"]]

    def encode(self, text: str) -> list[int]:
        """Special tokens written in the text are encoded as ordinary text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled tokens, without the stop token at the end."""
        if len(ids) and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", errors="replace")

    def mask_special_tokens(self, model: Qwen2_5_VL) -> Qwen2_5_VL:
        """Takes placeholders and the padded end of the vocabulary out of the model's
        distribution."""
        placeholders = [i for text, i in self.id.items() if re.search("vision|image|video", text)]
        padding = range(len(self.bytes), model.config.vocab_size)
        model.masked_token_ids = torch.tensor([*placeholders, *padding])
        return model


# --------------------------------------------------------------------------------------- examples

class Example(NamedTuple):
    """A tokenized record with its patches."""
    record: Record
    ids: Tensor                                              # (P,)
    positions: Tensor                                        # (3, P)
    next_position: int
    pixels: Tensor | None                                    # (S, 1176), None without a medium
    grid: tuple[int, int, int] | None
    seconds: float                                           # per temporal patch, 0 for an image


@lru_cache(maxsize=4)                                        # benchmarks ask several about one clip
def media_patches(medium: Record, root: Path, settings: InputSettings
                  ) -> tuple[Tensor, tuple[int, int, int], float]:
    frames, seconds, max_pixels = read_media(medium, root, settings)
    min_pixels = min(settings.min_pixels, max_pixels)
    return *patchify(frames, min_pixels, max_pixels), seconds


def build_example(r: Record, root: Path, v: Vocabulary, config: Config, settings: InputSettings
                  ) -> Example:
    """Reads the medium and lays out the prompt, Qwen's chat up to the response. Raises
    MediaError."""
    pixels, grid, seconds, medium = None, None, 0.0, []
    if not r.blind:
        clip = Record("", "", (), "", "", r.path, r.data_type, rate=r.rate)   # of any question
        pixels, grid, seconds = media_patches(clip, root, settings)
        pad = config.video_token_id if r.data_type == "video" else config.image_token_id
        places = [pad] * (len(pixels) // MERGE ** 2)
        medium = [v.id["<|vision_start|>"], *places, v.id["<|vision_end|>"]]
    start, ids = v.id["<|im_start|>"], []
    end = [v.id["<|im_end|>"], *v.encode("\n")]
    if settings.prompt != "short":
        ids += [start, *v.encode("system\nYou are a helpful assistant."), *end]
    question = v.encode(instruction(r, settings))
    ids += [start, *v.encode("user\n"), *medium, *question, *end]
    ids += [start, *v.encode("assistant\n")]
    if r.given is not None:
        ids += v.encode(f"<observation> {r.given} </observation>\n")
    ids, grids = torch.tensor(ids), [grid] if grid else []
    positions, following = mrope_positions(ids, grids, [seconds] * len(grids), config)
    return Example(r, ids, positions, following, pixels, grid, seconds)


def blank_example(v: Vocabulary) -> Example:
    """A picture without a question, for a rank without questions: all ranks must run the same
    passes."""
    names = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    ids = torch.tensor([v.id[name] for name in names])
    pixels = torch.zeros(MERGE ** 2, 3 * TEMPORAL_PATCH * PATCH ** 2)
    record = Record("", "", (), "numerical", "0", "", "image")
    positions = torch.arange(3).expand(3, -1)
    return Example(record, ids, positions, 3, pixels, (1, MERGE, MERGE), 0.0)


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
    whole = len(r.trace) == len(TRACE_FIELDS) and r.given is None
    return "trace: it breaks the template" if whole and not all(parse(trace_text(r, "p2r")).formats) else ""


CACHE_BYTES = 2 ** 29                                        # decoded media kept for the next epoch


@dataclass
class Examples:
    """Records that become examples when asked for. One that cannot is None, counted, and named in
    the file `log`."""
    records: list[Record]
    root: str | Path
    vocabulary: Vocabulary
    config: Config
    settings: InputSettings
    log: Path | None = None
    max_unreadable: float = 0.2                              # share of media above which a run stops
    teaching: bool = True                                    # leave out what `why_invalid` names
    asked: set[int] = field(default_factory=set)
    skipped: dict[int, str] = field(default_factory=dict)    # index → reason
    cache: dict[int, Example] = field(default_factory=dict)
    room: int = CACHE_BYTES

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example | None:
        if i in self.cache or i in self.skipped:
            return self.cache.get(i)
        self.asked.add(i)
        try:
            example = self.build(self.records[i])
        except (MediaError, ValueError) as error:
            self.skipped[i] = str(error)
            if self.log:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(f"{self.records[i].path}\t{error}\n")
            return None
        size = 0 if example.pixels is None else example.pixels.nbytes
        if size <= self.room:
            self.room -= size
            self.cache[i] = example
        return example

    def build(self, r: Record) -> Example:
        """Raises ValueError or MediaError with the reason why the record is skipped."""
        if self.teaching and (reason := why_invalid(r)):
            raise ValueError(reason)
        try:
            example = build_example(r, Path(self.root), self.vocabulary, self.config, self.settings)
        except MediaError as error:
            raise MediaError(f"media: {error}") from None
        if len(example.ids) > self.settings.max_prompt:
            raise ValueError(f"prompt: {len(example.ids)} tokens, over --max-prompt "
                             f"{self.settings.max_prompt}")
        return example

    def prefetch(self, steps: Iterable[Sequence[int]]) -> Iterator[list[Example]]:
        """Yields the examples of each step's indices, while threads read those of the next two
        steps. ValueError if many media cannot be read."""
        waiting, pool = [], ThreadPoolExecutor(self.settings.workers)
        try:
            for indices in [*steps, (), ()]:                 # two empty ones: the last two come out
                waiting.append([pool.submit(self.__getitem__, i) for i in indices])
                if len(waiting) < 3:
                    continue
                examples = [future.result() for future in waiting.pop(0)]
                self.check_media()
                yield [example for example in examples if example]
        finally:
            pool.shutdown(cancel_futures=True)

    def check_media(self) -> None:
        reasons = list(self.skipped.items())                 # other threads add to it
        lost = [i for i, reason in reasons if reason.startswith("media")]
        enough = len(self.asked) >= min(20, len(self))
        if enough and len(lost) > self.max_unreadable * len(self.asked):
            raise ValueError(f"{len(lost)} of {len(self.asked)} media cannot be read, such as "
                             f"{self.records[lost[0]].path} ({self.skipped[lost[0]]}). Is "
                             f"{self.root} the right media folder?")


def find_media(records: list[Record], root: str | Path, file: Path) -> list[int]:
    """Indices of the records whose media exist under `root`. They are kept in `file`: a run that is
    resumed has the same order when more media have arrived. SystemExit if there are none."""
    if file.is_file() and file.with_name("settings.json").is_file():     # the run has begun
        return [i for i in json.loads(file.read_text()) if i < len(records)]
    paths = {r.path for r in records}
    there = {path for path in paths if (Path(root) / path).exists()}
    found = [i for i, r in enumerate(records) if r.blind or r.path in there]
    if len(found) < len(records):
        print(f"{len(found):,} of {len(records):,} records have their media under {root}")
    if not found:
        raise SystemExit(f"{root} holds none of the media. The release's come with\n    hf download "
                         "Video-R1/Video-R1-data --repo-type dataset --local-dir "
                         "data/Video-R1-data   # 310 GB, a part is fine; unzip in place")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(found))
    return found


@lru_cache(maxsize=2)
def epoch_order(count: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def step_indices(count: int, size: int, step: int, seed: int) -> list[int]:
    """The records of a step: epoch after epoch, each shuffled anew. No sampler has to be saved."""
    indices = []
    for place in range(step * size, (step + 1) * size):
        order = epoch_order(count, place // count, seed)
        indices.append(order[place % count])
    return indices


def collate(examples: Sequence[Example]) -> Prompts:
    """Pads prompts on the right and joins their media, in the order of prompts."""
    pixels = [e.pixels for e in examples if e.pixels is not None]
    positions = pad_sequence([e.positions.T for e in examples])            # (P, B, 3)
    return Prompts(ids=pad_sequence([e.ids for e in examples], batch_first=True),
                   lengths=torch.tensor([len(e.ids) for e in examples]),
                   positions=positions.permute(2, 1, 0),                   # (3, B, P)
                   next_position=torch.tensor([e.next_position for e in examples]),
                   pixels=torch.cat(pixels) if pixels else None,
                   grid=[e.grid for e in examples if e.grid])


def question_uniforms(seed: int, stream: str, r: Record, group: int, tokens: int) -> Tensor:
    """The random numbers of a question's responses, (G, T): the same ones on any number of ranks."""
    key = f"{seed}/{stream}/{r.problem_id}/{r.path}/{r.question}"
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(group, tokens, generator=generator)


# ---------------------------------------------------------------------------------- the toy world

TOY_INPUT = dict(prompt="short", frames=6, min_pixels=28 * 28, max_pixels=28 * 28)      # settings
TOY_SIZE, TOY_FPS = 56, 2                                    # pixels; two frames for each letter
TOY_SPLITS = {"captions": 1200, "base": 4000, "sft": 1000, "rl": 1600, "heldout": 512}   # records
# How bright the letter behind is, next to the one in front. Clips for pre-training and SFT are clear.
TOY_BEHIND = {"rl": (0.6, 1.0), "heldout": (0.6, 1.0)}
CLEAR = 0.0, 0.3
# Pre-training is on captions, then on traces too. Most of its traces have no clip, but the observation
# in the prompt: like Qwen, the base learns to reason from texts.
CAPTION, WRONG_LETTERS = "What does the clip show?", 0.1     # share: the base stays unsure
CAPTIONS, TEXTS = {"captions": 1.0, "base": 0.15}, 0.92      # shares of a split, and of its traces
COLOURS, LETTERS = ("red", "green", "blue", "yellow"), ("O", "X", "T")
PAINT = {"red": (215, 50, 45), "green": (50, 170, 70), "blue": (55, 85, 220), "yellow": (220, 190, 40)}
PRICES = {"O": 3, "X": 2, "T": 1}
TOY_EVENTS = 3                                               # letters shown one after the other
# name → problem type and text; {} is a letter. Of two that fit a question the later one wins.
TOY_QUESTIONS = {
    "next": ("multiple choice", "Which letter comes right after the {}?"),
    "count": ("numerical", "How many letters are {}?"),
    "read": ("OCR", "Read the letters that are not {}."),
    "ends": ("free-form", "How does the clip begin and end?"),
    "total": ("regression", "O costs 3, X costs 2, T costs 1. What is the total?"),
}


class Toy(NamedTuple):
    """A toy question, read back from its text."""
    name: str                                                # in TOY_QUESTIONS
    asked: str                                               # "O" in "How many letters are O?"
    options: list[str]                                       # without their letters


def read_toy(r: Record | Claim) -> Toy | None:
    """None for a question that is not of the toy world."""
    for name, (kind, text) in reversed(TOY_QUESTIONS.items()):
        pattern = re.escape(text).replace(r"\{\}", "(.*)")
        match = re.fullmatch(pattern, r.question)
        if match and kind == r.problem_type:
            return Toy(name, "".join(match.groups()), rewards.split_options(r.options))
    return None


def toy_answer(toy: Toy, shown: list[str]) -> str | None:
    """The answer that follows from the letters shown, such as ["red O", "blue X", "red T"]; None if
    none does."""
    if len(shown) != TOY_EVENTS:
        return None
    letters = [x[-1] for x in shown]
    if toy.name == "next":
        if letters[:-1].count(toy.asked) != 1:
            return None
        after = shown[letters.index(toy.asked) + 1]
        return "ABC"[toy.options.index(after)] if after in toy.options else None
    if toy.name == "count":
        return str(letters.count(toy.asked))
    if toy.name == "read":
        return " ".join(x for x in letters if x != toy.asked) or None
    if toy.name == "ends":
        return f"a {shown[0]} turns into a {shown[-1]}"
    if toy.name == "total":
        return str(sum(PRICES[x] for x in letters))
    raise ValueError(f"toy_answer does not know {toy.name!r}")


def toy_observation(toy: Toy, shown: list[str]) -> str:
    """["red O", "blue X", "red T"] → "1 red O, 2 blue X, 3 red T" """
    return ", ".join(f"{i} {x}" for i, x in enumerate(shown, start=1))


def toy_think(toy: Toy, shown: list[str]) -> str:
    """Reasoning in small steps: a small model cannot learn to jump to the result. Comparisons read
    alike in three types of problem: what one teaches serves the others."""
    def same(x: str, y: str) -> str:                         # "O X? no"
        return f"{x} {y}? {'yes' if x == y else 'no'}"
    letters, steps, count, kept = [x[-1] for x in shown], [], 0, ""
    if toy.name == "next":
        place = letters.index(toy.asked)
        steps = [same(x, toy.asked) for x in letters[:place + 1]]
        after = shown[place + 1]
        steps.append(f"next {after}")
        right = toy.options.index(after)
        for name, option in zip("ABC", toy.options[:right + 1]):         # their letters differ
            steps.append(f"{name} {same(option[-1], after[-1])}")
    elif toy.name == "count":
        for x in letters:
            count += x == toy.asked
            steps.append(f"{same(x, toy.asked)} {count}")
    elif toy.name == "read":
        for x in letters:
            kept += f" {x}" if x != toy.asked else ""
            steps.append(f"{same(x, toy.asked)}{kept}")
    elif toy.name == "ends":
        steps = [f"first {shown[0]}", f"last {shown[-1]}"]
    elif toy.name == "total":
        total = 0
        for x in shown:
            total += PRICES[x[-1]]
            steps.append(f"{x} {total}")
    else:
        raise ValueError(f"toy_think does not know {toy.name!r}")
    return ", ".join(steps)


TOY_TEXTS = {"observation": toy_observation, "think": toy_think, "answer": toy_answer}   # tag → text


def letters_in(text: str) -> list[str]:
    """The coloured letters that a text names: "1 red O, 2 blue X" → ["red O", "blue X"]"""
    return re.findall(rf"\b(?:{'|'.join(COLOURS)}) [{''.join(LETTERS)}]\b", text)


def rule_judge(claims: Sequence[Claim]) -> list[Verdict]:
    """Judges toy observations exactly: derives the answer from the observation's text alone and
    compares. Raises ValueError for a question that is not of the toy world: silence would look like
    "insufficient"."""
    verdicts = []
    for claim in claims:
        toy = read_toy(claim)
        if toy is None:
            raise ValueError(f"the rule judge knows toy questions only, not {claim.question!r}: "
                             "choose another --judge")
        shown = letters_in(claim.observation)
        derived = toy_answer(toy, shown)
        seen = ", ".join(shown) or "nothing seen"
        verdicts.append(Verdict(derived == claim.reference,
                                f"{seen}: from this follows {derived or 'nothing'}"))
    return verdicts


JUDGES = {"rule": rule_judge}                                # by their names in --judge


def is_toy(asked: Iterable[Record | Claim]) -> bool:
    return all(map(read_toy, asked))


GRID = np.mgrid[:TOY_SIZE, :TOY_SIZE] - TOY_SIZE / 2         # rows and columns, (2, 56, 56)


def draw(colour: str, letter: str, behind: tuple[float, float], rng: np.random.Generator
         ) -> np.ndarray:
    """One frame (56, 56, 3) uint8: a letter near the middle, of varying size and brightness, with
    noise. Behind it is another one, whose brightness is between the two numbers of `behind`."""
    frame = np.full((3, TOY_SIZE, TOY_SIZE), rng.uniform(20, 50))
    other = rng.choice(COLOURS), rng.choice(LETTERS), rng.uniform(*behind)
    for paint, shape, strength in (other, (colour, letter, 1)):
        y, x = GRID - rng.uniform(-2, 2, (2, 1, 1))
        inside = ink(shape, x, y, rng.uniform(17, 20), rng.uniform(3.5, 4.5))
        colour_of = np.reshape(PAINT[paint], (3, 1, 1)) * rng.uniform(0.75, 1.1)
        frame += strength * inside * (colour_of - frame)
    noise = rng.integers(-1, 2, (TOY_SIZE // 2, TOY_SIZE // 2)) * 16
    noise = noise.repeat(2, 0).repeat(2, 1)                  # coarse: small files
    return (frame + noise).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def ink(letter: str, x: np.ndarray, y: np.ndarray, r: float, thick: float) -> np.ndarray:
    """Where a letter is, from -r to r on both axes."""
    if letter == "O":
        return abs(np.hypot(x, y) - r + thick) < thick
    if letter == "X":
        return (abs(abs(x) - abs(y)) < 1.4 * thick) & (abs(x) < r) & (abs(y) < r)
    return (abs(y) < r) & (abs(x) < thick) | (abs(x) < r) & (abs(y + r - thick) < thick)


def toy_record(rng: random.Random, number: int, split: str) -> tuple[dict, list[str]]:
    """A question about three letters with answer and correct trace, or a caption; and the letters
    shown."""
    problem_type = PROBLEM_TYPES[number % len(PROBLEM_TYPES)]
    texts = [text for kind, text in TOY_QUESTIONS.values() if kind == problem_type]
    text = texts[number // len(PROBLEM_TYPES) % len(texts)]
    everything = [f"{colour} {letter}" for colour in COLOURS for letter in LETTERS]
    answer = None
    while answer is None:                                    # some draws have no answer
        shown = [rng.choice(everything) for _ in range(TOY_EVENTS)]
        asked, options = rng.choice(shown)[-1], []
        if problem_type == "multiple choice":                # an option for each letter
            place = rng.randrange(TOY_EVENTS - 1)
            asked, right = shown[place][-1], shown[place + 1]
            for letter in rng.sample(LETTERS, len(LETTERS)):
                options.append(right if letter in right else f"{rng.choice(COLOURS)} {letter}")
        question = text.format(asked)
        toy = read_toy(Record("", question, tuple(options), problem_type, "", "", "video"))
        answer = toy_answer(toy, shown)
    trace = {name: TOY_TEXTS[tag](toy, shown) for tag, name in TRACE_FIELDS.items()}
    if split in CAPTIONS and rng.random() >= CAPTIONS[split]:
        trace["blind"] = rng.random() < TEXTS
    elif split in CAPTIONS:
        said = [rng.choice(everything) if rng.random() < WRONG_LETTERS else x for x in shown]
        problem_type, question, options, trace = "free-form", CAPTION, [], {}
        answer = toy_observation(toy, said)
    return {"problem_id": f"{split}-{number}", "problem": question,
            "options": rewards.letter_options(options), "data_type": "video",
            "problem_type": problem_type, "solution": f"<answer>{answer}</answer>", "answer": answer,
            "path": f"./{split}/{number:05d}.apng", "data_source": "toy", **trace}, shown


def toy_clip(seed: int, split: str, number: int) -> bytes:
    """The clip of a record, an animated PNG: lossless, and browsers show it. Each record has a seed
    of its own: no held-out clip is a training clip."""
    rng = random.Random(f"{seed}/{split}/{number}")
    _, shown = toy_record(rng, number, split)
    noise, frames = np.random.default_rng(rng.getrandbits(64)), []
    for x in shown:
        for _ in range(2):
            frame = draw(*x.split(), TOY_BEHIND.get(split, CLEAR), noise)
            frames.append(Image.fromarray(frame))
    frames[0].save(buffer := io.BytesIO(), "PNG", save_all=True, append_images=frames[1:],
                   duration=1000 // TOY_FPS, compress_level=1)
    return buffer.getvalue()


def write_clip(folder: Path, seed: int, split: str, number: int) -> None:
    (folder / f"{number:05d}.apng").write_bytes(toy_clip(seed, split, number))


def two_processes():
    """A pool of two processes, or of one thread where a fork is not safe. The processes ignore
    Ctrl-C: the one that has the pool ends them."""
    if sys.platform != "linux":
        return ThreadPool(1)
    return get_context("fork").Pool(2, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def make_toy(folder: str | Path, splits: dict[str, int] = TOY_SPLITS, seed: int = 0) -> Path:
    """Writes clips and `<split>.json`, unless they are there as the code would write them now."""
    for split, count in splits.items():
        file, clips = Path(folder) / f"{split}.json", Path(folder) / split
        rows, drawn = [], []
        for number in range(count):
            row, _ = toy_record(random.Random(f"{seed}/{split}/{number}"), number, split)
            rows.append(row)
            if not row.get("blind"):
                drawn.append(number)
        text = json.dumps(rows, indent=1)
        if drawn and file.is_file() and file.read_text() == text:
            first = clips / f"{drawn[0]:05d}.apng"
            if first.is_file() and first.read_bytes() == toy_clip(seed, split, drawn[0]):
                continue
        file.unlink(missing_ok=True)                         # written again when its clips are there
        clips.mkdir(parents=True, exist_ok=True)
        write = partial(write_clip, clips, seed, split)
        with two_processes() as pool:
            written = pool.imap_unordered(write, drawn, 16)
            list(tqdm(written, f"toy clips, {split}", len(drawn), unit="clip"))
        write_atomically(file, text)
    return Path(folder)


def make_toy_model(folder: str | Path, seed: int, config: Config = CONFIGS["tiny"]) -> None:
    """Writes a random tiny Qwen2.5-VL, and a byte-level tokenizer with a token for each word of the
    toy world."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    pieces = Regex(r" ?</?[a-z]+>\n?| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s")
    cut = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = ["system\nYou are a helpful assistant.\n", "user\n", "assistant\n", "0123456789", CAPTION]
    rng, words = random.Random(0), set()
    for number in range(500):
        record = to_record(toy_record(rng, number, "words")[0], True)
        question = instruction(record, InputSettings(prompt="short"))
        texts += [question, trace_text(record, "p2r")]
    for text in texts:
        words |= {piece for piece, _ in cut.pre_tokenize_str(text) if len(piece) > 1}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    pieces = specials + sorted(pre_tokenizers.ByteLevel.alphabet()) + sorted(words)
    assert len(pieces) <= config.vocab_size
    # ignore_merges: a piece of the vocabulary is one token, any other is split into its bytes.
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, [], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                        pad_token="<|endoftext|>")

    def write_extra(where: Path) -> None:
        tokenizer.save_pretrained(str(where))
        write_config(config, where, stop_ids=[2, 0])
    weights = init_weights(Qwen2_5_VL(config), seed).named_parameters()
    save_model(dict(weights), folder, write_extra=write_extra)


# ================================ a first reader may stop here ================================

# --------------------------------------------------------------------------------------- decoding

def decode(path: Path, settings: InputSettings, beat: Callable) -> tuple[np.ndarray, float]:
    """`read_video` of a file. Calls `beat` at each frame. Short clips are read on from the start: a
    seek costs as much as decoding some hundred frames, and is not exact in every file."""
    with path.open("rb") as file:
        head = file.read(12)
    if re.match(rb"(?s)GIF8|.PNG|RIFF....WEBP", head):
        return read_animation(path, settings, beat)
    reader, fps, total, exact = open_video(path)
    (indices, seconds), frames = frame_indices(total, fps, settings), {}
    if exact and total > READ_ON:
        frames = seek(reader, indices, beat)
    if not frames:
        frames = read_on(reader, indices, total, beat)
    return np.stack([frames[i] for i in indices]), seconds


def read_animation(path: Path, settings: InputSettings, beat: Callable) -> tuple[np.ndarray, float]:
    """`decode` of a GIF, PNG or WebP. Each frame counts as long as the first one."""
    with Image.open(path) as image:
        if image.n_frames == 1:
            raise MediaError("a picture, not a video")
        image.load()                                         # a WebP tells its duration then
        fps = 1000 / (image.info.get("duration") or 100)     # browsers, too, show 0 as 100 ms
        (indices, seconds), frames = frame_indices(image.n_frames, fps, settings), []
        for i in indices:
            image.seek(i)
            frames.append(to_rgb(image))
            beat()
        return np.stack(frames), seconds


def open_video(path: Path) -> tuple:
    """A decord.VideoReader, frames a second, the number of frames that a viewer shows, and whether
    it may seek: each frame has its time, and none is hidden."""
    import decord                                            # not at the top: torch comes before it
    # fault_tol: a frame that cannot be decoded is an error
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)
    fps = reader.get_avg_fps()
    starts = reader.get_frame_timestamp(range(len(reader)))[:, 0]      # seconds
    gaps = np.diff(starts)
    if not (len(gaps) and gaps.min() > 0):                   # AVI and MPEG do not time all frames
        return reader, fps, len(starts), False
    measured = 1 / float(gaps.mean())
    if not math.isclose(fps, measured, rel_tol=0.01):        # the header knows no variable rate
        fps = measured
    shown = int((starts >= 0).sum())                         # an edit list hides what is before 0
    gapless = gaps.min() > np.median(gaps) / 2               # VP8 hides frames that last no time
    return reader, fps, shown, shown == len(starts) and gapless


def seek(reader, indices: list[int], beat: Callable) -> dict[int, np.ndarray]:
    """Index → frame. Empty if a seek is not exact: decord counts key frames in the order of
    decoding. They are shown later where frames before a key frame need it (open groups, usual in
    HEVC and MPEG-2)."""
    from decord.video_reader import _CAPI_VideoReaderGetCurrentPosition as position
    keys, key, frames = [0, *reader.get_key_indices()], None, {}
    with suppress(Exception):                                # then reading on tells what is wrong
        reader.next()                                        # the first seek is a seek, too
        for i in indices:
            nearest = keys[bisect_right(keys, i) - 1]
            if nearest != key:
                key = nearest
                reader.seek_accurate(key)
                if position(reader._handle) != key + 1:      # another frame has this time
                    return {}
                frame = reader.next()
            if i > key:
                frame = reader[i]
            frames[i] = frame.asnumpy()
            beat()
        return frames
    return {}


def read_on(reader, indices: list[int], total: int, beat: Callable) -> dict[int, np.ndarray]:
    """Index → frame. Decodes all frames: only where `total` come is the number of each known."""
    from decord import DECORDLimitReachedError
    frames, count = {}, 0
    reader.seek(0)
    with suppress(StopIteration, DECORDLimitReachedError):
        while True:
            frame = reader.next()
            if count in indices:
                frames[count] = frame.asnumpy()
            count += 1
            beat()
    if count != total:
        raise ValueError(f"{count} of {total} frames can be decoded")
    return frames


# ----------------------------------------------------------------------------- judges and teachers

THRESHOLD = 0.6                                              # of a correct answer (paper)


@dataclass(frozen=True)
class JudgeSettings:
    """The judge of observations."""
    judge: str = flag("rule", "rule (toy world), reference (in RL the KL reference, in evaluation the "
                      "model itself) or http(s)://…/v1", built_in=(*JUDGES, "reference"))
    judge_model: str = flag("", "name of an http judge's model (key: JUDGE_API_KEY)")
    judge_tokens: int = flag(512, "maximum number of tokens in a judge's reply; a reasoning model "
                             "needs more", minimum=1)
    refuse_leaks: bool = flag(True, "an observation that only states an answer is refused without "
                              "a judge")
    concurrency: int = flag(64, "maximum number of concurrent requests to a server, for each rank",
                            minimum=1, may_change=True)
    timeout: float = flag(60.0, "seconds without data after which a request is tried again",
                          minimum=0.01, may_change=True)
    retries: int = flag(24, "retries of a failed request, 0.5 to 8 s apart: 24 outlast an outage of "
                        "two minutes", minimum=0, may_change=True)
    max_unknown: float = flag(0.2, "largest share of missing verdicts or traces; above it the run "
                              "stops", minimum=0, may_change=True)


def is_http(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def check_address(name: str, value: str, built_in: Sequence[str], model: str) -> None:
    """SystemExit if --judge or --teacher names no server. An address may hold a key: it is not
    shown."""
    if not is_http(value):
        raise SystemExit(f"{name} {value}: neither {', '.join(built_in)} nor an address; a model in "
                         "a folder can be served: `transformers serve` or `vllm serve`")
    if not re.fullmatch(r"https?://[^/:@?#][^@?#]*", value):
        raise SystemExit(f"{name}: an address is like https://host:port/v1; keys come from the "
                         "environment")
    if not (model and find_spec("openai")):
        raise SystemExit(f"{name} {value} needs {name}-model, and `pip install openai`")


def ask_server(s: JudgeSettings, name: str, **body) -> Callable[[list[dict]], Reply]:
    """A function that asks the server which --judge or --teacher names, with its key from
    JUDGE_API_KEY or TEACHER_API_KEY."""
    key = os.environ.get(f"{name.upper()}_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):            # it fits no header; do not show it
        raise ValueError(f"{name.upper()}_API_KEY holds characters that no key can have")
    url, body["model"] = getattr(s, name), getattr(s, f"{name}_model")
    return rewards.ChatClient(url, key, s.timeout, s.retries, body).ask


def make_judge(s: JudgeSettings, place: Path | None = None, reference: Judge | None = None,
               rank: int = 0, title: str = "") -> Judge:
    """The judge that --judge names, a function from claims to verdicts. place: of the journal of a
    server's replies; reference: what --judge reference calls; title: of the progress bar."""
    decide = JUDGES.get(s.judge, reference)
    if decide is None and not is_http(s.judge):
        raise SystemExit(f"--judge {s.judge} needs a model: choose an http address")
    if s.judge_model and s.judge == "reference":
        raise SystemExit("--judge-model names a server's model: give the server with --judge")
    if is_http(s.judge):
        ask = ask_server(s, "judge", max_tokens=s.judge_tokens, temperature=0)
        same = [s.judge_model, s.judge_tokens, rewards.JUDGE_PROMPT]   # not the address
        decide = partial(rewards.judge_by_server, ask, same, rewards.Journal(place, rank),
                         threads=s.concurrency, title=title,
                         max_failed=s.max_unknown if title else 1)
    return partial(rewards.judge_claims, decide, s.refuse_leaks)


def claim_about(r: Record, observation: str) -> Claim:
    return Claim(r.question, r.options, r.problem_type, r.reference, observation, r.data_type)




def picture(frame: np.ndarray) -> str:
    """A frame (height, width, 3) uint8 as a data address, for servers and pages."""
    Image.fromarray(frame).save(buffer := io.BytesIO(), "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def teacher_chat(r: Record, s: CotSettings) -> list[dict]:
    """The conversation that asks for a trace: frames, then the instruction. Raises MediaError."""
    content, root = [], Path(s.media or Path(s.data).parent)
    frames, _, most = read_media(r, root, s)
    for frame in resize(frames, min(s.min_pixels, most), most):
        content.append({"type": "image_url", "image_url": {"url": picture(frame)}})
    content.append({"type": "text", "text": instruction(r, s)})
    return [{"role": "user", "content": content}]


def teach(ask: Callable | None, s: CotSettings, r: Record) -> dict:
    """The teacher's output on a record, and an error if there is none. None as `ask`: the toy
    teacher."""
    try:
        text, error = ask(teacher_chat(r, s)) if ask else (toy_draft(r, s), "")
    except MediaError as problem:
        text, error = None, f"media: {problem}"
    return {"output": text, "error": "" if text else error}  # step 2 checks one that is cut off


def toy_draft(r: Record, s: CotSettings) -> str:
    """The toy teacher's trace, with mistakes at a known rate. Each changes the answer, but half of
    those in perception do not: there the reasoning follows what was shown, and only step 3 can
    catch it."""
    rng, toy = random.Random(f"{s.seed}/{r.problem_id}/{r.path}"), read_toy(r)
    seen = reasoned = shown = letters_in(r.trace["observation"])
    if rng.random() < s.mistakes:
        seen = misread(toy, shown, r, 1, rng)
        reasoned = shown if rng.random() < 0.5 else seen
    if rng.random() < s.mistakes:
        reasoned = misread(toy, shown, r, THRESHOLD, rng)
    texts = {}
    for tag in template_tags("p2r"):
        letters = seen if tag in SEGMENTS[0].tags else reasoned
        texts[tag.name] = TOY_TEXTS[tag.name](toy, letters)
    text = trace_text(replace(r, trace=texts, reference=texts["answer"]), "p2r")
    if rng.random() < s.mistakes / 5:
        text = text[:rng.randrange(len(text))]               # cut off: no </answer>
    return text


def misread(toy: Toy, shown: list[str], r: Record, below: float, rng: random.Random) -> list[str]:
    """Other letters than those shown, from which an answer follows that scores less than
    `below`."""
    while True:
        other = list(shown)
        for i in rng.sample(range(TOY_EVENTS), rng.randint(1, TOY_EVENTS)):
            other[i] = f"{rng.choice(COLOURS)} {rng.choice(LETTERS)}"
        answer = toy_answer(toy, other)
        if answer is not None and answer_score(r, answer) < below:
            return other


# ------------------------------------------------------------------------------ the data pipeline

@dataclass(frozen=True)
class CotSettings(InputSettings, JudgeSettings):
    """`python data.py cot`. Without --data: the toy world with the toy teacher."""
    data: str = flag("", "record file with questions (toy: made when missing)")
    media: str = flag("", "folder to which the records' paths are relative [the folder of --data]")
    out: str = flag("", "folder for the work and for traces.jsonl [runs/cot; toy: runs/tiny/cot]")
    limit: int = flag(0, "only the first N records; 0: all", minimum=0)
    teacher: str = flag("toy", "who writes traces: toy (toy world) or http(s)://…/v1",
                        built_in=("toy",))
    teacher_model: str = flag("", "name of an http teacher's model (key: TEACHER_API_KEY)")
    temperature: float = flag(0.0, "of a teacher's sampling; 0 is greedy", minimum=0)
    max_response: int = flag(1024, "maximum number of tokens in a trace", minimum=1)
    seed: int = flag(0, "decides a teacher's sampling, and the toy teacher's mistakes")
    mistakes: float = flag(0.1, "share of the toy teacher's traces with wrong letters, and as many "
                           "with wrong reasoning")


# What a reasoning teacher writes before the template. Its <think> may stand in the prompt.
OWN_REASONING = r"(?s)\A\s*(?:<think>.*?|(?:(?!<observation>).)*?)</think>\s*(?=<observation>)"
# What decides a draft, beside the record.
DECISIVE = ("prompt", "frames", "fps", "min_pixels", "max_pixels", "image_max_pixels", "teacher_model",
            "temperature", "max_response", "seed", "mistakes")
STEPS = {"not generated": "generated", "template broken": "template", "answer wrong": "answer",
         "not judged": "judged", "observation insufficient": "observation"}


def cot(s: CotSettings) -> Path:
    """Makes process-aware traces in three steps (paper, stage 1), and returns the file that SFT
    reads.

    Journals in --out grow by a line for each finished piece of work; traces.jsonl (kept) and
    dropped.jsonl (with reasons) come at the end. Started again, it does what is missing.
    """
    folder = Path(s.out)
    with lock_folder(folder):
        judge = make_judge(s, folder / "3-judged", title="3 observation sufficiency")
        records = {}                                         # equal ones are one
        for r in read_records(s.data)[:s.limit or None]:
            records[key_of(asdict(r), [getattr(s, name) for name in DECISIVE])] = r
        if (s.judge == "rule" or s.teacher == "toy") and not is_toy(records.values()):
            raise SystemExit("The toy teacher and the rule judge know toy records only: give "
                             "--teacher and --judge.")

        # Step 1, generate: a teacher writes a trace for every record.
        ask = None
        if is_http(s.teacher):
            ask = ask_server(s, "teacher", max_tokens=s.max_response, temperature=s.temperature,
                             seed=s.seed)
        journal = rewards.Journal(folder / "1-generated")
        drafts = journal.complete(records, partial(teach, ask, s), s.concurrency, "1 generate",
                                  s.max_unknown)

        # Step 2, verify: the template, and the answer's score.
        rows = [verify(r, drafts[key]) for key, r in records.items()]

        # Step 3, observation sufficiency: the judge reads nothing else.
        left = [(r, row) for r, row in zip(records.values(), rows) if row["select"]]
        claims = [claim_about(r, row["observation"]) for r, row in left]
        for (_, row), verdict in zip(left, judge(claims)):
            if not verdict.sufficient:
                reason = "not judged" if verdict.error else "observation insufficient"
                row |= dict(select=False, reason=reason, error=verdict.error)

        for name, select in (("traces", True), ("dropped", False)):
            chosen = [row for row in rows if row["select"] == select]
            write_rows(folder / f"{name}.jsonl", chosen)
        print(*funnel(rows), sep="\n", flush=True)
    return folder / "traces.jsonl"


def verify(r: Record, draft: dict) -> dict:
    """Step 2: the row of a record with its trace, `select` and, if it is dropped, the reason."""
    error, text = draft["error"], re.sub(OWN_REASONING, "", draft["output"] or "")
    contents, formats = parse(text)
    score, reason = answer_score(r, contents["answer"]), ""
    if error:
        reason = "not generated"
    elif not all(formats):
        reason = "template broken"
    elif score < THRESHOLD:
        reason = "answer wrong"
    row = to_row(replace(r, trace=contents))
    return row | dict(output=text, reward=score, select=not reason, reason=reason, error=error)



def funnel(rows: Iterable[dict]) -> list[str]:
    """How many records passed each step, and what is unfinished."""
    reasons = Counter(row["reason"] for row in rows)
    errors = Counter(row["error"] for row in rows if row["error"])
    left = reasons.total()
    table = [["step", "records"], ["all", str(left)]]
    for reason, step in STEPS.items():
        left -= reasons[reason]
        table.append([step, str(left)])
    lines = format_table(table) + [f"{left} of {reasons.total()} traces are kept for SFT"]
    for error, _ in errors.most_common(1):
        lines.append(f"{errors.total()} records are unfinished (most often: {error}); the same "
                     "command tries them again.")
    return lines


# ---------------------------------------------------------------------------- flags and commands

def add_flags(parser: argparse.ArgumentParser, cls, presets: dict[str, dict] = {},
              names: Iterable[str] = ()) -> None:
    """A flag for each setting of a dataclass, in a group for each class, those of the method first;
    or for those in `names`. One that is not given is not in the namespace."""
    left = {f.name: f for f in fields(cls) if not names or f.name in names}
    for part in cls.__mro__[:-1]:
        own = [left.pop(name) for name in part.__annotations__ if name in left]
        group = parser
        if not names:
            group = parser.add_argument_group(part.__doc__.split(".")[0])
        for f in own:
            group.add_argument("--" + f.name.replace("_", "-"), **flag_options(f, presets))


def flag_options(f: Field, presets: dict[str, dict]) -> dict:
    values = [f"default {f.default}"] if f.default != "" else []
    values += [f"{name} {row[f.name]}" for name, row in presets.items() if f.name in row]
    about = f.metadata["help"] + (f" [{'; '.join(values)}]" if values else "")
    options = {"default": argparse.SUPPRESS, "help": about.replace("%", "%%")}
    if isinstance(f.default, bool):
        return options | {"action": argparse.BooleanOptionalAction}
    if isinstance(f.default, tuple):
        return options | {"type": type(f.default[0]), "nargs": len(f.default)}
    return options | {"type": type(f.default), "choices": f.metadata["choices"]}



def check_settings(folder: Path, settings: InputSettings) -> None:
    """Writes settings.json. SystemExit, with the difference, if the folder holds work with other
    settings. One that is missing there counts as its default."""
    file, now = folder / "settings.json", json.loads(json.dumps(asdict(settings)))
    saved, defaults = read_json(file), asdict(type(settings)())
    before, changed = json.loads(json.dumps(defaults)) | saved, ""
    for f in fields(settings) if saved else ():
        old, new = before[f.name], now[f.name]
        moved = is_http(str(old)) and is_http(str(new))      # a judge at another address
        if old != new and not moved and not f.metadata["may_change"]:
            changed += f"  --{f.name.replace('_', '-')} was {old!r}, is now {new!r}\n"
    if changed:
        raise SystemExit(f"{folder} holds work with other settings:\n{changed}Use those or another "
                         "--out.")
    if saved != now:                                         # a finished run may be read-only
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, now)


def read_json(file: Path) -> dict:
    """The object in a JSON file; {} if there is none, or the file is damaged."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def write_atomically(file: Path, text: str) -> None:
    """After a kill the old text or the whole new one is there."""
    aside = file.with_name(file.name + ".writing")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)


def write_json(file: Path, value) -> None:
    write_atomically(file, json.dumps(value, indent=2) + "\n")


def write_rows(file: Path, rows: Iterable[dict]) -> None:
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table with a rule below its head, the first column to the left, the others to
    the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *values in rows:
        cells = [value.rjust(width) for value, width in zip(values, others)]
        lines.append("  ".join([name.ljust(first), *cells]).rstrip())
    lines.insert(1, "─" * max(map(len, lines)))
    return lines


@contextmanager
def lock_folder(folder: Path):
    """SystemExit while another process works in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"Another process works in {folder}.") from None
        except (ImportError, OSError):                       # Windows, and some network disks: there
            pass                                             # two runs in one folder go unnoticed
        yield


def main(argv: Sequence[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the toy world")
    toy.add_argument("--out", default="runs/tiny/toy", help="folder [runs/tiny/toy]")
    maker = commands.add_parser("cot", help="make traces for SFT: generate, verify, judge",
                                allow_abbrev=False, description=cot.__doc__, formatter_class=layout)
    add_flags(maker, CotSettings)
    given = vars(parser.parse_args(argv))
    try:
        if given.pop("command") == "toy":
            print(make_toy(given["out"]))
        else:
            run_cot(given)
    except (ValueError, OSError) as error:                   # also a full disk
        raise SystemExit(f"{error}")
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. Finished work is kept; the same command goes on from there.")


def run_cot(given: dict) -> None:
    """The pipeline with these flags; without --data in the toy world, beside --out."""
    if "data" not in given:
        small = {} if is_http(given.get("teacher", "")) else TOY_INPUT
        given = {"out": "runs/tiny/cot"} | small | given
        CotSettings(**given)                                 # refuses wrong flags before it is made
        given["data"] = str(make_toy(Path(given["out"]).parent / "toy") / "sft.json")
    traces = cot(CotSettings(**{"out": "runs/cot"} | given))
    if not traces.stat().st_size:
        raise SystemExit("No trace was kept.")


if __name__ == "__main__":
    main()
