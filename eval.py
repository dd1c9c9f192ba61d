"""What has a model learned? Seven benchmarks, the toy world, the paper's analyses, and single questions about any clip.

    python eval.py --bench toy                                   the newest finished run, on held-out toy clips
    python eval.py --bench mvbench --model runs/7b/pagrpo        reads data/mvbench as it is downloaded
    torchrun --nproc_per_node=8 eval.py --bench all              the paper's Table 1
    python eval.py --bench toy --mismatch                        does the answer follow from the think?
    python eval.py --bench toy --model runs/tiny/sft --perception-from runs/tiny/pagrpo/eval/toy
    python eval.py --compare runs/tiny/sft/eval/toy runs/tiny/pagrpo/eval/toy
    python eval.py --video clip.avi --question "Which letter comes right after the red O?" --options "red X" "blue T"

Protocol, unless flags say otherwise (the paper's): 32 frames spread over the whole video, always with the first and the
last, at most 256·28·28 pixels each, temperature 0.01, top-p 0.001, the prompt that the model was trained with. The toy
world and --video keep the run's own frames and pixels. An evaluation is a folder, by default MODEL/eval/BENCH:
responses.jsonl (a record a question), summary.json, settings.json. It goes on where it was stopped, on any number of
ranks.
"""
import argparse
import ast
import csv
import hashlib
import json
import math
import re
import sys
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np
from tqdm import tqdm

from data import (TOY_SPLITS, Examples, JudgeSettings, MediaError, Record, add_flags, lock_folder, blind_answers,
                  build_example, given_flags, instruction, load_local, make_judge, make_toy, format_table,
                  check_settings, to_record, write_rows, write_atomically)
from pagrpo import PRESETS, Response, Settings, ask, rollout, wilson
from rewards import PROBLEM_TYPES, Journal, choice, number, option_texts, normalize_text, task_metric, read_jsonl
from sft import QWEN, World, newest_checkpoint, start_world

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


# ------------------------------------------------------------------------------------------------ 1. benchmarks

@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""
    record: Record                                           # as the training prompt asks it
    metric: str                                              # task (as in training), choice, mra or open
    groups: dict[str, str]                                   # {"task": "action_count", …}; the first makes readings
    direct: str = ""                                         # the official short-answer prompt
    labels: tuple[str, ...] = ()                             # what that prompt calls its options, if not A, B, C


Find = Callable[..., str]                                    # the first of some paths that is on disk, else the first


def item(key: str, question: str, options: Sequence[str], answer: str, path: str, groups: dict, direct: str,
         metric: str = "choice", labels: Sequence[str] = (), **more) -> Item:
    """Checks a question and puts it into the words of training. `metric` is for a question without options. Raises
    ValueError for one that could not be scored."""
    options, reference = tuple(map(str, options)), str(answer)
    metric = "choice" if options else metric
    if metric == "choice" and (len(options) < 2 or (reference := choice(reference, options)) is None):
        raise ValueError(f"the answer {answer!r} is none of the options {list(options)}")
    if metric == "mra" and number(reference) is None:
        raise ValueError(f"the answer {answer!r} is no number")
    question, groups = str(question).strip(), {name: str(label) for name, label in groups.items()}
    (question + "".join(options) + direct).encode()          # half a character is a ValueError
    kind = {"choice": "multiple choice", "mra": "regression", "open": "free-form"}[metric]
    return Item(Record(str(key), question, options, kind, reference, path, "video", **more), metric, groups, direct,
                tuple(labels))


LETTER_ONLY = "Answer with the letter of the correct option."


def lettered(options: Sequence[str], form: str = "{}. {}") -> str:
    return "\n".join(form.format(chr(65 + i), o) for i, o in enumerate(options))


def toy(row: dict, part: str, keys: tuple, find: Find) -> Item:
    record = to_record(row, traces=False)
    return Item(record, "task", {"problem type": record.problem_type})


def vsibench(row: dict, part: str, keys: tuple, find: Find) -> Item:
    if row["question_type"] not in VSI_NUMERIC + VSI_CHOICE + VSI_DIRECTION:
        raise ValueError(f"unknown question_type {row['question_type']!r}")
    options = row["options"] or ()                           # they carry their letters
    asked = ["These are frames of a video.", row["question"]] + (["Options:", *options] if options else []) + [
        "Answer with the option's letter from the given choices directly." if options else
        "Please answer the question using a single word or phrase."]
    return item(row["id"], row["question"], options, row["ground_truth"],
                find(f"{row['dataset']}/{row['scene_name']}.mp4"), {"task": row["question_type"]}, "\n".join(asked),
                metric="mra")


DISCIPLINES = {subject: discipline for discipline, subjects in {
    "Art": "Art Art_Theory Design Music", "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics", "Humanities": "History Literature Sociology Psychology",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
                   "Mechanical_Engineering"}.items() for subject in subjects.split()}


IGNORE = "Please ignore the Quiz question in last frame of the video."


def videommmu(row: dict, part: str, keys: tuple, find: Find) -> Item:
    """Multiple choice where there are options: `question_type` is missing or null in places."""
    options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"] or ()
    discipline = DISCIPLINES["_".join(row["id"].split("_")[1:-1])]
    if part == "Adaptation":                                 # these sentences belong to the question in any prompt
        question = ("You should watch and learn the video content. Then apply what you learned to answer the "
                    f"following {'multi-choice' if options else 'open-ended'} question. The image for this question is "
                    f"at the end of the video.\n{row['question']}")
    else:
        question = f"{row['question']}\n{IGNORE}"
    direct = f"{question}\n{lettered(options)}" if part == "Adaptation" else (
        f"{row['question']}\n{lettered(options)}\n{IGNORE}")
    return item(f"{part}/{row['id']}", question, options, row["answer"], find(f"{discipline}/{row['id']}.mp4"),
                {"track": part, "discipline": discipline}, direct.strip(), metric="open")


def mmvu(row: dict, part: str, keys: tuple, find: Find) -> Item | None:
    if row["question_type"] != "multiple-choice":
        return None
    options = list(row["choices"].values())
    direct = f"Question: {row['question']}\n{lettered(options, '{}: {}')}\n{LETTER_ONLY}"
    return item(row["id"], row["question"], options, row["answer"], find(row["video"].split("/resolve/main/")[-1]),
                {"subject": row["metadata"]["subject"]}, direct)


def vcrbench(row: dict, part: str, keys: tuple, find: Find) -> Item | None:
    """The options stand inside the question, the first glued to it: cut there, they are shown once."""
    if str(row["multiple-choice"]).lower() != "true":
        return None
    choices = ast.literal_eval(row["choices"]) if isinstance(row["choices"], str) else row["choices"]
    options, question = list(choices.values()), row["question"]
    inside = re.search(r"\s*\(?A[.):]\s*" + re.escape(str(options[0])[:20]), question)
    seconds = float(row.get("duration") or 0)
    return item(row["id"], question[:inside.start()] if inside else question, options, row["answer"],
                find(f"v1/videos/{row['video_path']}", row["video_path"]),
                {"dimension": row["dimension"],
                 "duration": "up to 60 s" if seconds <= 60 else "up to 300 s" if seconds <= 300 else "over 300 s"},
                "\n".join([question.strip()] + [lettered(options)] * (not inside) + [LETTER_ONLY]))


# json name → folder in `main` (under video/, raw videos), folder in the branch `video` (clips already cut)
MVBENCH = {
    **dict.fromkeys(("action_sequence", "action_prediction", "object_interaction"),
                    ("star/Charades_v1_480", "star/Charades_segment")),
    "action_localization": ("sta/sta_video", "sta/sta_video_segment"),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment"),
    "action_antonym": ("ssv2_video", "ssv2_video_mp4"),
    "fine_grained_action": ("Moments_in_Time_Raw/videos",) * 2, "unexpected_action": ("FunQA_test/test",) * 2,
    **dict.fromkeys(("object_existence", "moving_direction", "moving_count", "moving_attribute",
                     "counterfactual_inference"), ("clevrer/video_validation",) * 2),
    **dict.fromkeys(("object_shuffle", "action_count", "state_change", "character_order"),
                    ("perception/videos",) * 2),
    "scene_transition": ("scene_qa/video",) * 2, "fine_grained_pose": ("nturgbd", "nturgbd_convert"),
    "egocentric_navigation": ("vlnqa",) * 2,
}


