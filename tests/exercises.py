"""Five functions of the project to write yourself, with its tests as the teacher (docs/course.md).

    python tests/exercises.py start [FOLDER]     a copy of the project in which the five functions are empty
    python tests/exercises.py check [FOLDER]     which of them are open, wrong or solved

FOLDER is runs/exercises unless it is named. In the folder, `python -m pytest` runs the tests of the five functions.
"""
import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ("runs", "models", "data", "solutions", "exercises.py", "curves.py", "test_solutions.py", "__pycache__")
TESTS = ("tests/test_template.py", "tests/test_loss.py")     # what plain pytest runs in the copy


class Exercise(NamedTuple):
    file: str
    function: str
    tests: tuple[str, ...]                                   # that only this function can turn red or green
    read: str                                                # where to look when they are red


EXERCISES = (  # from the easiest to the hardest
    Exercise("rewards.py", "extract_tag", ("tests/test_template.py::TestParser",),
             "`parse`, which calls it, and test_two_answers_half_a_pair…: a pair counts if it is there exactly once"),
    Exercise("pagrpo.py", "normalize", ("tests/test_loss.py::TestAdvantages",),
             "eq. 6 in the README; std is unbiased (n - 1), and an unknown reward is NaN: nansum, torch.where"),
    Exercise("pagrpo.py", "group_advantages", ("tests/test_loss.py::TestAdvantages",),
             "the table of --advantage in the README: which rewards are summed, before or after `normalize`?"),
    Exercise("rewards.py", "segment_ids", ("tests/test_template.py::TestSegmentIds",),
             "`segment_ends`, which does the search on bytes; a token belongs to the segment in which it begins"),
    Exercise("pagrpo.py", "pa_grpo_loss", ("tests/test_loss.py::TestLoss",),
             "eq. 7 in the README and the worked example of the docstring; the loss is the negative objective"),
)


def span(source: str, function: str, body: bool = False) -> tuple[int, int]:
    """First and last line of a function (from 0, the last one outside), or of its body without the docstring."""
    found = [node for node in ast.parse(source).body if getattr(node, "name", "") == function]
    if not found:
        raise ValueError(f"there is no function {function} any more")
    return found[0].body[1].lineno - 1 if body else found[0].lineno - 1, found[0].end_lineno


OPEN = 'raise NotImplementedError("exercise: {}")'


def emptied(source: str, function: str) -> str:
    """The source with a function that keeps its head and docstring and raises NotImplementedError."""
    lines, (start, end) = source.splitlines(keepends=True), span(source, function, body=True)
    return "".join([*lines[:start], f"    {OPEN.format(function)}\n", *lines[end:]])


def with_function(source: str, function: str, other: str) -> str:
    """The source with the function as it is in another source."""
    lines, (start, end) = source.splitlines(keepends=True), span(source, function)
    first, last = span(other, function)
    return "".join([*lines[:start], *other.splitlines(keepends=True)[first:last], *lines[end:]])


def start(folder: Path) -> None:
    """Writes the copy. SystemExit if the folder holds anything: it may be somebody's work."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"{folder} is not empty and stays as it is. Go on with it (`python tests/exercises.py check "
                         f"{folder}` says how far it is), or name another folder.")

    def left_out(where: str, names: list[str]) -> set[str]:
        return {name for name in names
                if name in LEFT_OUT or name.startswith(".") or Path(where, name) == folder.resolve()}
    shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)
    for exercise in EXERCISES:
        file = folder / exercise.file
        file.write_text(emptied(file.read_text(), exercise.function))
    (folder / "pytest.ini").write_text(f"[pytest]\ntestpaths = {' '.join(TESTS)}\n")
    print(f"{folder} holds a copy of the project. These functions are empty, the docstrings say what they do:")
    for exercise in EXERCISES:
        print(f"    {exercise.file:11} {exercise.function}")
    print(f"Write them, in any order. `cd {folder} && python -m pytest` is red until all are right.\n"
          f"`python tests/exercises.py check {folder}`, from here, tests each one beside the original four.")


def test_alone(folder: Path, exercise: Exercise) -> str:
    """Runs the tests of one exercise in a project whose other four functions are the original ones. "" if it passes,
    else the first failure in a line."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for file in ROOT.glob("*.py"):
            shutil.copy(file, copy)
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        source, original = (folder / exercise.file).read_text(), (ROOT / exercise.file).read_text()
        for other in EXERCISES:
            if other.file == exercise.file and other != exercise:
                source = with_function(source, other.function, original)
        (copy / exercise.file).write_text(source)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *exercise.tests]
        run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if run.returncode == 0:
        return ""
    errors = re.findall(r"^E +(.*)", run.stdout, re.M) or [(run.stdout + run.stderr).strip().splitlines()[-1]]
    failed = re.findall(r"^FAILED \S*?::(.*?)(?: - .*)?$", run.stdout, re.M)
    return f"{failed[0]}: {errors[0]}" if failed else errors[0]


def state_of(folder: Path, exercise: Exercise) -> tuple[str, str]:
    """open, wrong or solved, and what is wrong."""
    try:
        source = (folder / exercise.file).read_text()
        if OPEN.format(exercise.function) in source:
            return "open", ""
        failure = test_alone(folder, exercise)
    except FileNotFoundError:
        raise SystemExit(f"{folder} holds no copy of the project. To make one: "
                         f"python tests/exercises.py start {folder}") from None
    except SyntaxError as error:
        failure = (f"{exercise.file}, line {error.lineno}: {error.msg}. Mend this first: until then no function of "
                   "this file can be tested.")
    except ValueError as error:
        failure = f"{exercise.file}: {error}"
    return "wrong" if failure else "solved", failure


def check(folder: Path) -> dict[str, str]:
    """Prints and returns how far each exercise is."""
    states = {}
    for exercise in EXERCISES:
        state, failure = state_of(folder, exercise)
        states[exercise.function] = state
        print(f"{state:7} {exercise.file:11} {exercise.function}", flush=True)
        if failure:
            print(f"        {failure}")
        if state != "solved":
            print(f"        read: {exercise.read}")
    solved = list(states.values()).count("solved")
    print(f"{solved} of {len(EXERCISES)} solved." + (" All of them: go on with docs/course.md." if solved == 5 else ""))
    return states


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["start", "check"])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/exercises"), help="default: runs/exercises")
    args = parser.parse_args(argv)
    {"start": start, "check": check}[args.what](args.folder)


if __name__ == "__main__":
    main()
