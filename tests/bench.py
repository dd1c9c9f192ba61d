"""Figures that can be reproduced with one command each. Not tests: they measure and print.

    python tests/bench.py cpu                 seconds and bytes beside transformers and TRL, and how they grow
    python tests/bench.py gpu                 the same on a GPU
    python tests/bench.py memory              the peak of a step beside what tests/memory.py says; on a GPU five steps of 3b
    python tests/bench.py judge               what a judge behind http costs a step: a loopback server that takes 2 s

Run them with nothing else on the machine. `cpu` needs pip install -r tests/requirements-bench.txt.
"""
import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LARGE = 512 * 28 * 28                                        # pixels of a frame in the bench of the judge


def command(script: str, *flags) -> float:
    """Runs a script of this project and returns its seconds."""
    words = [sys.executable, str(ROOT / script), *map(str, flags)]
    print("$ python " + " ".join([script, *map(str, flags)]), flush=True)
    began = time.perf_counter()
    subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


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


def on_gpu(out: Path, preset: str, flags: list[str]) -> None:
    """Random weights in the preset's shape, clips of random frames, five PA-GRPO steps at the paper's frames and
    lengths, stopped by SIGTERM after the second and continued. Every visible GPU is a rank."""
    import numpy as np
    import torch
    from PIL import Image

    import pagrpo
    from data import make_toy, make_toy_model
    from memory import estimate
    from model import CONFIGS, Qwen2_5_VL, save_model, write_config
    gpus, clips = torch.cuda.device_count(), 64
    if not (out / "model").is_dir():
        make_toy_model(out / "base", seed=0)
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            model = Qwen2_5_VL(CONFIGS[preset])
            torch.set_default_dtype(torch.float32)
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else None
        save_model(dict(model.named_parameters()), out / "model", out / "base",
                   write_extra=lambda folder: write_config(CONFIGS[preset], folder, [2, 0], "bfloat16"))
        del model
        torch.cuda.empty_cache()
    toy, rng = make_toy(out / "toy", {"rl": clips}), np.random.default_rng(0)
    records = json.loads((toy / "rl.json").read_text())
    for i, record in enumerate(records):                     # folders of frames: they need no video decoder
        record["path"] = f"frames/{i}"
        (toy / record["path"]).mkdir(parents=True, exist_ok=True)
        for n in range(16):
            Image.fromarray(rng.integers(0, 255, (308, 320, 3), np.uint8)).save(toy / f"frames/{i}/{n:02d}.jpg")
    (out / "records.json").write_text(json.dumps(records))
    shutil.rmtree(out / "pagrpo", ignore_errors=True)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}",
             str(ROOT / "pagrpo.py"), "--preset", preset, "--model", out / "model", "--data", out / "records.json",
             "--media", toy, "--judge", "rule", "--steps", 5, "--questions", 8, "--out", out, *flags]
    words = [str(word) for word in words]
    print("$ " + " ".join(words[1:]), flush=True)
    first = subprocess.Popen(words)
    log = out / "pagrpo" / "metrics.jsonl"
    while first.poll() is None and (not log.exists() or log.read_text().count("\n") < 2):
        time.sleep(0.5)
    first.terminate()
    first.wait()
    subprocess.run(words, check=True)
    settings = pagrpo.sft.parse_flags(pagrpo.Settings, pagrpo.PRESETS, words[words.index("--preset"):], "")
    told = estimate(CONFIGS[preset], settings, gpus)["peak"] / 2 ** 30
    print(f"{torch.cuda.get_device_name()}, {gpus} GPU(s), {preset}: {told:.1f} GB said")
    for row in map(json.loads, log.read_text().splitlines()):
        print(f"step {row['step']}: {row['reserved_memory_gb']:.1f} GB reserved; sampling "
              f"{row['seconds_sampling']:.1f} s, reference {row['seconds_scoring']:.1f} s, learning "
              f"{row['seconds_training']:.1f} s, {row['tokens'] / row['seconds_sampling']:.0f} tokens/s sampled, gap "
              f"{row['logprob_gap_max']:.3f}")


