"""Promise: the ruler of tests/bench.py measures what it says, and its peers have the same weights."""
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import bench_gpu
import data
import ruler
import whole_steps
from model import Prompts, load_model, qwen
from peers import Peer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def small(folder, *names: str) -> list[dict]:
    """Runs rows for a GPU with a tiny model, and returns them."""
    bench_gpu.run(SimpleNamespace(json=folder / "rows.jsonl", small=True, minutes=5, only=names))
    return rows(folder / "rows.jsonl")[1:]


def test_a_ratio_is_taken_pair_by_pair(tmp_path):
    """The second pair ran while the machine was slow: the ratio of the medians would be 9 / 2."""
    table, seconds = ruler.Ruler(tmp_path / "rows.jsonl"), {"ours": [1.0, 9.0, 2.0], "theirs": [4.0, 27.0, 9.0]}
    for target in (4.0, 4.1):
        table.row("rollout", "8×8", seconds, peer="theirs", target=target)
    table.row("memory", "", {}, peer="theirs", target=4.0, bytes={"ours": 2 ** 20, "theirs": 3 * 2 ** 20})
    _, first, second, memory = rows(table.file)
    assert first["ratio"] == {"median": 4.0, "lowest": 3.0, "highest": 4.5} and memory["ratio"]["median"] == 3.0
    assert [row["verdict"] for row in (first, second, memory)] == ["reached", "missed", "missed"]


def test_the_peer_has_the_same_weights_and_says_why_it_fails(base):
    model, ids = load_model(base), torch.randint(8, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    lengths, positions = torch.full((2,), 20), torch.arange(20).expand(3, 2, 20)
    ours = model.generate(Prompts(ids, lengths, positions, lengths, None, []), torch.zeros(2, 1, 8), [-1], 0.0)
    peer = Peer(base, os.environ | {"OMP_NUM_THREADS": "1"})
    assert torch.equal(peer.ask("generate", ids, 1, 8, False, False), ours.tokens[:, 0])
    with pytest.raises(RuntimeError, match="(?s)load failed in the process of the peers.*config.json"):
        peer.ask("load", "nowhere")
    peer.close()


def test_the_rows_for_a_gpu_run_with_a_tiny_model(tmp_path):
    """All but those that start processes, and the one that waits for clips."""
    made = small(tmp_path, "decoding", "rollouts", "training", "whole_step", "by_parts")
    found = {row["what"]: row["bytes"].get("ours") for row in made}
    peaks = [found[f"tiny, step: {phase}"] for phase in ("sampling", "judging", "scoring", "training")]
    assert len(made) >= 20 and min(peaks) > 0 and found["tiny, step: memory"] == max(peaks)


def test_the_peak_of_each_phase_is_its_own():
    """What lives on from a phase counts in the next, what was freed does not."""
    with ruler.Peaks() as peaks:
        kept = torch.zeros(1024, device=DEVICE)
        torch.zeros(4096, device=DEVICE)
        assert peaks.take() == 5 * 4096
        more = torch.zeros(1024, device=DEVICE)
        assert peaks.take() == 2 * 4096 and len(kept) == len(more)


def test_frames_in_folders_are_those_of_the_clips_and_need_no_decoder(tmp_path, monkeypatch):
    toy, settings = data.make_toy(tmp_path / "toy", {"rl": 3}), data.InputSettings()
    clips = [data.read_media(r, toy, settings) for r in data.read_records(toy / "rl.json")]
    monkeypatch.setitem(sys.modules, "decord", None)
    for (frames, seconds, _), r in zip(clips, data.read_records(whole_steps.as_folders(toy, "rl")), strict=True):
        found = data.read_media(r, toy, settings)
        assert (found[0] == frames).all() and found[1] == seconds


def test_a_row_that_fails_leaves_the_others_alone(tmp_path, monkeypatch):
    def fails(bench):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(bench_gpu.ROWS, "rollouts", fails)
    with pytest.raises(SystemExit, match="Failed: rollouts"):
        small(tmp_path, "rollouts", "decoding")
    _, failed, *others = rows(tmp_path / "rows.jsonl")
    assert failed["note"] == "failed: RuntimeError: out of memory" and len(others) == 2


def test_operations_of_a_step_are_counted_by_hand():
    """One layer: D 4, two heads of 2, one key head, MLP 8, vocabulary 16. B 1, G 2, P 3, T 5; the judge reads 7."""
    config = qwen(4, 1, 2, 1, 8, 16, True, sections=(1, 0, 0))
    weights = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 8          # q, k and v, o, MLP
    pairs = 3 * 3 / 2 + 2 * (5 * 3 + 5 * 5 / 2)
    row = 2 * weights * 13 + 2 * 4 * 16 * 10 + 4 * 4 * pairs
    judged = 2 * (2 * weights * (7 + 5) + 2 * 4 * 16 * 5 + 4 * 4 * 12 * 12 / 2)
    assert bench_gpu.step_flops(config, 1, 2, 3, 5, 7) == 5 * row + judged
