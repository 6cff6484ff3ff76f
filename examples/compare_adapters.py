"""Which way of training the adapter learns a face soonest: equal steps, the same base, held-out people.

    python examples/compare_adapters.py --data DATA --model MODEL --out OUT --steps 300

For every variant: the validation loss with the right face, with somebody else's and with none (the same noise in all
three). What counts is how far the right face lies below the other two. Writes OUT/variants.md and OUT/variants.json.
"""

import argparse
import json
from pathlib import Path

from face_fusion_pipeline.cli import main


VARIANTS = {
    "attn1 copy": ["--init", "attn1", "--no-token-count-bias"],
    "attn1 copy, token-count bias": ["--init", "attn1", "--token-count-bias"],
    "zero value, token-count bias": ["--init", "zero_v", "--token-count-bias"],
    "Xavier, token-count bias": ["--init", "xavier", "--token-count-bias"],
    "attn1 copy, token-count bias, reference at t = 100": ["--token-count-bias", "--reference-timestep", "100"],
}


def last_losses(log: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "validation_loss_right_face" in row][-1]


def compare() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset with train/ and validation/")
    parser.add_argument("--model", type=Path, required=True, help="trained avatar model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="the same for every variant (default: 300)")
    parser.add_argument("--images", type=int, help="use only the first so many training images")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    rows = []
    for name, options in VARIANTS.items():
        label = name.replace(",", "").replace(" = ", "").replace(" ", "-")
        command = ["avatars-train", "adapter", "--data", str(args.data), "--out", str(args.model), "--steps"]
        command += [str(args.steps), "--threads", str(args.threads), "--sample-minutes", "1000", *options]
        command += ["--adapter-out", str(args.out / f"{label}.safetensors")]
        if args.images:
            command += ["--images", str(args.images)]
        if status := main(command):
            raise SystemExit(status)
        losses = last_losses(args.model / "logs" / f"adapter-{label}")
        rows.append({"variant": name, **{k: losses[f"validation_loss_{k}_face"] for k in ("right", "wrong", "no")}})

    table = ["| variant | right face | wrong face | no face | right below wrong |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        gain = 1 - row["right"] / row["wrong"]
        table.append(f"| {row['variant']} | {row['right']:.4f} | {row['wrong']:.4f} | {row['no']:.4f} | {gain:.2%} |")
    (args.out / "variants.md").write_text("\n".join(table) + "\n")
    (args.out / "variants.json").write_text(json.dumps({"steps": args.steps, "rows": rows}, indent=1) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    compare()