def mvbench(row: dict, part: str, keys: tuple, find: Find) -> Item:
    """The official prompt has a system line and begins the answer with "Best option:("; both are left out here."""
    main, branch = MVBENCH[part]
    name, options = row["video"], row["candidates"]
    path = find(f"video/{main}/{name}", f"{branch}/{name}", f"video/data0613/{main}/{name}")
    direct = f"Question: {row['question']}\nOptions:\n{lettered(options, '({}) {}')}\nOnly give the best option."
    bounds = (float(row["start"]), float(row["end"])) if "start" in row and path.startswith("video/") else None
    return item(f"{part}/{keys[-1]}", row["question"], options, chr(65 + options.index(row["answer"])), path,
                {"task": part}, direct, bounds=bounds, rate=3.0 if "frames_fps3" in path else 0.0)


def tempcompass(row: dict, part: str, keys: tuple, find: Find) -> Item:
    """Options stand in the question, a line each. The training prompt knows no yes/no question and no "Option 1":
    there both are multiple choice between two texts."""
    video, dimension = row.get("video_id") or keys[0], row.get("dim") or keys[1]
    key = f"{part}/{video}/{dimension}/{hashlib.sha256(row['question'].encode()).hexdigest()[:8]}"
    how = dict(path=find(f"videos/{video}.mp4"), groups={"format": part, "dimension": dimension})
    if part == "yes_no":
        return item(key, row["question"], ("yes", "no"), row["answer"],
                    direct=row["question"] + "\nPlease answer yes or no:", **how)
    lines = [re.fullmatch(r"[\s*-]*(?:((?:Option|Caption|Sentence) \w)|[A-D])\s*[.:)]\s*(.+)", line)
             for line in row["question"].split("\n")]
    asked = [line for line, found in zip(row["question"].split("\n"), lines) if not found]
    found = [line for line in lines if line]
    same = [chr(65 + i) for i, line in enumerate(found) if normalize_text(line[0]) == normalize_text(row["answer"])]
    return item(key, "\n".join(asked), [line[2] for line in found], same[0] if same else row["answer"],
                direct=row["question"] + "\nPlease directly give the best option:",
                labels=[line[1] for line in found if line[1]], **how)


def videomme(row: dict, part: str, keys: tuple, find: Find) -> Item:
    options = list(row["options"])                           # they carry their letters
    asked = ["Select the best answer to the following multiple-choice question based on the video. Respond with only "
             "the letter (A, B, C, or D) of the correct option.", row["question"], *options, "The best answer is:"]
    return item(row["question_id"], row["question"], options, row["answer"],
                find(*(f"data/{row['videoID']}.{kind}" for kind in ("mp4", "MP4", "mkv"))),
                {"duration": row["duration"], "domain": row["domain"], "task": row["task_type"]}, "\n".join(asked))


# A reading is a mean over parts, each a mean over leaves, each a mean over the questions of some labels (None: of all).
ALL = ((None,),)
VSI_NUMERIC = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
VSI_DIRECTION = tuple(f"object_rel_direction_{level}" for level in ("easy", "medium", "hard"))
VSI_CHOICE = ("object_rel_distance", "route_planning", "obj_appearance_order")


class BenchError(ValueError):
    """A benchmark that is not there, or broken."""


class Bench(NamedTuple):
    """A benchmark: where its questions lie and how they are read, counted and averaged."""
    files: dict[str, tuple[str, ...]]                        # part → places of its annotations (patterns), best first
    item: Callable[[dict, str, tuple, Find], Item | None]
    expected: int                                            # questions
    repo: str = ""                                           # on huggingface.co/datasets
    size: str = ""
    form: bool = False                                       # to be accepted in a browser first
    unpack: str = ""                                         # commands, inside its folder
    paper: tuple[float, ...] = ()                            # Qwen2.5-VL-7B, VideoP2R
    readings: dict[str, tuple] = {"all questions": ALL}      # name → parts; labels are those of the first group
    right: bool = False                                      # count what is entirely right, not the mean score


UNZIP = 'find . -name "*.zip" -execdir unzip -qo {} \\;'
BENCHES = {
    "toy": Bench({"heldout": ("heldout.json",)}, toy, 512, right=True),
    "vsibench": Bench({"test": ("test.jsonl",)}, vsibench, 5130, "nyu-visionx/VSI-Bench", "5.7 GB", False, UNZIP,
                      (30.1, 36.8), {
        "mean of multiple choice and MRA (paper)": ((VSI_CHOICE + VSI_DIRECTION,), (VSI_NUMERIC,)),
        "mean of eight tasks (official)": (tuple((task,) for task in VSI_DIRECTION),
                                           *(((task,),) for task in VSI_NUMERIC + VSI_CHOICE)),
        "multiple choice": ((VSI_CHOICE + VSI_DIRECTION,),), "MRA": ((VSI_NUMERIC,),), "all questions": ALL}),
    "videommmu": Bench({track: (f"{track}/test-*.parquet", f"data/{track.lower()}_video.json",
                                f"{track.lower()}_video.json")
                        for track in ("Perception", "Comprehension", "Adaptation")}, videommmu, 900,
                       "lmms-lab/VideoMMMU", "14 GB", True, UNZIP, (48.1, 55.0)),
    "mmvu": Bench({"validation": ("validation.json",)}, mmvu, 625, "yale-nlp/MMVU", "1.6 GB", False, "", (60.0, 65.4),
                  {"multiple choice of the validation split": ALL}),
    "vcrbench": Bench({"test": ("v1/videos/meta_info_video.json", "VCR-Bench.tsv")}, vcrbench, 510,
                      "VLM-Reasoning/VCR-Bench", "859 videos of unstated size", False, UNZIP, (44.3, 51.0),
                      {"multiple choice": ALL}),
    "mvbench": Bench({task: (f"json/{task}.json",) for task in MVBENCH}, mvbench, 4000, "OpenGVLab/MVBench", "16 GB",
                     True, UNZIP, (59.0, 68.1)),
    "tempcompass": Bench({form: (f"{form}/test-*.parquet", f"questions/{form}.json", f"{form}.json")
                          for form in ("multi-choice", "yes_no", "caption_matching")}, tempcompass, 5536,
                         "lmms-lab/TempCompass", "0.5 GB", False, UNZIP, (72.6, 74.5), {
        "closed formats, pooled": ALL,
        "mean of formats": tuple(((form,),) for form in ("multi-choice", "yes_no", "caption_matching"))}),
    "videomme": Bench({"test": ("videomme/test-*.parquet", "videomme/test-*.json")}, videomme, 2700,
                      "lmms-lab/Video-MME", "101 GB", False, UNZIP, (56.6, 60.0),
                      {"all questions, without subtitles": ALL}),
}


def annotation_rows(file: Path) -> Iterator[tuple[tuple, dict]]:
    """The rows of an annotation file, with the keys or numbers under which they stand in it."""
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise SystemExit(f"{file} is parquet: `pip install pyarrow` to read it")
        tree = pyarrow.parquet.read_table(file).to_pylist()
    elif file.suffix == ".tsv":
        csv.field_size_limit(2 ** 24)
        with file.open(encoding="utf-8", newline="") as lines:
            tree = list(csv.DictReader(lines, delimiter="\t"))
    elif file.suffix == ".jsonl":
        tree = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    else:
        tree = json.loads(file.read_text(encoding="utf-8-sig"))

    def leaves(tree, keys: tuple) -> Iterator[tuple[tuple, dict]]:
        if isinstance(tree, dict) and {"question", "problem"} & tree.keys():
            yield keys, tree
        elif isinstance(tree, (dict, list)):
            for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
                yield from leaves(part, (*keys, key))
        else:
            raise ValueError(f"{tree!r:.60} stands where a question should be")
    yield from leaves(tree, ())


