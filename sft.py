"""Stage 1, supervised fine-tuning: the model learns to write observation, think and answer (paper, stage 1).

    python sft.py                                        the toy world on any machine: runs/tiny/sft
    torchrun --nproc_per_node=8 sft.py --preset 7b       VideoP2R-CoT-162K on eight GPUs: runs/7b/sft

The loss is the cross-entropy of the response tokens: prompt and video carry none. It is the same `logprobs` that
PA-GRPO scores with, for a group of one. An unfinished run in the output folder is continued, a finished one is shown.

What both training scripts share stands here, in the first one that needs it: settings and presets, ranks and sharding,
the optimizer and its schedule, the metrics log, checkpoints. Then comes SFT itself, in a page.
"""
import argparse
import glob
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Iterator, Sequence

# Before torch: model.py checks the versions of Python and torch.
from model import Qwen2_5_VL, load_model, load_weights, newest_checkpoint, read_config, save_model
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm

from data import (TOY_INPUT, CotSettings, Example, Examples, InputSettings, Vocabulary, add_flags, at_least,
                  blank_example, collate, cot, flag, given_flags, make_toy, make_toy_model, read_records, same_settings,
                  step_indices, trace_text, write_rows)
from rewards import Journal, whole_lines


# ------------------------------------------------------------------------------------------------ settings

@dataclass(frozen=True)
class TrainSettings(InputSettings):
    """What SFT and PA-GRPO have in common."""
    out: str = flag("", "folder of the whole run, default runs/PRESET; each stage has a folder of its own in it")
    data: str = flag("", "record file to train on (toy: made when missing)")
    media: str = flag("", "folder to which the records' paths are relative")
    heldout: str = flag("", "record file for held-out evaluation, never trained on")
    lr: float = flag(1e-6, "peak learning rate")
    warmup: int = flag(0, "steps in which the learning rate rises to its peak; a cosine to 0 follows")
    weight_decay: float = flag(0.01, "decoupled weight decay of AdamW")
    beta2: float = flag(0.999, "memory of AdamW's second moment; a run of a few hundred steps wants it shorter")
    clip_norm: float = flag(5.0, "gradients are scaled down to this norm")
    micro_batch: int = flag(1, "questions in one forward and backward pass; changes memory and speed, never gradients")
    save_memory: bool = flag(True, "activation checkpointing: recompute blocks in the backward pass")
    save_every: int = flag(100, "steps between checkpoints")
    seed: int = flag(0, "decides weights of a new model, data order and sampling")


TINY = TOY_INPUT | dict(save_memory=False, clip_norm=1.0, beta2=0.95)
QWEN = "models/Qwen2.5-VL-{}-Instruct"                       # where the commands in the README put it


def parse_flags(cls, presets: dict[str, dict], argv: Sequence[str] | None, description: str):
    """Builds a settings dataclass from the preset, then from the flags given. Returns (settings, preset, reason).

    The default preset is 7b on several ranks with CUDA, and tiny everywhere else.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=presets, help="a row of settings; flags given beside it win")
    add_flags(parser, cls, presets)
    given = given_flags(parser.parse_args(argv))
    preset, reason = given.pop("preset", None), "chosen by flag"
    if preset is None and "data" in given:
        parser.error("--data needs --preset: 3b or 7b for real models, tiny for files of the toy world")
    if preset is None:
        several = torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1
        preset, reason = ("7b", "several ranks with CUDA") if several and "7b" in presets else (
            "tiny", "no flag names one, and these are not several ranks with CUDA")
    return cls(**({"out": f"runs/{preset}"} | presets[preset] | given)), preset, reason


# ------------------------------------------------------------------------------------------------ ranks and sharding

@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    apart: dist.ProcessGroup | None = None                   # for ranks that meet seldom

    @property
    def first(self) -> bool:
        return self.rank == 0

    def say(self, *words, sep: str = " ") -> None:
        if self.first:
            print(*words, sep=sep, flush=True)

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Adds up the same keys over all ranks."""
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return dict(zip(values, total.tolist()))

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.apart)

    def most(self, value: float) -> float:
        """The largest value of any rank."""
        most = torch.tensor(float(value), device=self.device)
        if self.size > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)

    def leave(self) -> None:
        """Ends a program that went well, when all ranks arrive; after an error a rank just ends. Several ranks skip
        Python's own shutdown: a thread of gloo may still hold a tensor then, and would abort (on busy machines)."""
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def start_world(patience: timedelta | None = None) -> World:
    """Reads torchrun's environment and joins the ranks. Without torchrun: one rank. Ranks wait ten minutes for each
    other; `patience` is how long `World.wait` may take where they work apart."""
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if size > 1:  # threads of several ranks on the same cores spin against each other: ten times slower than one rank
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized() and (size > 1 or cuda):
        alone = {} if size > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10), **alone)
    apart = dist.new_group(backend="gloo", timeout=patience) if size > 1 and patience else None
    return World(rank, size, device, apart)


