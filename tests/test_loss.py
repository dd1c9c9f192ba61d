"""Promise: each segment learns from its own reward and nothing else, every response counts the same, and splitting a
batch changes nothing. Rewards, advantages and loss in numbers small enough to check by hand."""
import math

import pytest
import torch

import pagrpo
from data import Example, Record, rule_judge
from pagrpo import Response, collate_responses, group_advantages, normalize, pa_grpo_loss, token_advantages
from rewards import judge_claims, parse


def response(n, boundary, logprob=-1.0):
    """n tokens, the first `boundary` of them perception; None: the observation was never closed."""
    segments = [2] * n if boundary is None else [0] * boundary + [1] * (n - boundary)
    return Response(None, list(range(8, 8 + n)), segments, torch.full((n,), logprob), True, "", parse(""))


def loss_of(groups, advantages, mode="response", logprobs=None, old=None, reference=None, eps=0.2, beta=0.0):
    """The mean loss over responses and its gradient at the log-probabilities (B, G, T). advantages (B, G, 2)"""
    _, lengths, segments, weights, sampled = collate_responses(groups, mode)
    logprobs = (sampled if logprobs is None else logprobs).clone().requires_grad_()
    old = logprobs.detach() if old is None else old
    a = token_advantages(torch.tensor(advantages, dtype=torch.float), segments)
    loss, kl, clipped = pa_grpo_loss(logprobs, old, reference, a, weights, eps, beta)
    loss = loss / lengths.numel()
    loss.backward()
    return loss.item(), logprobs.grad, kl, clipped


class TestAdvantages:
    def test_normalize_by_hand(self):
        std = math.sqrt(4 * 0.25 / 3)                        # unbiased: divided by n - 1
        expected = [0.5 / (std + 1e-4)] * 2 + [-0.5 / (std + 1e-4)] * 2
        assert normalize(torch.tensor([[2.0, 2.0, 1.0, 1.0]]))[0].tolist() == pytest.approx(expected)
        known = normalize(torch.tensor([[2.0, 1.0, 1.0]]))[0].tolist()
        unknown = normalize(torch.tensor([[2.0, math.nan, 1.0, 1.0]]))[0].tolist()
        assert unknown == [known[0], 0, *known[1:]], "an unknown reward is left out"

    @pytest.mark.parametrize("rewards", [[1.0, 1.0 + 1e-7, 1.0, 1.0], [3.0], [3.0, math.nan]])
    def test_a_group_of_equal_rewards_gives_none(self, rewards):
        assert normalize(torch.tensor([rewards]))[0].tolist() == [0.0] * len(rewards)

    @pytest.mark.parametrize("mode, perception, reasoning", [
        ("pa", [1, -1], [-1, 1]), ("gdpo", [0, 0], [0, 0]), ("grpo", [-1, 1], [-1, 1]), ("joint", [1, -1], [1, -1])])
    def test_the_worked_example_of_the_docstring(self, mode, perception, reasoning):
        rewards = torch.tensor([[[2.0, 1.0], [1.0, 1.5]]])   # R_P = (2, 1), R_R = (1, 1.5)
        expected = torch.tensor([perception, reasoning]).T / math.sqrt(2)
        assert torch.allclose(group_advantages(rewards, mode)[0], expected, atol=5e-4)

    def test_groups_do_not_mix(self):
        rewards = torch.rand(3, 4, 2)
        for mode in ("pa", "gdpo", "grpo", "joint"):
            alone = torch.cat([group_advantages(rewards[b:b + 1], mode) for b in range(3)])
            assert torch.equal(group_advantages(rewards, mode), alone)

    @pytest.mark.parametrize("off, expected", [
        ("none", [2.2, 1.7]), ("perception", [0.0, 1.7]), ("reasoning", [2.2, 0.0]), ("length", [2.0, 1.5])])
    def test_an_ablation_leaves_out_what_it_names(self, off, expected):
        parts = torch.tensor([[[[1, 1, 0.2], [0.5, 1, 0.2]]]])
        assert pagrpo.total_rewards(parts, off)[0, 0].tolist() == pytest.approx(expected)


class TestTokens:
    @pytest.mark.parametrize("segments, expected", [([0, 0, 1], [1, 1, -0.5]), ([2, 2, 2], [0.25] * 3)])
    def test_an_advantage_reaches_only_its_segment_and_their_mean_a_response_without_segments(self, segments, expected):
        a = token_advantages(torch.tensor([[[1.0, -0.5]]]), torch.tensor([[segments]]))
        assert a[0, 0].tolist() == expected

    @pytest.mark.parametrize("n, boundary, mode, expected", [
        (5, 2, "response", [1 / 5] * 5 + [0]), (5, 2, "segment", [1 / 2] * 2 + [1 / 3] * 3 + [0]),
        (4, None, "segment", [1 / 4] * 4 + [0, 0]), (3, 3, "segment", [1 / 3] * 3 + [0] * 3)])
    def test_weights_are_one_mean_a_response_or_one_a_segment_and_padding_has_none(self, n, boundary, mode, expected):
        weights = collate_responses([[response(n, boundary), response(6, 1)]], mode)[3]
        assert weights[0, 0].tolist() == pytest.approx(expected)


