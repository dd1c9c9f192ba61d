"""Promise: the shared prompt changes nothing. Reading a prompt once for its group gives the log-probabilities and
gradients of G separate sequences, and what was scored is what was sampled."""
import pytest
import torch

from data import Examples, collate, read_records
import model as network
from model import (LOGITS_AT_ONCE, LinearByConvolution, Prompts, linear_by_convolution, load_model,
                   packed_attention, plain_attention)


@pytest.fixture(scope="module")
def batch(folders, base, vocabulary, tiny_settings):
    """A model, a ragged batch of three prompts, and two responses to each."""
    model = vocabulary.mask_special_tokens(load_model(base))
    examples = Examples(read_records(folders), folders.parent, vocabulary, model.config, tiny_settings)
    prompts = collate([examples[0], examples[1], examples[4]])
    assert len(set(prompts.lengths.tolist())) > 1, "the lesson needs prompts of different lengths"
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(8, 300, (3, 2, 7), generator=generator)
    lengths = torch.tensor([[7, 3], [1, 6], [5, 7]])
    return model, prompts, tokens, lengths


def whole_sequence_logprobs(model, prompts, tokens, lengths):
    """The plain way: each response behind its own copy of the prompt, logits everywhere, no cache and no padding."""
    result, patches = torch.zeros(tokens.shape), 0
    for b, p in enumerate(prompts.lengths.tolist()):
        count = prompts.grid[b][0] * prompts.grid[b][1] * prompts.grid[b][2]
        pixels, patches = prompts.pixels[patches:patches + count], patches + count
        for g, n in enumerate(lengths[b].tolist()):
            ids = torch.cat([prompts.ids[b, :p], tokens[b, g, :n]])[None]
            behind = (prompts.next_position[b] + torch.arange(n)).expand(3, 1, n)
            positions = torch.cat([prompts.positions[:, b:b + 1, :p], behind], dim=-1)
            alone = Prompts(ids, torch.tensor([p + n]), positions, prompts.next_position[b:b + 1], pixels,
                            [prompts.grid[b]])
            logprobs = model.logits(model.prefill(alone)[0])[0, p - 1:-1].log_softmax(-1)
            result[b, g, :n] = logprobs.gather(-1, tokens[b, g, :n, None])[:, 0]
    return result


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_logprobs_equal_those_of_separate_sequences(batch):
    model, prompts, tokens, lengths = batch
    logprobs, _ = model.logprobs(prompts, tokens, lengths)
    expected = whole_sequence_logprobs(model, prompts, tokens, lengths)
    assert (logprobs - expected).abs().max() < 1e-5
    assert bool((logprobs[0, 1, 3:] == 0).all()), "nothing is scored after the end"


def test_gradients_equal_those_of_separate_sequences(batch):
    model, *inputs = batch
    weights = torch.randn(inputs[1].shape, generator=torch.Generator().manual_seed(1))
    shared = gradients(model, (model.logprobs(*inputs)[0] * weights).sum())
    plain = gradients(model, (whole_sequence_logprobs(model, *inputs) * weights).sum())
    for name, grad in plain.items():
        assert torch.linalg.norm(shared[name] - grad) <= 1e-4 * torch.linalg.norm(grad) + 1e-7, name


def test_recomputing_blocks_in_backward_changes_no_gradient(batch):
    model, *inputs = batch
    plain = gradients(model, model.logprobs(*inputs)[0].sum())
    model.save_memory = True
    saved = gradients(model, model.logprobs(*inputs)[0].sum())
    model.save_memory = False
    assert all(torch.allclose(plain[name], saved[name], atol=1e-6) for name in plain)


