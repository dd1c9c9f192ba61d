"""Stage 1, supervised fine-tuning (SFT): the model learns to write observation, think and answer.

    python sft.py                                        the toy world on any machine: runs/tiny/sft
    torchrun --nproc_per_node=8 sft.py --preset 7b       VideoP2R-CoT-162K on eight GPUs: runs/7b/sft

The loss is the cross-entropy of the response tokens; prompt and video are masked. It is `Qwen2_5_VL.logprobs`, as in
PA-GRPO, for a group of one. The same command resumes an unfinished run and shows a finished one.
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
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Callable, Iterator, Sequence

# Before torch: model.py sets what torch reads when it is loaded.
from model import (CHECKPOINTS, CONFIGS, LOGITS_AT_ONCE, Config, Qwen2_5_VL, build_model, newest_checkpoint,
                   read_config, save_model, tensor_files, write_tensors)
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_, parameters_to_vector
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

import data
from data import Example, Examples, InputSettings, Record, Vocabulary, flag
from rewards import SEGMENTS, read_jsonl


# ------------------------------------------------------------------------------------------------ settings

@dataclass(frozen=True)
class TrainSettings(InputSettings):
    """What SFT and PA-GRPO have in common."""
    preset: str = flag("", "settings that flags override; default: 7b on several GPUs, else tiny", list(CONFIGS))
    out: str = flag("", "folder of the run, default runs/PRESET; each stage has its own folder in it")
    data: str = flag("", "record file to train on (toy: made when missing)")
    media: str = flag("", "folder to which the records' paths are relative")
    heldout: str = flag("", "record file for held-out evaluation, never trained on")
    lr: float = flag(1e-6, "peak learning rate")
    warmup: int = flag(0, "steps until the learning rate is at its peak; a cosine to 0 follows")
    weight_decay: float = flag(0.01, "decoupled weight decay of AdamW")
    beta2: float = flag(0.999, "beta2 of AdamW; runs of a few hundred steps need a lower one")
    clip_norm: float = flag(5.0, "gradients are scaled down to this norm")
    micro_batch: int = flag(1, "questions in one pass; changes memory and speed, never gradients")
    save_memory: bool = flag(True, "activation checkpointing: recompute blocks in the backward pass")
    save_every: int = flag(100, "steps between checkpoints, 99.5 GB each at 7b; training waits meanwhile")
    keep: int = flag(2, "newest checkpoints that stay on disk, besides the best one")
    eval_every: int = flag(0, "steps between held-out evaluations, each with a checkpoint; 0: only at the end")
    resume: bool = flag(True, "resume from the newest checkpoint; --no-resume refuses a folder with a run")
    shards: int = flag(0, "ranks that share one copy of the weights; 0: those of a machine")
    patience: float = flag(6.0, "minutes that a rank waits for the others within a step")
    dry_run: bool = flag(False, "print the memory that a step needs on each GPU, and stop")
    seed: int = flag(0, "decides weights of a new model, data order and sampling")

    def __post_init__(self):
        super().__post_init__()
        data.check_minimum(self, micro_batch=1, save_every=1, keep=1, eval_every=0, shards=0, patience=0.01, lr=0,
                           warmup=0, weight_decay=0, clip_norm=1e-9, beta2=0)


@dataclass(frozen=True)
class Settings(TrainSettings):
    model: str = flag("", "checkpoint folder to start from (toy: a tiny model, pre-trained when missing)")
    steps: int = flag(0, "optimizer steps; 0: as many as --epochs makes")
    batch: int = flag(16, "traces in one optimizer step, over all ranks")
    epochs: float = flag(1.0, "passes over the records, if --steps is 0")
    blind: float = flag(0.0, "share of traces without media, the observation given; for --judge reference")
    heldout_count: int = flag(256, "without --heldout: records of --data that are held out, a tenth at most")
    stage: str = flag("sft", "name of this run's folder in --out")

    # Constants that `memory` expects; in PA-GRPO they are flags.
    group_size, max_response, kl_beta, judge, offload_reference = 1, 768, 0.0, "", False

    def __post_init__(self):
        super().__post_init__()
        data.check_minimum(self, batch=1, steps=0)


TINY = data.TOY_INPUT | dict(save_memory=False, clip_norm=1.0, beta2=0.95)
QWEN = "models/Qwen2.5-VL-{}-Instruct"                       # where the commands in the README put it
REAL = dict(data="data/videop2r/*CoT*.json*", media="data/Video-R1-data")
PRESETS = {
    "tiny": TINY | dict(batch=32, micro_batch=32, steps=120, lr=2e-3, warmup=30, blind=0.15),
    "3b": REAL | dict(model=QWEN.format("3B")),
    "7b": REAL | dict(model=QWEN.format("7B")),
}
PRETRAINING = dict(stage="base", template="none", steps=320, blind=0.8)     # of the toy world's model


# ------------------------------------------------------------------------------------------------ SFT

def trace_tokens(examples: Sequence[Example], vocabulary: Vocabulary, template: str) -> tuple[Tensor, Tensor]:
    """The traces as responses in groups of one, each with its stop token: tokens (B, 1, T), lengths (B, 1)."""
    traces = [torch.tensor(vocabulary.encode(data.trace_text(e.record, template)) + vocabulary.stop_ids[:1])
              for e in examples]
    lengths = torch.tensor([[len(t)] for t in traces])
    return pad_sequence(traces, batch_first=True)[:, None], lengths


def sft_loss(model: Qwen2_5_VL, examples: Sequence[Example], vocabulary: Vocabulary, template: str, device
             ) -> tuple[Tensor, int]:
    """Sum of the cross-entropy over response tokens, and their number. Prompt, video and padding are not scored."""
    tokens, lengths = trace_tokens(examples, vocabulary, template)
    prompts = data.collate(examples).to(device)
    logprobs, _ = model.logprobs(prompts, tokens.to(device), lengths.to(device))              # (B, 1, T)
    return -logprobs.sum(), int(lengths.sum())


def one_step(model: Qwen2_5_VL, batch: list[Example], optimizer: Optimizer, lr: float,
             vocabulary: Vocabulary, settings: Settings, world: World) -> dict[str, float]:
    """Loss, gradients and update for one batch. Micro-batches and ranks share one denominator: all response tokens."""
    local_tokens = int(trace_tokens(batch, vocabulary, settings.template)[1].sum()) if batch else 0
    counts = world.all_reduce_sum({"tokens": local_tokens, "records": len(batch)})
    tokens, total = int(counts["tokens"]), 0.0
    for part, weight in micro_batches(batch, settings.micro_batch, world, model, vocabulary):
        loss, _ = sft_loss(model, part, vocabulary, settings.template, world.device)
        (loss * weight * world.size / max(1, tokens)).backward()              # FSDP averages over ranks: undo that
        total += weight * float(loss.detach())
    norm = optimizer_step(model, optimizer, lr, settings.clip_norm)
    loss = world.all_reduce_sum({"loss": total})["loss"] / tokens if tokens else math.nan
    return {"loss": loss, "grad_norm": norm, "tokens": tokens, "skipped": settings.batch - int(counts["records"])}


@torch.no_grad()
def heldout_loss(model: Qwen2_5_VL, examples: Examples, settings: Settings, world: World) -> float:
    """Mean cross-entropy of a response token over the held-out records; NaN if there are none."""
    loss, count, n = 0.0, 0, len(examples)
    steps = [range(i, min(i + settings.batch, n))[world.rank::world.size] for i in range(0, n, settings.batch)]
    for batch in examples.prefetch(steps):
        for part, weight in micro_batches(batch, settings.micro_batch, world, model, examples.vocabulary):
            summed, tokens = sft_loss(model, part, examples.vocabulary, settings.template, world.device)
            loss, count = loss + weight * float(summed), count + int(weight) * tokens
    sums = world.all_reduce_sum({"loss": loss, "tokens": count})
    return sums["loss"] / sums["tokens"] if sums["tokens"] else math.nan


def make_optimizer(model: Qwen2_5_VL, settings: TrainSettings) -> AdamW:
    """AdamW; weight decay on matrices only."""
    groups = [{"params": [], "weight_decay": settings.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        groups[p.dim() <= 1]["params"].append(p)
    return AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=next(model.parameters()).is_cuda)


def learning_rate(step: int, steps: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine to zero. step counts from 0."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def micro_batches(examples: Sequence[Example], size: int, world: World, model: Qwen2_5_VL, vocabulary: Vocabulary
                  ) -> Iterator[tuple[list[Example], float]]:
    """Yields (examples, weight), as often on every rank, as FSDP needs: at the end a blank example of weight 0."""
    for i in range(world.all_reduce_max(-(-len(examples) // size))):
        part = examples[i * size:(i + 1) * size]
        yield (list(part), 1.0) if part else ([data.blank_example(vocabulary, model.config)], 0.0)


def optimizer_step(model: Qwen2_5_VL, optimizer: Optimizer, lr: float, clip_norm: float) -> float:
    """One clipped update. Returns the gradient norm before clipping; if it is not finite, nothing changes."""
    if any(p.grad is not None for p in model.parameters()):
        for p in model.parameters():                         # without media a sharded tower has zeros, not None
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    norm = clip_grad_norm_(model.parameters(), clip_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def read_traces(settings: Settings, world: World) -> tuple[Settings, list[Record], list[Record]]:
    """The settings with all paths filled in, the training records and the held-out records."""
    settings = find_files(settings, world, "cot/traces.jsonl")
    traces = settings.template != "none"
    records, heldout = (data.read_records(file, traces) if file else [] for file in (settings.data, settings.heldout))
    if not heldout:
        random.Random(0).shuffle(records)
        count = min(settings.heldout_count, len(records) // 10)
        records, heldout = records[count:], records[:count]
    rng = random.Random(settings.seed)
    for i, r in enumerate(records):
        if r.trace and rng.random() < settings.blind:
            records[i] = replace(r, blind=True, given=r.trace["observation"])
    return settings, records, heldout


def train(settings: Settings, world: World) -> Path:
    """Runs or resumes SFT. Returns the folder of the last checkpoint; SystemExit if the run stops before it."""
    settings, records, heldout = read_traces(settings, world)
    steps = settings.steps or max(1, int(settings.epochs * len(records)) // settings.batch)
    start = world.on_rank0(lambda: newest_checkpoint(settings.model))
    run = Run(Path(settings.out) / settings.stage, settings, steps, settings.batch, world)
    if run.finished:
        world.print0(f"{settings.stage} is finished: {run.last_checkpoint}")
        return run.last_checkpoint

    vocabulary = Vocabulary(start)
    model = build_model(run.last_checkpoint or start, vocabulary, world, settings.save_memory, settings.shards)
    optimizer = make_optimizer(model, settings)
    run.restore(model, optimizer)
    examples, held = (run.examples(rows, vocabulary, model.config) for rows in (records, heldout))
    with run.guard():
        for step, batch in run.batches(examples):
            began, lr, score = time.perf_counter(), learning_rate(step, steps, settings), {}
            metrics = one_step(model, batch, optimizer, lr, vocabulary, settings, world)
            seconds = time.perf_counter() - began
            metrics |= {"lr": lr, "seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
            due = step + 1 == steps or settings.eval_every and (step + 1) % settings.eval_every == 0
            if due and heldout:
                metrics["heldout_loss"] = heldout_loss(model, held, settings, world)
                score = {"score": -metrics["heldout_loss"]}                   # the highest score is the best
            run.log({"step": step + 1, **metrics}, f"loss {metrics['loss']:.3f}")
            run.end_of_step(step + 1, model, optimizer, start, **score)
    loss = metrics.get("heldout_loss", math.nan)
    world.print0(f"{settings.stage}: held-out loss {loss:.3f} over {len(heldout)} records; {len(examples.skipped)} "
                 f"records skipped. Checkpoint: {run.last_checkpoint}")
    world.print0(world.on_rank0(lambda: report(run.folder)))
    return run.last_checkpoint


# ================================ a first reader may stop here ================================
# Below: flags and files, ranks, a run on disk, memory and errors, for both trainings.

def parse_flags(cls, presets: dict[str, dict], argv: Sequence[str] | None, description: str) -> TrainSettings:
    """Settings from a preset and the flags beside it."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_flags(parser, cls, presets)
    given, (toy, *_, largest) = data.given_flags(parser.parse_args(argv)), presets
    if "data" in given and "preset" not in given:
        parser.error(f"--data needs --preset: {', '.join(presets)} ({toy} for files of the toy world)")
    several = torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    preset = given.get("preset", largest if several else toy)
    return cls(**({"out": f"runs/{preset}", "preset": preset} | presets[preset] | given))


