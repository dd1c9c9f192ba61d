"""Qwen2.5-VL from scratch in plain PyTorch: vision encoder, decoder, sampling, log-probabilities.

Read it from top to bottom: configuration, building blocks, vision encoder, attention, decoder, then
the whole model with its entry points `prefill`, `generate`, `logprobs`. Tensors have the names of
the official checkpoints.

Shapes are given in end-of-line comments, in one notation for the whole project:
    B questions (prompts)   G responses to each (the group)   P prompt tokens   T response tokens
    S patches of all media  D width  H heads  K key/value heads  E head_dim  V vocabulary
    N rows of a batch, B or B·G                               r = H/K query heads per key head
(In the other files, which know no heads, K is the number of segments of a response.)
"""
import sys

if sys.version_info < (3, 10):
    sys.exit(f"Python 3.10 or later is needed, this is {sys.version.split()[0]}.")
import inspect
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Callable, NamedTuple

# Read when torch is loaded. OpenMP threads that wait by spinning take the time of other programs: a
# step beside one is 3 times as long. Those that sleep at once wake up late: a step is 1.4 times as
# long. These spin for a moment, then sleep.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Shapes change from step to step.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.checkpoint import checkpoint

if torch.__version__ < "2.11.dev0":                          # versions, not texts, are compared
    sys.exit(f"torch 2.11 or later is needed, this is {torch.__version__}: "
             "pip install -r requirements.txt")
from torch.nn.attention.varlen import varlen_attn
try:                                                         # optional, CUDA only
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


# -------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class VisionConfig:
    """Fields of `vision_config` in config.json. Those without a default must be in the file: the
    classes of transformers fall back to other values than the official checkpoints have, so a
    default would be silently wrong."""
    hidden_size: int                                         # D of the vision encoder
    out_hidden_size: int                                     # D of the decoder
    tokens_per_second: int                                   # temporal positions in a second
    depth: int = 32
    num_heads: int = 16
    intermediate_size: int = 3420
    patch_size: int = 14                                     # pixels
    temporal_patch_size: int = 2                             # frames in one patch
    spatial_merge_size: int = 2                              # 2×2 patches: one token of the decoder
    window_size: int = 112                                   # pixels: 4×4 merged tokens
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)  # they attend over the whole frame


@dataclass(frozen=True)
class Config:
    """Fields of config.json, flat (official) or nested under `text_config` (transformers 5)."""
    vision: VisionConfig
    vocab_size: int                                          # V, more than the tokenizer has
    hidden_size: int                                         # D
    num_hidden_layers: int
    num_attention_heads: int                                 # H
    num_key_value_heads: int                                 # K
    intermediate_size: int
    mrope_section: tuple[int, ...]                           # frequencies for time, height, width
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:                               # E
        return self.hidden_size // self.num_attention_heads

    def is_medium(self, ids: Tensor) -> Tensor:
        """Where the placeholders of images and videos are."""
        return (ids == self.image_token_id) | (ids == self.video_token_id)


def qwen(
    hidden, layers, heads, kv_heads, mlp, vocab, tied,
    sections=(16, 24, 24), ids=(151655, 151656), vision=None
):
    """One row of the table below. Official vision encoders differ in `out_hidden_size` only."""
    encoder = dict(hidden_size=1280, out_hidden_size=hidden, tokens_per_second=2)
    encoder |= vision or {}
    return Config(VisionConfig(**encoder), vocab, hidden, layers, heads, kv_heads, mlp,
                  sections, tied, *ids)


TINY = dict(
    hidden_size=96, depth=2, num_heads=4, intermediate_size=256, fullatt_block_indexes=(1,))
CONFIGS = {  # one architecture, three sizes: students train `tiny`, the paper trains 3b and 7b
    #            D     layers H   K  MLP    V       tied
    "tiny": qwen(128,  4,     4,  2, 384,   384,    True, sections=(4, 6, 6), ids=(6, 7), vision=TINY),
    "3b":   qwen(2048, 36,    16, 2, 11008, 151936, True),
    "7b":   qwen(3584, 28,    28, 4, 18944, 152064, False),
}


# -------------------------------------------------------------------------------- building blocks

# Below the ruled line they are replaced on CPUs where another kernel computes the same faster.
Linear = nn.Linear
linear = F.linear


