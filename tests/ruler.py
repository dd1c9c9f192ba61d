"""Measures calls beside each other, in seconds and bytes. Prints a table and writes its rows as JSON lines."""
import json
import os
import platform
import re
import time
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Callable

import torch

from counting import Counting

TABLE = "{:<28} {:<30} {:>9} {:>9} {:<16} {:>6} {:>13} {:>14} {:>9} {:>10} {:>5}  {}"
TITLES = ("", "", "ours, ms", "peer, ms", "peer", "ratio", "low–high", "target", "MiB", "peer's MiB", "limit", "")


def finish() -> None:
    """CUDA computes behind Python's back: waits for what is not finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object]) -> float:
    finish()
    began = time.perf_counter()
    call()
    finish()
    return time.perf_counter() - began


def in_turn(calls: dict[str, Callable[[], object]], repeats: int = 5,
            warm: dict[str, Callable[[], object]] = {}) -> dict[str, list[float]]:
    """Seconds of each call. After one that warms up, or a shorter one in `warm`, they run in turn, so that the n-th of
    each see the same machine."""
    for name, call in calls.items():
        warm.get(name, call)()
    rounds = [{name: seconds_of(call) for name, call in calls.items()} for _ in range(repeats)]
    return {name: [seconds[name] for seconds in rounds] for name in calls}


class Peaks:
    """`with Peaks() as peaks:` … then `peaks.take()`: bytes of tensors at their most since the call before. On a GPU
    all that is allocated counts, on a CPU what was made inside. `reserved`: what the allocator held at most."""

    def __init__(self):
        self.reserved, self.count = 0, nullcontext() if torch.cuda.is_initialized() else Counting()

    def __enter__(self) -> "Peaks":
        self.count.__enter__()
        self.take()
        return self

    def __exit__(self, *error) -> None:
        self.count.__exit__(*error)

    def take(self) -> int:
        if isinstance(self.count, Counting):
            most, self.count.peak = self.count.peak, self.count.now
            return most
        most, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        self.reserved = max(self.reserved, reserved)
        torch.cuda.reset_peak_memory_stats()
        return most


def peak(call: Callable[[], object]) -> int:
    """Bytes of the tensors that a call makes, at their most."""
    before = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    with Peaks() as peaks:
        call()
        return peaks.take() - before


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    found = {"cpu": (names or [platform.processor()])[0], "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    found |= {name: version(name) for name in ("torch", "transformers", "trl") if find_spec(name)}
    return found | {"date": time.strftime("%Y-%m-%d")}


class Ruler:
    """One table. `file` is made anew: its first line says on which machine, each other one is a row."""

    def __init__(self, file: str | Path):
        self.file, on = Path(file), machine()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(on) + "\n")
        print(", ".join(f"{name} {value}" for name, value in on.items()), TABLE.format(*TITLES), sep="\n", flush=True)

    def failed(self, what: str, error: BaseException) -> None:
        """Adds a row without figures, which says why."""
        self.row(what, "", {}, note=" ".join(f"failed: {type(error).__name__}: {error}".split())[:300])

    def row(self, what: str, sizes: str, seconds: dict[str, list[float]], peer: str | None = None,
            target: float | None = None, bytes: dict[str, int] = {}, roofline: float | None = None,
            note: str = "") -> None:
        """Adds a row. One of what is measured is called "ours". The ratio is peer / ours, pair by pair, of seconds, or
        of bytes where there are no seconds; the target is the least that its median should be. roofline: the share of
        what the hardware allows, 0 to 1."""
        times, ratio, found = {name: median(x) for name, x in seconds.items()}, {}, ["", ""]
        if peer:
            values = seconds or {name: [n] for name, n in bytes.items()}
            pairs = [theirs / own for own, theirs in zip(values["ours"], values[peer], strict=True)]
            ratio = {"median": median(pairs), "lowest": min(pairs), "highest": max(pairs)}
            found = [f"{ratio['median']:.2f}", f"{min(pairs):.2f}–{max(pairs):.2f}"]
        verdict = "" if target is None else "reached" if ratio["median"] >= target else "missed"
        with self.file.open("a") as file:
            print(json.dumps({
                "what": what, "sizes": sizes, "peer": peer, "ratio": ratio, "target": target,
                "verdict": verdict, "median": times, "seconds": seconds, "bytes": bytes, "roofline": roofline,
                "note": note}), file=file)
        parts = (times, "ours", 1e-3), (times, peer, 1e-3), (bytes, "ours", 2 ** 20), (bytes, peer, 2 ** 20)
        a, b, *held = [f"{x[name] / unit:,.1f}" if name in x else "" for x, name, unit in parts]
        print(TABLE.format(what, sizes, a, b, peer or "", *found, f"≥ {target:g} {verdict}" if verdict else "", *held,
                           "" if roofline is None else f"{roofline:.0%}", note).rstrip(), flush=True)
