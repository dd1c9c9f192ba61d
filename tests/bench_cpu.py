"""The rows of `python tests/bench.py cpu`. Each function measures some of them; all use one small model of text.

A peer is asked for the same work on the same weights: transformers, TRL, or this code without a shared prompt. Where
transformers computes the same numbers, they are compared first. Targets are for two cores.
"""
import os
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Callable, NamedTuple

AS_STARTED = os.environ | {"CUDA_VISIBLE_DEVICES": ""}       # for the peers; model.py changes it
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import data  # noqa: E402  (found by bench.py)
import sft  # noqa: E402
import whole_steps  # noqa: E402
from model import Prompts, Qwen2_5_VL, causal_attention, load_model, qwen  # noqa: E402
import torch  # noqa: E402
from peers import Peer  # noqa: E402
from ruler import Ruler, in_turn, peak  # noqa: E402
from torch import Tensor  # noqa: E402

TOWER = dict(hidden_size=96, depth=1, num_heads=4, intermediate_size=128, fullatt_block_indexes=(0,))
SMALL = qwen(256, 6, 4, 2, 768, 3328, True, sections=(8, 12, 12), ids=(6, 7), vision=TOWER)     # 5.6 M parameters
WIDE = qwen(256, 2, 4, 2, 768, 151936, True, sections=(8, 12, 12), ids=(6, 7), vision=TOWER)    # Qwen's vocabulary


class Bench(NamedTuple):
    """What the rows share."""
    folder: Path                                             # SMALL with random weights, and a tokenizer
    model: Qwen2_5_VL
    peer: Peer                                               # has the same weights
    ruler: Ruler
    repeats: int
    world: sft.World


class Group(NamedTuple):
    """A prompt, G responses to it, and a weight for each log-probability."""
    prompts: Prompts
    tokens: Tensor                                           # (1, G, T)
    lengths: Tensor                                          # (1, G)
    weights: Tensor                                          # (1, G, T)

    def sequences(self) -> Tensor:                           # (G, P + T)
        return torch.cat([self.prompts.ids.expand(len(self.tokens[0]), -1), self.tokens[0]], dim=1)

    def separate(self) -> "Group":
        """The same responses, each behind a prompt of its own: G groups of one."""
        return Group(text_prompts(len(self.tokens[0]), self.prompts.ids), *(x.transpose(0, 1) for x in self[1:]))


def text_prompts(count: int, ids: Tensor) -> Prompts:
    """`count` prompts without media, of given ids (1, P) or (B, P)."""
    p = ids.shape[1]
    lengths = torch.full((count,), p)
    return Prompts(ids.expand(count, -1), lengths, torch.arange(p).expand(3, count, p), lengths, None, [])


def token_ids(*shape: int) -> Tensor:
    return torch.randint(8, 3000, shape, generator=torch.Generator().manual_seed(0))


def make_group(g: int, p: int, t: int) -> Group:
    weights = torch.randn(1, g, t, generator=torch.Generator().manual_seed(0))
    return Group(text_prompts(1, token_ids(1, p)), token_ids(1, g, t), torch.full((1, g), t), weights)


def training_pass(model: Qwen2_5_VL, group: Group) -> Tensor:
    """Adds gradients to those that are there. Returns the log-probabilities."""
    logprobs, _ = model.logprobs(group.prompts, group.tokens, group.lengths)
    (logprobs * group.weights).sum().backward()
    return logprobs.detach()


def ceiling(g: int, p: int, t: int) -> float:
    """How many times more tokens there are where each response has a prompt of its own."""
    return g * (p + t) / (p + g * t)


def sizes(g: int, p: int, t: int) -> str:
    return f"{g} × ({p:,}, {t})"


# ------------------------------------------------------------------------------------------------ against transformers

