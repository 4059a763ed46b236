"""A library that answers as NVIDIA's driver does: two GPUs, of which the second keeps some figures to itself.

It is compiled from C, with the structures as nvml.h declares them, and found by the package as the real one is.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = r"""
#include <stdio.h>
#include <string.h>

typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct { unsigned int gpu, memory; } nvmlUtilization_t;
typedef struct {
    unsigned int pid;
    unsigned long long usedGpuMemory;
    unsigned int gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;

enum { SUCCESS = 0, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7 };
static const unsigned long long GIB = 1ull << 30;
static int devices[2];

int nvmlInitWithFlags(unsigned int flags) { return SUCCESS; }
const char *nvmlErrorString(int result) { return "a figure that is kept back"; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) { *device = &devices[index]; return SUCCESS; }

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned int length) {
    snprintf(uuid, length, "GPU-0000-%d", (int)((int *)device - devices));
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, nvmlMemory_t *memory) {
    memory->total = 80 * GIB;
    memory->used = device == &devices[0] ? 70 * GIB : 2 * GIB;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *device, nvmlUtilization_t *rates) {
    if (device == &devices[1]) return NOT_SUPPORTED;
    rates->gpu = 97;
    rates->memory = 50;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, nvmlProcessInfo_t *infos) {
    if (device == &devices[1]) return NOT_SUPPORTED;
    if (infos == NULL || *count < 2) { *count = 2; return INSUFFICIENT_SIZE; }
    *count = 2;
    memset(infos, 0, 2 * sizeof *infos);
    infos[0].pid = 101;
    infos[0].usedGpuMemory = 36 * GIB;
    infos[1].pid = 102;
    infos[1].usedGpuMemory = ~0ull;  /* not to be had */
    return SUCCESS;
}
"""


def build(folder: Path) -> bool:
    """Puts ``libnvidia-ml.so.1`` into the folder. False: there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return False
    source = folder / "driver.c"
    source.write_text(SOURCE, encoding="utf-8")
    target = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return True
