"""Train Face Fusion weights on your own photos, with the argument names of diffusers' training scripts.

    accelerate launch examples/train_face_fusion.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir photos --output_dir out --resolution 512 \
        --train_batch_size 1 --gradient_accumulation_steps 16 --mixed_precision bf16 --gradient_checkpointing \
        --max_train_steps 20000 --learning_rate 1e-4 --lr_scheduler constant_with_warmup --lr_warmup_steps 500 \
        --validation_prompt "a portrait in a garden" --validation_image photo.jpg --checkpointing_steps 500

It is `face-fusion train` with `_` for `-` in its options: `--help` lists them all.
"""

import sys

from face_fusion_pipeline.cli import main


def dashed(word: str) -> str:
    """`--train_data_dir=my_photos` -> `--train-data-dir=my_photos`; what is no option stays as it is."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


if __name__ == "__main__":
    sys.exit(main(["train", *map(dashed, sys.argv[1:])]))