def read_bench(name: str, root: Path) -> tuple[list[Item], list[str]]:
    """A benchmark's questions as they lie on disk, and remarks on what was found. Raises BenchError: with the commands
    that fetch it if there is nothing, with file and number if more than 1 % of the questions are broken."""
    bench, items, seen, found, broken = BENCHES[name], [], Counter(), {}, []
    find = lambda *paths: next((p for p in paths if (root / p).exists()), paths[0])
    for part, places in bench.files.items():
        found[part] = next(filter(None, (sorted(root.glob(place)) for place in places)), [])
        for file in found[part]:
            try:
                rows = list(annotation_rows(file))
            except (ValueError, OSError) as error:           # JSON, Unicode and Arrow errors are ValueErrors
                raise BenchError(f"{file} cannot be read: {error}") from None
            for n, (keys, row) in enumerate(rows, start=1):
                try:
                    one = bench.item(row, part, keys, find)
                except (KeyError, IndexError, TypeError, ValueError, AttributeError, SyntaxError, OSError) as error:
                    broken.append(f"{file}, question {n}: {type(error).__name__}: {error}")
                    continue
                if one:
                    seen[key := one.record.problem_id] += 1  # what stands there twice is asked and counted twice
                    twice = f" ({seen[key]})" * (seen[key] > 1)
                    items.append(replace(one, record=replace(one.record, problem_id=key + twice)))
    if len(broken) > 0.01 * (len(items) + len(broken)):
        raise BenchError(f"{broken[0]}{f' (and {len(broken) - 1} more)' * (len(broken) > 1)}")
    if not any((root / i.record.path).exists() for i in items):
        what = f"{len(items)} questions, but none of their media lie" if items else "no questions"
        example = items[0].record.path if items else next(iter(bench.files.values()))[0]
        raise BenchError(f"{name}: {what} under {root}, for example {example}.\n{how_to_fetch(name, root)}")
    return items, remarks(bench, items, found) + [f"LEFT OUT {len(broken)}: {broken[0]}" for _ in broken[:1]]


def remarks(bench: Bench, items: list[Item], found: dict[str, list[Path]]) -> list[str]:
    """What a reader of the score should know of the questions that were found."""
    files = ["/".join(file.parts[-2:]) for some in found.values() for file in some]
    said = [f"{len(items)} questions from {', '.join(files[:3])}{f' and {len(files) - 3} more' * (len(files) > 3)}"]
    if len(items) != bench.expected:
        said.append(f"NOT the benchmark's {bench.expected} questions")
    if missing := [part for part, some in found.items() if not some]:
        said.append(f"WITHOUT {', '.join(missing)}")
    repeats = [i.record.problem_id for i in items
               if i.metric == "choice" and len(set(option_texts(i.record.options).values())) < len(i.record.options)]
    if repeats:
        said.append(f"{len(repeats)} questions offer the same text twice, where only the letter decides: "
                    f"{', '.join(repeats[:4])}{' …' * (len(repeats) > 4)}")
    return said


def how_to_fetch(name: str, root: Path) -> str:
    bench = BENCHES[name]
    form = f"accept the form at https://huggingface.co/datasets/{bench.repo}, then `hf auth login`; after that:"
    lines = [f"To fetch it ({bench.size}), {form if bench.form else 'which needs no form:'}",
             f"  hf download {bench.repo} --repo-type dataset --local-dir {root}"]
    return "\n".join(lines + [f"  (cd {root} && {bench.unpack})"] * bool(bench.unpack))


# ------------------------------------------------------------------------------------------------ 2. reading answers

def answer_text(response: str, finished: bool = True) -> str | None:
    """Where a response's answer is looked for: in its last <answer>; without one, behind the last closed segment;
    without tags, everywhere. None if it was cut off before an <answer>: it did not come to one."""
    if "<answer>" in response:
        return response.rsplit("<answer>", 1)[1].split("</answer>")[0]
    if not finished:
        return None
    rest = re.split(r"</(?:observation|think)>", response)[-1]
    return None if re.search(r"<(?:observation|think)>", rest) else rest


# A capital standing alone, or "b)" or a last "b": not the A of "5 A", "A = 5", "A man", nor the I of "I think".
VERBS = ("or|and|because|since|as|is|isn|was|which|but|in|seems|fits|matches|would|can|cannot|does|doesn|over|rather|"
         "then")
LETTER = re.compile(rf"(?<![A-Za-zÀ-ỹ0-9°'’])(?<!\d )(?<!° )(?:[B-HJ-Z]|A(?! (?!(?:{VERBS})\b)[a-z])|I(?=\W*$|[.):])|"
                    r"[a-z](?=\)|[.\]]?\s*$))(?![A-Za-zÀ-ỹ0-9₀-₉'’]|\s*=)")
CUE = re.compile(r"(?:answer|sample_token|select|pick|go with|(?:option|choice)(?=\s+is|\s*:)|respuesta|réponse|resposta|"
                 r"risposta|antwort|ответ|答案|选择|选|答え|正解|정답|답)"
                 r"(?:[\s:：*\"'`(\[-]|(?<![a-z])(?:is|would|should|must|be|to|final|correct|best|most|likely|thus|"
                 r"therefore|option|choice|letter|the|es|est|ist|lautet|é|è|la|le|die|opci[oó]n)(?![a-z])|"
                 r"是|为|选项|は|은|는)*(?:an? )?|"
                 r"\b(?:so|hence|thus|therefore|it is|it['’]s)[\s,:]+(?=\(?[A-Z]\)?\W*$)", re.I)
DOUBT = re.compile(                                          # before a mention: in its clause, its sentence, at once
    r"(?:n['’]t\b|\b(?:not|neither|cannot|unlikely|except|nicht|pas|no es|rul(?:e|ed|ing) out|eliminat\w+|"
    r"exclud\w+)\b|不)(?:(?!\b(?:but|so|thus|hence|therefore)\b)[^.!?;,，\n])*$|\bif\b(?! (?:i|we)\b)[^.!?;\n]*$|"
    r"\b(?:figure|table|section|plan|plot|frame|axis|point|line|vitamin|hepatitis|group|team|player|person|object|part|"
    r"type|grade|letter|mr\.) $", re.I)
WRONG = re.compile(                                          # behind it
    r"\W*(?:(?:would be|is|are|was|seems) (?:not|less likely|never|wrong|incorrect|false|unlikely|excluded|eliminated|"
    r"format_table out)\b|(?:is|does|did|was|can|could)(?:n['’]t| ?not)\b|can be (?:excluded|eliminated|format_table out)|是?(?:不|错))",
    re.I)
JOINED = re.compile(r"\W*(?:\b(?:or|and|as well as|oder|und|ou|et|o|y)\b)?"
                    r"(?:\W*\b(?:also|maybe|perhaps|possibly|option|choice|an?|the)\b)*\W*", re.I)
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def strip_markup(text: str) -> str:
    """Without Markdown, \\boxed{}, $ and spaces of LaTeX; every minus is a hyphen."""
    text = re.sub(r"\\[,;! ]", " ", text).replace("−", "-")
    for _ in range(2):                                       # \boxed{\text{B}}
        text = re.sub(r"\\(?:boxed|text|mathrm|textbf)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[^\S\n]+", " ", re.sub(r"[*$\\]", "", text)).strip()


