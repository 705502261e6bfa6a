"""Pictures and videos in LLaMA-Factory's chats: the model gets what the processor itself makes of them, and answers as stock transformers
does with that."""

from __future__ import annotations

import asyncio
import io
import re
import wave
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from helpers.chats import chat_model
from helpers.image_text import ARCHITECTURES, make_image_text_model, picture, prompt
from helpers.models import make_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from llamafactory_kt import KTDataError
from llamafactory_kt.decoding.continuing import ONE_BY_ONE
from llamafactory_kt.integration.generation import Generation
from llamafactory_kt.integration.media import add_token_types
from llamafactory_kt.integration.terminal.chat_model import _converse as chat_in_terminal
from llamafactory_kt.model.state import kt_state

PICTURES = [picture(), picture(64, 48, 1)]
FRAMES = [[picture(96, 64, seed) for seed in range(2, 6)], [picture(64, 64, seed) for seed in range(6, 9)]]
FPS = 2.0  # LLaMA-Factory's video_fps

CASES = {
    "two pictures, then text": (["<image>What is it, and <image>?", "A cat.", "Which one?"], PICTURES, []),
    "a picture in a later turn": (["Hello.", "Hi!", "<image>What is it?"], PICTURES[:1], []),
    "frames": (["<video>What happens?"], [], FRAMES[:1]),
    "two videos in a later turn": (["Hi.", "Hello!", "<video> or <video>?"], [], FRAMES),
    "a picture and a video": (["<image>Is that in <video>?"], PICTURES[1:], FRAMES[1:]),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def chat(request, tmp_path_factory):
    """A ChatModel with KT experts; the same checkpoint in stock transformers; its processor; the architecture's name. In float32."""
    path = make_image_text_model(tmp_path_factory.mktemp("model"), request.param, dtype=torch.float32)
    ours = chat_model(path, template=ARCHITECTURES[request.param].template, kt_backend="torch")
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return ours, stock, AutoProcessor.from_pretrained(path), request.param


def messages(turns):
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


def inputs_of(processor, architecture, turns, pictures, videos):
    """The processor's own inputs. Where two frames are looked at together, LLaMA-Factory repeats the last of an odd number."""
    more: dict = {}
    if videos:
        odd = [0 if architecture == "gemma4" else len(frames) % 2 for frames in videos]
        read = [[*frames, *frames[len(frames) - last :]] for frames, last in zip(videos, odd, strict=True)]
        more["videos"] = [[np.array(frame) for frame in frames] for frames in read]
        more["do_sample_frames"] = False
        more["video_metadata"] = [
            {"fps": FPS, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
            for frames in videos
        ]
    return processor(text=[prompt(architecture, *turns)], images=pictures or None, return_tensors="pt", **more)


def positions_during(model, run):
    """The positions that the language model gets for a prompt, and what ``run`` returns."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        return run(), seen[0]
    finally:
        hook.remove()


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_processors_inputs(chat, case):
    ours, stock, processor, architecture = chat
    turns, pictures, videos = CASES[case]
    if architecture == "glm4v_moe" and pictures and videos:
        pytest.skip("transformers' own model cannot: pictures and videos are the same token")
    if architecture == "gemma4" and len(videos) > 1:
        pytest.skip("transformers' own processor cannot: videos must have the same number of frames")
    given = inputs_of(processor, architecture, turns, pictures, videos)

    def reference():
        with torch.inference_mode():
            ids = stock.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :]
        return processor.tokenizer.decode(ids, skip_special_tokens=True)

    wanted, positions = positions_during(stock, reference)
    if architecture != "gemma4":  # whose vision tower alone knows rows and columns
        assert positions.shape[0] == 4 and not torch.equal(positions[1], positions[2])
    keys = {"images": list(pictures) or None, "videos": list(videos) or None, "max_new_tokens": 8}
    (answer,), found = positions_during(ours.engine.model, lambda: ours.chat(messages(turns), **keys))
    assert torch.equal(found, positions)
    assert (answer.response_text, answer.prompt_length) == (wanted, given["input_ids"].shape[1])
    assert "".join(ours.stream_chat(messages(turns), **keys)) == wanted
    three = ours.chat(messages(turns), **keys, num_return_sequences=3, top_k=1)
    assert [each.response_text for each in three] == [wanted] * 3


def test_several_answers_are_sampled(chat):
    ours, *_ = chat
    answers = ours.chat(
        messages(["<image>?"]), images=PICTURES[:1], max_new_tokens=8, num_return_sequences=4, temperature=1.5
    )
    assert len({answer.response_text for answer in answers}) > 1


def test_a_video_file(chat, tmp_path):
    """Read by LLaMA-Factory, which picks the frames; the times are those of the file."""
    ours, _, processor, architecture = chat
    file = tmp_path / "film.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height = 96, 64
        for seed in range(24):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(96, 64, seed // 8))))
        container.mux(stream.encode())
    engine = ours.engine
    parts = engine.model, engine.tokenizer, engine.processor, engine.template, engine.generating_args
    given, _ = engine._process_args(*parts, messages(["What happens?"]), videos=[str(file)], input_kwargs={})
    for form in (file, file.read_bytes(), io.BytesIO(file.read_bytes()), file.open("rb", buffering=0)):
        same, _ = engine._process_args(*parts, messages(["What happens?"]), videos=[form], input_kwargs={})
        tensors = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
        assert all(torch.equal(same[name], given[name]) for name in tensors), form
    text = processor.tokenizer.decode(given["inputs"][0])
    if architecture == "gemma4":
        assert given["pixel_values_videos"].flatten(0, -3).shape[0] == 6, "three seconds, two frames a second"
    else:
        assert given["video_grid_thw"].tolist() == [[3, 8, 12]], "the same, two frames at a time"
    times = {
        "qwen": ("<0.2 seconds>", "<1.4 seconds>", "<2.6 seconds>"),
        "glm": ("image|>0<", "image|>1<", "image|>2<"),
        "gemma": ("00:00 <", "00:00 <", "00:01 <", "00:01 <", "00:02 <", "00:02 <"),
    }[ARCHITECTURES[architecture].family]
    found = re.findall("|".join(map(re.escape, dict.fromkeys(times))), text)
    assert found == list(times), text
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(file.read_bytes()[:300])
    sound = tmp_path / "sound.wav"
    with wave.open(str(sound), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(1600))
    for wrong, reason in ((broken, "cannot be read: InvalidDataError"), (sound, "its file has sound alone")):
        with pytest.raises(KTDataError, match=reason):
            ours.chat(messages(["What happens?"]), videos=[str(wrong)])


def test_forms_of_pictures(chat, tmp_path):
    """Paths, bytes, open files, arrays, rows of datasets; and frames of videos likewise."""
    ours, *_ = chat
    shown, file = PICTURES[0], tmp_path / "shown.png"
    shown.save(file)
    forms = [
        str(file),
        file,
        file.read_bytes(),
        io.BytesIO(file.read_bytes()),
        np.array(shown),
        {"bytes": None, "path": str(file)},
    ]
    engine = ours.engine
    parts = engine.model, engine.tokenizer, engine.processor, engine.template, engine.generating_args

    def inputs(**media):
        return engine._process_args(*parts, messages(["?"]), **media, input_kwargs={})[0]

    for media in ({"images": [shown]}, {"videos": [[shown] * 2]}):
        wanted = {name: value for name, value in inputs(**media).items() if isinstance(value, torch.Tensor)}
        assert any("pixel" in name for name in wanted)
        for form in forms:
            found = inputs(images=[form]) if "images" in media else inputs(videos=[[form, shown]])
            assert all(torch.equal(found[name], value) for name, value in wanted.items()), form


def test_what_does_not_fit_is_refused(chat):
    ours, _, processor, _ = chat
    for keys, turns, reason in (
        (
            {"images": PICTURES[:1]},
            [f"<image>What does {processor.image_token} mean?"],
            "is the model's own token for images",
        ),
        ({"images": PICTURES[:1], "system": processor.image_token}, ["?"], "is the model's own token for images"),
        ({"images": PICTURES[0]}, ["?"], "images must be a list, .* found Image"),
        (
            {"images": ["none.png"]},
            ["?"],
            "A picture of the conversation cannot be read: FileNotFoundError: .*none.png",
        ),
        ({"images": [3]}, ["?"], "A picture of the conversation cannot be read"),
        ({"videos": [[]]}, ["?"], "A video of the conversation has no frames"),
        ({"images": PICTURES[:1]}, ["<image><image>?"], r"\(<image>\) in the messages: 2; images .*: 1"),
        ({}, ["<image>What is it?", "A cat.", "And now?"], r"\(<image>\) in the messages: 1; images .*: 0"),
        ({"videos": FRAMES}, ["<video>?"], r"\(<video>\) in the messages: 1; videos .*: 2"),
        ({"audios": ["sound.wav"]}, ["?"], r"has audios, but this chat's template takes none"),
    ):
        with pytest.raises(KTDataError, match=reason):
            ours.chat(messages(turns), **keys)
        with pytest.raises(KTDataError, match=reason):
            asyncio.run(_read(ours.engine.stream_chat(messages(turns), **keys)))


async def _read(stream):
    return [text async for text in stream]


def test_a_typed_place_in_the_terminal(chat, monkeypatch, capsys):
    """The terminal has text alone. The session goes on, without that question."""
    ours, *_ = chat
    monkeypatch.setattr(ours.engine, "generating_args", ours.engine.generating_args | {"max_new_tokens": 4})
    lines = iter(["Hello.", "What is <image>?", "Hello.", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat_in_terminal(ours)
    first, refused, second = [text.strip() for text in capsys.readouterr().out.split("Assistant: ")[1:]]
    assert refused.startswith("Places for images (<image>) in the messages: 1") and first and second


def test_a_picture_for_a_text_only_model(demo, tmp_path):
    """Nothing but its template tells it from others."""
    ours = chat_model(demo / "model")
    with pytest.raises(KTDataError, match="has images, but this chat's template takes none"):
        ours.chat(messages(["What is it?"]), images=PICTURES[:1])
    text = make_model(tmp_path / "m", "qwen3_moe", vocab_size=1100)  # with embeddings for what the template adds
    lost = chat_model(text, template="qwen3_vl_nothink")
    with pytest.raises(KTDataError, match="has images, but the checkpoint has no processor"):
        lost.chat(messages(["What is it?"]), images=PICTURES[:1])


def test_a_processor_that_cannot_tell(chat):
    ours, *_ = chat
    grids = {"inputs": torch.ones(1, 3, dtype=torch.long), "image_grid_thw": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(KTDataError, match="would place them wrongly"):
        add_token_types(grids, ours.engine.model, SimpleNamespace())
    text = {"inputs": grids["inputs"]}
    add_token_types(text, ours.engine.model, SimpleNamespace())
    assert list(text) == ["inputs"], "text alone needs none"


def test_conversations_about_text_between_pictures(chat):
    """What is kept of text is found again, however the last picture has moved the positions; of pictures nothing is kept."""
    ours, _, _, architecture = chat
    state, history = kt_state(ours.engine.model), messages(["word " * 30, "A sentence.", "And then?"])

    def ask(conversation, **keys):
        generation = Generation()
        given = [dict(message) for message in conversation]
        return "".join(ours.stream_chat(given, kt_generation=generation, max_new_tokens=6, **keys)), generation

    kept, state.prompts = state.prompts, None
    wanted, _ = ask(history)
    state.prompts = kept
    ask(history[:1])
    for _ in range(2):
        _, generation = ask(messages(["<image>What is it? " + "word " * 30]), images=[picture(96, 64)])
        assert generation.cached_tokens == 0
        found, generation = ask(history)
        assert found == wanted
    # linear attention, which goes on token by token, does so where little is new
    assert generation.cached_tokens > 20 or (architecture == "qwen3_5_moe" and state.continues == ONE_BY_ONE)
