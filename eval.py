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
world keeps its own frames and pixels. An evaluation is a folder, by default MODEL/eval/BENCH: responses.jsonl (a record
a question), summary.json, settings.json. It goes on where it was stopped, on any number of ranks.
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
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
from tqdm import tqdm

from data import (TOY_SPLITS, Examples, JudgeSettings, MediaError, Record, Vocabulary, add_flags, aligned,
                  blind_answers, build_example, given_flags, instruction, load_local, make_judge, make_toy,
                  same_settings, to_record, write_rows, write_whole)
from model import Qwen2_5_VL
from pagrpo import PRESETS, Episode, Settings, ask, rollout, wilson
from rewards import PROBLEM_TYPES, Journal, Judge, choice, number, option_texts, squash, task_metric, whole_lines
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


def item(key: str, question: str, options: Sequence[str], answer: str, path: str, groups: dict, direct: str = "",
         kind: str = "multiple choice", metric: str = "choice", labels: Sequence[str] = (), **more) -> Item:
    options, reference = tuple(map(str, options)), str(answer)
    if metric == "choice" and (reference := choice(reference, options)) is None:
        raise ValueError(f"the answer {answer!r} is none of the options {list(options)}")
    return Item(Record(key, question.strip(), options, kind, reference, path, "video", **more), metric, groups, direct,
                tuple(labels))


LETTER_ONLY = "Answer with the letter of the correct option."


def lettered(options: Sequence[str], form: str = "{}. {}") -> str:
    return "\n".join(form.format(chr(65 + i), o) for i, o in enumerate(options))


def toy(row: dict, part: str, keys: tuple, find: Find) -> Item:
    record = to_record(row, traces=False)
    return Item(record, "task", {"problem type": record.problem_type})


def vsibench(row: dict, part: str, keys: tuple, find: Find) -> Item:
    options = row["options"] or ()                           # they carry their letters
    asked = ["These are frames of a video.", row["question"]] + (["Options:", *options] if options else []) + [
        "Answer with the option's letter from the given choices directly." if options else
        "Please answer the question using a single word or phrase."]
    how = dict(kind="multiple choice", metric="choice") if options else dict(kind="regression", metric="mra")
    return item(str(row["id"]), row["question"], options, row["ground_truth"],
                find(f"{row['dataset']}/{row['scene_name']}.mp4"), {"task": row["question_type"]}, "\n".join(asked),
                **how)


DISCIPLINES = {subject: discipline for discipline, subjects in {
    "Art": "Art Art_Theory Design Music", "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics", "Humanities": "History Literature Sociology Psychology",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
                   "Mechanical_Engineering"}.items() for subject in subjects.split()}


