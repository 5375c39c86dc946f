"""What can be said of a failure that equals no known mistake: which cases, where, how it grows."""

from refattn.verify.findings.said import findings

__all__ = ["findings"]
