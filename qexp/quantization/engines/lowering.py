"""Graph passes from a PT2E program (quantize, dequantize, fp32 operations) to oneDNN's int8 kernels.

Torch's Inductor matches the patterns and inserts its int8 operations. The passes here do the rest: integers stay
integers through pools and reshapes, quantize and dequantize become torch's own kernels, and weights can be saved.
"""

import io
import operator
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.fx_passes.freezing_patterns import freezing_passes
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.shape_prop import ShapeProp

from qexp.quantization.engines.packed import PackedConv, PackedLinear, pack
from qexp.quantization.engines.pt2e import NAME

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
CONV_WITH_SUM, LINEAR_WITH_SUM = "onednn::qconv2d_pointwise.binary", "onednn::qlinear_pointwise.binary"
ADDEND = 6  # the place of what they add among their arguments
INT8_CALLS = ("onednn::qconv_pointwise", CONV_WITH_SUM, "onednn::qlinear_pointwise", LINEAR_WITH_SUM)
# Convolutions and matrix products, with the place of their weight among the arguments.
PRODUCTS = {getattr(aten, name).default: 1 for name in ("convolution", "conv2d", "linear", "mm")} | {
    aten.addmm.default: 2
}
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
STORED_AS = {torch.uint8: torch.quint8, torch.int8: torch.qint8}


