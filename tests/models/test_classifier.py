"""Classifiers: size, names, normalisation, and the weights file."""

import pickle
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qexp.data.datasets import Dataset
from qexp.errors import InputError, StageError
from qexp.measurement.accuracy import to_float
from qexp.models.classifier import (
    Classifier,
    ModelSpec,
    build_classifier,
    channel_statistics,
    load_classifier,
    needs_two_images,
    outline,
    repeated_inputs,
    save_classifier,
)
from qexp.models.names import MADE_FROM, TORCHVISION, available_models, check_model_name
from qexp.models.preprocessing import squashed
from qexp.training.train import TrainResult

TEN = tuple("abcdefghij")
BLACK = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


def _build(name: str, image_size: int = 32, classes: tuple[str, ...] = TEN) -> Classifier:
    return build_classifier(ModelSpec(name, classes, squashed(image_size)), BLACK)


def _without_weights(name: str, image_size: int = 32) -> Classifier:
    """Shapes only: a VGG16 with weights takes half a gigabyte."""
    with torch.device("meta"):
        return Classifier(ModelSpec(name, TEN, squashed(image_size)), torch.zeros(3), torch.ones(3))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["smallnet", "vgg16", "regnet_y_400mf", "shufflenet_v2_x0_5"])
def test_outline_has_the_modules_and_refuses_the_size_that_the_network_does(name: str) -> None:
    network = outline(ModelSpec(name, TEN, squashed(64)))
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) >= 6
    with pytest.raises(InputError, match="--image-size 32: not for --model alexnet"):
        outline(ModelSpec("alexnet", TEN, squashed(32)))


def test_vgg16_is_the_network_of_the_paper_with_ten_classes() -> None:
    assert _parameters(_without_weights("vgg16")) == 134_301_514


def test_smallnet_has_the_parameters_that_its_docstring_says() -> None:
    model = _build("smallnet")
    assert _parameters(model) == 427_178
    assert _parameters(_build("smallnet", classes=("a", "b"))) == 427_178 - 8 * 129
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_torchvision_classifier_by_name() -> None:
    model = _build("resnet18", classes=("a", "b", "c"))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert type(model.network).__name__ == "ResNet"


