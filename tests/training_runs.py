"""Trainings in processes of their own, for test_finetuning: python training_runs.py MODEL DATA OUT

One parent imports everything once and forks a child for each run; what the runs left behind is what the test looks at.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import torch  # noqa: E402  after the environment that it and the Hub read at import

from face_fusion_pipeline.cli import main, train  # noqa: E402, F401
from face_fusion_pipeline.training import latent_cache, model_card, samples, task  # noqa: E402, F401


torch.set_num_threads(1)


def before_step(number: int, action: Callable[[], None]) -> None:
    """Let this process do something when it computes its `number`-th loss."""
    forward, count = task.FaceFusionTask.forward, 0

    def counted(self, batch):
        nonlocal count
        count += 1
        if count == number:
            action()
        return forward(self, batch)

    task.FaceFusionTask.forward = counted


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


def start(name: str, *options: str, ranks: int = 1, prepare: Callable[[], None] | None = None) -> tuple[int, str]:
    """Run `face-fusion train` in `ranks` forked processes: the worst exit status (negative: a signal), and stderr."""
    model, data, out = sys.argv[1:]
    words = ["train", "--model", model, "--data", data, "--out", f"{out}/{name}", "--log-every", "1", *options]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    errors = Path(out) / f"{name}.err"
    for rank in range(ranks):
        if child := os.fork():
            children.append(child)
            continue
        if ranks > 1:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in group.items()}}
        if prepare is not None:
            prepare()
        with open(errors, "a") as file, contextlib.redirect_stderr(file):
            status = main(words)
        os._exit(status)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return max(statuses, key=abs), errors.read_text()


if __name__ == "__main__":
    one_step = ["--max-train-steps", "1", "--lr-warmup-steps", "0"]
    six_steps = ["--max-train-steps", "6", "--checkpointing-steps", "2", "--use-ema"]
    found = {
        "one": start("one", *one_step, "--train-batch-size", "4"),
        "two": start("two", *one_step, "--train-batch-size", "2", ranks=2),
        "parts": start("parts", *one_step, "--train-batch-size", "1", "--gradient-accumulation-steps", "4"),
        "straight": start("straight", *six_steps),
        "killed": start("killed", *six_steps, prepare=lambda: before_step(6, kill)),
        "resumed": start("killed", *six_steps),
        "full": start("full", *six_steps, prepare=lambda: before_step(4, full_disk)),
        "freed": start("full", *six_steps),
    }
    print(json.dumps(found))
