"""``docs/models.md``, made from what the survey has found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.model_types.patches import EMBEDDED_NOTES

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
lane, where prompts need not be whole. *Exact* in the column of images: prompts with pictures, several at once, in
chunks and preempted, get the tokens of `model.generate`, with transformers' own processor of the type, settings
shrunk and the vocabulary made up. *Text only*: the comparison at load fails, and a request with an image is a 400.
*Not tried*: no tiny model with its processor could be made, or it fails by itself; at load it is compared like all
others. Some image processors need torchvision; they were tried with it.
"""
EMBEDDINGS = """\
The model's folder goes the road of a load with `--task embed`, and up to ten texts of 1 to 512 tokens are dealt out to
two requests that share steps. *Exact*: no number of a vector (the mean of a text's tokens) differs by more than 1e-5,
or by 1e-5 of the vector's largest where that is above 1, from what the model's own forward gives for the text alone, in
float32. Ways, the fastest first; a load takes the first that gives the stock forward's hidden states:

| way | how |
|---|---|
| packed | all texts' tokens side by side in one row, nothing is padded |
| padded | texts of like length in one forward, with transformers' own masks |
| single | each text in a forward of its own |

Language models of the first table make vectors, too: with `--task embed` they go the same ways after the same
comparison (without their heads; the last token is pooled, or what the folder's files say). They are not tried here.
"""
COLUMNS = {
    "causal": ("type", "lane", ""),
    "image-text": ("type", "lane", "images", ""),
    "encoder": ("type", "way", "note"),
}


def render(table: dict[str, Any]) -> str:
    """The page, from the survey's file."""
    parts = [INTRODUCTION.format(version=table["transformers"])]
    for kind, heading in HEADINGS.items():
        records = sorted((record for record in table["types"] if record["kind"] == kind), key=_name)
        more = f"\n{EMBEDDINGS}" if kind == "encoder" else ""
        lines = [_line(COLUMNS[kind]), "|---" * len(COLUMNS[kind]) + "|", *(_line(_cells(each)) for each in records)]
        parts.append(f"\n## {heading}\n{_summary(kind, records)}\n{more}\n" + "\n".join(lines) + "\n")
    return "".join(parts)


def _name(record: dict[str, Any]) -> str:
    return str(record["model_type"])


def _summary(kind: str, records: list[dict[str, Any]]) -> str:
    right = [record for record in records if record["outcome"] == "right"]
    tried = records if kind == "encoder" else right
    outcomes = Counter(record.get("served") for record in tried)
    lanes = Counter(record["lane"].partition(",")[0] for record in tried if record.get("served") == "exact")
    told = ", ".join(f"{count} {lane}" for lane, count in lanes.most_common())
    failed = f" {outcomes['fails']} fail," if outcomes["fails"] else ""
    if kind == "encoder":
        return (
            f"Of {len(records)} types {outcomes['exact']} are served exactly ({told}),{failed} {outcomes['refused']} "
            f"refused, {outcomes['wrong']} wrong, {outcomes['']} not built. In transformers itself padding leaves the "
            f"vectors of {len(right)} types as they are."
        )
    share = 100 * outcomes["exact"] / max(1, len(right))
    return _read_images(records) + (
        f"Of {len(records)} types {len(right)} agree with themselves in transformers (cached and uncached). Of these "
        f"{outcomes['exact']} are served exactly ({share:.1f} %: {told}),{failed} {outcomes['refused']} refused, "
        f"{outcomes['wrong']} wrong."
    )


def _read_images(records: list[dict[str, Any]]) -> str:
    """A sentence on those that were tried with pictures; nothing if none was."""
    found = Counter(record["images"] for record in records if record.get("images"))
    if not found:
        return ""
    failed = f" {found['fails']} fail," if found["fails"] else ""
    return (
        f"With pictures {found['exact']} types are exact, {found['none']} more in these lanes serve text only,{failed} "
        f"{found['not tried']} could not be tried, {found['wrong']} wrong.\n\n"
    )


def _cells(record: dict[str, Any]) -> list[str]:
    served, outcome, kind = record.get("served"), record["outcome"], record["kind"]
    if served:
        state = record["lane"] if served == "exact" else served
    else:
        state = "" if outcome == "right" else outcome if outcome == "not built" else "not served"
    reason = record["reason"] or record.get("served_reason", "")
    if kind == "encoder" and served:
        reason = "; ".join(filter(None, [EMBEDDED_NOTES.get(record["model_type"]), record["served_reason"]]))
    elif outcome == "right" and served == "exact" and record["lane"] == "packed":
        reason = ""
    if kind == "image-text":
        told = record["images_reason"]
        reason = "; ".join(filter(None, [reason, f"images: {told}" if told else ""]))
    images = [_images(record)] if kind == "image-text" else []
    return [record["model_type"], state, *images, reason]


def _images(record: dict[str, Any]) -> str:
    if record.get("served") != "exact":
        return ""
    return "text only" if record["images"] in ("", "none") else str(record["images"])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
