"""One PA-GRPO step in several situations, on however many ranks torchrun starts: test_ranks.py compares what it writes.

    torchrun --nproc_per_node=2 tests/one_step.py MODEL REFERENCE TOY OUT
"""
import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import pagrpo  # noqa: E402
from data import JudgeSettings, Vocabulary, build_example, make_judge, read_records  # noqa: E402
from model import build_model, gathered  # noqa: E402
from sft import TINY, optimizer_step, start_world  # noqa: E402


def situations(toy: Path) -> dict[str, list]:
    """Questions of a step. Whole ones go to ranks in turn: question 0 to rank 0, 1 to 1, …"""
    records = read_records(toy / "rl.json")
    image = toy / "picture.png"
    Image.new("RGB", (28, 28), "red").save(image)
    picture = replace(records[3], path=image.name, data_type="image")
    text = [replace(r, blind=True, given="1 red X, 2 blue O, 3 red T") for r in records]
    return {"uneven": records[:5], "one question": records[:1], "none": [],
            "video and picture": [records[0], picture] * 2,
            "video and text": [records[0], text[1], records[2], text[3]], "text alone": text[:3],
            "zero variance": records[:4]}


def main(model: str, reference: str, toy: Path, out: Path) -> None:
    world = start_world(timedelta(seconds=30))
    settings = pagrpo.Settings(**TINY | dict(max_response=16, group_size=4, micro_batch=1, seed=5))
    vocabulary = Vocabulary(model)
    for shards in {1: [1], 2: [2], 4: [4, 2]}[world.size]:   # four ranks: four parts, and two replicas of two parts
        world = replace(world, shards=shards)
        policy = build_model(model, vocabulary, world)
        frozen = build_model(reference, vocabulary, world, frozen=True, offload=shards < world.size)
        with gathered(policy):
            with gathered(policy):
                pass
            assert not any(isinstance(p, DTensor) for p in policy.parameters()), "the inner one sharded them again"
        take_steps(policy, frozen, vocabulary, settings, toy, out / str(shards), world)
    world.shutdown()


def take_steps(policy, frozen, vocabulary, settings, toy: Path, out: Path, world) -> None:
    out.mkdir(parents=True, exist_ok=True)
    judge, optimizer = make_judge(JudgeSettings()), torch.optim.SGD(policy.parameters(), lr=0.0)

    def keep_gradients(model, optimizer, lr, clip_norm):
        """In the place of the optimizer step: writes the gradients, whole."""
        full = {n: getattr(p.grad, "full_tensor", lambda: p.grad)() for n, p in model.named_parameters()
                if p.grad is not None}
        if world.first:
            save_file({n: g.clone() for n, g in full.items()}, out / f"{name}.safetensors")
        return optimizer_step(model, optimizer, 0.0, clip_norm)

    pagrpo.sft.optimizer_step = keep_gradients
    for name, records in world.on_rank0(lambda: situations(toy)).items():
        mine = [build_example(r, toy, vocabulary, policy.config, settings) for r in records[world.rank::world.size]]
        groups = pagrpo.rollout(policy, mine, vocabulary, settings, "step 3")
        verdicts = judge([pagrpo.claim_of(response) for group in groups for response in group])
        ref_logprobs = pagrpo.score(frozen, groups, vocabulary, settings, world)
        parts = pagrpo.reward_tensor(groups, verdicts, settings)
        totals = pagrpo.total_rewards(parts, "none")
        advantages = pagrpo.group_advantages(totals, "pa") * (name != "zero variance")
        values = pagrpo.update(policy, optimizer, 0.0, groups, advantages, ref_logprobs, vocabulary, settings, world)
        metrics = pagrpo.step_metrics(groups, parts, totals, values, settings, world)
        tokens = {group[0].example.record.problem_id: [r.tokens for r in group] for group in groups}
        (out / f"{name}.{world.rank}.json").write_text(json.dumps({"tokens": tokens, "metrics": metrics}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
