"""The table of ``bench --quality``."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .results import QualityReport


def show(report: QualityReport, console: Console) -> None:
    """Print a column for each configuration, and what it was compared with."""
    rows = report.rows
    table = Table("", *(escape(row.name) for row in rows), title="Quality against float32", title_justify="left")
    for title, cells in {
        "experts computed by": (escape(row.engine) for row in rows),
        "mean KLD": (f"{row.mean_kld:.5f} ± {row.mean_kld_error:.5f}" for row in rows),
        "  median": (f"{row.median_kld:.5f}" for row in rows),
        "  90 %": (f"{row.kld_90:.5f}" for row in rows),
        "  99 %": (f"{row.kld_99:.5f}" for row in rows),
        "  maximum": (f"{row.max_kld:.5f}" for row in rows),
        "same top p": (f"{100 * row.same_top:.2f} ± {100 * row.same_top_error:.2f} %" for row in rows),
        "perplexity": (f"{row.perplexity:.3f}" for row in rows),
        "  over float32's": (f"{row.perplexity_ratio:.4f}" for row in rows),
    }.items():
        table.add_row(title, *cells)
    console.print(table)
    console.print(
        f"{report.predicted} tokens of {escape(report.text)}: the second halves of {report.chunks} chunks of {report.context}. "
        "float32 is the same model and adapter, computed in float32 from the checkpoint's weights "
        f"(experts by {escape(report.reference)}); its perplexity is {report.perplexity:.3f}. KLD is KL(float32 ‖ this) of the "
        "next-token distributions, in nats; ± is the standard error.",
        highlight=False,
    )
