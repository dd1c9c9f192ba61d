"""Stage 1, supervised fine-tuning (SFT): the model learns to write observation, think and answer.

    python sft.py                                        the toy world on any machine: runs/tiny/sft
    torchrun --nproc_per_node=8 sft.py --preset 7b       VideoP2R-CoT-162K on eight GPUs: runs/7b/sft

The loss is the cross-entropy of the response tokens; prompt and video are masked. It is `Qwen2_5_VL.logprobs`, as in
PA-GRPO, for a group of one. The same command resumes an unfinished run and shows a finished one.
"""
from __future__ import annotations

import argparse
import errno
import faulthandler
import glob
import hashlib
import inspect
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Callable, Iterator, Sequence

# Before torch: model.py checks versions and sets what torch reads when it is loaded.
from model import (CHECKPOINTS, CONFIGS, LOGITS_AT_ONCE, Config, Qwen2_5_VL, build_model, newest_checkpoint,
                   read_config, save_model, tensor_files, write_tensors)
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from data import (TOY_INPUT, CotSettings, Example, Examples, InputSettings, Record, Vocabulary, add_flags,
                  blank_example, check_minimum, check_settings, collate, cot, default_settings, flag, format_table,
                  given_flags, lock_folder, make_toy, make_toy_model, read_records, refuse_changes, step_indices,
                  trace_text, write_atomically)
from rewards import read_jsonl


# ------------------------------------------------------------------------------------------------ settings

@dataclass(frozen=True)
class TrainSettings(InputSettings):
    """What SFT and PA-GRPO have in common."""
    preset: str = flag("", "a model size and a row of settings for it; flags given beside it win", list(CONFIGS))
    out: str = flag("", "folder of the whole run, default runs/PRESET; each stage has a folder of its own in it")
    data: str = flag("", "record file to train on (toy: made when missing)")
    media: str = flag("", "folder to which the records' paths are relative")
    heldout: str = flag("", "record file for held-out evaluation, never trained on")
    lr: float = flag(1e-6, "peak learning rate")
    warmup: int = flag(0, "steps in which the learning rate rises to its peak; a cosine to 0 follows")
    weight_decay: float = flag(0.01, "decoupled weight decay of AdamW")
    beta2: float = flag(0.999, "beta2 of AdamW; runs of a few hundred steps need a lower one")
    clip_norm: float = flag(5.0, "gradients are scaled down to this norm")
    micro_batch: int = flag(1, "questions in one forward and backward pass; changes memory and speed, never gradients")
    save_memory: bool = flag(True, "activation checkpointing: recompute blocks in the backward pass")
    save_every: int = flag(100, "steps between checkpoints")
    keep: int = flag(2, "newest checkpoints that stay on disk; with --eval-every the best one stays as well")
    eval_every: int = flag(0, "steps between held-out evaluations, each with a checkpoint; 0: none during training")
    resume: bool = flag(True, "resume from the newest checkpoint (after a restart by torchrun always); --no-resume "
                        "refuses a folder that holds a run")
    shards: int = flag(0, "ranks that share one copy of the weights; further ranks hold replicas; 0: those of a machine")
    patience: float = flag(6.0, "minutes that a rank waits for the others within a step before the run ends")
    dry_run: bool = flag(False, "print the memory that a step needs on each GPU, and stop")
    seed: int = flag(0, "decides weights of a new model, data order and sampling")

    def __post_init__(self):
        super().__post_init__()
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), float) and not math.isfinite(value):
                raise SystemExit(f"--{f.name.replace('_', '-')} must be a finite number")
        check_minimum(self, micro_batch=1, save_every=1, keep=1, eval_every=0, shards=0, patience=0.01, lr=0, warmup=0,
                      weight_decay=0, clip_norm=1e-9, beta2=0)
        if self.beta2 >= 1:
            raise SystemExit("--beta2 must be below 1")


@dataclass(frozen=True)
class Settings(TrainSettings):
    model: str = flag("", "checkpoint folder to start from (toy: a random tiny model, made when missing)")
    steps: int = flag(0, "optimizer steps; 0: as many as --epochs makes")
    batch: int = flag(16, "traces in one optimizer step, over all ranks")
    epochs: float = flag(1.0, "passes over the records, if --steps is 0")
    blind: float = flag(0.0, "share of traces trained without their media: the observation is given, think and answer "
                        "follow; a model that never saw text alone needs some to serve as --judge reference")
    heldout_count: int = flag(256, "without --heldout: so many records of --data are held out, a tenth at most")

    # For `memory`, what PA-GRPO has as flags. SFT has groups of one, traces of some length, and no reference.
    group_size, max_response, kl_beta, judge, offload_reference = 1, 768, 0.0, "", False
    questions = property(lambda self: self.batch)

    def __post_init__(self):
        super().__post_init__()
        check_minimum(self, batch=1, steps=0)


