"""Import torchao and diffusers once without their notices about GPU kernels that this machine lacks.

Logging is as before afterwards; only what these imports say about themselves is left out.
"""

from __future__ import annotations

import logging

_disabled = logging.root.manager.disable
logging.disable(logging.WARNING)
try:
    import diffusers.models.modeling_utils  # noqa: F401
    import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401
finally:
    logging.disable(_disabled)
