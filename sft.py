"""Stage 1, supervised fine-tuning (SFT): the model learns to write observation, think and answer.

    python sft.py                                        the toy world on any machine: runs/tiny/sft
    torchrun --nproc_per_node=8 sft.py --preset 7b       VideoP2R-CoT-162K on eight GPUs: runs/7b/sft

The loss is the cross-entropy of the response tokens; prompt and video are masked. It is
`Qwen2_5_VL.logprobs`, as in PA-GRPO, for a group of one. The same command resumes an unfinished run
and shows a finished one.
"""
from __future__ import annotations

import argparse
import ctypes
import glob
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Callable, Iterator, Sequence

# Before torch: model.py sets what torch reads when it is loaded.
from model import (CHECKPOINTS, CONFIGS, Config, Qwen2_5_VL, build_model, newest_checkpoint,
                   save_model, tensor_files, write_tensors)
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

import data
from data import Example, Examples, InputSettings, Record, Vocabulary, flag
from rewards import SEGMENTS, read_jsonl


# ------------------------------------------------------------------------------------- settings

@dataclass(frozen=True)
class TrainSettings(InputSettings):
    """What SFT and PA-GRPO have in common."""
    preset: str = flag("", "settings that flags override; default: 7b on several GPUs, else tiny",
                       choices=list(CONFIGS), may_change=True)
    out: str = flag("", "folder of the run, default runs/PRESET; each stage has its folder in it",
                    may_change=True)
    data: str = flag("", "record file to train on (toy: made when missing)")
    media: str = flag("", "folder to which the records' paths are relative")
    heldout: str = flag("", "record file for held-out evaluation, never trained on")
    lr: float = flag(1e-6, "peak learning rate", minimum=0)
    warmup: int = flag(0, "steps until the learning rate is at its peak; a cosine to 0 follows",
                       minimum=0)
    weight_decay: float = flag(0.01, "decoupled weight decay of AdamW", minimum=0)
    beta2: float = flag(0.999, "beta2 of AdamW; runs of a few hundred steps need a lower one",
                        minimum=0)
    clip_norm: float = flag(5.0, "gradients are scaled down to this norm", minimum=1e-9)
    micro_batch: int = flag(1, "questions in one pass; changes memory and speed, never gradients",
                            minimum=1, may_change=True)
    save_memory: bool = flag(True, "activation checkpointing: blocks are recomputed in the "
                             "backward pass", may_change=True)
    save_every: int = flag(100, "steps between checkpoints, 99.5 GB each at 7b; training waits",
                           minimum=1, may_change=True)
    keep: int = flag(2, "newest checkpoints that stay on disk", minimum=1, may_change=True)
    eval_every: int = flag(0, "steps between held-out evaluations; 0: only at the end", minimum=0,
                           may_change=True)
    seed: int = flag(0, "decides weights of a new model, data order and sampling")


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Supervised fine-tuning."""
    model: str = flag("", "checkpoint folder to start from (toy: a tiny model, pre-trained when "
                      "missing)")
    steps: int = flag(0, "optimizer steps; 0: as many as --epochs makes", minimum=0)
    batch: int = flag(16, "traces in one optimizer step, over all ranks", minimum=1)
    epochs: float = flag(1.0, "passes over the records, if --steps is 0")
    blind: float = flag(0.0, "share of traces without media, the observation given; for --judge "
                        "reference")
    heldout_count: int = flag(256, "without --heldout: records of --data that are held out, a "
                              "tenth at most")
    stage: str = flag("sft", "name of this run's folder in --out")


TINY = data.TOY_INPUT | dict(save_memory=False, clip_norm=1.0, beta2=0.95)
QWEN = "models/Qwen2.5-VL-{}-Instruct"                       # where README's commands put it
REAL = dict(data="data/videop2r/*CoT*.json*", media="data/Video-R1-data")
PRESETS = {
    "tiny": TINY | dict(batch=8, micro_batch=8, steps=150, lr=1e-3, warmup=30, blind=0.15),
    "3b": REAL | dict(model=QWEN.format("3B")),
    "7b": REAL | dict(model=QWEN.format("7B")),
}
PRETRAINING = {"captions": 450, "base": 700}                 # of the toy model: stage → steps


# ------------------------------------------------------------------------------------------ SFT

SECONDS = Counter()                                          # of each phase of the current step


@contextmanager
def timed(phase: str):
    """A context, or a decorator, whose seconds are logged with the step."""
    began = time.perf_counter()
    yield
    SECONDS[f"seconds_{phase}"] += time.perf_counter() - began


def trace_tokens(examples: Sequence[Example], vocabulary: Vocabulary, template: str
                 ) -> tuple[Tensor, Tensor]:
    """The traces as responses in groups of one, each with its stop token.

    Returns tokens (B, 1, T) and lengths (B, 1).
    """
    traces = []
    for example in examples:
        text = data.trace_text(example.record, template)
        traces.append(torch.tensor(vocabulary.encode(text) + vocabulary.stop_ids[:1]))
    lengths = torch.tensor([[len(trace)] for trace in traces])
    return pad_sequence(traces, batch_first=True)[:, None], lengths


def sft_loss(model: Qwen2_5_VL, examples: Sequence[Example], vocabulary: Vocabulary,
             template: str, device) -> tuple[Tensor, int]:
    """Sum of the cross-entropy over response tokens, and their number. Prompt, video and padding
    are not scored."""
    tokens, lengths = trace_tokens(examples, vocabulary, template)
    prompts = data.collate(examples).to(device)
    logprobs, _ = model.logprobs(prompts, tokens.to(device), lengths.to(device))    # (B, 1, T)
    return -logprobs.sum(), int(lengths.sum())


@timed("training")
def one_step(model: Qwen2_5_VL, batch: list[Example], optimizer: Optimizer, lr: float,
             vocabulary: Vocabulary, settings: Settings, world: World) -> dict[str, float]:
    """Loss, gradients and update for one batch. Micro-batches and ranks share one denominator:
    all response tokens."""
    mine = total = 0
    if batch:
        _, lengths = trace_tokens(batch, vocabulary, settings.template)
        mine = int(lengths.sum())
    tokens = world.sum(mine)
    for part, weight in micro_batches(batch, settings.micro_batch, vocabulary, world):
        loss, _ = sft_loss(model, part, vocabulary, settings.template, world.device)
        share = weight * world.size / tokens                 # FSDP averages over ranks: undo that
        (loss * share).backward()
        total += weight * float(loss.detach())
    norm = optimizer_step(model, optimizer, lr, settings.clip_norm)
    loss = world.sum(total) / tokens if tokens else math.nan
    return {"loss": loss, "grad_norm": norm, "lr": lr, "tokens": tokens,
            "skipped": settings.batch - world.sum(len(batch))}


@torch.no_grad()
def heldout_loss(model: Qwen2_5_VL, examples: Examples, settings: Settings, world: World) -> float:
    """Mean cross-entropy of a response token over the held-out records; NaN if there are none."""
    loss = count = 0
    for batch in examples.prefetch(world.share(len(examples), settings.batch)):
        parts = micro_batches(batch, settings.micro_batch, examples.vocabulary, world)
        for part, weight in parts:
            summed, tokens = sft_loss(model, part, examples.vocabulary, settings.template,
                                      world.device)
            loss += weight * float(summed)
            count += weight * tokens
    loss, count = world.sum(loss), world.sum(count)
    return loss / count if count else math.nan


def make_optimizer(model: Qwen2_5_VL, settings: TrainSettings) -> AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)


def learning_rate(step: int, steps: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine to zero. step counts from 0."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / (steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def micro_batches(examples: Sequence[Example], size: int, vocabulary: Vocabulary, world: World
                  ) -> Iterator[tuple[list[Example], float]]:
    """Yields (examples, weight), as often on every rank, as FSDP needs: at the end a blank
    example of weight 0."""
    for i in range(0, max(world.gather(len(examples))), size):
        part = examples[i:i + size]
        if part:
            yield part, 1.0
        else:
            yield [data.blank_example(vocabulary)], 0.0


def optimizer_step(model: Qwen2_5_VL, optimizer: Optimizer, lr: float, clip_norm: float) -> float:
    """One clipped update. Returns the gradient norm before clipping; if it is not finite, nothing
    changes."""
    if any(p.grad is not None for p in model.parameters()):
        # Without media the vision tower has no gradient, in a sharded model zeros: the same update.
        for p in model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
    norm = clip_grad_norm_(model.parameters(), clip_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return norm


def read_traces(settings: Settings, world: World) -> tuple[Settings, list[Record], list[Record]]:
    """The settings with all paths and the number of steps filled in, the training records and the
    held-out records."""
    settings = find_files(settings, world, "cot/traces.jsonl")
    traces, heldout = settings.template != "none", []
    if settings.heldout:
        heldout = data.read_records(settings.heldout, traces)
    records = with_media(settings, Path(settings.out) / settings.stage, world, traces)
    if not heldout:
        random.Random(0).shuffle(records)
        count = min(settings.heldout_count, len(records) // 10)
        heldout, records = records[:count], records[count:]
    rng = random.Random(settings.seed)
    for i, r in enumerate(records):
        if r.trace and (r.blind or rng.random() < settings.blind):
            records[i] = replace(r, blind=True, given=r.trace["observation"])
    steps = int(settings.epochs * len(records)) // settings.batch
    return replace(settings, steps=settings.steps or max(1, steps)), records, heldout


@contextmanager
def one_thread():
    """A context, or a decorator, in which operations on a CPU take one thread: the toy world's traces
    are too little work for several, which take longer to wake up than they save. So the weights do
    not depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train(settings: Settings, world: World) -> Path:
    """Runs or resumes SFT. Returns the folder of the last checkpoint; SystemExit if the run stops
    before it."""
    settings, records, heldout = read_traces(settings, world)
    start = world.on_rank0(lambda: newest_checkpoint(settings.model))
    run = Run(Path(settings.out) / settings.stage, settings, settings.batch, start, world)
    if run.finished:
        world.print0(f"{settings.stage} is finished: {run.last_checkpoint}")
        return run.last_checkpoint

    vocabulary = Vocabulary(start)
    model = build_model(run.last_checkpoint or start, vocabulary, world, settings.save_memory)
    optimizer = make_optimizer(model, settings)
    run.restore(model, optimizer)
    examples = run.examples(records, vocabulary, model.config)
    held = run.examples(heldout, vocabulary, model.config)
    with run.guard():
        for step, batch in run.batches(examples):
            lr = learning_rate(step, settings.steps, settings)
            metrics = one_step(model, batch, optimizer, lr, vocabulary, settings, world)
            if heldout and run.evaluation_due(step + 1):
                metrics["heldout_loss"] = heldout_loss(model, held, settings, world)
            run.log({"step": step + 1, **metrics}, f"loss {metrics['loss']:.3f}")
            run.end_of_step(step + 1, model, optimizer)
    loss = metrics.get("heldout_loss", math.nan)
    world.print0(f"{settings.stage}: held-out loss {loss:.3f} over {len(heldout)} records; "
                 f"{len(examples.skipped)} records skipped. Checkpoint: {run.last_checkpoint}")
    world.print0(world.on_rank0(lambda: report(run.folder)))
    return run.last_checkpoint


