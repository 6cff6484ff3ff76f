"""How faces were built and painted in the first world, which the weights in `embedded/` were trained on.

What both worlds share is in `avatars`. Kept as it was, to be deleted with those weights.
"""