TINY = TOY_INPUT | dict(save_memory=False, clip_norm=1.0, beta2=0.95)
QWEN = "models/Qwen2.5-VL-{}-Instruct"                       # where the commands in the README put it
REAL = dict(data="data/videop2r/*CoT*.json*", media="data/Video-R1-data")
PRESETS = {
    "tiny": TINY | dict(batch=32, micro_batch=32, steps=240, lr=2e-3, warmup=30, blind=0.15),
    "3b": REAL | dict(model=QWEN.format("3B")),
    "7b": REAL | dict(model=QWEN.format("7B")),
}


# ------------------------------------------------------------------------------------------------ SFT

def trace_tokens(examples: Sequence[Example], vocabulary: Vocabulary, template: str) -> tuple[Tensor, Tensor]:
    """The traces as responses in groups of one, each with its stop token: tokens (B, 1, T), lengths (B, 1)."""
    traces = [torch.tensor(vocabulary.encode(trace_text(e.record, template)) + vocabulary.stop_ids[:1])
              for e in examples]
    lengths = torch.tensor([[len(t)] for t in traces])
    return torch.nn.utils.rnn.pad_sequence(traces, batch_first=True)[:, None], lengths


def sft_loss(model: Qwen2_5_VL, examples: Sequence[Example], vocabulary: Vocabulary, template: str, device
             ) -> tuple[Tensor, int]:
    """Sum of the cross-entropy over response tokens, and their number. Prompt, video and padding are not scored."""
    tokens, lengths = trace_tokens(examples, vocabulary, template)
    logprobs, _ = model.logprobs(collate(examples).to(device), tokens.to(device), lengths.to(device))   # (B, 1, T)
    return -logprobs.sum(), int(lengths.sum())


def one_step(model: Qwen2_5_VL, batch: list[Example], optimizer: torch.optim.Optimizer, lr: float,
             vocabulary: Vocabulary, settings: Settings, world: World) -> dict[str, float]:
    """Loss, gradients and update for one batch. Micro-batches and ranks share one denominator: all response tokens."""
    own = sum(trace_tokens([e], vocabulary, settings.template)[1].item() for e in batch)
    counts, total = world.all_reduce_sum({"tokens": own, "records": len(batch)}), 0.0
    tokens = int(counts["tokens"])
    for part, weight in micro_batches(batch, settings.micro_batch, world, model, vocabulary):
        loss, _ = sft_loss(model, part, vocabulary, settings.template, world.device)
        (loss * weight * world.size / max(1, tokens)).backward()              # FSDP averages over ranks: undo that
        total += weight * float(loss.detach())
    norm = optimizer_step(model, optimizer, lr, settings.clip_norm)
    total = world.all_reduce_sum({"loss": total})["loss"]
    return {"loss": total / tokens if tokens else math.nan, **grad_norm_metrics([norm]), "tokens": tokens,
            "skipped": settings.batch - int(counts["records"])}


@torch.no_grad()
def heldout_loss(model: Qwen2_5_VL, examples: Examples, settings: Settings, world: World) -> float:
    """Mean cross-entropy of a response token over the held-out records; NaN if there are none."""
    loss, count = 0.0, 0
    steps = [range(i, min(i + settings.batch, len(examples))) for i in range(0, len(examples), settings.batch)]
    for batch in examples.prefetch([step[world.rank::world.size] for step in steps]):
        for part, weight in micro_batches(batch, settings.micro_batch, world, model, examples.vocabulary):
            summed, tokens = sft_loss(model, part, examples.vocabulary, settings.template, world.device)
            loss, count = loss + weight * float(summed), count + int(weight) * tokens
    sums = world.all_reduce_sum({"loss": loss, "tokens": count})
    return sums["loss"] / sums["tokens"] if sums["tokens"] else math.nan