# ================================ a first reader may stop here ================================
# Below: flags and files, ranks, a run on disk, the page and errors, for both trainings.

def parse_flags(cls, presets: dict[str, dict], argv: Sequence[str] | None, about: str
                ) -> TrainSettings:
    """Settings from a preset and the flags beside it."""
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_flags(parser, cls, presets)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):                          # settings are hashed
            given[name] = tuple(value)
    toy, *_, largest = presets
    if "data" in given and "preset" not in given:
        parser.error(f"--data needs --preset: {', '.join(presets)} ({toy} for files of the toy "
                     "world)")
    several = torch.cuda.is_available() and environment("WORLD_SIZE", 1) > 1
    preset = given.get("preset", largest if several else toy)
    return cls(**{"out": f"runs/{preset}", "preset": preset} | presets[preset] | given)


def find_files(settings: TrainSettings, world: World, toy_records: str) -> TrainSettings:
    """The settings with all paths filled in. Without --data this makes the toy world.
    SystemExit, with the commands that fetch it, if something is missing."""
    if not settings.data:
        pretrain(settings, world)
        out = Path(settings.out)
        return replace(settings, data=str(out / toy_records), media=str(out / "toy"),
                       heldout=str(out / "toy/heldout.json"),
                       model=settings.model or str(out / "base"))
    files = [settings.data] if Path(settings.data).is_file() else glob.glob(settings.data)
    there = {"model": os.path.isdir(settings.model), "data": len(files) == 1,
             "media": os.path.isdir(settings.media)}      # Path("") would be this folder
    missing = [f"--{name} {getattr(settings, name)!r}" for name in there if not there[name]]
    if missing:
        size = settings.preset.upper()
        raise SystemExit(f"""\
Not found, or not one file: {', '.join(missing)}. This makes or fetches them:
    torchrun --nproc_per_node=8 sft.py --preset {settings.preset}            # PA-GRPO's model
    hf download Qwen/Qwen2.5-VL-{size}-Instruct --local-dir {QWEN.format(size)}
    hf download 1171-jpg/videop2r --repo-type dataset --local-dir data/videop2r
    hf download Video-R1/Video-R1-data --repo-type dataset --local-dir data/Video-R1-data
The last one has 310 GB; unzip the archives in place, a part of them is fine.""")
    return replace(settings, data=files[0])


