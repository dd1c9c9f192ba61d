"""Stage 2, PA-GRPO: process-aware group-relative policy optimisation of VideoP2R (eq. 3–7).

    python pagrpo.py                                     the toy world: clips, SFT, PA-GRPO, table
    torchrun --nproc_per_node=8 pagrpo.py                the 7b preset: the paper's settings

GRPO samples G responses to a question and reinforces those with an above-average reward. PA-GRPO
gives each segment of a response, perception and reasoning, a reward and an advantage of its own.
A step is the loop in `train`:
    1. rollout      sample G responses to each question
    2. rewards      R_P = does the observation suffice (judge) + format + length,
                    R_R = is the answer right + format + length                         (eq. 3–5)
    3. advantages   the rewards of each segment are normalized in their own group         (eq. 6)
    4. loss         A_P reaches the tokens of the observation, A_R those of think and answer;
                    a KL term keeps the policy near the frozen SFT model                  (eq. 7)
    5. update       AdamW, one optimizer step for all questions of all ranks

Differences from the paper: a ratio for each token instead of each segment (`pa_grpo_loss` says
why), every rank samples instead of one GPU, `--judge` takes any model instead of Claude. From PPO:
no value network, since the mean of the group is the baseline, and one update per rollout, so that
the ratio is 1 (`--updates-per-rollout` makes more). From TRL: no rollout server, no LoRA, no reward
model, no other losses. They would hide the algorithm.

"Loss is 0, is it broken?" No. With one advantage per response (grpo, joint, gdpo) and one mean per
response, the advantages of a group sum to 0, and so does the loss, apart from the KL term. With one
advantage per segment (pa) it is small, since segments differ in length. Its value is not
informative, and its gradient is not 0: watch the rewards.
"""
from __future__ import annotations

import gc
import math
import statistics
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Iterator, Sequence

import data
import model
import rewards
import sft
import torch
from data import Example, Examples, Vocabulary, flag
from model import Qwen2_5_VL, newest_checkpoint
from rewards import SEGMENTS, Claim, Judge, Verdict
from sft import World, timed
from torch import Tensor
from tqdm import tqdm


# ------------------------------------------------------------------------------------- the loop

def train(policy: Qwen2_5_VL, reference: Qwen2_5_VL | None, optimizer: torch.optim.Optimizer,
          judge: Judge, questions: Examples, heldout: Examples, run: sft.Run, settings: Settings,
          world: World) -> None:
    """PA-GRPO: B questions of this rank (perhaps none), G responses to each, K segments."""
    vocabulary, thread = questions.vocabulary, ThreadPool(1)
    with run.guard():
        for step, examples in run.batches(questions):
            # 1. rollout
            with timed("sampling"):
                groups = rollout(policy, examples, vocabulary, settings, f"step {step}")

            # 2. rewards. A judge behind http answers in a thread while the reference is scored:
            # "judging" is the wait that is left.
            claims = [claim_of(response) for group in groups for response in group]
            asked = None
            if data.is_http(settings.judge):
                asked = thread.apply_async(judge, (claims,))
            ref_logprobs = score(reference, groups, vocabulary, settings, world)
            with timed("judging"):
                verdicts = asked.get() if asked else judge(claims)
            metrics, lost = check_verdicts(verdicts, claims, settings, world)
            if lost:                                         # on all ranks: saves and exits
                run.end_of_step(step, policy, optimizer, lost)
            parts = reward_tensor(groups, verdicts, settings)          # (B, G, K, 3)
            totals = total_rewards(parts, settings.reward_off)         # (B, G, K)

            # 3. advantages
            advantages = group_advantages(totals, settings.advantage)  # (B, G, K)

            # 4. loss, 5. update
            lr = sft.learning_rate(step, settings.steps, settings)
            values = update(policy, optimizer, lr, groups, advantages, ref_logprobs, vocabulary,
                            settings, world)

            metrics |= step_metrics(groups, parts, totals, values, settings, world)
            if settings.eval_every and run.evaluation_due(step + 1):
                metrics |= heldout_metrics(policy, heldout, judge, settings, world)
            show(step, policy, groups, verdicts, parts, ref_logprobs, vocabulary, run)
            metrics |= {"step": step + 1, "lr": lr}
            run.log(metrics, in_short(metrics))
            run.end_of_step(step + 1, policy, optimizer)


# ----------------------------------------------------------------------------------- 1. rollout

@dataclass
class Response:
    """One sampled response."""
    example: Example
    tokens: list[int]                                        # with the stop token, unless cut off
    segments: list[int]                                      # of each token, 0 … K - 1; K: unknown
    logprobs: Tensor                                         # (T,) when sampled
    finished: bool                                           # False: cut off at the token limit
    text: str
    parsed: rewards.Parsed