def shard(model: Qwen2_5_VL, world: World) -> Qwen2_5_VL:
    """FSDP2: every rank keeps its part of each weight in fp32; a block's weights are gathered (in bf16 on CUDA) when it
    runs. Each block is a group, the rest of the vision tower another, the root holds embedding, last norm and head."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    how = dict(mesh=init_device_mesh(world.device.type, (world.size,)))
    if world.device.type == "cuda":
        how["mp_policy"] = half                              # rotary tables stay fp32: inputs are not cast
    for block in (*model.visual.blocks, *model.model.layers, model.visual):
        fully_shard(block, **how)
    fully_shard(model, **how)
    for entry in ("generate", "logprobs"):                   # ways into the model other than forward
        register_fsdp_forward_method(model, entry)
    return model


def build_model(folder: str | Path, vocabulary: Vocabulary, world: World, save_memory: bool = False) -> Qwen2_5_VL:
    """Loads a checkpoint, sharded where there are several ranks or a GPU. Rank 0 reads it and sends the parts."""
    if world.size == 1 and world.device.type == "cpu":
        model = load_model(folder)
    else:
        with torch.device("meta"):
            model = shard(Qwen2_5_VL(read_config(folder)), world)
        wanted = {name: p.shape for name, p in model.named_parameters()}
        model.to_empty(device=world.device)
        tensors = {k: x.float() for k, x in load_weights(folder, wanted).items()} if world.first else {}
        set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    model.save_memory = save_memory
    return vocabulary.restrict(model)


@contextmanager
def gathered(model: Qwen2_5_VL):
    """`with gathered(model):` holds all weights whole, so that sampling needs no exchange for each token, and ranks may
    sample different numbers of tokens."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)  # the root stays whole until its backward
            part.reshard()


# ------------------------------------------------------------------------------------------------ optimizer and log

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
    return settings.lr * 0.5 * (1 + torch.tensor(math.pi * done).cos().item())


