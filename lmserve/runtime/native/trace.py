"""From a stock transformers model to a ``Graph``: its own forward, watched once for one token.

torch's ``make_fx`` writes down every operation of the forward. What does not depend on the token is computed here and
now; views become views, products with weights become ``linear``, our attention stays one operation, and everything else
has to be in the tables of ``operations.py``. A model that does anything else is not traced, and is served as before;
whether a trace is right is for the comparison at load to say.
"""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lmserve.runtime.native.graph import Graph, Value, View, blank, needed, whole
from lmserve.runtime.native.operations import REDUCTIONS, ROWS, VIEWS, flat_arguments

IDS, POSITIONS, KEEP = "ids", "positions", "keep"
SMALL_CONSTANT = 2**22
"""Numbers that a constant worked out here may have: larger ones are weights in another format."""


class NotTraceable(Exception):
    """The model does something that the native program has no words for; the message names it."""


Layers = dict[int, int]
"""id of an attention module -> its index among the attention layers, in the order of their first call."""


@torch.library.custom_op(
    "lmserve::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int layer, float scaling, int window, float softcap, Tensor? sinks)"
    " -> Tensor",
)
def attend(
    q: Tensor, k: Tensor, v: Tensor, layer: int, scaling: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """q (1, heads, 1, Dk), k and v (1, kv heads, 1, D) -> (1, 1, heads, Dv). Stands in a trace; never computes."""
    return q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


@attend.register_fake
def _attend_shape(
    q: Tensor, k: Tensor, v: Tensor, layer: int, scaling: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])


