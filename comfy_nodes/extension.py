"""The pack's list of nodes, put together when ComfyUI asks for it."""

from __future__ import annotations

import importlib
import logging

from comfy_api.latest import ComfyExtension, io

_log = logging.getLogger(__name__)
MODULES = ("lora", "expert", "route", "merge", "compare", "score", "keep_best")  # each holds one node, NODE


class FlowOPDExtension(ComfyExtension):
    """The nodes of the category Flow-OPD."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node that can be had: one that fails is logged and the others are there."""
        nodes = []
        for name in MODULES:
            try:
                node = importlib.import_module(f".nodes.{name}", __package__).NODE
                node.GET_SCHEMA()  # ComfyUI asks for it next, and gives up the whole pack if one fails
            except Exception:
                _log.exception("Flow-OPD: the node %r is left out", name)
                continue
            nodes.append(node)
        return nodes
