"""What is done with an encoder's output, as its files say: sentence-transformers' ``modules.json``, or less.

The formats are sentence-transformers' own; what stands in no file is what it does by default, so that the vectors are
the ones it makes. Only its plain modules are known. A module that would change the vectors and is not among them is a
refusal, never left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.gguf.file import GGUFFile
from lmserve.runtime.interface import Task
from lmserve.runtime.loader import read_json

POOLING_MODES = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "lasttoken",
}
"""By the ends of their keys ``pooling_mode_…``, in the order in which sentence-transformers joins several."""
GGUF_POOLING = {1: "mean", 2: "cls", 3: "lasttoken"}
"""llama.cpp's numbers."""
SENTENCE_TRANSFORMERS = "sentence_transformers."


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the vectors of a text's tokens become one; several modes are joined end to end."""

    modes: tuple[str, ...]
    include_prompt: bool = True
    """Whether an instruction's tokens count."""


@dataclass(frozen=True, slots=True)
class Module:
    """A module behind the pooling: Dense, LayerNorm or Normalize, and the folder with its files."""

    kind: str
    folder: str
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recipe:
    """From a model's files to its rows."""

    task: Task
    subfolder: str = ""
    """Where the transformer's own files are."""
    max_seq_length: int | None = None
    """Tokens that the files allow, if they say."""
    pooling: Pooling | None = None
    modules: tuple[Module, ...] = ()
    truncate_dim: int | None = None
    """Numbers of a vector that are kept, if not all."""


def choose_task(config: ModelConfig) -> Task:
    """What a model is to do, where the person has not said: by its files, the architecture's name among them."""
    if config.task != "auto":
        return cast(Task, config.task)
    modules = read_json(config, "modules.json")
    if modules:
        return "score" if _transformer_task(config, _folder_of(modules, "Transformer")) else "embed"
    architecture = _architecture(config)
    if architecture.endswith("ForSequenceClassification"):
        return "score"
    if architecture.endswith(("Model", "ForMaskedLM", "ForPreTraining")) and not architecture.endswith("LMHeadModel"):
        return "embed"
    return "generate"


def read_recipe(config: ModelConfig, task: Task) -> Recipe:
    """
    Raises:
        ModelLoadFailed: the files ask for something that would not be done.
    """
    modules = read_json(config, "modules.json")
    if not modules:
        length = _length(config, "")
        if task == "score":
            return Recipe(task, "", length)
        pooling, normalized = _plain(config)
        return Recipe(task, "", length, pooling, (Module("Normalize", "", {}),) if normalized else ())
    kinds = [(_kind(each), str(each.get("path") or "")) for each in modules]
    if not kinds or kinds[0][0] != "Transformer":
        raise ModelLoadFailed(f"{config.model}: its first module is {kinds[0][0]}: only transformers are served")
    subfolder, rest = kinds[0][1], kinds[1:]
    length = _length(config, subfolder)
    if task == "score":
        if rest:
            raise ModelLoadFailed(f"{config.model}: its module {rest[0][0]} is not served")
        return Recipe(task, subfolder, length)
    if not rest or rest[0][0] != "Pooling":
        raise ModelLoadFailed(f"{config.model}: its modules pool no tokens, so there is no vector of a text")
    pooling = read_pooling(_object(read_json(config, f"{rest[0][1]}/config.json")))
    _check_output(config, subfolder)
    after = tuple(_module(config, *each) for each in rest[1:])
    return Recipe(task, subfolder, length, pooling, after, _truncate_dim(config))


def read_pooling(content: dict[str, Any]) -> Pooling:
    """From a Pooling module's configuration, of either of its formats. Mean is the default.

    Raises:
        ModelLoadFailed: a mode is not known.
    """
    said = content.get("pooling_mode")
    if said is None:
        modes = tuple(mode for key, mode in POOLING_MODES.items() if content.get(f"pooling_mode_{key}"))
    else:
        modes = (said,) if isinstance(said, str) else tuple(said)
    for mode in modes:
        if mode not in POOLING_MODES.values():
            raise ModelLoadFailed(f"pooling mode {mode!r} is not known")
    return Pooling(modes or ("mean",), content.get("include_prompt") is not False)