def named_options(options: Sequence[str], labels: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(text, letter) of every option, and of labels: "option 2", and "2" alone."""
    names = [(normalize_text(strip_markup(text)), letter) for letter, text in option_texts(options).items()]
    labels = [(name.casefold(), letter) for name, (_, letter) in zip(labels, names)]
    return names + labels + [(name[-1], letter) for name, letter in labels if name[-1].isdigit()]


def mentions(text: str, names: Sequence[tuple[str, str]]) -> list[tuple[int, int, str]]:
    """(start, end, letter) wherever a text names an option, in order: by its letter, or by its whole text. What stands
    in a longer one is none ("3" in "-3", "3.5" or "1/3"), nor what is doubted ("not B", "A is wrong")."""
    valid, flat = {letter for _, letter in names}, text.lower()
    found = [(m.start(), m.end(), m[0].upper()) for m in LETTER.finditer(text) if m[0].upper() in valid]
    found += [(m.start(), m.end(), letter) for name, letter in names if len(name) > 1 or name.isdigit()
              for m in re.finditer(rf"(?<![\w-])(?<!\d[.,/]){re.escape(name)}(?!\w|-\w|[.,/]\d)", flat)]
    found = sorted(x for x in found if not DOUBT.search(text[max(0, x[0] - 200):x[0]]) and not WRONG.match(text, x[1]))
    return [x for x in found if not any(y[0] <= x[0] and x[1] <= y[1] and y[:2] != x[:2] for y in found)]


def same_text(text: str, names: Sequence[tuple[str, str]]) -> set[str]:
    """The letters whose option is this text, with or without its letter: to the sign, else by its words, else by the
    number it is ("1000" for "1,000 m"), else but for the article."""
    for same in (normalize_text, lambda x: re.findall(r"-?\w+", x.casefold()), lambda x: number(x) or x,
                 lambda x: re.sub(r"^(?:an?|the) (?=\w)", "", normalize_text(x))):
        found = {letter for name, letter in names if name
                 and same(text) in (same(name), same(f"{letter}. {name}"), same(f"{letter} {name}"))}
        if found:
            return found
    return set()


def read_choice(text: str | None, options: Sequence[str], labels: Sequence[str] = ()) -> str | None:
    """The letter that an answer names; None if it names none, or two ("B or C"). The first of these that applies:

    1. it is a letter or an option's text, or both: "B", "(b)", "B. a cat", "a cat"
    2. it says so, the last time: "the answer is (B)", "I sample_token a cat", "答案是B", or at its end "so B."
    3. it begins with one: "B) because …", "Yes, he does"
    4. its last line names one
    5. all of it names one
    Options that are gone through in turn, a line each, are not named by the marks of these lines; behind 3, a yes or no
    counts at the very end only. Dress is taken off first (`strip_markup`); what counts as a mention says `mentions`.
    `labels` such as "Option 2" are other texts of the options.
    """
    if text is None or not (plain := strip_markup(text)):
        return None
    names, one = named_options(options, labels), lambda letters: letters.pop() if len(letters) == 1 else None
    if normalize_text(plain).upper() in {letter for _, letter in names}:                                                # 1
        return normalize_text(plain).upper()
    if whole := same_text(plain, names):
        return one(whole)
    found = mentions(plain, names)

    def at(place: int) -> set[str]:
        """The letters named at this place, and what is joined to them: "B", "B or C", "B. a cat"."""
        letters = {x for start, _, x in found if start == place}
        ends = [end for start, end, _ in found if start == place]
        return letters | {x for start, _, x in found for end in ends if JOINED.fullmatch(plain, end, start)}
    said = [at(m.end()) for m in CUE.finditer(plain) if any(start == m.end() for start, *_ in found)]
    if said:                                                                                                    # 2
        return one(said[-1])
    line = lambda place: plain[plain.rfind("\n", 0, place) + 1:place]
    marks = [x for x in found if re.fullmatch(r"[\W\d]*(?:option |choice )?", line(x[0]), re.I)]
    if len({x for *_, x in marks}) > 1:
        found = [x for x in found if x not in marks and not any(
            end <= x[0] and JOINED.fullmatch(plain, end, x[0]) for _, end, _ in marks)]
    begun = re.match(r"(?:(?!-)\W)*", plain), re.match(r"\W*(?:option|choice) |", plain, re.I)
    if begun := at(begun[0].end()) or at(begun[1].end()):                                                       # 3
        return one(begun)
    found = [x for x in found if plain[x[0]:x[1]].lower() not in ("yes", "no") or x[1] == len(plain.rstrip(" .!"))
             and re.search(r"(?:[,.:;\n]|\bso|\bsay) ?$", plain[:x[0]])]
    last = {x for start, _, x in found if start > plain.rfind("\n")}
    return one(last or {x for *_, x in found})                                                               # 4, 5


def ends_on(think: str, options: Sequence[str]) -> str | None:
    """The option that a think ends on: the one it mentions last. In "C red T" the letter counts for both. None if it
    mentions none, or ends on a text that two options share."""
    plain = strip_markup(think)
    found = mentions(plain, named_options(options))
    last = {x for _, end, x in found if end == found[-1][1]}
    if found and len(last) == 1 and len(found) > 1 and not plain[found[-2][1]:found[-1][0]].strip(" .:)(\"'"):
        return found[-2][2]
    return last.pop() if len(last) == 1 else None


def first_number(text: str) -> Fraction | None:
    """The first number of an answer, in digits or as an English word up to twelve: "about 3.5 m", "1,5", "four". Of a
    calculation, "4 m × 5 m = 20", the one behind the last =; of "the answer is 5", the one behind that."""
    behind = re.split(r"=|\banswer is\b", text := strip_markup(text), flags=re.I)[-1]
    text = behind if re.search(r"\d", behind) else text
    if (whole := number(text)) is not None:
        return whole
    found = re.search(rf"-?\d[\d,]*\.?\d*|(?<![\w-])(?:{'|'.join(NUMBER_WORDS)})(?![\w-])", text, re.I)
    if not found:
        return None
    digits = found[0].lower().rstrip(",.")
    return Fraction(NUMBER_WORDS.index(digits)) if digits in NUMBER_WORDS else number(
        re.sub(r"^(-?\d+),(\d{1,2})$", r"\1.\2", digits))  # a decimal comma


def mean_relative_accuracy(predicted: Fraction, wanted: Fraction) -> float:
    """MRA (VSI-Bench): the share of the ten tolerances 50 %, 45 % … 5 % within which the relative error lies. On the
    edge counts, as in the official code (its paper says <), and fractions keep edges where they are."""
    if wanted == 0:
        return float(predicted == 0)
    error = abs(predicted - wanted) / abs(wanted)
    return sum(error <= Fraction(5 * k, 100) for k in range(1, 11)) / 10


def open_answer(text: str, gold: str) -> float:
    """VideoMMMU's open questions, by MMMU's lenient rule: a number is right if any behind the last "is", "answer", "="
    or ":" is equal to two decimals, a text if the answer contains it, a letter if the answer names it."""
    wanted = [x.strip(" '\"") for x in gold.strip("[]").split(",")] if gold.startswith("[") else [gold]
    text = strip_markup(text)
    behind = re.split(r"\bis\b|\banswer\b|=|:(?!\d)", text, flags=re.I)[-1]
    said = [number(m) for m in re.findall(r"-?\d[\d,]*\.?\d*(?:/\d+)?", behind if re.search(r"\d", behind) else text)]
    for one in wanted:
        if re.fullmatch("[A-Z]", one):
            hit = read_choice(text, [""] * 26) == one
        elif (value := number(one)) is not None:
            hit = any(x is not None and round(x, 2) == round(value, 2) for x in said)
        else:
            hit = normalize_text(one) in normalize_text(text)
        if hit:
            return 1.0
    return 0.0


def score(item: Item, response: str, answer: str | None, finished: bool) -> tuple[str | None, float]:
    """What was read from a response, and its score in [0, 1]. Nothing read scores 0 and stays in the mean.

    `task` is the reward of training: one well-formed answer of a response that came to its end.
    """
    r = item.record
    if item.metric == "task":
        return answer, task_metric(r.problem_type, answer, r.reference, r.options) * finished
    text = answer_text(response, finished)
    if item.metric == "choice":
        letter = read_choice(text, r.options, item.labels)
        return letter, float(letter == r.reference)
    if text is None or not text.strip():
        return None, 0.0
    if item.metric == "open":
        return text.strip(), open_answer(text, r.reference)
    if (value := first_number(text)) is None:
        return None, 0.0
    value = max(-10 ** 15, min(value, 10 ** 15))             # no float holds 1e400, and it is as wrong
    return f"{float(value):g}", mean_relative_accuracy(value, number(r.reference))


# ------------------------------------------------------------------------------------------------ 3. running

@dataclass(frozen=True)
class Condition:
    """What the model gets of a question: its video or nothing, and an observation or none."""
    name: str = ""
    blind: bool = False
    given: dict[str, str] | None = None                      # problem_id → observation
    source: str = ""                                         # a hash of where they come from


@dataclass(frozen=True)
class Job:
    """An evaluation: a benchmark, a model, and how it is asked."""
    bench: str
    root: Path                                               # of the benchmark's files
    model: Path
    settings: Settings
    args: argparse.Namespace
    world: World


def asked(item: Item, condition: Condition, args: argparse.Namespace) -> Record:
    """A question as it is put. A direct prompt has no template: there a given observation is part of the question."""
    r, given = item.record, condition.given and condition.given[item.record.problem_id]
    if args.direct:
        r = replace(r, question=f"Observation: {given}\n{item.direct}" if given else item.direct, options=())
        given = None
    return replace(r, blind=condition.blind, given=given, bounds=r.bounds if args.clips else None)


def to_row(item: Item, e: Response, settings: Settings, verdict) -> dict:
    """One line of responses.jsonl: what was asked, what the model really saw, said, and what it was worth."""
    r, (steps, height, width) = e.example.record, e.example.grid or (0, 0, 0)
    read, value = score(item, e.text, e.parsed.answer, e.finished)
    prompt = hashlib.sha256(f"{settings.prompt}\n{instruction(r, settings)}".encode()).hexdigest()[:16]
    return {"id": r.problem_id, "clip": r.path, "groups": item.groups, "metric": item.metric,
            "problem_type": r.problem_type, "question": item.record.question, "options": list(item.record.options),
            "reference": r.reference, "prompt": prompt, "prompt_tokens": len(e.example.ids),
            "frames": steps * 2 if r.data_type == "video" else steps, "pixels": [height * 14, width * 14],
            "response": e.text, "tokens": len(e.tokens), "finished": e.finished,
            "observation": e.parsed.observation if r.given is None else r.given, "think": e.parsed.think,
            "answer": e.parsed.answer, "extracted": read, "score": value,
            "format": (e.parsed.perception_format or r.given is not None) and e.parsed.reasoning_format,
            "perception": verdict and verdict.sufficient, "judge": verdict and (verdict.error or verdict.explanation)}


def read_rows(file: Path) -> list[dict]:
    """The rows of a responses.jsonl, none if there is no file. Raises ValueError for what is no such row."""
    rows, _ = read_jsonl(file)
    for n, row in enumerate(rows, start=1):
        answered = isinstance(row.get("score"), (int, float)) and {"question", "response", "perception"} <= row.keys()
        if not ({"id", "clip", "groups"} <= row.keys() and (answered or {"missing", "bytes"} <= row.keys())):
            raise ValueError(f"{file}, line {n}: no response of an evaluation")
    return rows


def recorded(folder: Path) -> dict[str, dict]:
    """What an evaluation has so far, on however many ranks: id → row. An answer counts before a missing medium, and
    what ranks have just written before what stood there."""
    files = [folder / "responses.jsonl", *sorted(folder.glob("responses.*.jsonl"))]
    return {row["id"]: row for row in sorted((row for file in files for row in read_rows(file)),
                                             key=lambda row: "missing" not in row)}


def size_of(file: Path) -> int:
    return file.stat().st_size if file.is_file() else len(list(file.iterdir())) if file.is_dir() else -1


def unanswered(items: list[Item], done: dict[str, dict], root: Path) -> list[Item]:
    """Questions without an answer: never asked, worded anew since, or without a medium that has come or changed."""
    def settled(r: Record, row: dict) -> bool:
        if "missing" in row:
            return [row["clip"], row["bytes"]] == [r.path, size_of(root / r.path)]
        return [row["question"], row["options"], row["reference"]] == [r.question, list(r.options), r.reference]
    return [i for i in items if i.record.problem_id not in done or not settled(i.record, done[i.record.problem_id])]


loaded = lru_cache(maxsize=2)(load_local)                    # several benchmarks, one model


def respond(job: Job, items: list[Item], condition: Condition, folder: Path) -> None:
    """Answers this rank's questions and writes each down at once. Raises ValueError if the judge is lost."""
    s, args, (vocabulary, model, device) = job.settings, job.args, loaded(job.model)
    judge = None
    if args.judge != "none" and condition.given is None:
        blind = loaded(Path(s.judge_model) if s.judge == "reference" and s.judge_model else job.model)
        judge = make_judge(s, folder / f"judge-{job.world.rank}.jsonl", lambda claims: blind_answers(
            blind[1], blind[0], claims, s, s.max_response, args.batch, device), device)
    out, of = Journal(folder / f"responses.{job.world.rank}.jsonl"), {i.record.problem_id: i for i in items}
    examples = Examples([asked(i, condition, args) for i in items], job.root, vocabulary, model.config, s, max_unreadable=1,
                        teaching=False)
    batches = [range(i, min(i + args.batch, len(items))) for i in range(0, len(items), args.batch)]
    scores, bar = [], tqdm(total=len(items), desc=f"{job.bench} {condition.name}".strip(), unit="question",
                           disable=not job.world.first)
    for batch, part in zip(batches, examples.prefetch(batches)):
        for i in set(batch) & examples.skipped.keys():
            r = items[i].record
            out.add({"id": r.problem_id, "clip": r.path, "groups": items[i].groups, "missing": examples.skipped[i],
                     "bytes": size_of(job.root / r.path)})
        groups = rollout(model, part, vocabulary, s, 1, args.temperature, "evaluation", device, args.top_p
                         ) if part else []
        responses = [e for group in groups for e in group]
        verdicts = ask(responses, judge)() if judge else [None] * len(responses)
        if len(lost := [v.error for v in verdicts if v and v.error]) > s.max_unknown * len(verdicts):
            raise ValueError(f"{len(lost)} of {len(verdicts)} verdicts stayed unknown, more than --max-unknown "
                             f"{s.max_unknown:g} allows: {lost[0]:.200}. The same command goes on from here.")
        for e, verdict in zip(responses, verdicts):
            row = to_row(of[e.example.record.problem_id], e, s, verdict)
            scores.append(row["score"])
            out.add(row)
        bar.update(len(batch))
        bar.set_postfix_str(f"score {100 * sum(scores) / max(1, len(scores)):.1f}")
    bar.close()


OWN = ("frames", "fps", "min_pixels", "max_pixels", "max_prompt", "max_response", "prompt", "template", "seed",
       "refuse_leaks", "judge_model")                        # settings that decide an answer


def run(job: Job, items: list[Item], condition: Condition = Condition()) -> list[dict]:
    """Runs or continues an evaluation. Returns its rows in the benchmark's order, on every rank."""
    args, world = job.args, job.world
    folder = args.out / f"{job.bench} {condition.name}".strip().replace(" ", "-")
    weights = [f"{f.stat().st_size} bytes of {int(f.stat().st_mtime)}" for f in sorted(job.model.glob("*.safetensors"))]
    if world.first:
        check_settings(folder, {name: getattr(job.settings, name) for name in OWN} | {
            "bench": job.bench, "model": str(job.model.resolve()), "weights": weights, "temperature": args.temperature,
            "top_p": args.top_p, "direct": args.direct, "clips": args.clips, "judge": args.judge,
            "observations": condition.source}, {}, free=())
    todo = unanswered(items, recorded(folder), job.root)
    world.barrier()                                             # all have read before any writes
    if todo:
        with lock_folder(folder) if world.first else nullcontext():
            clips = {clip: n for n, clip in enumerate(dict.fromkeys(i.record.path for i in todo))}
            mine = [i for i in todo if clips[i.record.path] % world.size == world.rank]    # a clip is read by one rank
            respond(job, mine, condition, folder)
            world.barrier()
            done = recorded(folder)
            world.barrier()
            if world.first:                                  # in the benchmark's order, then what was asked before
                order = {i.record.problem_id: done[i.record.problem_id] for i in items}
                write_rows(folder / "responses.jsonl", (order | done).values())
                for file in folder.glob("responses.*.jsonl"):
                    file.unlink()
    world.barrier()
    done = recorded(folder)
    return [done[i.record.problem_id] for i in items]


# ------------------------------------------------------------------------------------------------ 4. numbers

def chance(row: dict) -> float:
    """What guessing among the options scores."""
    return 1 / len(row["options"]) if row["problem_type"] == "multiple choice" else 0.0


def grade(row: dict) -> float:
    return row["score"]


def right(row: dict) -> float:
    return float(row["score"] > 1 - 1e-9)


def mean(rows: list[dict], parts: Sequence[tuple] = ALL, value: Callable[[dict], float] = grade) -> dict:
    """A reading in percent (see ALL), over what is there of it, with its 95 % interval and chance level.

    One mean of rights and wrongs has Wilson's interval. For anything else (MRA, ROUGE, means of means) clips are drawn
    anew 2,000 times, each with all its questions: questions about one clip are not independent.
    """
    of = lambda names: [r for r in rows if names is None or next(iter(r["groups"].values())) in names]
    there = [leaves for part in parts if (leaves := [some for names in part if (some := of(names))])]
    leaves = [(1 / len(there) / len(part), some) for part in there for some in part]
    n = sum(len(some) for _, some in leaves)
    if not n:
        return {"value": None, "low": None, "high": None, "chance": None, "n": 0}
    weights = np.array([weight for weight, _ in leaves])
    clips = {clip: i for i, clip in enumerate(dict.fromkeys(r["clip"] for _, some in leaves for r in some))}
    sums, counts, guess = np.zeros((3, len(clips), len(leaves)))
    for j, (_, some) in enumerate(leaves):
        for r in some:
            at = clips[r["clip"]], j
            sums[at] += value(r)
            counts[at] += 1
            guess[at] += chance(r)
    level = float(weights @ (sums.sum(0) / counts.sum(0)))
    if len(leaves) == 1 and all(value(r) in (0, 1) for r in leaves[0][1]):
        low, high = wilson(level, n)
    else:
        draws = np.random.default_rng(0).multinomial(len(clips), np.full(len(clips), 1 / len(clips)), size=2000)
        with np.errstate(invalid="ignore"):
            means = (draws @ sums) / (draws @ counts) @ weights
        low, high = np.nanpercentile(means, [2.5, 97.5])
    return {"value": 100 * level, "low": 100 * float(low), "high": 100 * float(high),
            "chance": 100 * float(weights @ (guess.sum(0) / counts.sum(0))), "n": n}


def spread(values: list[int]) -> str:
    return (f"{values[0]}" if len(set(values)) == 1 else
            f"{min(values)}–{max(values)} (mean {sum(values) / len(values):.1f})" if values else "no")


def summarise(name: str, rows: list[dict]) -> dict:
    """All numbers of a finished evaluation, as summary.json holds them."""
    bench, scored = BENCHES[name], [r for r in rows if "missing" not in r]
    value = right if bench.right else grade
    judged = [r for r in scored if r["perception"] is not None]
    groups = defaultdict(dict)
    for dimension in rows[0]["groups"] if rows else ():
        for label in dict.fromkeys(r["groups"][dimension] for r in rows):
            some = [r for r in scored if r["groups"][dimension] == label]
            groups[dimension][label] = mean(some, value=value) | {"perception": mean(
                [r for r in some if r["perception"] is not None], value=lambda r: float(r["perception"]))}
    readings = {reading: mean(scored, parts, value) for reading, parts in bench.readings.items()}
    if bench.right:
        readings["mean of the task metrics"] = mean(scored)
    return {"bench": name, "questions": len(rows), "scored": len(scored),
            "missing": dict(Counter(r["missing"] for r in rows if "missing" in r).most_common()),
            "unread": sum(r["extracted"] is None for r in scored), "cut_off": sum(not r["finished"] for r in scored),
            "format": mean(scored, value=lambda r: float(r["format"])),
            "perception": mean(judged, value=lambda r: float(r["perception"])),
            "frames": spread([r["frames"] for r in scored]),
            "pixels": spread([r["pixels"][0] * r["pixels"][1] for r in scored]),
            "readings": readings, "groups": groups, "paper": dict(zip(("Qwen2.5-VL-7B", "VideoP2R"), bench.paper))}


def guess(x: dict) -> str:
    return f"{x['chance']:.1f}" if x["n"] and x["chance"] else "–"


def cell(x: dict) -> str:
    return f"{x['value']:.1f} ({x['low']:.1f}–{x['high']:.1f})" if x["n"] else "–"


def report(s: dict) -> str:
    """A summary as a table."""
    judged = s["perception"]["n"] > 0
    rows = [["percent, with 95 % intervals", "n", "answer"] + ["perception"] * judged + ["chance", *s["paper"]]]
    for i, (name, x) in enumerate(s["readings"].items()):
        paper = [f"{v:.1f}" if i == 0 else "" for v in s["paper"].values()]
        rows.append([name, str(x["n"]), cell(x)] + [cell(s["perception"]) if i == 0 else ""] * judged
                    + [guess(x), *paper])
    for dimension, labels in s["groups"].items():
        rows.append([f"by {dimension}"] + [""] * (len(rows[0]) - 1))
        rows += [[f"  {label}", str(x["n"]), cell(x)] + [cell(x["perception"])] * judged + [guess(x)]
                 + [""] * len(s["paper"]) for label, x in labels.items()]
    lost = s["questions"] - s["scored"]
    empty = [label for labels in list(s["groups"].values())[:1] for label, x in labels.items() if not x["n"]]
    head = f"{s['bench']}: {s['scored']} questions scored"
    if lost > 0.01 * s["questions"]:
        head += (f"; INCOMPLETE: {lost} of {s['questions']} ({lost / s['questions']:.1%}) have no readable media or "
                 f"too long a prompt, and are not in the score")
    if empty:
        (dimension, labels), *_ = s["groups"].items()
        head += f"; {len(labels) - len(empty)} of {len(labels)} {dimension}s (without {', '.join(empty)})"
    tail = [f"The model saw {s['frames']} frames of {s['pixels']} pixels. Sampled that keep the template: "
            f"{cell(s['format'])};", f"without a readable answer: {s['unread']} (they count as wrong); cut off at the "
            f"token limit: {s['cut_off']}; media missing or broken: {lost}."]
    tail += [f"  {n} × {reason}" for reason, n in list(s["missing"].items())[:3]]
    return "\n".join([head, *format_table(rows), *tail])


# ------------------------------------------------------------------------------------------------ 5. analyses

def mismatch(rows: list[dict]) -> str:
    """How often the answer is another option than the one the think ends on, over multiple choice (paper, Table 6)."""
    rows = [r for r in rows if "missing" not in r and r["problem_type"] == "multiple choice"]
    told = [r | {"thought": thought, "said": said} for r in rows if r["think"] and r["answer"]
            and (thought := ends_on(r["think"], r["options"])) and (said := read_choice(r["answer"], r["options"]))]
    off = [r for r in told if r["thought"] != r["said"]]
    hits = {name: sum(r[name] == choice(r["reference"], r["options"]) for r in off) for name in ("thought", "said")}
    share = mean(told, value=lambda r: float(r["thought"] != r["said"]))
    lines = [f"Think–answer mismatch: {cell(share)} percent of {len(told)} multiple-choice responses whose think names",
             f"an option (paper: Video-R1 21.5, VideoRFT 16.9, VideoP2R 7.5); {len(rows) - len(told)} of {len(rows)} "
             f"cannot be told: think or answer is missing,", f"or names no option. Where they differ, the think was "
             f"right {hits['thought']} times, the answer {hits['said']} times."]
    return "\n".join(lines + [f"  {r['id']}: thought {r['thought']}, said {r['said']}, right {r['reference']}: "
                              f"… {' '.join(r['think'].split())[-70:]}" for r in off[:5]])


def perception_from(job: Job, items: list[Item]) -> str:
    """How much of an answer is in the observation (paper, Figure 4): the same questions with nothing, with another
    run's observation, with the video, with both."""
    file = rows_file(job.args.perception_from)
    theirs = {r["id"]: r["observation"] for r in read_rows(file) if r.get("observation")}
    items = [i for i in items if isinstance(theirs.get(i.record.problem_id), str)]
    if not items:
        raise ValueError(f"{file} holds no observation on a question of {job.bench}")
    source = hashlib.sha256(json.dumps(theirs, sort_keys=True).encode()).hexdigest()[:16]
    conditions = [Condition("question", True), Condition("question and observation", True, theirs, source),
                  Condition(), Condition("video and observation", False, theirs, source)]
    bench, table = BENCHES[job.bench], [["what the model gets", "n", "answer", "chance"]]
    for c in conditions:
        rows = [r for r in run(job, items, c) if "missing" not in r]
        x = mean(rows, next(iter(bench.readings.values())), right if bench.right else grade)
        table.append([c.name or "video", str(x["n"]), cell(x), guess(x)])
    return "\n".join([f"{job.bench}: is the observation enough? Observations of {file}", *format_table(table),
                      "The question alone shows what can be guessed; a model that was never asked without a video may "
                      "do worse than that."])


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of so many wins and losses if both were equally likely: McNemar's exact test."""
    n, fewer = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2 ** n)


