"""Qwen2.5-VL from scratch: vision encoder, decoder, sampling and log-probabilities, in plain PyTorch.

Read it from top to bottom: configuration, building blocks, vision encoder, attention, decoder, then the whole model
with its entry points `prefill`, `generate`, `logprobs`. Tensors have the names of the official checkpoints.

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
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

LOADS = Path("/proc/loadavg")                               # Linux says how many threads can run; this one counts
if LOADS.exists() and min(int(LOADS.read_text().split()[3].split("/")[0]) for _ in range(5)) > 1:
    # OpenMP threads spin while they wait: beside another program a step takes three times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # read when torch is loaded; alone it would cost 60 %
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")   # shapes change from step to step
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    sys.exit(f"torch 2.11 or later is needed, this is {torch.__version__}: pip install -r requirements.txt")
from torch.nn.attention.varlen import varlen_attn
try:                                                         # optional, CUDA only
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

HALF = (torch.bfloat16, torch.float16)                       # what flash kernels on CUDA accept
torch.backends.cuda.enable_cudnn_sdp(False)                  # on Hopper it comes first, and builds a plan for each shape


# ------------------------------------------------------------------------------------------------ configuration

@dataclass(frozen=True)
class VisionConfig:
    """Fields of `vision_config` in config.json. Those without a default must be in the file: the classes of
    transformers fall back to other values than the official checkpoints have, so a default would be silently wrong."""
    hidden_size: int                                         # D of the vision encoder
    out_hidden_size: int                                     # D of the decoder
    tokens_per_second: int                                   # temporal positions per second of video
    depth: int = 32
    num_heads: int = 16
    intermediate_size: int = 3420
    patch_size: int = 14                                     # pixels
    temporal_patch_size: int = 2                             # frames in one patch
    spatial_merge_size: int = 2                              # 2×2 patches become one token of the decoder
    window_size: int = 112                                   # pixels: windows of 4×4 merged tokens
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)  # blocks that attend over the whole frame


@dataclass(frozen=True)
class Config:
    """Fields of config.json, flat (official) or nested under `text_config` (as transformers 5 writes it)."""
    vision: VisionConfig
    vocab_size: int                                          # V, padded beyond the tokenizer's length
    hidden_size: int                                         # D
    num_hidden_layers: int
    num_attention_heads: int                                 # H
    num_key_value_heads: int                                 # K
    intermediate_size: int
    mrope_section: tuple[int, ...]                           # rotary frequencies for time, height, width
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        if sum(self.mrope_section) != self.head_dim // 2:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to head_dim / 2 = {self.head_dim // 2}")

    @property
    def head_dim(self) -> int:                               # E
        return self.hidden_size // self.num_attention_heads


def qwen(hidden, layers, heads, kv_heads, mlp, vocab, tied, sections=(16, 24, 24), ids=(151655, 151656), vision=None):
    """One row of the table below. Official vision encoders differ in `out_hidden_size` only."""
    encoder = dict(hidden_size=1280, out_hidden_size=hidden, tokens_per_second=2) | (vision or {})
    return Config(VisionConfig(**encoder), vocab, hidden, layers, heads, kv_heads, mlp, sections, tied, *ids)


CONFIGS = {  # one architecture, three sizes: students train `tiny` on a laptop, the paper trains 3b and 7b
    #            D     layers H  K  MLP    V       tied
    "tiny": qwen(128,  4,     4, 2, 384,   384,    True, sections=(4, 6, 6), ids=(6, 7), vision=dict(
        hidden_size=96, depth=2, num_heads=4, intermediate_size=256, fullatt_block_indexes=(1,))),
    "3b":   qwen(2048, 36,    16, 2, 11008, 151936, True),
    "7b":   qwen(3584, 28,    28, 4, 18944, 152064, False),
}


# ------------------------------------------------------------------------------------------------ building blocks

# MKL, which computes F.linear on CPUs, uses AVX-512 on Intel's alone. oneDNN, which is also in torch, uses it on all.
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, for x (…, D) and weight (O, D). On a CPU as a convolution over N rows of one pixel: torch asks
    oneDNN for convolutions, which on AMD's CPUs takes half the time. It does not for few rows."""
    if not (ONEDNN and x.is_cpu and x.numel() > 20480):
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)             # (1, D, N, 1), in memory (N, D)
    return F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):                                     # the same layer, computed by `linear`
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) · weight. The kernel computes in fp32 whatever the dtype of x."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down( silu(gate x) · up x )"""

    def __init__(self, width: int, hidden: int, bias: bool):
        super().__init__()
        self.gate_proj, self.up_proj = Linear(width, hidden, bias), Linear(width, hidden, bias)
        self.down_proj = Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For `apply_rotary`: (cos, cos) and (-sin, sin), each (…, E), for all heads alike. angles (…, E/2)"""
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Frequency i rotates the pair (a, b) = (x_i, x_{i + E/2}) to (a cos - b sin, b cos + a sin). x (…, E)"""
    cos, sin = rotary
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def inverse_frequencies(count: int, theta: float, device) -> Tensor:
    # A function, not a buffer: the buffers of a model built on the meta device would be uninitialised.
    return 1.0 / theta ** (torch.arange(count, device=device, dtype=torch.float32) / count)


# ------------------------------------------------------------------------------------------------ vision encoder

GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}   # torch 2.11: always


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int,
                     longest_k: int, causal: bool = False) -> Tensor:
    """Attention of N rows of unequal lengths that lie one behind the other, by a flash kernel: CUDA in half precision.

    Row i has the queries starts_q[i] to starts_q[i + 1] (int32, N + 1 numbers) and the keys of starts_k. `causal` is
    aligned at the lower right: the last query of a row sees all its keys. q (ΣQ, H, E), k, v (ΣS, K, E) → as q.
    flash-attn (2.1 or later) computes it where it is installed, else torch."""
    lengths = starts_q, starts_k, longest_q, longest_k
    if flash_attn_varlen_func:
        return flash_attn_varlen_func(q, k, v, *lengths, causal=causal)
    return varlen_attn(q, k, v, *lengths, window_size=(-1, 0 if causal else -1), **GQA)