def videommmu(row: dict, part: str, keys: tuple, find: Find) -> Item:
    """Multiple choice where there are options: `question_type` is missing or null in places."""
    options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"] or ()
    discipline = DISCIPLINES["_".join(row["id"].split("_")[1:-1])]
    if part == "Adaptation":                                 # these sentences belong to the question in any prompt
        question = ("You should watch and learn the video content. Then apply what you learned to answer the "
                    f"following {'multi-choice' if options else 'open-ended'} question. The image for this question is "
                    f"at the end of the video.\n{row['question']}")
    else:
        question = f"{row['question']}\nPlease ignore the Quiz question in last frame of the video."
    how = dict(kind="multiple choice", metric="choice") if options else dict(kind="free-form", metric="open")
    return item(f"{part}/{row['id']}", question, options, row["answer"], find(f"{discipline}/{row['id']}.mp4"),
                {"track": part, "discipline": discipline}, f"{question}\n{lettered(options)}".strip(), **how)


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
    inside = re.search(r"\s*\(?A[.):]\s*" + re.escape(options[0][:20]), question)
    seconds = float(row.get("duration") or 0)
    return item(str(row["id"]), question[:inside.start()] if inside else question, options, row["answer"],
                find(f"v1/videos/{row['video_path']}", row["video_path"]),
                {"dimension": row["dimension"],
                 "duration": "up to 60 s" if seconds <= 60 else "up to 300 s" if seconds <= 300 else "over 300 s"},
                f"{question if inside else question + lettered(['', *options])[3:]}\n{LETTER_ONLY}")


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
    key = f"{part}/{video}/{dimension}/{keys[-1]}"
    how = dict(path=find(f"videos/{video}.mp4"), groups={"format": part, "dimension": dimension})
    if part == "yes_no":
        return item(key, row["question"], ("yes", "no"), row["answer"],
                    direct=row["question"] + "\nPlease answer yes or no:", **how)
    lines = [re.fullmatch(r"\s*(?:((?:Option|Caption|Sentence) \w)|[A-D])\s*[.:)]\s*(.+)", line)
             for line in row["question"].split("\n")]
    asked = [line for line, found in zip(row["question"].split("\n"), lines) if not found]
    found = [line for line in lines if line]
    same = [chr(65 + i) for i, line in enumerate(found) if squash(line[0]) == squash(row["answer"])]
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
                      "VLM-Reasoning/VCR-Bench", "859 videos of unstated size", False, UNZIP, (44.3, 51.0), {"multiple choice": ALL}),
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
    """A benchmark's questions as they lie on disk, and notes on what was found. Raises FileNotFoundError, with the
    commands that fetch it, if there is nothing; ValueError, with file and number, for a question that is broken."""
    bench, items, found = BENCHES[name], [], []
    find = lambda *paths: next((p for p in paths if (root / p).exists()), paths[0])
    for part, places in bench.files.items():
        files = [f for place in places for f in sorted(root.glob(place))][:1]
        for file in files:
            found.append(file.relative_to(root).as_posix())
            try:
                rows = list(annotation_rows(file))
            except (ValueError, OSError) as error:           # JSON, Unicode and Arrow errors are ValueErrors
                raise ValueError(f"{file} cannot be read: {error}") from None
            for n, (keys, row) in enumerate(rows):
                try:
                    items += filter(None, [bench.item(row, part, keys, find)])
                except (KeyError, IndexError, TypeError, ValueError, AttributeError, SyntaxError) as error:
                    raise ValueError(f"{file}, question {n + 1}: {type(error).__name__}: {error}") from None
    there = sum((root / i.record.path).exists() for i in items)
    if not there:
        raise FileNotFoundError(
            f"{name}: {f'{len(items)} questions, but none of their media lie' if items else 'no questions'} under "
            f"{root}, for example {items[0].record.path if items else next(iter(bench.files.values()))[0]}.\n"
            + how_to_fetch(name, root))
    if twice := [key for key, n in Counter(i.record.problem_id for i in items).items() if n > 1]:
        raise ValueError(f"{root}: {len(twice)} questions stand there twice, for example {twice[0]}")
    notes = [f"{len(items)} questions from {', '.join(found[:3])}{f' and {len(found) - 3} more' * (len(found) > 3)}"]
    if len(items) != bench.expected:
        notes.append(f"NOT the benchmark's {bench.expected} questions")
    if len(found) < len(bench.files):
        notes.append(f"{len(found)} of {len(bench.files)} annotation files")
    repeats = [i.record.problem_id for i in items
               if i.metric == "choice" and len(set(option_texts(i.record.options).values())) < len(i.record.options)]
    if repeats:
        notes.append(f"{len(repeats)} questions offer the same text twice, where only the letter decides: "
                     f"{', '.join(repeats[:4])}{' …' * (len(repeats) > 4)}")
    return items, notes


def how_to_fetch(name: str, root: Path) -> str:
    bench = BENCHES[name]
    form = f"accept the form at https://huggingface.co/datasets/{bench.repo}, then `hf auth login`; after that:"
    lines = [f"To fetch it ({bench.size}), {form if bench.form else 'which needs no form:'}",
             f"  hf download {bench.repo} --repo-type dataset --local-dir {root}"]
    return "\n".join(lines + [f"  (cd {root} && {bench.unpack})"] * bool(bench.unpack))


# ------------------------------------------------------------------------------------------------ 2. reading answers

def answer_text(response: str) -> str | None:
    """Where a response's answer is looked for: in its last <answer>; without one, behind the last closed segment;
    without tags, everywhere. None if it was cut off inside a segment: it did not come to an answer."""
    if "<answer>" in response:
        return response.rsplit("<answer>", 1)[1].split("</answer>")[0]
    rest = re.split(r"</(?:observation|think)>", response)[-1]
    return None if re.search(r"<(?:observation|think)>", rest) else rest


LETTER = r"(?<![A-Za-z0-9])([A-Za-z])(?![A-Za-z0-9'’])"
CUE = re.compile(r"(?:answer|choose|select|pick|go with|(?:option|choice)(?=\s+is|\s*:)|respuesta|réponse|resposta|"
                 r"risposta|antwort|ответ|答案|选择|选|答え|正解|정답|답)"
                 r"(?:[\s:：*\"'`(\[-]|(?<![a-z])(?:is|would|should|must|be|to|final|correct|best|most|likely|thus|"
                 r"therefore|option|choice|letter|the|es|est|ist|lautet|é|è|la|le|die|opci[oó]n)(?![a-z])|"
                 r"是|为|选项|は|은|는)*" + LETTER, re.I)