def read_traces(settings: Settings, world: World) -> tuple[Settings, list[Record], list[Record]]:
    """The settings with all paths filled in, the training records and the held-out records."""
    if not settings.data:
        settings = replace(settings, data=f"{settings.out}/cot/traces.jsonl", **prepare_toy(settings, world))
    settings = require_files(settings)
    records = read_records(settings.data, traces=True)
    if settings.heldout:
        heldout = read_records(settings.heldout, traces=True)
    else:
        random.Random(0).shuffle(records)
        count = min(settings.heldout_count, len(records) // 10)
        records, heldout = records[count:], records[:count]
    chance = random.Random(settings.seed)
    records = [replace(r, blind=True, given=r.trace["observation"]) if chance.random() < settings.blind else r for r in records]
    return settings, records, heldout


def prepare(run: Run, records: list[Record], heldout: list[Record], settings: Settings, world: World):
    """What the loop needs: the folder that the run started from, model, optimizer, training and held-out examples."""
    start = world.on_rank0(lambda: newest_checkpoint(settings.model))
    vocabulary = Vocabulary(start)
    model = build_model(run.last_checkpoint or start, vocabulary, world, settings.save_memory, settings.shards)
    examples, held = (Examples(some, settings.media, vocabulary, model.config, settings, run.folder / "skipped.log")
                      for some in (records, heldout))
    return start, model, make_optimizer(model, settings), examples, held


def train(settings: Settings, world: World) -> Path:
    """Runs SFT, or resumes it. Returns the folder of the last checkpoint; SystemExit if the run stops before it."""
    settings, records, heldout = read_traces(settings, world)
    steps = settings.steps or max(1, int(settings.epochs * len(records)) // settings.batch)
    run = Run(Path(settings.out) / "sft", settings, steps, settings.batch, world)
    report = run.folder / "results.json"
    if run.finished:
        losses = "".join(f"  {name} {loss:.3f}" for name, loss in read_json(report).items())
        world.print0(f"SFT is finished: {run.last_checkpoint}{losses}")
        return run.last_checkpoint

    start, model, optimizer, examples, held = prepare(run, records, heldout, settings, world)
    before = run.restore(model, optimizer)["heldout_before"] if run.step else heldout_loss(model, held, settings, world)
    with run.guard():
        for step, batch in run.batches(examples):
            began, lr, score = time.perf_counter(), learning_rate(step, steps, settings), {}
            metrics = one_step(model, batch, optimizer, lr, examples.vocabulary, settings, world)
            seconds = time.perf_counter() - began
            if settings.eval_every and (step + 1) % settings.eval_every == 0:
                metrics["heldout_loss"] = heldout_loss(model, held, settings, world)
                score = {"score": -metrics["heldout_loss"]}                   # the highest score is the best
            run.log({"step": step + 1, **metrics, "lr": lr, "tokens_per_second": metrics["tokens"] / seconds,
                     "seconds": seconds, **memory_metrics(world)}, f"loss {metrics['loss']:.3f}")
            run.end_of_step(step + 1, model, optimizer, start, heldout_before=before, **score)

    after = heldout_loss(model, held, settings, world)
    if world.first:
        write_atomically(report, json.dumps({"heldout_loss_before": before, "heldout_loss_after": after}) + "\n")
    world.print0(f"SFT: held-out loss {before:.3f} → {after:.3f} over {len(heldout)} records; "
                 f"{len(examples.skipped)} records skipped. Checkpoint: {run.last_checkpoint}")
    return run.last_checkpoint


# ------------------------------------------------- what both trainings share; a first reader may stop here

def parse_flags(cls, presets: dict[str, dict], argv: Sequence[str] | None, description: str
                ) -> tuple[TrainSettings, str]:
    """Settings from a preset and the flags beside it, and why it is this preset."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, cls, presets)
    given, (toy, *_, largest) = given_flags(parser.parse_args(argv)), presets
    if "data" in given and "preset" not in given:
        parser.error(f"--data needs --preset: {', '.join(presets)} ({toy} for files of the toy world)")
    several = torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    preset = given.get("preset") or (largest if several else toy)
    reason = "chosen by flag" if "preset" in given else f"{'' if several else 'not '}several ranks with CUDA"
    return cls(**({"out": f"runs/{preset}", "preset": preset} | presets[preset] | given)), reason


def require_files(settings: TrainSettings) -> TrainSettings:
    """Resolves --data where it is a pattern. SystemExit, with the commands that fetch it, if something is missing."""
    model, data = Path(settings.model), settings.data
    found = [data] if Path(data).is_file() else sorted(glob.glob(data))
    there = {"model": (model / "config.json").is_file() or any(model.glob(CHECKPOINTS)), "data": len(found) == 1,
             "media": Path(settings.media).is_dir()}
    missing = [f"--{k} {getattr(settings, k)!r}" for k, ok in there.items() if not (ok and getattr(settings, k))]
    if missing:
        size = settings.preset.upper()
        raise SystemExit(f"""Not found, or not one file: {', '.join(missing)}. This makes or fetches them:
    torchrun --nproc_per_node=8 sft.py --preset {settings.preset}            # the model that PA-GRPO starts from
    hf download Qwen/Qwen2.5-VL-{size}-Instruct --local-dir {QWEN.format(size)}
    hf download 1171-jpg/videop2r --repo-type dataset --local-dir data/videop2r
    hf download Video-R1/Video-R1-data --repo-type dataset --local-dir data/Video-R1-data
The last one has 310 GB; unzip the archives in place, a part of them is fine.""")
    return replace(settings, data=found[0])


def prepare_toy(settings: TrainSettings, world: World) -> dict[str, str]:
    """Makes the toy world, its traces and a random model in the run's folder. Returns the settings that name them."""
    out = Path(settings.out)

    def make() -> None:
        questions, traces = make_toy(out / "toy") / "sft.json", out / "cot" / "traces.jsonl"
        if not traces.is_file() or traces.stat().st_mtime < questions.stat().st_mtime:
            cot(CotSettings(**TOY_INPUT, out=str(out / "cot"), data=str(questions)))
        if not (out / "base" / "config.json").is_file():
            make_toy_model(out / "base", settings.seed, CONFIGS[settings.preset])
    world.on_rank0(make)
    return dict(model=settings.model or str(out / "base"), media=str(out / "toy"),
                heldout=str(out / "toy" / "heldout.json"))


# ------------------------------------------------------------------------------------------------ ranks

@dataclass(frozen=True)
class World:
    """The ranks (processes) of a run, and how they act together. Without torchrun there is one."""
    rank: int
    size: int
    device: torch.device
    slow_group: dist.ProcessGroup | None = None              # with a long timeout, while one rank works alone
    local_size: int = 1                                      # ranks on this machine
    minutes: float = 6.0                                     # timeout within a step

    @property
    def first(self) -> bool:
        return self.rank == 0

    def print0(self, *words, sep: str = " ") -> None:
        if self.first:
            print(*words, sep=sep, flush=True)

    def all_reduce_sum(self, values: dict[str, float]) -> dict[str, float]:
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return dict(zip(values, total.tolist()))

    def all_reduce_max(self, value: float) -> float:
        largest = torch.tensor(float(value), device=self.device)
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def gather(self, value) -> list:
        """The values of all ranks, in their order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.slow_group)

    def on_rank0(self, work: Callable):
        """Runs `work` on rank 0 while the others wait. All ranks return its result, or raise its error."""
        box = [None, None]
        if self.first:
            try:
                box[0] = work()
            except (Exception, SystemExit) as error:
                box[1] = error
        if self.size > 1:
            dist.broadcast_object_list(box, group=self.slow_group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    @lru_cache
    def mesh(self, shards: int):
        """The ranks as a grid (replicas, shards); 0: the ranks of a machine share a copy of the weights."""
        shards = shards or self.local_size
        if self.size % shards:
            raise SystemExit(f"--shards {shards}: the {self.size} ranks are not divisible by it")
        if shards == self.size:
            return init_device_mesh(self.device.type, (shards,))
        grid = init_device_mesh(self.device.type, (self.size // shards, shards), mesh_dim_names=("replicas", "shards"))
        for group in grid.get_all_groups():                  # new groups have a timeout of half an hour
            dist.distributed_c10d._set_pg_timeout(timedelta(minutes=self.minutes), group)
        return grid

    def shutdown(self, code: int = 0) -> None:
        """Ends a program. Several ranks skip Python's own shutdown, in which threads of gloo may abort."""
        if dist.is_initialized() and code == 0:
            dist.destroy_process_group()                     # when all ranks are here
        if self.size > 1:
            WRITER.shutdown()                                # waits for a checkpoint; torchrun allows 30 seconds
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def start_world(minutes: float = 6.0, patience: timedelta = timedelta(hours=1)) -> World:
    """Joins the ranks that torchrun started. They wait `minutes` for each other within a step, and `patience` where one
    works alone (`World.on_rank0`, `World.barrier`). A rank that dies is noticed at once: its connections close."""
    rank, size, local_size, local_rank = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if local_size > 1:                                       # more threads than cores: ten times slower than one rank
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // local_size))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if not dist.is_initialized() and (size > 1 or cuda):
        store, timeout = dist.HashStore(), timedelta(minutes=minutes)
        if size > 1:                                         # torchrun's store still holds what ended ranks wrote
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(start, next(dist.rendezvous("env://", timeout=timeout))[0])
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout, store=store, rank=rank,
                                world_size=size)
    if size == 1:
        return World(rank, size, device)
    faulthandler.enable()                                    # NCCL aborts after a timeout: show where that was
    return World(rank, size, device, dist.new_group(backend="gloo", timeout=patience), local_size, minutes)


# ------------------------------------------------------------------------------------------------ optimizer

def make_optimizer(model: Qwen2_5_VL, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == matrices], "weight_decay": decay}
              for matrices, decay in ((True, settings.weight_decay), (False, 0.0))]
    cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=cuda)


