"""Renders traces as a self-contained HTML page, or as text for a terminal."""

from whiflash_sdk.render.aligned import Turn
from whiflash_sdk.render.page import conversation_html, html
from whiflash_sdk.render.text import conversation_terminal, terminal

__all__ = ["Turn", "conversation_html", "conversation_terminal", "html", "terminal"]
