"""Files of a sweep: schemas, atomic parts, tensors and pictures, the lock, and the reader.

Nothing is imported here, so that ``plan`` and ``status`` pay only for what they use.
"""
