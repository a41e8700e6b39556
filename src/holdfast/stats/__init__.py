"""Statistics: intervals that respect clusters, rates, pairs, agreement, ranking.

Tensors in, small frozen results out. Nothing here loads a model, opens a file, prints,
or touches a global seed.
"""