def lower(converted: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    """The program that `convert_pt2e` gave, with int8 kernels in place of its patterns, for batches of any size."""
    program = _decompose(converted, example)
    _for_tracing(program)
    hidden = _hide_fp32_products(program)
    freezing_passes(program, (example,))
    for node, target in hidden.items():
        node.target = target
    _lay_out_addends(program)
    with redirect_stderr(io.StringIO()):  # what it raises it prints as well
        ShapeProp(program).propagate(example)
    _pack_weights(program)
    _stay_integer(program)
    _use_native_kernels(program)
    program.graph.eliminate_dead_code()
    _protect_addends(program)
    program.graph.lint()
    return fx.GraphModule(program, program.graph)  # without the fp32 weights and whatever else the graph does not use


def _decompose(converted: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    """The program in the operations of Inductor's patterns, none of which changes a tensor in place.

    What `torch.export` and `run_decompositions` do, but in one trace: this program was exported before.
    """
    table = torch.export.default_decompositions()
    composite = {name: function for name, function in table.items() if torch._export.utils._is_cia_op(name)}
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (example.dim() - 1)
    images = mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    def run(images: Tensor) -> Any:
        with fx.traceback.preserve_node_meta():  # the layer that an operation comes from
            return fx.Interpreter(converted).run(images)

    with enable_python_dispatcher(), mode:
        program = make_fx(dispatch_functionalize(run), decomposition_table=composite)(images)
    names = {id(tensor): name for name, tensor in [*converted.named_parameters(), *converted.named_buffers()]}
    for node in program.graph.find_nodes(op="get_attr"):  # which make_fx has numbered
        node.meta[NAME] = names.get(id(getattr(program, str(node.target))), str(node.target))
    return program


def _for_tracing(program: fx.GraphModule) -> None:
    """What a trace would turn into a constant, or does not know."""
    graph = program.graph
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if node.target is aten.t.default:  # Inductor's patterns look for permutations and reshapes
                _replace(node, graph.call_function(aten.permute.default, (node.args[0], [1, 0])))
            elif node.target in RESHAPES:
                node.target = aten.reshape.default
            elif node.target is aten.sym_size.int:
                _replace(node, graph.call_method("size", node.args))
            elif node.op == "call_module" and "guards" in str(node.target):
                graph.erase_node(node)
    program.recompile()


def _hide_fp32_products(program: fx.GraphModule) -> dict[fx.Node, Any]:
    """Give layers that stay fp32 a name that Inductor does not know: it packs them for kernels that no trace takes.

    Returns what each node has computed.
    """
    hidden = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in PRODUCTS:
            weight = node.args[PRODUCTS[node.target]]
            while isinstance(weight, fx.Node) and weight.target in (aten.permute.default, *RESHAPES):
                weight = weight.args[0]
            if _is_constant(weight):
                hidden[node] = node.target
                node.target = _under_another_name(node.target)
    return hidden


def _lay_out_addends(program: fx.GraphModule) -> None:
    """What a convolution adds to its output must be channels-last, which a layer that stays fp32 does not give."""
    for node in list(program.graph.nodes):
        name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
        if name in (CONV_WITH_SUM, LINEAR_WITH_SUM):
            layout = torch.channels_last if name == CONV_WITH_SUM else torch.contiguous_format
            with program.graph.inserting_before(node):
                options: dict[str, Any] = {"memory_format": layout}
                node.update_arg(
                    ADDEND, program.graph.call_function(aten.contiguous.default, (node.args[ADDEND],), options)
                )


def _under_another_name(operation: Any) -> Any:
    def fp32_product(*arguments: Any) -> Any:
        return operation(*arguments)

    return fp32_product


def _pack_weights(program: fx.GraphModule) -> None:
    for node in list(program.graph.nodes):
        if not (isinstance(node.target, torch._ops.OpOverload) and node.target.name() in INT8_CALLS):
            continue
        prepack = node.args[3]
        weight = _constant(program, prepack.args[0])
        arguments = tuple(_constant(program, arg) if _is_constant(arg) else arg for arg in node.args)
        module, inputs = pack(node.target, arguments, weight, list(node.args[0].meta["tensor_meta"].shape))
        name = f"int8_{node.name}"
        program.add_submodule(name, module)
        with program.graph.inserting_before(node):
            _replace(node, program.graph.call_module(name, inputs))


def _stay_integer(program: fx.GraphModule) -> None:
    """dequantize > f > quantize with the same scale is f on the integers, where f moves or picks values.

    So are dequantize > quantize, and a chain of such f, one after the other.
    """
    waiting = [node for node in program.graph.nodes if node.target is QUANTIZE]
    while waiting:
        quantize = waiting.pop(0)
        source = quantize.args[0]
        pool = source.args[0] if source.target is operator.getitem else None
        inner = source if source.target is DEQUANTIZE else (pool or source).args[0] if source.args else None
        if not isinstance(inner, fx.Node) or inner.target is not DEQUANTIZE or inner.args[1:] != quantize.args[1:]:
            continue
        with program.graph.inserting_before(quantize):
            if source.target is DEQUANTIZE:
                new = inner.args[0]
            elif source.target in RESHAPES:
                new = program.graph.call_method("reshape", (inner.args[0], tuple(source.args[1])))
            elif pool and pool.target is aten.max_pool2d_with_indices.default and source.args[1] == 0:
                arguments = _pool_arguments(inner.args[0], pool)
                new = program.graph.call_function(torch.ops.quantized.max_pool2d.default, arguments)
            else:
                continue
        _replace(quantize, new)


def _pool_arguments(images: Any, pool: Any) -> tuple[Any, ...]:
    kernel = pool.args[1]
    given: list[Any] = list(pool.args[2:])
    defaults: list[Any] = [kernel, [0, 0], [1, 1], False]
    stride, padding, dilation, ceil = given + defaults[len(given) :]
    return images, kernel, stride or kernel, padding, dilation, ceil


def _use_native_kernels(program: fx.GraphModule) -> None:
    """The decomposed operations are Python that only torch.ao knows; these are kernels that every process has."""
    graph = program.graph
    dequantized: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if node.target is DEQUANTIZE and node.args in dequantized:  # convert_pt2e makes one for each user
                _replace(node, dequantized[node.args])
            elif node.target is QUANTIZE:
                values, scale, zero, _, _, dtype = node.args
                stored = graph.call_function(aten.quantize_per_tensor.default, (values, scale, zero, STORED_AS[dtype]))
                _replace(node, graph.call_function(aten.int_repr.default, (stored,)))
            elif node.target is DEQUANTIZE:
                stored = graph.call_function(aten._make_per_tensor_quantized_tensor.default, node.args[:3])
                dequantized[node.args] = graph.call_function(aten.dequantize.self, (stored,))
                _replace(node, dequantized[node.args])
            elif node.target in RESHAPES or _takes_batch_size(node):  # as a method, so that a trace records the size
                name = "reshape" if node.target in RESHAPES else node.target._opname
                _replace(node, graph.call_method(name, node.args, node.kwargs))


def _takes_batch_size(node: fx.Node) -> bool:
    """Of a tensor's method that is given sizes, of which one is that of the batch."""
    sizes = [size for argument in node.args if isinstance(argument, list | tuple) for size in argument]
    return _is_method(node) and any(
        isinstance(size, fx.Node) and not isinstance(size.meta.get("val"), Tensor) for size in sizes
    )


def _is_method(node: fx.Node) -> bool:
    target: Any = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and hasattr(Tensor, target._opname)
        and bool(node.args and isinstance(node.args[0], fx.Node))
    )


def _protect_addends(program: fx.GraphModule) -> None:
    """Copy what a layer adds to its output, unless no other operation needs it any more.

    oneDNN's operation "sum" writes its result into the tensor that it adds. The last pass: those before it move
    operations, and with them the time at which they read.
    """
    for node in program.graph.nodes:
        addend = _overwritten(program, node)
        if addend and not _is_last_reader(program, node):
            addend.target = aten.clone.default  # in place of the `contiguous` of _lay_out_addends


def _overwritten(program: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The tensor that an int8 layer writes its result into; None: its result is a tensor of its own."""
    if node.op != "call_module" or len(node.args) < 2:
        return None
    layer = program.get_submodule(str(node.target))
    adds_in_place = isinstance(layer, PackedConv | PackedLinear) and layer.output[3] == "sum"
    return node.all_input_nodes[-1] if adds_in_place else None


def _is_last_reader(program: fx.GraphModule, layer: fx.Node) -> bool:
    """Whether nothing else reads the memory of what `layer` overwrites, at its time or later, but through its result.

    The caller's images and the constants of the program are never free to be written to.
    """
    origins: dict[fx.Node, fx.Node] = {}  # of each node: the one that has allocated its memory
    results: set[fx.Node] = set()  # the layer and all views of its result
    for node in program.graph.nodes:
        viewed = _viewed(program, node)
        origins[node] = origins[viewed] if viewed else node
        if node is layer or viewed in results:
            results.add(node)
    addend = _overwritten(program, layer)
    assert addend is not None
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    same_memory = [node for node in order if origins[node] is origins[addend] and node not in results]
    later = [user for node in same_memory for user in node.users if user is not layer and order[user] > order[layer]]
    its_own_input = origins[layer.all_input_nodes[0]] is origins[addend]
    return not later and not its_own_input and origins[addend].op not in ("placeholder", "get_attr")


def _viewed(program: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node whose memory the result of `node` may lie in; None: the result has its own."""
    if node.op == "call_method" or node.target is operator.getitem:
        return node.all_input_nodes[0]
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = zip(node.target._schema.arguments, node.args, strict=False)
        return next(
            (given for argument, given in arguments if argument.alias_info and isinstance(given, fx.Node)), None
        )
    return _overwritten(program, node)


def _replace(node: fx.Node, new: Any) -> None:
    if isinstance(new, fx.Node):
        new.meta = new.meta or dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _is_constant(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _constant(program: fx.GraphModule, node: Any) -> Tensor:
    value: Any = program
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value.detach()