def with_media(settings: TrainSettings, folder: Path, world: World, traces: bool = False
               ) -> list[Record]:
    """The training records whose media exist. Rank 0 looks once, and the run in `folder` keeps the
    list."""
    records = data.read_records(settings.data, traces)
    indices = world.on_rank0(lambda: data.find_media(records, settings.media,
                                                     folder / "records.json"))
    return [records[i] for i in indices]


def pretrain(settings: TrainSettings, world: World) -> None:
    """The files of the toy world, and its base model: pre-trained on captions, then mostly on
    texts."""
    out, model, stages = Path(settings.out), "random", []
    for stage, steps in PRETRAINING.items():
        files = dict(data=str(out / f"toy/{stage}.json"), media=str(out / "toy"))
        stages.append(Settings(**PRESETS[settings.preset] | files | dict(
            preset=settings.preset, out=str(out), seed=settings.seed, model=str(out / model),
            stage=stage, steps=steps, template="none", blind=0.0)))
        model = stage
    world.on_rank0(lambda: make_toy_files(stages))
    for stage in stages:
        train(stage, world)


def make_toy_files(stages: list[Settings]) -> None:
    """Clips, traces and the random model that pre-training starts from. SystemExit, before any file
    is written, if the folder's stages had other settings, such as another seed."""
    for settings in stages:
        data.check_settings(Path(settings.out) / settings.stage, settings)
    out, seed = Path(settings.out), settings.seed
    questions, traces = data.make_toy(out / "toy", seed=seed) / "sft.json", out / "cot/traces.jsonl"
    if not traces.is_file() or traces.stat().st_mtime < questions.stat().st_mtime:
        data.cot(data.CotSettings(**data.TOY_INPUT, out=str(out / "cot"), data=str(questions),
                                  seed=seed))
    if not (out / "random/config.json").is_file():
        data.make_toy_model(out / "random", seed, CONFIGS[settings.preset])


