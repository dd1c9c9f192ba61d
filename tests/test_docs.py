"""Promise: what the documents say is so. Their commands can be given, their links lead somewhere, the README's
figures are those of the demo, and the miniature's page is made of its rows."""
import json
import re
import shlex
from pathlib import Path

import pytest

import data
import eval as evaluation
import memory
import miniature
import miniature_tables as tables
import pagrpo
import sft

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GONE = ROOT / "docs/changes.md"                               # names commands that are no more
COMMAND = re.compile(r"(?:python|torchrun)((?: --[\w-]+=\S+)*) ((?:tests/)?\w+\.py)([^`#|&\n]*)")


def commands() -> list[tuple[str, list[str]]]:
    """(script, its words) of every command in a document."""
    found = set()
    for document in set(DOCUMENTS) - {GONE}:
        for _, script, rest in COMMAND.findall(document.read_text().replace("\\\n", " ")):
            found.add((script, tuple(shlex.split(rest))))
    return [(script, list(words)) for script, words in sorted(found)]


@pytest.mark.parametrize("script, words", commands(), ids=" ".join)
def test_a_command_can_be_given(script, words, capsys):
    """Settings are read by the scripts' own parsers. Of the others, every flag has to be known."""
    if "--help" in words or not words:
        return
    if script in ("sft.py", "pagrpo.py"):
        module = sft if script == "sft.py" else pagrpo
        sft.parse_flags(module.Settings, module.PRESETS, words, "")
    elif script == "eval.py":
        evaluation.parse_args(words)
    elif script == "tests/memory.py":
        memory.parse(words)
    elif script == "data.py":
        with pytest.raises(SystemExit):
            data.main([words[0], "--help"])
        page = capsys.readouterr().out
        assert all(word in page for word in words if word.startswith("--"))
    else:
        source, only = (ROOT / script).read_text(), (*words, "--only").index("--only")
        assert all(f'"{word}"' in source for word in words[:only] if re.match("--|[a-z]+$", word))
        for row in words[only + 1:]:                         # a function of bench_cpu.py or bench_gpu.py
            assert f"\ndef {row}(" in (ROOT / f"tests/bench_{words[0]}.py").read_text(), row


def test_the_tests_that_are_named_exist():
    """Also in `python -m pytest tests/…`, which the commands above leave out."""
    for document in DOCUMENTS:
        for name in re.findall(r"tests/\w+\.py", document.read_text()):
            assert (ROOT / name).is_file(), f"{document.name}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_link_to_a_file_leads_somewhere(document):
    for link in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        assert link.startswith("https://") or link.startswith("http://") or (document.parent / link).exists(), link


def test_the_figures_of_the_readme_are_those_of_the_demo():
    results = json.loads((ROOT / "docs/results/demo.json").read_text())
    lines = (ROOT / "README.md").read_text().splitlines()
    for title, name in ("base", "base"), ("SFT", "SFT"), ("PA-GRPO", "pagrpo"):
        cells = [f"{results[f'{name}, {how}'][what]['value']:.1f}"
                 for how in ("greedy", "sampled") for what in ("perception", "answer")]
        assert f"| {' | '.join([title, *cells])} |" in lines


def test_the_gains_in_the_readme_are_those_of_the_miniature():
    results = json.loads((ROOT / "docs/results/miniature.json").read_text())["rows"]
    lines = (ROOT / "README.md").read_text().splitlines()
    for title, name in ("SFT", "sft"), ("GRPO", "grpo"), ("joint", "joint"), ("PA-GRPO", "full"):
        cells = [tables.mean(results, name, key, "" if name == "sft" else "sft") for key in tables.PRIMARY]
        sign = "" if name == "sft" else "+"
        assert f"| {' | '.join([title, *(f'{sign}{cell}' for cell in cells)])} |" in lines


def test_the_page_of_the_miniature_is_made_of_its_rows():
    """The tables, and the picture that stands in README and course; what is written by hand is below "## Why"."""
    folder = ROOT / "docs/results"
    results = json.loads((folder / "miniature.json").read_text())["rows"]
    page, _, _ = (folder / "miniature.md").read_text().partition("\n## Why\n")
    assert page == tables.page(miniature.ROWS, miniature.JUDGES, miniature.FAILED, miniature.LADDER, results, folder)
    assert (folder / "separation.svg").read_text() == tables.picture(miniature.LADDER, results)
