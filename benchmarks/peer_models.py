"""The int8 models that peers.py compares: how each is made from one fp32 classifier, and loaded for timing."""

import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.config import QuantizeConfig
from qexp.measurement.accuracy import to_float
from qexp.models.classifier import Classifier
from qexp.models.onnx_file import INPUT, OnnxClassifier, export
from qexp.quantization import quantize_model
from qexp.quantization.cleanup import folded_layers

Predict = Callable[[Tensor], Tensor]
FOLDED = "fx_folded"
# Ours: options of the quantization. TorchScript files are the same whatever kernels they were made for.
OURS: dict[str, dict[str, Any]] = {
    "fx": {"engine": "fx"},
    "fx_onednn": {"engine": "fx", "backend": "onednn"},
    "pt2e": {"engine": "pt2e"},
    "onnx": {"engine": "onnx"},
    "onnx_openvino": {"engine": "onnx", "backend": "openvino"},
    FOLDED: {"engine": "fx", "backend": "onednn", "fold_pool": True},
}
PEERS = ("onnxruntime", "onnxruntime_u8s8_per_channel", "openvino")


def make_all(model: Classifier, images: Tensor, folder: Path, reduce_range: bool) -> dict[str, float]:
    """Write every int8 model into `folder`; seconds that each took, by name. `images` are uint8, for calibration."""
    seconds = {}
    (folder / "image_size").write_text(str(model.spec.preprocessing.height_px))
    for name, options in OURS.items():
        started = time.monotonic()
        quantized = quantize_model(model, images, QuantizeConfig(**options), reduce_range)
        if name == FOLDED and not folded_layers(model, quantized.source):
            continue
        if quantized.flavor == "onnx":
            (folder / f"{name}.onnx").write_bytes(quantized.stored.SerializeToString())
        else:
            torch.jit.save(quantized.stored, str(folder / f"{name}.pt"))
        seconds[name] = time.monotonic() - started
    export(model, to_float(images[:2]), folder / "exported")
    for make in (_onnxruntime, _openvino):
        started = time.monotonic()
        made = make(images, folder)
        seconds |= {each: (time.monotonic() - started) / len(made) for each in made}
    return seconds


def _onnxruntime(images: Tensor, folder: Path) -> tuple[str, ...]:
    """With quantize_static's defaults, and with what its documentation advises for x86 (U8S8), per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{INPUT: to_float(batch).numpy()} for batch in images.split(64)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    prepared = folder / "prepared"
    quant_pre_process(str(folder / "exported"), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(folder / "onnxruntime.onnx"), Images())
    quantize_static(
        str(prepared),
        str(folder / "onnxruntime_u8s8_per_channel.onnx"),
        Images(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return "onnxruntime", "onnxruntime_u8s8_per_channel"


def _openvino(images: Tensor, folder: Path) -> tuple[str, ...]:
    """With the defaults of nncf.quantize, calibrated with the same images, one by one as NNCF wants them."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    (folder / "exported").rename(folder / "exported.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(folder / "exported.onnx")
        batches = [to_float(image[None]).numpy() for image in images]
        quantized = nncf.quantize(converted, nncf.Dataset(batches), subset_size=len(batches))
    openvino.save_model(quantized, folder / "openvino.xml")
    return ("openvino",)


def _torchscript(name: str, backend: str) -> Callable[[Path], Predict]:
    def load(folder: Path) -> Predict:
        torch.backends.quantized.engine = backend
        module: Predict = torch.jit.load(str(folder / f"{name}.pt"))
        return module

    return load


def _load_openvino(folder: Path) -> Predict:
    """Compiled for the batch size of the images that it is given, whose memory it shares: as fast as it can be."""
    import openvino

    hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    core, compiled = openvino.Core(), dict[tuple[int, ...], Any]()

    def predict(images: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if shape not in compiled:
            model = core.read_model(folder / "openvino.xml")
            model.reshape(list(shape))
            compiled[shape] = core.compile_model(model, "CPU", hints).create_infer_request()
        found = compiled[shape].infer({0: images.numpy()}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0].copy())  # the next call writes where this one has

    return predict


def _load_ours_in_openvino(folder: Path) -> Predict:
    from qexp.models.openvino_file import OpenvinoClassifier

    return OpenvinoClassifier.of_file(folder / "onnx_openvino.onnx").forward


LOADERS: dict[str, Callable[[Path], Predict]] = {
    "fx": _torchscript("fx", "x86"),
    "fx_onednn": _torchscript("fx_onednn", "onednn"),
    "pt2e": _torchscript("pt2e", "x86"),
    FOLDED: _torchscript(FOLDED, "onednn"),
    "onnx": lambda folder: OnnxClassifier(folder / "onnx.onnx").forward,
    "onnx_openvino": _load_ours_in_openvino,
    "onnxruntime": lambda folder: OnnxClassifier(folder / "onnxruntime.onnx").forward,
    "onnxruntime_u8s8_per_channel": lambda folder: OnnxClassifier(folder / "onnxruntime_u8s8_per_channel.onnx").forward,
    "openvino": _load_openvino,
}
