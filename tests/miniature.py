"""The paper in miniature: its ablations and analyses on the toy world, over three seeds with one budget.

    python tests/miniature.py                    all rows, then docs/results/miniature.md, on two cores
    python tests/miniature.py --small            a few steps and clips, to try it in three minutes

A row of ROWS is one run of sft.py or pagrpo.py with the flags that stand there, evaluated by eval.py. All rows of a
seed share its clips, traces, base and SFT model. Nothing is tuned: every other setting is the preset's. The same
command resumes, row by row; a row that fails is named and the others go on. The section "## Why" of an existing
miniature.md is written by hand and is kept.
"""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tqdm import tqdm  # noqa: E402  (found through the line above)

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import miniature_tables as tables  # noqa: E402
import pagrpo  # noqa: E402
import rewards  # noqa: E402
import sft  # noqa: E402
from serving import serving, text_of  # noqa: E402


class Row(NamedTuple):
    """One line of a table: a model and how it is trained."""
    name: str                                                # its folder
    title: str
    paper: float | None                                      # mean of seven benchmarks, in percent
    sft: str | None                                          # flags of SFT; "": the SFT that rows share; None: no SFT
    rl: str | None                                           # flags of pagrpo.py; None: no RL
    error: float = 0.0                                       # share of wrong verdicts of its judge, a server


ROWS = (
    Row("base",         "base, no SFT, no RL",                   52.9, None, None),
    Row("sft",          "SFT only",                              55.6, "", None),
    Row("rl-only",      "RL only, no SFT",                       56.0, None, ""),
    Row("think-sft",    "process-agnostic SFT, no RL",           53.5, "--template think", None),
    Row("grpo",         "GRPO: process-agnostic RL",             56.4, "", "--advantage grpo"),
    Row("no-reasoning", "without reasoning reward",              55.3, "", "--reward-off reasoning"),
    Row("no-length",    "without length reward",                 57.7, "", "--reward-off length"),
    Row("joint",        "without separation",                    57.4, "", "--advantage joint"),
    Row("gdpo",         "GDPO by segment",                       None, "", "--advantage gdpo"),
    Row("full",         "PA-GRPO",                               58.7, "", ""),
)
JUDGES = (  # on the first seed only; the paper's: Llama-3.1 8B, 70B, 405B and Claude 3.7 Sonnet
    Row("judge-18",     "judge that errs in 18 %",               57.4, "", "", 0.18),
    Row("judge-12",     "judge that errs in 12 %",               57.6, "", "", 0.12),
    Row("judge-9",      "judge that errs in 9 %",                58.0, "", "", 0.09),
    Row("judge-5",      "judge that errs in 5 %",                58.7, "", "", 0.05),
)
FAILED = Row("lr-x10", "learning rate ten times too high", None, "", f"--lr {10 * pagrpo.PRESETS['tiny']['lr']:g}")
SUFFICIENCY = Row("sufficiency", "is the observation enough?", None, None, None)   # no training
FULL = ROWS[-1]
DECODING = {"greedy": [], "sampled": ["--temperature", "1", "--top-p", "1"]}   # eval.py's own is the paper's


# ------------------------------------------------------------------------------------------------ commands

def folder_of(row: Row, seed: int, args: argparse.Namespace) -> Path:
    return args.out / f"seed{seed}" / "rows" / row.name


def training(row: Row, seed: int, args: argparse.Namespace, url: str = "") -> list[list[str]]:
    """The commands that train a row: none, SFT, RL, or both."""
    home, own, commands = args.out / f"seed{seed}", folder_of(row, seed, args), []
    world = ["--preset", "tiny", "--media", str(home / "toy"), "--seed", str(seed)]
    sft_steps, steps = (["--steps", str(n)] if n else [] for n in (args.sft_steps, args.steps))
    if row.name == "sft":                                    # makes clips, traces and base, too
        return [["sft.py", "--preset", "tiny", "--out", str(home), "--seed", str(seed), *sft_steps]]
    if row.sft:
        commands.append(["sft.py", *world, "--out", str(own), "--model", str(home / "base"), "--data",
                         str(home / "cot/traces.jsonl"), "--heldout", str(home / "toy/heldout.json"), *row.sft.split(),
                         *sft_steps])
    if row.rl is not None:
        start = home / "base" if row.sft is None else own / "sft" if row.sft else home / "sft"
        judge = ["--judge", url, "--judge-model", row.name] if row.error else []
        commands.append(["pagrpo.py", *world, "--out", str(own), "--model", str(start), "--data",
                         str(home / "toy/rl.json"), *row.rl.split(), *judge, *steps])
    return commands