def find_files(settings: TrainSettings, world: World, toy_records: str) -> TrainSettings:
    """The settings with all paths filled in. Without --data this makes the toy world, its traces, and a base model that
    is pre-trained on captions, as Qwen is. SystemExit, with the commands that fetch it, if something is missing."""
    if not settings.data:
        out = Path(settings.out)
        world.on_rank0(lambda: make_toy_files(out, settings.preset))
        paths = dict(out=str(out), data=str(out / "toy/base.json"), media=str(out / "toy"), model=str(out / "random"))
        train(Settings(**PRESETS[settings.preset] | PRETRAINING | paths), world)
        return replace(settings, data=str(out / toy_records), media=str(out / "toy"),
                       heldout=str(out / "toy/heldout.json"), model=settings.model or str(out / "base"))
    model = Path(settings.model)
    files = [settings.data] if Path(settings.data).is_file() else glob.glob(settings.data)
    there = {"model": model.is_dir(), "data": len(files) == 1, "media": Path(settings.media).is_dir()}
    missing = [f"--{k} {getattr(settings, k)!r}" for k, ok in there.items() if not (ok and getattr(settings, k))]
    if missing:
        size = settings.preset.upper()
        raise SystemExit(f"""Not found, or not one file: {', '.join(missing)}. This makes or fetches them:
    torchrun --nproc_per_node=8 sft.py --preset {settings.preset}            # the model that PA-GRPO starts from
    hf download Qwen/Qwen2.5-VL-{size}-Instruct --local-dir {QWEN.format(size)}
    hf download 1171-jpg/videop2r --repo-type dataset --local-dir data/videop2r
    hf download Video-R1/Video-R1-data --repo-type dataset --local-dir data/Video-R1-data
The last one has 310 GB; unzip the archives in place, a part of them is fine.""")
    return replace(settings, data=files[0])