@lru_cache(maxsize=64)                                       # the same for all layers; a recorded step reads it there
@torch.inference_mode(False)                                 # the backward pass takes no tensor of inference mode
def starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where rows of these lengths start, and the end of the last one: (2, 3) → [0, 2, 5], int32."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)


def block_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Softmax attention inside each of the consecutive blocks of these lengths. q, k, v and the result (S, H, E)."""
    longest = max(lengths)
    if q.is_cuda and q.dtype in HALF:
        first = starts(tuple(lengths), q.device)
        return varlen_attention(q, k, v, first, first, longest, longest)
    if min(lengths) == longest:                              # one call for all blocks
        q, k, v = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (q, k, v))           # (N, H, L, E)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    blocks = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)))                # each (H, L, E)
    return torch.cat([F.scaled_dot_product_attention(*block) for block in blocks], dim=1).transpose(0, 1)


class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.heads = c.num_heads
        self.qkv, self.proj = Linear(c.hidden_size, 3 * c.hidden_size), Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], blocks: list[int]) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)       # each (S, H, E)
        q, k = apply_rotary(torch.cat([q, k], 1).float(), rotary).to(x.dtype).chunk(2, dim=1)
        return self.proj(block_attention(q, k, v, blocks).flatten(1))


class VisionBlock(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.hidden_size), RMSNorm(c.hidden_size)
        self.attn, self.mlp = VisionAttention(c), SwiGLU(c.hidden_size, c.intermediate_size, bias=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], blocks: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary, blocks)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """The official 3-D convolution has stride = kernel, so on cut patches it is one matrix product."""

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
        self.ln_q = RMSNorm(c.hidden_size)
        self.mlp = nn.Sequential(Linear(self.width, self.width), nn.GELU(), Linear(self.width, c.out_hidden_size))

    def forward(self, x: Tensor) -> Tensor:                  # (S, D) → (S/4, D of the decoder)
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionEncoder(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.config = c
        self.patch_embed, self.merger = PatchEmbed(c), PatchMerger(c)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))

    def layout(self, grid: list[tuple[int, int, int]], device
               ) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """Positions and blocks of all patches. `grid` holds (steps in time, rows, columns) of patches of each medium.

        Returns the row and column of each patch (S, 2), the order that sorts merged tokens by window (S/4,), and lengths
        of two kinds of blocks of the sorted patches: windows (most layers) and frames (`fullatt_block_indexes`; never
        across time). A patch attends only to patches of its own block.
        One frame of 4 × 6 merged tokens, windows 4 wide: each row lies in windows 0 0 0 0 1 1 → lengths [64, 32].
        """
        merge = self.config.spatial_merge_size
        side = self.config.window_size // self.config.patch_size // merge     # window width in merged tokens
        positions, window_of, frames, count = [], [], [], 0
        for t, h, w in grid:
            rows, columns = h // merge, w // merge                            # of merged tokens
            across, down = -(-columns // side), -(-rows // side)              # windows, cut at the right and lower edge
            place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(rows, merge, columns, merge, 2)
            positions.append(place.transpose(1, 2).reshape(-1, 2).repeat(t, 1))   # patches of a token are neighbours
            window = (torch.arange(rows)[:, None] // side * across + torch.arange(columns) // side).flatten()
            window_of += [count + step * across * down + window for step in range(t)]
            count, frames = count + t * across * down, frames + [h * w] * t
        window_of = torch.cat(window_of)
        windows = (torch.bincount(window_of, minlength=count) * merge ** 2).tolist()
        return torch.cat(positions).to(device), window_of.argsort(stable=True).to(device), windows, frames

    def forward(self, pixels: Tensor, grid: list[tuple[int, int, int]], save_memory: bool = False) -> Tensor:
        """pixels (S, 1176), patches in the processor's order → features (S/4, D of the decoder), same order."""
        unit = self.config.spatial_merge_size ** 2
        positions, order, windows, frames = self.layout(grid, pixels.device)
        quarter = self.config.hidden_size // self.config.num_heads // 4       # frequencies for rows, and for columns
        angles = positions[:, :, None] * inverse_frequencies(quarter, 10_000.0, pixels.device)   # (S, 2, E/4)
        x = self.patch_embed(pixels)
        x, angles = (z.flatten(1).view(len(order), unit, -1)[order].flatten(0, 1) for z in (x, angles))  # by windows
        rotary = rotary_tables(angles[:, None], torch.float32)
        for i, block in enumerate(self.blocks):
            blocks = frames if i in self.config.fullatt_block_indexes else windows
            x = run_block(block, save_memory, x, rotary, blocks)
        return self.merger(x)[order.argsort()]


def run_block(block: nn.Module, save_memory: bool, *inputs):
    """A block's forward pass. With `save_memory` it is recomputed in the backward pass (activation checkpointing)."""
    if not (save_memory and torch.is_grad_enabled()):
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)           # there is no dropout


# ------------------------------------------------------------------------------------------------ attention

class PackedRow(NamedTuple):
    """How a row of P + G·T places is split: the prompt, then G responses of T places each."""
    prompt: int                                              # P
    group: int                                               # G
    lengths: list[int]                                       # (B,) length of each prompt; the rest is padding


class KV(NamedTuple):
    """Keys and values in one layer: those of the prompts, computed once for a question's G responses (N = B, S = P), or
    those of the tokens sampled so far, with room for the longest response (N = B·G, S = T)."""
    k: Tensor                                                # (N, S, K, E)
    v: Tensor
    used: Tensor                                             # (N,) int32: how many of the S places; the rest is padding
    mask: Tensor | None = None                               # (N, 1, 1, S) -inf at padding, None if rows are alike
    place: Tensor | None = None                              # (1,) where the current token's go


