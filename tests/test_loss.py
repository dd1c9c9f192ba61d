"""Promise: each segment learns from its own reward and nothing else, every response counts the same, and splitting a
batch changes nothing. Advantages, loss and updates in numbers small enough to check by hand."""
import math

import pytest
import torch

from pagrpo import Response, Settings, ask, group_advantages, normalize, pa_grpo_loss, reward, to_tokens, totals
from data import Example, Record
from rewards import Judge, SegmentReward, parse, rule_judge


def episode(n, boundary, advantages=(0.0, 0.0), logprob=-1.0):
    return Response(None, list(range(8, 8 + n)), torch.full((n,), logprob), True, "", parse(""), boundary,
                   advantages=advantages)


def loss_of(groups, mode="response", logprobs=None, old=None, reference=None, eps=0.2, beta=0.0):
    """The step's mean loss and its gradient at the log-probabilities (B, G, T)."""
    batch = to_tokens(groups, mode, "cpu")
    logprobs = (batch.sampled if logprobs is None else logprobs).clone().requires_grad_()
    old = logprobs.detach() if old is None else old
    loss, kl, clipped = pa_grpo_loss(logprobs, old, reference, batch.advantages, batch.weights, eps, beta)
    loss = loss / batch.lengths.numel()
    loss.backward()
    return loss.item(), logprobs.grad, kl, clipped


class TestAdvantages:
    def test_normalise_by_hand(self):
        std = math.sqrt(4 * 0.25 / 3)                        # unbiased: divided by n - 1
        expected = [0.5 / (std + 1e-4)] * 2 + [-0.5 / (std + 1e-4)] * 2
        assert normalize(torch.tensor([2.0, 2.0, 1.0, 1.0])).tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("rewards", [[1.2] * 4, [0.0] * 4, [1.0, 1.0 + 1e-7, 1.0, 1.0], [3.0]])
    def test_a_group_that_is_all_equal_gives_none(self, rewards):
        assert normalize(torch.tensor(rewards)).tolist() == [0.0] * len(rewards)

    def test_segments_are_normalised_in_their_own_groups(self):
        perception, reasoning = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 2.0])
        a_p, a_r = group_advantages(perception, reasoning, "pa")
        assert torch.equal(a_p, normalize(perception)) and torch.equal(a_r, normalize(reasoning))

    def test_grpo_and_joint_give_both_segments_the_same(self):
        perception, reasoning = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 2.0])
        for mode, rewards in (("grpo", reasoning), ("joint", perception + reasoning)):
            a_p, a_r = group_advantages(perception, reasoning, mode)
            assert torch.equal(a_p, a_r) and torch.equal(a_p, normalize(rewards))

    @pytest.mark.parametrize("off, expected", [
        ("none", (2.2, 1.7)), ("perception", (0.0, 1.7)), ("reasoning", (2.2, 0.0)), ("length", (2.0, 1.5))])
    def test_an_ablation_leaves_out_what_it_names(self, off, expected):
        e = episode(4, 2)
        e.perception, e.reasoning = SegmentReward(1, 1, 0.2, 2), SegmentReward(0.5, 1, 0.2, 2)
        assert [float(t) for t in totals([e], off)] == pytest.approx(expected)


class TestTokens:
    def test_an_advantage_reaches_only_its_segment(self):
        batch = to_tokens([[episode(5, 2, (1.0, -1.0))]], "response", "cpu")
        assert batch.advantages[0, 0].tolist() == [1, 1, -1, -1, -1]
        assert batch.weights[0, 0].tolist() == pytest.approx([1 / 5] * 5)

    def test_a_mean_for_each_segment(self):
        batch = to_tokens([[episode(5, 2, (1.0, -1.0))]], "segment", "cpu")
        assert batch.weights[0, 0].tolist() == pytest.approx([1 / 2] * 2 + [1 / 3] * 3)

    def test_without_a_boundary_all_tokens_carry_the_mean_of_both(self):
        batch = to_tokens([[episode(4, None, (1.0, -0.5))]], "segment", "cpu")
        assert batch.advantages[0, 0].tolist() == [0.25] * 4 and batch.weights[0, 0].tolist() == [0.25] * 4

    def test_a_response_that_is_all_observation_has_one_segment(self):
        assert to_tokens([[episode(3, 3, (1.0, 9.0))]], "segment", "cpu").advantages[0, 0].tolist() == [1, 1, 1]

    def test_padding_has_no_weight(self):
        batch = to_tokens([[episode(2, 1), episode(4, 1)]], "response", "cpu")
        assert batch.weights[0, 0].tolist() == [0.5, 0.5, 0, 0]


