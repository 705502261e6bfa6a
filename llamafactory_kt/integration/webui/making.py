"""How LLaMA-Factory's pages are made otherwise than it would: elements in other places, other functions, events without gradio's limit."""

from __future__ import annotations

from typing import Any

import gradio as gr


class Instead:
    """An object with some of its attributes replaced."""

    def __init__(self, stock: Any, **replaced: Any):
        self._stock = stock
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)


def move(element: Any, before: Any = None, after: Any = None) -> None:
    """Move an element of the page before or after a sibling."""
    siblings = element.parent.children
    siblings.remove(element)
    siblings.insert(siblings.index(before) if before else siblings.index(after) + 1, element)


def move_out(element: Any) -> None:
    """Move an element to the end of the page. In a tab, it would not exist before the tab is opened."""
    element.parent.children.remove(element)
    while element.parent.parent is not None:
        element.parent = element.parent.parent
    element.parent.children.append(element)


def unlimited(function: Any) -> None:
    """Lift gradio's limit, of one call at a time, from the events of the page being made that call this function."""
    page: Any = gr.context.Context.root_block
    for event in page.fns.values():
        if event.fn == function:
            event.concurrency_limit = None
