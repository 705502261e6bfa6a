"""``llamafactory-kt doctor``: what prevents a chat with KT experts on this machine, in this environment, with this YAML.

Each check imports the libraries that it needs, so a missing or broken one becomes a finding.
"""

from .diagnosis import diagnose
from .finding import Finding, Status

__all__ = ["Finding", "Status", "diagnose"]
