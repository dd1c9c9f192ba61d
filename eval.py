"""What has a model learned? Held-out benchmarks, and single questions about any clip.

    python eval.py --bench toy --model runs/tiny/pagrpo
    python eval.py --model runs/tiny/pagrpo --video clip.avi --question "How many letters are red?" \\
                   --problem-type numerical
    python eval.py --model runs/tiny/sft --video clip.avi --question "Which letter comes right after the red O?" \\
                   --options "red X" "blue T" "green O"

`--bench toy` answers the 512 held-out clips greedily and sampled at temperature 1, and prints perception (does the
observation suffice, by the toy world's exact judge), answers by problem type, and how many responses keep the template,
each with a 95 % interval. A model folder of a run brings its own settings (frames, pixels, prompt); flags win over
them.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from data import TOY_SPLITS, Examples, MediaError, Record, Vocabulary, build_example, make_toy, read_records
from pagrpo import PRESETS, Settings, evaluate, rollout, summary, table
from rewards import PROBLEM_TYPES, Judge, rule_judge
from sft import World, build_model, gathered, newest_checkpoint, start_world

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


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


def bench_toy(path: Path, data: Path, settings: Settings, world: World) -> dict:
    """Greedy and sampled summaries of a checkpoint on the toy world's held-out clips, which are made when missing."""
    if world.first and not (data / "heldout.json").is_file():
        make_toy(data, {"heldout": TOY_SPLITS["heldout"]})
    world.wait()
    vocabulary = Vocabulary(path)
    model = build_model(path, vocabulary, world)
    held = Examples(read_records(data / "heldout.json"), data, vocabulary, model.config, settings)
    judge = Judge(rule_judge, settings.refuse_leaks)
    return {how: summary(evaluate(model, held, judge, settings, temperature, world), world)
            for how, temperature in (("greedy", 0.0), ("sampled", 1.0))}


def bench(path: Path, args: argparse.Namespace, settings: Settings, world: World) -> None:
    """Runs the benchmark, prints its table, writes its numbers."""
    world.say(f"Model {path}")
    worlds = [p / "toy" for p in path.resolve().parents]     # the run's own, if the model belongs to one
    data = Path(args.data) if args.data else next((w for w in worlds if (w / "heldout.json").is_file()),
                                                  Path("runs/tiny/toy"))
    results = bench_toy(path, data, settings, world)
    world.say(table({f"{Path(args.model).name}, {how}": r for how, r in results.items()}))
    if world.first:
        target = Path(args.json or Path(args.model) / "eval-toy.json")
        target.write_text(json.dumps({"model": str(path), "seed": settings.seed, "results": results}, indent=1) + "\n")
        print(f"Numbers: {target}")


def ask(path: Path, args: argparse.Namespace, settings: Settings, world: World) -> None:
    """One question about one clip or picture: prints what the model sees, thinks and answers. Raises MediaError."""
    clip = Path(args.video).resolve()
    kind = args.problem_type or ("multiple choice" if args.options else "free-form")
    record = Record("", args.question, tuple(args.options), kind, "", clip.name,
                    "image" if clip.suffix.lower() in IMAGES else "video")
    vocabulary = Vocabulary(path)
    model = build_model(path, vocabulary, world)
    example = build_example(record, clip.parent, vocabulary, model.config, settings)
    steps, rows, columns = example.grid
    print(f"{clip.name}: {steps} grid steps of {example.seconds:.2f} s, {columns * 14}×{rows * 14} pixels, "
          f"{len(example.ids)} prompt tokens")
    with gathered(model):
        (episode,), = rollout(model, [example], vocabulary, settings, 1, args.temperature, "question", world.device,
                              args.top_p)
    parts = episode.parsed
    if not episode.finished:
        print(f"The response was cut off after {len(episode.tokens)} tokens.")
    if parts.observation is None and parts.think is None and parts.answer is None:
        return print(f"The response keeps no template:\n{episode.text}")
    for name, text in (("sees", parts.observation), ("thinks", parts.think), ("answers", parts.answer)):
        print(f"{name:8}  {text if text is not None else '–'}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", choices=["toy"], help="benchmark to run")
    parser.add_argument("--model", default="runs/tiny/pagrpo", help="model folder, or folder of a stage [%(default)s]")
    parser.add_argument("--data", help="folder of the benchmark [toy: beside the model, made when missing]")
    parser.add_argument("--json", help="file for the numbers [eval-BENCH.json in the model's folder]")
    parser.add_argument("--video", help="ask about this video, picture or folder of frames instead")
    parser.add_argument("--question", help="the question")
    parser.add_argument("--options", nargs="+", default=[], help="options of a multiple choice, without letters")
    parser.add_argument("--problem-type", choices=PROBLEM_TYPES, help="[multiple choice with options, else free-form]")
    parser.add_argument("--temperature", type=float, default=0.0, help="for --video; 0 is greedy [0]")
    parser.add_argument("--top-p", type=float, default=1.0, help="for --video: only the likeliest tokens [1]")
    parser.add_argument("--preset", choices=PRESETS, help="settings for a model that is no run of this project [7b]")
    for name in ("frames", "max-pixels", "max-response", "seed"):
        parser.add_argument(f"--{name}", type=int, help="instead of the run's own setting")
    args = parser.parse_args(argv)
    if bool(args.bench) == bool(args.video) or (args.video and not args.question):
        parser.error("give --bench NAME, or --video FILE with --question TEXT")
    try:
        path = newest_checkpoint(args.model)
        own = {k: v for k, v in vars(args).items() if v is not None
               and k in ("frames", "max_pixels", "max_response", "seed")}
        settings = replace(run_settings(Path(args.model), args.preset), **own)
        world = start_world()
        if args.video:
            ask(path, args, settings, world)
        else:
            bench(path, args, settings, world)
        world.leave()
    except MediaError as error:
        sys.exit(f"{args.video}: {error}")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted.")


if __name__ == "__main__":
    main()
