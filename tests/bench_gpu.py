"""The rows of `python tests/bench.py gpu`, on one card: correctness, decoding, training, memory and whole steps at the
shapes of Qwen2.5-VL-3B and 7B with random weights. `--small` tries all of it with a tiny model on any device.

Prompts are text of the length that video and question have in the paper's setting; the vision tower has rows of its
own. A row that fails says why, the others still run, and the exit status is 1.
"""
import gc
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Callable, NamedTuple

AS_STARTED = dict(os.environ)                                # for the peers; model.py changes it
import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import data  # noqa: E402  (found by bench.py)
import memory
import pagrpo
import sft
import whole_steps
from model import (CONFIGS, Config, Prompts, Qwen2_5_VL, Step, build_model, causal_attention, qwen, record_step,
                   shard)
from peers import SHAPE, Peer
from ruler import Peaks, Ruler, in_turn, peak, seconds_of

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}                # bytes a second, by the makers
PAPER_GPU_HOURS = 144                                        # eight A100 for 18 hours, 1,000 steps
HALF_B = qwen(896, 24, 14, 2, 4864, 151936, True, sections=(8, 12, 12))       # small enough for TRL on the same card


class Sizes(NamedTuple):
    judged: bool                                             # are there targets?
    models: tuple[str, str]                                  # presets for what is said of 3B, and of 7B
    beside_trl: Config
    rollout: tuple[int, int] = (1424, 512)                   # prompt, new tokens
    places: int = 384                                        # a step of decoding in the middle of a response
    training: tuple[int, int, int] = (8, 1000, 200)          # G, P, T
    step: tuple[int, int, int, int] = (8, 8, 1424, 768)      # the paper's: questions, G, P, T
    trl: tuple[int, int, int, int] = (4, 8, 300, 256)
    grid: tuple[int, int, int] = (8, 16, 32)                 # a clip: 16 frames of 128 tokens
    claim: tuple[int, int, int] = (200, 500, 1200)           # question, observation, and all that the judge reads


LARGE = Sizes(True, ("3b", "7b"), HALF_B)
SMALL = Sizes(False, ("tiny", "tiny"), CONFIGS["tiny"], (40, 8), 6, (4, 30, 10), (2, 2, 20, 6), (2, 4, 20, 6),
              (2, 4, 4), (4, 6, 60))


class Bench(NamedTuple):
    """What the rows share."""
    ruler: Ruler
    size: Sizes
    world: sft.World

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def target(self, value: float) -> float | None:
        return value if self.size.judged else None


def fill(model: Qwen2_5_VL) -> Qwen2_5_VL:
    """Random numbers, made where the weights are. What they are does not matter."""
    for name, p in model.named_parameters():
        local = (p.to_local() if hasattr(p, "to_local") else p).data
        local.normal_(std=0.02) if p.dim() > 1 else local.fill_(float("norm" in name))
    return model


def build(b: Bench, preset: str, dtype: torch.dtype | None = None, sharded: bool = False) -> Qwen2_5_VL:
    """In half precision on a GPU, unless a dtype is given."""
    half = torch.bfloat16 if b.cuda else torch.float32
    with torch.device("meta"):
        model = Qwen2_5_VL(CONFIGS[preset]).to(dtype or half)
    if sharded and b.cuda:
        shard(model, b.world.mesh())
    return fill(model.to_empty(device=b.device))


def text(b: Bench, count: int, length: int) -> Prompts:
    ids = torch.randint(8, 300, (count, length), generator=torch.Generator().manual_seed(0))
    lengths = torch.full((count,), length)
    return Prompts(ids, lengths, torch.arange(length).expand(3, count, -1), lengths, None, []).to(b.device)


