# ruff: noqa: E501
"""Checkpoints of others: what is accepted, and the one line of what is not."""

import os
import pickle
import re
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documented import DOCUMENTED, says
from safetensors.torch import save_file
from torch import Tensor, nn

from qexp.errors import InputError
from qexp.models.checkpoints import load_weights_into, read_checkpoint

CLASSES = 3
State = dict[str, Tensor]


def _network(classes: int = CLASSES) -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, classes)).eval()


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(7)
    return _network().state_dict()


def _named(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


SAVED: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "state_dict, of Lightning": lambda state: {"state_dict": _named("model.", state), "epoch": 3, "lr": 0.1},
    "model, of torchvision": lambda state: {
        "model": state, "optimizer": {"state": {0: {"m": torch.ones(3)}}}, "args": Namespace(lr=0.1), "epoch": 3
    },
    "model_state_dict, of DDP": lambda state: {"model_state_dict": _named("module.", state), "loss": np.float32(0.3)},
    "model_ema": lambda state: {"model_ema": {"n_averaged": torch.tensor(5)} | _named("module.", state)},
    "nested": lambda state: {"model": {"state_dict": state}, "best": np.float64(0.9)},
    "compiled and wrapped": lambda state: _named("module._orig_mod.model.", state),
    "a prefix of one's own": lambda state: {"state_dict": _named("backbone.", state)},
    "half precision": lambda state: {name: tensor.half() if tensor.is_floating_point() else tensor
                                     for name, tensor in state.items()},
    "bfloat16": lambda state: {name: tensor.bfloat16() if tensor.is_floating_point() else tensor
                               for name, tensor in state.items()},
    "without counters": lambda state: {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")},
    "an average of timm": lambda state: {"arch": "net", "state_dict_ema": _named("module.", state), "optimizer": {"state": {0: {"m": torch.ones(3)}}}},
    "an average in a module": lambda state: {"model_ema": {"module": state, "decay": 0.99}},
    "a name of one's own": lambda state: {"checkpoint": {"my_net": state}, "scheduler": {"last": torch.ones(1)}},
    "beside a loss and metrics": lambda state: {"state_dict": {"loss.weight": torch.ones(3)} | _named("net.", state)},
    "a head of another prefix": lambda state: {"state_dict": {("head." if name[0] == "4" else "backbone.") + name: tensor for name, tensor in state.items()}},
    "a part compiled": lambda state: {name.replace("0.", "0._orig_mod."): tensor for name, tensor in state.items()},
    "arrays of numpy beside": lambda state: {"model": state, "losses": np.ones(3, np.float16), "name": np.str_("a")},
    "with counters of thop": lambda state: state | {"0.total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
}  # fmt: skip


def _save(saved: Any, file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file(saved, file)
    else:
        torch.save(saved, file, _use_new_zipfile_serialization=file.name != "legacy.pt")


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, "best.pt") for kind in SAVED]
    + [("plain", f"best{suffix}") for suffix in (".pth", ".bin", ".ckpt", ".pth.tar", ".safetensors")]
    + [("model, of torchvision", "legacy.pt"), ("bfloat16", "best.safetensors")],
)
def test_what_people_save_gives_the_network_that_was_saved(kind: str, name: str, state: State, tmp_path: Path) -> None:
    file, network = tmp_path / name, _network()
    _save(SAVED[kind](state), file)
    load_weights_into(network, read_checkpoint(file), file, CLASSES)
    exact = 1e-2 if kind in ("half precision", "bfloat16") else 0.0
    for name, tensor in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.float32 and torch.allclose(tensor, state[name], rtol=exact, atol=exact / 10)


