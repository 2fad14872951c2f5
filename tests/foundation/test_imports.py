"""What is imported is not looked through for garbage; afterwards the collector is as it was."""

import gc

import pytest

from qexp.foundation.imports import importing


def test_what_is_made_meanwhile_is_never_looked_through() -> None:
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        made = [[number] for number in range(1000)]
    assert gc.isenabled() and gc.get_freeze_count() >= before + len(made)
    assert not any(found is made for found in gc.get_objects())


@pytest.mark.parametrize("enabled", [True, False])
def test_an_import_that_fails_leaves_the_collector_as_it_was(enabled: bool) -> None:
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(ImportError), importing():
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
