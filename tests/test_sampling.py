"""Promise: a token is drawn from the distribution that is scored, from numbers fixed beforehand, and some tokens can
never be drawn."""
import pytest
import torch

from data import Examples, collate, question_uniforms, read_records
from model import load_model, sample_token


@pytest.fixture
def model(base, vocabulary):
    return vocabulary.mask_special_tokens(load_model(base))


@pytest.fixture
def examples(toy, vocabulary, model, tiny_settings):
    return Examples(read_records(toy / "rl.json"), toy, vocabulary, model.config, tiny_settings)


def test_inverting_the_cumulative_distribution_draws_each_token_as_often_as_it_should():
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    u = (torch.arange(1000) + 0.5) / 1000
    tokens, logprobs = sample_token(p.log().expand(1000, -1).float(), u, 1.0, 1.0)
    assert torch.bincount(tokens, minlength=6).tolist() == [0, 500, 0, 200, 300, 0]
    assert torch.allclose(logprobs.exp(), p[tokens], atol=1e-6)
    tokens, _ = sample_token(p.log().clamp(min=-1e30).expand(2, -1), torch.tensor([0.0, 1 - 2 ** -24]), 1.0, 1.0)
    assert tokens.tolist() == [1, 4], "the smallest and the largest number draw possible tokens"


def test_top_p_keeps_the_smallest_set_that_holds_its_share():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    u = (torch.arange(100) + 0.5) / 100
    tokens, logprobs = sample_token(logits.expand(100, -1), u, 1.0, 0.7)
    assert sorted(set(tokens.tolist())) == [1, 3], "0.5 alone is too little, 0.5 + 0.25 is enough"
    assert torch.allclose(logprobs.exp().unique(), torch.tensor([1 / 3, 2 / 3])), "renormalized: as they were drawn"
    assert set(sample_token(logits.expand(100, -1), u, 1.0, 0.001)[0].tolist()) == {1}


def test_temperature_sharpens_and_zero_is_greedy():
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    _, logprob = sample_token(logits, torch.tensor([0.5]), 0.5, 1.0)
    assert torch.allclose(logprob, (logits / 0.5).log_softmax(-1)[:, 1])
    assert sample_token(logits, torch.tensor([0.999]), 0.0, 1.0)[0].item() == 1


def test_placeholders_and_padding_are_never_sampled_and_never_scored(model, examples, vocabulary):
    banned = model.masked_token_ids.tolist()
    with torch.no_grad():                                    # without the mask it would say nothing else
        model.model.embed_tokens.weight[banned] *= 50
    prompts = collate([examples[0], examples[1]])
    sampled = model.generate(prompts, torch.rand(2, 8, 30, generator=torch.Generator().manual_seed(0)), [0])
    assert not set(sampled.tokens.flatten().tolist()) & (set(banned) - {0})
    scored, entropy = model.logprobs(prompts, torch.full((2, 1, 2), banned[0]), torch.full((2, 1), 2))
    assert bool((scored < -1e20).all()) and bool(torch.isfinite(entropy).all())
    assert {vocabulary.id["<|video_pad|>"], vocabulary.id["<|image_pad|>"], len(vocabulary.bytes)} <= set(banned)


def test_a_response_ends_with_any_of_several_stop_tokens_or_at_the_limit_and_nothing_follows(model, examples):
    uniforms, stops = torch.rand(1, 32, 40, generator=torch.Generator().manual_seed(1)), set(range(8, 60))
    out = model.generate(collate([examples[0]]), uniforms, list(stops))
    ends = set()
    for tokens, logprobs, n, finished in zip(out.tokens[0], out.logprobs[0], out.lengths[0], out.finished[0]):
        assert not set(tokens[:n - 1].tolist()) & stops
        assert bool((tokens[n:] == 0).all()) and bool((logprobs[n:] == 0).all())
        if finished:
            ends.add(tokens[n - 1].item())
    assert len(ends) > 1 and ends <= stops
    out = model.generate(collate([examples[0]]), uniforms[:, :, :3], stop_ids=[383])
    assert out.lengths.tolist() == [[3] * 32] and not bool(out.finished.any())


def test_random_numbers_belong_to_seed_step_and_question(examples):
    def draw(seed, stream, i):
        return question_uniforms(seed, stream, examples[i].record, 4, 10)
    same = draw(0, "step 3", 1)
    assert torch.equal(same, draw(0, "step 3", 1))
    for other in (draw(1, "step 3", 1), draw(0, "step 4", 1), draw(0, "step 3", 2)):
        assert not torch.equal(same, other)
