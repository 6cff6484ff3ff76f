"""Photos and identity files to identities, for the users of one pipeline."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..conditioner import mode_by
from ..face_detectors import Face, FaceDetector, load_detector
from ..face_errors import FaceFusionError, NoFaceError, SeveralFacesError
from ..face_identity import FaceIdentity, check_identity_fits
from ..face_images import detect_faces
from ..face_layout import Box
from ..generation.photos import FacePhoto, locate_face
from ..generation.references import reference_crops
from ..unet_family import unet_fingerprint
from .form import WHOLE_PHOTO, FieldError, PersonForm, in_field


class OneAtATime:
    """A face detector that looks for one thread after the other: those of OpenCV keep state while they look."""

    def __init__(self, detector: FaceDetector) -> None:
        self._detector, self._lock = detector, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._detector, name)

    def detect(self, image: Image.Image) -> list[Face]:
        """See `FaceDetector.detect`."""
        with self._lock:
            return self._detector.detect(image)


class PeopleEngine:
    """A pipeline and a face detector that make identities, for any number of threads.

    Args:
        pipe: [`StableDiffusionFaceFusionPipeline`].
        detector: see `face_detectors.load_detector`.
    """

    def __init__(self, pipe: Any, detector: FaceDetector | None = None) -> None:
        self.pipe, self.detector = pipe, OneAtATime(detector or load_detector())
        self._unet_lock = threading.Lock()

    def photos(self, person: PersonForm) -> Iterator[FacePhoto]:
        """The face that is meant in each photo, one after another: a photo may take much memory.

        Raises [`FieldError`] of the person, at the end, with a line for each photo that does not do.
        """
        bad = []
        for file in person.photos:
            try:
                yield self._photo(person, file)
            except FieldError as error:
                bad.append(str(error))
        if bad:
            raise FieldError(person.field, "\n".join(bad))

    def _photo(self, person: PersonForm, file: Path) -> FacePhoto:
        try:
            detector = None if person.which == WHOLE_PHOTO else self.detector
            return locate_face(file, detector, person.face_index, name="the image")
        except SeveralFacesError as error:
            message = "several faces are in it, and none is far larger: say which under “Which face”"
            raise FieldError(person.field, f"{file.name}: {message}") from error
        except NoFaceError as error:
            message = "no such face" if person.face_index is not None else "no face"
            way_out = f"take one that shows it larger, sharper or more frontal, or choose “{WHOLE_PHOTO}”"
            raise FieldError(person.field, f"{file.name}: {message} found in this photo: {way_out}") from error
        except FaceFusionError as error:
            raise FieldError(person.field, f"{file.name}: {error}") from error

    def identity(self, person: PersonForm) -> tuple[list[Image.Image], FaceIdentity]:
        """The face crops of a person (none of a saved identity) and the identity. Raises [`FieldError`]."""
        crops = self.crops(person)
        return crops, self.identities((person,), [crops])[0]

    def crops(self, person: PersonForm) -> list[Image.Image]:
        """The face crops of a person, none of a saved identity. Raises [`FieldError`]."""
        photos = () if person.identity is not None else self.photos(person)
        return [crop for photo in photos for crop in reference_crops(self.pipe, [photo])]

    def identities(
        self, people: Sequence[PersonForm], crops: Sequence[list[Image.Image]], mode: str | None = None
    ) -> list[FaceIdentity]:
        """Identities of people who are seen together, of saved ones and of [`crops`].

        Args:
            mode: see `FaceFusionMixin.encode_face`.

        Raises [`FieldError`]: the mode is not that of a saved identity, or needs weights that are not loaded.
        """
        faces: list[Any] = [person.identity or mine for person, mine in zip(people, crops, strict=True)]
        if all(person.identity is not None for person in people) and mode is None:
            return faces
        mode = mode_by(self.pipe, "face-fusion", mode)  # FaceStudio, where it is loaded, brings the style alone
        with self._unet_lock:
            return in_field("mode", self.pipe.encode_people, faces, mode)

    def load_identity(self, file: Path) -> FaceIdentity:
        """A saved identity. Raises [`FaceFusionError`]: not one, or made with another model."""
        try:
            identity = FaceIdentity.load(file)
        except FaceFusionError as error:  # its message may name the path on this machine
            raise FaceFusionError(
                f"this is no identity that can be read: {str(error).replace(str(file), 'it')}"
            ) from None
        adapter = self.pipe._adapter_fingerprint()
        if identity.needs_adapter and not adapter:
            raise FaceFusionError("this identity needs the adapter it was made with: start the app with --adapter")
        identity.check(unet_fingerprint(self.pipe.unet), adapter)
        check_identity_fits(identity, self.pipe.unet, self.pipe._face_adapter)
        return identity

    def find_boxes(self, picture: Image.Image) -> list[Box]:
        """Boxes XYXY in pixels of all faces of a picture, from left to right."""
        return [face.box for face in detect_faces(picture, self.detector)]