def make_toy_files(out: Path, preset: str) -> None:
    questions, traces = data.make_toy(out / "toy") / "sft.json", out / "cot/traces.jsonl"
    if not traces.is_file() or traces.stat().st_mtime < questions.stat().st_mtime:
        data.cot(data.CotSettings(**data.TOY_INPUT, out=str(out / "cot"), data=str(questions)))
    if not (out / "random/config.json").is_file():
        data.make_toy_model(out / "random", 0, CONFIGS[preset])


def find_start(settings: TrainSettings, world: World) -> TrainSettings:
    """The settings with all paths filled in, --model as the checkpoint to start from; in the toy world SFT is run if
    it is missing. SystemExit if files are missing or the run in --model is not finished."""
    if not (settings.data or settings.model):
        shared = {f.name: getattr(settings, f.name) for f in fields(InputSettings)}
        shared |= dict(preset=settings.preset, out=settings.out, seed=settings.seed)
        settings = replace(settings, model=str(train(Settings(**PRESETS[settings.preset] | shared), world)))
    settings = find_files(settings, world, "toy/rl.json")
    start = world.on_rank0(lambda: newest_checkpoint(settings.model))
    if start != Path(settings.model) and (state := read_json(start / "state.json"))["step"] < state["steps"]:
        raise SystemExit(f"{settings.model} is not finished: {start.name} is the newest of {state['steps']} steps. "
                         f"Finish it first, or start from this one with --model {start}")
    return replace(settings, model=str(start))               # saved with the run: the reference stays this checkpoint