def packed_attention(q: Tensor, k: Tensor, v: Tensor, row: PackedRow) -> Tensor:
    """Attention in training: the prompt attends causally to itself, each response to the prompt and causally to itself.

    The prompt is computed once for its G responses, with the same numbers as in G separate sequences. Padding is at the
    end of a prompt: causality hides it from the prompt, and it is cut off for the responses.
    q (B, H, P + G·T, E), k, v (B, K, P + G·T, E) → as q
    """
    p, places = row.prompt, q.shape[2]
    prompts, responses = zip(*(x.split([p, places - p], dim=2) for x in (q, k, v)))
    from_prompts = F.scaled_dot_product_attention(*prompts, is_causal=True, enable_gqa=True)
    if places == p:                                          # responses of one token: the prompt predicts it
        return from_prompts
    t, questions = (places - p) // row.group, []
    for n, prompt_k, prompt_v, *own in zip(row.lengths, *prompts[1:], *responses):
        own_q, own_k, own_v = (x.unflatten(1, (-1, t)).transpose(0, 1) for x in own)           # (G, H or K, T, E)
        keys = torch.cat([prompt_k[:, :n].expand(row.group, -1, -1, -1), own_k], dim=2)        # (G, K, n + T, E)
        values = torch.cat([prompt_v[:, :n].expand(row.group, -1, -1, -1), own_v], dim=2)
        questions.append((own_q, keys, values))
    if q.is_cuda and q.dtype in HALF:                        # all questions in one call
        seen = [n + t for n in row.lengths for _ in range(row.group)]                          # keys of each response
        first_q, first_k = starts((t,) * len(seen), q.device), starts(tuple(seen), q.device)
        out = varlen_attention(*map(one_behind_the_other, zip(*questions)), first_q, first_k, t, max(seen), causal=True)
        out = out.view(len(q), -1, *out.shape[1:]).transpose(1, 2)                             # (B, H, G·T, E)
    else:
        outs = [causal_attention(*question).transpose(0, 1).flatten(1, 2) for question in questions]
        out = torch.stack(outs)
    return torch.cat([from_prompts, out], dim=2)


def one_behind_the_other(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (N, H, T, E) as rows for `varlen_attention`, (ΣN·T, H, E)."""
    return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in parts])


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, aligned at the lower right, and not, as `is_causal` is, top left. q (G, H, T, E), k, v (G, K, S, E)"""
    t, places = q.shape[2], k.shape[2]
    mask = causal_lower_right(t, places) if q.is_cuda else torch.ones(t, places, dtype=torch.bool).tril(places - t)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def decode_attention(q: Tensor, prompt: KV, own: KV) -> Tensor:
    """Attention of a new token of every response, without G copies of the prompt's keys. q (B·G, H, E), as result.

    A softmax over prompt and response is computed in two parts. Where a part's scores are s, its output o is weighted
    by exp(s). With the log-sum-exp of both: o = (1 - w) o_own + w o_prompt, w = sigmoid(lse_prompt - lse_own).
    """
    n, h, e = q.shape
    (from_prompt, lse_p), (from_own, lse_o) = attend(q.view(len(prompt.k), -1, h, e), prompt), attend(q[:, None], own)
    w = torch.sigmoid(lse_p.reshape(n, h, 1) - lse_o.reshape(n, h, 1))
    return torch.lerp(from_own.reshape(q.shape).float(), from_prompt.reshape(q.shape).float(), w).to(q.dtype)


def attend(q: Tensor, kv: KV) -> tuple[Tensor, Tensor]:
    """Attention of Q queries a row to all places in use, and the log-sum-exp of the scores. No gradient. On CUDA no
    shape depends on how many are in use: a recorded step serves every token. q (N, Q, H, E) → as q, (N, Q, H)"""
    (n, queries, h, e), (_, room, heads, _) = q.shape, kv.k.shape
    if q.is_cuda and q.dtype in HALF:
        first_q, first_k = starts((queries,) * n, q.device), starts((room,) * n, q.device)
        flat = (x.flatten(0, 1) for x in (q, kv.k, kv.v))
        # What varlen_attn calls; in torch 2.11 that takes no `seqused_k`. 0, False, False: no dropout, mask, debugging.
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *flat, first_q, first_k, queries, room, 0.0, False, False, seqused_k=kv.used)
        return out.view(q.shape), lse.T.reshape(n, queries, h)
    room = room if kv.place is None else int(kv.place) + 1
    k, v = kv.k[:, :room].transpose(1, 2), kv.v[:, :room].transpose(1, 2)                      # (N, K, S, E)
    q = q.view(n, queries, heads, -1, e).transpose(1, 2).flatten(2, 3)   # heads with one key head: rows of one product
    mask = None if kv.mask is None else kv.mask.expand(-1, -1, q.shape[2], -1)
    attention = plain_attention if q.is_cuda else torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attention(q, k, v, attn_mask=mask)            # (N, K, Q·r, E), (N, K, Q·r)
    out, lse = out.view(n, heads, queries, -1, e).transpose(1, 2), lse.view(n, heads, queries, -1).transpose(1, 2)
    return out.reshape(n, queries, h, e), lse.reshape(n, queries, h)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * q.shape[-1] ** -0.5 + (0 if attn_mask is None else attn_mask)          # (N, K, Q·r, S)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)      # on CUDA no kernel returns the latter in fp32


# ------------------------------------------------------------------------------------------------ decoder