def _plain(config: ModelConfig) -> tuple[Pooling, bool]:
    """Of a model without ``modules.json``: its pooling, and whether its vectors are scaled to length 1."""
    if Path(config.model).is_file():
        # llama.cpp scales the vectors of every model to length 1, and those files are made for it.
        return Pooling((_gguf_pooling(Path(config.model)),)), True
    content = read_json(config, "1_Pooling/config.json")
    if content:
        return read_pooling(_object(content)), False
    model_config = _object(read_json(config, "config.json"))
    is_causal = _architecture(config).endswith("ForCausalLM") and model_config.get("is_causal", True)
    return Pooling(("lasttoken" if is_causal else "mean",)), False


def _gguf_pooling(file: Path) -> str:
    said = GGUFFile(file).get("pooling_type")
    mode = "mean" if said is None else GGUF_POOLING.get(int(said))
    if mode is None:
        raise ModelLoadFailed(f"{file.name}: it pools its tokens in a way that is not served")
    return mode


def _kind(module: dict[str, Any]) -> str:
    """The class, which is known by its name if it is sentence-transformers' own."""
    name = str(module.get("type"))
    return name.rpartition(".")[2] if name.startswith(SENTENCE_TRANSFORMERS) else name


def _module(config: ModelConfig, kind: str, folder: str) -> Module:
    if kind not in ("Dense", "LayerNorm", "Normalize", "Dropout"):
        raise ModelLoadFailed(f"{config.model}: its module {kind} is not served")
    content = _object(read_json(config, f"{folder}/config.json"))
    for key in ("module_input_name", "module_output_name"):
        if content.get(key) not in (None, "sentence_embedding"):
            raise ModelLoadFailed(f"{config.model}: its module {kind} works on {content[key]}, which is not served")
    return Module(kind, folder, content)


def _folder_of(modules: Any, kind: str) -> str:
    return next((str(each.get("path") or "") for each in modules if _kind(each) == kind), "")


def _transformer_task(config: ModelConfig, subfolder: str) -> bool:
    """Whether the transformer is there for its classification head.

    Raises:
        ModelLoadFailed: it is there for another one.
    """
    task = _transformer_config(config, subfolder).get("transformer_task", "feature-extraction")
    if task not in ("feature-extraction", "sequence-classification"):
        raise ModelLoadFailed(f"{config.model}: sentence-transformers' task {task!r} is not served")
    return bool(task == "sequence-classification")


def _check_output(config: ModelConfig, subfolder: str) -> None:
    """
    Raises:
        ModelLoadFailed: what is pooled is another output of the transformer than its last layer's.
    """
    modalities = _object(_transformer_config(config, subfolder).get("modality_config"))
    text = _object(modalities.get("text"))
    for key, served in (("method", "forward"), ("method_output_name", "last_hidden_state")):
        if text.get(key) not in (None, served):
            raise ModelLoadFailed(f"{config.model}: it pools the {key} {text[key]!r}, which is not served")


def _truncate_dim(config: ModelConfig) -> int | None:
    said = _object(read_json(config, "config_sentence_transformers.json")).get("truncate_dim")
    return said if isinstance(said, int) and said > 0 else None


def _length(config: ModelConfig, subfolder: str) -> int | None:
    """As sentence-transformers has it: its own number, else the tokenizer's."""
    prefix = f"{subfolder}/" if subfolder else ""
    own = _transformer_config(config, subfolder).get("max_seq_length")
    said = own or _object(read_json(config, f"{prefix}tokenizer_config.json")).get("model_max_length")
    return said if isinstance(said, int) and 0 < said < 2**40 else None


def _transformer_config(config: ModelConfig, subfolder: str) -> dict[str, Any]:
    prefix = f"{subfolder}/" if subfolder else ""
    return _object(read_json(config, f"{prefix}sentence_bert_config.json"))


def _architecture(config: ModelConfig) -> str:
    found = _object(read_json(config, "config.json")).get("architectures")
    return str(found[0]) if isinstance(found, list) and found else ""


def _object(content: Any) -> dict[str, Any]:
    return content if isinstance(content, dict) else {}
