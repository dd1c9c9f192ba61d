"""Compares this project's model with transformers' Qwen2.5-VL on one checkpoint folder.

    python tests/parity.py --model models/Qwen2.5-VL-3B-Instruct
    python tests/parity.py --model models/Qwen2.5-VL-7B-Instruct --device cuda --dtype bfloat16

Both read the same prompts of random words and random pixels. Each case prints one line of largest differences:

    logits      at every real token of the prompts
    decoding    between the log-probabilities that `generate` returns with its greedy tokens and transformers' own
    scoring     the same for those that `logprobs` gives to these tokens, along the path of training
    greedy      whether every token is the one that transformers finds most likely after the same beginning. If all
                are, its own greedy continuation is this one, token for token: each step starts from equal beginnings

transformers (5 or later) gets our positions as `position_ids`, because its own rule for videos changed from version to
version. It reads prompt and continuation in one plain forward pass, without a cache, with eager attention.

Exit status: 0 if everything agrees; 1 if a difference is over the tolerance, or, in float32, if a greedy token differs.
In bfloat16 greedy tokens may differ where two logits are about equal: the step between numbers near 30 is 0.125.
"""
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import transformers
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

import model as ours
from model import Config, Prompts, Qwen2_5_VL, init_weights, load_model, mrope_positions


# ------------------------------------------------------------------------------------------------ prompts

class Medium(NamedTuple):
    kind: str                                                # "image" or "video"
    grid: tuple[int, int, int]                               # (steps, rows, columns) of patches
    seconds: float = 0.0                                     # per grid step


def image(rows: int, columns: int) -> Medium:
    return Medium("image", (1, rows, columns))


def video(steps: int, rows: int, columns: int, seconds: float) -> Medium:
    return Medium("video", (steps, rows, columns), seconds)


CASES = {  # each a batch of prompts; a number stands for that many words
    "text only": [[24]],
    "one image": [[6, image(12, 20), 9]],
    "one video, 0.5 s a step": [[6, video(4, 10, 14, 0.5), 9]],
    "one video, 1.7 s a step": [[6, video(4, 10, 14, 1.7), 9]],
    "one video, 2 s a step": [[6, video(4, 10, 14, 2.0), 9]],
    "hours of video": [[6, video(3, 6, 10, 900.0), 20]],     # late positions: errors of rotary angles grow with them
    "odd grids": [[2, video(2, 6, 10, 1.0), 3, image(14, 22), 1, video(3, 2, 18, 0.9), 4]],
    "several of each": [[4, image(6, 6), 2, video(3, 4, 10, 1.7), 1, image(10, 4), video(2, 12, 4, 0.5), 5]],
    "ragged batch": [[30], [2, video(2, 6, 10, 1.2), 5], [image(4, 6), image(8, 10), 3], [1, video(1, 10, 12, 2.0)]],
}


