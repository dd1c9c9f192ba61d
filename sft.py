"""Stage 1, supervised fine-tuning: the model learns to write observation, think and answer (paper, stage 1).

    python sft.py                                        the toy world on any machine: runs/tiny/sft
    torchrun --nproc_per_node=8 sft.py --preset 7b       VideoP2R-CoT-162K on eight GPUs: runs/7b/sft

The loss is the cross-entropy of the response tokens: prompt and video carry none. It is the same `logprobs` that
PA-GRPO scores with, for a group of one. An unfinished run in the output folder is continued, a finished one is shown.

What both training scripts share stands here, in the first one that needs it: settings and presets, ranks and sharding,
the optimizer and its schedule, the metrics log, checkpoints. Then comes SFT itself, in a page.
"""
import argparse
import errno
import faulthandler
import glob
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import uuid
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Callable, Iterator, Sequence

# Before torch: model.py checks the versions of Python and torch.
from model import (CONFIGS, SHARD_BYTES, STEPS, SUMS, Config, Qwen2_5_VL, exchange, load_model,
                   load_weights, newest_checkpoint, read_config, save_model, tensor_files, write_tensors)
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from tqdm import tqdm

from data import (TOY_INPUT, CotSettings, Example, Examples, InputSettings, Vocabulary, add_flags, check_minimum,
                  lock_folder, blank_example, collate, cot, flag, given_flags, make_toy, make_toy_model, read_records,
                  refuse_changes, default_settings, format_table, check_settings, step_indices, trace_text, write_atomically)
from rewards import Journal, read_jsonl


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
    keep: int = flag(2, "newest checkpoints that stay on disk; with --eval-every the best one stays as well")
    eval_every: int = flag(0, "steps between held-out evaluations on the way, each with a checkpoint; 0: none")
    resume: bool = flag(True, "continue what the folder holds from its newest whole checkpoint (after a restart by "
                        "torchrun always); --no-resume refuses a folder in use")
    shards: int = flag(0, "ranks that share a copy of the weights; further ranks hold replicas; 0: those of a machine")
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