HEDGE = re.compile(LETTER + r"\W*\s*(?:/|,|&|\b(?:or|and|oder|und|ou|et|o|y)\b)\s*\W?" + LETTER)
UNIT_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def letters_in(text: str, valid: Iterable[str]) -> list[re.Match]:
    """Option letters that stand alone as capitals: not the article in "A man", not "I think", not "not B"."""
    return [m for m in re.finditer(LETTER, text) if m[1] in valid
            and not re.search(r"(?:\bnot|n't)\s+\W?$", text[:m.start()], re.I)
            and not (m[1] in "AI" and re.match(r" +[a-z]", text[m.end():]))]


def texts_in(text: str, options: dict[str, str]) -> list[tuple[int, int, str]]:
    """(start, end, letter) of every option text that occurs as whole words, without those inside a longer one."""
    flat = " ".join(text.casefold().split())                 # the 3 in "-3" or "3.5" is none
    found = [(m.start(), m.end(), letter) for letter, option in options.items() if option
             for m in re.finditer(rf"(?<![\w-])(?<!\d[.,]){re.escape(option)}(?!\w|[.,]\d)", flat)]
    return [(a, b, x) for a, b, x in found if not any(c <= a and b <= d and (c, d) != (a, b) for c, d, _ in found)]


def undressed(text: str) -> str:
    """Without Markdown, \\boxed{} and $."""
    for _ in range(2):                                       # \boxed{\text{B}}
        text = re.sub(r"\\(?:boxed|text|mathrm|textbf)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[*$\\]", "", text).strip()


def read_choice(text: str | None, options: Sequence[str], labels: Sequence[str] = ()) -> str | None:
    """The letter that an answer names; None if it names none, or two. The first of these that applies:

    1. it is a letter or an option's text, or both: "B", "(b)", "B. a cat", "a cat"
    2. it says so, the last time: "the answer is (B)", "I choose B", "答案是B"; with "B or C" behind it, none
    3. it begins with a letter: "B) because …", or with one option's text: "Yes, he does"
    4. its last line names one letter as a capital standing alone; the article in "An apple" or "A man" is none
    5. it contains the text of one option
    Dress is taken off first (`undressed`), and names like "Option 2" are turned into letters.
    """
    if text is None:
        return None
    texts = {letter: squash(undressed(option)) for letter, option in option_texts(options).items()}
    plain = undressed(text)
    for letter, label in zip(texts, labels):
        if squash(plain) == label.split()[-1].casefold():    # a bare "2" of "Option 2"
            return letter
        plain = re.sub(rf"(?<!\w){re.escape(label)}(?!\w)", letter, plain, flags=re.I)
    if squash(plain).upper() in texts:                                                                          # 1
        return squash(plain).upper()
    for same in squash, lambda x: re.findall(r"\w+", x.casefold()):
        whole = [letter for letter, option in texts.items() if option
                 and same(plain) in (same(option), same(f"{letter}. {option}"), same(f"{letter} {option}"))]
        if whole:
            return whole[0] if len(whole) == 1 else None
    said = [m for m in CUE.finditer(plain) if m[1].upper() in texts
            and (m[1].isupper() or re.match(r"\s*(?:$|[.,;:)\]}])", plain[m.end():]))]
    if said:                                                                                                    # 2
        return None if HEDGE.match(plain, said[-1].start(1)) else said[-1][1].upper()
    last = plain.splitlines()[-1] if plain else ""
    if (hedge := HEDGE.search(last)) and {hedge[1].upper(), hedge[2].upper()} <= texts.keys():
        return None
    begun = re.match(r"\W*([A-Za-z])\s*(?:[.)\]:,–—]|-\s)", plain)
    if begun and begun[1].upper() in texts:                                                                     # 3
        return begun[1].upper()
    mentioned = sorted(texts_in(plain, texts))
    begun = {letter for start, _, letter in mentioned if start == 0}
    if len(begun) == 1 and not re.search(r"\b(?:or|and)\b", " ".join(plain.split())[mentioned[0][1]:mentioned[1][0]]
                                         if len(mentioned) > 1 else ""):
        return begun.pop()
    named = {m[1] for m in letters_in(last, texts)}
    if named:                                                                                                   # 4
        return named.pop() if len(named) == 1 else None
    named = {letter for _, _, letter in mentioned}
    return named.pop() if len(named) == 1 else None                                                             # 5