def find_start(settings: TrainSettings, world: World) -> TrainSettings:
    """The settings with all paths filled in, --model as the checkpoint to start from; in the toy
    world SFT is run if it is missing. SystemExit if files are missing or the run in --model is
    not finished."""
    if not (settings.data or settings.model):
        names = *InputSettings.__dataclass_fields__, "preset", "out", "seed"
        same = {name: getattr(settings, name) for name in names}
        model = train(Settings(**PRESETS[settings.preset] | same), world)
        settings = replace(settings, model=str(model))
    settings = find_files(settings, world, "toy/rl.json")
    start = world.on_rank0(lambda: newest_checkpoint(settings.model))
    state = data.read_json(start / "state.json")
    if start != Path(settings.model) and state["step"] < state["steps"]:
        raise SystemExit(f"{settings.model} is not finished: {start.name} is the newest of "
                         f"{state['steps']} steps. Finish it first, or start from this one with "
                         f"--model {start}")
    return replace(settings, model=str(start))               # the reference stays this checkpoint


# ---------------------------------------------------------------------------------------- ranks

TIMEOUT = timedelta(minutes=30)                              # that ranks wait for each other


@dataclass(frozen=True)
class World:
    """The ranks (processes) of a run, and how they act together. Without torchrun there is one."""
    rank: int
    size: int
    device: torch.device
    shards: int = 1                                          # ranks that share a copy of the weights

    @property
    def first(self) -> bool:
        return self.rank == 0

    def print0(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def share(self, count: int, size: int) -> list[range]:
        """This rank's part of each batch of `size` out of `count` indices."""
        starts = range(0, count, size)
        return [range(i + self.rank, min(i + size, count), self.size) for i in starts]

    def gather(self, value) -> list:
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, value: float) -> float:
        """Over all ranks, the same on each: they are added in the order of ranks."""
        return sum(self.gather(value))

    def on_rank0(self, work: Callable):
        """Runs `work` on rank 0 while the others wait. All ranks return its result, or raise its
        error."""
        box = [None, None]
        try:
            box[0] = work() if self.first else None
        except (Exception, SystemExit) as error:
            box[1] = error
        if self.size > 1:
            dist.broadcast_object_list(box)
        if box[1]:
            raise box[1]
        return box[0]

    @lru_cache
    def mesh(self):
        """The ranks as a grid (copies of the weights, shards)."""
        if self.shards == self.size:
            return init_device_mesh(self.device.type, (self.shards,))
        grid = self.size // self.shards, self.shards
        return init_device_mesh(self.device.type, grid, mesh_dim_names=("replicas", "shards"))

    def shutdown(self) -> None:
        """Ends the program. Several ranks skip Python's own shutdown, in which threads of gloo
        may abort."""
        if dist.is_initialized():
            dist.destroy_process_group()                     # when all ranks are here
        if self.size > 1:
            sys.stdout.flush()
            os._exit(0)