def rollout(policy: Qwen2_5_VL, examples: Sequence[Example], vocabulary: Vocabulary,
            settings: Settings, stream: str, group: int = 0, temperature: float | None = None,
            top_p: float = 1.0) -> list[list[Response]]:
    """Samples `group` responses (0: G) to each question. `stream` names the random numbers: a step,
    or an evaluation."""
    group = group or settings.group_size
    temperature = settings.temperature if temperature is None else temperature
    with model.gathered(policy):                             # once, on every rank
        if not examples:
            return []
        uniforms = []
        for example in examples:
            uniforms.append(data.question_uniforms(settings.seed, stream, example.record, group,
                                                   settings.max_response))
        prompts = data.collate(examples).to(next(policy.parameters()).device)
        sampled = policy.generate(prompts, torch.stack(uniforms), vocabulary.stop_ids, temperature,
                                  top_p)
    tokens, lengths, logprobs, finished = (x.cpu() for x in sampled)
    groups = []
    for b, example in enumerate(examples):
        groups.append([])
        for g in range(group):
            n = int(lengths[b, g])
            ids = tokens[b, g, :n].tolist()
            text = vocabulary.decode(ids)
            response = Response(
                example, ids,
                segments=rewards.segment_ids([vocabulary.bytes[i] for i in ids]),
                logprobs=logprobs[b, g, :n],
                finished=bool(finished[b, g]),
                text=text,
                parsed=rewards.parse(text))
            groups[b].append(response)
    return groups


# ----------------------------------------------------------------------------------- 2. rewards

def claim_of(response: Response) -> Claim:
    """What the judge of perception reads. An observation that does not parse is empty: a No
    without asking."""
    observation = response.parsed.contents["observation"] or ""
    return data.claim_about(response.example.record, observation)


def reward_tensor(groups: Sequence[Sequence[Response]], verdicts: Sequence[Verdict],
                  settings: Settings) -> Tensor:
    """R_acc, R_form and R_len of every segment (eq. 3–5), (B, G, K, 3). NaN: the judge's verdict is
    unknown."""
    responses, parts = sum(groups, []), []
    for response, verdict in zip(responses, verdicts, strict=True):
        parts.append(rewards.reward_parts(response, verdict, settings.windows))
    size = len(groups[0]) if groups else settings.group_size
    shape = len(groups), size, len(SEGMENTS), len(rewards.REWARD_PARTS)
    return torch.tensor(parts).view(shape)


def total_rewards(parts: Tensor, off: str) -> Tensor:
    """R of every segment, without what an ablation leaves out. (B, G, K, 3) → (B, G, K)"""
    accuracy, format, length = parts.unbind(-1)
    total = accuracy + format + (0 if off == "length" else length)
    keep = torch.tensor([segment.name != off for segment in SEGMENTS])
    return torch.where(keep, total, 0.0)


# -------------------------------------------------------------------------------- 3. advantages

def normalize(totals: Tensor) -> Tensor:
    """Group-relative advantages (eq. 6): (R - mean) / (unbiased std + 1e-4) over the group.
    (B, G, …) → (B, G, …)

    A group whose rewards are equal up to rounding (std below 1e-6) carries no signal: its advantages
    are 0. An unknown reward (NaN) is left out of the statistics and gets advantage 0; fewer than two
    known rewards give 0 for all.
        [2, 2, 1, 1] → [+0.87, +0.87, -0.87, -0.87]        [2, NaN, 1, 1] → [+1.15, 0, -0.58, -0.58]
    """
    known = ~totals.isnan()
    count = known.sum(1, keepdim=True)
    mean = totals.nansum(1, keepdim=True) / count.clamp(min=1)
    squares = ((totals - mean) ** 2).nansum(1, keepdim=True)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    normalized = (totals - mean) / (std + 1e-4)
    return torch.where(known & (std >= 1e-6), normalized, 0.0)


def group_advantages(totals: Tensor, mode: str) -> Tensor:
    """The advantage of each segment of each response, (B, G, K) → (B, G, K).

    Two responses, R_P = (2, 1) and R_R = (1, 1.5); two rewards that differ are normalized to ±0.71:
        pa      each segment from its own reward    A_P = (+0.71, -0.71), A_R = (-0.71, +0.71)
        gdpo    their sum, for all tokens           0: better perception and worse reasoning cancel
        grpo    from the last segment's, for all    (-0.71, +0.71): the better observation is punished
        joint   from the sum of rewards, for all    (+0.71, -0.71): the better reasoning is punished
    """
    if mode == "grpo":
        totals = totals[..., -1:]
    if mode == "joint":
        totals = totals.sum(-1, keepdim=True)
    advantages = normalize(totals)
    if mode == "gdpo":
        advantages = advantages.sum(-1, keepdim=True)
    return advantages.expand(-1, -1, len(SEGMENTS))