def judge(out: Path, delay: float, flags: list[str]) -> None:
    """64 responses a step, judged by a server on loopback that answers every request after `delay` seconds. The frames
    are far larger than the toy world needs, so that a step has some length; SFT gets used to them first."""
    from serving import serving
    large = ["--preset", "tiny", "--media", out / "toy", "--min-pixels", LARGE, "--max-pixels", LARGE]
    command("sft.py", "--out", out)
    command("sft.py", *large, "--out", out / "large", "--model", out / "sft", "--data", out / "cot" / "traces.jsonl",
            "--heldout-count", 4, "--steps", 100, "--batch", 4, "--micro-batch", 4, "--lr", 1e-3)

    def say(number: int, request: dict) -> str:
        return f"Seen. <judgement>{'Yes' if number % 2 else 'No'}</judgement>"
    shutil.rmtree(out / "large" / "pagrpo", ignore_errors=True)
    with serving(say, delay) as server:
        command("pagrpo.py", *large, "--out", out / "large", "--model", out / "large" / "sft", "--data",
                out / "toy" / "rl.json", "--judge", server.url, "--judge-model", "any", "--questions", 8,
                "--micro-batch", 1, "--steps", 4, *flags)
    rows = [json.loads(line) for line in (out / "large" / "pagrpo" / "metrics.jsonl").read_text().splitlines()]
    phases = ["sampling", "scoring", "judging", "training"]  # judging: waited for it
    print(f"{len(server.requests)} requests\n" + "".join(f"{name:>14}" for name in ["step", *phases, "judging"]))
    for row in rows:
        seconds = [row[f"seconds_{phase}"] for phase in phases]
        print(f"{row['step']:>14}" + "".join(f"{x:>12.2f} s" for x in seconds) + f"{seconds[2] / sum(seconds):>14.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="bench", required=True)
    cpu = commands.add_parser("cpu", help="one table for two cores, beside transformers and TRL")
    cpu.add_argument("--json", type=Path, default=Path("runs/bench-cpu.jsonl"), help="its rows [%(default)s]")
    cpu.add_argument("--repeats", type=int, default=5, help="timings of each call [%(default)s]")
    cpu.add_argument("--only", nargs="+", default=[], metavar="ROWS", help="functions of bench_cpu.py; default: all")
    gpu = commands.add_parser("gpu", help="one table, on one GPU")
    gpu.add_argument("--json", type=Path, default=Path("runs/bench-gpu.jsonl"), help="its rows [%(default)s]")
    gpu.add_argument("--minutes", type=float, default=9.0, help="rows that take longer are broken off [9]")
    gpu.add_argument("--small", action="store_true", help="a small model, to try it")
    gpu.add_argument("--only", nargs="+", default=[], metavar="ROWS", help="functions of bench_gpu.py; default: all")
    measured = commands.add_parser("memory", help="half a minute on a CPU; some minutes on GPUs, with further "
                                                  "flags for pagrpo.py")
    measured.add_argument("--out", type=Path, default=Path("runs/bench-memory"), help="folder, on GPUs [%(default)s]")
    measured.add_argument("--preset", choices=["3b", "7b"], default="3b", help="shape, on GPUs [%(default)s]")
    judged = commands.add_parser("judge", help="what a slow judge costs a step, five minutes; further flags go to "
                                               "pagrpo.py")
    judged.add_argument("--out", type=Path, default=Path("runs/bench-judge"), help="folder [%(default)s]")
    judged.add_argument("--delay", type=float, default=2.0, help="seconds that the server takes [2]")
    args, flags = parser.parse_known_args()
    if args.bench in ("cpu", "gpu"):
        parser.parse_args()                                  # no further flags here
    if args.bench == "cpu":
        import bench_cpu
        bench_cpu.run(args)
    elif args.bench == "gpu":
        import bench_gpu
        bench_gpu.run(args)
    elif args.bench == "memory":
        import torch
        on_gpu(args.out, args.preset, flags) if torch.cuda.is_available() else on_cpu()
    else:
        judge(args.out, args.delay, flags)


if __name__ == "__main__":
    main()