def rows_file(place: str) -> Path:
    """responses.jsonl of an evaluation's folder, or a file of such rows. Raises ValueError."""
    file = Path(place) / "responses.jsonl" if Path(place).is_dir() else Path(place)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; an evaluation writes it (--bench)")
    return file


def matched(files: list[Path]) -> tuple[list[tuple[dict, dict]], list[str]]:
    """The questions that two evaluations share, and notes on what makes them unlike. Raises ValueError."""
    a, b = ({r["id"]: r for r in read_rows(file) if "missing" not in r} for file in files)
    pairs, notes = [(a[key], b[key]) for key in a if key in b], []
    if not pairs:
        raise ValueError(f"{files[0]} and {files[1]} have no question in common")
    asks = lambda *names: [x["id"] for x, y in pairs if any(x[name] != y[name] for name in names)]
    if other := asks("question", "reference", "options"):
        raise ValueError(f"{len(other)} questions have the same name but another text, for example {other[0]}")
    if other := asks("prompt", "frames", "pixels"):
        notes.append(f"NOT like with like: {len(other)} questions were put with another prompt, frames or pixels.")
    if len(pairs) < max(len(a), len(b)):
        notes.append(f"Only the {len(pairs)} questions that both have are compared (A has {len(a)}, B {len(b)}).")
    return pairs, notes


