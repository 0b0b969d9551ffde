"""The pipelines of ``pipeline_matrix.py``, by family."""

from .image_unets import ROWS as IMAGE_UNETS

__all__ = ["ROWS"]

ROWS = (*IMAGE_UNETS,)
