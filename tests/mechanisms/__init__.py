"""One file a mechanism: its attentions as ``MECHANISMS``, a list of ``cases.Mechanism``."""