class TestLoss:
    def test_the_worked_example_of_the_docstring(self):
        group = [[episode(2, 1, (1.0, -1.0))]]
        reference = torch.tensor([[[-1.0, -1.5]]])
        loss, grad, kl, _ = loss_of(group, reference=reference, beta=0.04)
        assert kl[0, 0].tolist() == pytest.approx([0.0, 0.1065], abs=1e-4)
        assert loss == pytest.approx(0.00213, abs=1e-5)
        assert grad[0, 0].tolist() == pytest.approx([-0.5, 0.50787], abs=1e-4)

    def test_loss_is_zero_but_its_gradient_is_not(self):
        """The commonest question about GRPO: with one update the loss is the mean of advantages that add up to zero."""
        group = [[episode(3, 1, (a, a)) for a in normalize(torch.tensor([1.0, 0.0, 0.0, 1.0])).tolist()]]
        loss, grad, _, _ = loss_of(group)
        assert abs(loss) < 1e-6 and grad.abs().max() > 0.05

    def test_equal_segment_advantages_are_grpo_exactly(self):
        rewards = torch.tensor([2.0, 1.0, 0.0, 1.0])
        make = lambda mode: [[episode(n, 2, pair) for n, *pair in
                              zip((5, 4, 6, 3), *(a.tolist() for a in group_advantages(rewards, rewards, mode)))]]
        pa, grpo = loss_of(make("pa")), loss_of(make("grpo"))
        assert pa[0] == grpo[0] and torch.equal(pa[1], grpo[1])

    def test_long_and_short_responses_count_the_same(self):
        _, grad, _, _ = loss_of([[episode(2, 1, (1.0, 1.0)), episode(8, 1, (1.0, 1.0))]])
        assert grad[0].sum(-1).tolist() == pytest.approx([-0.5, -0.5])

    def test_zero_variance_leaves_the_kl_term_only(self):
        group = [[episode(3, 1), episode(3, 1)]]
        reference = torch.full((1, 2, 3), -1.3)
        assert loss_of(group)[1].abs().max() == 0
        loss, grad, _, _ = loss_of(group, reference=reference, beta=0.04)
        d = -0.3
        assert loss == pytest.approx(0.04 * (math.exp(d) - d - 1), rel=1e-4) and grad.abs().max() > 0

    def test_kl_is_never_negative_and_clamped_before_exp(self):
        reference = torch.tensor([[[-200.0, -0.5, -1.0]]])
        _, grad, kl, _ = loss_of([[episode(3, 1)]], reference=reference, beta=0.04)
        assert bool((kl >= 0).all()) and bool(torch.isfinite(grad).all())
        far = torch.tensor([[[-1.0, -1.0, -1.0]]])
        lowest = torch.full((1, 1, 3), -1e30)
        assert torch.isfinite(loss_of([[episode(3, 1)]], logprobs=lowest, reference=far, beta=1.0)[2]).all()

    def test_the_clip_bites_above_for_good_and_below_for_bad_tokens(self):
        group = [[episode(4, 2, (1.0, -1.0))]]
        old = torch.full((1, 1, 4), -1.0)
        new = old + torch.tensor([0.5, -0.5, 0.5, -0.5])     # ratios 1.65, 0.61 on good tokens, then on bad ones
        _, grad, _, clipped = loss_of(group, logprobs=new, old=old)
        assert clipped[0, 0].tolist() == [True, False, False, True]
        assert [g == 0 for g in grad[0, 0].tolist()] == [True, False, False, True]

    def test_micro_batches_do_not_change_the_gradient(self):
        groups = [[episode(n, 2, (a, -a)) for n, a in ((3, 1.0), (9, -1.0))] for _ in range(2)]
        groups[1] = [episode(5, 4, (0.5, 2.0)), episode(2, None, (1.0, 1.0))]
        whole = loss_of(groups)[1]
        for i, group in enumerate(groups):
            alone = loss_of([group])[1] / len(groups)        # a step divides by the responses of all micro-batches
            assert torch.allclose(alone[0], whole[i, :, :alone.shape[-1]])


class TestRewards:
    """From text to R_P and R_R, through the judge."""

    def responses(self, *texts):
        record = Record("q", "How many letters are red?", (), "numerical", "2", "", "video")
        example = Example(record, None, None, 0, None, (1, 2, 2), 0.0)
        made = []
        for text in texts:
            pieces = text.replace("</observation>", "</observation>\x00").split("\x00")
            boundary = 12 if len(pieces) > 1 else None
            made.append(Response(example, [8] * 30, torch.zeros(30), True, text, parse(text), boundary))
        settings = Settings(perception_window=(8, 16), reasoning_window=(10, 48))
        asked = []
        judge = Judge(lambda claims: asked.append(len(claims)) or rule_judge(claims))
        reward(made, ask(made, judge)(), settings)
        return made, asked

    def test_a_right_look_and_a_wrong_thought_are_told_apart(self):
        good = "<observation> 1 red X, 2 red O, 3 blue T </observation>\n<think> a </think>\n<answer> 2 </answer>"
        slip = good.replace("> 2 <", "> 3 <")
        blind = good.replace("2 red O", "2 green O")
        made, asked = self.responses(good, slip, blind)
        assert [(e.perception.total, e.reasoning.total) for e in made] == [(2.2, 2.2), (2.2, 1.0), (1.0, 2.2)]
        assert asked == [2], "all observations of a step go to the judge in one batch, equal ones once"

    def test_no_observation_earns_nothing_and_asks_nobody(self):
        made, asked = self.responses("<think> a </think><answer> 2 </answer>", "<observation> </observation>")
        assert asked == [0]
        assert made[0].perception.total == 0 and made[0].reasoning.total == 2.2
        assert made[1].perception.total == 0