class SwiGLU(nn.Module):
    """down( silu(gate x) · up x )"""

    def __init__(self, width: int, hidden: int, bias: bool):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias)
        self.up_proj = Linear(width, hidden, bias)
        self.down_proj = Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For `apply_rotary`: (cos, cos) and (-sin, sin), each (…, E), for all heads.
    angles (…, E/2)"""
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)
    factors = torch.cat([cos, cos], -1)
    return factors, torch.cat([-sin, sin], -1)


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Frequency i rotates the pair (a, b) = (x_i, x_{i + E/2}) to (a cos - b sin, b cos + a sin).
    x (…, E)"""
    cos, sin = rotary
    swapped = x.roll(x.shape[-1] // 2, -1)                   # (b, a)
    return x * cos + swapped * sin


def inverse_frequencies(count: int, theta: float, device) -> Tensor:
    # A function, not a buffer: buffers of a model built on the meta device would be uninitialised.
    exponents = torch.arange(count, device=device, dtype=torch.float32) / count
    return 1.0 / theta ** exponents


def run_block(block: Callable, save_memory: bool, *inputs):
    """A forward pass. With `save_memory` it is recomputed in the backward pass (activation
    checkpointing)."""
    if not (save_memory and torch.is_grad_enabled()):
        return block(*inputs)
    # There is no dropout: no state of a random generator to keep.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


# -------------------------------------------------------------------------------- vision encoder

def attention_by_head(
    q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False
) -> Tensor:
    """softmax(q kᵀ / √E) v for each head. q (…, T, H, E), k, v (…, S, K, E) → as q"""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    return out.transpose(-3, -2)


def block_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Attention inside each of the consecutive blocks of these lengths. q, k, v (S, H, E) → as q"""
    if takes_flash(q):
        return varlen_attention(q, k, v, lengths, lengths)
    if min(lengths) == max(lengths):                         # one call for all blocks
        shape = len(lengths), -1
        q, k, v = (x.unflatten(0, shape) for x in (q, k, v))           # (N, L, H, E)
        return attention_by_head(q, k, v).flatten(0, 1)
    blocks = zip(q.split(lengths), k.split(lengths), v.split(lengths))
    outs = [attention_by_head(*block) for block in blocks]             # each (L, H, E)
    return torch.cat(outs)


class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.heads = c.num_heads
        self.qkv = Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], blocks: list[int]) -> Tensor:
        qkv = self.qkv(x).view(len(x), 3 * self.heads, -1)
        qk, v = qkv.split([2 * self.heads, self.heads], 1)
        qk = apply_rotary(qk.float(), rotary).to(x.dtype)
        q, k = qk.chunk(2, 1)                                # each (S, H, E)
        return self.proj(block_attention(q, k, v, blocks).flatten(1))


class VisionBlock(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(c.hidden_size, 1e-6)     # x / rms(x) · weight, computed in fp32
        self.norm2 = nn.RMSNorm(c.hidden_size, 1e-6)
        self.attn = VisionAttention(c)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size, bias=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], blocks: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary, blocks)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """The official 3-D convolution has stride = kernel: on cut patches it is one matrix product."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
        self.proj = nn.Conv3d(3, c.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:             # (S, 3·2·14·14) → (S, D)
        return linear(pixels, self.proj.weight.flatten(1))


class PatchMerger(nn.Module):
    """Four neighbouring patches → one token of the decoder's width."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.width = c.hidden_size * c.spatial_merge_size ** 2
        self.ln_q = nn.RMSNorm(c.hidden_size, 1e-6)
        self.mlp = nn.Sequential(
            Linear(self.width, self.width),
            nn.GELU(),
            Linear(self.width, c.out_hidden_size))

    def forward(self, x: Tensor) -> Tensor:                  # (S, D) → (S/4, D of the decoder)
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionEncoder(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.config = c
        self.patch_embed = PatchEmbed(c)
        self.merger = PatchMerger(c)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))

    def layout(
        self, grid: list[tuple[int, int, int]], device
    ) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """Positions and blocks of all patches. `grid` holds (steps in time, rows, columns) of
        patches of each medium.

        Returns the row and column of each patch (S, 2), the order that sorts patches by window
        (S,), and lengths of two kinds of blocks of the sorted patches: windows (most layers) and
        frames (`fullatt_block_indexes`; never across time). A patch attends only to patches of its
        own block.
        One frame of 4 × 6 merged tokens, windows 4 wide: each row lies in windows 0 0 0 0 1 1 →
        lengths [64, 32].
        """
        merge = self.config.spatial_merge_size
        side = self.config.window_size // self.config.patch_size // merge   # of a window, in tokens
        positions, windows, frames = [], [], []
        for t, h, w in grid:
            sizes = t, h // merge, w // merge, merge, merge  # the patches of a token are neighbours
            axes = torch.cartesian_prod(*map(torch.arange, sizes))
            step, row, column, y, x = axes.unbind(1)         # each (t·h·w,)
            positions.append(torch.stack([row * merge + y, column * merge + x], 1))
            # One number for frame, window row and window column, in this order.
            window = (len(frames) + step) * 10_000 + row // side
            windows.append(window * 10_000 + column // side)
            frames += [h * w] * t
        windows = torch.cat(windows)
        order = windows.argsort(stable=True)
        _, lengths = windows.unique(return_counts=True)
        positions = torch.cat(positions)
        return positions.to(device), order.to(device), lengths.tolist(), frames

    def forward(
        self, pixels: Tensor,
        grid: list[tuple[int, int, int]],
        save_memory: bool = False
    ) -> Tensor:
        """pixels (S, 1176), patches in the processor's order → features (S/4, D of the decoder),
        in the same order."""
        c = self.config
        positions, order, windows, frames = self.layout(grid, pixels.device)
        count = c.hidden_size // c.num_heads // 4            # of frequencies for rows; for columns
        frequencies = inverse_frequencies(count, 10_000.0, pixels.device)
        angles = positions[order, :, None] * frequencies     # (S, 2, E/4)
        rotary = rotary_tables(angles.view(-1, 1, 2 * count), torch.float32)
        x = self.patch_embed(pixels)[order]                  # (S, D)
        for i, block in enumerate(self.blocks):
            blocks = frames if i in c.fullatt_block_indexes else windows
            x = run_block(block, save_memory, x, rotary, blocks)
        tokens = order[::c.spatial_merge_size ** 2].argsort()          # the order before sorting
        return self.merger(x)[tokens]


# -------------------------------------------------------------------------------- attention

def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query sees the keys up to its own place; the last query is at the place of the last key.
    (`is_causal` puts the first query at the first key.) q (N, T, H, E), k, v (N, S, K, E) → as q"""
    t, places = q.shape[1], k.shape[1]
    if t == places:
        return attention_by_head(q, k, v, causal=True)
    every = torch.ones(t, places, dtype=torch.bool, device=q.device)
    return attention_by_head(q, k, v, mask=every.tril(places - t))


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor,
    group: int,
    lengths: list[int],
    width: int
) -> Tensor:
    """Attention in training, where a row is a prompt, P = `width` places with its padding, then G
    responses of T places each (in `logprobs` T - 1: the last token is no input). The prompt attends
    causally to itself, each response to the prompt and causally to itself.

    The prompt is computed once for its G responses, with the same numbers as in G separate
    sequences. Padding is at the end of a prompt: causality hides it from the prompt, and it is cut
    off for the responses. lengths: of the B prompts, without padding.
    q (B, P + G·T, H, E), k, v (B, P + G·T, K, E) → as q
    """
    sizes = [width, q.shape[1] - width]
    prompt_q, q = q.split(sizes, 1)
    prompt_k, k = k.split(sizes, 1)
    prompt_v, v = v.split(sizes, 1)
    from_prompts = causal_attention(prompt_q, prompt_k, prompt_v)
    if not q.numel():                                        # T = 1: responses have no inputs
        return from_prompts
    q = q.unflatten(1, (group, -1))                          # (B, G, T, H, E)
    keys = behind_prompts(prompt_k, k.unflatten(1, (group, -1)), lengths)
    values = behind_prompts(prompt_v, v.unflatten(1, (group, -1)), lengths)
    if takes_flash(q):                                       # all questions in one call
        out = flash_questions(q, keys, values)
    else:
        outs = [causal_attention(*question) for question in zip(q, keys, values)]
        out = torch.stack(outs)
    return torch.cat([from_prompts, out.flatten(1, 2)], 1)


def behind_prompts(prompts: Tensor, own: Tensor, lengths: list[int]) -> list[Tensor]:
    """Keys or values that the responses of each question see: those of its prompt, n long without
    padding, then their own. prompts (B, P, K, E), own (B, G, T, K, E) → B × (G, n + T, K, E)"""
    joined = []
    for prompt, responses, n in zip(prompts, own, lengths):
        copies = prompt[:n].expand(len(responses), -1, -1, -1)
        joined.append(torch.cat([copies, responses], 1))
    return joined


class KV(NamedTuple):
    """Keys and values in one layer: those of the prompts, computed once for a question's G
    responses (N = B, S = P), or those of the tokens sampled so far, with room for the longest
    response (N = B·G, S = T)."""
    k: Tensor                                                # (N, S, K, E)
    v: Tensor
    used: Tensor                                             # (N,) int32: of the S places; the rest
    mask: Tensor | None = None                               # is padding: (N, 1, 1, S) -inf there
    place: Tensor | None = None                              # (1,) where the current token's go


def cached_attention(q: Tensor, k: Tensor, v: Tensor, prompt: KV, own: KV) -> Tensor:
    """Attention in sampling: one token of each response; its key and value are written to `own`.
    q (B·G, 1, H, E), k, v (B·G, 1, K, E) → as q"""
    own.k.index_copy_(1, own.place, k)
    own.v.index_copy_(1, own.place, v)
    return decode_attention(q.squeeze(1), prompt, own).unsqueeze(1)


def decode_attention(q: Tensor, prompt: KV, own: KV) -> Tensor:
    """Attention of a new token of every response, without G copies of the prompt's keys.
    q (B·G, H, E), as the result.

    A softmax over prompt and response is computed in two parts. Where a part's scores are s, its
    output o is weighted by exp(s). With the log-sum-exp of both:
        o = (1 - w) o_own + w o_prompt,   w = sigmoid(lse_prompt - lse_own)
    """
    from_prompt, lse_prompt = attend(q, prompt)
    from_own, lse_own = attend(q, own)
    w = torch.sigmoid(lse_prompt - lse_own)[..., None]
    out = torch.lerp(from_own.float(), from_prompt.float(), w)
    return out.to(q.dtype)


def attend(q: Tensor, kv: KV) -> tuple[Tensor, Tensor]:
    """Attention of Q queries a row (G for the prompts' cache, 1 for a response's own) to all places
    in use, and the log-sum-exp of the scores, which F.scaled_dot_product_attention does not return.
    No gradient. q (N·Q, H, E) → as q, (N·Q, H)"""
    if takes_flash(q):
        return flash_attend(q, kv)
    used = None if kv.place is None else int(kv.place) + 1
    k = kv.k[:, :used].transpose(1, 2)                       # (N, K, S, E)
    v = kv.v[:, :used].transpose(1, 2)
    n, heads, _, e = k.shape
    queries = len(q) // n
    # Heads that share a key head, and the queries of a row, are rows of one product.
    rows = q.view(n, queries, heads, -1, e).transpose(1, 2)
    rows = rows.flatten(2, 3)                                # (N, K, Q·r, E)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if q.is_cuda:
        kernel = plain_attention
    out, lse = kernel(rows, k, v, attn_mask=kv.mask)         # (N, K, Q·r, E), (N, K, Q·r)
    out = out.unflatten(2, (queries, -1)).transpose(1, 2)    # (N, Q, K, r, E)
    lse = lse.unflatten(2, (queries, -1)).transpose(1, 2)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


# -------------------------------------------------------------------------------- decoder

class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads. Which places see which is
    decided by the `attention` that a caller passes: `packed_attention` in training,
    `cached_attention` in sampling, a causal one for prompts alone (`prefill`)."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        query_width = c.num_attention_heads * c.head_dim
        key_width = c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, query_width)
        self.k_proj = Linear(c.hidden_size, key_width)
        self.v_proj = Linear(c.hidden_size, key_width)
        self.o_proj = Linear(query_width, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention: Callable) -> Tensor:
        """x (N, T, D) → (N, T, D)"""
        heads = -1, self.head_dim
        q = apply_rotary(self.q_proj(x).unflatten(2, heads), rotary)   # (N, T, H, E)
        k = apply_rotary(self.k_proj(x).unflatten(2, heads), rotary)   # (N, T, K, E)
        v = self.v_proj(x).unflatten(2, heads)
        return self.o_proj(attention(q, k, v).flatten(2))


