"""Do the experts in the engine compute what the checkpoint and the adapter say? Checked layer by layer on a loaded model."""

from .layers import LayerResult, verify_layers
from .states import Inputs, record_inputs

__all__ = ["Inputs", "LayerResult", "record_inputs", "verify_layers"]