def keep_freed_memory() -> None:
    """On Linux, glibc gives the memory of a freed tensor back to the system, and every page of
    the next tensor has to be mapped anew: a sixth of a training step on a CPU. Blocks below
    256 MB are kept for the next tensor instead."""
    with suppress(OSError, AttributeError):                  # another system, another C library
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(-3, 2 ** 28)                           # M_MMAP_THRESHOLD
        glibc.mallopt(-1, 2 ** 30)                           # M_TRIM_THRESHOLD


def environment(name: str, default: int) -> int:
    """What torchrun tells a rank."""
    return int(os.environ.get(name, default))


def start_world(timeout: timedelta | None = None) -> World:
    """Joins the ranks that torchrun started. The ranks of a machine share a copy of the weights."""
    rank, local_rank = environment("RANK", 0), environment("LOCAL_RANK", 0)
    size, shards = environment("WORLD_SIZE", 1), environment("LOCAL_WORLD_SIZE", 1)
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    else:
        keep_freed_memory()
    if not dist.is_initialized() and (size > 1 or device.type == "cuda"):
        store, timeout = dist.HashStore(), timeout or TIMEOUT
        if size > 1:                                         # torchrun's, which outlives a restart:
            store, *_ = next(dist.rendezvous("env://", timeout=timeout))
            restarts = str(environment("TORCHELASTIC_RESTART_COUNT", 0))
            store = dist.PrefixStore(restarts, store)        # what ranks before it wrote is hidden
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    return World(rank, size, device, shards)


# -------------------------------------------------------------------------------- a run on disk

MAX_SKIPPED = 5                                              # updates in a row, not finite
ON_RANK0 = StateDictOptions(full_state_dict=True, cpu_offload=True)      # gathered in host memory


