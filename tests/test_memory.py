"""Promise: --dry-run says what a step takes, before anything is allocated; running out of memory ends in a line that
names the flags that help."""
import pytest
import torch

import pagrpo
import sft
from counting import Counting
from data import Vocabulary, build_example, read_records
from model import CONFIGS, Qwen2_5_VL, init_weights, qwen
from sft import TINY, World, memory

WIDE = qwen(256, 4, 4, 2, 1024, 2048, True, sections=(8, 12, 12), ids=(6, 7), vision=dict(
    hidden_size=160, depth=4, num_heads=4, intermediate_size=428, fullatt_block_indexes=(1, 3)))
BIG = TINY | dict(max_pixels=64 * 28 * 28, min_pixels=64 * 28 * 28)


def counted(settings, toy, base, config) -> float:
    """Peak bytes of two real steps: sampling, rewards, learning, and AdamW with its moments."""
    world, vocabulary = World(0, 1, torch.device("cpu")), Vocabulary(base)
    examples = [build_example(r, toy, vocabulary, config, settings) for r in read_records(toy / "rl.json")]
    with Counting() as count:
        policy, reference = (vocabulary.mask_special_tokens(init_weights(Qwen2_5_VL(config), seed)) for seed in (0, 1))
        reference = reference if settings.kl_beta else None
        policy.save_memory = settings.save_memory
        if reference:
            reference.requires_grad_(False)
        optimizer = sft.make_optimizer(policy, settings)
        for step in range(2):
            groups = pagrpo.rollout(policy, examples[:settings.questions], vocabulary, settings, f"step {step}",
                                    settings.group_size, 1.0)
            batches = pagrpo.make_batches(groups, policy, reference, vocabulary, settings, world)
            advantages = torch.ones(len(groups), settings.group_size, 2)
            pagrpo.update(policy, optimizer, batches, advantages, 1e-6, settings, world)
            del groups, batches
    return count.peak


SHAPES = [
    dict(questions=2, micro_batch=1, group_size=4, max_response=48, save_memory=True),
    dict(questions=2, micro_batch=1, group_size=4, max_response=48, save_memory=False),
    dict(questions=4, micro_batch=4, group_size=8, max_response=32, save_memory=True),
    dict(questions=1, micro_batch=1, group_size=2, max_response=160, save_memory=False, kl_beta=0.0),
    dict(questions=8, micro_batch=1, group_size=8, max_response=64, save_memory=True, max_pixels=784, min_pixels=784),
]


def shaped(changes: dict) -> pagrpo.Settings:
    return pagrpo.Settings(**BIG | changes)


@pytest.mark.parametrize("changes", SHAPES)
def test_the_table_is_what_a_step_takes(changes, toy, base):
    real = counted(shaped(changes), toy, base, WIDE)
    assert memory(WIDE, shaped(changes), ranks=1, cuda=False)["peak"] == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("preset, whole", [("3b", 3.75e9), ("7b", 8.29e9)])
def test_weights_gradients_and_moments_are_arithmetic(preset, whole):
    """16 bytes a number for weights, gradients and moments, 2 for the reference, shared by the ranks of a machine."""
    settings = pagrpo.Settings(**pagrpo.PRESETS[preset])
    for ranks in (1, 4, 8):
        parts = memory(CONFIGS[preset], settings, ranks)
        assert parts["weights"] + parts["gradients"] + parts["moments"] == pytest.approx(16 * whole / ranks, rel=0.01)
        assert parts["reference"] == pytest.approx(2 * whole / ranks, rel=0.01)
        assert parts["peak"] > sum(parts[k] for k in ("weights", "moments", "reference", "gradients"))
    assert memory(CONFIGS[preset], settings, 16) == memory(CONFIGS[preset], settings, 16) | {
        k: parts[k] for k in ("weights", "moments", "reference")}, "a second machine holds replicas"


def test_dry_run_prints_the_table_and_makes_nothing(tmp_path, capsys):
    for main, stage in ((pagrpo.main, "pagrpo"), (sft.main, "sft")):
        main(["--preset", "7b", "--dry-run", "--out", str(tmp_path / "out")])
        said = capsys.readouterr().out
        assert "weights" in said and "peak" in said and len(said.splitlines()) >= 8
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_ends_in_a_line_with_the_flags_that_help(error, toy, base, tmp_path, monkeypatch):
    def full(*args):
        raise error
    monkeypatch.setattr(sft, "optimizer_step", full)
    with pytest.raises(SystemExit) as ended:
        pagrpo.main(["--preset", "tiny", "--out", str(tmp_path), "--model", str(base), "--data", str(toy / "rl.json"),
                     "--media", str(toy), "--steps", "2", "--group-size", "2"])
    message = str(ended.value)
    assert message.startswith("Out of memory. Less is needed with --save-memory, --micro-batch 1, ")
    assert "\n" not in message and "same command starts again" in message and "pagrpo.py:" in message