def perception_or_reasoning(pairs: list[tuple[dict, dict]]) -> list[str]:
    """Perception right or wrong × answer right or wrong, for both runs."""
    judged = [pair for pair in pairs if None not in (pair[0]["perception"], pair[1]["perception"])]
    if not judged:
        return ["No judge has looked at the observations (--judge): every change counts as one of thinking."]
    runs = list(zip("AB", zip(*judged)))
    count = lambda rows, sees, good: str(sum(r["perception"] == sees and right(r) == good for r in rows))
    table = [["", *(f"{name}: answer {what}" for name, _ in runs for what in ("right", "wrong"))]]
    for what, sees in (("right", True), ("wrong", False)):
        table.append([f"perception {what}", *(count(rows, sees, good) for _, rows in runs for good in (True, False))])
    lines = ["Where does it go wrong, in looking or in thinking? Perception is right when the observation suffices.",
             *format_table(table)]
    for name, rows in runs:
        lines.append(f"{name}: {count(rows, False, False)} wrong answers come after a wrong look, "
                     f"{count(rows, True, False)} after a right one; {count(rows, False, True)} right answers after a "
                     f"wrong look: luck.")
    return lines


CHANGES = ("learned to look", "learned to think", "forgot to look", "forgot to think", "right by luck")


def change(a: dict, b: dict) -> str | None:
    """What a pair of responses to one question shows, if anything. Without a judge every change is one of thinking."""
    better, sees = right(b) - right(a), (a["perception"], b["perception"])
    if not better:
        return CHANGES[-1] if right(b) and sees[1] is False else None
    look = None not in sees and sees[1] - sees[0] == better
    return f"{'learned' if better > 0 else 'forgot'} to {'look' if look else 'think'}"