def ends_on(think: str, options: Sequence[str]) -> str | None:
    """The option that a think ends on: the one it mentions last, by its letter as a capital standing alone or by its
    whole text; a letter just before a text, "C red T", counts for both. None if it mentions none, or ends on a text
    that two options share."""
    texts, flat = option_texts(options), " ".join(think.split())
    letters = [(m.end(), m[1]) for m in letters_in(flat, texts)]
    found = letters + [(end, x) for start, end, x in texts_in(flat, texts)
                       if not any(at <= start and not flat[at:start].strip(" .:)(\"'") for at, _ in letters)]
    last = {letter for end, letter in found if end == max(found)[0]}
    return last.pop() if len(last) == 1 else None


def first_number(text: str) -> Fraction | None:
    """The first number of an answer, in digits or as an English word up to twelve: "about 3.5 m", "four chairs"."""
    if (whole := number(text)) is not None:
        return whole
    found = re.search(rf"-?\d[\d,]*\.?\d*|\b(?:{'|'.join(UNIT_WORDS)})\b", text, re.I)
    if not found:
        return None
    word = found[0].lower()
    return Fraction(UNIT_WORDS.index(word)) if word in UNIT_WORDS else number(found[0].rstrip(",."))


def mean_relative_accuracy(predicted: Fraction, wanted: Fraction) -> float:
    """MRA (VSI-Bench): the share of the ten tolerances 50 %, 45 % … 5 % within which the relative error lies. On the
    edge counts, as in the official code (its paper says <), and fractions keep edges where they are."""
    if wanted == 0:
        return float(predicted == 0)
    error = abs(predicted - wanted) / abs(wanted)
    return sum(error <= Fraction(5 * k, 100) for k in range(1, 11)) / 10


def open_answer(text: str, gold: str) -> float:
    """VideoMMMU's open questions, by MMMU's rule: a number is right if one behind the last "is", "answer", "=" or ":"
    is equal to two decimals, a text if the answer contains it, a letter if the answer names it."""
    wanted = [x.strip(" '\"") for x in gold.strip("[]").split(",")] if gold.startswith("[") else [gold]
    behind = re.split(r"\bis\b|\banswer\b|=|:", text, flags=re.I)[-1]
    said = [number(m) for m in re.findall(r"-?\d[\d,]*\.?\d*(?:/\d+)?", behind if re.search(r"\d", behind) else text)]
    for one in wanted:
        if re.fullmatch("[A-Z]", one):
            hit = read_choice(text, [""] * 26) == one
        elif (value := number(one)) is not None:
            hit = any(x is not None and round(x, 2) == round(value, 2) for x in said)
        else:
            hit = squash(one) in squash(text)
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
    text = answer_text(response)
    if item.metric == "choice":
        letter = read_choice(text, r.options, item.labels)
        return letter, float(letter == r.reference)
    if text is None or not text.strip():
        return None, 0.0
    if item.metric == "open":
        return text.strip(), open_answer(text, r.reference)
    value = first_number(text)
    return (None, 0.0) if value is None else (
        f"{float(value):g}", mean_relative_accuracy(value, Fraction(number(r.reference))))


# ------------------------------------------------------------------------------------------------ 3. running

@dataclass(frozen=True)
class Condition:
    """What the model gets of a question: its video or nothing, and an observation or none."""
    name: str = ""
    blind: bool = False
    given: dict[str, str] | None = None                      # problem_id → observation


def asked(item: Item, condition: Condition, args: argparse.Namespace) -> Record:
    """A question as it is put. A direct prompt has no template: there a given observation is part of the question."""
    r, given = item.record, condition.given and condition.given[item.record.problem_id]
    if args.direct and item.direct:
        r = replace(r, question=f"Observation: {given}\n{item.direct}" if given else item.direct, options=())
        given = None
    return replace(r, blind=condition.blind, given=given, bounds=r.bounds if args.clips else None)


def to_row(item: Item, e: Episode, settings: Settings, verdict) -> dict:
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
            "perception": verdict and verdict.sufficient, "judge": verdict and (verdict.lost or verdict.words)}


def recorded(folder: Path) -> dict[str, dict]:
    """What an evaluation has so far, on however many ranks: id → row. The ranks' own files are the newer ones."""
    files = [folder / "responses.jsonl", *sorted(folder.glob("responses.*.jsonl"))]
    return {row["id"]: row for file in files for row in whole_lines(file)[0]}


