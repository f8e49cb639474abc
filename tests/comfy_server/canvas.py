"""The canvas in a browser: an example opened as a user opens it, the miniature put in SD3.5's place, Run pressed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .client import Server
from .files import PROMPTS
from .graphs import EXAMPLES, REPLACED

READY = "window.app && window.app.graph && window.app.canvas && window.app.vueAppReady"
# The loader is exchanged for the tests' own where it stands; its links go on from the new one.
EXCHANGE = """() => {
  const graph = app.graph, old = graph._nodes.find(n => n.type === 'CheckpointLoaderSimple');
  const fresh = LiteGraph.createNode('FlowOPDTestLoadMiniature');
  fresh.pos = [old.pos[0], old.pos[1]]; fresh.size = [old.size[0], fresh.size[1]];
  graph.add(fresh);
  const links = [];
  old.outputs.forEach((output, slot) => (output.links || []).forEach(id => {
    const link = graph.links.get ? graph.links.get(id) : graph.links[id];
    links.push([slot, link.target_id, link.target_slot]);
  }));
  links.forEach(([slot, target, at]) => fresh.connect(slot, graph.getNodeById(target), at));
  graph.remove(old);
}"""
WIDGETS = "() => app.graph._nodes.map(n => [n.id, (n.widgets || []).map(w => [w.name, w.value])])"
SET = """([id, name, value]) => {
  const widget = app.graph.getNodeById(id).widgets.find(w => w.name === name);
  widget.value = value; if (widget.callback) widget.callback(value);
}"""
# The whole graph and no more of the page: the view is moved so that the nodes fill it.
FIT = """() => {
  const ns = app.graph._nodes, pad = 20;
  const x0 = Math.min(...ns.map(n => n.pos[0])) - pad, y0 = Math.min(...ns.map(n => n.pos[1] - 30)) - pad;
  const x1 = Math.max(...ns.map(n => n.pos[0] + n.size[0])) + pad;
  const y1 = Math.max(...ns.map(n => n.pos[1] + n.size[1])) + pad;
  const box = app.canvas.canvas.getBoundingClientRect(), left = 70, top = 90;
  const scale = Math.min((box.width - left) / (x1 - x0), (box.height - top) / (y1 - y0));
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [left / scale - x0, top / scale - y0];
  app.canvas.setDirty(true, true);
  return {x: box.x + left, y: box.y + top, width: scale * (x1 - x0), height: scale * (y1 - y0)};
}"""


@contextmanager
def browser(url: str, width: int = 1700, height: int = 900) -> Iterator[Any]:
    """A page with the canvas of the server at ``url``, its first dialogue closed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.goto(url)
        page.wait_for_function(READY, timeout=180_000)
        page.wait_for_timeout(4000)
        close_dialogues(page)
        for setting in ("Comfy.Minimap.Visible", "Comfy.Graph.CanvasInfo"):  # they cover nodes
            page.evaluate("name => app.extensionManager.setting.set(name, false)", setting)
        yield page
        chromium.close()


def close_dialogues(page: Any) -> None:
    """Close what covers the canvas: the templates at the first visit, a word about models that are not there."""
    for _ in range(40):
        if not page.locator(".p-dialog-mask:visible").count():
            return
        page.keyboard.press("Escape")  # the templates of newer front ends do not listen to it
        if (cross := page.locator(".p-dialog-mask:visible button:has(i.pi-times):visible")).count():
            cross.last.click()
        page.wait_for_timeout(500)
    raise TimeoutError("A dialogue over the canvas does not close.")


def open_example(page: Any, name: str) -> None:
    """Load an example into the canvas."""
    page.evaluate(
        "async graph => { await app.loadGraphData(graph) }", json.loads((EXAMPLES / f"{name}.json").read_text())
    )
    page.wait_for_timeout(1500)
    close_dialogues(page)


def exchange_model(page: Any) -> None:
    """Put the miniature in the place of SD3.5, as ``graphs.as_miniature`` does with the API format."""
    page.evaluate(EXCHANGE)
    for node, widgets in page.evaluate(WIDGETS):
        for name, value in widgets:
            if name in REPLACED and (name not in ("text", "value") or value in PROMPTS):
                page.evaluate(SET, [node, name, REPLACED[name](value)])


def press_run(page: Any, server: Server, timeout: float = 300) -> str:
    """Press Run and wait for the prompt it queued; ``success`` or ``error``."""
    import time

    before = set(server.json("/history"))
    close_dialogues(page)
    page.get_by_role("button", name="Run", exact=True).first.click()
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        page.wait_for_timeout(200)
        fresh = set(server.json("/history")) - before
        if fresh:
            page.wait_for_timeout(2500)  # pictures are fetched and drawn
            return server.json("/history")[fresh.pop()]["status"]["status_str"]
    raise TimeoutError(f"Run queued nothing that ended within {timeout} s.")


def photograph(page: Any) -> bytes:
    """The graph as a JPEG."""
    page.evaluate(FIT)
    page.wait_for_timeout(1500)
    return page.screenshot(clip=page.evaluate(FIT), type="jpeg", quality=80)