@dataclass
class Run:
    """A stage's folder: settings.json, metrics.jsonl, skipped.log, and checkpoints step-NNNNNN:
    model folders with the optimizer's moments and state.json. All else is a function of seed and
    step, so there is no other state.

    SystemExit if the folder holds a run with other settings."""
    folder: Path
    settings: TrainSettings
    per_step: int                                            # records
    source: Path                                             # has configuration and tokenizer
    world: World
    stop_asked: bool = False
    skipped: int = 0                                         # updates in a row, not finite

    def __post_init__(self):
        self.steps, self.code = self.settings.steps, code_hashes(self.settings)
        self.last_checkpoint, state = self.world.on_rank0(self.find)
        self.step, before = state.get("step", 0), state.get("code", {})
        self.finished = self.step >= self.steps
        changed = [name for name in before if before[name] != self.code.get(name)]
        if changed:
            self.world.print0(f"{', '.join(changed)} changed since {self.last_checkpoint}: its results "
                              "are the old code's, what follows is the new code's. Another --out "
                              "begins anew.")
        if 0 < self.step < self.steps:
            self.world.print0(f"{self.folder.name} continues after step {self.step}")

    def find(self) -> tuple[Path | None, dict]:
        """On rank 0: the newest usable checkpoint and its state.json."""
        data.check_settings(self.folder, self.settings)
        with suppress(FileNotFoundError):
            newest = newest_checkpoint(self.folder)
            return newest, data.read_json(newest / "state.json")
        return None, {}

    def examples(self, records: list[Record], vocabulary: Vocabulary, config: Config) -> Examples:
        return Examples(records, self.settings.media, vocabulary, config, self.settings,
                        self.folder / "skipped.log")

    def batches(self, examples: Examples) -> tqdm:
        """Yields each step that is left and this rank's examples of it, under a progress bar."""
        left, world = range(self.step, self.steps), self.world
        whole = (data.step_indices(len(examples), self.per_step, step, self.settings.seed)
                 for step in left)
        mine = (indices[world.rank::world.size] for indices in whole)
        steps = zip(left, examples.prefetch(mine))
        self.bar = tqdm(steps, self.folder.name, self.steps, initial=self.step, unit="step",
                        disable=not world.first)
        return self.bar

    def evaluation_due(self, done: int) -> bool:
        every = self.settings.eval_every or self.steps       # 0: only at the end
        return done == self.steps or done % every == 0

    @contextmanager
    def guard(self):
        """Around the loop: locks the folder, cuts the logs to the last checkpoint, lets Ctrl-C and
        SIGTERM stop the run after a step, and adds to an error how the run continues."""
        with data.lock_folder(self.folder) if self.world.first else nullcontext():
            for name in ("metrics.jsonl", "rollouts.jsonl") if self.world.first else ():
                if (self.folder / name).is_file():           # its last line may be cut by a kill
                    rows = read_jsonl(self.folder / name)
                    kept = [row for row in rows if row["step"] <= self.step]
                    data.write_rows(self.folder / name, kept)
            numbers = signal.SIGINT, signal.SIGTERM
            handlers = [signal.signal(number, self.on_signal) for number in numbers]
            try:
                yield
            except BaseException as error:
                if self.world.size > 1:                      # torchrun must not stop this rank
                    handlers = [signal.SIG_IGN] * 2          # before it says why
                error.hint = " There is no checkpoint yet; the same command starts again."
                if self.last_checkpoint:
                    error.hint = (f" The last checkpoint is {self.last_checkpoint}; the same "
                                  "command resumes from it.")
                raise
            finally:
                for number, handler in zip(numbers, handlers):
                    signal.signal(number, handler)

    def on_signal(self, number, frame) -> None:
        """Stops the run after the step. Launchers repeat their signals: a second one changes
        nothing."""
        if not self.stop_asked and self.world.first:         # print may be running below this
            os.write(1, b"\nStopping after this step, with a checkpoint. Ctrl-\\ stops at once.\n")
        self.stop_asked = True

    def log(self, metrics: dict, shown: str = "") -> None:
        """Adds finite values, seconds and the peak memory of all GPUs to metrics.jsonl; `shown`
        goes to the progress bar. SystemExit after MAX_SKIPPED steps without finite gradients."""
        metrics = metrics | SECONDS
        SECONDS.clear()
        metrics["skipped_updates"] = int(not math.isfinite(metrics["grad_norm"]))
        self.skipped = (self.skipped + 1) * metrics["skipped_updates"]
        if self.world.device.type == "cuda":                 # what decides when a GPU is full
            peak = torch.cuda.max_memory_reserved() / 2 ** 30
            metrics["reserved_memory_gb"] = max(self.world.gather(peak))
        row = {name: rounded(x) for name, x in metrics.items() if math.isfinite(x)}
        if self.world.first:
            self.append("metrics.jsonl", row)
        self.bar.set_postfix_str(shown)
        if self.skipped == MAX_SKIPPED:
            raise SystemExit(f"The gradients of {MAX_SKIPPED} steps in a row were NaN or infinite, "
                             f"up to step {row['step']}: try a lower --lr in another --out.")

    def append(self, name: str, row: dict) -> None:
        """Adds a line to a log; `guard` removes those after the last checkpoint. Tensors become
        lists."""
        with (self.folder / name).open("a") as file:
            print(json.dumps(row, default=lambda x: rounded(x.tolist())), file=file)

    def end_of_step(self, done: int, model: Qwen2_5_VL, optimizer: Optimizer, lost: str = ""
                    ) -> None:
        """After `done` steps: saves if that is due, and stops the run (SystemExit) after a signal,
        or if `lost` says on all ranks why it cannot go on."""
        stop = lost or max(self.world.gather(self.stop_asked))
        due = stop or done == self.steps or done % self.settings.save_every == 0
        if due and done > self.step:
            weights, moments = get_model_state_dict(model, options=ON_RANK0), {}
            if optimizer.state:                              # else asking for moments makes some
                full = get_optimizer_state_dict(model, optimizer, options=ON_RANK0)
                moments = full.get("state", {})
            self.last_checkpoint = self.world.on_rank0(lambda: self.write(done, weights, moments))
            self.step = done
        if stop:
            raise SystemExit(f"{lost}Stopped after step {done} of {self.steps}.")

    def write(self, done: int, weights: dict[str, Tensor], moments: dict[str, dict]) -> Path:
        """On rank 0: writes a checkpoint, then removes all but the newest ones."""
        state = {"step": done, "steps": self.steps, "source": str(self.source), "code": self.code,
                 "made_by": made_by()}

        def write_extra(folder: Path) -> None:
            flat = {f"{name} {kind}": x for name, kinds in moments.items()
                    for kind, x in kinds.items()}
            write_tensors(flat, folder, "optimizer")
            data.write_json(folder / "state.json", state)
        target = self.folder / f"step-{done:06d}"
        save_model(weights, target, self.source, write_extra)
        saved = [path for path in sorted(self.folder.glob(CHECKPOINTS)) if path <= target]
        for old in saved[:-self.settings.keep]:              # later ones are damaged
            old.rename(f"{old}.old")                         # a checkpoint is never there in part
        for leftover in self.folder.glob("step-*.*"):        # also of a run that was killed
            shutil.rmtree(leftover)
        return target

    def restore(self, model: Qwen2_5_VL, optimizer: Optimizer) -> None:
        """Loads the moments of the last checkpoint, from which the model was built."""
        folder = self.last_checkpoint or self.folder         # without a checkpoint there are none
        files = set(tensor_files(folder, "optimizer").values())
        if not files:                                        # no update so far
            return
        moments = {name: {} for name, _ in model.named_parameters()}
        for file in files if self.world.first else ():
            for key, x in load_file(file).items():
                name, kind = key.split(" ")
                moments[name][kind] = x
        self.world.gather(None)                              # rank 0 has read them
        groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
        how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.world.size > 1)
        whole = {"state": moments, "param_groups": groups}
        set_optimizer_state_dict(model, optimizer, whole, options=how)


