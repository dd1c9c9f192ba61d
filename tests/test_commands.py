"""Promise: every script can be started by a newcomer. Help is a page, mistakes are answered in a line, and a question
about a clip gets a readable answer."""
import errno
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import data
import eval as evaluation
import pagrpo
import sft

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", [data, sft, pagrpo, evaluation])
def test_help_is_a_page(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    page = capsys.readouterr().out
    assert ended.value.code == 0 and len(page.splitlines()) > 10 and "python" in page


@pytest.mark.parametrize("module", [sft, pagrpo])
def test_help_names_every_setting_with_its_reason_and_presets(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    page = " ".join(capsys.readouterr().out.split())
    for name, setting in module.Settings.__dataclass_fields__.items():
        assert "--" + name.replace("_", "-") in page and " ".join(setting.metadata["help"].split())[:30] in page
    assert "tiny 0.002" in page if module is sft else "tiny 0.0003" in page


@pytest.mark.parametrize("module, flags, complaint", [
    (sft, ["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    (pagrpo, ["--step", "1"], "unrecognized arguments: --step"),
    (pagrpo, ["--preset", "70b"], "invalid choice: '70b'"),
    (pagrpo, ["--advantage", "ppo"], "invalid choice: 'ppo'"),
    (sft, ["--steps", "many"], "invalid int value: 'many'"),
    (evaluation, ["--bench", "toy", "--video", "x.mp4"], "not allowed with argument")])
def test_a_wrong_flag_is_named(module, flags, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(flags)
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize("script, expected", [
    ("sft.py", ["hf download Qwen/Qwen2.5-VL-7B-Instruct", "hf download 1171-jpg/videop2r",
                "hf download Video-R1/Video-R1-data"]),
    ("pagrpo.py", ["sft.py --preset 7b", "hf download 1171-jpg/videop2r"])])
def test_missing_weights_and_data_are_one_error_with_the_commands_that_fetch_them(script, expected, tmp_path):
    ended = subprocess.run([sys.executable, str(ROOT / script), "--preset", "7b"], cwd=tmp_path,
                           capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout.startswith("Preset 7b; others: tiny, 3b")
    assert all(command in ended.stderr for command in expected) and "Traceback" not in ended.stderr


@pytest.mark.parametrize("script", ["model.py", "sft.py", "pagrpo.py", "eval.py"])
def test_an_old_torch_is_named_before_anything_breaks(script, monkeypatch):
    for name in ("model", "sft", "pagrpo", "data", "eval"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("torch.__version__", "2.10.1+cpu")
    with pytest.raises(SystemExit, match="torch 2.11 or later is needed, this is 2.10.1"):
        runpy.run_path(str(ROOT / script))


def test_a_question_about_a_clip_is_answered(toy, base, capsys):
    clip = next((toy / "heldout").glob("*.avi"))
    evaluation.main(["--model", str(base), "--preset", "tiny", "--video", str(clip),
                     "--question", "Which colour is first?", "--options", "red", "blue", "--max-response", "8"])
    said = capsys.readouterr().out
    assert "3 grid steps of 1.00 s, 28×28 pixels" in said and "cut off after 8 tokens" in said


def test_the_toy_bench_prints_the_numbers_of_the_training_table_again(toy, base, tmp_path, capsys):
    pagrpo.main(["--preset", "tiny", "--out", str(tmp_path), "--model", str(base), "--data", str(toy / "rl.json"),
                 "--media", str(toy), "--heldout", str(toy / "heldout.json"), "--steps", "1", "--questions", "2",
                 "--max-response", "12"])
    trained = json.loads((tmp_path / "pagrpo" / "results.json").read_text())["pagrpo, greedy"]
    evaluation.main(["--bench", "toy", "--model", str(tmp_path / "pagrpo"), "--data", str(toy)])
    said = capsys.readouterr().out
    numbers = json.loads((tmp_path / "pagrpo" / "eval" / "toy" / "summary.json").read_text())
    assert numbers["aggregates"]["all questions"]["value"] == trained["answer"]["value"]
    assert numbers["aggregates"]["all questions"]["perception"]["value"] == trained["perception"]["value"]
    assert "toy: 20 questions scored" in said and numbers["aggregates"]["all questions"]["n"] == 20


def said_in(encoding: str, *words) -> str:
    """What a command prints to a terminal of this encoding."""
    ended = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True,
                           env=os.environ | {"PYTHONIOENCODING": encoding})
    assert ended.returncode == 0, ended.stderr.decode()
    return ended.stdout.decode(encoding)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_our_characters_shows_others(encoding, toy, tmp_path):
    """The work is done by then: a character of a transcript or a table must not lose it."""
    said = said_in(encoding, "data.py", "cot", "--data", toy / "sft.json", "--out", tmp_path / "cot")
    assert "??????" in said and "traces are kept for SFT" in said, "the line below the head of a table"


def test_help_can_be_read_there():
    assert "(eq. 3?7)" in said_in("latin-1", "pagrpo.py", "--help")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_said_once(number, tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", refuse)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for name in ("sft", "pagrpo"):
            with data.lock_folder(tmp_path / name):
                assert (tmp_path / name).is_dir()
    assert len(said) == 1 and "no locks" in str(said[0].message)


def test_another_error_of_a_lock_is_not_hidden(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(errno.EIO, "broken")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken"), data.lock_folder(tmp_path):
        pass