class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = Linear(c.hidden_size, self.heads * self.head_dim)
        self.k_proj = Linear(c.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(c.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], row: PackedRow | None = None,
                prompt: KV | None = None, own: KV | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, T, D) → (N, T, D), and the keys and values of x, (N, K, T, E). Three callers:

        caller     passes           x
        prefill                     prompts, causal among themselves; their keys and values are kept for sampling
        decoding   prompt and own   one token of each response; its key and value are written to `own`
        training   row              a prompt and its responses in one row
        """
        n, t, _ = x.shape
        q = apply_rotary(self.q_proj(x).view(n, t, self.heads, -1).transpose(1, 2), rotary)    # (N, H, T, E)
        k = apply_rotary(self.k_proj(x).view(n, t, self.kv_heads, -1).transpose(1, 2), rotary)
        v = self.v_proj(x).view(n, t, self.kv_heads, -1).transpose(1, 2)                       # (N, K, T, E)
        if row is not None:
            out = packed_attention(q, k, v, row)
        elif own is not None:
            own.k.index_copy_(1, own.place, k.transpose(1, 2))
            own.v.index_copy_(1, own.place, v.transpose(1, 2))
            out = decode_attention(q[:, :, 0], prompt, own)[:, :, None]
        else:                                                # padding is at the end: causality hides it
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(n, t, -1)), k, v


class DecoderLayer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn, self.mlp = Attention(c), SwiGLU(c.hidden_size, c.intermediate_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], row: PackedRow | None = None,
                prompt: KV | None = None, own: KV | None = None, first: int = 0
                ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Attention.forward`. `first`: in the last layer, the first place whose result is used."""
        attended, k, v = self.self_attn(self.input_layernorm(x), rotary, row, prompt, own)
        x = (x + attended)[:, first:]
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class Decoder(nn.Module):
    """Embedding, layers and last norm: the tensors under `model.` in the checkpoint."""

    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


