"""The rows of `python tests/bench.py gpu`: correctness first, then kernels a token, decoding, training pass and memory
at the shapes of Qwen2.5-VL-3B and 7B with random weights, on one card. `--small` tries it with the tiny model on any device.

Prompts are text: they have the length that video and question have in the paper's setting. transformers gets the same
text weights.
"""
import subprocess
import sys
from pathlib import Path
from typing import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from model import CONFIGS, Prompts, Qwen2_5_VL, Step, init_weights, record_step  # noqa: E402  (found by bench.py)
from ruler import Ruler, in_turn, peak, seconds_of

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}                # bytes a second, by the makers
SHAPES = {"prompt": 1424, "new": 512, "train": (8, 1000, 200), "places": 384}
SMALL = {"prompt": 40, "new": 8, "train": (4, 30, 10), "places": 6}


def build(preset: str, device: str, dtype: torch.dtype) -> Qwen2_5_VL:
    """Random weights of the right size. Large ones are made on the device, where the order of numbers does not matter."""
    if preset == "tiny":
        return init_weights(Qwen2_5_VL(CONFIGS[preset]), 0).to(device, dtype)
    with torch.device("meta"):
        model = Qwen2_5_VL(CONFIGS[preset]).to(dtype)
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.constant_(p, float("norm" in name))
    return model


def text(count: int, length: int, device: str) -> Prompts:
    ids = torch.randint(8, 300, (count, length), generator=torch.Generator().manual_seed(0)).to(device)
    return Prompts(ids, torch.full((count,), length, device=device),
                   torch.arange(length, device=device).expand(3, count, -1),
                   torch.full((count,), length, device=device), None, [])


def transformers_model(model: Qwen2_5_VL):
    """transformers' text network with the weights of ours; no second copy."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    c = model.config
    with torch.device("meta"):
        net = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads, rope_theta=c.rope_theta,
            num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps, max_position_embeddings=32768,
            tie_word_embeddings=c.tie_word_embeddings))
    weights = {name: p for name, p in model.named_parameters() if not name.startswith("visual")}
    net.load_state_dict(weights | {"lm_head.weight": model.head.weight}, strict=True, assign=True)
    net.model.rotary_emb = type(net.model.rotary_emb)(net.config).to(model.head.weight.device)     # buffers
    return net.eval()


def rollouts(ruler: Ruler, model: Qwen2_5_VL, net, size: dict, questions: int, group: int, target: float) -> None:
    prompts = text(questions, size["prompt"], str(model.head.weight.device))
    uniforms = torch.rand(questions, group, size["new"])
    asked = dict(attention_mask=torch.ones_like(prompts.ids), max_new_tokens=size["new"], eos_token_id=None,
                 pad_token_id=0, num_return_sequences=group, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    calls = {"ours": lambda: model.generate(prompts, uniforms, [-1]),
             "dynamic cache": lambda: net.generate(prompts.ids, **asked),
             "static cache": lambda: net.generate(prompts.ids, **asked, cache_implementation="static")}
    seconds = in_turn(calls, 2)
    for peer in ("dynamic cache", "static cache"):
        ruler.row("rollout", f"{questions}×{group}, {size['prompt']} + {size['new']}", seconds, peer=peer,
                  target=(target if peer == "dynamic cache" else 2.0) if size is SHAPES else None)


@torch.no_grad()
def decoding(ruler: Ruler, model: Qwen2_5_VL, size: dict, questions: int) -> None:
    """A step in the middle of a rollout against the bytes it has to read: weights, prompts' and own keys and values."""
    weight, t = model.head.weight, size["places"]
    prompts = text(questions, size["prompt"], str(weight.device))
    _, prompt_kv = model.prefill(prompts)
    step = Step(model, prompts, prompt_kv, 8, 2 * t)
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        record_step(step)
    tokens = torch.full((8 * questions,), 9, device=weight.device)
    seconds = in_turn({"ours": lambda: [step(tokens, t) for _ in range(10)]}, 5)
    seconds = {name: [x / 10 for x in values] for name, values in seconds.items()}
    read = sum(p.numel() for layer in model.model.layers for p in layer.parameters()) + weight.numel()
    read += sum(x.numel() for kv in prompt_kv for x in kv[:2])
    read += sum(x[:, :t].numel() for own in step.caches for x in own[:2])
    card = torch.cuda.get_device_name() if weight.is_cuda else ""
    fastest = next((rate for name, rate in BANDWIDTH.items() if name in card), None)
    share = fastest and read * weight.element_size() / fastest / min(seconds["ours"])
    ruler.row("decoding, a step", f"{8 * questions} sequences, place {t}", seconds, roofline=share,
              note=f"{read * weight.element_size() / 1e9:.2f} GB read; {kernels(lambda: step(tokens, t))} operations")


def kernels(call: Callable[[], object]) -> int:
    """What a call runs: kernels on CUDA, operations on a CPU."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        seconds_of(call)
    return sum(event.count for event in seen.key_averages())


def training(ruler: Ruler, model: Qwen2_5_VL, net, size: dict) -> None:
    (g, p, t), device = size["train"], str(model.head.weight.device)
    prompts, tokens = text(1, p, device), torch.randint(8, 300, (1, g, t), device=device)
    whole = torch.cat([prompts.ids.expand(g, -1), tokens[0]], dim=1)
    lengths = torch.full((1, g), t, device=device)

    def ours() -> None:
        model.zero_grad()
        model.logprobs(prompts, tokens, lengths)[0].sum().backward()

    def theirs(keep: int) -> None:
        net.zero_grad()
        logits = net(whole, logits_to_keep=keep).logits[:, -t - 1:-1].float().log_softmax(-1)
        logits.gather(-1, whole[:, -t:, None]).sum().backward()
    calls = {"ours": ours, "full sequences": lambda: theirs(t + 1)}
    ruler.row("training pass", f"{g} × ({p}, {t})", in_turn(calls, 5), peer="full sequences", target=3.0 if size is SHAPES else None,
              note=f"ceiling {g * (p + t) / (p + g * t):.1f}")
    ruler.row("its memory", f"{g} × ({p}, {t})", {}, peer="full logits", target=4.0 if size is SHAPES else None,
              bytes={"ours": peak(ours), "full logits": peak(lambda: theirs(0))}, note="gradients included")


def run(args) -> None:
    cuda = torch.cuda.is_available()
    if not (cuda or args.small):
        sys.exit("There is no GPU. --small tries the command with the tiny model on a CPU.")
    here, device = Path(__file__).parent, "cuda" if cuda else "cpu"
    subprocess.run([sys.executable, "-m", "pytest", "-q", str(here / "test_cuda.py")], check=True, cwd=here.parent)
    ruler, size = Ruler(args.json), SMALL if args.small else SHAPES
    for preset in ("tiny",) if args.small else ("3b", "7b"):
        model = build(preset, device, torch.bfloat16 if cuda else torch.float32)
        net = transformers_model(model)
        print(preset, flush=True)
        if preset != "7b":
            rollouts(ruler, model, net, size, 8, 8, 8.0)
            rollouts(ruler, model, net, size, 1, 1, 5.0)
        for questions in (1, 8):
            decoding(ruler, model, size, questions)
        training(ruler, model, net, size)
        del model, net
        torch.cuda.empty_cache()
