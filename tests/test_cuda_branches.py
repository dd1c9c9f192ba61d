"""Promise: the branches that only a GPU takes compute what the CPU's do. They are run here without one.

`is_cuda` says yes, the flash kernels are plain softmax with the checks that the real ones make, and a CUDA graph is a
list of the operations that were recorded, computed again into the same memory: a number or an address that should
change with the token stays as it was, as in a real graph.
"""
from contextlib import contextmanager, suppress

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as network
from model import KV, Prompts, Qwen2_5_VL, block_attention, decode_attention, init_weights, packed_attention, qwen


def softmax_rows(q, k, v, starts_q, starts_k, longest_q, longest_k, causal):
    """Row after row, q (ΣQ, H, E), k, v (ΣS, K, E); causal: the last query of a row sees all its keys."""
    assert starts_q.dtype == starts_k.dtype == torch.int32 and q.shape[1] % k.shape[1] == 0
    ends_q, ends_k = starts_q.tolist(), starts_k.tolist()
    assert (ends_q[-1], ends_k[-1]) == (len(q), len(k)) and len(ends_q) == len(ends_k)
    assert longest_q == starts_q.diff().max() and longest_k == starts_k.diff().max()
    outs = []
    for i in range(len(ends_q) - 1):
        own_q = q[ends_q[i]:ends_q[i + 1]].float()
        own_k, own_v = (x[ends_k[i]:ends_k[i + 1]].float() for x in (k, v))
        own_k, own_v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (own_k, own_v))
        scores = torch.einsum("qhe,khe->hqk", own_q, own_k) * q.shape[-1] ** -0.5
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - scores.shape[1] + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        outs.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), own_v).to(q.dtype))
    return torch.cat(outs)


def torch_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size=(-1, -1), enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn of torch 2.12 and later."""
    assert enable_gqa or q.shape[1] == k.shape[1]
    return softmax_rows(q, k, v, starts_q, starts_k, longest_q, longest_k, window_size == (-1, 0))


def torch_211_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size=(-1, -1)):
    return softmax_rows(q, k, v, starts_q, starts_k, longest_q, longest_k, window_size == (-1, 0))


def flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
               causal=False):
    """flash_attn.flash_attn_varlen_func."""
    assert not dropout_p and softmax_scale is None
    return softmax_rows(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)


def flash_kernel(q, k, v, starts_q, starts_k, longest_q, longest_k, dropout, causal, debug, *, seqused_k):
    """The kernel below varlen_attn, as decoding calls it: equal rows of which the first seqused_k places count."""
    assert not (dropout or causal or debug or q.requires_grad) and seqused_k.dtype == torch.int32
    n, h, e = len(seqused_k), *q.shape[1:]
    for starts, length in ((starts_q, longest_q), (starts_k, longest_k)):                      # read past the tape
        assert starts.numpy().tolist() == [i * length for i in range(n + 1)] and starts.dtype == torch.int32
    keys, values = (x.repeat_interleave(h // k.shape[1], 1).view(n, longest_k, h, e).float() for x in (k, v))
    scores = torch.einsum("nqhe,nkhe->nhqk", q.view(n, longest_q, h, e).float(), keys) * e ** -0.5
    scores = scores.masked_fill(torch.arange(longest_k) >= seqused_k.view(n, 1, 1, 1), -torch.inf)
    out = torch.einsum("nhqk,nkhe->nqhe", scores.softmax(-1), values).to(q.dtype).reshape(q.shape)
    return out, scores.logsumexp(-1).transpose(0, 1).reshape(h, -1), None, None, None


class Tape(TorchDispatchMode):
    """Records operations. One that waits for the GPU is an error, as in a real capture."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"), name
        out = operation(*args, **(kwargs or {}))
        self.steps.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        for operation, args, kwargs, out in self.steps:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():         # else a view, or in place
                    old.copy_(new)


class Graph:
    def replay(self):
        self.tape.replay()


@contextmanager
def record(graph, capture_error_mode):
    graph.tape = Tape()
    with graph.tape:
        yield


@pytest.fixture
def on_gpu(monkeypatch):
    """A context: inside, tensors on the CPU take the branches of CUDA. `half`: those of half precision."""
    @contextmanager
    def context(half=True, varlen=torch_varlen, installed=None):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type != "meta"))
            patch.setattr(network, "takes_flash", lambda x: half)
            patch.setattr(network, "varlen_attn", varlen)
            patch.setattr(network, "GQA", {} if varlen is torch_211_varlen else {"enable_gqa": True})
            patch.setattr(network, "flash_attn_varlen_func", installed)
            patch.setattr(torch.ops.aten, "_flash_attention_forward", flash_kernel)
            patch.setattr(torch.cuda, "CUDAGraph", Graph)
            patch.setattr(torch.cuda, "graph", record)
            yield
    return context


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


KERNELS = {"torch": dict(), "torch 2.11": dict(varlen=torch_211_varlen), "flash-attn": dict(installed=flash_attn)}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lengths", [[16, 16, 16], [64, 32, 4, 12]], ids=["equal blocks", "unequal blocks"])
def test_vision_blocks(on_gpu, lengths, kernel):
    q, k, v = (random(sum(lengths), 4, 80, seed=i) for i in range(3))
    expected = block_attention(q, k, v, lengths)
    with on_gpu(**KERNELS[kernel]):
        assert torch.allclose(block_attention(q, k, v, lengths), expected, atol=1e-5)


