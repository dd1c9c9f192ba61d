"""The paper in miniature: its ablations and analyses on the toy world, over three seeds with one budget.

    python tests/miniature.py                    all rows, then docs/results/miniature.md, on two cores
    python tests/miniature.py --small            a few steps and clips, to try it in three minutes

A row of ROWS is one run of sft.py or pagrpo.py with the flags that stand there, evaluated by eval.py. All rows of a seed
share its clips, traces, base and SFT model. Nothing is tuned: every other setting is the preset's. The same command
resumes, row by row; a row that fails is named and the others go on. The section "## Why" of an existing miniature.md is
written by hand and is kept.
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
FAILED = Row("lr-x10",  "learning rate ten times too high",      None, "", f"--lr {10 * pagrpo.PRESETS['tiny']['lr']:g}")
SUFFICIENCY = "sufficiency"                                  # the paper's Figure 4, for each seed
DECODING = {"greedy": [], "sampled": ["--temperature", "1", "--top-p", "1"]}   # eval.py's own is the paper's


# ------------------------------------------------------------------------------------------------ commands

def training(row: Row, seed: int, args: argparse.Namespace, url: str = "") -> list[list[str]]:
    """The commands that train a row: none, SFT, RL, or both."""
    home, commands = args.out / f"seed{seed}", []
    own, world = home / "rows" / row.name, ["--preset", "tiny", "--media", str(home / "toy"), "--seed", str(seed)]
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
    home = args.out / f"seed{seed}"
    if row.rl is not None:
        chosen = sft.parse_flags(pagrpo.Settings, pagrpo.PRESETS, row.rl.split(), "").advantage
        return home / "rows" / row.name / pagrpo.STAGES[chosen]
    return home / "rows" / row.name / "sft" if row.sft else home / row.name


def evaluating(row: Row, seed: int, args: argparse.Namespace, how: str) -> list[str]:
    """The command that evaluates a row on the held-out clips."""
    home = args.out / f"seed{seed}"
    return ["eval.py", "--bench", "toy", "--data", str(home / "toy"), "--model", str(trained(row, seed, args)),
            "--preset", "tiny", "--seed", str(seed), "--out", str(home / "rows" / row.name / how),
            "--limit", str(args.limit), *DECODING[how]]


def asking(seed: int, args: argparse.Namespace, source: str) -> list[str]:
    """The command that asks the SFT model with and without the observations of the row `source`."""
    rows = args.out / f"seed{seed}" / "rows"
    command = evaluating(ROWS[1], seed, args, "greedy")
    command[command.index("--out") + 1] = str(rows / SUFFICIENCY / source)
    return [*command, "--perception-from", str(rows / source / "greedy" / "toy")]


# ------------------------------------------------------------------------------------------------ a judge that errs

PLACES = {"article": r"an?", "medium": r"\w+", "question": "(?P<question>.*)", "options": "(?P<options>(?:Option: .*\n)*)",
          "reference": "(?P<reference>.*)", "observation": '(?P<observation>".*")'}
ASKED = re.compile(re.sub(r"\\\{(\w+)\\\}", lambda place: PLACES[place[1]], re.escape(rewards.JUDGE_PROMPT)))


def read_claim(prompt: str) -> rewards.Claim:
    """The toy claim that a judge is asked about. The prompt does not name the problem type: the question tells it."""
    found = ASKED.fullmatch(prompt)
    options = tuple(re.findall("Option: (.*)\n", found["options"]))
    kind = next(k for k in rewards.PROBLEM_TYPES if rewards.read_toy(k, found["question"], options))
    return rewards.Claim(found["question"], options, kind, found["reference"], json.loads(found["observation"]))


def errs(claim: rewards.Claim, share: float) -> bool:
    """Does a judge that errs in this share of the claims err in this one? A claim decides it by its hash: the same claim
    always gets the same verdict, and a better judge errs in a part of the claims in which a worse one does."""
    return int(data.short_hash(list(claim)), 16) / 16 ** len(data.short_hash("")) < share


def erring_judge(share: float):
    """What a loopback server says: the rule judge's verdict, or its opposite."""
    def play(number: int, request: dict) -> str:
        claim = read_claim(text_of(request))
        (verdict,) = rewards.rule_judge([claim])
        sufficient = verdict.sufficient != errs(claim, share)
        return f"{verdict.explanation}. <judgement>{'Yes' if sufficient else 'No'}</judgement>"
    return play


