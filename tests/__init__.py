"""The tests run in the environment that a worker's libraries get, which has to be set before torch is imported.

Triton's kernels run in its interpreter: there need not be a GPU. It decides on that when it is imported, too.
"""

import os

from lmserve.models.worker_process import WORKER_ENVIRONMENT

for name, value in {**WORKER_ENVIRONMENT, "TRITON_INTERPRET": "1"}.items():
    os.environ.setdefault(name, value)