def trace(model: nn.Module, num_position_rows: int = 1) -> Graph:
    """Watches ``model(input_ids, position_ids, logits_to_keep)`` for one token; its attention is ``attend`` by now.

    Args:
        num_position_rows: 4 for models with M-RoPE.

    Raises:
        NotTraceable: it cannot be watched, or does what the program has no words for.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise NotTraceable("its forward cannot be asked for the logits of some tokens only")

    def forward(ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        output = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep)
        logits: Tensor = output.logits
        return logits

    ids = torch.zeros(1, 1, dtype=torch.int64)
    positions = torch.full((1, 1) if num_position_rows == 1 else (num_position_rows, 1, 1), 3)
    try:
        with torch.inference_mode(False), torch.no_grad(), _quietly():
            traced = make_fx(forward, tracing_mode="fake", _allow_non_fake_inputs=True)(
                ids, positions, torch.zeros(1, dtype=torch.int64)
            )
    except NotTraceable:
        raise
    except Exception as error:  # whatever the model's code or torch's tracer raises
        raise NotTraceable(f"its forward cannot be watched: {_first_line(error)}") from error
    return _Reader(traced).read()


@contextmanager
def _quietly() -> Iterator[None]:
    """torch logs what its tracer stumbles over before it raises; a model that cannot be traced is no error here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Reader:
    """Reads a flat graph of torch's operations, node by node."""

    def __init__(self, traced: torch.fx.GraphModule) -> None:
        self._traced = traced
        self._known: dict[torch.fx.Node, Any] = {}
        self._order: list[Value] = []

    @torch.no_grad()
    def read(self) -> Graph:
        names = iter((IDS, POSITIONS, KEEP))
        for node in self._traced.graph.nodes:
            if node.op == "placeholder":
                self._known[node] = whole(self._add(Value("input", next(names), [], _meta(node))))
            elif node.op == "get_attr":
                self._known[node] = getattr(self._traced, node.target).detach()
            elif node.op == "call_function":
                self._known[node] = self._call(node)
            elif node.op == "output":
                (output,) = torch.utils._pytree.tree_leaves(node.args)
                return self._graph(self._known[output])
        raise AssertionError("a trace ends with its output")

    def _graph(self, output: Any) -> Graph:
        if not isinstance(output, View):
            raise NotTraceable("its logits do not depend on its tokens")
        kept = set(map(id, needed(output)))
        return Graph(output, [value for value in self._order if id(value) in kept])

    def _add(self, value: Value) -> Value:
        self._order.append(value)
        return value

    def _call(self, node: torch.fx.Node) -> Any:
        args: Any = torch.fx.node.map_arg(node.args, self._known.__getitem__)
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, self._known.__getitem__)
        operation: Any = node.target
        parts = flat_arguments((args, kwargs))
        if operation is operator.getitem:
            return args[0][args[1]]
        if not any(isinstance(part, View) for part in parts):
            return self._compute(node, operation, args, kwargs)
        name = str(operation._schema.name).removeprefix("aten::")
        if name in VIEWS:
            return self._view(name, operation, args, kwargs, node)
        args = tuple(self._as_view(arg) if isinstance(arg, Tensor) else arg for arg in args)
        special: Callable[..., Any] | None = getattr(self, f"_read_{name.replace('::', '_')}", None)
        if special is not None:
            return special(node, args, kwargs)
        if name in ROWS:
            return self._row(name, _bound(operation, args, kwargs), node)
        if name in REDUCTIONS:
            return self._reduce(name, args, kwargs, node)
        raise NotTraceable(f"its forward uses {name}")

    def _compute(self, node: torch.fx.Node, operation: Any, args: Any, kwargs: Any) -> Any:
        """What is the same for every token."""
        result = operation(*args, **{**kwargs, **({"device": "cpu"} if kwargs.get("device") else {})})
        places = {
            part.untyped_storage().data_ptr() for part in flat_arguments((args, kwargs)) if isinstance(part, Tensor)
        }
        is_new = isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in places
        if is_new and result.numel() > SMALL_CONSTANT:
            raise NotTraceable(f"its forward computes weights anew at each call ({operation})")
        return result

    def _as_view(self, tensor: Tensor) -> View:
        value = Value("const", "", [], blank(tensor.shape, tensor.dtype), data=tensor)
        return whole(self._add(value))

    def _view(self, name: str, operation: Any, args: Any, kwargs: Any, node: torch.fx.Node) -> Any:
        source: View = args[0]
        if name in ("clone", "contiguous", "alias", "detach", "lift_fresh_copy"):
            return source
        metas = [args[0].meta, *args[1:]]
        try:
            result = operation(*metas, **kwargs)
        except RuntimeError:  # not a view in this layout
            result = operation(self._copy(source).meta, *args[1:], **kwargs)
            source = whole(self._order[-1])
        if isinstance(result, list | tuple):
            return [View(source.value, part) for part in result]
        return View(source.value, result)

    def _copy(self, view: View) -> View:
        return whole(self._add(Value("row", "copy", [view], blank(view.shape, view.meta.dtype))))

    def _row(self, name: str, args: Sequence[Any], node: torch.fx.Node) -> View:
        meta = _meta(node)
        operands: list[View | float] = []
        for arg in args:
            if isinstance(arg, View):
                operands.append(arg.broadcast(meta.shape))
            elif isinstance(arg, bool | int | float):
                operands.append(float(arg))
            elif isinstance(arg, str) or arg is None:
                continue
            else:
                raise NotTraceable(f"its forward uses {name} in an unknown way")
        options = {"approximate": next((arg for arg in args if isinstance(arg, str)), "none")}
        if name == "clamp":
            low, high = [*args, None, None][1:3]
            options["low"], options["high"] = low, high
            operands = operands[:1]
        return whole(self._add(Value("row", name, operands, meta, options=options)))

    def _reduce(self, name: str, args: Sequence[Any], kwargs: Any, node: torch.fx.Node) -> View:
        source: View = args[0]
        dims = args[1] if len(args) > 1 and args[1] else list(range(source.meta.dim()))
        dims = sorted({d % source.meta.dim() for d in ([dims] if isinstance(dims, int) else dims)})
        meta = _meta(node)
        kept = torch.empty([1 if i in dims else n for i, n in enumerate(source.shape)], device="meta")
        value = Value("reduce", name, [source], blank(kept.shape, meta.dtype), options={"dims": dims})
        return whole(self._add(value)).apply(lambda t: t.view(meta.shape))

    # What is neither a view nor a row: one method each, by the operation's name.

    def _read__to_copy(self, node: torch.fx.Node, args: Any, kwargs: Any) -> View:
        return self._row("copy", args[:1], node)

    def _read_cat(self, node: torch.fx.Node, args: Any, kwargs: Any) -> View:
        parts = [self._as_view(part) if isinstance(part, Tensor) else part for part in args[0]]
        meta = _meta(node)
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % meta.dim()
        return whole(self._add(Value("cat", "cat", list(parts), meta, options={"dim": dim})))

    def _read_stack(self, node: torch.fx.Node, args: Any, kwargs: Any) -> View:
        meta = _meta(node)
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % meta.dim()
        parts = [part.apply(lambda t: t.unsqueeze(dim)) for part in args[0]]
        return self._read_cat(node, (parts, dim), {})

    def _read_embedding(self, node: torch.fx.Node, args: Any, kwargs: Any) -> View:
        table, ids = args[0], args[1]
        return self._look_up(table, ids, _meta(node))

    def _read_index_select(self, node: torch.fx.Node, args: Any, kwargs: Any) -> View:
        if args[1] != 0:
            raise NotTraceable("its forward uses index_select in an unknown way")
        return self._look_up(args[0], args[2], _meta(node))

    def _look_up(self, table: View, ids: View, meta: Tensor) -> View:
        if table.value.kind != "const" or table.meta.dim() != 2 or ids.meta.numel() != 1:
            raise NotTraceable("its forward looks something up that is no embedding")
        ids = ids.apply(lambda t: t.reshape(1))
        value = Value("embed", "embed", [ids], meta, data=_data(table), options={"table": table.value})
        return whole(self._add(value))

    def _read_index(self, node: torch.fx.Node, args: Any, kwargs: Any) -> View:
        source, indices = args[0], args[1]
        picked = [index for index in indices if index is not None]
        if len(picked) == 1 and isinstance(picked[0], View):
            if source.value.kind == "const" and len(indices) == 1:
                return self._look_up(source, picked[0], _meta(node))
            if picked[0].value.name == KEEP and picked[0].value.kind == "input":
                source = source if source.is_whole else self._copy(source)
                meta = _meta(node)
                return whole(self._add(Value("select", "select", [source, picked[0]], meta)))
        raise NotTraceable("its forward picks tokens by itself")

    def _read_mm(self, node: torch.fx.Node, args: Any, kwargs: Any) -> View:
        return self._linear(args[0], args[1], None, _meta(node))

    def _read_addmm(self, node: torch.fx.Node, args: Any, kwargs: Any) -> View:
        if kwargs:
            raise NotTraceable("its forward uses a scaled addmm")
        return self._linear(args[1], args[2], args[0], _meta(node))

    def _linear(self, x: View, weight: View, bias: View | None, meta: Tensor) -> View:
        if weight.value.kind != "const" or (bias is not None and bias.value.kind != "const"):
            raise NotTraceable("its forward multiplies two things that depend on the tokens")
        x = x if x.is_run else self._copy(x)
        value = Value("linear", "linear", [x], meta, data=_data(weight).t())
        value.options["bias"] = None if bias is None else _data(bias)
        return whole(self._add(value))

    def _read_bmm(self, node: torch.fx.Node, args: Any, kwargs: Any) -> View:
        left, right = args
        if left.shape[2] != 1:
            raise NotTraceable("its forward multiplies matrices that are no weights")
        return self._row("mul", (left, right), node)  # an outer product: rotary frequencies times the position

    def _read_native_layer_norm(self, node: torch.fx.Node, args: Any, kwargs: Any) -> tuple[View, None, None]:
        source, normalized, weight, bias, epsilon = args
        meta = node.meta["val"][0]
        dims = list(range(source.meta.dim() - len(normalized), source.meta.dim()))
        wide = blank(source.shape, torch.float32)

        def row(name: str, *operands: View | float) -> View:
            spread = [o.broadcast(source.shape) if isinstance(o, View) else o for o in operands]
            return whole(self._add(Value("row", name, spread, wide)))

        def mean(of: View) -> View:
            shape = [1 if i in dims else n for i, n in enumerate(source.shape)]
            return whole(self._add(Value("reduce", "mean", [of], blank(shape, torch.float32), options={"dims": dims})))

        centred = row("sub", source, mean(source), 1.0)
        variance = mean(row("mul", centred, centred))
        scale = self._add(Value("row", "rsqrt_plus", [variance, epsilon], variance.meta))
        result = row("mul", centred, whole(scale))
        if weight is not None:
            result = row("mul", result, weight)
        if bias is not None:
            result = row("add", result, bias, 1.0)
        rounded = Value("row", "copy", [result], blank(meta.shape, meta.dtype))
        return whole(self._add(rounded)), None, None

    def _read_lmserve_attend(self, node: torch.fx.Node, args: Any, kwargs: Any) -> View:
        q, k, v, layer, scaling, window, softcap, sinks = args
        options: dict[str, Any] = {"layer": layer, "scaling": scaling, "window": window, "softcap": softcap}
        options["sinks"] = None if sinks is None else _data(sinks)
        options["heads"], options["kv_heads"] = q.shape[1], k.shape[1]
        runs = [part if part.is_run else self._copy(part) for part in (q, k, v)]
        return whole(self._add(Value("attend", "attend", list(runs), _meta(node), options=options)))


def _data(view: View) -> Tensor:
    """A constant's numbers, in the view's shape."""
    assert view.value.data is not None
    return view.value.data


def _bound(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments by position, defaults filled in, for operations whose keyword arguments matter (add's alpha)."""
    values = list(args)
    for argument in operation._schema.arguments[len(args) :]:
        if argument.name in kwargs:
            values.append(kwargs[argument.name])
        elif argument.has_default_value():
            values.append(argument.default_value)
    return values


def _meta(node: torch.fx.Node) -> Tensor:
    fake = node.meta["val"]
    return blank(fake.shape, fake.dtype)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
