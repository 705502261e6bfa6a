"""Where an estimate's model is described: in a local folder, in a ``config.json`` alone, or on a hub, from which that one file is fetched."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from ...ground.errors import KTPathError, one_line

CONFIG = "config.json"
_MODELSCOPE = "https://modelscope.cn"


def find_configuration(model: str) -> Path:
    """A local folder or file as it is; of a hub's model, the local copy of its ``config.json``.

    Args:
        model: a folder, a ``config.json`` under any name, or a name on the hub: ModelScope's with ``USE_MODELSCOPE_HUB=1``, as
            LLaMA-Factory has it, else that of ``HF_ENDPOINT``.

    Raises:
        KTPathError: There is no such model, or the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise KTPathError(f"{path} holds no {CONFIG}, which says what the model is. Give the model's own folder.")
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise KTPathError(f"{path} is neither a folder nor a file, and no name on a hub either. Correct the path.")
    try:
        return _fetch(model)
    except Exception as error:  # of the hubs' libraries, which have many
        raise KTPathError(
            f"{model} is no local folder, and its {CONFIG} could not be fetched from the hub: {one_line(error).rstrip('.')}. Check the name "
            f"and the network (HF_ENDPOINT names a mirror, USE_MODELSCOPE_HUB=1 takes ModelScope), or give a {CONFIG} that you have."
        ) from error


def _fetch(name: str) -> Path:
    if os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "y"):
        from modelscope.hub.file_download import model_file_download

        _check_network(os.environ.get("MODELSCOPE_DOMAIN") or _MODELSCOPE)
        return Path(model_file_download(name, CONFIG))
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    if isinstance(kept := try_to_load_from_cache(name, CONFIG), str):
        return Path(kept)
    _check_network(constants.ENDPOINT)
    return Path(hf_hub_download(name, CONFIG))


def _check_network(address: str) -> None:
    """Fail at once where the hub has no address: the libraries would try again for half a minute."""
    host = urlsplit(address if "//" in address else f"//{address}").hostname
    if host is not None and not getproxies():
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise ConnectionError(f"{host}: {error.strerror or error}") from error
