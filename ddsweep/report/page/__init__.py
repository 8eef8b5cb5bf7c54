"""``ddsweep report``: one self-contained page, and figures and tables for papers, from the tables alone.

`gather` reads, each module of `sections` answers one question, `write` puts the page together. Nothing here
imports torch or ray.
"""
