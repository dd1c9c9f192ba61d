"""Promise: tests/memory.py says what a run takes on each rank before anything is allocated; running out
of memory ends in a line that names the flags that help."""
from dataclasses import replace
from pathlib import Path

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
from sft import TINY, World

WIDE = qwen(256, 4, 4, 2, 1024, 2048, True, sections=(8, 12, 12), ids=(6, 7), vision=dict(
    hidden_size=160, depth=4, num_heads=4, intermediate_size=428, fullatt_block_indexes=(1, 3)))
BIG = TINY | dict(max_pixels=64 * 28 * 28, min_pixels=64 * 28 * 28, judge="reference")
STAYS = "weights", "moments", "reference"
DOCUMENT = Path(__file__).parent.parent / "docs/scaling.md"


def counted(settings, toy, base, config) -> dict[str, int]:
    """Bytes of tensors at their most in each phase of a step, beside weights and moments. Decoding is
    what it is on a GPU, without the copies of weights that a CPU is faster with."""
    world, vocabulary, s = World(0, 1, torch.device("cpu")), Vocabulary(base), settings
    records = read_records(toy / "rl.json")[:s.questions]
    asked = [build_example(r, toy, vocabulary, config, s) for r in records]
    clips, peaks = asked * s.group_size, {}
    with Counting() as count:
        policy, reference = (vocabulary.mask_special_tokens(init_weights(Qwen2_5_VL(config), seed))
                             for seed in (0, 1))
        for model in (policy, reference):                    # no response ends early
            stops = torch.tensor(vocabulary.stop_ids)
            model.masked_token_ids = torch.cat([model.masked_token_ids, stops])
        policy.save_memory = s.save_memory
        reference.requires_grad_(False)
        optimizer = sft.make_optimizer(policy, s)
        for p in policy.parameters():
            p.grad = torch.zeros_like(p)
        sft.optimizer_step(policy, optimizer, 0.0, 1.0)      # makes the moments

        def measure(phase: str, call, *args):
            before = count.peak = count.now
            result = call(*args)
            peaks[phase] = count.peak - before
            return result
        groups = measure("sampling", pagrpo.rollout, policy, asked, vocabulary, s, "step 0")
        text = "red " * (s.max_response - 1)                 # as long as an observation may be
        claims = [data.claim_about(r.example.record, text) for group in groups for r in group]
        measure("judging", data.blind_answers, reference, vocabulary, s, s.max_response, "cpu",
                claims)
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


@pytest.mark.parametrize("preset, whole", [("3b", 3.75e9), ("7b", 8.29e9)])
def test_weights_gradients_and_moments_are_arithmetic(preset, whole):
    """16 bytes a number for weights, gradients and moments, 2 for the reference, shared by the ranks
    of a machine."""
    settings = pagrpo.Settings(**pagrpo.PRESETS[preset])
    for ranks in (1, 4, 8):
        parts = estimate(CONFIGS[preset], settings, ranks)
        assert parts["weights"] + parts["moments"] == pytest.approx(12 * whole / ranks, rel=0.01)
        assert parts["reference"] == pytest.approx(2 * whole / ranks, rel=0.01)
        assert parts["training"] > 4 * whole / ranks
        assert parts["sampling"] > 2 * whole, "gathered on every rank"
        stays = parts["weights"] + parts["moments"] + parts["reference"]
        phases = [parts[name] for name in ("sampling", "judging", "training")]
        assert parts["peak"] == stays + max(phases)
    second = estimate(CONFIGS[preset], settings, 16)
    assert [second[name] for name in STAYS] == [parts[name] for name in STAYS], "replicas"


def test_one_rank_alone_has_a_second_copy_of_the_gradients_of_the_root():
    settings, config = pagrpo.Settings(**pagrpo.PRESETS["3b"]), CONFIGS["3b"]
    alone, several = (memory.root_backward(memory.rank_of(config, settings, ranks, True))
                      for ranks in (1, 8))
    root = config.vocab_size * config.hidden_size + config.hidden_size
    assert alone - several == pytest.approx(4 * root * 7 / 8)


def test_an_evaluation_counts_where_there_is_one():
    """At the end the policy is in half precision and has no moments; --eval-every evaluates in
    training."""
    settings, config = pagrpo.Settings(**pagrpo.PRESETS["7b"]), CONFIGS["7b"]
    at_end = replace(settings, heldout="heldout.json")
    often = replace(at_end, eval_every=100)
    never, last, between = (estimate(config, s, 8) for s in (settings, at_end, often))
    assert never["evaluation"] == last["evaluation"] > 4 * 8.29e9, "policy and judge are gathered"
    assert last["peak"] == last["evaluation"] + last["weights"] / 2 + last["reference"]
    assert between["peak"] == last["evaluation"] + sum(last[name] for name in STAYS)
    assert never["peak"] < last["peak"] < between["peak"]


def test_what_is_not_there_takes_nothing():
    settings, config = pagrpo.Settings(**pagrpo.PRESETS["7b"]), CONFIGS["7b"]
    assert estimate(config, replace(settings, offload_reference=True), 8)["reference"] == 0
    rule = replace(settings, judge="rule")
    assert estimate(config, rule, 8)["judging"] == 0 < estimate(config, rule, 8)["reference"]
    assert estimate(config, replace(rule, kl_beta=0.0), 8)["reference"] == 0
    sft_alone = estimate(config, sft.Settings(**sft.PRESETS["7b"]), 8)
    assert list(sft_alone) == ["weights", "moments", "reference", "training", "peak"]
    assert sft_alone["reference"] == 0


def test_the_document_shows_what_the_command_prints(tmp_path, monkeypatch):
    """No file is read or made for it."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for line in DOCUMENT.read_text().splitlines():
        preset, *cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if preset in ("3b", "7b") and len(cells) == 9:
            printed = memory.table(memory.parse(["--preset", preset])).splitlines()
            assert cells in [row.split() for row in printed], line
            rows.append((preset, cells[0]))
    assert rows == [(preset, ranks) for preset in ("3b", "7b") for ranks in ("1", "2", "4", "8")]
    assert not list(tmp_path.iterdir())


def test_sft_has_a_table_of_its_own_and_flags_decide():
    assert "training" in memory.table(memory.parse(["sft", "--preset", "7b", "--batch", "64"]))
    shorter = memory.parse(["--preset", "7b", "--max-response", "64"])
    assert memory.table(shorter) != memory.table(memory.parse(["--preset", "7b"]))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_ends_in_a_line_with_the_flags_that_help(error, toy, base, tmp_path,
                                                              monkeypatch):
    def full(*args):
        raise error
    monkeypatch.setattr(sft, "optimizer_step", full)
    with pytest.raises(SystemExit) as ended:
        pagrpo.main(["--preset", "tiny", "--out", str(tmp_path), "--model", str(base),
                     "--data", str(toy / "rl.json"), "--media", str(toy), "--steps", "2",
                     "--group-size", "2"])
    message = str(ended.value)
    assert message.startswith("Out of memory. Less is needed with --save-memory, --micro-batch 1, ")
    assert "tests/memory.py" in message and "same command starts again" in message
    assert "\n" not in message