# ------------------------------------------------------------------------------------------------ running

RUNNING, STOP = set(), threading.Event()


def call(command: list[str], log: Path, args: argparse.Namespace) -> None:
    """Runs a script of the project; its output goes to `log`. RuntimeError, with its last line, if it fails."""
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
        last = re.split(r"[\r\n]", log.read_text(errors="replace").strip())[-1]
        raise RuntimeError(f"{command[0]} ended with {code}: {last.strip()} ({log})")


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
    folder, began = args.out / f"seed{seed}" / "rows" / row.name, time.time()
    server, results = serving(erring_judge(row.error)) if row.error else nullcontext(), {}
    with server as running:
        for command in training(row, seed, args, running.url if row.error else ""):
            call(command, folder / "log.txt", args)
    for how in DECODING:
        call(evaluating(row, seed, args, how), folder / "log.txt", args)
        place = folder / how / "toy"
        results[f"answer, {how}"] = by_clip(place, evaluation.is_correct)
        if "think" not in (row.sft or ""):                   # without an observation there is no perception to count
            results[f"perception, {how}"] = by_clip(place, lambda r: r["perception"])
        results[f"mismatch, {how}"] = by_clip(place, differs)
    data.write_atomically(folder / "results.json", json.dumps(results | {"seconds": time.time() - began}) + "\n")


def run_sufficiency(seed: int, args: argparse.Namespace) -> None:
    """How well the SFT model answers from a text alone (the paper's Figure 4)."""
    rows, results, began = args.out / f"seed{seed}" / "rows", {}, time.time()
    for source in ("sft", "full"):
        if not any(by_clip(rows / source / "greedy/toy", lambda r: bool(r.get("observation"))).values()):
            continue                                         # eval.py refuses a run without any observation
        call(asking(seed, args, source), rows / SUFFICIENCY / "log.txt", args)
        for folder in (rows / SUFFICIENCY / source).glob("toy*"):
            results[f"{source}: {folder.name}"] = by_clip(folder, evaluation.is_correct)
    data.write_atomically(rows / SUFFICIENCY / "results.json",
                          json.dumps(results | {"seconds": time.time() - began}) + "\n")


def jobs(args: argparse.Namespace) -> list[tuple]:
    """(name, seed, work, names of the same seed's jobs that come first), in order."""
    plan = []
    one = args.seeds[:1]
    for rows, seeds in ((ROWS[1:2], args.seeds), (ROWS[:1] + ROWS[2:], args.seeds), (JUDGES, one), ((FAILED,), one)):
        for seed in seeds:
            for row in rows:
                first = [] if row.name == "sft" else ["sft"]
                plan.append((row.name, seed, lambda row=row, seed=seed: run_row(row, seed, args), first))
    for seed in args.seeds:
        plan.append((SUFFICIENCY, seed, lambda seed=seed: run_sufficiency(seed, args), ["sft", "full"]))
    return plan