def size_of(file: Path) -> int:
    return file.stat().st_size if file.is_file() else len(list(file.iterdir())) if file.is_dir() else -1


def respond(items: list[Item], condition: Condition, root: Path, model: Qwen2_5_VL, vocabulary: Vocabulary,
            device: str, judge: Judge | None, settings: Settings, args: argparse.Namespace, out: Journal,
            world: World) -> None:
    """Answers this rank's questions and writes each down at once."""
    of = {i.record.problem_id: i for i in items}
    examples = Examples([asked(i, condition, args) for i in items], root, vocabulary, model.config, settings,
                        most_lost=1)
    batches = [range(i, min(i + args.batch, len(items))) for i in range(0, len(items), args.batch)]
    scores, bar = [], tqdm(total=len(items), desc=f"{args.bench} {condition.name}".strip(), unit="question",
                           disable=not world.first)
    for batch, part in zip(batches, examples.ahead(batches)):
        for i in batch:
            if i in examples.skipped:
                r = items[i].record
                out.add({"id": r.problem_id, "clip": r.path, "groups": items[i].groups, "metric": items[i].metric,
                         "missing": examples.skipped[i], "bytes": size_of(root / r.path)})
        groups = rollout(model, part, vocabulary, settings, 1, args.temperature, "evaluation", device,
                         args.top_p) if part else []
        episodes = [e for group in groups for e in group]
        verdicts = ask(episodes, judge)() if judge else [None] * len(episodes)
        for e, verdict in zip(episodes, verdicts):
            row = to_row(of[e.example.record.problem_id], e, settings, verdict)
            scores.append(row["score"])
            out.add(row)
        bar.update(len(batch))
        bar.set_postfix_str(f"score {100 * sum(scores) / max(1, len(scores)):.1f}")
    bar.close()


loaded = lru_cache(maxsize=2)(load_local)                    # several benchmarks, one model


def run(items: list[Item], condition: Condition, root: Path, path: Path, settings: Settings, args: argparse.Namespace,
        world: World) -> list[dict]:
    """Runs or continues an evaluation. Returns its rows in the benchmark's order, on every rank."""
    folder = args.out / f"{args.bench}{f' {condition.name}' * bool(condition.name)}".replace(" ", "-")
    own = ("frames", "fps", "min_pixels", "max_pixels", "max_prompt", "max_response", "prompt", "template", "seed",
           "refuse_leaks", "judge_model")
    given = hashlib.sha256(json.dumps(condition.given, sort_keys=True).encode()).hexdigest()[:16]
    if world.first:
        same_settings(folder, {"bench": args.bench, "model": str(path), "temperature": args.temperature,
                               "top_p": args.top_p, "direct": args.direct, "clips": args.clips, "judge": args.judge,
                               "observations": given, **{name: getattr(settings, name) for name in own}}, free=())
    world.wait()
    done, wanted = recorded(folder), {i.record.problem_id for i in items}
    world.wait()                                             # all have read before any writes
    stale = lambda row: "missing" in row and row["bytes"] != size_of(root / row["clip"])  # it has come, or changed
    todo = [i for i in items if i.record.problem_id not in done or stale(done[i.record.problem_id])]
    if todo:
        vocabulary, model, device = loaded(path)
        judge = None
        if args.judge != "none" and condition.given is None:
            blind = loaded(settings.judge_model if settings.judge == "reference" and settings.judge_model else path)
            judge = make_judge(settings, folder / f"judge-{world.rank}.jsonl", lambda claims: blind_answers(
                blind[1], blind[0], claims, settings, settings.max_response, args.batch, device), device)
        out = Journal(folder / f"responses.{world.rank}.jsonl")
        respond(todo[world.rank::world.size], condition, root, model, vocabulary, device, judge, settings, args,
                out, world)
    world.wait()
    rows = recorded(folder)
    rows = [rows[i.record.problem_id] for i in items]
    world.wait()
    if world.first:
        write_rows(folder / "responses.jsonl", rows if len(rows) == len(wanted) else [])
        for file in folder.glob("responses.*.jsonl"):
            file.unlink()
    return rows


# ------------------------------------------------------------------------------------------------ 4. numbers

def chance(row: dict) -> float:
    """What guessing among the options scores."""
    return 1 / len(row["options"]) if row["problem_type"] == "multiple choice" else 0.0


def graded(row: dict) -> float:
    return row["score"]


def right(row: dict) -> float:
    return float(row["score"] > 1 - 1e-9)


