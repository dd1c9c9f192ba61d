"""Evaluation: seven video benchmarks, the toy world, the paper's analyses, and single questions about any clip.

    python eval.py --bench toy                                   the newest finished run, on held-out toy clips
    python eval.py --bench mvbench --model runs/7b/pagrpo        reads data/mvbench as it is downloaded
    torchrun --nproc_per_node=8 eval.py --bench all              the paper's Table 1
    python eval.py --bench toy --mismatch                        does the answer follow from the think?
    python eval.py --bench toy --model runs/tiny/sft --perception-from runs/tiny/pagrpo/eval/toy
    python eval.py --compare runs/tiny/sft/eval/toy runs/tiny/pagrpo/eval/toy
    python eval.py --video clip.avi --question "Which letter comes right after the red O?" --options "red X" "blue T"

Protocol of the seven, unless flags say otherwise (Video-R1's, to which the paper's numbers belong): 2 frames a second
but at most 32, always with the first and the last, of 256·28·28 pixels; temperature 0.01, top-p 0.001; 1,024 tokens;
the prompt of training. The toy world and --video keep the run's frames and pixels. Results are in MODEL/eval/BENCH:
responses.jsonl (a row a question), summary.json, settings.json. The same command resumes, on any number of ranks.
"""
import argparse
import ast
import csv
import hashlib
import json
import math
import re
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np
from tqdm import tqdm

import data
import pagrpo
import rewards
import sft
from model import newest_checkpoint


# ------------------------------------------------------------------------------------------------ 1. reading answers

def answer_text(response: str, finished: bool = True) -> str | None:
    """The last <answer>, else what follows the last closed segment, else everything. None if the response was cut off
    before an <answer>, or ends inside a segment."""
    if "<answer>" in response:
        return response.rsplit("<answer>", 1)[1].split("</answer>")[0]
    rest = response.rsplit("</observation>", 1)[-1].rsplit("</think>", 1)[-1]
    inside = "<observation>" in rest or "<think>" in rest
    return rest if finished and not inside else None


