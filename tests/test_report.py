"""Promise: a run ends with one page that needs nothing else, and what it shows is what happened in the run. The page is
also looked at by a browser: tests/render.py."""
import base64
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
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
from rewards import SEGMENTS
from toy_runs import interrupt_in_step, rl_flags, same_end

BOARD = ("prompt", "response", "response_tokens", "logprobs", "ref_logprobs", "values", "token_rewards", "reward",
         "step")                                             # the keys that RLLoggingBoard reads
OF_TOKENS = ("response_tokens", "logprobs", "logprobs_after", "ref_logprobs", "values", "token_rewards", "weights",
             "segments")


class Page(HTMLParser):
    """What a browser would load, and the data in the page."""

    def __init__(self, file):
        super().__init__()
        self.text, self.inside, self.loads, self.texts = file.read_text(encoding="utf-8"), [], [], {}
        self.feed(self.text)
        self.run, *self.others = json.loads(self.texts["runs"], parse_constant=pytest.fail)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.inside.append(attributes.get("id", tag))
        self.loads += [v for k, v in attributes.items() if k in ("src", "href", "srcset", "action", "data", "poster")]

    def handle_endtag(self, tag):
        self.inside.append("")

    def handle_data(self, text):
        if self.inside:
            self.texts[self.inside[-1]] = self.texts.get(self.inside[-1], "") + text


@pytest.fixture(scope="module")
def run(toy, started, tmp_path_factory):
    """The folder of a run of three steps, each of them recorded."""
    out = tmp_path_factory.mktemp("report")
    pagrpo.main(rl_flags(out, toy, newest_checkpoint(started), steps=3, questions=4, group_size=4, max_response=40,
                         transcript_every=1, clip_norm="inf"))
    return out / "pagrpo"


@pytest.fixture(scope="module")
def page(run):
    return Page(run / "report.html")