def trained(row: Row, seed: int, args: argparse.Namespace) -> Path:
    """The folder of the model that a row ends in."""
    if row.rl is not None:
        chosen = sft.parse_flags(pagrpo.Settings, pagrpo.PRESETS, row.rl.split(), "").advantage
        return folder_of(row, seed, args) / pagrpo.STAGES[chosen]
    return folder_of(row, seed, args) / "sft" if row.sft else args.out / f"seed{seed}" / row.name


def evaluating(row: Row, seed: int, args: argparse.Namespace, out: Path, *flags: str) -> list[str]:
    """The command that evaluates a row on the held-out clips."""
    toy, model = args.out / f"seed{seed}" / "toy", trained(row, seed, args)
    return ["eval.py", "--bench", "toy", "--data", str(toy), "--model", str(model), "--preset", "tiny", "--seed",
            str(seed), "--out", str(out), "--limit", str(args.limit), *flags]


# ------------------------------------------------------------------------------------------------ a judge that errs

PLACES = {"article": "an?", "medium": r"\w+", "question": "(?P<question>.*)", "reference": "(?P<reference>.*)",
          "options": "(?P<options>(?:Option: .*\n)*)", "observation": '(?P<observation>".*")'}
ASKED = re.compile(re.sub(r"\\\{(\w+)\\\}", lambda place: PLACES[place[1]], re.escape(rewards.JUDGE_PROMPT)))


def read_claim(prompt: str) -> rewards.Claim:
    """The toy claim that a judge is asked about. The prompt does not name the problem type: the question tells it."""
    found = ASKED.fullmatch(prompt)
    options = tuple(re.findall("Option: (.*)\n", found["options"]))
    texts = found["question"], options, "", found["reference"], json.loads(found["observation"])
    claims = [rewards.Claim(*texts)._replace(problem_type=kind) for kind in rewards.PROBLEM_TYPES]
    return next(filter(data.read_toy, claims))


def errs(claim: rewards.Claim, share: float) -> bool:
    """Does a judge that errs in this share of the claims err in this one? The claim's hash decides: equal claims get
    equal verdicts, and a better judge errs in a part of the claims in which a worse one does."""
    digest = rewards.key_of(claim)
    return int(digest, 16) / 16 ** len(digest) < share


def erring_judge(share: float):
    """What a loopback server says: the rule judge's verdict, or its opposite."""
    def play(number: int, request: dict) -> str:
        claim = read_claim(text_of(request))
        (verdict,) = data.rule_judge([claim])
        sufficient = verdict.sufficient != errs(claim, share)
        return f"{verdict.explanation}. <judgement>{'Yes' if sufficient else 'No'}</judgement>"
    return play


# ------------------------------------------------------------------------------------------------ running

RUNNING, STOP = set(), threading.Event()