def run_all(args: argparse.Namespace) -> list[str]:
    """Runs what is not finished, `--jobs` rows at a time. Returns what failed."""
    futures: dict[tuple, Future] = {}

    def work(name, seed, do, first):
        for before in first:
            if futures[before, seed].exception():
                raise RuntimeError(f"the row {before} that it needs failed")
        (args.out / f"seed{seed}" / "rows" / name).mkdir(parents=True, exist_ok=True)
        if not (args.out / f"seed{seed}" / "rows" / name / "results.json").is_file():
            do()

    failures, plan = [], jobs(args)
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, seed, do, first in plan:                   # in order: a job waits for earlier ones only
            futures[name, seed] = pool.submit(work, name, seed, do, first)
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
    known = {row.name: row for row in (*ROWS, *JUDGES, FAILED)}
    for name, seed, *_ in jobs(args):
        file = args.out / f"seed{seed}" / "rows" / name / "results.json"
        if not file.is_file():
            continue
        results.setdefault(name, {})[str(seed)] = sft.read_json(file)
        if name in known and known[name].rl is not None:
            log = trained(known[name], seed, args) / "metrics.jsonl"
            curves.setdefault(name, {})[str(seed)] = rewards.read_jsonl(log)[0]
    return results, curves


def markdown(args: argparse.Namespace, results: dict, curves: dict) -> str:
    """All tables."""
    full, ours, first = ROWS[-1], [row for row in ROWS if row.rl is not None and row.sft == ""], str(args.seeds[0])
    one_seed = {name: {first: x[first]} for name, x in results.items() if first in x}
    hours = sum(x.get("seconds", 0) for of_row in results.values() for x in of_row.values()) / 3600
    seeds = " ".join(map(str, args.seeds))
    steps = args.steps or pagrpo.PRESETS["tiny"]["steps"]
    sft_steps = args.sft_steps or sft.PRESETS["tiny"]["steps"]
    clips = len(next(iter(results.get("sft", {}).values()), {}).get(tables.ANSWER, {}))
    lines = [INTRODUCTION.format(seeds=seeds, steps=steps, sft_steps=sft_steps, clips=clips, hours=hours)]
    lines += ["## Table 2: what each part brings", "", *tables.ablations(ROWS, results)]
    lines += ["### Where it disagrees with the paper", "", *tables.disagreements(ROWS, results, [full, ROWS[1]]), ""]
    lines += [f"## Table 4: judges that err, seed {first}", "", ABOUT_JUDGES, "",
              *tables.judges([*JUDGES, full._replace(title="exact judge", paper=None)], one_seed, curves)]
    lines += ["## Figure 6c: groups without an advantage", "", ABOUT_COLLAPSE, "", *tables.collapse(ours, curves)]
    lines += ["## Table 6: does the answer follow from the reasoning?", "", ABOUT_MISMATCH, "",
              *tables.mismatch(ROWS, results)]
    lines += ["## Figure 4: is the observation enough?", "", ABOUT_SUFFICIENCY, "", *tables.sufficiency(results)]
    lines += [f"## A run that failed: {FAILED.title}", "", *tables.failed(FAILED, full, results, curves)]
    return "\n".join(lines)


INTRODUCTION = """\
# The paper in miniature

`python tests/miniature.py` wrote this file. Seeds {seeds}; {sft_steps} steps of SFT, {steps} steps of RL for each row, all
other settings those of the preset `tiny`; {clips} held-out clips; {hours:.1f} hours of processes in all. Percent of right
answers, greedy, as in the paper; *sampled* is temperature 1. Perception is right if the observation suffices for the
answer. A mean has two 95 % intervals: ± over clips (these models, other clips), then ± over seeds (other models; Student's
t, so with three seeds it is wide). *paper* is its mean of seven benchmarks with Qwen2.5-VL-7B: compare signs, not sizes.
"""
ABOUT_JUDGES = """\
A server on loopback judges in training: the exact verdict, turned round for that share of the claims, chosen by a hash of
the claim. Evaluation is by the exact judge. *agreement* is measured over all verdicts in training, also those that no
server is asked for (an empty observation, a bare answer). One seed: only intervals over clips."""
ABOUT_COLLAPSE = """\
Share of the groups of eight responses of which no token gets an advantage, over all steps (`zero_variance` in
metrics.jsonl). With one advantage per response that is a group whose rewards are all equal; with PA-GRPO, one whose
perception rewards are all equal and whose reasoning rewards are, too. The last two columns count each segment's reward by
itself, whether the row uses it or not. ± is over seeds."""
ABOUT_MISMATCH = """\
Multiple choice only, and only where both name an option. The paper: Video-R1 21.5, VideoRFT 16.9, VideoP2R 7.5."""
ABOUT_SUFFICIENCY = """\
The SFT model answers from a text, without or with the video. The paper asks plain Qwen2.5-VL-7B; here it is the SFT model,
which has learned to read an observation. A question counts if the other run has an observation for it."""
WHY = "\n## Why\n"