# ------------------------------------------------------------------------------------------------ ranks

@dataclass(frozen=True)
class World:
    """The ranks (processes) of a run, and how they act together. Without torchrun there is one."""
    rank: int
    size: int
    device: torch.device
    slow_group: dist.ProcessGroup | None = None              # with a long timeout, while one rank works alone
    store: dist.Store | None = None                          # torchrun's key-value store

    @property
    def first(self) -> bool:
        return self.rank == 0

    def print0(self, *words, sep: str = " ") -> None:
        if self.first:
            print(*words, sep=sep, flush=True)

    def gather(self, value) -> list:
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, values: dict[str, float]) -> dict[str, float]:
        total = dict.fromkeys(values, 0.0)
        for part in self.gather(values):
            for name in total:                               # by name: ranks may hold them in another order
                total[name] += part[name]
        return total

    def all_reduce_max(self, value: float) -> float:
        return max(self.gather(value))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.slow_group)

    def on_rank0(self, work: Callable):
        """Runs `work` on rank 0 while the others wait. All ranks return its result, or raise its error."""
        box = [None, None]
        try:
            box[0] = work() if self.first else None
        except (Exception, SystemExit) as error:
            box[1] = error
        if self.size > 1:
            dist.broadcast_object_list(box, group=self.slow_group)
        if box[1]:
            raise box[1]
        return box[0]

    @lru_cache
    def mesh(self, shards: int):
        """The ranks as a grid (replicas, shards); 0: the ranks of a machine share a copy of the weights."""
        shards = shards or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if self.size % shards:
            raise SystemExit(f"--shards {shards}: the {self.size} ranks are not divisible by it")
        if shards == self.size:
            return init_device_mesh(self.device.type, (shards,))
        return init_device_mesh(self.device.type, (self.size // shards, shards), mesh_dim_names=("replicas", "shards"))

    def shutdown(self, code: int = 0) -> None:
        """Ends the program. Several ranks skip Python's own shutdown, in which threads of gloo may abort."""
        if dist.is_initialized() and code == 0:
            dist.destroy_process_group()                     # when all ranks are here
        if self.size > 1:
            sys.stdout.flush()
            os._exit(code)


def keep_freed_memory() -> None:
    """On Linux, glibc gives the memory of a freed tensor back to the system, and every page of the next tensor has to
    be mapped anew: a sixth of a training step on a CPU. Blocks below 256 MB are kept for the next tensor instead."""
    with suppress(OSError, AttributeError):                  # another system, another C library
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(-3, 2 ** 28)                           # M_MMAP_THRESHOLD
        glibc.mallopt(-1, 2 ** 30)                           # M_TRIM_THRESHOLD


def start_world(minutes: float = 6.0, patience: timedelta = timedelta(hours=1)) -> World:
    """Joins the ranks that torchrun started. They wait `minutes` for each other within a step, `patience` in `on_rank0`
    and `barrier`; one that dies is noticed at once."""
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "TORCHELASTIC_RESTART_COUNT": 0}
    rank, size, local_rank, restarts = (int(os.environ.get(name, n)) for name, n in defaults.items())
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    else:
        keep_freed_memory()
    store, slow_group, timeout = dist.HashStore(), None, timedelta(minutes=minutes)
    if size > 1:                                             # the prefix hides what ranks before a restart wrote
        store = dist.PrefixStore(str(restarts), next(dist.rendezvous("env://", timeout=timeout))[0])
    if not dist.is_initialized() and (size > 1 or device.type == "cuda"):
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    if size > 1:
        slow_group = dist.new_group(backend="gloo", timeout=patience)
    return World(rank, size, device, slow_group, store)


# ------------------------------------------------------------------------------------------------ a run on disk

# Settings that may change when a run resumes: they affect placement and speed, not results.
RESUMABLE = ("preset", "save_every", "micro_batch", "save_memory", "transcript_every", "keep", "eval_every", "resume",
             "shards", "patience", "dry_run", "offload_reference")
LOGS = ("metrics.jsonl", "rollouts.jsonl", "question.jsonl")                   # a row holds its step
MAX_SKIPPED = 5                                              # updates in a row without a finite gradient
GB = 2 ** 30
ON_RANK0 = StateDictOptions(full_state_dict=True, cpu_offload=True)          # gathered in host memory


class Run:
    """A stage's folder: settings.json, metrics.jsonl, skipped.log, and checkpoints step-NNNNNN: model folders with the
    optimizer's moments and state.json. All else is a function of seed and step, so there is no other state."""

    def __init__(self, folder: Path, settings: TrainSettings, steps: int, per_step: int, world: World):
        """Finds the last checkpoint. SystemExit if the folder holds a run with other settings. per_step: records."""
        self.folder, self.settings, self.steps, self.per_step, self.world = folder, settings, steps, per_step, world
        self.stop_asked, self.stop_reason, self.skipped = 0.0, "", 0
        self.configuration, self.code = asdict(settings) | {"steps": steps}, code_hashes(settings)
        self.last_checkpoint, state = world.on_rank0(self.find)
        self.step, before = state.get("step", 0), state.get("code", {})
        self.finished = self.step >= steps
        if changed := [name for name, now in self.code.items() if before.get(name, now) != now]:
            what = "These are the old code's results" if self.finished else "The run goes on with the new code"
            names = ", ".join(changed)
            world.print0(f"{names} changed since {self.last_checkpoint}. {what}; another --out begins anew.")
        if 0 < self.step < steps:
            world.print0(f"{folder.name} continues after step {self.step}")

    def find(self) -> tuple[Path | None, dict]:
        """On rank 0: the newest usable checkpoint and its state.json."""
        resume = self.settings.resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if (self.folder / "metrics.jsonl").exists() and not resume:
            raise SystemExit(f"{self.folder} holds a run: leave out --no-resume to continue it, or take another --out")
        data.check_settings(self.folder, self.configuration, data.default_settings(self.settings), RESUMABLE)
        with suppress(FileNotFoundError):
            newest = newest_checkpoint(self.folder, optimizer=True)
            return newest, read_json(newest / "state.json")
        return None, {}

    def examples(self, records: list[Record], vocabulary: Vocabulary, config: Config) -> Examples:
        return Examples(records, self.settings.media, vocabulary, config, self.settings, self.folder / "skipped.log")

    def batches(self, examples: Examples) -> tqdm:
        """Yields each step that is left and this rank's examples of it, under a progress bar."""
        left, n, rank, ranks = range(self.step, self.steps), len(examples), self.world.rank, self.world.size
        indices = (data.step_indices(n, self.per_step, step, self.settings.seed)[rank::ranks] for step in left)
        steps = zip(left, examples.prefetch(indices))
        self.bar = tqdm(steps, self.folder.name, self.steps, initial=self.step, unit="step", disable=rank > 0)
        return self.bar

    @contextmanager
    def guard(self):
        """Around the loop: locks the folder, cuts the log to the last checkpoint, lets Ctrl-C and SIGTERM stop the run
        after a step, and adds to an error how the run continues."""
        with data.lock_folder(self.folder) if self.world.first else nullcontext():
            for log in map(self.folder.joinpath, LOGS if self.world.first else ()):
                if log.is_file():                            # its last line may be cut short by a kill
                    data.write_rows(log, [row for row in read_jsonl(log)[0] if row.get("step", 0) <= self.step])
            handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            except BaseException as error:
                if self.world.size > 1:                      # torchrun must not stop this rank before it says why
                    handlers = dict.fromkeys(handlers, signal.SIG_IGN)
                error.hint = " There is no checkpoint yet; the same command starts again."
                if self.last_checkpoint:
                    error.hint = f" The last checkpoint is {self.last_checkpoint}; the same command resumes from it."
                raise
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def on_signal(self, number, frame) -> None:
        """The first signal stops the run after the step, another at once. Launchers repeat theirs within 2 s."""
        if self.stop_asked and time.monotonic() > self.stop_asked + 2:
            raise KeyboardInterrupt
        if not self.stop_asked and self.world.first:         # print may be running below this handler
            os.write(1, b"\nStopping after this step, with a checkpoint. Again: stops at once.\n")
        self.stop_asked = self.stop_asked or time.monotonic()

    def stop(self, reason: str) -> None:
        """Makes `end_of_step` stop the run, for a reason that all ranks know."""
        self.stop_asked, self.stop_reason = time.monotonic(), f"{reason}. "

    def log(self, metrics: dict, shown: str = "") -> None:
        """Adds finite values, and the peak memory of all GPUs, to metrics.jsonl; `shown` goes to the progress bar.
        SystemExit after MAX_SKIPPED steps without finite gradients."""
        metrics["skipped_updates"] = int(not math.isfinite(metrics["grad_norm"]))
        self.skipped = (self.skipped + 1) * metrics["skipped_updates"]
        if self.world.device.type == "cuda":                 # reserved memory decides when a GPU is full
            metrics["peak_memory_gb"] = self.world.all_reduce_max(torch.cuda.max_memory_allocated() / GB)
            metrics["reserved_memory_gb"] = self.world.all_reduce_max(torch.cuda.max_memory_reserved() / GB)
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items() if math.isfinite(v)}
        if self.world.first:
            self.append("metrics.jsonl", row)
        self.bar.set_postfix_str(shown)
        if self.skipped == MAX_SKIPPED:
            raise SystemExit(f"The gradients of {MAX_SKIPPED} steps in a row were NaN or infinite, up to step "
                             f"{row['step']}: try a lower --lr in another --out.")

    def append(self, name: str, row: dict) -> None:
        """Adds a line to one of LOGS; `guard` removes those after the last checkpoint. Tensors become lists."""
        with (self.folder / name).open("a") as file:
            print(json.dumps(row, default=lambda x: rounded(x.tolist())), file=file)

    def end_of_step(self, done: int, model: Qwen2_5_VL, optimizer: Optimizer, source: Path, **state) -> None:
        """After `done` steps: saves if that is due, and stops the run (SystemExit) after a signal. `state` goes into
        state.json, a "score" in it ranks checkpoints. `source` gives configuration and tokenizer files."""
        stop, every = self.world.all_reduce_max(self.stop_asked) > 0, self.settings.save_every
        if done > self.step and (stop or done == self.steps or "score" in state or done % every == 0):
            weights, optimizer_state = get_model_state_dict(model, options=ON_RANK0), {}
            if optimizer.state:                              # without an update so far, asking for moments makes one
                optimizer_state = get_optimizer_state_dict(model, optimizer, options=ON_RANK0).get("state", {})
            state |= {"step": done, "steps": self.steps, "source": str(source), "settings": self.configuration,
                      "code": self.code}
            self.last_checkpoint = self.world.on_rank0(lambda: self.write(weights, optimizer_state, state))
            self.step = done
        if stop:
            raise SystemExit(f"{self.stop_reason}Stopped after step {done} of {self.steps}.")

    def write(self, weights: dict[str, Tensor], moments: dict[str, dict], state: dict) -> Path:
        """On rank 0: writes a checkpoint, then removes all but the newest ones and the best one."""
        target = self.folder / f"step-{state['step']:06d}"

        def write_extra(folder: Path) -> None:
            flat = {f"{name} {kind}": x for name, kinds in moments.items() for kind, x in kinds.items()}
            write_tensors(flat, folder, "optimizer")
            made = {"files": {file.name: file.stat().st_size for file in folder.iterdir()}, "made_by": made_by()}
            (folder / "state.json").write_text(json.dumps(state | made, indent=2) + "\n")
        save_model(weights, target, state["source"], write_extra)
        saved = [p for p in sorted(self.folder.glob(CHECKPOINTS)) if p <= target]     # later ones are damaged
        best = max(saved, key=lambda p: (read_json(p / "state.json").get("score", -math.inf), p))
        for old in set(saved[:-self.settings.keep]) - {best}:
            old.rename(f"{old}.old")                         # a checkpoint is never there in part
        for leftover in self.folder.glob("step-*.*"):        # also of a run that was killed
            shutil.rmtree(leftover)
        return target

    def restore(self, model: Qwen2_5_VL, optimizer: Optimizer) -> None:
        """Loads the moments of the last checkpoint, from which the model was built."""
        files = set(tensor_files(self.last_checkpoint, "optimizer").values()) if self.last_checkpoint else ()
        if not files:                                        # no checkpoint, or no update before it
            return
        moments = {name: {} for name, _ in model.named_parameters()}
        for file in files if self.world.first else ():
            for key, x in load_file(file).items():
                name, kind = key.split(" ")
                moments[name][kind] = x
        self.world.barrier()
        groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
        how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.world.size > 1)
        set_optimizer_state_dict(model, optimizer, {"state": moments, "param_groups": groups}, options=how)


