"""Data: from a name or an inline mapping to uint8 tensors, a validation split and a fingerprint.

``files`` resolves the data set of a sweep file and has the user's own data checked by ``survey`` (no torch:
``plan`` uses both), ``sources`` has a module for each kind of files, ``load`` makes `Splits` of what they
read, ``stand_in`` makes small data for missing files, ``weights`` reads weights of networks that ddsweep did
not train, and ``fetch`` is the only place that downloads. Importing this package imports none of them.
"""