def mean(rows: list[dict], parts: Sequence[tuple] = ALL, value: Callable[[dict], float] = graded) -> dict:
    """A reading in percent (see ALL), over what is there of it, with its 95 % interval and chance level.

    One mean of rights and wrongs has Wilson's interval. For anything else (MRA, ROUGE, means of means) clips are drawn
    anew 2,000 times, each with all its questions: questions about one clip are not independent.
    """
    of = lambda names: [r for r in rows if names is None or next(iter(r["groups"].values())) in names]
    there = [leaves for part in parts if (leaves := [some for names in part if (some := of(names))])]
    leaves = [(1 / len(there) / len(part), some) for part in there for some in part]
    n = sum(len(some) for _, some in leaves)
    if not n:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "chance": math.nan, "n": 0}
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
    value = right if bench.right else graded
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


def cell(x: dict) -> str:
    return f"{x['value']:.1f} ({x['low']:.1f}–{x['high']:.1f})" if x["n"] else "–"


def ruled(table: list[list[str]]) -> list[str]:
    head, *lines = aligned(table)
    return [head, "─" * max(map(len, (head, *lines))), *lines]


def report(s: dict) -> str:
    """A summary as a table."""
    judged = s["perception"]["n"] > 0
    guess = lambda x: f"{x['chance']:.1f}" if x["n"] and x["chance"] else "–"
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
        head += (f"; INCOMPLETE: the media of {lost} of {s['questions']} ({lost / s['questions']:.1%}) cannot be read, "
                 f"and they are not in the score")
    if empty:
        (dimension, labels), *_ = s["groups"].items()
        head += f"; {len(labels) - len(empty)} of {len(labels)} {dimension}s (without {', '.join(empty)})"
    tail = [f"The model saw {s['frames']} frames of {s['pixels']} pixels. Responses that keep the template: "
            f"{cell(s['format'])};", f"without a readable answer: {s['unread']} (they count as wrong); cut off at the "
            f"token limit: {s['cut_off']}; media missing or broken: {lost}."]
    tail += [f"  {n} × {reason}" for reason, n in list(s["missing"].items())[:3]]
    return "\n".join([head, *ruled(rows), *tail])


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


def perception_from(items: list[Item], root: Path, path: Path, settings: Settings, args: argparse.Namespace,
                    world: World) -> str:
    """How much of an answer is in the observation (paper, Figure 4): the same questions with nothing, with another
    run's observation, with the video, with both."""
    file = rows_file(args.perception_from)
    theirs = {r["id"]: r.get("observation") for r in whole_lines(file)[0]}
    items = [i for i in items if theirs.get(i.record.problem_id)]
    if not items:
        raise ValueError(f"{file} holds no observation on a question of {args.bench}")
    seen = {i.record.problem_id: theirs[i.record.problem_id] for i in items}
    conditions = [Condition("question", True), Condition("question and observation", True, seen), Condition(),
                  Condition("video and observation", False, seen)]
    bench, table = BENCHES[args.bench], [["what the model gets", "n", "answer", "chance"]]
    for c in conditions:
        rows = [r for r in run(items, c, root, path, settings, args, world) if "missing" not in r]
        x = mean(rows, next(iter(bench.readings.values())), right if bench.right else graded)
        table.append([c.name or "video", str(x["n"]), cell(x), f"{x['chance']:.1f}"])
    return "\n".join([f"{args.bench}: is the observation enough? Observations of {file}", *ruled(table),
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
    a, b = ({r["id"]: r for r in whole_lines(file)[0] if "missing" not in r} for file in files)
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


def looking_or_thinking(pairs: list[tuple[dict, dict]]) -> list[str]:
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
             *ruled(table)]
    for name, rows in runs:
        lines.append(f"{name}: {count(rows, False, False)} wrong answers come after a wrong look, "
                     f"{count(rows, True, False)} after a right one; {count(rows, False, True)} right answers after a "
                     f"wrong look: luck.")
    return lines


LESSONS = ("learned to look", "learned to think", "forgot to look", "forgot to think", "right by luck")


def lesson(a: dict, b: dict) -> str | None:
    """What a pair of responses to one question shows, if anything. Without a judge every change is one of thinking."""
    better, sees = right(b) - right(a), (a["perception"], b["perception"])
    if not better:
        return LESSONS[-1] if right(b) and sees[1] is False else None
    look = None not in sees and sees[1] - sees[0] == better
    return f"{'learned' if better > 0 else 'forgot'} to {'look' if look else 'think'}"


def instructive(pairs: list[tuple[dict, dict]], most: int = 10) -> list[str]:
    """A few examples of every lesson in turn, the shortest first."""
    kinds = {name: sorted((pair for pair in pairs if lesson(*pair) == name),
                          key=lambda pair: sum(len(r["response"]) for r in pair)) for name in LESSONS}
    lines = ["From A to B: " + ", ".join(f"{len(some)} {name}" for name, some in kinds.items())]
    turns = [(name, some[i]) for i in range(most) for name, some in kinds.items() if i < len(some)][:most]
    for name, pair in sorted(turns, key=lambda turn: LESSONS.index(turn[0])):
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
    return "\n".join([*ruled(table), *notes, f"B wins {wins} questions and loses {losses}, "
                      f"{len(pairs) - wins - losses} are even: p = {sign_test(wins, losses):.2g} if neither were "
                      "better (McNemar's exact test).", "", *looking_or_thinking(pairs), "", *instructive(pairs)])


# ------------------------------------------------------------------------------------------------ 6. command line

def default_model() -> tuple[str, str]:
    """The newest finished run, else the base model's local copy, and which of the two it is."""
    finished = []
    for file in Path("runs").glob("*/*/settings.json"):
        try:
            newest = newest_checkpoint(file.parent)
        except FileNotFoundError:
            continue
        if json.loads(file.read_text()).get("steps") == int(newest.name[5:]):
            finished.append(((newest / "state.json").stat().st_mtime, str(file.parent)))
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
            saved = json.loads((folder / "settings.json").read_text())
            row = PRESETS[preset or ("tiny" if saved["prompt"] == "short" else "7b")]
            same = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()
                    if k in Settings.__dataclass_fields__ and not k.startswith("judge")}
            return Settings(**row | same)
    return Settings(**PRESETS[preset or "7b"])


