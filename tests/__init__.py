"""The tests run in the environment that a worker's libraries get, which has to be set before torch is imported."""

import os

from lmserve.models.worker_process import WORKER_ENVIRONMENT

for name, value in WORKER_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
