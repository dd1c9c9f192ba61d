"""Stage 2, PA-GRPO: reinforcement learning with separate rewards and advantages for looking and thinking (eq. 3–7).

    python pagrpo.py                                     the toy world on any machine: clips, SFT, PA-GRPO, table
    torchrun --nproc_per_node=8 pagrpo.py                the 7b preset: the paper's settings on eight GPUs

One step, in the order of this file:
    1. rollout      sample G responses to each question, with the log-probabilities they were sampled with
    2. rewards      R_P = does the observation suffice (judge) + format + length;  R_R = is the answer right + …
    3. advantages   each segment's rewards are normalised in their own group:      A_P, A_R            (eq. 6)
    4. loss         A_P reaches the observation's tokens, A_R those of think and answer, a KL term holds
                    the policy near the frozen SFT model                                               (eq. 7)
    5. update       AdamW, one step for all questions of all ranks

"Loss is 0, is it broken?" No: with one update per rollout the ratio is 1, and the advantages of a group add up to 0,
so without the KL term the loss is about 0 by construction. Its gradient is not: watch the rewards.
"""
import json
import math
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

import sft
from data import (HTTP, Example, Examples, InputSettings, JudgeSettings, Record, Vocabulary, check_minimum, blind_answers,
                  claim_about, collate, flag, is_toy, make_judge, question_uniforms, read_records, format_table,
                  step_indices, write_atomically)
from model import Qwen2_5_VL, build_model, gathered, newest_checkpoint, read_config
from rewards import (PATIENCE, PROBLEM_TYPES, Claim, Judge, Parsed, SegmentReward, Verdict, parse, perception_tokens,
                     response_rewards, rule_judge, task_metric, read_jsonl)
from sft import (TINY, Run, TrainSettings, World, grad_norm_metrics, learning_rate, make_optimizer, memory_metrics,
                 micro_batches, optimizer_step, prepare_toy, read_json, require_files)


@dataclass(frozen=True)
class Settings(TrainSettings, JudgeSettings):
    model: str = flag("", "SFT checkpoint to start from; it stays the KL reference (toy: SFT is run when missing)")
    steps: int = flag(1000, "batches of rollouts; each makes --updates-per-rollout optimizer steps")
    questions: int = flag(8, "questions in one step, over all ranks; whole questions go to ranks")
    group_size: int = flag(8, "G, responses sampled to each question")
    max_response: int = flag(768, "tokens after which a response is cut off")
    temperature: float = flag(1.0, "of sampling and of scoring: the policy that acts is the policy that learns")
    advantage: str = flag("pa", "pa: each segment its own (paper); grpo: R_R on all tokens; joint: R_P + R_R on all",
                          ["pa", "grpo", "joint"])
    token_mean: str = flag("response", "response: one mean over a response's tokens; segment: one in each, added",
                           ["response", "segment"])
    reward_off: str = flag("none", "leaves a reward out; the paper's row without perception reward is --advantage grpo",
                           ["none", "perception", "reasoning", "length"])
    perception_window: tuple = flag((128, 320), "tokens of an observation that earn the length reward")
    reasoning_window: tuple = flag((320, 512), "tokens of think and answer that earn the length reward")
    kl_beta: float = flag(0.04, "weight of the KL term; at 0 the reference is not scored, nor loaded unless it judges")
    clip_eps: float = flag(0.2, "the ratio counts between 1 - this and 1 + this; bites with several updates only")
    updates_per_rollout: int = flag(1, "optimizer steps on one batch of rollouts")
    transcript_every: int = flag(50, "steps between printed transcripts")
    offload_reference: bool = flag(False, "keep the KL reference in host memory: less on the GPU, more copying")

    def __post_init__(self):
        TrainSettings.__post_init__(self)
        JudgeSettings.__post_init__(self)
        check_minimum(self, questions=1, group_size=2, max_response=1, updates_per_rollout=1, transcript_every=1, steps=1,
                 kl_beta=0, clip_eps=0)
        if self.judge.startswith(HTTP) and self.patience * 60 < PATIENCE + self.timeout:
            raise SystemExit(f"--patience must leave a judge its time: {(PATIENCE + self.timeout) / 60:.1f} minutes")
        if not self.temperature > 0:
            raise SystemExit("--temperature must be above 0: a policy that cannot vary cannot learn")


