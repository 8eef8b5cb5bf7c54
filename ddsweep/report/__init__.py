"""What the results say: status, plan, summary and single trials, as text. Reads files, never runs anything.

Nothing is imported here, and no module of this folder imports torch, ray or pandas: ``plan`` and
``status`` must answer in under a second, on a login node too.
"""
