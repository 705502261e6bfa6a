"""What PyTorch calls at the end of ``import torch``. It must never raise and import nothing heavy."""


def autoload() -> None:
    """Register llamafactory_kt's import hooks; on any failure warn once and leave everything alone."""
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
