"""What `--model` names, without importing torchvision, which takes seconds; the form of a version's URI and of a run's
id.

For the command line, which refuses a wrong name at once and completes a right one. A test compares the list with what
torchvision has; where another version of it is installed, an unknown name is looked up there.
"""

import difflib
import os
import re
from importlib.metadata import version
from pathlib import Path

from qexp.errors import InputError
from qexp.foundation.extras import check_package

MADE_FROM = "0.28.0"  # the version of torchvision
VERSION_URI = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>\d{1,9}|latest)|@(?P<alias>[^/@]+))")
RUN_ID = re.compile(r"[0-9a-f]{32}")
TORCHVISION = """
    alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169
    densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5
    efficientnet_b6 efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet inception_v3
    maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small
    regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf
    regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf
    regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d resnext101_64x4d resnext50_32x4d
    shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b
    swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16
    vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2
""".split()


TIMM = "timm:"  # begins the name of a model of timm
OBJECT = "object:"  # begins that of a module which somebody has given as it is
# That run an ONNX file, the default first. OpenVINO computes what stays float beside int8 in fp32, or in bf16.
ONNXRUNTIME, OPENVINO, OPENVINO_BF16 = RUNTIMES = ("onnxruntime", "openvino", "openvino_bf16")
BY_OPENVINO = (OPENVINO, OPENVINO_BF16)
RUNTIME_NAMES = {ONNXRUNTIME: "ONNX Runtime", OPENVINO: "OpenVINO", OPENVINO_BF16: "OpenVINO with bf16"}
FILES = (".pt2", ".onnx")  # models that are files: exported programs of torch, and ONNX
ALLOWED = (
    "smallnet, a torchvision classifier by its registered name (torchvision.models.list_models), timm:NAME, "
    "package.module:factory, or a .pt2 or .onnx file"
)


def check_model_name(name: str) -> None:
    """Raise InputError unless `name` is that of a model that `networks.build_network` knows. Nothing is imported for
    that: whether timm has the model, or a module its factory, is seen when the network is built."""
    if is_file(name):
        _check_file(name)
    elif not is_model_name(name):
        known = available_models() if _other_torchvision() else ["smallnet", *TORCHVISION]
        no_name = set(":./") & set(name)
        near = [] if no_name else difflib.get_close_matches(name, known, n=3) or ["smallnet", "vgg16"]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        if name.endswith(".py"):
            hint = f"a Python file is given with its function, {Path(name).stem}:FUNCTION. "
        raise InputError(f"--model {name}: unknown; {hint}Allowed: {ALLOWED}")
    elif name.startswith(TIMM):
        check_package("timm", f"--model {name}", "timm")


def is_model_name(name: str) -> bool:
    """Whether `name` has the form of a model that is no file, and is one of torchvision's if it can be nothing else."""
    if name.startswith(TIMM):
        return bool(re.fullmatch(r"[\w.-]+", name.removeprefix(TIMM), re.ASCII))
    if ":" in name:
        module, _, attribute = name.partition(":")
        return all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))
    return name in ("smallnet", *TORCHVISION) or (_other_torchvision() and name in available_models())


def _other_torchvision() -> bool:
    return version("torchvision").partition("+")[0] != MADE_FROM


def is_file(name: str) -> bool:
    """Whether `--model` names a file: an exported program or an ONNX model."""
    return name.lower().endswith(FILES)


def is_onnx_file(name: str) -> bool:
    """Whether `--model` names an ONNX file."""
    return name.lower().endswith(".onnx")


def is_program(name: str) -> bool:
    """Whether `--model` names the file of an exported program."""
    return name.lower().endswith(".pt2")


def is_factory(name: str) -> bool:
    """Whether `--model` names a function of the user's: package.module:factory."""
    return ":" in name and not is_file(name) and not name.startswith(TIMM)


def short_name(model: str) -> str:
    """The part that `--model` has in the names of experiments, runs, folders and registered models: letters, digits,
    `-` and `_`, which MLflow takes in all of them. A file gives its name without folder and suffix, `timm:NAME` its
    name, `a.b:c` a-b-c."""
    own = Path(model).stem if is_file(model) else model.removeprefix(TIMM).removeprefix("models:/")
    return re.sub(r"[^\w-]+", "-", own, flags=re.ASCII).strip("-") or "model"


def is_rebuilt_by_name(name: str) -> bool:
    """Whether this network can be built again from its name, and from what a weights file of ours holds."""
    return not (name.startswith((OBJECT, "models:/")) or name.lower().endswith(".onnx"))


def _check_file(name: str) -> None:
    if not os.path.exists(name):
        raise InputError(f"--model {name}: no such file")
    if not os.path.isfile(name):
        kind = "a folder" if os.path.isdir(name) else "none"
        raise InputError(f"--model {name}: must be a file, and is {kind}")


def available_models() -> list[str]:
    """SmallNet and the names of the classifiers of the torchvision that is installed, which is imported for that."""
    from qexp.models.vision import torchvision

    return ["smallnet", *torchvision.models.list_models(module=torchvision.models)]


def parse_version_uri(uri: str, option: str) -> re.Match[str]:
    """The groups `name`, and `version` or `alias`, of a registered version's URI, which was given as `option`.

    Raises:
        InputError: it has another form.
    """
    parts = VERSION_URI.fullmatch(uri)
    if parts is None:
        raise InputError(f"{option} {uri}: must be models:/NAME/VERSION, models:/NAME/latest or models:/NAME@ALIAS")
    return parts


def check_run_id(run_id: str, option: str) -> None:
    """Raise InputError unless this can be the id of a run."""
    if not RUN_ID.fullmatch(run_id):
        raise InputError(f"{option} {run_id}: no such run: an id is 32 digits and letters from a to f")