def strip_markup(text: str) -> str:
    """Text without Markdown, \\boxed{}, $ and LaTeX spaces. Every minus sign becomes a hyphen."""
    text = re.sub(r"\\[,;! ]", " ", text).replace("−", "-")
    text = re.sub(r"\\(?:boxed|text|mathrm|textbf)\{|[*$`}\\]", "", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


def option_names(options: Sequence[str], labels: Sequence[str] = ()) -> dict[str, str]:
    """Text, label ("option 2", and "2") or letter of an option → its letter; "" where two options share a text."""
    texts, names = rewards.option_texts(options), {}
    called = [*texts.items(), *zip(texts, labels), *((letter, label[-1]) for letter, label in zip(texts, labels))]
    for letter, name in called:
        name = rewards.normalize_text(strip_markup(name))
        names[name] = letter if names.get(name, letter) == letter else ""
    names.pop("", None)
    return names | {letter.lower(): letter for letter in texts}


VERBS = r"(?:is|was|because|since|as|fits|seems|would|or|and)\b"              # before these, A is a letter
CUE = re.compile(r"\b(?:answer|option|choice)(?:\W*:|\s+(?:is|(?:would|should) be)\b)(?:(?!-)\W|\bthe\b)*", re.I)
ENDORSED = re.compile(r"\W{0,3}(?:is|was|seems) (?:(?:the|most|my) )*(?:best|correct|right|answer)\b", re.I)


def mentions(text: str, names: dict[str, str]) -> list[tuple[str, re.Match]]:
    """(letter, match) of the options that a text mentions, in order. match.lastgroup is `text` (an option's), `capital`
    (a letter alone) or `short` ("b)"). Not the article A, the pronoun I, the A of "5 A", and what follows "not"."""
    long = sorted((re.escape(name) for name in names if len(name) > 1 or name.isdigit()), key=len, reverse=True)
    short = [re.escape(name) for name in names if len(name) == 1 and not name.isdigit()]
    pattern = (r"(?<![\w°-])(?<!\d[.,/])(?<![nN]ot )(?:(?i:option|choice|letter) \(?)?(?:"
               rf"(?P<text>(?i:{'|'.join(long) or '(?!)'}))|"
               rf"(?P<capital>(?<!\d )(?!A (?!{VERBS})[a-z])(?!I(?![.):]|\W*$))[{''.join(names.values()) or '-'}])|"
               rf"(?P<short>(?![AI])(?i:{'|'.join(short) or '(?!)'}))(?=[).,:;\]]|\W*$))(?!\w|['’-]\w|[.,/]\d)")
    return [(names.get(m[m.lastgroup].casefold(), ""), m) for m in re.finditer(pattern, text)]


def read_choice(text: str | None, options: Sequence[str], labels: Sequence[str] = ()) -> str | None:
    """The letter of the option that an answer names, None if it names none. `labels` are other names of the options.

    An exact letter or option text decides; otherwise the first of these that applies:
        1. a letter that begins the text, alone on its line or before punctuation: "B) a dog", "(D) F"
        2. the last "answer/option/choice is X" or "X is the best": "Answer: (A) C", "so option A is correct"
        3. the option whose text is named first: "It shows a dog. There is no cat."
        4. the last capital letter that stands alone: "It must be B"
    """
    plain, names = strip_markup(text or ""), option_names(options, labels)
    if exact := names.get(rewards.normalize_text(plain)):
        return exact
    found = [(letter, m) for letter, m in mentions(plain, names) if letter]
    cues = {cue.end() for cue in CUE.finditer(plain)}
    first = [x for x, m in found[:1] if m.lastgroup != "text" and not plain[:m.start()].strip("([\"'“‘")
             and plain[m.end():m.end() + 1] in ("", *".):,;]\n")]
    stated = [x for x, m in found if m.start() in cues or ENDORSED.match(plain, m.end())]
    texts = [x for x, m in found if m.lastgroup == "text"]
    capitals = [x for x, m in found if m.lastgroup == "capital"]
    return next(iter(first + stated[-1:] + texts[:1] + capitals[-1:]), None)


def ends_on(think: str, options: Sequence[str]) -> str | None:
    """The option that a think mentions last, None without one. In "C red T" the letter decides for both."""
    plain = strip_markup(think)
    found = mentions(plain, option_names(options))
    if len(found) > 1 and not plain[found[-2][1].end():found[-1][1].start()].strip(" .:)(\"'"):
        found.pop()
    return found[-1][0] or None if found else None


def first_number(text: str) -> Fraction | None:
    """The first number, in digits, behind the last "=" or "answer is": "about 3.5 m", "4 m × 5 m = 20"."""
    text = strip_markup(text)
    behind = re.split(r"=|\banswer is\b", text, flags=re.I)[-1]
    found = re.search(r"-?\d[\d,]*\.?\d*(?:e[-+]?\d+)?", behind if re.search(r"\d", behind) else text)
    return rewards.number(found[0].rstrip(",.")) if found else None


# ------------------------------------------------------------------------------------------------ 2. metrics

@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""
    record: data.Record                                      # as the training prompt asks it
    metric: str                                              # task (as in training), choice, mra or open
    groups: dict[str, str]                                   # {"task": "action_count", …}; `mean` selects by the first
    direct: str = ""                                         # the official short-answer prompt
    labels: tuple[str, ...] = ()                             # what that prompt calls its options, if not A, B, C


def mean_relative_accuracy(predicted: float, wanted: float) -> float:
    """MRA (VSI-Bench): the share of the ten tolerances 50 %, 45 % … 5 % within which the relative error lies.

    Bit for bit the official code, floats and all: 5 instead of 4 scores 0.6, and so does 10 instead of 8.
    """
    if wanted == 0:
        return float(predicted == 0)
    error = abs(predicted - wanted) / abs(wanted)
    return float(np.mean(error <= 1 - np.linspace(0.5, 0.95, 10)))


def open_answer(text: str, gold: str) -> float:
    """VideoMMMU's open questions, by MMMU's lenient rule: a number is right if any behind the last "is", "answer", "="
    or ":" is equal to two decimals, a text if the answer contains it, a letter if the answer names it."""
    text = strip_markup(text)
    behind = re.split(r"\bis\b|\banswer\b|=|:(?!\d)", text, flags=re.I)[-1]
    digits = re.findall(r"-?\d[\d,]*\.?\d*(?:/\d+)?", behind if re.search(r"\d", behind) else text)
    said = [round(x, 2) for x in map(rewards.number, digits) if x is not None]
    for one in gold.strip("[]").split(",") if gold.startswith("[") else [gold]:
        one = one.strip(" '\"")
        if re.fullmatch("[A-Z]", one):
            hit = read_choice(text, [""] * 26) == one
        elif (value := rewards.number(one)) is not None:
            hit = round(value, 2) in said
        else:
            hit = rewards.normalize_text(one) in rewards.normalize_text(text)
        if hit:
            return 1.0
    return 0.0


def grade(question: Question, response: str, answer: str | None, finished: bool) -> tuple[str | None, float]:
    """What was read from a response (None: nothing), and its score in [0, 1]. `task` is the reward of training: one
    well-formed <answer>, in a response that came to its end."""
    r = question.record
    if question.metric == "task":
        return answer, rewards.task_metric(r.problem_type, answer, r.reference, r.options) * finished
    text = answer_text(response, finished)
    if question.metric == "choice":
        letter = read_choice(text, r.options, question.labels)
        return letter, float(letter == r.reference)
    if text is None or not text.strip():
        return None, 0.0
    if question.metric == "open":
        return text.strip(), open_answer(text, r.reference)
    if (value := first_number(text)) is None:
        return None, 0.0
    value = float(max(-10 ** 15, min(value, 10 ** 15)))      # no float holds 1e400, and it is as wrong
    return f"{value:g}", mean_relative_accuracy(value, float(rewards.number(r.reference)))


# ------------------------------------------------------------------------------------------------ 3. numbers

ALL = ((None,),)


def is_correct(row: dict) -> float:
    return float(row["score"] > 1 - 1e-9)


def weighted_groups(rows: list[dict], parts: Sequence[tuple]) -> list[tuple[float, list[dict]]]:
    """The weight and the rows of each group in an aggregate: a mean over parts, each a mean over groups, each a mean
    over the rows with certain labels (None: all). ((("a",),), (("b",), ("c",))) weighs a by 1/2, b and c by 1/4."""
    filled = []
    for part in parts:
        groups = [[r for r in rows if labels is None or next(iter(r["groups"].values())) in labels] for labels in part]
        if groups := [group for group in groups if group]:
            filled.append(groups)
    return [(1 / len(filled) / len(groups), group) for groups in filled for group in groups]


def mean(rows: list[dict], parts: Sequence[tuple] = ALL, value: Callable[[dict], float] = itemgetter("score")) -> dict:
    """An aggregate in percent, with its 95 % interval and what guessing among the options scores (chance).

    A mean of zeros and ones has Wilson's interval. Anything else (MRA, ROUGE, means of means) gets a bootstrap over
    clips, each with all its questions: questions about one clip are not independent.
    """
    groups = weighted_groups(rows, parts)
    if not groups:
        return {"value": None, "low": None, "high": None, "chance": None, "n": 0}
    weights = np.array([weight for weight, _ in groups])
    clips = {clip: i for i, clip in enumerate(dict.fromkeys(r["clip"] for _, group in groups for r in group))}
    sums, chances, counts = np.zeros((3, len(clips), len(groups)))            # of each clip in each group
    for j, (_, group) in enumerate(groups):
        for r in group:
            place = clips[r["clip"]], j
            sums[place] += value(r)
            chances[place] += 1 / len(r["options"]) if r["problem_type"] == "multiple choice" else 0
            counts[place] += 1
    level, n = float(weights @ (sums.sum(0) / counts.sum(0))), int(counts.sum())
    if len(groups) == 1 and all(value(r) in (0, 1) for r in groups[0][1]):
        low, high = pagrpo.wilson(level, n)
    else:
        draws = np.random.default_rng(0).multinomial(len(clips), np.full(len(clips), 1 / len(clips)), size=2000)
        with np.errstate(invalid="ignore"):                  # a draw may miss a group
            means = (draws @ sums) / (draws @ counts) @ weights
        low, high = np.nanpercentile(means, [2.5, 97.5])
    return {"value": 100 * level, "low": 100 * float(low), "high": 100 * float(high),
            "chance": 100 * float(weights @ (chances.sum(0) / counts.sum(0))), "n": n}


def summarise(name: str, rows: list[dict]) -> dict:
    """All numbers of a finished evaluation, as summary.json holds them."""
    bench, scored = BENCHES[name], [r for r in rows if "missing" not in r]
    judged = [r for r in scored if r["perception"] is not None]
    groups = {}
    for dimension in rows[0]["groups"]:
        groups[dimension] = {}
        for label in dict.fromkeys(r["groups"][dimension] for r in rows):
            answers, looks = ([r for r in some if r["groups"][dimension] == label] for some in (scored, judged))
            groups[dimension][label] = mean(answers, value=bench.value) | {
                "perception": mean(looks, value=itemgetter("perception"))}
    aggregates = {what: mean(scored, parts, bench.value) for what, parts in bench.aggregates.items()}
    if bench.value is is_correct:
        aggregates["mean of the task metrics"] = mean(scored)
    frames, pixels = {r["frames"] for r in scored} or {0}, {math.prod(r["pixels"]) for r in scored} or {0}
    return {"bench": name, "questions": len(rows), "scored": len(scored),
            "missing": dict(Counter(r["missing"] for r in rows if "missing" in r).most_common()),
            "unread": sum(r["extracted"] is None for r in scored), "cut_off": sum(not r["finished"] for r in scored),
            "format": mean(scored, value=itemgetter("format")),
            "perception": mean(judged, value=itemgetter("perception")),
            "frames": [min(frames), max(frames)], "pixels": [min(pixels), max(pixels)], "aggregates": aggregates,
            "groups": groups, "paper": bench.paper}


def cell(x: dict) -> str:
    return f"{x['value']:.1f} ({x['low']:.1f}–{x['high']:.1f})" if x["n"] else "–"


def cells(name: str, x: dict, perception: str = "") -> list[str]:
    return [name, str(x["n"]), cell(x), perception, f"{x['chance']:.1f}" if x["chance"] else "–"]


HEADER = ["percent, with 95 % intervals", "n", "answer", "perception", "chance"]


def report(s: dict) -> str:
    """A summary as text."""
    lost, (dimension, labels) = s["questions"] - s["scored"], next(iter(s["groups"].items()))
    head = f"{s['bench']}: {s['scored']} questions scored"
    if lost > 0.01 * s["questions"]:
        head += (f"; INCOMPLETE: {lost} of {s['questions']} ({lost / s['questions']:.1%}) have no readable media or "
                 "too long a prompt, and are not in the score")
    if empty := [label for label, x in labels.items() if not x["n"]]:
        head += f"; {len(labels) - len(empty)} of {len(labels)} {dimension}s (without {', '.join(empty)})"
    table = [HEADER] + [cells(name, x, cell(s["perception"])) for name, x in s["aggregates"].items()]
    for dimension, labels in s["groups"].items():
        table.append([f"by {dimension}", "", "", "", ""])
        table += [cells(f"  {label}", x, cell(x["perception"])) for label, x in labels.items()]
    frames, pixels = ("–".join(str(x) for x in dict.fromkeys(s[name])) for name in ("frames", "pixels"))
    tail = [f"{frames} frames of {pixels} pixels. Responses that keep the template: {cell(s['format'])};",
            f"without a readable answer: {s['unread']} (they count as wrong); cut off at the token limit: "
            f"{s['cut_off']}; media missing or broken: {lost}."]
    tail += [f"  {n} × {reason}" for reason, n in [*s["missing"].items()][:3]]
    if s["paper"]:
        tail.append(f"Paper, {next(iter(s['aggregates']))}: Qwen2.5-VL-7B {s['paper'][0]}, VideoP2R {s['paper'][1]}")
    return "\n".join([head, *data.format_table(table), *tail])


# ------------------------------------------------------------------------------------------------ 4. analyses

def mismatch(rows: list[dict]) -> str:
    """How often the answer is another option than the one the think ends on, over multiple choice (paper, Table 6)."""
    rows = [r for r in rows if "missing" not in r and r["problem_type"] == "multiple choice"]
    told = []
    for r in rows:
        thought, said = ends_on(r["think"] or "", r["options"]), read_choice(r["answer"], r["options"])
        if thought and said:
            told.append(r | {"thought": thought, "said": said, "gold": rewards.choice(r["reference"], r["options"])})
    share = mean(told, value=lambda r: float(r["thought"] != r["said"]))
    off = [r for r in told if r["thought"] != r["said"]]
    return "\n".join([
        f"Think–answer mismatch: {cell(share)} percent of {len(told)} multiple-choice responses whose think names",
        f"an option (paper: Video-R1 21.5, VideoRFT 16.9, VideoP2R 7.5). {len(rows) - len(told)} of {len(rows)} cannot "
        "be told: think or answer is missing,",
        f"or names no option. Where they differ, the think was right {sum(r['thought'] == r['gold'] for r in off)} "
        f"times, the answer {sum(r['said'] == r['gold'] for r in off)} times.",
        *(f"  {r['id']}: thought {r['thought']}, said {r['said']}, right {r['gold']}: "
          f"… {' '.join(r['think'].split())[-70:]}" for r in off[:5])])


def perception_from(job: "Job", questions: list[Question]) -> str:
    """The same questions with nothing, another run's observation, the video, or both (paper, Figure 4)."""
    place = job.args.perception_from
    observations = {r["id"]: r["observation"] for r in read_rows(place) if isinstance(r.get("observation"), str)}
    questions = [q for q in questions if observations.get(q.record.problem_id)]
    if not questions:
        raise ValueError(f"{place} holds no observation on a question of {job.bench}")
    bench, table = BENCHES[job.bench], [["what the model gets, and percent", *HEADER[1:]]]
    for name, blind, given in (("question", True, None), ("question and observation", True, observations),
                               ("", False, None), ("video and observation", False, observations)):
        rows = [r for r in run(job._replace(variant=name, blind=blind, given=given), questions) if "missing" not in r]
        table.append(cells(name or "video", mean(rows, next(iter(bench.aggregates.values())), bench.value)))
    return "\n".join([f"{job.bench}: is the observation enough? Observations of {place}", *data.format_table(table),
                      "The question alone shows what can be guessed."])


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of so many wins and losses if both were equally likely: McNemar's exact test."""
    n, fewer = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2 ** n)


