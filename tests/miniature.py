"""The paper in miniature: its ablations and analyses on the toy world, and what separate advantages bring when a model
reasons less surely.

    python tests/miniature.py                    what is not finished, then docs/results/miniature.md, on two cores
    python tests/miniature.py --small            a few steps and clips, to try it

A row is a run of sft.py or pagrpo.py with the flags that stand in its table, evaluated by eval.py. Each seed has its
own clips, traces, base and SFT model, which its rows share. No row is tuned: every other setting is the preset's.
Finished rows are kept in miniature.json; the same command goes on from there, on any day. A row that fails is named
and the others go on. The section "## Why" of an existing miniature.md is written by hand and is kept.
"""
import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, replace
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
    slips: float = 0.0                                       # share of SFT's traces that reason wrongly


ROWS = (
    Row("base",         "base, no SFT, no RL",                   52.9, None, None),
    Row("sft",          "SFT only",                              55.6, "", None),
    Row("rl-only",      "RL only, no SFT",                       56.0, None, ""),
    Row("think-sft",    "process-agnostic SFT, no RL",           53.5, "--template think", None),
    Row("grpo",         "GRPO: process-agnostic RL",             56.4, "", "--advantage grpo"),
    Row("no-reasoning", "without reasoning reward",              55.3, "", "--reward-off reasoning"),
    Row("no-length",    "without length reward",                 57.7, "", "--reward-off length"),
    Row("joint",        "joint: without separation",             57.4, "", "--advantage joint"),
    Row("gdpo",         "GDPO by segment",                       None, "", "--advantage gdpo"),
    Row("full",         "PA-GRPO",                               58.7, "", ""),
)
NAMED = {row.name: row for row in ROWS}
JUDGES = (  # on the first seed only; the paper's: Llama-3.1 8B, 70B, 405B and Claude 3.7 Sonnet
    Row("judge-18",     "judge that errs in 18 %",               57.4, "", "", 0.18),
    Row("judge-12",     "judge that errs in 12 %",               57.6, "", "", 0.12),
    Row("judge-9",      "judge that errs in 9 %",                58.0, "", "", 0.09),
    Row("judge-5",      "judge that errs in 5 %",                58.7, "", "", 0.05),
)
FAILED = Row("lr-x10", "ten times the learning rate", None, "", f"--lr {10 * pagrpo.PRESETS['tiny']['lr']:g}")
SUFFICIENCY = Row("sufficiency", "is the observation enough?", None, None, None)   # no training
DECODING = {"greedy": [], "sampled": ["--temperature", "1", "--top-p", "1"]}   # eval.py's own is the paper's
LEVELS = (0.15, 0.3, 0.45)                                   # of slips, on the first three seeds
COMPARED = ("sft", "full", "grpo", "joint")


def at_level(name: str, level: float) -> Row:
    """A row of the table above, with a share of slips in the traces of its SFT."""
    row = NAMED[name]
    return row._replace(name=f"{name}-slips-{100 * level:.0f}", paper=None, slips=level) if level else row


LADDER = {level: {name: at_level(name, level).name for name in COMPARED} for level in (0, *LEVELS)}


# ------------------------------------------------------------------------------------------------ commands

def home_of(row: Row, seed: int, args: argparse.Namespace) -> Path:
    """The folder with the SFT model that a row starts from; rows with equal slips share it."""
    return args.out / f"seed{seed}" / (f"slips-{100 * row.slips:.0f}" if row.slips else "")


def folder_of(row: Row, seed: int, args: argparse.Namespace) -> Path:
    return args.out / f"seed{seed}" / "rows" / row.name


