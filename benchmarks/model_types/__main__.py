"""``python -m benchmarks.model_types``."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; read when transformers is imported

from benchmarks.model_types.survey import main

sys.exit(main())
