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


def test_calls_run_in_turn_after_one_that_warms_up():
    order = []
    seconds = ruler.in_turn({name: lambda name=name: order.append(name) for name in "ab"}, repeats=3)
    assert order == ["a", "b"] * 4
    assert [len(seconds[name]) for name in "ab"] == [3, 3] and min(seconds["a"]) > 0


def test_a_ratio_is_taken_pair_by_pair(tmp_path, capsys):
    """The second pair ran while the machine was slow: the ratio of the medians would be 9 / 2."""
    file, seconds = tmp_path / "new" / "rows.jsonl", {"ours": [1.0, 9.0, 2.0], "theirs": [4.0, 27.0, 9.0]}
    for _ in range(2):                                       # the second time the file is made anew
        table = ruler.Ruler(file)
        for target in (4.0, 4.1):
            table.row("rollout", "8×8", seconds, peer="theirs", target=target)
        table.row("memory", "", {}, peer="theirs", target=4.0, bytes={"ours": 2 ** 20, "theirs": 3 * 2 ** 20})
        table.row("growth", "", {"ours": [0.5]}, roofline=0.4, note="told")
    machine, first, second, memory, growth = rows(file)
    assert machine["cores"] and machine["torch"] == torch.__version__
    assert first["ratio"] == {"median": 4.0, "lowest": 3.0, "highest": 4.5} and memory["ratio"]["median"] == 3.0
    assert first["median"] == {"ours": 2.0, "theirs": 9.0} and first["seconds"] == seconds
    assert [row["verdict"] for row in (first, second, memory, growth)] == ["reached", "missed", "missed", ""]
    titles, line, _, _, last = capsys.readouterr().out.splitlines()[-5:]
    assert "3.00–4.50" in line and "≥ 4 reached" in line and titles.index("ratio") + 5 == line.index("4.00") + 4
    assert "500.0" in last and last.endswith("40%  told")


def test_peak_is_what_a_call_makes_at_its_most():
    kept = torch.zeros(4096, device=DEVICE)

    def call():
        for _ in range(3):                                   # one after the other, never two at once
            torch.zeros(1024, device=DEVICE)
        return kept
    assert ruler.peak(call) == 4096
    assert ruler.peak(lambda: [torch.zeros(1024, device=DEVICE) for _ in range(3)]) == 3 * 4096


def test_the_peer_has_the_same_weights_and_says_why_it_fails(base):
    model, ids = load_model(base), torch.randint(8, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    lengths, positions = torch.full((2,), 20), torch.arange(20).expand(3, 2, 20)
    ours = model.generate(Prompts(ids, lengths, positions, lengths, None, []), torch.zeros(2, 1, 8), [-1], 0.0)
    peer = Peer(base, os.environ | {"OMP_NUM_THREADS": "1"})
    assert torch.equal(peer.ask("generate", ids, 1, 8, False, False), ours.tokens[:, 0])
    assert peer.ask("bytes_of", "forward_backward", ids, torch.ones(2, 4), 5) > 0
    assert len(peer.ask("gradients")) == 4 * 12 + 2 and peer.ask("gradients") == {}
    with pytest.raises(RuntimeError, match="(?s)load failed in the process of the peers.*config.json"):
        peer.ask("load", "nowhere")
    peer.close()
    assert peer.process.returncode == 0


def test_the_rows_for_a_gpu_run_with_a_tiny_model(tmp_path):
    """All but those that start processes, and the one that waits for clips."""
    made = small(tmp_path, "decoding", "rollouts", "training", "whole_step", "by_parts")
    found = {row["what"]: row for row in made}
    assert len(made) >= 20 and {"tiny: whole step", "tiny: sum of the parts", "its memory"} <= set(found)
    phases = ("sampling", "judging", "scoring", "training")
    peaks = [found[f"tiny, step: {phase}"]["bytes"]["ours"] for phase in phases]
    assert min(peaks) > 0 and found["tiny, step: memory"]["bytes"]["ours"] == max(peaks)
    assert min(found[f"tiny: {part}"]["bytes"]["ours"] for part in phases[:2]) > 0


def test_the_peak_of_each_phase_is_its_own():
    """What lives on from a phase counts in the next, what was freed does not."""
    with ruler.Peaks() as peaks:
        kept = torch.zeros(1024, device=DEVICE)
        torch.zeros(4096, device=DEVICE)
        assert peaks.take() == 5 * 4096
        more = torch.zeros(1024, device=DEVICE)
        assert peaks.take() == 2 * 4096 and len(kept) == len(more)


def test_frames_in_folders_need_no_decoder(tmp_path, monkeypatch):
    """They are those of the clips. A machine with a GPU may have no decoder."""
    toy, settings = data.make_toy(tmp_path / "toy", {"rl": 3}), data.InputSettings()
    clips = data.read_records(toy / "rl.json")
    folders = data.read_records(whole_steps.as_folders(toy, "rl"))
    expected = [data.read_media(r, toy, settings) for r in clips]
    monkeypatch.setitem(sys.modules, "decord", None)
    for r, (frames, seconds, _) in zip(folders, expected):
        found = data.read_media(r, toy, settings)
        assert r.path.endswith("0" + r.problem_id[3:]) and (found[0] == frames).all() and found[1] == seconds
    (row,) = small(tmp_path, "waiting")
    assert row["what"] == "waiting for data" and row["sizes"] == "3 steps, folders of frames"


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
