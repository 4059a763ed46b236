"""The process that ``benchmarks.embeddings`` compares with: a list of texts a line in, seconds and vectors out."""

from __future__ import annotations

import base64
import json
import sys
import time

import torch
from sentence_transformers import SentenceTransformer

from benchmarks.embeddings import PEER_BATCH


def main(options: dict[str, str]) -> None:
    torch.set_num_threads(int(options["threads"]))
    dtype = getattr(torch, options["dtype"])
    model = SentenceTransformer(options["model"], device="cpu", model_kwargs={"dtype": dtype})
    for line in sys.stdin:
        texts = json.loads(line)
        began = time.perf_counter()
        vectors = model.encode(texts, batch_size=PEER_BATCH, show_progress_bar=False, convert_to_tensor=True)
        seconds = time.perf_counter() - began
        raw = vectors.float().numpy().astype("<f4").tobytes()
        print(json.dumps({"seconds": seconds, "vectors": base64.b64encode(raw).decode()}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
