"""Promise: SFT teaches the response and nothing else, with one denominator however a step is cut up."""
import pytest
import torch

import sft
from data import Examples, collate, read_records
from model import load_model
from sft import Settings, World, learning_rate, make_optimizer, micro_batches, sft_loss, trace_tokens
from toy_runs import logged, sft_flags

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def traces(toy, base, vocabulary, tiny_settings):
    model = vocabulary.mask_special_tokens(load_model(base))
    examples = Examples(read_records(toy / "sft.json", traces=True), toy, vocabulary, model.config, tiny_settings)
    return model, [examples[i] for i in range(6)]


def test_the_loss_is_the_cross_entropy_of_response_tokens(traces, vocabulary):
    model, (example, *_) = traces
    loss, count = sft_loss(model, [example], vocabulary, "p2r", "cpu")
    tokens, lengths = trace_tokens([example], vocabulary, "p2r")
    assert count == lengths.item() and tokens[0, 0, -1] == vocabulary.id["<|im_end|>"], "the stop token is learned too"
    assert vocabulary.decode(tokens[0, 0].tolist()).startswith("<observation>")
    logprobs, _ = model.logprobs(collate([example]), tokens, lengths)
    assert loss.item() == pytest.approx(-logprobs.sum().item())


def test_prompt_video_and_padding_carry_no_loss(traces, vocabulary, monkeypatch):
    """Every place at which the model is asked for a distribution predicts a token of the response."""
    model, examples = traces
    asked = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: asked.append(len(hidden)) or logits(hidden))
    _, count = sft_loss(model, examples, vocabulary, "p2r", "cpu")
    _, lengths = trace_tokens(examples, vocabulary, "p2r")
    assert len(set(lengths.flatten().tolist())) > 1 and sum(asked) == count == int(lengths.sum())


def test_micro_batches_add_up_to_the_whole_batch(traces, vocabulary):
    """A ragged batch is the sum of its examples: padding and neighbours do not leak."""
    model, examples = traces
    gradients = {}
    for size in (6, 4, 1):
        model.zero_grad()
        for part, weight in micro_batches(examples, size, vocabulary, ALONE):
            (sft_loss(model, part, vocabulary, "p2r", "cpu")[0] * weight / 100).backward()
        gradients[size] = [p.grad.clone() for p in model.parameters()]
    for size in (4, 1):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients[6], gradients[size])), size


def test_the_learning_rate_rises_then_falls_along_a_cosine():
    settings = Settings(lr=1.0, warmup=4)
    rates = [learning_rate(s, 104, settings) for s in range(104)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[54] == pytest.approx(0.5) and 0 < rates[-1] < 0.001
    assert all(a >= b for a, b in zip(rates[3:], rates[4:]))


def test_weight_decay_spares_norms_and_biases(traces):
    model, _ = traces
    decayed, spared = make_optimizer(model, Settings(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and decayed["params"] == [p for p in model.parameters() if p.dim() > 1]
    assert spared["weight_decay"] == 0.0 and spared["params"] == [p for p in model.parameters() if p.dim() == 1]


def test_training_takes_one_thread_and_gives_the_others_back(monkeypatch):
    """So SFT gives the same weights on any number of threads."""
    def read(*_):
        seen.append(torch.get_num_threads())
        raise SystemExit("no traces")
    seen = []
    monkeypatch.setattr(sft, "read_traces", read)
    torch.set_num_threads(2)
    try:
        with pytest.raises(SystemExit):
            sft.train(Settings(), ALONE)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(1)                             # as all tests have it


def test_a_short_run_learns_logs_and_reports_held_out_loss(toy, base, tmp_path, capsys):
    sft.main(sft_flags(tmp_path, toy, base, steps=12, batch=16))
    said, rows = capsys.readouterr().out, logged(tmp_path / "sft")
    assert said.startswith("Preset tiny; others: 3b, 7b") and "held-out loss" in said
    assert len(rows) == 12 and rows[-1]["loss"] < 0.7 * rows[0]["loss"]
