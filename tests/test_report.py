"""Promise: a run ends with one page that needs nothing else, and what it shows is what happened in the run. The page is
also looked at by a browser: tests/render.py."""
import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import pagrpo
import sft
from model import newest_checkpoint
from toy_runs import interrupted, logged, rl_flags, same_end

RUNS = re.compile(r'<script type="application/json" id="runs">(.*?)</script', re.DOTALL | re.IGNORECASE)
BOARD = {"prompt", "response", "response_tokens", "logprobs", "ref_logprobs", "values", "token_rewards", "reward",
         "step"}                                             # the keys that RLLoggingBoard reads
OF_TOKENS = ("response_tokens", "logprobs", "logprobs_after", "ref_logprobs", "values", "token_rewards", "weights",
             "segments")


def runs_in(page: Path) -> list[dict]:
    """The data of a page, where a browser finds them."""
    return json.loads(RUNS.search(page.read_text())[1], parse_constant=pytest.fail)


def rollouts(folder: Path) -> list[dict]:
    return logged(folder, "rollouts.jsonl")


@pytest.fixture(scope="module")
def run(toy, started, tmp_path_factory):
    """The folder of a run of three steps, each of them recorded."""
    out = tmp_path_factory.mktemp("report")
    pagrpo.main(rl_flags(out, toy, newest_checkpoint(started), steps=3, questions=4, group_size=4, max_response=40,
                         transcript_every=1, clip_norm="inf"))
    return out / "pagrpo"


@pytest.fixture(scope="module")
def shown(run):
    return runs_in(run / "report.html")[0]


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run/pagrpo")


# ------------------------------------------------------------------------------------------------ one file

def test_the_page_needs_no_other_file_and_no_network(run, shown):
    program = RUNS.sub("", (run / "report.html").read_text())
    assert not re.search(r"http|url\(|@import|\b(src|href|srcset|action|data|poster)=", program)
    for clip in shown["clips"].values():
        assert clip and all(frame.startswith("data:image/jpeg;base64,") for frame in clip)


def test_a_response_cannot_break_out_of_its_place(copy):
    rows = rollouts(copy)
    rows[0]["response_tokens"] = ["</script><script>alert(1)</script>", "<!--", "</SCRIPT >"]
    data.write_rows(copy / "rollouts.jsonl", rows)
    page = sft.write_report(copy)
    assert runs_in(page)[0]["rollouts"] == rows
    assert page.read_text().lower().count("</script") == 2, "those of the template"


def test_the_page_of_the_longest_run_is_small(copy):
    """The paper's settings record so few groups that all of them fit, also if every response is cut off."""
    paper, row = pagrpo.Settings(**pagrpo.PRESETS["7b"]), rollouts(copy)[0]
    for name in OF_TOKENS:
        row[name] = (row[name] * paper.max_response)[:paper.max_response]
    groups = paper.steps // paper.transcript_every + 1
    data.write_rows(copy / "rollouts.jsonl", [row] * groups * paper.group_size)
    data.write_rows(copy / "metrics.jsonl", logged(copy)[:1] * paper.steps)
    assert 1_000_000 < sft.write_report(copy).stat().st_size < 6_000_000


def test_frames_are_few_and_small_and_a_clip_that_is_gone_has_none(shown, monkeypatch):
    row, settings = shown["rollouts"][0], shown["settings"]
    assert sft.small_frames(row | {"path": "gone.avi"}, settings) == []
    monkeypatch.setattr(data, "read_media", lambda *_: (np.zeros((20, 300, 400, 3), np.uint8), None))
    frames = sft.small_frames(row, settings)
    assert 4 < len(frames) <= 8
    picture = Image.open(io.BytesIO(base64.b64decode(frames[0].partition(",")[2])))
    assert 64 ** 2 < picture.width * picture.height <= 128 ** 2


# ------------------------------------------------------------------------------------------------ what happened

def test_the_page_holds_the_files_as_they_are(run, shown):
    assert shown["metrics"] == logged(run)
    assert shown["rollouts"] == rollouts(run)
    assert shown["settings"] == data.read_json(run / "settings.json") | {"clip_norm": "Infinity"}
    assert shown["results"] == data.read_json(run / "results.json")
    answer = shown["results"]["pagrpo, greedy"]["answer"]
    (both, alone), neither = answer["crossed"]
    assert 5 * (both + neither[0]) == pytest.approx(answer["value"]) and both + alone + sum(neither) == 20
    assert shown["state"]["made_by"]["torch"] == torch.__version__
    assert shown["clips"].keys() == {row["path"] for row in rollouts(run)}


