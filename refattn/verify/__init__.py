"""Hold a kernel, or an exercise's answer, against refattn, and be told what is wrong with it."""

from refattn.verify.certain import truth, truth_vjp
from refattn.verify.check import check, check_answer
from refattn.verify.features import check_features
from refattn.verify.like import Convention
from refattn.verify.probes import probe
from refattn.verify.report import Report

__all__ = [
    "Convention",
    "Report",
    "check",
    "check_answer",
    "check_features",
    "probe",
    "truth",
    "truth_vjp",
]
