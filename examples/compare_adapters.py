"""Which way of training learns a face soonest: equal steps, the same base and data, people set aside.

    face-fusion prepare DATA/train --model MODEL --out PREPARED --min-sharpness 0
    python examples/compare_adapters.py --data PREPARED --model MODEL --out OUT --steps 300

For every variant: the validation loss with the right face, with somebody else's and with none (the same noise in all
three). What counts is how far the right face lies below the other two. Writes OUT/variants.md and OUT/variants.json;
other options of `face-fusion train`, such as --seed 1, go to every variant.
"""

import argparse
import json
from pathlib import Path

from face_fusion_pipeline.cli import main


BIAS = "--token-count-bias"
VARIANTS = {
    "attn1 copy": [],
    "attn1 copy, token-count bias": [BIAS],
    "zero value, token-count bias": ["--init", "zero_v", BIAS],
    "Xavier, token-count bias": ["--init", "xavier", BIAS],
    "attn1 copy, token-count bias, reference at t = 100": [BIAS, "--reference-timestep", "100"],
}


def last_losses(out: Path) -> dict[str, float]:
    lines = (out / "logs" / "face-fusion" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if "validation_loss_right_face" in row][-1]


def compare() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prepared folder")
    parser.add_argument("--model", required=True, help="the base")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="the same for every variant (default: 300)")
    args, others = parser.parse_known_args()

    rows = []
    for name, options in VARIANTS.items():
        out = args.out / name.replace(",", "").replace(" = ", "").replace(" ", "-")
        command = ["train", "--data", args.data, "--model", args.model, "--out", str(out), *options, *others]
        command += ["--max-train-steps", str(args.steps), "--validation-steps", str(args.steps)]
        if status := main(command):
            raise SystemExit(status)
        losses = last_losses(out)
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
