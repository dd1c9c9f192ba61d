"""Stage 2, PA-GRPO: process-aware group-relative policy optimisation of VideoP2R (eq. 3–7).

    python pagrpo.py                                     the toy world on any machine: clips, SFT, PA-GRPO, table
    torchrun --nproc_per_node=8 pagrpo.py                the 7b preset: the paper's settings on eight GPUs

GRPO samples G responses to a question and reinforces those with an above-average reward. PA-GRPO gives each segment of
a response, perception and reasoning, a reward and an advantage of its own. A step is the loop in `train`:
    1. rollout      sample G responses to each question
    2. rewards      R_P = does the observation suffice (judge) + format + length,  R_R = is the answer right + …
    3. advantages   the rewards of each segment are normalized in their own group: A_P, A_R            (eq. 6)
    4. loss         A_P reaches the tokens of the observation, A_R those of think and answer; a KL term
                    keeps the policy near the frozen SFT model                                         (eq. 7)
    5. update       AdamW, one optimizer step for all questions of all ranks

Differences from the paper: a ratio for each token instead of each segment (`pa_grpo_loss` says why), every rank samples
instead of one GPU, `--judge` takes any model instead of Claude. From PPO: no value network, since the mean of the group
is the baseline, and one update per rollout, so that the ratio is 1 (`--updates-per-rollout` makes more). From TRL: no
rollout server, no LoRA, no reward model, no other losses. They would hide the algorithm.

"Loss is 0, is it broken?" No. With one advantage per response (grpo, joint, gdpo) and one mean per response, the
advantages of a group sum to 0, and so does the loss, apart from the KL term. With one advantage per segment (pa) it is
small, since segments differ in length. Its value is not informative, and its gradient is not 0: watch the rewards.
"""
import gc
import json
import math
import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, make_dataclass
from itertools import islice
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import data
import model
import rewards
import sft
import torch
import torch.nn.functional as F
from data import Examples, flag
from model import Qwen2_5_VL, newest_checkpoint
from rewards import SEGMENTS, Judge, Verdict
from sft import World
from torch import Tensor
from tqdm import tqdm

Windows = make_dataclass("Windows", [  # one flag a segment: --perception-window, --reasoning-window
    (f"{s.name}_window", tuple, flag(s.window, f"lengths of the {s.name} segment, in tokens with tags and stop token, "
                                     "that earn the length reward")) for s in SEGMENTS], frozen=True)


@dataclass(frozen=True)
class Settings(Windows, sft.TrainSettings, data.JudgeSettings):
    model: str = flag("", "SFT checkpoint to start from; it stays the KL reference (toy: SFT is run when missing)")
    steps: int = flag(1000, "rollout batches; each makes --updates-per-rollout optimizer steps")
    questions: int = flag(8, "questions in one step, over all ranks; a rank takes whole questions")
    group_size: int = flag(8, "G, responses sampled to each question")
    max_response: int = flag(768, "tokens after which a response is cut off")
    temperature: float = flag(1.0, "of the softmax, in sampling and in log-probabilities")
    advantage: str = flag("pa", "pa: each segment its own; grpo: A_R on all tokens; joint: that of R_P + R_R; gdpo: "
                          "A_P + A_R (GDPO without normalization over the batch)", ["pa", "gdpo", "grpo", "joint"])
    token_mean: str = flag("response", "the mean over the tokens of a response, or the sum of those of its segments "
                           "(the KL term then counts once per segment)", ["response", "segment"])
    reward_off: str = flag("none", "leaves a reward out; the paper's row without perception reward is --advantage grpo",
                           ["none", *(s.name for s in SEGMENTS), "length"])
    kl_beta: float = flag(0.04, "weight of the KL term; at 0 there is no reference, unless it judges")
    clip_eps: float = flag(0.2, "PPO clip range 1 ± this; no effect with one update per rollout")
    updates_per_rollout: int = flag(1, "optimizer steps on one batch of rollouts")
    transcript_every: int = flag(50, "steps between printed transcripts")
    offload_reference: bool = flag(False, "keep the KL reference in host memory: less on the GPU, more copying")

    def __post_init__(self):
        sft.TrainSettings.__post_init__(self)
        data.JudgeSettings.__post_init__(self)
        data.check_minimum(self, questions=1, group_size=2, max_response=1, updates_per_rollout=1, transcript_every=1,
                           steps=1, kl_beta=0, clip_eps=0, temperature=0.01)


REAL = dict(data="data/videop2r/*RL*.json*", media="data/Video-R1-data", judge="reference")
PRESETS = {
    "tiny": sft.TINY | dict(questions=16, micro_batch=16, steps=160, lr=3e-4, warmup=15, max_response=64,
                            perception_window=(8, 16), reasoning_window=(10, 48)),
    "3b": REAL | dict(model="runs/3b/sft"),
    "7b": REAL | dict(model="runs/7b/sft"),
}
STAGES = {"pa": "pagrpo", "gdpo": "gdpo", "grpo": "grpo", "joint": "joint"}   # folder of each advantage in the run


