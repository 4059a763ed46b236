"""``docs/models.md``, made from what the survey has found."""

from __future__ import annotations

from collections import Counter
from typing import Any

HEADINGS = {"causal": "Text", "image-text": "Images and text", "encoder": "Embeddings"}
INTRODUCTION = """\
# Which models are served, and how

Every type of transformers {version} that continues a text, reads images with it, or makes vectors, tried with tiny
random models (float32, on a CPU): what came of it is in `benchmarks/model_types/survey.json`, which makes this page:

    python -m benchmarks.model_types --json benchmarks/model_types/survey.json
    python -m benchmarks.model_types --page docs/models.md

*Exact*: the tokens of six requests at once, some read in chunks, some preempted for want of memory, one cancelled, are
those of the model's own forward, one by one and without a cache. *Refused*: no lane gives the model's own logits, and a
load says so with the figures. Lanes, the fastest first:

| lane | how |
|---|---|
| packed | all sequences' tokens side by side, one forward a step, paged KV cache |
| state | prompts one after the other, decodes as one batch; recurrent states in rows, saved for shared prefixes |
| state, whole prompts | the same, for models that do not go on from a state with more than one token |
| serial | each sequence by itself, with the model's own cache |

What a load compares on the real weights decides, not this page. Images are read in the packed lane and in the state
lane, where prompts need not be whole.
"""


def render(table: dict[str, Any]) -> str:
    """The page, from the survey's file."""
    parts = [INTRODUCTION.format(version=table["transformers"])]
    for kind, heading in HEADINGS.items():
        records = [record for record in table["types"] if record["kind"] == kind]
        parts.append(f"\n## {heading}\n{_summary(kind, records)}\n\n| type | {'lane' if kind != 'encoder' else ''} | |")
        parts[-1] += "\n|---|---|---|\n" + "\n".join(_row(record) for record in sorted(records, key=_name)) + "\n"
    return "".join(parts)


def _name(record: dict[str, Any]) -> str:
    return str(record["model_type"])


def _summary(kind: str, records: list[dict[str, Any]]) -> str:
    right = [record for record in records if record["outcome"] == "right"]
    if kind == "encoder":
        return f"Of {len(records)} types {len(right)} give a text, alone or padded, the same vectors in transformers."
    outcomes = Counter(record.get("served") for record in right)
    share = 100 * outcomes["exact"] / max(1, len(right))
    lanes = Counter(record["lane"].partition(",")[0] for record in right if record.get("served") == "exact")
    told = ", ".join(f"{count} {lane}" for lane, count in lanes.most_common())
    return (
        f"Of {len(records)} types {len(right)} agree with themselves in transformers (cached and uncached). Of these "
        f"{outcomes['exact']} are served exactly ({share:.1f} %: {told}), {outcomes['refused']} refused, "
        f"{outcomes['wrong']} wrong."
    )


def _row(record: dict[str, Any]) -> str:
    served, outcome = record.get("served"), record["outcome"]
    if served:
        state = record["lane"] if served == "exact" else served
    else:
        state = "" if outcome == "right" else outcome if outcome == "not built" else "not served"
    reason = record["reason"] or record.get("served_reason", "")
    if outcome == "right" and served == "exact" and record["lane"] == "packed":
        reason = ""
    return f"| {record['model_type']} | {state} | {_cell(reason)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
