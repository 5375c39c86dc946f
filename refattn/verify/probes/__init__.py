"""Probes that need no reference: what must hold for a kernel whatever its formula is."""

from refattn.verify.probes.probe import probe

__all__ = ["probe"]