# ------------------------------------------------------------------------------------------------ the loop

def train(policy: Qwen2_5_VL, reference: Qwen2_5_VL | None, optimizer: torch.optim.Optimizer, judge: Judge,
          questions: Examples, heldout: Examples, run: sft.Run, settings: Settings, world: World) -> None:
    """PA-GRPO: B questions of this rank (perhaps none), G responses to each, K segments."""
    vocabulary, source = questions.vocabulary, settings.model
    with run.guard():
        for step, examples in run.batches(questions):
            clock = Clock()
            groups = rollout(policy, examples, vocabulary, settings, f"step {step}",                  # 1
                             settings.group_size, settings.temperature)
            clock.lap("sampling")
            pending = start_judging(judge, groups)           # a judge behind http works while the reference does
            clock.lap("judging")
            batches = make_batches(groups, policy, reference, vocabulary, settings, world)
            clock.lap("scoring")
            verdicts = pending()
            metrics = judge_metrics(verdicts, groups, judge, settings, world)
            metrics |= check_verdicts(verdicts, run.stop, settings, world)
            clock.lap("judging")
            run.end_of_step(step, policy, optimizer, source)                  # stops after a signal or a lost judge

            parts = reward_tensor(groups, verdicts, settings)                 # 2 (B, G, K, 3)
            totals = total_rewards(parts, settings.reward_off)                #   (B, G, K)
            advantages = group_advantages(totals, settings.advantage)         # 3 (B, G, K)
            lr = sft.learning_rate(step, run.steps, settings)
            values = update(policy, optimizer, batches, advantages, lr, settings, world)              # 4, 5
            clock.lap("training")
            if step % settings.transcript_every == 0 or step + 1 == run.steps:
                record(step + 1, policy, batches, groups, verdicts, parts, heldout or questions, run)

            metrics |= step_metrics(groups, parts, totals, values, settings, world) | clock.seconds
            if settings.eval_every and (step + 1) % settings.eval_every == 0:
                found = evaluate(policy, heldout, judge, run.stop, settings, 0.0, world)
                metrics |= {f"heldout/{name}": cell["value"] for name, cell in found.items()}
            run.log({"step": step + 1, "lr": lr, **metrics}, "  ".join(
                f"{segment.name} {metrics.get(f'{segment.name}/accuracy', math.nan):.2f}" for segment in SEGMENTS))
            score = {"score": metrics["heldout/answer"]} if "heldout/answer" in metrics else {}
            run.end_of_step(step + 1, policy, optimizer, source, **score)


# ------------------------------------------------------------------------------------------------ 1. rollout

@dataclass
class Response:
    """One sampled response."""
    example: "data.Example"
    tokens: list[int]                                        # with the stop token, unless it was cut off
    segments: list[int]                                      # index of each token's segment, K: unknown
    logprobs: Tensor                                         # (T,) log-probabilities when sampled
    finished: bool                                           # False: cut off at the token limit
    text: str
    parsed: "rewards.Parsed"


def rollout(policy: Qwen2_5_VL, examples: Sequence, vocabulary: data.Vocabulary, settings: Settings, stream: str,
            group: int, temperature: float, top_p: float = 1.0) -> list[list[Response]]:
    """Samples `group` responses to each question. `stream` names the random numbers: a step, or an evaluation."""
    with model.gathered(policy):                             # sharded weights are all-gathered once, on every rank
        if not examples:
            return []
        uniforms = torch.stack([data.question_uniforms(settings.seed, stream, e.record, group, settings.max_response)
                                for e in examples])
        prompts = data.collate(examples).to(next(policy.parameters()).device)
        sampled = policy.generate(prompts, uniforms, vocabulary.stop_ids, temperature, top_p)
    tokens, lengths, logprobs, finished = (x.cpu() for x in sampled)
    groups = []
    for b, example in enumerate(examples):
        groups.append([])
        for g in range(group):
            ids = tokens[b, g, :lengths[b, g]].tolist()
            text, segments = vocabulary.decode(ids), rewards.segment_ids([vocabulary.bytes[i] for i in ids])
            groups[-1].append(Response(example, ids, segments, logprobs[b, g, :len(ids)], bool(finished[b, g]), text,
                                       rewards.parse(text)))
    return groups


# ------------------------------------------------------------------------------------------------ 2. rewards

UNCLOSED = Verdict(False, "there is no observation between its tags")