def matched(first: str, second: str) -> tuple[list[tuple[dict, dict]], list[str]]:
    """The questions that two evaluations share, and notes on how they differ. Raises ValueError."""
    a, b = ({r["id"]: r for r in read_rows(place) if "missing" not in r} for place in (first, second))
    pairs, notes = [(a[key], b[key]) for key in a if key in b], []
    if not pairs:
        raise ValueError(f"{first} and {second} have no question in common")

    def differing(*names: str) -> list[str]:
        return [x["id"] for x, y in pairs if any(x[name] != y[name] for name in names)]
    if other := differing("question", "reference", "options"):
        raise ValueError(f"{len(other)} questions have the same name but another text, for example {other[0]}")
    if other := differing("prompt", "frames", "pixels"):
        notes.append(f"NOT comparable: {len(other)} questions were put with another prompt, frames or pixels.")
    if len(pairs) < max(len(a), len(b)):
        notes.append(f"Only the {len(pairs)} questions that both have are compared (A has {len(a)}, B {len(b)}).")
    return pairs, notes


def perception_or_reasoning(pairs: list[tuple[dict, dict]]) -> list[str]:
    """Perception right or wrong × answer right or wrong, for both runs."""
    judged = [pair for pair in pairs if None not in (pair[0]["perception"], pair[1]["perception"])]
    if not judged:
        return ["The observations were not judged (--judge): every change counts as one of reasoning."]
    table = [["", "A: answer right", "A: answer wrong", "B: answer right", "B: answer wrong"]]
    for what, perception in (("right", True), ("wrong", False)):
        table.append([f"perception {what}"])
        for rows in zip(*judged):
            answers = [is_correct(r) for r in rows if r["perception"] == perception]
            table[-1] += [str(answers.count(1)), str(answers.count(0))]
    return ["Where does it go wrong, in perception or in reasoning? Perception is right when the observation suffices; "
            "a right", "answer after a wrong perception is luck.", *data.format_table(table)]


def change(a: dict, b: dict) -> str | None:
    """What changed from one response to another. Without a judge every change counts as one of reasoning."""
    gain, before, after = is_correct(b) - is_correct(a), a["perception"], b["perception"]
    if not gain:
        return "right by luck" if is_correct(b) and after is False else None
    by_perception = None not in (before, after) and after - before == gain
    return f"{'perception' if by_perception else 'reasoning'} {'fixed' if gain > 0 else 'broken'}"


CHANGES = ("perception fixed", "reasoning fixed", "perception broken", "reasoning broken", "right by luck")