def make_prompts(batch: list[list[int | Medium]], config: Config, seed: int) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    placeholder = {"image": config.image_token_id, "video": config.video_token_id}
    words = torch.tensor([i for i in range(config.vocab_size) if i not in placeholder.values()])
    c, rows = config.vision, []
    for pieces in batch:
        media = [x for x in pieces if isinstance(x, Medium)]
        ids = torch.cat([words[torch.randint(len(words), (x,), generator=generator)] if isinstance(x, int) else
                         torch.full((torch.Size(x.grid).numel() // c.spatial_merge_size ** 2,), placeholder[x.kind])
                         for x in pieces])
        rows.append((ids, *mrope_positions(ids, [m.grid for m in media], [m.seconds for m in media], config)))
    longest = max(len(ids) for ids, _, _ in rows)
    pad = lambda x: torch.nn.functional.pad(x, (0, longest - x.shape[-1]))
    grid = [x.grid for pieces in batch for x in pieces if isinstance(x, Medium)]
    patches, numbers = sum(t * h * w for t, h, w in grid), 3 * c.temporal_patch_size * c.patch_size ** 2
    return Prompts(ids=torch.stack([pad(ids) for ids, _, _ in rows]),
                   lengths=torch.tensor([len(ids) for ids, _, _ in rows]),
                   positions=torch.stack([pad(positions) for _, positions, _ in rows], dim=1),
                   next_position=torch.tensor([following for _, _, following in rows]),
                   pixels=torch.randn(patches, numbers, generator=generator) if grid else None, grid=grid)


def random_model(config: Config, seed: int) -> Qwen2_5_VL:
    """Random weights in which no bias is zero and no norm is one, so that leaving one out or swapping two shows."""
    model, generator = init_weights(Qwen2_5_VL(config), seed), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


# ------------------------------------------------------------------------------------------------ both models

class Answers(NamedTuple):
    """What this project's model says to a batch of prompts. R real tokens in all prompts together."""
    logits: Tensor                                           # (R, V)
    tokens: Tensor                                           # (B, G, T) greedy
    decoded: Tensor                                          # (B, G, T) their log-probabilities, from `generate`
    scored: Tensor                                           # (B, G, T) and from `logprobs`


class Difference(NamedTuple):
    logits: float
    decoding: float
    scoring: float
    greedy: bool                                             # identical?
    largest_logit: float


def real_tokens(prompts: Prompts) -> Tensor:
    return torch.arange(prompts.ids.shape[1], device=prompts.ids.device) < prompts.lengths[:, None]        # (B, P)


def placeholders(config: Config) -> Tensor:
    return torch.tensor([config.image_token_id, config.video_token_id])


@torch.no_grad()
def ask_ours(model: Qwen2_5_VL, prompts: Prompts, length: int, group: int = 2) -> Answers:
    logits = model(prompts)[real_tokens(prompts)]
    before, model.masked_token_ids = model.masked_token_ids, placeholders(model.config)     # a sampled placeholder would ask for pixels
    drawn = model.generate(prompts, torch.zeros(len(prompts.ids), group, length), stop_ids=[-1], temperature=0)
    scored, _ = model.logprobs(prompts, drawn.tokens, drawn.lengths)
    model.masked_token_ids = before
    return Answers(*(x.cpu() for x in (logits, drawn.tokens, drawn.logprobs, scored)))


def media_inputs(prompts: Prompts, config: Config) -> dict[str, Tensor]:
    """transformers takes images and videos apart; ours stand in one tensor, in prompt order."""
    inputs, kinds, at = {}, [], 0
    tokens = prompts.ids[torch.isin(prompts.ids, placeholders(config).to(prompts.ids.device))].tolist()
    sizes = [t * h * w for t, h, w in prompts.grid]
    for size in sizes:
        kinds.append(tokens[at])
        at += size // config.vision.spatial_merge_size ** 2
    for kind, pixels, grid in ((config.image_token_id, "pixel_values", "image_grid_thw"),
                               (config.video_token_id, "pixel_values_videos", "video_grid_thw")):
        mine = [i for i, k in enumerate(kinds) if k == kind]
        if mine:
            pieces = prompts.pixels.split(sizes)
            inputs |= {pixels: torch.cat([pieces[i] for i in mine]),
                       grid: torch.tensor([prompts.grid[i] for i in mine], device=prompts.ids.device)}
    return inputs


@torch.no_grad()
def ask_transformers(model, prompts: Prompts, config: Config, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One forward pass over [prompt | padding | tokens]; padding is masked and positions go on after the prompt.

    tokens (B, T) → logits at the prompts' real tokens (R, V), log-probabilities at each of the tokens (B, T, V)
    """
    (b, t), p, real = tokens.shape, prompts.ids.shape[1], real_tokens(prompts)
    behind = prompts.next_position[:, None] + torch.arange(t, device=tokens.device)                        # (B, T)
    logits = model(input_ids=torch.cat([prompts.ids, tokens], dim=1),
                   attention_mask=torch.cat([real, torch.ones_like(tokens, dtype=torch.bool)], dim=1).long(),
                   position_ids=torch.cat([prompts.positions, behind.expand(3, -1, -1)], dim=2),
                   use_cache=False, **media_inputs(prompts, config)).logits.float()                        # (B, P+T, V)
    before = torch.cat([logits[torch.arange(b), prompts.lengths - 1][:, None], logits[:, p:-1]], dim=1)    # (B, T, V)
    logprobs = before.index_fill(-1, placeholders(config).to(logits.device), -1e30).log_softmax(-1)
    return logits[:, :p][real].cpu(), logprobs.cpu()


def compare(answers: Answers, logits: Tensor, logprobs: Tensor) -> Difference:
    """Largest differences between our answers and transformers' logits (R, V) and log-probabilities (B, T, V)."""
    expected = logprobs.gather(-1, answers.tokens[:, 0, :, None])[..., 0]                                  # (B, T)
    largest = lambda x: x.abs().max().item()
    return Difference(largest(answers.logits - logits), largest(answers.decoded - expected[:, None]),
                      largest(answers.scored - expected[:, None]),
                      bool((answers.tokens == logprobs.argmax(-1)[:, None]).all()), largest(logits))


def load_reference(folder: str | Path, dtype: torch.dtype = torch.float32, device="cpu"):
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return network.to(device)


# ------------------------------------------------------------------------------------------------ command line

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint folder, official or written here")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tolerance", type=float, metavar="X", help="default 1e-4 in float32, 1 in bfloat16")
    parser.add_argument("--tokens", type=int, default=16, metavar="T", help="length of the greedy continuations (16)")
    flags = parser.parse_args()
    exact, dtype = flags.dtype == "float32", getattr(torch, flags.dtype)
    tolerance = flags.tolerance if flags.tolerance is not None else 1e-4 if exact else 1.0
    torch.backends.cudnn.allow_tf32 = False                  # else transformers' patch convolution rounds to 10 bits
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    try:
        model = load_model(flags.model, dtype, flags.device)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    config = model.config
    windows = "flash-attn" if ours.flash_attn_varlen_func and flags.device == "cuda" and not exact else "torch"
    print(f"{flags.model} on {flags.device} in {flags.dtype}, attention of the vision tower by {windows}; "
          f"transformers {transformers.__version__}; tolerance {tolerance:g}")
    batches = {name: make_prompts(case, config, seed=0).to(flags.device) for name, case in CASES.items()}
    answers = {name: ask_ours(model, prompts, flags.tokens) for name, prompts in batches.items()}
    del model                                                # the two networks are never in memory together
    reference, failed = load_reference(flags.model, dtype, flags.device), False
    for name, prompts in batches.items():
        tokens = answers[name].tokens[:, 0].to(flags.device)
        d = compare(answers[name], *ask_transformers(reference, prompts, config, tokens))
        # Written so that a NaN fails too.
        good = all(x <= tolerance for x in (d.logits, d.decoding, d.scoring)) and (d.greedy or not exact)
        failed |= not good
        print(f"{name:24} logits {d.logits:.1e} (of {d.largest_logit:.1f})  decoding {d.decoding:.1e}  "
              f"scoring {d.scoring:.1e}  greedy {'identical' if d.greedy else 'DIFFERENT'}{'' if good else '  FAILED'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
