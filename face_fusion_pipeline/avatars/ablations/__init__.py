"""The reviewers' questions: variants of the method, trained alike, measured on avatars that no training saw."""
