"""Results as text and as a page: status, plan, summary and single trials. Reads files, never runs anything.

Nothing is imported here, and no module of this folder imports torch, ray or pandas: ``plan`` and
``status`` must answer in under a second, on a login node too.
"""