class DecoderLayer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size, bias=False)

    def forward(
        self, x: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention: Callable,
        first: int = 0
    ) -> Tensor:
        """x (N, T, D) → (N, T - first, D): places before `first` are attended to and end here."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, attention)
        x = x[:, first:]
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and last norm: the tensors under `model.` in the checkpoint."""

    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(
        self, x: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention: Callable,
        first: int,
        save_memory: bool
    ) -> Tensor:
        """The layers alone: embeddings (N, T, D) → (N, T - first, D). Nothing is predicted before
        place `first`: the last layer skips what others no longer attend to."""
        *others, last = self.layers
        for layer in others:
            x = run_block(layer, save_memory, x, rotary, attention)
        return run_block(last, save_memory, x, rotary, attention, first)


def mrope_positions(
    ids: Tensor,
    grid: list[tuple[int, int, int]],
    seconds: list[float],
    config: Config
) -> tuple[Tensor, int]:
    """Multimodal rotary positions of one prompt (section 2.1.2 of the Qwen2.5-VL report).

    A text token has the same position on all three axes, one more than the token before it. A
    medium begins where the text stopped and has positions (time, row, column). Text resumes after
    the largest position used.

    ids (P,); grid and `seconds` (per grid step, 0 for an image) of its media in order. Returns
    positions (3, P) and the position of the first response token. Time is
    floor(step · seconds · tokens_per_second), as the model was trained; later versions of
    transformers round `seconds` or let text resume earlier (docs/scaling.md).
    Raises ValueError if placeholders and grids disagree.
    """
    merge, rate = config.vision.spatial_merge_size, config.vision.tokens_per_second
    is_medium = config.is_medium(ids).tolist()
    pieces, start = [], 0
    filled = []                                              # what `is_medium` should be
    for (t, h, w), step in zip(grid, seconds, strict=True):
        rest = [*is_medium[len(filled):], True]
        text = rest.index(True)                              # tokens before the next placeholder
        pieces.append(torch.arange(start, start + text).expand(3, -1))
        time = (torch.arange(t) * step * rate).long()
        rows = torch.arange(h // merge)
        columns = torch.arange(w // merge)
        axes = torch.cartesian_prod(time, rows, columns)
        pieces.append(axes.T + start + text)
        filled += [False] * text + [True] * len(axes)
        start = int(pieces[-1].max()) + 1
    text = len(ids) - len(filled)
    if filled + [False] * text != is_medium:
        raise ValueError(f"the placeholders of media in the prompt do not fit the grids {grid}")
    pieces.append(torch.arange(start, start + text).expand(3, -1))
    return torch.cat(pieces, 1), start + text


# -------------------------------------------------------------------------------- the whole model

@dataclass
class Prompts:
    """A batch of prompts, padded at the end. The patches of all media are in one tensor, in prompt
    order."""
    ids: Tensor                                              # (B, P)
    lengths: Tensor                                          # (B,)
    positions: Tensor                                        # (3, B, P)
    next_position: Tensor                                    # (B,) of the first response token
    pixels: Tensor | None                                    # (S, 1176), None for text alone
    grid: list[tuple[int, int, int]]                         # (steps, rows, columns) of each medium

    def to(self, device) -> "Prompts":
        values = vars(self).values()
        return Prompts(*(x.to(device) if isinstance(x, Tensor) else x for x in values))


class Sampled(NamedTuple):
    """What `generate` returns. After its end a response holds token 0 and log-probability 0: build
    masks from `lengths`, never from token ids."""
    tokens: Tensor                                           # (B, G, T)
    lengths: Tensor                                          # (B, G) with the stop token
    logprobs: Tensor                                         # (B, G, T) of the tokens when sampled
    finished: Tensor                                         # (B, G) False: cut off by the limit


def sample_token(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    top_p: float
) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling of one token a row, from a given uniform number, so that the randomness
    of a response is fixed before it is sampled.
    logits (N, V) fp32, uniforms (N,) in [0, 1) → tokens (N,), log-probabilities (N,)

    Temperature 0 takes the most likely token (its log-probability is that of temperature 1).
    """
    if not temperature:
        tokens = logits.argmax(-1)
    else:
        logits = logits / temperature
        if top_p < 1:  # the smallest set of tokens that holds top_p, at least the most likely one
            ranked, order = logits.softmax(-1).sort(descending=True)
            cut = ranked.cumsum(-1) - ranked >= top_p        # the tokens before it hold enough
            logits = logits.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
        # fp64: no draw reaches past the last token.
        cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
        target = uniforms.double()[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    logprobs = logits.log_softmax(-1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


class Step:
    """One step of decoding, the plain way: token t of every response goes through the network, its
    keys and values into the caches. Call it with tokens (B·G,) and t = 0, 1, …; it returns the
    logits of the next tokens, (B·G, V)."""

    def __init__(
        self, model: "Qwen2_5_VL",
        prompts: Prompts,
        prompt_kv: list[KV],
        group: int,
        limit: int
    ):
        self.model = model
        self.prompt_kv = prompt_kv
        cache = prompt_kv[0].k                               # (B, P, K, E)
        start = prompts.next_position.repeat_interleave(group)         # (B·G,) of the first token
        positions = start[:, None] + torch.arange(limit, device=start.device)
        positions = positions.expand(3, -1, -1)
        self.tables = model.rotary(positions, cache.dtype)             # (B·G, T, 1, E) each
        self.place = start.new_zeros(1)
        self.used = torch.zeros_like(start, dtype=torch.int32)
        self.caches = []
        for _ in prompt_kv:
            k = cache.new_zeros(len(start), limit, *cache.shape[2:])   # (B·G, T, K, E)
            v = torch.zeros_like(k)
            self.caches.append(KV(k, v, self.used, None, self.place))

    @torch.inference_mode()                  # no_grad without bookkeeping: 12 % of a row on a CPU
    def __call__(self, tokens: Tensor, t: int) -> Tensor:
        self.place.fill_(t)
        self.used.fill_(t + 1)
        return self.forward(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        decoder = self.model.model
        x = decoder.embed_tokens(tokens[:, None])                      # (B·G, 1, D)
        rotary = [x.index_select(1, self.place) for x in self.tables]  # (B·G, 1, 1, E) each
        for layer, prompt, own in zip(decoder.layers, self.prompt_kv, self.caches):
            attention = partial(cached_attention, prompt=prompt, own=own)
            x = layer.forward(x, rotary, attention)
        return self.model.logits(decoder.norm(x)[:, 0])


LOGITS_AT_ONCE = {"cpu": 2 ** 25, "cuda": 2 ** 27}           # at most, in fp32, in training


class Qwen2_5_VL(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.visual = VisionEncoder(config.vision)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.masked_token_ids = torch.empty(0, dtype=torch.long, device="cpu")   # see `logits`
        self.sharded = False                 # are weights sharded among ranks, and not gathered?
        self.save_memory = False                             # activation checkpointing

    # Every probability that leaves the model is computed from these: sampling, training and the KL
    # reference agree.
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (…, D) → logits (…, V) in fp32, -1e30 at the masked ids, which are never
        sampled (-inf would give 0 · inf in the entropy)."""
        return self.mask(linear(hidden, self.head.weight).float())

    @property
    def head(self) -> nn.Module:
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def mask(self, logits: Tensor) -> Tensor:
        self.masked_token_ids = self.masked_token_ids.to(logits.device)          # moves once
        with torch.no_grad():                # the probability there is 0, and so is the gradient
            return logits.index_fill_(-1, self.masked_token_ids, -1e30)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (3, N, T) → tables (N, T, 1, E). Each frequency follows one axis, in runs of
        `mrope_section`."""
        c = self.config
        frequencies = inverse_frequencies(c.head_dim // 2, c.rope_theta, positions.device)
        runs = (positions[..., None] * frequencies).split(c.mrope_section, -1)
        angles = torch.cat([run[axis] for axis, run in enumerate(runs)], -1)   # (N, T, E/2)
        return rotary_tables(angles[:, :, None], dtype)

    def embed(self, prompts: Prompts) -> Tensor:
        """Embeddings of the prompts, with the features of the media at their placeholders,
        (B, P, D)."""
        x = self.model.embed_tokens(prompts.ids)
        if prompts.pixels is not None:
            features = self.visual(prompts.pixels.to(x.dtype), prompts.grid, self.save_memory)
            is_medium = self.config.is_medium(prompts.ids)
            x = x.masked_scatter(is_medium[..., None], features.to(x.dtype))
        elif self.sharded:  # other ranks may have media: all run the encoder for FSDP's all-gathers
            c = self.config.vision
            side = c.spatial_merge_size
            numbers = 3 * c.temporal_patch_size * c.patch_size ** 2
            patches = x.new_zeros(side ** 2, numbers)
            blank = self.visual(patches, [(1, side, side)], self.save_memory)
            x = x + 0 * blank.sum()
        return x

    def prefill(self, prompts: Prompts, first: int = 0) -> tuple[Tensor, list[KV]]:
        """Hidden states of the prompts (B, P - first, D), and every layer's keys and values."""
        x = self.embed(prompts)
        used = prompts.lengths.int()
        places = torch.arange(x.shape[1], device=x.device)
        padding = places >= used[:, None, None, None]        # (B, 1, 1, P)
        mask = None
        if padding.any():
            mask = torch.where(padding, -torch.inf, 0.0).to(x.dtype)
        prompt_kv = []

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prompt_kv.append(KV(k, v, used, mask))
            return causal_attention(q, k, v)                 # hides padding, which is at the end
        rotary = self.rotary(prompts.positions, x.dtype)
        x = self.model(x, rotary, attention, first, save_memory=False)
        return self.model.norm(x), prompt_kv

    @torch.no_grad()
    def generate(
        self, prompts: Prompts,
        uniforms: Tensor,
        stop_ids: list[int],
        temperature: float = 1.0,
        top_p: float = 1.0
    ) -> Sampled:
        """Samples G responses to each prompt, at most T tokens long, from given uniform numbers
        (B, G, T).

        A prompt is computed once; its keys and values serve the whole group. The uniform numbers
        are given, not drawn here, so that any number of ranks samples the same responses. Sharded
        weights must be gathered (`gathered`): decoding calls the layers without FSDP's hooks,
        which would run for every token.
        """
        b, g, limit = uniforms.shape
        device = prompts.ids.device
        uniforms = uniforms.to(device).flatten(0, 1)                   # (B·G, T)
        stops = torch.tensor(stop_ids, device=device)
        first = int(prompts.lengths.min()) - 1
        hidden, prompt_kv = self.prefill(prompts, first)
        last = hidden[torch.arange(b, device=device), prompts.lengths - 1 - first]
        logits = self.logits(last).repeat_interleave(g, 0)             # (B·G, V)
        step = Step(self, prompts, prompt_kv, g, limit)
        if takes_flash(hidden):                              # both compute the same, faster
            record_step(step)
        elif not hidden.is_cuda:
            shorten_step(step)
        check_every = 16 if hidden.is_cuda else 1            # to read `active`, the CPU waits
        active = torch.ones(b * g, dtype=torch.bool, device=device)
        lengths = torch.zeros_like(active, dtype=torch.long)
        tokens, logprobs = [], []
        for t in range(limit):
            if t % check_every == 0 and not active.any():
                break
            if t:
                logits = step(tokens[-1], t - 1)
            token, logprob = sample_token(logits, uniforms[:, t], temperature, top_p)
            tokens.append(token * active)
            logprobs.append(logprob * active)
            lengths += active
            active = active & ~torch.isin(token, stops)
        longest = int(lengths.max())
        tokens = torch.stack(tokens[:longest], 1).view(b, g, -1)
        logprobs = torch.stack(logprobs[:longest], 1).view(b, g, -1)
        finished = ~active.view(b, g)
        return Sampled(tokens, lengths.view(b, g), logprobs, finished)

    def logprobs(
        self, prompts: Prompts,
        tokens: Tensor,
        lengths: Tensor,
        temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of given responses under this model, with gradient, and the entropy at
        each token.

        A prompt and its G responses are one row, and each block runs once (`packed_attention`):
            prompt, padded to P | response 1: T - 1 tokens | … | response G: T - 1 tokens
        Logits are computed only where a response token is predicted.
        tokens (B, G, T), lengths (B, G) → log-probabilities (B, G, T), entropies (B, G, T), both 0
        after the end.
        """
        b, g, t = tokens.shape
        p, device = prompts.ids.shape[1], tokens.device
        inputs = tokens[:, :, :-1].flatten(1)                # (B, G·(T-1)): the last is no input
        embedded = self.model.embed_tokens(inputs)
        x = torch.cat([self.embed(prompts), embedded], 1)          # (B, P + G·(T-1), D)
        steps = torch.arange(t - 1, device=device).repeat(g)
        of_responses = prompts.next_position[:, None] + steps      # (B, G·(T-1))
        of_responses = of_responses.expand(3, -1, -1)              # text: the same on all axes
        positions = torch.cat([prompts.positions, of_responses], 2)
        rotary = self.rotary(positions, x.dtype)
        prompt_lengths = prompts.lengths.tolist()
        attention = partial(packed_attention, group=g, lengths=prompt_lengths, width=p)
        first = min(prompt_lengths) - 1      # the first place whose output is used
        x = self.model(x, rotary, attention, first, self.save_memory)
        prompt, others = x.split([p - first, g * (t - 1)], 1)
        others = others.unflatten(1, (g, t - 1))             # they predict tokens 1, 2, …
        last = prompt[torch.arange(b, device=device), prompts.lengths - 1 - first]
        last = last[:, None, None].expand(b, g, 1, -1)       # predicts token 0
        hidden = torch.cat([last, others], 2)                # (B, G, T, D)
        real = torch.arange(t, device=device) < lengths[..., None]             # (B, G, T)
        hidden = self.model.norm(hidden[real])               # (number of real tokens, D)
        logprobs, entropies = self.token_logprobs(hidden, tokens[real], temperature)
        empty = torch.zeros(b, g, t, device=device)
        return empty.masked_scatter(real, logprobs), empty.masked_scatter(real, entropies)

    def token_logprobs(
        self, hidden: Tensor,
        targets: Tensor,
        temperature: float
    ) -> tuple[Tensor, Tensor]:
        """log p(target) and entropy, in chunks recomputed in backward.
        hidden (N, D), targets (N,) → (N,), (N,)"""
        size = LOGITS_AT_ONCE[hidden.device.type] // self.config.vocab_size
        several, chunks = len(hidden) > size, []
        for h, t in zip(hidden.split(size), targets.split(size)):
            chunks.append(run_block(self.score, several, h, t, temperature))
        return tuple(map(torch.cat, zip(*chunks)))

    def score(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self.logits(hidden)
        if temperature != 1:
            logits = logits / temperature
        logprobs = logits.log_softmax(-1)
        with torch.no_grad():
            # Not logprobs.exp(): that of -1e30 is slow on a CPU.
            entropies = -(logits.softmax(-1) * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropies


def init_weights(model: Qwen2_5_VL, seed: int) -> Qwen2_5_VL:
    """Random start: normal matrices of variance 1 / inputs, zero biases, unit norms; the same for a
    seed everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            inputs = p[0].numel()
            p.data.copy_(torch.randn(p.shape, generator=generator) * inputs ** -0.5)
        else:
            p.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


# ================================ a first reader may stop here ================================

# -------------------------------------------------------------------------------- kernels

# SDPA's kernel of cuDNN, the first choice on Hopper, builds a plan for each new shape.
torch.backends.cuda.enable_cudnn_sdp(False)
PARAMETERS = inspect.signature(varlen_attn).parameters       # torch 2.11 groups heads unasked
GQA = {"enable_gqa": True} if "enable_gqa" in PARAMETERS else {}
# MKL, which computes F.linear on CPUs, uses AVX-512 on Intel's alone. oneDNN, which is also in
# torch, uses it on all.
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
ONEDNN = AVX512 and torch.backends.mkldnn.is_available()


def linear_by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, for x (…, D) and weight (O, D). On a CPU as a convolution over N rows of
    one pixel: torch asks oneDNN for convolutions, which on AMD's CPUs takes half the time. It does
    not for few rows."""
    if not x.is_cpu or x.numel() <= 20480:
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, -1, 1, x.shape[-1])
    pixels = pixels.permute(0, 3, 1, 2)                      # (1, D, N, 1), in memory (N, D)
    out = F.conv2d(pixels, weight[:, :, None, None], bias)
    out = out.permute(0, 2, 3, 1)                            # (1, N, 1, O)
    return out.reshape(*x.shape[:-1], -1)


class LinearByConvolution(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear_by_convolution(x, self.weight, self.bias)


if ONEDNN:
    Linear = LinearByConvolution
    linear = linear_by_convolution


def takes_flash(x: Tensor) -> bool:
    """Flash kernels are for CUDA in half precision."""
    return x.is_cuda and x.dtype.itemsize == 2


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    causal: bool = False
) -> Tensor:
    """Attention of N rows of unequal lengths that lie one behind the other, by a flash kernel.

    Row i has lengths_q[i] queries and lengths_k[i] keys. `causal` is aligned at the lower right:
    the last query of a row sees all its keys. q (ΣQ, H, E), k, v (ΣS, K, E) → as q.
    flash-attn (2.1 or later) computes it where it is installed, else torch."""
    first_q = starts(tuple(lengths_q), q.device)
    first_k = starts(tuple(lengths_k), q.device)
    where = first_q, first_k, max(lengths_q), max(lengths_k)
    if flash_attn_varlen_func:
        return flash_attn_varlen_func(q, k, v, *where, causal=causal)
    window = (-1, 0 if causal else -1)
    return varlen_attn(q, k, v, *where, window_size=window, **GQA)


def flash_questions(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """`causal_attention` of each question, all in one call. q (B, G, T, H, E), as the result; keys
    and values B × (G, S, K, E) with an S of each question."""
    b, g, t, _, _ = q.shape
    lengths_q = [t] * b * g
    lengths_k = []
    for responses in keys:
        lengths_k += [responses.shape[1]] * g
    k = torch.cat([x.flatten(0, 1) for x in keys])           # (ΣS, K, E)
    v = torch.cat([x.flatten(0, 1) for x in values])
    out = varlen_attention(q.flatten(0, 2), k, v, lengths_q, lengths_k, causal=True)
    return out.view(q.shape)


def flash_attend(q: Tensor, kv: KV) -> tuple[Tensor, Tensor]:
    """As `attend`. No shape depends on how many places are in use, so that a recorded step serves
    every token. The kernel is that of varlen_attn, which takes no `seqused_k` in torch 2.11."""
    n, room = kv.k.shape[:2]
    queries = len(q) // n
    k, v = kv.k.flatten(0, 1), kv.v.flatten(0, 1)            # (N·S, K, E)
    first_q = starts((queries,) * n, q.device)
    first_k = starts((room,) * n, q.device)
    no = 0.0, False, False                                   # dropout, causal mask, debugging
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, first_q, first_k, queries, room, *no, seqused_k=kv.used)
    return out, lse.T


@lru_cache(maxsize=64)                       # the same for all layers; recorded steps read it there
@torch.inference_mode(False)                 # the backward pass takes no tensor of inference mode
def starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where rows of these lengths start, and the end of the last: (2, 3) → [0, 2, 5], int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor,
    attn_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """With the log-sum-exp, which no kernel on CUDA returns in fp32."""
    scores = q @ k.mT * q.shape[-1] ** -0.5                  # (N, K, Q·r, S)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


# -------------------------------------------------------------------------------- faster decoding

def record_step(step: Step) -> None:
    """Makes `step` one launch a token: a GPU computes faster than a CPU launches a step's thousand
    kernels.

    They are recorded as a CUDA graph, which runs them again at the same addresses. So tokens are
    copied to a tensor that stays, logits are valid until the next call, and weights must not move:
    a graph serves one rollout.
    """
    plain, graph = step.forward, torch.cuda.CUDAGraph()
    tokens = torch.zeros_like(step.used, dtype=torch.long)
    step(tokens, 0)                          # warms the libraries up; the first token overwrites it
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):   # other threads may use CUDA
        logits = plain(tokens)

    def forward(new_tokens: Tensor) -> Tensor:
        tokens.copy_(new_tokens)
        graph.replay()
        return logits
    step.forward = forward


def shorten_step(step: Step) -> None:
    """Makes `step` half the operations; their number is what it costs on a CPU. Matrices with one
    input are joined, and all rotary tables are made beforehand."""
    model, place, tables = step.model, step.place, step.tables         # `forward` knows no step
    prompt_kv, caches = step.prompt_kv, step.caches
    n, _, kv_heads, e = caches[0].k.shape
    heads = model.config.num_attention_heads
    layers = [joined_layer(layer, n) for layer in model.model.layers]
    head = reordered(model.head.weight, n)

    def forward(tokens: Tensor) -> Tensor:
        t = int(place)
        rotary = [x[:, t] for x in tables]
        x = model.model.embed_tokens(tokens)                 # (N, D)
        for layer, prompt, own in zip(layers, prompt_kv, caches):
            norm_1, norm_2, bias, qkv, o, gate_up, down = layer
            joined = product(norm_1(x), qkv) + bias
            joined = joined.view(n, -1, e)
            qk, v = joined.split([heads + kv_heads, kv_heads], 1)
            q, k = apply_rotary(qk, rotary).split([heads, kv_heads], 1)        # (N, H or K, E)
            own.k[:, t] = k
            own.v[:, t] = v
            attended = decode_attention(q, prompt, own)
            x = x + product(attended.view(n, -1), o)
            gate, up = product(norm_2(x), gate_up).chunk(2, 1)
            x = x + product(F.silu(gate) * up, down)
        return model.mask(product(model.model.norm(x), head))
    step.forward = forward


def joined_layer(layer: DecoderLayer, rows: int) -> tuple:
    """Norms, bias and matrices of a layer, in the order in which `shorten_step` takes them."""
    a, mlp = layer.self_attn, layer.mlp
    projections = a.q_proj, a.k_proj, a.v_proj
    qkv = torch.cat([x.weight for x in projections])
    bias = torch.cat([x.bias for x in projections])
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    weights = qkv, a.o_proj.weight, gate_up, mlp.down_proj.weight
    matrices = [reordered(weight, rows) for weight in weights]
    return layer.input_layernorm, layer.post_attention_layernorm, bias, *matrices


def reordered(weight: Tensor, rows: int) -> Tensor:
    """A matrix (O, D) as `product` reads it fastest with so many rows of x: in oneDNN's own layout,
    or a part for each thread, (parts, D, O / parts). MKL by itself shares out the rows of x: with
    one row, one thread works."""
    if ONEDNN and rows > 1:
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    parts = torch.get_num_threads()
    if len(weight) % parts:
        parts = 1
    return weight.unflatten(0, (parts, -1)).mT


def product(x: Tensor, weight: Tensor) -> Tensor:            # (N, D) → (N, O)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    parts = torch.bmm(x.expand(len(weight), -1, -1), weight)           # (parts, N, O / parts)
    return parts.transpose(0, 1).flatten(1)


# -------------------------------------------------------------------------------- shards

SMALLEST_IN_BF16 = 512                                       # hidden_size


def compute_dtype(device: torch.device, config: Config) -> torch.dtype:
    """bfloat16 on a GPU that computes in it, else float32. Toy-sized models are float32
    everywhere."""
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    large = config.hidden_size >= SMALLEST_IN_BF16
    return torch.bfloat16 if supported and large else torch.float32


def shard(model: Qwen2_5_VL, mesh, offload: bool = False) -> Qwen2_5_VL:
    """FSDP2: each rank keeps a part of every weight; a block's weights are gathered in
    `compute_dtype` while it runs. The root holds embedding, last norm and head. `offload` keeps the
    parts in host memory (frozen models only). mesh: a DeviceMesh."""
    device = torch.device(mesh.device_type)
    dtype = compute_dtype(device, model.config)
    # Inputs are not cast: rotary tables stay fp32.
    precision = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    placement = fsdp.OffloadPolicy()
    if offload:
        placement = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for block in (*model.visual.blocks, *model.model.layers, model.visual, model):
        fsdp.fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=placement)
    for entry in ("generate", "logprobs"):   # FSDP gathers the root's weights for these calls too
        fsdp.register_fsdp_forward_method(model, entry)
    model.sharded = True
    return model


def build_model(
    folder: str | Path,
    vocabulary,
    world,
    save_memory: bool = False,
    frozen: bool = False,
    offload: bool = False
) -> Qwen2_5_VL:
    """Loads a model folder for training (fp32), or `frozen` (in `compute_dtype`); sharded where
    there are several ranks or a GPU: rank 0 reads it and broadcasts the parts.
    vocabulary: a data.Vocabulary, world: a sft.World."""
    config = read_config(folder)
    dtype = compute_dtype(world.device, config) if frozen else torch.float32
    if world.size == 1 and world.device.type == "cpu":
        model = load_model(folder, dtype)
    else:
        with torch.device("meta"):
            model = shard(Qwen2_5_VL(config).to(dtype), world.mesh(), offload)
        model.to_empty(device="cpu" if offload else world.device)
        tensors = load_weights(folder, model, dtype) if world.first else {}
        world.gather(None)               # ranks wait: a large model takes minutes to read
        how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, tensors, options=how)
        model.set_reshard_after_forward(frozen, recurse=False)
    model.save_memory = save_memory
    return vocabulary.mask_special_tokens(model.requires_grad_(not frozen))


@contextmanager
def gathered(model: Qwen2_5_VL):
    """Inside, every rank holds all weights, so that ranks may sample different numbers of
    tokens."""
    if not model.sharded:                                    # or gathered by a caller
        yield
        return
    modules = [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
    frozen = not any(p.requires_grad for p in model.parameters())
    model.sharded = False
    model.set_reshard_after_forward(False)
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        model.set_reshard_after_forward(True)                # then as in `build_model`
        model.set_reshard_after_forward(frozen, recurse=False)
        for module in modules:
            module.reshard()
        model.sharded = True


# -------------------------------------------------------------------------------- files

SHARD_BYTES = 5 * 2 ** 30                                    # largest safetensors file
CHECKPOINTS = "step-" + 6 * "[0-9]"                          # a run's folders
SUPPORTED = {  # fields of config.json that would change the network
    "rope_type": ("mrope", "default"),
    "type": ("mrope", "default"),
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
}


def why_unusable(folder: Path) -> str:
    """What helps with a folder that people bring and that is no model folder with safetensors; ""
    if nothing is known."""
    if (folder / "adapter_config.json").is_file():
        return (". It is a LoRA adapter: merge it into its base model (peft: merge_and_unload) "
                "and save that")
    if any(folder.glob("*.bin")):
        return (". Its weights are pickled (.bin), and nothing is unpickled: save them as "
                "safetensors")
    return ""


def build_config(cls, source: dict):
    """A VisionConfig or Config from the fields that `source` has; null counts as absent. Raises
    TypeError naming those that are missing, ValueError for one that would change the network."""
    fields = {}
    for name, value in source.items():
        if value is None:
            continue
        if value not in SUPPORTED.get(name, [value]):
            raise ValueError(f"{name} {value!r} is not supported, only {SUPPORTED[name]}")
        if name in cls.__dataclass_fields__:
            fields[name] = tuple(value) if isinstance(value, list) else value
    return cls(**fields)


def read_config(folder: str | Path) -> Config:
    """Reads config.json of a Qwen2.5-VL folder. Raises FileNotFoundError, or ValueError naming what
    is missing, or what would make it another network."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
        nested = raw.get("text_config", {})
        text = dict(raw)
        for name, value in nested.items():                   # nested values win over flat ones
            if value is not None:
                text[name] = value
        rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
        tied = raw.get("tie_word_embeddings") or nested.get("tie_word_embeddings")
        vision = build_config(VisionConfig, raw.get("vision_config", {}))
        special = {"tie_word_embeddings": bool(tied), "vision": vision}
        return build_config(Config, rope | text | special)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; is this a Qwen2.5-VL checkpoint?") from None


def write_config(config: Config, folder: Path, stop_ids: list[int]) -> None:
    """Writes config.json in the official flat layout, so that transformers builds the same network
    from it."""
    flat = asdict(config)
    rope = {"type": "mrope", "mrope_section": flat.pop("mrope_section")}
    vision = {"model_type": "qwen2_5_vl", "hidden_act": "silu", "in_chans": 3}
    vision |= flat.pop("vision")
    flat |= {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "eos_token_id": stop_ids[0],
        "max_position_embeddings": 128000,
        "rope_scaling": rope,
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(flat, indent=2) + "\n")


def tensor_files(folder: Path, stem: str) -> dict[str, Path]:
    """Maps each tensor to its file: as the index stem.safetensors.index.json says, without an
    index to stem.safetensors. No other file counts. {} if there is none."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in files.items()}
    path = folder / f"{stem}.safetensors"
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys(), path)


def load_weights(
    folder: str | Path,
    model: Qwen2_5_VL,
    dtype: torch.dtype,
    device="cpu"
) -> dict[str, Tensor]:
    """Reads exactly the tensors of `model`, each converted as it is read. ValueError names what
    does not fit.

    Names as transformers has them in memory are accepted, and an output matrix beside an equal
    embedding that it is tied to."""
    folder = Path(folder)
    tensors = {}
    try:
        for stored, path in tensor_files(folder, "model").items():
            with safe_open(path, "pt") as file:
                x = file.get_tensor(stored)
            if not x.isfinite().all():
                raise ValueError(f"{stored} contains NaN or infinite values")
            name = stored.replace("model.language_model.", "model.")
            name = name.replace("model.visual.", "visual.")
            tensors[name] = x.to(device, dtype)
    except (SafetensorError, OSError, ValueError, LookupError) as error:
        raise ValueError(f"the weights in {folder} cannot be read: {error}") from None
    head = None
    if model.config.tie_word_embeddings:
        head = tensors.pop("lm_head.weight", None)
    found = {(name, tuple(x.shape)) for name, x in tensors.items()}
    wanted = {(name, tuple(p.shape)) for name, p in model.named_parameters()}
    missing = sorted(wanted - found)
    unexpected = sorted(found - wanted)
    if missing or unexpected:
        raise ValueError(f"{folder}: {len(missing)} missing tensors {missing[:3]}, "
                         f"{len(unexpected)} unexpected {unexpected[:3]}{why_unusable(folder)}")
    if head is not None and not torch.equal(head, tensors["model.embed_tokens.weight"]):
        raise ValueError(f"{folder}: lm_head.weight differs from model.embed_tokens.weight, to "
                         "which config.json ties it")
    return tensors


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Qwen2_5_VL:
    """Builds the network on the meta device, where weights take no memory, and fills it from a
    model folder."""
    with torch.device("meta"):
        model = Qwen2_5_VL(read_config(folder))
    model.load_state_dict(load_weights(folder, model, dtype, device), assign=True)
    return model


def newest_checkpoint(folder: str | Path) -> Path:
    """A model folder itself, or a run's newest checkpoint. One whose state.json, or the header of
    one of its safetensors files, cannot be read is named, and the one before is taken. Raises
    FileNotFoundError if nothing is left."""
    folder = Path(folder)
    checkpoints = sorted(folder.glob(CHECKPOINTS), reverse=True)
    if (folder / "config.json").is_file():
        if not (folder / "state.json").is_file():            # a model from elsewhere
            return folder
        checkpoints = [folder]
    for path in checkpoints:
        try:
            json.loads((path / "state.json").read_text())
            for file in path.glob("*.safetensors"):
                with safe_open(file, "pt"):
                    pass
            return path
        except (SafetensorError, OSError, ValueError) as error:
            print(f"{path} is damaged and not used: {error}", file=sys.stderr, flush=True)
    raise FileNotFoundError(f"{folder} is neither a model folder nor a run with a checkpoint, or "
                            f"they are damaged{why_unusable(folder)}")


def write_tensors(tensors: dict[str, Tensor], folder: Path, stem: str) -> None:
    """Writes stem.safetensors, or several files and an index where there are more than
    `SHARD_BYTES`."""
    pattern = stem + "{suffix}.safetensors"
    try:
        save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=SHARD_BYTES)
    except SafetensorError as error:                         # e.g. a full disk
        raise OSError(f"{folder} cannot be written: {error}") from None


def save_model(
    tensors: dict[str, Tensor],
    folder: str | Path,
    source: str | Path | None = None,
    write_extra: Callable[[Path], None] | None = None
) -> None:
    """Writes a model folder: tensors, the configuration and tokenizer files of `source`, and what
    `write_extra` adds. It is there whole or not at all: written as FOLDER.writing, flushed to the
    disk, renamed. May raise OSError."""
    folder = Path(folder)
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for file in Path(source).iterdir() if source else ():
            written_here = file.name.endswith((".index.json", "state.json"))
            if file.suffix in (".json", ".txt", ".jinja") and not written_here:
                shutil.copy(file, aside)
        write_tensors(tensors, aside, "model")
        if write_extra:
            write_extra(aside)
        for file in aside.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        shutil.rmtree(folder, ignore_errors=True)            # a damaged one of the same name
        os.replace(aside, folder)
    finally:                                                 # most often a full disk
        shutil.rmtree(aside, ignore_errors=True)