def test_of_several_weights_the_first_is_taken_and_the_others_are_named(
    state: State, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model_ema": other, "model": state}, tmp_path / "best.pt")
    found = read_checkpoint(tmp_path / "best.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert "the weights under model are taken; there are others under model_ema" in capfd.readouterr().err


def test_what_is_left_out_is_said(state: State, capfd: pytest.CaptureFixture[str]) -> None:
    load_weights_into(_network(), {"loss.weight": torch.ones(3)} | _named("net.", state), "best.pt", CLASSES)
    assert "best.pt: 1 tensor beside the network and left out (loss.weight)" in capfd.readouterr().err


def test_a_new_head_keeps_its_fresh_weights_and_all_else_is_loaded(state: State) -> None:
    network = _network(classes=5)
    fresh = network.state_dict()["4.weight"].clone()
    load_weights_into(network, state, "best.pt", 5, new_head=True)
    assert torch.equal(network.state_dict()["4.weight"], fresh)
    assert torch.equal(network.state_dict()["0.weight"], state["0.weight"])


class _Trap:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def _text(content: str) -> Callable[[Path, State], None]:
    return lambda file, state: file.write_text(content) and None


def _saved(make: Callable[[State], Any]) -> Callable[[Path, State], None]:
    return lambda file, state: torch.save(make(state), file)


def _half(file: Path, state: State) -> None:
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _half_of_safetensors(file: Path, state: State) -> None:
    save_file(state, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _half_of_legacy(file: Path, state: State) -> None:
    torch.save(state, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _script(file: Path, state: State) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), file)


def _program(file: Path, state: State) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 3), (torch.zeros(1, 2),)), file)


def _language_model(file: Path, state: State) -> None:
    layers = {f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(8, 8, dtype=torch.bfloat16) for i in range(9)}
    save_file(layers | {"model.embed_tokens.weight": torch.zeros(9, 8)}, file)


def _broken(state: State) -> State:
    return state | {"0.weight": torch.full_like(state["0.weight"], float("nan"))}


def _quantized(state: State) -> State:
    return state | {"0.weight": torch.quantize_per_tensor(state["0.weight"], 0.1, 0, torch.qint8)}


