"""Which LLaMA-Factory has what: the functions that the hooks rely on, with their parameters in each version.

A function without a row for what is installed leaves its module stock. To support another version, add the rows in which it
differs, and its name to :data:`VERSIONS`.
"""

from __future__ import annotations

from dataclasses import dataclass

RELEASE, MAIN = "0.9.5", "0.9.6.dev0"
VERSIONS = (RELEASE, MAIN)
"""of LLaMA-Factory; the second is its main branch"""
ADVICE = f"pip install llamafactory=={RELEASE}"
"""what to do with another one"""

REQUEST = ("messages", "system", "tools", "images", "videos", "audios", "input_kwargs")
PARAMETERS = ("model", "tokenizer", "processor", "template", "generating_args", *REQUEST)
"""those of ``HuggingfaceEngine._process_args``, ``_chat`` and ``_stream_chat``"""


@dataclass(frozen=True)
class Row:
    """One function, or one class by its constructor, as some versions have it."""

    function: str
    """with its module, without ``llamafactory.``"""
    parameters: str | None
    """separated by blanks; None: these versions have no such function"""
    versions: tuple[str, ...] = VERSIONS


_ENGINE, _CHATTER, _MODEL_ARGS = (
    "chat.hf_engine.HuggingfaceEngine",
    "webui.chatter.WebChatModel",
    "hparams.model_args.ModelArguments",
)

TABLE = (
    Row("hparams.parser.read_args", "args"),
    Row("hparams.parser.get_infer_args", "args"),
    Row("hparams.parser._check_extra_dependencies", "model_args finetuning_args training_args"),
    # kt_config of chats is an option of this class; its value goes to ModelArguments._kt_inference_config
    Row("hparams.parser._KTransformersRuntimeArguments", None, (RELEASE,)),
    Row("hparams.parser._KTransformersRuntimeArguments", "kt_config", (MAIN,)),
    # prepares an inference through KTransformers' forks, after _check_extra_dependencies
    Row(f"{_MODEL_ARGS}.configure_kt_loading", None, (RELEASE,)),
    Row(f"{_MODEL_ARGS}.configure_kt_loading", "self finetuning_args model_max_length", (MAIN,)),
    Row("model.loader._get_init_kwargs", "model_args"),
    Row("model.loader.load_config", "model_args"),
    Row("model.loader.patch_config", "config tokenizer model_args init_kwargs is_trainable"),
    Row("model.loader.init_adapter", "config model model_args finetuning_args is_trainable"),
    Row("model.loader.is_torch_version_greater_than", "content"),
    Row("model.patcher.configure_attn_implementation", "config model_args"),
    # main takes a seed among input_kwargs, and hands it to _chat and _stream_chat as gen_kwargs["_seed"]
    Row(f"{_ENGINE}._process_args", " ".join(PARAMETERS)),
    Row(f"{_ENGINE}._chat", " ".join(PARAMETERS)),
    Row(f"{_ENGINE}._stream_chat", " ".join(PARAMETERS)),
    Row(f"{_ENGINE}.stream_chat", f"self {' '.join(REQUEST)}"),
    Row("chat.hf_engine.get_template_and_fix_tokenizer", "tokenizer data_args"),
    Row("data.mm_plugin.Qwen2VLPlugin._regularize_videos", "self videos kwargs"),
    Row("data.mm_plugin.Qwen3VLPlugin.process_messages", "self messages images videos audios processor"),
    Row("data.mm_plugin.GLM4VPlugin.process_messages", "self messages images videos audios processor"),
    Row(
        "data.mm_plugin.BasePlugin.get_mm_inputs",
        "self images videos audios imglens vidlens audlens batch_ids processor",
    ),
    Row("chat.chat_model.run_chat", ""),
    Row("chat.sglang_engine.SGLangEngine", "model_args data_args finetuning_args generating_args"),
    Row("chat.sglang_engine.SGLangEngine._cleanup_server", "self"),
    Row("chat.sglang_engine.load_tokenizer", "model_args"),
    Row("chat.sglang_engine.get_template_and_fix_tokenizer", "tokenizer data_args"),
    Row("api.app.create_app", "chat_model"),
    Row("api.app.run_api", ""),
    Row(f"{_CHATTER}.load_model", "self data"),
    Row(f"{_CHATTER}.unload_model", "self data"),
    Row(
        f"{_CHATTER}.stream",
        "self chatbot messages lang system tools image video audio max_new_tokens top_p temperature skip_special_tokens "
        "escape_html enable_thinking",
        (RELEASE,),
    ),
    Row(
        f"{_CHATTER}.stream",
        "self chatbot messages lang system tools image video audio max_new_tokens top_p temperature seed "
        "skip_special_tokens escape_html enable_thinking",
        (MAIN,),
    ),
    Row("webui.components.chatbot.create_chat_box", "engine visible"),
    Row("webui.components.infer.create_infer_tab", "engine"),
    Row("webui.manager.Manager.get_base_elems", "self"),
    Row("webui.interface.run_web_demo", ""),
    Row("v1.config.arg_parser.get_args", "args"),
)


def rows(function: str) -> list[Row]:
    """The rows of one function, named with its module and ``llamafactory.``."""
    return [row for row in TABLE if f"llamafactory.{row.function}" == function]
