"""Evaluation: seven video benchmarks, the toy world, the paper's analyses, and single questions about any clip.

    python eval.py --bench toy                                   the newest finished run, on held-out toy clips
    torchrun --nproc_per_node=8 eval.py --bench all              the paper's Table 1, from data/BENCH as downloaded
    python eval.py --bench toy --mismatch                        does the answer follow from the reasoning?
    python eval.py --bench toy --model runs/tiny/sft --perception-from runs/tiny/pagrpo/eval/toy
    python eval.py --compare runs/tiny/sft/eval/toy runs/tiny/pagrpo/eval/toy
    python eval.py --report runs/tiny/pagrpo runs/tiny/grpo      a page with the curves of both, to open in a browser
    python eval.py --video clip.avi --question "Which letter comes right after the red O?" --options "red X" "blue T"

The seven are run as Video-R1 ran them (PROTOCOL), the others as the model was trained. MODEL/eval/BENCH holds
responses.jsonl and summary.json. The same command resumes, on any number of ranks. More: docs/evaluation.md.
"""
import ast
import hashlib
import json
import math
import re
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
from tqdm import tqdm

import data
import pagrpo
import rewards
import sft
from model import newest_checkpoint
from rewards import ends_on, mentions, strip_markup


# ------------------------------------------------------------------------------------------------ 1. reading answers

def answer_text(response: str, finished: bool = True) -> str | None:
    """The last <answer>, else what follows the last closed segment. None if the response was cut off before both."""
    if "<answer>" in response:
        return response.rsplit("<answer>", 1)[1].split("</answer>")[0]
    others = "|".join(tag for tag in rewards.TAGS if tag != "answer")
    rest = re.split(f"</(?:{others})>", response)[-1]
    return rest if finished and not re.search(f"<(?:{others})>", rest) else None


BEST = re.compile(r"\W{0,3}(?:is|was|seems) (?:(?:the|most|my) )*(?:best|correct|right|answer)\b", re.I)


def read_choice(text: str | None, options: Sequence[str], labels: Sequence[str] = ()) -> str | None:
    """The letter of the option that an answer names, None if it names none. `labels` are other names of the options.

    An exact letter or option text decides; otherwise the first of these that applies:
        1. a letter that begins the text, alone on its line or before punctuation: "B) a dog", "(D) F"
        2. the last "answer/option/choice is X" or "X is the best": "Answer: (A) C", "so option A is correct"
        3. the option whose text is named first: "It shows a dog. There is no cat."
        4. the last capital letter that stands alone: "It must be B"
    """
    plain = strip_markup(text or "")
    if exact := rewards.choice(plain, options):
        return exact
    found = [(option, match) for option, match in mentions(plain, options, labels) if option]
    letters = [(option, match) for option, match in found if match["letter"]]
    alone = [(option, match) for option, match in letters if plain[match.end():][:1] in ".):,;]\n"]
    first = [option for option, match in alone if match["first"] is not None]
    stated = [option for option, match in found if match["cue"] or BEST.match(plain, match.end())]
    texts = [option for option, match in found if match["text"]]
    capitals = [option for option, match in letters if match["letter"].isupper()]
    return next(iter(first + stated[-1:] + texts[:1] + capitals[-1:]), None)


def numbers(text: str, cue: str = r"=|\banswer is\b") -> list[Fraction]:
    """The numbers, in digits, behind the last cue, else all: "about 3.5 m" → [3.5], "4 m × 5 m = 20" → [20]."""
    text = strip_markup(text)
    behind = re.split(cue, text, flags=re.I)[-1]
    found = re.findall(rf"-?\d[\d,]*\.?\d*(?:e[-+]?\d+|/\d+)?(?:{rewards.MAGNITUDE})*",
                       behind if re.search(r"\d", behind) else text)
    values = [rewards.number(digits.rstrip(",.")) for digits in found]
    return [value for value in values if value is not None]


# ------------------------------------------------------------------------------------------------ 2. metrics

class Question(NamedTuple):
    """One question of a benchmark. `mean` selects by the first of its groups."""
    record: data.Record                                      # as the training prompt asks it
    metric: str                                              # task (as in training), choice, mra or open
    groups: dict[str, str]                                   # {"task": "action_count", …}
    direct: str = ""                                         # the official short-answer prompt
    labels: tuple[str, ...] = ()                             # its names of the options, if not A, B, C


def mean_relative_accuracy(predicted: float, wanted: float) -> float:
    """MRA (VSI-Bench): the share of the tolerances 50 %, 45 % … 5 % that the relative error is within; 5 for 4: 0.6."""
    if wanted == 0:
        return float(predicted == 0)
    return float(np.mean(abs(predicted - wanted) / abs(wanted) <= 1 - np.linspace(0.5, 0.95, 10)))


def open_answer(text: str, gold: str) -> float:
    """MMMU's lenient rule: an answer has the gold number to two decimals, names the gold letter, or the gold text."""
    given, hits = [round(x, 2) for x in numbers(text, r"\bis\b|\banswer\b|=|:(?!\d)")], []
    for wanted in gold.strip("[]").split(",") if gold.startswith("[") else [gold]:
        wanted = wanted.strip(" '\"")
        if re.fullmatch("[A-Z]", wanted):
            hits.append(read_choice(text, [""] * 26) == wanted)
        elif (value := rewards.number(wanted)) is not None:
            hits.append(round(value, 2) in given)
        else:
            hits.append(rewards.normalize_text(wanted) in rewards.normalize_text(strip_markup(text)))
    return float(any(hits))


