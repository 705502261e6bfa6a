"""``llamafactory.webui.components.infer``: LlamaBoard's Chat tab gets a section for KTransformers and the load table.

Made for gradio 5: elements are moved in ``parent.children``, and the lines of the status field are set after its creation. Uses
``Manager.get_base_elems`` and the table ``LOCALES`` of LLaMA-Factory, which are checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from types import ModuleType
from typing import Any

from ...engines.ktkernel.sub_pools import sub_pools
from ...engines.registry import backend_names
from ...ground.errors import KTHookError
from ...model.state import has_kt_experts
from ...settings.keys import SCOPES, KTArguments
from .. import bootstrap
from ..patching import expect, replace, versions
from .texts import add_components, is_said

_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(KTArguments)}

_SHOWN: dict[str, Any] = {"kt_num_threads": "auto", "kt_threadpool_count": sub_pools(), "kt_weight_path": ""}
"""what the page shows for a key that is not set; an empty field means the same"""

_KEYS = (
    "use_kt", "kt_backend", "kt_num_threads", "kt_threadpool_count", "kt_weight_path", "kt_lora_scope",
    "kt_router_stats", "kt_debug",
)  # fmt: skip
_TOP = (
    "model_path", "finetuning_type", "checkpoint_path", "quantization_bit", "quantization_method", "template", "rope_scaling", "booster",
)  # fmt: skip
_FIELDS = ("infer_backend", "infer_dtype", "extra_args")
"""LLaMA-Factory's fields that a load reads, above the tabs and in this one. Without the model's name: when it changes, LLaMA-Factory fills in
others."""


def patch(module: ModuleType) -> None:
    """Replace ``create_infer_tab``, which the page looks up in its package, and add our texts to LLaMA-Factory's."""
    from llamafactory.webui import chatter, locales, manager

    stock = expect(module, "create_infer_tab")
    expect(manager.Manager, "get_base_elems")
    if not bootstrap.is_patched(chatter):  # nothing would read the section
        raise KTHookError(
            f"{module.__name__} gets no section for KTransformers, as {chatter.__name__} could not be hooked: "
            f"{bootstrap.failures.get(chatter.__name__)}"
        )
    languages = _languages(locales)

    def create_infer_tab(engine: Any) -> dict[str, Any]:
        from .making import move, unlimited

        section = _create_section()
        with _more_inputs(engine.manager, {section[key] for key in _KEYS}):
            elements: dict[str, Any] = stock(engine)
        unlimited(engine.chatter.load_model)  # what another page loads can be followed
        move(section["kt_section"], before=elements["load_btn"].parent)
        return elements | section | _create_report(engine, elements | section, locales)

    add_components(locales.LOCALES, languages)
    replace(module, create_infer_tab)


def section_values(manager: Any, data: dict[Any, Any]) -> dict[str, Any]:
    """The keys that the section sets to other than their defaults; none without ``use_kt``.

    Args:
        manager: LLaMA-Factory's, which knows the components.
        data: the page's components with their values.
    """
    try:
        values = {key: data[manager.get_elem_by_id(f"infer.{key}")] for key in _KEYS}
    except KeyError:  # webchat, or a page whose hook was not applied
        return {}
    if not values["use_kt"]:
        return {}
    values = {key: value.strip() if isinstance(value, str) else value for key, value in values.items()}
    return {k: v for k, v in values.items() if v not in (None, "", _SHOWN.get(k, _DEFAULTS[k]))}


def _languages(locales: Any) -> list[str]:
    """The languages of LLaMA-Factory's pages.

    Raises:
        KTHookError: Its table of texts has another form.
    """
    try:
        languages = list(locales.LOCALES["infer_backend"])
        tables = locales.LOCALES["info_box"], locales.ALERTS["info_loading"]
        valid = {"en", "zh"} <= set(languages) and all(language in table for table in tables for language in languages)
    except (AttributeError, KeyError, TypeError):
        valid = False
    if not valid:
        raise KTHookError(f"{locales.__name__}.LOCALES is not a table of texts by name and language. {versions()}")
    return languages