def training(row: Row, seed: int, args: argparse.Namespace, url: str = "") -> list[list[str]]:
    """The commands that train a row. The first makes what the rows of a seed share, and ends at once where it is there;
    then the row's own SFT, its RL, both or neither."""
    first, home, own = args.out / f"seed{seed}", home_of(row, seed, args), folder_of(row, seed, args)
    world = ["--preset", "tiny", "--media", str(first / "toy"), "--seed", str(seed)]
    sft_steps, steps = (["--steps", str(n)] if n else [] for n in (args.sft_steps, args.steps))
    on_traces = [*world, "--model", str(first / "base"), "--heldout", str(first / "toy/heldout.json"), *sft_steps]
    commands = [["sft.py", "--preset", "tiny", "--out", str(first), "--seed", str(seed), *sft_steps]]
    if row.slips:
        commands.append(["sft.py", *on_traces, "--out", str(home), "--data", str(home / "traces.jsonl")])
    if row.sft:
        commands.append(["sft.py", *on_traces, "--out", str(own), "--data", str(first / "cot/traces.jsonl"),
                         *row.sft.split()])
    if row.rl is not None:
        start = first / "base" if row.sft is None else own / "sft" if row.sft else home / "sft"
        judge = ["--judge", url, "--judge-model", row.name] if row.error else []
        commands.append(["pagrpo.py", *world, "--out", str(own), "--model", str(start), "--data",
                         str(first / "toy/rl.json"), *row.rl.split(), *judge, *steps])
    return commands


def trained(row: Row, seed: int, args: argparse.Namespace) -> Path:
    """The folder of the model that a row ends in."""
    own, home = folder_of(row, seed, args), home_of(row, seed, args)
    if row.rl is not None:
        return own / pagrpo.STAGES[sft.parse_flags(pagrpo.Settings, pagrpo.PRESETS, row.rl.split(), "").advantage]
    return home / "base" if row.sft is None else own / "sft" if row.sft else home / "sft"


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


# ------------------------------------------------------------------------------------------------ reasoning that slips

def with_slips(records: list[data.Record], share: float, seed: int) -> list[dict]:
    """Traces of which a share reasons from other letters than those observed, to another answer. What is seen stays
    right: the SFT model sees nearly as well as without slips, and reasons less surely."""
    rows = []
    for r in records:
        rng, toy = random.Random(f"slip/{seed}/{r.problem_id}"), data.read_toy(r)
        if rng.random() < share:                             # a larger share slips in the same traces and in more
            letters = data.letters_in(r.trace["observation"])
            other = data.misread(toy, letters, r, data.THRESHOLD, rng)
            r = replace(r, trace=r.trace | {"think": data.toy_think(toy, other)}, reference=data.toy_answer(toy, other))
        rows.append(data.to_row(r))
    return rows


# ------------------------------------------------------------------------------------------------ running

RUNNING, STOP, LOCKS = set(), threading.Event(), defaultdict(threading.Lock)


def call(command: list[str], log: Path, args: argparse.Namespace) -> None:
    """Runs a script of the project; its output goes to `log`. RuntimeError, with its last lines, if it fails."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // args.jobs))
    if STOP.is_set():
        raise RuntimeError("stopped")
    log.parent.mkdir(parents=True, exist_ok=True)
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


def train(row: Row, seed: int, args: argparse.Namespace) -> None:
    own, home = folder_of(row, seed, args), home_of(row, seed, args)
    with serving(erring_judge(row.error)) if row.error else nullcontext() as server:
        for command in training(row, seed, args, server.url if server else ""):
            if str(home / "traces.jsonl") in command:
                records = data.read_records(args.out / f"seed{seed}" / "cot/traces.jsonl", traces=True)
                home.mkdir(exist_ok=True)
                data.write_rows(home / "traces.jsonl", with_slips(records, row.slips, seed))
            with nullcontext() if str(own) in command else LOCKS[seed]:      # one row makes what others share
                call(command, own / "log.txt", args)


def measured(folder: Path, value) -> list[float] | None:
    """[percent, number] of an evaluation's questions, without those that have no value (None)."""
    found = [value(row) for row in evaluation.read_rows(folder).values() if "missing" not in row]
    known = [float(x) for x in found if x is not None]
    return [100 * statistics.fmean(known), len(known)] if known else None


