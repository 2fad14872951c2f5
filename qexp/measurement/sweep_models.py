"""The models of a latency sweep, and how each is loaded: as a user would load it.

fp32 is the stored version, an exported program. The fair baselines are made from its weights: the Python module
(eager), traced and frozen by TorchScript, the same in bf16, and exported to ONNX for ONNX Runtime and for OpenVINO,
which also computes it in bf16; an fp32 version that is an ONNX file is read by OpenVINO as it is. Where a C++ compiler
is installed, torch compiles it for each batch size, in fp32 and in bf16 (compiled.py). Beside int8 models in which a
pool is folded away, these are made from the folded fp32 model too. int8 models are stored versions, each with one
choice of kernels, or of the runtime for an ONNX file.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from qexp.errors import StageError
from qexp.measurement.compiled import Compiled, compile_for
from qexp.models.classifier import load_classifier
from qexp.models.exported import METHODS
from qexp.models.factories import NotImportable
from qexp.models.folding import folded
from qexp.models.names import BY_OPENVINO, ONNXRUNTIME
from qexp.models.preprocessing import Shape
from qexp.models.program import load_program
from qexp.models.stored import load_module, load_stored, model_file

Predict = Callable[[Tensor], object]
BASELINE = "fp32"
EAGER, TRACED, ONNX = "fp32_eager", "fp32_traced", "fp32_onnx"
BF16 = "bf16"
FP32_OPENVINO, BF16_OPENVINO = "fp32_openvino", "bf16_openvino"
IN_OPENVINO = (FP32_OPENVINO, BF16_OPENVINO)
FP32_COMPILED, BF16_COMPILED = "fp32_compiled", "bf16_compiled"
COMPILED = (FP32_COMPILED, BF16_COMPILED)
ROUNDED = (BF16, BF16_OPENVINO, BF16_COMPILED)  # the floats that round
FOLDED = "_folded"  # in the names of what is made from the fp32 model after a pool was folded away
MADE = (EAGER, TRACED, BF16, ONNX, *IN_OPENVINO, *COMPILED)  # from the fp32 version
DEFAULTS = (None, "x86", ONNXRUNTIME)  # kernels and runtimes


@dataclass(frozen=True)
class SweepModel:
    """A name, the folder of a stored version's files, and what runs them: torch's engine for int8 kernels, or the
    runtime of an ONNX file (None: any). A model that is not `needed` is left out where it does not load or run."""

    name: str
    folder: str
    backend: str | None = None
    needed: bool = True

    @property
    def compiles_for_each_size(self) -> bool:
        """Whether the first pass at a batch size is the one that compiles the model for it."""
        return self.backend in BY_OPENVINO or unfolded(self.name) in (*IN_OPENVINO, *COMPILED)

    @property
    def is_compiled(self) -> bool:
        """Whether torch's compiler makes it, which takes long."""
        return unfolded(self.name) in COMPILED

    @property
    def is_made(self) -> bool:
        """Whether it is a baseline, which `prepare_baseline` makes: no stored version."""
        return unfolded(self.name) in MADE


def unfolded(name: str) -> str:
    """The name of the model that is the same but for folding."""
    return name.removesuffix(FOLDED)


def rounds(name: str) -> bool:
    """Whether a float rounds, so that its accuracy is its own."""
    return unfolded(name) in ROUNDED


def rounds_like(name: str) -> str:
    """The float whose accuracy stands for that of one that rounds: in bf16 torch rounds compiled models where it rounds
    the traced one, or in fewer places."""
    return name.replace(BF16_COMPILED, BF16)


def folded_baselines(baselines: Sequence[str]) -> tuple[str, ...]:
    """Names of the baselines to time beside folded int8 models: one at least, or folding would pass for int8's gain."""
    return tuple(f"{name}{FOLDED}" for name in baselines if name != EAGER) or (f"{TRACED}{FOLDED}",)


def int8_models(
    folder: str, engine: str, backends: tuple[str | None, ...], is_folded: bool = False
) -> tuple[SweepModel, ...]:
    """A stored int8 version once for each choice of kernels or runtimes; the default has the engine's plain name."""
    name = f"int8_{engine}{FOLDED if is_folded else ''}"
    return tuple(
        SweepModel(name if backend in DEFAULTS else f"{name}_{backend}", folder, backend, place == 0)
        for place, backend in enumerate(backends)
    )