def start_judging(judge: Judge, groups: Sequence[Sequence[Response]]) -> Callable[[], list[Verdict]]:
    """Sends all observations to the judge together and does not wait. Call the result for the B·G verdicts."""
    responses = [r for group in groups for r in group]
    observed = {i: r for i, r in enumerate(responses) if r.parsed.contents["observation"] is not None}
    answer = judge.start([data.claim_about(r.example.record, r.parsed.contents["observation"])
                          for r in observed.values()])

    def verdicts() -> list[Verdict]:
        found = dict(zip(observed, answer(), strict=True))
        return [found.get(i, UNCLOSED) for i in range(len(responses))]
    return verdicts


def reward_tensor(groups: Sequence[Sequence[Response]], verdicts: Sequence[Verdict], settings: Settings) -> Tensor:
    """R_acc, R_form and R_len of every segment (eq. 3–5), (B, G, K, 3). NaN: the judge's verdict is unknown."""
    windows = [getattr(settings, f"{segment.name}_window") for segment in SEGMENTS]
    responses, size = [r for group in groups for r in group], len(groups[0]) if groups else settings.group_size
    parts = [rewards.reward_parts(r, verdict, windows) for r, verdict in zip(responses, verdicts, strict=True)]
    return torch.tensor(parts).view(len(groups), size, len(SEGMENTS), len(rewards.REWARD_PARTS))


def total_rewards(parts: Tensor, off: str) -> Tensor:
    """R of every segment, without what an ablation leaves out. (B, G, K, 3) → (B, G, K)"""
    accuracy, format, length = parts.unbind(-1)
    total = accuracy + format + (0 if off == "length" else length)
    keep = torch.tensor([segment.name != off for segment in SEGMENTS])
    return torch.where(keep, total, 0.0)


# ------------------------------------------------------------------------------------------------ 3. advantages

def normalize(totals: Tensor) -> Tensor:
    """Group-relative advantages (eq. 6): (R - mean) / (unbiased std + 1e-4) over the group. (B, G, …) → (B, G, …)

    A group whose rewards are equal up to rounding (std below 1e-6) carries no signal: its advantages are 0. An unknown
    reward (NaN) is left out of the statistics and gets advantage 0; fewer than two known rewards give 0 for all.
        [2, 2, 1, 1] → [+0.87, +0.87, -0.87, -0.87]        [2, NaN, 1, 1] → [+1.15, 0, -0.58, -0.58]
    """
    known = ~totals.isnan()
    count = known.sum(1, keepdim=True)
    mean = totals.nansum(1, keepdim=True) / count.clamp(min=1)
    std = (((totals - mean) ** 2).nansum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(known & (std >= 1e-6), (totals - mean) / (std + 1e-4), 0.0)


def group_advantages(totals: Tensor, mode: str) -> Tensor:
    """The advantage of each segment of each response, (B, G, K) → (B, G, K).

    Two responses, R_P = (2, 1) and R_R = (1, 1.5); two rewards that differ are normalized to ±0.71:
        pa      each segment from its own reward        A_P = (+0.71, -0.71), A_R = (-0.71, +0.71)
        gdpo    their sum, for all tokens               0 for both: better perception and worse reasoning cancel out
        grpo    from the last segment's reward, for all (-0.71, +0.71): the better observation is punished
        joint   from the sum of the rewards, for all    (+0.71, -0.71): the better reasoning is punished
    """
    if mode == "grpo":
        totals = totals[..., -1:]
    if mode == "joint":
        totals = totals.sum(-1, keepdim=True)
    advantages = normalize(totals)
    if mode == "gdpo":
        advantages = advantages.sum(-1, keepdim=True)
    return advantages.expand(-1, -1, len(SEGMENTS))


# ------------------------------------------------------------------------------------------------ 4. loss

class MicroBatch(NamedTuple):
    """Some of the rank's questions with their responses as tensors, and what stays constant in this step."""
    rows: list[int]                                          # indices of the rank's questions; B: a dummy question
    inputs: tuple                                            # of `logprobs`: prompts, tokens (B, G, T), lengths …
    segments: Tensor                                         # (B, G, T) index of a token's segment, K: unknown
    weights: Tensor                                          # (B, G, T) share of a token in its response's mean
    sampled: Tensor                                          # (B, G, T) log-probabilities when sampled
    reference: Tensor | None                                 # (B, G, T) log-probabilities under the KL reference
    old: Tensor | None                                       # (B, G, T) before the first update; None with one update


def collate_responses(groups: Sequence[Sequence[Response]], token_mean: str) -> tuple[Tensor, ...]:
    """Responses as tensors: tokens (B, G, T), lengths (B, G), segments, weights, sampled log-probabilities (B, G, T).

    5 tokens, segments [0, 0, 1, 1, 1]:  weights, one mean per response  [1/5, 1/5, 1/5, 1/5, 1/5]
                                         one mean per segment            [1/2, 1/2, 1/3, 1/3, 1/3]
    After the end segments are K (unknown) and everything else is 0.
    """
    shape = len(groups), len(groups[0]), max(len(r.tokens) for r in sum(groups, []))
    tokens, segments = torch.zeros(shape, dtype=torch.long), torch.full(shape, len(SEGMENTS))
    weights, sampled, lengths = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.long)
    for i, group in enumerate(groups):
        for j, r in enumerate(group):
            n, ids = len(r.tokens), torch.tensor(r.segments)
            lengths[i, j], tokens[i, j, :n], segments[i, j, :n] = n, torch.tensor(r.tokens), ids
            sampled[i, j, :n] = r.logprobs
            weights[i, j, :n] = 1 / n if token_mean == "response" else 1 / torch.bincount(ids)[ids]
    return tokens, lengths, segments, weights, sampled


