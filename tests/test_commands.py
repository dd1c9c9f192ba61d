"""Promise: every script can be started by a newcomer. Help is a page, mistakes are answered in a line, and a question
about a clip gets a readable answer."""
import errno
import runpy
import subprocess
import sys

import pytest

import data
import eval as evaluation
import pagrpo
import sft
from toy_runs import ENV, ROOT, rl_flags


@pytest.mark.parametrize("module", [data, evaluation])
def test_help_is_a_page(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0 and "python" in capsys.readouterr().out


@pytest.mark.parametrize("module", [sft, pagrpo])
def test_help_names_every_setting_with_its_reason_and_presets(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "python" in page
    for name, setting in module.Settings.__dataclass_fields__.items():
        assert "--" + name.replace("_", "-") in page and " ".join(setting.metadata["help"].split())[:30] in page
    assert f"tiny {module.PRESETS['tiny']['lr']}" in page


@pytest.mark.parametrize("module, flags, complaint", [
    (pagrpo, ["--step", "1"], "unrecognized arguments: --step"),
    (pagrpo, ["--advantage", "ppo"], "invalid choice: 'ppo'"),
    (sft, ["--steps", "many"], "invalid int value: 'many'"),
    (evaluation, ["--bench", "toy", "--video", "x.mp4"], "not allowed with argument")])
def test_a_wrong_flag_is_named(module, flags, complaint, capsys):
    with pytest.raises(SystemExit):
        module.main(flags)
    assert complaint in capsys.readouterr().err


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
    clip = next((toy / "heldout").glob("*.apng"))
    evaluation.main(["--model", str(base), "--preset", "tiny", "--video", str(clip),
                     "--question", "Which colour is first?", "--options", "red", "blue", "--max-response", "8"])
    said = capsys.readouterr().out
    assert "3 grid steps of 1.00 s, 28×28 pixels" in said and "cut off after 8 tokens" in said


def test_the_toy_bench_prints_the_numbers_of_the_training_table_again(toy, base, tmp_path, capsys):
    pagrpo.main(rl_flags(tmp_path, toy, base, steps=1, max_response=12))
    trained = data.read_json(tmp_path / "pagrpo/results.json")["pagrpo, greedy"]
    evaluation.main(["--bench", "toy", "--model", str(tmp_path / "pagrpo"), "--data", str(toy)])
    assert "toy: 20 questions scored" in capsys.readouterr().out
    found = data.read_json(tmp_path / "pagrpo/eval/toy/summary.json")["aggregates"]["all questions"]
    assert found["value"] == trained["answer"]["value"]
    assert found["perception"]["value"] == trained["perception"]["value"]


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_our_characters_shows_others(encoding, toy, tmp_path):
    """The work is done by then: a character of a transcript or a table must not lose it."""
    words = ["data.py", "cot", "--data", toy / "sft.json", "--out", tmp_path]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=True,
                           env=ENV | {"PYTHONIOENCODING": encoding})
    said = ended.stdout.decode(encoding)
    assert "??????" in said and "traces are kept for SFT" in said, "the line below the head of a table"


def test_a_disk_without_locks_is_no_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")
    monkeypatch.setattr("fcntl.flock", refuse)
    with data.lock_folder(tmp_path / "sft"):
        assert (tmp_path / "sft").is_dir()
