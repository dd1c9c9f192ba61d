"""Evaluation: seven video benchmarks, the toy world, the paper's analyses, and single questions.

    python eval.py --bench toy                               the newest finished run, held-out clips
    torchrun --nproc_per_node=8 eval.py --bench all          the paper's Table 1, from data/BENCH
    python eval.py --bench toy --model runs/tiny/sft --blind --given runs/tiny/pagrpo/eval/toy
    python eval.py --compare runs/tiny/sft/eval/toy runs/tiny/pagrpo/eval/toy
    python eval.py --report runs/tiny/pagrpo runs/tiny/grpo      a page with the curves of both
    python eval.py --video clip.avi --question "Which letter is last?" --options "red X" "blue T"

The seven are run as Video-R1 ran them (PROTOCOL), the others as the model was trained.
MODEL/eval/BENCH holds responses.jsonl and summary.json. The same command resumes, on any number of
ranks. More: docs/evaluation.md.
"""
import math
import re
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache, partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Callable, NamedTuple, Sequence

import numpy as np
from tqdm import tqdm

import data
import pagrpo
import rewards
import sft
from data import flag
from model import Qwen2_5_VL, compute_dtype, load_model, newest_checkpoint, read_config


# ---------------------------------------------------------------------------- 1. reading answers

def answer_text(response: str, finished: bool = True) -> str | None:
    """The last <answer>, else what follows the last closed segment. None if the response was cut
    off before both."""
    _, begun, answer = response.rpartition("<answer>")
    if begun:
        return answer.partition("</answer>")[0]
    others = "|".join(data.TRACE_FIELDS)
    rest = re.split(f"</(?:{others})>", response)[-1]
    left_open = re.search(f"<(?:{others})>", rest)
    return rest if finished and not left_open else None