def test_googlenet_gives_logits_only_in_training() -> None:
    model = _build("googlenet").train()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_available_models_are_classifiers() -> None:
    names = available_models()
    assert version("torchvision").partition("+")[0] != MADE_FROM or names == ["smallnet", *TORCHVISION]
    assert {"smallnet", "vgg16", "resnet18", "mobilenet_v3_small"} <= set(names)
    assert not {"fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "raft_large"} & set(names)
    for name in ("smallnet", "vgg16", "resnet18"):
        check_model_name(name)


@pytest.mark.parametrize(
    ("name", "near"), [("vgg61", "vgg16"), ("smalnet", "smallnet"), ("resnet-18", "resnet18"), ("???", "smallnet")]
)
def test_unknown_name_suggests_near_ones(name: str, near: str) -> None:
    with pytest.raises(InputError) as refused:
        check_model_name(name)
    message = str(refused.value)
    assert message.startswith(f"--model {name}: unknown; did you mean")
    assert near in message.split("?")[-2]
    assert "Allowed: smallnet" in message


def test_image_size_too_small_for_alexnet() -> None:
    with pytest.raises(InputError, match=r"--image-size 32: .*--model alexnet") as refused:
        _build("alexnet")
    assert "\n" not in str(refused.value)


def test_image_size_that_a_vision_transformer_does_not_take() -> None:
    """It is built for 224 px and asserts that it gets them."""
    with pytest.raises(InputError, match=r"--image-size 32.*vit_b_16"):
        _build("vit_b_16")


@pytest.mark.parametrize(
    ("name", "image_size", "needed"), [("resnet18", 32, 2), ("resnet18", 64, 1), ("smallnet", 8, 1)]
)
def test_batch_norm_of_one_pixel_needs_two_images(name: str, image_size: int, needed: int) -> None:
    network = outline(ModelSpec(name, TEN, squashed(image_size)))
    assert needs_two_images(network, (3, image_size, image_size)) is (needed == 2) and not network.training


def test_normalised_training_images_have_mean_zero_and_deviation_one(digits: Dataset) -> None:
    model = build_classifier(ModelSpec("smallnet", digits.classes, squashed(16)), digits.train.images)
    inside = model.normalize(to_float(digits.train.images)).double()
    assert inside.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (inside.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-4


def test_channels_have_their_own_statistics() -> None:
    images = torch.zeros(2, 3, 1, 2, dtype=torch.uint8)
    images[:, 1] = 51
    images[:, 2] = torch.tensor([0, 255])
    mean, deviation = channel_statistics(images)
    assert mean.tolist() == pytest.approx([0.0, 0.2, 0.5])
    assert deviation.tolist() == pytest.approx([1.0, 1.0, 0.5])  # a constant channel is only shifted


def test_the_normalisation_feeds_the_network(trained: tuple[Classifier, TrainResult], digits: Dataset) -> None:
    model, _ = trained
    images = to_float(digits.test.images[:4])
    with torch.no_grad():
        by_hand = (images - model.normalize.mean) / model.normalize.std
        assert torch.equal(model(images), model.network(by_hand))


def test_same_torch_seed_gives_the_same_weights() -> None:
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        weights.append(_build("smallnet").network[0].weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_repeated_inputs_only_where_a_vgg_sees_one_pixel() -> None:
    vgg, wider = _without_weights("vgg16"), _without_weights("vgg16", image_size=64)
    with torch.device("meta"):
        assert repeated_inputs(vgg) == 49
        assert repeated_inputs(wider) == 1  # four different pixels
    assert repeated_inputs(_build("smallnet")) == 1
    assert repeated_inputs(_build("resnet18")) == 1


def test_weights_file_rebuilds_the_model(
    trained: tuple[Classifier, TrainResult], digits: Dataset, tmp_path: Path
) -> None:
    model, _ = trained
    file = tmp_path / "new folder" / "weights.safetensors"
    save_classifier(model, file)
    loaded = load_classifier(file)
    assert loaded.spec == model.spec and loaded.spec.classes == digits.classes
    assert not loaded.training
    images = to_float(digits.test.images[:32])
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert [entry.name for entry in file.parent.iterdir()] == ["weights.safetensors"]


def test_class_names_keep_their_order_and_letters(tmp_path: Path) -> None:
    classes = ("zebra", "Äpfel", 'a "b"', "狗")
    save_classifier(_build("smallnet", classes=classes), tmp_path / "w")
    assert load_classifier(tmp_path / "w").spec.classes == classes


def test_weights_in_another_memory_format_are_saved(tmp_path: Path) -> None:
    model = _build("smallnet")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        save_classifier(model.to(memory_format=torch.channels_last), tmp_path / "w")
        assert torch.equal(load_classifier(tmp_path / "w")(images), before)


def _touch(file: str) -> None:
    Path(file).touch()


class _Trap:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return _touch, (str(self.file),)


def test_pickle_is_refused_unread(tmp_path: Path) -> None:
    trap, file = tmp_path / "trap", tmp_path / "model.pth"
    file.write_bytes(pickle.dumps(_Trap(trap)))
    with pytest.raises(InputError, match=r"weights file .*model.pth: not written by qexp"):
        load_classifier(file)
    torch.save(_Trap(trap), file)
    with pytest.raises(InputError, match="not written by qexp"):
        load_classifier(file)
    assert not trap.exists()
    pickle.loads(pickle.dumps(_Trap(trap)))
    assert trap.exists()  # so the trap works


def test_other_files_are_refused(tmp_path: Path) -> None:
    foreign, damaged = tmp_path / "foreign", tmp_path / "damaged"
    save_file({"weight": torch.zeros(1)}, foreign)
    save_classifier(_build("smallnet"), damaged)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    for file in (foreign, damaged, tmp_path / "absent"):
        with pytest.raises(InputError, match=f"weights file {file}"):
            load_classifier(file)


def test_weights_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(tensors: dict, file: Path, metadata: dict) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    file = tmp_path / "weights.safetensors"
    save_classifier(_build("smallnet"), file)
    before = file.read_bytes()
    monkeypatch.setattr("qexp.models.classifier.save_file", fill_disk)
    with pytest.raises(StageError, match=r"cannot be written .*No space left"):
        save_classifier(_build("smallnet"), file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_weights_file_of_a_network_with_versioned_layers(tmp_path: Path) -> None:
    """MNASNet refuses weights that do not say which version of its layers they are for."""
    model = _build("mnasnet0_5", classes=("a", "b"))
    save_classifier(model, tmp_path / "weights")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), load_classifier(tmp_path / "weights")(images))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in _build("smallnet").state_dict().items()}
    tensors.pop("network.0.weight")
    spec = '{"architecture": "smallnet", "classes": ["a", "b"], "image_size": 32}'
    save_file(tensors, tmp_path / "weights", metadata={"qexp": spec})
    with pytest.raises(InputError, match="not those of smallnet"):
        load_classifier(tmp_path / "weights")
