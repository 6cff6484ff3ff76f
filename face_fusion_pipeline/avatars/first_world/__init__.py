"""How faces were built and painted in the first world, which the weights in `embedded/` were trained on.

Kept as it was, to be deleted with those weights; everything else is shared with the second world.
"""
