"""Whole steps of PA-GRPO for the benches, from the functions that pagrpo.py calls, on prompts of random words."""
import io
import json
import random
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
from PIL import Image, ImageSequence

import data
import pagrpo
import rewards
import sft
from model import Qwen2_5_VL
from peers import Peer
from ruler import Peaks, Ruler, finish, in_turn, seconds_of

WORDS = " red", " blue", " green", " yellow", " letter", " after"            # a token each


def never_stop(model: Qwen2_5_VL, vocabulary: data.Vocabulary) -> Qwen2_5_VL:
    """All responses get the same length."""
    vocabulary.mask_special_tokens(model)
    model.masked_token_ids = torch.cat([model.masked_token_ids, torch.tensor(vocabulary.stop_ids)])
    return model


def texts(count: int, length: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(WORDS, k=length)) for _ in range(count)]


def examples(prompts: list[str], vocabulary: data.Vocabulary) -> list[data.Example]:
    made = []
    for i, text in enumerate(prompts):
        record = data.Record(str(i), text, (), "free-form", "1", "", "video")
        ids = torch.tensor(vocabulary.encode(text))
        made.append(data.Example(record, ids, torch.arange(len(ids)).expand(3, -1), len(ids), None, None, 0.0))
    return made


def step(policy: Qwen2_5_VL, reference: Qwen2_5_VL, optimizer: torch.optim.Optimizer, asked: list[data.Example],
         vocabulary: data.Vocabulary, s: pagrpo.Settings, world: sft.World, judge: Callable | None = None,
         peaks: Peaks | None = None) -> tuple[dict[str, float], dict[str, int]]:
    """A step on these questions. judge: called with all claims. Returns the seconds of its phases and, with `peaks`,
    the peak bytes of each."""
    seconds, bytes, began = {}, {}, time.perf_counter()

    def lap(phase: str) -> None:
        nonlocal began
        finish()
        seconds[phase] = time.perf_counter() - began
        if peaks:
            bytes[phase] = peaks.take()
        began = time.perf_counter()
    groups = pagrpo.rollout(policy, asked, vocabulary, s, "bench")
    responses = sum(groups, [])
    check_lengths("ours", {len(r.tokens) for r in responses}, s.max_response)
    lap("sampling")
    if judge:
        judge([data.claim_about(r.example.record, r.text) for r in responses])
        lap("judging")
    ref_logprobs = pagrpo.score(reference, groups, vocabulary, s, world)
    lap("scoring")
    parts = pagrpo.reward_tensor(groups, [rewards.Verdict(False, "")] * len(responses), s)
    parts = parts + torch.rand_like(parts)                   # random text earns nothing
    advantages = pagrpo.group_advantages(pagrpo.total_rewards(parts, s.reward_off), s.advantage)
    pagrpo.update(policy, optimizer, 1e-6, groups, advantages, ref_logprobs, vocabulary, s, world)
    lap("training")
    return seconds, bytes


def check_lengths(whose: str, found: set[int], wanted: int) -> None:
    if found != {wanted}:
        raise SystemExit(f"A response of {whose} is not {wanted} tokens long.")


def against_trl(ruler: Ruler, folder: Path, peer: Peer, policy: Qwen2_5_VL, reference: Qwen2_5_VL, world: sft.World,
                shape: Iterable[int], repeats: int, target: float | None) -> None:
    """PA-GRPO against TRL's GRPO, both with KL term, one update, and responses of the same lengths.
    shape: questions, responses to each, prompt tokens, new tokens."""
    (questions, g, p, t), vocabulary = shape, data.Vocabulary(folder)
    prompts = texts((repeats + 2) * questions, p)
    changes = dict(questions=questions, group_size=g, max_response=t, micro_batch=questions)
    settings, left = pagrpo.Settings(**pagrpo.PRESETS["tiny"] | changes), iter(examples(prompts, vocabulary))
    optimizer = sft.make_optimizer(never_stop(policy, vocabulary), settings)
    never_stop(reference, vocabulary)

    def ours() -> None:
        asked = [next(left) for _ in range(questions)]
        step(policy, reference, optimizer, asked, vocabulary, settings, world)
    peer.ask("train", prompts, questions, g, t)              # the first step
    seconds = in_turn({"ours": ours, "TRL": partial(peer.ask, "go")}, repeats)
    check_lengths("TRL", peer.ask("stop"), t)
    ruler.row("step", f"{questions}×{g}, prompt {p}, {t} new", seconds, peer="TRL", target=target)


def as_folders(toy: Path, split: str) -> Path:
    """Records of a split of the toy world with a folder of pictures for each clip."""
    rows, file = json.loads((toy / f"{split}.json").read_text()), toy / f"{split}-folders.json"
    for row in rows:
        clip = toy / row["path"]
        folder = clip.with_suffix("")
        folder.mkdir()
        row["path"] = str(folder.relative_to(toy))
        with Image.open(clip) as image:
            for n, frame in enumerate(ImageSequence.Iterator(image)):
                frame.save(folder / f"{n}.png")
    file.write_text(json.dumps(rows))
    return file


def waiting(ruler: Ruler, world: sft.World, steps: int = 30, folders: bool = False) -> None:
    """How long the loop of the toy world waits for clips, or `folders` of frames, each read anew whenever it is
    needed."""
    blocked = []
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        toy, base = data.make_toy(Path(folder) / "toy", {"rl": 200}), Path(folder) / "base"
        data.make_toy_model(base, 0)
        records = as_folders(toy, "rl") if folders else toy / "rl.json"
        changes = dict(preset="tiny", out=folder, model=str(base), data=str(records), media=str(toy), steps=steps)
        settings = pagrpo.Settings(**pagrpo.PRESETS["tiny"] | changes)
        run = sft.Run(Path(folder) / "pagrpo", settings, settings.questions, base, world)
        prepared = pagrpo.prepare(settings, run, world)
        questions = prepared[4]
        prefetch, questions.room = questions.prefetch, 0     # nothing is kept for the next epoch

        def timed(indices: Iterable) -> Iterator[list[data.Example]]:
            began = time.perf_counter()
            for batch in prefetch(indices):
                blocked.append(time.perf_counter() - began)
                yield batch
                began = time.perf_counter()
        questions.prefetch = timed
        whole = seconds_of(lambda: pagrpo.train(*prepared))
    read = "folders of frames" if folders else "clips"
    ruler.row("waiting for data", f"{steps} steps, {read}", {"ours": [sum(blocked)], "whole loop": [whole]},
              peer="whole loop", target=20.0, note=f"{sum(blocked) / whole:.2%} of the loop, at most 5 %")