def responses(b: Bench, group: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (1, G, T) and lengths (1, G)."""
    shape = 1, group, length
    return torch.randint(8, 300, shape, device=b.device), torch.full(shape[:2], length, device=b.device)


def transformers_model(model: Qwen2_5_VL):
    """transformers' text network with the weights of ours; no second copy."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    shape = {name: getattr(model.config, name, 32768) for name in SHAPE}           # ours has no max_position_embeddings
    with torch.device("meta"):
        net = Qwen2ForCausalLM(Qwen2Config(**shape))
    weights = {name: p for name, p in model.named_parameters() if not name.startswith("visual")}
    net.load_state_dict(weights | {"lm_head.weight": model.head.weight}, strict=True, assign=True)
    net.model.rotary_emb = type(net.model.rotary_emb)(net.config).to(model.head.weight.device)     # buffers
    return net.eval()


# ------------------------------------------------------------------------------------------------ sampling

def checks(b: Bench) -> None:
    """KL 0 before the first update, greedy tokens, gradients against fp32, the recorded step: tests/test_cuda.py."""
    here = Path(__file__).parent
    words = [sys.executable, "-m", "pytest", "-q", str(here / "test_cuda.py"), str(here / "test_shared_prefix.py")]
    subprocess.run(words, check=True, cwd=here.parent)


def rollouts(b: Bench) -> None:
    """Against transformers' generate, two pairs each. transformers compiles where the cache is static, so that is
    asked of 64 responses alone; both warm up on 8 tokens, in a cache of the full size."""
    from transformers import StoppingCriteria

    class Eight(StoppingCriteria):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **others) -> torch.Tensor:
            return torch.full((len(ids),), ids.shape[1] >= p + 8, device=ids.device)
    model, (p, t) = build(b, b.size.models[0]), b.size.rollout
    net = transformers_model(model)
    for questions, group, target in ((8, 8, 8.0), (1, 1, 5.0)):
        prompts, uniforms = text(b, questions, p), torch.rand(questions, group, t)
        asked = dict(attention_mask=torch.ones_like(prompts.ids), max_new_tokens=t, eos_token_id=None, pad_token_id=0,
                     num_return_sequences=group, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        calls = {"ours": partial(model.generate, prompts, uniforms, [-1]),
                 "dynamic cache": partial(net.generate, prompts.ids, **asked)}
        if group > 1:
            calls["static cache"] = partial(net.generate, prompts.ids, **asked, cache_implementation="static")
        warm = {name: partial(call, stopping_criteria=[Eight()]) for name, call in calls.items() if name != "ours"}
        seconds = in_turn(calls, 2, warm)
        for peer, least in (("dynamic cache", target), ("static cache", 2.0))[:len(warm)]:
            b.ruler.row(f"rollout, {b.size.models[0]}", f"{questions}×{group}, prompt {p:,}, {t} new", seconds,
                        peer=peer, target=b.target(least))


@torch.no_grad()
def decoding(b: Bench) -> None:
    """A step in the middle of a response against the bytes it has to read: weights, and the keys and values in use."""
    model, t = build(b, b.size.models[1]), b.size.places
    weight, card = model.head.weight, torch.cuda.get_device_name() if b.cuda else ""
    fastest = next((rate for name, rate in BANDWIDTH.items() if name in card), None)
    for questions in (1, 8):
        prompts, tokens = text(b, questions, b.size.rollout[0]), torch.full((8 * questions,), 9, device=b.device)
        _, prompt_kv = model.prefill(prompts)
        read = sum(p.numel() for p in model.model.layers.parameters()) + weight.numel()
        read += sum(x.numel() for kv in prompt_kv for x in (kv.k, kv.v))
        for recorded in (False, True) if weight.dtype == torch.bfloat16 else (False,):
            step = Step(model, prompts, prompt_kv, 8, 2 * t)
            if recorded:
                record_step(step)
            seconds = [x / 10 for x in in_turn({"ours": lambda: [step(tokens, t) for _ in range(10)]}, 5)["ours"]]
            bytes = weight.element_size() * (read + sum(x[:, :t].numel() for kv in step.caches for x in (kv.k, kv.v)))
            b.ruler.row(f"decoding, {b.size.models[1]}, {'recorded' if recorded else 'plain'}",
                        f"{8 * questions} sequences, place {t}", {"ours": seconds},
                        roofline=fastest and bytes / fastest / median(seconds),
                        note=f"{bytes / 1e9:.2f} GB read, wanted ≥ 60 %; {kernels(lambda: step(tokens, t))}")


def kernels(call: Callable[[], object]) -> str:
    """What a call runs on the card, and how often Python starts something there; operations on a CPU."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as seen:
        seconds_of(call)
    events = list(seen.events())
    if not cuda:
        return f"{sum(e.cpu_parent is None for e in events):,} operations"
    on_card = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events)
    started = sum(bool(re.match("cu(da)?(Graph)?(Launch|Memcpy|Memset)", e.name)) for e in events)
    return f"{on_card:,} kernels, {started:,} launches"


# ------------------------------------------------------------------------------------------------ training

def training(b: Bench) -> None:
    """A pass, its memory, and one layer, against transformers on full sequences with logits at the responses."""
    model, (g, p, t) = build(b, b.size.models[0]), b.size.training
    net, prompts, size = transformers_model(model), text(b, 1, p), f"{g} × ({p:,}, {t})"
    tokens, lengths = responses(b, g, t)
    whole = torch.cat([prompts.ids.expand(g, -1), tokens[0]], dim=1)

    def ours() -> None:
        model.logprobs(prompts, tokens, lengths)[0].sum().backward()

    def theirs(keep: int) -> None:
        logits = net(whole, logits_to_keep=keep).logits[:, -t - 1:-1].float().log_softmax(-1)
        logits.gather(-1, whole[:, -t:, None]).sum().backward()
    b.ruler.row(f"training pass, {b.size.models[0]}", size,
                in_turn({"ours": ours, "transformers": partial(theirs, t + 1)}, 5), peer="transformers",
                target=b.target(3.0), note=f"ceiling by tokens {g * (p + t) / (p + g * t):.2f}")
    b.ruler.row("its memory", size, {}, peer="full logits", target=b.target(4.0),          # gradients are there by now
                bytes={"ours": peak(ours), "full logits": peak(partial(theirs, 0))})
    x = torch.randn(g, p, model.config.hidden_size, device=b.device, dtype=model.head.weight.dtype, requires_grad=True)
    positions = torch.arange(p, device=b.device).expand(g, p)
    tables, rotary = net.model.rotary_emb(x, positions), model.rotary(positions.expand(3, -1, -1), x.dtype)
    calls = {"ours": lambda: model.model.layers[0](x, rotary, causal_attention).sum().backward(),
             "transformers": lambda: net.model.layers[0](x, attention_mask=None, position_ids=positions,
                                                         position_embeddings=tables).sum().backward()}
    b.ruler.row("one layer, forward, backward", f"{g} × {p:,}", in_turn(calls, 10), peer="transformers",
                target=b.target(1.0))


# ------------------------------------------------------------------------------------------------ whole steps

def step_flops(c: Config, questions: int, g: int, p: int, t: int, claim: int) -> float:
    """Floating-point operations of a step: 2 for each parameter and token, and 4 · H · E for each pair of places that
    attend in a layer. Sampling and scoring read the packed row once, training counts three times (what is recomputed
    counts for nothing). For each response the judge reads `claim` tokens and writes as many as the response has."""
    attention = 2 * c.hidden_size * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    weights = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    pair, head = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim, 2 * c.vocab_size * c.hidden_size
    row = 2 * weights * (p + g * t) + head * g * t + pair * (p * p / 2 + g * (t * p + t * t / 2))
    judged = g * (2 * weights * (claim + t) + head * t + pair * (claim + t) ** 2 / 2)
    return questions * (5 * row + judged)


def said_of(b: Bench, preset: str, seconds: float, wanted: float, what: str) -> None:
    """A row for a whole step: the wanted time beside it, operations, and GPU-hours."""
    flops, target = step_flops(CONFIGS[preset], *b.size.step, b.size.claim[-1]), b.target(1.0)
    b.ruler.row(what, sizes(b), {"ours": [seconds], "wanted": [wanted]}, peer="wanted", target=target,
                note=f"{flops / 1e12:.3g} TFLOP, {flops / seconds / 1e12:.3g} TFLOP/s; {seconds / 3.6:.3g} GPU-hours "
                     f"per 1,000 steps, the paper's 7B {PAPER_GPU_HOURS} on A100")


def sizes(b: Bench) -> str:
    return "{}×{}, prompt {:,}, {} new".format(*b.size.step)


def whole_step(b: Bench) -> None:
    """PA-GRPO's step from end to end: fp32 weights, AdamW, KL reference in half precision, which also judges."""
    preset, (questions, g, p, t) = b.size.models[0], b.size.step
    changes = dict(questions=questions, group_size=g, max_response=t)
    settings = pagrpo.Settings(**pagrpo.PRESETS[preset] | changes)
    with tempfile.TemporaryDirectory() as folder:
        data.make_toy_model(Path(folder), 0)
        vocabulary = data.Vocabulary(folder)
    policy = whole_steps.never_stop(build(b, preset, torch.float32, sharded=True), vocabulary)
    reference = whole_steps.never_stop(build(b, preset, sharded=True), vocabulary).requires_grad_(False)
    if b.cuda:                                               # as model.build_model does
        policy.set_reshard_after_forward(False, recurse=False)
    policy.save_memory, optimizer = settings.save_memory, sft.make_optimizer(policy, settings)
    asked = whole_steps.examples(whole_steps.texts(questions, p), vocabulary)
    # They make a prompt of the usual length: a random response has no observation and, encoded once more, two to three
    # times its tokens.
    question, observation = (whole_steps.texts(1, length)[0] for length in b.size.claim[:2])

    def judge(claims: list) -> None:
        claims = [claim._replace(question=question, observation=observation) for claim in claims]
        pagrpo.blind_answers(reference, vocabulary, settings, claims)
    run = partial(whole_steps.step, policy, reference, optimizer, asked, vocabulary, settings, b.world, judge)
    run()                                                    # warms up; moments are made
    with Peaks() as peaks:
        phases, bytes = run(peaks=peaks)
    for name, seconds in phases.items():
        b.ruler.row(f"{preset}, step: {name}", sizes(b), {"ours": [seconds]}, bytes={"ours": bytes[name]})
    said_of(b, preset, sum(phases.values()), 10.0, f"{preset}: whole step")
    told = memory.estimate(CONFIGS[preset], settings, 1, b.cuda)["peak"]
    note = f"{peaks.reserved / 2 ** 20:,.0f} MiB reserved"
    if not peaks.reserved:
        note = "ours without weights and moments, which were made before"
    b.ruler.row(f"{preset}, step: memory", sizes(b), {}, peer="estimate", note=note,
                bytes={"ours": max(bytes.values()), "estimate": int(told)})


def by_parts(b: Bench) -> None:
    """The 7B's step in parts, since weights in fp32, gradients and moments do not fit on one card: the network in half
    precision, AdamW on as many numbers as a layer has, scaled to all. The vision tower reads each clip three times."""
    preset, (questions, g, p, t) = b.size.models[1], b.size.step
    model, prompts = build(b, preset), text(b, questions, p)
    model.save_memory = True
    claims, one, (tokens, lengths) = text(b, questions * g, b.size.claim[-1]), text(b, 1, p), responses(b, g, t)
    pixels = torch.randn(math.prod(b.size.grid), 3 * 2 * 14 * 14, device=b.device, dtype=model.head.weight.dtype)
    layer = [torch.nn.Parameter(torch.randn_like(x, dtype=torch.float32)) for x in model.model.layers[0].parameters()]
    for x in layer:
        x.grad = torch.randn_like(x)
    optimizer = torch.optim.AdamW(layer, fused=b.cuda)
    share = sum(x.numel() for x in model.parameters()) / sum(x.numel() for x in layer)

    read = partial(model.visual, pixels, [b.size.grid], True)

    def score() -> torch.Tensor:
        return model.logprobs(one, tokens, lengths)[0]

    def learn(call: Callable[[], torch.Tensor]) -> None:
        call().sum().backward()
    parts = {  # what is called, how often in a step
        "sampling": (partial(model.generate, prompts, torch.rand(questions, g, t), [-1]), 1),
        "judging": (partial(model.generate, claims, torch.rand(questions * g, 1, t), [-1], 0.0), 1),
        "scoring, a question": (torch.no_grad()(score), questions),
        "training, a question": (partial(learn, score), questions),
        "clip, read": (torch.no_grad()(read), 2 * questions), "clip, trained on": (partial(learn, read), questions),
        "AdamW, a layer": (optimizer.step, share)}
    total = 0.0
    for name, (call, times) in parts.items():
        with Peaks() as peaks:
            seconds = in_turn({"ours": call}, 2)
            bytes = {"ours": peaks.take()}
        total += times * median(seconds["ours"])
        what = f"{b.size.grid} patches" if "clip" in name else sizes(b)
        b.ruler.row(f"{preset}: {name}", what, seconds, bytes=bytes,
                    note=f"× {times:.4g} = {times * median(seconds['ours']):.2f} s")
    said_of(b, preset, total, 25.0, f"{preset}: sum of the parts")


def steps(b: Bench) -> None:
    """Against TRL in a process of its own, at a size of which both fit on a card."""
    if not (find_spec("trl") and find_spec("datasets")):
        return print("step against TRL: not measured, pip install -r tests/requirements-bench.txt", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data.make_toy_model(Path(folder), 0, b.size.beside_trl)
        peer, vocabulary = Peer(folder, AS_STARTED), data.Vocabulary(folder)
        models = [build_model(folder, vocabulary, b.world, frozen=frozen) for frozen in (False, True)]
        whole_steps.against_trl(b.ruler, Path(folder), peer, *models, b.world, b.size.trl, 3, b.target(4.0))
        peer.close()


def waiting(b: Bench) -> None:
    whole_steps.waiting(b.ruler, b.world, 30 if b.size.judged else 3, folders=True)


ROWS = {f.__name__: f for f in (checks, decoding, training, whole_step, by_parts, rollouts, steps, waiting)}


def run(args) -> None:
    if not (torch.cuda.is_available() or args.small):
        sys.exit("There is no GPU. --small tries the command with the tiny model on a CPU.")
    bench, failed = Bench(Ruler(args.json), SMALL if args.small else LARGE, sft.start_world()), []
    if unknown := [name for name in args.only if name not in ROWS]:
        sys.exit(f"--only: {', '.join(unknown)} is none of {', '.join(ROWS)}")
    until = time.monotonic() + 60 * args.minutes

    def late(*_) -> None:
        raise TimeoutError(f"the {args.minutes:g} minutes of --minutes are over")
    signal.signal(signal.SIGALRM, late)
    for name in args.only or ROWS:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, until - time.monotonic()))
            ROWS[name](bench)
        except (Exception, SystemExit) as error:             # out of memory, for one
            failed.append(name)
            bench.ruler.failed(name, error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        gc.collect()
        torch.cuda.empty_cache()
    if failed and bench.world.size > 1:
        os._exit(1)                                          # rows are flushed as they are printed
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")
    bench.world.shutdown()