def _create_section() -> dict[str, Any]:
    import gradio as gr

    with gr.Accordion(open=False) as section:
        elements: dict[str, Any] = {"kt_section": section}
        with gr.Row():
            elements["use_kt"] = gr.Checkbox(value=False, min_width=190)
            elements["kt_backend"] = gr.Dropdown(
                choices=list(backend_names()), value=_DEFAULTS["kt_backend"], min_width=190
            )
            elements["kt_num_threads"] = gr.Textbox(value=_SHOWN["kt_num_threads"], min_width=190)
            elements["kt_threadpool_count"] = gr.Number(
                value=_SHOWN["kt_threadpool_count"], precision=0, minimum=1, min_width=190
            )
        with gr.Row():
            elements["kt_weight_path"] = gr.Textbox(value=_SHOWN["kt_weight_path"], min_width=190)
            elements["kt_lora_scope"] = gr.Dropdown(
                choices=list(SCOPES), value=_DEFAULTS["kt_lora_scope"], min_width=190
            )
            elements["kt_router_stats"] = gr.Checkbox(value=False, min_width=190)
            elements["kt_debug"] = gr.Checkbox(value=False, min_width=190)
        elements["kt_names"] = gr.Markdown()
    return elements


@contextlib.contextmanager
def _more_inputs(manager: Any, elements: set[Any]) -> Iterator[None]:
    """Let the tab's buttons also send the values of these elements."""
    stock = manager.get_base_elems
    manager.get_base_elems = lambda: stock() | elements
    try:
        yield
    finally:
        del manager.get_base_elems  # uncovers the method of its class


def _create_report(engine: Any, elements: dict[str, Any], locales: Any) -> dict[str, Any]:
    """The load table below the status line. All that depends on the model is renewed when the status line changes."""
    import gradio as gr

    from ...load_report import load_rows
    from ..media import takes_media
    from .chat_page import follow
    from .load_table import markdown
    from .making import move

    def refresh(lang: str, status: str) -> list[Any]:
        model: Any = getattr(engine.chatter.engine, "model", None)
        loaded, form = has_kt_experts(model), getattr(engine.chatter, "_kt_form", None)
        # A change of language resets the status line to "unloaded", even if a model is loaded.
        says_loaded, says_unloaded = locales.ALERTS["info_loaded"][lang], locales.LOCALES["info_box"][lang]["value"]
        # another tab has unloaded it
        gone = engine.chatter.engine is None and (
            status == says_loaded or any(is_said(name, lang, status) for name in ("switched", "loaded_so", "offer"))
        )
        return [
            says_loaded if loaded and status == says_unloaded else says_unloaded if gone else gr.skip(),
            gr.Accordion(visible=loaded),
            markdown(load_rows(model), lang) if loaded else "",
            form.as_yaml() if loaded and form else "",
            # LLaMA-Factory shows it for names of its list, which a model given by its path has not
            gr.Column(visible=True) if loaded and takes_media(engine.chatter.engine.template) else gr.skip(),
            # LLaMA-Factory shows it after its own Load alone: the page may have followed another's, or miss that event
            gr.Column(visible=True) if loaded else gr.skip(),
        ]

    box, lang = elements["info_box"], engine.manager.get_elem_by_id("top.lang")
    box.lines = 2  # from two lines on, a text field grows with its text
    with gr.Accordion(open=True, visible=False) as report:
        table = gr.Markdown(elem_classes=["kt-steady", "kt-table"])
        keys = gr.Markdown(elem_classes="kt-steady")
        fill = gr.Button(size="sm")
    move(report, after=box)
    triggers = [box.change]
    if "kt_loaded" in elements:  # the chat box was hooked
        follow(engine, elements, triggers)
        triggers = [*triggers, elements["kt_loaded"].change]
    gr.on(
        triggers, refresh, [lang, box], [box, report, table, keys, elements["mm_box"], elements["chat_box"]],
        trigger_mode="always_last", show_progress="hidden", show_api=False,
    )  # fmt: skip
    _follow_load(engine, elements)

    def fill_in() -> list[Any]:
        form = getattr(engine.chatter, "_kt_form", None)
        return form.values(filled) if form else [gr.skip()] * len(filled)

    names = [name for name in (*_FIELDS, *_KEYS) if name in elements]
    filled = {f"infer.{name}": elements[name] for name in names}
    filled |= {f"top.{name}": engine.manager.get_elem_by_id(f"top.{name}") for name in _TOP}
    fill.click(fill_in, outputs=list(filled.values()), show_api=False)
    return {"kt_report": report, "kt_fill": fill}


def _follow_load(engine: Any, elements: dict[str, Any]) -> None:
    """A page that is opened shows the load that is running, as far as it has come."""
    import gradio as gr

    from .background_load import running_load

    def opened(language: str, seen: bool) -> Iterator[tuple[Any, bool]]:
        if not seen and (load := running_load(engine.chatter)) is not None:
            for status in load.report(language):
                yield status, True
        yield gr.skip(), True

    seen, lang = gr.State(False), engine.manager.get_elem_by_id("top.lang")  # which a page gets when it is opened
    lang.change(
        opened, [lang, seen], [elements["info_box"], seen],
        concurrency_limit=None, show_progress="hidden", show_api=False,
    )  # fmt: skip
