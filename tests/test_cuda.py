"""Promise: on a GPU the numbers are those of the CPU, up to bf16. Skipped where there is none."""
import pytest
import torch

import data
import pagrpo
import sft
import model as network
from model import Qwen2_5_VL, load_model, qwen, shard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def world():
    return sft.start_world()


@pytest.fixture(scope="module")
def step(toy, base, vocabulary, tiny_settings):
    """Two prompts of different lengths with two responses each: inputs of `logprobs`."""
    records = data.read_records(toy / "rl.json")
    examples = data.Examples(records, toy, vocabulary, network.read_config(base), tiny_settings)
    tokens = torch.randint(8, 300, (2, 2, 9), generator=torch.Generator().manual_seed(0))
    return data.collate([examples[0], examples[1]]), tokens, torch.tensor([[9, 4], [1, 7]])


def on_gpu(step):
    prompts, *tensors = step
    return prompts.to("cuda"), *(x.cuda() for x in tensors)


def half(base, vocabulary):
    return vocabulary.mask_special_tokens(load_model(base, torch.bfloat16, "cuda"))


def test_kl_is_0_before_the_first_update(base, vocabulary, world, step, monkeypatch):
    """The policy keeps fp32 weights and computes in bf16; the reference keeps bf16: the same numbers."""
    monkeypatch.setattr(network, "SMALLEST_IN_BF16", 0)
    policy = shard(load_model(base, device="cuda"), world.mesh(0))
    reference = shard(load_model(base, torch.bfloat16, "cuda"), world.mesh(0))
    with torch.no_grad():
        ours, theirs = (vocabulary.mask_special_tokens(m).logprobs(*on_gpu(step))[0] for m in (policy, reference))
    _, kl, _ = pagrpo.pa_grpo_loss(ours, ours, theirs, torch.zeros_like(ours), torch.ones_like(ours), 0.2, 0.04)
    assert kl.abs().max() == 0


def test_greedy_tokens_are_the_most_likely_ones_when_scored(base, vocabulary, step):
    model, (prompts, _, _) = half(base, vocabulary), on_gpu(step)
    sampled = model.generate(prompts, torch.zeros(2, 3, 12), vocabulary.stop_ids, temperature=0)
    scored, _ = model.logprobs(prompts, sampled.tokens, sampled.lengths)
    assert (scored - sampled.logprobs).abs().max() < 0.1


@pytest.mark.parametrize("equal", [True, False], ids=["equal prompts", "unequal prompts"])
def test_gradients_of_a_step_are_those_of_fp32_on_a_cpu(equal, base, vocabulary, step):
    prompts, tokens, lengths = step
    if equal:
        one = data.Prompts(prompts.ids[:1, :prompts.lengths[0]], prompts.lengths[:1],
                           prompts.positions[:, :1, :prompts.lengths[0]], prompts.next_position[:1],
                           prompts.pixels[:len(prompts.pixels) // 2], prompts.grid[:1])
        prompts, tokens, lengths = one, tokens[:1], lengths[:1]
    grads = []
    for model, inputs in ((load_model(base), (prompts, tokens, lengths)),
                          (load_model(base, torch.bfloat16, "cuda"), on_gpu((prompts, tokens, lengths)))):
        vocabulary.mask_special_tokens(model).logprobs(*inputs)[0].sum().backward()
        grads.append({name: p.grad.float().cpu() for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        assert torch.linalg.norm(grads[1][name] - expected) <= 0.05 * torch.linalg.norm(expected) + 1e-6, name


def test_windows_and_heads_of_the_real_shape(world):
    """Head widths 80 and 128, unequal windows, 7 query heads a key head: what flash kernels are asked for at 3B, 7B."""
    config = qwen(1792, 2, 14, 2, 256, 512, True, ids=(6, 7), vision=dict(depth=2, fullatt_block_indexes=(1,)))
    torch.manual_seed(0)
    model = Qwen2_5_VL(config).to("cuda", torch.bfloat16)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    features = model.visual(torch.randn(2 * 12 * 20, 1176, device="cuda", dtype=torch.bfloat16), [(2, 12, 20)])
    exact = model.float().visual(torch.randn(2 * 12 * 20, 1176, device="cuda"), [(2, 12, 20)])
    assert features.shape == exact.shape and torch.isfinite(features).all()


def test_one_sharded_step_on_one_rank(toy, base, tmp_path):
    settings = pagrpo.Settings(**pagrpo.PRESETS["tiny"] | dict(
        data=str(toy / "rl.json"), media=str(toy), model=str(base), out=str(tmp_path), questions=2, group_size=2,
        max_response=12, steps=1))
    pagrpo.run_stage(settings, sft.start_world())
    assert (tmp_path / "pagrpo" / "step-000001" / "model.safetensors").is_file()
