"""Looking inside: what a picture takes from the face. Nothing of it is needed to generate or to train."""
