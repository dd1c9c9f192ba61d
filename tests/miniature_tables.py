"""Statistics, tables and the picture of tests/miniature.py: from what each row measured on each seed to Markdown.

A mean over seeds has a 95 % interval by Student's t: base, clips, order and sampling could have been others. A
difference is taken on the same seed. With one seed only, the interval is over clips.
"""
import math
import statistics
from typing import NamedTuple

import rewards

# Student's t for 95 %, by degrees of freedom; with more than five it is a little smaller than that of five.
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
ANSWER = "answer, greedy"                                    # the paper's measure
PRIMARY = ("perception, sampled", "answer, sampled")         # full less grpo, fixed before the seeds were run


class Mean(NamedTuple):
    """A mean in percent or points, with the half width of its interval."""
    value: float
    half: float
    by_seed: dict[str, float]

    def __str__(self) -> str:
        return f"{self.value:.1f}" + (f" ±{self.half:.1f}" if self.half else "")


def mean(results: dict, name: str, key: str, minus: str = "") -> Mean | None:
    """A measure of a row over its seeds, or its difference to the row `minus` on the seeds that have both. None if
    there is none."""
    by_seed, n = {}, 0
    for seed, found in sorted(results.get(name, {}).items()):
        mine, other = found.get(key), results.get(minus, {}).get(seed, {}).get(key)
        if mine and (other or not minus):
            by_seed[seed] = mine[0] - (other[0] if minus else 0)
            n = mine[1]
    if not by_seed:
        return None
    values = list(by_seed.values())
    half = 1.96 * math.sqrt(abs(values[0] * (100 - values[0])) / n)      # of one seed, over its clips
    half *= " " in key                                       # a name of metrics.jsonl: over steps, not clips
    if len(values) > 1:
        half = T95.get(len(values) - 1, 2.571) * statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), half, by_seed)


def of_steps(steps: list[dict]) -> dict[str, list[float]]:
    """What a row keeps of its metrics: percent over all steps."""
    found = {}
    for key in ("zero_variance", "perception/zero_variance", "reasoning/zero_variance", "judge/agreement"):
        values = [100 * row[key] for row in steps if key in row]
        if values:
            found[key] = [statistics.fmean(values), len(values)]
    return found


def verdict(paper: float, here: Mean) -> str:
    """Does a difference have the paper's sign? Resolved: 0 lies outside its interval."""
    if len(here.by_seed) < 2 or abs(here.value) <= here.half:
        return "not resolved"
    return "agrees" if (paper > 0) == (here.value > 0) else "disagrees: the opposite sign"


def signs(rows, results: dict, references: list) -> list[str]:
    """Each difference that is at least a point in the paper, and whether it has the same sign here."""
    cells, said = [["difference in answers, greedy", "paper", "here", ""]], []
    for reference in references:
        for row in rows:
            here = mean(results, row.name, ANSWER, reference.name)
            if None in (row.paper, reference.paper, here) or abs(row.paper - reference.paper) < 1:
                continue
            if row in references and references.index(row) < references.index(reference):
                continue                                     # stands above with the other sign
            said.append(verdict(row.paper - reference.paper, here))
            cells.append([f"{row.title} less {reference.title}", f"{row.paper - reference.paper:+.1f}",
                          f"{here.value:+.1f} ±{here.half:.1f}", said[-1]])
    return [f"Of {len(said)} differences {said.count('agrees')} agree with the paper's sign.", "", *table(cells)]


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


def columns(rows, results: dict, keys: dict[str, str], paper: bool = False) -> list[str]:
    """A table with a row each and a column for each measure: heading → its key."""
    cells = [["", *["paper"] * paper, *keys]]
    for row in rows:
        found = [mean(results, row.name, key) for key in keys.values()]
        if any(found):
            cells.append([row.title, *[row.paper] * paper, *found])
    return table(cells)


def ablations(rows, results: dict) -> list[str]:
    """The paper's Table 2."""
    full = rows[-1]
    cells = [["", "paper", "− PA-GRPO", "answer", "− PA-GRPO", "perception", "answer, sampled", "− PA-GRPO",
              "perception, sampled", "− PA-GRPO", "seeds"]]
    for row in rows:
        line = [row.title, row.paper, f"{row.paper - full.paper:+.1f}" if row.paper and row is not full else None]
        for key in (ANSWER, "perception, greedy", *PRIMARY[::-1]):
            line.append(mean(results, row.name, key))
            if key != "perception, greedy":
                line.append(mean(results, row.name, key, full.name) if row is not full else None)
        cells.append([*line, len(results.get(row.name, {}))])
    return table(cells)


def primary(results: dict) -> list[str]:
    cells = [["PA-GRPO less GRPO, points", "mean", "by seed"]]
    for key in PRIMARY:
        if here := mean(results, "full", key, "grpo"):
            cells.append([key, here, " ".join(f"{x:+.1f}" for x in here.by_seed.values())])
    return table(cells)


