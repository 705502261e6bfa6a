"""What a request may have the server read: pictures from the public internet and from its own folder, of bounded size; nothing else.

The downloads go to servers on this machine, for which one address of it is declared public."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from helpers.image_text import picture
from llamafactory.api import common

from llamafactory_kt.integration.api.attached import attachments, fetch
from llamafactory_kt.integration.api.attached.attachments import Media, read_media
from llamafactory_kt.integration.api.errors import BadRequest
from llamafactory_kt.integration.api.protocol.messages import Message


def read(url: str, kind: str = "image", media: Media | None = None) -> Media:
    media = media or Media()
    part = Message.model_validate(
        {"role": "user", "content": [{"type": f"{kind}_url", f"{kind}_url": {"url": url}}]}
    ).parts()[0]
    assert read_media(part, "messages[0]", media) == f"<{kind}>"
    return media


def file_of(shown, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    shown.save(file, kind)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.server.server_address[0], self.path))
        target = self.path.removeprefix("/to/")
        if target != self.path:
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        if self.path.startswith("/slow"):
            self.wfile.write(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if self.path == "/slow_body" else b""))
            with contextlib.suppress(OSError):
                for _ in range(40):
                    self.wfile.write(b"X-" if self.path == "/slow_head" else b"x")
                    time.sleep(0.05)
            return
        body = {"/picture": file_of(picture()), "/large": b"x" * 70_000}.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def web(monkeypatch) -> Iterator[SimpleNamespace]:
    """The same port of two addresses of this machine, of which the first counts as public."""
    asked: list[tuple[str, str]] = []
    public = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port = public.server_address[1]
    private = ThreadingHTTPServer(("127.0.0.2", port), Handler)
    stock = fetch.is_public
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1" or stock(address))
    for server in (public, private):
        server.asked = asked
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield SimpleNamespace(
        handler=Handler, public=f"http://127.0.0.1:{port}", private=f"http://127.0.0.2:{port}", port=port, asked=asked
    )
    for server in (public, private):
        server.shutdown()
        server.server_close()


def test_a_picture_from_the_web(web):
    (image,) = read(f"{web.public}/picture").images
    assert image.tobytes() == picture().convert("RGB").tobytes()
    (image,) = read(f"{web.public}/to/{web.public}/picture").images
    assert image.size == picture().size
    for path, reason in (
        ("/none", "status 404"),
        ("/large", "it is no PNG, JPEG, GIF, BMP or WEBP"),
        ("/to/" * 9, "TooManyRedirects|status"),
    ):
        with pytest.raises(BadRequest, match=reason):
            read(web.public + path)
    with pytest.raises(BadRequest, match="larger than 0 MiB"):
        fetch.fetch(f"{web.public}/large", 60_000)


@pytest.mark.parametrize("path", ["/slow_head", "/slow_body"])
def test_a_download_has_a_deadline(web, monkeypatch, path):
    """Also one of which a byte comes now and then."""
    monkeypatch.setattr(fetch, "SECONDS", 0.4)
    with pytest.raises(BadRequest, match="took longer than"):
        read(web.public + path)


@pytest.mark.parametrize(
    "target", ["{private}/picture", "http://169.254.169.254/latest", "file:///etc/passwd", "ftp://127.0.0.1/"]
)
def test_redirects_are_checked_too(web, target):
    with pytest.raises(BadRequest):
        read(f"{web.public}/to/{target.format(private=web.private)}")
    assert [address for address, _ in web.asked] == ["127.0.0.1"], "nothing else was asked"


def test_a_name_is_looked_up_once(web, monkeypatch):
    """A name server may answer the check with a public address, and the download with another one."""
    answers = iter(["127.0.0.1", "127.0.0.2", "127.0.0.2"])

    def look_up(host, port, *args, **keys):
        address = next(answers) if host == "rebinding.example" else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    read(f"http://rebinding.example:{web.port}/picture")
    assert [address for address, _ in web.asked] == ["127.0.0.1"]


def test_a_name_with_a_private_address_among_others(monkeypatch):
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (a, 80)) for a in ("8.8.8.8", "10.0.0.1")]
    )
    with pytest.raises(BadRequest, match="private or reserved"):
        read("http://both.example/picture")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "[::]", "10.0.0.1",
     "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "[fe80::1]", "[fd00::1]", "224.0.0.1", "user@127.0.0.1",
     "8.8.8.8@127.0.0.1", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "192.0.0.8",
     "[::127.0.0.1]", "[::ffff:0:127.0.0.1]", "[64:ff9b:1::7f00:1]", "[3fff::1]", "[5f00::1]", "[fec0::1]", "[::ffff:192.0.0.8]"],
)  # fmt: skip
def test_private_addresses(host):
    with pytest.raises(BadRequest, match=r"private or reserved|Could not resolve|InvalidURL"):
        read(f"http://{host}:1/picture.png")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/etc/passwd", "/etc/none", "../../etc/passwd", "ftp://x/y", "gopher://x", "x",
                                 "\x00", "//127.0.0.1/x", "DATA:image/png;base64,AAAA", "x" * 5000])  # fmt: skip
def test_no_other_files(url):
    """An answer does not tell whether a file exists."""
    with pytest.raises(
        BadRequest, match=r"Only HTTP/HTTPS URLs are allowed|is neither a data URL|cannot be read: (ValueError|OSError)"
    ):
        read(url)


def test_the_servers_own_pictures(tmp_path, monkeypatch):
    for name in ("safe", "safe_not"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(file_of(picture()))
    (tmp_path / "safe" / "out.png").symlink_to(tmp_path / "safe_not" / "a.png")
    monkeypatch.setattr(common, "SAFE_MEDIA_PATH", str(tmp_path / "safe"))
    assert read(str(tmp_path / "safe" / "a.png")).images[0].size == picture().size
    for path in ("safe_not/a.png", "safe/out.png", "safe/../safe_not/a.png", "safe", "safe/none.png"):
        with pytest.raises(BadRequest, match="is neither a data URL, nor an address"):
            read(str(tmp_path / path))
    monkeypatch.setattr(common, "ALLOW_LOCAL_FILES", False)
    with pytest.raises(BadRequest, match="is neither a data URL, nor an address"):
        read(str(tmp_path / "safe" / "a.png"))


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bomb(12_000, 12_000), "more than 89478485 pixels"),
        (bomb(2**31 - 1, 2**31 - 1), "cannot be read: DecompressionBombError"),
        (bomb(0, 1), "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is no PNG, JPEG, GIF, BMP or WEBP"),
        (
            b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
            "it is no PNG, JPEG, GIF, BMP or WEBP",
        ),
        (file_of(picture(), "TIFF"), "it is no PNG, JPEG, GIF, BMP or WEBP"),
        (b"", "has no url|begins with|cannot be read"),
    ],
)
def test_hostile_pictures(data, reason):
    with pytest.raises(BadRequest, match=reason):
        read(data_url(data))


def test_many_small_pictures(monkeypatch):
    monkeypatch.setattr(attachments, "MOST_FILES", 2)
    media = Media()
    for _ in range(2):
        read(data_url(file_of(picture())), media=media)
    with pytest.raises(BadRequest, match="more than 2 images, videos and audios"):
        read(data_url(file_of(picture())), media=media)


def test_many_large_pictures(monkeypatch):
    monkeypatch.setattr(attachments, "MOST_PIXELS", 3 * picture().width * picture().height)
    media = Media()
    for _ in range(3):
        read(data_url(file_of(picture())), media=media)
    with pytest.raises(BadRequest, match="pixels together"):
        read(data_url(file_of(picture())), media=media)
    monkeypatch.setattr(attachments, "MOST_BYTES", 100)
    with pytest.raises(BadRequest, match="larger than 0 MiB"):
        read(data_url(file_of(picture())))


@pytest.mark.parametrize("kind", ["video/mp4", "audio/wav"])
@pytest.mark.parametrize(
    "playlist", [b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n", b"AAAA"]
)
def test_playlists_are_no_videos(kind, playlist):
    with pytest.raises(BadRequest, match="of the conversation cannot be read: it is no"):
        read(data_url(playlist, kind), kind.partition("/")[0])


def test_sounds_as_openai_sends_them():
    sound = b"RIFF\0\0\0\0WAVEfmt "
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode(), "format": "wav"}}
    (given,) = Message.model_validate({"role": "user", "content": [part]}).parts()
    media = Media()
    assert read_media(given, "messages[0]", media) == "<audio>" and media.audios[0].read() == sound


@pytest.mark.parametrize("url", ["data:image/png;base64,A", "data:image/png;base64,=", "data:image/png;base64,AA AA", "data:image/png,AAAA",
                                 "data:image/png;base64,", "data:;base64,AAAA", "data:text/html;base64,AAAA"])  # fmt: skip
def test_data_urls(url):
    with pytest.raises(BadRequest, match=r"cannot be read|begins with|has no url"):
        read(url)
