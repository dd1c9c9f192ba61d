"""What the lessons share: a small toy world and a tiny random model, made once. Tests read these folders and never
write into them."""
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)                                     # tiny matrices: threads would only wait for each other

import data  # noqa: E402  (found through the line above)


def pytest_configure(config):
    """Plain `pytest` leaves the worked solutions out: they test docs/solutions, not the project (-m solutions)."""
    config.addinivalue_line("markers", "solutions: the course's worked solutions, applied to a copy and tried")
    config.option.markexpr = config.option.markexpr or "not solutions"


@pytest.fixture(autouse=True)
def handlers():
    """A run that is stopped in a lesson leaves the process as it was."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with sft.json, rl.json, heldout.json and their clips."""
    return data.make_toy(tmp_path_factory.mktemp("world") / "toy", {"sft": 40, "rl": 20, "heldout": 20})


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """rl.json of a toy world whose clips are folders of pictures: no video decoder is needed."""
    from whole_steps import as_folders
    return as_folders(data.make_toy(tmp_path_factory.mktemp("folders"), {"rl": 20}), "rl")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint folder of a tiny random model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "base"
    data.make_toy_model(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def started(toy, base, tmp_path_factory):
    """A stage's folder with a checkpoint that keeps the template: 40 steps of SFT on the small world."""
    import sft
    out = tmp_path_factory.mktemp("started")
    sft.main(["--preset", "tiny", "--out", str(out), "--model", str(base), "--data", str(toy / "sft.json"), "--media",
              str(toy), "--steps", "40", "--batch", "32", "--lr", "5e-3", "--warmup", "4",
              "--save-every", "100"])
    return out / "sft"


@pytest.fixture(scope="session")
def trained(toy, base, tmp_path_factory):
    """The folder of a finished SFT run of six steps with checkpoints of steps 3 and 6. Lessons work on copies."""
    import sft
    from toy_runs import sft_flags
    out = tmp_path_factory.mktemp("trained")
    sft.main(sft_flags(out, toy, base, steps=6))
    return out


@pytest.fixture(scope="session")
def vocabulary(base):
    return data.Vocabulary(base)


@pytest.fixture(scope="session")
def tiny_settings():
    return data.InputSettings(prompt="short", frames=6, min_pixels=784, max_pixels=784)
