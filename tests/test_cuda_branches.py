"""Promise: the branches that only a GPU takes compute what the CPU's do. They are run here without one.

`is_cuda` says yes, the flash kernels are plain softmax with the checks that the real ones make, and a CUDA graph is a
list of the operations that were recorded, computed again into the same memory: a number or an address that should
change with the token stays as it was, as in a real graph.
"""
from contextlib import contextmanager

import pytest
import torch
from test_cuda import caches, softmax_of_all
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import model as network
from model import (attention_by_head, block_attention, causal_attention, decode_attention, load_model,
                   packed_attention, plain_attention)


def by_rows(q, k, v, starts_q, starts_k, longest_q, longest_k, causal):
    """Row after row, q (ΣQ, H, E), k, v (ΣS, K, E); causal: the last query of a row sees all its keys."""
    assert starts_q.dtype == starts_k.dtype == torch.int32 and starts_q[0] == starts_k[0] == 0
    lengths_q, lengths_k = starts_q.diff().tolist(), starts_k.diff().tolist()
    assert (longest_q, longest_k) == (max(lengths_q), max(lengths_k))
    attend = causal_attention if causal else attention_by_head
    rows = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([attend(*(x[None] for x in row))[0] for row in rows])


def torch_varlen(*inputs, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn of torch 2.12 and later."""
    assert enable_gqa
    return by_rows(*inputs, window_size == (-1, 0))


def flash_attn(*inputs, causal):
    """flash_attn.flash_attn_varlen_func."""
    return by_rows(*inputs, causal)


def flash_kernel(q, k, v, starts_q, starts_k, longest_q, longest_k, dropout, causal, debug, *, seqused_k):
    """The kernel below varlen_attn, as decoding calls it: equal rows of which the first seqused_k places count."""
    assert not (dropout or causal or debug or q.requires_grad) and seqused_k.dtype == torch.int32
    n, h, e = len(seqused_k), *q.shape[1:]
    for starts, length in ((starts_q, longest_q), (starts_k, longest_k)):
        assert starts.numpy().tolist() == [i * length for i in range(n + 1)]                   # unseen by the tape
    keys, values = (x.repeat_interleave(h // k.shape[1], 1).view(n, longest_k, h, e).transpose(1, 2) for x in (k, v))
    unused = torch.arange(longest_k) >= seqused_k.view(n, 1, 1, 1)
    mask = torch.zeros(unused.shape).masked_fill(unused, -torch.inf)
    out, lse = plain_attention(q.view(n, longest_q, h, e).transpose(1, 2), keys, values, mask)
    return out.transpose(1, 2).reshape(q.shape), lse.transpose(0, 1).reshape(h, -1), None, None, None


class Tape(TorchDispatchMode):
    """A CUDA graph: inside, it records operations. One that waits for the GPU is an error, as in a real capture."""

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
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():        # else a view, or in place
                    old.copy_(new)


@pytest.fixture
def on_gpu(monkeypatch):
    """A context: inside, tensors on the CPU take the branches of CUDA. `half`: those of half precision."""
    @contextmanager
    def context(half=True, installed=None):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type != "meta"))
            patch.setattr(network, "takes_flash", lambda x: half)
            patch.setattr(network, "varlen_attn", torch_varlen)
            patch.setattr(network, "GQA", {"enable_gqa": True})
            patch.setattr(network, "flash_attn_varlen_func", installed)
            patch.setattr(torch.ops.aten, "_flash_attention_forward", flash_kernel)
            patch.setattr(torch.cuda, "CUDAGraph", Tape)
            patch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: graph)
            yield
    return context


@pytest.mark.parametrize("installed", [None, flash_attn], ids=["torch", "flash-attn"])
def test_vision_blocks(on_gpu, installed):
    lengths = [64, 32, 4, 12]
    qkv = torch.randn(3, sum(lengths), 4, 80)
    expected = block_attention(*qkv, lengths)
    with on_gpu(installed=installed):
        assert torch.allclose(block_attention(*qkv, lengths), expected, atol=1e-5)


@pytest.mark.parametrize("installed", [None, flash_attn], ids=["torch", "flash-attn"])
@pytest.mark.parametrize("lengths, group", [([24, 24], 3), ([24, 17, 5], 2), ([9, 4], 1)])
def test_training_rows_with_their_gradients(on_gpu, lengths, group, installed):
    """Prompts, padded or not, and the responses of all questions in one call."""
    width = max(lengths)
    qkv = [torch.randn(len(lengths), width + group * 6, heads, 16, requires_grad=True) for heads in (14, 2, 2)]
    expected = packed_attention(*qkv, group, lengths, width)
    with on_gpu(installed=installed):
        found = packed_attention(*qkv, group, lengths, width)
    assert torch.allclose(found, expected, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(out.sin().sum(), qkv) for out in (found, expected))):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("heads, kv", [(4, 4), (28, 4)])
@pytest.mark.parametrize("questions, group", [(1, 8), (2, 3), (3, 1)])
def test_decoding_from_two_caches_is_one_softmax(on_gpu, questions, group, heads, kv):
    """On the CPU, and on a GPU in half precision and in fp32."""
    for used in (1, 5, 8):
        call = caches(questions, group, heads, kv, 24, 8, used, "cpu", torch.float32)
        expected = softmax_of_all(*call)
        assert torch.allclose(decode_attention(*call), expected, atol=1e-5)
        for half in (True, False):
            with on_gpu(half):
                assert torch.allclose(decode_attention(*call), expected, atol=1e-5)


@pytest.mark.parametrize("count, group", [(1, 3), (3, 2), (3, 1)])
def test_the_recorded_step_samples_the_tokens_of_the_cpu(
        on_gpu, base, folders, vocabulary, tiny_settings, count, group):
    """And scoring on the GPU gives the log-probabilities with which they were sampled."""
    model = vocabulary.mask_special_tokens(load_model(base))
    examples = data.Examples(data.read_records(folders), folders.parent, vocabulary, model.config, tiny_settings)
    prompts = data.collate([examples[i] for i in range(count)])
    asked = prompts, torch.rand(count, group, 20), list(range(8, 40))
    expected = model.generate(*asked)
    with on_gpu(), torch.no_grad():
        sampled = model.generate(*asked)
        scored, _ = model.logprobs(prompts, sampled.tokens, sampled.lengths)
    assert torch.equal(sampled.tokens, expected.tokens) and torch.equal(sampled.lengths, expected.lengths)
    for logprobs in (expected.logprobs, scored):
        assert torch.allclose(sampled.logprobs, logprobs, atol=1e-4)


def test_where_rows_start_can_be_used_in_training():
    with torch.inference_mode():
        assert not network.starts((2, 3), torch.device("cpu")).is_inference()


@pytest.mark.parametrize("dtype, half", [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_flash_kernels_are_for_cuda_in_half_precision(dtype, half, monkeypatch):
    x = torch.zeros(1, dtype=dtype)
    assert not network.takes_flash(x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert network.takes_flash(x) is half
