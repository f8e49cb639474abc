"""The page: its frame, its look, and how it is served."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: nothing is told to anybody

import gradio as gr

from app import cards
from app.api import offer
from app.compare_tab import CompareTab
from app.runs import Runs
from app.runs_tab import RunsTab
from app.session import Session
from app.vote import Ballot
from app.vote_tab import Polling, VoteTab
from app.wanted import shown

TITLE = "Flow-OPD: student against experts"
TOY = "Toy model: the same code at 1/550 of the size."
QUEUE = 64  # requests that may wait; further ones are told that the queue is full
_STYLE = Path(__file__).with_name("style.css")
# Left with Tab, gradio's list of choices closes and, of the same key, opens again over what comes next.
_CLOSE = """() => document.addEventListener("focusout", ({target}) => {
  if (target.matches("input[role=combobox]"))
    target.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
})"""
_HOUR = 3600
_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")


def on_a_space() -> bool:
    """Whether this is a Space of the Hub."""
    return "SPACE_ID" in os.environ


def theme() -> gr.themes.Base:
    """Fonts of the visitor's own system: none is fetched."""
    return gr.themes.Base(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=_SANS, font_mono=_MONO, radius_size="md"
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_border_width="1px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        body_text_color_subdued="*neutral_600",  # what the theme has is too faint to be read by everybody
        body_text_color_subdued_dark="*neutral_400",
        block_label_text_color="*neutral_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white",
    )


def page(session: Session, ballot: Ballot, runs: Runs | None) -> gr.Blocks:
    """The whole page over a session."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(_HOUR, 6 * _HOUR), fill_width=True) as blocks:
        gr.HTML(_head(session))
        polling = Polling(session, ballot)
        offer(session, polling, runs)  # first, so that no button of the page takes a promised name
        with gr.Tab("Compare", id="compare"):
            CompareTab(session)
        with gr.Tab("Blind vote", id="vote"):
            votes = VoteTab(polling, temporary=on_a_space())
        with gr.Tab("Finished runs", id="runs"):
            finished = RunsTab(runs)
        votes.begin(blocks)
        finished.begin(blocks)
    return blocks


def start_page(family: str, reason: str) -> gr.Blocks:
    """What stands in the page's place while the model cannot be had: why, and the steps to it."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.HTML(
            f"<header class='head'><h1>{TITLE}</h1></header>"
            f"{cards.notice(f'{family} cannot be drawn with yet. {shown(reason)}', 'bad')}"
            "<section class='steps'><h2>Two steps</h2><ol>"
            "<li><b>Accept the licence</b> of Stable Diffusion 3.5 Medium, signed in to the Hub, at "
            "<a href='https://huggingface.co/stabilityai/stable-diffusion-3.5-medium'>"
            "huggingface.co/stabilityai/stable-diffusion-3.5-medium</a>.</li>"
            "<li><b>Give this server a token of yours</b> that may read it: on your own machine "
            "<code>hf auth login</code>, on a Space a secret named <code>HF_TOKEN</code> in its settings.</li></ol>"
            "<p>Then start it again. Until then <code>python -m app</code> shows the same demo with the built-in "
            "miniature, on any machine.</p></section>"
            "<footer class='foot'>Powered by Stability AI</footer>"
        )
    return blocks


def _head(session: Session) -> str:
    if session.toy:
        line = (
            f"<p class='toy'><b>{TOY}</b> It draws five shapes and short signs, 64 pixels wide, enlarged here. The "
            "real one, on a GPU: <code>python -m app --model flow-opd</code></p>"
        )
    else:
        line = f"<p class='toy'>{cards.escape(session.family.about)}. <b>Powered by Stability AI</b></p>"
    lead = "One prompt, one seed, the same noise: what distillation kept of each expert, picture by picture."
    return f"<header class='head'><h1>{TITLE}</h1><p class='lead'>{lead}</p>{line}</header>"


def serve(blocks: gr.Blocks, host: str | None, port: int | None, **more: Any) -> Any:
    """Serve a page. No file but gradio's own cache can be had from it, and no error's trace."""
    blocks.queue(max_size=QUEUE, default_concurrency_limit=4)
    return blocks.launch(
        server_name=host,
        server_port=port,
        theme=theme(),
        css=_STYLE.read_text(),
        js=_CLOSE,
        show_error=False,
        allowed_paths=[],
        max_file_size="32mb",
        footer_links=["api"],
        ssr_mode=False,
        share=False,
        **more,
    )
