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
def prompts(toy, vocabulary, model, tiny_settings):
    records = read_records(toy / "rl.json")
    return collate([Examples(records, toy, vocabulary, model.config, tiny_settings)[0]])


EVENLY = (torch.arange(1000) + 0.5) / 1000


def draw(probabilities, uniforms=EVENLY, temperature=1.0, top_p=1.0):
    """A token for each of the numbers, with log-probabilities."""
    logits = torch.tensor(probabilities).log().clamp(min=-1e30)
    return sample_token(logits.expand(len(uniforms), -1), uniforms, temperature, top_p)


def test_inverting_the_cumulative_distribution_draws_each_token_as_often_as_it_should():
    p = [0.0, 0.5, 0.0, 0.2, 0.3, 0.0]
    tokens, logprobs = draw(p)
    assert torch.bincount(tokens, minlength=6).tolist() == [0, 500, 0, 200, 300, 0]
    assert torch.allclose(logprobs.exp(), torch.tensor(p)[tokens])
    smallest_and_largest = torch.tensor([0.0, 1 - 2 ** -24])
    assert draw(p, smallest_and_largest)[0].tolist() == [1, 4]


def test_top_p_keeps_the_smallest_set_that_holds_its_share():
    tokens, logprobs = draw([0.1, 0.5, 0.15, 0.25], top_p=0.7)
    assert tokens.unique().tolist() == [1, 3]                # 0.5 alone is too little, 0.5 + 0.25 is enough
    assert torch.allclose(logprobs.exp(), torch.tensor([0, 2, 0, 1])[tokens] / 3)


def test_temperature_sharpens():
    tokens, logprobs = draw([0.2, 0.6, 0.2], temperature=0.5)
    assert torch.allclose(logprobs.exp(), torch.tensor([1, 9, 1])[tokens] / 11)


def test_placeholders_and_padding_are_never_sampled_and_never_scored(model, prompts, vocabulary):
    banned = model.masked_token_ids
    special = {vocabulary.id["<|video_pad|>"], vocabulary.id["<|image_pad|>"], len(vocabulary.bytes)}
    assert special <= set(banned.tolist())
    with torch.no_grad():                                    # without the mask it would say nothing else
        model.model.embed_tokens.weight[banned] *= 50
    sampled = model.generate(prompts, torch.rand(1, 16, 30), [-1])
    assert not torch.isin(sampled.tokens, banned).any()
    scored, entropy = model.logprobs(prompts, banned[None, None, :2], torch.tensor([[2]]))
    assert (scored < -1e20).all() and entropy.isfinite().all()


def test_a_response_ends_with_any_of_several_stop_tokens_or_at_the_limit_and_nothing_follows(model, prompts):
    stops, uniforms = list(range(8, 40)), torch.rand(1, 32, 20, generator=torch.Generator().manual_seed(1))
    out = model.generate(prompts, uniforms, stops)
    lengths, places = out.lengths[..., None], torch.arange(20)
    stopped = torch.isin(out.tokens, torch.tensor(stops))
    assert torch.equal(stopped, (places == lengths - 1) & out.finished[..., None])
    assert len(out.tokens[stopped].unique()) > 1
    assert lengths[~out.finished].unique().tolist() == [20]
    behind = places >= lengths
    assert not out.tokens[behind].any() and not out.logprobs[behind].any()


def test_random_numbers_belong_to_seed_step_and_question(toy):
    one, other, *_ = read_records(toy / "rl.json")
    asked = (0, "a", one), (0, "a", one), (1, "a", one), (0, "b", one), (0, "a", other)
    first, *others = [question_uniforms(*words, 4, 10).sum().item() for words in asked]
    assert first == others[0] and len({*others}) == 4
