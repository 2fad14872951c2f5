"""Which operations between layers kept in fp32 stay fp32 too: a question about graphs, the same for all engines."""

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def between_kept(nodes: Iterable[tuple[T, Sequence[T], bool | None]]) -> set[T]:
    """The operations all of whose values come from layers that stay fp32: rounding them would serve no int8 kernel.

    Args:
        nodes: in the order of computation, each with the nodes that it takes, and whether it is a layer that stays
            fp32 (True), a layer in int8 (False), or no layer (None).
    """
    origins: dict[T, frozenset[bool]] = {}
    found = set()
    for node, inputs, kept in nodes:
        own = frozenset().union(*(origins.get(one, frozenset()) for one in inputs)) if kept is None else {kept}
        origins[node] = frozenset(own)
        if kept is None and own == {True}:
            found.add(node)
    return found
