"""``llamafactory.data.mm_plugin``: videos for Qwen3-VL's and GLM-4.5V's templates, expanded by the model's own processor.

LLaMA-Factory's plugins for them fail in a chat with transformers 5.6: one takes the metadata that the processor returns for a tensor, the
other passes an argument that the processor refuses. With several videos, or one after the first message, 0.9.5 also takes the wrong
video's times. Here LLaMA-Factory still picks the frames, and each video is then expanded by a call of the processor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from .patching import expect

_SETTINGS = {
    "image_max_pixels": "video_max_pixels", "image_min_pixels": "video_min_pixels", "video_fps": "video_fps",
    "video_maxlen": "video_maxlen",
}  # fmt: skip
"""argument of ``_regularize_videos`` -> where LLaMA-Factory has put the user's value: an attribute of the processor"""


def check_plugins() -> None:
    """Check what is used of the plugins.

    Raises:
        KTHookError: They are not those of a known LLaMA-Factory.
    """
    from llamafactory.data import mm_plugin

    expect(mm_plugin.Qwen2VLPlugin, "_regularize_videos")
    for owner in (mm_plugin.Qwen3VLPlugin, mm_plugin.GLM4VPlugin):
        expect(owner, "process_messages")
    expect(mm_plugin.BasePlugin, "get_mm_inputs")


def with_videos(template: Any, videos: list[Any] | None, processor: Any) -> Any:
    """The template for a conversation with these videos: a copy whose plugin has the processor expand them, where that is needed.

    Args:
        videos: paths, open files, or lists of frames.
    """
    from llamafactory.data.mm_plugin import GLM4VPlugin, Qwen3VLPlugin

    if not videos or not isinstance(template.mm_plugin, Qwen3VLPlugin | GLM4VPlugin):
        return template
    changed = copy.copy(template)
    changed.mm_plugin = _ProcessorVideos(template.mm_plugin, _expanded(template.mm_plugin, videos, processor))
    return changed


class _ProcessorVideos:
    """Stands in for a plugin during one conversation, whose videos are expanded already."""

    def __init__(self, plugin: Any, expanded: list[Any]):
        self._plugin, self._expanded = plugin, expanded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plugin, name)

    def process_messages(self, messages: Any, images: Any, videos: Any, audios: Any, processor: Any) -> Any:
        """The messages with tokens in place of media."""
        from llamafactory.extras.constants import VIDEO_PLACEHOLDER

        texts = iter([tokens for tokens, _ in self._expanded])
        filled = [{**message, "content": _fill(message["content"], VIDEO_PLACEHOLDER, texts)} for message in messages]
        return self._plugin.process_messages(filled, images, [], audios, processor)

    def get_mm_inputs(self, *, videos: Any, vidlens: list[int], **others: Any) -> dict[str, Any]:
        """The model's inputs of all media."""
        inputs = self._plugin.get_mm_inputs(videos=[], vidlens=[0 for _ in vidlens], **others)
        each = [tensors for _, tensors in self._expanded]
        return {**inputs, **{name: torch.cat([tensors[name] for tensors in each]) for name in each[0]}}


def _expanded(plugin: Any, videos: list[Any], processor: Any) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Of each video, the text that stands for it and the model's inputs."""
    from llamafactory.extras.constants import VIDEO_PLACEHOLDER

    settings = {name: getattr(processor, value) for name, value in _SETTINGS.items()}
    # copies, because it appends to lists of an odd length
    own = [list(video) if isinstance(video, list) else video for video in videos]
    read = plugin._regularize_videos(own, **settings)
    marking = copy.copy(plugin)
    marking.expand_mm_tokens = False
    place = [{"role": "user", "content": VIDEO_PLACEHOLDER}]
    text = marking.process_messages(place, [], videos[:1], [], processor)[0]["content"]
    expanded = []
    for frames, numbers, seconds in zip(read["videos"], read["frames_indices"], read["durations"], strict=True):
        metadata = {
            "fps": settings["video_fps"], "frames_indices": list(numbers), "duration": seconds, "total_num_frames": len(frames),
        }  # fmt: skip
        inputs = processor(
            text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, add_special_tokens=False,
            return_tensors="pt",
        )  # fmt: skip
        tokens = processor.tokenizer.decode(inputs["input_ids"][0], clean_up_tokenization_spaces=False)
        expanded.append((tokens, {name: inputs[name] for name in processor.video_processor.model_input_names}))
    return expanded


def _fill(text: str, place: str, texts: Iterator[str]) -> str:
    """Each place of a text replaced by the next of the texts."""
    first, *others = text.split(place)
    return first + "".join(next(texts) + other for other in others)