REAL = dict(data="data/videop2r/*RL*.json*", media="data/Video-R1-data", judge="reference")
PRESETS = {
    "tiny": TINY | dict(questions=16, micro_batch=16, steps=300, lr=1.5e-4, warmup=15, max_response=64,
                        perception_window=(8, 16), reasoning_window=(10, 48)),
    "3b": REAL | dict(model="runs/3b/sft"),
    "7b": REAL | dict(model="runs/7b/sft"),
}


STAGES = {"pa": "pagrpo", "grpo": "grpo", "joint": "joint"}  # an advantage's folder in the run


# ------------------------------------------------------------------------------------------------ 1. rollout

@dataclass
class Response:
    """One response, from sampling to loss."""
    example: Example
    tokens: list[int]                                        # with the stop token, if it came to one
    logprobs: Tensor                                         # (T,) as sampled
    finished: bool                                           # False: cut off at the token limit
    text: str
    parsed: Parsed
    boundary: int | None                                     # tokens of the perception segment; None: never closed
    perception: SegmentReward | None = None
    reasoning: SegmentReward | None = None
    advantages: tuple[float, float] = (0.0, 0.0)             # A_P, A_R
    verdict: Verdict | None = None                           # of the judge


def rollout(model: Qwen2_5_VL, examples: Sequence[Example], vocabulary: Vocabulary, settings: Settings, group: int,
            temperature: float, stream: str, device, top_p: float = 1.0) -> list[list[Response]]:
    """Samples `group` responses to each question. `stream` names the random numbers: a step, or an evaluation."""
    uniforms = torch.stack([question_uniforms(settings.seed, stream, e.record, group, settings.max_response)
                            for e in examples])
    sampled = model.generate(collate(examples).to(device), uniforms, vocabulary.stop_ids, temperature, top_p)
    tokens, lengths, logprobs, finished = (x.cpu() for x in sampled)
    groups = []
    for b, example in enumerate(examples):
        groups.append([])
        for g in range(group):
            ids = tokens[b, g, :lengths[b, g]].tolist()
            text = vocabulary.decode(ids)
            groups[-1].append(Response(example, ids, logprobs[b, g, :len(ids)], bool(finished[b, g]), text, parse(text),
                                      perception_tokens([vocabulary.bytes[i] for i in ids])))
    return groups


# ------------------------------------------------------------------------------------------------ 2. rewards

def ask(responses: Sequence[Response], judge: Judge) -> Callable[[], list[Verdict]]:
    """Sends all observations to the judge together and does not wait. Call the result for a verdict on each episode."""
    claims = {i: claim_about(e.example.record, e.parsed.observation) for i, e in enumerate(responses)
              if e.parsed.observation is not None}
    answer, unclosed = judge.start(list(claims.values())), Verdict(False, "there is no closed observation")

    def verdicts() -> list[Verdict]:
        found = dict(zip(claims, answer(), strict=True))
        return [found.get(i, unclosed) for i in range(len(responses))]
    return verdicts


def reward(responses: Sequence[Response], verdicts: Sequence[Verdict], settings: Settings) -> None:
    """Fills in verdicts, R_P and R_R (eq. 3–5)."""
    for e, verdict in zip(responses, verdicts, strict=True):
        r, boundary = e.example.record, e.boundary or 0
        score = task_metric(r.problem_type, e.parsed.answer, r.reference, r.options)
        e.verdict, tokens = verdict, (boundary, len(e.tokens) - boundary)
        e.perception, e.reasoning = response_rewards(e.parsed, verdict.sufficient, score, e.finished, tokens,
                                                     (settings.perception_window, settings.reasoning_window))


def reference_judge(reference: Qwen2_5_VL, vocabulary: Vocabulary, settings: Settings, world: World
                    ) -> Callable[[list[Claim]], list[Verdict]]:
    """The frozen SFT model as judge (`data.blind_answers`). All ranks gather its weights together, also a rank that has
    no claims."""
    def decide(claims: list[Claim]) -> list[Verdict]:
        with gathered(reference):
            return blind_answers(reference, vocabulary, claims, settings, settings.max_response,
                                 settings.group_size * settings.micro_batch, world.device)
    return decide


def totals(group: Sequence[Response], off: str) -> tuple[Tensor, Tensor]:
    """R_P and R_R of a group's responses, (G,) each, without what an ablation leaves out."""
    total = lambda r: r.total - r.length if off == "length" else r.total
    return (torch.tensor([0.0 if off == "perception" else total(e.perception) for e in group]),
            torch.tensor([0.0 if off == "reasoning" else total(e.reasoning) for e in group]))


# ------------------------------------------------------------------------------------------------ 3. advantages

