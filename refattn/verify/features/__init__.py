"""Random features held against what they should be, by statistics of many draws."""

from refattn.verify.features.check import check_features

__all__ = ["check_features"]