def code_hashes(settings: TrainSettings) -> dict[str, str]:
    """A hash of each project file that a run imports."""
    script = Path(sys.modules[type(settings).__module__].__file__)
    hashes = {}
    for name in ("model.py", "rewards.py", "data.py", "sft.py", script.name):
        text = script.with_name(name).read_bytes()
        hashes[name] = hashlib.sha256(text).hexdigest()[:16]
    return hashes


def made_by() -> dict[str, str]:
    """The command, and the versions it runs on."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --nproc_per_node={ranks}" if ranks else "python"
    return {"command": f"{launcher} {shlex.join(sys.argv)}", "python": sys.version.split()[0],
            "torch": torch.__version__, "transformers": version("transformers")}


def rounded(x: list | float) -> list | float | None:
    """Floats with six digits; NaN, which JSON lacks, becomes null."""
    if isinstance(x, list):
        return [rounded(part) for part in x]
    if isinstance(x, float):
        return None if math.isnan(x) else float(f"{x:.6g}")
    return x


# ------------------------------------------------------------------------------------- the page

def report(folder: Path) -> str:
    """At the end of a run: where its page is, or why there is none. The run is finished either
    way."""
    try:
        return f"Report: {write_report(folder)}"
    except (OSError, ValueError) as error:
        return f"No report: {error}"


def write_report(folder: str | Path, *others: str | Path) -> Path:
    """Writes report.html into a run's folder: assets/report.html with the run's files, and another
    run's curves laid over its own. ValueError if there is no run."""
    runs = [collect(Path(run)) for run in (folder, *others)]
    strict = json.loads(json.dumps(runs), parse_constant=str)   # JSON knows no inf: --clip-norm inf
    text = json.dumps(strict).replace("<", "\\u003c")        # no response closes its script element
    page = Path(__file__).with_name("assets") / "report.html"
    file = Path(folder) / "report.html"
    data.write_atomically(file, page.read_text(encoding="utf-8").replace("{{runs}}", text))
    return file


