"""Promise: tests/memory.py says what a run takes on each rank before anything is allocated; running out
of memory ends in a line that names the flags that help."""
import re
from dataclasses import replace

import pytest
import torch

import data
import memory
import pagrpo
import sft
from counting import Counting
from data import Vocabulary, build_example, read_records
from memory import estimate
from model import CONFIGS, Qwen2_5_VL, init_weights, qwen
from toy_runs import ROOT
from whole_steps import never_stop

WIDE = qwen(256, 4, 4, 2, 1024, 2048, True, sections=(8, 12, 12), ids=(6, 7), vision=dict(
    hidden_size=160, depth=4, num_heads=4, intermediate_size=428, fullatt_block_indexes=(1, 3)))
BIG = sft.TINY | dict(max_pixels=64 * 28 * 28, min_pixels=64 * 28 * 28, judge="reference")
SEVEN = pagrpo.Settings(**pagrpo.PRESETS["7b"])


def counted(s, toy, base, config) -> dict[str, int]:
    """Bytes of tensors at their most in each phase of a step, beside weights and moments. Decoding is
    what it is on a GPU, without the copies of weights that a CPU is faster with."""
    world, vocabulary = sft.World(0, 1, torch.device("cpu")), Vocabulary(base)
    records = read_records(toy / "rl.json")[:s.questions]
    asked = [build_example(r, toy, vocabulary, config, s) for r in records]
    clips, peaks = asked * s.group_size, {}
    with Counting() as count:
        policy, reference = (never_stop(init_weights(Qwen2_5_VL(config), seed), vocabulary)
                             for seed in (0, 1))
        policy.save_memory = s.save_memory
        reference.requires_grad_(False)
        optimizer = sft.make_optimizer(policy, s)
        norm = policy.model.norm.weight
        norm.grad = torch.zeros_like(norm)
        sft.optimizer_step(policy, optimizer, 0.0, 1.0)      # makes the moments

        def measure(phase: str, call, *args):
            before = count.peak = count.now
            result = call(*args)
            peaks[phase] = count.peak - before
            return result
        groups = measure("sampling", pagrpo.rollout, policy, asked, vocabulary, s, "step 0")
        text = "red " * (s.max_response - 1)                 # as long as an observation may be
        claims = [data.claim_about(r.example.record, text) for group in groups for r in group]
        measure("judging", pagrpo.blind_answers, reference, vocabulary, s, claims)
        ref_logprobs = pagrpo.score(reference, groups, vocabulary, s, world)
        advantages = torch.ones(len(groups), s.group_size, 2)
        measure("training", pagrpo.update, policy, optimizer, 1e-6, groups, advantages, ref_logprobs,
                vocabulary, s, world)
        measure("evaluation", pagrpo.rollout, policy, clips, vocabulary, s, "evaluation", 1, 0.0)
    peaks["evaluation"] = max(peaks["evaluation"], peaks["judging"])     # it is judged, too
    return peaks


SHAPES = [
    dict(questions=2, micro_batch=1, group_size=4, max_response=16, save_memory=True),
    dict(questions=2, micro_batch=2, group_size=2, max_response=16, save_memory=True),
    dict(questions=1, micro_batch=1, group_size=2, max_response=24, save_memory=False),
    dict(questions=8, micro_batch=1, group_size=4, max_response=24, save_memory=True,
         max_pixels=784, min_pixels=784),
]


def shaped(changes: dict) -> pagrpo.Settings:
    return pagrpo.Settings(**BIG | changes)


@pytest.mark.parametrize("changes", SHAPES)
def test_each_phase_takes_what_the_table_says(changes, toy, base, monkeypatch):
    monkeypatch.setattr("model.shorten_step", lambda step: None)
    told = estimate(WIDE, shaped(changes), ranks=1, cuda=False)
    for phase, real in counted(shaped(changes), toy, base, WIDE).items():
        assert told[phase] == pytest.approx(real, rel=0.1), phase


@pytest.mark.parametrize("ranks, shards", [(1, 1), (8, 8), (16, 8)])
def test_weights_gradients_and_moments_are_arithmetic(ranks, shards):
    """16 bytes a number for weights, gradients and moments, 2 for the reference, shared by the ranks
    of a machine."""
    parts, numbers = estimate(CONFIGS["7b"], SEVEN, ranks), 8.29e9
    assert parts["weights"] + parts["moments"] == pytest.approx(12 * numbers / shards, rel=0.01)
    assert parts["reference"] == pytest.approx(2 * numbers / shards, rel=0.01)
    assert parts["training"] > 4 * numbers / shards
    phases = [parts[name] for name in ("sampling", "judging", "training")]
    assert parts["peak"] == parts["weights"] + parts["moments"] + parts["reference"] + max(phases)


def told(**changes) -> dict[str, int]:
    """By the 7b preset with some changes, on eight ranks."""
    return estimate(CONFIGS["7b"], replace(SEVEN, **changes), 8)


def test_an_evaluation_counts_where_there_is_one():
    """At the end the policy is in half precision and has no moments; --eval-every evaluates in
    training."""
    last, between = (told(heldout="heldout.json", eval_every=steps) for steps in (0, 100))
    assert last["peak"] == last["evaluation"] + last["weights"] / 2 + last["reference"]
    assert between["peak"] == last["peak"] + last["weights"] / 2 + last["moments"]
    assert told()["peak"] < last["peak"]


def test_what_is_not_there_takes_nothing():
    assert told(offload_reference=True)["reference"] == 0
    assert told(judge="rule")["judging"] == 0 < told(judge="rule")["reference"]
    assert told(judge="rule", kl_beta=0.0)["reference"] == 0
    stage1 = estimate(CONFIGS["7b"], memory.parse(["sft", "--preset", "7b"]), 8)
    assert stage1["reference"] == 0 and "sampling" not in stage1


def test_the_document_shows_what_the_command_prints():
    document = (ROOT / "docs/scaling.md").read_text()
    shown = [re.findall(r"[\w.]+", line) for line in document.splitlines()]
    for preset in ("3b", "7b"):
        printed = memory.table(memory.parse(["--preset", preset])).splitlines()
        for row in printed[3:7]:                             # 1, 2, 4 and 8 ranks
            assert [preset, *row.split()] in shown


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_ends_in_a_line_with_the_flags_that_help(error):
    assert sft.explain(error).startswith("Out of memory. Less is needed with --save-memory, ")
