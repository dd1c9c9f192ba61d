"""Figures that can be reproduced with one command each. Not tests: they measure and print.

    python tests/bench.py cpu                 seconds and bytes beside transformers and TRL, and how they grow
    python tests/bench.py gpu                 the same on a GPU
    python tests/bench.py memory              the peak of a step beside that of tests/memory.py; on GPUs 5 steps of 3b
    python tests/bench.py judge               what a judge behind http costs a step: a loopback server that takes 2 s

`cpu` takes seven minutes, `gpu` at most nine, `memory` half a minute on a CPU and some minutes on GPUs, `judge` five.

Run them with nothing else on the machine. `cpu` needs pip install -r tests/requirements-bench.txt.
"""
import argparse
import importlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LARGE = 512 * 28 * 28                                        # pixels of a frame in the bench of the judge


def command(script: str, *flags) -> None:
    """Runs a script of this project."""
    words = [script, *map(str, flags)]
    print("$ python " + " ".join(words), flush=True)
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def on_cpu() -> None:
    """Bytes of tensors at their most in each phase of a step, counted while a small model runs."""
    import tempfile

    from data import make_toy, make_toy_model
    from memory import estimate
    from test_memory import SHAPES, WIDE, counted, shaped
    with tempfile.TemporaryDirectory() as folder:
        toy = make_toy(Path(folder) / "toy", {"rl": 20})
        make_toy_model(Path(folder) / "base", seed=0)
        print(f"{'phase':>12}{'counted':>12}{'said':>12}{'ratio':>8}   settings")
        for shape in SHAPES:
            told = estimate(WIDE, shaped(shape), 1, cuda=False)
            for phase, real in counted(shaped(shape), toy, Path(folder) / "base", WIDE).items():
                print(f"{phase:>12}{real / 2 ** 20:>8.1f} MiB{told[phase] / 2 ** 20:>8.1f} MiB"
                      f"{told[phase] / real:>8.2f}   {shape}", flush=True)


def noisy_clips(toy: Path) -> None:
    """Replaces the clips of the toy world by 16 random frames each, of 128 tokens."""
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    for clip in (toy / "rl").iterdir():
        first, *others = [Image.fromarray(x) for x in rng.integers(0, 255, (16, 224, 448, 3), np.uint8)]
        first.save(clip, "PNG", save_all=True, append_images=others, duration=500, compress_level=1)


def stopped_once(words: list[str], folder: Path) -> None:
    """Runs a training, stops it by SIGTERM after the second step and continues it."""
    from toy_runs import logged
    print("$ " + " ".join(words[1:]), flush=True)
    first = subprocess.Popen(words)
    while first.poll() is None and len(logged(folder)) < 2:
        time.sleep(0.5)
    first.terminate()
    first.wait()
    subprocess.run(words, check=True)


def on_gpu(out: Path, preset: str, flags: list[str]) -> None:
    """Random weights in the preset's shape, clips of random frames, five PA-GRPO steps at the paper's frames and
    lengths. Every visible GPU is a rank."""
    import torch

    import pagrpo
    from data import make_toy, make_toy_model
    from memory import estimate
    from model import CONFIGS
    from toy_runs import logged
    gpus, model, run = torch.cuda.device_count(), out / preset, out / "pagrpo"
    if not model.is_dir():
        make_toy_model(model, 0, CONFIGS[preset])
    toy = make_toy(out / "toy", {"rl": 64})
    noisy_clips(toy)
    shutil.rmtree(run, ignore_errors=True)
    given = ["--preset", preset, "--model", model, "--data", toy / "rl.json", "--media", toy, "--judge", "rule",
             "--steps", 5, "--questions", 8, "--out", out, *flags]
    given = [str(word) for word in given]
    stopped_once([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}",
                  str(ROOT / "pagrpo.py"), *given], run)
    settings = pagrpo.sft.parse_flags(pagrpo.Settings, pagrpo.PRESETS, given, "")
    told = estimate(CONFIGS[preset], settings, gpus)["peak"] / 2 ** 30
    print(f"{torch.cuda.get_device_name()}, {gpus} GPU(s), {preset}: {told:.1f} GB said")
    for row in logged(run):
        print(f"step {row['step']}: {row['reserved_memory_gb']:.1f} GB reserved; sampling "
              f"{row['seconds_sampling']:.1f} s, reference {row['seconds_scoring']:.1f} s, learning "
              f"{row['seconds_training']:.1f} s, {row['tokens'] / row['seconds_sampling']:.0f} tokens/s sampled, gap "
              f"{row['logprob_gap_max']:.3f}")