def write(args: argparse.Namespace, folder: Path, text: str, results: dict, curves: dict) -> None:
    """Writes Markdown, JSON and curves to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "miniature.md"
    _, why, kept = (page.read_text() if page.is_file() else "").partition(WHY)
    data.write_atomically(page, text + why + kept)
    means = {}
    for row in (*ROWS, *JUDGES, FAILED):
        keys = [key for key in next(iter(results.get(row.name, {}).values()), {}) if key != "seconds"]
        found = {key: tables.mean(tables.scores(results, row.name, key)) for key in keys}
        found["answer, greedy, less PA-GRPO"] = tables.mean(tables.scores(results, row.name, tables.ANSWER, "full"))
        means[row.name] = {"title": row.title, "paper": row.paper, "sft": row.sft, "rl": row.rl}
        means[row.name] |= {key: x and x.as_json() for key, x in found.items()}
        for key in ("zero_variance", "perception/zero_variance", "reasoning/zero_variance", "judge/agreement"):
            if x := tables.average(curves, row.name, key):
                means[row.name][key] = x.as_json()
    for key in next(iter(results.get(SUFFICIENCY, {}).values()), {}):
        if key != "seconds" and (x := tables.mean(tables.scores(results, SUFFICIENCY, key))):
            means.setdefault(SUFFICIENCY, {})[key] = x.as_json()
    settings = {"seeds": args.seeds, **budget(args)}
    data.write_atomically(folder / "miniature.json", json.dumps({"settings": settings, "rows": means}, indent=1) + "\n")
    for name, copy in (("full", "default"), (FAILED.name, FAILED.name)):
        row, seed = next(r for r in (*ROWS, FAILED) if r.name == name), args.seeds[0]
        log = trained(row, seed, args) / "metrics.jsonl"
        if log.is_file():
            shutil.copy(log, folder / f"metrics-{copy}.jsonl")


def budget(args: argparse.Namespace) -> dict:
    """All that decides the numbers, apart from the seeds."""
    found = {"steps": args.steps, "sft-steps": args.sft_steps, "limit": args.limit}
    for module, name in ((sft, "SFT"), (pagrpo, "RL")):
        preset = asdict(sft.parse_flags(module.Settings, module.PRESETS, ["--preset", "tiny"], ""))
        found |= {f"{name} {key}": value for key, value in preset.items() if key not in ("out", "preset")}
    return found


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
    usual = dict(out=Path("runs/miniature"), seeds=[0, 1, 2], results=ROOT / "docs/results", steps=0, sft_steps=0, limit=0)
    if args.small:
        usual = dict(out=Path("runs/miniature-small"), seeds=[0], results=None, steps=3, sft_steps=60, limit=40)
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out.resolve()
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    data.check_settings(args.out, budget(args), {}, free=())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failures = run_all(args)
    results, curves = gather(args)
    text = markdown(args, results, curves)
    write(args, args.out, text, results, curves)
    print(text)
    if failures:
        sys.exit("\n".join([f"{len(failures)} rows failed; tables without them are in {args.out}. The same command "
                            "tries them again:", *failures]))
    if args.results:
        write(args, args.results, text, results, curves)
    print(f"Tables: {args.results or args.out}/miniature.md")


if __name__ == "__main__":
    main()