PROTOCOL = dict(frames=32, fps=0.0, max_pixels=256 * 28 * 28, max_response=1024)             # paper; the last: Video-R1


def evaluate(name: str, path: Path, settings: Settings, args: argparse.Namespace, world: World) -> dict | None:
    """One benchmark, from its files to its table. Returns its summary."""
    args.bench, root = name, Path(args.data or f"data/{name}")
    if name == "toy":
        worlds = [p / "toy" for p in path.resolve().parents]                 # the run's own, if the model is of one
        root = root if args.data else next((w for w in worlds if (w / "heldout.json").is_file()), Path("runs/tiny/toy"))
        if world.first and not (root / "heldout.json").is_file():
            make_toy(root, {"heldout": TOY_SPLITS["heldout"]})
        world.wait()
    items, notes = read_bench(name, root)
    items = items[:args.limit]
    world.say(f"\n{name}, {root}: " + "; ".join(notes + [f"only the first {len(items)}"] * bool(args.limit)))
    rate = f" ({settings.fps:g} a second)" * bool(settings.fps)
    prompt = "official short-answer prompt" if settings.prompt == "direct" else f"training prompt ({settings.prompt})"
    world.say(f"At most {settings.frames} frames{rate} of {settings.max_pixels} pixels, "
              f"{'cut to the bounds of the annotations' if args.clips else 'whole videos'}; temperature "
              f"{args.temperature:g}, top-p {args.top_p:g},",
              f"at most {settings.max_response} tokens; {prompt}; judge of observations: {args.judge}.", sep="\n")
    if args.perception_from:
        return world.say(perception_from(items, root, path, settings, args, world))
    rows = run(items, Condition(), root, path, settings, args, world)
    summary = summarise(name, rows) | {"model": str(path)}
    if world.first:
        write_whole(args.out / name / "summary.json", json.dumps(summary, indent=1) + "\n")
    world.say("\n" + report(summary))
    if args.mismatch:
        world.say(mismatch(rows))
    world.say(f"Responses and numbers: {args.out / name}")
    return summary


def evaluate_all(path: Path, settings: Settings, args: argparse.Namespace, world: World) -> None:
    """The paper's Table 1. A benchmark that is not there is said so and left out of no mean silently."""
    results, lacking = {}, []
    for name in [name for name in BENCHES if name != "toy"]:
        try:
            results[name] = evaluate(name, path, settings, args, world)
        except FileNotFoundError as error:
            lacking.append(f"{error}")
    scores = {path.parent.name or path.name: [next(iter(s["readings"].values()))["value"] for s in results.values()]}
    for i, model in enumerate(("Qwen2.5-VL-7B (paper)", "VideoP2R (paper)")):
        scores[model] = [BENCHES[name].paper[i] for name in results]
    if results:
        world.say("", *ruled([["percent", *results, "mean"]] + [
            [model, *(f"{x:.1f}" for x in [*some, np.mean(some)])] for model, some in scores.items()]), sep="\n")
    if lacking:
        raise FileNotFoundError(f"{len(lacking)} of 7 benchmarks are not there:\n" + "\n".join(lacking))