def grade(question: Question, response: str, finished: bool = True) -> tuple[str | None, float]:
    """What was read from a response (None: nothing), and its score in [0, 1]."""
    r, text = question.record, answer_text(response, finished) or ""
    if question.metric == "task":                            # as in training: one well-formed <answer>, to the end
        answer = rewards.parse(response).contents["answer"]
        return answer, rewards.task_metric(r.problem_type, answer, r.reference, r.options) * finished
    if question.metric == "choice":
        letter = read_choice(text, r.options, question.labels)
        return letter, float(letter == r.reference)
    if question.metric == "open":
        return text.strip() or None, open_answer(text, r.reference)
    if not (found := numbers(text)):
        return None, 0.0
    value = float(max(-10 ** 15, min(found[0], 10 ** 15)))   # no float holds 1e400, and it is as wrong
    return f"{value:g}", mean_relative_accuracy(value, float(rewards.number(r.reference)))


# ------------------------------------------------------------------------------------------------ 3. numbers

ALL = ((1, None),)
HEADER = ["percent, with 95 % intervals", "n", "answer", "perception", "chance"]


def is_correct(row: dict) -> float:
    return float(row["score"] > 1 - 1e-9)


def mean(rows: list[dict], parts: Sequence[tuple] = ALL, value: Callable[[dict], float] = itemgetter("score")) -> dict:
    """An aggregate in percent, with its 95 % interval and what guessing among the options scores (chance).

    Each part is a weight and labels: the mean over rows whose first label is one of them (None: all) has that weight.
    Zeros and ones have Wilson's interval, others a bootstrap over clips: questions about one are not independent.
    """
    labels, masks, weights = [next(iter(r["groups"].values())) for r in rows], [], []
    for weight, names in parts:
        mask = np.isin(labels, names) if names else np.full(len(rows), True)
        if mask.any():
            masks.append(mask)
            weights.append(weight)
    if not masks:
        return {"value": None, "low": None, "high": None, "chance": None, "n": 0}
    used = np.any(masks, axis=0)
    rows, masks = [r for r, use in zip(rows, used) if use], np.array(masks, float)[:, used]   # (groups, rows)
    scores = np.array([value(r) for r in rows], float)
    guesses = [1 / len(r["options"]) if r["problem_type"] == "multiple choice" else 0 for r in rows]
    weights = np.array(weights) / sum(weights)
    level, chance = (float(weights @ (masks @ x / masks.sum(1))) for x in (scores, np.array(guesses)))
    if len(masks) == 1 and np.isin(scores, (0, 1)).all():
        low, high = pagrpo.wilson(level, len(rows))
    else:
        clips, of_row = np.unique([r["clip"] for r in rows], return_inverse=True)
        draws = np.random.default_rng(0).multinomial(len(clips), np.full(len(clips), 1 / len(clips)), size=2000)
        draws = draws[:, of_row].astype(float)               # (draws, rows): how often each row is drawn
        with np.errstate(invalid="ignore"):                  # a draw may miss a group
            means = (draws @ (masks * scores).T) / (draws @ masks.T) @ weights
        low, high = map(float, np.nanpercentile(means, [2.5, 97.5]))
    return {"value": 100 * level, "low": 100 * low, "high": 100 * high, "chance": 100 * chance, "n": len(rows)}


def summarise(name: str, rows: list[dict]) -> dict:
    """All numbers of a finished evaluation, as summary.json holds them."""
    bench, groups, perception = BENCHES[name], {}, itemgetter("perception")
    scored = [r for r in rows if "missing" not in r]
    judged = [r for r in scored if perception(r) is not None]
    for dimension in rows[0]["groups"]:
        groups[dimension] = {}
        for label in dict.fromkeys(r["groups"][dimension] for r in rows):
            answers = [r for r in scored if r["groups"][dimension] == label]
            claims = [r for r in answers if perception(r) is not None]
            groups[dimension][label] = mean(answers, value=bench.value) | {"perception": mean(claims, value=perception)}
    aggregates = {what: mean(scored, parts, bench.value) for what, parts in bench.aggregates.items()}
    if bench.value is is_correct:
        aggregates["mean of the task metrics"] = mean(scored)
    frames, pixels = [r["frames"] for r in scored] or [0], [math.prod(r["pixels"]) for r in scored] or [0]
    return {
        "bench": name, "questions": len(rows), "scored": len(scored),
        "missing": dict(Counter(r["missing"] for r in rows if "missing" in r).most_common()),
        "unread": sum(r["extracted"] is None for r in scored), "cut_off": sum(not r["finished"] for r in scored),
        "format": mean(scored, value=itemgetter("format")), "perception": mean(judged, value=perception),
        "frames": [min(frames), max(frames)], "pixels": [min(pixels), max(pixels)],
        "aggregates": aggregates, "groups": groups, "paper": bench.paper}


def cell(x: dict) -> str:
    return f"{x['value']:.1f} ({x['low']:.1f}–{x['high']:.1f})" if x["n"] else "–"


def cells(name: str, x: dict, perception: str = "") -> list[str]:
    return [name, str(x["n"]), cell(x), perception, f"{x['chance']:.1f}" if x["chance"] else "–"]


