"""How much memory a run needs on each rank, before it is started. No weights are loaded.

    python tests/memory.py --preset 7b                        PA-GRPO on 1, 2, 4, 8 and 16 ranks
    python tests/memory.py --preset 3b --offload-reference    any flag of pagrpo.py
    python tests/memory.py sft --preset 7b                    the same for sft.py and its flags

The ranks of a machine, eight, share a copy of the weights. A rank holds its part of weights, moments
and KL reference all the time. Beside them a step has phases, one after the other: the rank samples
for all its questions at once, judges all responses at once (the `reference` judge), and trains on one
micro-batch after the other. A held-out evaluation writes as many responses at once as a step, but to
as many clips. All sizes are in bytes, all lengths in tokens.
"""
from __future__ import annotations

import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402  (found through the line above)
import pagrpo  # noqa: E402
import sft  # noqa: E402
import torch  # noqa: E402
from model import (CONFIGS, LOGITS_AT_ONCE, SMALLEST_IN_BF16, Config, Qwen2_5_VL,  # noqa: E402
                   newest_checkpoint, read_config)

MACHINE = 8                                                  # its ranks share a copy of the weights
QUESTION = {"full": 400, "short": 48}                        # tokens of a prompt without its medium
GIB = 2 ** 30
TRACE = 768                                                  # tokens of a trace in SFT


class Rank(NamedTuple):
    """What falls to one rank."""
    config: Config
    cuda: bool
    size: int                                                # of a number while computing: 2 or 4
    shards: int                                              # ranks that share a copy of the weights
    gathers: bool                                            # are weights copied before their use?
    questions: int
    evaluated: int                                           # clips of an evaluation at once
    micro: int                                               # questions in a training pass
    group: int
    medium: int                                              # tokens of a clip
    prompt: int                                              # with the clip
    claim: int                                               # that the judge reads
    response: int