def sufficiency(results: dict) -> list[str]:
    """The paper's Figure 4."""
    cells = [["what the SFT model is given", "paper", "answer"]]
    for title, paper, key in (("question", 35.1, "sft: toy-blind"),
                              ("question and its own observation", 48.6, "sft: toy-blind-given"),
                              ("question and PA-GRPO's observation", 55.5, "full: toy-blind-given"),
                              ("video", 52.9, "sft: toy"),
                              ("video and its own observation", 54.9, "sft: toy-given"),
                              ("video and PA-GRPO's observation", 56.0, "full: toy-given")):
        cells.append([title, paper, mean(results, "sufficiency", key)])
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


def failed(row, full, results: dict, seed: str, folder) -> list[str]:
    """A run that failed beside the one that did not: their curves and what to see in them."""
    bad, good = (rewards.read_jsonl(folder / f"metrics-{name}.jsonl") for name in (row.name, "default"))
    if not (bad and good and seed in results.get(row.name, {})):
        return ["It has not been run.", ""]
    cells = [["mean in each fifth of the run", full.title, row.title]]
    for key in CURVES:
        cells.append([key, *(" ".join(f"{x:.3g}" for x in fifths(steps, key)) for steps in (good, bad))])
    one = {name: {seed: results[name][seed]} for name in (row.name, full.name, "sft")}
    mine, usual, start = (mean(one, name, ANSWER) for name in one)
    told = " It has unlearned what SFT taught." if mine.value + mine.half < start.value else ""
    held = f"Held-out answers: {mine} percent; PA-GRPO {usual}; SFT, from which both start, {start}.{told}"
    return [*table(cells), held, ""]


# ------------------------------------------------------------------------------------------------ separation

GAINS = {"full": ("PA-GRPO", "#0072B2"), "joint": ("joint", "#009E73"), "grpo": ("GRPO", "#D55E00")}


def separation(levels: dict[float, dict[str, str]], results: dict) -> list[str]:
    """What RL brings over SFT at each level of slips, and the lead of PA-GRPO over joint and over GRPO."""
    lines, (full, *others) = [], GAINS
    for key in (*PRIMARY, "answer given perception, sampled"):
        titles = [title for title, _ in GAINS.values()]
        cells = [[key, "SFT", *titles, *(f"PA-GRPO − {title}" for title in titles[1:]), "seeds"]]
        for level, names in levels.items():
            start = names["sft"]
            found = [mean(results, names[name], key, start) for name in GAINS]
            found += [mean(results, names[full], key, names[name]) for name in others]
            if any(found):
                cells.append([f"{100 * level:.0f} % slips", mean(results, start, key), *found, len(results[start])])
        lines += table(cells)
    return lines


