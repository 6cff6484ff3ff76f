"""The error of everything that trains."""

from ..face_errors import FaceFusionError


class TrainingError(FaceFusionError):
    """Training cannot start or go on; the message says why and what to change."""
