"""The models that peers.py compares: how each is made from one fp32 classifier, and loaded for timing."""

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.config import QuantizeConfig
from qexp.errors import first_line
from qexp.measurement.accuracy import to_float
from qexp.models.classifier import Classifier
from qexp.models.onnx_file import INPUT, OnnxClassifier, export
from qexp.quantization import quantize_model
from qexp.quantization.cleanup import clean, folded_layers

Predict = Callable[[Tensor], Tensor]
FOLDED = "_folded"  # in the names of models from which a pool was folded away
U8S8 = "onnxruntime_u8s8_per_channel"
COMPILED: dict[tuple[Path, tuple[int, ...]], Predict] = {}


def _torchscript(backend: str, file: Path) -> Predict:
    torch.backends.quantized.engine = backend
    module: Predict = torch.jit.load(str(file))
    return module


def _in_onnxruntime(file: Path) -> Predict:
    return OnnxClassifier(file).forward


def _in_openvino(file: Path, bf16: bool = False) -> Predict:
    from qexp.models.openvino_file import OpenvinoClassifier

    return OpenvinoClassifier.of_file(file, bf16).forward


def _nncf_in_openvino(file: Path) -> Predict:
    """Compiled for the batch size of the images that it is given, and called as our file is in OpenVINO."""
    import openvino

    from qexp.models.openvino_file import core

    hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = dict[tuple[int, ...], Any]()

    def predict(images: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if shape not in compiled:
            model = core().read_model(file)
            model.reshape(list(shape))
            compiled[shape] = core().compile_model(model, "CPU", hints).create_infer_request()
        request = compiled[shape]
        request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))
        request.start_async()
        request.wait()
        return torch.from_numpy(request.get_output_tensor(0).data.copy())  # where the next call writes

    return predict


def _compiled(file: Path) -> Predict:
    """Compiled by torch for each batch size once: that takes up to a minute, so all loads have what the first made."""
    import torch._inductor.config as inductor

    inductor.freezing = True

    def predict(images: Tensor) -> Tensor:
        key = (file, tuple(images.shape))
        if key not in COMPILED:
            torch._dynamo.reset()
            COMPILED[key] = torch.compile(torch.export.load(file).module(), dynamic=False)
        return COMPILED[key](images)

    return predict


@dataclass(frozen=True)
class Model:
    """A file that one of the makers below writes, and how it is loaded."""

    file: str
    load: Callable[[Path], Predict]


OURS = {
    "fx": Model("fx.pt", partial(_torchscript, "x86")),
    "fx_onednn": Model("fx_onednn.pt", partial(_torchscript, "onednn")),
    "pt2e": Model("pt2e.pt", partial(_torchscript, "x86")),
    "onnx": Model("onnx.onnx", _in_onnxruntime),
    "onnx_openvino": Model("onnx.onnx", _in_openvino),
    f"fx{FOLDED}": Model(f"fx{FOLDED}.pt", partial(_torchscript, "onednn")),
    f"onnx{FOLDED}": Model(f"onnx{FOLDED}.onnx", _in_onnxruntime),
    f"onnx{FOLDED}_openvino": Model(f"onnx{FOLDED}.onnx", _in_openvino),
}
PEERS = {
    "onnxruntime": Model("onnxruntime.onnx", _in_onnxruntime),
    U8S8: Model(f"{U8S8}.onnx", _in_onnxruntime),
    "openvino": Model("openvino.xml", _nncf_in_openvino),
    "pt2e_compiled": Model("pt2e_compiled.pt2", _compiled),
}
FLOATS = {
    "fp32_onnx": Model("fp32.onnx", _in_onnxruntime),
    "fp32_openvino": Model("fp32.onnx", _in_openvino),
    "bf16_openvino": Model("fp32.onnx", partial(_in_openvino, bf16=True)),
    f"fp32{FOLDED}_onnx": Model(f"fp32{FOLDED}.onnx", _in_onnxruntime),
    f"fp32{FOLDED}_openvino": Model(f"fp32{FOLDED}.onnx", _in_openvino),
    f"bf16{FOLDED}_openvino": Model(f"fp32{FOLDED}.onnx", partial(_in_openvino, bf16=True)),
}
MODELS = OURS | PEERS | FLOATS


def present(folder: Path) -> list[str]:
    """The names of the models whose files are in the folder."""
    return [name for name, model in MODELS.items() if (folder / model.file).exists()]