def token_advantages(advantages: Tensor, segments: Tensor) -> Tensor:
    """The advantage of each token is that of its segment. advantages (B, G, K), segments (B, G, T) → (B, G, T)

    Index K: a segment before the last was never closed, and all tokens of the response get the mean over segments.
        A = (+1, -1), segments [0, 0, 1, 1, 1] → [+1, +1, -1, -1, -1]        segments [2, 2, 2] → [0, 0, 0]
    """
    columns = torch.cat([advantages, advantages.mean(-1, keepdim=True)], dim=-1)          # (B, G, K + 1)
    return columns.gather(-1, segments)


def pa_grpo_loss(logprobs: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, weights: Tensor,
                 clip_eps: float, kl_beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped objective with a KL term (eq. 7), summed over responses. All inputs (B, G, T); after the end of a
    response its weights and log-probabilities are 0.

    Departures from eq. 7 as printed. There, ρ is the ratio of a whole segment's probabilities, and no length divides
    it: over hundreds of tokens such a ratio leaves [1 - ε, 1 + ε] at once, and long responses outweigh short ones. Here
    each token has its own ratio and `weights` make one mean over a response, as in the code the authors build on. With
    one update per rollout the ratio is 1 either way, and the gradient differs by that mean only. The KL term is inside
    the same mean; it is the k3 estimate e^d - d - 1 with d = log π_ref - log π, clamped to ±10.

    Two tokens with log-probability -1 now and before, the reference at -1 and -1.5, A = (+1, -1), weights (1/2, 1/2),
    ε 0.2, β 0.04:  ρ = 1, 1 → objective +1, -1;  d = 0, -0.5 → KL 0, 0.1065
        loss = 1/2 (-1 + 0.04 · 0) + 1/2 (+1 + 0.04 · 0.1065) = 0.00213
    The loss is nearly 0, its gradient is not: d loss / d logprobs = (-1/2, 1/2 + 0.02 (1 - e^-0.5)) = (-0.5, 0.508).

    Returns the loss (a sum: divide it by the responses of the whole step), and for each token, without gradient, its KL
    (0 without a reference) and whether it was clipped: whether the minimum is the clipped term, and not the other.
    """
    ratio = torch.exp(logprobs - old)                                         # (B, G, T); 1 after the end, weight 0
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    objective = torch.minimum(ratio * advantages, clipped * advantages)       # (B, G, T)
    kl = torch.zeros_like(logprobs)
    if reference is not None:
        d = (reference - logprobs).clamp(-10, 10)
        kl = torch.exp(d) - d - 1                                             # (B, G, T), never negative
    loss = (weights * (kl_beta * kl - objective)).sum()
    return loss, kl.detach(), (clipped * advantages < ratio * advantages).detach()


# ------------------------------------------------------------------------------------------------ 5. update

@torch.no_grad()
def make_batches(groups: list[list[Response]], policy: Qwen2_5_VL, reference: Qwen2_5_VL | None,
                 vocabulary: data.Vocabulary, settings: Settings, world: World) -> list[MicroBatch]:
    """Cuts a step into micro-batches and computes what needs no rewards, while the judge is at work."""
    batches, questions = [], [group[0].example for group in groups]
    for examples, weight in sft.micro_batches(questions, settings.micro_batch, world, policy, vocabulary):
        rows = [*range(len(batches) * settings.micro_batch, len(groups))][:len(examples)] or [len(groups)]
        blank = Response(examples[0], vocabulary.stop_ids[:1], [0], torch.zeros(1), True, "", rewards.parse(""))
        some = [groups[i] for i in rows] if weight else [[blank] * settings.group_size]
        tensors = collate_responses(some, settings.token_mean)
        tokens, lengths, segments, weights, sampled = (x.to(world.device) for x in tensors)
        inputs = data.collate(examples).to(world.device), tokens, lengths, settings.temperature
        batches.append(MicroBatch(
            rows, inputs, segments, weights * weight, sampled,
            reference.logprobs(*inputs)[0] if settings.kl_beta else None,
            policy.logprobs(*inputs)[0] if settings.updates_per_rollout > 1 else None))
    return batches


def update(policy: Qwen2_5_VL, optimizer: torch.optim.Optimizer, batches: list[MicroBatch], advantages: Tensor,
           lr: float, settings: Settings, world: World) -> dict[str, list[float]]:
    """One or more optimizer steps on a step's responses. advantages (B, G, K). Returns what is worth logging, a value
    a token or an update."""
    values, (questions, group, _) = defaultdict(list), advantages.shape
    responses = world.all_reduce_sum({"n": questions * group})["n"]
    advantages = F.pad(advantages, (0, 0, 0, 0, 0, 1)).to(world.device)       # zeros for the dummy question
    for number in range(settings.updates_per_rollout):
        for batch in batches:
            logprobs, entropy = policy.logprobs(*batch.inputs)                                 # (B, G, T)
            old = logprobs.detach() if batch.old is None else batch.old       # a single update: the ratio is 1
            loss, kl, clipped = pa_grpo_loss(
                logprobs, old, batch.reference, token_advantages(advantages[batch.rows], batch.segments), batch.weights,
                settings.clip_eps, settings.kl_beta)
            # One denominator for all micro-batches and ranks. FSDP averages over ranks: undo that.
            (loss * world.size / max(1, responses)).backward()
            of_tokens = {"kl": kl, "entropy": entropy, "clip_share": clipped.float()}
            if number == 0:                                  # before any update, the policy is the one that sampled
                of_tokens["logprob_gap"] = (logprobs.detach() - batch.sampled).abs()
                values["loss"].append(float(loss.detach()))
            for name, x in of_tokens.items():
                values[name] += x[batch.weights > 0].tolist()
        values["grad_norm"].append(sft.optimizer_step(policy, optimizer, lr, settings.clip_norm))
    return values


# ================================ a first reader may stop here ================================

# ------------------------------------------------------------------------------------------------ set-up

def prepare(settings: Settings, run: sft.Run, world: World) -> tuple:
    """Loads what `train` needs, in the order of its parameters, and continues from the newest checkpoint."""
    vocabulary = data.Vocabulary(settings.model)
    reference, judge = load_judge(settings, run, vocabulary, world)
    policy = model.build_model(run.last_checkpoint or settings.model, vocabulary, world, settings.save_memory,
                               settings.shards)
    optimizer = sft.make_optimizer(policy, settings)
    run.restore(policy, optimizer)
    questions, heldout = (run.examples(data.read_records(file) if file else [], vocabulary, policy.config)
                          for file in (settings.data, settings.heldout))
    return policy, reference, optimizer, judge, questions, heldout, run, settings, world


def load_judge(settings: Settings, run: sft.Run, vocabulary: data.Vocabulary, world: World
               ) -> tuple[Qwen2_5_VL | None, Judge]:
    """The frozen SFT model, if the KL term or the judge needs it, and the judge."""
    reference = None
    if settings.kl_beta or settings.judge == "reference":
        reference = model.build_model(settings.model, vocabulary, world, shards=settings.shards, frozen=True,
                                      offload=settings.offload_reference)

    def answer_from_observation(claims: list) -> list[Verdict]:
        with model.gathered(reference):                      # all ranks together, also one that has no claims
            return data.blind_answers(reference, vocabulary, claims, settings, settings.max_response,
                                      max(1, len(claims)), world.device)
    cache = run.folder / f"judge-{world.rank}.jsonl"
    return reference, data.make_judge(settings, cache, answer_from_observation, str(world.device))


# ------------------------------------------------------------------------------------------------ metrics

class Clock:
    """Seconds of each phase of a step."""

    def __init__(self):
        self.last, self.seconds = time.perf_counter(), Counter()

    def lap(self, phase: str) -> None:
        began, self.last = self.last, time.perf_counter()
        self.seconds[f"seconds_{phase}"] += self.last - began


def step_metrics(groups: list[list[Response]], parts: Tensor, totals: Tensor, values: dict[str, list[float]],
                 settings: Settings, world: World) -> dict:
    """The metrics of a step, over all ranks. Every part of every reward is logged with its standard deviation."""
    responses = [r for group in groups for r in group]
    lengths = torch.tensor([rewards.segment_lengths(r.segments) for r in responses]).view(-1, len(SEGMENTS))
    differ = [think_differs(r) for r in responses]
    spread, shares = {}, {"truncated": [float(not r.finished) for r in responses],
                          "mismatch": [x for x in differ if x is not None]}
    for k, segment in enumerate(SEGMENTS):
        columns = {"reward": totals[..., k], "tokens": lengths[:, k].float()}
        columns |= zip(rewards.REWARD_PARTS, parts[..., k, :].unbind(-1))
        for name, x in columns.items():
            spread[f"{segment.name}/{name}"] = x[~x.isnan()].tolist()         # an unknown verdict is no zero
        shares[f"{segment.name}/zero_variance"] = (normalize(totals[..., k]) == 0).all(1).float().tolist()
    advantages = group_advantages(totals, settings.advantage)                 # no token of such a group gets one
    shares["zero_variance"] = (advantages == 0).flatten(1).all(1).float().tolist()
    shares |= {name: x for name, x in values.items() if name not in ("loss", "grad_norm")}
    sums = world.all_reduce_sum({"questions": len(groups), "responses": len(responses), "loss": sum(values["loss"]),
                                 "tokens": int(lengths.sum())})
    if not sums["questions"]:
        world.print0("The media of none of this step's questions can be read; nothing was learned.")
    return {**mean_over_ranks(spread, world, deviation=True), **mean_over_ranks(shares, world),
            "logprob_gap_max": world.all_reduce_max(max(values["logprob_gap"], default=0.0)),
            "loss": sums["loss"] / max(1, sums["responses"]),
            "grad_norm": sum(values["grad_norm"]) / len(values["grad_norm"]),
            "questions": int(sums["questions"]), "skipped": settings.questions - int(sums["questions"]),
            "tokens": int(sums["tokens"])}


def think_differs(r: Response) -> float | None:
    """Is the answer another option than the one that the reasoning ends on? None where one of them names no option."""
    said, record = r.parsed.contents, r.example.record
    options = record.options if record.problem_type == "multiple choice" else ()
    thought, answered = rewards.ends_on(said.get("think") or "", options), rewards.choice(said["answer"] or "", options)
    return float(thought != answered) if thought and answered else None


def mean_over_ranks(values: dict[str, list[float]], world: World, deviation: bool = False) -> dict[str, float]:
    """Means over the values of all ranks, with `deviation` their standard deviations too. A name without any value is
    absent: 0 would draw a line that means nothing."""
    pooled = defaultdict(list)
    for part in world.gather(dict(values)):
        for name, x in part.items():
            pooled[name] += x
    means = {name: statistics.fmean(x) for name, x in pooled.items() if x}
    return means | {f"{name}_std": statistics.pstdev(x) for name, x in pooled.items() if x and deviation}


def judge_metrics(verdicts: list[Verdict], groups: list[list[Response]], judge: Judge, settings: Settings, world: World
                  ) -> dict:
    """How the judge works and, in the toy world, how often it says what the exact rule says."""
    values, rules = defaultdict(list), verdicts
    if settings.judge != "rule" and data.is_toy([group[0].example.record for group in groups]):
        rules = start_judging(Judge(rewards.rule_judge), groups)()
    for v, rule in zip(verdicts, rules):
        if v is not UNCLOSED:
            values["judge/leak"].append(float(v.leak))
        if v is not rule and v.sufficient is not None:
            values["judge/agreement"].append(float(v.sufficient == rule.sufficient))
            values["judge/false_positive"].append(float(v.sufficient > rule.sufficient))      # too little is accepted
    requests = {f"judge/{name}": judge.counts.pop(name, 0) for name in ("requests", "retries", "cached")}
    requests = {name: int(n) for name, n in world.all_reduce_sum(requests).items()}
    return {**mean_over_ranks(values, world), **requests, "judge/seconds": world.all_reduce_max(judge.seconds)}


def check_verdicts(verdicts: list[Verdict], stop: Callable[[str], None], settings: Settings, world: World) -> dict:
    """Counts unknown verdicts. Calls `stop` with the reason, on all ranks alike, above --max-unknown."""
    asked = [v for v in verdicts if v is not UNCLOSED]
    errors = [v.error for v in asked if v.sufficient is None]
    sums = world.all_reduce_sum({"judge/claims": len(asked), "judge/unknown": len(errors)})
    if sums["judge/unknown"] > settings.max_unknown * sums["judge/claims"]:
        reason = Counter(errors).most_common(1)[0][0][:200] if errors else "see the other ranks"
        stop(f"{sums['judge/unknown']:.0f} of {sums['judge/claims']:.0f} verdicts stayed unknown, more than "
             f"--max-unknown {settings.max_unknown:g} allows. Most often: {reason}")
    return {name: int(n) for name, n in sums.items()}


def transcript(response: Response, verdict: Verdict, parts: Tensor, advantages: Tensor) -> str:
    """A response as a person reads it, with verdict, rewards and advantages. parts (K, 3), advantages (K,)"""
    r = response.example.record
    says = {True: "Yes", False: "No", None: "unknown"}[verdict.sufficient]
    lines = [f"── {r.path}  {r.problem_type} ".ljust(100, "─"),
             f"question    {r.question}  {'  '.join(r.options)}".rstrip(), f"reference   {r.reference}",
             response.text.strip() + ("" if response.finished else " … (cut off)"),
             f"judge       {says}: {verdict.error or verdict.explanation}"]
    for k, segment in enumerate(SEGMENTS):
        accuracy, format, length = parts[k].tolist()
        tokens = rewards.segment_lengths(response.segments)[k]
        lines.append(f"{segment.name:11} accuracy {accuracy:.2f} + format {format:.0f} + length {length:.1f} "
                     f"({tokens} tokens) → advantage {advantages[k]:+.2f}")
    return "\n".join(lines + ["─" * 100])


# ------------------------------------------------------------------------------------------------ what the report shows

@torch.no_grad()
def record(step: int, policy: Qwen2_5_VL, batches: list[MicroBatch], groups: list[list[Response]],
           verdicts: list[Verdict], parts: Tensor, questions: Examples, run: sft.Run) -> None:
    """After a step: adds one of its groups to rollouts.jsonl, and to question.jsonl responses to a question that stays
    the same for the whole run. All ranks run the same passes, rank 0 writes. parts (B, G, K, 3)"""
    s = run.settings
    after = [policy.logprobs(*batch.inputs)[0] for batch in batches[:1]]      # by the updated weights, (B, G, T)
    readable = filter(None, map(questions.__getitem__, range(min(20, len(questions)))))
    same = [*islice(readable, 1)] if run.world.first else []
    answers = rollout(policy, same, questions.vocabulary, s, "the same question", 4, s.temperature)
    opinions = [Verdict(None, "not judged")] * 4 * len(answers)               # the run's judge may cost money
    if data.is_toy(example.record for example in same):
        opinions = start_judging(Judge(rewards.rule_judge), answers)()
    for r, verdict, part in zip(sum(answers, []), opinions, reward_tensor(answers, opinions, s).flatten(0, 1)):
        run.append("question.jsonl", response_row(step, r, verdict, part, questions))
    if not groups or not run.world.first:
        return
    # Of the first micro-batch, the group whose segments differ most in their advantages shows the most.
    batch, totals, n = batches[0], total_rewards(parts, s.reward_off), len(batches[0].rows)
    credit = {mode: group_advantages(totals, mode) for mode in STAGES}                     # each (B, G, K)
    b = int((credit["pa"][:n].amax(-1) - credit["pa"][:n].amin(-1)).sum(1).argmax())
    received = token_advantages(credit[s.advantage][:n], batch.segments.cpu())             # (B, G, T)
    zeros = torch.zeros_like(received)                       # there is no value network, and perhaps no reference
    columns = {"logprobs_after": after[0], "ref_logprobs": zeros if batch.reference is None else batch.reference,
               "weights": batch.weights, "token_rewards": received, "values": zeros}
    for g, (r, verdict) in enumerate(zip(groups[b], verdicts[b * s.group_size:])):
        run.append("rollouts.jsonl", response_row(step, r, verdict, parts[b, g], questions) | {
            "advantages": {mode: x[b, g] for mode, x in credit.items()}, "totals": totals[b, g],
            "reward": totals[b, g].nansum(), **{name: x[b, g, :len(r.tokens)] for name, x in columns.items()}})
    tqdm.write(f"Before step {step}, one of {s.group_size} responses:\n" + transcript(
        groups[b][0], verdicts[b * s.group_size], parts[b, 0], credit[s.advantage][b, 0]))


def response_row(step: int, r: Response, verdict: Verdict, parts: Tensor, questions: Examples) -> dict:
    """A response and its record as a line of JSON, with RLLoggingBoard's names. parts (K, 3); unknown ones are null."""
    return asdict(r.example.record) | {
        "step": step, "prompt": data.instruction(r.example.record, questions.settings), "response": r.text,
        "response_tokens": [questions.vocabulary.bytes[i].decode(errors="replace") for i in r.tokens],
        "segments": r.segments, "logprobs": r.logprobs, "finished": r.finished, "parts": parts,
        "sufficient": verdict.sufficient, "judge": verdict.error or verdict.explanation}


# ------------------------------------------------------------------------------------------------ held-out table

@torch.no_grad()
def evaluate(policy: Qwen2_5_VL, held: Examples, judge: Judge, stop: Callable[[str], None], settings: Settings,
             temperature: float, world: World) -> dict[str, dict]:
    """One response to each held-out record, greedy (temperature 0) or sampled, on all ranks together.

    Returns percentages with intervals, {"perception": {"value", "low", "high", "n"}, …, "answer", "format"}. Only a
    metric of 1 counts as a right answer. `stop` is for `check_verdicts`. The toy world has an exact judge.
    """
    judge = Judge(rewards.rule_judge, settings.refuse_leaks) if data.is_toy(held.records) else judge
    rows, size = [], settings.questions * settings.group_size                 # as many responses at once as in a step
    mine = [[*range(i, min(i + size, len(held)))][world.rank::world.size] for i in range(0, len(held), size)]
    with model.gathered(policy):
        for examples in tqdm(held.prefetch(mine), total=len(mine), desc="evaluating", unit="batch", leave=False,
                             disable=not world.first):
            groups = rollout(policy, examples, held.vocabulary, settings, "evaluation", 1, temperature)
            verdicts = start_judging(judge, groups)()
            check_verdicts(verdicts, stop, settings, world)
            for (r,), parts in zip(groups, reward_tensor(groups, verdicts, settings)[:, 0].tolist()):
                *before, (answer, _, _) = parts              # (K, 3)
                rows.append([*(accuracy for accuracy, _, _ in before), answer > 1 - 1e-9, all(r.parsed.formats)])
    columns, result = [segment.name for segment in SEGMENTS[:-1]] + ["answer", "format"], {}
    rows = sum(world.gather(rows), [])
    for i, name in enumerate(columns):
        known = [float(row[i]) for row in rows if not math.isnan(row[i])]
        low, high = wilson(sum(known) / max(1, len(known)), max(1, len(known)))
        result[name] = {"value": 100 * sum(known) / max(1, len(known)), "low": 100 * low, "high": 100 * high,
                        "n": len(known)}
    pairs = Counter((row[0] > 1 - 1e-9, row[-2]) for row in rows if not math.isnan(row[0]))   # first segment, answer
    result["answer"]["crossed"] = [[pairs[True, True], pairs[True, False]], [pairs[False, True], pairs[False, False]]]
    return result


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): unlike share ± 2 s it stays in [0, 1] and is right near its ends."""
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def results_table(results: dict[str, dict[str, dict]]) -> str:
    """{"SFT, greedy": what `evaluate` returned, …} as a table, one row a model and way of sampling."""
    columns = list(next(iter(results.values())))
    rows = [["percent of held-out clips, with 95 % intervals", *columns]]
    for title, result in results.items():
        rows.append([title, *(f"{c['value']:.1f} ({c['low']:.1f}–{c['high']:.1f})" for c in result.values())])
    return "\n".join(data.format_table(rows))


def compare_models(settings: Settings, run: sft.Run, toy: bool, world: World) -> str:
    """The held-out table: the model before SFT (toy world), after SFT, and this run's."""
    vocabulary = data.Vocabulary(settings.model)
    held = run.examples(data.read_records(settings.heldout), vocabulary, model.read_config(settings.model))
    _, judge = load_judge(settings, run, vocabulary, world)
    models = {"base": newest_checkpoint(Path(settings.out) / "base")} if toy else {}
    models |= {"SFT": Path(settings.model), run.folder.name: run.last_checkpoint}
    results = {}
    for name, path in models.items():
        policy = model.build_model(path, vocabulary, world, shards=settings.shards, frozen=True)
        for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            results[f"{name}, {how}"] = evaluate(policy, held, judge, sys.exit, settings, temperature, world)
    if world.first:
        data.write_atomically(run.folder / "results.json", json.dumps(results, indent=1) + "\n")
    return results_table(results)