# -------------------------------------------------------------------------------------- 4. loss

def collate_responses(groups: Sequence[Sequence[Response]], token_mean: str) -> tuple[Tensor, ...]:
    """Responses as tensors: tokens (B, G, T), lengths (B, G), segments, weights, sampled
    log-probabilities (B, G, T).

    5 tokens, segments [0, 0, 1, 1, 1]:
        weights, one mean per response  [1/5, 1/5, 1/5, 1/5, 1/5]
                 one mean per segment   [1/2, 1/2, 1/3, 1/3, 1/3]
    After the end segments are K (unknown) and everything else is 0.
    """
    longest = max(len(response.tokens) for group in groups for response in group)
    shape = len(groups), len(groups[0]), max(1, longest)
    tokens = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, len(SEGMENTS))
    weights, sampled = torch.zeros(shape), torch.zeros(shape)
    lengths = torch.zeros(shape[:2], dtype=torch.long)
    for i, group in enumerate(groups):
        for j, response in enumerate(group):
            n = len(response.tokens)
            ids = torch.tensor(response.segments, dtype=torch.long)
            lengths[i, j] = n
            tokens[i, j, :n] = torch.tensor(response.tokens)
            segments[i, j, :n] = ids
            sampled[i, j, :n] = response.logprobs
            length = torch.bincount(ids)[ids] if token_mean == "segment" else n
            weights[i, j, :n] = 1 / length if n else 0
    return tokens, lengths, segments, weights, sampled


def token_advantages(advantages: Tensor, segments: Tensor) -> Tensor:
    """The advantage of each token is that of its segment.
    advantages (B, G, K), segments (B, G, T) → (B, G, T)

    Index K: a segment before the last was never closed. The boundary is unknown, and every token
    gets the mean of the segments' advantages. (Padding, too, has index K, and weight 0.)
        A = (+1, -1), segments [0, 0, 1, 1, 1] → [+1, +1, -1, -1, -1]      segments [2, 2] → [0, 0]
    """
    mean = advantages.mean(-1, keepdim=True)
    columns = torch.cat([advantages, mean], dim=-1)                    # (B, G, K + 1)
    return columns.gather(-1, segments)


