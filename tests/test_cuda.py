"""Promise: on a GPU the numbers are those of the CPU, up to bf16. Skipped where there is none. Clips are folders of
pictures: no video decoder is needed."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import data
import pagrpo
import sft
import model as network
from model import (KV, Qwen2_5_VL, Step, decode_attention, init_weights, load_model, packed_attention, qwen,
                   record_step, shard)
from torch.nn.attention import SDPBackend, sdpa_kernel

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def examples(folders, base, vocabulary, tiny_settings):
    """Two questions with prompts of different lengths."""
    config = network.read_config(base)
    found = data.Examples(data.read_records(folders), folders.parent, vocabulary, config, tiny_settings)
    return [found[0], found[1]]


def inputs(examples, device="cuda"):
    """Those of `logprobs`, with two responses to each question."""
    tokens = torch.randint(8, 300, (2, 2, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[9, 4], [1, 7]])
    b = len(examples)
    return [x.to(device) for x in (data.collate(examples), tokens[:b], lengths[:b])]


@pytest.fixture
def half(base, vocabulary):
    return vocabulary.mask_special_tokens(load_model(base, torch.bfloat16, "cuda"))


def near(found, expected, share=0.02):
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    return torch.linalg.norm(found - expected) <= share * torch.linalg.norm(expected) + 1e-6


@no_gpu
def test_kl_is_0_before_the_first_update(base, vocabulary, half, examples, monkeypatch):
    """The policy keeps fp32 weights and computes in bf16; the reference keeps bf16: the same numbers."""
    monkeypatch.setattr(network, "SMALLEST_IN_BF16", 0)
    policy, mesh = vocabulary.mask_special_tokens(load_model(base, device="cuda")), sft.start_world().mesh()
    with torch.no_grad():
        ours, theirs = (shard(model, mesh).logprobs(*inputs(examples))[0] for model in (policy, half))
    _, kl, _ = pagrpo.pa_grpo_loss(ours, ours, theirs, ours, ours, 0.2, 0.04)
    assert kl.abs().max() == 0


@no_gpu
def test_greedy_tokens_are_the_most_likely_ones_when_scored(half, vocabulary, examples):
    prompts, _, _ = inputs(examples)
    sampled = half.generate(prompts, torch.zeros(2, 3, 12), vocabulary.stop_ids, temperature=0)
    scored, _ = half.logprobs(prompts, sampled.tokens, sampled.lengths)
    assert (scored - sampled.logprobs).abs().max() < 0.1


@no_gpu
@pytest.mark.parametrize("count", [1, 2], ids=["one prompt", "unequal prompts"])
def test_gradients_of_a_step_are_those_of_fp32_on_a_cpu(count, base, half, vocabulary, examples):
    exact = vocabulary.mask_special_tokens(load_model(base))
    for model, device in ((exact, "cpu"), (half, "cuda")):
        model.logprobs(*inputs(examples[:count], device))[0].sum().backward()
    for (name, p), q in zip(exact.named_parameters(), half.parameters()):
        assert near(q.grad, p.grad, 0.08), name


@no_gpu
def test_windows_and_heads_of_the_real_shape():
    """Heads of width 80 and unequal windows: what flash kernels are asked for in the encoder of 3B and 7B."""
    config = qwen(1792, 2, 14, 2, 256, 512, True, ids=(6, 7), vision=dict(depth=2, fullatt_block_indexes=(1,)))
    model = init_weights(Qwen2_5_VL(config), seed=0).to("cuda", torch.bfloat16)
    pixels = torch.randn(2 * 12 * 20, 1176, device="cuda", dtype=torch.bfloat16)
    assert model.visual(pixels, [(2, 12, 20)]).isfinite().all()


@no_gpu
@torch.no_grad()
def test_a_recorded_step_computes_what_the_plain_one_does(half, examples):
    prompts, _, _ = inputs(examples)
    _, prompt_kv = half.prefill(prompts)
    plain, recorded = (Step(half, prompts, prompt_kv, 3, 8) for _ in range(2))
    record_step(recorded)
    for t in range(8):
        tokens = torch.randint(8, 300, (6,), device="cuda")
        expected = plain(tokens, t)
        real = expected > -1e29                              # the others are masked
        assert (recorded(tokens, t) - expected)[real].abs().max() <= 0.01 * expected[real].abs().max()


@no_gpu
@pytest.mark.parametrize("heads, kv", [(16, 2), (28, 4)], ids=["3b", "7b"])
def test_flash_kernels_take_the_heads_of_the_real_shape(heads, kv):
    """Training with its gradients, for prompts of unequal lengths, against fp32 on a CPU."""
    row = 3, [24, 17], 24
    flash = [torch.randn(2, 24 + 3 * 8, h, 128).cuda().bfloat16().requires_grad_() for h in (heads, kv, kv)]
    exact = [x.detach().cpu().float().requires_grad_() for x in flash]
    expected = packed_attention(*exact, *row)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):            # an error if that cannot compute it
        found = packed_attention(*flash, *row)
    for out in (expected, found):
        out.sum().backward()
    assert near(found, expected)
    assert all(near(x.grad, y.grad) for x, y in zip(flash, exact))


def softmax_of_all(q, prompt, own):
    """What `decode_attention` computes in two parts, in one softmax a row and in fp32. Its arguments and result."""
    group, rows = len(q) // len(prompt.k), []
    for n, (heads, used) in enumerate(zip(q, own.used)):
        of_prompt = n // group, slice(0, int(prompt.used[n // group]))
        k, v = (torch.cat([a[of_prompt], b[n, :used]]).float().transpose(0, 1)[None]           # (1, K, S, E)
                for a, b in ((prompt.k, own.k), (prompt.v, own.v)))
        rows.append(F.scaled_dot_product_attention(heads[None, :, None].float(), k, v, enable_gqa=True)[0, :, 0])
    return torch.stack(rows)


def caches(questions, group, heads, kv, p, room, used, device, dtype):
    """Arguments of `decode_attention` in the middle of a response: prompts of unequal lengths, the longest of P."""
    made, n = partial(torch.randn, device=device, dtype=dtype), questions * group
    lengths = torch.randint(p // 2, p + 1, (questions,), device=device, dtype=torch.int32)
    lengths[0] = p
    padding = torch.arange(p, device=device) >= lengths[:, None, None, None]
    mask = torch.zeros_like(padding, dtype=dtype).masked_fill(padding, -torch.inf)
    full, place = torch.full((n,), used, device=device, dtype=torch.int32), torch.tensor([used - 1], device=device)
    prompt = KV(made(questions, p, kv, 128), made(questions, p, kv, 128), lengths, mask)
    return made(n, heads, 128), prompt, KV(made(n, room, kv, 128), made(n, room, kv, 128), full, None, place)


@no_gpu
@torch.no_grad()
@pytest.mark.parametrize("heads, kv", [(16, 2), (28, 4)], ids=["3b", "7b"])
@pytest.mark.parametrize("questions, group", [(1, 8), (8, 8), (64, 1)])
def test_decoding_where_the_kernel_splits_the_keys(questions, group, heads, kv):
    """Few rows and long caches, as real runs have them: several blocks of the card share the keys of a row, and the
    parts are joined by their log-sum-exp. 700 of 768 places of the responses are in use; the judge and an evaluation
    have one response to a prompt."""
    call = caches(questions, group, heads, kv, 1424, 768, 700, "cuda", torch.bfloat16)
    assert near(decode_attention(*call), softmax_of_all(*call))


@no_gpu
def test_one_sharded_step_on_one_rank(folders, base, tmp_path):
    settings = pagrpo.Settings(**pagrpo.PRESETS["tiny"] | dict(
        data=str(folders), media=str(folders.parent), model=str(base), out=str(tmp_path), questions=2, group_size=2,
        max_response=12, steps=1))
    pagrpo.run_stage(settings, sft.start_world())
    assert (tmp_path / "pagrpo" / "step-000001" / "model.safetensors").is_file()
