"""What is in the way of a chat with KT experts on this machine, in this environment, with this configuration.

Every library is imported inside the check that needs it, so that a missing or broken one is a finding and not the end.
"""

from .diagnosis import diagnose
from .finding import Finding, Status

__all__ = ["Finding", "Status", "diagnose"]