def backend_in(name: str, engine: str) -> str | None:
    """The kernels or the runtime in a name that `int8_models` has given; None: the default of the engine."""
    return name.removeprefix(f"int8_{engine}").removeprefix(FOLDED).removeprefix("_") or None


def prepare_baseline(
    weights: Path, stored: Path, name: str, shape: Shape, folder: Path, batch_sizes: Sequence[int] = ()
) -> None:
    """Write what `load` needs for the baseline of this name into `folder`, from a weights file of `save_classifier`, or
    from an exported program. With FOLDED in its name, a pool is folded away before.

    A network whose code lies in the user's folder, from which this process imports nothing, is taken from `stored`, the
    folder of the fp32 version: its exported program has the same operations. `batch_sizes` are those to compile for.

    Raises:
        StageError: there is no pool to fold away.
    """
    exported, plain = _onnx_file(name, folder), unfolded(name)
    in_onnx = plain in (ONNX, *IN_OPENVINO)
    if weights.suffix == ".onnx":
        shutil.copyfile(weights, exported)
        return
    if in_onnx and exported.is_file():  # by another baseline
        return
    try:
        with torch.no_grad():
            model: nn.Module = load_program(weights) if weights.suffix == ".pt2" else load_classifier(weights)
    except NotImportable:
        model = load_program(model_file(stored))
    example = torch.zeros(2, *shape)
    if name != plain:
        without_pool = folded(model.eval(), torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
        if without_pool is None:
            raise StageError("the fp32 model has no pool that can be folded away")
        model = without_pool
    if in_onnx:
        from qexp.models.onnx_file import export

        return export(model, example, exported)
    if plain in COMPILED:
        return compile_for(model.eval(), shape, batch_sizes, folder / name, plain == BF16_COMPILED)
    if name == EAGER:
        return torch.save(model, folder / f"{name}.pt")
    torch.jit.save(freeze(model, shape, torch.bfloat16 if plain == BF16 else torch.float32), folder / f"{name}.pt")


def _onnx_file(name: str, folder: Path) -> Path:
    """The file that baselines share."""
    return folder / f"{ONNX}{'' if name == unfolded(name) else FOLDED}.onnx"


def freeze(model: nn.Module, shape: Shape, kind: torch.dtype) -> torch.jit.ScriptModule:
    """The model traced and frozen by TorchScript with weights of this kind, which `model` has afterwards too."""
    example = torch.zeros(2, *shape, dtype=kind)
    for program in [module for module in model.modules() if isinstance(module, fx.GraphModule)]:
        _ask_tensors_for_sizes(program)
    with torch.no_grad():
        return torch.jit.freeze(torch.jit.trace(model.to(kind), example, check_trace=False).eval())


def _ask_tensors_for_sizes(program: fx.GraphModule) -> None:
    """In an exported program, whose operations a trace gives the sizes of the example as fixed numbers."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and (method := METHODS.get(node.target)):
            with program.graph.inserting_before(node):
                node.replace_all_uses_with(program.graph.call_method(method, node.args, node.kwargs))
            program.graph.erase_node(node)
    program.recompile()


def in_bf16(module: torch.jit.ScriptModule) -> Callable[[Tensor], Tensor]:
    """A module of bf16 as a model of float images and float logits."""
    return lambda images: module(images.bfloat16()).float()


def load(model: SweepModel, folder: Path) -> Predict:
    """The model, freshly loaded from its own folder or from what `prepare_baseline` has written to `folder`."""
    plain, exported = unfolded(model.name), _onnx_file(model.name, folder)
    if plain == ONNX:
        from qexp.models.onnx_file import OnnxClassifier

        return OnnxClassifier(exported).forward  # as load_stored does
    if plain in IN_OPENVINO:
        from qexp.models.openvino_file import OpenvinoClassifier

        return OpenvinoClassifier.of_file(exported, bf16=plain == BF16_OPENVINO).forward
    if plain in COMPILED:
        return Compiled(folder / model.name)
    if plain == EAGER:
        return load_module(folder / f"{EAGER}.pt")  # which this process has written
    if plain in (TRACED, BF16):
        module = torch.jit.load(folder / f"{model.name}.pt")
        return in_bf16(module) if plain == BF16 else module
    return load_stored(Path(model.folder), model.backend)