def test_logits_in_chunks_change_no_logprob_and_no_gradient(batch, monkeypatch):
    model, *inputs = batch
    whole = model.logprobs(*inputs)
    plain = gradients(model, whole[0].sum())
    seen = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: seen.append(len(hidden)) or logits(hidden))
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", 4 * model.config.vocab_size)
    chunked = model.logprobs(*inputs)
    chunked_gradients = gradients(model, chunked[0].sum())
    assert max(seen) == 4 and sum(seen[:len(seen) // 2 + 1]) >= int(inputs[2].sum()), "only response places, by fours"
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, chunked))
    assert all(torch.allclose(plain[name], chunked_gradients[name], atol=1e-5) for name in plain)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_was_sampled_is_what_is_scored(batch, vocabulary, temperature):
    model, prompts, _, _ = batch
    uniforms = torch.rand(3, 4, 20, generator=torch.Generator().manual_seed(2))
    sampled = model.generate(prompts, uniforms, vocabulary.stop_ids, temperature)
    logprobs, _ = model.logprobs(prompts, sampled.tokens, sampled.lengths, temperature)
    assert (logprobs - sampled.logprobs).abs().max() < 1e-4


def test_a_group_samples_what_its_members_would_sample_alone(batch, vocabulary):
    model, prompts, _, _ = batch
    uniforms = torch.rand(3, 3, 12, generator=torch.Generator().manual_seed(3))
    together = model.generate(prompts, uniforms, vocabulary.stop_ids)
    for g in range(3):
        alone = model.generate(prompts, uniforms[:, g:g + 1], vocabulary.stop_ids)
        width = alone.tokens.shape[-1]
        assert torch.equal(together.tokens[:, g, :width], alone.tokens[:, 0])
        assert torch.equal(together.lengths[:, g], alone.lengths[:, 0])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_shortened_step_samples_the_tokens_of_the_plain_one(batch, vocabulary, monkeypatch, threads):
    """`Step` as it stands is the reference, for padded prompts and for one row as well."""
    model, prompts, _, _ = batch
    uniforms, before = torch.rand(3, 4, 30, generator=torch.Generator().manual_seed(4)), torch.get_num_threads()
    torch.set_num_threads(threads)
    p = prompts.lengths[0]
    alone = Prompts(prompts.ids[:1, :p], prompts.lengths[:1], prompts.positions[:, :1, :p], prompts.next_position[:1],
                    None, [])
    for some, numbers in ((prompts, uniforms), (alone, uniforms[:1, :1])):
        fast = model.generate(some, numbers, [-1])
        with monkeypatch.context() as patch:
            patch.setattr(network, "shorten_step", lambda step: None)
            plain = model.generate(some, numbers, [-1])
        assert torch.equal(fast.tokens, plain.tokens) and (fast.logprobs - plain.logprobs).abs().max() < 1e-5
    torch.set_num_threads(before)


def test_the_recorded_step_replays_the_plain_one(batch, monkeypatch):
    """With a stand-in for the CUDA graph that calls again what was recorded: each call has its own tokens and place."""
    class Graph:
        def replay(self):
            self.logits.copy_(forward(self.tokens))

    class Recorder:
        def __init__(self, graph, capture_error_mode):
            recording.append(graph)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    def watched(tokens):
        logits = forward(tokens)
        for graph in recording:
            graph.tokens, graph.logits = tokens, logits
        seen.append(tokens)
        return logits

    recording, seen, (model, prompts, _, _) = [], [], batch
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recorder)
    with torch.no_grad():
        _, prompt_kv = model.prefill(prompts)
        plain, recorded = (network.Step(model, prompts, prompt_kv, 2, 5) for _ in range(2))
        forward, recorded.forward = recorded.forward, watched
        network.record_step(recorded)
        for t in range(5):
            tokens = torch.arange(6) + 10 * (t + 1)
            assert torch.allclose(recorded(tokens, t), plain(tokens, t), atol=1e-5)
    assert len(recording) == 1 and len(seen) == 2, "one call to warm up, one to record"