def differs(row: dict) -> bool | None:
    """Is the answer another option than the one that the reasoning ends on? None if either names none."""
    if row["problem_type"] != "multiple choice":
        return None
    thought = evaluation.ends_on(row["think"] or "", row["options"])
    answered = evaluation.read_choice(row["answer"], row["options"])
    return thought != answered if thought and answered else None


def surely(row: dict) -> bool | None:
    """Is the answer right, given an observation that suffices? None without one."""
    return evaluation.is_correct(row) if row.get("perception") else None


def run_row(row: Row, seed: int, args: argparse.Namespace) -> dict:
    """Trains and evaluates a row. Returns its measures: in percent, with the number behind them."""
    folder, results = folder_of(row, seed, args), {}
    train(row, seed, args)
    for how, flags in DECODING.items():
        call(evaluating(row, seed, args, folder / how, *flags), folder / "log.txt", args)
        measures = {"answer": evaluation.is_correct, "mismatch": differs}
        if "think" not in (row.sft or ""):                   # without an observation there is no perception to count
            measures |= {"perception": itemgetter("perception"), "answer given perception": surely}
        for name, value in measures.items():
            results[f"{name}, {how}"] = measured(folder / how / "toy", value)
    if row.rl is not None:
        results |= tables.of_steps(rewards.read_jsonl(trained(row, seed, args) / "metrics.jsonl"))
    return results


def run_sufficiency(seed: int, args: argparse.Namespace) -> dict:
    """The SFT model answers from its own observations, and from PA-GRPO's, without and with the video."""
    folder, start, results = folder_of(SUFFICIENCY, seed, args), NAMED["sft"], {}
    for row in (start, NAMED["full"]):
        train(row, seed, args)                               # its models, in a later sitting perhaps gone
        place, ways = folder_of(row, seed, args) / "greedy" / "toy", [[], ["--blind"]] if row is start else []
        call(evaluating(row, seed, args, place.parent), folder / "log.txt", args)
        if measured(place, lambda r: bool(r.get("observation")))[0]:         # eval.py refuses to go without
            ways += [["--given", str(place)], ["--blind", "--given", str(place)]]
        for flags in ways:
            call(evaluating(start, seed, args, folder / row.name, *flags), folder / "log.txt", args)
        for found in (folder / row.name).glob("toy*"):
            results[f"{row.name}: {found.name}"] = measured(found, evaluation.is_correct)
    return results


def jobs(args: argparse.Namespace) -> list[tuple[Row, int]]:
    """(row, seed) in order: the primary outcome first. SUFFICIENCY trains nothing, but has its place."""
    plan = [(NAMED[name], seed) for name in COMPARED for seed in args.seeds] + [(FAILED, args.seeds[0])]
    plan += [(at_level(name, level), seed) for name in COMPARED for level in LEVELS for seed in args.seeds[:3]]
    plan += [(row, seed) for row in (*ROWS, SUFFICIENCY) for seed in args.seeds if (row, seed) not in plan]
    return plan + [(row, args.seeds[0]) for row in JUDGES]


def run_all(args: argparse.Namespace, kept: dict) -> list[str]:
    """Runs what is not finished, `--jobs` rows at a time. Returns what failed."""
    plan = [(row, seed) for row, seed in jobs(args) if str(seed) not in kept["rows"].get(row.name, {})]
    failures = []

    def work(row: Row, seed: int) -> None:
        began = time.time()
        found = run_sufficiency(seed, args) if row is SUFFICIENCY else run_row(row, seed, args)
        with LOCKS["results"]:
            kept["rows"].setdefault(row.name, {})[str(seed)] = found | {"seconds": round(time.time() - began)}
            save(kept, args)

    with ThreadPoolExecutor(args.jobs) as pool:
        names = {pool.submit(work, row, seed): f"{row.name}, seed {seed}" for row, seed in plan}
        try:
            for future in tqdm(as_completed(names), total=len(plan), unit="row", smoothing=0):
                if error := future.exception():
                    failures.append(f"{names[future]}: {error}")
                    tqdm.write(f"FAILED {failures[-1]}")
        except KeyboardInterrupt:
            STOP.set()
            for process in list(RUNNING):
                process.terminate()                          # stops after its step, with a checkpoint
            pool.shutdown(cancel_futures=True)
            sys.exit("Stopped. The same command goes on from here.")
    return failures


