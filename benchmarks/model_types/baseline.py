"""Does a model agree with itself: transformers' own cached generation with its own uncached forward?

A server that runs a model in another way can only be held to what the model itself does. Where transformers' two ways
differ there is nothing to be exact to, and where its forward does not run there is nothing to serve.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.model_types.sizes import SPECIAL_TOKENS, VOCABULARY
from benchmarks.model_types.tiny import Kind

PROMPT = 23
NEW_TOKENS = 12
TIE = 1e-4
"""Two logits are one where they are closer than this, in spreads (standard deviations of a row of logits)."""
CLOSE = 1e-3
"""Logits or vectors are equal up to rounding where they differ by less than this, in spreads."""
CHANGED = 5
"""Tokens at the prompt's start that are changed, to see whether the last logits notice."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model. The numbers are in spreads, and None where it did not get that far."""

    outcome: Literal["right", "wrong", "fails"]
    reason: str = ""
    error: float | None = None
    """How far the cached logits are from the uncached ones; of encoders, padded vectors from unpadded ones."""
    future: float | None = None
    """How far a later token moves the logits before it: about 0, or the model is not causal."""
    reach: float | None = None
    """How far the prompt's first tokens move the logits behind its last: about 0, and the check sees little."""


def check(kind: Kind, model: PreTrainedModel) -> Outcome:
    """Run the tiny model both ways; what its own code raises is an outcome, too."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about paths that are slow on a CPU
        return check_encoder(model) if kind == "encoder" else check_generation(model)


def check_generation(model: PreTrainedModel) -> Outcome:
    """Greedy, ``NEW_TOKENS`` behind a random prompt of ``PROMPT`` tokens; nothing stops it earlier."""
    if model.config.is_encoder_decoder:
        return Outcome("fails", "an encoder-decoder: its decoder continues no prompt")
    if not model.can_generate():
        return Outcome("fails", "transformers has no generate for it")
    prompt = make_prompt(0)
    try:
        ids, expected = _generate_uncached(model, prompt)
        whole = forward(model, ids[:, :-1])[0, PROMPT - 1 :]
        changed = forward(model, torch.cat([make_prompt(1)[:, :CHANGED], prompt[:, CHANGED:]], 1))
    except Exception as error:
        return Outcome("fails", f"its forward: {_one_line(error)}")
    if not bool(torch.isfinite(expected).all()):
        return Outcome("fails", "its uncached logits are not finite")
    known = Outcome("fails", future=distance(whole, expected), reach=distance(changed[:, -1], expected[:1]))
    try:
        made: Any = _generate_cached(model, prompt)
    except Exception as error:
        return replace(known, reason=f"its generate: {_one_line(error)}")
    if len(made.logits) != NEW_TOKENS:
        return replace(known, reason=f"its generate made {len(made.logits)} tokens, not {NEW_TOKENS}")
    tokens, logits = made.sequences[0, -NEW_TOKENS:], torch.cat(made.logits)
    reason, error_ = _compare(tokens, logits, ids[0, PROMPT:], expected)
    if reason and _counts_positions_otherwise(model, prompt, logits[:1]):
        reason += "; generate counts positions from 0, its forward alone otherwise"
    if reason and (known.future or 0) > CLOSE:
        reason += "; later tokens move the logits before them"
    return replace(known, outcome="wrong" if reason else "right", reason=reason, error=error_)


def check_encoder(model: PreTrainedModel) -> Outcome:
    """Its last hidden states of a text alone, and of the same text padded in a batch with a longer one."""
    if model.config.is_encoder_decoder:
        return Outcome("fails", "an encoder-decoder")
    short, long = make_prompt(0)[:, : PROMPT - 10], make_prompt(1)
    count = short.shape[1]
    padding = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    ids = torch.cat([torch.nn.functional.pad(short, (0, PROMPT - count), value=padding), long])
    mask = torch.ones_like(ids)
    mask[0, count:] = 0
    try:
        alone = encode(model, short, mask[1:, :count])[0]
        changed = encode(model, torch.cat([long[:, :CHANGED], short[:, CHANGED:]], 1), mask[1:, :count])[0]
        padded = encode(model, ids, mask)[0, :count]
    except Exception as error:
        return Outcome("fails", f"its forward: {_one_line(error)}")
    if not bool(torch.isfinite(alone).all()):
        return Outcome("fails", "its hidden states are not finite")
    error_, reach = distance(padded, alone), distance(changed[-1:], alone[-1:])
    if error_ > CLOSE:
        return Outcome("wrong", f"padding moves its vectors by {error_:.1g} spreads", error_, None, reach)
    return Outcome("right", "", error_, None, reach)


def encode(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(texts, tokens, width): the last hidden states."""
    made = model(input_ids=ids, attention_mask=mask)
    states: Tensor = made[0]
    return states