def pa_grpo_loss(
    logprobs: Tensor,
    old: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    clip_eps: float,
    kl_beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped objective with a KL term (eq. 7), summed over responses. All inputs (B, G, T);
    after the end of a response its weights and log-probabilities are 0. weights: those of
    `collate_responses`, chosen by --token-mean.

    Departures from eq. 7 as printed. There, ρ is the ratio of a whole segment's probabilities, and
    no length divides it: over hundreds of tokens such a ratio leaves [1 - ε, 1 + ε] at once, and
    long responses outweigh short ones. Here each token has its own ratio and `weights` make one mean
    over a response, as in the code the authors build on. With one update per rollout the ratio is 1
    either way, and the gradient differs by that mean only. The KL term is inside the same mean; it
    is the k3 estimate e^d - d - 1 with d = log π_ref - log π, clamped to ±10.

    Two tokens with log-probability -1 now and before, the reference at -1 and -1.5, A = (+1, -1),
    weights (1/2, 1/2), ε 0.2, β 0.04:  ρ = 1, 1 → objective +1, -1;  d = 0, -0.5 → KL 0, 0.1065
        loss = 1/2 (-1 + 0.04 · 0) + 1/2 (+1 + 0.04 · 0.1065) = 0.00213
    The loss is nearly 0, its gradient is not:
        d loss / d logprobs = (-1/2, 1/2 + 0.02 (1 - e^-0.5)) = (-0.5, 0.508)

    Returns the loss (a sum: divide it by the responses of the whole step), and for each token,
    without gradient, its KL (0 without a reference) and whether it was clipped: whether the minimum
    is the clipped term, and not the other.
    """
    ratio = torch.exp(logprobs - old)                     # (B, G, T); 1 after the end
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(logprobs)
    if reference is not None:
        d = (reference - logprobs).clamp(-10, 10)
        kl = torch.exp(d) - d - 1                            # never negative
    loss = (weights * (kl_beta * kl - objective)).sum()
    return loss, kl.detach(), (clipped * advantages < ratio * advantages).detach()


# ------------------------------------------------------------------------------------ 5. update

def micro_batches(groups: list[list[Response]], vocabulary: Vocabulary, settings: Settings,
                  world: World) -> Iterator[tuple]:
    """Some questions at a time: their indices, the inputs of `logprobs`, then segments, weights and
    sampled log-probabilities (B, G, T).

    All ranks must run the same passes, as FSDP needs. A rank that has no questions left takes a
    blank one, behind the last, with responses without tokens, so that all its weights are 0.
    """
    blank, size = data.blank_example(vocabulary), settings.micro_batch
    nothing = Response(blank, [], [], torch.zeros(0), True, "", None)
    for i in range(0, max(world.gather(len(groups))), size):
        part = groups[i:i + size]
        rows = list(range(i, i + len(part)))
        if not part:
            part, rows = [[nothing] * settings.group_size], [len(groups)]
        examples = [group[0].example for group in part]
        prompts = data.collate(examples).to(world.device)
        tensors = collate_responses(part, settings.token_mean)
        tokens, lengths, *others = (x.to(world.device) for x in tensors)
        yield rows, (prompts, tokens, lengths, settings.temperature), *others


@torch.no_grad()
@timed("scoring")
def score(reference: Qwen2_5_VL | None, groups: list[list[Response]], vocabulary: Vocabulary,
          settings: Settings, world: World) -> list[Tensor | None]:
    """log π_ref of each micro-batch, (B, G, T); None where there is no KL term."""
    found = []
    for _, inputs, *_ in micro_batches(groups, vocabulary, settings, world):
        found.append(reference.logprobs(*inputs)[0] if settings.kl_beta else None)
    return found


@timed("training")
def update(policy: Qwen2_5_VL, optimizer: torch.optim.Optimizer, lr: float,
           groups: list[list[Response]], advantages: Tensor, ref_logprobs: list[Tensor | None],
           vocabulary: Vocabulary, settings: Settings, world: World) -> dict[str, list[float]]:
    """One or more optimizer steps on a step's responses. advantages (B, G, K). Returns what is
    worth logging, a value a token or an update."""
    responses = world.sum(len(groups) * settings.group_size)
    blank = torch.zeros(1, settings.group_size, len(SEGMENTS))          # of the blank question
    advantages = torch.cat([advantages, blank]).to(world.device)
    old_logprobs, values = [], defaultdict(list)
    for number in range(settings.updates_per_rollout):
        batches = micro_batches(groups, vocabulary, settings, world)
        for i, (rows, inputs, segments, weights, sampled) in enumerate(batches):
            logprobs, entropy = policy.logprobs(*inputs)               # (B, G, T)
            if number == 0:                                  # before any update
                old_logprobs.append(logprobs.detach())
            of_tokens = token_advantages(advantages[rows], segments)   # (B, G, T)
            loss, kl, clipped = pa_grpo_loss(
                logprobs, old_logprobs[i], ref_logprobs[i], of_tokens, weights,
                settings.clip_eps, settings.kl_beta)
            # One denominator for all micro-batches and ranks. FSDP averages over ranks: undo that.
            (loss * world.size / responses).backward()
            worth = {"kl": kl, "entropy": entropy, "clip_share": clipped.float()}
            if number == 0:                                  # by the policy that sampled
                worth["logprob_gap"] = (old_logprobs[i] - sampled).abs()
                values["loss"].append(float(loss.detach()))
            for name, x in worth.items():
                values[name] += x[weights > 0].tolist()
        values["grad_norm"].append(sft.optimizer_step(policy, optimizer, lr, settings.clip_norm))
    return values


# ------------------------------------------------------------------------------------- settings

STAGES = {"pa": "pagrpo", "gdpo": "gdpo", "grpo": "grpo", "joint": "joint"}      # folders in --out


@dataclass(frozen=True)
class Settings(sft.TrainSettings, data.JudgeSettings):
    """PA-GRPO."""
    model: str = flag("", "SFT checkpoint to start from; it stays the KL reference (toy: SFT is run "
                      "when missing)")
    steps: int = flag(1000, "rollout batches; each makes --updates-per-rollout optimizer steps",
                      minimum=1)
    questions: int = flag(8, "questions in one step, over all ranks; a rank takes whole questions",
                          minimum=1)
    group_size: int = flag(8, "G, responses sampled to each question", minimum=2)
    max_response: int = flag(768, "tokens after which a response is cut off", minimum=1)
    temperature: float = flag(1.0, "of the softmax, in sampling and in log-probabilities",
                              minimum=0.01)
    advantage: str = flag("pa", "pa: each segment its own; grpo: A_R on all tokens; joint: that of "
                          "R_P + R_R; gdpo: A_P + A_R (GDPO without normalization over the batch)",
                          choices=list(STAGES))
    token_mean: str = flag("response", "the mean over the tokens of a response, or the sum of those "
                           "of its segments (the KL term then counts once per segment)",
                           choices=["response", "segment"])
    reward_off: str = flag("none", "leaves a reward out; the paper's row without perception reward "
                           "is --advantage grpo",
                           choices=["none", *(s.name for s in SEGMENTS), "length"])
    windows: tuple[int, ...] = flag(sum((s.window for s in SEGMENTS), ()), "shortest and longest "
                                    "length of each segment in turn, in tokens with tags and stop "
                                    "token, that earns the length reward")
    kl_beta: float = flag(0.04, "weight of the KL term; at 0 there is no reference, unless it "
                          "judges", minimum=0)
    clip_eps: float = flag(0.2, "PPO clip range 1 ± this; no effect with one update per rollout",
                           minimum=0)
    updates_per_rollout: int = flag(1, "optimizer steps on one batch of rollouts", minimum=1)
    transcript_every: int = flag(200, "steps between printed transcripts, which the page shows",
                                 minimum=1, may_change=True)
    offload_reference: bool = flag(False, "keep the KL reference in host memory: less on the GPU, "
                                   "more copying", may_change=True)


REAL = dict(data="data/videop2r/*RL*.json*", media="data/Video-R1-data", judge="reference")
PRESETS = {
    "tiny": sft.TINY | dict(
        questions=16, micro_batch=16, max_response=64, windows=(8, 16, 10, 48),
        temperature=1.3, steps=100, lr=4e-4, warmup=15, transcript_every=40),
    "3b": REAL | dict(model="runs/3b/sft"),
    "7b": REAL | dict(model="runs/7b/sft"),
}


# ================================ a first reader may stop here ================================

# --------------------------------------------------------------------------------------- set-up

def prepare(settings: Settings, run: sft.Run, world: World) -> tuple:
    """Loads what `train` needs, in the order of its parameters, and continues from the newest
    checkpoint."""
    vocabulary = Vocabulary(settings.model)
    reference, judge = load_judge(settings, run, vocabulary, world)
    policy = model.build_model(run.last_checkpoint or settings.model, vocabulary, world,
                               settings.save_memory)
    optimizer = sft.make_optimizer(policy, settings)
    run.restore(policy, optimizer)
    records = sft.with_media(settings, run.folder, world)
    questions = run.examples(records, vocabulary, policy.config)
    records = data.read_records(settings.heldout) if settings.heldout else []
    heldout = run.examples(records, vocabulary, policy.config)
    return policy, reference, optimizer, judge, questions, heldout, run, settings, world


def load_judge(settings: Settings, run: sft.Run, vocabulary: Vocabulary, world: World
               ) -> tuple[Qwen2_5_VL | None, Judge]:
    """The frozen SFT model, if the KL term or the judge needs it, and the judge."""
    reference = None
    if settings.kl_beta or settings.judge == "reference":
        reference = model.build_model(settings.model, vocabulary, world, frozen=True,
                                      offload=settings.offload_reference)
    answer_blind = partial(blind_answers, reference, vocabulary, settings)
    return reference, data.make_judge(settings, run.folder / "judge", answer_blind, world.rank)


def blind_answers(reference: Qwen2_5_VL, vocabulary: Vocabulary, settings: Settings,
                  claims: Sequence[Claim]) -> list[Verdict]:
    """Judges by answering: the model reads question and observation, without the media, and writes
    think and answer. The observation suffices if the answer's score reaches THRESHOLD: weak
    reasoning counts against it."""
    examples, verdicts = [], []
    for c in claims:
        r = data.Record(
            "", c.question, c.options, c.problem_type, c.reference, "", c.data_type,
            blind=True, given=c.observation)
        examples.append(data.build_example(r, Path(), vocabulary, reference.config, settings))
    for (response,) in rollout(reference, examples, vocabulary, settings, "judge", 1, 0.0):
        answer, text = response.parsed.contents["answer"], " ".join(response.text.split())
        score = data.answer_score(response.example.record, answer)
        explanation = f"answering blind: {text} (score {score:.2f})"
        verdicts.append(Verdict(score >= data.THRESHOLD, explanation))
    return verdicts


# -------------------------------------------------------------------------------------- metrics

def step_metrics(groups: list[list[Response]], parts: Tensor, totals: Tensor,
                 values: dict[str, list[float]], settings: Settings, world: World) -> dict:
    """The metrics of a step, over all ranks. Every part of every reward is logged with its standard
    deviation."""
    responses = sum(groups, [])
    lengths = torch.tensor([rewards.segment_lengths(r.segments) for r in responses])
    lengths = lengths.view(-1, len(SEGMENTS)).float()
    spread, shares = {}, {"truncated": [not response.finished for response in responses]}
    for k, segment in enumerate(SEGMENTS):
        of_segment = parts[..., k, :].unbind(-1)             # 3 × (B, G)
        columns = dict(zip(rewards.REWARD_PARTS, of_segment))
        columns |= {"reward": totals[..., k], "tokens": lengths[:, k]}
        for name, x in columns.items():
            spread[f"{segment.name}/{name}"] = x[~x.isnan()].tolist()  # an unknown verdict is no 0
        alike = (normalize(totals[..., k]) == 0).all(1)
        shares[f"{segment.name}/zero_variance"] = alike.tolist()
    advantages = group_advantages(totals, settings.advantage)          # (B, G, K)
    alike = (advantages == 0).flatten(1).all(1)
    shares["zero_variance"] = alike.tolist()
    for name in values.keys() - {"loss", "grad_norm"}:
        shares[name] = values[name]
    questions = world.sum(len(groups))
    if not questions:
        world.print0("The media of none of this step's questions can be read; nothing was learned.")
    means = mean_over_ranks(spread, world, deviation=True) | mean_over_ranks(shares, world)
    loss = world.sum(sum(values["loss"]))
    largest = max(values["logprob_gap"], default=0.0)
    return {**means, "logprob_gap_max": max(world.gather(largest)),
            "loss": loss / max(1, questions * settings.group_size),
            "grad_norm": statistics.fmean(values["grad_norm"]),
            "questions": questions, "skipped": settings.questions - questions,
            "tokens": world.sum(int(lengths.sum()))}


def mean_over_ranks(values: dict[str, list[float]], world: World, deviation: bool = False
                    ) -> dict[str, float]:
    """Means over the values of all ranks, with `deviation` their standard deviations too. A name
    without any value is absent: 0 would draw a line that means nothing."""
    pooled, found = defaultdict(list), {}
    for part in world.gather(values):
        for name, x in part.items():
            pooled[name] += x
    for name, x in pooled.items():
        if x:
            found[name] = statistics.fmean(x)
        if x and deviation:
            found[f"{name}_std"] = statistics.pstdev(x)
    return found


def check_verdicts(verdicts: list[Verdict], claims: list[Claim], settings: Settings, world: World
                   ) -> tuple[dict, str]:
    """How the judge works and, in the toy world, how often it says what the exact rule says. Then
    why the run cannot go on: more than --max-unknown verdicts are missing; else ""."""
    values, exact = defaultdict(list), verdicts
    if settings.judge != "rule" and data.is_toy(claims):
        exact = data.rule_judge(claims)
    errors, asked = [], 0
    for claim, verdict, rule in zip(claims, verdicts, exact):
        if not claim.observation:
            continue
        asked += 1
        values["judge/leak"].append(verdict.leak)
        if verdict.sufficient is None:
            errors.append(verdict.error)
        elif verdict is not rule:
            values["judge/agreement"].append(verdict.sufficient == rule.sufficient)
            accepted = verdict.sufficient > rule.sufficient            # and too little is said
            values["judge/false_positive"].append(accepted)
    asked, unknown, lost = world.sum(asked), world.sum(len(errors)), ""
    if unknown > settings.max_unknown * asked:
        reason = statistics.mode(errors) if errors else "see the other ranks"
        lost = (f"{unknown} of {asked} verdicts stayed unknown, more than --max-unknown "
                f"{settings.max_unknown:g} allows. Most often: {reason:.200}. ")
    counts = {"judge/claims": asked, "judge/unknown": unknown}
    return mean_over_ranks(values, world) | counts, lost


def in_short(metrics: dict) -> str:
    """For the progress bar."""
    shown = []
    for segment in SEGMENTS:
        accuracy = metrics.get(f"{segment.name}/accuracy", math.nan)
        shown.append(f"{segment.name} {accuracy:.2f}")
    return "  ".join(shown)


# --------------------------------------------------------------------------- what the page shows

@torch.no_grad()
def show(step: int, policy: Qwen2_5_VL, groups: list[list[Response]], verdicts: list[Verdict],
         parts: Tensor, ref_logprobs: list[Tensor | None], vocabulary: Vocabulary, run: sft.Run
         ) -> None:
    """Every --transcript-every steps: prints a response and adds its group to rollouts.jsonl, with
    RLLoggingBoard's names. All ranks run the same passes, rank 0 writes. parts (B, G, K, 3)"""
    s = run.settings
    if step % s.transcript_every and step + 1 < s.steps:
        return
    for rows, inputs, segments, weights, _ in micro_batches(groups, vocabulary, s, run.world):
        after, _ = policy.logprobs(*inputs)                  # by the updated weights, (b, G, T)
        break
    if not groups or not run.world.first:
        return
    # Of the first micro-batch, the group whose segments differ most in their advantages.
    totals = total_rewards(parts, s.reward_off)
    credit = {mode: group_advantages(totals, mode) for mode in STAGES}           # each (B, G, K)
    separate = credit["pa"][rows]
    differ = separate.amax(-1) - separate.amin(-1)           # (b, G)
    b = int(differ.sum(1).argmax())
    received = token_advantages(credit[s.advantage][rows], segments.cpu())       # (B, G, T)
    zeros = torch.zeros_like(received)                       # no value network, perhaps no reference
    columns = {"logprobs_after": after, "weights": weights, "token_rewards": received,
               "ref_logprobs": zeros if ref_logprobs[0] is None else ref_logprobs[0],
               "values": zeros}
    for g, response in enumerate(groups[b]):
        verdict, n = verdicts[b * s.group_size + g], len(response.tokens)
        row = asdict(response.example.record) | {
            "step": step + 1,
            "prompt": data.instruction(response.example.record, s),
            "response": response.text,
            "response_tokens": [vocabulary.bytes[i].decode(errors="replace")
                                for i in response.tokens],
            "segments": response.segments,
            "logprobs": response.logprobs,
            "finished": response.finished,
            "parts": parts[b, g],
            "totals": totals[b, g],
            "reward": totals[b, g].nansum(),
            "sufficient": verdict.sufficient,
            "judge": verdict.error or verdict.explanation,
            "advantages": {mode: x[b, g] for mode, x in credit.items()}}
        run.append("rollouts.jsonl", row | {name: x[b, g, :n] for name, x in columns.items()})
    verdict, advantages = verdicts[b * s.group_size], credit[s.advantage][b, 0]
    tqdm.write(f"Before step {step + 1}, one of {s.group_size} responses:")
    tqdm.write(transcript(groups[b][0], verdict, parts[b, 0], advantages))


def transcript(response: Response, verdict: Verdict, parts: Tensor, advantages: Tensor) -> str:
    """A response as a person reads it, with verdict, rewards and advantages. parts (K, 3),
    advantages (K,)"""
    r = response.example.record
    says = {True: "Yes", False: "No", None: "unknown"}[verdict.sufficient]
    cut = "" if response.finished else " … (cut off)"
    lines = [f"── {r.path}  {r.problem_type} ".ljust(100, "─"),
             f"question    {r.question}  {'  '.join(r.options)}".rstrip(),
             f"reference   {r.reference}",
             response.text.strip() + cut,
             f"judge       {says}: {verdict.error or verdict.explanation}"]
    lengths = rewards.segment_lengths(response.segments)
    for k, segment in enumerate(SEGMENTS):
        accuracy, format, length = parts[k].tolist()
        lines.append(f"{segment.name:11} accuracy {accuracy:.2f} + format {format:.0f} + length "
                     f"{length:.1f} ({lengths[k]} tokens) → advantage {advantages[k]:+.2f}")
    return "\n".join(lines + ["─" * 100])


# -------------------------------------------------------------------------------- held-out table

def answer(policy: Qwen2_5_VL, examples: Sequence[Example], vocabulary: Vocabulary, judge: Judge,
           settings: Settings, temperature: float, top_p: float = 1.0
           ) -> list[tuple[Response, Verdict]]:
    """A response to each example, and the judge's verdict on its observation: every evaluation."""
    groups = rollout(policy, examples, vocabulary, settings, "evaluation", 1, temperature, top_p)
    responses = [response for (response,) in groups]
    verdicts = judge([claim_of(response) for response in responses])
    return list(zip(responses, verdicts))


@torch.no_grad()
def evaluate(policy: Qwen2_5_VL, held: Examples, judge: Judge, settings: Settings,
             temperature: float, world: World) -> dict[str, dict]:
    """One response to each held-out record, greedy (temperature 0) or sampled, on all ranks together.

    Returns percentages with intervals, {"perception": {"value", "low", "high", "n"}, …, "answer",
    "format"}. Only a metric of 1 counts as a right answer. The toy world has an exact judge.
    """
    if data.is_toy(held.records):
        judge = data.make_judge(data.JudgeSettings())
    size = settings.questions * settings.group_size          # as many responses at once as in a step
    mine, rows = world.share(len(held), size), []
    with model.gathered(policy):
        for examples in tqdm(held.prefetch(mine), "evaluating", len(mine), leave=False,
                             disable=not world.first):
            answered = answer(policy, examples, held.vocabulary, judge, settings, temperature)
            for response, verdict in answered:
                parts = rewards.reward_parts(response, verdict, settings.windows)
                *before, right = [accuracy for accuracy, _, _ in parts]
                rows.append([*before, right > 1 - 1e-9, all(response.parsed.formats)])
    rows = sum(world.gather(rows), [])
    columns = [segment.name for segment in SEGMENTS[:-1]] + ["answer", "format"]
    result = {}
    for i, name in enumerate(columns):
        known = [row[i] for row in rows if not math.isnan(row[i])]
        level = sum(known) / max(1, len(known))
        result[name] = wilson(level, len(known)) | {"n": len(known)}
    pairs = Counter((row[0] > 1 - 1e-9, row[-2]) for row in rows)      # perception, answer
    both, seen = pairs[True, True], pairs[True, False]
    result["answer"]["crossed"] = [[both, seen], [pairs[False, True], pairs[False, False]]]
    return result


def wilson(share: float, n: float) -> dict[str, float]:
    """A proportion of n answers and its 95 % interval (Wilson 1927), in percent: unlike
    share ± 2 s it stays in [0, 100] and is right near its ends."""
    z, n = 1.96, max(1, n)
    centre = share + z * z / (2 * n)
    variance = share * (1 - share) / n
    half = z * math.sqrt(variance + z * z / (4 * n * n))
    low, high = centre - half, centre + half
    scale = 1 + z * z / n
    low, high = max(0.0, low / scale), min(1.0, high / scale)
    return {"value": 100 * share, "low": 100 * low, "high": 100 * high}


def heldout_metrics(policy: Qwen2_5_VL, held: Examples, judge: Judge, settings: Settings,
                    world: World) -> dict[str, float]:
    found = evaluate(policy, held, judge, settings, 0.0, world)
    return {f"heldout/{name}": cell["value"] for name, cell in found.items()}


def results_table(results: dict[str, dict[str, dict]]) -> str:
    """{"SFT, greedy": what `evaluate` returned, …} as a table, one row a model and way of
    sampling."""
    columns = list(next(iter(results.values())))
    rows = [["percent of held-out clips, with 95 % intervals", *columns]]
    for title, result in results.items():
        cells = [f"{c['value']:.1f} ({c['low']:.1f}–{c['high']:.1f})" for c in result.values()]
        rows.append([title, *cells])
    return "\n".join(data.format_table(rows))


def compare_models(settings: Settings, run: sft.Run, toy: bool, world: World) -> str:
    """The held-out table: the model before SFT (toy world), after SFT, and this run's."""
    vocabulary = Vocabulary(settings.model)
    records = data.read_records(settings.heldout)
    held = run.examples(records, vocabulary, model.read_config(settings.model))
    _, judge = load_judge(settings, run, vocabulary, world)
    models = {"base": newest_checkpoint(Path(settings.out) / "base")} if toy else {}
    models |= {"SFT": Path(settings.model), run.folder.name: run.last_checkpoint}
    results = {}
    for name, path in models.items():
        policy = model.build_model(path, vocabulary, world, frozen=True)
        for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            found = evaluate(policy, held, judge, settings, temperature, world)
            results[f"{name}, {how}"] = found
    if world.first:
        data.write_json(run.folder / "results.json", results)
    return results_table(results)


# -------------------------------------------------------------------------- from flags to a table

def run_stage(settings: Settings, world: World) -> None:
    """Finds the files (in the toy world it makes them, SFT included), runs or continues PA-GRPO,
    then evaluates where there are held-out records. SystemExit if it cannot start."""
    toy, settings = not settings.data, sft.find_start(settings, world)
    if settings.heldout:
        data.read_records(settings.heldout)                  # a damaged file is named now
    if len(settings.windows) != 2 * len(SEGMENTS):
        raise SystemExit(f"--windows takes two lengths for each of {len(SEGMENTS)} segments")
    if settings.judge == "rule" and not data.is_toy(data.read_records(settings.data)):
        raise SystemExit("--judge rule knows toy questions only: choose reference, or an http "
                         "address")
    if settings.eval_every and not settings.heldout:
        raise SystemExit("--eval-every needs --heldout, a record file that is not trained on")
    folder = Path(settings.out) / STAGES[settings.advantage]
    run = sft.Run(folder, settings, settings.questions, Path(settings.model), world)
    results = world.on_rank0(lambda: data.read_json(run.folder / "results.json"))
    if run.finished and results:
        world.print0(f"{run.folder} is finished:\n{results_table(results)}")
        return
    if not run.finished:
        train(*prepare(settings, run, world))
        gc.collect()                                         # FSDP modules are reference cycles
        torch.cuda.empty_cache()
    if settings.heldout:
        world.print0(compare_models(settings, run, toy, world))
    else:
        world.print0(f"PA-GRPO is finished: {run.last_checkpoint}. Evaluate it with "
                     "eval.py --bench.")
    world.print0(world.on_rank0(lambda: sft.report(run.folder)))


def main(argv: Sequence[str] | None = None) -> None:
    sft.launch(run_stage, Settings, PRESETS, argv, __doc__)


if __name__ == "__main__":
    main()