def rank_of(config: Config, s: sft.TrainSettings, ranks: int, cuda: bool) -> Rank:
    """The longest prompts and responses that the settings allow. SFT is PA-GRPO in groups of one."""
    rl = isinstance(s, pagrpo.Settings)
    step, group, response = (s.questions, s.group_size, s.max_response) if rl else (s.batch, 1, TRACE)
    questions = -(-step // ranks)
    medium = -(-s.frames // 2) * (s.max_pixels // 28 ** 2)
    question = QUESTION[s.prompt]
    return Rank(config=config, cuda=cuda,
                size=2 if cuda and config.hidden_size >= SMALLEST_IN_BF16 else 4,
                shards=min(MACHINE, ranks), gathers=cuda or ranks > 1,
                questions=questions, evaluated=-(-step * group // ranks),
                micro=min(s.micro_batch, questions), group=group,
                medium=medium, prompt=min(s.max_prompt, medium + question),
                claim=min(s.max_prompt, question + response), response=response)


# -------------------------------------------------------------------------------------- weights

class Numbers(NamedTuple):
    """How many numbers the parts of a model have."""
    whole: int
    layer: int                                               # of the decoder
    embedding: int
    root: int                                                # embedding, head and last norm


@lru_cache
def numbers(config: Config) -> Numbers:
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    tower, layer, whole = (sum(p.numel() for p in part.parameters())
                           for part in (model.visual, model.model.layers[0], model))
    root = whole - tower - config.num_hidden_layers * layer
    return Numbers(whole, layer, config.vocab_size * config.hidden_size, root)


def gathered(rank: Rank) -> int:
    """All weights in the dtype of computation, on every rank."""
    return rank.gathers * rank.size * numbers(rank.config).whole


# ------------------------------------------------------------------------------------ generating

def patches(rank: Rank, clips: int) -> int:
    """Four make a token."""
    return 4 * clips * rank.medium


def pixels(rank: Rank, clips: int) -> int:
    """Patches in fp32, and their copy in the dtype of computation."""
    copy = rank.size if rank.size < 4 else 0
    return patches(rank, clips) * 1176 * (4 + copy)


def keys_and_values(rank: Rank) -> int:
    """Of one token in one layer."""
    return 2 * rank.size * rank.config.head_dim * rank.config.num_key_value_heads


def cache(rank: Rank, tokens: int) -> int:
    """Keys and values in all layers."""
    return rank.config.num_hidden_layers * tokens * keys_and_values(rank)


def prefill(rank: Rank, tokens: int) -> int:
    """In the MLP of a layer: gate, its activation, up; inputs and residuals beside them."""
    c = rank.config
    return tokens * (3 * c.intermediate_size + 4 * c.hidden_size) * rank.size


def tower(rank: Rank, clips: int) -> int:
    """In a block of the vision encoder, whose queries and keys are rotated in fp32."""
    return patches(rank, clips) * rank.config.vision.hidden_size * (6 * rank.size + 8 * 4)


def drawing(rank: Rank, responses: int) -> int:
    """Logits, their softmax and log-softmax in fp32, divided by the temperature; sums in fp64."""
    return responses * rank.config.vocab_size * (4 * 4 + 8)


def generating(rank: Rank, prompts: int, length: int, group: int, clips: int) -> int:
    """A call of `generate`: the largest of what follows one another. A prompt's keys and values are
    there once for its group."""
    read, written = prompts * length, prompts * group * rank.response
    return pixels(rank, clips) + max(tower(rank, clips),
                                     cache(rank, read) + prefill(rank, read),
                                     cache(rank, read + written) + drawing(rank, prompts * group))


def sampling(rank: Rank) -> int:
    rollout = generating(rank, rank.questions, rank.prompt, rank.group, rank.questions)
    return gathered(rank) + rollout


def judging(rank: Rank, claims: int) -> int:
    """The reference answers from the observations, a prompt each, without media."""
    return gathered(rank) + generating(rank, claims, rank.claim, 1, 0)


def evaluation(rank: Rank, reference_judges: bool) -> int:
    """A response to each clip by the policy, which stays gathered while the reference judges."""
    answering = generating(rank, rank.evaluated, rank.prompt, 1, rank.evaluated)
    judged = judging(rank, rank.evaluated) if reference_judges else 0
    return gathered(rank) + max(answering, judged)


# -------------------------------------------------------------------------------------- training

def row(rank: Rank) -> int:
    """Tokens of a training pass: a prompt stands once before its responses."""
    return rank.micro * (rank.prompt + rank.group * rank.response)


def block(rank: Rank) -> int:
    """What a layer keeps for its backward pass; every response has a copy of its prompt's keys and
    values."""
    c = rank.config
    a_token = (8 + 7 * rank.size) * c.hidden_size + 4 * rank.size * c.intermediate_size
    copies = rank.micro * rank.group * (rank.prompt + rank.response)
    return row(rank) * a_token + copies * keys_and_values(rank)


def kept_by_layers(rank: Rank, save_memory: bool) -> int:
    """Until the backward pass; with activation checkpointing the inputs of layers alone."""
    an_input = rank.size * row(rank) * rank.config.hidden_size
    return rank.config.num_hidden_layers * (an_input if save_memory else block(rank))


def kept_by_tower(rank: Rank, save_memory: bool) -> int:
    v = rank.config.vision
    a_block = (8 + 9 * rank.size) * v.hidden_size + 4 * rank.size * v.intermediate_size
    a_patch = rank.size * v.hidden_size if save_memory else a_block
    return v.depth * patches(rank, rank.micro) * a_patch


def scoring(rank: Rank) -> int:
    """Logits of a chunk, their log-softmax, softmax and the product of both, in fp32; gradient of the
    head by the chunks before."""
    logits = rank.micro * rank.group * rank.response * rank.config.vocab_size
    chunk = min(logits, LOGITS_AT_ONCE["cuda" if rank.cuda else "cpu"])
    return 4 * 4 * chunk + rank.size * numbers(rank.config).embedding


def layer_backward(rank: Rank, save_memory: bool) -> int:
    """The layer computed again, gradients in its MLP, and the gradient of the head."""
    again = block(rank) if save_memory else 0
    mlp = 3 * rank.size * rank.config.intermediate_size * row(rank)
    return again + mlp + rank.size * numbers(rank.config).embedding


def layer_weights(rank: Rank) -> int:
    """Three layers are gathered: one that computes, the next, the one before. Gradients of one are
    there as computed, in fp32 twice, and summed over ranks."""
    layer = numbers(rank.config).layer
    gradients = (rank.size + 4 + 4) * layer + 4 * layer // rank.shards
    return rank.gathers * (3 * rank.size * layer + gradients)


def root_backward(rank: Rank) -> int:
    """Gradients of the embedding from prompts and from responses, and their sum, beside that of the
    head; then those of the root as computed, in fp32, and summed over ranks. One rank alone has that
    sum as a second copy in full."""
    n = numbers(rank.config)
    computed = rank.size * (3 * n.embedding + rank.gathers * (n.root - n.embedding))
    reduced = (rank.size + 4) * n.root + 4 * n.root // rank.shards
    return max(computed, rank.gathers * reduced)


def training(rank: Rank, save_memory: bool) -> int:
    """A pass is largest at its turn, when all layers keep what they need and gradients are those of
    earlier passes, or at its end, when all gradients are there."""
    n = numbers(rank.config)
    gradients = 4 * n.whole // rank.shards
    earlier = gradients if rank.questions > rank.micro else 0
    root = rank.gathers * rank.size * n.root                 # stays gathered during a pass
    tower = kept_by_tower(rank, save_memory)
    a_layer = layer_backward(rank, save_memory) + layer_weights(rank)
    turn = earlier + kept_by_layers(rank, save_memory) + max(scoring(rank), a_layer)
    end = gradients + max(a_layer, root_backward(rank))
    return root + pixels(rank, rank.micro) + tower + max(turn, end)


# ------------------------------------------------------------------------------------- the table

def estimate(config: Config, s: sft.TrainSettings, ranks: int, cuda: bool = True) -> dict[str, int]:
    """Bytes on each rank: what is there all the time, what each phase takes beside it, and the
    peak."""
    rank, rl = rank_of(config, s, ranks, cuda), isinstance(s, pagrpo.Settings)
    share = numbers(config).whole // rank.shards
    judge_reads = rl and s.judge == "reference"
    reference = rl and (s.kl_beta > 0 or judge_reads) and not s.offload_reference
    stays = {"weights": 4 * share, "moments": 2 * 4 * share,
             "reference": reference * rank.size * share}
    phases = {}
    if rl:
        phases["sampling"] = sampling(rank)
        phases["judging"] = judge_reads * judging(rank, rank.questions * rank.group)
    phases["training"] = training(rank, s.save_memory)
    peak = sum(stays.values()) + max(phases.values())
    if rl:
        phases["evaluation"] = evaluation(rank, judge_reads)
        peak = max(peak, evaluated(s, phases["evaluation"], stays, rank.size * share))
    return stays | phases | {"peak": peak}


def evaluated(s: pagrpo.Settings, phase: int, stays: dict[str, int], policy: int) -> int:
    """All that is there during an evaluation, where there is one: at the end of a run a policy in the
    dtype of computation and the reference, with --eval-every what training holds."""
    if s.data and not s.heldout:
        return 0
    beside = sum(stays.values()) if s.eval_every else policy + stays["reference"]
    return beside + phase


def parse(argv: Sequence[str]) -> sft.TrainSettings:
    """Settings from the flags of pagrpo.py or, after the word sft, of sft.py."""
    if argv[:1] == ["sft"]:
        return sft.parse_flags(sft.Settings, sft.PRESETS, argv[1:], __doc__)
    return sft.parse_flags(pagrpo.Settings, pagrpo.PRESETS, argv, __doc__)


def table(s: sft.TrainSettings) -> str:
    config, rows = CONFIGS[s.preset], []
    with suppress(FileNotFoundError):                        # the model need not be there yet
        config = read_config(newest_checkpoint(s.model))
    toy = not s.data                                         # on CPUs
    for ranks in (1, 2, 4, 8, 16):
        parts = estimate(config, s, ranks, cuda=not toy)
        rows.append([str(ranks), *(f"{x / GIB:.{3 if toy else 1}f}" for x in parts.values())])
    lines = data.format_table([["ranks", *parts], *rows])
    return "\n".join([f"Preset {s.preset}, {numbers(config).whole:,} parameters: GiB on each rank",
                      *lines,
                      "Peak: weights, moments and reference, and the largest of the phases. An "
                      "evaluation counts with", "--heldout: at the end of a run, beside a policy in "
                      "half precision; with --eval-every in training."])


if __name__ == "__main__":
    print(table(parse(sys.argv[1:])))