def update(model: Qwen2_5_VL, optimizer: torch.optim.Optimizer, lr: float, clip_norm: float) -> float:
    """One clipped optimizer step. Returns the gradient norm before clipping; if it is not finite, nothing changes."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def norms(values: list[float]) -> dict:
    """Gradient norms for the log. An update whose norm is not finite was left out; JSON knows no NaN."""
    finite = [v for v in values if math.isfinite(v)]
    return {"grad_norm": sum(finite) / len(finite) if finite else None, "skipped_updates": len(values) - len(finite)}


def peak_memory_gb(world: World) -> float:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 2 ** 10        # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


# ------------------------------------------------------------------------------------------------ a run on disk

MOST_BROKEN = 5                                              # steps in a row without a finite gradient
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)   # gathered from all ranks, on rank 0's host


class Run:
    """A stage's folder: settings.json, metrics.jsonl, skipped.log, and complete checkpoints step-NNNNNN.

    A checkpoint is a model folder in Hugging Face format with optimizer.safetensors and state.json beside it. It is
    written aside and renamed, so it is there whole or not at all.
    """

    def __init__(self, folder: Path, settings, steps: int, world: World):
        """Raises SystemExit if the folder holds a run with other settings."""
        self.folder, self.steps, self.world = folder, steps, world
        self.step, self.stopping, self.broken = 0, False, 0
        if world.first:
            same_settings(folder, asdict(settings) | {"steps": steps},
                          free=("save_every", "micro_batch", "save_memory", "transcript_every"))
        checkpoints = self.checkpoints()
        self.step = int(checkpoints[-1].name[5:]) if checkpoints else 0
        if world.first:                                      # steps after the checkpoint are taken again: log them once
            file = folder / "metrics.jsonl"
            kept = [line for line in whole_lines(file)[0] if line["step"] <= self.step]
            write_rows(file, kept)
            self.metrics = Journal(file)
        world.wait()

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def checkpoints(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-??????") if (p / "state.json").is_file())

    def log(self, metrics: dict) -> None:
        """Writes a step's line. Raises ValueError, on all ranks alike, when the gradients of several steps in a row
        were not finite: their updates were left out, and more of them would change nothing."""
        if self.world.first:
            short = lambda v: v if not isinstance(v, float) else float(f"{v:.6g}") if math.isfinite(v) else None
            self.metrics.add({k: short(v) for k, v in metrics.items()})
        self.broken = self.broken + 1 if metrics["grad_norm"] is None else 0
        if self.broken == MOST_BROKEN:
            stands = self.checkpoints()[-1:] or ["none"]
            raise ValueError(f"the gradients of {MOST_BROKEN} steps in a row were NaN or infinite, up to step "
                             f"{metrics['step']}. The newest checkpoint is {stands[0]}; a lower --lr or --clip-norm "
                             f"may help, in another --out")

    def save(self, model: Qwen2_5_VL, optimizer: torch.optim.Optimizer, source: Path, step: int, **state) -> Path:
        """Writes checkpoint `step` and removes the ones before it. `source`, the folder that the run started from,
        gives configuration and tokenizer files."""
        weights = get_model_state_dict(model, options=WHOLE)
        moments = get_optimizer_state_dict(model, optimizer, options=WHOLE)

        def beside(folder: Path) -> None:
            save_file({f"{name} {kind}": x.contiguous() for name, kinds in moments["state"].items()
                       for kind, x in kinds.items()}, folder / "optimizer.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": step} | state, indent=2) + "\n")

        target, old = self.folder / f"step-{step:06d}", self.checkpoints()
        if self.world.first:
            save_model(weights, target, source, beside)
            for folder in old:
                if folder != target:
                    shutil.rmtree(folder)
        self.world.wait()                                    # no rank looks for, or outlives, a half-written checkpoint
        self.step = step
        return target

    def restore(self, model: Qwen2_5_VL, optimizer: torch.optim.Optimizer) -> dict:
        """Loads the optimizer's moments from the newest checkpoint; the model was built from it. Returns state.json."""
        newest = self.checkpoints()[-1]
        moments = get_optimizer_state_dict(model, optimizer, options=WHOLE)    # its form, filled with zeros
        if self.world.first:
            for key, x in load_file(newest / "optimizer.safetensors").items():
                name, kind = key.split(" ")
                moments["state"][name][kind] = x
        spread = replace(WHOLE, broadcast_from_rank0=self.world.size > 1)
        set_optimizer_state_dict(model, optimizer, moments, options=spread)
        return json.loads((newest / "state.json").read_text())

    @contextmanager
    def stoppable(self):
        """Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; a second one ends it at once."""
        def ask(number, frame):
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            self.world.say("\nStopping after this step, with a checkpoint (once more: at once, without) …")
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def need_files(settings: TrainSettings) -> TrainSettings:
    """Resolves --data where it is a pattern. SystemExit with the commands that fetch whatever is not there."""
    model, lacking = Path(settings.model), []
    found = [settings.data] if Path(settings.data).is_file() else sorted(glob.glob(settings.data))
    if not settings.model or not (model / "config.json").is_file() and not list(model.glob("step-??????")):
        lacking.append((f"model {settings.model!r}: no config.json and no checkpoint",
                        f"torchrun --nproc_per_node=8 sft.py --preset {model.parent.name}" if model.name == "sft" else
                        f"hf download Qwen/{model.name} --local-dir {model}" if "Qwen2.5-VL" in model.name else
                        "name a checkpoint folder with --model"))
    if len(found) != 1:
        lacking.append((f"records {settings.data}: " + (", ".join(found) or "no such file"),
                        "name one of them with --data" if found else
                        "hf download 1171-jpg/videop2r --repo-type dataset --local-dir data/videop2r"))
    if not settings.media or not Path(settings.media).is_dir():
        lacking.append((f"media {settings.media!r}: no such folder",
                        "hf download Video-R1/Video-R1-data --repo-type dataset --local-dir data/Video-R1-data"
                        "    # 310 GB; unzip the archives in place, a part of them is fine"))
    if lacking:
        raise SystemExit("Not there yet:\n" + "\n".join(f"  {what}\n    {how}" for what, how in lacking) +
                         "\nOther places: --model, --data, --media. `pip install huggingface_hub` brings hf.")
    return replace(settings, data=found[0])


