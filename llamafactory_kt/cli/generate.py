"""``llamafactory-kt generate``: a file of prompts answered in batches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..integration.prompts import Prompt
    from ..tools.experiments.answers import AnswerFile


def generate(
    config: Path = typer.Argument(..., help="LLaMA-Factory inference YAML."),
    overrides: list[str] = typer.Argument(None, help="key=value, in place of the YAML's values.", show_default=False),
    input: Path = typer.Option(..., help="Prompts, .jsonl or .json: alpaca, sharegpt or openai form."),
    output: Path = typer.Option(..., help="Answers, .jsonl; what is there from an earlier run is kept."),
    batch_size: int = typer.Option(8, help="Prompts computed together."),
    seed: int = typer.Option(None, help="Seed of sampling.", show_default=False),
    overwrite: bool = typer.Option(False, "--overwrite", help="Answer everything anew."),
) -> None:
    """Answer prompts with the YAML's model, adapter, template and sampling keys; a run that was stopped is continued."""
    from ..ground.errors import KTConfigError
    from ..integration.chat_config import read_yaml
    from ..integration.prompts import read_prompts
    from ..tools.experiments.answers import AnswerFile

    if batch_size < 1:
        raise KTConfigError(f"--batch-size must be at least 1, found {batch_size}.")
    keys = read_yaml(config, overrides or [])
    prompts = read_prompts(input)
    answers = AnswerFile(output, prompts, {**keys, "seed": seed}, overwrite)
    kept = len(answers.lines)
    todo = [prompt for prompt in prompts if prompt.index not in answers.lines]
    failed = 0
    if todo:
        failed = _run(keys, todo, answers, batch_size, seed)
        answers.sort()
    typer.echo(
        f"{output}: {len(prompts) - failed} of {len(prompts)} prompts answered ({kept} were there), {failed} failed."
    )
    if failed:
        raise typer.Exit(1)


def _run(keys: dict[str, Any], todo: list[Prompt], answers: AnswerFile, batch_size: int, seed: int | None) -> int:
    """Answer what is missing, with a progress bar; returns how many failed."""
    from tqdm import tqdm

    from ..integration.chat import LoadedChat
    from ..tools.experiments.generating import answer_all

    failed = tokens = 0
    chat = LoadedChat.load(keys)
    with tqdm(total=len(todo), unit="prompt", desc="Generating") as bar:
        for batch in answer_all(chat, todo, batch_size=batch_size, seed=seed):
            answers.add(batch)
            for answer in batch:
                tokens += answer.answer_tokens
                if answer.error:
                    failed += 1
                    bar.write(f"prompt {answer.index}: {answer.error}")
            bar.update(len(batch))
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.1f} tokens/s", refresh=False)
    return failed
