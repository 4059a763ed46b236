"""One section in a process of its own: writes each row, as it is measured, as a line to standard output.

    python -m benchmarks.gpu.section_process SECTION SETTING

``SETTING`` is JSON. It ends with 0, with 3 if there is nothing to measure here, or with 1; the last line of standard
error says why.
"""

from __future__ import annotations

import os
import sys
import traceback

import torch

from benchmarks.gpu.results import Skipped, line_of, words_of
from benchmarks.gpu.sections import runner_of
from benchmarks.gpu.setting import Setting

SKIPPED = 3


def main(section: str, setting: Setting) -> int:
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not a row
    if setting.tiny and not setting.is_cuda:
        torch.set_num_threads(1)  # for so few numbers others only wait for each other
    try:
        for row in runner_of(section)(setting):
            rows.write(line_of(row) + "\n")
            rows.flush()
    except Skipped as error:
        print(error, file=sys.stderr)
        return SKIPPED
    except Exception as error:
        traceback.print_exc()
        print(words_of(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1], Setting.from_json(sys.argv[2]))
    sys.stderr.flush()
    os._exit(code)  # threads of libraries, or a device that has failed, must not keep it
