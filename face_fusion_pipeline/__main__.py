"""`python -m face_fusion_pipeline`, the same as the command `face-fusion`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