def code_hashes(settings: TrainSettings) -> dict[str, str]:
    """A hash of each project file that a run imports."""
    script = Path(sys.modules[type(settings).__module__].__file__)
    files = {script.with_name(name) for name in ("model.py", "rewards.py", "data.py", "sft.py")} | {script}
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in sorted(files)}


def read_json(file: Path) -> dict:
    """The object in a JSON file; {} if there is none, or the file is damaged."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


# ------------------------------------------------------------------------------------------------ the report

def made_by() -> dict[str, str]:
    """The command, the versions it runs on, and the git commit, "" if there is none."""
    root, ranks = Path(__file__).parent, os.environ.get("LOCAL_WORLD_SIZE")
    failed, commit = subprocess.getstatusoutput(f'git -C "{root}" describe --always --dirty')
    launcher = ["torchrun", f"--nproc_per_node={ranks}"] if ranks else ["python"]
    return {"command": shlex.join(launcher + sys.argv), "python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": version("transformers"), "commit": "" if failed or not (root / ".git").exists() else commit}


def rounded(x: list | float) -> list | float | None:
    """Numbers with five digits; NaN, which JSON lacks, becomes null."""
    if isinstance(x, list):
        return [rounded(part) for part in x]
    return None if math.isnan(x) else float(f"{x:.5g}")


def report(folder: Path) -> str:
    """At the end of a run: where its page is, or why there is none. The run is finished either way."""
    try:
        return f"Report: {write_report(folder)}"
    except (OSError, ValueError) as error:
        return f"No report: {error}"


def write_report(folder: str | Path, other: str | Path | None = None) -> Path:
    """Writes report.html into a run's folder: assets/report.html with what the run left on disk, and another run's
    curves laid over its own. Fewer steps are shown until the page is small. ValueError if there is no run."""
    second, file = [collect(Path(other), 0, 0)] if other else [], Path(folder) / "report.html"
    for steps, responses in ((24, 16), (12, 16), (6, 8), (2, 4), (0, 0)):
        runs = [collect(Path(folder), steps, responses), *second]
        text = json.dumps(json.loads(json.dumps(runs), parse_constant=str))   # JSON knows no inf, as in --clip-norm inf
        text = text.replace("<", "\\u003c")                  # no response can close the script element it is in
        if len(text) < 4_500_000:
            break
    page = Path(__file__).with_name("assets") / "report.html"
    data.write_atomically(file, page.read_text(encoding="utf-8").replace("{{runs}}", text))
    return file


def collect(folder: Path, steps: int, responses: int) -> dict:
    """Configuration, metrics, held-out table and data funnel of a run; recorded responses of at most so many steps, so
    many of each, and small pictures of their clips, by path. What there is none of is empty."""
    settings, rows, clips = read_json(folder / "settings.json"), read_jsonl(folder / LOGS[0])[0], {}
    if not (settings and rows):
        raise ValueError(f"{folder} holds no run with a finished step: give the folder of a stage, such as "
                         "runs/tiny/pagrpo")
    run = {"name": folder.as_posix(), "settings": settings, "segments": [s.name for s in SEGMENTS], "clips": clips,
           "metrics": thin(rows, 500) + [row for row in rows if {"heldout/answer", "heldout_loss"} & row.keys()],
           "state": read_json(max(folder.glob(CHECKPOINTS), default=folder) / "state.json"), "funnel": {},
           "results": read_json(folder / "results.json")}
    for place in (folder.parent / "cot", Path(settings["data"]).parent):
        if (place / "dropped.jsonl").is_file():
            reasons = Counter(row["reason"] for row in read_jsonl(place / "dropped.jsonl")[0])
            kept = (place / "traces.jsonl").read_bytes().count(b"\n")
            run["funnel"] = {"steps": data.STEPS, "kept": kept, "dropped": reasons, "dropped_at": data.DROPPED}
    for name in LOGS[1:]:
        groups = {}
        for row in read_jsonl(folder / name)[0]:
            groups.setdefault(row["step"], []).append(row)
        run[name] = {"steps": len(groups), "groups": [thin(g, responses) for g in thin([*groups.values()], steps)]}
        for row, *_ in run[name]["groups"]:
            with suppress(data.MediaError):                  # the media may be elsewhere now
                frames, *_ = data.read_media(argparse.Namespace(**row), Path(settings["media"]),
                                             argparse.Namespace(**settings))
                clips[row["path"]] = [data.picture(f) for f in thin([*data.resize(frames, 0, 128 ** 2)], 8)]
    return run


def thin(rows: list, most: int) -> list:
    """At most so many of them, evenly spread, the first and the last among them."""
    return rows if len(rows) <= most else [rows[i * (len(rows) - 1) // max(1, most - 1)] for i in range(most)]


# ------------------------------------------------------------------------------------ memory, start and errors

def memory(config: Config, s: TrainSettings, ranks: int, cuda: bool = True) -> dict[str, float]:
    """Estimates a step's bytes on each rank, by part, and their peak. A rank samples for all its questions at once,
    then trains on one micro-batch after the other. c: bytes of a gathered weight or an activation."""
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    whole, tower, layer = (parameters_to_vector(part.parameters()).numel()
                           for part in (model, model.visual, model.model.layers[0]))
    layers, d, f, v = config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vision
    c, root = 2 if cuda else 4, whole - tower - layers * layer                # root: embedding and head
    shards, sharded = min(s.shards or 8, ranks), cuda or ranks > 1
    questions = -(-(s.batch if isinstance(s, Settings) else s.questions) // ranks)
    micro, media = min(s.micro_batch, questions), s.frames // 2 * s.max_pixels // 28 ** 2
    prompt, response = min(s.max_prompt, media + (400 if s.prompt == "full" else 40)), s.group_size * s.max_response
    pixels = questions * 4 * media * 1176 * 4                                 # 4 patches a token, fp32
    kv = 2 * c * config.head_dim * config.num_key_value_heads                 # of one token in one layer
    sampling = (s.group_size > 1) * (pixels + c * whole * sharded + layers * kv * questions * (prompt + response) + max(
        questions * prompt * (3 * f + 4 * d) * c,                             # prefill, in a layer's MLP
        questions * 4 * media * v.hidden_size * (8 * c + 16),                 # the vision tower
        questions * s.group_size * config.vocab_size * 24))                   # logits, probabilities, sums in fp64
    row, patches = micro * (prompt + response), 4 * micro * media             # tokens and patches of a micro-batch
    block = row * ((8 + 7 * c) * d + 4 * c * f) + kv * micro * s.group_size * (prompt + s.max_response)
    activations = layers * block + v.depth * patches * ((8 + 9 * c) * v.hidden_size + 4 * c * v.intermediate_size)
    if s.save_memory:                                                         # inputs of all blocks, the rest of one
        activations = block + c * (layers * d * row + v.depth * v.hidden_size * patches)
    logits = min(LOGITS_AT_ONCE["cuda" if cuda else "cpu"], micro * response * config.vocab_size)
    training = 4 * whole / shards + pixels + activations + max(logits * (12 + c), 3 * c * f * row) + sharded * (
        c * (root + 3 * layer) + (4 + c) * max(root, layer))                  # gathered blocks, unreduced gradients
    reference = (s.kl_beta > 0 or s.judge == "reference") and not s.offload_reference
    parts = {"weights": 4 * whole / shards, "moments": 8 * whole / shards, "reference": reference * c * whole / shards}
    peak = sum(parts.values()) + max(sampling, training)
    return parts | {"sampling": sampling, "gradients": parts["weights"], "training": training, "peak": peak}


def plan(s: TrainSettings) -> str:
    """What --dry-run prints: the parts of a step's memory by number of ranks."""
    config, rows = CONFIGS[s.preset], []
    with suppress(FileNotFoundError):                        # the model need not be there yet
        config = read_config(newest_checkpoint(s.model))
    for ranks in (1, 2, 4, 8, 16):
        parts = memory(config, s, ranks, cuda=bool(s.data))
        rows.append([str(ranks), *(f"{x / GB:.{1 if s.data else 3}f}" for x in parts.values())])
    return "\n".join([f"Preset {s.preset}: GB on each rank", *data.format_table([["ranks", *parts], *rows]),
                      "Peak: weights, moments, reference, and the larger of sampling (RL only) and training."])


