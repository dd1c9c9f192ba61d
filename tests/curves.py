"""Curves of a healthy run and of four broken ones, for docs/course.md.

    python tests/curves.py run      three broken runs, one after another; the same command goes on after a stop
    python tests/curves.py draw     docs/results/curves/NAME.jsonl → NAME.svg

The healthy run and the one with a high learning rate are rows of tests/miniature.py, which writes their metrics.
"""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pagrpo  # noqa: E402  (found through the line above)

WORK, RESULTS = ROOT / "runs/curves", ROOT / "docs/results/curves"
STEPS, EVERY = 100, 5                                        # of a broken run; steps behind one point
TINY = pagrpo.PRESETS["tiny"]
ACCURACY = ["perception/accuracy", "reasoning/accuracy"]
MINIATURE = {"healthy": "metrics-default.jsonl", "high-learning-rate": "metrics-lr-x10.jsonl"}
RUNS = {  # name → flags beside those of all runs
    "no-kl": ["--kl-beta", "1e-9"],                          # not 0: without a reference the KL could not be measured
    "gamed-judge": ["--judge", "relevance"],
    "low-length-cap": ["--max-response", str(TINY["max_response"] // 2)],
}
DRAWN = {
    "healthy": [*ACCURACY, "loss"],
    "high-learning-rate": [*ACCURACY, "kl"],
    "no-kl": [*ACCURACY, "kl"],
    "gamed-judge": ["perception/accuracy", "perception/sufficient", "reasoning/accuracy"],
    "low-length-cap": ["truncated", *ACCURACY[::-1]],
}
KEPT = sorted({"step", "entropy", "reasoning/tokens"}.union(*DRAWN.values()))
BLUE, ORANGE = "#0072B2", "#D55E00"


def run(start: Path) -> None:
    """start: a folder with clips and a finished SFT, as `python sft.py` leaves it."""
    for name, flags in RUNS.items():
        with tempfile.TemporaryDirectory() as code:          # of this run: one of them needs a bad judge
            for file in ROOT.glob("*.py"):
                shutil.copy(file, code)
            shutil.copytree(ROOT / "assets", Path(code) / "assets")
            if name == "gamed-judge":
                subprocess.run(["git", "apply", ROOT / "docs/solutions/gameable-judge.diff"], cwd=code, check=True)
            subprocess.run([sys.executable, "pagrpo.py", "--preset", "tiny", "--out", WORK / name, "--model",
                            start / "sft", "--data", start / "toy/rl.json", "--media", start / "toy", "--steps",
                            str(STEPS), *flags], cwd=code, check=True)
        keep(name, WORK / name / "pagrpo/metrics.jsonl")
    for name, file in MINIATURE.items():
        keep(name, RESULTS.parent / file)


def keep(name: str, log: Path) -> None:
    """Writes the thinned metrics of a run beside the others."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(row) for row in log.read_text().splitlines()]
    (RESULTS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in thin(rows)))


def thin(rows: list[dict]) -> list[dict]:
    """Means over EVERY steps. `perception/sufficient` is the share that the exact rule accepts: what the judge accepts,
    less what it accepts wrongly, and what it refuses wrongly."""
    for row in rows:
        wrong = row.get("judge/false_positive", 0.0)
        row["perception/sufficient"] = row["perception/accuracy"] + 1 - row.get("judge/agreement", 1.0) - 2 * wrong
    parts = [rows[i:i + EVERY] for i in range(0, len(rows), EVERY)]
    return [{name: float(f"{sum(row[name] for row in part) / len(part):.4g}") for name in KEPT} for part in parts]


def panel(x: int, name: str, curves: list[tuple[str, list[dict]]]) -> str:
    """One metric of one or two runs over the steps."""
    values = [row[name] for _, rows in curves for row in rows]
    low, high = min(0.0, *values), max(0.0 if name in ("loss", "kl") else 1.0, *values) or 1.0         # others: shares
    last = max(rows[-1]["step"] for _, rows in curves)
    lines = [f'<text x="{x}" y="62">{name}</text><path d="M{x} 74V214H{x + 225}" fill="none" stroke="#8c959f"/>',
             f'<text x="{x}" y="234" class="s">{low:.2g} to {high:.2g}</text>',
             f'<text x="{x + 225}" y="234" class="s" text-anchor="end">step {last:.0f}</text>']
    for colour, rows in curves:
        points = [f"{x + 225 * r['step'] / last:.1f},{214 - 140 * (r[name] - low) / (high - low):.1f}" for r in rows]
        dash = ' stroke-dasharray="7 4"' if colour == BLUE and len(curves) > 1 else ""
        lines.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2.5"{dash}/>')
    return "\n".join(lines)


def draw() -> None:
    runs = {name: [json.loads(row) for row in (RESULTS / f"{name}.jsonl").read_text().splitlines()] for name in DRAWN}
    for name, metrics in DRAWN.items():
        curves = [(BLUE, runs["healthy"])] + ([(ORANGE, runs[name])] if name != "healthy" else [])
        title = f'<text x="15" y="28" fill="{BLUE}">healthy{", dashed" * (len(curves) > 1)}</text>' + (
            f'<text x="185" y="28" fill="{ORANGE}" font-weight="bold">{name}</text>' if len(curves) > 1 else "")
        panels = "\n".join(panel(15 + 250 * i, metric, curves) for i, metric in enumerate(metrics))
        (RESULTS / f"{name}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 245" font-family="system-ui,sans-serif" '
            f'font-size="18" fill="#1f2328"><title>{name}: {", ".join(metrics)}</title><style>.s{{font-size:14px}}'
            f'</style><rect width="760" height="245" rx="8" fill="#fff"/>\n{title}\n{panels}\n</svg>\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "draw"])
    parser.add_argument("--start", type=Path, default=ROOT / "runs/tiny", help="folder of a finished SFT [runs/tiny]")
    args = parser.parse_args()
    run(args.start.resolve()) if args.what == "run" else draw()
