"""Promise: on a GPU the numbers are those of the CPU, up to bf16. Skipped where there is none, but for the formula that
a kernel is compared with. Clips are folders of pictures: no video decoder is needed."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import data
import pagrpo
import sft
import model as network
from model import KV, Qwen2_5_VL, Step, decode_attention, load_model, packed_attention, qwen, record_step, shard
from torch.nn.attention import SDPBackend, sdpa_kernel

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def world():
    return sft.start_world()


@pytest.fixture(scope="module")
def step(folders, base, vocabulary, tiny_settings):
    """Two prompts of different lengths with two responses each: inputs of `logprobs`."""
    config = network.read_config(base)
    examples = data.Examples(data.read_records(folders), folders.parent, vocabulary, config, tiny_settings)
    tokens = torch.randint(8, 300, (2, 2, 9), generator=torch.Generator().manual_seed(0))
    return data.collate([examples[0], examples[1]]), tokens, torch.tensor([[9, 4], [1, 7]])


def on_gpu(step):
    prompts, *tensors = step
    return prompts.to("cuda"), *(x.cuda() for x in tensors)


def half(base, vocabulary):
    return vocabulary.mask_special_tokens(load_model(base, torch.bfloat16, "cuda"))


@no_gpu
def test_kl_is_0_before_the_first_update(base, vocabulary, world, step, monkeypatch):
    """The policy keeps fp32 weights and computes in bf16; the reference keeps bf16: the same numbers."""
    monkeypatch.setattr(network, "SMALLEST_IN_BF16", 0)
    policy = shard(load_model(base, device="cuda"), world.mesh())
    reference = shard(load_model(base, torch.bfloat16, "cuda"), world.mesh())
    with torch.no_grad():
        ours, theirs = (vocabulary.mask_special_tokens(m).logprobs(*on_gpu(step))[0] for m in (policy, reference))
    _, kl, _ = pagrpo.pa_grpo_loss(ours, ours, theirs, torch.zeros_like(ours), torch.ones_like(ours), 0.2, 0.04)
    assert kl.abs().max() == 0


@no_gpu
def test_greedy_tokens_are_the_most_likely_ones_when_scored(base, vocabulary, step):
    model, (prompts, _, _) = half(base, vocabulary), on_gpu(step)
    sampled = model.generate(prompts, torch.zeros(2, 3, 12), vocabulary.stop_ids, temperature=0)
    scored, _ = model.logprobs(prompts, sampled.tokens, sampled.lengths)
    assert (scored - sampled.logprobs).abs().max() < 0.1


@no_gpu
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
        assert torch.linalg.norm(grads[1][name] - expected) <= 0.08 * torch.linalg.norm(expected) + 1e-6, name


@no_gpu
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


@no_gpu
@torch.no_grad()
def test_a_recorded_step_computes_what_the_plain_one_does(base, vocabulary, step):
    model, (prompts, _, _) = half(base, vocabulary), on_gpu(step)
    _, prompt_kv = model.prefill(prompts)
    plain, recorded = (Step(model, prompts, prompt_kv, 3, 8) for _ in range(2))
    record_step(recorded)
    for t in range(8):
        tokens = torch.randint(8, 300, (6,), generator=torch.Generator().manual_seed(t)).cuda()
        expected = plain(tokens, t)
        real = expected > -1e29                              # the others are masked
        assert (recorded(tokens, t) - expected)[real].abs().max() <= 0.01 * expected[real].abs().max()


@no_gpu
@pytest.mark.parametrize("heads, kv", [(16, 2), (28, 4)], ids=["3b", "7b"])
def test_flash_kernels_take_the_heads_of_the_real_shape(heads, kv):
    """Training with its gradients, and decoding, for prompts of unequal lengths, against fp32 on a CPU."""
    torch.manual_seed(0)
    row, sizes = (3, [24, 17], 24), (heads, kv, kv)
    exact = [torch.randn(2, 24 + 3 * 8, h, 128).bfloat16().float().requires_grad_() for h in sizes]
    flash = [x.detach().cuda().bfloat16().requires_grad_() for x in exact]
    expected = packed_attention(*exact, *row)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):            # an error if that cannot compute it
        found = packed_attention(*flash, *row)
    for out in (expected, found):
        out.sum().backward()
    for a, b in ((found, expected), *((x.grad, y.grad) for x, y in zip(flash, exact))):
        assert torch.linalg.norm(a.detach().float().cpu() - b.detach()) <= 0.02 * torch.linalg.norm(b.detach())

    q, prompt, own = (torch.randn(*shape, 128).bfloat16().float() for shape in ((6, heads), (2, 24, kv), (6, 8, kv)))
    used = torch.tensor([24, 17], dtype=torch.int32)
    mask = torch.zeros(2, 1, 1, 24).masked_fill(torch.arange(24) >= used[:, None, None, None], -torch.inf)
    place, five = torch.tensor([4]), torch.full((6,), 5, dtype=torch.int32)
    call = (q, KV(prompt, -prompt, used, mask), KV(own, -own, five, None, place))
    caches = [KV(*(None if x is None else x.cuda() for x in kv)) for kv in call[1:]]
    caches = [kv._replace(k=kv.k.bfloat16(), v=kv.v.bfloat16()) for kv in caches]
    expected, found = decode_attention(*call), decode_attention(q.cuda().bfloat16(), *caches).float().cpu()
    assert torch.linalg.norm(found - expected) <= 0.02 * torch.linalg.norm(expected)


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
    torch.manual_seed(0)
    made, n = partial(torch.randn, device=device, dtype=dtype), questions * group
    lengths = torch.randint(p // 2, p + 1, (questions,), device=device, dtype=torch.int32)
    lengths[0] = p
    padding = torch.arange(p, device=device) >= lengths[:, None, None, None]
    mask = torch.zeros_like(padding, dtype=dtype).masked_fill(padding, -torch.inf)
    full, place = torch.full((n,), used, device=device, dtype=torch.int32), torch.tensor([used - 1], device=device)
    prompt = KV(made(questions, p, kv, 128), made(questions, p, kv, 128), lengths, mask)
    return made(n, heads, 128), prompt, KV(made(n, room, kv, 128), made(n, room, kv, 128), full, None, place)


@torch.no_grad()
def test_two_parts_are_one_softmax():
    """The formula, on a CPU in fp32."""
    call = caches(3, 2, 4, 2, 24, 16, 11, "cpu", torch.float32)
    torch.testing.assert_close(decode_attention(*call), softmax_of_all(*call), rtol=1e-5, atol=1e-6)


@no_gpu
@torch.no_grad()
@pytest.mark.parametrize("heads, kv", [(16, 2), (28, 4)], ids=["3b", "7b"])
@pytest.mark.parametrize("questions, group", [(1, 8), (8, 1), (8, 8), (64, 1)])
def test_decoding_where_the_kernel_splits_the_keys(questions, group, heads, kv):
    """Few rows and long caches, as real runs have them: several blocks of the card share the keys of a row, and the
    parts are joined by their log-sum-exp. 700 of 768 places of the responses are in use; the judge and an evaluation
    have one response to a prompt."""
    call = caches(questions, group, heads, kv, 1424, 768, 700, "cuda", torch.bfloat16)
    expected = softmax_of_all(*call)
    assert torch.linalg.norm(decode_attention(*call) - expected) <= 0.02 * torch.linalg.norm(expected)


@no_gpu
def test_one_sharded_step_on_one_rank(folders, base, tmp_path):
    settings = pagrpo.Settings(**pagrpo.PRESETS["tiny"] | dict(
        data=str(folders), media=str(folders.parent), model=str(base), out=str(tmp_path), questions=2, group_size=2,
        max_response=12, steps=1))
    pagrpo.run_stage(settings, sft.start_world())
    assert (tmp_path / "pagrpo" / "step-000001" / "model.safetensors").is_file()
