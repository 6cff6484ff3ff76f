"""Training a face adapter on photos: prepare data, pair them, learn, judge, keep. `loop` trains any task."""
