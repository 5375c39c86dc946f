"""Vectors: stored cases with inputs, options, right outputs, and how far off a kernel may be.

``load`` gives those that come with refattn, or those of a folder that ``python -m refattn vectors``
wrote; docs/vectors.md says how to read them without refattn.
"""

from refattn.verify.vectors.case import Case
from refattn.verify.vectors.files import free, load, write
from refattn.verify.vectors.made import counted, made

__all__ = ["Case", "counted", "free", "load", "made", "write"]
