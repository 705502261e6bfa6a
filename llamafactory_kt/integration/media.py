"""Images, videos and audios of a conversation: whether this chat can take them, and where they stand for the model.

LLaMA-Factory 0.9.5 does not pass on the processor's ``mm_token_type_ids``, by which models of transformers 5.6 tell the tokens of
pictures from text when they lay out positions in time, height and width (M-RoPE). A plain ``forward`` raises without them, but ``generate``
takes the positions of plain text: the model answers, and has seen each picture as one long row of patches.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..ground.errors import KTDataError, describe
from ..model.state import plain_model

KINDS = ("image", "video", "audio")
_TYPES = "mm_token_type_ids"


def read_media(given: dict[str, Any]) -> None:
    """Check a conversation's media against the chat's template and processor, and put Pillow's pictures in place of its images and of
    its videos' frames.

    LLaMA-Factory takes paths as text, bytes, rows of datasets (``{"bytes", "path"}``) and Pillow's pictures; here also a
    :class:`Path`, an open file, and an array ``[height, width, 3]`` uint8.

    Args:
        given: ``template``, ``processor``, ``messages`` and the media, as ``HuggingfaceEngine._process_args`` takes them.

    Raises:
        KTDataError: The template has no place for them, the checkpoint has no processor, a text holds the model's own
            token for them, messages and media differ in number, or one of them cannot be read.
    """
    for name in KINDS:
        _check_places(name, given)
    if images := given.get("images"):
        given["images"] = [_read_image(image) for image in images]
    if videos := given.get("videos"):
        given["videos"] = [_read_video(video) for video in videos]


def takes_media(template: Any) -> bool:
    """Whether a chat's template has a place for pictures, videos or sound."""
    return any(getattr(template.mm_plugin, f"{name}_token", None) for name in KINDS)


def _check_places(name: str, given: Mapping[str, Any]) -> None:
    """Raise KTDataError if media of one kind cannot be put into the conversation."""
    from llamafactory.extras import constants

    kind, items = f"{name}s", given.get(f"{name}s") or ()
    plugin, place = given["template"].mm_plugin, getattr(constants, f"{name.upper()}_PLACEHOLDER")
    taken = getattr(plugin, f"{name}_token", None)
    messages = [message["content"] for message in given["messages"]]
    if not isinstance(items, list | tuple):
        raise KTDataError(f"{kind} must be a list, with an item for each of the {kind}; found {type(items).__name__}.")
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
    texts = [*messages, given.get("system") or "", given.get("tools") or ""]
    if items and taken != place and any(taken in text for text in texts):
        raise KTDataError(
            f"A text of the conversation holds {taken}, which is the model's own token for {kind}: there would be more of them than "
            f"{kind}. Write {place} for each of the {kind}, or leave the token out."
        )
    places = sum(text.count(place) for text in messages)
    if taken is not None and places and places != len(items):
        raise KTDataError(
            f"Places for {kind} ({place}) in the messages: {places}; {kind} that came with them: {len(items)}. Send one for each "
            "place, or begin a new conversation."
        )


def _read_image(image: Any) -> Image.Image:
    source = image
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, Image.Image):
        return source
    try:
        if isinstance(source, np.ndarray):
            return Image.fromarray(source)
        read = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        read.load()
    except Exception as error:  # Pillow raises a dozen types; all mean the same here
        raise KTDataError(f"A picture of the conversation cannot be read: {describe(error)}") from error
    return read


def _read_video(video: Any) -> Any:
    """A path, a file in memory, which can be read several times, or a list of frames; a file is opened to see whether it is a video."""
    import av

    if isinstance(video, list | tuple):
        if not video:
            raise KTDataError("A video of the conversation has no frames.")
        return [_read_image(frame) for frame in video]
    source = video
    try:
        if isinstance(video, Path):
            source = str(video)
        elif not isinstance(video, str | io.BytesIO):
            source = io.BytesIO(video if isinstance(video, bytes) else video.read())
        with av.open(source) as container:
            found = bool(container.streams.video)
    except (OSError, AttributeError, av.FFmpegError) as error:  # the second: it cannot be read at all
        raise KTDataError(f"A video of the conversation cannot be read: {describe(error)}") from error
    if isinstance(source, io.BytesIO):
        source.seek(0)
    if not found:
        raise KTDataError("A video of the conversation has no pictures: its file has sound alone.")
    return source


@contextlib.contextmanager
def videos_in_files(given: dict[str, Any]) -> Iterator[None]:
    """Put videos that :func:`read_media` has in memory into files: some plugins open a video several times, and find the end of what they
    have read already."""
    videos: Any = given.get("videos") or ()
    in_memory = [number for number, video in enumerate(videos) if isinstance(video, io.BytesIO)]
    if not in_memory:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="llamafactory-kt-") as folder:
        for number in in_memory:
            file = Path(folder) / str(number)
            file.write_bytes(videos[number].getvalue())
            videos[number] = str(file)
        yield


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
