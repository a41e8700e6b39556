"""Defenses that are trained in: each is one function, found by its name.

`options` has what can be set of each and needs no torch, `registry` the functions,
`base` what they are handed and what they give back.
"""