def strip_markup(text: str) -> str:
    """Text without Markdown, \\boxed{}, $ and LaTeX spaces. Every minus sign becomes a hyphen."""
    text = re.sub(r"\\[,;! ]", " ", text).replace("−", "-")
    text = re.sub(r"\\(?:boxed|text|mathrm|textbf)\{|[*$`}\\]", "", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


# What announces an answer: "The answer is", "Option:". A minus behind it belongs to a number.
CUE = (r"\b(?i:answer|option|choice)(?:\W*:|\s+(?i:is|(?:would|should) be)\b)"
       r"(?:(?!-)\W|\b(?i:the)\b)*")
# The article of "A man", but not the letter of "A is right"; the pronoun of "I see", but not the
# letter of "I."
ARTICLE_OR_PRONOUN = (r"A (?!(?:is|was|because|since|as|fits|seems|would|or|and)\b)[a-z]"
                      r"|I(?![.):]|\W*$)")
# What follows a chosen option: "B is the best", "B seems right".
BEST = re.compile(r"\W{0,3}(?:is|was|seems) (?:(?:the|most|my) )*(?:best|correct|right|answer)\b",
                  re.I)


def mentions(text: str, options: Sequence[str]) -> list[tuple[str, re.Match]]:
    """(letter, match) for each option that a text names, in order; "" for a text that two options
    share. The letters found among the options "a cat", "a dog":
        "It is B." → B        "A dog, so the answer is (b)" → B, B        "a dogma" → none
        "I see a cat, not B" → A
    """
    if not options:
        return []
    # 1. An option's names: its text and its letter.
    texts = rewards.option_texts([strip_markup(option) for option in options])
    names = {}
    for letter, name in texts.items():
        names[name] = letter if names.get(name, letter) == letter else ""
    names |= {letter.lower(): letter for letter in texts}
    # 2. A letter counts if it is a capital or before punctuation. The article, the pronoun and the
    #    A of "5 A" do not.
    letters = [name for name in names if len(name) == 1 and not name.isdigit()]
    small = rf"(?i:[{re.escape(''.join(letters))}])(?=[).,:;\]]|\W*$)"
    letter = rf"(?<!\d )(?!{ARTICLE_OR_PRONOUN})(?:[{''.join(texts)}]|{small})"
    # 3. Other names count in any case, the longest first. `(?!)` matches nothing.
    others = sorted(names.keys() - {*letters, ""}, key=len, reverse=True)
    longer = "|".join(map(re.escape, others)) or "(?!)"
    # 4. Neither counts inside a word or a number, or after "not". `first`: it begins the text.
    alone = r"(?<![\w°-])(?<!\d[.,/])(?<![nN]ot )"
    before = rf"(?P<first>^\W*)?(?P<cue>{CUE})?{alone}(?:(?i:option|choice|letter) \(?)?"
    name = rf"(?P<name>(?P<text>(?i:{longer}))|(?P<letter>{letter}))"
    after = r"(?!\w|['’-]\w|[.,/]\d)"
    found = re.finditer(before + name + after, text)
    return [(names.get(match["name"].casefold(), ""), match) for match in found]


def read_choice(text: str | None, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer names, None if it names none.

    An exact letter or option text decides; otherwise the first of these that applies:
        1. a letter that begins the text, alone on its line or before punctuation: "B) a dog", "(D) F"
        2. the last "answer/option/choice is X" or "X is the best": "Answer: (A) C", "so option A is
           correct"
        3. the option whose text is named first: "It shows a dog. There is no cat."
        4. the last capital letter that stands alone: "It must be B"
    """
    plain = strip_markup(text or "")
    exact = rewards.choice(plain, options)
    if exact:
        return exact
    first, stated, texts, capitals = [], [], [], []
    for option, match in mentions(plain, options):
        if not option:                                       # two options have this text
            continue
        letter, next_character = match["letter"], plain[match.end():][:1]
        if letter and next_character in ".):,;]\n" and match["first"] is not None:
            first.append(option)
        if match["cue"] or BEST.match(plain, match.end()):
            stated.append(option)
        if match["text"]:
            texts.append(option)
        elif letter.isupper():
            capitals.append(option)
    ranked = first + stated[-1:] + texts + capitals[-1:]
    return ranked[0] if ranked else None


def ends_on(reasoning: str, options: Sequence[str]) -> str | None:
    """The option that a reasoning mentions last, or None. In "C red T" the letter decides for
    both."""
    plain = strip_markup(reasoning)
    found = mentions(plain, options)
    if len(found) > 1:
        (_, before), (_, last) = found[-2:]
        between = plain[before.end():last.start("name")]
        if not between.strip(" .:)(\"'"):
            found.pop()
    return found[-1][0] or None if found else None


def read_numbers(text: str, cue: str = r"=|\banswer is\b") -> list[Fraction]:
    """The numbers, in digits, behind the last cue, else all: "about 3.5 m" → [3.5],
    "4 m × 5 m = 20" → [20]."""
    text = strip_markup(text)
    behind = re.split(cue, text, flags=re.I)[-1]
    if re.search(r"\d", behind):
        text = behind
    digits = r"-?\d[\d,]*\.?\d*(?:e[-+]?\d+|/\d+)?"
    found = re.findall(rf"{digits}(?:{rewards.MAGNITUDE})*", text)
    values = [rewards.number(x.rstrip(",.")) for x in found]
    return [value for value in values if value is not None]


# ------------------------------------------------------------------------------------ 2. metrics

class Question(NamedTuple):
    """One question of a benchmark. `mean` selects by the first of its groups."""
    record: data.Record                                      # as the training prompt asks it
    groups: dict[str, str]                                   # {"task": "action_count", …}
    as_trained: bool = False                                 # scored by the reward's metric


def mean_relative_accuracy(predicted: float, wanted: float) -> float:
    """MRA (VSI-Bench): the share of the tolerances 50 %, 45 % … 5 % that the relative error is
    within; 5 for 4: 0.6."""
    if wanted == 0:
        return float(predicted == 0)
    tolerances = 1 - np.linspace(0.5, 0.95, 10)
    return float(np.mean(abs(predicted - wanted) / abs(wanted) <= tolerances))


def open_answer(text: str, gold: str) -> float:
    """MMMU's lenient rule: an answer has the gold number to two decimals, names the gold letter, or
    the gold text. "[7, 7.0]" are two that count."""
    values = read_numbers(text, r"\bis\b|\banswer\b|=|:(?!\d)")
    given = [round(value, 2) for value in values]
    normalized = rewards.normalize_text(strip_markup(text))
    for wanted in gold.strip("[]").split(",") if gold.startswith("[") else [gold]:
        wanted = wanted.strip(" '\"")
        value = rewards.number(wanted)
        if re.fullmatch("[A-Z]", wanted):
            right = read_choice(text, [""] * 26) == wanted
        elif value is not None:
            right = round(value, 2) in given
        else:
            right = rewards.normalize_text(wanted) in normalized
        if right:
            return 1.0
    return 0.0


def grade(question: Question, response: str, finished: bool = True) -> tuple[str | None, float]:
    """What was read from a response (None: nothing), and its score in [0, 1]."""
    r, text = question.record, answer_text(response, finished) or ""
    if question.as_trained:                                  # one well-formed <answer>, to the end
        answer = rewards.parse(response).contents["answer"]
        score = rewards.task_metric(r.problem_type, answer, r.reference, r.options)
        return answer, score * finished
    if r.problem_type == "multiple choice":
        letter = read_choice(text, r.options)
        return letter, float(letter == r.reference)
    if r.problem_type == "free-form":
        return text.strip() or None, open_answer(text, r.reference)
    found = read_numbers(text)
    if not found:
        return None, 0.0
    value = float(max(-10 ** 15, min(found[0], 10 ** 15)))   # no float holds 1e400: as wrong
    return f"{value:g}", mean_relative_accuracy(value, float(rewards.number(r.reference)))


# ------------------------------------------------------------------------------------ 3. numbers

ALL = ((1, None),)                                           # one part: every row


def is_correct(row: dict) -> bool:
    return row["score"] > 1 - 1e-9


def guess(row: dict) -> float:
    """What guessing among the options scores."""
    return 1 / len(row["options"]) if row["options"] else 0.0


def mean(rows: list[dict], parts: Sequence[tuple] = ALL,
         value: Callable[[dict], float] = itemgetter("score")) -> dict:
    """A mean in percent, its 95 % interval, and what guessing scores (chance).

    Each part is a weight and labels: the mean over rows whose first label is one of them (None:
    all) has that weight. Questions about one clip are not independent: the variance is the sum over
    clips of (sum of w (x - mean) / n)². A share p with a variance v is as uncertain as that of
    p (1 - p) / v independent answers, whose interval is Wilson's.
    """
    level = chance = total = 0.0
    clips, n = Counter(), 0                                  # of each clip: its sum of deviations
    for weight, names in parts:
        inside = [r for r in rows if not names or next(iter(r["groups"].values())) in names]
        if not inside:
            continue
        average = fmean(map(value, inside))
        level += weight * average
        chance += weight * fmean(map(guess, inside))
        total += weight
        n += len(inside)
        for r in inside:
            clips[r["clip"]] += weight * (value(r) - average) / len(inside)
    total = total or 1                                       # nothing to average: n is 0
    level, chance = level / total, chance / total
    variance = sum(x * x for x in clips.values()) / total ** 2
    independent = level * (1 - level) / variance if variance > 1e-18 else len(clips)
    return pagrpo.wilson(level, independent) | {"chance": 100 * chance, "n": n}


def mismatch(rows: list[dict]) -> dict:
    """How often the answer is not the option that the reasoning ends on (multiple choice; paper,
    Table 6). Rows in which one of both names no option do not count."""
    decided = []
    for r in rows:
        thought = ends_on(r["think"] or "", r["options"])
        answered = read_choice(r["answer"], r["options"])
        if thought and answered:
            decided.append(r | {"differ": thought != answered})
    return mean(decided, value=itemgetter("differ"))


def both_means(rows: list[dict], bench: "Bench", parts: Sequence[tuple] = ALL) -> dict:
    """Of answers, and of the observations that were judged."""
    judged = [r for r in rows if r["perception"] is not None]
    perception = mean(judged, value=itemgetter("perception"))
    return mean(rows, parts, bench.value) | {"perception": perception}


def summarise(name: str, rows: list[dict]) -> dict:
    """All numbers of a finished evaluation, as summary.json holds them."""
    bench, aggregates, groups = BENCHES[name], {}, {}
    missing = Counter(r["missing"] for r in rows if "missing" in r)
    scored = [r for r in rows if "missing" not in r]
    for what, parts in bench.aggregates.items():
        aggregates[what] = both_means(scored, bench, parts)
    for dimension in rows[0]["groups"]:
        groups[dimension] = {}
        for label in dict.fromkeys(r["groups"][dimension] for r in rows):
            part = [r for r in scored if r["groups"][dimension] == label]
            groups[dimension][label] = both_means(part, bench)
    return {
        "bench": name, "questions": len(rows), "scored": len(scored), "aggregates": aggregates,
        "groups": groups, "score": mean(scored), "mismatch": mismatch(scored),
        "format": mean(scored, value=itemgetter("format")),
        "unread": sum(r["extracted"] is None for r in scored),
        "cut_off": sum(not r["finished"] for r in scored),
        "missing": dict(missing.most_common(3)), "paper": bench.paper}


def cell(x: dict) -> str:
    return f"{x['value']:.1f} ({x['low']:.1f}–{x['high']:.1f})" if x["n"] else "–"


def cells(name: str, x: dict) -> list[str]:
    chance = f"{x['chance']:.1f}" if x["chance"] else "–"
    return [name, str(x["n"]), cell(x), cell(x["perception"]), chance]


def summary_text(s: dict) -> str:
    lost = s["questions"] - s["scored"]
    title = f"{s['bench']}: {s['scored']} questions scored"
    if lost > 0.01 * s["questions"]:
        title += (f"; INCOMPLETE: {lost} of {s['questions']} ({lost / s['questions']:.1%}) could "
                  "not be asked")
    table = [["percent, with 95 % intervals", "n", "answer", "perception", "chance"]]
    for name, x in s["aggregates"].items():
        table.append(cells(name, x))
    for dimension, labels in s["groups"].items():
        table.append([f"by {dimension}", "", "", "", ""])
        for label, x in labels.items():
            table.append(cells(f"  {label}", x))
    lines = [title, *data.format_table(table),
             f"Mean score: {cell(s['score'])}. Responses that keep the template: "
             f"{cell(s['format'])}.",
             f"Without a readable answer: {s['unread']} (wrong); cut off: {s['cut_off']}; not "
             f"asked: {lost}."]
    lines += [f"  {n} × {reason}" for reason, n in s["missing"].items()]
    if s["mismatch"]["n"]:
        lines.append(f"Reasoning and answer name different options: {cell(s['mismatch'])}, of "
                     f"{s['mismatch']['n']} responses in which both name one.")
    if s["paper"]:
        base, paper = s["paper"]
        lines.append(f"Paper, first row: Qwen2.5-VL-7B {base}, VideoP2R {paper}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------- 4. two evaluations

def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of so many wins and losses if both were equally likely: McNemar's
    exact test."""
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def compare(first: str, second: str) -> str:
    """Two evaluations, question by question. Raises ValueError if they share no question, or a text
    differs."""
    a, b, pairs = read_rows(first), read_rows(second), []
    for key in a:
        if key in b and "missing" not in a[key] | b[key]:
            pairs.append((a[key], b[key]))
    if not pairs:
        raise ValueError(f"{first} ({len(a)} responses) and {second} ({len(b)}) have no question in "
                         "common")
    wins = losses = unlike = 0
    text = itemgetter("question", "options", "reference")
    inputs = itemgetter("prompt", "frames", "pixels")
    for x, y in pairs:
        if text(x) != text(y):
            raise ValueError(f"{x['id']} has another text in {second}")
        gain = y["score"] - x["score"]
        wins += gain > 1e-9
        losses += gain < -1e-9
        unlike += inputs(x) != inputs(y)
    table = [["", "answer right", "perception and answer right", "perception only", "answer only",
              "neither"]]
    for name, rows in zip((f"A  {first}", f"B  {second}"), zip(*pairs)):
        counts = Counter((r["perception"], is_correct(r)) for r in rows)
        crossed = [str(counts[pair]) for pair in product((1, 0), repeat=2)]
        table.append([name, cell(mean(rows, value=is_correct)), *crossed])
    lines = [*data.format_table(table),
             f"{len(pairs)} questions are in both (A has {len(a)}, B {len(b)}). B wins {wins} and "
             f"loses {losses}: p = {sign_test(wins, losses):.2g} if neither is better (McNemar)."]
    if unlike:
        lines.append(f"NOT comparable: {unlike} questions had another prompt, frames or pixels.")
    return "\n".join(lines)


# ================================ a first reader may stop here ================================

# ------------------------------------------------------------------------------------ 5. running

@lru_cache                                                   # several benchmarks, one model
def load_once(path: Path, device) -> tuple[data.Vocabulary, Qwen2_5_VL]:
    """Vocabulary and model of a checkpoint."""
    vocabulary = data.Vocabulary(path)
    model = load_model(path, compute_dtype(device, read_config(path)), device)
    return vocabulary, vocabulary.mask_special_tokens(model)


def prompt_hash(r: data.Record, settings: pagrpo.Settings) -> str:
    return rewards.key_of(settings.prompt, data.instruction(r, settings), r.given)


def row_of(question: Question, response: pagrpo.Response, verdict: rewards.Verdict | None,
           settings: pagrpo.Settings) -> dict:
    """What responses.jsonl holds about a response, beside id, clip and groups."""
    r, parsed = response.example.record, response.parsed
    steps, height, width = response.example.grid or (0, 0, 0)
    extracted, score = grade(question, response.text, response.finished)
    formats = parsed.formats
    if r.given or settings.template == "think":
        formats = formats[-1:]                               # only the last segment is expected
    return {
        "problem_type": r.problem_type, "question": r.question, "options": list(r.options),
        "reference": r.reference, "prompt": prompt_hash(r, settings),
        "frames": steps * 2 if r.data_type == "video" else steps,
        "pixels": [height * 14, width * 14], "response": response.text,
        "tokens": len(response.tokens), "finished": response.finished, **parsed.contents,
        "format": all(formats), "extracted": extracted, "score": score,
        "perception": verdict and verdict.sufficient,
        "judge": verdict and (verdict.error or verdict.explanation)}


def read_rows(folder: str | Path) -> dict[str, dict]:
    """id → row of an evaluation."""
    rows = rewards.read_jsonl(Path(folder) / "responses.jsonl")
    return {row["id"]: row for row in rows}


def no_verdicts(claims: list[rewards.Claim]) -> list[None]:
    return [None] * len(claims)



def row_keys(questions: list[Question], args: Namespace) -> list[str]:
    """For each question a hash of all that decides its row."""
    s, weights = args.settings, [str(args.model.resolve())]
    for file in sorted(args.model.glob("*.safetensors")):
        stat = file.stat()
        weights.append([stat.st_size, int(stat.st_mtime)])
    address = args.judge and data.is_http(args.judge)        # it may change
    decisive = [weights, "http" if address else args.judge]
    for name in (*INPUTS, "min_pixels", "image_max_pixels", "judge_model", "refuse_leaks"):
        decisive.append(getattr(s, name))
    records = [question.record for question in questions]
    return [rewards.key_of(decisive, repr(r), prompt_hash(r, s)) for r in records]


def answer_bench(questions: list[Question], folder: Path, args: Namespace) -> list[dict]:
    """A row for each question, in their order, on every rank. Finished rows are in a journal,
    FOLDER/work.RANK.jsonl; the ranks share the others."""
    world, keys = args.world, row_keys(questions, args)
    folder.mkdir(parents=True, exist_ok=True)
    journal = rewards.Journal(folder / "work", world.rank)
    rows = world.on_rank0(lambda: journal.rows)              # all ranks leave out the same ones
    todo = [(key, question) for key, question in zip(keys, questions) if key not in rows]
    found = answer_share(todo, journal, folder, args) if todo else []
    for part in world.gather(found):
        rows = rows | {row["key"]: row for row in part}
    return [rows[key] for key in keys]


def answer_share(todo: list[tuple], journal: rewards.Journal, folder: Path, args: Namespace
                 ) -> list[dict]:
    """Rows of this rank's share of the (key, question) pairs. One whose medium is missing is not
    kept in the journal: it is asked for again. ValueError if too many verdicts are unknown."""
    s, world, rows = args.settings, args.world, []
    vocabulary, model = load_once(args.model, world.device)
    judge = no_verdicts
    if args.judge:                                           # `reference` is the model itself
        answer_blind = partial(pagrpo.blind_answers, model, vocabulary, s)
        judge = data.make_judge(s, folder / "judge", answer_blind, world.rank)
    records = [question.record for _, question in todo]
    examples = data.Examples(records, args.data, vocabulary, model.config, s, max_unreadable=1,
                             teaching=False)
    batches = world.share(len(todo), s.batch * world.size)
    progress = tqdm(batches, args.bench, disable=not world.first)
    for batch, readable in zip(progress, examples.prefetch(batches)):
        answers = pagrpo.answer(model, readable, vocabulary, judge, s, s.temperature, s.top_p)
        errors = [verdict.error for _, verdict in answers if verdict and verdict.error]
        if len(errors) > s.max_unknown * len(answers):
            raise ValueError(f"{len(errors)} of {len(answers)} verdicts stayed unknown, over "
                             f"--max-unknown. The same command goes on from here. {errors[0]:.200}")
        for i in batch:
            key, question = todo[i]
            r, groups, _ = question
            row = {"key": key, "id": r.problem_id, "clip": r.path, "groups": groups}
            if i in examples.skipped:
                row["missing"] = examples.skipped[i]
            else:
                row |= row_of(question, *answers.pop(0), s)
                journal.add(row)
            rows.append(row)
    return rows


def choose_questions(questions: list[Question], notes: list[str], args: Namespace) -> list[Question]:
    """The questions as --blind, --given and --limit have them. ValueError if --given fits none."""
    rows, asked = read_rows(args.given) if args.given else {}, []
    for q in questions:
        given = rows.get(q.record.problem_id, {}).get("observation")
        if given or not args.given:
            asked.append(q._replace(record=replace(q.record, blind=args.blind, given=given)))
    count = len(asked)
    if not count:
        raise ValueError(f"{args.given} holds no observation on a question of {args.bench}")
    if args.given:
        notes.append(f"the {count} with an observation in {args.given}")
    limit = args.settings.limit or count
    if limit < count:
        notes.append(f"ONLY {limit} of them, evenly spread")
        asked = [asked[i * count // limit] for i in range(limit)]
    return asked


def run_bench(questions: list[Question], notes: list[str], args: Namespace) -> dict:
    """Runs or resumes one benchmark and prints its table. Returns its summary."""
    s, print0 = args.settings, args.world.print0
    questions = choose_questions(questions, notes, args)
    name = args.bench + "-blind" * args.blind + "-given" * bool(args.given)
    folder = args.out / name
    print0(f"\n{name}: {'; '.join(notes)}\n{s.fps:g} frames a second (0: as many as allowed), at most "
           f"{s.frames}, of {s.max_pixels} pixels, uncut; temperature {s.temperature:g}, top-p "
           f"{s.top_p:g};\n{s.max_response} tokens; template {s.template}, {s.prompt} prompt; judge: "
           f"{args.judge or 'none'}.")
    rows = answer_bench(questions, folder, args)
    summary = summarise(args.bench, rows) | {"model": str(args.model)}
    if args.world.first:
        data.write_rows(folder / "responses.jsonl", rows)
        data.write_json(folder / "summary.json", summary)
    print0(f"\n{summary_text(summary)}\nResponses and numbers: {folder}")
    return summary


# --------------------------------------------------------------------------------- 6. benchmarks

def make_question(row: dict, path: str, options: Sequence[str], groups: dict,
                  kind: str = "multiple choice", rate: float = 0.0) -> Question:
    """ValueError if it could not be scored. `kind`: of a question without options. `rate`: frames a
    second in a folder of frames."""
    text = str(row["question"]).strip()
    reference = str(row["answer"]).strip()
    options = tuple(str(option).strip() for option in options)
    rewards.check_letters(options, reference)
    if options:
        kind = "multiple choice"
    if kind == "multiple choice":
        reference = rewards.choice(reference, options)
    if reference is None or kind == "regression" and rewards.number(reference) is None:
        raise ValueError(f"the answer {row['answer']!r} is no number, or none of {list(options)}")
    (text + "".join(options)).encode()                       # a lone surrogate is a ValueError
    record = data.Record(str(row["id"]), text, options, kind, reference, path, "video", rate=rate)
    return Question(record, groups)


VSI_NUMERIC = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
VSI_DIRECTION = ("object_rel_direction_easy", "object_rel_direction_medium", "object_rel_direction_hard")
VSI_OTHER = ("object_rel_distance", "route_planning", "obj_appearance_order")
VSI_CHOICE = VSI_OTHER + VSI_DIRECTION


# Each loader makes a Question of a row, or None to leave it out. part: key of its file in
# Bench.files; number: of the row, from 0; find(*paths): the first path that exists, else the first.

def toy(row, part, number, find):
    record = data.to_record(row, traces=False)
    return Question(record, {"problem type": record.problem_type}, as_trained=True)


def vsibench(row, part, number, find):
    task = row["question_type"]
    if task not in VSI_NUMERIC + VSI_CHOICE:
        raise ValueError(f"unknown question_type {task!r}")
    row["answer"] = row["ground_truth"]
    path = find(f"{row['dataset']}/{row['scene_name']}.mp4")
    return make_question(row, path, row["options"] or (), {"task": task}, "regression")


def videommmu(row, part, number, find):
    """Multiple choice where there are options: `question_type` is missing or null in places."""
    options = data.read_options(row["options"])
    path = find(f"*/{row['id']}.mp4")                        # "*" stays if the video is not there
    row["id"] = f"{part}/{row['id']}"
    if part == "Adaptation":
        kind = "multi-choice" if options else "open-ended"
        row["question"] = (
            "You should watch and learn the video content. Then apply what you learned to answer "
            f"the following {kind} question. The image for this question is at the end of the "
            f"video.\n{row['question']}")
    else:
        row["question"] += "\nPlease ignore the Quiz question in last frame of the video."
    groups = {"track": part, "discipline": Path(path).parent.name}
    return make_question(row, path, options, groups, "free-form")


def mmvu(row, part, number, find):
    if row["question_type"] != "multiple-choice":
        return None
    path = row["video"].split("/resolve/main/")[-1]
    groups = {"subject": row["metadata"]["subject"]}
    return make_question(row, path, row["choices"].values(), groups)


def vcrbench(row, part, number, find):
    """The options are inside the question, the first glued to it: cut there, they are shown once."""
    if str(row["multiple-choice"]).lower() != "true":
        return None
    options = [str(option) for option in row["choices"].values()]
    inside = r"\s*\(?A[.):]\s*" + re.escape(options[0][:20])
    row["question"] = re.split(inside, row["question"].strip())[0]
    seconds = float(row.get("duration") or 0)
    duration = next((f"up to {limit} s" for limit in (60, 300) if seconds <= limit), "over 300 s")
    groups = {"dimension": row["dimension"], "duration": duration}
    return make_question(row, f"v1/videos/{row['video_path']}", options, groups)


# Of each task: its annotation file, folder in the branch `main` (below video/: whole videos), and
# folder in the branch `video` (videos that are cut already).
MVBENCH = """\
action_sequence star/Charades_v1_480 star/Charades_segment
action_prediction star/Charades_v1_480 star/Charades_segment
object_interaction star/Charades_v1_480 star/Charades_segment
action_localization sta/sta_video sta/sta_video_segment
episodic_reasoning tvqa/frames_fps3_hq tvqa/video_fps3_hq_segment
action_antonym ssv2_video ssv2_video_mp4
fine_grained_action Moments_in_Time_Raw/videos Moments_in_Time_Raw/videos
unexpected_action FunQA_test/test FunQA_test/test
object_existence clevrer/video_validation clevrer/video_validation
moving_direction clevrer/video_validation clevrer/video_validation
moving_count clevrer/video_validation clevrer/video_validation
moving_attribute clevrer/video_validation clevrer/video_validation
counterfactual_inference clevrer/video_validation clevrer/video_validation
object_shuffle perception/videos perception/videos
action_count perception/videos perception/videos
state_change perception/videos perception/videos
character_order perception/videos perception/videos
scene_transition scene_qa/video scene_qa/video
fine_grained_pose nturgbd nturgbd_convert
egocentric_navigation vlnqa vlnqa"""
MVBENCH_FOLDERS = {task: folders for task, *folders in map(str.split, MVBENCH.splitlines())}


def mvbench(row, part, number, find):
    """Without the system line and the begun answer "Best option:(" of the official prompt. Videos
    of the branch `main` are not cut to their bounds."""
    (main, branch), name = MVBENCH_FOLDERS[part], row["video"]
    path = find(f"video/{main}/{name}", f"{branch}/{name}",
                f"{branch}/{Path(name).with_suffix('.mp4')}",
                f"video/data0613/{main}/{name}")             # the last: videos added later
    options = [option.strip() for option in row["candidates"]]
    row["id"] = f"{part}/{number}"
    row["answer"] = chr(65 + options.index(row["answer"].strip()))
    rate = 3.0 if "frames_fps3" in path else 0.0
    return make_question(row, path, options, {"task": part}, rate=rate)


def tempcompass(row, part, number, find):
    """Options are lines of the question. Yes/no and "Option 1" become choices between texts."""
    video, dimension, text, options = row["video_id"], row["dim"], [], []
    row["id"] = f"{part}/{video}/{dimension}/{rewards.key_of(row['question'])[:8]}"
    for line in row["question"].split("\n"):
        name = r"[\s*-]*(?:(?:Option|Caption|Sentence) \w|[A-D])\s*[.:)]\s*"
        option = part != "yes_no" and re.fullmatch(name + "(.+)", line)
        if not option:
            text.append(line)
            continue
        if rewards.normalize_text(line) == rewards.normalize_text(row["answer"]):
            row["answer"] = chr(65 + len(options))
        options.append(option[1])
    if part == "yes_no":
        options = ["yes", "no"]
    row["question"] = "\n".join(text)
    groups = {"format": part, "dimension": dimension}
    return make_question(row, f"videos/{video}.mp4", options, groups)


def videomme(row, part, number, find):
    name = f"data/{row['videoID']}"
    path = find(f"{name}.mp4", f"{name}.MP4", f"{name}.mkv")
    row["id"] = row["question_id"]
    groups = {"duration": row["duration"], "domain": row["domain"], "task": row["task_type"]}
    return make_question(row, path, row["options"], groups)


class Bench(NamedTuple):
    """A benchmark: where its questions lie, and how they are read, counted and averaged."""
    files: dict[str, str]                                    # part → pattern of its annotation files
    read: Callable[..., Question | None]
    expected: int                                            # number of questions
    repo: str = ""                                           # on huggingface.co/datasets
    size: str = ""
    paper: tuple[float, ...] = ()                            # Qwen2.5-VL-7B, VideoP2R
    aggregates: dict[str, tuple] = {"all questions": ALL}    # see `mean`
    gated: bool = False                                      # a form must be accepted first
    value: Callable[[dict], float] = itemgetter("score")
    folder: str = ""                                         # if it is not data/NAME


TRACKS, FORMATS = ("Perception", "Comprehension", "Adaptation"), ("multi-choice", "yes_no", "caption_matching")
BENCHES = {
    "toy": Bench({"heldout": "heldout.json"}, toy, 512, size="4 MB", value=is_correct, folder="runs/tiny/toy"),
    "vsibench": Bench({"test": "test.jsonl"}, vsibench, 5130, "nyu-visionx/VSI-Bench", "5.7 GB", (30.1, 36.8), {
        "mean of multiple choice and MRA (paper)": ((1, VSI_CHOICE), (1, VSI_NUMERIC)),
        "mean of eight tasks (official)": (*((1 / 3, (task,)) for task in VSI_DIRECTION),
                                           *((1, (task,)) for task in VSI_NUMERIC + VSI_OTHER)),
        "multiple choice": ((1, VSI_CHOICE),), "MRA": ((1, VSI_NUMERIC),), "all questions": ALL}),
    "videommmu": Bench({track: f"{track}/test-*.parquet" for track in TRACKS}, videommmu, 900, "lmms-lab/VideoMMMU",
                       "14 GB", (48.1, 55.0), gated=True),
    "mmvu": Bench({"validation": "validation.json"}, mmvu, 625, "yale-nlp/MMVU", "1.6 GB", (60.0, 65.4),
                  {"multiple choice of the validation split": ALL}),
    "vcrbench": Bench({"test": "v1/videos/meta_info_video.json"}, vcrbench, 510, "VLM-Reasoning/VCR-Bench",
                      "859 videos", (44.3, 51.0), {"multiple choice": ALL}),
    "mvbench": Bench({task: f"json/{task}.json" for task in MVBENCH_FOLDERS}, mvbench, 4000, "OpenGVLab/MVBench",
                     "16 GB", (59.0, 68.1), gated=True),
    "tempcompass": Bench({form: f"{form}/test-*.parquet" for form in FORMATS}, tempcompass, 5536,
                         "lmms-lab/TempCompass", "0.5 GB", (72.6, 74.5), {
        "closed formats, pooled": ALL, "mean of formats": tuple((1, (form,)) for form in FORMATS)}),
    "videomme": Bench({"test": "videomme/test-*.parquet"}, videomme, 2700,
                      "lmms-lab/Video-MME", "101 GB", (56.6, 60.0), {"all questions, without subtitles": ALL}),
}
SEVEN = [name for name in BENCHES if name != "toy"]


def find_path(root: Path, *paths: str) -> str:
    """The first path or pattern that is there below root, else the first one."""
    for path in paths:
        for file in root.glob(path):
            return file.relative_to(root).as_posix()
    return paths[0]


def read_annotations(file: Path) -> list[dict]:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet
            return pyarrow.parquet.read_table(file).to_pylist()
        return list(data.json_rows(file))
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def read_bench(name: str, root: Path) -> tuple[list[Question], list[str]]:
    """A benchmark's questions, and notes. ValueError if over 1 % are broken, or there are no media,
    with commands."""
    bench, questions, broken = BENCHES[name], [], []
    for part, pattern in bench.files.items():
        for file in sorted(root.glob(pattern)):
            for number, row in enumerate(read_annotations(file)):
                try:
                    question = bench.read(row, part, number, partial(find_path, root))
                except Exception as error:                   # a damaged row can cause any
                    broken.append(f"{file}, question {number + 1}: {type(error).__name__}: {error}")
                    continue
                if question:
                    questions.append(question)
    if len(broken) > 0.01 * (len(questions) + len(broken)):
        raise ValueError(f"{broken[0]} (one of {len(broken)})")
    if not any((root / q.record.path).exists() for q in questions):
        raise ValueError(how_to_fetch(name, root, len(questions)))
    notes = [f"{len(questions)} questions in {root}"]
    if len(questions) != bench.expected:
        notes.append(f"NOT the benchmark's {bench.expected} questions")
    if broken:
        notes.append(f"LEFT OUT {len(broken)}: {broken[0]}")
    return questions, notes


def how_to_fetch(name: str, root: Path, count: int) -> str:
    bench = BENCHES[name]
    lines = [f"{name}: under {root} are {count} questions and none of their media. "
             f"To fetch {bench.size}:"]
    if bench.gated:
        lines.append(f"accept the form at https://huggingface.co/datasets/{bench.repo}, run `hf auth "
                     "login`")
    if bench.repo:
        lines += [f"hf download {bench.repo} --repo-type dataset --local-dir {root}",
                  f"(cd {root} && find . -name '*.zip' -execdir unzip -qo {{}} \\;)"]
    else:
        lines.append(f"python data.py toy --out {root}")
    return "\n  ".join(lines)


# ------------------------------------------------------------------------------- 7. command line

PROTOCOL = dict(frames=32, fps=2.0, max_pixels=256 * 28 * 28, max_response=1024)     # of Video-R1
INPUTS = (*PROTOCOL, "max_prompt", "prompt", "template", "seed", "temperature", "top_p")


@dataclass(frozen=True)
class EvalSettings(pagrpo.Settings):
    """How a model answers; of the training settings only those of its inputs and judges count."""
    temperature: float = flag(0.01, "0 is greedy", minimum=0)
    top_p: float = flag(0.001, "only the likeliest tokens up to this share", minimum=1e-9)
    limit: int = flag(0, "only so many questions, evenly spread; 0: all", minimum=0)
    batch: int = flag(8, "questions answered together; toy: 128", minimum=1)


def find_model(name: str | None) -> Path:
    """The newest checkpoint in a folder; without a name, that of the newest finished run, else the
    base model. Raises ValueError, with the command."""
    finished = [(0, sft.QWEN.format("7B"))]
    for file in Path("runs").glob("*/*/step-*/state.json"):
        state = data.read_json(file)
        if state.get("step", 0) == state.get("steps"):
            finished.append((file.stat().st_mtime, file.parents[1]))
    folder = Path(name or max(finished)[1])
    try:
        return newest_checkpoint(folder)
    except (OSError, ValueError) as error:
        text = f"{error}. `python pagrpo.py` makes a small model, --model names one."
        if folder.name.startswith("Qwen2.5-VL"):
            text += f"\n  hf download Qwen/{folder.name} --local-dir {folder}"
        raise ValueError(text) from None


def find_settings(stage: Path, args: Namespace) -> EvalSettings:
    """A preset, over it the inputs of a stage's run, over them the protocol, then the flags."""
    saved, given = data.read_json(stage / "settings.json"), vars(args)
    inputs = {*data.InputSettings.__dataclass_fields__, "max_response", "seed"}
    values = dict(pagrpo.PRESETS[args.preset or saved.get("preset") or "7b"])
    values.pop("temperature", None)                          # RL's own
    values |= {name: saved[name] for name in inputs if name in saved}
    if args.bench == "toy":
        values["batch"] = 128
    elif args.bench:
        values |= PROTOCOL
    for name in EvalSettings.__dataclass_fields__:
        if given.get(name) is not None:
            values[name] = given[name]
    return EvalSettings(**values)


def answer_one(args: Namespace) -> None:
    """Prints what the model sees of a clip or picture, and its response to --question. Raises
    MediaError."""
    clip = Path(args.video).resolve()
    kind = args.problem_type or ("multiple choice" if args.options else "free-form")
    medium = "image" if clip.suffix.lower() in data.PICTURES else "video"
    record = data.Record("", args.question, tuple(args.options), kind, "", clip.name, medium)
    s, (vocabulary, model) = args.settings, load_once(args.model, args.world.device)
    example = data.build_example(record, clip.parent, vocabulary, model.config, s)
    steps, rows, columns = example.grid
    print(f"{clip.name}: {steps} grid steps of {example.seconds:.2f} s, {columns * 14}×{rows * 14} "
          f"pixels, {len(example.ids)} prompt tokens")
    (response, _), = pagrpo.answer(model, [example], vocabulary, no_verdicts, s,
                                   s.temperature, s.top_p)
    print(response.text)
    if not response.finished:
        print(f"(cut off after {len(response.tokens)} tokens)")


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False,
                            formatter_class=RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to do")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--bench", choices=[*BENCHES, "all"], help="benchmark to run; toy: with the rule judge, "
        "the others: without a judge unless --judge names one")
    add("--compare", nargs=2, metavar=("A", "B"), help="two evaluations, question by question")
    add("--video", help="ask --question about this video, picture or folder of frames")
    add("--report", nargs="+", metavar="RUN", help="write the page of a run, or of two")
    group = parser.add_argument_group("for --bench")
    add = group.add_argument
    add("--model", help="model folder, or a stage's [the newest finished run, else the base model]")
    add("--blind", action="store_true", help="the model does not see the media")
    add("--given", metavar="RUN", help="responses begin with the observations of this evaluation")
    add("--data", help="folder of the benchmark [data/BENCH; toy: runs/tiny/toy]")
    add("--out", help="folder of results [eval/ in the model's folder]")
    add("--preset", choices=pagrpo.PRESETS, help="settings of a model from elsewhere [7b]")
    data.add_flags(group, EvalSettings, {}, ("limit", "batch"))
    data.add_flags(parser, data.JudgeSettings)
    parser.set_defaults(judge=None)
    group = parser.add_argument_group("input and sampling [as the model's run; benchmarks: as below]")
    data.add_flags(group, EvalSettings, {"benchmarks": PROTOCOL}, INPUTS)
    add = parser.add_argument_group("for --video").add_argument
    add("--question", default="What can be seen?", help="[What can be seen?]")
    add("--options", nargs="+", default=[], help="its options, without letters")
    add("--problem-type", choices=rewards.PROBLEM_TYPES, help="[free-form, or multiple choice]")
    args = parser.parse_args(argv)
    if len(args.report or ()) > 2:
        parser.error("--report takes one run or two")
    return args


def paper_table(model: str, summaries: list[dict]) -> list[str]:
    """The paper's Table 1: this model's scores beside the paper's."""
    table = [["percent (* not the whole benchmark)", model, "Qwen2.5-VL-7B (paper)",
              "VideoP2R (paper)"]]
    scores = {}
    for s in summaries:
        part = s["scored"] != BENCHES[s["bench"]].expected
        headline = next(iter(s["aggregates"].values()))
        scores[s["bench"] + "*" * part] = [headline["value"], *s["paper"]]
    scores["mean"] = np.mean([*scores.values()], axis=0)
    for name, columns in scores.items():
        table.append([name, *(f"{x:.1f}" for x in columns)])
    return data.format_table(table)


def evaluate_all(args: Namespace) -> None:
    """Finds model and benchmarks, and runs them. Raises ValueError if one cannot be run."""
    args.model = find_model(args.model)
    stage = args.model.parent if args.model.name.startswith("step-") else args.model
    if args.blind or args.given:                             # what was not seen is not judged
        args.judge = None
    elif args.bench == "toy":
        args.judge = args.judge or "rule"
    args.settings, args.out = find_settings(stage, args), Path(args.out or stage / "eval")
    args.world.print0(f"Model {args.model}")
    if args.video:
        return answer_one(args)
    names = SEVEN if args.bench == "all" else [args.bench]
    benches, lacking, scored = [], [], []
    for name in names:
        folder = Path(args.data or BENCHES[name].folder or f"data/{name}")
        try:
            benches.append((name, folder, *read_bench(name, folder)))
        except ValueError as error:
            lacking.append(str(error))
    for args.bench, args.data, questions, notes in benches:
        summary = run_bench(questions, notes, args)
        if summary["scored"]:
            scored.append(summary)
    if len(names) > 1 and scored:
        args.world.print0("\n".join(["", *paper_table(stage.name, scored)]))
    if lacking:
        raise ValueError("\n".join(lacking))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.compare:
            return print(compare(*args.compare))
        if args.report:
            return print(sft.write_report(*args.report))
        args.world = sft.start_world(timeout=timedelta(hours=12))    # ranks may end hours apart
        evaluate_all(args)
        args.world.shutdown()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    except data.MediaError as error:
        sys.exit(f"{args.video}: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on from here.")


if __name__ == "__main__":
    main()