def instructive(pairs: list[tuple[dict, dict]], most: int = 10) -> list[str]:
    """A few examples of every lesson in turn, the shortest first."""
    kinds = {name: sorted((pair for pair in pairs if change(*pair) == name),
                          key=lambda pair: sum(len(r["response"]) for r in pair)) for name in CHANGES}
    lines = ["From A to B: " + ", ".join(f"{len(some)} {name}" for name, some in kinds.items())]
    turns = [(name, some[i]) for i in range(most) for name, some in kinds.items() if i < len(some)][:most]
    for name, pair in sorted(turns, key=lambda turn: CHANGES.index(turn[0])):
        r = pair[0]
        lines += ["", f"── {name}: {r['id']} ".ljust(100, "─"), f"{r['question']}  {'  '.join(r['options'])}".rstrip(),
                  f"right: {r['reference']}"]
        for run_name, r in zip("AB", pair):
            parts = [f"{verb} {r[part]}" for verb, part in (("sees:", "observation"), ("thinks:", "think"),
                                                            ("answers:", "answer")) if r[part]]
            lines.append(f"{run_name}  " + ("  ".join(parts) or r["response"].strip()))
    return lines


def compare(first: str, second: str) -> str:
    """Two evaluations, question by question."""
    files = [rows_file(first), rows_file(second)]
    pairs, notes = matched(files)
    wins, losses = (sum(sign * (y["score"] - x["score"]) > 1e-9 for x, y in pairs) for sign in (1, -1))
    table = [["", "n", "answer right", "score"]]
    for name, file, rows in zip("AB", files, zip(*pairs)):
        table.append([f"{name}  {file}", str(len(rows)), cell(mean(rows, value=right)), cell(mean(rows))])
    return "\n".join([*format_table(table), *notes, f"B wins {wins} questions and loses {losses}, "
                      f"{len(pairs) - wins - losses} are even: p = {sign_test(wins, losses):.2g} if neither were "
                      "better (McNemar's exact test).", "", *perception_or_reasoning(pairs), "", *instructive(pairs)])


# ------------------------------------------------------------------------------------------------ 6. command line

def default_model() -> tuple[str, str]:
    """The newest finished run, else the base model's local copy, and which of the two it is."""
    finished = []
    for file in Path("runs").glob("*/*/settings.json"):
        try:
            newest = newest_checkpoint(file.parent)
            if dict(json.loads(file.read_text()))["steps"] == int(newest.name[5:]):
                finished.append(((newest / "state.json").stat().st_mtime, str(file.parent)))
        except (OSError, ValueError, TypeError, KeyError):   # another folder, or a damaged one
            continue
    if finished:
        return max(finished)[1], "the newest finished run"
    base = next((QWEN.format(size) for size in ("7B", "3B") if Path(QWEN.format(size)).is_dir()), None)
    if base is None:
        raise SystemExit("There is no finished run under runs/ and no base model under models/: name a folder with "
                         "--model, or make a run with `python pagrpo.py`.")
    return base, "no run is finished, so the base model"


def run_settings(model: Path, preset: str | None) -> Settings:
    """The settings a model was trained with, from its run's folder; else those of a preset. An SFT run has no settings
    for responses: the preset's fill them in."""
    for folder in (model, model.parent):
        if (folder / "settings.json").is_file():
            try:
                saved = dict(json.loads((folder / "settings.json").read_text()))
                row = PRESETS[preset or ("tiny" if saved["prompt"] == "short" else "7b")]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{folder / 'settings.json'} is damaged: {type(error).__name__}: {error}") from None
            same = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()
                    if k in Settings.__dataclass_fields__ and not k.startswith("judge")}
            return Settings(**row | same)
    return Settings(**PRESETS[preset or "7b"])


PROTOCOL = dict(frames=32, fps=0.0, max_pixels=256 * 28 * 28, max_response=1024)             # paper; the last: Video-R1


