import pytest

pytest.register_assert_rewrite(f"{__name__}.chats", f"{__name__}.pages")
