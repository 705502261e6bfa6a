"""Images, videos and audios of a conversation: whether this chat can take them, and where they stand for the model.

LLaMA-Factory 0.9.5 does not pass on the processor's ``mm_token_type_ids``, by which models of transformers 5.6 tell the tokens of
pictures from text when they lay out positions in time, height and width (M-RoPE). A plain ``forward`` raises without them, but ``generate``
takes the positions of plain text: the model answers, and has seen each picture as one long row of patches.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..ground.errors import KTDataError, describe
from ..model.state import plain_model

KINDS = ("image", "video", "audio")
_TYPES = "mm_token_type_ids"


def check_media(given: Mapping[str, Any]) -> None:
    """Check a conversation's media against the chat's template and processor.

    Args:
        given: ``template``, ``processor``, ``messages`` and the media, as ``HuggingfaceEngine._process_args`` takes them.

    Raises:
        KTDataError: The template has no place for them, the checkpoint has no processor, a message holds the model's
            own token for them, messages and media differ in number, or a video is no video.
    """
    from llamafactory.extras import constants

    plugin = given["template"].mm_plugin
    for name in KINDS:
        kind, items = f"{name}s", given.get(f"{name}s") or ()
        taken, place = getattr(plugin, f"{name}_token", None), getattr(constants, f"{name.upper()}_PLACEHOLDER")
        if items and taken is None:
            raise KTDataError(
                f"The conversation has {kind}, but this chat's template takes none. If the model does, set template to its own; "
                "else send text."
            )
        if items and given["processor"] is None:
            raise KTDataError(
                f"The conversation has {kind}, but the checkpoint has no processor for them. Copy processor_config.json or "
                "preprocessor_config.json of the original model beside its weights."
            )
        if items and taken != place and any(taken in message["content"] for message in given["messages"]):
            raise KTDataError(
                f"A message holds {taken}, which is the model's own token for {kind}: there would be more of them than {kind}. Write "
                f"{place} for each of the {kind}, or leave the token out."
            )
        places = sum(message["content"].count(place) for message in given["messages"])
        if taken is not None and places and places != len(items):
            raise KTDataError(
                f"Places for {kind} ({place}) in the messages: {places}; {kind} that came with them: {len(items)}. Send one for each "
                "place, or begin a new conversation."
            )
    for video in given.get("videos") or ():
        _check_video(video)


def _check_video(video: Any) -> None:
    """Raise KTDataError if a path or an open file is no video; frames are checked when they are read."""
    import av

    if not isinstance(video, str | Path | io.BytesIO):
        return
    try:
        with av.open(video) as container:
            found = bool(container.streams.video)
    except (OSError, av.FFmpegError) as error:
        raise KTDataError(f"A video of the conversation cannot be read: {describe(error)}") from error
    if isinstance(video, io.BytesIO):
        video.seek(0)
    if not found:
        raise KTDataError("A video of the conversation has no pictures: its file has sound alone.")


def add_token_types(inputs: dict[str, Any], model: Any, processor: Any) -> None:
    """Put ``mm_token_type_ids`` [1, T] of the prompt into the arguments of ``generate``, if the model takes them and has pictures to
    place. They are the processor's own: 0 for text, 1 for images, 2 for videos, 3 for audio.

    Raises:
        KTDataError: The processor cannot tell.
    """
    has_pictures = any(isinstance(value, torch.Tensor) and name.endswith("_grid_thw") for name, value in inputs.items())
    if _TYPES in inputs or not has_pictures or _TYPES not in inspect.signature(plain_model(model).forward).parameters:
        return
    if not hasattr(processor, "create_mm_token_type_ids"):
        raise KTDataError(
            f"{type(processor).__name__} does not tell which tokens of a prompt are pictures, without which "
            f"{type(plain_model(model)).__name__} would place them wrongly. Send text alone, or use transformers' own processor."
        )
    tokens: torch.Tensor = inputs["inputs"]
    types = processor.create_mm_token_type_ids(tokens.tolist())
    inputs[_TYPES] = torch.tensor(types, dtype=torch.long, device=tokens.device)


def each_answer(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls that make the answers asked for: one for all of them, or, with media, one for each.

    transformers' ``generate`` repeats the tensors of several pictures one by one, and not all of them for each answer, unless the model
    says otherwise; answers of Gemma-4, and in transformers 5.24 of GLM-4.5V, would be about each other's pictures.

    Args:
        given: the arguments of ``HuggingfaceEngine._chat``.
    """
    keys = given["input_kwargs"]
    count = keys.get("num_return_sequences") or 1
    if count == 1 or not any(given.get(f"{name}s") for name in KINDS):
        return [given]
    # as LLaMA-Factory does it for several answers
    temperature = keys.get("temperature")
    temperature = given["generating_args"]["temperature"] if temperature is None else temperature
    keys = keys | {"num_return_sequences": 1, "do_sample": True, "temperature": temperature or 1.0}
    later = {key: value for key, value in keys.items() if key != "seed"}  # which would make all of them the same
    return [given | {"input_kwargs": dict(keys if number == 0 else later)} for number in range(count)]