def learning_rate(step: int, steps: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine to zero. step counts from 0."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def micro_batches(examples: Sequence[Example], size: int, world: World, model: Qwen2_5_VL, vocabulary: Vocabulary
                  ) -> Iterator[tuple[list[Example], float]]:
    """Cuts a rank's examples into micro-batches. Yields (examples, weight), as often on every rank, since all must take
    part in each exchange of weights and gradients: where nothing is left, a blank example of weight 0."""
    for i in range(int(world.all_reduce_max(-(-len(examples) // size)))):
        part = examples[i * size:(i + 1) * size]
        yield (list(part), 1.0) if part else ([blank_example(vocabulary, model.config)], 0.0)


def optimizer_step(model: Qwen2_5_VL, optimizer: torch.optim.Optimizer, lr: float, clip_norm: float) -> float:
    """One clipped update. Returns the gradient norm before clipping; if it is not finite, nothing changes."""
    if any(p.grad is not None for p in model.parameters()):
        for p in model.parameters():                         # a step without media: sharded towers have zeros, not None
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def grad_norm_metrics(norms: Sequence[float]) -> dict[str, float]:
    """Mean gradient norm of a step's updates (NaN: none was finite), and how many updates were left out."""
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {"grad_norm": sum(finite) / len(finite) if finite else math.nan,
            "skipped_updates": len(norms) - len(finite)}


def memory_metrics(world: World) -> dict[str, float]:
    """Peak memory of any rank in GB. On GPUs also what the allocator reserved: that decides when memory runs out."""
    if world.device.type == "cuda":
        found = {"peak_memory_gb": torch.cuda.max_memory_allocated(),
                 "reserved_memory_gb": torch.cuda.max_memory_reserved()}
    else:
        try:
            import resource                                  # not on Windows
        except ImportError:
            return {}
        unit = 1 if sys.platform == "darwin" else 2 ** 10    # bytes on macOS, KiB on Linux
        found = {"peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    return {name: world.all_reduce_max(x / GB) for name, x in found.items()}


GB = 2 ** 30


# ------------------------------------------------------------------------------------------------ a run on disk

# Settings that may change when a run resumes: they decide where and how fast numbers are computed, not which.
RESUMABLE = ("preset", "save_every", "micro_batch", "save_memory", "transcript_every", "keep", "eval_every", "resume",
             "shards", "patience", "dry_run", "offload_reference")
MAX_SKIPPED = 5                                              # updates in a row without a finite gradient
WRITER = ThreadPoolExecutor(1)                               # writes checkpoints while training goes on
ON_RANK0 = StateDictOptions(full_state_dict=True, cpu_offload=True)           # gathered in rank 0's host memory


class Run:
    """A stage's folder: settings.json, metrics.jsonl, skipped.log, and checkpoints step-NNNNNN.

    A checkpoint is a model folder with the optimizer's moments and state.json. Learning rate, data order and random
    numbers are functions of seed and step, so there is no other state to save.
    """

    def __init__(self, folder: Path, settings: TrainSettings, steps: int, per_step: int, world: World):
        """Finds the last checkpoint. SystemExit if the folder holds a run with other settings. per_step: records."""
        self.folder, self.settings, self.steps, self.per_step, self.world = folder, settings, steps, per_step, world
        self.stop_asked, self.stop_reason, self.skipped, self.bar = None, "", 0, None
        self.writing = WRITER.submit(str)
        self.configuration = json.loads(json.dumps(asdict(settings) | {"steps": steps}))
        self.last_checkpoint, state = world.on_rank0(self.find)
        self.step = state.get("step", 0)
        before, now = state.get("code", {}), code_hashes(settings)
        if changed := [name for name in now if before.get(name, now[name]) != now[name]]:
            what = "These are the results of the old code" if self.finished else "The run goes on with the new code"
            world.print0(f"{', '.join(changed)} changed since {self.last_checkpoint} was written. {what}; "
                         "take another --out to run the new code from the start.")

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def find(self) -> tuple[Path | None, dict]:
        """The newest usable checkpoint and its state.json."""
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if (self.folder / "metrics.jsonl").exists() and not (self.settings.resume or restarted):
            raise SystemExit(f"{self.folder} holds a run: leave out --no-resume to continue it, or take another --out")
        defaults = default_settings(self.settings)
        check_settings(self.folder, self.configuration, defaults, RESUMABLE)
        try:
            checkpoint = newest_checkpoint(self.folder, optimizer=True)
        except FileNotFoundError:
            return None, {}
        state = read_json(checkpoint / "state.json")
        if state["step"] != int(checkpoint.name[5:]):
            raise SystemExit(f"{checkpoint} holds step {state['step']}: it was renamed or copied there; move it away")
        refuse_changes(checkpoint, state["settings"], self.configuration, defaults, RESUMABLE)
        return checkpoint, state

    def checkpoints(self) -> list[Path]:
        """Those up to the current step: later ones were found damaged, and will be replaced."""
        return [p for p in sorted(self.folder.glob(CHECKPOINTS)) if int(p.name[5:]) <= self.step]

    def resume_hint(self) -> str:
        last = self.checkpoints()[-1:]
        return f"The last checkpoint is {last[0]}; the same command resumes from it." if last else \
            "There is no checkpoint yet; the same command starts again."

    def batches(self, examples: Examples) -> Iterator[tuple[int, list[Example]]]:
        """Yields each step that is left and this rank's examples of it, under a progress bar."""
        left, rank, ranks = range(self.step, self.steps), self.world.rank, self.world.size
        indices = (step_indices(len(examples), self.per_step, step, self.settings.seed)[rank::ranks] for step in left)
        with tqdm(total=self.steps, initial=self.step, desc=self.folder.name, unit="step", disable=rank > 0) as self.bar:
            for step, batch in zip(left, examples.prefetch(indices)):
                yield step, batch
                self.bar.update()

    @contextmanager
    def guard(self):
        """Around the loop: locks the folder, and makes Ctrl-C or SIGTERM stop the run after a step. A checkpoint that is
        being written is finished in any case, and an error gets a `resume_hint`."""
        handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with lock_folder(self.folder) if self.world.first else nullcontext():
                if self.world.first:
                    self.trim_log()
                yield
                self.wait_for_writer()
        except BaseException as error:
            if self.world.size == 1:
                wait([self.writing])
            else:                                            # torchrun must not stop this rank before it says why
                handlers = dict.fromkeys(handlers, signal.SIG_IGN)
            error.resume_hint = self.resume_hint()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_signal(self, number, frame) -> None:
        """The first signal stops the run after the step, one more than two seconds later at once: launchers repeat."""
        if self.stop_asked and time.monotonic() > self.stop_asked + 2:
            raise KeyboardInterrupt
        if not self.stop_asked and self.world.first:         # print may be running below this handler
            os.write(1, b"\nStopping after this step, with a checkpoint (once more: at once).\n")
        self.stop_asked = self.stop_asked or time.monotonic()

    def stop(self, reason: str) -> None:
        """Makes `end_of_step` stop the run, for a reason that all ranks know."""
        self.stop_asked, self.stop_reason = time.monotonic(), f"{reason}. "

    def trim_log(self) -> None:
        """Removes the lines of steps after the checkpoint, which run again, and what an interrupted write left."""
        for leftover in (*self.folder.glob("step-*.old"), *self.folder.glob("step-*.writing")):
            shutil.rmtree(leftover)
        rows = [row for row in read_jsonl(self.folder / "metrics.jsonl")[0] if row.get("step", 0) <= self.step]
        write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, metrics: dict, shown: str = "") -> None:
        """Adds a line to metrics.jsonl, without values that are not finite; `shown` goes to the progress bar. SystemExit
        once the gradients of several steps in a row were not finite."""
        if self.world.first:
            row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items() if math.isfinite(v)}
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self.bar is not None:
            self.bar.set_postfix_str(shown)
        self.skipped = 0 if math.isfinite(metrics["grad_norm"]) else self.skipped + 1
        if self.skipped == MAX_SKIPPED:
            self.wait_for_writer()
            raise SystemExit(f"The gradients of {MAX_SKIPPED} steps in a row were NaN or infinite, up to step "
                             f"{metrics['step']}. A lower --lr or --clip-norm may help, in another --out. "
                             f"{self.resume_hint()}")

    def end_of_step(self, done: int, model: Qwen2_5_VL, optimizer: torch.optim.Optimizer, source: Path, **state
                    ) -> None:
        """Call it when `done` steps are complete. Saves if that is due, and stops the run (SystemExit) after a signal.
        `state` goes into state.json; its "score" says how good the checkpoint is."""
        failed = self.writing.done() and self.writing.exception()
        asked = self.world.all_reduce_max(2 if failed else bool(self.stop_asked))
        due = done == self.steps or "score" in state or done % self.settings.save_every == 0
        if done > self.step and (due or asked == 1):
            self.save(model, optimizer, source, done, **state)
        if asked:
            self.wait_for_writer()
            raise SystemExit(f"{self.stop_reason}Stopped after step {done} of {self.steps}. {self.resume_hint()}")

    def save(self, model: Qwen2_5_VL, optimizer: torch.optim.Optimizer, source: Path, step: int, **state) -> None:
        """Copies everything to rank 0's host memory; a thread writes it while training goes on. `source`, from which
        the run started, gives configuration and tokenizer files, and RL its KL reference."""
        self.wait_for_writer()

        def copy(x: Tensor) -> Tensor:                       # on a CPU gathering may return the live tensor
            return x.clone() if x.device == self.world.device or x.numel() == 1 else x
        weights = {name: copy(x) for name, x in get_model_state_dict(model, options=ON_RANK0).items()}
        # Without an update so far there are no moments, and asking for them would make one.
        found = get_optimizer_state_dict(model, optimizer, options=ON_RANK0) if optimizer.state else {}
        moments = {f"{name} {kind}": copy(x) for name, kinds in found.get("state", {}).items()
                   for kind, x in kinds.items()}
        state |= {"step": step, "steps": self.steps, "records_taken": step * self.per_step, "source": str(source),
                  "settings": self.configuration, "code": code_hashes(self.settings)}
        self.step = step
        if self.world.first:
            self.writing = WRITER.submit(self.write, weights, moments, state, source)

    def write(self, weights: dict, moments: dict, state: dict, source: Path) -> None:
        """Writes a checkpoint, then removes all but the newest ones and the best one. OSError if it fails."""
        target = self.folder / f"step-{state['step']:06d}"

        def write_extra(folder: Path) -> None:
            write_tensors(moments, folder, "optimizer")
            sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
            (folder / "state.json").write_text(json.dumps(state | {"files": sizes}, indent=2) + "\n")
        try:
            save_model(weights, target, source, write_extra)
            self.last_checkpoint, saved = target, self.checkpoints()
            for old in set(saved[:-self.settings.keep]) - {best_of(saved)}:
                shutil.rmtree(old.rename(f"{old}.old"))      # a checkpoint is never there in part
        except Exception as error:
            raise OSError(f"Checkpoint {target} could not be written: {error}.") from error

    def wait_for_writer(self) -> None:
        """Waits for the checkpoint that is being written. OSError on all ranks if that failed."""
        self.last_checkpoint = self.world.on_rank0(lambda: self.writing.result() or self.last_checkpoint)

    def restore(self, model: Qwen2_5_VL, optimizer: torch.optim.Optimizer) -> dict:
        """Loads the moments of the last checkpoint, from which the model was built. Returns its state.json."""
        self.world.print0(f"{self.folder.name} continues after step {self.step}")
        files = set(tensor_files(self.last_checkpoint, "optimizer").values())
        if files:                                            # none: no step so far had an update
            names = {p: name for name, p in model.named_parameters()}
            groups = [group | {"params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
            moments = {"state": {name: {} for name in names.values()}, "param_groups": groups}
            for file in files if self.world.first else ():
                for key, x in load_file(file).items():
                    name, kind = key.split(" ")
                    moments["state"][name][kind] = x
            self.world.barrier()
            how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.world.size > 1)
            set_optimizer_state_dict(model, optimizer, moments, options=how)
        return read_json(self.last_checkpoint / "state.json")


def code_hashes(settings: TrainSettings) -> dict[str, str]:
    """A hash of each project file that a run imports."""
    here, script = Path(__file__).parent, Path(inspect.getfile(type(settings))).name
    names = sorted({"model.py", "rewards.py", "data.py", "sft.py", script})
    return {name: hashlib.sha256((here / name).read_bytes()).hexdigest()[:16] for name in names}


def read_json(file: Path) -> dict:
    """The object in a JSON file; {} if there is none, or the file is damaged."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def best_of(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the highest held-out score, the newest of equals; None if none was evaluated."""
    scores = [(read_json(p / "state.json").get("score"), p) for p in checkpoints]
    return max((pair for pair in scores if pair[0] is not None), default=(0, None))[1]


# ------------------------------------------------------------------------------------------------ memory

def needs_reference(s: TrainSettings) -> bool:
    """RL keeps the SFT model in memory where the KL term or the judge asks for it."""
    return s.kl_beta > 0 or s.judge == "reference"


def memory(config: Config, s: TrainSettings, ranks: int, cuda: bool = True) -> dict[str, float]:
    """Estimates the bytes of one step on each rank, by part, and their peak. Nothing is allocated.

    Weights, gradients and AdamW's moments are fp32 and sharded; gathered weights and activations have c bytes a number.
    A rank samples for all its questions at once, then trains on one micro-batch after the other.
    """
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    whole, tower, layer = (sum(p.numel() for p in part.parameters())
                           for part in (model, model.visual, model.model.layers[0]))
    layers, d, f, v = config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vision
    width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    root, c = whole - tower - layers * layer, 2 if cuda else 4                # root: embedding, last norm, head
    shards, sharded, questions = s.shards or min(ranks, 8), cuda or ranks > 1, -(-s.questions // ranks)
    micro, media = min(s.micro_batch, questions), s.frames // 2 * s.max_pixels // 28 ** 2
    prompt, response = min(s.max_prompt, media + (400 if s.prompt == "full" else 40)), s.group_size * s.max_response

    pixels = questions * 4 * media * 1176 * 4                                 # 4 patches a token, fp32
    cache = 2 * c * layers * kv_width * questions * (prompt + response) + max(
        questions * prompt * (3 * f + 4 * d) * c,                             # prefill, in a layer's MLP
        questions * 4 * media * v.hidden_size * (8 * c + 16),                 # the vision tower
        questions * s.group_size * config.vocab_size * 24)                    # logits, probabilities, sums in fp64
    sampling = pixels + c * whole * sharded + cache if s.group_size > 1 else 0

    row, patches = micro * (prompt + response), 4 * micro * media             # what one pass computes
    copies = 2 * c * kv_width * micro * s.group_size * (prompt + s.max_response)             # K and V for each response
    block = row * (2 * (4 + 2 * c) * d + 3 * c * width + 4 * c * f) + copies  # what backward needs of a layer, …
    patch = (2 * (4 + 2 * c) + 5 * c) * v.hidden_size + 4 * c * v.intermediate_size          # … and of a patch
    activations = (layers * c * d * row + v.depth * patches * c * v.hidden_size if s.save_memory else
                   layers * block + v.depth * patches * patch)
    logits = min(LOGITS_AT_ONCE["cuda" if cuda else "cpu"], micro * response * config.vocab_size)
    gradients, sent = 4 * whole / shards, (4 + c) * sharded                   # sent: before gradients are reduced
    earlier = gradients * (micro < questions)                                 # of the micro-batches before
    training = pixels + c * (root + 3 * layer) * sharded + activations + max(                # three layers are gathered
        earlier + logits * (12 + c) + c * root * sharded,
        earlier + block * s.save_memory + 3 * c * f * row + sent * layer,
        gradients + patches * patch * s.save_memory + sent * root)
    constant = {"weights": 4 * whole / shards, "moments": 8 * whole / shards,
                "reference": c * whole / shards * (needs_reference(s) and not s.offload_reference)}
    return constant | {"cache": cache, "sampling": sampling, "gradients": gradients, "activations": activations,
                       "training": training, "peak": sum(constant.values()) + max(sampling, training)}


def plan(config: Config, s: TrainSettings, title: str) -> str:
    """What --dry-run prints: the parts of a step's memory by number of ranks."""
    parts = {ranks: memory(config, s, ranks, cuda=bool(s.data)) for ranks in (1, 2, 4, 8, 16)}
    rows = [["ranks", *parts[1]]]
    rows += [[str(ranks), *(f"{x / GB:.{1 if s.data else 3}f}" for x in part.values())] for ranks, part in parts.items()]
    return "\n".join([f"{title}: GB on each rank with {s.frames} frames, responses of {s.max_response} tokens and "
                      f"micro-batches of {s.micro_batch}", *format_table(rows),
                      "Peak: weights, moments, reference, and the larger of sampling and training."])


# ------------------------------------------------------------------------------------------------ start and errors

LOST = "lost the connection to another rank, which has ended."
LESS_MEMORY = ("Less is needed with --save-memory, --micro-batch 1, fewer --frames, a lower --max-response, "
               "--offload-reference or --kl-beta 0; --dry-run says how much.")


def explain(error: BaseException, settings: TrainSettings) -> str:
    """One sentence for an error that a user can mend; "" for one that needs its traceback."""
    text, runtime = str(error), isinstance(error, RuntimeError)
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return text or "Interrupted."
    if isinstance(error, MemoryError) or runtime and ("out of memory" in text or "DefaultCPUAllocator" in text):
        return f"Out of memory. {LESS_MEMORY}"
    if runtime and (isinstance(error, dist.DistError) or "gloo" in text or "closure" in text):
        if "imed out" in text or "timeout" in text:
            return f"waited {settings.patience:g} minutes for the other ranks (--patience)."
        gone = any(word in text for word in ("closed", "reset by peer", "Broken pipe", "remote process"))
        return LOST if gone else f"{type(error).__name__}: {text.splitlines()[0]}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {text}."
    return f"{type(error).__name__}: {text}" if isinstance(error, (ValueError, OSError)) else ""


def launch(train: Callable, settings_class, presets: dict[str, dict], argv: Sequence[str] | None, description: str
           ) -> None:
    """What `python sft.py` and `python pagrpo.py` do. Errors end in a line, and only likely bugs in a traceback."""
    settings, reason = parse_flags(settings_class, presets, argv, description)
    title = f"Preset {settings.preset} ({reason})"
    if settings.dry_run:
        folders = [Path(settings.model), *Path(settings.model).glob(CHECKPOINTS)] if settings.model else []
        found = [folder for folder in folders if (folder / "config.json").is_file()]
        if int(os.environ.get("RANK", 0)) == 0:
            print(plan(read_config(found[0]) if found else CONFIGS[settings.preset], settings, title))
        return
    world = start_world(settings.patience)
    world.print0(f"{title}; others: " + ", ".join(f"--preset {p}" for p in presets if p != settings.preset))
    try:
        train(settings, world)
        world.shutdown()
    except BaseException as error:
        message, here = explain(error, settings), Path(__file__).parent
        if not message:
            traceback.print_exception(error)
            message = f"{type(error).__name__}: {error}"
        if not isinstance(error, SystemExit):
            frames = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in
                      traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == here]
            message += f" {getattr(error, 'resume_hint', '')}  (at {', from '.join(frames[:-3:-1])})"
        if world.size == 1:
            sys.exit(message)
        if world.first or not isinstance(error, SystemExit):                  # which all ranks raise alike
            print(f"Rank {world.rank}: {message}", file=sys.stderr, flush=True)
        world.shutdown(1)


def main(argv: Sequence[str] | None = None) -> None:
    launch(train, Settings, PRESETS, argv, __doc__)


if __name__ == "__main__":
    main()