def normalize(rewards: Tensor) -> Tensor:
    """Group-relative advantages (eq. 6): (R - mean) / (unbiased std + 1e-4). rewards (…, G) → (…, G)

    A group whose rewards are all equal says nothing about what was better: its advantages are 0. An unknown reward
    (NaN) leaves the statistics of its group and gets no advantage; with fewer than two known ones nobody gets any.
        [2, 2, 1, 1] → [+0.87, +0.87, -0.87, -0.87]        [2, NaN, 1, 1] → [+1.15, 0, -0.58, -0.58]
    """
    known = ~rewards.isnan()
    count, total = known.sum(-1, keepdim=True), lambda x: torch.where(known, x, 0.0).sum(-1, keepdim=True)
    mean = total(rewards) / count.clamp(min=1)
    std = (total((rewards - mean) ** 2) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(known & (std >= 1e-6), (rewards - mean) / (std + 1e-4), 0.0)   # one known reward: std 0


def group_advantages(perception: Tensor, reasoning: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """A_P and A_R of a group from R_P and R_R, (G,) each.

    pa     each segment normalised in its own group: the paper
    grpo   R_R for both: ordinary process-agnostic GRPO, which never asks whether the look was right
    joint  R_P + R_R for both: both rewards, no separation
    """
    if mode == "pa":
        return normalize(perception), normalize(reasoning)
    both = normalize(reasoning if mode == "grpo" else perception + reasoning)
    return both, both


# ------------------------------------------------------------------------------------------------ 4. loss

class Tokens(NamedTuple):
    """A micro-batch of B questions with G responses each, as the loss needs it."""
    tokens: Tensor                                           # (B, G, T)
    lengths: Tensor                                          # (B, G)
    sampled: Tensor                                          # (B, G, T) log-probabilities at sampling
    advantages: Tensor                                       # (B, G, T) A_P on the observation, A_R behind it
    weights: Tensor                                          # (B, G, T) share of a token in its response's mean


def to_tokens(groups: Sequence[Sequence[Response]], token_mean: str, device) -> Tokens:
    """Lays responses out as tensors. A response without a boundary carries the mean of both advantages everywhere.

    5 tokens, boundary 2, A = (+1, -1): advantages [+1, +1, -1, -1, -1]
    weights, one mean a response: [1/5, 1/5, 1/5, 1/5, 1/5]; one mean a segment: [1/2, 1/2, 1/3, 1/3, 1/3]
    """
    # At least two places: for one, `logprobs` skips its second pass, and sharded ranks must all run the same passes.
    b, g, t = len(groups), len(groups[0]), max(2, *(len(e.tokens) for group in groups for e in group))
    tokens, lengths = torch.zeros(b, g, t, dtype=torch.long), torch.zeros(b, g, dtype=torch.long)
    sampled, advantages, weights = torch.zeros(3, b, g, t)
    for i, group in enumerate(groups):
        for j, e in enumerate(group):
            n, p, (a_p, a_r) = len(e.tokens), e.boundary, e.advantages
            tokens[i, j, :n], lengths[i, j], sampled[i, j, :n] = torch.tensor(e.tokens), n, e.logprobs
            if p is None:
                advantages[i, j, :n], weights[i, j, :n] = (a_p + a_r) / 2, 1 / n
            else:
                advantages[i, j, :p], advantages[i, j, p:n] = a_p, a_r
                by_segment = token_mean == "segment" and p < n
                weights[i, j, :p] = 1 / p if by_segment else 1 / n
                weights[i, j, p:n] = 1 / (n - p) if by_segment else 1 / n
    return Tokens(*(x.to(device) for x in (tokens, lengths, sampled, advantages, weights)))


def pa_grpo_loss(logprobs: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, weights: Tensor,
                 clip_eps: float, kl_beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped objective with a KL term (eq. 7), summed over responses. All inputs (B, G, T), 0 after the end.

    Departures from eq. 7 as printed. There, ρ is the ratio of a whole segment's probabilities, and no length divides
    it: over hundreds of tokens such a ratio leaves [1 - ε, 1 + ε] at once, and long responses outweigh short ones. Here
    each token has its own ratio and `weights` make one mean over a response, as in the code the authors build on. With
    one update per rollout the ratio is 1 either way, and the gradient differs by that mean only. The KL term stands
    inside the same mean; it is the k3 estimate e^d - d - 1 with d = log π_ref - log π, clamped to ±10.

    Two tokens with log-probability -1 now and before, the reference at -1 and -1.5, A = (+1, -1), weights (1/2, 1/2),
    ε 0.2, β 0.04:  ρ = 1, 1 → objective +1, -1;  d = 0, -0.5 → KL 0, 0.1065
        loss = 1/2 (-1 + 0.04 · 0) + 1/2 (+1 + 0.04 · 0.1065) = 0.00213
    The loss is nearly 0, its gradient is not: d loss / d logprobs = (-1/2, 1/2 + 0.02 (1 - e^-0.5)) = (-0.5, 0.508).

    Returns the loss (a sum: divide it by the responses of the whole step), KL and "was clipped" of each token.
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

class Part(NamedTuple):
    """A micro-batch of questions with their groups, scored by what does not learn in this step."""
    groups: list[list[Response]]
    inputs: tuple                                            # what `logprobs` takes
    weight: float                                            # 0 for the blank that keeps a rank in step
    reference: Tensor | None                                 # (B, G, T) log-probabilities under the KL reference
    old: Tensor | None                                       # (B, G, T) and before the first of several updates


@torch.no_grad()
def score(groups: list[list[Response]], policy: Qwen2_5_VL, reference: Qwen2_5_VL | None, vocabulary: Vocabulary,
          settings: Settings, world: World) -> list[Part]:
    """Cuts a step into micro-batches and computes what needs no rewards, while the judge is at work."""
    parts, waiting = [], iter(groups)
    asked = [group[0].example for group in groups]
    for examples, weight in micro_batches(asked, settings.micro_batch, world, policy, vocabulary):
        nothing = Response(examples[0], vocabulary.stop_ids[:1], torch.zeros(1), True, "", parse(""), None)
        here = [next(waiting) for _ in examples] if weight else [[nothing]]
        batch = to_tokens(here, settings.token_mean, world.device)
        inputs = collate(examples).to(world.device), batch.tokens, batch.lengths, settings.temperature
        parts.append(Part(here, inputs, weight, reference.logprobs(*inputs)[0] if settings.kl_beta else None,
                          policy.logprobs(*inputs)[0] if settings.updates_per_rollout > 1 else None))
    return parts


def train_on(parts: list[Part], policy: Qwen2_5_VL, optimizer, lr: float, settings: Settings, world: World
             ) -> dict[str, list[float]]:
    """One or more updates on a step's responses. Returns what is worth logging, a value a token or an update."""
    seen = defaultdict(list)
    count = sum(len(group) for part in parts for group in part.groups if part.weight)
    responses = world.all_reduce_sum({"n": count})["n"]                 # one denominator for the whole step
    for number in range(settings.updates_per_rollout):
        for groups, inputs, weight, ref, old in parts:
            batch = to_tokens(groups, settings.token_mean, world.device)      # by now with advantages
            logprobs, entropy = policy.logprobs(*inputs)
            old = logprobs.detach() if old is None else old  # a single update: old = current, the ratio is 1
            loss, kl, was_clipped = pa_grpo_loss(logprobs, old, ref, batch.advantages, batch.weights,
                                                 settings.clip_eps, settings.kl_beta)
            (loss * weight * world.size / max(1, responses)).backward()       # FSDP averages over ranks: undo that
            if weight:
                real = torch.arange(batch.tokens.shape[-1], device=world.device) < batch.lengths[..., None]
                values = {"kl": kl, "entropy": entropy}
                if number or settings.updates_per_rollout == 1:               # at the first update nothing can clip
                    values["clip_share"] = was_clipped.float()
                if number == 0:                              # before any update, what is scored is what was sampled
                    seen["loss"].append(float(loss.detach()))
                    values["logprob_gap"] = (logprobs.detach() - batch.sampled).abs()
                for name, x in values.items():
                    seen[name] += x[real].tolist()
        seen["grad_norm"].append(optimizer_step(policy, optimizer, lr, settings.clip_norm))
    return seen


REWARD_PARTS = [f"{segment}/{part}" for segment in ("perception", "reasoning")
                for part in ("reward", "accuracy", "format", "length", "tokens")]
SHARES = ["perception/zero_variance", "reasoning/zero_variance", "truncated", "judge/leak"]
OF_TOKENS = ["kl", "clip_share", "entropy", "logprob_gap"]


def statistics(groups: list[list[Response]], settings: Settings) -> dict[str, list[float]]:
    """Every reward part of every segment, one value a response, and the shares that say how much of it can teach."""
    values = defaultdict(list)
    for group in groups:
        for segment, rewards in zip(("perception", "reasoning"), totals(group, settings.reward_off)):
            values[f"{segment}/zero_variance"].append(float(not normalize(rewards).any()))
            for e, total in zip(group, rewards.tolist()):
                for name, value in {"reward": total, **asdict(getattr(e, segment))}.items():
                    values[f"{segment}/{name}"] += [float(value)] * (not math.isnan(value))   # unknown: not a zero
        values["truncated"] += [float(not e.finished) for e in group]
        for e in group:
            if e.parsed.observation is not None:
                values["judge/leak"].append(float(e.verdict.leak))
    return values


def pooled(values: dict[str, list[float]], keys: list[str], world: World, spread: bool = False) -> dict[str, float]:
    """Means over the values of all ranks, and with `spread` their standard deviations too."""
    sums = world.all_reduce_sum({f"{k} {p}": sum(x ** p for x in values.get(k, ())) for k in keys for p in (0, 1, 2)})
    result = {}
    for k in keys:
        n, total, squares = (sums[f"{k} {p}"] for p in (0, 1, 2))
        result[k] = total / max(1, n)
        if spread:
            result[k + "_std"] = math.sqrt(max(0.0, squares / max(1, n) - result[k] ** 2))
    return result


def compare_with_rule(exact: Judge, responses: Sequence[Response], world: World) -> dict[str, float]:
    """How often the judge said what the toy world's exact rule says, and how often it took too little for enough."""
    pairs = [(e.verdict.sufficient, rule.sufficient) for e, rule in zip(responses, ask(responses, exact)())
             if e.parsed.observation is not None and e.verdict.sufficient is not None]
    values = {"judge/agreement": [float(a == b) for a, b in pairs], "judge/too_kind": [float(a > b) for a, b in pairs]}
    return pooled(values, list(values), world)


class JudgeDown(ValueError):
    """Too many verdicts of a step are unknown to learn from it."""


def enough_verdicts(groups: list[list[Response]], settings: Settings, world: World) -> dict[str, int]:
    """Counts verdicts. Raises JudgeDown, on all ranks alike, if a larger share than --max-unknown is unknown."""
    verdicts = [e.verdict for group in groups for e in group if e.parsed.observation is not None]
    unknown = [v.error for v in verdicts if v.sufficient is None]
    counts = {k: int(n) for k, n in world.all_reduce_sum({"judge/claims": len(verdicts), "judge/unknown": len(unknown)}).items()}
    if counts["judge/unknown"] > settings.max_unknown * counts["judge/claims"]:
        reason = Counter(unknown).most_common(1)[0][0][:200] if unknown else "see the other ranks"
        raise JudgeDown(f"{counts['judge/unknown']} of {counts['judge/claims']} verdicts stayed unknown, "
                        f"more than --max-unknown {settings.max_unknown:g} allows. Most often: {reason}")
    return counts


def act(step: int, examples: list[Example], policy: Qwen2_5_VL, reference: Qwen2_5_VL | None, vocabulary: Vocabulary,
        judge: Judge, exact: Judge | None, settings: Settings, world: World
        ) -> tuple[list[list[Response]], list[Part], dict[str, float]]:
    """Parts 1 to 3 of a step: responses with rewards and advantages, in groups and micro-batches, and how long it took.
    The judge works while the reference scores, and `exact`, where there is one, says how far it can be believed."""
    watch, before = [time.perf_counter()], Counter(judge.counts)
    with gathered(policy):
        groups = rollout(policy, examples, vocabulary, settings, settings.group_size, settings.temperature,
                         f"step {step}", world.device) if examples else []
    watch.append(time.perf_counter())
    responses = [e for group in groups for e in group]
    verdicts = ask(responses, judge)                          # a judge behind http now works beside us,
    watch.append(time.perf_counter())                        # any other one is through here
    parts = score(groups, policy, reference, vocabulary, settings, world)
    watch.append(time.perf_counter())
    reward(responses, verdicts(), settings)
    counts = enough_verdicts(groups, settings, world)        # waits for the judges of the other ranks, too
    watch.append(time.perf_counter())
    for group in groups:
        a_p, a_r = group_advantages(*totals(group, settings.reward_off), settings.advantage)
        for e, *pair in zip(group, a_p.tolist(), a_r.tolist()):
            e.advantages = tuple(pair)
    sampling, judging, scoring, waiting = (b - a for a, b in zip(watch, watch[1:]))
    asked = world.all_reduce_sum({f"judge/{k}": judge.counts[k] - before[k] for k in ("requests", "retries", "cached")})
    return groups, parts, {"seconds_sampling": sampling, "seconds_scoring": scoring,
                           "seconds_judging": judging + waiting, "judge/seconds": world.all_reduce_max(judge.seconds),
                           **counts, **{name: int(n) for name, n in asked.items()},
                           **(compare_with_rule(exact, responses, world) if exact else {})}


def learn(groups: list[list[Response]], parts: list[Part], policy: Qwen2_5_VL, optimizer, lr: float, settings: Settings,
          world: World) -> dict[str, float]:
    """Parts 4 and 5 of a step. Returns the step's metrics, the same on every rank."""
    began = time.perf_counter()
    seen = train_on(parts, policy, optimizer, lr, settings, world)
    seconds = time.perf_counter() - began
    counts = world.all_reduce_sum({"tokens": sum(len(e.tokens) for g in groups for e in g), "questions": len(groups),
                        "loss": sum(seen["loss"])})
    values = statistics(groups, settings)
    return {**pooled(values, REWARD_PARTS, world, spread=True), **pooled(values, SHARES, world),
            **pooled(seen, OF_TOKENS, world), "logprob_gap_max": world.all_reduce_max(max(seen["logprob_gap"], default=0.0)),
            "loss": counts["loss"] / max(1, counts["questions"] * settings.group_size),
            **grad_norm_metrics(seen["grad_norm"]), "lr": lr, "questions": int(counts["questions"]),
            "tokens": int(counts["tokens"]), "seconds_training": seconds,
            **memory_metrics(world)}


def transcript(e: Response) -> str:
    """A response as a person reads it: what was asked, said, right, and what it was worth."""
    r, p, q = e.example.record, e.perception, e.reasoning
    part = lambda s: f"accuracy {s.accuracy:.2f} + format {s.format:.0f} + length {s.length:.1f} ({s.tokens} tokens)"
    says = {True: "Yes", False: "No", None: "unknown"}[e.verdict.sufficient]
    lines = [f"── {r.path}  {r.problem_type} ".ljust(100, "─"),
             f"question    {r.question}  {'  '.join(r.options)}".rstrip(), f"reference   {r.reference}",
             e.text.strip() + ("" if e.finished else " … (cut off)"),
             f"judge       {says}: {' '.join(filter(None, (e.verdict.error, e.verdict.explanation)))}",
             f"perception  {part(p)} → advantage {e.advantages[0]:+.2f}",
             f"reasoning   {part(q)} → advantage {e.advantages[1]:+.2f}"]
    return "\n".join(lines + ["─" * 100])


# ------------------------------------------------------------------------------------------------ held-out evaluation

@torch.no_grad()
def evaluate(model: Qwen2_5_VL, examples: Examples, judge: Judge, settings: Settings, temperature: float, world: World,
             top_p: float = 1.0) -> list[dict]:
    """One response to each record, greedy (temperature 0) or sampled. Returns one row a record, on every rank those it
    had: perception and answer are right or not, formats hold or not."""
    batch = settings.questions * settings.group_size         # as many responses at once as in a step
    rows, steps = [], range(0, len(examples), batch)
    mine = [[*range(i, min(i + batch, len(examples)))][world.rank::world.size] for i in steps]
    with gathered(model):
        for part in tqdm(examples.prefetch(mine), total=len(mine), desc="evaluating", unit="batch", leave=False,
                         disable=not world.first):
            groups = rollout(model, part, examples.vocabulary, settings, 1, temperature, "evaluation", world.device,
                             top_p) if part else []
            responses = [e for group in groups for e in group]
            reward(responses, ask(responses, judge)(), settings)
            enough_verdicts(groups, settings, world)
            rows += [{"problem_id": e.example.record.problem_id, "problem_type": e.example.record.problem_type,
                      "perception": e.perception.accuracy, "answer": float(e.reasoning.accuracy > 1 - 1e-9),
                      "score": e.reasoning.accuracy, "format": e.perception.format * e.reasoning.format,
                      "text": e.text} for (e,) in groups]
    return rows


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): unlike share ± 2 s it stays in [0, 1] and is right near its ends."""
    if n == 0:
        return 0.0, 1.0
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def summary(rows: list[dict], world: World) -> dict[str, dict[str, float]]:
    """Shares in percent with their intervals: {"perception": {"value", "low", "high", "n"}, "answer": …, by type …}."""
    kinds = {"perception": ("perception", None), "answer": ("answer", None), "format": ("format", None)}
    kinds |= {f"answer: {t}": ("answer", t) for t in PROBLEM_TYPES}
    sums = world.all_reduce_sum({f"{kind} {p}": sum(row[key] ** p for row in rows if t in (None, row["problem_type"])
                                             and not math.isnan(row[key]))    # an unknown verdict counts for nothing
                      for kind, (key, t) in kinds.items() for p in (0, 1)})
    result = {}
    for kind in kinds:
        n, right = int(sums[f"{kind} 0"]), sums[f"{kind} 1"]
        if n:
            low, high = wilson(right / n, n)
            result[kind] = {"value": 100 * right / n, "low": 100 * low, "high": 100 * high, "n": n}
    return result


def table(results: dict[str, dict[str, dict]]) -> str:
    """{"SFT, greedy": summary, …} as a table, one row a model and way of sampling."""
    kinds = list(dict.fromkeys(k for r in results.values() for k in r))
    cell = lambda v: f"{v['value']:5.1f} ({v['low']:.0f}–{v['high']:.0f})" if v else "–"
    rows = [["", *(k.removeprefix("answer: ") for k in kinds)]]
    rows += [[name, *(cell(result.get(k)) for k in kinds)] for name, result in results.items()]
    n = max(v["n"] for r in results.values() for v in r.values())
    title = f"Percent of {n} held-out clips, with 95 % intervals (Wilson); answers by problem type at the right"
    return "\n".join([title, *format_table(rows)])


# ------------------------------------------------------------------------------------------------ the run

def train(settings: Settings, world: World) -> None:
    """Runs or continues PA-GRPO, then evaluates where there are held-out records."""
    toy = not settings.data
    if toy:
        same = {f.name: getattr(settings, f.name) for f in fields(InputSettings)}
        begin = settings.model or sft.train(
            sft.Settings(**(sft.PRESETS[settings.preset] | same | dict(out=settings.out, seed=settings.seed, preset=settings.preset))), world)
        made = prepare_toy(settings, world) | dict(data=f"{settings.out}/toy/rl.json", model=str(begin))
        settings = replace(settings, **made)
    settings = require_files(settings)
    start = world.on_rank0(lambda: newest_checkpoint(settings.model))
    if start != Path(settings.model) and (state := read_json(start / "state.json"))["step"] < state["steps"]:
        raise SystemExit(f"{settings.model} is not finished: {start.name} is the newest of {state['steps']} steps. "
                         f"Finish it first, or start from this one with --model {start}")
    folder = Path(settings.out) / STAGES[settings.advantage]
    settings = replace(settings, model=str(start))           # saved with the run: the reference stays this checkpoint
    records = read_records(settings.data)
    if settings.judge == "rule" and not is_toy(records):
        raise SystemExit("--judge rule knows toy questions only: sample_token reference, a folder or an http address")
    if settings.eval_every and not settings.heldout:
        raise SystemExit("--eval-every needs --heldout, a record file that is not trained on")
    run, report = Run(folder, settings, settings.steps, settings.questions, world), folder / "results.json"
    if run.finished and (results := world.on_rank0(lambda: read_json(report))):
        return world.print0(f"{folder} is finished:\n{table(results)}")
    if run.finished and not settings.heldout:
        return world.print0(f"PA-GRPO is finished: {run.last_checkpoint}. Evaluate it with eval.py --bench.")
    vocabulary = Vocabulary(start)
    reference = build_model(start, vocabulary, world, shards=settings.shards, frozen=True,
                            offload=settings.offload_reference) if (
        settings.kl_beta or settings.judge == "reference") else None          # the SFT model, also after a resume
    judge = make_judge(settings, folder / f"judge-{world.rank}.jsonl", reference and reference_judge(
        reference, vocabulary, settings, world), str(world.device))
    exact = Judge(rule_judge, settings.refuse_leaks) if settings.judge != "rule" and is_toy(records) else None
    if settings.judge == "reference":
        world.print0(ABOUT_REFERENCE)
    held = Examples(read_records(settings.heldout) if settings.heldout else [], settings.media, vocabulary,
                    read_config(start), settings, folder / "skipped.log")
    examiner = Judge(rule_judge, settings.refuse_leaks) if is_toy(held.records) else judge   # exact where there is such
    look = lambda model, temperature=0.0: evaluate(model, held, examiner, settings, temperature, world)
    if not run.finished:
        reinforce(records, start, reference, run, vocabulary, judge, exact, look, settings, world)
    if exact and world.first:
        print(agreement(run, settings.judge))
    if not settings.heldout:
        return world.print0(f"PA-GRPO is finished: {run.last_checkpoint}. Evaluate it with eval.py --bench.")
    models = {"base": Path(settings.out) / "base"} if toy else {}
    models |= {"SFT": start, folder.name: run.last_checkpoint}
    results = {}
    for name, path in models.items():
        model = build_model(path, vocabulary, world, shards=settings.shards, frozen=True)
        for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            results[f"{name}, {how}"] = summary(look(model, temperature), world)
    if world.first:
        write_atomically(report, json.dumps(results, indent=1) + "\n")
    world.print0(table(results))


ABOUT_REFERENCE = ("Judge: the KL reference, answering from the observation alone. The paper asked a large language "
                   "model; here weak reasoning is blamed on perception and a hidden answer may pass, at the price of "
                   "one more generation without video for each response. Others: --judge FOLDER or https://…/v1.")


def agreement(run: Run, name: str) -> str:
    """How often a judge and the toy world's exact rule said the same, over a whole run."""
    rows, _ = read_jsonl(run.folder / "metrics.jsonl")
    known = [row["judge/claims"] - row["judge/unknown"] for row in rows]
    share = lambda key: sum(n * row[key] for n, row in zip(known, rows)) / max(1, sum(known))
    agreed, too_kind = share("judge/agreement"), share("judge/too_kind")
    return (f"Judge {name} agreed with the exact rule on {agreed:.1%} of {sum(known)} observations; it accepted "
            f"{too_kind:.1%} that do not suffice and refused {max(0, 1 - agreed - too_kind):.1%} that do.")


def reinforce(records: list[Record], start: Path, reference: Qwen2_5_VL | None, run: Run, vocabulary: Vocabulary,
              judge: Judge, exact: Judge | None, look: Callable[[Qwen2_5_VL], list[dict]], settings: Settings,
              world: World) -> None:
    """The loop: act, show, learn, log, save. `look` answers the held-out questions greedily."""
    policy = build_model(run.last_checkpoint or start, vocabulary, world, settings.save_memory, settings.shards)
    optimizer = make_optimizer(policy, settings)
    if run.step:
        run.restore(policy, optimizer)
    examples = Examples(records, settings.media, vocabulary, policy.config, settings, run.folder / "skipped.log")
    def stopped(error: JudgeDown, done: int) -> JudgeDown:
        if done > run.step:
            run.save(policy, optimizer, start, done)
        run.wait_for_writer()
        return JudgeDown(f"{error}. Stopped after step {done} of {run.steps}.")

    todo = range(run.step, run.steps)
    mine = (step_indices(len(records), settings.questions, s, settings.seed)[world.rank::world.size] for s in todo)
    with run.guard(), tqdm(total=run.steps, initial=run.step, desc=run.folder.name, unit="step",
                               disable=not world.first) as bar:
        for step, batch in zip(todo, examples.prefetch(mine)):
            try:
                groups, parts, times = act(step, batch, policy, reference, vocabulary, judge, exact, settings, world)
            except JudgeDown as error:
                raise stopped(error, step) from None
            run.end_of_step(step, policy, optimizer, start)     # a signal: rather the last step whole than this one late
            if groups and world.first and (step == run.step or step % settings.transcript_every == 0):
                tqdm.write(f"Before step {step + 1}, one of {settings.group_size} responses:\n"
                           + transcript(groups[0][0]))
            lr = learning_rate(step, run.steps, settings)
            metrics = times | learn(groups, parts, policy, optimizer, lr, settings, world)
            total = sum(v for k, v in metrics.items() if k.startswith("seconds"))
            found, score, down = {}, {}, None
            if settings.eval_every and (step + 1) % settings.eval_every == 0:
                try:
                    found = {f"heldout/{k}": v["value"] for k, v in summary(look(policy), world).items()}
                    score = {"score": found["heldout/answer"]}
                except JudgeDown as error:
                    down = error
            run.log({"step": step + 1, **metrics, "tokens_per_second": metrics["tokens"] / total,
                     "judge/share": metrics["seconds_judging"] / total,
                     "skipped": settings.questions - metrics["questions"], **found})
            if down:
                raise stopped(down, step + 1)
            bar.update()
            bar.set_postfix_str(f"perception {metrics['perception/accuracy']:.2f} "
                                f"answer {metrics['reasoning/accuracy']:.2f} KL {metrics['kl']:.3f}")
            if not metrics["questions"]:
                world.print0(f"Step {step + 1}: the media of none of its questions can be read; nothing was learned.")
            run.end_of_step(step + 1, policy, optimizer, start, **score)


def main(argv: Sequence[str] | None = None) -> None:
    sft.launch(train, Settings, PRESETS, argv, __doc__)


if __name__ == "__main__":
    main()
