"""Equal images in several parts of a data set: accuracy on test images that training has seen is meaningless."""

from collections.abc import Sequence
from dataclasses import dataclass

from qexp.foundation.quantities import Number

Part = tuple[Sequence[bytes], Sequence[int]]  # digest and label of each image


@dataclass(frozen=True)
class Duplicates:
    """How many images of one part equal, pixel by pixel after decoding and resizing, an image of another one.

    `test_images_seen` equal an image that training, calibration (whose images are training images), early stopping or
    search has seen. `labelled_twice` counts the different images that the whole data set has with several labels.
    """

    test_in_training: Number
    test_in_validation: Number
    test_images_seen: Number
    validation_in_training: Number
    labelled_twice: Number

    def warning(self, test_images: int) -> str | None:
        """One line where accuracy on the test images cannot be trusted; None where it can."""
        if not self.test_images_seen:
            return None
        return (
            f"{self.test_images_seen} of {test_images} test images equal a training or validation image, pixel by "
            "pixel: accuracy on them says nothing about new images"
        )


def count_duplicates(train: Part, validation: Part, test: Part) -> Duplicates:
    """Compare the digests of the images of three parts."""
    in_train, in_validation = set(train[0]), set(validation[0])
    first_label: dict[bytes, int] = {}
    labelled_twice = {
        digest
        for digests, labels in (train, validation, test)
        for digest, label in zip(digests, labels, strict=True)
        if first_label.setdefault(digest, label) != label
    }
    return Duplicates(
        test_in_training=sum(digest in in_train for digest in test[0]),
        test_in_validation=sum(digest in in_validation for digest in test[0]),
        test_images_seen=sum(digest in in_train or digest in in_validation for digest in test[0]),
        validation_in_training=sum(digest in in_train for digest in validation[0]),
        labelled_twice=len(labelled_twice),
    )
