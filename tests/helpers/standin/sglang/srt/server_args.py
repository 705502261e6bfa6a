"""The options of sglang-kt 0.7.2 as recorded in tests/data, changed by STANDIN_DIALECT for other servers."""

import json
import os
from pathlib import Path

RECORDED = Path(__file__).parents[4] / "data" / "sglang-kt-0.7.2.json"
MOE_LORA = {
    "--kt-moe-lora-path": None,
    "--kt-moe-lora-rank": "int",
    "--kt-moe-lora-alpha": "float",
    "--kt-moe-sft-method": None,
}


def _options():
    dialect = os.environ.get("STANDIN_DIALECT", "expert-lora")
    options = json.loads(RECORDED.read_text())["options"]
    if dialect == "plain":
        return [option for option in options if "--kt-" not in option["flags"][0]]
    if dialect in ("moe-lora", "none"):
        options = [
            option for option in options if "lora-path" not in option["flags"][0] or "--kt" not in option["flags"][0]
        ]
    if dialect == "moe-lora":
        for flag, kind in MOE_LORA.items():
            dest = flag[2:].replace("-", "_")
            options.append(
                {"flags": [flag], "dest": dest, "nargs": None, "type": kind, "choices": None, "default": None}
            )
    return options


class ServerArgs:
    @staticmethod
    def add_cli_args(parser):
        for option in _options():
            settings = {"dest": option["dest"], "default": option["default"]}
            if option["nargs"] == 0:
                settings["action"] = "store_true"
            else:
                settings["type"] = {"int": int, "float": float}.get(option["type"], str)
                settings["nargs"] = option["nargs"]
                if option["choices"] is not None:
                    settings["choices"] = [settings["type"](choice) for choice in option["choices"]]
            parser.add_argument(*option["flags"], **settings)
