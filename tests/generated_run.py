"""Two processes that draw people, for test_generated: python generated_run.py prepare generated:N ...

One parent imports everything once and forks a child for each.
"""

import os
import socket
import sys


os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import numpy as np  # noqa: E402  after the environment that the Hub reads at import
import torch  # noqa: E402

from face_fusion_pipeline.cli import main  # noqa: E402
from face_fusion_pipeline.face_detectors import Face  # noqa: E402
from face_fusion_pipeline.training import generated, generated_pairs  # noqa: E402


class Finds:
    """The detector of test_generated."""

    name, sizes = "finds", (16,)

    def detect(self, image):
        points = np.array([[5, 6], [11, 6], [8, 9], [6, 12], [10, 12]]) + np.asarray(image)[:5, 0, :2] / 128
        return [Face((4.0, 4.0, 12.0, 13.0), 0.9, points)]


def told(piece, out, number, key):
    print(f"piece {number} of rank {os.environ['RANK']}", flush=True)
    save(piece, out, number, key)


if __name__ == "__main__":
    torch.set_num_threads(1)
    generated._detector = lambda thread, name, model: Finds()
    generated.PIECE = 4
    generated_pairs.threshold = lambda *_: -2.0
    save, generated.Piece.save = generated.Piece.save, told
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        if child := os.fork():
            children.append(child)
            continue
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in group.items()}}
        os._exit(main(sys.argv[1:]))
    sys.exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children))
