"""adapter_config.json."""

from __future__ import annotations

import pytest
from helpers.expert_tensors import broken

from llamafactory_kt.adapters import open_adapter
from llamafactory_kt.ground.errors import KTAdapterError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing: rank and lora_alpha"),
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, found list"),
        ('{"peft_type": "LOHA"}', "peft_type must be LORA"),
        ('{"r": 0}', "r: should be greater than or equal to 1, found 0"),
        (
            '{"lora_alpha": "x", "rank_pattern": [1]}',
            "lora_alpha: should be a valid number, found 'x', rank_pattern: should be a valid dictionary, found [1]",
        ),
    ],
)
def test_broken_config(tmp_path, text, message):
    directory = broken(tmp_path)
    (directory / "adapter_config.json").unlink()
    if text is not None:
        (directory / "adapter_config.json").write_text(text)
    with pytest.raises(KTAdapterError) as error:
        open_adapter(directory)
    assert message in str(error.value)