def test_the_page_counts_what_the_filters_drop(copy):
    cot = copy.parent / "cot"
    cot.mkdir()
    data.write_rows(cot / "traces.jsonl", [{}] * 5)
    data.write_rows(cot / "dropped.jsonl", [{"reason": reason} for reason in data.STEPS])
    page = sft.write_report(copy)
    run, = runs_in(page)
    assert run["kept"] == 5 and run["dropped"] == dict.fromkeys(data.STEPS, 1)
    assert all(f'"{reason}": ' in RUNS.sub("", page.read_text()) for reason in data.STEPS), "and says what it means"


def test_every_token_shows_the_advantage_that_the_loss_gave_it(shown):
    """Computed again from the rewards on the page, through the functions of the training."""
    rows = shown["rollouts"]
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    for group in (rows[:4], rows[4:8], rows[8:]):
        parts = torch.tensor([[row["parts"] for row in group]])                           # (1, G, K, 3)
        totals = pagrpo.total_rewards(parts, "none")
        for mode in pagrpo.STAGES:
            advantages = pagrpo.group_advantages(totals, mode)[0]
            assert torch.allclose(torch.tensor([row["advantages"][mode] for row in group]), advantages, atol=1e-3)
        for row in group:
            own, segments = torch.tensor([[row["advantages"]["pa"]]]), torch.tensor([[row["segments"]]])
            expected = pagrpo.token_advantages(own, segments).flatten().tolist()
            assert row["token_rewards"] == pytest.approx(expected, abs=1e-3)
    assert any(any(row["token_rewards"]) for row in rows)


def test_the_rows_are_those_that_viewers_of_rollouts_read(shown):
    for row in shown["rollouts"]:
        assert BOARD <= row.keys() and len({len(row[name]) for name in OF_TOKENS}) == 1
        assert "".join(row["response_tokens"]).removesuffix("<|im_end|>") == row["response"]
        assert sum(row["weights"]) == pytest.approx(1, abs=1e-3)
        assert row["reward"] == pytest.approx(sum(row["totals"]), abs=1e-4)


def test_the_scores_after_an_update_are_those_of_the_updated_model(toy, run, tiny_settings):
    """The last checkpoint gives the last group the log-probabilities that were recorded after the last update."""
    vocabulary, policy = evaluation.load_once(newest_checkpoint(run), torch.device("cpu"))
    row = next(row for row in rollouts(run)[-4:] if "\ufffd" not in "".join(row["response_tokens"]))
    record = next(r for r in data.read_records(toy / "rl.json") if r.problem_id == row["problem_id"])
    example = data.build_example(record, toy, vocabulary, policy.config, tiny_settings)
    ids = [vocabulary.bytes.index(text.encode()) for text in row["response_tokens"]]
    temperature = pagrpo.PRESETS["tiny"]["temperature"]
    tokens, lengths = torch.tensor([[ids]]), torch.tensor([[len(ids)]])
    logprobs, _ = policy.logprobs(data.collate([example]), tokens, lengths, temperature)
    assert logprobs.flatten().tolist() == pytest.approx(row["logprobs_after"], abs=1e-4)
    assert row["logprobs"] != pytest.approx(row["logprobs_after"], abs=1e-4)


def test_recording_changes_nothing_and_a_resumed_run_has_no_row_twice(toy, base, tmp_path, monkeypatch):
    """The same run three times: recorded in the beginning and at the end, at each step, and at each step with two
    stops, after which steps are taken again."""
    def start(name: str, **changes) -> Path:
        pagrpo.main(rl_flags(tmp_path / name, toy, base, heldout="", steps=4, **changes))
        return tmp_path / name / "pagrpo"
    seldom, often = start("seldom"), start("often", transcript_every=1)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.delattr(sft.Run, "log")                        # behind the rows of step 1
        start("killed", transcript_every=1)
    os.truncate(tmp_path / "killed/pagrpo/rollouts.jsonl", 50)                # a kill cuts a file's only line
    with interrupted(3):
        start("killed", transcript_every=1)
    killed = start("killed", transcript_every=1)
    assert same_end(seldom, often) and same_end(often, killed)
    assert rollouts(often) == rollouts(killed)
    assert [row for row in rollouts(often) if row["step"] in (1, 4)] == rollouts(seldom)


def test_a_second_run_is_laid_over_the_first(copy, started, tmp_path, capsys):
    evaluation.main(["--report", str(copy), str(started)])
    assert capsys.readouterr().out.strip() == str(copy / "report.html")
    first, second = runs_in(copy / "report.html")
    assert len(first["metrics"]) == 3 and len(second["metrics"]) == 40
    with pytest.raises(SystemExit, match="holds no run"):
        evaluation.main(["--report", str(tmp_path)])