def answer_one(path: Path, args: argparse.Namespace, settings: Settings) -> None:
    """One question about one clip or picture: prints what the model sees, thinks and answers. Raises MediaError."""
    clip = Path(args.video).resolve()
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
    how = parser.add_argument_group("which model")
    how.add_argument("--model", help="model folder, or a stage's folder [the newest finished run, else the base model]")
    how.add_argument("--preset", choices=PRESETS, help="settings for a model that is no run of this project [7b]")
    how.add_argument("--temperature", type=float, default=0.01, help="0 is greedy [0.01]")
    how.add_argument("--top-p", type=float, default=0.001, help="only the likeliest tokens up to this share [0.001]")
    bench = parser.add_argument_group("for --bench")
    bench.add_argument("--data", help="the benchmark's folder [data/BENCH; toy: beside the model, made when missing]")
    bench.add_argument("--out", help="folder of results [eval/ in the model's folder]")
    bench.add_argument("--direct", action="store_true", help="the official short-answer prompt, not the training one")
    bench.add_argument("--clips", action="store_true", help="cut videos to the bounds of the annotations (MVBench)")
    bench.add_argument("--mismatch", action="store_true", help="how often the answer is not what the think ends on")
    bench.add_argument("--perception-from", metavar="RUN", help="another evaluation, whose observations this model "
                       "gets: question alone, with observation, video, both")
    bench.add_argument("--limit", type=int, help="only so many questions, for a try [all]")
    bench.add_argument("--batch", type=int, default=0, help="questions answered together [toy 128, else 8]")
    for name, kind, about in (("frames", int, "most frames [32; toy: the run's]"),
                              ("fps", float, "most frames a second; 0: as many as --frames [0; toy: the run's]"),
                              ("max-pixels", int, "of a frame [256·28·28 = 200704; toy: the run's]"),
                              ("max-response", int, "tokens after which a response is cut off [1024; toy: the run's]"),
                              ("seed", int, "of sampling [the run's]")):
        bench.add_argument(f"--{name}", type=kind, help=about)
    one = parser.add_argument_group("for --video")
    one.add_argument("--question", help="the question")
    one.add_argument("--options", nargs="+", default=[], help="options of a multiple choice, without letters")
    one.add_argument("--problem-type", choices=PROBLEM_TYPES, help="[multiple choice with options, else free-form]")
    add_flags(parser.add_argument_group("for judging observations [--judge: toy rule, else none]"), JudgeSettings)
    args = parser.parse_args(argv)
    if sum(map(bool, (args.bench, args.compare, args.video))) != 1 or (args.video and not args.question):
        parser.error("give one of --bench NAME, --compare A B, or --video FILE with --question TEXT")
    if args.bench == "all" and args.data:
        parser.error("--data is the folder of one benchmark; --bench all looks under data/")
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
        world = start_world(timedelta(hours=12))             # ranks may be hours apart at a benchmark's end
        world.say(f"Model {path} ({why})")
        args.judge = args.judge or ("rule" if args.bench == "toy" else "none")
        settings = run_settings(Path(chosen), args.preset)
        names = {f.name for f in fields(Settings)} & vars(args).keys() - {"model", "data", "out"}
        own = {k: v for k, v in given_flags(args).items() if k in names and (k, v) != ("judge", "none")}
        settings = replace(settings, **(PROTOCOL if args.bench not in (None, "toy") else {}) | own,
                           **({"prompt": "direct"} if args.direct and args.bench != "toy" else {}))
        if args.video:
            answer_one(path, args, settings)
        else:
            args.batch = args.batch or (128 if args.bench == "toy" else 8)
            args.out = Path(args.out or (path.parent if path.name.startswith("step-") else path) / "eval")
            args.mismatch and args.perception_from and sys.exit("--mismatch belongs to a plain --bench")
            (evaluate_all if args.bench == "all" else lambda *a: evaluate(args.bench, *a))(path, settings, args, world)
        world.leave()
    except MediaError as error:
        sys.exit(f"{args.video}: {error}")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on from here." if args.bench else "Interrupted.")


if __name__ == "__main__":
    main()