def call(command: list[str], log: Path, args: argparse.Namespace) -> None:
    """Runs a script of the project; its output goes to `log`. RuntimeError, with its last lines, if it fails."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // args.jobs))
    if STOP.is_set():
        raise RuntimeError("stopped")
    with log.open("a") as out:
        print(f"$ OMP_NUM_THREADS={threads} python {' '.join(command)}", file=out, flush=True)
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_NUM_THREADS": threads})
        RUNNING.add(process)
        code = process.wait()
        RUNNING.remove(process)
    if code:
        last = re.split(r"\s*[\r\n]\s*", log.read_text(errors="replace").strip())[-2:]
        raise RuntimeError(f"{command[0]} ended with {code}: {' '.join(last)} ({log})")


def by_clip(folder: Path, value) -> dict[str, float]:
    """clip → mean of value(row) over its questions, without those that have none (None)."""
    found = {}
    for row in evaluation.read_rows(folder).values():
        if "missing" not in row and (x := value(row)) is not None:
            found.setdefault(row["clip"], []).append(float(x))
    return {clip: sum(values) / len(values) for clip, values in found.items()}


def differs(row: dict) -> bool | None:
    """Is the answer another option than the one that the reasoning ends on? None if either names none."""
    if row["problem_type"] != "multiple choice":
        return None
    thought = evaluation.ends_on(row["think"] or "", row["options"])
    answered = evaluation.read_choice(row["answer"], row["options"])
    return thought != answered if thought and answered else None


def run_row(row: Row, seed: int, args: argparse.Namespace) -> None:
    """Trains and evaluates a row, and writes results.json: for each clip how right it was."""
    folder, began, results = folder_of(row, seed, args), time.time(), {}
    with serving(erring_judge(row.error)) if row.error else nullcontext() as server:
        for command in training(row, seed, args, server.url if server else ""):
            call(command, folder / "log.txt", args)
    for how, flags in DECODING.items():
        call(evaluating(row, seed, args, folder / how, *flags), folder / "log.txt", args)
        results[f"answer, {how}"] = by_clip(folder / how / "toy", evaluation.is_correct)
        if "think" not in (row.sft or ""):                   # without an observation there is no perception to count
            results[f"perception, {how}"] = by_clip(folder / how / "toy", itemgetter("perception"))
        results[f"mismatch, {how}"] = by_clip(folder / how / "toy", differs)
    data.write_atomically(folder / "results.json", json.dumps(results | {"seconds": time.time() - began}) + "\n")


def run_sufficiency(seed: int, args: argparse.Namespace) -> None:
    """The SFT model answers from its own observations, and from PA-GRPO's, without and with the video."""
    folder, sft_row, results = folder_of(SUFFICIENCY, seed, args), ROWS[1], {}
    for row in (sft_row, FULL):
        place, ways = folder_of(row, seed, args) / "greedy" / "toy", [[], ["--blind"]] if row is sft_row else []
        if any(by_clip(place, lambda r: bool(r.get("observation"))).values()):       # eval.py refuses to go without
            ways += [["--given", str(place)], ["--blind", "--given", str(place)]]
        for flags in ways:
            call(evaluating(sft_row, seed, args, folder / row.name, *flags), folder / "log.txt", args)
        for found in (folder / row.name).glob("toy*"):
            results[f"{row.name}: {found.name}"] = by_clip(found, evaluation.is_correct)
    data.write_atomically(folder / "results.json", json.dumps(results) + "\n")


def jobs(args: argparse.Namespace) -> list[tuple]:
    """(row, seed, names of what must be finished on that seed) in order. SUFFICIENCY is no row, but has its place."""
    shared, others, first = ROWS[1], (ROWS[0], *ROWS[2:]), args.seeds[0]
    plan = [(shared, seed, ()) for seed in args.seeds]
    for seed in args.seeds:
        plan += [(row, seed, ("sft",)) for row in others]
    plan += [(row, first, ("sft",)) for row in (*JUDGES, FAILED)]
    return plan + [(SUFFICIENCY, seed, ("sft", "full")) for seed in args.seeds]


def run_all(args: argparse.Namespace) -> list[str]:
    """Runs what is not finished, `--jobs` rows at a time. Returns what failed."""
    futures: dict[tuple, Future] = {}

    def work(row, seed, needed):
        for name in needed:
            if futures[name, seed].exception():
                raise RuntimeError(f"the row {name} that it needs failed")
        if not (folder_of(row, seed, args) / "results.json").is_file():
            folder_of(row, seed, args).mkdir(parents=True, exist_ok=True)
            run_sufficiency(seed, args) if row is SUFFICIENCY else run_row(row, seed, args)

    failures, plan = [], jobs(args)
    with ThreadPoolExecutor(args.jobs) as pool:
        for row, seed, needed in plan:                       # in order: a row waits for earlier ones only
            futures[row.name, seed] = pool.submit(work, row, seed, needed)
        names = {future: key for key, future in futures.items()}
        try:
            for future in tqdm(as_completed(names), total=len(plan), unit="row", smoothing=0):
                if error := future.exception():
                    failures.append(f"{names[future][0]}, seed {names[future][1]}: {error}")
                    tqdm.write(f"FAILED {failures[-1]}")
        except KeyboardInterrupt:
            STOP.set()
            for process in list(RUNNING):
                process.terminate()                          # stops after its step, with a checkpoint
            pool.shutdown(cancel_futures=True)
            sys.exit("Stopped. The same command goes on from here.")
    return failures


# ------------------------------------------------------------------------------------------------ results

