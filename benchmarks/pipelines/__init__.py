"""The pipelines of ``pipeline_matrix.py``, by family."""

from .conditioned_unets import ROWS as CONDITIONED_UNETS
from .image_transformers import ROWS as IMAGE_TRANSFORMERS
from .image_unets import ROWS as IMAGE_UNETS
from .image_unets_sdxl import ROWS as IMAGE_UNETS_SDXL
from .more_image_transformers import ROWS as MORE_IMAGE_TRANSFORMERS
from .more_video import ROWS as MORE_VIDEO
from .other_unets import ROWS as OTHER_UNETS
from .pixels_and_sound import ROWS as PIXELS_AND_SOUND
from .recent_video import ROWS as RECENT_VIDEO
from .sound_unets import ROWS as SOUND_UNETS
from .video import ROWS as VIDEO

__all__ = ["ROWS"]

ROWS = (
    *IMAGE_UNETS,
    *IMAGE_UNETS_SDXL,
    *CONDITIONED_UNETS,
    *OTHER_UNETS,
    *IMAGE_TRANSFORMERS,
    *MORE_IMAGE_TRANSFORMERS,
    *VIDEO,
    *MORE_VIDEO,
    *RECENT_VIDEO,
    *PIXELS_AND_SOUND,
    *SOUND_UNETS,
)
