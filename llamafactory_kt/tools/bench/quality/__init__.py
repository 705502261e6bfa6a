"""``llamafactory-kt bench --quality``: what a configuration's precision costs, in its next-token distributions on a text."""

from .results import QualityReport, QualityResult
from .run import Text, measure_quality

__all__ = ["QualityReport", "QualityResult", "Text", "measure_quality"]
