"""Router statistics in LLaMA-Factory's chat in the terminal: ``/experts``. The web pages have tests of their own."""

from __future__ import annotations

from helpers.chats import PROMPTS, answers, chat, config


def test_experts_in_the_terminal(tmp_path, demo):
    lines = [PROMPTS[2], "/experts", PROMPTS[3], " /experts", "exit"]
    result = chat(config(tmp_path, demo, kt_backend="torch", kt_router_stats=True), lines)
    assert result.returncode == 0, result.stderr
    assert len(answers(result)) == 2, "the command is no question to the model"
    counted = [int(part.split(" tokens")[0]) for part in result.stdout.split("Experts: ")[1:]]
    assert len(counted) == 2 and counted[1] > counted[0] > 10
    assert "busiest experts" in result.stdout


def test_experts_without_counting(tmp_path, demo):
    """It says how to count. Without use_kt it is a message like any other."""
    result = chat(config(tmp_path, demo, kt_backend="torch"), ["/experts", "exit"])
    assert "set kt_router_stats: true in the YAML" in result.stdout and not answers(result)
    keys = {"use_kt": None, "kt_backend": None, "kt_num_threads": None, "kt_tp_enabled": None}
    result = chat(config(tmp_path, demo, **keys, max_new_tokens=4), ["/experts", "exit"])
    assert len(answers(result)) == 1, result.stderr