def change_examples(pairs: list[tuple[dict, dict]], of_each: int = 2) -> list[str]:
    """How often each change happened, and its shortest examples."""
    kinds = {name: [pair for pair in pairs if change(*pair) == name] for name in CHANGES}
    lines = ["From A to B: " + ", ".join(f"{len(some)} {name}" for name, some in kinds.items())]
    for name, some in kinds.items():
        some.sort(key=lambda pair: len(pair[0]["response"]) + len(pair[1]["response"]))
        for a, b in some[:of_each]:
            lines += ["", f"── {name}: {a['id']} ".ljust(100, "─"),
                      f"{a['question']}  {'  '.join(a['options'])}".rstrip(), f"right: {a['reference']}"]
            for run_name, r in (("A", a), ("B", b)):
                parts = [f"{part}: {r[part]}" for part in ("observation", "think", "answer") if r[part]]
                lines.append(f"{run_name}  " + ("  ".join(parts) or r["response"].strip()))
    return lines


def compare(first: str, second: str) -> str:
    """Two evaluations, question by question."""
    pairs, notes = matched(first, second)
    wins = sum(b["score"] > a["score"] + 1e-9 for a, b in pairs)
    losses = sum(a["score"] > b["score"] + 1e-9 for a, b in pairs)
    table = [["", "n", "answer right", "score"]]
    for name, rows in zip((f"A  {first}", f"B  {second}"), zip(*pairs)):
        table.append([name, str(len(rows)), cell(mean(rows, value=is_correct)), cell(mean(rows))])
    return "\n".join([*data.format_table(table), *notes, f"B wins {wins} questions and loses {losses}, "
                      f"{len(pairs) - wins - losses} are even: p = {sign_test(wins, losses):.2g} if neither were "
                      "better (McNemar's exact test).", "", *perception_or_reasoning(pairs), "",
                      *change_examples(pairs)])


# ---------------------------------------- a first reader may stop here: below stand running, benchmarks, command line


# ------------------------------------------------------------------------------------------------ 5. running

class Job(NamedTuple):
    """One evaluation: a benchmark, a model, and what it gets of a question."""
    bench: str
    root: Path                                               # of the benchmark's files
    model: Path
    settings: pagrpo.Settings
    args: argparse.Namespace
    world: sft.World
    variant: str = ""                                        # names the folder of a prompt variant
    blind: bool = False                                      # no video
    given: dict[str, str] | None = None                      # problem_id → observation that is part of the prompt


def variant_record(job: Job, question: Question) -> data.Record:
    """The record that the model is asked. In a direct prompt, a given observation becomes part of the question."""
    r, given = question.record, job.given and job.given[question.record.problem_id]
    if job.args.direct:
        text = f"Observation: {given}\n{question.direct}" if given else question.direct
        r, given = replace(r, question=text, options=()), None
    return replace(r, blind=job.blind, given=given, bounds=r.bounds if job.args.clips else None)


def to_row(question: Question, response: pagrpo.Response, settings: pagrpo.Settings, verdict) -> dict:
    """One line of responses.jsonl: what was asked, what the model saw and said, and its score."""
    example, r, parsed = response.example, response.example.record, response.parsed
    observed = r.given is not None or settings.template == "think"            # then only the last segment is expected
    extracted, value = grade(question, response.text, parsed.contents["answer"], response.finished)
    prompt = hashlib.sha256(f"{settings.prompt}\n{data.instruction(r, settings)}".encode()).hexdigest()[:16]
    steps, height, width = example.grid or (0, 0, 0)
    return {"id": r.problem_id, "clip": r.path, "groups": question.groups, "metric": question.metric,
            "problem_type": r.problem_type, "question": question.record.question,
            "options": list(question.record.options), "reference": r.reference, "prompt": prompt,
            "prompt_tokens": len(example.ids), "frames": steps * 2 if r.data_type == "video" else steps,
            "pixels": [height * 14, width * 14], "response": response.text, "tokens": len(response.tokens),
            "finished": response.finished, **parsed.contents, **({"observation": r.given} if r.given else {}),
            "format": all(parsed.formats[-1:] if observed else parsed.formats), "extracted": extracted, "score": value,
            "perception": verdict and verdict.sufficient, "judge": verdict and (verdict.error or verdict.explanation)}


def read_rows(place: str | Path) -> list[dict]:
    """The rows of an evaluation's folder or responses.jsonl. Raises ValueError if there are none, or others."""
    file = Path(place) / "responses.jsonl" if Path(place).is_dir() else Path(place)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; an evaluation writes it (--bench)")
    rows, _ = rewards.read_jsonl(file)
    for n, row in enumerate(rows, start=1):
        answered = isinstance(row.get("score"), (int, float)) and {"question", "response", "perception"} <= row.keys()
        if not ({"id", "clip", "groups"} <= row.keys() and (answered or "missing" in row)):
            raise ValueError(f"{file}, line {n}: not a response of an evaluation")
    return rows


def recorded(folder: Path) -> dict[str, dict]:
    """id → row of all that an evaluation has so far. An answer counts before a missing medium, new rows before old."""
    rows = [row for file in sorted(folder.glob("responses*.jsonl"), reverse=True) for row in read_rows(file)]
    return {row["id"]: row for row in sorted(rows, key=lambda row: "missing" not in row)}


load_model = lru_cache(maxsize=2)(data.load_local)           # several benchmarks, one model


def respond(job: Job, questions: list[Question], folder: Path) -> None:
    """Answers this rank's questions and appends each row to a file at once. Raises ValueError without verdicts."""
    s, args, judge, (vocabulary, model, device) = job.settings, job.args, None, load_model(job.model)
    if args.judge != "none" and job.given is None:           # `reference`: --judge-model, else the model itself
        words, blind, _ = load_model(Path(s.judge == "reference" and s.judge_model or job.model))
        judge = data.make_judge(s, folder / f"judge-{job.world.rank}.jsonl", lambda claims: data.blind_answers(
            blind, words, claims, s, s.max_response, args.batch, device), device)
    by_id = {q.record.problem_id: q for q in questions}
    out = rewards.Journal(folder / f"responses.{job.world.rank}.jsonl")
    examples = data.Examples([variant_record(job, q) for q in questions], job.root, vocabulary, model.config,
                             s, max_unreadable=1, teaching=False)
    batches = [range(i, min(i + args.batch, len(questions))) for i in range(0, len(questions), args.batch)]
    bar = tqdm(total=len(questions), desc=f"{job.bench} {job.variant}", unit="question", disable=not job.world.first)
    for batch, readable in zip(batches, examples.prefetch(batches)):
        for i in examples.skipped.keys() & set(batch):
            r = questions[i].record
            out.add({"id": r.problem_id, "clip": r.path, "groups": questions[i].groups, "missing": examples.skipped[i]})
        groups = pagrpo.rollout(model, readable, vocabulary, s, "evaluation", 1, args.temperature, args.top_p)
        verdicts = pagrpo.start_judging(judge, groups)() if judge else [[None]] * len(groups)
        errors = [verdict.error for verdict, in verdicts if verdict and verdict.error]
        if len(errors) > s.max_unknown * len(verdicts):
            raise ValueError(f"{len(errors)} of {len(verdicts)} verdicts stayed unknown, more than --max-unknown "
                             f"{s.max_unknown:g} allows: {errors[0]:.200}. The same command goes on from here.")
        for (response,), (verdict,) in zip(groups, verdicts):
            out.add(to_row(by_id[response.example.record.problem_id], response, s, verdict))
        bar.update(len(batch))
    bar.close()