def evaluate(name: str, path: Path, settings: Settings, args: argparse.Namespace, world: World) -> dict | None:
    """One benchmark, from its files to its table. Returns its summary."""
    root = Path(args.data or f"data/{name}")
    if name == "toy":
        worlds = [p / "toy" for p in path.resolve().parents]                 # the run's own, if the model is of one
        root = root if args.data else next((w for w in worlds if (w / "heldout.json").is_file()), Path("runs/tiny/toy"))
        if not args.data and world.first and not (root / "heldout.json").is_file():
            make_toy(root, {"heldout": TOY_SPLITS["heldout"]})
        world.barrier()
    items, notes = read_bench(name, root)
    if args.limit and args.limit < len(items):
        notes.append(f"ONLY {args.limit} of them, evenly spread")
        items = [items[i * len(items) // args.limit] for i in range(args.limit)]
    world.print0(f"\n{name}, {root}: " + "; ".join(notes))
    rate = f" ({settings.fps:g} a second)" * bool(settings.fps)
    prompt = "official short-answer prompt" if settings.prompt == "direct" else f"training prompt ({settings.prompt})"
    world.print0(f"At most {settings.frames} frames{rate} of {settings.max_pixels} pixels, "
              f"{'cut to the bounds of the annotations' if args.clips else 'uncut'}; temperature "
              f"{args.temperature:g}, top-p {args.top_p:g},",
              f"at most {settings.max_response} tokens; {prompt}; judge of observations: {args.judge}.", sep="\n")
    job = Job(name, root, path, settings, args, world)
    if args.perception_from:
        return world.print0(perception_from(job, items))
    rows = run(job, items)
    summary = summarise(name, rows) | {"model": str(path)}
    file, text = args.out / name / "summary.json", json.dumps(summary, indent=1) + "\n"
    if world.first and not (file.is_file() and file.read_text() == text):    # shown again: nothing is written
        write_atomically(file, text)
    world.print0("\n" + report(summary))
    if args.mismatch:
        world.print0(mismatch(rows))
    world.print0(f"Sampled and numbers: {args.out / name}")
    return summary


def evaluate_all(path: Path, settings: Settings, args: argparse.Namespace, world: World) -> None:
    """The paper's Table 1. A benchmark that is not there is said so and left out of no mean silently."""
    results, lacking = {}, []
    for name in [name for name in BENCHES if name != "toy"]:
        try:
            results[name] = evaluate(name, path, settings, args, world)
        except BenchError as error:                          # anything else is one rank's trouble, and stops all
            lacking.append(f"{error}")
    results = {name: s for name, s in results.items() if s["scored"]}
    whole = {name: s["scored"] == BENCHES[name].expected for name, s in results.items()}
    scores = {path.parent.name or path.name: [next(iter(s["readings"].values()))["value"] for s in results.values()]}
    for i, model in enumerate(("Qwen2.5-VL-7B (paper)", "VideoP2R (paper)")):
        scores[model] = [BENCHES[name].paper[i] for name in results]
    if results:
        world.print0("", *format_table([["percent", *(name + "*" * (not all_of) for name, all_of in whole.items()), "mean"]] + [
            [model, *(f"{x:.1f}" for x in [*some, np.mean(some)])] for model, some in scores.items()]), sep="\n")
    if not all(whole.values()):
        world.print0("* not the whole benchmark: see its headline")
    if lacking:
        raise BenchError(f"{len(lacking)} of 7 benchmarks are not there, or broken:\n" + "\n".join(lacking))


def answer_one(path: Path, args: argparse.Namespace, settings: Settings) -> None:
    """One question about one clip or picture: prints what the model sees, thinks and answers. Raises MediaError."""
    clip = Path(args.video).resolve()
    "".join([args.question, *args.options]).encode()         # half a character is a ValueError
    kind = args.problem_type or ("multiple choice" if args.options else "free-form")
    record = Record("", args.question, tuple(args.options), kind, "", clip.name,
                    "image" if clip.suffix.lower() in IMAGES else "video")
    vocabulary, model, device = load_local(path)
    example = build_example(record, clip.parent, vocabulary, model.config, settings)
    steps, rows, columns = example.grid
    print(f"{clip.name}: {steps} grid steps of {example.seconds:.2f} s, {columns * 14}×{rows * 14} pixels, "
          f"{len(example.ids)} prompt tokens")
    (e,), = rollout(model, [example], vocabulary, settings, 1, args.temperature, "question", device, args.top_p)
    parts = e.parsed
    if not e.finished:
        print(f"The response was cut off after {len(e.tokens)} tokens.")
    if parts.observation is None and parts.think is None and parts.answer is None:
        return print(f"The response keeps no template:\n{e.text}")
    for name, text in (("sees", parts.observation), ("thinks", parts.think), ("answers", parts.answer)):
        print(f"{name:8}  {text if text is not None else '–'}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to do (one of these)")
    what.add_argument("--bench", choices=[*BENCHES, "all"], help="benchmark to run")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two evaluations (folders or files), question by "
                      "question")
    what.add_argument("--video", help="ask about this video, picture or folder of frames")
    how = parser.add_argument_group("which model, and what it gets")
    how.add_argument("--model", help="model folder, or a stage's folder [the newest finished run, else the base model]")
    how.add_argument("--preset", choices=PRESETS, help="settings for a model that is no run of this project [7b]")
    how.add_argument("--temperature", type=float, default=0.01, help="0 is greedy [0.01]")
    how.add_argument("--top-p", type=float, default=0.001, help="only the likeliest tokens up to this share [0.001]")
    for name, kind, about in (("frames", int, "most frames [32; toy and --video: the run's]"),
                              ("fps", float, "most frames a second; 0: as many as --frames [0; likewise]"),
                              ("max-pixels", int, "of a frame [256·28·28 = 200704; likewise]"),
                              ("max-prompt", int, "tokens; a question with more is left out and counted [the run's]"),
                              ("max-response", int, "tokens after which a response is cut off [1024; likewise]"),
                              ("seed", int, "of sampling [the run's]")):
        how.add_argument(f"--{name}", type=kind, help=about)
    bench = parser.add_argument_group("for --bench")
    bench.add_argument("--data", help="the benchmark's folder [data/BENCH; toy: beside the model, made when missing]")
    bench.add_argument("--out", help="folder of results [eval/ in the model's folder]")
    bench.add_argument("--direct", action="store_true", help="the official short-answer prompt, not the training one")
    bench.add_argument("--clips", action="store_true", help="cut videos to the bounds of the annotations (MVBench)")
    bench.add_argument("--mismatch", action="store_true", help="how often the answer is not what the think ends on")
    bench.add_argument("--perception-from", metavar="RUN", help="ask four times: the question alone, with the "
                       "observation of this evaluation, the video, both")
    bench.add_argument("--limit", type=int, help="only so many questions, evenly spread: a try, no score [all]")
    bench.add_argument("--batch", type=int, default=0, help="questions answered together [toy 128, else 8]")
    one = parser.add_argument_group("for --video")
    one.add_argument("--question", help="the question")
    one.add_argument("--options", nargs="+", default=[], help="options of a multiple choice, without letters")
    one.add_argument("--problem-type", choices=PROBLEM_TYPES, help="[multiple choice with options, else free-form]")
    add_flags(parser.add_argument_group(
        "for judging observations: by rule in the toy world, elsewhere by nobody unless --judge is given; `reference` "
        "without --judge-model is the model itself"), JudgeSettings)
    args = parser.parse_args(argv)
    if sum(map(bool, (args.bench, args.compare, args.video))) != 1 or (args.video and not args.question):
        parser.error("give one of --bench NAME, --compare A B, or --video FILE with --question TEXT")
    if args.bench == "all" and (args.data or args.perception_from):
        parser.error("--bench all reads data/BENCH; --data and --perception-from belong to one benchmark")
    if not (math.isfinite(args.temperature) and args.temperature >= 0 and 0 < args.top_p <= 1):
        parser.error("--temperature must be 0 (greedy) or more, --top-p above 0 and at most 1")
    if args.bench == "toy" and args.direct:
        parser.error("the toy world has no official short-answer prompt")
    if args.mismatch and args.perception_from:
        parser.error("--mismatch belongs to a --bench without --perception-from")
    if (args.limit is not None and args.limit < 1) or args.batch < 0:
        parser.error("--limit and --batch count from 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.compare:
            return print(compare(*args.compare))
        chosen, why = (args.model, "chosen by flag") if args.model else default_model()
        path = newest_checkpoint(chosen)
        world = start_world(patience=timedelta(hours=12))    # ranks may be hours apart at a benchmark's end
        world.print0(f"Model {path} ({why})")
        args.judge = args.judge or ("rule" if args.bench == "toy" else "none")
        settings = run_settings(Path(chosen), args.preset)
        names = {f.name for f in fields(Settings)} & vars(args).keys() - {"model", "data", "out", "temperature"}
        own = {k: v for k, v in given_flags(args).items() if k in names and (k, v) != ("judge", "none")}
        settings = replace(settings, **(PROTOCOL if args.bench not in (None, "toy") else {}) | own,
                           **({"prompt": "direct"} if args.direct and args.bench != "toy" else {}))
        if args.video:
            answer_one(path, args, settings)
        else:
            args.batch = args.batch or (128 if args.bench == "toy" else 8)
            args.out = Path(args.out or (path.parent if path.name.startswith("step-") else path) / "eval")
            if args.bench == "all":
                evaluate_all(path, settings, args, world)
            else:
                evaluate(args.bench, path, settings, args, world)
        world.shutdown()
    except MediaError as error:
        sys.exit(f"{args.video}: {error}")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on from here." if args.bench else "Interrupted.")


if __name__ == "__main__":
    main()