def micro_batches(examples: Sequence[Example], size: int, world: World, model: Qwen2_5_VL, vocabulary: Vocabulary
                  ) -> Iterator[tuple[list[Example], float]]:
    """Cuts a rank's examples into micro-batches, as many on every rank: one that has too few joins the exchange of
    weights and gradients with a blank example of weight 0. Yields (examples, weight)."""
    for i in range(int(world.most(-(-len(examples) // size)))):
        part = examples[i * size:(i + 1) * size]
        yield (list(part), 1.0) if part else ([blank_example(vocabulary, model.config)], 0.0)


def prepare_toy(settings: TrainSettings, world: World) -> dict[str, str]:
    """Makes the toy world, its traces and a random tiny model in the run's folder. Returns the settings that point
    there."""
    out = Path(settings.out)
    if world.first:
        make_toy(out / "toy")
        if not (out / "cot" / "traces.jsonl").is_file():
            cot(CotSettings(**TOY_INPUT, out=str(out / "cot"), data=str(out / "toy" / "sft.json")))
        if not (out / "base" / "config.json").is_file():
            make_toy_model(out / "base", settings.seed)
    world.wait()
    return dict(model=settings.model or str(out / "base"), media=str(out / "toy"),
                heldout=str(out / "toy" / "heldout.json"))


# ------------------------------------------------------------------------------------------------ SFT

@dataclass(frozen=True)
class Settings(TrainSettings):
    model: str = flag("", "checkpoint folder to start from (toy: a random tiny model, made when missing)")
    steps: int = flag(0, "optimizer steps; 0: as many as --epochs makes")
    batch: int = flag(16, "traces in one optimizer step, over all ranks")
    epochs: float = flag(1.0, "passes over the records, if --steps does not say how long")
    blind: float = flag(0.0, "share of traces learned without their media: the observation is given, think and answer "
                        "follow; a model that never read text alone needs some to serve as --judge reference")
    heldout_count: int = flag(256, "without --heldout: so many records of --data are held out, a tenth at most")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, batch=1, micro_batch=1, save_every=1, steps=0)


PRESETS = {
    "tiny": TINY | dict(batch=32, micro_batch=32, steps=240, lr=2e-3, warmup=30, blind=0.15),
    "3b": dict(model=QWEN.format("3B"), data="data/videop2r/*CoT*.json*", media="data/Video-R1-data"),
    "7b": dict(model=QWEN.format("7B"), data="data/videop2r/*CoT*.json*", media="data/Video-R1-data"),
}


def trace_tokens(examples: Sequence[Example], vocabulary: Vocabulary, template: str) -> tuple[Tensor, Tensor]:
    """The traces as responses in groups of one, each with its stop token: tokens (B, 1, T), lengths (B, 1)."""
    traces = [torch.tensor(vocabulary.encode(trace_text(e.record, template)) + vocabulary.stop_ids[:1])
              for e in examples]
    lengths = torch.tensor([[len(t)] for t in traces])
    return torch.nn.utils.rnn.pad_sequence(traces, batch_first=True)[:, None], lengths


def sft_loss(model: Qwen2_5_VL, examples: Sequence[Example], vocabulary: Vocabulary, template: str, device
             ) -> tuple[Tensor, int]:
    """Sum of the cross-entropy over response tokens, and their number. Prompt, video and padding are never scored."""
    tokens, lengths = trace_tokens(examples, vocabulary, template)
    logprobs, _ = model.logprobs(collate(examples).to(device), tokens.to(device), lengths.to(device))   # (B, 1, T)
    return -logprobs.sum(), int(lengths.sum())


@torch.no_grad()
def heldout_loss(model: Qwen2_5_VL, examples: Examples, settings: Settings, world: World) -> float:
    """Mean cross-entropy of a response token over the held-out records."""
    total, count = 0.0, 0
    steps = [range(i, min(i + settings.batch, len(examples))) for i in range(0, len(examples), settings.batch)]
    for batch in examples.ahead([step[world.rank::world.size] for step in steps]):
        for part, weight in micro_batches(batch, settings.micro_batch, world, model, examples.vocabulary):
            loss, tokens = sft_loss(model, part, examples.vocabulary, settings.template, world.device)
            total, count = total + weight * float(loss), count + int(weight) * tokens
    sums = world.sum({"loss": total, "tokens": count})
    return sums["loss"] / max(1, sums["tokens"])


def one_step(model: Qwen2_5_VL, batch: list[Example], optimizer, lr: float, vocabulary: Vocabulary, settings: Settings,
             world: World) -> dict[str, float]:
    """Loss, gradients and update for one batch, over micro-batches and ranks with one denominator: all response tokens
    of the step."""
    count = int(sum(trace_tokens([e], vocabulary, settings.template)[1].item() for e in batch))
    count, loss = world.sum({"tokens": count})["tokens"], 0.0
    for part, weight in micro_batches(batch, settings.micro_batch, world, model, vocabulary):
        summed, _ = sft_loss(model, part, vocabulary, settings.template, world.device)
        (summed * weight * world.size / max(1, count)).backward()             # FSDP averages over ranks: undo that
        loss += weight * float(summed.detach())
    norm = update(model, optimizer, lr, settings.clip_norm)
    return {"loss": world.sum({"loss": loss})["loss"] / max(1, count), **norms([norm]), "tokens": int(count)}


def train(settings: Settings, world: World) -> Path:
    """Runs or continues SFT. Returns the folder of the finished checkpoint; SystemExit where it cannot finish."""
    folder = Path(settings.out) / "sft"
    if not settings.data:
        settings = replace(settings, data=f"{settings.out}/cot/traces.jsonl", **prepare_toy(settings, world))
    settings = need_files(settings)
    records = read_records(settings.data, traces=True)
    if settings.heldout:
        heldout = read_records(settings.heldout, traces=True)
    else:
        random.Random(0).shuffle(records)
        count = min(settings.heldout_count, len(records) // 10)
        records, heldout = records[count:], records[:count]
    chance = random.Random(settings.seed)
    records = [replace(r, blind=True, given=r.observation) if chance.random() < settings.blind else r for r in records]
    steps = settings.steps or max(1, int(settings.epochs * len(records)) // settings.batch)
    run = Run(folder, settings, steps, world)
    report = folder / "results.json"
    if run.finished:
        losses = json.loads(report.read_text()) if report.is_file() else {}
        shown = "".join(f"  {name} {loss:.3f}" for name, loss in losses.items())
        world.say(f"SFT is finished: {newest_checkpoint(folder)}{shown}")
        return newest_checkpoint(folder)

    start = newest_checkpoint(settings.model)
    source = newest_checkpoint(folder) if run.step else start
    vocabulary = Vocabulary(start)
    model = build_model(source, vocabulary, world, settings.save_memory)
    optimizer = make_optimizer(model, settings)
    examples, held = (Examples(some, settings.media, vocabulary, model.config, settings, folder / "skipped.log")
                      for some in (records, heldout))
    if run.step:
        before = run.restore(model, optimizer)["heldout_before"]
        world.say(f"SFT continues after step {run.step}")
    else:
        before = heldout_loss(model, held, settings, world)
    todo = range(run.step, steps)
    mine = (step_indices(len(records), settings.batch, s, settings.seed)[world.rank::world.size] for s in todo)
    with run.stoppable(), tqdm(total=steps, initial=run.step, desc="SFT", unit="step", disable=not world.first) as bar:
        for step, batch in zip(todo, examples.ahead(mine)):
            began, lr = time.perf_counter(), learning_rate(step, steps, settings)
            metrics = one_step(model, batch, optimizer, lr, vocabulary, settings, world)
            seconds = time.perf_counter() - began
            run.log({"step": step + 1, **metrics, "lr": lr, "tokens_per_second": metrics["tokens"] / seconds,
                     "seconds": seconds, "skipped": int(world.sum({"skipped": len(examples.skipped)})["skipped"]),
                     "peak_memory_gb": world.most(peak_memory_gb(world))})
            bar.update()
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}")
            stop = world.most(run.stopping)
            if stop or step + 1 == steps or (step + 1) % settings.save_every == 0:
                run.save(model, optimizer, start, step + 1, heldout_before=before)
            if stop:
                raise SystemExit(f"SFT stopped after step {step + 1} of {steps}; the same command continues it.")
    after = heldout_loss(model, held, settings, world)
    if world.first:
        report.write_text(json.dumps({"heldout_loss_before": before, "heldout_loss_after": after}) + "\n")
    world.say(f"SFT: held-out loss {before:.3f} → {after:.3f} over {len(heldout)} records; "
              f"{len(examples.skipped)} records skipped. Checkpoint: {newest_checkpoint(folder)}")
    return newest_checkpoint(folder)


def launch(train, settings_class, presets: dict[str, dict], argv: Sequence[str] | None, description: str) -> None:
    """What `python sft.py` and `python pagrpo.py` do: flags, ranks, one line about the preset, and the run. Errors that
    a user can mend end in their message, not in a traceback."""
    settings, preset, reason = parse_flags(settings_class, presets, argv, description)
    world = start_world()
    world.say(f"Preset {preset} ({reason}); others: " + ", ".join(f"--preset {p}" for p in presets if p != preset))
    try:
        train(settings, world)
        world.leave()
    except (ValueError, OSError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        sys.exit(f"{type(error).__name__}: {error}  ({Path(place.filename).name}:{place.lineno})")
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command continues from the last checkpoint.")


def main(argv: Sequence[str] | None = None) -> None:
    launch(train, Settings, PRESETS, argv, __doc__)


if __name__ == "__main__":
    main()
