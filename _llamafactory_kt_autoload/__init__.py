"""PyTorch calls :func:`autoload` at the end of ``import torch``, so it must never raise, and must not import anything heavy."""


def autoload() -> None:
    """Register llamafactory_kt's import hooks. On any failure, print one line on stderr and change nothing."""
    try:
        import os

        if os.environ.get("LLAMAFACTORY_KT_DISABLE", "") not in ("", "0"):
            return
        from llamafactory_kt.integration.bootstrap import activate

        activate()
    except BaseException as error:  # an exception here would make `import torch` fail for everyone
        try:
            import sys

            print(f"llamafactory_kt is installed but could not be activated: {error!r}", file=sys.stderr)
        except BaseException:
            pass