def run(job: Job, questions: list[Question]) -> list[dict]:
    """Runs or resumes an evaluation. Returns its rows in the benchmark's order, on every rank."""
    args, world = job.args, job.world
    folder = args.out / f"{job.bench} {job.variant}".strip().replace(" ", "-")
    if world.first:
        stats = [file.stat() for file in sorted(job.model.glob("*.safetensors"))]
        given = hashlib.sha256(json.dumps(job.given, sort_keys=True).encode()).hexdigest()[:16]
        deciding = (*INPUTS, "min_pixels", "refuse_leaks", "judge_model")
        data.check_settings(folder, {name: getattr(job.settings, name) for name in deciding} | {
            "bench": job.bench, "model": str(job.model.resolve()), "temperature": args.temperature, "top_p": args.top_p,
            "weights": [f"{x.st_size} bytes of {int(x.st_mtime)}" for x in stats],
            "direct": args.direct, "clips": args.clips, "judge": args.judge,
            "observations": given if job.given else ""}, data.default_settings(job.settings), free=())
    done, todo = recorded(folder), []
    for q in questions:                                      # new ones, those without media, and those reworded since
        row, asked = done.get(q.record.problem_id, {}), (q.record.question, list(q.record.options), q.record.reference)
        if (row.get("question"), row.get("options"), row.get("reference")) != asked:
            todo.append(q)
    world.barrier()                                          # all have read before any writes
    if todo:
        with data.lock_folder(folder) if world.first else nullcontext():
            clips = {clip: n for n, clip in enumerate(dict.fromkeys(q.record.path for q in todo))}
            mine = [q for q in todo if clips[q.record.path] % world.size == world.rank]   # one rank reads a clip
            respond(job, mine, folder)
            world.barrier()
            done = recorded(folder)
            world.barrier()
            if world.first:                                  # in the benchmark's order, then what was asked before
                order = {q.record.problem_id: done[q.record.problem_id] for q in questions}
                data.write_rows(folder / "responses.jsonl", (order | done).values())
                for file in folder.glob("responses.*.jsonl"):
                    file.unlink()
            world.barrier()
    return [done[q.record.problem_id] for q in questions]


# ------------------------------------------------------------------------------------------------ 6. benchmarks

def make_question(key: str, question: str, options: Sequence[str], answer: str, path: str, groups: dict,
                  direct: Sequence[str], metric: str = "choice", labels: Sequence[str] = (), **more) -> Question:
    """Checks and builds a question. `direct` are the lines of the short-answer prompt, `metric` is for one without
    options. Raises ValueError for a question that could not be scored."""
    options, reference, direct = tuple(str(o).strip() for o in options), str(answer).strip(), "\n".join(direct)
    metric = "choice" if options else metric
    if metric == "choice" and (reference := rewards.choice(reference, options)) is None:
        raise ValueError(f"the answer {answer!r} is none of the options {list(options)}")
    if metric == "mra" and rewards.number(reference) is None:
        raise ValueError(f"the answer {answer!r} is no number")
    question, groups = str(question).strip(), {name: str(label) for name, label in groups.items()}
    (question + "".join(options) + direct).encode()          # a lone surrogate is a ValueError
    kind = {"choice": "multiple choice", "mra": "regression", "open": "free-form"}[metric]
    record = data.Record(str(key), question, options, kind, reference, path, "video", **more)
    return Question(record, metric, groups, direct, tuple(labels))


def toy(row: dict, part: str, keys: tuple, find: Callable) -> Question:
    record = data.to_record(row, traces=False)
    return Question(record, "task", {"problem type": record.problem_type})


VSI_NUMERIC = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
VSI_DIRECTION = ("object_rel_direction_easy", "object_rel_direction_medium", "object_rel_direction_hard")
VSI_CHOICE = ("object_rel_distance", "route_planning", "obj_appearance_order")


def vsibench(row: dict, part: str, keys: tuple, find: Callable) -> Question:
    if row["question_type"] not in VSI_NUMERIC + VSI_CHOICE + VSI_DIRECTION:
        raise ValueError(f"unknown question_type {row['question_type']!r}")
    lines = ["Please answer the question using a single word or phrase."]
    if options := row["options"] or ():                      # they carry their letters
        lines = ["Options:", *options, "Answer with the option's letter from the given choices directly."]
    return make_question(row["id"], row["question"], options, row["ground_truth"],
                         find(f"{row['dataset']}/{row['scene_name']}.mp4"), {"task": row["question_type"]},
                         ["These are frames of a video.", row["question"], *lines], metric="mra")


def videommmu(row: dict, part: str, keys: tuple, find: Callable) -> Question:
    """Multiple choice where there are options: `question_type` is missing or null in places."""
    options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"] or ()
    question, ignore = row["question"], "Please ignore the Quiz question in last frame of the video."
    direct, path = [question, *rewards.letter_options(options), ignore], find(f"*/{row['id']}.mp4")
    question += f"\n{ignore}"
    if part == "Adaptation":                                 # these sentences belong to the question in any prompt
        question = ("You should watch and learn the video content. Then apply what you learned to answer the following "
                    f"{'multi-choice' if options else 'open-ended'} question. The image for this question is at the "
                    f"end of the video.\n{row['question']}")
        direct = [question, *rewards.letter_options(options)]
    groups = {"track": part, "discipline": Path(path).parent.name}            # "*" for a video that is not there
    return make_question(f"{part}/{row['id']}", question, options, row["answer"], path, groups, direct, metric="open")


def mmvu(row: dict, part: str, keys: tuple, find: Callable) -> Question | None:
    if row["question_type"] != "multiple-choice":
        return None
    return make_question(row["id"], row["question"], list(row["choices"].values()), row["answer"],
                         find(row["video"].split("/resolve/main/")[-1]), {"subject": row["metadata"]["subject"]},
                         [f"Question: {row['question']}", *(f"{x}: {text}" for x, text in row["choices"].items()), "",
                          "Do not generate any intermediate reasoning process. Answer directly with the option letter "
                          "from the given choices."])


def vcrbench(row: dict, part: str, keys: tuple, find: Callable) -> Question | None:
    """The options stand inside the question, the first glued to it: cut there, they are shown once."""
    if str(row["multiple-choice"]).lower() != "true":
        return None
    choices = ast.literal_eval(row["choices"]) if isinstance(row["choices"], str) else row["choices"]
    options, question, seconds = list(choices.values()), row["question"].strip(), float(row.get("duration") or 0)
    inside = re.search(r"\s*\(?A[.):]\s*" + re.escape(str(options[0])[:20]), question)
    duration = "up to 60 s" if seconds <= 60 else "up to 300 s" if seconds <= 300 else "over 300 s"
    return make_question(row["id"], question[:inside.start()] if inside else question, options, row["answer"],
                         find(f"v1/videos/{row['video_path']}", row["video_path"]),
                         {"dimension": row["dimension"], "duration": duration},
                         [question, *([] if inside else rewards.letter_options(options)),
                          "Answer with the letter of the correct option."])


