"""Artefacts: a quantized program as one folder, safetensors for tensors and JSON for all else.

The folder holds ``manifest.json`` (format, versions, configuration, timesteps, names, sizes and checksums),
``tensors.safetensors`` and ``graph.json.gz`` (the graph in torch.export's own schema). An artefact is data: loading
one never unpickles, imports or runs what it names, and admits no operator outside a list.
"""