def compare(b: Bench, what: str, size: str, ours: Callable, asked: dict[str, tuple], repeats: int, **more) -> None:
    """A row for each peer: a call of ours against what the peer's process is asked for. more: for `Ruler.row`."""
    calls = {"ours": ours} | {name: partial(b.peer.ask, *words) for name, words in asked.items()}
    seconds = in_turn(calls, repeats)
    bytes = {"ours": peak(ours)} | {name: b.peer.ask("bytes_of", *words) for name, words in asked.items()}
    for name in asked:
        b.ruler.row(what, size, seconds, peer=name, bytes=bytes, **more)


def rollouts(b: Bench) -> None:
    for questions, g, p, target in ((8, 8, 300, 5.0), (4, 8, 1000, None), (1, 1, 300, 1.8)):
        prompts, t = text_prompts(questions, token_ids(questions, p)), 64
        uniforms = torch.rand(questions, g, t)
        greedy = b.model.generate(prompts, uniforms, [-1], 0.0).tokens                         # (B, G, T)
        expected = b.peer.ask("generate", prompts.ids, 1, t, False, False)                     # (B, T)
        if not torch.equal(greedy, expected[:, None].expand_as(greedy)):
            raise SystemExit(f"Greedy tokens after {questions} prompts of {p} tokens are not those of transformers.")
        asked = {"transformers": ("generate", prompts.ids, g, t, True, False)}
        if questions == 8:
            asked["static cache"] = "generate", prompts.ids, g, t, True, True
        compare(b, "rollout", f"{questions}×{g}, prompt {p:,}, {t} new",
                partial(b.model.generate, prompts, uniforms, [-1]), asked, b.repeats, target=target,
                note="same greedy tokens")


def training(b: Bench) -> None:
    """transformers reads full sequences and computes logits where responses are predicted."""
    shape = g, p, t = 8, 1000, 200
    group = make_group(*shape)
    ours = partial(training_pass, b.model, group)
    asked = "forward_backward", group.sequences(), group.weights[0], t + 1
    b.model.zero_grad()
    b.peer.ask("gradients")                                  # forgets those of other rows
    apart = (ours()[0] - b.peer.ask(*asked)).abs().max()
    expected, own = b.peer.ask("gradients"), dict(b.model.named_parameters())
    worst = max((own[name].grad - x).abs().max() for name, x in expected.items())
    largest = max(x.abs().max() for x in expected.values())
    compare(b, "training pass", sizes(*shape), ours, {"transformers": asked}, b.repeats, target=3.3,
            note=f"ceiling by tokens {ceiling(*shape):.2f}; largest differences: log-probability {apart:.0e}, gradient "
                 f"{worst:.0e} of {largest:.0f}")


def layers(b: Bench) -> None:
    layer = b.model.model.layers[0]
    for rows, length in ((8, 300), (2, 1200)):
        x = torch.randn(rows, length, SMALL.hidden_size, generator=torch.Generator().manual_seed(0))
        rotary = b.model.rotary(torch.arange(length).expand(3, rows, length), x.dtype)
        apart = (b.peer.ask("layer_input", x) - layer(x, rotary, causal_attention)).abs().max()
        x.requires_grad_()
        compare(b, "one layer, forward, backward", f"{rows} × {length:,}",
                lambda: layer(x, rotary, causal_attention).sum().backward(),
                {"transformers": ("layer_pass",)}, 4 * b.repeats,
                target=1.0, note=f"largest difference {apart:.0e}")


def vocabulary(b: Bench) -> None:
    """A training pass with Qwen's vocabulary, in bytes above weights and gradients."""
    shape, folder = (8, 200, 100), b.folder / "wide"
    data.make_toy_model(folder, 0, WIDE)
    model, group = load_model(folder), make_group(*shape)
    b.peer.ask("load", str(folder))
    ours, asked = partial(training_pass, model, group), ("forward_backward", group.sequences(), group.weights[0])
    ours()                                                   # from here on there are gradients to add to
    b.peer.ask(*asked, 0)
    bytes = {"ours": peak(ours), "full logits": b.peer.ask("bytes_of", *asked, 0)}
    fewer = b.peer.ask("bytes_of", *asked, shape[2] + 1) / 2 ** 20
    b.ruler.row("memory, vocabulary 151,936", sizes(*shape), {}, peer="full logits", target=4.0, bytes=bytes,
                note=f"transformers with logits of responses alone: {fewer:,.0f} MiB")
    b.peer.ask("load", str(b.folder))