def mrope_positions(ids: Tensor, grid: list[tuple[int, int, int]], seconds: list[float], config: Config
                    ) -> tuple[Tensor, int]:
    """Multimodal rotary positions of one prompt (section 2.1.2 of the Qwen2.5-VL report).

    A text token has the same position on all three axes, one more than the token before it. A medium begins where the
    text stopped and has positions (time, row, column). Text resumes after the largest position used.

    ids (P,); grid and `seconds` (per grid step, 0 for an image) of its media in order. Returns positions (3, P) and
    the position of the first response token. Time is floor(step · seconds · tokens_per_second), as the model was
    trained; later versions of transformers round `seconds` or let text resume earlier (docs/scaling.md).
    Raises ValueError if placeholders and grids disagree.
    """
    merge, rate = config.vision.spatial_merge_size, config.vision.tokens_per_second
    media = (ids == config.image_token_id) | (ids == config.video_token_id)
    pieces, at, start = [], 0, 0                                              # `at` in tokens, `start` in positions
    places = media.nonzero()[:, 0].tolist()
    for (t, h, w), step in zip(grid, seconds, strict=True):
        size = t * (h // merge) * (w // merge)
        if not places:
            raise ValueError(f"{len(grid)} media, but the prompt has placeholders for fewer")
        text = torch.arange(start, start + places[0] - at).expand(3, -1)
        at, start = places[0], start + places[0] - at
        if not bool(media[at:at + size].all()) or at + size > len(ids):
            raise ValueError(f"a medium of {size} tokens does not fit its placeholders at token {at}")
        time = (torch.arange(t) * step * rate).long()
        axes = torch.meshgrid(time, torch.arange(h // merge), torch.arange(w // merge), indexing="ij")
        pieces += [text, torch.stack(axes).flatten(1) + start]
        at, start, places = at + size, int(pieces[-1].max()) + 1, places[size:]
    if places:
        raise ValueError(f"{len(places)} media placeholders are left over after {len(grid)} media")
    pieces.append(torch.arange(start, start + len(ids) - at).expand(3, -1))
    return torch.cat(pieces, dim=1), start + len(ids) - at


# ------------------------------------------------------------------------------------------------ the whole model

@dataclass
class Prompts:
    """A batch of prompts, padded at the end. The patches of all media are in one tensor, in prompt order."""
    ids: Tensor                                              # (B, P)
    lengths: Tensor                                          # (B,)
    positions: Tensor                                        # (3, B, P)
    next_position: Tensor                                    # (B,) position of the first response token
    pixels: Tensor | None                                    # (S, 1176), None for text alone
    grid: list[tuple[int, int, int]]                         # (steps, rows, columns) of patches of each medium

    def to(self, device) -> "Prompts":
        return Prompts(*(x.to(device) if isinstance(x, Tensor) else x for x in vars(self).values()))


class Sampled(NamedTuple):
    """What `generate` returns. After its end a response holds token 0 and log-probability 0: build masks from
    `lengths`, never from token ids."""
    tokens: Tensor                                           # (B, G, T)
    lengths: Tensor                                          # (B, G) with the stop token
    logprobs: Tensor                                         # (B, G, T) log-probabilities of the tokens when sampled
    finished: Tensor                                         # (B, G) False: cut off by the token limit


def sample_token(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling of one token a row, from a given uniform number, so that the randomness of a response is
    fixed before it is sampled. logits (N, V) fp32, uniforms (N,) in [0, 1) → tokens (N,), log-probabilities (N,)

    Temperature 0 takes the most likely token (its log-probability is that of temperature 1).
    """
    if not temperature:
        tokens = logits.argmax(-1)
    else:
        logits = logits / temperature
        if top_p < 1:  # the smallest set of tokens that holds top_p, always with the most likely one
            ranked, order = logits.softmax(-1).sort(descending=True)
            cut = ranked.cumsum(-1) - ranked >= top_p         # the tokens before it already hold enough
            logits = logits.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
        cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)      # fp64: no draw reaches past the last token
        target = uniforms.double()[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


class Step:
    """One step of decoding, the plain way: token t of every response goes through the network, its keys and values into
    the caches. Call it with tokens (B·G,) and t = 0, 1, …; it returns the logits of the next tokens, (B·G, V)."""

    def __init__(self, model: "Qwen2_5_VL", prompts: Prompts, prompt_kv: list[KV], group: int, limit: int):
        self.model, self.prompt_kv = model, prompt_kv
        self.start = prompts.next_position.repeat_interleave(group, 0)        # (B·G,) position of the first token
        self.place = torch.zeros_like(self.start[:1])
        self.used = torch.zeros_like(self.start, dtype=torch.int32)
        empty = prompt_kv[0].k.new_zeros(len(self.start), limit, *prompt_kv[0].k.shape[2:])   # (B·G, T, K, E)
        self.caches = [KV(empty.clone(), empty.clone(), self.used, None, self.place) for _ in prompt_kv]

    @torch.inference_mode()                                  # no_grad without bookkeeping: 12 % of a row alone on a CPU
    def __call__(self, tokens: Tensor, t: int) -> Tensor:
        self.place.fill_(t)
        self.used.fill_(t + 1)
        return self.forward(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.model.embed_tokens(tokens[:, None])                                     # (B·G, 1, D)
        rotary = self.model.rotary((self.start + self.place).expand(3, -1)[..., None], x.dtype)
        for layer, prompt, own in zip(self.model.model.layers, self.prompt_kv, self.caches):
            x, _, _ = layer.forward(x, rotary, None, prompt, own)
        return self.model.logits(self.model.model.norm(x)[:, 0])


LOGITS_AT_ONCE = {"cpu": 2 ** 25, "cuda": 2 ** 27}           # at most so many fp32 logits exist at a time in training


class Qwen2_5_VL(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.visual, self.model = VisionEncoder(config.vision), Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.masked_token_ids = torch.empty(0, dtype=torch.long, device="cpu")   # never sampled, see `logits`
        self.sharded = False                                 # are the weights sharded among ranks, and not gathered?
        self.save_memory = False                             # activation checkpointing

    # Every probability that leaves the model is computed from these: sampling, training and the KL reference agree.
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (…, D) → logits (…, V) in fp32, -1e30 at the masked ids (-inf would give 0 · inf in the entropy)."""
        return self.mask(linear(hidden, self.head.weight).float())

    @property
    def head(self) -> nn.Module:
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def mask(self, logits: Tensor) -> Tensor:
        self.masked_token_ids = self.masked_token_ids.to(logits.device)       # moves once
        with torch.no_grad():                                # the probability there is 0, and so is the gradient
            return logits.index_fill_(-1, self.masked_token_ids, -1e30)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (3, N, T) → tables (N, 1, T, E). Each frequency follows one axis, in runs of `mrope_section`."""
        c = self.config
        angles = positions[..., None] * inverse_frequencies(c.head_dim // 2, c.rope_theta, positions.device)
        by_axis = [part[axis] for axis, part in enumerate(angles.split(c.mrope_section, dim=-1))]
        return rotary_tables(torch.cat(by_axis, dim=-1)[:, None], dtype)

    def embed(self, prompts: Prompts) -> Tensor:
        """Embeddings of the prompts, with the features of the media at their placeholders, (B, P, D)."""
        x = self.model.embed_tokens(prompts.ids)
        if prompts.pixels is not None:
            features = self.visual(prompts.pixels.to(x.dtype), prompts.grid, self.save_memory)
            is_medium = (prompts.ids == self.config.image_token_id) | (prompts.ids == self.config.video_token_id)
            return x.masked_scatter(is_medium[..., None], features.to(x.dtype))
        if self.sharded:  # other ranks may have media: every rank must run the encoder for FSDP's all-gathers
            c = self.config.vision
            side, numbers = c.spatial_merge_size, 3 * c.temporal_patch_size * c.patch_size ** 2
            blank = self.visual(x.new_zeros(side ** 2, numbers), [(1, side, side)], self.save_memory)
            x = x + 0 * blank.sum()
        return x

    def prefill(self, prompts: Prompts, first: int = 0) -> tuple[Tensor, list[KV]]:
        """Hidden states of the prompts (B, P - first, D), and every layer's keys and values."""
        x = self.embed(prompts)
        padding = torch.arange(x.shape[1], device=x.device) >= prompts.lengths[:, None]        # (B, P)
        mask = x.new_zeros(padding.shape).masked_fill(padding, -torch.inf)[:, None, None] if padding.any() else None
        rotary, prompt_kv = self.rotary(prompts.positions, x.dtype), []
        for i, layer in enumerate(self.model.layers, 1):
            x, k, v = layer(x, rotary, first=first if i == len(self.model.layers) else 0)
            prompt_kv.append(KV(k.transpose(1, 2), v.transpose(1, 2), prompts.lengths.int(), mask))
        return self.model.norm(x), prompt_kv

    @torch.no_grad()
    def generate(self, prompts: Prompts, uniforms: Tensor, stop_ids: list[int], temperature: float = 1.0,
                 top_p: float = 1.0) -> Sampled:
        """Samples G responses to each prompt, at most T tokens long, from given uniform numbers (B, G, T).

        A prompt is computed once; its keys and values serve the whole group. The uniform numbers are given, not drawn
        here, so that any number of ranks samples the same responses. Sharded weights must be gathered (`gathered`):
        decoding calls the layers without FSDP's hooks, which would run for every token.
        """
        (b, g, limit), device = uniforms.shape, prompts.ids.device
        uniforms, stops = uniforms.to(device).flatten(0, 1), torch.tensor(stop_ids, device=device)
        first = int(prompts.lengths.min()) - 1
        hidden, prompt_kv = self.prefill(prompts, first)
        last = hidden[torch.arange(b, device=device), prompts.lengths - 1 - first]             # (B, D)
        logits = self.logits(last).repeat_interleave(g, 0)
        tokens = torch.zeros(b * g, limit, dtype=torch.long, device=device)
        logprobs = torch.zeros(b * g, limit, device=device)
        lengths, active = torch.zeros_like(tokens[:, 0]), torch.ones_like(tokens[:, 0], dtype=torch.bool)
        step = Step(self, prompts, prompt_kv, g, limit)
        if not tokens.is_cuda:                               # both compute the same, faster
            shorten_step(step)
        elif hidden.dtype in HALF:
            record_step(step)
        check_every = 16 if tokens.is_cuda else 1            # reading `active` makes the CPU wait for the GPU
        for t in range(limit):
            token, logprob = sample_token(logits, uniforms[:, t], temperature, top_p)
            tokens[:, t], logprobs[:, t] = token * active, logprob * active
            lengths += active
            active = active & ~torch.isin(token, stops)
            if t + 1 == limit or (t + 1) % check_every == 0 and not bool(active.any()):
                break
            logits = step(tokens[:, t], t)
        longest = int(lengths.max())
        return Sampled(tokens[:, :longest].unflatten(0, (b, g)), lengths.view(b, g),
                       logprobs[:, :longest].unflatten(0, (b, g)), ~active.view(b, g))

    def logprobs(self, prompts: Prompts, tokens: Tensor, lengths: Tensor, temperature: float = 1.0
                 ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of given responses under this model, with gradient, and the entropy at each token.

        A prompt and its G responses are one row, and each block runs once (`packed_attention`). Logits are computed
        only where a response token is predicted.
        tokens (B, G, T), lengths (B, G) → log-probabilities (B, G, T), entropies (B, G, T), both 0 after the end.
        """
        (b, g, t), device, p = tokens.shape, tokens.device, prompts.ids.shape[1]
        responses = self.model.embed_tokens(tokens[:, :, :-1].flatten(1))                      # (B, G·(T-1), D)
        x = torch.cat([self.embed(prompts), responses], dim=1)                                 # (B, P + G·(T-1), D)
        following = prompts.next_position[:, None] + torch.arange(t - 1, device=device).repeat(g)  # (B, G·(T-1))
        positions = torch.cat([prompts.positions, following.expand(3, -1, -1)], dim=2)
        rotary, row = self.rotary(positions, x.dtype), PackedRow(p, g, prompts.lengths.tolist())
        for layer in self.model.layers[:-1]:
            x, _, _ = run_block(layer, self.save_memory, x, rotary, row)
        first = min(row.lengths) - 1                         # places before it are of no use after the last attention
        x, _, _ = run_block(self.model.layers[-1], self.save_memory, x, rotary, row, None, None, first)
        prompt, others = x.split([p - first, x.shape[1] - p + first], dim=1)
        last = prompt[torch.arange(b, device=device), prompts.lengths - 1 - first]             # (B, D) predicts token 0
        hidden = torch.cat([last[:, None, None].expand(b, g, 1, -1), others.unflatten(1, (g, t - 1))], dim=2)
        real = torch.arange(t, device=device) < lengths[..., None]                             # (B, G, T)
        hidden = self.model.norm(hidden[real])                                                 # (N, D)
        logprobs, entropies = self.token_logprobs(hidden, tokens[real], temperature)
        empty = torch.zeros(b, g, t, device=device)
        return tuple(empty.masked_scatter(real, x) for x in (logprobs, entropies))

    def token_logprobs(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """log p(target) and entropy, in chunks recomputed in backward. hidden (N, D), targets (N,) → (N,), (N,)"""
        def chunk(hidden, targets):
            logits = self.logits(hidden)
            logits = logits if temperature == 1 else logits / temperature
            logprobs = logits.log_softmax(-1)
            with torch.no_grad():
                entropy = -(logits.softmax(-1) * logprobs).sum(-1)            # `exp` of -1e30 is slow on a CPU
            return logprobs.gather(-1, targets[:, None])[:, 0], entropy

        size = max(1, LOGITS_AT_ONCE[hidden.device.type] // self.config.vocab_size)
        if len(hidden) <= size:
            return chunk(hidden, targets)
        parts = [checkpoint(chunk, h, t, use_reentrant=False, preserve_rng_state=False)
                 for h, t in zip(hidden.split(size), targets.split(size))]
        return tuple(torch.cat(x) for x in zip(*parts))


def init_weights(model: Qwen2_5_VL, seed: int) -> Qwen2_5_VL:
    """Random start: normal matrices of variance 1 / inputs, zero biases, unit norms; the same for a seed everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data.copy_(torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
        else:
            p.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


# ================================ a first reader may stop here ================================

# ------------------------------------------------------------------------------------------------ faster decoding

def record_step(step: Step) -> None:
    """Makes `step` one launch a token: a GPU computes faster than a CPU launches a step's thousand kernels.

    They are recorded as a CUDA graph, which runs them again at the same addresses. So tokens are copied to a tensor
    that stays, logits are valid until the next call, and weights must not move: a graph serves one rollout.
    """
    plain, graph, tokens = step.forward, torch.cuda.CUDAGraph(), torch.zeros_like(step.start)
    step(tokens, 0)                                          # warms the libraries up; the first token overwrites it
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):          # other threads may use CUDA meanwhile
        logits = plain(tokens)

    def forward(new_tokens: Tensor) -> Tensor:
        tokens.copy_(new_tokens)
        graph.replay()
        return logits
    step.forward = forward


def reordered(weight: Tensor, rows: int) -> Tensor:
    """A matrix (O, D) as `product` reads it fastest with so many rows of x: in oneDNN's own layout, or a part for each
    thread, (parts, D, O / parts). MKL by itself shares out the rows of x: with one row, one thread works."""
    if ONEDNN and rows > 1:
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    parts = torch.get_num_threads() if len(weight) % torch.get_num_threads() == 0 else 1
    return weight.view(parts, -1, weight.shape[1]).mT


def product(x: Tensor, weight: Tensor) -> Tensor:            # (N, D) → (N, O)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.bmm(x.expand(len(weight), -1, -1), weight).transpose(0, 1).flatten(1)


def shorten_step(step: Step) -> None:
    """Makes `step` half the operations; their number is what it costs on a CPU. Matrices with one input are joined, and
    all rotary tables are made beforehand. With a response each, prompts of one length are put into the same cache."""
    model, place, prompt_kv, caches = step.model, step.place, step.prompt_kv, step.caches      # `forward` knows no step
    layers, (n, room, kv, e), before = [], caches[0].k.shape, 0
    if len(prompt_kv[0].k) == n and prompt_kv[0].mask is None:
        before = prompt_kv[0].k.shape[1]
        caches = [KV(torch.cat([prompt.k, own.k], 1), torch.cat([prompt.v, own.v], 1), own.used, None, place.clone())
                  for prompt, own in zip(prompt_kv, caches)]
    positions = (step.start[:, None] + torch.arange(room)).expand(3, -1, -1)                   # (3, N, T)
    cos, sin = (x.transpose(1, 2).unbind(1) for x in model.rotary(positions, caches[0].k.dtype))   # T × (N, 1, E)
    for layer in model.model.layers:
        a, mlp = layer.self_attn, layer.mlp
        weights, biases = zip(*[(p.weight, p.bias) for p in (a.q_proj, a.k_proj, a.v_proj)])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        matrices = [reordered(x, n) for x in (torch.cat(weights), a.o_proj.weight, gate_up, mlp.down_proj.weight)]
        layers.append((layer.input_layernorm, torch.cat(biases), layer.post_attention_layernorm, *matrices))
    head, heads = reordered(model.head.weight, n), model.config.num_attention_heads

    def forward(tokens: Tensor) -> Tensor:
        t, x = int(place), model.model.embed_tokens(tokens)                                    # (N, D)
        for (norm_1, bias, norm_2, qkv, o, gate_up, down), prompt, own in zip(layers, prompt_kv, caches):
            qk, v = (product(norm_1(x), qkv) + bias).view(n, -1, e).split([heads + kv, kv], dim=1)
            q, k = apply_rotary(qk, (cos[t], sin[t])).split([heads, kv], dim=1)                # (N, H or K, E)
            own.k[:, before + t], own.v[:, before + t] = k, v
            own.place.fill_(before + t)
            attended = attend(q[:, None], own)[0] if before else decode_attention(q, prompt, own)
            x = x + product(attended.view(n, -1), o)
            gate, up = product(norm_2(x), gate_up).chunk(2, dim=1)
            x = x + product(F.silu(gate) * up, down)
        return model.mask(product(model.model.norm(x), head))
    step.forward = forward


# ------------------------------------------------------------------------------------------------ shards and files

SMALLEST_IN_BF16 = 512                                       # hidden_size
SHARD_BYTES = 5 * 2 ** 30                                    # largest safetensors file
CHECKPOINTS = "step-" + 6 * "[0-9]"                          # a run's folders


def compute_dtype(device: torch.device, config: Config) -> torch.dtype:
    """bfloat16 on a GPU that computes in it, else float32. Toy-sized models are float32 everywhere."""
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if supported and config.hidden_size >= SMALLEST_IN_BF16 else torch.float32


def shard(model: Qwen2_5_VL, mesh: DeviceMesh, offload: bool = False) -> Qwen2_5_VL:
    """FSDP2: each rank keeps a part of every weight; a block's weights are gathered in `compute_dtype` while it runs.
    The root holds embedding, last norm and head. `offload` keeps the parts in host memory (frozen models only)."""
    device = torch.device(mesh.device_type)
    # Inputs are not cast: rotary tables stay fp32.
    precision = MixedPrecisionPolicy(compute_dtype(device, model.config), torch.float32, cast_forward_inputs=False)
    placement = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for block in (*model.visual.blocks, *model.model.layers, model.visual, model):
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=placement)
    for entry in ("generate", "logprobs"):                   # FSDP gathers the root's weights for these calls too
        register_fsdp_forward_method(model, entry)
    model.sharded = True
    return model


def build_model(folder: str | Path, vocabulary, world, save_memory: bool = False,
                frozen: bool = False, offload: bool = False) -> Qwen2_5_VL:
    """Loads a model folder for training (fp32), or `frozen` (in `compute_dtype`); sharded where there are several
    ranks or a GPU: rank 0 reads it and broadcasts the parts. vocabulary: a data.Vocabulary, world: a sft.World."""
    config = read_config(folder)
    dtype = compute_dtype(world.device, config) if frozen else torch.float32
    if world.size == 1 and world.device.type == "cpu":
        model = load_model(folder, dtype)
    else:
        with torch.device("meta"):
            model = shard(Qwen2_5_VL(config).to(dtype), world.mesh(), offload)
        model.to_empty(device="cpu" if offload else world.device)
        tensors = load_weights(folder, model, dtype) if world.first else {}
        world.barrier()                                      # a large model takes minutes to read
        set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        model.set_reshard_after_forward(frozen, recurse=False)
    model.save_memory = save_memory
    return vocabulary.mask_special_tokens(model.requires_grad_(not frozen))


@contextmanager
def gathered(model: Qwen2_5_VL):
    """Inside, every rank holds all weights, so that ranks may sample different numbers of tokens."""
    if not model.sharded:                                    # or gathered by a caller
        yield
        return
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    frozen = not any(p.requires_grad for p in model.parameters())
    model.sharded = False
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:                               # as build_model set it: in training the root stays whole
            module.set_reshard_after_forward(frozen or module is not model, recurse=False)
            module.reshard()
        model.sharded = True


def build_config(cls, source: dict):
    """A VisionConfig or Config from the fields that `source` has. Raises TypeError naming those that are missing."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in source.items()
                  if k in cls.__dataclass_fields__ and v is not None})


def why_unusable(folder: Path) -> str:
    """What helps with a folder that people bring and that is no model folder with safetensors; "" if nothing is known."""
    if (folder / "adapter_config.json").is_file():
        return ". It is a LoRA adapter: merge it into its base model (peft: merge_and_unload) and save that"
    if any(folder.glob("*.bin")):
        return ". Its weights are pickled (.bin), and nothing is unpickled: save them as safetensors"
    return ""


def read_config(folder: str | Path) -> Config:
    """Reads config.json of a Qwen2.5-VL folder. Raises FileNotFoundError, or ValueError naming what is missing, or what
    would make it another network."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint folder: it has no config.json")
    try:
        raw = dict(json.loads(path.read_text()))
        nested = {k: v for k, v in raw.get("text_config", {}).items() if v is not None}
        text = raw | nested                                  # nested values win over flat ones
        rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
        tied = bool(raw.get("tie_word_embeddings") or nested.get("tie_word_embeddings"))
        encoder = raw.get("vision_config", {})
        vision = build_config(VisionConfig, encoder)
        known = {"rope_type": ("mrope", "default"), "type": ("mrope", "default"), "hidden_act": ("silu",),
                 "use_sliding_window": (False,)}             # fields that would change the network
        for name, value in [*rope.items(), *text.items(), *encoder.items()]:
            if value is not None and value not in known.get(name, (value,)):
                raise ValueError(f"{name} {value!r} is not supported, only {known[name][0]!r}")
        return build_config(Config, {**rope, **text, "tie_word_embeddings": tied, "vision": vision})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; is this a Qwen2.5-VL checkpoint?") from None


def write_config(config: Config, folder: Path, stop_ids: list[int], dtype: str = "float32") -> None:
    """Writes config.json in the official flat layout, so that transformers builds the same network from it."""
    flat = {k: v for k, v in asdict(config).items() if k not in ("vision", "mrope_section")}
    flat |= {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], "torch_dtype": dtype,
             "hidden_act": "silu", "eos_token_id": stop_ids[0], "max_position_embeddings": 128000,
             "rope_scaling": {"type": "mrope", "mrope_section": config.mrope_section},
             "vision_config": asdict(config.vision) | {"hidden_act": "silu", "in_chans": 3, "model_type": "qwen2_5_vl"}}
    (folder / "config.json").write_text(json.dumps(flat, indent=2) + "\n")


def tensor_files(folder: Path, stem: str) -> dict[str, Path]:
    """Maps each tensor to its file: one that the index stem.safetensors.index.json lists, without an index
    stem.safetensors. No other file is read. {} if there is none. Raises ValueError if one is damaged or missing."""
    index, where = folder / f"{stem}.safetensors.index.json", {}
    path = folder / f"{stem}.safetensors"
    try:
        files = {path} if path.is_file() else set()
        if index.is_file():
            path = index
            files = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        for path in sorted(files):
            with safe_open(path, "pt") as file:
                where |= dict.fromkeys(file.keys(), path)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or missing: {error}") from None
    return where


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_weights(folder: str | Path, model: Qwen2_5_VL, dtype: torch.dtype, device="cpu") -> dict[str, Tensor]:
    """Reads exactly the tensors of `model`, each converted as it is read. ValueError names what does not fit.

    Names as transformers has them in memory are accepted, and an output matrix beside an equal embedding that it is
    tied to."""
    wanted, where = {name: p.shape for name, p in model.named_parameters()}, {}
    for name, path in tensor_files(Path(folder), "model").items():
        official = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        where[official] = path, name
    if not where:
        raise ValueError(f"{folder}: no model.safetensors{why_unusable(Path(folder))}")
    if model.config.tie_word_embeddings and HEAD in where:
        wanted[HEAD] = wanted[EMBEDDING]
    for kind, names in (("missing", wanted.keys() - where.keys()), ("unexpected", where.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{folder}: {len(names)} {kind} tensors: {', '.join(sorted(names)[:5])}")
    tensors = {}
    for name, (path, stored) in where.items():
        with safe_open(path, "pt") as file:
            x = file.get_tensor(stored)
        if x.shape != wanted[name]:
            raise ValueError(f"{path}: {name} has shape {tuple(x.shape)}, not {tuple(wanted[name])}")
        if not bool(x.isfinite().all()):
            raise ValueError(f"{path}: {name} contains NaN or infinite values")
        tensors[name] = x.to(device, dtype)
    if model.config.tie_word_embeddings and not torch.equal(tensors.pop(HEAD, tensors[EMBEDDING]), tensors[EMBEDDING]):
        raise ValueError(f"{folder}: {HEAD} differs from {EMBEDDING}, to which config.json ties it")
    return tensors


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Qwen2_5_VL:
    """Builds the network on the meta device, where weights take no memory, and fills it from a model folder."""
    with torch.device("meta"):
        model = Qwen2_5_VL(read_config(folder))
    model.load_state_dict(load_weights(folder, model, dtype, device), assign=True)
    return model


def newest_checkpoint(folder: str | Path, optimizer: bool = False) -> Path:
    """A model folder itself, or a run's newest checkpoint; a damaged one is named, and the one before taken. Damaged: a
    size differs from state.json, or a safetensors header is wrong; flipped bits are not noticed. `optimizer`: its files
    count too. Raises FileNotFoundError if nothing is left."""
    folder = Path(folder)
    is_model = (folder / "config.json").is_file()
    if is_model and not (folder / "state.json").is_file():   # a model from elsewhere
        return folder
    for found in [folder] if is_model else sorted(folder.glob(CHECKPOINTS), reverse=True):
        try:
            dict(json.loads((found / "state.json").read_text()))
            for stem in ("model", "optimizer") if optimizer else ("model",):
                tensor_files(found, stem)
            return found
        except (OSError, ValueError, TypeError, AttributeError) as error:
            print(f"{found} is damaged and not used: {error}", file=sys.stderr, flush=True)
    raise FileNotFoundError(f"{folder} is neither a model folder nor a run with a checkpoint, or they are damaged"
                            f"{why_unusable(folder)}")


def write_tensors(tensors: dict[str, Tensor], folder: Path, stem: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes stem.safetensors, or several files and an index where there are more than `shard_bytes`."""
    try:
        pattern = stem + "{suffix}.safetensors"
        save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=shard_bytes)
    except SafetensorError as error:                         # how the Rust library reports a full disk
        raise OSError(f"{folder} cannot be written: {error}") from None


def save_model(tensors: dict[str, Tensor], folder: str | Path, source: str | Path | None = None,
               write_extra: Callable[[Path], None] | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a model folder: tensors, the configuration and tokenizer files of `source`, and what `write_extra` adds.
    It is there whole or not at all: written as FOLDER.writing, flushed to the disk, renamed. May raise OSError."""
    folder = Path(folder)
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for file in Path(source).iterdir() if source else ():
            if file.suffix in (".json", ".txt", ".jinja") and not file.name.endswith((".index.json", "state.json")):
                shutil.copy(file, aside)
        write_tensors(tensors, aside, "model", shard_bytes)
        if write_extra:
            write_extra(aside)
        for file in aside.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
    except OSError:                                          # most often a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)                # a damaged one of the same name
    os.replace(aside, folder)
