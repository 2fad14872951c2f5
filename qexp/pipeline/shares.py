"""Evaluation shared by the processes that torchrun has started, on one machine or several.

The first process has the job; the others wait for models. Each computes every n-th batch of the images, with the
batches that one process would take, so that the logits are those of one process; the first one puts them together.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qexp.data.datasets import Dataset
from qexp.measurement.accuracy import predict_logits, to_float
from qexp.models.classifier import load_classifier, save_classifier
from qexp.models.stored import load_stored
from qexp.models.taken import export_program, is_onnx, is_rebuilt
from qexp.progress import say
from qexp.training.distributed import Group, read_group, threads_each

BATCH_SIZE = 256
LONGEST_WAIT = timedelta(days=7)  # of the others, while the first process quantizes and times
_shared: list[Group] = []  # the group, while one is joined


@contextmanager
def leading() -> Iterator[None]:
    """While the block lasts, the other processes help to evaluate; then they end."""
    group = read_group()
    if group.size == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    _shared.append(group)
    try:
        yield
        group.from_leader(None)
    finally:
        _shared.clear()
        dist.destroy_process_group()


def follow(dataset: Dataset) -> None:
    """Compute this process's share of every model that the first process sends, until it has no more."""
    group = read_group()
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        while (task := group.from_leader(None)) is not None:
            name, content, backend, split = task
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, name).write_bytes(content)
                model = _loaded(Path(folder), name, backend)
                share = _share_of(model, getattr(dataset, split).images, group, f"share of the {split} images")
            dist.gather_object(share)
    finally:
        dist.destroy_process_group()


def predict_part(model: Any, dataset: Dataset, split: str, label: str) -> Tensor:
    """Logits of one part of a data set, in its order, by all processes that there are."""
    images = getattr(dataset, split).images
    if not _shared:
        return predict_logits(model, images, BATCH_SIZE, label)
    (group,) = _shared
    say(f"{label}: shared by {group.size} processes")
    group.from_leader((*_packed(model, images), split))
    shares: list[Any] = [None] * group.size
    dist.gather_object(_share_of(model, images, group, label), shares)
    parts = [part.split(BATCH_SIZE) for part in shares]
    batches = range(-(-len(images) // BATCH_SIZE))
    return torch.cat([parts[number % group.size][number // group.size] for number in batches])


def _share_of(model: Callable[[Tensor], Tensor], images: Any, group: Group, label: str) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads_each(before, group))
    try:
        starts = range(group.rank * BATCH_SIZE, len(images), group.size * BATCH_SIZE)
        found = [predict_logits(model, images[start : start + BATCH_SIZE], BATCH_SIZE) for start in starts]
        return torch.cat(found) if found else torch.empty(0)
    finally:
        torch.set_num_threads(before)


def _packed(model: Any, images: Any) -> tuple[str, bytes, str | None]:
    """A model as a file's name and content, and torch's engine for its int8 kernels."""
    if hasattr(model, "stored_bytes"):  # an int8 model, as an engine has returned it
        return f"model.{'onnx' if model.flavor == 'onnx' else 'pth'}", model.stored_bytes(), model.result.load_backend
    if is_onnx(model):
        return "model.onnx", model.canonical.SerializeToString(), None
    with tempfile.TemporaryDirectory() as folder:
        if is_rebuilt(model):
            save_classifier(model, file := Path(folder, "model.safetensors"))
        else:
            export_program(model, to_float(images[:2]), file := Path(folder, "model.pt2"))
        return file.name, file.read_bytes(), None


def _loaded(folder: Path, name: str, backend: str | None) -> Any:
    return load_classifier(folder / name) if name.endswith(".safetensors") else load_stored(folder, backend)
