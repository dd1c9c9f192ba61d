"""Promise: the shared prompt changes nothing. Reading a prompt once for its group gives the log-probabilities and
gradients of G separate sequences, and what was scored is what was sampled."""
import pytest
import torch

from data import Examples, collate, read_records
import model as network
from model import LOGITS_AT_ONCE, LinearByConvolution, load_model


@pytest.fixture(scope="module")
def batch(folders, base, vocabulary, tiny_settings):
    """A model, three questions with prompts of different lengths, and two responses to each."""
    model = vocabulary.mask_special_tokens(load_model(base))
    examples = Examples(read_records(folders), folders.parent, vocabulary, model.config, tiny_settings)
    chosen = [examples[0], examples[1], examples[4]]
    assert len({len(example.ids) for example in chosen}) > 1
    tokens = torch.randint(8, 300, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[7, 3], [1, 6], [5, 7]])
    return model, chosen, tokens, lengths


def uniforms(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


def shared(model, examples, tokens, lengths):
    return model.logprobs(collate(examples), tokens, lengths)


def separate(model, examples, tokens, lengths):
    """The plain way: each response behind its own copy of the prompt, logits everywhere, no cache and no padding."""
    logprobs, entropies = torch.zeros(tokens.shape), torch.zeros(tokens.shape)
    for b, example in enumerate(examples):
        for g, n in enumerate(lengths[b].tolist()):
            response = tokens[b, g, :n]
            behind = (example.next_position + torch.arange(n)).expand(3, -1)
            ids = torch.cat([example.ids, response])
            positions = torch.cat([example.positions, behind], 1)
            hidden, _ = model.prefill(collate([example._replace(ids=ids, positions=positions)]))
            every = model.logits(hidden)[0, -n - 1:-1].log_softmax(-1)
            logprobs[b, g, :n] = every.gather(-1, response[:, None])[:, 0]
            entropies[b, g, :n] = -(every.exp() * every).sum(-1)
    return logprobs, entropies


def outcome(score, model, *inputs):
    """Log-probabilities, entropies, and the gradients of a weighted sum."""
    logprobs, entropies = score(model, *inputs)
    loss = (logprobs * (uniforms(*logprobs.shape) - 0.5)).sum()
    return [logprobs, entropies, *torch.autograd.grad(loss, list(model.parameters()))]


def close(results, expected):
    return all(torch.linalg.norm(a - b) < 1e-5 * torch.linalg.norm(b) for a, b in zip(results, expected))


def test_it_is_as_if_sequences_were_separate(batch):
    assert close(outcome(shared, *batch), outcome(separate, *batch))


def test_neither_recomputed_blocks_nor_logits_in_chunks_change_anything(batch, monkeypatch):
    model, plain, seen = batch[0], outcome(shared, *batch), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: seen.append(len(hidden)) or logits(hidden))
    monkeypatch.setattr(model, "save_memory", True)
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", 4 * model.config.vocab_size)
    assert close(outcome(shared, *batch), plain)
    assert max(seen) == 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_was_sampled_is_what_is_scored(batch, vocabulary, temperature):
    model, examples, _, _ = batch
    prompts = collate(examples)
    sampled = model.generate(prompts, uniforms(3, 4, 20), vocabulary.stop_ids, temperature)
    logprobs, _ = model.logprobs(prompts, sampled.tokens, sampled.lengths, temperature)
    assert (logprobs - sampled.logprobs).abs().max() < 1e-4


def test_a_group_samples_what_its_members_would_sample_alone(batch):
    model, examples, _, _ = batch
    prompts, numbers = collate(examples), uniforms(3, 3, 12)
    together = model.generate(prompts, numbers, [-1])
    for g in range(3):
        alone = model.generate(prompts, numbers[:, g:g + 1], [-1])
        assert torch.equal(together.tokens[:, g], alone.tokens[:, 0])


def test_the_shortened_step_samples_the_tokens_of_the_plain_one(batch, monkeypatch):
    """`Step` as it stands is the reference, for padded prompts and for one row, whose products have a part a thread."""
    model, examples, _, _ = batch
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for some, group in ((examples, 4), (examples[:1], 1)):
        asked = collate(some), uniforms(len(some), group, 30), [-1]
        fast = model.generate(*asked)
        with monkeypatch.context() as patch:
            patch.setattr(network, "shorten_step", lambda step: None)
            plain = model.generate(*asked)
        assert torch.equal(fast.tokens, plain.tokens)
        assert torch.allclose(fast.logprobs, plain.logprobs, atol=1e-5)


def test_products_by_convolution_have_the_values_and_gradients_of_linear():
    layer, results = LinearByConvolution(64, 48), []
    x = uniforms(5, 100, 64).requires_grad_()
    for product in (LinearByConvolution, torch.nn.Linear):
        out = product.forward(layer, x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    assert close(*results)