def report(s: dict) -> str:
    """A summary as text."""
    missing, lines = s["questions"] - s["scored"], [f"{s['bench']}: {s['scored']} questions scored"]
    if missing > 0.01 * s["questions"]:
        lines[0] += f"; INCOMPLETE: {missing} of {s['questions']} ({missing / s['questions']:.1%}) could not be asked"
    table = [HEADER] + [cells(name, x, cell(s["perception"])) for name, x in s["aggregates"].items()]
    for dimension, labels in s["groups"].items():
        table.append([f"by {dimension}", "", "", "", ""])
        table += [cells(f"  {label}", x, cell(x["perception"])) for label, x in labels.items()]
    frames, pixels = ("–".join(map(str, dict.fromkeys(s[name]))) for name in ("frames", "pixels"))
    lines += [*data.format_table(table),
              f"{frames} frames of {pixels} pixels. Responses that keep the template: {cell(s['format'])}.",
              f"Without a readable answer: {s['unread']} (wrong); cut off: {s['cut_off']}; not asked: {missing}."]
    lines += [f"  {n} × {reason}" for reason, n in [*s["missing"].items()][:3]]
    if s["paper"]:
        lines.append(f"Paper, {next(iter(s['aggregates']))}: Qwen2.5-VL-7B {s['paper'][0]}, VideoP2R {s['paper'][1]}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ 4. analyses

CHANGES = ("perception fixed", "reasoning fixed", "perception broken", "reasoning broken", "right by luck")


def mismatch(rows: list[dict]) -> str:
    """How often the answer is not the option that the reasoning ends on (multiple choice; paper, Table 6)."""
    rows, decidable = [r for r in rows if "missing" not in r and r["problem_type"] == "multiple choice"], []
    for r in rows:
        thought, answered = ends_on(r["think"] or "", r["options"]), read_choice(r["answer"], r["options"])
        if thought and answered:
            decidable.append(r | {"thought": thought, "answered": answered, "differ": float(thought != answered)})
    lines = [f"Reasoning and answer differ in {cell(mean(decidable, value=itemgetter('differ')))} percent of "
             f"{len(decidable)} multiple-choice responses (paper: Video-R1 21.5, VideoRFT 16.9, VideoP2R 7.5).",
             f"{len(rows) - len(decidable)} of {len(rows)} are not counted: reasoning or answer names no option."]
    lines += [f"  {r['id']}: reasoning {r['thought']}, answer {r['answered']}" for r in decidable if r["differ"]][:5]
    return "\n".join(lines)


def perception_from(questions: list[Question], args: Namespace) -> str:
    """The same questions with nothing, another run's observation, the video, or both (paper, Figure 4)."""
    observations = {key: row.get("observation") for key, row in read_rows(args.perception_from).items()}
    questions, bench = [q for q in questions if observations.get(q.record.problem_id)], BENCHES[args.bench]
    if not questions:
        raise ValueError(f"{args.perception_from} holds no observation on a question of {args.bench}")
    table = [["what the model gets, and percent", *HEADER[1:]]]
    for name in ("question", "question and observation", "video", "video and observation"):
        given = observations if "observation" in name else {}
        records = [asked_record(q, args, "question" in name, given.get(q.record.problem_id)) for q in questions]
        rows = run(questions, records, args, "" if name == "video" else name)
        scored = [r for r in rows if "missing" not in r]
        table.append(cells(name, mean(scored, next(iter(bench.aggregates.values())), bench.value)))
    return "\n".join([f"Is the observation enough? Those of {args.perception_from}:", *data.format_table(table)])


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of so many wins and losses if both were equally likely: McNemar's exact test."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2 ** n)


def change(a: dict, b: dict) -> str | None:
    """One of CHANGES, from one response to another, or None. Without a judge every change is one of reasoning."""
    gain, before, after = is_correct(b) - is_correct(a), a["perception"], b["perception"]
    if not gain:
        return "right by luck" if is_correct(b) and after is False else None
    by_perception = None not in (before, after) and after - before == gain
    return f"{'perception' if by_perception else 'reasoning'} {'fixed' if gain > 0 else 'broken'}"


def compare(first: str, second: str) -> str:
    """Two evaluations, question by question. Raises ValueError if they share no question, or a text differs."""
    a, b = read_rows(first), read_rows(second)
    pairs = [(a[key], b[key]) for key in a if key in b and "missing" not in a[key] | b[key]]
    texts, inputs = itemgetter("question", "reference", "options"), itemgetter("prompt", "frames", "pixels")
    if not pairs:
        raise ValueError(f"{first} ({len(a)} responses) and {second} ({len(b)}) have no question in common")
    if other := [x["id"] for x, y in pairs if texts(x) != texts(y)]:
        raise ValueError(f"{len(other)} questions have another text, such as {other[0]}")
    gains, changes = [y["score"] - x["score"] for x, y in pairs], [change(x, y) for x, y in pairs]
    wins, losses = sum(gain > 1e-9 for gain in gains), sum(gain < -1e-9 for gain in gains)
    table = [["", "answer right", "score"]]
    where = [["", *(f"{run_name}: answer {what}" for run_name in "AB" for what in ("right", "wrong"))],
             ["perception right"], ["perception wrong"], ["not judged"]]
    for name, rows in zip((f"A  {first}", f"B  {second}"), zip(*pairs)):
        table.append([name, cell(mean(rows, value=is_correct)), cell(mean(rows))])
        for line, perception in zip(where[1:], (True, False, None)):
            answers = [is_correct(r) for r in rows if r["perception"] is perception]
            line += [str(answers.count(1)), str(answers.count(0))]
    lines = [*data.format_table(table), f"{len(pairs)} questions are in both (A has {len(a)}, B {len(b)}). B wins "
             f"{wins} and loses {losses}: p = {sign_test(wins, losses):.2g} if neither is better (McNemar)."]
    if other := sum(inputs(x) != inputs(y) for x, y in pairs):
        lines.append(f"NOT comparable: {other} questions had another prompt, frames or pixels.")
    counts = ", ".join(f"{changes.count(name)} {name}" for name in CHANGES)
    lines += ["", *data.format_table(where), "", f"From A to B: {counts}"]
    for name in CHANGES:
        for x, y in [pair for pair, what in zip(pairs, changes) if what == name][:2]:
            lines += ["", f"── {name}: {x['id']} ".ljust(100, "─"), "  ".join([x["question"], *x["options"]]),
                      f"right: {x['reference']}", f"A  {x['response'].strip()}", f"B  {y['response'].strip()}"]
    return "\n".join(lines)


# ================================ a first reader may stop here ================================

# ------------------------------------------------------------------------------------------------ 5. running

load_model = lru_cache(maxsize=2)(data.load_local)           # several benchmarks, one model


def asked_record(question: Question, args: Namespace, blind: bool = False, given: str | None = None) -> data.Record:
    """The record that the model is asked: without its media if `blind`, with an observation if `given`."""
    r = replace(question.record, blind=blind, given=given, bounds=question.record.bounds if args.clips else None)
    return replace(r, question=question.direct, options=()) if args.direct else r


def prompt_hash(r: data.Record, settings: pagrpo.Settings) -> str:
    text = f"{settings.prompt}\n{data.instruction(r, settings)}{r.given or ''}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_row(question: Question, response: pagrpo.Response, settings: pagrpo.Settings, verdict) -> dict:
    """One line of responses.jsonl."""
    r, parsed, (steps, height, width) = response.example.record, response.parsed, response.example.grid or (0, 0, 0)
    extracted, score = grade(question, response.text, response.finished)
    last_only = r.given is not None or settings.template == "think"   # only the last segment is expected
    return {
        "id": r.problem_id, "clip": r.path, "groups": question.groups, "problem_type": r.problem_type,
        "question": question.record.question, "options": list(question.record.options), "reference": r.reference,
        "prompt": prompt_hash(r, settings), "frames": steps * 2 if r.data_type == "video" else steps,
        "pixels": [height * 14, width * 14], "response": response.text, "tokens": len(response.tokens),
        "finished": response.finished, **parsed.contents, **({"observation": r.given} if r.given else {}),
        "format": all(parsed.formats[-1:] if last_only else parsed.formats), "extracted": extracted, "score": score,
        "perception": verdict and verdict.sufficient, "judge": verdict and (verdict.error or verdict.explanation)}


def read_rows(place: str | Path) -> dict[str, dict]:
    """id → row of an evaluation's folder or file, an answer before a missing medium. ValueError for other files."""
    place, rows = Path(place), {}
    for file in sorted(place.glob("responses*.jsonl"), reverse=True) if place.is_dir() else [place]:
        for n, row in enumerate(rewards.read_jsonl(file)[0], start=1):
            answered = isinstance(row.get("score"), (int, float))
            if not ({"id", "clip", "groups"} <= row.keys() and (answered or "missing" in row)):
                raise ValueError(f"{file}, line {n}: not a response of an evaluation")
            if answered or "missing" in rows.get(row["id"], row):
                rows[row["id"]] = row
    return rows


def respond(pairs: list[tuple], folder: Path, judging: bool, args: Namespace) -> None:
    """Appends a row for each of this rank's (question, record) pairs to a file. ValueError if verdicts fail."""
    s, rank, judge, (vocabulary, model, device) = args.settings, args.world.rank, None, load_model(args.model)
    if judging:                                              # `reference`: --judge-model, else the model itself
        words, blind, _ = load_model(Path(s.judge == "reference" and s.judge_model or args.model))
        judge = data.make_judge(s, folder / f"judge-{rank}.jsonl", lambda claims: data.blind_answers(
            blind, words, claims, s, s.max_response, args.batch, device), device)
    out, records = rewards.Journal(folder / f"responses.{rank}.jsonl"), [r for _, r in pairs]
    examples = data.Examples(records, args.data, vocabulary, model.config, s, max_unreadable=1, teaching=False)
    batches = [range(i, min(i + args.batch, len(pairs))) for i in range(0, len(pairs), args.batch)]
    for batch, readable in zip(tqdm(batches, desc=args.bench, disable=rank > 0), examples.prefetch(batches)):
        groups = pagrpo.rollout(model, readable, vocabulary, s, "evaluation", 1, args.temperature, args.top_p)
        verdicts = pagrpo.start_judging(judge, groups)() if judge else [None] * len(groups)
        errors = [verdict.error for verdict in verdicts if verdict and verdict.error]
        if len(errors) > s.max_unknown * len(verdicts):
            raise ValueError(f"{len(errors)} of {len(verdicts)} verdicts stayed unknown, over --max-unknown. The same "
                             f"command goes on from here. {errors[0]:.200}")
        answers = zip(groups, verdicts, strict=True)
        for question, r, reason in [(*pairs[i], examples.skipped.get(i)) for i in batch]:
            if reason:
                out.add({"id": r.problem_id, "clip": r.path, "groups": question.groups, "missing": reason})
            else:
                (response,), verdict = next(answers)
                out.add(to_row(question, response, s, verdict))


def run(questions: list[Question], records: list[data.Record], args: Namespace, variant: str = "") -> list[dict]:
    """Runs or resumes an evaluation, in the folder of this prompt `variant`. Returns a row for each, on every rank."""
    s, world, judge = args.settings, args.world, "none" if variant else args.judge
    folder = args.out / f"{args.bench} {variant}".strip().replace(" ", "-")
    weights = [file.stat() for file in sorted(args.model.glob("*.safetensors"))]
    decisive = {"model": str(args.model.resolve()), "judge": judge,
                "weights": [f"{x.st_size} bytes of {int(x.st_mtime)}" for x in weights]}
    decisive |= {name: getattr(s, name) for name in (*INPUTS, "min_pixels", "refuse_leaks", "judge_model")}
    decisive |= {name: getattr(args, name) for name in ("bench", "temperature", "top_p", "direct", "clips")}
    world.on_rank0(lambda: data.check_settings(folder, decisive, data.default_settings(s), free=()))
    rows = read_rows(folder)
    done = {(row["id"], row.get("prompt"), row.get("reference")) for row in rows.values()}
    todo = [(q, r) for q, r in zip(questions, records) if (r.problem_id, prompt_hash(r, s), r.reference) not in done]

    def merge() -> None:
        rows = read_rows(folder)
        ordered = {r.problem_id: rows[r.problem_id] for r in records} | rows
        data.write_rows(folder / "responses.jsonl", ordered.values())
        for file in folder.glob("responses.*.jsonl"):
            file.unlink()

    world.barrier()                                          # all have read before any writes
    if todo:
        with data.lock_folder(folder) if world.first else nullcontext():
            respond(todo[world.rank::world.size], folder, judge != "none", args)
            world.barrier()
            world.on_rank0(merge)
        rows = read_rows(folder)
    return [rows[r.problem_id] for r in records]


# ------------------------------------------------------------------------------------------------ 6. benchmarks

def make_question(key: str, question: str, options: Sequence[str], answer: str, path: str, groups: dict,
                  direct: Sequence[str], metric: str = "choice", labels: Sequence[str] = (), **more) -> Question:
    """ValueError if it could not be scored. `direct`: lines of the short prompt; `metric`: of one without options."""
    options, reference, direct = tuple(str(o).strip() for o in options), str(answer).strip(), "\n".join(direct)
    metric = "choice" if options else metric
    rewards.check_letters(options, reference)
    if metric == "choice":
        reference = rewards.choice(reference, options)
    if reference is None or metric == "mra" and rewards.number(reference) is None:
        raise ValueError(f"the answer {answer!r} is no number, or none of the options {list(options)}")
    question, groups = str(question).strip(), {name: str(label) for name, label in groups.items()}
    (question + "".join(options) + direct).encode()          # a lone surrogate is a ValueError
    kind = {"choice": "multiple choice", "mra": "regression", "open": "free-form"}[metric]
    record = data.Record(str(key), question, options, kind, reference, path, "video", **more)
    return Question(record, metric, groups, direct, tuple(labels))


VSI_NUMERIC = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
VSI_DIRECTION = ("object_rel_direction_easy", "object_rel_direction_medium", "object_rel_direction_hard")
VSI_CHOICE = ("object_rel_distance", "route_planning", "obj_appearance_order")


# Each loader makes a Question of a row, or None to leave it out. part: key of its file in Bench.files; number: of the
# row, from 0; find(*paths): the first path that exists, else the first.

def toy(row, part, number, find):
    record = data.to_record(row, traces=False)
    return Question(record, "task", {"problem type": record.problem_type})


def vsibench(row, part, number, find):
    task, question, options = row["question_type"], row["question"], row["options"] or ()
    if task not in VSI_NUMERIC + VSI_CHOICE + VSI_DIRECTION:
        raise ValueError(f"unknown question_type {task!r}")
    lines = ["Please answer the question using a single word or phrase."]
    if options:                                              # they carry their letters
        lines = ["Options:", *options, "Answer with the option's letter from the given choices directly."]
    path, direct = find(f"{row['dataset']}/{row['scene_name']}.mp4"), ["These are frames of a video.", question, *lines]
    return make_question(row["id"], question, options, row["ground_truth"], path, {"task": task}, direct, "mra")


def videommmu(row, part, number, find):
    """Multiple choice where there are options: `question_type` is missing or null in places."""
    options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"] or ()
    question, last = row["question"], ["Please ignore the Quiz question in last frame of the video."]
    if part == "Adaptation":
        last, kind = [], "multi-choice" if options else "open-ended"
        question = ("You should watch and learn the video content. Then apply what you learned to answer the following "
                    f"{kind} question. The image for this question is at the end of the video.\n{question}")
    path = find(f"*/{row['id']}.mp4")                        # "*" stays for a video that is not there
    return make_question(f"{part}/{row['id']}", "\n".join([question, *last]), options, row["answer"], path,
                         {"track": part, "discipline": Path(path).parent.name},
                         [question, *rewards.letter_options(options), *last], "open")


def mmvu(row, part, number, find):
    if row["question_type"] != "multiple-choice":
        return None
    path, groups = find(row["video"].split("/resolve/main/")[-1]), {"subject": row["metadata"]["subject"]}
    direct = [f"Question: {row['question']}", *(f"{x}: {text}" for x, text in row["choices"].items()), "",
              "Do not generate any intermediate reasoning process. Answer directly with the option letter from the "
              "given choices."]
    return make_question(row["id"], row["question"], row["choices"].values(), row["answer"], path, groups, direct)


def vcrbench(row, part, number, find):
    """The options are inside the question, the first glued to it: cut there, they are shown once."""
    if str(row["multiple-choice"]).lower() != "true":
        return None
    options, question = list(row["choices"].values()), row["question"].strip()
    inside = re.search(r"\s*\(?A[.):]\s*" + re.escape(str(options[0])[:20]), question)
    shown = [] if inside else rewards.letter_options(options)
    direct = [question, *shown, "Answer with the letter of the correct option."]
    seconds = float(row.get("duration") or 0)
    duration = next((f"up to {limit} s" for limit in (60, 300) if seconds <= limit), "over 300 s")
    groups = {"dimension": row["dimension"], "duration": duration}
    return make_question(row["id"], question[:inside.start()] if inside else question, options, row["answer"],
                         f"v1/videos/{row['video_path']}", groups, direct)


# folder in the branch `main` (below video/: raw videos), folder in the branch `video` (clips), annotation files
MVBENCH = """\
star/Charades_v1_480 star/Charades_segment action_sequence action_prediction object_interaction
sta/sta_video sta/sta_video_segment action_localization
tvqa/frames_fps3_hq tvqa/video_fps3_hq_segment episodic_reasoning
ssv2_video ssv2_video_mp4 action_antonym
Moments_in_Time_Raw/videos Moments_in_Time_Raw/videos fine_grained_action
FunQA_test/test FunQA_test/test unexpected_action
clevrer/video_validation clevrer/video_validation object_existence moving_direction moving_count
clevrer/video_validation clevrer/video_validation moving_attribute counterfactual_inference
perception/videos perception/videos object_shuffle action_count state_change character_order
scene_qa/video scene_qa/video scene_transition
nturgbd nturgbd_convert fine_grained_pose
vlnqa vlnqa egocentric_navigation"""
MVBENCH_FOLDERS = {task: line.split()[:2] for line in MVBENCH.splitlines() for task in line.split()[2:]}


def mvbench(row, part, number, find):
    """Without the system line and the begun answer "Best option:(" of the official prompt."""
    (main, branch), name, options = MVBENCH_FOLDERS[part], row["video"], [o.strip() for o in row["candidates"]]
    path = find(f"video/{main}/{name}", f"{branch}/{name}", f"{branch}/{Path(name).with_suffix('.mp4')}",
                f"video/data0613/{main}/{name}")             # the last: videos that were added later
    bounds = (float(row["start"]), float(row["end"])) if "start" in row and path.startswith("video/") else None
    direct = [f"Question: {row['question']}", "Options:", *(f"({chr(65 + i)}) {o}" for i, o in enumerate(options)),
              "Only give the best option."]
    answer, rate = chr(65 + options.index(row["answer"].strip())), 3.0 if "frames_fps3" in path else 0.0
    return make_question(f"{part}/{number}", row["question"], options, answer, path, {"task": part}, direct,
                         bounds=bounds, rate=rate)


def tempcompass(row, part, number, find):
    """Options are lines of the question. In the training prompt yes/no and "Option 1" become choices between texts."""
    video, dimension, question = row["video_id"], row["dim"], row["question"]
    answer, text, options, labels, last = row["answer"], [], [], [], "Please directly give the best option:"
    for line in question.split("\n"):
        option = re.fullmatch(r"[\s*-]*(?:((?:Option|Caption|Sentence) \w)|[A-D])\s*[.:)]\s*(.+)", line)
        if part == "yes_no" or not option:
            text.append(line)
            continue
        if rewards.normalize_text(line) == rewards.normalize_text(answer):
            answer = chr(65 + len(options))
        options.append(option[2])
        labels += [option[1]] if option[1] else []
    if part == "yes_no":
        options, last = ["yes", "no"], "Please answer yes or no:"
    key = f"{part}/{video}/{dimension}/{hashlib.sha256(question.encode()).hexdigest()[:8]}"
    return make_question(key, "\n".join(text), options, answer, find(f"videos/{video}.mp4"),
                         {"format": part, "dimension": dimension}, [question, last], labels=labels)


def videomme(row, part, number, find):
    path = find(*(f"data/{row['videoID']}.{kind}" for kind in ("mp4", "MP4", "mkv")))
    groups = {"duration": row["duration"], "domain": row["domain"], "task": row["task_type"]}
    direct = ["Select the best answer to the following multiple-choice question based on the video. Respond with only "
              "the letter (A, B, C, or D) of the correct option.", row["question"], *row["options"],
              "The best answer is:"]
    return make_question(row["question_id"], row["question"], row["options"], row["answer"], path, groups, direct)


class Bench(NamedTuple):
    """A benchmark: where its questions lie, and how they are read, counted and averaged."""
    files: dict[str, str]                                    # part → pattern of its annotation files
    read: Callable[..., Question | None]
    expected: int                                            # number of questions
    repo: str = ""                                           # on huggingface.co/datasets
    size: str = ""
    gated: bool = False                                      # a form must be accepted first
    paper: tuple[float, ...] = ()                            # Qwen2.5-VL-7B, VideoP2R
    aggregates: dict[str, tuple] = {"all questions": ALL}    # see `mean`
    value: Callable[[dict], float] = itemgetter("score")


TRACKS, FORMATS = ("Perception", "Comprehension", "Adaptation"), ("multi-choice", "yes_no", "caption_matching")
BENCHES = {
    "toy": Bench({"heldout": "heldout.json"}, toy, 512, value=is_correct),
    "vsibench": Bench({"test": "test.jsonl"}, vsibench, 5130, "nyu-visionx/VSI-Bench", "5.7 GB", False, (30.1, 36.8), {
        "mean of multiple choice and MRA (paper)": ((1, VSI_CHOICE + VSI_DIRECTION), (1, VSI_NUMERIC)),
        "mean of eight tasks (official)": (*((1 / 3, (task,)) for task in VSI_DIRECTION),
                                           *((1, (task,)) for task in VSI_NUMERIC + VSI_CHOICE)),
        "multiple choice": ((1, VSI_CHOICE + VSI_DIRECTION),), "MRA": ((1, VSI_NUMERIC),), "all questions": ALL}),
    "videommmu": Bench({track: f"{track}/test-*.parquet" for track in TRACKS}, videommmu, 900, "lmms-lab/VideoMMMU",
                       "14 GB", True, (48.1, 55.0)),
    "mmvu": Bench({"validation": "validation.json"}, mmvu, 625, "yale-nlp/MMVU", "1.6 GB", False, (60.0, 65.4),
                  {"multiple choice of the validation split": ALL}),
    "vcrbench": Bench({"test": "v1/videos/meta_info_video.json"}, vcrbench, 510, "VLM-Reasoning/VCR-Bench",
                      "859 videos", False, (44.3, 51.0), {"multiple choice": ALL}),
    "mvbench": Bench({task: f"json/{task}.json" for task in MVBENCH_FOLDERS}, mvbench, 4000, "OpenGVLab/MVBench",
                     "16 GB", True, (59.0, 68.1)),
    "tempcompass": Bench({form: f"{form}/test-*.parquet" for form in FORMATS}, tempcompass, 5536,
                         "lmms-lab/TempCompass", "0.5 GB", False, (72.6, 74.5), {
        "closed formats, pooled": ALL, "mean of formats": tuple((1, (form,)) for form in FORMATS)}),
    "videomme": Bench({"test": "videomme/test-*.parquet"}, videomme, 2700,
                      "lmms-lab/Video-MME", "101 GB", False, (56.6, 60.0), {"all questions, without subtitles": ALL}),
}
SEVEN = [name for name in BENCHES if name != "toy"]


def read_annotations(file: Path) -> list[dict]:
    if file.suffix == ".parquet":
        import pyarrow.parquet
        return pyarrow.parquet.read_table(file).to_pylist()
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return list(json.loads(text))


def read_bench(name: str, root: Path) -> tuple[list[Question], list[str]]:
    """A benchmark's questions, and notes. ValueError if over 1 % are broken, or there are no media, with commands."""
    bench, questions, broken = BENCHES[name], [], []

    def find(*paths: str) -> str:
        found = (file for path in paths for file in (root.glob(path) if path.startswith("*") else [root / path]))
        return next((file.relative_to(root).as_posix() for file in found if file.exists()), paths[0])

    for part, pattern in bench.files.items():
        for file in sorted(root.glob(pattern)):
            try:
                rows = read_annotations(file)
            except (ValueError, TypeError, OSError, ImportError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from None
            for n, row in enumerate(rows, start=1):
                try:
                    questions.append(bench.read(row, part, n - 1, find))   # duplicates are kept
                except Exception as error:   # a damaged row can cause any
                    broken.append(f"{file}, question {n}: {type(error).__name__}: {error}")
    questions = [q for q in questions if q]
    if len(broken) > 0.01 * (len(questions) + len(broken)):
        raise ValueError(f"{broken[0]} (one of {len(broken)})")
    if not any((root / q.record.path).exists() for q in questions):
        form = f"\n  accept the form at https://huggingface.co/datasets/{bench.repo}, run `hf auth login`" * bench.gated
        what = "none of the media is" if questions else f"no file {next(iter(bench.files.values()))} is"
        raise ValueError(f"{name}: {what} under {root}. To fetch {bench.size}:{form}\n"
                         f"  hf download {bench.repo} --repo-type dataset --local-dir {root}\n"
                         f"  (cd {root} && find . -name '*.zip' -execdir unzip -qo {{}} \\;)")
    notes = [f"{len(questions)} questions in {root}"]
    notes += [f"NOT the benchmark's {bench.expected} questions"] * (len(questions) != bench.expected)
    return questions, notes + [f"LEFT OUT {len(broken)}: {x}" for x in broken[:1]]


# ------------------------------------------------------------------------------------------------ 7. command line

PROTOCOL = dict(frames=32, fps=2.0, max_pixels=256 * 28 * 28, max_response=1024)   # of Video-R1
INPUTS = (*PROTOCOL, "max_prompt", "prompt", "template", "seed")


def find_model(name: str | None) -> tuple[Path, Path, str]:
    """A model's folder, its newest checkpoint, and why it was chosen. Raises ValueError, with the command."""
    folder, why, finished = Path(name or sft.QWEN.format("7B")), "chosen by flag" if name else "no run is finished", []
    for state in [] if name else Path("runs").glob("*/*/step-*/state.json"):
        steps = sft.read_json(state.parents[1] / "settings.json").get("steps")
        if state.parent.name == f"step-{str(steps).zfill(6)}":
            finished.append((state.stat().st_mtime, state.parents[1]))
    if finished:
        folder, why = max(finished)[1], "the newest finished run"
    try:
        return folder, newest_checkpoint(folder), why
    except (OSError, ValueError) as error:
        hub = f"\n  hf download Qwen/{folder.name} --local-dir {folder}" * folder.name.startswith("Qwen2.5-VL")
        raise ValueError(f"{error} ({why}). `python pagrpo.py` makes a small model, --model names one.{hub}") from None


def find_settings(model: Path, args: Namespace) -> pagrpo.Settings:
    """The settings of a model's run, else a preset's; over them the protocol, then the flags."""
    file = next((f for f in (model / "settings.json", model.parent / "settings.json") if f.is_file()), None)
    saved = data.given_flags(Namespace(**sft.read_json(file))) if file else {}
    if file and not saved:
        raise ValueError(f"{file} is damaged")
    same = {k: v for k, v in saved.items() if k in data.default_settings(pagrpo.Settings) and not k.startswith("judge")}
    preset = pagrpo.PRESETS[args.preset or ("tiny" if saved.get("prompt") == "short" else "7b")]
    args.judge = args.judge or ("rule" if args.bench == "toy" else "none")
    names = {*INPUTS, *(f.name for f in fields(data.JudgeSettings))}
    own = {k: v for k, v in data.given_flags(args).items() if k in names and (k, v) != ("judge", "none")}
    own |= {"prompt": "direct"} if args.direct else {}
    return pagrpo.Settings(**preset | same | (PROTOCOL if args.bench in [*SEVEN, "all"] else {}) | own)


def evaluate(questions: list[Question], notes: list[str], args: Namespace) -> dict | None:
    """Runs one benchmark and prints its table. Returns its summary."""
    s, print0 = args.settings, args.world.print0
    if args.limit and args.limit < len(questions):
        notes = [*notes, f"ONLY {args.limit} of them, evenly spread"]
        questions = [questions[i * len(questions) // args.limit] for i in range(args.limit)]
    prompt = "official short-answer" if args.direct else f"template {s.template}, {s.prompt}"
    rate = f"{s.fps:g} frames a second, at most" if s.fps else "frames: always"
    print0(f"\n{args.bench}: {'; '.join(notes)}\n{rate} {s.frames}, of {s.max_pixels} pixels, "
           f"{'cut to their bounds' if args.clips else 'uncut'}; temperature {args.temperature:g}, top-p "
           f"{args.top_p:g};\n{s.max_response} tokens; {prompt} prompt; judge: {args.judge}.")
    if args.perception_from:
        return print0(perception_from(questions, args))
    rows = run(questions, [asked_record(q, args) for q in questions], args)
    summary = summarise(args.bench, rows) | {"model": str(args.model)}
    folder, differing = args.out / args.bench, mismatch(rows) + "\n" if args.mismatch else ""
    if args.world.first:
        data.write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    print0(f"\n{report(summary)}\n{differing}Responses and numbers: {folder}")
    return summary


def answer_one(args: Namespace) -> None:
    """Prints what the model sees of a clip or picture, and its response to --question. Raises MediaError."""
    clip, kind = Path(args.video).resolve(), args.problem_type or ("multiple choice" if args.options else "free-form")
    medium = "image" if clip.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") else "video"
    record = data.Record("", args.question, tuple(args.options), kind, "", clip.name, medium)
    vocabulary, model, _ = load_model(args.model)
    example = data.build_example(record, clip.parent, vocabulary, model.config, args.settings)
    steps, rows, columns = example.grid
    print(f"{clip.name}: {steps} grid steps of {example.seconds:.2f} s, {columns * 14}×{rows * 14} pixels, "
          f"{len(example.ids)} prompt tokens")
    sampling = "question", 1, args.temperature, args.top_p
    (response,), = pagrpo.rollout(model, [example], vocabulary, args.settings, *sampling)
    print(response.text + ("" if response.finished else f"\n(cut off after {len(response.tokens)} tokens)"))


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bench", choices=[*BENCHES, "all"], help="benchmark to run")
    add("--compare", nargs=2, metavar=("A", "B"), help="two evaluations, question by question")
    add("--report", nargs="+", metavar="RUN", help="write a run's report.html, a second run's curves laid over it")
    add("--video", help="ask --question about this video, picture or folder of frames")
    add("--question", help="the question about it")
    add("--options", nargs="+", default=[], help="its options, without letters, if it is multiple choice")
    add("--problem-type", choices=rewards.PROBLEM_TYPES, help="of the question [free-form, or multiple choice]")
    how = parser.add_argument_group("which model, and what it gets (default: as its run; benchmarks: as above)")
    how.add_argument("--model", help="model folder, or a stage's [the newest finished run, else the base model]")
    how.add_argument("--preset", choices=pagrpo.PRESETS, help="settings for a model from elsewhere [7b]")
    data.add_flags(how, pagrpo.Settings, {"benchmarks": PROTOCOL}, INPUTS)
    how.add_argument("--temperature", type=float, default=0.01, help="0 is greedy [0.01]")
    how.add_argument("--top-p", type=float, default=0.001, help="only the likeliest tokens up to this share [0.001]")
    add = parser.add_argument_group("for --bench").add_argument
    add("--data", help="folder of the benchmark [data/BENCH; toy: beside the model, made when missing]")
    add("--out", help="folder of results [eval/ in the model's folder]")
    add("--direct", action="store_true", help="the official short-answer prompt, not the training one")
    add("--clips", action="store_true", help="cut videos to the annotated bounds (MVBench)")
    add("--mismatch", action="store_true", help="how often the answer is not what the reasoning ends on")
    add("--perception-from", metavar="RUN", help="ask with and without the observations of this evaluation")
    add("--limit", type=int, default=0, help="only so many questions, evenly spread [0: all]")
    add("--batch", type=int, default=0, help="questions answered together [0: toy 128, else 8]")
    judges = parser.add_argument_group("judges of observations [toy: rule, else none]; reference: the model itself")
    data.add_flags(judges, data.JudgeSettings)
    args = parser.parse_args(argv)
    if [args.bench, args.compare, args.report, args.video].count(None) != 3 or args.video and not args.question \
            or len(args.report or ()) > 2:
        parser.error("give one of --bench NAME, --compare A B, --report RUN [RUN], --video FILE with --question TEXT")
    if args.bench == "all" and (args.data or args.perception_from):
        parser.error("--data and --perception-from belong to one benchmark, not to all")
    another_prompt = args.prompt or args.template or args.perception_from
    if args.prompt == "direct" or args.direct and (args.bench in (None, "toy") or another_prompt):
        parser.error("--direct is for the seven benchmarks, without --prompt, --template and --perception-from")
    if not (0 <= args.temperature < math.inf and 0 < args.top_p <= 1 and args.limit >= 0 and args.batch >= 0):
        parser.error("--temperature, --limit and --batch must be 0 or more, --top-p above 0 and at most 1")
    return args


def evaluate_all(args: Namespace) -> None:
    """Finds model and benchmarks, and runs them. Raises ValueError, at once if nothing can be run."""
    benches, lacking, summaries, everything = {}, [], [], args.bench == "all"
    for name in SEVEN if everything else {args.bench} & {*SEVEN}:
        try:
            root = Path(args.data or f"data/{name}")
            benches[name] = root, *read_bench(name, root)
        except ValueError as error:
            lacking.append(str(error))
    try:
        folder, args.model, why = find_model(args.model)
    except ValueError as error:
        raise ValueError("\n".join([str(error), *lacking])) from None
    args.settings, args.batch = find_settings(folder, args), args.batch or (128 if args.bench == "toy" else 8)
    args.out = Path(args.out or (args.model.parent if args.model.name.startswith("step-") else args.model) / "eval")
    args.world.print0(f"Model {args.model} ({why})")
    if args.video:
        return answer_one(args)
    if args.bench == "toy":                                  # beside the model; else runs/tiny's, made when missing
        places = [parent / "toy" for parent in args.model.resolve().parents] + [Path("runs/tiny/toy")]
        root = args.data or next((place for place in places if (place / "heldout.json").is_file()), None)
        root = root or args.world.on_rank0(lambda: data.make_toy(places[-1], {"heldout": BENCHES["toy"].expected}))
        benches["toy"] = Path(root), *read_bench("toy", Path(root))
    for args.bench, (args.data, questions, notes) in benches.items():
        summaries.append(evaluate(questions, notes, args))
    if everything and any(s["scored"] for s in summaries):   # the paper's Table 1
        summaries = [s for s in summaries if s["scored"]]
        head = [s["bench"] + "*" * (s["scored"] != BENCHES[s["bench"]].expected) for s in summaries]
        table = [["percent (* not the whole benchmark)", *head, "mean"]]
        for i, model in enumerate((folder.name, "Qwen2.5-VL-7B (paper)", "VideoP2R (paper)")):
            row = [(next(iter(s["aggregates"].values()))["value"], *s["paper"])[i] for s in summaries]
            table.append([model, *(f"{x:.1f}" for x in [*row, np.mean(row)])])
        args.world.print0("", *data.format_table(table), sep="\n")
    if lacking:
        lacking.insert(0, f"{len(lacking)} of {len(benches) + len(lacking)} benchmarks are missing or broken:")
        raise ValueError("\n".join(lacking))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.compare:
            return print(compare(*args.compare))
        if args.report:
            return print(sft.write_report(*args.report))
        args.world = sft.start_world(patience=timedelta(hours=12))   # ranks may be hours apart at the end
        evaluate_all(args)
        args.world.shutdown()
    except data.MediaError as error:
        sys.exit(f"{args.video}: {error}")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on from here." if args.bench else "Interrupted.")


if __name__ == "__main__":
    main()