def test_entropy_is_that_of_the_distribution_a_token_was_drawn_from(batch):
    model, prompts, tokens, lengths = batch
    _, entropy = model.logprobs(prompts, tokens, lengths)
    hidden, _ = model.prefill(prompts)
    p = model.logits(hidden[0, prompts.lengths[0] - 1][None]).softmax(-1)[0]
    assert entropy[0, 0, 0].item() == pytest.approx(-(p * p.clamp_min(1e-38).log()).sum().item(), abs=1e-4)


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def whole_row_attention(q, k, v, lengths, p, group):
    """The plain way: all places of a row see each other, except for what one large mask forbids."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))         # (B, H or K, places, E)
    places = torch.arange(q.shape[2])
    owner = ((places - p) // ((len(places) - p) // group)).masked_fill(places < p, -1)         # of a place, -1: prompt
    allowed = (places <= places[:, None]) & ((owner == owner[:, None]) | (owner == -1))
    padding = (places >= torch.tensor(lengths)[:, None]) & (places < p)
    allowed = allowed & ~padding[:, None, None] | (places < p)[:, None] & (places <= places[:, None])
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    out = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return out.transpose(1, 2)


@pytest.mark.parametrize("lengths", [[11, 11, 11], [11, 4, 7]], ids=["equal prompts", "padded prompts"])
def test_packed_attention_is_attention_with_one_large_mask(lengths):
    """With gradients. Two responses of 5 tokens to each prompt, 4 query heads share 2 key heads."""
    results = []
    for attend in (lambda *qkv: packed_attention(*qkv, 2, lengths, 11),
                   lambda *qkv: whole_row_attention(*qkv, lengths, 11, 2)):
        inputs = tensors((3, 21, 4, 8), (3, 21, 2, 8), (3, 21, 2, 8))
        out = attend(*inputs)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*results))


def test_products_by_convolution_have_the_values_and_gradients_of_linear():
    results = []
    for product in (linear_by_convolution, torch.nn.functional.linear):
        inputs = tensors((5, 100, 64), (48, 64), (48,))
        out = product(*inputs)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*results))


def test_few_rows_are_no_convolution(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "conv2d", None)
    x, weight = (x.detach() for x in tensors((5, 4096), (48, 4096)))
    assert torch.equal(linear_by_convolution(x, weight), torch.nn.functional.linear(x, weight))


def test_layers_and_logits_are_convolutions_on_the_cpus_where_that_is_faster(monkeypatch):
    """A network that is built and called as on such a CPU has the same tensors and computes the same."""
    config = network.CONFIGS["tiny"]
    prompts = Prompts(torch.arange(8, 208).view(1, 200), torch.tensor([200]), torch.arange(200).expand(3, 1, 200),
                      torch.tensor([200]), None, [])
    plain = network.init_weights(network.Qwen2_5_VL(config), seed=0)
    monkeypatch.setattr(network, "Linear", LinearByConvolution)
    monkeypatch.setattr(network, "linear", linear_by_convolution)
    fast = network.init_weights(network.Qwen2_5_VL(config), seed=0)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    convolve, seen = torch.nn.functional.conv2d, []
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *inputs: seen.append(inputs) or convolve(*inputs))
    with torch.no_grad():
        logits = fast.logits(fast.prefill(prompts)[0])
        assert len(seen) == 7 * config.num_hidden_layers + 1, "each matrix of a layer, and the head"
        monkeypatch.setattr(network, "linear", torch.nn.functional.linear)
        assert torch.allclose(logits, plain.logits(plain.prefill(prompts)[0]), atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_plain_products_is_that_of_the_kernel(masked):
    """In fp32 a GPU has no kernel that returns the log-sum-exp. 5 queries, keys of which the last are padding."""
    q, k, v = (x.detach() for x in tensors((3, 2, 5, 8), (3, 2, 9, 8), (3, 2, 9, 8)))
    padding = torch.arange(9) >= torch.tensor([9, 4, 7])[:, None, None, None]
    mask = torch.zeros(3, 1, 1, 9).masked_fill(padding, -torch.inf).expand(-1, -1, 5, -1) if masked else None
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for a, b in zip(kernel(q, k, v, attn_mask=mask), plain_attention(q, k, v, mask)):
        assert torch.allclose(a, b, atol=1e-5)