def rows_of(folder, name="rollouts.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def copy_of(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "run/pagrpo")


# ------------------------------------------------------------------------------------------------ one file

def test_the_page_needs_no_other_file_and_no_network(page):
    assert page.loads == [], "nothing is loaded; frames are in the data"
    style = page.texts["style"]
    assert not re.search(r"url\(|@import", style) and "http" not in page.text.replace(page.texts["runs"], "")
    assert len(page.text.encode()) < 5_000_000
    frames = [frame for clip in page.run["clips"].values() for frame in clip]
    assert frames and all(frame.startswith("data:image/jpeg;base64,") for frame in frames)


def test_a_response_cannot_break_out_of_its_place(run, tmp_path):
    folder, rows = copy_of(run, tmp_path), rows_of(run)
    rows[0] |= {"response_tokens": ["</script><script>alert(1)</script>", "<!--", "\u2028"], "judge": "</SCRIPT >"}
    data.write_rows(folder / "rollouts.jsonl", rows)
    page = Page(sft.write_report(folder))
    assert page.run["rollouts"][0]["response_tokens"] == rows[0]["response_tokens"]
    assert page.text.lower().count("</script") == 2, "those of the template"


def test_the_page_of_the_longest_run_is_small(run, tmp_path):
    """The paper's settings record so few groups that all of them fit, also if every response is cut off."""
    paper, folder = pagrpo.Settings(**pagrpo.PRESETS["7b"]), copy_of(run, tmp_path)
    steps = range(1, paper.steps + 1)
    recorded = [*steps[::paper.transcript_every], steps[-1]]
    row = rows_of(run)[0]
    for name in OF_TOKENS:
        row[name] = (row[name] * paper.max_response)[:paper.max_response]
    group = [row] * paper.group_size
    data.write_rows(folder / "rollouts.jsonl", [row | {"step": step} for step in recorded for row in group])
    last = rows_of(run, "metrics.jsonl")[-1]
    data.write_rows(folder / "metrics.jsonl", [last | {"step": step} for step in steps])
    page = sft.write_report(folder)
    assert 1_000_000 < page.stat().st_size < 6_000_000


def test_frames_are_few_and_small_and_a_clip_that_is_gone_has_none(run, page, monkeypatch):
    row = rows_of(run)[0]
    assert sft.small_frames(row | {"path": "gone.avi"}, page.run["settings"]) == []
    monkeypatch.setattr(data, "read_media", lambda *_: (np.zeros((20, 300, 400, 3), np.uint8), None))
    frames = sft.small_frames(row, page.run["settings"])
    assert 4 < len(frames) <= 8
    for frame in frames:
        width, height = Image.open(io.BytesIO(base64.b64decode(frame.partition(",")[2]))).size
        assert 64 ** 2 < width * height <= 128 ** 2 and width > height


# ------------------------------------------------------------------------------------------------ what happened

def test_the_page_holds_the_files_as_they_are(run, page):
    assert page.run["metrics"] == rows_of(run, "metrics.jsonl") and len(page.run["metrics"]) == 3
    assert page.run["rollouts"] == rows_of(run)
    assert page.run["settings"] == sft.read_json(run / "settings.json") | {"clip_norm": "Infinity"}
    assert page.run["results"] == sft.read_json(run / "results.json")
    assert page.run["state"]["steps"] == 3 and page.run["segments"] == [segment.name for segment in SEGMENTS]
    assert page.run["clips"].keys() == {row["path"] for row in page.run["rollouts"]}


def test_the_page_counts_what_the_filters_drop(run, page, tmp_path):
    assert page.run["kept"] == 0 and page.run["dropped"] == {}, "this run's traces come from elsewhere"
    folder, cot = copy_of(run, tmp_path), tmp_path / "run/cot"
    cot.mkdir()
    data.write_rows(cot / "traces.jsonl", [{}] * 5)
    data.write_rows(cot / "dropped.jsonl", [{"reason": "answer wrong"}, {"reason": "not judged"}] * 2)
    page = Page(sft.write_report(folder))
    assert page.run["kept"] == 5 and page.run["dropped"] == {"answer wrong": 2, "not judged": 2}
    checks = re.search(r"CHECKS = \{(.*?)\}", page.texts["script"], re.DOTALL)
    assert re.findall(r'"([^"]+)":', checks[1]) == [*data.STEPS], "the page knows each reason, in this order"


def test_every_token_shows_the_advantage_that_the_loss_gave_it(page):
    """Computed again from the rewards on the page, through the functions of the training."""
    rows = page.run["rollouts"]
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    for group in (rows[:4], rows[4:8], rows[8:]):
        totals = torch.tensor([row["totals"] for row in group])[None]                     # (1, G, K)
        parts = torch.tensor([row["parts"] for row in group])[None]                       # (1, G, K, 3)
        assert torch.allclose(totals, pagrpo.total_rewards(parts, "none"), atol=1e-4)
        for mode in pagrpo.STAGES:
            advantages = pagrpo.group_advantages(totals, mode)
            for g, row in enumerate(group):
                assert row["advantages"][mode] == pytest.approx(advantages[0, g].tolist(), abs=1e-3)
        advantages = pagrpo.group_advantages(totals, page.run["settings"]["advantage"])
        for g, row in enumerate(group):
            segments = torch.tensor([[row["segments"]]])                                  # (1, 1, T)
            expected = pagrpo.token_advantages(advantages[:, [g]], segments).flatten().tolist()
            assert row["token_rewards"] == pytest.approx(expected, abs=1e-3)
    assert any(x for row in rows for x in row["token_rewards"]), "not all are 0"


def test_the_rows_are_those_that_viewers_of_rollouts_read(run):
    rows = rows_of(run)
    for row in rows:
        assert set(BOARD) <= row.keys() and len({len(row[name]) for name in OF_TOKENS}) == 1
        assert "".join(row["response_tokens"]).removesuffix("<|im_end|>") == row["response"]
        assert set(row["segments"]) <= {*range(len(SEGMENTS) + 1)} and sum(row["weights"]) == pytest.approx(1, abs=1e-3)
        assert row["reward"] == pytest.approx(sum(row["totals"]), abs=1e-4)
    assert any(row["logprobs"] != row["logprobs_after"] for row in rows), "the update changed something"


def test_the_scores_after_an_update_are_those_of_the_updated_model(toy, run):
    """Its last checkpoint gives the last group the log-probabilities that were recorded after the last update."""
    vocabulary, policy, _ = data.load_local(newest_checkpoint(run))
    settings = pagrpo.Settings(**{k: tuple(v) if isinstance(v, list) else v
                                  for k, v in sft.read_json(run / "settings.json").items()})
    readable = [row for row in rows_of(run)[-4:] if "\ufffd" not in "".join(row["response_tokens"])]
    assert readable, "single bytes of a character have no text by which they could be found again"
    for row in readable:
        record = next(r for r in data.read_records(toy / "rl.json") if r.problem_id == row["problem_id"])
        example = data.build_example(record, toy, vocabulary, policy.config, settings)
        ids = [vocabulary.bytes.index(text.encode()) for text in row["response_tokens"]]
        tokens, lengths = torch.tensor([[ids]]), torch.tensor([[len(ids)]])
        logprobs, _ = policy.logprobs(data.collate([example]), tokens, lengths)
        assert logprobs.flatten().tolist() == pytest.approx(row["logprobs_after"], rel=1e-3, abs=1e-3)


def fail(*_):
    raise OSError("the disk is full")


def test_recording_changes_nothing_and_a_resumed_run_has_no_row_twice(toy, base, tmp_path, monkeypatch):
    """The same run three times: recorded once in the beginning and at the end, at each step, and at each step with a
    kill in between, after which a step is taken again."""
    pagrpo.main(rl_flags(tmp_path / "seldom", toy, base, heldout="", steps=4))
    pagrpo.main(rl_flags(tmp_path / "often", toy, base, heldout="", steps=4, transcript_every=1))
    with monkeypatch.context() as patch:
        patch.setattr(sft.Run, "log", fail)                  # behind the rows of step 1
        with pytest.raises(SystemExit):
            pagrpo.main(rl_flags(tmp_path / "killed", toy, base, heldout="", steps=4, transcript_every=1))
    assert {row["step"] for row in rows_of(tmp_path / "killed/pagrpo")} == {1}
    os.truncate(tmp_path / "killed/pagrpo/rollouts.jsonl", 50)                # a kill cuts a file's only line
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 3)
        with pytest.raises(SystemExit, match="topped after step 3"):
            pagrpo.main(rl_flags(tmp_path / "killed", toy, base, heldout="", steps=4, transcript_every=1))
    pagrpo.main(rl_flags(tmp_path / "killed", toy, base, heldout="", steps=4, transcript_every=1))
    seldom, often, killed = (tmp_path / name / "pagrpo" for name in ("seldom", "often", "killed"))
    assert same_end(seldom, often) and same_end(often, killed)
    assert rows_of(often) == rows_of(killed)
    assert [row for row in rows_of(often) if row["step"] in (1, 4)] == rows_of(seldom)


def test_sft_has_a_page_and_a_second_run_is_laid_over_the_first(run, started, capsys, tmp_path):
    page = Page(started / "report.html")
    assert page.run["metrics"][-1]["step"] == 40 and not page.run["rollouts"] and not page.others
    shutil.copytree(run, tmp_path / "a")
    evaluation.main(["--report", str(tmp_path / "a"), str(started)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "a/report.html")
    page = Page(tmp_path / "a/report.html")
    assert page.others[0]["metrics"][-1]["step"] == 40 and page.others[0]["settings"]["batch"] == 32
    with pytest.raises(SystemExit, match="holds no run"):
        evaluation.main(["--report", str(tmp_path)])
    with pytest.raises(SystemExit):
        evaluation.main(["--report", "a", "b", "c"])


def test_the_page_knows_how_the_run_was_made(page):
    made = page.run["state"]["made_by"]
    assert made["torch"] == torch.__version__ and made["command"].startswith("python ") and "commit" in made
    crossed = page.run["results"]["pagrpo, greedy"]["answer"]["crossed"]
    assert sum(map(sum, crossed)) == 20 and sum(row[0] for row in crossed) == pytest.approx(
        0.2 * page.run["results"]["pagrpo, greedy"]["answer"]["value"])
