"""Promise: each segment learns from its own reward and nothing else, and every response counts the same. Rewards,
advantages and loss in numbers small enough to check by hand."""
import math

import pytest
import torch
from torch import nan, tensor

import data
import pagrpo
from pagrpo import Response, collate_responses, group_advantages, normalize, pa_grpo_loss, token_advantages
from rewards import parse


def response(n, boundary):
    """n tokens, the first `boundary` of them perception; None: the observation was never closed."""
    segments = [2] * n if boundary is None else [0] * boundary + [1] * (n - boundary)
    return Response(None, [8] * n, segments, -torch.ones(n), True, "", None)


def loss_of(group, advantages, logprobs=None, old=None, reference=None, beta=0.0):
    """The mean loss over the responses of a group, its gradient at their log-probabilities (1, G, T), the KL and what
    was clipped. advantages (G, 2)"""
    _, lengths, segments, weights, sampled = collate_responses([group], "response")
    logprobs = (sampled if logprobs is None else logprobs).requires_grad_()
    old = logprobs.detach() if old is None else old
    a = token_advantages(tensor([advantages]).float(), segments)
    loss, kl, clipped = pa_grpo_loss(logprobs, old, reference, a, weights, 0.2, beta)
    loss = loss / lengths.numel()
    loss.backward()
    return loss.item(), logprobs.grad, kl, clipped


class TestAdvantages:
    def test_normalize_by_hand(self):
        """Each group by itself, by the unbiased standard deviation. An unknown reward is left out."""
        equal, unknown = normalize(tensor([[2, 2, 1, 1], [2, nan, 1, 1]])).tolist()
        a = 0.5 / (math.sqrt(4 * 0.25 / 3) + 1e-4)
        assert equal == pytest.approx([a, a, -a, -a])
        b = 1 / 3 / (math.sqrt(2 / 3 / 2) + 1e-4)
        assert unknown == pytest.approx([2 * b, 0, -b, -b])

    @pytest.mark.parametrize("rewards", [[1.0, 1.0 + 1e-7, 1.0, 1.0], [3.0, nan]])
    def test_a_group_of_equal_rewards_gives_none(self, rewards):
        assert not normalize(tensor([rewards])).any()

    @pytest.mark.parametrize("mode, perception, reasoning", [
        ("pa", [1, -1], [-1, 1]), ("gdpo", [0, 0], [0, 0]), ("grpo", [-1, 1], [-1, 1]), ("joint", [1, -1], [1, -1])])
    def test_the_worked_example_of_the_docstring(self, mode, perception, reasoning):
        rewards = tensor([[[2.0, 1.0], [1.0, 1.5]]])         # R_P = (2, 1), R_R = (1, 1.5)
        expected = tensor([perception, reasoning]).T / math.sqrt(2)
        assert torch.allclose(group_advantages(rewards, mode)[0], expected, atol=5e-4)


@pytest.mark.parametrize("off, expected", [
    ("perception", [0.0, 1.7]), ("reasoning", [2.2, 0.0]), ("length", [2.0, 1.5])])
def test_an_ablation_leaves_out_what_it_names(off, expected):
    parts = tensor([[1, 1, 0.2], [0.5, 1, 0.2]])
    assert pagrpo.total_rewards(parts, off).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("segments, expected", [([0, 0, 1], [1, 1, -0.5]), ([2, 2, 2], [0.25] * 3)])
def test_an_advantage_reaches_only_its_segment_and_their_mean_a_response_without_segments(segments, expected):
    a = token_advantages(tensor([[[1.0, -0.5]]]), tensor([[segments]]))
    assert a[0, 0].tolist() == expected


@pytest.mark.parametrize("boundary, mode, expected", [
    (2, "response", [1 / 5] * 5), (2, "segment", [1 / 2] * 2 + [1 / 3] * 3), (None, "segment", [1 / 5] * 5)])
def test_weights_are_one_mean_a_response_or_one_a_segment_and_padding_has_none(boundary, mode, expected):
    weights = collate_responses([[response(5, boundary), response(6, 1)]], mode)[3]
    assert weights[0, 0].tolist() == pytest.approx([*expected, 0])


class TestLoss:
    def test_the_worked_example_of_the_docstring(self):
        reference = tensor([[[-1.0, -1.5]]])
        loss, grad, kl, _ = loss_of([response(2, 1)], [[1, -1]], reference=reference, beta=0.04)
        assert kl[0, 0].tolist() == pytest.approx([0.0, 0.1065], abs=1e-4)
        assert loss == pytest.approx(0.00213, abs=1e-5)
        assert grad[0, 0].tolist() == pytest.approx([-0.5, 0.50787], abs=1e-4)

    def test_with_one_advantage_a_response_the_loss_is_0_and_its_gradient_is_not(self):
        """GRPO, whatever the lengths: the loss is the mean of advantages that sum to 0."""
        loss, grad, _, _ = loss_of([response(9, 4), response(7, None)], [[1, 1], [-1, -1]])
        assert abs(loss) < 1e-6 and grad.abs().max() > 0.05

    def test_kl_is_clamped_before_exp(self):
        now, reference = tensor([[[-1.0, -1e30]]]), tensor([[[-200.0, -1.0]]])
        _, grad, kl, _ = loss_of([response(2, 1)], [[0, 0]], now, reference=reference, beta=1.0)
        assert kl[0, 0].tolist() == pytest.approx([math.exp(-10) + 9, math.exp(10) - 11])
        assert grad.isfinite().all()

    def test_the_ratio_is_clipped_above_for_good_and_below_for_bad_tokens(self):
        old = -torch.ones(1, 1, 4)
        new = old + tensor([0.5, -0.5, 0.5, -0.5])           # ratios 1.65, 0.61 on good tokens, then on bad ones
        _, grad, _, clipped = loss_of([response(4, 2)], [[1, -1]], new, old)
        assert clipped[0, 0].tolist() == [True, False, False, True]
        assert torch.equal(grad == 0, clipped)


def test_from_texts_to_rewards_through_the_judge():
    """Wrong perception and wrong reasoning are told apart; a missing or empty observation earns nothing."""
    record = data.Record("q", "How many letters are X?", (), "numerical", "2", "", "video")
    example = data.Example(record, None, None, 0, None, None, 0.0)
    good = "<observation> 1 red X, 2 red X, 3 blue T </observation>\n<think> a </think>\n<answer> 2 </answer>"
    group = []
    for text in (good, good.replace("> 2 <", "> 3 <"), good.replace("2 red X", "2 red O"),
                 "<think> a </think><answer> 2 </answer>", "<observation> </observation>"):
        segments = [0] * 12 + [1] * 18 if "</observation>" in text else [2] * 30
        group.append(Response(example, [8] * 30, segments, torch.zeros(30), True, text, parse(text)))
    verdicts = data.make_judge(data.JudgeSettings())([pagrpo.claim_of(response) for response in group])
    parts = pagrpo.reward_tensor([group], verdicts, pagrpo.Settings(windows=(8, 16, 10, 48)))
    rewards = pagrpo.total_rewards(parts, "none")[0]
    assert torch.allclose(rewards, tensor([[2.2, 2.2], [2.2, 1.0], [1.0, 2.2], [0.0, 2.2], [0.0, 0.0]]))
