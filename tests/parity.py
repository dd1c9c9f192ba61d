"""Compares this project's model with transformers' Qwen2.5-VL on one checkpoint folder.

    python tests/parity.py --model models/Qwen2.5-VL-3B-Instruct
    python tests/parity.py --model models/Qwen2.5-VL-7B-Instruct --device cuda --dtype bfloat16

Both read the same prompts of random words and random pixels. Each case prints one line of largest differences:

    logits      at every real token of the prompts
    decoding    between the log-probabilities that `generate` returns with its greedy tokens and transformers' own
    scoring     the same for those that `logprobs` gives to these tokens, along the path of training
    greedy      whether each token is the one that transformers finds most likely after the tokens before it

transformers (5 or later) gets our positions as `position_ids`, because its own rule for videos changed from version to
version. It reads prompt and continuation in one forward pass, without a cache, with eager attention.

Exit status: 1 if a difference is over 1e-4 (bfloat16: 1), or, in float32, if a greedy token differs; else 0.
In bfloat16 greedy tokens may differ where two logits are about equal: the step between numbers near 30 is 0.125.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import transformers
from torch import Tensor

from data import Example, collate
from model import Config, Prompts, Qwen2_5_VL, init_weights, load_model, mrope_positions


# ------------------------------------------------------------------------------------------------ prompts

CASES = {  # each a batch of prompts; 24 stands for so many words, (steps, rows, columns, seconds per step) for a video
    "text only": [[24]],                                     # or, with 0 seconds, for an image
    "one image": [[6, (1, 12, 20, 0), 9]],
    "one video": [[6, (4, 10, 14, 1.7), 9]],
    "hours of video": [[6, (3, 6, 10, 900.0), 20]],          # late positions: errors of rotary angles grow with them
    "odd grids": [[2, (2, 6, 10, 1.0), 3, (1, 14, 22, 0), 1, (3, 2, 18, 0.9), 4]],
    "several of each": [[4, (1, 6, 6, 0), 2, (3, 4, 10, 1.7), 1, (1, 10, 4, 0), (2, 12, 4, 0.5), 5]],
    "ragged batch": [[30], [2, (2, 6, 10, 1.2), 5], [(1, 4, 6, 0), (1, 8, 10, 0), 3], [1, (1, 10, 12, 2.0)]],
}


def make_prompts(batch: list[list[int | tuple]], config: Config, seed: int) -> Prompts:
    generator, c, examples = torch.Generator().manual_seed(seed), config.vision, []
    words = torch.arange(config.vocab_size)
    words = words[~config.is_medium(words)]
    for pieces in batch:
        ids, grid, seconds = [], [], []
        for x in pieces:
            if isinstance(x, int):
                ids += words[torch.randint(len(words), (x,), generator=generator)].tolist()
            else:
                placeholder = config.video_token_id if x[3] else config.image_token_id
                ids += [placeholder] * (torch.Size(x[:3]).numel() // c.spatial_merge_size ** 2)
                grid.append(x[:3])
                seconds.append(x[3])
        ids = torch.tensor(ids)
        positions, following = mrope_positions(ids, grid, seconds, config)
        shape = sum(t * h * w for t, h, w in grid), 3 * c.temporal_patch_size * c.patch_size ** 2
        pixels = torch.randn(shape, generator=generator) if grid else None
        examples.append(Example(None, ids, positions, following, pixels, grid, 0.0))
    prompts = collate(examples)
    return replace(prompts, grid=sum(prompts.grid, []))


def random_model(config: Config, seed: int) -> Qwen2_5_VL:
    """Random weights in which no bias is zero and no norm is one, so that leaving one out or swapping two shows."""
    model, generator = init_weights(Qwen2_5_VL(config), seed), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


# ------------------------------------------------------------------------------------------------ both models

class Answers(NamedTuple):
    """What this project's model returns for a batch of prompts with R real tokens together."""
    logits: Tensor                                           # (R, V)
    tokens: Tensor                                           # (B, G, T) greedy
    decoded: Tensor                                          # (B, G, T) their log-probabilities, from `generate`
    scored: Tensor                                           # (B, G, T) and from `logprobs`


def real_tokens(prompts: Prompts) -> Tensor:
    return torch.arange(prompts.ids.shape[1], device=prompts.ids.device) < prompts.lengths[:, None]        # (B, P)


@torch.no_grad()
def ask_ours(model: Qwen2_5_VL, prompts: Prompts, length: int) -> Answers:
    logits = model.logits(model.prefill(prompts)[0])[real_tokens(prompts)]
    before, c = model.masked_token_ids, model.config
    model.masked_token_ids = torch.tensor([c.image_token_id, c.video_token_id])            # they would ask for pixels
    sampled = model.generate(prompts, torch.zeros(len(prompts.ids), 2, length), stop_ids=[-1], temperature=0)
    scored, _ = model.logprobs(prompts, sampled.tokens, sampled.lengths)
    model.masked_token_ids = before
    return Answers(*(x.cpu() for x in (logits, sampled.tokens, sampled.logprobs, scored)))


