"""Every attention as loops over numbers, written from the papers. Imports nothing of refattn.

The loops run on any kind of number: float, complex (for complex-step derivatives), mpmath.mpf (for
many digits) and ``Counted`` (a number that counts the operations made on it). One head at a time:
q, k, v are lists of rows.
"""