WRONG: dict[str, tuple[Callable[[Path, State], object], str]] = {
    "no file": (lambda file, state: None, "no such file"),
    "a folder": (lambda file, state: file.mkdir(), "must be a file, and is a folder"),
    "a pipe": (lambda file, state: os.mkfifo(file), "must be a regular file"),
    "an empty file": (lambda file, state: file.touch(), "is empty"),
    "a text file": (_text("epoch 1: loss 0.3\n"), "is text, not weights"),
    "a page of HTML": (_text("\n<!DOCTYPE html><html>404</html>"), r"is HTML or XML, not weights; was a page saved instead of the download\?"),
    "a pointer of Git LFS": (_text("version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS; fetch the file itself: git lfs pull"),
    "random bytes": (lambda file, state: file.write_bytes(bytes(range(256)) * 9), "is not a file of torch.save or safetensors"),
    "a file of Keras": (lambda file, state: file.write_bytes(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file, of Keras perhaps; save the weights with torch"),
    "an archive of NumPy": (lambda file, state: np.savez(file.open("wb"), a=np.ones(3)), "is a zip archive, but not of torch.save"),
    "half a file": (_half, r"is not all there, or damaged \(.*\)"),
    "half a legacy file": (_half_of_legacy, r"is (damaged, or )?not (all there|a file of torch.save).*"),
    "half a safetensors file": (_half_of_safetensors, r"is not a whole safetensors file \(.*\)"),
    "code in the pickle": (_saved(lambda state: {"state_dict": state, "hook": _Trap(Path("trap"))}), r"is a pickle with code in it \(.*\), which is not executed; where you trust it, load it and save the weights alone: torch\.save\(model\.state_dict\(\), FILE\)"),
    "a plain pickle with code": (lambda file, state: file.write_bytes(pickle.dumps(_Trap(Path("trap")))), r"is .*(code in it|not a file of torch.save).*"),
    "a whole network, pickled": (_saved(lambda state: _network()), r"is a pickle with code in it \(torch\.nn\.modules\.container\.Sequential\), .*"),
    "TorchScript": (_script, "is a TorchScript archive, code and weights; .*"),
    "an exported program": (_program, "is an exported program; give it without weights, as --model FILE.pt2"),
    "the state of an optimizer": (_saved(lambda state: torch.optim.SGD(_network().parameters()).state_dict()), "holds the state of an optimizer, and no weights of a network"),
    "a tensor alone": (_saved(lambda state: torch.ones(3)), "holds a Tensor, not the weights of a network by name"),
    "figures of a training": (_saved(lambda state: {"epoch": 3, "best": 0.9}), "holds no weights: there is epoch, best, and none of state_dict, .*"),
    "an empty dict": (_saved(lambda state: {}), "holds no weights: there is nothing, and none of state_dict, .*"),
    "quantized weights": (_saved(_quantized), "holds weights that are quantized already; give those of the float network"),
    "packed int8 weights": (_saved(lambda state: state | {"fc._packed_params._packed_params": torch.ones(1)}), "holds weights that are quantized already; .*"),
    "NaN weights": (_saved(_broken), r"1 tensor with NaN or infinite weights \(0\.weight\)"),
    "whole numbers": (_saved(lambda state: state | {"0.weight": state["0.weight"].to(torch.int8)}), r"0\.weight is of int8; weights must be .*"),
    "complex numbers": (_saved(lambda state: state | {"0.weight": state["0.weight"].to(torch.complex64)}), r"0\.weight is of complex64; .*"),
    "sparse weights": (_saved(lambda state: state | {"4.weight": state["4.weight"].to_sparse()}), r"4\.weight is of sparse_coo; weights must be dense .*"),
    "weights without numbers": (_saved(lambda state: {name: tensor.to("meta") for name, tensor in state.items()}), r"0\.weight has a shape and no numbers: it was saved from the device meta"),
    "two networks": (_saved(lambda state: {"teacher": state, "student": state}), "holds weights of several networks, under teacher, student; save one"),
    "a head for other classes": (_saved(lambda state: _network(classes=7).state_dict()), r"does not fit the network: 0 keys missing; 0 unexpected; 2 of another shape \(4\.weight \[7, 8\], not \[3, 8\], 4\.bias \[7\], not \[3\]\); its last layer is for 7 classes, and the data have 3"),
    "another network": (_saved(lambda state: nn.Sequential(nn.Conv2d(3, 9, 5), nn.Linear(8, 3)).state_dict()), r"does not fit the network: 4 keys missing \(1\.running_mean, 1\.running_var, 4\.weight, …\); 1 unexpected \(0\.bias\); 3 of another shape \(0\.weight \[9, 3, 5, 5\], not \[8, 3, 3, 3\], .*\)"),
    "a key too few and one too many": (_saved(lambda state: {name + "x" * (name == "0.weight"): tensor for name, tensor in state.items()}), r"does not fit the network: 1 key missing \(0\.weight\); 1 unexpected \(0\.weightx\); 0 of another shape"),
    "a language model": (_language_model, r"does not fit the network: 7 keys missing \(.*, …\); 10 unexpected \(.*, …\); 0 of another shape; it is of another network"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_table_of_wrong_inputs(kind: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, line = WRONG[kind]
    file, network = Path("best.pt"), _network()
    make(file, state)
    before, start = {name: tensor.clone() for name, tensor in network.state_dict().items()}, time.process_time()
    with pytest.raises(InputError) as refused:
        load_weights_into(network, read_checkpoint(file), file, CLASSES)
    assert time.process_time() - start < 2
    said = str(refused.value)
    assert re.fullmatch(re.escape(f"--weights {file}: ") + f"({line})", said) and said.isprintable()
    assert kind not in DOCUMENTED or says(DOCUMENTED[kind], said)
    assert not Path("trap").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_page_shows_twenty_and_more_of_them() -> None:
    """test_external.py holds the others."""
    assert len(DOCUMENTED.keys() & WRONG.keys()) >= 20 and len(DOCUMENTED.keys() - WRONG.keys()) == 4