def media_inputs(prompts: Prompts, config: Config) -> dict[str, Tensor]:
    """transformers takes images and videos apart; ours are in one tensor, in prompt order."""
    if prompts.pixels is None:
        return {}
    device, inputs = prompts.ids.device, {}
    tokens = prompts.ids[config.is_medium(prompts.ids)]
    kinds = tokens.repeat_interleave(config.vision.spatial_merge_size ** 2)               # (S,) one for each patch
    grids = torch.tensor(prompts.grid, device=device)
    first = grids.prod(1).cumsum(0) - grids.prod(1)                                       # patch of each medium
    for kind, pixels, grid in ((config.image_token_id, "pixel_values", "image_grid_thw"),
                               (config.video_token_id, "pixel_values_videos", "video_grid_thw")):
        if (kinds == kind).any():
            inputs |= {pixels: prompts.pixels[kinds == kind], grid: grids[kinds[first] == kind]}
    return inputs


@torch.no_grad()
def ask_transformers(model, prompts: Prompts, config: Config, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One forward pass over [prompt | padding | tokens]; padding is masked and positions go on after the prompt.

    tokens (B, T) → logits at the prompts' real tokens (R, V), log-probabilities at each of the tokens (B, T, V)
    """
    (b, t), p, real = tokens.shape, prompts.ids.shape[1], real_tokens(prompts)
    following = prompts.next_position[:, None] + torch.arange(t, device=tokens.device)                     # (B, T)
    logits = model(input_ids=torch.cat([prompts.ids, tokens], dim=1),
                   attention_mask=torch.cat([real, torch.ones_like(tokens, dtype=torch.bool)], dim=1).long(),
                   position_ids=torch.cat([prompts.positions, following.expand(3, -1, -1)], dim=2),
                   use_cache=False, **media_inputs(prompts, config)).logits.float()                        # (B, P+T, V)
    before = torch.cat([logits[torch.arange(b), prompts.lengths - 1][:, None], logits[:, p:-1]], dim=1)    # (B, T, V)
    words = torch.arange(config.vocab_size, device=tokens.device)
    logprobs = before.masked_fill(config.is_medium(words), -1e30).log_softmax(-1)
    return logits[:, :p][real].cpu(), logprobs.cpu()


def compare(answers: Answers, logits: Tensor, logprobs: Tensor) -> tuple[dict[str, float], bool]:
    """The largest differences from transformers' logits (R, V) and log-probabilities (B, T, V), and whether the greedy
    tokens are the same."""
    expected = logprobs.gather(-1, answers.tokens[:, 0, :, None])[..., 0][:, None]                         # (B, 1, T)
    pairs = {"logits": answers.logits - logits, "decoding": answers.decoded - expected,
             "scoring": answers.scored - expected}
    same = bool((answers.tokens == logprobs.argmax(-1)[:, None]).all())
    return {name: difference.abs().max().item() for name, difference in pairs.items()}, same


def load_reference(folder: str | Path, dtype: torch.dtype = torch.float32, device="cpu"):
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager").to(device)


# ------------------------------------------------------------------------------------------------ command line

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint folder, official or written here")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags = parser.parse_args()
    exact, dtype = flags.dtype == "float32", getattr(torch, flags.dtype)
    tolerance = 1e-4 if exact else 1.0
    torch.backends.cudnn.allow_tf32 = False                  # else transformers' patch convolution rounds to 10 bits
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    try:
        model = load_model(flags.model, dtype, flags.device)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    config = model.config
    print(f"{flags.model} on {flags.device} in {flags.dtype}; transformers {transformers.__version__}; "
          f"tolerance {tolerance:g}")
    batches = {name: make_prompts(case, config, seed=0).to(flags.device) for name, case in CASES.items()}
    answers = {name: ask_ours(model, prompts, length=16) for name, prompts in batches.items()}
    del model                                                # the two networks are never in memory together
    reference, failed = load_reference(flags.model, dtype, flags.device), False
    for name, prompts in batches.items():
        tokens = answers[name].tokens[:, 0].to(flags.device)
        logits, logprobs = ask_transformers(reference, prompts, config, tokens)
        differences, greedy = compare(answers[name], logits, logprobs)
        good = all(x <= tolerance for x in differences.values()) and (greedy or not exact)    # a NaN fails too
        failed |= not good
        print(f"{name:16}", *(f"{what} {x:.1e} " for what, x in differences.items()),
              f"greedy {'identical' if greedy else 'DIFFERENT'}  largest logit {logits.abs().max():.1f}",
              "" if good else " FAILED")
    sys.exit(failed)


if __name__ == "__main__":
    main()