# ------------------------------------------------------------------------------------------------ whole steps

def steps(b: Bench) -> None:
    policy, reference = load_model(b.folder), load_model(b.folder).requires_grad_(False)
    for *shape, target in ((8, 8, 60, 48, 2.6), (4, 8, 300, 64, 6.0)):
        whole_steps.against_trl(b.ruler, b.folder, b.peer, policy, reference, b.world, shape, b.repeats, target)


def waiting(b: Bench) -> None:
    whole_steps.waiting(b.ruler, b.world)


# ------------------------------------------------------------------------------------------------ how they grow

def sampling_growth(b: Bench) -> None:
    prompts, news = text_prompts(8, token_ids(8, 300)), (32, 64, 128, 256)
    calls = {f"8×8, prompt 300, {t} new": partial(b.model.generate, prompts, torch.rand(8, 8, t), [-1]) for t in news}
    for (name, times), t in zip(in_turn(calls, b.repeats).items(), news):
        b.ruler.row("sampling", name, {"ours": times}, note=f"{1000 * median(times) / t:.2f} ms for each new token")


def training_growth(b: Bench) -> None:
    """Time and memory follow the tokens of a row, G responses and one prompt."""
    by_length, by_group = [(8, 1000, t) for t in (50, 100, 200, 400)], [(g, 1000, 200) for g in (2, 4, 8, 16)]
    calls = {shape: partial(training_pass, b.model, make_group(*shape)) for shape in by_length + by_group}
    seconds, bytes = in_turn(calls, b.repeats), {shape: peak(call) for shape, call in calls.items()}
    for what, shapes in (("training pass by length", by_length), ("training pass by group", by_group)):
        for shape in shapes:
            g, p, t = shape
            tokens, each = p + g * t, 1000 * median(seconds[shape]) / (p + g * t)
            b.ruler.row(what, sizes(*shape), {"ours": seconds[shape]}, bytes={"ours": bytes[shape]},
                        note=f"{tokens:,} tokens, each {each:.3f} ms and {bytes[shape] / tokens / 1024:.0f} KiB")


def shared_prompt(b: Bench) -> None:
    """What one prompt for a group saves, against this code with a prompt for each response."""
    for shape in ((8, 1000, 200), (8, 300, 48), (4, 1000, 50), (8, 60, 48)):
        group, uniforms, peer = make_group(*shape), torch.rand(1, shape[0], shape[2]), "separate prompts"
        copies = group.separate()
        calls = {"ours": partial(training_pass, b.model, group), peer: partial(training_pass, b.model, copies)}
        b.ruler.row("shared prompt, training", sizes(*shape), in_turn(calls, b.repeats), peer=peer,
                    note=f"ceiling by tokens {ceiling(*shape):.2f}")
        calls = {"ours": partial(b.model.generate, group.prompts, uniforms, [-1]),
                 peer: partial(b.model.generate, copies.prompts, uniforms.transpose(0, 1), [-1])}
        b.ruler.row("shared prompt, sampling", sizes(*shape), in_turn(calls, b.repeats), peer=peer)


ROWS = {f.__name__: f for f in (rollouts, training, layers, vocabulary, steps, waiting, sampling_growth,
                                training_growth, shared_prompt)}


def run(args) -> None:
    if not (find_spec("trl") and find_spec("datasets")):
        sys.exit("The peers are missing: pip install -r tests/requirements-bench.txt")
    if unknown := [name for name in args.only if name not in ROWS]:
        sys.exit(f"--only: {', '.join(unknown)} is none of {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as folder:
        world, model_folder = sft.start_world(), Path(folder) / "small"
        data.make_toy_model(model_folder, 0, SMALL)
        peer = Peer(model_folder, AS_STARTED)
        bench = Bench(model_folder, load_model(model_folder), peer, Ruler(args.json), args.repeats, world)
        for name in args.only or ROWS:
            ROWS[name](bench)
        peer.close()