def make_prompt(seed: int) -> Tensor:
    """(1, ``PROMPT``), random tokens without a special meaning."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(SPECIAL_TOKENS, VOCABULARY - 4, (1, PROMPT), generator=draw)


def forward(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(1, tokens, vocabulary): the logits without any cache."""
    accepted = inspect.signature(model.forward).parameters
    more = {"use_cache": False} if "use_cache" in accepted or "kwargs" in accepted else {}
    logits: Tensor = model(input_ids=ids, **more).logits
    return logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two (rows, numbers), in standard deviations of a row of the second.

    Logits of tokens that a model never says count on neither side.
    """
    said = (b > torch.finfo(b.dtype).min / 2).all(0)
    a, b = a.float()[:, said], b[:, said]
    return float(((a - b).abs() / b.std(-1, keepdim=True)).max())


def layer_kinds(model: PreTrainedModel) -> str:
    """How many layers there are of each kind, as the configuration says, else the classes that mix tokens."""
    config: Any = model.config.get_text_config()
    said = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if said:
        return ", ".join(f"{count} {kind}" for kind, count in Counter(map(str, said)).items())
    names = Counter(type(module).__name__ for module in model.modules())
    mixers = {name: count for name, count in names.items() if _mixes_tokens(name)}
    return ", ".join(f"{count} {name}" for name, count in sorted(mixers.items())[:4])


def _mixes_tokens(name: str) -> bool:
    words = ("attention", "mixer", "mamba", "recurrent", "xlstm", "shortconv", "mla")
    return any(word in name.lower() for word in words) and not name.endswith(("Output", "Norm", "Block", "Layer"))


def _generate_uncached(model: PreTrainedModel, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """All ids, and the logits (``NEW_TOKENS``, vocabulary) that chose the new ones."""
    ids, rows = prompt, []
    for _ in range(NEW_TOKENS):
        rows.append(forward(model, ids)[:, -1])
        ids = torch.cat([ids, rows[-1].argmax(-1, keepdim=True)], 1)
    return ids, torch.cat(rows)


def _generate_cached(model: PreTrainedModel, prompt: Tensor) -> Any:
    make: Any = GenerationConfig
    model.generation_config = make(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    model.config.eos_token_id = None
    generate: Any = model.generate
    return generate(prompt, attention_mask=torch.ones_like(prompt))


def gap(logits: Tensor, token: int) -> float:
    """How far a token's logit is below the highest, in spreads of all that are not hidden. logits: (vocab,)."""
    return float((logits.max() - logits[token]) / logits[logits > torch.finfo(logits.dtype).min / 2].std())


def greedy(num_tokens: int) -> Any:
    """The likeliest token each time, so many of them, whatever they mean."""
    make: Any = GenerationConfig
    return make(max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)


def _compare(tokens: Tensor, logits: Tensor, expected_ids: Tensor, expected: Tensor) -> tuple[str, float]:
    """What is wrong, if anything, and the error up to the first token that differs: behind it all may differ."""
    same = tokens == expected_ids
    count = NEW_TOKENS if bool(same.all()) else int(same.int().argmin()) + 1
    error = distance(logits[:count], expected[:count])
    row = expected[count - 1]
    below = gap(row, int(tokens[count - 1]))
    if below >= TIE:
        return (
            f"token {count} of {NEW_TOKENS} differs, whose uncached logit is {below:.2g} spreads below the highest",
            error,
        )
    if error > CLOSE:
        return f"the same tokens, but cached logits up to {error:.1g} spreads from the uncached ones", error
    return "", error


def _counts_positions_otherwise(model: PreTrainedModel, prompt: Tensor, cached: Tensor) -> bool:
    """Whether the forward without positions is another than with those that generate gives: 0, 1, 2 …"""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    try:
        logits = model(input_ids=prompt, position_ids=torch.arange(PROMPT)[None], use_cache=False).logits[:, -1]
    except Exception:  # reformer's default positions do not pass for given ones
        return False
    return distance(logits, cached) < CLOSE < distance(forward(model, prompt)[:, -1], cached)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"
