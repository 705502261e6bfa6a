"""Pictures, videos and sounds of a request: data URLs, web addresses, and files of the server that it may show.

LLaMA-Factory hands whatever it finds to Pillow and FFmpeg. Those open dozens of formats, of which some name further files or web
addresses (playlists) or run programs (EPS), and pictures of any size. Here a file must be what its kind says, and of bounded size.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....ground.errors import describe
from ..errors import BadRequest
from .fetch import fetch

MOST_BYTES = 64 * 2**20
"""of one picture, video or sound"""
MOST_FILES = 1000
"""of a request"""
MOST_PIXELS = 2**30 // 12
"""of all pictures of a request: where Pillow begins to warn"""
MOST_PIXELS_OF_A_FRAME = 4096 * 2304
"""of a video, of which LLaMA-Factory keeps up to 128 frames"""
MOST_SCANS = 100
"""of a JPEG: each goes over the whole picture again, however few bytes it has; a progressive one has about ten"""
_SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e]")
"""how one of one to four components begins; other bytes, such as a phone's film behind the picture, hardly ever look like it"""
_PICTURES = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
_VIDEO = re.compile(rb".{4}(ftyp|moov|mdat|free|skip|wide|pnot)|\x1a\x45\xdf\xa3|RIFF.{4}AVI ", re.DOTALL)
"""how MP4 and MOV, Matroska and WebM, and AVI begin"""
_SOUND = re.compile(rb"ID3|\xff[\xe0-\xff]|RIFF.{4}WAVE|OggS|fLaC", re.DOTALL)


@dataclass
class Media:
    """What has been read of a request, in its order."""

    images: list[Any] = field(default_factory=list)
    """Pillow's, RGB"""
    videos: list[io.BytesIO] = field(default_factory=list)
    audios: list[io.BytesIO] = field(default_factory=list)
    pixels: int = 0


@dataclass(frozen=True)
class _Kind:
    types: str
    """of data URLs: those that LLaMA-Factory takes, and webp"""
    placeholder: str
    """its name in LLaMA-Factory's constants"""
    add: Callable[[Media, bytes], None]


def read_media(part: Any, place: str, media: Media) -> str:
    """Read one into ``media``; returns LLaMA-Factory's placeholder for it.

    Args:
        part: of a message.
        place: the message, for errors.

    Raises:
        BadRequest: It has no address or a forbidden one, cannot be read, or is too large.
    """
    from llamafactory.extras import constants

    if len(media.images) + len(media.videos) + len(media.audios) >= MOST_FILES:
        raise BadRequest(f"The request has more than {MOST_FILES} images, videos and audios.", "messages")
    name = part.type.removesuffix("_url")
    kind, address = _KINDS[name], getattr(part, part.type)
    if address is None or not address.url:
        raise BadRequest(f"{place}: {part.type} has no url.", "messages")
    try:
        kind.add(media, _read(address.url, part.type, kind, place))
    except BadRequest:
        raise
    except Exception as error:  # Pillow, base64 and the file system raise a dozen types; all mean the same here
        raise BadRequest(f"An image, video or audio cannot be read: {describe(error)}", "messages") from error
    return str(getattr(constants, kind.placeholder))


def _read(url: str, field_name: str, kind: _Kind, place: str) -> bytes:
    if url.startswith("data:"):
        begin, _, encoded = url.partition(",")
        if not re.fullmatch(rf"data:{field_name.removesuffix('_url')}/({kind.types});base64", begin) or not encoded:
            raise BadRequest(
                f"{place}: {field_name} begins with {url[:40]!r}, expected data:{field_name.removesuffix('_url')}/TYPE;base64, with "
                f"one of the types {kind.types.replace('|', ', ')}.",
                "messages",
            )
        if len(encoded) > MOST_BYTES * 4 // 3 + 4:
            raise BadRequest(f"{place}: {field_name} is larger than {MOST_BYTES >> 20} MiB.", "messages")
        return base64.b64decode(encoded, validate=True)
    if url.lower().startswith(("http://", "https://")):
        return fetch(url, MOST_BYTES)
    if ":" in url.partition("/")[0] or url.startswith("//"):
        raise BadRequest("Only HTTP/HTTPS URLs are allowed.", "messages")
    return _read_file(url, f"{place}: {field_name}")


def _read_file(name: str, place: str) -> bytes:
    """A file below ``SAFE_MEDIA_PATH``. Nobody learns whether there is one elsewhere."""
    from llamafactory.api import common

    path, safe = Path(name).resolve(), Path(common.SAFE_MEDIA_PATH).resolve()
    if not common.ALLOW_LOCAL_FILES or not path.is_relative_to(safe) or not path.is_file():
        raise BadRequest(
            f"{place} {name[:200]!r} is neither a data URL, nor an address with http(s)://, nor a file in the server's SAFE_MEDIA_PATH.",
            "messages",
        )
    if path.stat().st_size > MOST_BYTES:
        raise BadRequest(f"The file is larger than {MOST_BYTES >> 20} MiB.", "messages")
    return path.read_bytes()


def _add_image(media: Media, data: bytes) -> None:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(data), formats=_PICTURES)
    except UnidentifiedImageError:
        raise BadRequest(
            f"An image of the conversation cannot be read: it is no {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}.",
            "messages",
        ) from None
    media.pixels += picture.width * picture.height
    if media.pixels > MOST_PIXELS:
        raise BadRequest(f"The pictures have more than {MOST_PIXELS} pixels together.", "messages")
    if data.startswith(b"\xff\xd8") and len(_SCAN.findall(data)) > MOST_SCANS:
        raise BadRequest(f"A JPEG has more than {MOST_SCANS} scans.", "messages")
    media.images.append(picture.convert("RGB"))


def _add_video(media: Media, data: bytes) -> None:
    if not _VIDEO.match(data):
        raise BadRequest("A video of the conversation cannot be read: it is no MP4, MOV, MKV, WebM or AVI.", "messages")
    import av

    file = io.BytesIO(data)
    with av.open(file) as container:
        for stream in container.streams.video:
            if stream.width * stream.height > MOST_PIXELS_OF_A_FRAME:
                raise BadRequest(f"A video's frames have more than {MOST_PIXELS_OF_A_FRAME} pixels.", "messages")
    file.seek(0)
    media.videos.append(file)


def _add_audio(media: Media, data: bytes) -> None:
    if not _SOUND.match(data):
        raise BadRequest("A sound of the conversation cannot be read: it is no MP3, WAV, OGG or FLAC.", "messages")
    media.audios.append(io.BytesIO(data))


_KINDS = {
    "image": _Kind("png|jpg|jpeg|gif|bmp|webp", "IMAGE_PLACEHOLDER", _add_image),
    "video": _Kind("mp4|mkv|avi|mov", "VIDEO_PLACEHOLDER", _add_video),
    "audio": _Kind("mpeg|mp3|wav|ogg", "AUDIO_PLACEHOLDER", _add_audio),
}