@pytest.mark.parametrize("kernel", [*KERNELS, "fp32"])
@pytest.mark.parametrize("heads, kv", [(4, 4), (14, 2), (16, 2)])
@pytest.mark.parametrize("lengths, group", [([24, 24], 3), ([24, 17, 5], 2), ([9, 4], 1)])
def test_training_rows_with_their_gradients(on_gpu, lengths, group, heads, kv, kernel):
    """Prompts, padded or not, and the responses of all questions in one call."""
    results = []
    for settings in (None, KERNELS.get(kernel, dict(half=False))):
        inputs = [random(len(lengths), max(lengths) + group * 6, h, 16, seed=h).requires_grad_()
                  for h in (heads, kv, kv)]
        with on_gpu(**settings) if settings is not None else suppress():
            out = packed_attention(*inputs, group, lengths, max(lengths))
        (out * random(*out.shape, seed=9)).sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    for ours, expected in zip(*results):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", [True, False], ids=["half precision", "fp32"])
@pytest.mark.parametrize("heads, kv", [(4, 4), (28, 4), (16, 2)])
@pytest.mark.parametrize("lengths, group", [([9], 8), ([24, 17], 3), ([24, 17, 5], 1)])
def test_decoding_from_two_caches_is_one_softmax(on_gpu, lengths, group, heads, kv, half):
    n, p, room, e = len(lengths), max(lengths), 8, 32
    q, prompt, own = random(n * group, heads, e), random(n, p, kv, e, seed=1), random(n * group, room, kv, e, seed=2)
    used = torch.tensor(lengths, dtype=torch.int32)
    padding = torch.arange(p) >= used[:, None]
    mask = torch.zeros(n, 1, 1, p).masked_fill(padding[:, None, None], -torch.inf) if padding.any() else None
    for at in (0, 4, 7):
        counts = torch.full((n * group,), at + 1, dtype=torch.int32)
        caches = KV(prompt, prompt.flip(0), used, mask), KV(own, -own, counts, None, torch.tensor([at]))
        keys = torch.cat([prompt.repeat_interleave(group, 0), own[:, :at + 1]], 1).repeat_interleave(heads // kv, 2)
        values = torch.cat([prompt.flip(0).repeat_interleave(group, 0), -own[:, :at + 1]], 1)
        hidden = torch.cat([padding.repeat_interleave(group, 0), torch.zeros(n * group, at + 1).bool()], 1)
        scores = torch.einsum("nhe,nkhe->nhk", q, keys) * e ** -0.5
        weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
        expected = torch.einsum("nhk,nkhe->nhe", weights, values.repeat_interleave(heads // kv, 2))
        with on_gpu(half):
            assert torch.allclose(decode_attention(q, *caches), expected, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    """Widths of the real shape: heads of 80 in the encoder and 128 in the decoder, 7 query heads a key head."""
    vision = dict(hidden_size=160, depth=2, num_heads=2, intermediate_size=64, fullatt_block_indexes=(1,))
    built = init_weights(Qwen2_5_VL(qwen(896, 2, 7, 1, 128, 384, True, ids=(6, 7), vision=vision)), seed=0)
    built.masked_token_ids = torch.tensor([5, 6, 7, 380, 381])
    return built


def make_prompts(lengths, media):
    ids = torch.randint(8, 300, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(max(lengths)).expand(3, len(lengths), -1)
    if not media:
        return Prompts(ids, torch.tensor(lengths), positions, torch.tensor(lengths), None, [])
    ids[:, 1:5] = 6
    grid = [(1, 4, 4)] * len(lengths)
    return Prompts(ids, torch.tensor(lengths), positions, torch.tensor(lengths), random(16 * len(lengths), 1176), grid)


@pytest.mark.parametrize("lengths, group, media", [([20, 20], 3, True), ([20, 13, 7], 3, True), ([20, 13], 1, False)])
def test_the_recorded_step_samples_the_tokens_of_the_cpu(on_gpu, model, lengths, group, media):
    """And scoring on the GPU gives the log-probabilities with which they were sampled."""
    prompts, uniforms = make_prompts(lengths, media), torch.rand(len(lengths), group, 10)
    for temperature, top_p in ((1.0, 1.0), (0.8, 0.9), (0.0, 1.0)):
        expected = model.generate(prompts, uniforms, [3, 4], temperature, top_p)
        with on_gpu():
            sampled = model.generate(prompts, uniforms, [3, 4], temperature, top_p)
        assert torch.equal(sampled.tokens, expected.tokens) and torch.equal(sampled.lengths, expected.lengths)
        assert torch.allclose(sampled.logprobs, expected.logprobs, atol=1e-4)
    with on_gpu(installed=flash_attn), torch.no_grad():
        scored, _ = model.logprobs(prompts, sampled.tokens, sampled.lengths)
    assert torch.allclose(scored, sampled.logprobs, atol=1e-4)


def test_where_rows_start_is_computed_once_and_can_be_used_in_training():
    with torch.inference_mode():
        made = network.starts((2, 3), torch.device("cpu"))
    assert made.tolist() == [0, 2, 5] and made.dtype == torch.int32 and not made.is_inference()
    assert network.starts((2, 3), torch.device("cpu")) is made


@pytest.mark.parametrize("dtype, half", [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_flash_kernels_are_for_cuda_in_half_precision(dtype, half, monkeypatch):
    x = torch.zeros(1, dtype=dtype)
    assert not network.takes_flash(x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert network.takes_flash(x) is half


def test_sdpa_does_not_choose_a_kernel_that_plans_for_each_new_shape():
    assert not torch.backends.cuda.cudnn_sdp_enabled()