# ------------------------------------------------------------------------------------------------ results

def save(kept: dict, args: argparse.Namespace) -> None:
    data.write_atomically(args.results / "miniature.json", json.dumps(kept, indent=1) + "\n")


def write(kept: dict, args: argparse.Namespace) -> None:
    """Writes tables, picture and curves, and keeps what was written by hand in the page."""
    for row, name in ((NAMED["full"], "default"), (FAILED, FAILED.name)):
        log = trained(row, args.seeds[0], args) / "metrics.jsonl"
        if log.is_file():
            shutil.copy(log, args.results / f"metrics-{name}.jsonl")
    page = tables.page(ROWS, JUDGES, FAILED, LADDER, kept["rows"], args.results)
    old = args.results / "miniature.md"
    _, why, by_hand = (old.read_text() if old.is_file() else "").partition("\n## Why\n")
    data.write_atomically(old, page + why + by_hand)
    data.write_atomically(args.results / "separation.svg", tables.picture(LADDER, kept["rows"]))
    print(f"{page}\nWritten: {old}")


def budget(args: argparse.Namespace) -> dict:
    """The settings that decide the numbers; not the seeds, the toy world's constants, the code."""
    found = {"steps": args.steps, "sft-steps": args.sft_steps, "limit": args.limit, "pre-training": sft.PRETRAINING}
    for module, name in ((sft, "SFT"), (pagrpo, "RL")):
        preset = asdict(sft.parse_flags(module.Settings, module.PRESETS, ["--preset", "tiny"], ""))
        found |= {f"{name} {key}": value for key, value in preset.items() if key not in ("out", "preset")}
    return json.loads(json.dumps(found))


def read_kept(args: argparse.Namespace) -> dict:
    """The finished rows. SystemExit, with the difference, if they are of another budget."""
    now, kept = budget(args), data.read_json(args.results / "miniature.json")
    before = kept.get("settings", now)
    changed = [f"  {name} was {before.get(name)!r}, is now {x!r}" for name, x in now.items() if before.get(name) != x]
    if changed:
        raise SystemExit("\n".join([f"{args.results} holds rows of another budget:", *changed,
                                    "Use another --results."]))
    return {"settings": now, "rows": kept.get("rows", {})}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the runs [runs/miniature; --small: runs/miniature-small]")
    add("--seeds", type=int, nargs="+", help="clips, weights, order and sampling [20 to 25; --small: 0]")
    add("--jobs", type=int, default=2, help="rows at a time, each with its share of the cores [2]")
    add("--results", type=Path, help="folder of finished rows and tables [docs/results; --small: --out]")
    add("--small", action="store_true", help="a trial of all rows: 3 steps of RL, 60 of SFT, 40 held-out clips")
    args = parser.parse_args(argv)
    args.steps, args.sft_steps, args.limit = (3, 60, 40) if args.small else (0, 0, 0)        # 0: the presets', all
    args.seeds = args.seeds or ([0] if args.small else [20, 21, 22, 23, 24, 25])
    args.out = (args.out or Path("runs/miniature-small" if args.small else "runs/miniature")).resolve()
    args.results = args.results or (args.out if args.small else ROOT / "docs/results")
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    kept = read_kept(args)
    args.results.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failures = run_all(args, kept)
    write(kept, args)
    if failures:
        sys.exit("\n".join([f"{len(failures)} rows failed; the tables are without them. The same command tries them "
                            "again:", *failures]))


if __name__ == "__main__":
    main()
