"""The implementations that this code is measured against, transformers and TRL, in a process of their own.

They run as they come, without this project's settings of threads and memory: that process never imports model.py. While
this code runs, it sleeps on a pipe.
"""
import json
import pickle
import subprocess
import sys
import traceback
import warnings
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from ruler import peak

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")


class Peer:
    """The other process, seen from here. It computes with the text weights of a model folder. environment: the one from
    before model.py changed it."""

    def __init__(self, folder: str | Path, environment: dict[str, str]):
        self.pipe, theirs = Pipe()
        words = [sys.executable, __file__, str(theirs.fileno())]
        self.process = subprocess.Popen(words, env=environment, pass_fds=[theirs.fileno()],
                                        stdout=subprocess.DEVNULL)
        theirs.close()
        self.ask("load", str(folder))

    def ask(self, name: str, *args):
        """Calls a method of `Worker` and waits for what it returns. RuntimeError with its traceback if it fails."""
        send(self.pipe, (name, args))
        failed, answer = self.pipe.recv()
        if failed:
            raise RuntimeError(f"{name} failed in the process of the peers:\n{answer}")
        return answer

    def close(self) -> None:
        self.pipe.close()
        self.process.wait()


def send(pipe: Connection, message) -> None:
    pipe.send_bytes(pickle.dumps(message))                   # pipe.send would put tensors in shared memory


# ------------------------------------------------------------------------------------------------ in the other process

class Worker:
    """transformers' Qwen2 for text, faster than its class for video, and TRL's GRPO on the same weights."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def load(self, folder: str) -> None:
        from safetensors.torch import load_file
        from transformers import Qwen2Config, Qwen2ForCausalLM
        config = json.loads((Path(folder) / "config.json").read_text())
        shape = {name: config[name] for name in SHAPE}
        self.folder, self.model = folder, Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
        tensors = load_file(Path(folder) / "model.safetensors")
        text = {name: x for name, x in tensors.items() if not name.startswith("visual.")}
        self.model.load_state_dict(text | {"lm_head.weight": text["model.embed_tokens.weight"]})    # they are tied

    def generate(self, ids: Tensor, group: int, tokens: int, sample: bool, static: bool) -> Tensor:
        """`group` responses to each prompt, none of which stops early. ids (B, P) → (B·G, T)"""
        full = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
            num_return_sequences=group, do_sample=sample, temperature=1.0, top_k=0, top_p=1.0,
            cache_implementation="static" if static else None)
        return full[:, ids.shape[1]:]

    def forward_backward(self, ids: Tensor, weights: Tensor, keep: int) -> Tensor:
        """Log-probabilities of the last T tokens of full sequences, and gradients of their weighted sum. Logits at the
        last `keep` places, 0: at all of them. ids (N, P + T), weights (N, T) → (N, T)"""
        t = weights.shape[1]
        logits = self.model(ids, logits_to_keep=keep).logits[:, -t - 1:-1]
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, -t:, None])[..., 0]
        (logprobs * weights).sum().backward()
        return logprobs.detach()

    def gradients(self) -> dict[str, Tensor]:
        """The gradients so far, which are then forgotten."""
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return found

    def layer_input(self, x: Tensor) -> Tensor:
        """Keeps what `layer_pass` reads, (N, T, D), and returns the first layer's output."""
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        tables = self.model.model.rotary_emb(x, positions)
        self.layer = partial(self.model.model.layers[0], x.requires_grad_(), attention_mask=None,
                             position_ids=positions, position_embeddings=tables)
        return self.layer().detach()

    def layer_pass(self) -> None:
        self.layer().sum().backward()

    def bytes_of(self, name: str, *args) -> int:
        return peak(partial(getattr(self, name), *args))

    def train(self, texts: list[str], questions: int, group: int, tokens: int) -> set[int]:
        """TRL's GRPO on as many steps as there are prompts for. It answers after each step, goes on when it is asked
        for anything but `stop`, and returns the lengths of all responses."""
        from datasets import Dataset
        from transformers import AutoTokenizer, Qwen2ForCausalLM, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
        pipe, lengths, folder, cuda = self.pipe, set(), str(Path(self.folder) / "trl"), torch.cuda.is_available()

        class InTurn(TrainerCallback):
            def on_step_end(self, args, state, control, **others):
                send(pipe, (False, None))
                control.should_training_stop = pipe.recv()[0] == "stop"

        def reward(completions, completion_ids, **others):
            lengths.update(map(len, completion_ids))
            return [float(len(text) % 7) for text in completions]

        self.model.save_pretrained(folder)                   # the KL reference is read from the policy's folder
        args = GRPOConfig(
            output_dir=folder, use_cpu=not cuda, bf16=cuda, seed=0, max_steps=len(texts) // questions,
            per_device_train_batch_size=questions * group, num_generations=group,
            loss_type="grpo", beta=0.04, max_grad_norm=5.0, max_completion_length=tokens,
            generation_kwargs={"min_new_tokens": tokens}, temperature=1.0, top_k=0, top_p=1.0,
            gradient_checkpointing=False, disable_dropout=True, shuffle_dataset=False, dataloader_pin_memory=False,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True)
        GRPOTrainer(model=Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32), reward_funcs=reward, args=args,
                    train_dataset=Dataset.from_dict({"prompt": texts}), callbacks=[InTurn()],
                    processing_class=AutoTokenizer.from_pretrained(self.folder)).train()
        return lengths


def serve(pipe: Connection) -> None:
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    worker = Worker(pipe)
    with suppress(EOFError):                                 # the other end is closed
        while True:
            name, args = pipe.recv()
            try:
                answer = False, getattr(worker, name)(*args)
            except Exception:
                answer = True, traceback.format_exc()
            send(pipe, answer)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