def collect(folder: Path) -> dict:
    """The files of a run, empty where there is none, and small frames of the recorded clips."""
    settings, clips = data.read_json(folder / "settings.json"), {}
    rows = {name: read_jsonl(folder / f"{name}.jsonl") for name in ("metrics", "rollouts")}
    if not (settings and rows["metrics"]):
        raise ValueError(f"{folder} holds no run with a finished step: give the folder of a stage, "
                         "such as runs/tiny/pagrpo")
    for row in rows["rollouts"]:
        if row["path"] not in clips:
            clips[row["path"]] = small_frames(row, settings)
    dropped = Counter(row["reason"] for row in read_jsonl(folder.parent / "cot/dropped.jsonl"))
    kept = read_jsonl(folder.parent / "cot/traces.jsonl")
    newest = max(folder.glob(CHECKPOINTS), default=folder)
    return {"name": folder.as_posix(), "settings": settings, "clips": clips, **rows,
            "segments": [segment.name for segment in SEGMENTS], "dropped": dropped,
            "kept": len(kept), "state": data.read_json(newest / "state.json"),
            "results": data.read_json(folder / "results.json")}


def small_frames(row: dict, settings: dict) -> list[str]:
    """Up to eight frames of a recorded clip as pictures; none if it cannot be read any more."""
    record, inputs = argparse.Namespace(**row), argparse.Namespace(**settings)
    with suppress(data.MediaError):
        frames, *_ = data.read_media(record, Path(settings["media"]), inputs)
        step = -(-len(frames) // 8)
        return [data.picture(frame) for frame in data.resize(frames[::step], 0, 128 ** 2)]
    return []


# -------------------------------------------------------------------------------- start and errors

def explain(error: BaseException) -> str:
    """One line for an error, with a hint. Prints the traceback of one that is probably a bug."""
    text, hint = str(error), getattr(error, "hint", "")
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return (text or "Interrupted.") + hint
    if "out of memory" in text or "DefaultCPUAllocator" in text:
        return ("Out of memory. Less is needed with --save-memory, --micro-batch 1, fewer --frames, "
                "in RL a lower --max-response, --offload-reference or --kl-beta 0. "
                f"tests/memory.py estimates it.{hint}")
    if isinstance(error, dist.DistError) or "gloo" in text or "closure" in text:
        return f"Lost another rank, or waited {TIMEOUT} for it ({text[:200]}).{hint}"
    if not isinstance(error, (ValueError, OSError)):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {text}{hint}"


def launch(train: Callable, settings_class, presets: dict[str, dict], argv: Sequence[str] | None,
           about: str) -> None:
    """What `python sft.py` and `python pagrpo.py` do. An error ends in one line for each rank."""
    settings = parse_flags(settings_class, presets, argv, about)
    try:
        world = start_world()
        others = ", ".join(name for name in presets if name != settings.preset)
        world.print0(f"Preset {settings.preset}; others: {others}")
        train(settings, world)
        world.shutdown()
    except BaseException as error:
        message = explain(error)
        if environment("WORLD_SIZE", 1) == 1:
            sys.exit(message)
        print(f"Rank {environment('RANK', 0)}: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)                                          # without waiting for the others


def main(argv: Sequence[str] | None = None) -> None:
    launch(train, Settings, PRESETS, argv, __doc__)


if __name__ == "__main__":
    main()