class TestLoss:
    def test_the_worked_example_of_the_docstring(self):
        reference = torch.tensor([[[-1.0, -1.5]]])
        loss, grad, kl, _ = loss_of([[response(2, 1)]], [[[1, -1]]], reference=reference, beta=0.04)
        assert kl[0, 0].tolist() == pytest.approx([0.0, 0.1065], abs=1e-4)
        assert loss == pytest.approx(0.00213, abs=1e-5)
        assert grad[0, 0].tolist() == pytest.approx([-0.5, 0.50787], abs=1e-4)

    def test_with_one_advantage_a_response_the_loss_is_0_and_its_gradient_is_not(self):
        """GRPO, whatever the lengths: the loss is the mean of advantages that sum to 0."""
        advantages = normalize(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))[0].tolist()
        group = [response(3, 1), response(9, 4), response(5, 5), response(7, None)]
        loss, grad, _, _ = loss_of([group], [[[a, a] for a in advantages]])
        assert abs(loss) < 1e-6 and grad.abs().max() > 0.05

    def test_with_one_advantage_a_segment_the_loss_is_not_0(self):
        """PA-GRPO: two responses of 10 tokens, 8 and 4 of them perception: -(8/10 · 1 + 4/10 · -1) / 2 = -0.2."""
        loss, _, _, _ = loss_of([[response(10, 8), response(10, 4)]], [[[1, 0], [-1, 0]]])
        assert loss == pytest.approx(-0.2)

    def test_zero_variance_leaves_the_kl_term_only(self):
        group, reference, d = [response(3, 1), response(3, 1)], torch.full((1, 2, 3), -1.3), -0.3
        assert loss_of([group], [[[0, 0], [0, 0]]])[1].abs().max() == 0
        loss, grad, _, _ = loss_of([group], [[[0, 0], [0, 0]]], reference=reference, beta=0.04)
        assert loss == pytest.approx(0.04 * (math.exp(d) - d - 1), rel=1e-4) and grad.abs().max() > 0

    @pytest.mark.parametrize("logprobs", [[-1.0] * 3, [-1e30] * 3])
    def test_kl_is_never_negative_and_clamped_before_exp(self, logprobs):
        group, reference = [response(3, 1)], torch.tensor([[[-200.0, -0.5, -1.0]]])
        new = torch.tensor([[logprobs]])
        _, grad, kl, _ = loss_of([group], [[[0, 0]]], logprobs=new, reference=reference, beta=1.0)
        assert bool((kl >= 0).all()) and bool(torch.isfinite(kl).all()) and bool(torch.isfinite(grad).all())

    def test_the_ratio_is_clipped_above_for_good_and_below_for_bad_tokens(self):
        old = torch.full((1, 1, 4), -1.0)
        new = old + torch.tensor([0.5, -0.5, 0.5, -0.5])     # ratios 1.65, 0.61 on good tokens, then on bad ones
        _, grad, _, clipped = loss_of([[response(4, 2)]], [[[1, -1]]], logprobs=new, old=old)
        assert clipped[0, 0].tolist() == [True, False, False, True]
        assert [g == 0 for g in grad[0, 0].tolist()] == [True, False, False, True]


def test_from_texts_to_rewards_through_the_judge():
    """Wrong perception and wrong reasoning are told apart; a missing or empty observation earns nothing."""
    record = Record("q", "How many letters are red?", (), "numerical", "2", "", "video")
    example, asked = Example(record, None, None, 0, None, (1, 2, 2), 0.0), []
    good = "<observation> 1 red X, 2 red O, 3 blue T </observation>\n<think> a </think>\n<answer> 2 </answer>"
    group = []
    for text in (good, good.replace("> 2 <", "> 3 <"), good.replace("2 red O", "2 green O"),
                 "<think> a </think><answer> 2 </answer>", "<observation> </observation>"):
        segments = [0] * 12 + [1] * 18 if "</observation>" in text else [2] * 30
        group.append(Response(example, [8] * 30, segments, torch.zeros(30), True, text, parse(text)))

    def decide(claims):
        asked.append(len(claims))
        return rule_judge(claims)
    verdicts = judge_claims(decide, True, [pagrpo.claim_of(response) for response in group])
    settings = pagrpo.Settings(windows=(8, 16, 10, 48))
    rewards = pagrpo.total_rewards(pagrpo.reward_tensor([group], verdicts, settings), "none")[0]
    assert torch.allclose(rewards, torch.tensor([[2.2, 2.2], [2.2, 1.0], [1.0, 2.2], [0.0, 2.2], [0.0, 0.0]]))
    assert asked == [2], "all observations of a step go to the judge in one batch, equal ones once, empty ones never"
