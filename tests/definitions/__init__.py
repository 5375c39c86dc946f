"""Every attention as loops over numbers, written from the papers. Imports nothing of refattn.

The loops run on any kind of number: float, complex (for complex-step derivatives), mpmath.mpf and
mpmath.mpc (for many digits) and ``Counted`` (which counts the operations made on it). One head at
a time: q, k, v are lists of rows.
"""