# folder in the branch `main` (in video/, raw videos), folder in the branch `video` (clips already cut), json names
MVBENCH = """\
star/Charades_v1_480       star/Charades_segment      action_sequence action_prediction object_interaction
sta/sta_video              sta/sta_video_segment      action_localization
tvqa/frames_fps3_hq        tvqa/video_fps3_hq_segment episodic_reasoning
ssv2_video                 ssv2_video_mp4             action_antonym
Moments_in_Time_Raw/videos Moments_in_Time_Raw/videos fine_grained_action
FunQA_test/test            FunQA_test/test            unexpected_action
clevrer/video_validation   clevrer/video_validation   object_existence moving_direction moving_count moving_attribute \
counterfactual_inference
perception/videos          perception/videos          object_shuffle action_count state_change character_order
scene_qa/video             scene_qa/video             scene_transition
nturgbd                    nturgbd_convert            fine_grained_pose
vlnqa                      vlnqa                      egocentric_navigation"""
MVBENCH_FOLDERS = {task: line.split()[:2] for line in MVBENCH.splitlines() for task in line.split()[2:]}


def mvbench(row: dict, part: str, keys: tuple, find: Callable) -> Question:
    """The official prompt has a system line and begins the answer with "Best option:("; both are left out here."""
    (main, branch), name, options = MVBENCH_FOLDERS[part], row["video"], [o.strip() for o in row["candidates"]]
    path = find(f"video/{main}/{name}", f"{branch}/{name}", f"{branch}/{Path(name).with_suffix('.mp4')}",
                f"video/data0613/{main}/{name}")             # the last: videos that were added later
    bounds = (float(row["start"]), float(row["end"])) if "start" in row and path.startswith("video/") else None
    return make_question(f"{part}/{keys[-1]}", row["question"], options,
                         chr(65 + options.index(row["answer"].strip())), path, {"task": part},
                         [f"Question: {row['question']}", "Options:",
                          *(f"({chr(65 + i)}) {text}" for i, text in enumerate(options)),
                          "Only give the best option."], bounds=bounds, rate=3.0 if "frames_fps3" in path else 0.0)


def tempcompass(row: dict, part: str, keys: tuple, find: Callable) -> Question:
    """Options stand in the question, a line each. The training prompt knows no yes/no question and no "Option 1":
    there both are multiple choice between two texts."""
    video, dimension, question = row.get("video_id") or keys[0], row.get("dim") or keys[1], row["question"]
    answer, text, options, labels, last = row["answer"], [], [], [], "\nPlease directly give the best option:"
    for line in question.split("\n"):
        option = re.fullmatch(r"[\s*-]*(?:((?:Option|Caption|Sentence) \w)|[A-D])\s*[.:)]\s*(.+)", line)
        if part == "yes_no" or not option:
            text.append(line)
            continue
        if rewards.normalize_text(line) == rewards.normalize_text(row["answer"]):
            answer = chr(65 + len(options))
        options.append(option[2])
        labels += [option[1]] if option[1] else []
    if part == "yes_no":
        options, last = ["yes", "no"], "\nPlease answer yes or no:"
    return make_question(f"{part}/{video}/{dimension}/{hashlib.sha256(question.encode()).hexdigest()[:8]}",
                         "\n".join(text), options, answer, find(f"videos/{video}.mp4"),
                         {"format": part, "dimension": dimension}, [question + last], labels=labels)


