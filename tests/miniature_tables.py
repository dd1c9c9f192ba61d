"""Statistics and tables of tests/miniature.py: from what each row scored on each clip to Markdown.

Every mean has two 95 % intervals. Over clips: the models are fixed, other clips could have been drawn; the unit is a
clip's mean over the seeds, so that the same clip under three seeds is not counted as three. Over seeds: other weights
and another order could have been drawn; Student's t of the seeds' means. A difference is taken clip by clip on the
same seed.
"""
import math
import statistics
from typing import NamedTuple

# Student's t for 95 %, by degrees of freedom.
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
ANSWER = "answer, greedy"                                    # the paper's measure


class Mean(NamedTuple):
    """A mean in percent or points, with the half widths of its intervals."""
    value: float
    clips: float
    seeds: float                                             # infinite with one seed
    by_seed: dict[str, float]
    n: int                                                   # clips

    def as_json(self) -> dict:
        return self._asdict() | {"seeds": self.seeds if math.isfinite(self.seeds) else None}

    def __str__(self) -> str:
        return f"{self.value:.1f} ±{self.clips:.1f}" + (f" ±{self.seeds:.1f}" if math.isfinite(self.seeds) else "")


def mean(scores: dict[str, dict[str, float]]) -> Mean | None:
    """seed → clip → score in [0, 1] as a mean in percent. A clip counts with the seeds that have it. None if empty."""
    of_clip = {}
    for of_seed in scores.values():
        for clip, score in of_seed.items():
            of_clip.setdefault(clip, []).append(100 * score)
    if len(of_clip) < 2:
        return None
    clips = [statistics.fmean(values) for values in of_clip.values()]
    by_seed = {seed: 100 * statistics.fmean(of_seed.values()) for seed, of_seed in scores.items() if of_seed}
    half = 1.96 * statistics.stdev(clips) / math.sqrt(len(clips))
    return Mean(statistics.fmean(clips), half, over_seeds(list(by_seed.values())), by_seed, len(clips))


def over_seeds(values: list[float]) -> float:
    """Half width of the 95 % interval of a mean by Student's t; infinite for a single value."""
    n = len(values)
    return T95.get(n - 1, 2.262) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf


def scores(results: dict, name: str, key: str, minus: str = "") -> dict[str, dict[str, float]]:
    """seed → clip → score of a row, or its difference to the row `minus`, where there are both."""
    found = {}
    for seed, result in results.get(name, {}).items():
        mine, other = result.get(key), results.get(minus, {}).get(seed, {}).get(key)
        if mine and minus and other:
            found[seed] = {clip: x - other[clip] for clip, x in mine.items() if clip in other}
        elif mine and not minus:
            found[seed] = mine
    return found


def verdict(paper: float, here: Mean) -> str:
    """Does a difference have the paper's sign? Resolved: 0 lies outside both intervals."""
    same = (paper > 0) == (here.value > 0)
    if abs(here.value) <= here.clips:
        return "not resolved"
    if abs(here.value) <= here.seeds:
        return f"not resolved over seeds ({'the same' if same else 'the opposite'} sign for these models)"
    return "agrees" if same else "disagrees: the opposite sign"


def disagreements(rows, results: dict, references: list) -> list[str]:
    """A sentence for each difference that does not agree with the paper's, and how many do."""
    lines, agreeing, all_of_them = [], 0, 0
    for reference in references:
        for row in rows:
            here = mean(scores(results, row.name, ANSWER, reference.name))
            if None in (row.paper, reference.paper, here) or row.name == reference.name or row.paper == reference.paper:
                continue
            paper = row.paper - reference.paper
            said, all_of_them = verdict(paper, here), all_of_them + 1
            agreeing += said == "agrees"
            if said != "agrees":
                lines.append(f"- {row.title} less {reference.title}: paper {paper:+.1f}, here {here.value:+.1f} "
                             f"{str(here).split(' ', 1)[1]}: {said}.")
    return [f"Of {all_of_them} differences {agreeing} agree with the paper's sign. The others:", "", *lines]