def load(name: str, folder: Path) -> Predict:
    return MODELS[name].load(folder / MODELS[name].file)


@dataclass(frozen=True)
class Made:
    """Seconds that each file took to make, and the reasons of those that could not be made."""

    seconds: dict[str, float]
    failed: dict[str, str]


def make_all(model: Classifier, images: Tensor, folder: Path, reduce_range: bool) -> Made:
    """Write the files of all models into `folder`. `images` are uint8, for calibration.

    The peers, except for PyTorch's own, begin with the clean graph that our engines begin with.
    """
    made = Made({}, {})
    (folder / "image_size").write_text(str(model.spec.preprocessing.height_px))
    example = to_float(images[:2])
    cleaned, folded = (clean(model, example, fold_pool) for fold_pool in (False, True))
    folds = bool(folded_layers(cleaned, folded))
    makers: dict[str, Callable[[Path], None]] = {"fp32.onnx": partial(export, cleaned, example)}
    if folds:
        makers[f"fp32{FOLDED}.onnx"] = partial(export, folded, example)
    for file, options in _options(folds).items():
        makers[file] = partial(_ours, model, images, options, reduce_range)
    makers["onnxruntime.onnx"] = partial(_onnxruntime, {}, images)
    makers[f"{U8S8}.onnx"] = partial(_onnxruntime, _u8s8(), images)
    makers["openvino.xml"] = partial(_openvino, images)
    makers["pt2e_compiled.pt2"] = partial(_pt2e, model, images)
    for name, make in makers.items():
        started = time.monotonic()
        try:
            make(folder / name)
        except Exception as error:  # whatever it is: that a peer fails is a result
            made.failed[name] = first_line(error)
        else:
            made.seconds[name] = time.monotonic() - started
    return made


def _options(folds: bool) -> dict[str, dict[str, Any]]:
    """Of each of our files the options with which it is made."""
    plain: dict[str, dict[str, Any]] = {
        "fx.pt": {"engine": "fx"},
        "fx_onednn.pt": {"engine": "fx", "backend": "onednn"},
        "pt2e.pt": {"engine": "pt2e"},
        "onnx.onnx": {"engine": "onnx"},
    }
    folded = {
        f"fx{FOLDED}.pt": plain["fx_onednn.pt"] | {"fold_pool": True},
        f"onnx{FOLDED}.onnx": plain["onnx.onnx"] | {"fold_pool": True},
    }
    return plain | (folded if folds else {})


def _ours(model: Classifier, images: Tensor, options: dict[str, Any], reduce_range: bool, file: Path) -> None:
    quantized = quantize_model(model, images, QuantizeConfig(**options), reduce_range)
    if quantized.flavor == "onnx":
        file.write_bytes(quantized.stored.SerializeToString())
    else:
        torch.jit.save(quantized.stored, str(file))


def _u8s8() -> dict[str, Any]:
    """What ONNX Runtime's documentation advises for x86; without it, quantize_static has its defaults."""
    from onnxruntime.quantization import QuantType

    return {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}


def _onnxruntime(options: dict[str, Any], images: Tensor, file: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{INPUT: to_float(batch).numpy()} for batch in images.split(64)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    prepared = file.parent / "prepared"
    quant_pre_process(str(file.parent / "fp32.onnx"), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(file), Images(), **options)


def _openvino(images: Tensor, file: Path) -> None:
    """With the defaults of nncf.quantize, calibrated with the same images, one by one as NNCF wants them."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(file.parent / "fp32.onnx")
        batches = [to_float(image[None]).numpy() for image in images]
        quantized = nncf.quantize(converted, nncf.Dataset(batches), subset_size=len(batches))
    openvino.save_model(quantized, file)


def _pt2e(model: Classifier, images: Tensor, file: Path) -> None:
    """As https://docs.pytorch.org/ao/stable/pt2e_quantization/pt2e_quant_x86_inductor.html has it."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    example = to_float(images[:2])
    sizes = ({0: torch.export.Dim("images", min=1, max=65_536)},)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_pt2e(torch.export.export(model, (example,), dynamic_shapes=sizes).module(), quantizer)
        for batch in images.split(64):
            prepared(to_float(batch))
        converted = convert_pt2e(prepared)
        torch.export.save(torch.export.export(converted, (example,), dynamic_shapes=sizes), file)
