"""PEFT takes our modules by their names; a model of others that is wrapped meanwhile is translated as ever."""

from __future__ import annotations

import pytest
from helpers.foreign_adapters import stock
from packaging.version import Version
from peft import LoraConfig, __version__, get_peft_model

from llamafactory_kt.peft_side.given_names import names_as_given

OLD_NAMES = ["q_proj", "gate_proj", "up_proj", "down_proj"]
"""of transformers 4, in a mixture of experts without any other MLP"""


@pytest.mark.skipif(Version(__version__) < Version("0.19"), reason="this PEFT translates nothing")
def test_only_this_model():
    ours, other = stock(), stock()
    with names_as_given(ours):
        config = get_peft_model(other, LoraConfig(target_modules=OLD_NAMES)).peft_config["default"]
        assert config.target_modules == {"q_proj"} and config.target_parameters == {"gate_up_proj", "down_proj"}
        config = get_peft_model(ours, LoraConfig(target_modules=OLD_NAMES)).peft_config["default"]
        assert config.target_modules == set(OLD_NAMES) and not config.target_parameters
    config = get_peft_model(stock(), LoraConfig(target_modules=OLD_NAMES)).peft_config["default"]
    assert config.target_modules == {"q_proj"}
