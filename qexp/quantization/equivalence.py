"""Whether a rewritten model still computes the same: the power of the difference of logits on the same images."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qexp.errors import StageError, first_line
from qexp.measurement.accuracy import to_float

MOST_IMAGES = 64
FEW_IMAGES = 8
BATCH_SIZE = 32
# What int8 kernels round otherwise than the quantized program moves the logits by up to about the error that
# quantization has made (0 to 1.5 times its power over all networks of the tests); a wrong kernel by 100 times and more.
MOST_ERRORS = 4.0
CLOSE_DB = 40.0  # closer than this to the signal is the same, however small the error of quantization
# What engines lose more than a simulation of the same layers: 4 dB at most over networks of all families. A program
# that was wrong lost 20 dB more.
NONSENSE_DB = 12.0
SAME_DB = 100.0  # the rounding of float32
EXACT_DB = 60.0  # of two fp32 models that are the same but for the order in which they sum; they have 90 and more


def check_kernels(
    engine: str,
    int8: Callable[[Tensor], Tensor],
    program: Callable[[Tensor], Tensor],
    fp32: nn.Module,
    images: Tensor,
) -> float:
    """Hold the int8 model against the quantized program that it was made from.

    Args:
        int8: as a process has it that loads the model.
        program: quantize, fp32 operations, dequantize.
        fp32: what was quantized; how far `program` is from it says which differences are small.
        images: uint8 [N, 3, H, W], of which 64 count.

    Returns:
        The signal-to-noise ratio of the int8 logits against fp32, in dB; NaN where fp32 overflows.

    Raises:
        StageError: the int8 model does not take batches of other sizes, its logits depend on them, or they differ from
            those of the program by more than roundings explain.
    """
    some = _varied(images[:MOST_IMAGES])
    alone = {size: _of_any_batch(engine, int8, some[:1].expand(size, -1, -1, -1)) for size in (1, 3)}
    exact, expected = (_logits(model, some) for model in (fp32, program))
    found = _of_any_batch(engine, int8, some)
    allowed = _allowed(exact, expected)
    if not math.isfinite(allowed):  # a model that overflows in fp32: nothing to compare with
        return math.nan
    if not _power(found - expected) <= allowed:
        raise StageError(
            f"engine {engine}: its int8 kernels compute something else than the quantized program of this model: the "
            f"signal-to-noise ratio of the logits against fp32 is {sqnr_db(exact, found):.1f} dB instead of "
            f"{sqnr_db(exact, expected):.1f} dB; use another --engine"
        )
    for size, logits in alone.items():
        if not _power(logits - found[:1]) <= allowed:
            raise StageError(
                f"engine {engine}: the logits that its int8 model gives for an image depend on the size of the batch, "
                f"{size} or {min(len(some), BATCH_SIZE)} images; use another --engine"
            )
    return sqnr_db(exact, found)


def check_sense(
    engine: str, found_db: float, fp32: nn.Module, simulated: Callable[[Tensor], Tensor | None], images: Tensor
) -> None:
    """Refuse int8 logits that have nothing to do with those of fp32, though the kernels compute what the quantized
    program says: then the program is wrong.

    A network may be one that int8 is too coarse for, above all an untrained one. So the same layers, quantized with
    the same options one by one in simulation, say what is to be expected of it.

    Args:
        found_db: what `check_kernels` returned.
        simulated: from images [N, 3, H, W] to logits [N, classes]; None where layers cannot be simulated.
        images: as for `check_kernels`.

    Raises:
        StageError: the error is larger than the signal, and far larger than in the simulation.
    """
    if not found_db < 0:
        return
    some = _varied(images[:MOST_IMAGES])
    if (expected := simulated(some)) is None:
        return
    expected_db = sqnr_db(_logits(fp32, some), expected)
    if found_db < expected_db - NONSENSE_DB:
        raise StageError(
            f"engine {engine}: its int8 model does not compute what the fp32 model does: the signal-to-noise ratio of "
            f"the logits is {found_db:.1f} dB, where quantizing each layer gives {expected_db:.1f} dB; use another "
            "--engine"
        )


def _varied(images: Tensor) -> Tensor:
    """The images, and mirrored ones where there are few: of a handful of logits, the size of an error says little."""
    for dim in (-1, -2):
        images = torch.cat([images, images.flip(dim)]) if len(images) < FEW_IMAGES else images
    if len(images) < FEW_IMAGES and images.shape[-1] == images.shape[-2]:
        images = torch.cat([images, images.transpose(-1, -2)])
    return images


def _logits(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(to_float(batch)).double() for batch in images.split(BATCH_SIZE)])


def _of_any_batch(engine: str, int8: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    try:
        return _logits(int8, images)
    except Exception as error:  # of a trace that holds the size of its batch, in whatever library's words
        said = f"the int8 model does not take a batch of {len(images[:BATCH_SIZE])}"
        raise StageError(f"engine {engine} cannot quantize this model: {said} ({first_line(error)})") from error


def same_logits(expected: Tensor, found: Tensor) -> bool:
    """Whether an fp32 model after a rewrite gives the logits of before, but for rounding."""
    if not expected.isfinite().all():
        return True
    return expected.shape == found.shape and _power(found - expected) <= _power(expected) * _ratio(EXACT_DB)


def sqnr_db(fp32: Tensor, logits: Tensor) -> float:
    """Power of what tells images apart in logits [N, classes] over that of the error: signal to quantization noise."""
    signal, noise = _power(_varying(fp32)), _power(logits - fp32)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if 0 < signal and noise < math.inf else -math.inf


def _allowed(exact: Tensor, expected: Tensor) -> float:
    """Power that int8 logits may differ by from those of the quantized program."""
    by_rounding = max(_power(_varying(exact)) * _ratio(CLOSE_DB), _power(exact) * _ratio(SAME_DB))
    return max(MOST_ERRORS * _power(expected - exact), by_rounding)


def _varying(logits: Tensor) -> Tensor:
    """Without what is the same for all images, which no class is told by."""
    return logits - (logits.mean(0) if len(logits) > 1 else logits.mean())


def _ratio(decibels: float) -> float:
    return 10 ** (-decibels / 10)


def _power(values: Tensor) -> float:
    return values.double().square().mean().item()