# ------------------------------------------------------------------------------------------------ from flags to a table

def run_stage(settings: Settings, world: World) -> None:
    """Finds the files (in the toy world it makes them, SFT included), runs or continues PA-GRPO, then evaluates where
    there are held-out records. SystemExit if it cannot start."""
    toy, settings = not settings.data, sft.find_start(settings, world)
    are_toy = [data.is_toy(data.read_records(file)) for file in (settings.data, settings.heldout) if file]
    if settings.judge == "rule" and not are_toy[0]:          # a damaged file has been named by now
        raise SystemExit("--judge rule knows toy questions only: choose reference, a folder or an http address")
    if settings.eval_every and not settings.heldout:
        raise SystemExit("--eval-every needs --heldout, a record file that is not trained on")
    folder = Path(settings.out) / STAGES[settings.advantage]
    run = sft.Run(folder, settings, settings.steps, settings.questions, world)
    if run.finished and (results := world.on_rank0(lambda: sft.read_json(run.folder / "results.json"))):
        return world.print0(f"{run.folder} is finished:\n{results_table(results)}")
    if not run.finished:
        train(*prepare(settings, run, world))
        gc.collect()                                         # FSDP modules are reference cycles: free the policy now
        torch.cuda.empty_cache()
    if settings.heldout:
        world.print0(compare_models(settings, run, toy, world))
    else:
        world.print0(f"PA-GRPO is finished: {run.last_checkpoint}. Evaluate it with eval.py --bench.")
    world.print0(world.on_rank0(lambda: sft.report(run.folder)))


def main(argv: Sequence[str] | None = None) -> None:
    sft.launch(run_stage, Settings, PRESETS, argv, __doc__)


if __name__ == "__main__":
    main()