def table(rows: list[list]) -> list[str]:
    """Rows, the first of them the head, as a Markdown table with columns of even width."""
    rows = [["–" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append(f"| {' | '.join(cells)} |")
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return [lines[0], rule, *lines[1:], ""]


def ablations(rows, results: dict) -> list[str]:
    """The paper's Table 2."""
    full = rows[-1]
    cells = [["", "paper", "− PA-GRPO", "answer", "by seed", "− PA-GRPO", "perception", "answer, sampled",
              "perception, sampled"]]
    for row in rows:
        answer = mean(scores(results, row.name, ANSWER))
        gap = mean(scores(results, row.name, ANSWER, "full")) if row is not full else None
        others = [mean(scores(results, row.name, key)) for key in ("perception, greedy", "answer, sampled",
                                                                    "perception, sampled")]
        by_seed = " ".join(f"{x:.1f}" for x in answer.by_seed.values()) if answer else None
        paper_gap = f"{row.paper - full.paper:+.1f}" if row.paper and row is not full else None
        cells.append([row.title, row.paper, paper_gap, answer, by_seed, gap, *others])
    return table(cells)


def judges(rows, results: dict, curves: dict) -> list[str]:
    """The paper's Table 4, on one seed."""
    cells = [["", "paper", "answer", "perception", "answer, sampled", "perception, sampled", "agreement in training"]]
    for row in rows:
        found = [mean(scores(results, row.name, f"{what}, {how}"))
                 for how in ("greedy", "sampled") for what in ("answer", "perception")]
        agreement = average(curves, row.name, "judge/agreement")
        cells.append([row.title, row.paper, *found, agreement and f"{agreement.value:.1f}"])
    return table(cells)


def average(curves: dict, name: str, key: str, last: float = 1.0) -> Mean | None:
    """A metric in percent: its mean over the last share of the steps of each seed, then over the seeds."""
    by_seed = {}
    for seed, steps in curves.get(name, {}).items():
        values = [row[key] for row in steps[-max(1, round(last * len(steps))):] if key in row] if steps else []
        if values:
            by_seed[seed] = 100 * statistics.fmean(values)
    if not by_seed:
        return None
    return Mean(statistics.fmean(by_seed.values()), 0.0, over_seeds([*by_seed.values()]), by_seed, 0)


def collapse(rows, curves: dict) -> list[str]:
    """The paper's Figure 6c."""
    cells = [["percent of the groups", "no advantage at all", "in the last third", "none for perception",
              "none for reasoning"]]
    for row in rows:
        found = [average(curves, row.name, "zero_variance"), average(curves, row.name, "zero_variance", 1 / 3),
                 average(curves, row.name, "perception/zero_variance"),
                 average(curves, row.name, "reasoning/zero_variance")]
        shown = [x and f"{x.value:.1f}" + f" ±{x.seeds:.1f}" * math.isfinite(x.seeds) for x in found]
        cells.append([row.title, *shown])
    return table(cells)


def mismatch(rows, results: dict) -> list[str]:
    """The paper's Table 6."""
    cells = [["", "answer is not what the reasoning ends on, greedy", "sampled", "clips"]]
    for row in rows:
        greedy, sampled = (mean(scores(results, row.name, f"mismatch, {how}")) for how in ("greedy", "sampled"))
        cells.append([row.title, greedy, sampled, greedy and greedy.n])
    return table(cells)


def sufficiency(results: dict) -> list[str]:
    """The paper's Figure 4."""
    cells = [["what the SFT model is given", "paper", "answer", "clips"]]
    for title, paper, key in (("question", 35.1, "sft: toy-blind"),
                              ("question and its own observation", 48.6, "sft: toy-blind-given"),
                              ("question and PA-GRPO's observation", 55.5, "full: toy-blind-given"),
                              ("video", 52.9, "sft: toy"),
                              ("video and its own observation", 54.9, "sft: toy-given"),
                              ("video and PA-GRPO's observation", 56.0, "full: toy-given")):
        found = mean(scores(results, "sufficiency", key))
        cells.append([title, paper, found, found and found.n])
    return table(cells)


CURVES = ("perception/accuracy", "reasoning/accuracy", "perception/format", "reasoning/format", "kl", "entropy",
          "truncated", "zero_variance", "grad_norm")


def fifths(steps: list[dict], key: str) -> list[float]:
    """The mean of a metric in each fifth of a run; shorter if the run stopped or the metric is missing."""
    size, found = max(1, -(-len(steps) // 5)), []
    for i in range(0, len(steps), size):
        if values := [row[key] for row in steps[i:i + size] if key in row]:
            found.append(statistics.fmean(values))
    return found


def failed(row, full, results: dict, curves: dict) -> list[str]:
    """A run that failed beside the one that did not: their curves and what to see in them."""
    seed = next(iter(curves.get(row.name, {})), None)
    bad, good = (curves.get(name, {}).get(seed, []) for name in (row.name, full.name))
    if not (bad and good):
        return ["It has not been run.", ""]
    cells = [["mean in each fifth of the run", full.title, row.title]]
    for key in CURVES:
        cells.append([key, *(" ".join(f"{x:.3g}" for x in fifths(steps, key)) for steps in (good, bad))])
    mine, usual, start = (mean({seed: results[name][seed][ANSWER]}) for name in (row.name, full.name, "sft"))
    gap, told = mean(scores(results, row.name, ANSWER, full.name)), ""
    if gap.value >= -gap.clips:
        told = " So it has NOT failed: it is not below PA-GRPO."
    elif mine.value + mine.clips < start.value:
        told = " It has unlearned what SFT taught."
    kl, usual_kl, accuracy = fifths(bad, "kl"), fifths(good, "kl"), fifths(bad, "reasoning/accuracy")
    best = accuracy.index(max(accuracy)) + 1
    return table(cells) + [
        f"Held-out answers: {mine} percent; PA-GRPO {usual}; SFT, from which both start, {start}.{told}",
        f"KL to the SFT model is {kl[0]:.2g} in the first fifth and {kl[-1]:.2g} in the last (PA-GRPO: "
        f"{usual_kl[0]:.2g} and {usual_kl[-1]:.2g}).",
        f"The accuracy of sampled answers is best in fifth {best} of {len(accuracy)}, {max(accuracy):.2f}, and ends at "
        f"{accuracy[-1]:.2f}.", ""]


# ------------------------------------------------------------------------------------------------ the page

INTRODUCTION = """\
# The paper in miniature

`python tests/miniature.py` wrote this file. Seeds {seeds}; {sft_steps} steps of SFT and {steps} of RL for each row,
all other settings those of the preset `tiny`; {clips} held-out clips. Percent of right answers, greedy, as in the
paper; *sampled* is temperature 1. Perception is right if the observation suffices for the answer. A mean has two 95 %
intervals: ± over clips (these models, other clips), then ± over seeds (other models; Student's t, so with three seeds
it is wide). ±0.0 over clips beside 0 or 100 says only that all of these clips agree. *paper* is its mean of seven
benchmarks with Qwen2.5-VL-7B: compare signs, not sizes. {rows} runs took {hours:.1f} hours in all.
"""
ABOUT_JUDGES = """\
A server on loopback judges in training: the exact verdict, turned round for that share of the claims, chosen by a
hash of the claim. Evaluation is by the exact judge. *agreement* is measured over all verdicts in training, also those
that no server is asked for (an empty observation, a bare answer). One seed: only intervals over clips."""
ABOUT_COLLAPSE = """\
Share of the groups of responses of which no token gets an advantage, over all steps (`zero_variance` in
metrics.jsonl). With one advantage per response that is a group whose rewards are all equal; with PA-GRPO, one whose
perception rewards are all equal and whose reasoning rewards are, too. The last two columns count each segment's
reward by itself, whether the row uses it or not: a group may be in either, in both or in neither. ± is over seeds."""
ABOUT_MISMATCH = """\
Multiple choice only, and only where both name an option. The paper: Video-R1 21.5, VideoRFT 16.9, VideoP2R 7.5."""
ABOUT_SUFFICIENCY = """\
The SFT model answers from a text, without or with the video. The paper asks plain Qwen2.5-VL-7B; here it is the SFT
model, which has learned to read an observation. Where an observation is given, a question counts if its run has one."""


def page(rows, judging, broken, results: dict, curves: dict, seeds: list[int], steps: int, sft_steps: int) -> str:
    """All tables as Markdown."""
    full, first = rows[-1], str(seeds[0])
    ours = [row for row in rows if row.rl is not None]
    one_seed = {name: {first: x[first]} for name, x in results.items() if first in x}
    of_full = {name: {first: x[first]} for name, x in curves.items() if first in x}
    processes = [x for by_seed in results.values() for x in by_seed.values() if "seconds" in x]
    clips = [len(x.get(ANSWER, {})) for x in results.get("sft", {}).values()]
    hours = sum(x["seconds"] for x in processes) / 3600
    lines = [INTRODUCTION.format(seeds=" ".join(map(str, seeds)), steps=steps, sft_steps=sft_steps, hours=hours,
                                 clips=max(clips, default=0), rows=len(processes))]
    lines += ["## Table 2: what each part brings", "", *ablations(rows, results)]
    lines += ["### Where it differs from the paper", "", *disagreements(rows, results, [full, rows[1]]), ""]
    lines += [f"## Table 4: judges that err, seed {first}", "", ABOUT_JUDGES, ""]
    lines += judges([*judging, full._replace(title="exact judge", paper=None)], one_seed, of_full)
    lines += ["## Figure 6c: groups without an advantage", "", ABOUT_COLLAPSE, "", *collapse(ours, curves)]
    lines += ["## Table 6: does the answer follow from the reasoning?", "", ABOUT_MISMATCH, ""]
    lines += mismatch(rows, results)
    lines += ["## Figure 4: is the observation enough?", "", ABOUT_SUFFICIENCY, "", *sufficiency(results)]
    lines += [f"## A run that failed: {broken.title}, seed {first}", "", *failed(broken, full, results, curves)]
    return "\n".join(lines)


def means(rows, results: dict, curves: dict) -> dict:
    """The numbers of all tables, by row."""
    found = {}
    for row in rows:
        keys = [key for key in next(iter(results.get(row.name, {}).values()), {}) if key != "seconds"]
        numbers = {key: mean(scores(results, row.name, key)) for key in keys}
        numbers[f"{ANSWER}, less PA-GRPO"] = mean(scores(results, row.name, ANSWER, "full"))
        for key in ("zero_variance", "perception/zero_variance", "reasoning/zero_variance", "judge/agreement"):
            numbers[key] = average(curves, row.name, key)
        found[row.name] = {"title": row.title, "paper": row.paper, "flags of SFT": row.sft, "flags of RL": row.rl}
        found[row.name] |= {key: x.as_json() for key, x in numbers.items() if x}
    return found
