"""Importing torch and MLflow faster: without looking for garbage meanwhile, nor later in what they have made.

They make millions of objects that live as long as the process does. Python's collector looks through them again and
again while they are imported, and once more at the end, which takes 40 % of the time of importing them. The commands
(entrypoints/) and the processes that they start (processes.py) import in such a block; `import qexp` in the process of
a user does not.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """What the block makes is never looked through for garbage."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()
