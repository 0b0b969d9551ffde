"""Artefacts: a quantized program as one folder, safetensors for tensors and JSON for all else.

The folder holds ``manifest.json`` (format, versions, configuration, timesteps, names, checksums),
``tensors.safetensors`` and ``graph.json.gz`` (the graph in torch.export's own schema). Loading never
unpickles, and admits no operator outside a short list.
"""

from tfmq_fx.artefact.load import load
from tfmq_fx.artefact.save import save

__all__ = ["load", "save"]