# What may change when a run is continued: it decides where and how fast the numbers are computed, not which.
RESUMABLE = ("save_every", "micro_batch", "save_memory", "transcript_every", "keep", "eval_every", "resume", "shards",
              "patience", "dry_run", "offload_reference")
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
    slow_group: dist.ProcessGroup | None = None                   # for waits in which one rank works alone
    local: int = 1                                           # ranks on this machine
    store: dist.Store | None = None                          # torchrun's own: it outlives a rank
    minutes: float = 6.0                                     # of waiting for each other within a step

    @property
    def first(self) -> bool:
        return self.rank == 0

    def print0(self, *words, sep: str = " ") -> None:
        if self.first:
            print(*words, sep=sep, flush=True)

    def all_reduce_sum(self, values: dict[str, float]) -> dict[str, float]:
        """Adds up the same keys over all ranks."""
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return dict(zip(values, total.tolist()))

    def barrier(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.slow_group)

    def all_reduce_max(self, value: float) -> float:
        """The largest value of any rank."""
        most = torch.tensor(float(value), device=self.device)
        if self.size > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)

    def on_rank0(self, work: Callable):
        """Does work on the first rank, while the others wait. Its result, or its error, is everybody's."""
        result = error = None
        if self.first:
            try:
                result = work()
            except (Exception, SystemExit) as e:
                error = e
        if self.size > 1:
            box = [result, error]
            dist.broadcast_object_list(box, group=self.slow_group)
            result, error = box
        if error is not None:
            raise error
        return result

    @lru_cache
    def mesh(self, shards: int):
        """The ranks as a grid (replicas, shards): weights are parted along a row and equal in a column. By default a
        row is a machine, so that weights travel inside it and only gradients between machines."""
        shards = shards or self.local
        if self.size % shards:
            raise SystemExit(f"--shards {shards}: the {self.size} ranks are no multiple of it")
        if shards == self.size:
            return init_device_mesh(self.device.type, (shards,))
        grid = init_device_mesh(self.device.type, (self.size // shards, shards), mesh_dim_names=("replicas", "shards"))
        for group in grid.get_all_groups():                  # new groups would wait for half an hour
            dist.distributed_c10d._set_pg_timeout(timedelta(minutes=self.minutes), group)
        return grid

    def leave(self) -> None:
        """Ends a program that went well, when all ranks arrive. Several ranks skip Python's own shutdown: a thread of
        gloo may still hold a tensor then, and would abort (on busy machines)."""
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def fail(self, message: str, where: str = "", alike: bool = True) -> None:
        """Ends a rank after an error. What several ranks say `alike` is said once; one that only lost the others says
        so if none of them has said why."""
        if self.size == 1:
            sys.exit(f"{message}{where}")
        if message == LOST:
            time.sleep(1)
        try:
            said = self.store.add(f"said {message if alike else self.rank}", 1) > 1
            reason = self.store.add("reason", int(alike and message != LOST and not said))
        except RuntimeError:                                 # the store is gone, and torchrun with it
            said = reason = False
        if not said and not (message == LOST and reason):
            print(f"Rank {self.rank}: {message}{where}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        for thread in threading.enumerate():                 # a checkpoint under way, if torchrun gives it the time
            if thread.name == WRITER:
                thread.join()
        os._exit(1)


WRITER = "checkpoint"
LOST = "lost the connection to another rank, which has ended."


def meeting(rank: int, size: int, patience: timedelta) -> dist.Store:
    """A store that only the ranks of this start share. torchrun's own lives on when it restarts them, and still holds
    the addresses of those that are gone: whoever read these would wait for the dead. So the first rank gives this start
    a name, the others greet it under that name, and only who lives can answer."""
    store, me = next(dist.rendezvous("env://"))[0], uuid.uuid4().hex
    end = time.monotonic() + patience.total_seconds()

    def asked(key: str) -> str | None:
        """In small steps: a wait inside the store would not hear Ctrl-C."""
        if time.monotonic() > end:
            raise dist.DistStoreError(f"waited {patience} for {key} in vain")
        time.sleep(0.05)
        return store.get(key).decode() if store.check([key]) else None

    if rank == 0:
        store.set("start", me)
        for other in range(1, size):
            while not (greeting := asked(f"{me} {other}")):
                pass
            store.set(f"welcome {greeting}", me)
        return dist.PrefixStore(me, store)
    while not (name := asked(f"welcome {me}")):
        if start := asked("start"):                          # perhaps from before a restart, and nobody is there
            store.set(f"{start} {rank}", me)
    return dist.PrefixStore(name, store)


def start_world(minutes: float = 6.0, patience: timedelta = timedelta(hours=1)) -> World:
    """Reads torchrun's environment and joins the ranks. Without torchrun: one rank. Ranks wait `minutes` for each other
    within a step, and `patience` where one of them works alone (`World.on_rank0`, `World.barrier`). A rank that dies is
    noticed at once in both, since its connections close."""
    rank, size, local, place = (int(os.environ.get(k, d)) for k, d in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if local > 1:  # threads of several ranks on the same cores spin against each other: ten times slower than one rank
        torch.set_num_threads(max(1, cores // local))
    cuda, store = torch.cuda.is_available(), None
    device = torch.device("cuda", place) if cuda else torch.device("cpu")
    if size > 1:
        faulthandler.enable()                                # NCCL aborts who waited too long: show where that was
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized() and (size > 1 or cuda):
        store = dist.HashStore() if size == 1 else meeting(rank, size, timedelta(minutes=minutes))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
                                timeout=timedelta(minutes=minutes))
    slow_group = dist.new_group(backend="gloo", timeout=patience) if size > 1 else None
    return World(rank, size, device, slow_group, local, store, minutes)


def shard(model: Qwen2_5_VL, world: World, shards: int = 0, offload: bool = False) -> Qwen2_5_VL:
    """FSDP2: every rank keeps its part of each weight in fp32; a block's weights are gathered (in bf16 on CUDA) when it
    runs. Each block is a group, the rest of the vision tower another, the root holds embedding, last norm and head.
    `offload` keeps the parts in host memory, for a model that does not learn."""
    how, cuda = dict(mesh=world.mesh(shards)), world.device.type == "cuda"
    if cuda:                                                 # rotary tables stay fp32: inputs are not cast
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=cuda)
    for block in (*model.visual.blocks, *model.model.layers, model.visual):
        fully_shard(block, **how)
    fully_shard(model, **how)
    for entry in ("generate", "logprobs"):                   # ways into the model other than forward
        register_fsdp_forward_method(model, entry)
    model.sharded = True
    return model


def build_model(folder: str | Path, vocabulary: Vocabulary, world: World, save_memory: bool = False, shards: int = 0,
                frozen: bool = False, offload: bool = False) -> Qwen2_5_VL:
    """Loads a checkpoint, sharded where there are several ranks or a GPU: built without memory, read by the first rank
    alone, sent in parts. A frozen model on a GPU is kept in bf16, in which it computes anyway, `offload`ed or not."""
    if world.size == 1 and world.device.type == "cpu":
        model = load_model(folder)
    else:
        dtype = torch.bfloat16 if frozen and world.device.type == "cuda" else torch.float32
        with torch.device("meta"):
            model = shard(Qwen2_5_VL(read_config(folder)).to(dtype), world, shards, offload)
        wanted = {name: p.shape for name, p in model.named_parameters()}
        model.to_empty(device="cpu" if offload else world.device)
        tensors = load_weights(folder, wanted, dtype) if world.first else {}
        world.barrier()                                         # a large model takes minutes to read
        set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        model.set_reshard_after_forward(frozen, recurse=False)               # the root, too, where no backward follows
    model.save_memory = save_memory
    return vocabulary.mask_special_tokens(model.requires_grad_(not frozen))


@contextmanager
def gathered(model: Qwen2_5_VL):
    """`with gathered(model):` holds all weights whole, so that sampling needs no exchange for each token, and ranks may
    sample different numbers of tokens."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    learns = any(p.requires_grad for p in model.parameters())                 # … whole until its backward
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model or not learns, recurse=False)    # a root that learns stays
            part.reshard()


# ------------------------------------------------------------------------------------------------ memory

def memory(config: Config, s: TrainSettings, ranks: int, cuda: bool = True) -> dict[str, float]:
    """Bytes that one step takes on each rank, by part, and their peak. Nothing is allocated to find out.

    Weights, gradients and AdamW's two moments are fp32 and parted among the ranks. What is gathered or computed has `c`
    bytes a number: 2 on CUDA, where one process is sharded too, 4 on a CPU. A rank first samples for all its questions
    at once, then learns from one micro-batch after the other: the largest moment of these counts.
    """
    with torch.device("meta"):                               # counted, not remembered: no shape has a second home
        model = Qwen2_5_VL(config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    whole, layer, layers = count(model), count(model.model.layers[0]), config.num_hidden_layers
    root = whole - count(model.visual) - layers * layer      # embedding, last norm, head
    c, shards, v = 2 if cuda else 4, s.shards or min(ranks, MACHINE), config.vision
    sharded = cuda or ranks > 1
    group, response = getattr(s, "group_size", 1), getattr(s, "max_response", TRACE_TOKENS)
    questions = -(-getattr(s, "questions", s.micro_batch * ranks) // ranks)
    media = s.frames // 2 * s.max_pixels // 28 ** 2
    prompt = min(s.max_prompt, media + (400 if s.prompt == "full" else 40))
    d, f, e = config.hidden_size, config.intermediate_size, config.head_dim
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    pixels = questions * 4 * media * 1176 * 4                # four patches a token, three colours, two frames, fp32

    # Sampling: the whole model gathered, the cache, and the widest moment of prefill or of choosing a token.
    cache = 2 * layers * keys * e * c * questions * (prompt + group * response)
    cache += max(questions * prompt * (3 * f + 4 * d) * c,                    # a layer's gate, up and their product
                 questions * 4 * media * v.hidden_size * (8 * c + 16),        # the tower turns queries and keys in fp32
                 questions * group * config.vocab_size * 24)                  # logits, probabilities and sums in fp64

    # Learning: what a block remembers of a token, where checkpointing keeps only its input, …
    micro = min(s.micro_batch, questions)
    asked, written, patches = micro * prompt, micro * group * response, 4 * micro * media
    token = 2 * (4 + 2 * c) * d + 3 * c * heads * e + 4 * c * f               # two norms, q and its result, the MLP
    spread = 2 * c * (heads if cuda else keys) * e * (prompt + response) * micro * group   # K, V a response sees
    patch = (2 * (4 + 2 * c) + 5 * c) * v.hidden_size + 4 * c * v.intermediate_size
    reading, writing = asked * token, written * token + spread
    kept = c * d * asked + 2 * c * keys * e * asked, c * d * written          # a layer's inputs, the prompt's K and V
    tower = v.depth * patches * (c * v.hidden_size if s.save_memory else patch)
    past, own = (layers * kept[0], layers * kept[1]) if s.save_memory else (layers * reading, layers * writing)
    block = lambda tokens, remembered: remembered * s.save_memory + 3 * c * f * tokens      # recomputed, and backward
    logits = min(2 ** 25, written * config.vocab_size) * (12 + c)
    # … and weights: two blocks gathered, a third on its way, the gradients of one; the root's own are sent at the end.
    gathered = c * (root + 3 * layer) * sharded
    sent = (4 + c) * sharded
    # A weight serves prompt and responses. Its gradients from the responses wait, whole, for those from the prompt.
    waiting = c * layers * layer
    gradients = 4 * whole / shards
    earlier = gradients if micro < questions else 0          # of the micro-batches before
    learning = pixels + gathered + max(
        earlier + tower + past + own + max(logits, block(written, writing)) + c * root * sharded,
        earlier + tower + past + waiting + block(asked, reading) + sent * layer,
        gradients + tower + patches * patch * s.save_memory + sent * root)
    reference = c * whole / shards * (needs_reference(s) and not getattr(s, "offload_reference", False))
    sampling, cache = (pixels + c * whole * sharded + cache, cache) if hasattr(s, "group_size") else (0, 0)
    standing = {"weights": 4 * whole / shards, "moments": 8 * whole / shards, "reference": reference}
    return standing | {"cache": cache, "sampling": sampling, "gradients": gradients, "activations": tower + past + own,
                       "learning": learning, "peak": sum(standing.values()) + max(sampling, learning)}


MACHINE = 8                                                  # GPUs in a usual machine
TRACE_TOKENS = 768                                           # of a long SFT trace
GB = 2 ** 30


def needs_reference(s: TrainSettings) -> bool:
    """RL keeps the SFT model in memory where the KL term or the judge asks for it."""
    return bool(getattr(s, "kl_beta", 0)) or getattr(s, "judge", "") == "reference"


def plan(config: Config, s: TrainSettings, name: str, cuda: bool = True) -> str:
    """What `--dry-run` prints: the parts of a step's memory by number of ranks, and the peak for other lengths."""
    cell = lambda x: f"{x / GB:.{1 if cuda else 3}f}"
    parts = {ranks: memory(config, s, ranks, cuda) for ranks in (1, 2, 4, 8, 16)}
    rows = [["ranks", *parts[1]]] + [[str(ranks), *map(cell, row.values())] for ranks, row in parts.items()]
    if not hasattr(s, "max_response"):
        return "\n".join([f"{name}: GB on each rank with {s.frames} frames", *format_table(rows)])
    lengths = [(frames, tokens) for frames in (8, 16, 32) for tokens in (256, 768, 1536)] if cuda else []
    peak = lambda n, frames, tokens: memory(config, replace(s, frames=frames, max_response=tokens), n)["peak"]
    other = [["ranks", *(f"{frames}, {tokens}" for frames, tokens in lengths)]]
    other += [[str(ranks), *(cell(peak(ranks, *length)) for length in lengths)] for ranks in parts]
    return "\n".join([
        f"{name}: GB on each rank with {s.frames} frames and responses of {s.max_response} tokens, micro-batches of "
        f"{s.micro_batch}", *format_table(rows), 
        "Sampling: the gathered weights and the cache. Learning: gradients, activations, and what stands gathered. "
        "The peak is\nweights, moments, reference and the larger of the two.",
        *(["", "Peak with other frames, tokens of a response:", *format_table(other)] if cuda else [])])


def relief(config: Config, s: TrainSettings, ranks: int, cuda: bool) -> list[tuple[str, float]]:
    """Which flags would lower the peak, and by how many bytes, the best one first."""
    changes = {"--save-memory": dict(save_memory=True), "--micro-batch 1": dict(micro_batch=1),
               f"--frames {s.frames // 2}": dict(frames=max(2, s.frames // 2))}
    if hasattr(s, "max_response"):
        changes |= {f"--max-response {s.max_response // 2}": dict(max_response=max(1, s.max_response // 2)),
                    "--kl-beta 0": dict(kl_beta=0.0)}
        changes |= {"--offload-reference": dict(offload_reference=True)} if cuda else {}
    now = memory(config, s, ranks, cuda)["peak"]
    saved = {flag: now - memory(config, replace(s, **change), ranks, cuda)["peak"] for flag, change in changes.items()}
    saved[f"{2 * ranks} ranks"] = now - memory(config, s, 2 * ranks, cuda)["peak"] if cuda else 0.0
    return sorted(((flag, x) for flag, x in saved.items() if x > 0.01 * now), key=lambda pair: -pair[1])


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
    if any(p.grad is not None for p in model.parameters()):
        for p in model.parameters():                         # a step of text alone: sharded towers have zeros, not None
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
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
    """A stage's folder: settings.json, metrics.jsonl, skipped.log, and whole checkpoints step-NNNNNN.

    A checkpoint is a model folder in Hugging Face format with the optimizer's moments and state.json beside it.
    Learning rate, data order and random numbers are functions of seed and step (`learning_rate`, `step_indices`,
    `question_uniforms`): there is no scheduler, sampler or generator whose state could be lost.
    """

    def __init__(self, folder: Path, settings: TrainSettings, steps: int, per_step: int, world: World):
        """Finds out how far the folder's run has come. Raises SystemExit if it is a run with other settings."""
        self.folder, self.settings, self.steps, self.per_step, self.world = folder, settings, steps, per_step, world
        self.stopping, self.broken, self.writer, self.lost = False, 0, None, None
        self.newest = world.on_rank0(self.find)                  # the checkpoint that stands
        self.step = int(self.newest.name[5:]) if self.newest else 0

    @property
    def configuration(self) -> dict:
        return json.loads(json.dumps(asdict(self.settings) | {"steps": self.steps}))

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def find(self) -> Path | None:
        begun = any(self.folder.glob(STEPS)) or (self.folder / "metrics.jsonl").exists()
        if begun and not self.settings.resume and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            raise SystemExit(f"{self.folder} holds a run: leave out --no-resume to continue it, or take another --out")
        check_settings(self.folder, self.configuration, default_settings(self.settings), RESUMABLE)
        try:
            newest = newest_checkpoint(self.folder, optimizer=True)
        except FileNotFoundError:
            return None
        state = read_state(newest)
        if state["step"] != int(newest.name[5:]):
            raise SystemExit(f"{newest} holds step {state['step']}: it was renamed or copied there; take it away")
        refuse_changes(newest, state["settings"], self.configuration, default_settings(self.settings), RESUMABLE)
        return newest

    def whole(self) -> list[Path]:
        """The checkpoints on disk up to the last one taken or written."""
        return [p for p in sorted(self.folder.glob(STEPS)) if (p / SUMS).is_file() and int(p.name[5:]) <= self.step]

    def stands(self) -> str:
        return "".join(f"Checkpoint {p} stands; the same command continues from it." for p in self.whole()[-1:]) or \
            "There is no checkpoint yet; the same command begins anew."

    @contextmanager
    def guard(self):
        """Around the steps. Ctrl-C or SIGTERM ends the run at the next boundary of a step, with a checkpoint, a second
        one at once; whatever ends it, a checkpoint being written is finished, and the one that stands is named."""
        def ask(number, frame):
            if self.stopping and time.monotonic() > self.asked + 2:          # launchers repeat themselves
                raise KeyboardInterrupt
            if self.stopping:
                return
            self.stopping, self.asked = True, time.monotonic()
            if self.world.first:                             # print may be at work below this very handler
                os.write(1, f"\nStopping after this step, with a checkpoint (once more: at once). {self.stands()}\n"
                         .encode())
        after = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with lock_folder(self.folder) if self.world.first else nullcontext():
                if self.world.first:                         # steps after the checkpoint are taken again: log them once
                    for left in (*self.folder.glob("step-*.old"), *self.folder.glob("step-*.writing")):
                        shutil.rmtree(left)
                    file = self.folder / "metrics.jsonl"
                    rows = read_jsonl(file)[0]
                    if odd := [row for row in rows if not isinstance(row.get("step"), int)]:
                        raise ValueError(f"{file} has a line without a step, {str(odd[0])[:60]}: remove it")
                    rows = [row for row in rows if row["step"] <= self.step]
                    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
                    self.metrics = Journal(file)
                try:
                    yield
                finally:
                    if self.world.size == 1 and self.writer:
                        self.writer.join()                   # several ranks speak first: torchrun will not wait long
                self.wait_for_writer()
        except BaseException as error:
            error.stands = self.stands()
            if self.world.size > 1:                          # torchrun ends us already: there is something to say first
                after = dict.fromkeys(after, signal.SIG_IGN)
            raise
        finally:
            for number, handler in after.items():
                signal.signal(number, handler)

    def log(self, metrics: dict) -> None:
        """Writes a step's line. Raises ValueError, on all ranks alike, when the gradients of several steps in a row
        were not finite: their updates were left out, and more of them would change nothing."""
        if self.world.first:
            short = lambda v: v if not isinstance(v, float) else float(f"{v:.6g}") if math.isfinite(v) else None
            self.metrics.add({k: short(v) for k, v in metrics.items()})
        self.broken = self.broken + 1 if metrics["grad_norm"] is None else 0
        if self.broken == MOST_BROKEN:
            self.wait_for_writer()
            raise ValueError(f"the gradients of {MOST_BROKEN} steps in a row were NaN or infinite, up to step "
                             f"{metrics['step']}. A lower --lr or --clip-norm may help, in another --out.")

    def boundary(self, done: int, model: Qwen2_5_VL, optimizer: torch.optim.Optimizer, source: Path, **state) -> None:
        """Between two steps, when `done` of them are whole: saves if that is due, and ends the run (SystemExit) if a
        signal asked for it. `state` goes into state.json; its "score" says how good the checkpoint is."""
        asked = self.world.all_reduce_max(2 if self.lost else self.stopping)            # 1: to stop, 2: nothing can be written
        due = done == self.steps or "score" in state or done % self.settings.save_every == 0
        if done > self.step and (due or asked == 1):
            self.save(model, optimizer, source, done, **state)
        if asked:
            self.wait_for_writer()
            raise SystemExit(f"Stopped after step {done} of {self.steps}. {self.stands()}")

    def save(self, model: Qwen2_5_VL, optimizer: torch.optim.Optimizer, source: Path, step: int, **state) -> None:
        """Copies everything to the first rank's host memory; a thread writes it while training goes on. `source`, the
        folder that the run started from, gives configuration and tokenizer files, and is the KL reference of RL."""
        self.wait_for_writer()
        # Gathering copies from a GPU. On a CPU, and for AdamW's count of steps, it may give the living tensor itself.
        copy = lambda x: x.clone() if x.device == self.world.device or x.numel() == 1 else x
        weights = {k: copy(x) for k, x in get_model_state_dict(model, options=WHOLE).items()}
        # Without an update so far there are no moments, and asking for them would take a step to make some.
        moments = get_optimizer_state_dict(model, optimizer, options=WHOLE) if optimizer.state else {}
        moments = {f"{name} {kind}": copy(x) for name, kinds in moments.get("state", {}).items()
                   for kind, x in kinds.items()}
        state = {"step": step, "steps": self.steps, "records_taken": step * self.per_step, "source": str(source),
                 "next_learning_rate": learning_rate(step, self.steps, self.settings),
                 "settings": self.configuration} | state
        self.step, target = step, self.folder / f"step-{step:06d}"
        if self.world.first:
            self.writer = threading.Thread(name=WRITER, target=self.write,
                                           args=(weights, moments, state, target, source))
            self.writer.start()

    def write(self, weights: dict, moments: dict, state: dict, target: Path, source: Path) -> None:
        """A thread's work. Then all but the newest checkpoints and the best one may go."""
        def beside(folder: Path) -> None:
            write_tensors(moments, folder, "optimizer", SHARD_BYTES)
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        try:
            save_model(weights, target, source, beside)
            self.newest, whole = target, self.whole()        # what was refused as damaged is newer, and not among them
            for old in set(whole[:-self.settings.keep]) - {best_of(whole)}:
                exchange(old)
        except Exception as error:                           # whatever it is, nobody else would hear of it
            self.lost = f"Checkpoint {target} could not be written: {error}."

    def wait_for_writer(self) -> None:
        """Until the checkpoint under way is on disk. Raises OSError, on all ranks alike, if it could not be written."""
        if self.writer:
            self.writer.join()
        lost, self.newest = self.world.on_rank0(lambda: (self.lost, self.newest))
        if lost:
            raise OSError(lost)

    def restore(self, model: Qwen2_5_VL, optimizer: torch.optim.Optimizer) -> dict:
        """Loads the optimizer's moments from the checkpoint that stands (the model was built from it) and returns
        state.json."""
        files = sorted(set(tensor_files(self.newest, "optimizer").values()))
        if not files:
            return read_state(self.newest)
        moments = get_optimizer_state_dict(model, optimizer, options=WHOLE)    # its form, filled with zeros
        if self.world.first:
            for file in files:
                for key, x in load_file(file).items():
                    name, kind = key.split(" ")
                    moments["state"][name][kind] = x
        self.world.barrier()
        spread = replace(WHOLE, broadcast_from_rank0=self.world.size > 1)
        set_optimizer_state_dict(model, optimizer, moments, options=spread)
        return read_state(self.newest)


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def read_report(file: Path) -> dict | None:
    """The results of a finished run; None where there are none, or no whole ones."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def best_of(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the highest held-out score, the newest of equals; None where nothing was evaluated."""
    scores = []
    for folder in checkpoints:
        try:
            scores += [(read_state(folder)["score"], folder)]
        except (OSError, ValueError, KeyError):              # damaged, or not evaluated
            continue
    return max(scores, default=(0, None))[1]


def need_files(settings: TrainSettings) -> TrainSettings:
    """Resolves --data where it is a pattern. SystemExit with the commands that fetch whatever is not there."""
    model, lacking = Path(settings.model), []
    found = [settings.data] if Path(settings.data).is_file() else sorted(glob.glob(settings.data))
    if not settings.model or not (model / "config.json").is_file() and not list(model.glob(STEPS)):
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
    for i in range(int(world.all_reduce_max(-(-len(examples) // size)))):
        part = examples[i * size:(i + 1) * size]
        yield (list(part), 1.0) if part else ([blank_example(vocabulary, model.config)], 0.0)


def prepare_toy(settings: TrainSettings, world: World) -> dict[str, str]:
    """Makes the toy world, its traces and a random tiny model in the run's folder. Returns the settings that point
    there."""
    out = Path(settings.out)

    def make() -> None:
        make_toy(out / "toy")
        if not (out / "cot" / "traces.jsonl").is_file():
            cot(CotSettings(**TOY_INPUT, out=str(out / "cot"), data=str(out / "toy" / "sft.json")))
        if not (out / "base" / "config.json").is_file():
            make_toy_model(out / "base", settings.seed)
    world.on_rank0(make)
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
        check_minimum(self, batch=1, steps=0)


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
    for batch in examples.prefetch([step[world.rank::world.size] for step in steps]):
        for part, weight in micro_batches(batch, settings.micro_batch, world, model, examples.vocabulary):
            loss, tokens = sft_loss(model, part, examples.vocabulary, settings.template, world.device)
            total, count = total + weight * float(loss), count + int(weight) * tokens
    sums = world.all_reduce_sum({"loss": total, "tokens": count})
    return sums["loss"] / max(1, sums["tokens"])


def one_step(model: Qwen2_5_VL, batch: list[Example], optimizer, lr: float, vocabulary: Vocabulary, settings: Settings,
             world: World) -> dict[str, float]:
    """Loss, gradients and update for one batch, over micro-batches and ranks with one denominator: all response tokens
    of the step."""
    count = int(sum(trace_tokens([e], vocabulary, settings.template)[1].item() for e in batch))
    count, loss = world.all_reduce_sum({"tokens": count})["tokens"], 0.0
    for part, weight in micro_batches(batch, settings.micro_batch, world, model, vocabulary):
        summed, _ = sft_loss(model, part, vocabulary, settings.template, world.device)
        (summed * weight * world.size / max(1, count)).backward()             # FSDP averages over ranks: undo that
        loss += weight * float(summed.detach())
    norm = update(model, optimizer, lr, settings.clip_norm)
    return {"loss": world.all_reduce_sum({"loss": loss})["loss"] / max(1, count), **norms([norm]), "tokens": int(count)}


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
    records = [replace(r, blind=True, given=r.trace["observation"]) if chance.random() < settings.blind else r for r in records]
    steps = settings.steps or max(1, int(settings.epochs * len(records)) // settings.batch)
    run = Run(folder, settings, steps, settings.batch, world)
    report = folder / "results.json"
    if run.finished:
        losses = read_report(report) or {}
        shown = "".join(f"  {name} {loss:.3f}" for name, loss in losses.items())
        world.print0(f"SFT is finished: {run.newest}{shown}")
        return run.newest

    start = world.on_rank0(lambda: newest_checkpoint(settings.model))
    vocabulary = Vocabulary(start)
    model = build_model(run.newest or start, vocabulary, world, settings.save_memory, settings.shards)
    optimizer = make_optimizer(model, settings)
    examples, held = (Examples(some, settings.media, vocabulary, model.config, settings, folder / "skipped.log")
                      for some in (records, heldout))
    if run.step:
        before = run.restore(model, optimizer)["heldout_before"]
        world.print0(f"SFT continues after step {run.step}")
    else:
        before = heldout_loss(model, held, settings, world)
    todo = range(run.step, steps)
    mine = (step_indices(len(records), settings.batch, s, settings.seed)[world.rank::world.size] for s in todo)
    with run.guard(), tqdm(total=steps, initial=run.step, desc="SFT", unit="step", disable=not world.first) as bar:
        for step, batch in zip(todo, examples.prefetch(mine)):
            began, lr = time.perf_counter(), learning_rate(step, steps, settings)
            metrics = one_step(model, batch, optimizer, lr, vocabulary, settings, world)
            seconds = time.perf_counter() - began
            taken = world.all_reduce_sum({"records": len(batch)})["records"]
            held_out = {}
            if settings.eval_every and (step + 1) % settings.eval_every == 0:
                held_out = {"heldout_loss": heldout_loss(model, held, settings, world)}
            run.log({"step": step + 1, **metrics, "lr": lr, "tokens_per_second": metrics["tokens"] / seconds,
                     "seconds": seconds, "skipped": settings.batch - int(taken),
                     "peak_memory_gb": world.all_reduce_max(peak_memory_gb(world)), **held_out})
            bar.update()
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}")
            score = {"score": -loss for loss in held_out.values()}            # a score is better if it is higher
            run.boundary(step + 1, model, optimizer, start, heldout_before=before, **score)
    after = heldout_loss(model, held, settings, world)
    if world.first:
        write_atomically(report, json.dumps({"heldout_loss_before": before, "heldout_loss_after": after}) + "\n")
    world.print0(f"SFT: held-out loss {before:.3f} → {after:.3f} over {len(heldout)} records; "
              f"{len(examples.skipped)} records skipped. Checkpoint: {run.newest}")
    return run.newest


# ------------------------------------------------------------------------------------------------ from flags to an end

def project_frames(error: BaseException) -> list[str]:
    """Where an error came through our own files, the innermost last: "pagrpo.py:319 in train_on"."""
    here = Path(__file__).parent
    return [f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in traceback.extract_tb(error.__traceback__)
            if Path(f.filename).parent == here]


def shape_of(settings: TrainSettings, preset: str = "tiny") -> Config:
    """The network that a run is about, even before its checkpoint is there."""
    for folder in (Path(settings.model), *sorted(Path(settings.model).glob(STEPS), reverse=True)):
        if settings.model and (folder / "config.json").is_file():
            return read_config(folder)
    return CONFIGS[preset]


def advice(settings: TrainSettings, world: World) -> str:
    saved = relief(shape_of(settings), settings, world.size, world.device.type == "cuda")
    return "What would help: " + ", ".join(f"{flag} ({x / GB:.2g} GB less)" for flag, x in saved) + ". See --dry-run."


def explain(error: BaseException, settings: TrainSettings, world: World) -> str | None:
    """A fault that a user meets in a sentence that helps; None for one that only a traceback explains."""
    text = str(error)
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return text if isinstance(error, SystemExit) else "Interrupted."
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text or (
            isinstance(error, RuntimeError) and "out of memory" in text):
        return f"Out of memory after {peak_memory_gb(world):.1f} GB. {advice(settings, world)}"
    if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in text or "closure" in text):
        if "imed out" in text or "timeout" in text:
            return f"waited {settings.patience:g} minutes for the other ranks (--patience)."
        gone = ("closed", "reset by peer", "Broken pipe", "remote process")
        return LOST if any(word in text for word in gone) else f"{type(error).__name__}: {text.splitlines()[0]}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {text}."
    return f"{type(error).__name__}: {text}" if isinstance(error, (ValueError, OSError)) else None


def launch(train, settings_class, presets: dict[str, dict], argv: Sequence[str] | None, description: str) -> None:
    """What `python sft.py` and `python pagrpo.py` do: flags, ranks, one line about the preset, and the run. Errors that
    a user can mend end in their message, not in a traceback."""
    settings, preset, reason = parse_flags(settings_class, presets, argv, description)
    if settings.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            try:
                print(plan(shape_of(settings, preset), settings, f"Preset {preset} ({reason})", preset != "tiny"))
            except ValueError as error:
                sys.exit(str(error))
        return
    try:
        world = start_world(settings.patience)
    except RuntimeError as error:
        sys.exit(f"Rank {os.environ.get('RANK', 0)} could not join the others: {str(error).splitlines()[0]}")
    world.print0(f"Preset {preset} ({reason}); others: " + ", ".join(f"--preset {p}" for p in presets if p != preset))
    try:
        train(settings, world)
        world.leave()
    except BaseException as error:
        message, frames = explain(error, settings, world), project_frames(error)
        if message is None:                                  # a fault of ours, perhaps: all of it, please
            if world.size == 1:
                print(getattr(error, "stands", ""), file=sys.stderr, flush=True)
                raise
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"
        where = f"  (at {', from '.join(frames[:-3:-1])})" if frames and not isinstance(error, SystemExit) else ""
        stands = "" if isinstance(error, SystemExit) else getattr(error, "stands", "")
        if message == LOST or message.startswith("waited "):
            world.fail(message, f" {stands}{where}", alike=message == LOST)
        world.fail(f"{message} {stands}".strip(), where)


def main(argv: Sequence[str] | None = None) -> None:
    launch(train, Settings, PRESETS, argv, __doc__)


if __name__ == "__main__":
    main()