def picture(levels: dict[float, dict[str, str]], results: dict) -> str:
    """Gains over SFT against the level, perception and answers side by side, with intervals, as SVG."""
    gains = {}
    for p, key in enumerate(PRIMARY):
        for name in GAINS:
            for level, names in levels.items():
                if here := mean(results, names[name], key, names["sft"]):
                    gains[p, name, level] = here
    low, high, last = -10, 50, max(levels)

    def place(p: int, level: float, points: float, shift: int = 0) -> tuple[float, float]:
        height = (min(max(points, low), high) - low) / (high - low)
        return 60 + 370 * p + 300 * level / last + shift, 250 - 190 * height
    lines = []
    for p, key in enumerate(PRIMARY):
        (x, y), (right, _) = place(p, 0, 0), place(p, last, 0)
        lines += [f'<text x="{x - 35}" y="45">{key.split(",")[0]}: points over SFT</text>',
                  f'<path d="M{x - 15} {y}H{right + 15}" stroke="#8c959f"/>']
        for points in range(low, high + 1, 10):
            lines.append(f'<text x="{x - 22}" y="{place(p, 0, points)[1] + 5:.0f}" text-anchor="end">{points}</text>')
        for level in levels:
            lines.append(f'<text x="{place(p, level, 0)[0]:.0f}" y="275" text-anchor="middle">'
                         f'{100 * level:.0f} %</text>')
        for shift, (name, (title, colour)) in zip((-4, 0, 4), GAINS.items()):
            found = {level: gains[p, name, level] for level in levels if (p, name, level) in gains}
            path = " ".join("{:.1f},{:.1f}".format(*place(p, level, x.value, shift)) for level, x in found.items())
            lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
            for level, here in found.items():
                x, top = place(p, level, here.value + here.half, shift)
                _, bottom = place(p, level, here.value - here.half, shift)
                lines.append(f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="{colour}" stroke-width="1.5"/>')
    for i, (title, colour) in enumerate(GAINS.values()):
        lines.append(f'<text x="{25 + 90 * i}" y="22" fill="{colour}" font-weight="bold">{title}</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 310" font-family="system-ui,sans-serif" '
            'font-size="15" fill="#1f2328"><title>Gains over SFT against the share of slips in its traces</title>'
            '<rect width="760" height="310" rx="8" fill="#fff"/>\n' + "\n".join(lines) +
            '\n<text x="395" y="300" text-anchor="middle">traces of SFT whose reasoning slips</text></svg>\n')


# ------------------------------------------------------------------------------------------------ the page

INTRODUCTION = """\
# The paper in miniature

`python tests/miniature.py` wrote this file, and [miniature.json](miniature.json) with every finished row. Each seed has
its own clips, base, traces and SFT model; settings are those of the preset `tiny`. Percent of held-out clips; greedy,
as in the paper, or *sampled* at temperature 1. Perception is right if the observation suffices for the answer. *Answer
given perception*: of a model's clips with such an observation, the percent answered rightly. ± is a 95 % interval over
seeds (Student's t): how clips and base vary is in it. *paper* is its mean of seven benchmarks with Qwen2.5-VL-7B:
compare signs, not sizes. {rows} rows took {hours:.1f} hours of processes, two at a time.

## Primary outcome

Fixed before these seeds were run: PA-GRPO less GRPO, sampled, in perception and in answers; reported as it comes.
GRPO is `--advantage grpo`, joint `--advantage joint`, PA-GRPO the default.
"""
ABOUT_SEPARATION = """\
In a share of SFT's traces the reasoning *slips*: think and answer follow from other letters than those in the
observation, which stays right. GRPO rewards the answer only. joint rewards perception as well and gives one advantage
to all tokens. PA-GRPO gives each segment an advantage of its own: its lead over joint is what the separation brings.
Expected before GRPO was run with slips, after trials on two other seeds: PA-GRPO's lead over GRPO in perception grows
with the share, since with slips an answer says less about what was seen. A lead that does not grow would refute it.
Nothing was expected of joint. Gains are points over SFT; 0 % is over all seeds, the other levels over the first three,
so that levels compare only on these (*Growth*, at the end).

![Gains over SFT against the share of slips](separation.svg)
"""
ABOUT_JUDGES = """\
A server on loopback judges in training: the exact verdict, turned round for that share of the claims, chosen by a
hash of the claim. Evaluation is by the exact judge. *agreement* is measured over all verdicts in training, also those
that no server is asked for (an empty observation, a bare answer). One seed: intervals are over clips."""
ABOUT_COLLAPSE = """\
Share of the groups of responses of which no token gets an advantage, over all steps (`zero_variance` in
metrics.jsonl). With one advantage per response that is a group whose rewards are all equal; with PA-GRPO, one whose
perception rewards are all equal and whose reasoning rewards are, too. The last two columns count each segment's
reward by itself, whether the row uses it or not: a group may be in either, in both or in neither."""
ABOUT_MISMATCH = """\
Multiple choice only, and only where both name an option. The paper: Video-R1 21.5, VideoRFT 16.9, VideoP2R 7.5."""
ABOUT_SUFFICIENCY = """\
The SFT model answers from a text, without or with the video. The paper asks plain Qwen2.5-VL-7B; here it is the SFT
model, which has learned to read an observation. Where an observation is given, a question counts if its run has one."""
JUDGED = {"answer": ANSWER, "perception": "perception, greedy", "answer, sampled": "answer, sampled",
          "perception, sampled": "perception, sampled", "agreement in training": "judge/agreement"}
COLLAPSE = {"no advantage at all": "zero_variance", "none for perception": "perception/zero_variance",
            "none for reasoning": "reasoning/zero_variance"}
MISMATCH = {"answer is not what the reasoning ends on, greedy": "mismatch, greedy", "sampled": "mismatch, sampled"}


def page(rows, judging, broken, levels: dict, results: dict, folder) -> str:
    """All tables as Markdown."""
    full, first = rows[-1], min(results.get("sft", [""]))
    ours = [row for row in rows if row.rl is not None]
    exact = full._replace(title="exact judge", paper=None)
    one_seed = {name: {first: x[first]} for name, x in results.items() if first in x}
    seconds = [found["seconds"] for x in results.values() for found in x.values()]
    lines = [INTRODUCTION.format(rows=len(seconds), hours=sum(seconds) / 3600), *primary(results)]
    lines += ["## When separate advantages pay", "", ABOUT_SEPARATION, *separation(levels, results)]
    lines += ["## Table 2: what each part brings", "", *ablations(rows, results)]
    lines += ["### Signs", "", *signs(rows, results, [full, rows[1]])]
    lines += [f"## Table 4: judges that err, seed {first}", "", ABOUT_JUDGES, ""]
    lines += columns([*judging, exact], one_seed, JUDGED, paper=True)
    lines += ["## Figure 6c: groups without an advantage, percent", "", ABOUT_COLLAPSE, "",
              *columns(ours, results, COLLAPSE)]
    lines += ["## Table 6: does the answer follow from the reasoning?", "", ABOUT_MISMATCH, "",
              *columns(rows, results, MISMATCH)]
    lines += ["## Figure 4: is the observation enough?", "", ABOUT_SUFFICIENCY, "", *sufficiency(results)]
    lines += [f"## A run that failed: {broken.title}, seed {first}", "", *failed(broken, full, results, first, folder)]
    return "\n".join(lines)