def videomme(row: dict, part: str, keys: tuple, find: Callable) -> Question:
    files = [f"data/{row['videoID']}.{kind}" for kind in ("mp4", "MP4", "mkv")]
    return make_question(row["question_id"], row["question"], row["options"], row["answer"], find(*files),
                         {"duration": row["duration"], "domain": row["domain"], "task": row["task_type"]}, [
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.", row["question"], *row["options"], "The best answer is:"])


class Bench(NamedTuple):
    """A benchmark: where its questions lie, and how they are read, counted and averaged."""
    files: dict[str, tuple[str, ...]]                        # part → patterns of its annotation file, best first
    read: Callable[..., Question | None]    # of a row, its part, the keys above it
    expected: int                                            # questions
    repo: str = ""                                           # on huggingface.co/datasets
    size: str = ""
    gated: bool = False                                      # a form must be accepted in a browser first
    paper: tuple[float, ...] = ()                            # Qwen2.5-VL-7B, VideoP2R
    aggregates: dict[str, tuple] = {"all questions": ALL}    # see `weighted_groups`
    value: Callable[[dict], float] = itemgetter("score")     # of a row; `is_correct` counts entirely right answers


TRACKS, FORMATS = ("Perception", "Comprehension", "Adaptation"), ("multi-choice", "yes_no", "caption_matching")
BENCHES = {
    "toy": Bench({"heldout": ("heldout.json",)}, toy, 512, value=is_correct),
    "vsibench": Bench({"test": ("test.jsonl",)}, vsibench, 5130, "nyu-visionx/VSI-Bench", "5.7 GB", False,
                      (30.1, 36.8), {
        "mean of multiple choice and MRA (paper)": ((VSI_CHOICE + VSI_DIRECTION,), (VSI_NUMERIC,)),
        "mean of eight tasks (official)": (tuple((task,) for task in VSI_DIRECTION),
                                           *(((task,),) for task in VSI_NUMERIC + VSI_CHOICE)),
        "multiple choice": ((VSI_CHOICE + VSI_DIRECTION,),), "MRA": ((VSI_NUMERIC,),), "all questions": ALL}),
    "videommmu": Bench({x: (f"{x}/test-*.parquet", f"data/{x.lower()}_video.json", f"{x.lower()}_video.json")
                        for x in TRACKS}, videommmu, 900, "lmms-lab/VideoMMMU", "14 GB", True, (48.1, 55.0)),
    "mmvu": Bench({"validation": ("validation.json",)}, mmvu, 625, "yale-nlp/MMVU", "1.6 GB", False, (60.0, 65.4),
                  {"multiple choice of the validation split": ALL}),
    "vcrbench": Bench({"test": ("v1/videos/meta_info_video.json", "VCR-Bench.tsv")}, vcrbench, 510,
                      "VLM-Reasoning/VCR-Bench", "859 videos of unstated size", False, (44.3, 51.0),
                      {"multiple choice": ALL}),
    "mvbench": Bench({task: (f"json/{task}.json",) for task in MVBENCH_FOLDERS}, mvbench, 4000, "OpenGVLab/MVBench",
                     "16 GB", True, (59.0, 68.1)),
    "tempcompass": Bench({x: (f"{x}/test-*.parquet", f"questions/{x}.json", f"{x}.json") for x in FORMATS},
                         tempcompass, 5536, "lmms-lab/TempCompass", "0.5 GB", False, (72.6, 74.5), {
        "closed formats, pooled": ALL, "mean of formats": tuple(((form,),) for form in FORMATS)}),
    "videomme": Bench({"test": ("videomme/test-*.parquet", "videomme/test-*.json")}, videomme, 2700,
                      "lmms-lab/Video-MME", "101 GB", False, (56.6, 60.0), {"all questions, without subtitles": ALL}),
}
SEVEN = [name for name in BENCHES if name != "toy"]


class BenchError(ValueError):
    """A benchmark that is missing or broken."""


def leaves(tree, keys: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    """The questions in nested lists and dictionaries, with the keys or numbers above them."""
    if isinstance(tree, dict) and {"question", "problem"} & tree.keys():
        yield keys, tree
    elif isinstance(tree, (dict, list)):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(part, (*keys, key))
    else:
        raise ValueError(f"{tree!r:.60} stands where a question should be")


def annotation_rows(file: Path) -> list[tuple[tuple, dict]]:
    """The rows of an annotation file of any form, with the keys or numbers above them."""
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise SystemExit(f"{file} is parquet: `pip install pyarrow` to read it") from None
        return list(leaves(pyarrow.parquet.read_table(file).to_pylist()))
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".json":
        return list(leaves(json.loads(text)))
    if file.suffix == ".jsonl":
        return list(leaves([json.loads(line) for line in text.split("\n") if line.strip()]))
    csv.field_size_limit(2 ** 24)
    return list(leaves(list(csv.DictReader(text.splitlines(keepends=True), delimiter="\t"))))


def read_bench(name: str, root: Path) -> tuple[list[Question], list[str]]:
    """A benchmark's questions, and notes on what was found. Raises BenchError: with the commands that fetch it if
    nothing is there, with file and number if more than 1 % of the questions are broken."""
    bench, questions, missing, broken = BENCHES[name], [], [], []

    def find(*paths: str) -> str:
        for path in paths:
            for file in root.glob(path) if path.startswith("*") else [root / path]:
                if file.exists():
                    return file.relative_to(root).as_posix()
        return paths[0]
    for part, places in bench.files.items():
        files = next(filter(None, (sorted(root.glob(place)) for place in places)), [])
        missing += [] if files else [part]
        for file in files:
            try:
                rows = annotation_rows(file)
            except (ValueError, OSError) as error:           # JSON, Unicode and Arrow errors are ValueErrors
                raise BenchError(f"{file} cannot be read: {error}") from None
            for n, (keys, row) in enumerate(rows, start=1):
                try:
                    question = bench.read(row, part, keys, find)
                except (KeyError, IndexError, TypeError, ValueError, AttributeError, SyntaxError, OSError) as error:
                    broken.append(f"{file}, question {n}: {type(error).__name__}: {error}")
                    continue
                questions += [question] if question else []  # duplicates are kept
    if len(broken) > 0.01 * (len(questions) + len(broken)):
        raise BenchError(f"{broken[0]} (one of {len(broken)})")
    if not any((root / q.record.path).exists() for q in questions):
        where = questions[0].record.path if questions else next(iter(bench.files.values()))[0]
        form = f"accept the form at https://huggingface.co/datasets/{bench.repo}, run `hf auth login`, then:"
        raise BenchError(f"{name}: {len(questions)} questions and no media under {root}, for example {where}.\n"
                         f"To fetch it ({bench.size}), {form if bench.gated else 'without a form:'}\n"
                         f"  hf download {bench.repo} --repo-type dataset --local-dir {root}\n"
                         f"  (cd {root} && find . -name '*.zip' -execdir unzip -qo {{}} \\;)")
    notes = [f"{len(questions)} questions in {root}"]
    notes += [f"NOT the benchmark's {bench.expected} questions"] * (len(questions) != bench.expected)
    notes += [f"WITHOUT {', '.join(missing)}"] * bool(missing) + [f"LEFT OUT {len(broken)}: {x}" for x in broken[:1]]
    return questions, notes


# ------------------------------------------------------------------------------------------------ 7. command line

def find_model(args: argparse.Namespace) -> tuple[Path, Path, str]:
    """The model's folder, its newest checkpoint, and why it was chosen. SystemExit names all that is missing, model and
    benchmarks, with the commands that fetch it."""
    finished = []
    for file in Path("runs").glob("*/*/settings.json"):
        try:
            newest = newest_checkpoint(file.parent)
            if json.loads(file.read_text())["steps"] == int(newest.name[5:]):
                finished.append(((newest / "state.json").stat().st_mtime, file.parent))
        except (OSError, ValueError, TypeError, KeyError):   # another folder, or a damaged one
            continue
    folder, why = Path(args.model or sft.QWEN.format("7B")), "no run is finished, so the base model"
    if args.model or finished:
        folder, why = (folder, "chosen by flag") if args.model else (max(finished)[1], "the newest finished run")
    try:
        return folder, newest_checkpoint(folder), why
    except (OSError, ValueError) as error:
        lacking = [f"{error} ({why}). `python pagrpo.py` makes a small model, --model names another."]
    if folder.name.startswith("Qwen2.5-VL"):
        lacking.append(f"  hf download Qwen/{folder.name} --local-dir {folder}")
    for name in SEVEN if args.bench == "all" else {args.bench} & set(SEVEN):
        try:
            read_bench(name, Path(args.data or f"data/{name}"))
        except BenchError as error:
            lacking.append(str(error))
    raise SystemExit("\n".join(lacking))


def run_settings(model: Path, preset: str | None) -> pagrpo.Settings:
    """The settings a model was trained with, from its run's folder; a preset's fill in what is missing."""
    file = next((f for f in (model / "settings.json", model.parent / "settings.json") if f.is_file()), None)
    try:
        saved = dict(json.loads(file.read_text())) if file else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    same = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()
            if k in data.default_settings(pagrpo.Settings) and not k.startswith("judge")}
    return pagrpo.Settings(**pagrpo.PRESETS[preset or ("tiny" if saved.get("prompt") == "short" else "7b")] | same)


def evaluate(name: str, path: Path, settings: pagrpo.Settings, args: argparse.Namespace,
             world: sft.World) -> dict | None:
    """One benchmark, from its files to its table. Returns its summary."""
    root = Path(args.data or f"data/{name}")
    if name == "toy" and not args.data:                      # beside the model; else runs/tiny's, made when missing
        places = [parent / "toy" for parent in path.resolve().parents] + [Path("runs/tiny/toy")]
        root = next((place for place in places if (place / "heldout.json").is_file()), None)
        root = root or world.on_rank0(lambda: data.make_toy(places[-1], {"heldout": BENCHES["toy"].expected}))
    questions, notes = read_bench(name, root)
    if args.limit and args.limit < len(questions):
        notes.append(f"ONLY {args.limit} of them, evenly spread")
        questions = [questions[i * len(questions) // args.limit] for i in range(args.limit)]
    prompt = "official short-answer" if args.direct else f"template {settings.template}, {settings.prompt}"
    rate = f"{settings.fps:g} frames a second, at most" if settings.fps else "frames: always"
    world.print0(f"\n{name}: {'; '.join(notes)}\n{rate} {settings.frames}, of {settings.max_pixels} pixels, "
                 f"{'cut to their bounds' if args.clips else 'uncut'}; temperature {args.temperature:g}, top-p "
                 f"{args.top_p:g};\n{settings.max_response} tokens; {prompt} prompt; judge: {args.judge}.")
    job = Job(name, root, path, settings, args, world)
    if args.perception_from:
        return world.print0(perception_from(job, questions))
    rows = run(job, questions)
    summary = summarise(name, rows) | {"model": str(path)}
    file, text = args.out / name / "summary.json", json.dumps(summary, indent=1) + "\n"
    if world.first and not (file.is_file() and file.read_text() == text):     # a read-only folder can be shown again
        data.write_atomically(file, text)
    said = mismatch(rows) + "\n" if args.mismatch else ""
    world.print0(f"\n{report(summary)}\n{said}Responses and numbers: {file.parent}")
    return summary


def evaluate_all(path: Path, settings: pagrpo.Settings, args: argparse.Namespace, world: sft.World) -> None:
    """The paper's Table 1. Raises BenchError at the end, if a benchmark is missing or broken."""
    results, lacking = {}, []
    for name in SEVEN:
        try:
            summary = evaluate(name, path, settings, args, world)
        except BenchError as error:                          # any other error stops all ranks
            lacking.append(str(error))
            continue
        if summary["scored"]:
            results[name + "*" * (summary["scored"] != BENCHES[name].expected)] = summary
    scores = {path.parent.name or path.name: [next(iter(s["aggregates"].values()))["value"] for s in results.values()]}
    for i, model in enumerate(("Qwen2.5-VL-7B (paper)", "VideoP2R (paper)")):
        scores[model] = [s["paper"][i] for s in results.values()]
    table = [["percent (* not the whole benchmark)", *results, "mean"]]
    if results:
        table += [[model, *(f"{x:.1f}" for x in [*some, np.mean(some)])] for model, some in scores.items()]
        world.print0("", *data.format_table(table), sep="\n")
    if lacking:
        raise BenchError(f"{len(lacking)} of {len(SEVEN)} benchmarks are missing or broken:\n" + "\n".join(lacking))


def answer_one(path: Path, args: argparse.Namespace, settings: pagrpo.Settings) -> None:
    """One question about one clip or picture: prints what the model sees, thinks and answers. Raises MediaError."""
    clip = Path(args.video).resolve()
    "".join([args.question, *args.options]).encode()         # a lone surrogate is a ValueError
    kind = args.problem_type or ("multiple choice" if args.options else "free-form")
    medium = "image" if clip.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif") else "video"
    record = data.Record("", args.question, tuple(args.options), kind, "", clip.name, medium)
    vocabulary, model, _ = load_model(path)
    example = data.build_example(record, clip.parent, vocabulary, model.config, settings)
    steps, rows, columns = example.grid
    print(f"{clip.name}: {steps} grid steps of {example.seconds:.2f} s, {columns * 14}×{rows * 14} pixels, "
          f"{len(example.ids)} prompt tokens")
    (response,), = pagrpo.rollout(model, [example], vocabulary, settings, "question", 1, args.temperature, args.top_p)
    print(response.text + ("" if response.finished else f"\n(cut off after {len(response.tokens)} tokens)"))


PROTOCOL = dict(frames=32, fps=2.0, max_pixels=256 * 28 * 28, max_response=1024)             # of Video-R1
INPUTS = (*PROTOCOL, "max_prompt", "prompt", "template", "seed")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to do (one of these)")
    what.add_argument("--bench", choices=[*BENCHES, "all"], help="benchmark to run")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two evaluations, question by question")
    what.add_argument("--video", help="ask about this video, picture or folder of frames")
    how = parser.add_argument_group("which model, and what it gets (default: as its run; benchmarks: as above)")
    how.add_argument("--model", help="model folder, or a stage's folder [the newest finished run, else the base model]")
    how.add_argument("--preset", choices=pagrpo.PRESETS, help="settings for a model from elsewhere [7b]")
    data.add_flags(how, pagrpo.Settings, {"benchmarks": PROTOCOL}, INPUTS)
    how.add_argument("--temperature", type=float, default=0.01, help="0 is greedy [0.01]")
    how.add_argument("--top-p", type=float, default=0.001, help="only the likeliest tokens up to this share [0.001]")
    bench = parser.add_argument_group("for --bench")
    bench.add_argument("--data", help="the benchmark's folder [data/BENCH; toy: beside the model, made when missing]")
    bench.add_argument("--out", help="folder of results [eval/ in the model's folder]")
    bench.add_argument("--direct", action="store_true", help="the official short-answer prompt, not the training one")
    bench.add_argument("--clips", action="store_true", help="cut videos to the bounds of the annotations (MVBench)")
    bench.add_argument("--mismatch", action="store_true", help="how often the answer is not what the think ends on")
    bench.add_argument("--perception-from", metavar="RUN", help="ask with and without this evaluation's observations")
    bench.add_argument("--limit", type=int, help="only so many questions, evenly spread: a try, no score [all]")
    bench.add_argument("--batch", type=int, help="questions answered together [toy 128, else 8]")
    one = parser.add_argument_group("for --video")
    one.add_argument("--question", help="the question")
    one.add_argument("--options", nargs="+", default=[], help="options of a multiple choice, without letters")
    one.add_argument("--problem-type", choices=rewards.PROBLEM_TYPES, help="[free-form, or multiple choice]")
    judge = parser.add_argument_group("judges of observations [toy: rule; else none; `reference`: the model itself]")
    data.add_flags(judge, data.JudgeSettings)
    args = parser.parse_args(argv)
    positive = [number for number in (args.limit, args.batch) if number is not None]
    for wrong, complaint in (
        (sum(map(bool, (args.bench, args.compare, args.video))) != 1 or args.video and not args.question,
         "give one of --bench NAME, --compare A B, or --video FILE with --question TEXT"),
        (args.bench == "all" and (args.data or args.perception_from),
         "--data and --perception-from belong to one benchmark, not to all"),
        (not (0 <= args.temperature < math.inf and 0 < args.top_p <= 1),
         "--temperature must be 0 (greedy) or more, --top-p above 0 and at most 1"),
        (args.prompt == "direct" or args.direct and (args.bench in (None, "toy") or args.prompt or args.template),
         "--direct belongs to one of the seven benchmarks, and goes without --prompt and --template"),
        (min(positive, default=1) < 1, "--limit and --batch must be at least 1"),
        (args.mismatch and args.perception_from, "--mismatch belongs to a --bench without --perception-from"),
    ):
        if wrong:
            parser.error(complaint)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.compare:
            return print(compare(*args.compare))
        folder, path, why = find_model(args)
        world = sft.start_world(patience=timedelta(hours=12))    # ranks may be hours apart at a benchmark's end
        world.print0(f"Model {path} ({why})")
        args.judge = args.judge or ("rule" if args.bench == "toy" else "none")
        names = {*INPUTS, *(f.name for f in fields(data.JudgeSettings))}
        own = {k: v for k, v in data.given_flags(args).items() if k in names and (k, v) != ("judge", "none")}
        settings = replace(run_settings(folder, args.preset), **(PROTOCOL if args.bench in [*SEVEN, "all"] else {})
                           | own | ({"prompt": "direct"} if args.direct else {}))
        args.batch = args.batch or (128 if args.bench == "toy" else 8)
        args.out = Path(args.out or (path.parent if path.name.startswith("step-") else path) / "eval")
        if args.video:
            answer_one(path, args, settings)
        elif args.bench == "all":
            evaluate_all(path, settings, args, world)
        else:
            evaluate(args.bench, path, settings, args, world)
        world.shutdown()
    except data.MediaError as error:
        sys.exit(f"{args.video}: {error}")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on from here." if args.bench else "Interrupted.")


if __name__ == "__main__":
    main()