def judge(out: Path, delay: float, flags: list[str]) -> None:
    """64 responses a step, judged by a server on loopback that answers every request after `delay` seconds. The frames
    are far larger than the toy world needs, so that a step has some length; SFT gets used to them first."""
    from serving import serving
    from toy_runs import logged
    large, run = out / "large", out / "large" / "pagrpo"
    shared = ["--preset", "tiny", "--media", out / "toy", "--min-pixels", LARGE, "--max-pixels", LARGE, "--out", large]
    command("sft.py", "--out", out)
    command("sft.py", *shared, "--model", out / "sft", "--data", out / "cot" / "traces.jsonl",
            "--heldout-count", 4, "--steps", 100, "--batch", 4, "--micro-batch", 4, "--lr", 1e-3)

    def say(number: int, request: dict) -> str:
        return f"Seen. <judgement>{'Yes' if number % 2 else 'No'}</judgement>"
    shutil.rmtree(run, ignore_errors=True)
    with serving(say, delay) as server:
        command("pagrpo.py", *shared, "--model", large / "sft", "--data", out / "toy" / "rl.json",
                "--judge", server.url, "--judge-model", "any", "--questions", 8, "--micro-batch", 1,
                "--steps", 4, *flags)
    phases = ["sampling", "scoring", "judging", "training"]  # judging: waited for it
    print(f"{len(server.requests)} requests\n" + "".join(f"{name:>14}" for name in ["step", *phases, "judging"]))
    for row in logged(run):
        seconds = [row[f"seconds_{phase}"] for phase in phases]
        print(f"{row['step']:>14}" + "".join(f"{x:>12.2f} s" for x in seconds) + f"{seconds[2] / sum(seconds):>14.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="bench", required=True)
    benches = {name: commands.add_parser(name) for name in ("cpu", "gpu", "memory", "judge")}
    for name, bench in benches.items():
        if name in ("cpu", "gpu"):
            bench.add_argument("--json", type=Path, default=f"runs/bench-{name}.jsonl", help="its rows [%(default)s]")
            bench.add_argument("--only", nargs="+", default=[], metavar="ROWS",
                               help=f"functions of bench_{name}.py; default: all")
        else:
            bench.epilog = "Further flags go to pagrpo.py."
            bench.add_argument("--out", type=Path, default=f"runs/bench-{name}", help="folder [%(default)s]")
    benches["cpu"].add_argument("--repeats", type=int, default=5, help="timings of each call [%(default)s]")
    add = benches["gpu"].add_argument
    add("--minutes", type=float, default=9.0, help="rows that take longer are broken off [9]")
    add("--small", action="store_true", help="a small model, to try it")
    benches["memory"].add_argument("--preset", choices=["3b", "7b"], default="3b", help="shape, on GPUs [%(default)s]")
    benches["judge"].add_argument("--delay", type=float, default=2.0, help="seconds that the server takes [2]")
    args, flags = parser.parse_known_args()
    if args.bench in ("cpu", "gpu"):
        parser.parse_args()                                  # no further flags here
        importlib.import_module(f"bench_{args.bench}").run(args)
    elif args.bench == "judge":
        judge(args.out, args.delay, flags)
    else:
        import torch
        on_gpu(args.out, args.preset, flags) if torch.cuda.is_available() else on_cpu()


if __name__ == "__main__":
    main()