def explain(error: BaseException, settings: TrainSettings) -> str:
    """One line for an error. Prints the traceback of one that is probably a bug."""
    text, hint, runtime = str(error), getattr(error, "hint", ""), isinstance(error, RuntimeError)
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return (text or "Interrupted.") + hint
    what = f"{type(error).__name__}: {text}"
    if isinstance(error, MemoryError) or runtime and ("out of memory" in text or "DefaultCPUAllocator" in text):
        more = "" if isinstance(settings, Settings) else ", a lower --max-response, --offload-reference or --kl-beta 0"
        what = f"Out of memory. Less is needed with --save-memory, --micro-batch 1, fewer --frames{more}; --dry-run " \
               "says how much. Fewer frames, shorter responses and another β need another --out."
    elif runtime and (isinstance(error, dist.DistError) or "gloo" in text or "closure" in text):
        what = f"lost the connection to another rank ({text[:200]})."
        if "imed out" in text or "timeout" in text:
            what = f"waited {settings.patience:g} minutes for the other ranks (--patience)."
    elif not isinstance(error, (ValueError, OSError)):
        traceback.print_exception(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == Path(__file__).parent]
    at = [f" (at {Path(f.filename).name}:{f.lineno} in {f.name})" for f in frames]
    return what + hint + "".join(at[-1:])


def launch(train: Callable, settings_class, presets: dict[str, dict], argv: Sequence[str] | None, about: str) -> None:
    """What `python sft.py` and `python pagrpo.py` do. An error ends in one line."""
    settings = parse_flags(settings_class, presets, argv, about)
    world = World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), torch.device("cpu"))
    try:
        if settings.dry_run:
            return world.print0(plan(settings))
        world = start_world(settings.patience)
        world.print0(f"Preset {settings.preset}; others: {', '.join(p for p in presets if p != settings.preset)}")
        train(settings, world)
        world.shutdown()
    except BaseException as error:
        message, said_by = explain(error, settings), str(world.rank)
        if world.size == 1:
            sys.exit(message)
        with suppress(Exception):                            # while there is a store, one rank prints what all say
            said_by = world.store.compare_set(message, "", said_by).decode()
        if said_by == str(world.rank):
            print(f"Rank {world.rank}: {message}", file=sys.stderr, flush=True)
        world.shutdown(1)


def main(argv: Sequence[str] | None = None) -> None:
    launch(train, Settings, PRESETS, argv, __doc__)


if __name__ == "__main__":
    main()
