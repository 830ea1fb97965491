"""Runs the nodes of a loop's graph, as both stand-ins for the CUDA runtime keep them, from their raw addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any


def run_graph(
    graphs: Mapping[int, list[tuple]], number: int, replay: Callable[[Any], None], conditions: dict | None = None
) -> None:
    """Run graph `number`: its nodes are ("child", graph), ("while", handle, number of the body) and
    ("condition", handle, slots, rows, flags, stride)."""
    conditions = {} if conditions is None else conditions
    for kind, *node in graphs[number]:
        if kind == "child":
            replay(node[0])
        elif kind == "while":
            for _ in range(100):
                if not conditions[node[0]]:
                    break
                run_graph(graphs, node[1], replay, conditions)
            assert not conditions[node[0]], "a loop without end"
        else:
            handle, slots, rows, flags, stride = node
            slots = (ctypes.c_int64 * rows).from_address(slots)
            read = [ctypes.c_float.from_address(flags + 4 * stride * slot).value for slot in slots]
            conditions[handle] = any(flag == 0 for flag in read)