def gather(args: argparse.Namespace) -> tuple[dict, dict]:
    """What is finished: row → seed → results.json, and row → seed → rows of metrics.jsonl."""
    results, curves = {}, {}
    for row, seed, _ in jobs(args):
        if found := data.read_json(folder_of(row, seed, args) / "results.json"):
            results.setdefault(row.name, {})[str(seed)] = found
            if row.rl is not None:
                log = rewards.read_jsonl(trained(row, seed, args) / "metrics.jsonl")[0]
                curves.setdefault(row.name, {})[str(seed)] = log
    return results, curves


def write(args: argparse.Namespace, folder: Path, page: str, means: dict) -> None:
    """Writes tables and curves to a folder, and keeps what was written by hand there."""
    folder.mkdir(parents=True, exist_ok=True)
    old = folder / "miniature.md"
    _, why, kept = (old.read_text() if old.is_file() else "").partition("\n## Why\n")
    data.write_atomically(folder / "miniature.md", page + why + kept)
    settings = {"seeds": args.seeds, **budget(args)}
    data.write_atomically(folder / "miniature.json", json.dumps({"settings": settings, "rows": means}, indent=1) + "\n")
    for row, name in ((FULL, "default"), (FAILED, FAILED.name)):
        log = trained(row, args.seeds[0], args) / "metrics.jsonl"
        if log.is_file():
            shutil.copy(log, folder / f"metrics-{name}.jsonl")


def budget(args: argparse.Namespace) -> dict:
    """All that decides the numbers, apart from the seeds."""
    found = {"steps": args.steps, "sft-steps": args.sft_steps, "limit": args.limit}
    for module, name in ((sft, "SFT"), (pagrpo, "RL")):
        preset = asdict(sft.parse_flags(module.Settings, module.PRESETS, ["--preset", "tiny"], ""))
        found |= {f"{name} {key}": value for key, value in preset.items() if key not in ("out", "preset")}
    return found


def check_budget(args: argparse.Namespace) -> None:
    """SystemExit, with the difference, if the folder holds rows of another budget."""
    file, now = args.out / "settings.json", json.loads(json.dumps(budget(args)))
    before = data.read_json(file) or now
    changed = [name for name, x in now.items() if before.get(name) != x]
    if changed:
        lines = [f"  --{name} was {before.get(name)!r}, is now {now[name]!r}" for name in changed]
        raise SystemExit("\n".join([f"{args.out} holds rows of another budget:", *lines, "Use another --out."]))
    args.out.mkdir(parents=True, exist_ok=True)
    data.write_atomically(file, json.dumps(now, indent=1) + "\n")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the runs [runs/miniature; --small: runs/miniature-small]")
    add("--seeds", type=int, nargs="+", help="weights, order and sampling [0 1 2; --small: 0]")
    add("--jobs", type=int, default=2, help="rows at a time, each with its share of the cores [2]")
    add("--steps", type=int, help="steps of RL [the preset's; --small: 3]")
    add("--sft-steps", type=int, help="steps of SFT [the preset's; --small: 60]")
    add("--limit", type=int, help="held-out clips, evenly spread [all; --small: 40]")
    add("--results", type=Path, help="folder of the tables [docs/results; --small: only --out]")
    add("--small", action="store_true", help="a trial of all rows with a few steps")
    args = parser.parse_args(argv)
    usual = dict(out=Path("runs/miniature"), seeds=[0, 1, 2], results=ROOT / "docs/results")
    usual |= dict(steps=0, sft_steps=0, limit=0)             # the presets', and all clips
    if args.small:
        usual = dict(out=Path("runs/miniature-small"), seeds=[0], results=None, steps=3, sft_steps=60, limit=40)
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out.resolve()
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    check_budget(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failures = run_all(args)
    results, curves = gather(args)
    steps, sft_steps = (getattr(args, name) or module.PRESETS["tiny"]["steps"]
                        for name, module in (("steps", pagrpo), ("sft_steps", sft)))
    page = tables.page(ROWS, JUDGES, FAILED, results, curves, args.seeds, steps, sft_steps)
    means = tables.means((*ROWS, *JUDGES, FAILED, SUFFICIENCY), results, curves)
    print(page)
    for folder in {args.out, args.results if args.results and not failures else args.out}:
        write(args, folder, page, means)
        print(f"Written: {folder}/miniature.md")
    if failures:
        sys.exit("\n".join([f"{len(failures)} rows failed; the tables are without them. The same command tries them "
                            "again:", *failures]))


if __name__ == "__main__":
    main()
